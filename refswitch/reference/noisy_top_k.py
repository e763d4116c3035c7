# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Noisy top-k gating with its two losses: the mixture of experts that the Switch layer simplifies.

Paper: 2.2 (what one choice and one loss replace). Source: Shazeer et al. 2017, appendix A; tensor2tensor. Read `top_k` first. Next: `embedding`.

    noisy = x w_gate + noise * scale        scale = softplus(x w_noise) + noise_floor
    gate  = softmax(the K highest of noisy)
    importance_e = sum_s gate_se            load_e = sum_s P(expert e is among the K when only its own noise is drawn again)
    losses: CV(importance)^2, CV(load)^2, each the mean over groups, without their weight (0.1 in the source)

The load is a smooth stand-in for the number of tokens. Its probability asks whether expert e passes the K-th highest of the *others*: the (K+1)-th
highest of all where e is among the K, else the K-th. With e itself in the list the last one chosen would have to pass its own value.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from refswitch.config import RoundingPoints
from refswitch.reference.claims import Claims, serve
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.router import choices_in_order
from refswitch.reference.top_k import MixtureSaved, mixture_backward, mixture_forward, place_choices


def normal_cdf(z: np.ndarray) -> np.ndarray:
    """Return Phi(z), the probability of a standard normal below z."""
    return 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-z / math.sqrt(2.0))  # erfc: no cancellation in the left tail


def normal_density(z: np.ndarray) -> np.ndarray:
    """Return the derivative of `normal_cdf`."""
    return np.exp(-0.5 * np.square(z)) / math.sqrt(2.0 * math.pi)


class NoisyParams(NamedTuple):
    """The layer's parameters; gradients use the same type. Both matrices of the gate start at zero."""

    w_gate_DE: np.ndarray
    w_noise_DE: np.ndarray
    experts: ExpertsParams


class NoisyLogitsSaved(NamedTuple):
    """What the noisy logits' backward needs."""

    x_GSD: np.ndarray
    raw_GSE: np.ndarray  # argument of the softplus
    noise_GSE: np.ndarray


def noisy_logits_forward(
    x_GSD: np.ndarray, noise_GSE: np.ndarray, params: NoisyParams, noise_floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, NoisyLogitsSaved]:
    """Return clean_GSE, scale_GSE and noisy_GSE. Shazeer 2017, eq. (4); `noise_floor` is 0 there and 1e-2 in tensor2tensor."""
    clean_GSE = x_GSD @ params.w_gate_DE  # F1
    raw_GSE = x_GSD @ params.w_noise_DE  # F2
    scale_GSE = np.logaddexp(0.0, raw_GSE) + noise_floor  # F3
    noisy_GSE = clean_GSE + noise_GSE * scale_GSE  # F4
    return clean_GSE, scale_GSE, noisy_GSE, NoisyLogitsSaved(x_GSD, raw_GSE, noise_GSE)


