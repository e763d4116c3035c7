# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Experts: one feed-forward network per expert, applied to the rows in its slots.

Paper: 2.1, 2.4 (expert dropout), 5.2. Spec: S-EXPERT-1, S-EXPERT-2, S-BACK-3, S-BACK-4. Next: `losses`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from refswitch.config import RoundingPoints
from refswitch.numbers.precision import round_to

SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
GELU_CUBE = 0.044715


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-z / math.sqrt(2.0))  # erfc: no cancellation in the left tail


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -z))  # 1 / (1 + exp(-z)) without its overflow


def activate(z: np.ndarray, activation: str) -> np.ndarray:
    """Apply the activation: relu, gelu_erf, gelu_tanh or silu.

    Spec: S-EXPERT-1. The two GELUs differ by up to 4.7e-4: they are two activations, not one with a tolerance.
    """
    if activation == "relu":
        return np.maximum(z, 0.0)
    if activation == "gelu_erf":
        return z * _normal_cdf(z)
    if activation == "gelu_tanh":
        return 0.5 * z * (1.0 + np.tanh(SQRT_2_OVER_PI * (z + GELU_CUBE * z**3)))
    return z * _sigmoid(z)


def activation_slope(z: np.ndarray, activation: str) -> np.ndarray:
    """Return the derivative of `activate`; at z = 0 that of relu is 0.

    Spec: S-BACK-3.
    """
    if activation == "relu":
        return np.where(z > 0.0, 1.0, 0.0)
    if activation == "gelu_erf":
        return _normal_cdf(z) + z * np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
    if activation == "gelu_tanh":
        t = np.tanh(SQRT_2_OVER_PI * (z + GELU_CUBE * z**3))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t**2) * SQRT_2_OVER_PI * (1.0 + 3.0 * GELU_CUBE * z**2)
    return _sigmoid(z) * (1.0 + z * (1.0 - _sigmoid(z)))


class ExpertsParams(NamedTuple):
    """The experts' parameters; one that the dialect does not have is zero (a bias) or None (`w_gate_EDF`, which changes the form)."""

    w_in_EDF: np.ndarray
    w_gate_EDF: np.ndarray | None
    w_out_EFD: np.ndarray
    b_in_EF: np.ndarray
    b_gate_EF: np.ndarray
    b_out_ED: np.ndarray


class ExpertsSaved(NamedTuple):
    """What the experts' backward needs."""

    packed_GECD: np.ndarray  # left operand of dw_in, dw_gate
    z_act_GECF: np.ndarray  # pre-activation: the slope is read from it
    z_linear_GECF: np.ndarray  # the other branch where the expert is gated, else one
    factor_GECF: np.ndarray  # expert dropout times the gate where it sits on the hidden activation
    hidden_GECF: np.ndarray  # left operand of dw_out
    bias_scale_GEC: np.ndarray  # 1 in a used slot, the gate where it sits on the hidden activation, 0 in an empty slot


