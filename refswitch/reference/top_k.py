# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Several experts for each token: gates, the mixture of outputs, losses, and the layer around `claims`.

Paper: eq. (2) with k > 1, the top-2 baseline of table 1, appendix B (no token left behind). Others: Shazeer 2017, GShard, Mesh TensorFlow.
Spec: V-GATE-1 to V-TOP-2. Read `switch` and `claims` first: with one choice and raw gates this layer is the Switch layer.
Next: `expert_choice`. In this file K counts the choices of a token.

    x_GSD -> logits, probs -> expert_GSK, gate_GSK, wanted_GSK -> Claims -> packed_GECD -> expert_out_GSKD -> sum_k gate * expert_out -> out_GSD
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import Aux, RoundingPoints, Z
from refswitch.numbers.precision import round_to
from refswitch.reference.capacity import Route
from refswitch.reference.claims import EPSILON, Claims, pack_choices, route_of, serve, unpack_choices, wanted_choices
from refswitch.reference.experts import ExpertsParams, ExpertsSaved, experts_backward, experts_forward
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
from refswitch.reference.pack import slots_in_use
from refswitch.reference.router import (
    LogitsSaved,
    SoftmaxSaved,
    choices_in_order,
    logits_backward,
    logits_forward,
    softmax_backward,
    softmax_forward,
)
from refswitch.reference.switch import SwitchParams

# ------------------------------------------------------------------------------------------------------------------------- gates


class GatesSaved(NamedTuple):
    """What the gates' backward needs."""

    expert_GSK: np.ndarray  # where the gradient goes
    gate_GSK: np.ndarray
    total_GS1: np.ndarray  # denominator of the renormalisation
    E: int


def gates_forward(
    probs_GSE: np.ndarray, logits_GSE: np.ndarray, expert_GSK: np.ndarray, value: str, points: RoundingPoints
) -> tuple[np.ndarray, GatesSaved]:
    """Return gate_GSK, the factors on the chosen experts' outputs.

    Paper: eq. (2). `raw`: p_k; `renormalised`: p_k / (sum_j p_j + 1e-9) over the choices (GShard, Mesh TensorFlow), before anything is dropped, so
    that a token that loses a choice has less than 1 in all; `softmax_of_chosen`: the softmax over the chosen logits, which is the same without 1e-9.

    Rounding: R4, R5.
    """
    chosen_GSK = np.take_along_axis(round_to(probs_GSE, points.choice), expert_GSK, axis=-1)  # F1  R4
    total_GS1 = chosen_GSK.sum(axis=-1, keepdims=True) + EPSILON
    gate_GSK = chosen_GSK / total_GS1 if value == "renormalised" else chosen_GSK  # F2
    if value == "softmax_of_chosen":
        gate_GSK, _ = softmax_forward(np.take_along_axis(logits_GSE, expert_GSK, axis=-1), points)
    return round_to(gate_GSK, points.gate), GatesSaved(expert_GSK, gate_GSK, total_GS1, probs_GSE.shape[-1])  # R5


def gates_backward(dgate_GSK: np.ndarray, saved: GatesSaved, value: str) -> tuple[np.ndarray, np.ndarray]:
    """Return dprobs_GSE and dlogits_GSE.

    Gradient: renormalised, dp_k = (dgate_k - sum_j gate_j dgate_j) / total; of a softmax, dlogit_k = gate_k (dgate_k - sum_j gate_j dgate_j).
    """
    zeros_GSE = np.zeros((*dgate_GSK.shape[:2], saved.E))
    mean_GS1 = np.sum(saved.gate_GSK * dgate_GSK, axis=-1, keepdims=True)
    if value == "softmax_of_chosen":
        return zeros_GSE, place_choices(saved.gate_GSK * (dgate_GSK - mean_GS1), saved.expert_GSK, saved.E)
    dchosen_GSK = (dgate_GSK - mean_GS1) / saved.total_GS1 if value == "renormalised" else dgate_GSK  # B2
    return place_choices(dchosen_GSK, saved.expert_GSK, saved.E), zeros_GSE  # B1


def place_choices(values_GSK: np.ndarray, expert_GSK: np.ndarray, E: int) -> np.ndarray:
    """Return values_GSE, each value at its expert and 0 elsewhere: the adjoint of reading the chosen entries."""
    placed_GSE = np.zeros((*values_GSK.shape[:2], E))
    np.put_along_axis(placed_GSE, expert_GSK, values_GSK, axis=-1)
    return placed_GSE


