# May import: standard library, numpy, refswitch.numbers, refswitch.reference, refswitch.config, refswitch.verify (below).
"""The backward pass in tubes: every gradient's value with the radius that the profile allows.

Conditioned like the forward pass: on the implementation's own route and on what it exported. Spec: S-BACK-1 to S-BACK-6; the radii: numbers.
Gradients in between may be stored in the profile's `storage.gradients`, elementwise products too; those that are returned are. Next: `route`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.reference.capacity import Route
from refswitch.reference.losses import rows_of_mean
from refswitch.reference.switch import leaks
from refswitch.verify import tubes
from refswitch.verify.layer import Expertise, Layer, pack_tube, unpack_tube
from refswitch.verify.tubes import Arithmetic, Tube, exact


class Forward(NamedTuple):
    """The forward tubes as conditioned by the judge."""

    x_router_GSD: Tube
    x_expert_GSD: Tube
    raw_GSE: Tube  # logits before the cap
    logits_GSE: Tube
    probs_GSE: Tube
    gate_GS: Tube
    route: Route
    expertise: Expertise
    expert_out_GSD: Tube
    count_GE: Tube
    lse_GS: Tube
    z_weight_GS: np.ndarray


def _stored(layer: Layer, tube: Tube) -> Tube:
    return tubes.may_store(tube, layer.points.gradients)


def _inner(layer: Layer, a: Tube, b: Tube, terms: int) -> Tube:
    """Return the sum over the last axis of a * b, its products stored as gradients are."""
    products = tubes.multiply(a, b, layer.experts)
    if layer.points.gradients.precision < layer.points.router.precision:
        products = _stored(layer, products)
    return _stored(layer, tubes.total(products, -1, layer.experts, terms))


def _sum_of(parts: list[Tube], arithmetic: Arithmetic, layer: Layer, terms: int = 0) -> Tube:
    """Add several gradients of one value in any order; one accumulator may take the `terms` of all of them, starting from any."""
    result, size = parts[0], np.abs(parts[0].value) + parts[0].radius
    for part in parts[1:]:
        size = size + np.abs(part.value) + part.radius
        result = tubes.may_store(tubes.add(result, part, arithmetic), layer.points.gradients, size)
    return tubes.widen(result, tubes.gamma(terms, arithmetic.unit) * size) if len(parts) > 1 else result


def _experts_backward(layer: Layer, dexpert_out_GECD: Tube, forward: Forward) -> tuple[Tube, Tube, Tube, dict[str, Tube]]:
    """Return dpacked_GECD, dfactor_GECF, dbias_scale_GEC and the experts' parameter gradients."""
    weights, arithmetic, activation = layer.params.experts, layer.experts, layer.case.activation
    saved = forward.expertise
    E, D, F = weights.w_in_EDF.shape
    rows_E = np.array([(forward.route.kept_GS & (forward.route.expert_GS == e)).sum() for e in range(E)], dtype=np.float64)
    rows_E11, rows_E1 = rows_E[:, None, None], rows_E[:, None]
    found: dict[str, Tube] = {}
    found["w_out"] = tubes.contract("gecf,gecd->efd", saved.hidden_GECF, dexpert_out_GECD, arithmetic, rows_E11)
    scale = saved.bias_scale_GEC
    found["b_out"] = tubes.contract("gec,gecd->ed", scale, dexpert_out_GECD, arithmetic, rows_E1)
    dbias_scale = tubes.contract("gecd,ed->gec", dexpert_out_GECD, exact(weights.b_out_ED), arithmetic, D)
    dhidden = _stored(layer, tubes.contract("gecd,efd->gecf", dexpert_out_GECD, exact(weights.w_out_EFD), arithmetic, D))
    acted = tubes.may_store(tubes.activate(saved.z_act_GECF, activation, arithmetic), layer.points.z)
    product = acted if saved.z_linear_GECF is None else tubes.multiply(acted, saved.z_linear_GECF, arithmetic)
    dfactor = _stored(layer, tubes.multiply(dhidden, product, arithmetic))
    dproduct = dhidden
    if (saved.factor_GECF.value != 1.0).any():
        dproduct = _stored(layer, tubes.multiply(dhidden, saved.factor_GECF, arithmetic))
    slope = tubes.activation_slope(saved.z_act_GECF, activation, arithmetic)
    dact = dproduct if saved.z_linear_GECF is None else _stored(layer, tubes.multiply(dproduct, saved.z_linear_GECF, arithmetic))
    dz_act = _stored(layer, tubes.multiply(dact, slope, arithmetic))

    def weight_gradient(dz: Tube) -> tuple[Tube, Tube]:
        dw = tubes.contract("gecd,gecf->edf", saved.x_GECD, dz, arithmetic, rows_E11)
        return dw, tubes.total(dz, (0, 2), arithmetic, rows_E1)

    dw_act, db_act = weight_gradient(dz_act)
    if weights.w_gate_EDF is None:
        found["w_in"], found["b_in"] = dw_act, db_act
        return _stored(layer, tubes.contract("gecf,edf->gecd", dz_act, exact(weights.w_in_EDF), arithmetic, F)), dfactor, dbias_scale, found
    found["w_gate"], found["b_gate"] = dw_act, db_act
    dz_linear = _stored(layer, tubes.multiply(dproduct, acted, arithmetic))
    found["w_in"], found["b_in"] = weight_gradient(dz_linear)
    through_gate = _stored(layer, tubes.contract("gecf,edf->gecd", dz_act, exact(weights.w_gate_EDF), arithmetic, F))
    through_in = _stored(layer, tubes.contract("gecf,edf->gecd", dz_linear, exact(weights.w_in_EDF), arithmetic, F))
    return _sum_of([through_in, through_gate], arithmetic, layer, 2 * F), dfactor, dbias_scale, found


