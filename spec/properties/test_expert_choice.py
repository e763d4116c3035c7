# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Experts that choose their tokens: V-PICK-1 to V-EC-2. Integers by plain loops, values in tubes of a dense evaluation, gradients as slopes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.drawn import noise_of
from properties.harness import clause, draws, needs
from properties.operations import Operations
from properties.variant_tubes import (
    A64,
    ACTIVATIONS,
    POINTS,
    TOP_2,
    arguments_of,
    assert_gradients,
    assert_within,
    aux_of,
    balance_tubes,
    expert_tubes,
    layer_of,
    logits_tube,
    mask_of,
    random_layer,
    valid_mask,
    weighted,
    z_tube,
)
from refswitch.numbers.precision import FORMATS, round_to
from refswitch.proof.adjoint import dot
from refswitch.reference.expert_choice import ExpertChoiceInputs, ExpertChoiceStatics, Picks
from refswitch.verify import tubes
from refswitch.verify.tubes import Tube, exact

RULES = ("expert_selection", "expert_choice", "switch_max")
DAUX, DZ = 3.0, 0.5


class Plan(NamedTuple):
    """The structure of one example."""

    G: int
    S: int
    E: int
    capacity: int
    rule: str
    activation: str
    is_gated: bool
    pads: str
    seed: int


def plans(**given: Any) -> st.SearchStrategy[Plan]:
    """Draw a plan."""
    drawn: dict[str, Any] = {
        "G": st.integers(1, 3), "S": st.sampled_from((7, 5, 9, 1, 0)), "E": st.sampled_from((4, 3, 2, 1)), "capacity": st.integers(0, 6),
        "rule": st.sampled_from(RULES), "activation": st.sampled_from(ACTIVATIONS), "is_gated": st.booleans(),
        "pads": st.sampled_from(("none", "scattered", "all")), "seed": st.integers(0, 2**20),
    }  # fmt: skip
    return st.builds(Plan, **(drawn | given))


EXAMPLES = [
    Plan(2, 7, 4, 3, "expert_selection", "silu", False, "scattered", 1),
    Plan(2, 9, 3, 4, "expert_choice", "gelu_erf", True, "scattered", 2),
    Plan(2, 9, 3, 2, "switch_max", "gelu_tanh", True, "scattered", 3),
    Plan(1, 5, 2, 6, "switch_max", "silu", False, "none", 4),
    Plan(1, 0, 3, 2, "expert_selection", "silu", False, "none", 5),
]


def random_of(plan: Plan) -> np.random.Generator:
    """Return the plan's generator."""
    return np.random.Generator(np.random.Philox(plan.seed))


def picked_by_hand(scores_S: list[float], eligible_S: list[bool], capacity: int) -> list[int]:
    """Return the tokens that one expert takes, the highest first, the lowest index among equals."""
    return sorted((s for s, asks in enumerate(eligible_S) if asks), key=lambda s: (-scores_S[s], s))[:capacity]


@clause("V-PICK-1")
@needs("tie", "slot left empty", "token left")
@draws(examples=EXAMPLES, plan=plans())
def test_pick_tokens__the_highest_first(operations: Operations, plan: Plan) -> None:
    """Each expert's slots hold its eligible tokens by falling score, ties to the lowest index, no more than slots or tokens; the rest are empty."""
    random, (G, S, E) = random_of(plan), plan[:3]
    scores_GSE, eligible_GSE = random.integers(0, 4, (G, S, E)) / 4.0, random.random((G, S, E)) < 0.6
    picks = operations.pick_tokens(scores_GSE, eligible_GSE, plan.capacity)
    assert [part.shape for part in picks] == [(G, E, min(plan.capacity, S))] * 2
    operations.meets("tie", len(np.unique(scores_GSE)) < scores_GSE.size)
    for g, e in np.ndindex(G, E):
        wanted = picked_by_hand(scores_GSE[g, :, e].tolist(), eligible_GSE[g, :, e].tolist(), plan.capacity)
        kept = picks.kept_GEC[g, e]
        assert picks.token_GEC[g, e][kept].tolist() == wanted
        assert kept.tolist() == [c < len(wanted) for c in range(len(kept))]
        operations.meets("slot left empty", len(wanted) < len(kept))
        operations.meets("token left", len(wanted) < eligible_GSE[g, :, e].sum())


def picks_of(operations: Operations, plan: Plan, random: np.random.Generator) -> Picks:
    """Return picks of a plan."""
    shape = plan[:3]
    return operations.pick_tokens(random.random(shape), random.random(shape) < 0.6, plan.capacity)


