# May import: standard library, numpy, refswitch.kernels.cpu (bfloat16, functions, jit, matmul).
"""Experts: one feed-forward network per expert over the rows of its kept tokens; no row is padding.

Paper: 2.1, 2.4 (expert dropout), 5.2. Spec: S-EXPERT-1, S-EXPERT-2, S-BACK-3, S-BACK-4. Next: `losses`.

A thread owns a run of rows, whichever experts they belong to; of a weight's gradient, rows of its matrix. So a sum is never shared. With ReLU
and no second branch hidden tells the slope, and no pre-activation is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.kernels.cpu.bfloat16 import round_row, round_rows
from refswitch.kernels.cpu.functions import RELU, ZERO, activate, activation_slope
from refswitch.kernels.cpu.jit import kernel
from refswitch.kernels.cpu.matmul import matmul_in
from refswitch.kernels.cpu.tile import TILE_ROWS

ROWS_OF_AN_EXPERT = 64  # what reading or writing an expert's weights costs beside its rows, in rows; decides who does what, not what is computed


class Experts(NamedTuple):
    """Parameters of all experts, or their gradients. What the layer does not have has no elements."""

    w_in_EDF: np.ndarray
    w_gate_EDF: np.ndarray
    w_out_EFD: np.ndarray
    b_in_EF: np.ndarray
    b_gate_EF: np.ndarray
    b_out_ED: np.ndarray


class Form(NamedTuple):
    """What is computed and rounded, as numbers that kernels read."""

    activation: int
    is_gated: bool
    has_bias: bool
    rounds_z: bool  # R6
    rounds_hidden: bool  # R7
    rounds_expert_out: bool  # R8
    rounds_out: bool  # R9
    rounds_gradients: bool  # R10


@kernel
def add_bias_rows(z_NF: np.ndarray, b_F: np.ndarray, has_bias: bool, is_rounded: bool) -> None:
    """Finish pre-activations or outputs in place."""
    if has_bias:
        for n in range(z_NF.shape[0]):
            row_F = z_NF[n]
            for f in range(b_F.size):
                row_F[f] += b_F[f]
    if is_rounded:
        round_rows(z_NF)


@kernel
def hidden_rows(hidden_NF: np.ndarray, z_act_NF: np.ndarray, z_linear_NF: np.ndarray, mask_TF: np.ndarray, token_N: np.ndarray, form: Form) -> None:
    """Write act(z_act) * z_linear * mask, each factor where there is one; hidden may be z_act."""
    for n in range(hidden_NF.shape[0]):
        row_F = hidden_NF[n]
        activate(row_F, z_act_NF[n], form.activation)
        if form.is_gated:
            linear_F = z_linear_NF[n]
            for f in range(row_F.size):
                row_F[f] *= linear_F[f]
        if mask_TF.size > 0:
            mask_F = mask_TF[token_N[n]]
            for f in range(row_F.size):
                row_F[f] *= mask_F[f]
        if form.rounds_hidden:
            round_row(row_F, row_F)


@kernel
def experts_forward(
    expert_out_ND: np.ndarray, hidden_NF: np.ndarray, z_act_NF: np.ndarray, z_linear_NF: np.ndarray, packed_ND: np.ndarray, token_N: np.ndarray,
    mask_TF: np.ndarray, start_E: np.ndarray, experts: Experts, form: Form, first: int, last: int, panels: np.ndarray,
) -> None:  # fmt: skip
    """Run rows `first` to `last` through their experts. Reads an expert's weights once; a row's bits depend on the row alone."""
    for e in range(start_E.size - 1):
        rows = slice(max(first, start_E[e]), min(last, start_E[e + 1]))
        if rows.stop <= rows.start:
            continue
        packed_MD, hidden_MF = packed_ND[rows], hidden_NF[rows]
        if form.is_gated:
            matmul_in(panels, z_act_NF[rows], packed_MD, experts.w_gate_EDF[e], False)
            add_bias_rows(z_act_NF[rows], experts.b_gate_EF[e], form.has_bias, form.rounds_z)
            matmul_in(panels, z_linear_NF[rows], packed_MD, experts.w_in_EDF[e], False)
            add_bias_rows(z_linear_NF[rows], experts.b_in_EF[e], form.has_bias, form.rounds_z)
        else:
            matmul_in(panels, z_act_NF[rows], packed_MD, experts.w_in_EDF[e], False)
            add_bias_rows(z_act_NF[rows], experts.b_in_EF[e], form.has_bias, form.rounds_z)
        hidden_rows(hidden_MF, z_act_NF[rows], z_linear_NF[rows] if form.is_gated else z_linear_NF, mask_TF, token_N[rows], form)
        matmul_in(panels, expert_out_ND[rows], hidden_MF, experts.w_out_EFD[e], False)
        add_bias_rows(expert_out_ND[rows], experts.b_out_ED[e], form.has_bias, form.rounds_expert_out)


@kernel
def dz_rows(
    dz_act_NF: np.ndarray, dz_linear_NF: np.ndarray, hidden_NF: np.ndarray, z_act_NF: np.ndarray, z_linear_NF: np.ndarray, mask_TF: np.ndarray,
    token_N: np.ndarray, form: Form, slope_F: np.ndarray, acted_F: np.ndarray,
) -> None:  # fmt: skip
    """Undo `hidden_rows`: dz_act holds the gradient of hidden and is replaced by that of the pre-activation."""
    for n in range(dz_act_NF.shape[0]):
        row_F = dz_act_NF[n]
        if mask_TF.size > 0:
            mask_F = mask_TF[token_N[n]]
            for f in range(row_F.size):
                row_F[f] *= mask_F[f]
        if form.is_gated:
            activate(acted_F, z_act_NF[n], form.activation)
            activation_slope(slope_F, z_act_NF[n], form.activation)
            linear_F, dlinear_F = z_linear_NF[n], dz_linear_NF[n]
            for f in range(row_F.size):
                dlinear_F[f] = row_F[f] * acted_F[f]
                row_F[f] = row_F[f] * linear_F[f] * slope_F[f]
        elif form.activation == RELU:
            hidden_F = hidden_NF[n]
            for f in range(row_F.size):
                row_F[f] = row_F[f] if hidden_F[f] != ZERO else ZERO
        else:
            activation_slope(slope_F, z_act_NF[n], form.activation)
            for f in range(row_F.size):
                row_F[f] *= slope_F[f]


@kernel
def experts_backward_rows(
    dpacked_ND: np.ndarray, dz_act_NF: np.ndarray, dz_linear_NF: np.ndarray, dexpert_out_ND: np.ndarray, hidden_NF: np.ndarray,
    z_act_NF: np.ndarray, z_linear_NF: np.ndarray, token_N: np.ndarray, mask_TF: np.ndarray, start_E: np.ndarray, experts: Experts, form: Form,
    first: int, last: int, panels: np.ndarray,
) -> None:  # fmt: skip
    """Undo `experts_forward` for the rows' own gradients. Reads an expert's weights once; a row's bits depend on the row alone."""
    F = hidden_NF.shape[1]
    slope_F, acted_F = np.empty(F, np.float32), np.empty(F, np.float32)
    for e in range(start_E.size - 1):
        rows = slice(max(first, start_E[e]), min(last, start_E[e + 1]))
        if rows.stop <= rows.start:
            continue
        branches = rows if form.is_gated else slice(0, 0)
        kept_z = slice(0, 0) if form.activation == RELU and not form.is_gated else rows
        dz_act_MF, dz_linear_MF = dz_act_NF[rows], dz_linear_NF[branches]
        matmul_in(panels, dz_act_MF, dexpert_out_ND[rows], experts.w_out_EFD[e].T, False)
        dz_rows(
            dz_act_MF, dz_linear_MF, hidden_NF[rows], z_act_NF[kept_z], z_linear_NF[branches], mask_TF, token_N[rows], form, slope_F, acted_F
        )  # fmt: skip
        if form.is_gated:
            matmul_in(panels, dpacked_ND[rows], dz_linear_MF, experts.w_in_EDF[e].T, False)
            matmul_in(panels, dpacked_ND[rows], dz_act_MF, experts.w_gate_EDF[e].T, True)
        else:
            matmul_in(panels, dpacked_ND[rows], dz_act_MF, experts.w_in_EDF[e].T, False)