def _softmax_backward(layer: Layer, dprobs_GSE: Tube, probs_GSE: Tube) -> Tube:
    """Return p * (dp - sum_e p dp), whichever of its algebraic forms was evaluated. Spec: S-BACK-2, numbers."""
    router, E = layer.router, probs_GSE.value.shape[-1]
    dprobs_GSE = tubes.may_store(dprobs_GSE, layer.points.probs)
    mean_GS = tubes.total(tubes.multiply(probs_GSE, dprobs_GSE, router), -1, router, E)
    centred = tubes.add(dprobs_GSE, Tube(-mean_GS.value[..., None], mean_GS.radius[..., None]), router)
    dlogits = tubes.multiply(probs_GSE, centred, router)
    size = np.abs(dprobs_GSE.value) + dprobs_GSE.radius
    p_high = np.abs(probs_GSE.value) + probs_GSE.radius
    forms = tubes.gamma(E + 6, router.unit + tubes.OWN_UNIT) * p_high * (size + np.sum(p_high * size, axis=-1, keepdims=True))
    return tubes.widen(dlogits, forms)


def _dprobs_of_aux(layer: Layer, daux: float, forward: Forward) -> Tube:
    """Return the balance loss's gradient of the probabilities. Spec: S-BACK-5."""
    aux, router = layer.target.dialect.aux, layer.router
    G, _, E = forward.probs_GSE.value.shape
    denominator_G, group_scale_G = rows_of_mean(~layer.is_pad_GS, forward.route.kept_GS, aux)
    scale_E = {"E": E, "local_E": E, "none": 1.0, "inverse_E": 1.0 / E}[aux.scale_E]
    inverse_G = np.where(denominator_G > 0, 1.0 / np.maximum(denominator_G, 1), 0.0)
    f_GE = tubes.scale(forward.count_GE, inverse_G[:, None], router)
    slope_GE = tubes.scale(f_GE, (group_scale_G * inverse_G * scale_E * daux / G)[:, None], router)
    slope_GE = tubes.scale(slope_GE, 1.0, router)  # daux * scale / (denominator * G) may be formed in several roundings
    in_mean_GS1 = (~layer.is_pad_GS if aux.P_pads == "exclude" else np.ones_like(layer.is_pad_GS))[..., None]
    return Tube(slope_GE.value[:, None, :] * in_mean_GS1, slope_GE.radius[:, None, :] * in_mean_GS1)