# ----------------------------------------------------------------------------------------------------------------------- mixture


class MixtureSaved(NamedTuple):
    """What the mixture's backward needs."""

    claims: Claims
    gate_GSK: np.ndarray
    expert_out_GSKD: np.ndarray  # for the gates' gradient; zero where a claim was not kept
    experts: ExpertsSaved


def mixture_forward(
    x_GSD: np.ndarray,
    gate_GSK: np.ndarray,
    claims: Claims,
    hidden_mask_GSKF: np.ndarray,
    params: ExpertsParams,
    activation: str,
    points: RoundingPoints,
) -> tuple[np.ndarray, MixtureSaved]:
    """Return mixed_GSD, the sum over a token's kept choices of gate * expert(x). Paper: eq. (2)."""
    E, C = params.w_in_EDF.shape[0], slots_in_use(route_of(claims))
    x_GSKD = np.repeat(x_GSD[:, :, None], gate_GSK.shape[-1], axis=2)  # F1
    packed_GECD = pack_choices(x_GSKD, claims, E, C)  # F2
    factor_GECF = pack_choices(hidden_mask_GSKF, claims, E, C)
    in_use_GEC = pack_choices(np.ones((*gate_GSK.shape, 1)), claims, E, C)[..., 0]
    expert_out_GECD, _, experts = experts_forward(packed_GECD, factor_GECF, in_use_GEC, params, activation, points)  # F3
    expert_out_GSKD = unpack_choices(expert_out_GECD, claims)  # F4
    mixed_GSD = np.sum(gate_GSK[..., None] * expert_out_GSKD, axis=2)  # F5
    return mixed_GSD, MixtureSaved(claims, gate_GSK, expert_out_GSKD, experts)


def mixture_backward(
    dmixed_GSD: np.ndarray, saved: MixtureSaved, params: ExpertsParams, activation: str
) -> tuple[np.ndarray, np.ndarray, ExpertsParams]:
    """Return dx_GSD, dgate_GSK and the experts' gradients. Gradient: dgate_k = <dmixed, expert_out_k>, 0 where the claim was not kept."""
    E, C = params.w_in_EDF.shape[0], slots_in_use(route_of(saved.claims))
    dgate_GSK = np.sum(dmixed_GSD[:, :, None] * saved.expert_out_GSKD, axis=-1)  # B5
    dexpert_out_GSKD = dmixed_GSD[:, :, None] * saved.gate_GSK[..., None]  # B5
    dexpert_out_GECD = pack_choices(dexpert_out_GSKD, saved.claims, E, C)  # B4
    dpacked_GECD, _, _, dexperts = experts_backward(dexpert_out_GECD, saved.experts, params, activation)  # B3
    dx_GSKD = unpack_choices(dpacked_GECD, saved.claims)  # B2
    return dx_GSKD.sum(axis=2), dgate_GSK, dexperts  # B1


# ------------------------------------------------------------------------------------------------------------------------ losses


def choice_counts(claims: Claims, wanted_GSK: np.ndarray, valid_GS: np.ndarray, E: int, counted_choices: int, aux: Aux) -> np.ndarray:
    """Return count_GE, what f counts: the mean over the first `counted_choices` choices of who chose whom.

    Spec: S-AUX-1. Mesh's top-2 counts first choices alone; its gating of appendix B takes the mean over all K, asked for or not.
    """
    counts = [
        counted_fraction(Route(*(part_GSK[..., k] for part_GSK in claims)), claims.expert_GSK[..., k], wanted_GSK[..., k], valid_GS, E, aux)
        for k in range(counted_choices)
    ]
    return np.sum(counts, axis=0) / counted_choices


class SecondSaved(NamedTuple):
    """What the second-place loss's backward needs."""

    without_first_GSE: np.ndarray  # where a probability is read
    share_GSE: np.ndarray  # the probabilities without the first choice, renormalised
    total_GS1: np.ndarray
    dvalue_dshare_G1E: np.ndarray  # the loss is linear in the shares


