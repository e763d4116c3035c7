# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Dense feed-forward: what every token passes where a layer is not sparse.

Paper: the T5 body; ReLU in v1.0, gated GELU in v1.1. The experts' own form is in `experts`. Next: `cross_entropy`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import ModelPoints
from refswitch.numbers.precision import round_to
from refswitch.reference.experts import activate, activation_slope


class FeedForwardParams(NamedTuple):
    """Two matrices, three where gated; gradients use the same type."""

    w_in_DF: np.ndarray
    w_gate_DF: np.ndarray | None
    w_out_FD: np.ndarray


class FeedForwardSaved(NamedTuple):
    """What the feed-forward's backward needs."""

    x_BLD: np.ndarray
    z_act_BLF: np.ndarray  # pre-activation: the slope is read from it
    z_linear_BLF: np.ndarray  # the other branch where gated, else one
    factor_BLF: np.ndarray  # dropout on the hidden activation, already scaled
    hidden_BLF: np.ndarray  # left operand of dw_out


def feed_forward_forward(
    x_BLD: np.ndarray, params: FeedForwardParams, factor_BLF: np.ndarray, activation: str, points: ModelPoints
) -> tuple[np.ndarray, FeedForwardSaved]:
    """Return act(x w_in) w_out, or (act(x w_gate) * x w_in) w_out where gated.

    Rounding: R11.
    """
    z_in_BLF = round_to(x_BLD @ params.w_in_DF, points.activations)  # F1  R11
    z_act_BLF, z_linear_BLF = z_in_BLF, np.ones_like(z_in_BLF)
    if params.w_gate_DF is not None:
        z_act_BLF, z_linear_BLF = round_to(x_BLD @ params.w_gate_DF, points.activations), z_in_BLF  # F2  R11
    hidden_BLF = round_to(activate(z_act_BLF, activation) * z_linear_BLF * factor_BLF, points.activations)  # F3  R11
    out_BLD = round_to(hidden_BLF @ params.w_out_FD, points.activations)  # F4  R11
    return out_BLD, FeedForwardSaved(x_BLD, z_act_BLF, z_linear_BLF, factor_BLF, hidden_BLF)


def feed_forward_backward(
    dout_BLD: np.ndarray, saved: FeedForwardSaved, params: FeedForwardParams, activation: str, points: ModelPoints
) -> tuple[np.ndarray, FeedForwardParams]:
    """Return dx_BLD and the parameters' gradients.

    Rounding: R14.
    """
    dw_out_FD = np.einsum("blf,bld->fd", saved.hidden_BLF, dout_BLD)  # B4
    dhidden_BLF = round_to(dout_BLD @ params.w_out_FD.T, points.gradients)  # B4  R14
    dproduct_BLF = dhidden_BLF * saved.factor_BLF  # B3
    dz_act_BLF = round_to(dproduct_BLF * saved.z_linear_BLF * activation_slope(saved.z_act_BLF, activation), points.gradients)  # B3  R14
    dw_act_DF = np.einsum("bld,blf->df", saved.x_BLD, dz_act_BLF)
    if params.w_gate_DF is None:
        return round_to(dz_act_BLF @ params.w_in_DF.T, points.gradients), FeedForwardParams(dw_act_DF, None, dw_out_FD)  # B1  R14
    dx_gate_BLD = dz_act_BLF @ params.w_gate_DF.T  # B2
    dz_in_BLF = round_to(dproduct_BLF * activate(saved.z_act_BLF, activation), points.gradients)  # B1  R14
    dw_in_DF = np.einsum("bld,blf->df", saved.x_BLD, dz_in_BLF)  # B1
    dx_BLD = round_to(dx_gate_BLD + dz_in_BLF @ params.w_in_DF.T, points.gradients)  # R14
    return dx_BLD, FeedForwardParams(dw_in_DF, dw_act_DF, dw_out_FD)