def noisy_logits_backward(
    dclean_own_GSE: np.ndarray, dscale_own_GSE: np.ndarray, dnoisy_GSE: np.ndarray, saved: NoisyLogitsSaved, params: NoisyParams
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return dx_GSD, dw_gate_DE and dw_noise_DE. Gradient: the noise is data; softplus' = sigmoid."""
    dclean_GSE = dclean_own_GSE + dnoisy_GSE  # B4
    dscale_GSE = dscale_own_GSE + dnoisy_GSE * saved.noise_GSE  # B4
    draw_GSE = dscale_GSE * np.exp(-np.logaddexp(0.0, -saved.raw_GSE))  # B3
    dx_scale_GSD = draw_GSE @ params.w_noise_DE.T  # B2
    dw_noise_DE = np.einsum("gsd,gse->de", saved.x_GSD, draw_GSE)  # B2
    dx_clean_GSD = dclean_GSE @ params.w_gate_DE.T  # B1
    dw_gate_DE = np.einsum("gsd,gse->de", saved.x_GSD, dclean_GSE)  # B1
    return dx_clean_GSD + dx_scale_GSD, dw_gate_DE, dw_noise_DE


class NoisyGatesSaved(NamedTuple):
    """What the gates' backward needs."""

    expert_GSK: np.ndarray
    gate_GSK: np.ndarray
    E: int


def noisy_gates_forward(noisy_GSE: np.ndarray, expert_GSK: np.ndarray) -> tuple[np.ndarray, NoisyGatesSaved]:
    """Return gate_GSK, the softmax over the chosen noisy logits. Shazeer 2017, eqs. (3), (5): with one choice it is the constant 1."""
    chosen_GSK = np.take_along_axis(noisy_GSE, expert_GSK, axis=-1)  # F1
    exp_GSK = np.exp(chosen_GSK - chosen_GSK.max(axis=-1, keepdims=True))
    gate_GSK = exp_GSK / exp_GSK.sum(axis=-1, keepdims=True)  # F2
    return gate_GSK, NoisyGatesSaved(expert_GSK, gate_GSK, noisy_GSE.shape[-1])


def noisy_gates_backward(dgate_GSK: np.ndarray, saved: NoisyGatesSaved) -> np.ndarray:
    """Return dnoisy_GSE. Gradient: that of a softmax, at the chosen entries alone."""
    mean_GS1 = np.sum(saved.gate_GSK * dgate_GSK, axis=-1, keepdims=True)
    dchosen_GSK = saved.gate_GSK * (dgate_GSK - mean_GS1)  # B2
    return place_choices(dchosen_GSK, saved.expert_GSK, saved.E)  # B1


class LoadSaved(NamedTuple):
    """What the load's backward needs."""

    threshold_GSE: np.ndarray  # index of the logit that each expert has to pass
    z_GSE: np.ndarray
    density_GSE: np.ndarray  # at z; 0 where nothing has to be passed
    scale_GSE: np.ndarray


def load_forward(clean_GSE: np.ndarray, scale_GSE: np.ndarray, noisy_GSE: np.ndarray, K: int) -> tuple[np.ndarray, LoadSaved]:
    """Return load_GE = sum_s Phi((clean - K-th highest of the other experts' noisy logits) / scale).

    Shazeer 2017, eqs. (8) to (10). Where all E experts are chosen each has probability 1 and no gradient.
    """
    E = noisy_GSE.shape[-1]
    if K == E:
        zeros_GSE = np.zeros_like(noisy_GSE)
        return np.ones_like(noisy_GSE).sum(axis=1), LoadSaved(zeros_GSE.astype(np.int64), zeros_GSE, zeros_GSE, scale_GSE)
    order_GSE = choices_in_order(noisy_GSE, E)
    is_chosen_GSE = (order_GSE[..., :K, None] == np.arange(E)).any(axis=2)
    threshold_GSE = np.where(is_chosen_GSE, order_GSE[..., K, None], order_GSE[..., K - 1, None])
    margin_GSE = clean_GSE - np.take_along_axis(noisy_GSE, threshold_GSE, axis=-1)  # F1
    z_GSE = margin_GSE / scale_GSE  # F2
    load_GE = normal_cdf(z_GSE).sum(axis=1)  # F3
    return load_GE, LoadSaved(threshold_GSE, z_GSE, normal_density(z_GSE), scale_GSE)


def load_backward(dload_GE: np.ndarray, saved: LoadSaved) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return dclean_GSE, dscale_GSE and dnoisy_GSE. Which logit is the threshold is a constant, its value is not."""
    G, S, _ = saved.z_GSE.shape
    dz_GSE = dload_GE[:, None] * saved.density_GSE  # B3
    dmargin_GSE = dz_GSE / saved.scale_GSE  # B2
    dscale_GSE = -dmargin_GSE * saved.z_GSE  # B2
    dnoisy_GSE = np.zeros_like(dmargin_GSE)
    np.add.at(dnoisy_GSE, (np.arange(G)[:, None, None], np.arange(S)[:, None], saved.threshold_GSE), -dmargin_GSE)  # B1
    return dmargin_GSE, dscale_GSE, dnoisy_GSE


class VariationSaved(NamedTuple):
    """What the backward of the squared coefficient of variation needs."""

    deviation_GE: np.ndarray
    mean_G1: np.ndarray
    variance_G1: np.ndarray
    inverse_G1: np.ndarray  # 1 / (mean^2 + epsilon)


def cv_squared_forward(amount_GE: np.ndarray, epsilon: float) -> tuple[np.ndarray, VariationSaved]:
    """Return the mean over groups of variance / (mean^2 + epsilon); a group without anything has 0.

    Shazeer 2017, eq. (7). The variance is that of all E amounts (denominator E). `epsilon` is 0 there and 1e-10 in tensor2tensor.
    """
    mean_G1 = amount_GE.mean(axis=1, keepdims=True)  # F1
    deviation_GE = amount_GE - mean_G1  # F2
    variance_G1 = np.mean(np.square(deviation_GE), axis=1, keepdims=True)  # F3
    square_G1 = np.square(mean_G1) + epsilon
    inverse_G1 = np.divide(1.0, square_G1, out=np.zeros_like(square_G1), where=square_G1 > 0.0)
    value = np.mean(variance_G1 * inverse_G1)  # F4
    return value, VariationSaved(deviation_GE, mean_G1, variance_G1, inverse_G1)


def cv_squared_backward(dvalue: float, saved: VariationSaved) -> np.ndarray:
    """Return damount_GE. Gradient: 2 / E ((a_e - m) inverse - v m inverse^2)."""
    G, E = saved.deviation_GE.shape
    dvariance_G1 = dvalue * saved.inverse_G1 / G  # B4
    dsquare_G1 = -dvalue * saved.variance_G1 * np.square(saved.inverse_G1) / G  # B4
    ddeviation_GE = dvariance_G1 * 2.0 * saved.deviation_GE / E  # B3
    dmean_G1 = dsquare_G1 * 2.0 * saved.mean_G1  # B2: deviations sum to 0, so the mean inside them has no share
    return ddeviation_GE + dmean_G1 / E  # B1


class NoisyStatics(NamedTuple):
    """What does not change from call to call."""

    choices: int
    noise_floor: float
    epsilon: float
    order: str  # as in `claims.serve`
    capacity: int  # the source has none: at least S
    activation: str
    points: RoundingPoints  # of the experts; the gate is float64 throughout


class NoisyOutputs(NamedTuple):
    """Everything that the layer computes."""

    out_GSD: np.ndarray
    importance_loss: np.ndarray
    load_loss: np.ndarray
    noisy_GSE: np.ndarray
    claims: Claims
    gate_GSK: np.ndarray
    importance_GE: np.ndarray
    load_GE: np.ndarray


class NoisySaved(NamedTuple):
    """What the layer's backward needs: activations, never parameters."""

    logits: NoisyLogitsSaved
    gates: NoisyGatesSaved
    load: LoadSaved
    importance_variation: VariationSaved
    load_variation: VariationSaved
    mixture: MixtureSaved


def noisy_top_k_forward(
    x_GSD: np.ndarray, noise_GSE: np.ndarray, hidden_mask_GSKF: np.ndarray, params: NoisyParams, statics: NoisyStatics
) -> tuple[NoisyOutputs, NoisySaved]:
    """Compute the layer. `noise_GSE` is standard normal in training and 0 otherwise; padding is taken out before."""
    G, S, _ = x_GSD.shape
    E = params.w_gate_DE.shape[1]
    clean_GSE, scale_GSE, noisy_GSE, logits_saved = noisy_logits_forward(x_GSD, noise_GSE, params, statics.noise_floor)  # F1
    expert_GSK = choices_in_order(noisy_GSE, statics.choices)
    gate_GSK, gates_saved = noisy_gates_forward(noisy_GSE, expert_GSK)  # F2
    priority_GS = np.broadcast_to(np.arange(S), (G, S))
    claims = serve(expert_GSK, np.ones_like(expert_GSK, bool), priority_GS, E, statics.capacity, statics.order)
    out_GSD, mixture_saved = mixture_forward(x_GSD, gate_GSK, claims, hidden_mask_GSKF, params.experts, statics.activation, statics.points)  # F3
    importance_GE = place_choices(gate_GSK, expert_GSK, E).sum(axis=1)  # F4
    importance_loss, importance_saved = cv_squared_forward(importance_GE, statics.epsilon)  # F5
    load_GE, load_saved = load_forward(clean_GSE, scale_GSE, noisy_GSE, statics.choices)  # F6
    load_loss, load_variation_saved = cv_squared_forward(load_GE, statics.epsilon)  # F7
    outputs = NoisyOutputs(out_GSD, importance_loss, load_loss, noisy_GSE, claims, gate_GSK, importance_GE, load_GE)
    return outputs, NoisySaved(logits_saved, gates_saved, load_saved, importance_saved, load_variation_saved, mixture_saved)


def noisy_top_k_backward(
    dout_GSD: np.ndarray, dimportance_loss: float, dload_loss: float, saved: NoisySaved, params: NoisyParams, statics: NoisyStatics
) -> tuple[np.ndarray, NoisyParams]:
    """Return dx_GSD and the parameters' gradients of sum(out * dout) + dimportance_loss * importance_loss + dload_loss * load_loss.

    Choices, slots and which logit is a threshold are constants; dropping does not enter the importance.
    """
    dload_GE = cv_squared_backward(dload_loss, saved.load_variation)  # B7
    dclean_GSE, dscale_GSE, dnoisy_load_GSE = load_backward(dload_GE, saved.load)  # B6
    dimportance_GE = cv_squared_backward(dimportance_loss, saved.importance_variation)  # B5
    dgate_importance_GSK = dimportance_GE[np.arange(len(dimportance_GE))[:, None, None], saved.gates.expert_GSK]  # B4
    dx_expert_GSD, dgate_out_GSK, dexperts = mixture_backward(dout_GSD, saved.mixture, params.experts, statics.activation)  # B3
    dnoisy_gate_GSE = noisy_gates_backward(dgate_out_GSK + dgate_importance_GSK, saved.gates)  # B2
    dx_gate_GSD, dw_gate_DE, dw_noise_DE = noisy_logits_backward(
        dclean_GSE, dscale_GSE, dnoisy_gate_GSE + dnoisy_load_GSE, saved.logits, params
    )  # B1
    return dx_expert_GSD + dx_gate_GSD, NoisyParams(dw_gate_DE, dw_noise_DE, dexperts)