def second_place_forward(probs_GSE: np.ndarray, expert_GSK: np.ndarray, valid_GS: np.ndarray) -> tuple[np.ndarray, SecondSaved]:
    """Return the mean over groups of E sum_e f2_e P2_e, the balance of second choices. Mesh adds half of it to the balance loss.

    Paper: the top-2 baseline. f2 counts the second choices of valid tokens before any policy; P2 is the mean of the probabilities without the first
    choice, renormalised by sum + 1e-9; both denominators are S. As in Mesh a padding row has no first choice to leave out and stays in P2.
    """
    G, S, E = probs_GSE.shape
    first_GSE, second_GSE = ((expert_GSK[..., k, None] == np.arange(E)) & valid_GS[..., None] for k in (0, 1))
    left_GSE = np.where(first_GSE, 0.0, probs_GSE)  # F1
    total_GS1 = left_GSE.sum(axis=-1, keepdims=True) + EPSILON
    share_GSE = left_GSE / total_GS1  # F2
    dvalue_dshare_G1E = second_GSE.sum(axis=1, keepdims=True) * (E / (G * max(S, 1) ** 2))
    value = np.sum(dvalue_dshare_G1E * share_GSE)  # F3
    return value, SecondSaved(~first_GSE, share_GSE, total_GS1, dvalue_dshare_G1E)


def second_place_backward(dvalue: float, saved: SecondSaved) -> np.ndarray:
    """Return dprobs_GSE. Gradient: dp_e = (dshare_e - sum_i share_i dshare_i) / total for all but the first choice."""
    dshare_G1E = dvalue * saved.dvalue_dshare_G1E  # B3
    mean_GS1 = np.sum(saved.share_GSE * dshare_G1E, axis=-1, keepdims=True)
    dleft_GSE = (dshare_G1E - mean_GS1) / saved.total_GS1  # B2
    return np.where(saved.without_first_GSE, dleft_GSE, 0.0)  # B1


# --------------------------------------------------------------------------------------------------------------------- the layer


class TopKInputs(NamedTuple):
    """One call's data; randomness is data too."""

    x_GSD: np.ndarray
    valid_GS: np.ndarray  # False marks padding: no claim, output 0
    noise_factor_GSD: np.ndarray  # 1 where there is no noise on the router's input
    noise_term_GSE: np.ndarray  # 0 where there is no noise on the logits
    choice_term_GSE: np.ndarray  # added for the choice alone where it is made on logits; temperature * Gumbel draws samples without replacement
    uniform_GSK: np.ndarray  # the draw of the policies `random` and `gshard`
    priority_GS: np.ndarray  # first served first, within a choice
    hidden_mask_GSKF: np.ndarray  # expert dropout as a factor, already scaled


class TopKStatics(NamedTuple):
    """What does not change from call to call. Mesh's top-2: 2, probs, renormalised, random, 0.2, after_kept, counted_choices 1."""

    choices: int  # at most E
    choose_on: str  # probs | logits
    gate: str  # raw | renormalised | softmax_of_chosen
    policy: str  # all | none | threshold | random | gshard
    threshold: float
    order: str  # after_kept | after_all | by_token | until_placed
    capacity: int
    aux: Aux
    counted_choices: int
    second_loss: float  # weight of the second-place loss in the balance loss: 0, or Mesh's 0.5
    z: Z
    activation: str
    points: RoundingPoints


class TopKOutputs(NamedTuple):
    """Everything that the layer computes."""

    out_GSD: np.ndarray
    aux_loss: np.ndarray
    z_loss: np.ndarray
    logits_GSE: np.ndarray
    probs_GSE: np.ndarray
    wanted_GSK: np.ndarray
    claims: Claims
    gate_GSK: np.ndarray
    expert_out_GSKD: np.ndarray


class TopKSaved(NamedTuple):
    """What the layer's backward needs: activations, never parameters."""

    inputs: TopKInputs
    logits: LogitsSaved
    softmax: SoftmaxSaved
    gates: GatesSaved
    mixture: MixtureSaved
    balance: BalanceSaved
    second: SecondSaved
    z: ZSaved


