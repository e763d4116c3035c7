# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The experts' own computation: S-EXPERT-1, S-EXPERT-2; and the whole forward pass where every bit is known."""

from __future__ import annotations

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from properties.conditions import BARE_EXPERTS, DROPS_ZERO, MASKED, NO_BIAS, OUTER_GATE, UNGATED
from properties.harness import clause, draws, needs
from properties.implementation import Implementation
from properties.lattice import UNDERSTOOD, Plan, large, lattice_case, lattice_outputs, plans
from properties.scenes import EVERYTHING, INSIDE, ROUTE, SCORES, assert_same, assert_within, assert_zero, certain, play, replay
from properties.strategies import (
    LATE_EXPERTS,
    SQUARE,
    TAILS,
    changed,
    letters_of,
    permutations,
    recipes,
    reordered,
    stored,
    with_axis,
)
from refswitch.verify import tubes
from refswitch.verify.cases import Recipe
from refswitch.verify.tubes import exact

POWERS = st.sampled_from((1, -1, 3))


@clause("S-EXPERT-1", "S-EXPERT-2", "S-BACK-3", "S-BACK-4")
@draws(examples=[TAILS, LATE_EXPERTS, SQUARE], recipe=recipes(ties=""))
def test_experts__hidden_permutation(implementation: Implementation, recipe: Recipe) -> None:
    """The hidden units may come in any order, columns of the first layer and rows of the second alike: the last one counts like the first."""
    scene = play(implementation, recipe)
    target = implementation.target
    order = permutations(scene.case.sizes["F"], recipe.name)
    other = replay(implementation, with_axis(scene.case, target, "F", order))
    certain(scene)
    assert_same(scene, other, EVERYTHING, move=lambda name, array: reordered(array, letters_of(name, array, target), "F", order))


@clause("S-EXPERT-1", "S-EXPERT-2", "S-COMBINE-1")
@needs(only={"expert.act": ("relu",)} | UNGATED | DROPS_ZERO)
@draws(recipe=recipes(ties=""), power=POWERS)
def test_experts__relu_is_homogeneous(implementation: Implementation, recipe: Recipe, power: int) -> None:
    """A first layer times 2^k and a second times 2^-k compute the same output, to the bit."""
    scene = play(implementation, recipe)
    up, down = 2.0**power, 2.0**-power
    factors = {"w_in": up, "b_in": up, "w_out": down}
    arrays = {name: scene.case[name] * factor for name, factor in factors.items() if name in scene.case}
    other = replay(implementation, changed(scene.case, implementation.target, **arrays))
    assert_same(scene, other, (*ROUTE, *SCORES, "gate", "expert_out", "out"), is_exact=True)
    assert_same(scene, other, ("hidden",), times=up, is_exact=True)


@clause("S-EXPERT-1")
@needs("gated", exports=("hidden",), only={"gate.site": ("output",)})
@draws(recipe=recipes(ties=""), power=POWERS)
def test_experts__gated_is_linear_in_its_linear_half(implementation: Implementation, recipe: Recipe, power: int) -> None:
    """w_in and b_in are the half without the activation: twice them is twice the hidden row, to the bit."""
    scene = play(implementation, recipe)
    arrays = {name: scene.case[name] * 2.0**power for name in ("w_in", "b_in") if name in scene.case}
    other = replay(implementation, changed(scene.case, implementation.target, **arrays))
    assert_same(scene, other, ("hidden",), times=2.0**power, is_exact=True)


@clause("S-EXPERT-1", "S-EXPERT-2", "S-DROP-1")
@needs(only=NO_BIAS)
@draws(recipe=recipes(pads=""))
def test_experts__zero_token_outputs_zero(implementation: Implementation, recipe: Recipe) -> None:
    """Without biases a token of zeros outputs zeros."""
    scene = play(implementation, recipe)
    zeros = replay(implementation, changed(scene.case, implementation.target, x=np.zeros_like(scene.case.x)))
    assert_zero(zeros, ("out",))


@clause("S-EXPERT-1", "S-BACK-3", "S-BACK-4")
@needs("dropout", only=OUTER_GATE)
@draws(recipe=recipes(mask=True, ties=""), power=POWERS)
def test_experts__dropout_is_a_factor(implementation: Implementation, recipe: Recipe, power: int) -> None:
    """The mask multiplies the hidden row: a power of two comes through to the bit, ones are no mask, zeros leave the bias alone."""
    scene = play(implementation, recipe)
    target, ones_GSF = implementation.target, np.ones_like(scene.case.hidden_mask)
    bare, whole, scaled, empty = (
        replay(implementation, changed(scene.case, target, hidden_mask=mask)) for mask in (None, ones_GSF, ones_GSF * 2.0**power, ones_GSF * 0.0)
    )
    certain(bare)
    assert_same(bare, whole, EVERYTHING)
    assert_same(bare, scaled, ("hidden",), times=2.0**power)
    kept_GS = empty.route.kept_GS
    assert_zero(empty, ("hidden",), only=kept_GS)
    assert_zero(empty, ("dw_out", "dw_in", "dw_gate", "db_in", "db_gate"))
    if implementation.dialect.expert.bias == "none":
        assert_zero(empty, ("out",), only=kept_GS)