def experts_forward(
    packed_GECD: np.ndarray,
    factor_GECF: np.ndarray,
    bias_scale_GEC: np.ndarray,
    params: ExpertsParams,
    activation: str,
    points: RoundingPoints,
) -> tuple[np.ndarray, np.ndarray, ExpertsSaved]:
    """Run each expert on its slots: hidden = act(x w_in) * factor, or act(x w_gate) * (x w_in) * factor; out = hidden w_out.

    Spec: S-EXPERT-1, S-EXPERT-2. Paper: FFN(x) = max(0, x W_in) W_out. Returns out_GECD, hidden_GECF and what backward needs.

    Rounding: R6, R7, R8.
    """
    z_GECF = np.einsum("gecd,edf->gecf", packed_GECD, params.w_in_EDF) + params.b_in_EF[:, None]  # F1
    z_in_GECF = round_to(z_GECF, points.z)  # R6
    if params.w_gate_EDF is None:
        z_act_GECF, z_linear_GECF = z_in_GECF, np.ones_like(z_in_GECF)
    else:
        z_GECF = np.einsum("gecd,edf->gecf", packed_GECD, params.w_gate_EDF) + params.b_gate_EF[:, None]  # F2
        z_act_GECF, z_linear_GECF = round_to(z_GECF, points.z), z_in_GECF  # R6
    raw_GECF = activate(z_act_GECF, activation) * z_linear_GECF * factor_GECF  # F3
    hidden_GECF = round_to(raw_GECF, points.hidden)  # R7
    bias_GECD = bias_scale_GEC[..., None] * params.b_out_ED[:, None]
    out_GECD = np.einsum("gecf,efd->gecd", hidden_GECF, params.w_out_EFD) + bias_GECD  # F4
    saved = ExpertsSaved(packed_GECD, z_act_GECF, z_linear_GECF, factor_GECF, hidden_GECF, bias_scale_GEC)
    return round_to(out_GECD, points.expert_out), hidden_GECF, saved  # R8


def experts_backward(
    dout_GECD: np.ndarray, saved: ExpertsSaved, params: ExpertsParams, activation: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, ExpertsParams]:
    """Return dpacked_GECD, dfactor_GECF, dbias_scale_GEC and the parameters' gradients.

    Spec: S-BACK-3, S-BACK-4. Gradient: dw_out = hidden^T dout; dhidden = dout w_out^T; dz = dhidden * factor * act'(z).
    Slots that nobody holds are zero in `packed`, `hidden` and `dout`, so they add nothing.
    """
    dw_out_EFD = np.einsum("gecf,gecd->efd", saved.hidden_GECF, dout_GECD)  # B4
    db_out_ED = np.einsum("gec,gecd->ed", saved.bias_scale_GEC, dout_GECD)  # B4
    dbias_scale_GEC = np.einsum("gecd,ed->gec", dout_GECD, params.b_out_ED)  # B4
    dhidden_GECF = np.einsum("gecd,efd->gecf", dout_GECD, params.w_out_EFD)  # B4
    acted_GECF = activate(saved.z_act_GECF, activation)
    dfactor_GECF = dhidden_GECF * acted_GECF * saved.z_linear_GECF  # B3
    dproduct_GECF = dhidden_GECF * saved.factor_GECF  # B3
    dz_act_GECF = dproduct_GECF * saved.z_linear_GECF * activation_slope(saved.z_act_GECF, activation)  # B3
    dw_act_EDF = np.einsum("gecd,gecf->edf", saved.packed_GECD, dz_act_GECF)
    db_act_EF = dz_act_GECF.sum(axis=(0, 2))
    if params.w_gate_EDF is None:
        dpacked_GECD = np.einsum("gecf,edf->gecd", dz_act_GECF, params.w_in_EDF)  # B1
        dparams = ExpertsParams(dw_act_EDF, None, dw_out_EFD, db_act_EF, np.zeros_like(db_act_EF), db_out_ED)
        return dpacked_GECD, dfactor_GECF, dbias_scale_GEC, dparams
    dpacked_gate_GECD = np.einsum("gecf,edf->gecd", dz_act_GECF, params.w_gate_EDF)  # B2
    dz_linear_GECF = dproduct_GECF * acted_GECF  # B1
    dw_in_EDF = np.einsum("gecd,gecf->edf", saved.packed_GECD, dz_linear_GECF)  # B1
    dpacked_in_GECD = np.einsum("gecf,edf->gecd", dz_linear_GECF, params.w_in_EDF)  # B1
    dparams = ExpertsParams(dw_in_EDF, dw_act_EDF, dw_out_EFD, dz_linear_GECF.sum(axis=(0, 2)), db_act_EF, db_out_ED)
    return dpacked_in_GECD + dpacked_gate_GECD, dfactor_GECF, dbias_scale_GEC, dparams
