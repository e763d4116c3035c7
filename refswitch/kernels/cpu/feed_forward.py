# May import: standard library, numpy, numba, refswitch.config, refswitch.kernels.cpu (arrays, bfloat16, dense, functions, jit, matmul, workspace).
"""Dense feed-forward: what every token passes where a layer is not sparse.

Paper: the T5 body; ReLU in v1.0, gated GELU in v1.1. A task takes some rows through both products, so that what lies between them is activated,
masked and rounded while it is in the core's cache. Next: `cross_entropy`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from refswitch.config import ModelPoints
from refswitch.errors import InputError
from refswitch.kernels.cpu.arrays import checked, chunks, same_shape
from refswitch.kernels.cpu.bfloat16 import is_narrow, round_row, round_rows
from refswitch.kernels.cpu.dense import BLOCK, ROWS, weight_gradient
from refswitch.kernels.cpu.functions import ACTIVATIONS, RELU, activate, activation_slope
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.matmul import matmul
from refswitch.kernels.cpu.workspace import Workspace


class Form(NamedTuple):
    """What a call has, as statics of its kernels."""

    activation: int
    is_gated: bool
    has_factor: bool
    is_narrow: bool
    is_gradient_narrow: bool


class FeedForwardSaved(NamedTuple):
    """What the feed-forward's backward needs."""

    x_BLD: np.ndarray
    z_act_TF: (
        np.ndarray
    )  # pre-activation; under ReLU without a gate `hidden_TF` itself, which is positive where the slope is 1 and the factor is not 0
    z_linear_TF: np.ndarray  # the other branch where gated, else `z_act_TF`, and not read
    factor_TF: np.ndarray
    hidden_TF: np.ndarray  # left operand of dw_out


