# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""The Switch layer: decide, move, compute, move back, weigh; and the same doors in mirror order for the gradients.

Paper: 2.1, 2.2, figure 2; appendix F without its errata. Spec: the chapter on the switch layer. Read `router`, `capacity`, `pack`,
`experts` and `losses` first.

    x_GSD -> logits, probs, Route, gate -> packed_GECD -> expert_out_GECD -> expert_out_GSD -> gate * expert_out -> out_GSD
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import Dialect, RoundingPoints
from refswitch.numbers.precision import round_to
from refswitch.reference.capacity import Route, arrival_order, no_token_left_behind, order_by_gate, slots_forward
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
from refswitch.reference.pack import pack, slots_in_use, unpack
from refswitch.reference.router import (
    GateSaved,
    LogitsSaved,
    SoftmaxSaved,
    choices_in_order,
    choose,
    gate_backward,
    gate_forward,
    logits_backward,
    logits_forward,
    softmax_backward,
    softmax_forward,
)


class SwitchParams(NamedTuple):
    """The layer's parameters; gradients use the same type. An absent bias is zero; `experts.w_gate_EDF` is None without a gated form."""

    w_router_DE: np.ndarray
    b_router_E: np.ndarray
    experts: ExpertsParams
    b_shared_D: np.ndarray  # one output bias for every token (`expert.bias: shared_out`)


class SwitchInputs(NamedTuple):
    """One call's data; randomness is data too."""

    x_GSD: np.ndarray
    valid_GS: np.ndarray  # False marks padding
    noise_factor_GSD: np.ndarray  # 1 where there is no noise on the input
    noise_term_GSE: np.ndarray  # 0 where there is no noise on the logits
    select_noise_GSE: np.ndarray  # the draw or term that `select.rule` names
    priority_GS: np.ndarray  # first served first, where the dialect draws it
    hidden_mask_GSF: np.ndarray  # expert dropout as a factor, already scaled


class Statics(NamedTuple):
    """What does not change from call to call."""

    dialect: Dialect
    points: RoundingPoints
    activation: str
    capacity: int


class SwitchOutputs(NamedTuple):
    """Everything that an implementation may be asked for."""

    out_GSD: np.ndarray
    aux_loss: np.ndarray
    z_loss: np.ndarray
    logits_GSE: np.ndarray
    probs_GSE: np.ndarray
    route: Route
    gate_GS: np.ndarray
    hidden_GSF: np.ndarray
    expert_out_GSD: np.ndarray


class SwitchSaved(NamedTuple):
    """What the layer's backward needs: activations, never parameters."""

    inputs: SwitchInputs  # masks and noise are factors of gradients
    is_pad_GS: np.ndarray
    sits_out_GS: np.ndarray  # rows whose output is the constant zero
    x_expert_GSD: np.ndarray  # what the experts and a dropped token's output read
    x_scaled_GSD: np.ndarray  # the same times the gate where the dialect puts it there
    route: Route
    gate_GS: np.ndarray
    expert_out_GSD: np.ndarray  # for the gate's gradient
    logits: LogitsSaved
    softmax: SoftmaxSaved
    gate: GateSaved
    experts: ExpertsSaved
    balance: BalanceSaved
    z: ZSaved


def leaks(dialect: Dialect, points: RoundingPoints) -> bool:
    """Whether the experts see the noise: an in-place product leaks where casting to the router's format makes no copy. Spec: S-NOISE-2."""
    return dialect.noise.leak_to_experts == "if_same_dtype" and points.router == points.x


def claimants(x_GSD: np.ndarray, valid_GS: np.ndarray, dialect: Dialect) -> tuple[np.ndarray, np.ndarray]:
    """Return is_pad_GS and claims_GS, who is padding and who asks for a slot.

    Spec: S-PAD-1, S-PAD-2. `zero_row` takes every row of zeros for padding, a real one too.
    """
    is_pad_GS = ~np.any(x_GSD != 0.0, axis=-1) if dialect.pad.detect == "zero_row" else ~valid_GS
    return is_pad_GS, ~is_pad_GS if dialect.pad.route == "exclude" else np.ones_like(valid_GS)