@clause("S-EXPERT-1", "S-EXPERT-2")
@needs("bias", exports=("hidden",), only=MASKED | OUTER_GATE)
@draws(recipe=recipes(ties="", noise=False))
def test_experts__bias_is_a_constant_column(implementation: Implementation, recipe: Recipe) -> None:
    """A bias is the weight of a coordinate that is always 1: given as a row of w_in, it computes the same hidden row; so does each expert's own."""
    scene = play(implementation, recipe)
    x_GSD, w_router_DE = np.array(scene.case.x), np.array(scene.case.w_router)
    x_GSD[..., -1], w_router_DE[-1] = 1.0, 0.0
    biased = changed(scene.case, implementation.target, x=x_GSD, w_router=w_router_DE, **_last_rows(scene.case, as_bias=True))
    columned = changed(scene.case, implementation.target, x=x_GSD, w_router=w_router_DE, **_last_rows(scene.case, as_bias=False))
    a, b = replay(implementation, biased), replay(implementation, columned)
    certain(a, b)
    real_GS = a.layer.inputs.valid_GS
    assert_same(a, b, (*ROUTE, *SCORES))
    assert_same(a, b, (*INSIDE, "out"), only_GS=real_GS)


def _last_rows(case: object, as_bias: bool) -> dict[str, np.ndarray]:
    """Return weights whose last row is 0 with the biases as they are, or the same biases in the last row and none beside."""
    arrays: dict[str, np.ndarray] = {}
    for weight, bias in (("w_in", "b_in"), ("w_gate", "b_gate")):
        if weight in case:  # type: ignore[operator]
            w_EDF, b_EF = np.array(case[weight]), np.array(case[bias])  # type: ignore[index]
            w_EDF[:, -1] = 0.0 if as_bias else b_EF
            arrays |= {weight: w_EDF, bias: b_EF if as_bias else np.zeros_like(b_EF)}
    return arrays


@clause("S-EXPERT-1", "S-ROUTE-1")
@needs(exports=("hidden",), only=BARE_EXPERTS | MASKED | {"gate.site": ("output",)})
@draws(
    examples=[(SQUARE, 1.0), (LATE_EXPERTS, 0.25)],
    recipe=recipes(ties="", mask=False, pads="", noise=False),
    value=st.sampled_from((1.0, 0.5, -2.0, 3.0, -0.25)),
)
def test_experts__activation_at_known_points(implementation: Implementation, recipe: Recipe, value: float) -> None:
    """A token on one axis reads one row of its expert's first layer: the hidden row is the activation of that row, product by product."""
    scene = play(implementation, recipe)
    D = scene.case.sizes["D"]
    axis_GS = permutations(D, recipe.name)[np.arange(scene.claims_GS.size) % D].reshape(scene.claims_GS.shape)
    x_GSD = np.where(axis_GS[..., None] == np.arange(D), value, 0.0)
    other = replay(implementation, changed(scene.case, implementation.target, x=x_GSD))
    certain(other)
    layer = other.layer

    def row(weight: str) -> tubes.Tube:
        w_EDF = np.asarray(other.case[weight], np.float64)
        product = tubes.multiply(exact(w_EDF[other.expert_GS, axis_GS]), exact(np.asarray(value)), layer.experts)
        return tubes.store(product, layer.points.z)

    hidden = tubes.activate(row("w_gate" if "w_gate" in other.case else "w_in"), other.case.activation, layer.experts)
    if "w_gate" in other.case:
        hidden = tubes.multiply(tubes.may_store(hidden, layer.points.z), row("w_in"), layer.experts)
    hidden = tubes.store(hidden, layer.points.hidden)
    kept = np.broadcast_to(other.route.kept_GS[..., None], hidden.value.shape)
    assert_within("hidden", other.outputs["hidden"], hidden, kept, "GSF")


@clause("S-EXPERT-2")
@needs(exports=("hidden", "expert_out"), only=BARE_EXPERTS | {"gate.site": ("output", "input", "input_and_output")})
@draws(examples=[TAILS], recipe=recipes(ties=""))
def test_experts__second_layer_reads_every_hidden_unit(implementation: Implementation, recipe: Recipe) -> None:
    """With one 1 in each column of w_out the expert's output is a choice of its hidden units, moved to the bit, the last ones too."""
    scene = play(implementation, recipe)
    sizes = scene.case.sizes
    unit_ED = np.arange(sizes["E"] * sizes["D"]).reshape(sizes["E"], sizes["D"]) * 7 % sizes["F"]
    unit_ED[:, -1] = sizes["F"] - 1
    w_EFD = np.arange(sizes["F"])[None, :, None] == unit_ED[:, None]
    other = replay(implementation, changed(scene.case, implementation.target, w_out=w_EFD))
    chosen_GSD = np.take_along_axis(np.asarray(other.outputs["hidden"], np.float64), unit_ED[other.expert_GS], axis=-1)
    expected = tubes.store(exact(chosen_GSD), other.layer.points.expert_out)
    looked_at = other.looked_at("expert_out") & np.isfinite(chosen_GSD)
    assert_within("expert_out", other.outputs["expert_out"], expected, looked_at, "GSD")


