# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Several experts for each token: V-WANT-1 to V-TOP-2. Integers by plain loops, values in tubes of a dense evaluation, gradients as slopes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.drawn import noise_of
from properties.harness import clause, draws, needs
from properties.operations import Operations
from properties.variant_tubes import (
    A64,
    ACTIVATIONS,
    MESH,
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
from refswitch.reference.claims import EPSILON, Claims
from refswitch.reference.switch import SwitchParams
from refswitch.reference.top_k import TopKInputs, TopKStatics
from refswitch.verify import tubes
from refswitch.verify.tubes import Tube, exact

GATES = ("raw", "renormalised", "softmax_of_chosen")
POLICIES = ("all", "none", "threshold", "random", "gshard")
ORDERS = ("after_kept", "after_all", "by_token", "until_placed")
DAUX, DZ = 3.0, 0.5


class Plan(NamedTuple):
    """The structure of one example."""

    G: int
    S: int
    E: int
    K: int
    capacity: int
    gate: str
    policy: str
    order: str
    choose_on: str
    is_all_counted: bool
    second_loss: float
    activation: str
    is_gated: bool
    pads: str
    seed: int


def plans(**given: Any) -> st.SearchStrategy[Plan]:
    """Draw a plan; at most E choices."""
    drawn: dict[str, Any] = {
        "G": st.integers(1, 3), "S": st.sampled_from((7, 5, 9, 1, 0)), "E": st.sampled_from((4, 5, 2, 1)), "K": st.integers(1, 4),
        "capacity": st.integers(0, 5), "gate": st.sampled_from(GATES), "policy": st.sampled_from(POLICIES), "order": st.sampled_from(ORDERS),
        "choose_on": st.sampled_from(("probs", "logits")), "is_all_counted": st.booleans(), "second_loss": st.sampled_from((0.0, 0.5)),
        "activation": st.sampled_from(ACTIVATIONS), "is_gated": st.booleans(), "pads": st.sampled_from(("none", "scattered", "all")),
        "seed": st.integers(0, 2**20),
    }  # fmt: skip
    return st.builds(Plan, **(drawn | given)).map(lambda plan: plan._replace(K=min(plan.K, plan.E)))


EXAMPLES = [
    Plan(2, 9, 4, 2, 3, "renormalised", "random", "after_kept", "probs", False, 0.5, "gelu_tanh", False, "scattered", 1),
    Plan(2, 7, 5, 3, 2, "raw", "all", "until_placed", "probs", True, 0.0, "silu", True, "none", 2),
    Plan(1, 9, 4, 3, 3, "softmax_of_chosen", "gshard", "by_token", "logits", True, 0.5, "gelu_erf", True, "scattered", 3),
    Plan(2, 9, 4, 2, 2, "renormalised", "threshold", "after_all", "logits", False, 0.0, "silu", False, "scattered", 4),
    Plan(1, 7, 2, 2, 4, "renormalised", "none", "after_all", "probs", True, 0.5, "silu", True, "none", 5),
]


def random_of(plan: Plan) -> np.random.Generator:
    """Return the plan's generator."""
    return np.random.Generator(np.random.Philox(plan.seed))


# ----------------------------------------------------------------------------------------------------------------- the discrete part


@clause("V-WANT-1")
@needs("given up", "made use of")
@draws(
    examples=[(1, 3, "random", 0.2), (2, 4, "gshard", 0.2), (3, 3, "threshold", 0.2), (4, 2, "random", 0.0)],
    seed=st.integers(0, 2**20), K=st.integers(1, 4), policy=st.sampled_from(POLICIES), threshold=st.sampled_from((0.2, 0.25, 0.0, 0.5)),
)  # fmt: skip
def test_wanted_choices__by_rational_numbers(operations: Operations, seed: int, K: int, policy: str, threshold: float) -> None:
    """The first choice always; a later one by its share p / (sum p + 1e-9): above the threshold, or at odds of share / threshold or 2 share."""
    random = np.random.Generator(np.random.Philox(seed))
    chosen_GSK, uniform_GSK = random.integers(0, 9, (2, 11, K)) / 16.0, random.integers(0, 32, (2, 11, K)) / 32.0
    got = operations.wanted_choices(chosen_GSK, uniform_GSK, policy, threshold)
    assert (got.dtype, got.shape) == (np.bool_, chosen_GSK.shape)
    for g, s, k in np.ndindex(chosen_GSK.shape):
        share = Fraction(chosen_GSK[g, s, k]) / (sum(map(Fraction, chosen_GSK[g, s].tolist())) + Fraction(EPSILON))
        later = {
            "all": True, "none": False, "threshold": share > Fraction(threshold), "gshard": Fraction(uniform_GSK[g, s, k]) < 2 * share,
            "random": Fraction(uniform_GSK[g, s, k]) < share / max(Fraction(threshold), Fraction(EPSILON)),
        }[policy]  # fmt: skip
        operations.meets("given up", k and not later)
        operations.meets("made use of", k and later)
        assert got[g, s, k] == (k == 0 or later)


def served_by_hand(expert_SK: np.ndarray, wanted_SK: np.ndarray, tokens: list[int], E: int, capacity: int, order: str) -> dict[Any, tuple[int, bool]]:
    """Return slot and survival of every claim (s, k) that one group makes, one after the other."""
    K, before, found = expert_SK.shape[1], [0] * E, {}
    if order == "by_token":
        for s in tokens:
            for k in range(K):
                if wanted_SK[s, k]:
                    e = int(expert_SK[s, k])
                    found[s, k] = (before[e], before[e] < capacity)
                    before[e] += 1
        return found
    placed: set[int] = set()
    for k in range(K):
        asked, kept = [0] * E, [0] * E
        for s in tokens:
            e = int(expert_SK[s, k])
            if wanted_SK[s, k] and not (order == "until_placed" and s in placed):
                found[s, k] = (before[e] + asked[e], before[e] + asked[e] < capacity)
                asked[e] += 1
                kept[e] += found[s, k][1]
        placed |= {s for s, j in found if j == k and found[s, j][1]}
        before = [was + more for was, more in zip(before, asked if order == "after_all" else kept, strict=True)]
    return found


@clause("V-SERVE-1")
@needs("drop", "later choice kept")
@draws(examples=EXAMPLES, plan=plans())
def test_serve__one_claim_after_the_other(operations: Operations, plan: Plan) -> None:
    """In every order of service a claim's slot is the number of claims counted before it on its expert, and it is kept below the capacity."""
    random, (G, S, E, K) = random_of(plan), plan[:4]
    expert_GSK = np.argsort(random.random((G, S, E)), axis=-1)[..., :K]
    wanted_GSK, priority_GS = random.random((G, S, K)) < 0.75, np.argsort(random.random((G, S)), axis=-1)
    claims = operations.serve(expert_GSK, wanted_GSK, priority_GS, E, plan.capacity, plan.order)
    assert np.array_equal(claims.expert_GSK, expert_GSK)
    assert [part.shape for part in claims] == [(G, S, K)] * 3
    for g in range(G):
        wanted = served_by_hand(expert_GSK[g], wanted_GSK[g], np.argsort(priority_GS[g], kind="stable").tolist(), E, plan.capacity, plan.order)
        for s, k in np.ndindex(S, K):
            slot, kept = wanted.get((s, k), (None, False))
            assert claims.kept_GSK[g, s, k] == kept, (s, k)
            assert slot is None or claims.slot_GSK[g, s, k] == slot, (s, k)
    operations.meets("drop", np.any(wanted_GSK & ~claims.kept_GSK))
    operations.meets("later choice kept", np.any(claims.kept_GSK[..., 1:]))


@clause("V-SERVE-1")
@draws(examples=EXAMPLES, plan=plans(order=st.just("until_placed")))
def test_serve__no_token_left_behind(operations: Operations, plan: Plan) -> None:
    """Asking the next choice where there was no room keeps what appendix B keeps, one claim of a token at most."""
    random, (G, S, E, K) = random_of(plan), plan[:4]
    choices_GSK, valid_GS = np.argsort(random.random((G, S, E)), axis=-1)[..., :K], random.random((G, S)) < 0.75
    arrival_GS, wanted_GSK = np.broadcast_to(np.arange(S), (G, S)), np.broadcast_to(valid_GS[..., None], (G, S, K))
    claims = operations.serve(choices_GSK, wanted_GSK, arrival_GS, E, plan.capacity, "until_placed")
    route = operations.no_token_left_behind(choices_GSK, valid_GS, E, plan.capacity)
    assert np.all(claims.kept_GSK.sum(axis=-1) == route.kept_GS)
    for part_GSK, part_GS in ((claims.expert_GSK, route.expert_GS), (claims.slot_GSK, route.slot_GS)):
        assert np.array_equal(np.sum(part_GSK * claims.kept_GSK, axis=-1), part_GS * route.kept_GS)


def claims_of(operations: Operations, plan: Plan, random: np.random.Generator) -> Claims:
    """Return claims of a plan."""
    (G, S, E, K) = plan[:4]
    expert_GSK, wanted_GSK = np.argsort(random.random((G, S, E)), axis=-1)[..., :K], random.random((G, S, K)) < 0.75
    return operations.serve(expert_GSK, wanted_GSK, np.broadcast_to(np.arange(S), (G, S)), E, plan.capacity, plan.order)


@clause("V-MOVE-1")
@draws(examples=EXAMPLES, plan=plans())
def test_pack_choices__adjoint_and_addresses(operations: Operations, plan: Plan) -> None:
    """Each kept claim's row, and none else, lies in its slot and comes back; <pack x, y> = <x, unpack y> exactly."""
    random, (G, S, E, K), D = random_of(plan), plan[:4], 3
    claims, C = claims_of(operations, plan, random), plan.capacity + 1
    x_GSKD = 1.0 + np.arange(float(G * S * K * D)).reshape(G, S, K, D)
    packed = operations.pack_choices(x_GSKD, claims, E, C)
    assert packed.shape == (G, E, C, D)
    for g, s, k in np.argwhere(claims.kept_GSK):
        assert np.array_equal(packed[g, claims.expert_GSK[g, s, k], claims.slot_GSK[g, s, k]], x_GSKD[g, s, k])
    assert np.count_nonzero(packed.any(axis=-1)) == claims.kept_GSK.sum()
    assert np.array_equal(operations.unpack_choices(packed, claims), np.where(claims.kept_GSK[..., None], x_GSKD, 0.0))
    y = random.integers(-9, 10, packed.shape).astype(float)
    assert dot(packed, y) == dot(x_GSKD, operations.unpack_choices(y, claims))
    route = operations.route_of(claims)
    assert [part.shape for part in route] == [(G, S * K)] * 3
    assert all(np.array_equal(part.reshape(G, S, K), claim) for part, claim in zip(route, claims, strict=True))


# ------------------------------------------------------------------------------------------------------------------ gates and losses


def gate_tube(logits_GSE: Tube, expert_GSK: np.ndarray, value: str) -> Tube:
    """Return p_k, p_k / (sum_j p_j + 1e-9), or the softmax of the chosen logits."""
    probs = tubes.softmax(logits_GSE, A64)
    chosen = Tube(*(np.take_along_axis(part, expert_GSK, axis=-1) for part in probs))
    if value == "raw":
        return chosen
    if value == "softmax_of_chosen":
        return tubes.softmax(Tube(*(np.take_along_axis(part, expert_GSK, axis=-1) for part in logits_GSE)), A64)
    total = tubes.add(tubes.total(chosen, -1, A64, expert_GSK.shape[-1]), exact(np.full(expert_GSK.shape[:2], EPSILON)), A64).at((..., None))
    low, high = chosen.value - chosen.radius, chosen.value + chosen.radius
    box = tubes.hull(low / (total.value + total.radius), high / (total.value - total.radius))
    return tubes.scale(box, 1.0, A64)


@clause("V-GATE-1")
@needs("several choices", *GATES)
@draws(examples=EXAMPLES, plan=plans())
def test_gates_forward__their_formula(operations: Operations, plan: Plan) -> None:
    """Raw, renormalised over the choices with 1e-9, or the softmax of the chosen logits: within their tubes, in the gate's format."""
    random, (G, S, E, K) = random_of(plan), plan[:4]
    logits_GSE, expert_GSK = 3.0 * random.normal(size=(G, S, E)), np.argsort(random.random((G, S, E)), axis=-1)[..., :K]
    operations.meets("several choices", K > 1)
    operations.meets(plan.gate)
    probs = softmax_by_hand(logits_GSE)
    gate_GSK, _ = operations.gates_forward(probs, logits_GSE, expert_GSK, plan.gate, POINTS)
    assert_within(gate_GSK, gate_tube(exact(logits_GSE), expert_GSK, plan.gate), "gate")
    narrow = POINTS._replace(gate=FORMATS["bfloat16"])
    stored_GSK, _ = operations.gates_forward(probs, logits_GSE, expert_GSK, plan.gate, narrow)
    assert np.array_equal(stored_GSK, round_to(gate_GSK, narrow.gate))
    read = POINTS._replace(choice=FORMATS["bfloat16"])
    coarse_GSK, _ = operations.gates_forward(probs, logits_GSE, expert_GSK, "raw", read)
    assert np.array_equal(coarse_GSK, np.take_along_axis(round_to(probs, read.choice), expert_GSK, axis=-1))


def softmax_by_hand(logits_GSE: np.ndarray) -> np.ndarray:
    """Return the softmax."""
    exp_GSE = np.exp(logits_GSE - logits_GSE.max(axis=-1, keepdims=True))
    return exp_GSE / exp_GSE.sum(axis=-1, keepdims=True)


@clause("V-GATE-2")
@needs("several choices", *GATES, wide=True)
@draws(examples=EXAMPLES, plan=plans(S=st.sampled_from((5, 3, 1))))
def test_gates_backward__finite_difference(operations: Operations, plan: Plan) -> None:
    """The slope along probabilities and logits: each gate's gradient goes to the chosen entries alone."""
    random, (G, S, E, K) = random_of(plan), plan[:4]
    logits_GSE, expert_GSK, dgate_GSK = (
        random.normal(size=(G, S, E)),
        np.argsort(random.random((G, S, E)), axis=-1)[..., :K],
        random.normal(size=(G, S, K)),
    )
    probs_GSE = softmax_by_hand(logits_GSE)
    operations.meets("several choices", K > 1)
    operations.meets(plan.gate)
    _, saved = operations.gates_forward(probs_GSE, logits_GSE, expert_GSK, plan.gate, POINTS)
    dprobs_GSE, dlogits_GSE = operations.gates_backward(dgate_GSK, saved, plan.gate)

    def value(there: dict[str, np.ndarray]) -> tuple[float, int]:
        gate_GSK, _ = operations.gates_forward(there["probs"], there["logits"], expert_GSK, plan.gate, POINTS)
        return float(np.sum(gate_GSK * dgate_GSK)), 0

    noise = noise_of([(gate_tube(exact(logits_GSE), expert_GSK, plan.gate), dgate_GSK)])
    arguments, gradients = {"probs": probs_GSE, "logits": logits_GSE}, {"probs": dprobs_GSE, "logits": dlogits_GSE}
    assert assert_gradients(value, arguments, gradients, noise, random) == 2
    placed = operations.place_choices(dgate_GSK, expert_GSK, E)
    assert np.array_equal(np.take_along_axis(placed, expert_GSK, axis=-1), dgate_GSK)
    assert np.count_nonzero(placed) == np.count_nonzero(dgate_GSK)


@clause("V-COUNT-1")
@needs("pads", "several counted")
@draws(examples=EXAMPLES, plan=plans(K=st.integers(1, 3), E=st.sampled_from((4, 3, 5))))
def test_choice_counts__mean_over_choices(operations: Operations, plan: Plan) -> None:
    """The mean over the first choices of how many valid tokens chose each expert: made use of or not, kept or not."""
    random, (G, S, E, K) = random_of(plan), plan[:4]
    claims, valid_GS = claims_of(operations, plan, random), random.random((G, S)) < 0.75
    counted = K if plan.is_all_counted else 1
    operations.meets("pads", not valid_GS.all())
    operations.meets("several counted", counted > 1)
    got = operations.choice_counts(claims, np.broadcast_to(valid_GS[..., None], (G, S, K)), valid_GS, E, counted, TOP_2.aux)
    wanted = [
        [sum(int(claims.expert_GSK[g, s, k] == e and valid_GS[g, s]) for s in range(S) for k in range(counted)) / counted for e in range(E)]
        for g in range(G)
    ]
    assert np.array_equal(got, np.array(wanted).reshape(G, E))


def second_tube(probs_GSE: Tube, expert_GSK: np.ndarray, valid_GS: np.ndarray) -> Tube:
    """Return the second-place loss: mean over groups of E sum_e f2_e P2_e, P2 of the shares without the first choice."""
    G, S, E = probs_GSE.value.shape
    first_GSE, second_GSE = ((expert_GSK[..., k, None] == np.arange(E)) & valid_GS[..., None] for k in (0, 1))
    left = tubes.where(first_GSE, exact(np.zeros(first_GSE.shape)), probs_GSE)
    total = tubes.add(tubes.total(left, -1, A64, E), exact(np.full((G, S), EPSILON)), A64).at((..., None))
    low, high = left.value - left.radius, left.value + left.radius
    share = tubes.scale(
        tubes.hull(np.maximum(low, 0.0) / (total.value + total.radius), high / np.maximum(total.value - total.radius, EPSILON / 2)), 1.0, A64
    )
    f_G1E = second_GSE.sum(axis=1, keepdims=True) * (E / (G * max(S, 1) ** 2))
    return tubes.total(tubes.scale(share, np.broadcast_to(f_G1E, share.value.shape), A64), (0, 1, 2), A64, G * S * E)


@clause("V-SECOND-1")
@needs("pads")
@draws(examples=EXAMPLES, plan=plans(E=st.sampled_from((4, 5, 2)), S=st.sampled_from((7, 5, 1))))
def test_second_place__formula_and_slope(operations: Operations, plan: Plan) -> None:
    """The balance of second choices lies in its tube, 1 where they are spread evenly; its gradient is the slope along the probabilities."""
    random, (G, S, E) = random_of(plan), plan[:3]
    probs_GSE = softmax_by_hand(random.normal(size=(G, S, E)))
    expert_GSK, valid_GS = np.argsort(-probs_GSE, axis=-1)[..., :2], random.random((G, S)) < 0.75
    operations.meets("pads", not valid_GS.all())
    value, saved = operations.second_place_forward(probs_GSE, expert_GSK, valid_GS)
    tube = second_tube(exact(probs_GSE), expert_GSK, valid_GS)
    assert_within(value, tube, "second")
    dprobs_GSE = operations.second_place_backward(2.0, saved)

    def along(there: dict[str, np.ndarray]) -> tuple[float, int]:
        return 2.0 * float(operations.second_place_forward(there["probs"], expert_GSK, valid_GS)[0]), 0

    assert assert_gradients(along, {"probs": probs_GSE}, {"probs": dprobs_GSE}, noise_of([(tube, np.asarray(2.0))]), random) == 1
    even_GSE = np.full((1, E, E), 1.0 / E)
    turns_GSK = np.stack([np.arange(E), (np.arange(E) + 1) % E], axis=-1)[None]
    value, _ = operations.second_place_forward(even_GSE, turns_GSK, np.ones((1, E), bool))
    assert_within(value, second_tube(exact(even_GSE), turns_GSK, np.ones((1, E), bool)), "second at balance")


# --------------------------------------------------------------------------------------------------------------------------- the layer


class Layer(NamedTuple):
    """One call."""

    inputs: TopKInputs
    params: SwitchParams
    statics: TopKStatics
    dout_GSD: np.ndarray


def layer(plan: Plan, random: np.random.Generator) -> Layer:
    """Draw the data of a plan."""
    (G, S, E, K), D, F = plan[:4], 3, 6
    params, x_GSD = random_layer(random, E, D, F, plan.is_gated), random.normal(size=(G, S, D))
    inputs = TopKInputs(
        x_GSD, valid_mask(random, plan.pads, G, S), 1.0 + random.normal(size=x_GSD.shape) / 8.0, random.normal(size=(G, S, E)) / 4.0,
        -np.log(-np.log(random.random((G, S, E)))), random.random((G, S, K)), np.argsort(random.random((G, S)), axis=-1), mask_of(random, G, S, K, F),
    )  # fmt: skip
    counted = K if plan.is_all_counted else 1
    routing = (K, plan.choose_on, plan.gate, plan.policy, 0.2, plan.order, plan.capacity)
    statics = TopKStatics(*routing, aux_of(plan.seed), counted, plan.second_loss, TOP_2.z, plan.activation, POINTS)
    return Layer(inputs, params, statics, random.normal(size=x_GSD.shape))


def chosen_by_hand(scores: list[float], K: int) -> list[int]:
    """Return the K highest of one token, the lowest index among equals."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:K]


def layer_tubes(plan: Plan, call: Layer, outputs: Any) -> tuple[Tube, Tube, Tube]:
    """Return tubes of the output and of both losses, each token at every expert, along the claims that were made."""
    inputs, params, (G, S, E, K), F = call.inputs, call.params, plan[:4], 6
    claims = outputs.claims
    logits = logits_tube(inputs.x_GSD, inputs.noise_factor_GSD, params.w_router_DE, [params.b_router_E, inputs.noise_term_GSE])
    gate, mask_GSEF = gate_tube(logits, claims.expert_GSK, plan.gate), np.zeros((G, S, E, F))
    weight = Tube(np.zeros((G, S, E)), np.zeros((G, S, E)))
    for g, s, k in np.ndindex(G, S, K):
        e = claims.expert_GSK[g, s, k]
        mask_GSEF[g, s, e] = inputs.hidden_mask_GSKF[g, s, k]
        if claims.kept_GSK[g, s, k]:
            weight.value[g, s, e], weight.radius[g, s, e] = gate.value[g, s, k], gate.radius[g, s, k]
    out = weighted(weight, expert_tubes(inputs.x_GSD, mask_GSEF, params.experts, plan.activation), params.b_shared_D)
    out = tubes.where(inputs.valid_GS[..., None], out, exact(np.zeros(out.value.shape)))
    probs, counted = tubes.softmax(logits, A64), call.statics.counted_choices
    chosen_GSKE = claims.expert_GSK[..., None] == np.arange(E)
    aux = balance_tubes(probs, chosen_GSKE[:, :, :counted].sum(axis=2) / counted, inputs.valid_GS, claims.kept_GSK.any(axis=-1), call.statics.aux)
    if plan.second_loss:
        scores_GSE = outputs.probs_GSE if plan.choose_on == "probs" else outputs.logits_GSE + inputs.choice_term_GSE
        best_GSK = np.array([[chosen_by_hand(scores_GSE[g, s].tolist(), 2) for s in range(S)] for g in range(G)]).reshape(G, S, -1)
        second = second_tube(probs, best_GSK[..., [0, -1]], inputs.valid_GS)
        aux = tubes.add(aux, tubes.scale(second, plan.second_loss, A64), A64)
    return out, aux, z_tube(logits, inputs.valid_GS)


@clause("V-TOP-1", "V-TOP-2")
@needs("drop", "two experts", "given up", "pads", "second loss", "slope", *GATES, *ORDERS, wide=True)
@draws(examples=EXAMPLES, plan=plans(S=st.sampled_from((7, 5, 9, 1))), fewer=2)
def test_top_k__values_and_slopes(operations: Operations, plan: Plan) -> None:
    """Choices are the K highest scores, output and losses lie in their tubes, and every gradient is the slope of their sum at equal claims."""
    random = random_of(plan)
    call = layer(plan, random)
    (inputs, params, statics, dout_GSD), (G, S, E, K) = call, plan[:4]
    outputs, saved = operations.top_k_forward(inputs, params, statics)
    claims = outputs.claims
    scores_GSE = outputs.probs_GSE if plan.choose_on == "probs" else outputs.logits_GSE + inputs.choice_term_GSE
    for g, s in np.ndindex(G, S):
        assert claims.expert_GSK[g, s].tolist() == chosen_by_hand(scores_GSE[g, s].tolist(), K)
    chosen_GSK = np.take_along_axis(outputs.probs_GSE, claims.expert_GSK, axis=-1)
    wanted_GSK = operations.wanted_choices(chosen_GSK, inputs.uniform_GSK, plan.policy, 0.2) & inputs.valid_GS[..., None]
    assert np.array_equal(outputs.wanted_GSK, wanted_GSK)
    again = operations.serve(claims.expert_GSK, wanted_GSK, inputs.priority_GS, E, plan.capacity, plan.order)
    assert all(np.array_equal(mine, wanted) for mine, wanted in zip(claims, again, strict=True))
    tubes_of = layer_tubes(plan, call, outputs)
    for name, tube, got in zip(("out", "aux_loss", "z_loss"), tubes_of, outputs[:3], strict=True):
        assert_within(got, tube, name)
    assert_within(outputs.gate_GSK, gate_tube(exact(outputs.logits_GSE), claims.expert_GSK, plan.gate), "gate")
    assert np.all(outputs.expert_out_GSKD[~claims.kept_GSK] == 0.0)
    operations.meets("drop", np.any(wanted_GSK & ~claims.kept_GSK))
    operations.meets("two experts", np.any(claims.kept_GSK.sum(axis=-1) > 1))
    operations.meets("given up", np.any(inputs.valid_GS[..., None] & ~wanted_GSK))
    operations.meets("pads", plan.pads == "scattered")
    operations.meets("second loss", plan.second_loss > 0.0)
    operations.meets(plan.gate, K > 1)
    operations.meets(plan.order, K > 1)

    def value(there: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
        x_GSD, moved = layer_of(there, params)
        found, _ = operations.top_k_forward(inputs._replace(x_GSD=x_GSD), moved, statics)
        return float(np.sum(found.out_GSD * dout_GSD) + DAUX * found.aux_loss + DZ * found.z_loss), np.stack([*found.claims, found.wanted_GSK])

    noise = noise_of(list(zip(tubes_of, (dout_GSD, np.asarray(DAUX), np.asarray(DZ)), strict=True)))
    gradients = arguments_of(*operations.top_k_backward(dout_GSD, DAUX, DZ, saved, params, statics))
    operations.meets("slope", assert_gradients(value, arguments_of(inputs.x_GSD, params), gradients, noise, random))


@clause("V-TOP-1", "V-TOP-2")
@draws(
    examples=EXAMPLES[:2],
    plan=plans(K=st.just(1), gate=st.just("raw"), choose_on=st.just("probs"), is_all_counted=st.just(False), second_loss=st.just(0.0)),
)
def test_top_k__one_raw_choice_is_the_switch_layer(operations: Operations, plan: Plan) -> None:
    """One choice with its raw gate has every output and gradient of the Switch layer, to the bit, in every order of service."""
    from refswitch.reference.switch import Statics, SwitchInputs
    from refswitch.spec_data import with_knob

    plan = plan._replace(K=1, gate="raw", choose_on="probs", is_all_counted=False, second_loss=0.0)
    random = random_of(plan)
    (inputs, params, statics, dout_GSD), (G, S, E) = layer(plan, random), plan[:3]
    outputs, saved = operations.top_k_forward(inputs, params, statics)
    mine = arguments_of(*operations.top_k_backward(dout_GSD, DAUX, DZ, saved, params, statics))
    dialect = with_knob(with_knob((TOP_2, MESH, with_knob(TOP_2, "aux.denom", "kept"))[plan.seed % 3], "priority", "random"), "pad.zero_input", False)
    zeros_GSE = np.zeros((G, S, E))
    switch = SwitchInputs(*inputs[:4], zeros_GSE, inputs.priority_GS, inputs.hidden_mask_GSKF[:, :, 0])
    layer_statics = Statics(dialect, POINTS, plan.activation, plan.capacity)
    theirs, kept = operations.switch_forward(switch, params, layer_statics)
    wanted = arguments_of(*operations.switch_backward(dout_GSD, DAUX, DZ, kept, params, layer_statics))
    assert np.array_equal(outputs.out_GSD, theirs.out_GSD)
    assert (outputs.aux_loss, outputs.z_loss) == (theirs.aux_loss, theirs.z_loss)
    assert [name for name, value in wanted.items() if not np.array_equal(mine[name], value)] == []


@clause("V-TOP-1", "V-TOP-2")
@needs("narrow", "tie")
@draws(examples=EXAMPLES[:1], plan=plans())
def test_top_k__rounds_where_it_says(operations: Operations, plan: Plan) -> None:
    """With storage in bfloat16 output, gates and gradients lie on its grid, the router's copy of x is rounded, and the choice reads the rounded."""
    random, bf16 = random_of(plan), FORMATS["bfloat16"]
    inputs, params, statics, dout_GSD = layer(plan._replace(choose_on="probs"), random)
    params, zeros_GSE = params._replace(b_router_E=np.zeros(plan.E)), np.zeros_like(inputs.noise_term_GSE)
    inputs = inputs._replace(x_GSD=inputs.x_GSD / 64.0, noise_term_GSE=zeros_GSE)  # probabilities that are equal when rounded
    narrow = POINTS._replace(out=bf16, gate=bf16, gradients=bf16, router=FORMATS["float32"], choice=bf16)
    outputs, saved = operations.top_k_forward(inputs, params, statics._replace(points=narrow))
    gradients = arguments_of(*operations.top_k_backward(dout_GSD, DAUX, DZ, saved, params, statics._replace(points=narrow)))
    operations.meets("narrow", outputs.claims.kept_GSK.any())
    read_GSE = round_to(outputs.probs_GSE, bf16)
    for g, s in np.ndindex(plan.G, plan.S):
        assert outputs.claims.expert_GSK[g, s].tolist() == chosen_by_hand(read_GSE[g, s].tolist(), plan.K)
        operations.meets("tie", len(np.unique(read_GSE[g, s])) < len(np.unique(outputs.probs_GSE[g, s])))
    for name, value in {"out": outputs.out_GSD, "gate": outputs.gate_GSK, **gradients}.items():
        assert np.array_equal(value, round_to(value, bf16)), name
    exact_copy = inputs._replace(noise_factor_GSD=np.ones_like(inputs.x_GSD), x_GSD=round_to(inputs.x_GSD * inputs.noise_factor_GSD, narrow.router))
    same, _ = operations.top_k_forward(exact_copy, params, statics._replace(points=narrow))
    assert np.array_equal(same.logits_GSE, outputs.logits_GSE)
