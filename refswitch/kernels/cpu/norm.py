# May import: standard library, numpy, numba, refswitch.config, refswitch.kernels.cpu (arrays, bfloat16, functions, jit, workspace).
"""RMSNorm: T5's layer norm, which scales and neither shifts nor subtracts the mean.

Paper: the T5 body. Next: `position`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from refswitch.config import ModelPoints
from refswitch.kernels.cpu.arrays import ROWS, checked, chunks, same_shape
from refswitch.kernels.cpu.bfloat16 import is_narrow, round_row, round_value
from refswitch.kernels.cpu.functions import product
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.workspace import Workspace


class NormSaved(NamedTuple):
    """What the norm's backward needs."""

    x_BLD: np.ndarray
    inverse_T: np.ndarray  # 1 / root mean square


@kernel
def norm_rows(
    out_TD: np.ndarray, inverse_T: np.ndarray, x_TD: np.ndarray, scale_D: np.ndarray, epsilon: float, is_inverse_narrow: bool, is_out_narrow: bool
) -> None:
    """Norm some rows."""
    T, D = x_TD.shape
    for t in range(T):
        inverse = np.float32(1.0 / np.sqrt(np.float64(product(x_TD[t], x_TD[t])) / D + epsilon))
        inverse_T[t] = round_value(inverse) if is_inverse_narrow else inverse
        for d in range(D):
            out_TD[t, d] = x_TD[t, d] * inverse_T[t] * scale_D[d]
        if is_out_narrow:
            round_row(out_TD[t], out_TD[t])


@kernel
def dnorm_rows(
    dx_TD: np.ndarray, dscale_D: np.ndarray, dout_TD: np.ndarray, x_TD: np.ndarray, inverse_T: np.ndarray, scale_D: np.ndarray, narrow: bool
) -> None:
    """Undo the norm of some rows; dscale is these rows' part."""
    T, D = x_TD.shape
    for d in range(D):
        dscale_D[d] = np.float32(0.0)
    dnormed_D = np.empty(D, np.float32)
    for t in range(T):
        inverse = inverse_T[t]
        for d in range(D):
            dscale_D[d] += dout_TD[t, d] * x_TD[t, d] * inverse
        for d in range(D):
            dnormed_D[d] = dout_TD[t, d] * scale_D[d]
        dinverse = product(dnormed_D, x_TD[t])
        dmean = np.float32(np.float64(dinverse) * -0.5 * np.float64(inverse) ** 3 * 2.0 / D)
        for d in range(D):
            dx_TD[t, d] = dnormed_D[d] * inverse + dmean * x_TD[t, d]
        if narrow:
            round_row(dx_TD[t], dx_TD[t])


@parallel_kernel
def norm_kernel(
    out_TD: np.ndarray,
    inverse_T: np.ndarray,
    x_TD: np.ndarray,
    scale_D: np.ndarray,
    epsilon: float,
    is_inverse_narrow: bool,
    is_out_narrow: bool,
    rows: int,
) -> None:
    """Norm every row. Task i owns `rows` rows of the outputs; 8 T D bytes moved; a row depends on no other."""
    for i in prange(chunks(x_TD.shape[0], rows)):
        part = slice(i * rows, min((i + 1) * rows, x_TD.shape[0]))
        norm_rows(out_TD[part], inverse_T[part], x_TD[part], scale_D, epsilon, is_inverse_narrow, is_out_narrow)


@parallel_kernel
def dnorm_kernel(
    dx_TD: np.ndarray,
    dscale_PD: np.ndarray,
    dout_TD: np.ndarray,
    x_TD: np.ndarray,
    inverse_T: np.ndarray,
    scale_D: np.ndarray,
    narrow: bool,
    rows: int,
) -> None:
    """Undo the norm of every row. Task i owns `rows` rows of dx and row i of dscale, which the caller adds in order; 12 T D bytes moved."""
    for i in prange(dscale_PD.shape[0]):
        part = slice(i * rows, min((i + 1) * rows, x_TD.shape[0]))
        dnorm_rows(dx_TD[part], dscale_PD[i], dout_TD[part], x_TD[part], inverse_T[part], scale_D, narrow)


def norm_forward(x_BLD: np.ndarray, scale_D: np.ndarray, epsilon: float, points: ModelPoints, workspace: Workspace) -> tuple[np.ndarray, NormSaved]:
    """Return x / sqrt(mean(x**2) + epsilon) * scale.

    Rounding: R11, R12.
    """
    x_BLD, scale_D = checked("norm_forward", x_BLD=x_BLD, scale_D=scale_D)
    B, L, D = x_BLD.shape
    same_shape("norm_forward", (D,), scale_D=scale_D)
    out_BLD, inverse_T = workspace.take((B, L, D)), workspace.take((B * L,))
    x_TD, out_TD = x_BLD.reshape(-1, D), out_BLD.reshape(-1, D)
    norm_kernel(out_TD, inverse_T, x_TD, scale_D, epsilon, is_narrow(points.statistics), is_narrow(points.activations), ROWS)
    return out_BLD, NormSaved(x_BLD, inverse_T)


def norm_backward(
    dout_BLD: np.ndarray, saved: NormSaved, scale_D: np.ndarray, points: ModelPoints, workspace: Workspace
) -> tuple[np.ndarray, np.ndarray]:
    """Return dx_BLD and dscale_D.

    Rounding: R14.
    """
    dout_BLD, scale_D = checked("norm_backward", dout_BLD=dout_BLD, scale_D=scale_D)
    same_shape("norm_backward", saved.x_BLD.shape, dout_BLD=dout_BLD)
    D = scale_D.size
    dx_BLD, dscale_PD = workspace.take(dout_BLD.shape), np.empty((-(-saved.inverse_T.size // ROWS), D), np.float32)
    x_TD, dx_TD, dout_TD = (x.reshape(-1, D) for x in (saved.x_BLD, dx_BLD, dout_BLD))
    dnorm_kernel(dx_TD, dscale_PD, dout_TD, x_TD, saved.inverse_T, scale_D, is_narrow(points.gradients), ROWS)
    return dx_BLD, dscale_PD.sum(axis=0, dtype=np.float64).astype(np.float32)
