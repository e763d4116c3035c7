# May import: standard library, numpy, refswitch.numbers, refswitch.reference, refswitch.config, refswitch.verify (below).
"""The forward pass in tubes, one function per stage.

Each stage takes the tubes of the stage before. Where the implementation exports a stage, the judge checks it and goes on with the
exported values as an exact tube, so that every stage is judged on the implementation's own previous one. Spec: S-NOISE-1 to S-Z-1; the
radii: numbers. Next: `gradients`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import RoundingPoints, rounding_points, router_format
from refswitch.numbers.precision import Format
from refswitch.reference.capacity import Route
from refswitch.reference.losses import counted_fraction, rows_of_mean
from refswitch.reference.pack import pack, slots_in_use, unpack
from refswitch.reference.router import choose
from refswitch.reference.switch import SwitchInputs, SwitchParams, claimants, leaks, noise_terms
from refswitch.verify import tubes
from refswitch.verify.case import Case
from refswitch.verify.cases import Target
from refswitch.verify.oracle import inputs_of, params_of
from refswitch.verify.tubes import Arithmetic, Tube, exact


class Layer(NamedTuple):
    """One case under one declared dialect and profile, ready to be evaluated."""

    case: Case
    target: Target
    points: RoundingPoints
    router: Arithmetic
    experts: Arithmetic
    inputs: SwitchInputs
    params: SwitchParams
    x_GSD: np.ndarray  # as the layer reads it: padding zeroed where the dialect does so
    is_pad_GS: np.ndarray
    claims_GS: np.ndarray
    sits_out_GS: np.ndarray

    @property
    def gate_site(self) -> str:
        """Where the gate is applied."""
        return self.target.dialect.gate.site


class Expertise(NamedTuple):
    """The expert stage in slots: pre-activation, factor and hidden activation."""

    x_GECD: Tube
    z_act_GECF: Tube
    z_linear_GECF: Tube | None
    factor_GECF: Tube
    bias_scale_GEC: Tube
    hidden_GECF: Tube


def prepare_layer(case: Case, target: Target) -> Layer:
    """Join a case with what is declared about it."""
    dialect, profile = target.dialect, target.profile
    inputs = inputs_of(case, dialect)
    zeroed_GS = ~inputs.valid_GS & (dialect.pad.zero_input is True)
    x_GSD = np.where(zeroed_GS[..., None], 0.0, inputs.x_GSD)
    is_pad_GS, claims_GS = claimants(x_GSD, inputs.valid_GS, dialect)
    return Layer(
        case=case,
        target=target,
        points=rounding_points(dialect, profile),
        router=tubes.arithmetic_of(profile, router_format(dialect, profile)),
        experts=tubes.arithmetic_of(profile),
        inputs=inputs,
        params=params_of(case),
        x_GSD=x_GSD,
        is_pad_GS=is_pad_GS,
        claims_GS=claims_GS,
        sits_out_GS=is_pad_GS & (dialect.pad.route != "include"),
    )


def noise_stage(layer: Layer) -> tuple[Tube, Tube]:
    """Return what the router and what the experts read. Spec: S-NOISE-1, S-NOISE-2."""
    x = exact(layer.x_GSD)
    if (layer.inputs.noise_factor_GSD == 1.0).all():
        return x, x
    x_router = tubes.store(tubes.multiply(x, exact(layer.inputs.noise_factor_GSD), layer.router), layer.points.router)
    return x_router, x_router if leaks(layer.target.dialect, layer.points) else x


def logits_stage(layer: Layer, x_router_GSD: Tube) -> tuple[Tube, Tube]:
    """Return the logits that the gate reads, and the same before the cap. Spec: S-ROUTE-1."""
    D = layer.x_GSD.shape[-1]
    noise_GSE, _ = noise_terms(layer.inputs, layer.target.dialect)
    plus = [exact(term) for term in (layer.params.b_router_E, noise_GSE) if term.any()]
    raw = tubes.contract("gsd,de->gse", x_router_GSD, exact(layer.params.w_router_DE), layer.router, D, plus)
    if plus:
        raw = _may_store_before(raw, plus, layer.points.logits)
    cap = layer.target.dialect.router.logit_cap
    if not cap:
        return tubes.store(raw, layer.points.logits), raw
    value, low, high = (cap * np.tanh(end / cap) for end in (raw.value, raw.value - raw.radius, raw.value + raw.radius))
    evaluation = ((2.0 * layer.router.functions.tanh_ulp + 4.0) * layer.router.element_unit + 8.0 * tubes.OWN_UNIT) * np.abs(value)
    radius = np.maximum(high - value, value - low) + evaluation  # tanh is increasing
    return tubes.store(Tube(value, radius * tubes.RADIUS_SLACK), layer.points.logits), raw


def probs_stage(layer: Layer, logits_GSE: Tube) -> Tube:
    """Return the probabilities as stored. Spec: S-ROUTE-2."""
    return tubes.store(tubes.softmax(logits_GSE, layer.router), layer.points.probs)


def read_probs(layer: Layer, probs_GSE: Tube) -> Tube:
    """Return the probabilities as the choice and the gate read them (R4)."""
    return tubes.store(probs_GSE, layer.points.choice)


def scores_stage(layer: Layer, probs_GSE: Tube, logits_GSE: Tube) -> Tube:
    """Return the scores that the choice is made on. Spec: S-ROUTE-3."""
    dialect = layer.target.dialect
    if dialect.select.rule == "sample" or dialect.noise.gate_from == "clean":
        _, term_GSE = noise_terms(layer.inputs, dialect)
        return tubes.add(logits_GSE, exact(term_GSE), layer.router)
    return read_probs(layer, probs_GSE) if dialect.select.on == "probs" else logits_GSE


def gate_stage(layer: Layer, probs_GSE: Tube, logits_GSE: Tube, expert_GS: np.ndarray) -> Tube:
    """Return the gate of the chosen expert. Spec: S-GATE-1."""
    value = layer.target.dialect.gate.value
    index = (*np.indices(expert_GS.shape), expert_GS)
    if value in ("one", "norm_topk", "ratio_st"):
        return exact(np.ones(expert_GS.shape))
    if value == "sigmoid":
        return tubes.store(tubes.sigmoid(logits_GSE.at(index), layer.router), layer.points.gate)
    return tubes.store(read_probs(layer, probs_GSE).at(index), layer.points.gate)


def pack_tube(tube: Tube, route: Route, E: int) -> Tube:
    """Move a tube to its slots: moves are exact."""
    C = slots_in_use(route)
    return Tube(pack(tube.value, route, E, C), pack(tube.radius, route, E, C))


def unpack_tube(tube: Tube, route: Route) -> Tube:
    """Move a tube back to its tokens."""
    return Tube(unpack(tube.value, route), unpack(tube.radius, route))


def _may_store_before(total: Tube, plus: list[Tube], format: Format) -> Tube:
    """Allow that the sum was stored before and between the additions of its further terms."""
    size = np.abs(total.value) + total.radius + sum(np.abs(term.value) + term.radius for term in plus)
    for _ in plus:
        total = tubes.may_store(total, format, size)
    return total


def hidden_stage(layer: Layer, x_expert_GSD: Tube, gate_GS: Tube, route: Route) -> Expertise:
    """Return the hidden activation of every slot in use. Spec: S-PACK-1, S-EXPERT-1."""
    E, D, _ = layer.params.experts.w_in_EDF.shape
    weights, arithmetic, activation = layer.params.experts, layer.experts, layer.case.activation
    gate_GS1 = Tube(gate_GS.value[..., None], gate_GS.radius[..., None])
    if layer.gate_site.startswith("input"):
        x_expert_GSD = tubes.multiply(gate_GS1, x_expert_GSD, arithmetic)
        x_expert_GSD = tubes.may_store(x_expert_GSD, layer.points.x)
    x = pack_tube(x_expert_GSD, route, E)

    def branch(w_EDF: np.ndarray, b_EF: np.ndarray) -> Tube:
        plus = [exact(b_EF[:, None])] if b_EF.any() else []
        z = tubes.contract("gecd,edf->gecf", x, exact(w_EDF), arithmetic, D, plus)
        return tubes.store(_may_store_before(z, plus, layer.points.z), layer.points.z)

    z_in = branch(weights.w_in_EDF, weights.b_in_EF)
    z_act, z_linear = (z_in, None) if weights.w_gate_EDF is None else (branch(weights.w_gate_EDF, weights.b_gate_EF), z_in)
    hidden = tubes.activate(z_act, activation, arithmetic)
    if z_linear is not None:
        hidden = tubes.multiply(tubes.may_store(hidden, layer.points.z), z_linear, arithmetic)
    on_hidden = gate_GS1 if layer.gate_site == "hidden" else exact(np.ones_like(gate_GS1.value))
    bias_scale = pack_tube(on_hidden, route, E)
    factor = exact(layer.inputs.hidden_mask_GSF)
    if layer.gate_site == "hidden":
        factor = tubes.multiply(factor, on_hidden, arithmetic)
    factor = pack_tube(factor, route, E)
    is_used = pack(np.ones_like(layer.inputs.hidden_mask_GSF), route, E, slots_in_use(route)) == 1.0
    if (factor.value[is_used] != 1.0).any():
        hidden = tubes.multiply(tubes.may_store(hidden, layer.points.z), factor, arithmetic)
    hidden = tubes.where(is_used, tubes.store(hidden, layer.points.hidden), exact(np.zeros_like(hidden.value)))
    return Expertise(x, z_act, z_linear, factor, bias_scale.at(np.s_[..., 0]), hidden)


def expert_out_stage(layer: Layer, expertise: Expertise, route: Route) -> Tube:
    """Return the chosen expert's output per token, zero for a token without a slot. Spec: S-EXPERT-2."""
    weights = layer.params.experts
    F = weights.w_out_EFD.shape[1]
    plus = []
    if weights.b_out_ED.any():
        scale = Tube(expertise.bias_scale_GEC.value[..., None], expertise.bias_scale_GEC.radius[..., None])
        plus = [tubes.multiply(scale, exact(weights.b_out_ED[:, None]), layer.experts)]
    out = tubes.contract("gecf,efd->gecd", expertise.hidden_GECF, exact(weights.w_out_EFD), layer.experts, F, plus)
    out = _may_store_before(out, plus, layer.points.expert_out)
    return unpack_tube(tubes.store(out, layer.points.expert_out), route)