def _dlogits_of_gate(layer: Layer, dgate_GS: Tube, forward: Forward) -> Tube | None:
    """Return the gate's gradient of the logits, all through the chosen entry. Spec: S-BACK-2."""
    value, router, probs = layer.target.dialect.gate.value, layer.router, forward.probs_GSE
    chosen_GSE = forward.route.expert_GS[..., None] == np.arange(probs.value.shape[-1])

    def placed(tube: Tube) -> Tube:
        return Tube(tube.value[..., None] * chosen_GSE, tube.radius[..., None] * chosen_GSE)

    if value == "sigmoid":
        gate = tubes.may_store(forward.gate_GS, layer.points.gate)  # the sigmoid before it was stored, or after
        slope_GS = tubes.multiply(gate, tubes.add(exact(np.ones_like(gate.value)), Tube(-gate.value, gate.radius), router), router)
        return placed(tubes.multiply(dgate_GS, slope_GS, router))
    if value == "ratio_st":
        chosen = Tube(np.sum(probs.value * chosen_GSE, axis=-1), np.sum(probs.radius * chosen_GSE, axis=-1))
        low, high = np.maximum(chosen.value - chosen.radius, np.finfo(np.float64).tiny), chosen.value + chosen.radius
        dgate_GS = tubes.scale(tubes.multiply(dgate_GS, tubes.hull(1.0 / high, 1.0 / low), router), 1.0, router)
    return _softmax_backward(layer, placed(dgate_GS), probs) if value in ("p", "ratio_st") else None


def _dlogits(layer: Layer, dgate_GS: Tube, daux: float, dz: float, forward: Forward) -> list[Tube]:
    """Return the gradients of the logits before the cap: the gate's, the balance loss's, the z-loss's.

    They stay apart because an implementation may add them at any point on the way to the parameters.
    """
    router, probs = layer.router, forward.probs_GSE
    parts: list[Tube] = []
    through_gate = _dlogits_of_gate(layer, dgate_GS, forward)
    if through_gate is not None:
        parts.append(through_gate)
    if daux:
        parts.append(_softmax_backward(layer, _dprobs_of_aux(layer, daux, forward), probs))
    if dz:
        own = tubes.may_store(tubes.softmax(forward.logits_GSE, router), layer.points.probs)  # its own softmax, or the stored one
        weighed_GS = tubes.scale(tubes.scale(forward.lse_GS, 2.0 * dz * forward.z_weight_GS, router), 1.0, router)
        parts.append(tubes.multiply(Tube(weighed_GS.value[..., None], weighed_GS.radius[..., None]), own, router))
    cap = layer.target.dialect.router.logit_cap
    if cap:
        # The slope of cap * tanh(raw / cap) falls with |raw|: its image lies between its values at the ends nearest to and farthest from 0.
        size, radius = np.abs(forward.raw_GSE.value), forward.raw_GSE.radius
        slope, high, low = (1.0 - np.tanh(end / cap) ** 2 for end in (size, np.maximum(size - radius, 0.0), size + radius))
        evaluation = (4.0 * router.functions.tanh_ulp + 4.0) * router.element_unit + 8.0 * tubes.OWN_UNIT
        slope_tube = Tube(slope, (np.maximum(high - slope, slope - low) + evaluation) * tubes.RADIUS_SLACK)
        parts = [tubes.multiply(part, slope_tube, router) for part in parts]
    size = sum((np.abs(part.value) + part.radius for part in parts), np.zeros(probs.value.shape))  # their sum may be what is stored
    return [tubes.may_store(part, layer.points.logits, size) for part in parts]