def assign(
    probs_GSE: np.ndarray,
    logits_GSE: np.ndarray,
    scores_GSE: np.ndarray,
    inputs: SwitchInputs,
    claims_GS: np.ndarray,
    is_pad_GS: np.ndarray,
    statics: Statics,
) -> Route:
    """Choose an expert for each token and serve the claims.

    Spec: S-ROUTE-3, S-CAP-1, S-CAP-2, S-POS-1. `scores_GSE` is what the dialect's choice reads.
    """
    dialect, E = statics.dialect, scores_GSE.shape[-1]
    capacity = max(statics.capacity - dialect.capacity.slots_lost, 0)
    if dialect.select.rule == "ntlb":
        return no_token_left_behind(choices_in_order(scores_GSE, dialect.select.choices), claims_GS, E, capacity)
    expert_GS = choose(scores_GSE)
    if dialect.pad.route == "expert0_weight0":
        expert_GS = np.where(is_pad_GS, 0, expert_GS)
    gate_GS, _ = gate_forward(probs_GSE, logits_GSE, expert_GS, dialect.gate.value, statics.points)
    G, S = expert_GS.shape
    priority_GS = {"gate_desc": order_by_gate(gate_GS), "random": inputs.priority_GS}.get(dialect.priority, arrival_order(S, G))
    route = slots_forward(expert_GS, claims_GS, priority_GS, E, capacity, statics.points.positions)
    return route._replace(kept_GS=route.kept_GS & ~is_pad_GS) if dialect.pad.route == "expert0_weight0" else route


def noise_terms(inputs: SwitchInputs, dialect: Dialect) -> tuple[np.ndarray, np.ndarray]:
    """Return what is added to the logits that the gate reads, and what is added for the choice alone.

    Spec: S-NOISE-1. `second_place` rewrites the logits themselves: its term is -1e9 where an expert is ruled out.
    """
    is_clean = dialect.noise.gate_from == "clean"
    zeros_GSE = np.zeros_like(inputs.noise_term_GSE)
    read_GSE, choice_GSE = (zeros_GSE, inputs.noise_term_GSE) if is_clean else (inputs.noise_term_GSE, zeros_GSE)
    if dialect.select.rule == "second_place":
        read_GSE = read_GSE + inputs.select_noise_GSE
    if dialect.select.rule == "sample":
        choice_GSE = choice_GSE + dialect.select.temperature * inputs.select_noise_GSE
    return read_GSE, choice_GSE


def scores_of(probs_GSE: np.ndarray, logits_GSE: np.ndarray, choice_term_GSE: np.ndarray, statics: Statics) -> np.ndarray:
    """Return the scores that the choice is made on.

    Spec: S-ROUTE-3. A perturbed choice is made on the logits; else on the probabilities as stored, unless the dialect says logits.

    Rounding: R4.
    """
    dialect = statics.dialect
    if dialect.select.rule == "sample" or dialect.noise.gate_from == "clean":
        return logits_GSE + choice_term_GSE
    return round_to(probs_GSE, statics.points.choice) if dialect.select.on == "probs" else logits_GSE