def out_stage(layer: Layer, expert_out_GSD: Tube, gate_GS: Tube, x_expert_GSD: Tube, route: Route) -> Tube:
    """Return the layer's output. Spec: S-COMBINE-1, S-DROP-1, S-PAD-1."""
    gate_GS1 = Tube(gate_GS.value[..., None], gate_GS.radius[..., None])
    weighed = expert_out_GSD
    if layer.gate_site in ("output", "input_and_output"):
        weighed = tubes.multiply(gate_GS1, expert_out_GSD, layer.experts)
    dropped = {
        "zero": exact(np.zeros_like(expert_out_GSD.value)),
        "x": x_expert_GSD,
        "x_times_gate": tubes.multiply(gate_GS1, x_expert_GSD, layer.experts),
    }[layer.target.dialect.drop.output]
    out = tubes.where(route.kept_GS[..., None], weighed, dropped)
    if layer.params.b_shared_D.any():
        shared = exact(np.broadcast_to(layer.params.b_shared_D, out.value.shape))
        out = _may_store_before(tubes.add(out, shared, layer.experts), [shared], layer.points.out)
    return tubes.where(layer.sits_out_GS[..., None], exact(np.zeros_like(out.value)), tubes.store(out, layer.points.out))


def counts_of(layer: Layer, route: Route, logits_GSE: Tube, scores_GSE: Tube) -> Tube:
    """Return count_GE, the integers behind f, under the implementation's own choices.

    Spec: S-AUX-1. A count is exact, but where f counts the largest logit and the logits are not exported: there each token whose largest
    logit is uncertain widens the count of each expert that it may be.
    """
    aux, E = layer.target.dialect.aux, logits_GSE.value.shape[-1]
    first_GS = choose(scores_GSE.value) if layer.target.dialect.select.rule == "ntlb" else route.expert_GS
    choice_GS = choose(logits_GSE.value) if aux.f.count == "logits" else first_GS
    counts = exact(counted_fraction(route, choice_GS, layer.claims_GS, ~layer.is_pad_GS, E, aux))
    if aux.f.count == "choice" or not logits_GSE.radius.any():
        return counts
    lowest_GS1 = (logits_GSE.value - logits_GSE.radius).max(axis=-1, keepdims=True)
    possible_GSE = logits_GSE.value + logits_GSE.radius >= lowest_GS1
    uncertain_GSE = possible_GSE & (possible_GSE.sum(axis=-1, keepdims=True) > 1)
    return Tube(counts.value, uncertain_GSE.sum(axis=1).astype(np.float64))