@clause("V-PICK-2")
@draws(examples=EXAMPLES, plan=plans())
def test_gather__adjoint_and_addresses(operations: Operations, plan: Plan) -> None:
    """A slot holds its token's row, an empty one zeros; the way back adds up the slots of a token; <gather x, y> = <x, scatter y> exactly."""
    random, (G, S, _), D = random_of(plan), plan[:3], 3
    picks, x_GSD = picks_of(operations, plan, random), random.integers(-9, 10, (G, S, D)).astype(float)
    gathered = operations.gather(x_GSD, picks)
    assert gathered.shape == (*picks.token_GEC.shape, D)
    for g, e, c in np.ndindex(picks.token_GEC.shape):
        wanted = x_GSD[g, picks.token_GEC[g, e, c]] if picks.kept_GEC[g, e, c] else np.zeros(D)
        assert np.array_equal(gathered[g, e, c], wanted)
    y_GECD = random.integers(-9, 10, gathered.shape).astype(float)
    assert dot(gathered, y_GECD) == dot(x_GSD, operations.scatter(y_GECD, picks, S))


@clause("V-PICK-2")
@needs("dropped")
@draws(examples=EXAMPLES, plan=plans())
def test_route_of_picks__where_each_token_has_one_expert(operations: Operations, plan: Plan) -> None:
    """A token that is held has its slot's number and is kept; served so by falling gate the Switch layer keeps the same tokens in the same slots."""
    random, (G, S, E) = random_of(plan), plan[:3]
    scores_GSE, valid_GS = random.integers(1, 9, (G, S, E)) / 8.0, random.random((G, S)) < 0.75
    first_GS = np.argmax(scores_GSE, axis=-1)
    picks = operations.pick_tokens(scores_GSE, (first_GS[..., None] == np.arange(E)) & valid_GS[..., None], plan.capacity)
    route = operations.route_of_picks(picks, first_GS)
    slots = {(g, int(picks.token_GEC[g, e, c])): c for g, e, c in np.argwhere(picks.kept_GEC)}
    for g, s in np.ndindex(G, S):
        assert route.kept_GS[g, s] == ((g, s) in slots)
        assert route.slot_GS[g, s] == slots.get((g, s), 0)
    operations.meets("dropped", np.any(valid_GS & ~route.kept_GS))
    assert np.array_equal(route.expert_GS, first_GS)
    assert route.slot_GS.dtype.kind == "i"
    by_gate = operations.slots_forward(first_GS, valid_GS, operations.order_by_gate(scores_GSE.max(axis=-1)), E, plan.capacity)
    assert np.array_equal(by_gate.kept_GS, route.kept_GS)
    assert np.array_equal(by_gate.slot_GS[route.kept_GS], route.slot_GS[route.kept_GS])


def scores_tube(logits_GSE: Tube, valid_GS: np.ndarray, rule: str) -> Tube:
    """Return the softmax over experts, or over a group's valid tokens, 0 for padding."""
    if rule != "expert_selection":
        return tubes.softmax(logits_GSE, A64)
    value, radius = np.zeros(logits_GSE.value.shape), np.zeros(logits_GSE.value.shape)
    for g in range(len(value)):
        if valid_GS[g].any():
            rows = tubes.softmax(Tube(logits_GSE.value[g, valid_GS[g]].T, logits_GSE.radius[g, valid_GS[g]].T), A64)
            value[g, valid_GS[g]], radius[g, valid_GS[g]] = rows.value.T, rows.radius.T
    return Tube(value, radius)


@clause("V-SCORE-1")
@needs("over tokens", "over experts", "pads", "a group of padding", wide=True)
@draws(examples=EXAMPLES, plan=plans())
def test_scores__formula_and_slope(operations: Operations, plan: Plan) -> None:
    """Probabilities lie in their tubes, over a group's valid tokens or over experts, however large the logits; the gradient is the slope."""
    random, (G, S, E) = random_of(plan), plan[:3]
    logits_GSE, valid_GS, dprobs_GSE = 2.0 * random.normal(size=(G, S, E)), valid_mask(random, plan.pads, G, S), random.normal(size=(G, S, E))
    operations.meets("over tokens", plan.rule == "expert_selection")
    operations.meets("over experts", plan.rule != "expert_selection")
    operations.meets("pads", not valid_GS.all())
    operations.meets("a group of padding", plan.pads == "all" and plan.rule == "expert_selection")
    probs_GSE, saved = operations.scores_forward(logits_GSE, valid_GS, plan.rule, POINTS)
    tube = scores_tube(exact(logits_GSE), valid_GS, plan.rule)
    assert_within(probs_GSE, tube, "probs")
    large, _ = operations.scores_forward(logits_GSE * 1024.0, valid_GS, plan.rule, POINTS)
    assert_within(large, scores_tube(exact(logits_GSE * 1024.0), valid_GS, plan.rule), "probs of large logits")
    narrow = POINTS._replace(probs=FORMATS["bfloat16"])
    stored, _ = operations.scores_forward(logits_GSE, valid_GS, plan.rule, narrow)
    assert np.array_equal(stored, round_to(probs_GSE, narrow.probs))
    dlogits_GSE = operations.scores_backward(dprobs_GSE, saved, plan.rule)

    def value(there: dict[str, np.ndarray]) -> tuple[float, int]:
        return float(np.sum(operations.scores_forward(there["logits"], valid_GS, plan.rule, POINTS)[0] * dprobs_GSE)), 0

    assert assert_gradients(value, {"logits": logits_GSE}, {"logits": dlogits_GSE}, noise_of([(tube, dprobs_GSE)]), random) == 1