def switch_forward(inputs: SwitchInputs, params: SwitchParams, statics: Statics) -> tuple[SwitchOutputs, SwitchSaved]:
    """Compute the layer.

    Spec: S-NOISE-1 to S-Z-1. Paper: y = p_i(x) E_i(x), 2.1.

    Raises
    ------
    ValueError
        From NumPy, where shapes disagree.
    """
    dialect, points = statics.dialect, statics.points
    zeroed_GS = ~inputs.valid_GS & (dialect.pad.zero_input is True)
    x_GSD = np.where(zeroed_GS[..., None], 0.0, inputs.x_GSD)  # F1
    is_pad_GS, claims_GS = claimants(x_GSD, inputs.valid_GS, dialect)
    x_router_GSD = round_to(x_GSD * inputs.noise_factor_GSD, points.router)  # F2  R1: the router's copy
    x_expert_GSD = x_router_GSD if leaks(dialect, points) else x_GSD
    read_term_GSE, choice_term_GSE = noise_terms(inputs, dialect)
    logits_GSE, logits_saved = logits_forward(
        x_router_GSD, read_term_GSE, params.w_router_DE, params.b_router_E, dialect.router.logit_cap, points
    )  # F3
    probs_GSE, softmax_saved = softmax_forward(logits_GSE, points)  # F4
    scores_GSE = scores_of(probs_GSE, logits_GSE, choice_term_GSE, statics)
    route = assign(probs_GSE, logits_GSE, scores_GSE, inputs, claims_GS, is_pad_GS, statics)
    gate_GS, gate_saved = gate_forward(probs_GSE, logits_GSE, route.expert_GS, dialect.gate.value, points)  # F5
    E, C, kept_GS1 = params.w_router_DE.shape[1], slots_in_use(route), route.kept_GS[..., None]

    x_scaled_GSD = gate_GS[..., None] * x_expert_GSD if dialect.gate.site.startswith("input") else x_expert_GSD  # F6
    on_hidden_GS = gate_GS if dialect.gate.site == "hidden" else np.ones_like(gate_GS)
    packed_GECD = pack(x_scaled_GSD, route, E, C)  # F7
    factor_GECF = pack(inputs.hidden_mask_GSF * on_hidden_GS[..., None], route, E, C)
    bias_scale_GEC = pack(on_hidden_GS[..., None], route, E, C)[..., 0]
    expert_out_GECD, hidden_GECF, experts_saved = experts_forward(
        packed_GECD, factor_GECF, bias_scale_GEC, params.experts, statics.activation, points
    )  # F8
    expert_out_GSD = unpack(expert_out_GECD, route)  # F9
    weigh_GS = gate_GS if dialect.gate.site in ("output", "input_and_output") else np.ones_like(gate_GS)
    passed_GSD = {"zero": np.zeros_like(x_expert_GSD), "x": x_expert_GSD, "x_times_gate": gate_GS[..., None] * x_expert_GSD}[dialect.drop.output]
    sum_GSD = np.where(kept_GS1, weigh_GS[..., None] * expert_out_GSD, passed_GSD) + params.b_shared_D  # F10
    sits_out_GS = is_pad_GS & (dialect.pad.route != "include")
    out_GSD = np.where(sits_out_GS[..., None], 0.0, round_to(sum_GSD, points.out))  # F11  R9

    first_GS = choose(scores_GSE) if dialect.select.rule == "ntlb" else route.expert_GS  # not where it ended up
    choice_GS = choose(logits_GSE) if dialect.aux.f.count == "logits" else first_GS
    count_GE = counted_fraction(route, choice_GS, claims_GS, ~is_pad_GS, E, dialect.aux)
    denominator_G, group_scale_G = rows_of_mean(~is_pad_GS, route.kept_GS, dialect.aux)
    aux_loss, balance_saved = balance_forward(probs_GSE, count_GE, denominator_G, group_scale_G, ~is_pad_GS, dialect.aux)  # F12
    aux_loss = round_to(aux_loss, points.x) if dialect.aux.dtype == "compute" else aux_loss
    z_loss, z_saved = z_loss_forward(logits_GSE, ~is_pad_GS, dialect.z)  # F13

    hidden_GSF = unpack(hidden_GECF, route)
    outputs = SwitchOutputs(out_GSD, aux_loss, z_loss, logits_GSE, probs_GSE, route, gate_GS, hidden_GSF, expert_out_GSD)
    saved = SwitchSaved(
        inputs, is_pad_GS, sits_out_GS, x_expert_GSD, x_scaled_GSD, route, gate_GS, expert_out_GSD, logits_saved, softmax_saved,
        gate_saved, experts_saved, balance_saved, z_saved,
    )  # fmt: skip
    return outputs, saved