def top_k_forward(inputs: TopKInputs, params: SwitchParams, statics: TopKStatics) -> tuple[TopKOutputs, TopKSaved]:
    """Compute the layer. Paper: eq. (2); with `until_placed` and raw gates appendix B, each stage's gate its own lower probability.

    Raises
    ------
    ValueError
        From NumPy, where shapes disagree.
    """
    points, valid_GS, E = statics.points, inputs.valid_GS, params.w_router_DE.shape[1]
    x_router_GSD = round_to(inputs.x_GSD * inputs.noise_factor_GSD, points.router)  # F1  R1
    logits_GSE, logits_saved = logits_forward(x_router_GSD, inputs.noise_term_GSE, params.w_router_DE, params.b_router_E, 0.0, points)  # F2
    probs_GSE, softmax_saved = softmax_forward(logits_GSE, points)  # F3
    read_GSE = round_to(probs_GSE, points.choice)
    scores_GSE = read_GSE if statics.choose_on == "probs" else logits_GSE + inputs.choice_term_GSE
    expert_GSK = choices_in_order(scores_GSE, statics.choices)
    chosen_GSK = np.take_along_axis(read_GSE, expert_GSK, axis=-1)
    wanted_GSK = wanted_choices(chosen_GSK, inputs.uniform_GSK, statics.policy, statics.threshold) & valid_GS[..., None]
    claims = serve(expert_GSK, wanted_GSK, inputs.priority_GS, E, statics.capacity, statics.order)
    gate_GSK, gates_saved = gates_forward(probs_GSE, logits_GSE, expert_GSK, statics.gate, points)  # F4
    mixed_GSD, mixture_saved = mixture_forward(
        inputs.x_GSD, gate_GSK, claims, inputs.hidden_mask_GSKF, params.experts, statics.activation, points
    )  # F5
    out_GSD = np.where(valid_GS[..., None], round_to(mixed_GSD + params.b_shared_D, points.out), 0.0)  # F6  R9
    count_GE = choice_counts(claims, wanted_GSK, valid_GS, E, statics.counted_choices, statics.aux)
    denominator_G, group_scale_G = rows_of_mean(valid_GS, np.any(claims.kept_GSK, axis=-1), statics.aux)
    balance_loss, balance_saved = balance_forward(probs_GSE, count_GE, denominator_G, group_scale_G, valid_GS, statics.aux)  # F7
    second_loss, second_saved = second_place_forward(probs_GSE, choices_in_order(scores_GSE, 2)[..., [0, -1]], valid_GS)  # F8
    aux_loss = balance_loss + statics.second_loss * second_loss  # F9
    z_loss, z_saved = z_loss_forward(logits_GSE, valid_GS, statics.z)  # F10
    outputs = TopKOutputs(
        out_GSD, aux_loss, z_loss, logits_GSE, probs_GSE, wanted_GSK, claims, gate_GSK, mixture_saved.expert_out_GSKD
    )  # fmt: skip
    return outputs, TopKSaved(inputs, logits_saved, softmax_saved, gates_saved, mixture_saved, balance_saved, second_saved, z_saved)


def top_k_backward(
    dout_GSD: np.ndarray, daux: float, dz: float, saved: TopKSaved, params: SwitchParams, statics: TopKStatics
) -> tuple[np.ndarray, SwitchParams]:
    """Return dx_GSD and the parameters' gradients of sum(out * dout) + daux * aux_loss + dz * z_loss.

    Choices, policy, kept and f are constants.

    Rounding: R10.
    """
    gradients = statics.points.gradients
    dlogits_z_GSE = z_loss_backward(dz, saved.z)  # B10
    dsecond = daux * statics.second_loss  # B9
    dprobs_second_GSE = second_place_backward(dsecond, saved.second)  # B8
    dprobs_aux_GSE = balance_backward(daux, saved.balance)  # B7
    dsum_GSD = np.where(saved.inputs.valid_GS[..., None], dout_GSD, 0.0)  # B6
    db_shared_D = dsum_GSD.sum(axis=(0, 1))  # B6
    dx_expert_GSD, dgate_GSK, dexperts = mixture_backward(dsum_GSD, saved.mixture, params.experts, statics.activation)  # B5
    dprobs_gate_GSE, dlogits_gate_GSE = gates_backward(dgate_GSK, saved.gates, statics.gate)  # B4
    dlogits_probs_GSE = softmax_backward(dprobs_gate_GSE + dprobs_aux_GSE + dprobs_second_GSE, saved.softmax)  # B3
    dlogits_GSE = dlogits_probs_GSE + dlogits_gate_GSE + dlogits_z_GSE
    dx_router_GSD, dw_router_DE, db_router_E = logits_backward(dlogits_GSE, saved.logits, params.w_router_DE)  # B2
    dx_GSD = dx_expert_GSD + dx_router_GSD * saved.inputs.noise_factor_GSD  # B1
    rounded = {name: round_to(value, gradients) for name, value in dexperts._asdict().items() if value is not None}  # R10
    dparams = SwitchParams(
        round_to(dw_router_DE, gradients), round_to(db_router_E, gradients), dexperts._replace(**rounded), round_to(db_shared_D, gradients)
    )
    return round_to(dx_GSD, gradients), dparams