def aux_stage(layer: Layer, probs_GSE: Tube, count_GE: Tube, route: Route) -> Tube:
    """Return the balance loss. Spec: S-AUX-1; the bound: judging, auxiliary loss."""
    aux, arithmetic = layer.target.dialect.aux, layer.router
    G, S, E = probs_GSE.value.shape
    denominator_G, group_scale_G = rows_of_mean(~layer.is_pad_GS, route.kept_GS, aux)
    in_mean_GS1 = (~layer.is_pad_GS if aux.P_pads == "exclude" else np.ones_like(layer.is_pad_GS))[..., None]
    inverse_G1 = np.where(denominator_G > 0, 1.0 / np.maximum(denominator_G, 1), 0.0)[:, None]
    masked = Tube(probs_GSE.value * in_mean_GS1, probs_GSE.radius * in_mean_GS1)
    P_GE = tubes.scale(tubes.total(masked, 1, arithmetic, S), inverse_G1, arithmetic)
    f_GE = tubes.scale(count_GE, inverse_G1, arithmetic)
    if aux.dtype == "compute":
        P_GE, f_GE = tubes.may_store(P_GE, layer.points.x), tubes.may_store(f_GE, layer.points.x)
    factor_GE = np.broadcast_to((group_scale_G * {"E": E, "local_E": E, "none": 1.0, "inverse_E": 1.0 / E}[aux.scale_E])[:, None], (G, E))
    terms = tubes.scale(tubes.multiply(f_GE, P_GE, arithmetic), factor_GE, arithmetic)
    value = tubes.scale(tubes.total(terms, (0, 1), arithmetic, G * E), 1.0 / max(G, 1), arithmetic)
    return tubes.store(value, layer.points.x) if aux.dtype == "compute" else tubes.may_store(value, layer.points.router)


def z_stage(layer: Layer, logits_GSE: Tube) -> tuple[Tube, Tube, np.ndarray]:
    """Return the z-loss, the log-sum-exp of each row, and the weight of each row's square. Spec: S-Z-1."""
    z, valid_GS = layer.target.dialect.z, ~layer.is_pad_GS
    zeroed_GS = layer.is_pad_GS & (z.pads == "zero_logits")
    read = tubes.where(zeroed_GS[..., None], exact(np.zeros_like(logits_GSE.value)), logits_GSE)
    lse_GS = tubes.log_sum_exp(read, layer.router)
    counted_GS = valid_GS if z.pads == "exclude" else np.ones_like(valid_GS)
    denominator = valid_GS.sum() if z.denom == "valid" else valid_GS.size
    weight_GS = counted_GS * (1.0 / denominator if denominator else 0.0)
    square_GS = tubes.scale(tubes.multiply(lse_GS, lse_GS, layer.router), weight_GS, layer.router)
    value = tubes.may_store(tubes.total(square_GS, (0, 1), layer.router, valid_GS.size), layer.points.router)
    return value, lse_GS, weight_GS * ~zeroed_GS