def spread_tube(probs_GSE: Tube, valid_GS: np.ndarray) -> Tube:
    """Return the mean over groups of n sum_s a_s^2, a_s the mean over experts."""
    G, S, E = probs_GSE.value.shape
    share = tubes.scale(tubes.total(probs_GSE, 2, A64, E), 1.0 / E, A64)
    squares = tubes.where(valid_GS, tubes.multiply(share, share, A64), exact(np.zeros(valid_GS.shape)))
    return tubes.total(tubes.scale(tubes.total(squares, 1, A64, S), valid_GS.sum(axis=1) / G, A64), 0, A64, G)


@clause("V-SCORE-2")
@needs("pads")
@draws(examples=EXAMPLES, plan=plans())
def test_spread_loss__formula_and_slope(operations: Operations, plan: Plan) -> None:
    """The loss lies in its tube, is 1 where all tokens have the same share, padding or not, and its gradient is the slope."""
    random, (G, S, E) = random_of(plan), plan[:3]
    probs_GSE, valid_GS = random.random((G, S, E)), random.random((G, S)) < 0.75
    valid_GS[:, :1] = True
    operations.meets("pads", not valid_GS.all())
    loss, saved = operations.spread_loss(probs_GSE, valid_GS)
    tube = spread_tube(exact(probs_GSE), valid_GS)
    assert_within(loss, tube, "spread loss")
    even_GSE = np.broadcast_to(valid_GS[..., None] / valid_GS.sum(axis=1)[:, None, None], (G, S, E))
    assert_within(
        operations.spread_loss(even_GSE, valid_GS)[0],
        Tube(np.asarray(float(S > 0)), 4.0 * spread_tube(exact(even_GSE), valid_GS).radius),
        "loss at balance",
    )

    def value(there: dict[str, np.ndarray]) -> tuple[float, int]:
        return 2.0 * float(operations.spread_loss(there["probs"], valid_GS)[0]), 0

    gradients = {"probs": 2.0 * saved.dvalue_dprobs_GSE}
    assert assert_gradients(value, {"probs": probs_GSE}, gradients, noise_of([(tube, np.asarray(2.0))]), random) == 1


