# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Experts that choose their tokens: the two further gatings in the original code, and the expert choice that came after it.

Paper: none of these is in it; they stand in the same file as its gates (Mesh TensorFlow) or follow it (Zhou et al. 2022). Spec: S-CAP-2, S-PACK-1.
Read `switch` first. Next: `noisy_top_k`. The rules:

    expert_selection   softmax over a group's tokens; each expert takes the C highest; a token's sum is divided by the number of its experts
    expert_choice      softmax over experts; each expert takes the C tokens that give it the highest probability; no division
    switch_max         softmax over experts; each expert takes the C highest among the tokens whose first choice it is

`switch_max` drops the least probable claims, not the last: it is the Switch layer served by falling gate (batch-prioritised routing), slot by slot.
Under the other two a token may have several experts, or none. All three look at later tokens, so none is causal.

    x_GSD -> logits, probs -> Picks -> gate_GEC -> gathered_GECD -> expert_out_GECD -> weight * expert_out -> out_GSD
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import Aux, RoundingPoints, Z
from refswitch.numbers.precision import round_to
from refswitch.reference.capacity import Route
from refswitch.reference.experts import ExpertsSaved, experts_backward, experts_forward
from refswitch.reference.losses import (
    BalanceSaved,
    ZSaved,
    balance_backward,
    balance_forward,
    counted_fraction,
    rows_of_mean,
    z_loss_backward,
    z_loss_forward,
)
from refswitch.reference.router import (
    LogitsSaved,
    SoftmaxSaved,
    choose,
    logits_backward,
    logits_forward,
    softmax_backward,
    softmax_forward,
)
from refswitch.reference.switch import SwitchParams


class Picks(NamedTuple):
    """The discrete part: which token holds each slot; no gradient passes through it."""

    token_GEC: np.ndarray
    kept_GEC: np.ndarray  # False where an expert found fewer tokens than it has slots


def pick_tokens(scores_GSE: np.ndarray, eligible_GSE: np.ndarray, capacity: int) -> Picks:
    """Let each expert take its eligible tokens by falling score, ties to the lowest index, up to its capacity or the number of tokens.

    Spec: S-CAP-2.
    """
    read_GES = np.where(eligible_GSE, scores_GSE, -np.inf).swapaxes(1, 2)
    token_GEC = np.argsort(-read_GES, axis=-1, kind="stable")[..., : min(capacity, scores_GSE.shape[1])]
    return Picks(token_GEC, np.take_along_axis(eligible_GSE.swapaxes(1, 2), token_GEC, axis=-1))


def route_of_picks(picks: Picks, expert_GS: np.ndarray) -> Route:
    """Return the route that picks amount to where each token has one expert; the slot of a token that is not held is 0."""
    S, C = expert_GS.shape[1], picks.token_GEC.shape[-1]
    slot_GEC1 = np.broadcast_to(np.arange(C, dtype=np.float64)[:, None], (*picks.token_GEC.shape, 1))
    slot_GS = scatter(slot_GEC1, picks, S)[..., 0].astype(np.int64)
    return Route(expert_GS, slot_GS, scatter(np.ones_like(slot_GEC1), picks, S)[..., 0] > 0.0)


def gather(x_GSD: np.ndarray, picks: Picks) -> np.ndarray:
    """Move each picked token's row to its slots, zero elsewhere; returns gathered_GECD. Its backward is `scatter`."""
    g = np.arange(len(x_GSD))[:, None, None]
    return np.where(picks.kept_GEC[..., None], x_GSD[g, picks.token_GEC], 0.0)


def scatter(gathered_GECD: np.ndarray, picks: Picks, S: int) -> np.ndarray:
    """Add up the rows of each token's slots; returns x_GSD. Its backward is `gather`."""
    G, _, _, D = gathered_GECD.shape
    x_GSD = np.zeros((G, S, D))
    g = np.arange(G)[:, None, None]
    np.add.at(x_GSD, (g, picks.token_GEC), np.where(picks.kept_GEC[..., None], gathered_GECD, 0.0))
    return x_GSD


def scores_forward(logits_GSE: np.ndarray, valid_GS: np.ndarray, rule: str, points: RoundingPoints) -> tuple[np.ndarray, SoftmaxSaved]:
    """Return probs_GSE: over the group's valid tokens where experts select, else over experts.

    The softmax over tokens gives padding exactly 0; Mesh adds -1e9 to its logits, which is 0 too unless the whole group is padding.

    Rounding: R3.
    """
    if rule != "expert_selection":
        return softmax_forward(logits_GSE, points)
    read_GSE = np.where(valid_GS[..., None], logits_GSE, -np.inf)
    max_G1E = read_GSE.max(axis=1, keepdims=True, initial=-np.inf)
    exp_GSE = np.exp(read_GSE - np.where(np.isfinite(max_G1E), max_G1E, 0.0))
    total_G1E = exp_GSE.sum(axis=1, keepdims=True)
    probs_GSE = round_to(exp_GSE / np.where(total_G1E > 0.0, total_G1E, 1.0), points.probs)  # F1  R3
    return probs_GSE, SoftmaxSaved(probs_GSE)


