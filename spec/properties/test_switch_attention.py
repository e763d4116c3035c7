# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Switch attention: V-HEADS-1 to V-SAT-2. Values in tubes of a dense evaluation, gradients as slopes at equal routes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.drawn import noise_of
from properties.harness import clause, draws, needs
from properties.model_tubes import masked_probs
from properties.operations import Operations
from properties.variant_tubes import (
    A64,
    ACTIVATIONS,
    POINTS,
    TOP_2,
    assert_gradients,
    assert_within,
    aux_of,
    balance_tubes,
    logits_tube,
    mask_of,
    z_tube,
)
from refswitch.proof.adjoint import dot
from refswitch.reference.capacity import Route
from refswitch.reference.switch_attention import SwitchAttentionInputs, SwitchAttentionParams, SwitchAttentionStatics
from refswitch.verify import tubes
from refswitch.verify.tubes import Tube, contract, exact, multiply

DAUX, DZ = 3.0, 0.5
D, F = 3, 7


class Plan(NamedTuple):
    """The structure of one example: B rows of L tokens, cut into G groups of S."""

    B: int
    L: int
    G: int
    E: int
    H: int
    K: int
    capacity: int
    is_causal: bool
    activation: str
    pads: str
    seed: int

    @property
    def S(self) -> int:
        """Tokens of one group."""
        return self.B * self.L // self.G


def plans(**given: Any) -> st.SearchStrategy[Plan]:
    """Draw a plan."""
    drawn: dict[str, Any] = {
        "B": st.sampled_from((2, 1, 3)), "L": st.sampled_from((5, 4, 1)), "G": st.just(1), "E": st.sampled_from((4, 2, 1)),
        "H": st.sampled_from((2, 3, 1)), "K": st.sampled_from((6, 4)), "capacity": st.integers(0, 5), "is_causal": st.booleans(),
        "activation": st.sampled_from(ACTIVATIONS), "pads": st.sampled_from(("none", "scattered")), "seed": st.integers(0, 2**20),
    }  # fmt: skip
    return st.builds(Plan, **(drawn | given)).map(lambda plan: plan._replace(G=plan.B))


EXAMPLES = [
    Plan(2, 5, 2, 4, 3, 6, 2, True, "silu", "scattered", 1),
    Plan(3, 4, 1, 2, 2, 6, 4, False, "gelu_erf", "none", 2),
    Plan(2, 6, 4, 4, 2, 4, 1, False, "gelu_tanh", "scattered", 3),
]


def random_of(plan: Plan) -> np.random.Generator:
    """Return the plan's generator."""
    return np.random.Generator(np.random.Philox(plan.seed))


def random_params(plan: Plan, random: np.random.Generator) -> SwitchAttentionParams:
    """Draw parameters."""
    E, H, K = plan.E, plan.H, plan.K
    shapes = ((D, E), (E, D, F), (E, F, H, K), (E, F, H, K), (H, K, D))
    return SwitchAttentionParams(*(random.normal(size=shape) / 2.0 for shape in shapes))


def random_route(plan: Plan, operations: Operations, random: np.random.Generator) -> Route:
    """Draw a route."""
    (G, S) = (plan.G, plan.S)
    expert_GS, claims_GS = random.integers(0, plan.E, (G, S)), random.random((G, S)) < 0.8
    return operations.slots_forward(expert_GS, claims_GS, np.broadcast_to(np.arange(S), (G, S)), plan.E, plan.capacity)


@clause("V-HEADS-1")
@draws(examples=EXAMPLES, plan=plans())
def test_pack_heads__adjoint_and_addresses(operations: Operations, plan: Plan) -> None:
    """A kept token's heads lie in its slot and come back, a dropped token gets zeros; <pack x, y> = <x, unpack y> exactly."""
    random, (G, S, E, H, K) = random_of(plan), (plan.G, plan.S, plan.E, plan.H, plan.K)
    route, C = random_route(plan, operations, random), plan.capacity + 1
    x_GSHK = 1.0 + np.arange(float(G * S * H * K)).reshape(G, S, H, K)
    packed = operations.pack_heads(x_GSHK, route, E, C)
    assert packed.shape == (G, E, C, H, K)
    for g, s in np.argwhere(route.kept_GS):
        assert np.array_equal(packed[g, route.expert_GS[g, s], route.slot_GS[g, s]], x_GSHK[g, s])
    assert np.array_equal(operations.unpack_heads(packed, route), np.where(route.kept_GS[..., None, None], x_GSHK, 0.0))
    y = random.integers(-9, 10, packed.shape).astype(float)
    assert dot(packed, y) == dot(x_GSHK, operations.unpack_heads(y, route))