@clause("V-EC-1", "V-EC-2")
@needs("several experts", "left over", "pads", "slope", *RULES, wide=True)
@draws(examples=EXAMPLES, plan=plans(), fewer=2)
def test_expert_choice__values_and_slopes(operations: Operations, plan: Plan) -> None:
    """Picks are the highest scores, the output and both losses lie in their tubes, and every gradient is the slope of their sum at equal picks."""
    random, (G, S, E, capacity), D, F = random_of(plan), plan[:4], 3, 6
    params, x_GSD = random_layer(random, E, D, F, plan.is_gated), random.normal(size=(G, S, D))
    C, dout_GSD = min(capacity, S), random.normal(size=(G, S, D))
    inputs = ExpertChoiceInputs(x_GSD, valid_mask(random, plan.pads, G, S), 1.0 + random.normal(size=x_GSD.shape) / 8.0, mask_of(random, G, E, C, F))
    statics = ExpertChoiceStatics(plan.rule, capacity, aux_of(plan.seed), TOP_2.z, plan.activation, POINTS)
    outputs, saved = operations.expert_choice_forward(inputs, params, statics)
    picks, valid_GS = outputs.picks, inputs.valid_GS
    first_GS = np.argmax(outputs.probs_GSE, axis=-1)
    eligible_GSE = valid_GS[..., None] & ((first_GS[..., None] == np.arange(E)) | (plan.rule != "switch_max"))
    again = operations.pick_tokens(outputs.probs_GSE, eligible_GSE, capacity)
    assert all(np.array_equal(mine, wanted) for mine, wanted in zip(picks, again, strict=True))
    logits = logits_tube(x_GSD, inputs.noise_factor_GSD, params.w_router_DE, [params.b_router_E])
    probs = scores_tube(logits, valid_GS, plan.rule)
    assert_within(outputs.probs_GSE, probs, "probs")
    mask_GSEF, is_held_GSE = np.zeros((G, S, E, F)), np.zeros((G, S, E), bool)
    for g, e, c in np.argwhere(picks.kept_GEC):
        is_held_GSE[g, picks.token_GEC[g, e, c], e] = True
        mask_GSEF[g, picks.token_GEC[g, e, c], e] = inputs.hidden_mask_GECF[g, e, c]
        assert outputs.gate_GEC[g, e, c] == outputs.probs_GSE[g, picks.token_GEC[g, e, c], e]
    assert np.all(outputs.gate_GEC[~picks.kept_GEC] == 0.0)
    weight = tubes.where(is_held_GSE, probs, exact(np.zeros(is_held_GSE.shape)))
    if plan.rule == "expert_selection":
        weight = tubes.scale(weight, 1.0 / np.maximum(is_held_GSE.sum(axis=-1, keepdims=True), 1), A64)
    dense = weighted(weight, expert_tubes(x_GSD, mask_GSEF, params.experts, plan.activation), params.b_shared_D)
    out = tubes.where(valid_GS[..., None], dense, exact(np.zeros(x_GSD.shape)))
    balance = balance_tubes(probs, first_GS[..., None] == np.arange(E), valid_GS, is_held_GSE.any(axis=-1), statics.aux)
    aux = {"expert_selection": spread_tube(probs, valid_GS), "expert_choice": exact(0.0), "switch_max": balance}[plan.rule]
    z = z_tube(logits, valid_GS)
    for name, tube, got in (("out", out, outputs.out_GSD), ("aux_loss", aux, outputs.aux_loss), ("z_loss", z, outputs.z_loss)):
        assert_within(got, tube, name)
    operations.meets("several experts", np.any(is_held_GSE.sum(axis=-1) > 1))
    operations.meets("left over", np.any(valid_GS & ~is_held_GSE.any(axis=-1)))
    operations.meets("pads", plan.pads == "scattered")
    operations.meets(plan.rule)

    def value(there: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
        moved_GSD, moved = layer_of(there, params)
        found, _ = operations.expert_choice_forward(inputs._replace(x_GSD=moved_GSD), moved, statics)
        return float(np.sum(found.out_GSD * dout_GSD) + DAUX * found.aux_loss + DZ * found.z_loss), np.stack([*found.picks])

    noise = noise_of([(out, dout_GSD), (aux, np.asarray(DAUX)), (z, np.asarray(DZ))])
    gradients = arguments_of(*operations.expert_choice_backward(dout_GSD, DAUX, DZ, saved, params, statics))
    operations.meets("slope", assert_gradients(value, arguments_of(x_GSD, params), gradients, noise, random))


@clause("V-EC-1", "V-EC-2")
@needs("narrow")
@draws(examples=EXAMPLES[:2], plan=plans())
def test_expert_choice__rounds_where_it_says(operations: Operations, plan: Plan) -> None:
    """With storage in bfloat16 output, gates and every returned gradient lie on its grid, and the router's copy of x is rounded."""
    random, (G, S, E, capacity), D, F, bf16 = random_of(plan), plan[:4], 3, 6, FORMATS["bfloat16"]
    params, x_GSD = random_layer(random, E, D, F, plan.is_gated), random.normal(size=(G, S, D))
    narrow = POINTS._replace(out=bf16, gate=bf16, gradients=bf16, router=FORMATS["float32"], choice=FORMATS["tf32"])
    noise_GSD = 1.0 + random.normal(size=x_GSD.shape) / 8.0
    inputs = ExpertChoiceInputs(x_GSD, valid_mask(random, plan.pads, G, S), noise_GSD, np.ones((G, E, min(capacity, S), F)))
    statics = ExpertChoiceStatics(plan.rule, capacity, aux_of(plan.seed), TOP_2.z, plan.activation, narrow)
    outputs, saved = operations.expert_choice_forward(inputs, params, statics)
    gradients = arguments_of(*operations.expert_choice_backward(x_GSD, DAUX, DZ, saved, params, statics))
    operations.meets("narrow", outputs.picks.kept_GEC.any())
    for name, value in {"out": outputs.out_GSD, "gate": outputs.gate_GEC, **gradients}.items():
        assert np.array_equal(value, round_to(value, bf16)), name
    read_GSE = round_to(outputs.probs_GSE, narrow.choice)
    for g, e, c in np.argwhere(outputs.picks.kept_GEC):
        assert outputs.gate_GEC[g, e, c] == round_to(read_GSE[g, outputs.picks.token_GEC[g, e, c], e], bf16)
    exact_copy = inputs._replace(noise_factor_GSD=np.ones_like(x_GSD), x_GSD=round_to(x_GSD * noise_GSD, narrow.router))
    same, _ = operations.expert_choice_forward(exact_copy, params, statics)
    assert np.array_equal(same.probs_GSE, outputs.probs_GSE)