# every bit known


@clause(
    "S-ROUTE-3",
    "S-CAP-1",
    "S-CAP-2",
    "S-POS-1",
    "S-PACK-1",
    "S-EXPERT-1",
    "S-EXPERT-2",
    "S-GATE-1",
    "S-COMBINE-1",
    "S-DROP-1",
    "S-PAD-1",
    "S-PREC-1",
    is_oracle=True,
)
@needs("drop", "tie", only=UNDERSTOOD, exact_sums=True)
@draws(examples=[Plan("two-ways", 17, 4, 3, 2, 2), Plan("one-way", 11, 5, 6, 1, 3, "scattered", True)], plan=plans())
def test_switch_layer__exact_on_lattice(implementation: Implementation, plan: Plan) -> None:
    """On integers every output is known to the bit, whatever the order of summation and the format."""
    case = lattice_case(implementation, plan)
    scene = replay(implementation, case)
    expected = lattice_outputs(case, implementation.target)
    for name in (*ROUTE, "probs", *INSIDE, "out"):
        if name in scene.outputs:
            assert_within(name, scene.outputs[name], exact(np.asarray(expected[name], np.float64)), scene.looked_at(name), "GSD")


@clause("S-PACK-1", "S-DROP-1", "S-COMBINE-1")
@needs("drop", only=UNDERSTOOD | DROPS_ZERO | UNGATED, exact_sums=True)
@draws(examples=[Plan("round-trip", 17, 4, 3, 1, 2)], plan=plans(st.just(1)))
def test_pack__round_trip(implementation: Implementation, plan: Plan) -> None:
    """Experts that compute the identity, with a gate of 1, return every kept token as it came, and 0 for the others."""
    case = lattice_case(implementation, plan._replace(F=2 * (plan.E + 3), mask=False))
    E, D, F = case.w_in.shape
    assume(F >= 2 * D)
    both_DF = np.zeros((D, F))
    both_DF[np.arange(D), np.arange(D)], both_DF[np.arange(D), D + np.arange(D)] = 1.0, -1.0
    scale = large(implementation.target)
    identity = {"w_in": np.broadcast_to(both_DF * scale, (E, D, F)), "w_out": np.broadcast_to(both_DF.T / scale, (E, F, D))}
    biases = {name: np.zeros_like(case[name]) for name in ("b_in", "b_out") if name in case}
    scene = replay(implementation, changed(case, implementation.target, **identity, **biases))
    expected_GSD = np.where(scene.route.kept_GS[..., None], np.asarray(case.x, np.float64), 0.0)
    assert_within("out", scene.outputs["out"], exact(expected_GSD), letters="GSD")


@clause("S-PACK-1", "S-ROUTE-3", "S-CAP-1")
@needs("drop", only=UNDERSTOOD | DROPS_ZERO | UNGATED, exact_sums=True)
@draws(examples=[Plan("codes", 17, 4, 3, 1, 2)], plan=plans(st.just(1)))
def test_pack__experts_that_return_their_name(implementation: Implementation, plan: Plan) -> None:
    """Experts that return their own number spell the routing table in the output: each token's own expert, once, and 0 for the dropped."""
    case = lattice_case(implementation, plan._replace(mask=False))
    E, D, F = case.w_in.shape
    scale = large(implementation.target)
    w_in_EDF, w_out_EFD = np.zeros((E, D, F)), np.zeros((E, F, D))
    w_in_EDF[:, -1, 0], w_out_EFD[:, 0] = scale, (np.arange(E) + 1.0)[:, None] / scale
    biases = {name: np.zeros_like(case[name]) for name in ("b_in", "b_out") if name in case}
    scene = replay(implementation, changed(case, implementation.target, w_in=w_in_EDF, w_out=stored(w_out_EFD, implementation.target, "w"), **biases))
    expected = lattice_outputs(case, implementation.target)
    code_GS = np.where(expected["kept"], expected["expert"] + 1.0, 0.0)
    assert_within("out", scene.outputs["out"], exact(np.broadcast_to(code_GS[..., None], case.x.shape)), letters="GSD")


@clause("S-EXPERT-1", "S-EXPERT-2", "S-PACK-1", "S-PREC-1", "S-NOISE-2", is_oracle=True)
@needs("dropout")
@draws(examples=[LATE_EXPERTS, TAILS, SQUARE, Recipe("integers", S=27, D=7, E=1, F=5, integers=True)], recipe=recipes())
def test_experts__match_spec(implementation: Implementation, recipe: Recipe) -> None:
    """Hidden row and expert's output lie within the radius of the spec's formula on the layer's own stages."""
    scene = play(implementation, recipe)
    assert not scene.judged(("expert", "dispatch", "combine", "precision"))