@kernel
def multiply_row(out: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Write x * y; out may be x."""
    for i in range(out.size):
        out[i] = x[i] * y[i]


@kernel
def feed_forward_rows(
    out_TD: np.ndarray,
    hidden_TF: np.ndarray,
    z_act_TF: np.ndarray,
    z_linear_TF: np.ndarray,
    x_TD: np.ndarray,
    w_act_DF: np.ndarray,
    w_linear_DF: np.ndarray,
    w_out_FD: np.ndarray,
    factor_TF: np.ndarray,
    form: Form,
) -> None:
    """Take some rows through both products."""
    matmul(z_act_TF, x_TD, w_act_DF, False)
    if form.is_narrow:
        round_rows(z_act_TF)
    if form.is_gated:
        matmul(z_linear_TF, x_TD, w_linear_DF, False)
        if form.is_narrow:
            round_rows(z_linear_TF)
    for t in range(x_TD.shape[0]):
        activate(hidden_TF[t], z_act_TF[t], form.activation)
        if form.is_gated:
            multiply_row(hidden_TF[t], hidden_TF[t], z_linear_TF[t])
        if form.has_factor:
            multiply_row(hidden_TF[t], hidden_TF[t], factor_TF[t])
        if form.is_narrow:
            round_row(hidden_TF[t], hidden_TF[t])
    matmul(out_TD, hidden_TF, w_out_FD, False)
    if form.is_narrow:
        round_rows(out_TD)


@kernel
def dfeed_forward_rows(
    dx_TD: np.ndarray,
    dz_act_TF: np.ndarray,
    dz_linear_TF: np.ndarray,
    dout_TD: np.ndarray,
    z_act_TF: np.ndarray,
    z_linear_TF: np.ndarray,
    w_act_DF: np.ndarray,
    w_linear_DF: np.ndarray,
    w_out_FD: np.ndarray,
    factor_TF: np.ndarray,
    form: Form,
) -> None:
    """Take some rows' gradients back through both products."""
    matmul(dz_act_TF, dout_TD, w_out_FD.T, False)
    if form.is_gradient_narrow:
        round_rows(dz_act_TF)
    scratch_F = np.empty(dz_act_TF.shape[1], np.float32)
    for t in range(dx_TD.shape[0]):
        dz_act_F = dz_act_TF[t]  # so far the gradient of the hidden activation
        if form.has_factor:
            multiply_row(dz_act_F, dz_act_F, factor_TF[t])
        if form.is_gated:
            activate(scratch_F, z_act_TF[t], form.activation)
            multiply_row(dz_linear_TF[t], dz_act_F, scratch_F)
            multiply_row(dz_act_F, dz_act_F, z_linear_TF[t])
            if form.is_gradient_narrow:
                round_row(dz_linear_TF[t], dz_linear_TF[t])
        activation_slope(scratch_F, z_act_TF[t], form.activation)
        multiply_row(dz_act_F, dz_act_F, scratch_F)
        if form.is_gradient_narrow:
            round_row(dz_act_F, dz_act_F)
    matmul(dx_TD, dz_act_TF, w_act_DF.T, False)
    if form.is_gated:
        matmul(dx_TD, dz_linear_TF, w_linear_DF.T, True)
    if form.is_gradient_narrow:
        round_rows(dx_TD)


@parallel_kernel
def feed_forward_kernel(
    out_TD: np.ndarray,
    hidden_TF: np.ndarray,
    z_act_TF: np.ndarray,
    z_linear_TF: np.ndarray,
    x_TD: np.ndarray,
    w_act_DF: np.ndarray,
    w_linear_DF: np.ndarray,
    w_out_FD: np.ndarray,
    factor_TF: np.ndarray,
    form: Form,
    rows: int,
) -> None:
    """Take every token through. Task i owns `rows` rows of the outputs; 8 T (D + F) bytes moved, and the matrices per task; no row reads another."""
    for i in prange(chunks(x_TD.shape[0], rows)):
        part = slice(i * rows, min((i + 1) * rows, x_TD.shape[0]))
        factor = factor_TF[part] if form.has_factor else factor_TF
        feed_forward_rows(out_TD[part], hidden_TF[part], z_act_TF[part], z_linear_TF[part], x_TD[part], w_act_DF, w_linear_DF, w_out_FD, factor, form)


@parallel_kernel
def dfeed_forward_kernel(
    dx_TD: np.ndarray,
    dz_act_TF: np.ndarray,
    dz_linear_TF: np.ndarray,
    dout_TD: np.ndarray,
    z_act_TF: np.ndarray,
    z_linear_TF: np.ndarray,
    w_act_DF: np.ndarray,
    w_linear_DF: np.ndarray,
    w_out_FD: np.ndarray,
    factor_TF: np.ndarray,
    form: Form,
    rows: int,
) -> None:
    """Take every token's gradient back. Task i owns `rows` rows of the outputs; 8 T (D + F) bytes moved, and both matrices per task."""
    for i in prange(chunks(dx_TD.shape[0], rows)):
        part = slice(i * rows, min((i + 1) * rows, dx_TD.shape[0]))
        factor = factor_TF[part] if form.has_factor else factor_TF
        dfeed_forward_rows(
            dx_TD[part], dz_act_TF[part], dz_linear_TF[part], dout_TD[part], z_act_TF[part], z_linear_TF[part],
            w_act_DF, w_linear_DF, w_out_FD, factor, form,
        )  # fmt: skip


def _weights(caller: str, params: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the matrix that is activated, the one that is not (the same where there is no gate), and the last."""
    w_in_DF, w_out_FD = checked(caller, w_in_DF=params.w_in_DF, w_out_FD=params.w_out_FD)
    if params.w_gate_DF is None:
        return w_in_DF, w_in_DF, w_out_FD
    (w_gate_DF,) = checked(caller, w_gate_DF=params.w_gate_DF)
    same_shape(caller, w_in_DF.shape, w_gate_DF=w_gate_DF)
    return w_gate_DF, w_in_DF, w_out_FD


def feed_forward_forward(
    x_BLD: np.ndarray, params: Any, factor_BLF: np.ndarray, activation: str, points: ModelPoints, workspace: Workspace
) -> tuple[np.ndarray, FeedForwardSaved]:
    """Return act(x w_in) w_out, or (act(x w_gate) * x w_in) w_out where gated.

    Rounding: R11.
    """
    x_BLD, factor_BLF = checked("feed_forward_forward", x_BLD=x_BLD, factor_BLF=factor_BLF)
    w_act_DF, w_linear_DF, w_out_FD = _weights("feed_forward_forward", params)
    (B, L, D), F, is_gated = x_BLD.shape, w_out_FD.shape[0], params.w_gate_DF is not None
    same_shape("feed_forward_forward", (D, F), w_in_DF=params.w_in_DF)
    has_factor = factor_BLF.shape == (B, L, F)
    if not has_factor and not (factor_BLF.size == 1 and factor_BLF.item() == 1.0):
        raise InputError(f"feed_forward_forward: factor_BLF has shape {factor_BLF.shape}, but should be {(B, L, F)}, or one 1")
    form = Form(ACTIVATIONS[activation], is_gated, has_factor, is_narrow(points.activations), is_narrow(points.gradients))
    out_BLD, hidden_TF, factor_TF = workspace.take((B, L, D)), workspace.take((B * L, F)), factor_BLF.reshape(-1, factor_BLF.shape[-1])
    z_act_TF = hidden_TF if form.activation == RELU and not is_gated else workspace.take((B * L, F))
    z_linear_TF = workspace.take((B * L, F)) if is_gated else z_act_TF
    x_TD, out_TD = x_BLD.reshape(-1, D), out_BLD.reshape(-1, D)
    feed_forward_kernel(out_TD, hidden_TF, z_act_TF, z_linear_TF, x_TD, w_act_DF, w_linear_DF, w_out_FD, factor_TF, form, ROWS)
    return out_BLD, FeedForwardSaved(x_BLD, z_act_TF, z_linear_TF, factor_TF, hidden_TF)


def feed_forward_backward(
    dout_BLD: np.ndarray, saved: FeedForwardSaved, params: Any, activation: str, points: ModelPoints, workspace: Workspace
) -> tuple[np.ndarray, Any]:
    """Return dx_BLD and the parameters' gradients.

    Rounding: R14.
    """
    (dout_BLD,) = checked("feed_forward_backward", dout_BLD=dout_BLD)
    same_shape("feed_forward_backward", saved.x_BLD.shape, dout_BLD=dout_BLD)
    w_act_DF, w_linear_DF, w_out_FD = _weights("feed_forward_backward", params)
    (D, F), is_gated, take = w_act_DF.shape, params.w_gate_DF is not None, workspace.take
    has_factor = saved.factor_TF.shape == saved.hidden_TF.shape
    form = Form(ACTIVATIONS[activation], is_gated, has_factor, is_narrow(points.activations), is_narrow(points.gradients))
    dx_BLD, dz_act_TF = take(dout_BLD.shape), take(saved.hidden_TF.shape)
    dz_linear_TF = take(saved.hidden_TF.shape) if is_gated else dz_act_TF
    x_TD, dx_TD, dout_TD = (x.reshape(-1, D) for x in (saved.x_BLD, dx_BLD, dout_BLD))
    dfeed_forward_kernel(
        dx_TD, dz_act_TF, dz_linear_TF, dout_TD, saved.z_act_TF, saved.z_linear_TF, w_act_DF, w_linear_DF, w_out_FD, saved.factor_TF, form, ROWS
    )
    dw_act_DF, dw_out_FD = take((D, F)), take((F, D))
    weight_gradient(dw_out_FD, saved.hidden_TF, dout_TD, BLOCK)
    weight_gradient(dw_act_DF, x_TD, dz_act_TF, BLOCK)
    if not is_gated:
        workspace.give(dz_act_TF)
        return dx_BLD, params._replace(w_in_DF=dw_act_DF, w_out_FD=dw_out_FD)
    dw_in_DF = take((D, F))
    weight_gradient(dw_in_DF, x_TD, dz_linear_TF, BLOCK)
    workspace.give(dz_act_TF, dz_linear_TF)
    return dx_BLD, params._replace(w_in_DF=dw_in_DF, w_gate_DF=dw_act_DF, w_out_FD=dw_out_FD)