def scores_backward(dprobs_GSE: np.ndarray, saved: SoftmaxSaved, rule: str) -> np.ndarray:
    """Return dlogits_GSE. Gradient: that of a softmax, over tokens dlogits = p * (dp - sum_s p dp)."""
    if rule != "expert_selection":
        return softmax_backward(dprobs_GSE, saved)
    mean_G1E = np.sum(saved.probs_GSE * dprobs_GSE, axis=1, keepdims=True)
    return saved.probs_GSE * (dprobs_GSE - mean_G1E)  # B1


def spread_loss(probs_GSE: np.ndarray, valid_GS: np.ndarray) -> tuple[np.ndarray, BalanceSaved]:
    """Return Mesh's balance loss of `expert_selection`, with its gradient: the mean over groups of n sum_s a_s**2.

    a_s is the mean over experts of p_se, n the number of valid tokens: 1 where they all have the same share. Gradient: dp_se = 2 n a_s / (E G).
    """
    G, _, E = probs_GSE.shape
    share_GS = np.where(valid_GS, probs_GSE.mean(axis=2), 0.0)
    n_G1 = valid_GS.sum(axis=1, keepdims=True)
    value = np.sum(n_G1 * np.square(share_GS)) / G
    per_token_GS1 = (2.0 * n_G1 * share_GS / (E * G))[..., None]
    return value, BalanceSaved(np.broadcast_to(per_token_GS1, probs_GSE.shape))


class ExpertChoiceInputs(NamedTuple):
    """One call's data; randomness is data too."""

    x_GSD: np.ndarray
    valid_GS: np.ndarray  # False marks padding, which no expert takes
    noise_factor_GSD: np.ndarray  # 1 where there is no noise on the router's input
    hidden_mask_GECF: np.ndarray  # expert dropout by slot, already scaled; C is min(capacity, S)


class ExpertChoiceStatics(NamedTuple):
    """What does not change from call to call."""

    rule: str  # expert_selection | expert_choice | switch_max
    capacity: int
    aux: Aux  # of switch_max alone
    z: Z
    activation: str
    points: RoundingPoints


class ExpertChoiceOutputs(NamedTuple):
    """Everything that the layer computes."""

    out_GSD: np.ndarray
    aux_loss: np.ndarray
    z_loss: np.ndarray
    probs_GSE: np.ndarray
    picks: Picks
    gate_GEC: np.ndarray  # the probability by which a token was picked


class ExpertChoiceSaved(NamedTuple):
    """What the layer's backward needs: activations, never parameters."""

    inputs: ExpertChoiceInputs
    picks: Picks
    weight_GEC: np.ndarray
    share_GEC: np.ndarray  # one over the number of a token's experts where the rule divides, else 1
    expert_out_GECD: np.ndarray  # for the gates' gradient
    logits: LogitsSaved
    softmax: SoftmaxSaved
    experts: ExpertsSaved
    balance: BalanceSaved
    z: ZSaved