def heads_tubes(
    x_GSD: np.ndarray, gate_GS: Tube, route: Route, mask_GSF: np.ndarray, params: SwitchAttentionParams, activation: str
) -> tuple[Tube, Tube]:
    """Return queries, scaled by K^(-1/2), and keys: gate times the token's expert's heads, 0 where it was dropped."""
    (G, S, _), (E, _, H, K) = x_GSD.shape, params.w_query_EFHK.shape
    found = []
    for w_EFHK, factor in ((params.w_query_EFHK, K**-0.5), (params.w_key_EFHK, 1.0)):
        value, radius = np.zeros((G, S, H, K)), np.zeros((G, S, H, K))
        for e in range(E):
            z = contract("gsd,df->gsf", exact(x_GSD), exact(params.w_in_EDF[e]), A64, D)
            hidden = multiply(tubes.activate(z, activation, A64), exact(mask_GSF), A64)
            heads = multiply(gate_GS.at((..., None, None)), contract("gsf,fhk->gshk", hidden, exact(w_EFHK[e]), A64, F), A64)
            heads = tubes.scale(heads, factor, A64)
            mine = (route.expert_GS == e) & route.kept_GS
            value[mine], radius[mine] = heads.value[mine], heads.radius[mine]
        found.append(Tube(value, radius))
    return found[0], found[1]


@clause("V-HEADS-2")
@needs("dropped", "slope", wide=True)
@draws(examples=EXAMPLES, plan=plans())
def test_heads__formula_and_slope(operations: Operations, plan: Plan) -> None:
    """Queries and keys share one hidden row, one gate and one route; the queries alone have K^(-1/2). All gradients are slopes."""
    random = random_of(plan)
    params, route, (G, S) = random_params(plan, random), random_route(plan, operations, random), (plan.G, plan.S)
    x_GSD, gate_GS, mask_GSF = random.normal(size=(G, S, D)), random.random((G, S)), mask_of(random, G, S, F)
    dquery, dkey = random.normal(size=(2, G, S, plan.H, plan.K))
    query, key, saved = operations.heads_forward(x_GSD, gate_GS, route, mask_GSF, params, plan.activation)
    query_tube, key_tube = heads_tubes(x_GSD, exact(gate_GS), route, mask_GSF, params, plan.activation)
    assert_within(query, query_tube, "query")
    assert_within(key, key_tube, "key")
    operations.meets("dropped", not route.kept_GS.all())
    back = operations.heads_backward(dquery, dkey, saved, params, plan.activation)

    def value(there: dict[str, np.ndarray]) -> tuple[float, int]:
        moved = params._replace(w_in_EDF=there["w_in"], w_query_EFHK=there["w_query"], w_key_EFHK=there["w_key"])
        one, other, _ = operations.heads_forward(there["x"], there["gate"], route, mask_GSF, moved, plan.activation)
        return float(np.sum(one * dquery) + np.sum(other * dkey)), 0

    arguments = {"x": x_GSD, "gate": gate_GS, "w_in": params.w_in_EDF, "w_query": params.w_query_EFHK, "w_key": params.w_key_EFHK}
    gradients = dict(zip(arguments, back, strict=True))
    operations.meets("slope", assert_gradients(value, arguments, gradients, noise_of([(query_tube, dquery), (key_tube, dkey)]), random) == 5)


def mix_tube(query: Tube, key: Tube, bias_HLM: np.ndarray, w_out_HKD: np.ndarray, allowed_BLM: np.ndarray, factor_BHLM: np.ndarray) -> Tube:
    """Return the keys mixed by softmax(query key + bias) and projected: the keys are the values."""
    (B, L, H, K), M = query.value.shape, key.value.shape[1]
    bias = exact(np.broadcast_to(bias_HLM, (B, H, L, M)))
    probs = masked_probs(contract("blhk,bmhk->bhlm", query, key, A64, K, [bias]), allowed_BLM, A64)
    mixed = contract("bhlm,bmhk->blhk", multiply(probs, exact(factor_BHLM), A64), key, A64, M)
    return contract("blhk,hkd->bld", mixed, exact(w_out_HKD), A64, H * K)


@clause("V-MIX-1")
@needs("hidden memory", "nothing to see", "slope", wide=True)
@draws(examples=EXAMPLES, plan=plans(L=st.sampled_from((5, 4, 2))))
def test_mix__formula_and_slope(operations: Operations, plan: Plan) -> None:
    """The output lies in the tube of its formula, whoever may be seen; gradients are slopes, the key's through score and value."""
    random, (B, L, H, K), M = random_of(plan), (plan.B, plan.L, plan.H, plan.K), plan.L + 1
    query, key, bias_HLM = random.normal(size=(B, L, H, K)), random.normal(size=(B, M, H, K)), random.normal(size=(H, L, M))
    w_out_HKD, factor_BHLM, dout_BLD = random.normal(size=(H, K, D)), mask_of(random, B, H, L, M), random.normal(size=(B, L, D))
    allowed_BLM = random.random((B, L, M)) < 0.75
    allowed_BLM[0, 0] = False
    operations.meets("hidden memory", not allowed_BLM.all())
    operations.meets("nothing to see")
    out_BLD, saved = operations.mix_forward(query, key, bias_HLM, w_out_HKD, allowed_BLM, factor_BHLM)
    tube = mix_tube(exact(query), exact(key), bias_HLM, w_out_HKD, allowed_BLM, factor_BHLM)
    assert_within(out_BLD, tube, "out")
    assert not out_BLD[0, 0].any()
    back = operations.mix_backward(dout_BLD, saved, w_out_HKD)

    def value(there: dict[str, np.ndarray]) -> tuple[float, int]:
        moved, _ = operations.mix_forward(there["query"], there["key"], there["bias"], there["w_out"], allowed_BLM, factor_BHLM)
        return float(np.sum(moved * dout_BLD)), 0

    arguments = {"query": query, "key": key, "bias": bias_HLM, "w_out": w_out_HKD}
    gradients = dict(zip(arguments, back, strict=True))
    operations.meets("slope", assert_gradients(value, arguments, gradients, noise_of([(tube, dout_BLD)]), random) == 4)


