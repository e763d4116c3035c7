# May import: numpy, refswitch.kernels.cpu (bfloat16, functions, jit).
"""Pack and unpack: the token's trip to its expert's row and back, weighed by its gate on the way.

Paper: eq. (7), 5.4. Spec: S-PACK-1, S-DROP-1, S-GATE-1. Next: `experts`. Each takes the rows or tokens of one thread.
"""

from __future__ import annotations

import numpy as np

from refswitch.kernels.cpu.bfloat16 import round_row
from refswitch.kernels.cpu.functions import ZERO, product
from refswitch.kernels.cpu.jit import kernel


@kernel
def copy_row(out_D: np.ndarray, x_D: np.ndarray) -> None:
    """Write a row as it is. (An assignment of slices would compile the formatting of its error message, for seconds.)"""
    for d in range(out_D.size):
        out_D[d] = x_D[d]


@kernel
def zero_row(out_D: np.ndarray) -> None:
    """Write zeros."""
    for d in range(out_D.size):
        out_D[d] = ZERO


@kernel
def pack(packed_ND: np.ndarray, x_TD: np.ndarray, token_N: np.ndarray, zeroed_T: np.ndarray) -> None:
    """Write the rows of kept tokens; a zeroed token's is 0, whatever stands in x."""
    for n in range(token_N.size):
        if zeroed_T[token_N[n]]:
            zero_row(packed_ND[n])
        else:
            copy_row(packed_ND[n], x_TD[token_N[n]])


@kernel
def unpack_weighed(
    out_TD: np.ndarray, expert_out_ND: np.ndarray, gate_T: np.ndarray, b_shared_D: np.ndarray, token_N: np.ndarray, rounds: bool
) -> None:
    """Write gate * expert_out (and the shared bias, where it has elements) of each row to its token."""
    for n in range(token_N.size):
        out_D, row_D, gate = out_TD[token_N[n]], expert_out_ND[n], gate_T[token_N[n]]
        for d in range(out_D.size):
            out_D[d] = gate * row_D[d]
        for d in range(b_shared_D.size):
            out_D[d] += b_shared_D[d]
        if rounds:
            round_row(out_D, out_D)


@kernel
def fill_dropped(out_TD: np.ndarray, row_T: np.ndarray, sits_out_T: np.ndarray, b_shared_D: np.ndarray, first: int, last: int, rounds: bool) -> None:
    """Write the output of tokens without a row: 0, or the shared bias where the token is no padding."""
    for t in range(first, last):
        if row_T[t] < 0:
            zero_row(out_TD[t])
            if b_shared_D.size and not sits_out_T[t]:
                copy_row(out_TD[t], b_shared_D)
                if rounds:
                    round_row(out_TD[t], out_TD[t])


@kernel
def pack_weighed(
    dexpert_out_ND: np.ndarray, dgate_T: np.ndarray, dout_TD: np.ndarray, expert_out_ND: np.ndarray, gate_T: np.ndarray, token_N: np.ndarray
) -> None:
    """Undo `unpack_weighed`: the rows' gradient and the gate's."""
    for n in range(token_N.size):
        t = token_N[n]
        dgate_T[t] = product(dout_TD[t], expert_out_ND[n])
        dout_D, dexpert_out_D, gate = dout_TD[t], dexpert_out_ND[n], gate_T[t]
        for d in range(dout_D.size):
            dexpert_out_D[d] = gate * dout_D[d]


@kernel
def unpack(x_TD: np.ndarray, packed_ND: np.ndarray, token_N: np.ndarray) -> None:
    """Write each row to its token."""
    for n in range(token_N.size):
        copy_row(x_TD[token_N[n]], packed_ND[n])