@kernel
def rows_of_share(rows: int, before: int, cost: int, low: int, high: int) -> tuple[int, int]:
    """Return the rows of a matrix that lie between `low` and `high` on the line of all work; it begins at `before` and is `cost` long."""
    first = 0 if low <= before else min(rows, rows * (low - before) // cost // TILE_ROWS * TILE_ROWS)
    last = rows if high >= before + cost else max(0, rows * (high - before) // cost // TILE_ROWS * TILE_ROWS)
    return (first, last) if low < before + cost and high > before else (0, 0)


@kernel
def weight_part(dw_IO: np.ndarray, left_NI: np.ndarray, right_NO: np.ndarray, first: int, last: int, is_rounded: bool, panels: np.ndarray) -> None:
    """Write rows `first` to `last` of left^T right, zero where there are no tokens."""
    if last > first:
        matmul_in(panels, dw_IO[first:last], left_NI[:, first:last].T, right_NO, False)
        if is_rounded:
            round_rows(dw_IO[first:last])


@kernel
def experts_weights_part(
    dexperts: Experts, packed_ND: np.ndarray, dz_act_NF: np.ndarray, dz_linear_NF: np.ndarray, hidden_NF: np.ndarray, dexpert_out_ND: np.ndarray,
    start_E: np.ndarray, form: Form, part: int, parts: int, panels: np.ndarray,
) -> None:  # fmt: skip
    """Write this part of the weights' gradients: all weights lie on one line by their work, which is cut into equal parts at whole tiles of rows.

    Writes every element once, and zero for an expert without tokens. A sum runs over the expert's rows in order, whatever the number of parts.
    """
    E, D, F = dexperts.w_in_EDF.shape
    work = (3 if form.is_gated else 2) * (start_E[E] + E * ROWS_OF_AN_EXPERT)
    low, high, before = work * part // parts, work * (part + 1) // parts, 0
    for e in range(E):
        rows = slice(start_E[e], start_E[e + 1])
        branches, cost = rows if form.is_gated else slice(0, 0), rows.stop - rows.start + ROWS_OF_AN_EXPERT
        first, last = rows_of_share(D, before, cost, low, high)
        weight_part(
            dexperts.w_in_EDF[e],
            packed_ND[rows],
            dz_linear_NF[branches] if form.is_gated else dz_act_NF[rows],
            first,
            last,
            form.rounds_gradients,
            panels,
        )
        before += cost
        if form.is_gated:
            first, last = rows_of_share(D, before, cost, low, high)
            weight_part(dexperts.w_gate_EDF[e], packed_ND[rows], dz_act_NF[rows], first, last, form.rounds_gradients, panels)
            before += cost
        first, last = rows_of_share(F, before, cost, low, high)
        weight_part(dexperts.w_out_EFD[e], hidden_NF[rows], dexpert_out_ND[rows], first, last, form.rounds_gradients, panels)
        before += cost


@kernel
def bias_row(db_N: np.ndarray, rows_MN: np.ndarray, is_rounded: bool) -> None:
    """Write the sum of rows, in order."""
    for n in range(db_N.size):
        db_N[n] = ZERO
    for m in range(rows_MN.shape[0]):
        row_N = rows_MN[m]
        for n in range(db_N.size):
            db_N[n] += row_N[n]
    if is_rounded:
        round_row(db_N, db_N)


@kernel
def experts_biases_part(
    dexperts: Experts,
    dz_act_NF: np.ndarray,
    dz_linear_NF: np.ndarray,
    dexpert_out_ND: np.ndarray,
    start_E: np.ndarray,
    form: Form,
    part: int,
    parts: int,
) -> None:
    """Write the biases' gradients of this part's experts; zero for biases that the layer does not have."""
    E = start_E.size - 1
    for e in range(E * part // parts, E * (part + 1) // parts):
        rows = slice(start_E[e], start_E[e + 1]) if form.has_bias else slice(0, 0)
        branches = rows if form.is_gated else slice(0, 0)
        bias_row(dexperts.b_in_EF[e], dz_linear_NF[branches] if form.is_gated else dz_act_NF[rows], form.rounds_gradients)
        bias_row(dexperts.b_gate_EF[e], dz_act_NF[branches], form.rounds_gradients)
        bias_row(dexperts.b_out_ED[e], dexpert_out_ND[rows], form.rounds_gradients)