@clause("V-SAT-1", "V-SAT-2")
@needs("drop", "pads", "groups across rows", "slope", wide=True)
@draws(examples=EXAMPLES, plan=plans(), fewer=2)
def test_switch_attention__values_and_slopes(operations: Operations, plan: Plan) -> None:
    """One route serves queries, keys and values; output and losses lie in their tubes, and every gradient is the slope of their sum."""
    random, (B, L, H, E), (G, S) = random_of(plan), (plan.B, plan.L, plan.H, plan.E), (plan.G, plan.S)
    params, x_BLD = random_params(plan, random), random.normal(size=(B, L, D))
    valid_GS = random.random((G, S)) < 0.8 if plan.pads == "scattered" else np.ones((G, S), bool)
    seen_BLL = np.broadcast_to(np.tril(np.ones((L, L), bool)), (B, L, L)) if plan.is_causal else np.ones((B, L, L), bool)
    inputs = SwitchAttentionInputs(
        x_BLD, valid_GS, 1.0 + random.normal(size=(G, S, D)) / 8.0, mask_of(random, G, S, F), random.normal(size=(H, L, L)), seen_BLL,
        mask_of(random, B, H, L, L),
    )  # fmt: skip
    statics = SwitchAttentionStatics(plan.capacity, aux_of(plan.seed), TOP_2.z, plan.activation, POINTS)
    dout_BLD = random.normal(size=x_BLD.shape)
    outputs, saved = operations.switch_attention_forward(inputs, params, statics)
    x_GSD, route = x_BLD.reshape(G, S, D), outputs.route
    logits = logits_tube(x_GSD, inputs.noise_factor_GSD, params.w_router_DE, [])
    probs, expert_GS = tubes.softmax(logits, A64), np.argmax(logits.value, axis=-1)
    again = operations.slots_forward(expert_GS, valid_GS, np.broadcast_to(np.arange(S), (G, S)), E, plan.capacity)
    assert all(np.array_equal(mine, wanted) for mine, wanted in zip(route, again, strict=True))
    gate = Tube(*(np.take_along_axis(part, expert_GS[..., None], axis=-1)[..., 0] for part in probs))
    assert_within(outputs.gate_GS, gate, "gate")
    query, key = (
        Tube(*(part.reshape(B, L, H, plan.K) for part in tube))
        for tube in heads_tubes(x_GSD, gate, route, inputs.hidden_mask_GSF, params, plan.activation)
    )
    out = mix_tube(query, key, inputs.bias_HLL, params.w_out_HKD, seen_BLL, inputs.factor_BHLL)
    aux, z = balance_tubes(probs, expert_GS[..., None] == np.arange(E), valid_GS, route.kept_GS, statics.aux), z_tube(logits, valid_GS)
    named = {"out": (outputs.out_BLD, out), "aux_loss": (outputs.aux_loss, aux), "z_loss": (outputs.z_loss, z)}
    for name, (got, tube) in {**named, "query": (outputs.query_BLHK, query), "key": (outputs.key_BLHK, key)}.items():
        assert_within(got, tube, name)
    operations.meets("drop", np.any(valid_GS & ~route.kept_GS))
    operations.meets("pads", not valid_GS.all())
    operations.meets("groups across rows", G != B)

    def value(there: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
        moved = SwitchAttentionParams(**{name: there[name] for name in params._fields})
        found, _ = operations.switch_attention_forward(inputs._replace(x_BLD=there["x"], bias_HLL=there["bias"]), moved, statics)
        return float(np.sum(found.out_BLD * dout_BLD) + DAUX * found.aux_loss + DZ * found.z_loss), np.stack(found.route)

    noise = noise_of([(out, dout_BLD), (aux, np.asarray(DAUX)), (z, np.asarray(DZ))])
    dx_BLD, dbias_HLL, dparams = operations.switch_attention_backward(dout_BLD, DAUX, DZ, saved, params, statics)
    arguments, gradients = {"x": x_BLD, "bias": inputs.bias_HLL, **params._asdict()}, {"x": dx_BLD, "bias": dbias_HLL, **dparams._asdict()}
    operations.meets("slope", assert_gradients(value, arguments, gradients, noise, random))