def gradient_tubes(layer: Layer, forward: Forward) -> dict[str, Tube]:
    """Return the tube of every gradient by the name of its value.

    Spec: S-BACK-1 to S-BACK-6.
    """
    dialect, case, experts, router, route = layer.target.dialect, layer.case, layer.experts, layer.router, forward.route
    G, S, D = layer.x_GSD.shape
    E = layer.params.w_router_DE.shape[1]
    kept_GS1, site = route.kept_GS[..., None], layer.gate_site
    dout = exact(np.where(layer.sits_out_GS[..., None], 0.0, np.asarray(case.dout, np.float64)))
    zeros = exact(np.zeros((G, S, D)))
    dkept, dpassed = tubes.where(kept_GS1, dout, zeros), tubes.where(kept_GS1, zeros, dout)
    gate_GS1 = Tube(forward.gate_GS.value[..., None], forward.gate_GS.radius[..., None])
    dgates: list[Tube] = [exact(np.zeros((G, S)))]
    dexpert_out = dkept
    if site in ("output", "input_and_output"):
        dgates.append(_inner(layer, dkept, forward.expert_out_GSD, D))
        dexpert_out = _stored(layer, tubes.multiply(dkept, gate_GS1, experts))
    dpacked, dfactor, dbias_scale, found = _experts_backward(layer, pack_tube(dexpert_out, route, E), forward)
    if site == "hidden":
        dfactor_GSF = unpack_tube(dfactor, route)
        dgates.append(_inner(layer, dfactor_GSF, exact(layer.inputs.hidden_mask_GSF), dfactor_GSF.value.shape[-1]))
        if layer.params.experts.b_out_ED.any():
            dgates.append(unpack_tube(Tube(dbias_scale.value[..., None], dbias_scale.radius[..., None]), route).at(np.s_[..., 0]))
    dx_scaled = unpack_tube(dpacked, route)
    dx_parts = [dx_scaled]
    if site.startswith("input"):
        dgates.append(_inner(layer, dx_scaled, forward.x_expert_GSD, D))
        dx_parts = [_stored(layer, tubes.multiply(dx_scaled, gate_GS1, experts))]
    if dialect.dispatch_grad == "straight_through":
        dgates.append(_inner(layer, dx_scaled, unpack_tube(forward.expertise.x_GECD, route), D))
    if dialect.drop.output == "x":
        dx_parts.append(dpassed)
    if dialect.drop.output == "x_times_gate":
        dgates.append(_inner(layer, dpassed, forward.x_expert_GSD, D))
        dx_parts.append(_stored(layer, tubes.multiply(dpassed, gate_GS1, experts)))
    dgate = _sum_of(dgates, experts, layer)
    parts = _dlogits(layer, dgate, float(case.get("daux", 0.0)), float(case.get("dz", 0.0)), forward) or [exact(np.zeros((G, S, E)))]
    w_router = exact(layer.params.w_router_DE)
    terms = len(parts)  # one accumulator may take all parts
    found["w_router"] = _sum_of(
        [tubes.contract("gsd,gse->de", forward.x_router_GSD, part, router, G * S * terms) for part in parts], router, layer, G * S * terms
    )
    found["b_router"] = _sum_of([tubes.total(part, (0, 1), router, G * S * terms) for part in parts], router, layer, G * S * terms)
    dx_router = _sum_of([tubes.contract("gse,de->gsd", part, w_router, router, E * terms) for part in parts], router, layer, E * terms)
    found["x"] = _dx(layer, dx_parts, dx_router, E * terms + 2 * layer.params.experts.w_in_EDF.shape[-1])
    if case.get("b_out") is not None and case.b_out.ndim == 1:
        found["b_out"] = tubes.total(dout, (0, 1), experts, G * S)
    return {name: tubes.store(tube, layer.points.gradients) for name, tube in found.items()}


def _dx(layer: Layer, dx_parts: list[Tube], dx_router: Tube, terms: int) -> Tube:
    """Join the experts' and the router's part, each through the noise that its branch went through."""
    factor = layer.inputs.noise_factor_GSD
    has_noise = (factor != 1.0).any()
    dx_router = _stored(layer, dx_router)
    if has_noise and leaks(layer.target.dialect, layer.points):
        joined = _sum_of([*dx_parts, dx_router], layer.experts, layer, terms)
        dx = tubes.multiply(joined, exact(factor), layer.router)
    else:
        through_noise = _stored(layer, tubes.multiply(dx_router, exact(factor), layer.router)) if has_noise else dx_router
        dx = _sum_of([*dx_parts, through_noise], layer.experts, layer, terms)
    zeroed_GS1 = (~layer.inputs.valid_GS & (layer.target.dialect.pad.zero_input is True))[..., None]
    return tubes.where(zeroed_GS1, exact(np.zeros_like(dx.value)), dx)