def switch_backward(
    dout_GSD: np.ndarray, daux: float, dz: float, saved: SwitchSaved, params: SwitchParams, statics: Statics
) -> tuple[np.ndarray, SwitchParams]:
    """Return dx_GSD and the parameters' gradients of sum(out * dout) + daux * aux_loss + dz * z_loss.

    Spec: S-BACK-1 to S-BACK-6. Choice, kept and f are constants; noise and masks are data. Rounding has derivative 1.

    Rounding: R10.
    """
    dialect, points, route = statics.dialect, statics.points, saved.route
    E, C = params.w_router_DE.shape[1], slots_in_use(route)
    kept_GS1, gate_GS1 = route.kept_GS[..., None], saved.gate_GS[..., None]
    dlogits_z_GSE = z_loss_backward(dz, saved.z)  # B13
    dprobs_aux_GSE = balance_backward(daux, saved.balance)  # B12
    dsum_GSD = np.where(saved.sits_out_GS[..., None], 0.0, dout_GSD)  # B11
    db_shared_D = dsum_GSD.sum(axis=(0, 1))  # B10
    dkept_GSD = np.where(kept_GS1, dsum_GSD, 0.0)  # B10
    dpassed_GSD = dsum_GSD - dkept_GSD  # B10
    at_output = dialect.gate.site in ("output", "input_and_output")
    dgate_out_GS = np.sum(dkept_GSD * saved.expert_out_GSD, axis=-1) * at_output
    dexpert_out_GSD = dkept_GSD * gate_GS1 if at_output else dkept_GSD
    dexpert_out_GECD = pack(dexpert_out_GSD, route, E, C)  # B9
    dpacked_GECD, dfactor_GECF, dbias_scale_GEC, dexperts = experts_backward(
        dexpert_out_GECD, saved.experts, params.experts, statics.activation
    )  # B8
    dfactor_GSF = unpack(dfactor_GECF, route)
    dbias_scale_GS = unpack(dbias_scale_GEC[..., None], route)[..., 0]
    on_hidden = dialect.gate.site == "hidden"
    dgate_hidden_GS = (np.sum(dfactor_GSF * saved.inputs.hidden_mask_GSF, axis=-1) + dbias_scale_GS) * on_hidden
    dx_scaled_GSD = unpack(dpacked_GECD, route)  # B7
    at_input = dialect.gate.site.startswith("input")
    dgate_in_GS = np.sum(dx_scaled_GSD * saved.x_expert_GSD, axis=-1) * at_input  # B6
    dx_expert_GSD = dx_scaled_GSD * gate_GS1 if at_input else dx_scaled_GSD  # B6
    straight_through = dialect.dispatch_grad == "straight_through"
    dgate_dispatch_GS = np.sum(dx_scaled_GSD * saved.x_scaled_GSD, axis=-1) * straight_through
    passes_gate = dialect.drop.output == "x_times_gate"
    dgate_passed_GS = np.sum(dpassed_GSD * saved.x_expert_GSD, axis=-1) * passes_gate
    dx_passed_GSD = {"zero": np.zeros_like(dpassed_GSD), "x": dpassed_GSD, "x_times_gate": dpassed_GSD * gate_GS1}[dialect.drop.output]
    dgate_GS = dgate_out_GS + dgate_hidden_GS + dgate_in_GS + dgate_dispatch_GS + dgate_passed_GS
    dprobs_gate_GSE, dlogits_gate_GSE = gate_backward(dgate_GS, saved.gate, dialect.gate.value)  # B5
    dlogits_probs_GSE = softmax_backward(dprobs_gate_GSE + dprobs_aux_GSE, saved.softmax)  # B4
    dlogits_GSE = dlogits_probs_GSE + dlogits_gate_GSE + dlogits_z_GSE
    dx_router_GSD, dw_router_DE, db_router_E = logits_backward(dlogits_GSE, saved.logits, params.w_router_DE)  # B3
    dx_read_GSD = dx_expert_GSD + dx_passed_GSD
    leaked = leaks(dialect, points)
    dx_noised_GSD = dx_router_GSD + dx_read_GSD if leaked else dx_router_GSD
    dx_clean_GSD = np.zeros_like(dx_read_GSD) if leaked else dx_read_GSD
    dx_GSD = dx_clean_GSD + dx_noised_GSD * saved.inputs.noise_factor_GSD  # B2
    zeroed_GS = ~saved.inputs.valid_GS & (dialect.pad.zero_input is True)
    dx_GSD = np.where(zeroed_GS[..., None], 0.0, dx_GSD)  # B1
    rounded = {name: round_to(value, points.gradients) for name, value in dexperts._asdict().items() if value is not None}  # R10
    dparams = SwitchParams(
        round_to(dw_router_DE, points.gradients),
        round_to(db_router_E, points.gradients),
        dexperts._replace(**rounded),
        round_to(db_shared_D, points.gradients),
    )
    return round_to(dx_GSD, points.gradients), dparams