def _entries(picks: Picks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    G, E, _ = picks.token_GEC.shape
    return np.arange(G)[:, None, None], picks.token_GEC, np.arange(E)[:, None]


def _balance(
    probs_GSE: np.ndarray, first_GS: np.ndarray, picks: Picks, valid_GS: np.ndarray, statics: ExpertChoiceStatics
) -> tuple[np.ndarray, BalanceSaved]:
    if statics.rule == "expert_selection":
        return spread_loss(probs_GSE, valid_GS)
    if statics.rule == "expert_choice":  # every expert is as full as every other by construction
        return np.zeros(()), BalanceSaved(np.zeros_like(probs_GSE))
    route = route_of_picks(picks, first_GS)
    count_GE = counted_fraction(route, first_GS, valid_GS, valid_GS, probs_GSE.shape[2], statics.aux)
    return balance_forward(probs_GSE, count_GE, *rows_of_mean(valid_GS, route.kept_GS, statics.aux), valid_GS, statics.aux)


def expert_choice_forward(
    inputs: ExpertChoiceInputs, params: SwitchParams, statics: ExpertChoiceStatics
) -> tuple[ExpertChoiceOutputs, ExpertChoiceSaved]:
    """Compute the layer: out = sum over the slots that hold a token of weight * expert(x)."""
    points, valid_GS, (_, S, _) = statics.points, inputs.valid_GS, inputs.x_GSD.shape
    x_router_GSD = round_to(inputs.x_GSD * inputs.noise_factor_GSD, points.router)  # F1  R1
    no_term_GSE = np.zeros((*valid_GS.shape, params.w_router_DE.shape[1]))
    logits_GSE, logits_saved = logits_forward(x_router_GSD, no_term_GSE, params.w_router_DE, params.b_router_E, 0.0, points)  # F2
    probs_GSE, softmax_saved = scores_forward(logits_GSE, valid_GS, statics.rule, points)  # F3
    read_GSE = round_to(probs_GSE, points.choice)  # R4
    first_GS = choose(read_GSE)
    is_first_GSE = (first_GS[..., None] == np.arange(read_GSE.shape[2])) | (statics.rule != "switch_max")
    picks = pick_tokens(read_GSE, valid_GS[..., None] & is_first_GSE, statics.capacity)
    gate_GEC = np.where(picks.kept_GEC, round_to(read_GSE[_entries(picks)], points.gate), 0.0)  # F4  R5
    experts_GS1 = scatter(np.ones((*gate_GEC.shape, 1)), picks, S)
    divides = statics.rule == "expert_selection"
    share_GEC = 1.0 / np.maximum(gather(experts_GS1, picks)[..., 0], 1.0) if divides else np.ones_like(gate_GEC)
    weight_GEC = gate_GEC * share_GEC  # F5
    gathered_GECD = gather(inputs.x_GSD, picks)  # F6
    in_use_GEC = np.ones(gate_GEC.shape)  # what the biases make of an empty slot has weight 0
    expert_out_GECD, _, experts_saved = experts_forward(
        gathered_GECD, inputs.hidden_mask_GECF, in_use_GEC, params.experts, statics.activation, points
    )  # F7
    sum_GSD = scatter(weight_GEC[..., None] * expert_out_GECD, picks, S) + params.b_shared_D  # F8
    out_GSD = np.where(valid_GS[..., None], round_to(sum_GSD, points.out), 0.0)  # F9  R9
    aux_loss, balance_saved = _balance(probs_GSE, first_GS, picks, valid_GS, statics)  # F10
    z_loss, z_saved = z_loss_forward(logits_GSE, valid_GS, statics.z)  # F11
    saved = ExpertChoiceSaved(
        inputs, picks, weight_GEC, share_GEC, expert_out_GECD, logits_saved, softmax_saved, experts_saved, balance_saved, z_saved
    )  # fmt: skip
    return ExpertChoiceOutputs(out_GSD, aux_loss, z_loss, probs_GSE, picks, gate_GEC), saved


def expert_choice_backward(
    dout_GSD: np.ndarray, daux: float, dz: float, saved: ExpertChoiceSaved, params: SwitchParams, statics: ExpertChoiceStatics
) -> tuple[np.ndarray, SwitchParams]:
    """Return dx_GSD and the parameters' gradients of sum(out * dout) + daux * aux_loss + dz * z_loss.

    Picks, the number of a token's experts and f are constants; the probabilities by which tokens were picked are not.

    Rounding: R10.
    """
    picks, gradients, S = saved.picks, statics.points.gradients, dout_GSD.shape[1]
    dlogits_z_GSE = z_loss_backward(dz, saved.z)  # B11
    dprobs_aux_GSE = balance_backward(daux, saved.balance)  # B10
    dsum_GSD = np.where(saved.inputs.valid_GS[..., None], dout_GSD, 0.0)  # B9
    db_shared_D = dsum_GSD.sum(axis=(0, 1))  # B8
    dweighed_GECD = gather(dsum_GSD, picks)  # B8
    dweight_GEC = np.sum(dweighed_GECD * saved.expert_out_GECD, axis=-1)  # B8
    dexpert_out_GECD = dweighed_GECD * saved.weight_GEC[..., None]  # B8
    dgathered_GECD, _, _, dexperts = experts_backward(dexpert_out_GECD, saved.experts, params.experts, statics.activation)  # B7
    dx_expert_GSD = scatter(dgathered_GECD, picks, S)  # B6
    dgate_GEC = dweight_GEC * saved.share_GEC  # B5
    dprobs_gate_GSE = np.zeros_like(saved.softmax.probs_GSE)
    dprobs_gate_GSE[_entries(picks)] = np.where(picks.kept_GEC, dgate_GEC, 0.0)  # B4
    dlogits_probs_GSE = scores_backward(dprobs_gate_GSE + dprobs_aux_GSE, saved.softmax, statics.rule)  # B3
    dlogits_GSE = dlogits_probs_GSE + dlogits_z_GSE
    dx_router_GSD, dw_router_DE, db_router_E = logits_backward(dlogits_GSE, saved.logits, params.w_router_DE)  # B2
    dx_GSD = dx_expert_GSD + dx_router_GSD * saved.inputs.noise_factor_GSD  # B1
    rounded = {name: round_to(value, gradients) for name, value in dexperts._asdict().items() if value is not None}  # R10
    dparams = SwitchParams(
        round_to(dw_router_DE, gradients), round_to(db_router_E, gradients), dexperts._replace(**rounded), round_to(db_shared_D, gradients)
    )
    return round_to(dx_GSD, gradients), dparams
