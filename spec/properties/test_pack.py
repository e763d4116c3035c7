# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The way to the expert and back, what is dropped, padding: S-PACK-1, S-COMBINE-1, S-DROP-1, S-PAD-1; and what the order of things may change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from properties.conditions import DROPS_ZERO, FIXED_ORDER, LINEAR_LOGITS, MASKED, OUTER_GATE, OWN_BIAS, ROUTED, WHOLE_PADS
from properties.harness import clause, draws, needs
from properties.implementation import Implementation
from properties.scenes import (
    EVERYTHING,
    FORWARD,
    INSIDE,
    LOSSES,
    OF_EXPERTS,
    OF_ROUTER,
    ROUTE,
    SCORES,
    Scene,
    assert_same,
    assert_within,
    assert_zero,
    certain,
    play,
    replay,
)
from properties.strategies import (
    CROWD,
    LATE_EXPERTS,
    MANY_EXPERTS,
    OVERFLOW_IN_GROUPS,
    SQUARE,
    SQUARE_ROUTER,
    TAILS,
    TOKENS_AS_EXPERTS,
    changed,
    joined,
    letters_of,
    permutations,
    recipes,
    reordered,
    with_axis,
)
from refswitch.numbers.precision import FORMATS
from refswitch.verify import layer as stages
from refswitch.verify import tubes
from refswitch.verify.cases import Recipe
from refswitch.verify.tubes import Tube, exact

PASSED = {"zero": 0.0, "x": 1.0}
PADS = st.sampled_from(("right", "left", "scattered"))


# the order of things


@clause(
    "S-PACK-1", "S-COMBINE-1", "S-ROUTE-1", "S-EXPERT-1", "S-EXPERT-2", "S-AUX-1", "S-Z-1", "S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", "S-PAD-1"
)
@needs("pad", "noise", only=ROUTED)
@draws(examples=[TAILS, MANY_EXPERTS, SQUARE, Recipe("scattered", S=9, D=5, E=3, F=7, pads="scattered", noise=True)], recipe=recipes(ties=""))
def test_switch_layer__token_permutation(implementation: Implementation, recipe: Recipe) -> None:
    """Tokens in another order give the same rows in that order, and the same losses and weights' gradients, where who comes first decides nothing.

    That is so where nothing is dropped, and where the priority comes as data.
    """
    by_data = implementation.dialect.priority == "random"
    scene = play(implementation, recipe if by_data else replace(recipe, capacity=None))
    assume(by_data or not scene.dropped_GS.any())
    target = implementation.target
    order = permutations(scene.case.sizes["S"], recipe.name)
    other = replay(implementation, with_axis(scene.case, target, "S", order))
    certain(scene, other)

    def moved(name: str, array: np.ndarray) -> np.ndarray:
        return reordered(array, letters_of(name, array, target), "S", order)

    assert_same(scene, other, [name for name in EVERYTHING if by_data or name != "slot"], move=moved)


@clause(
    "S-PACK-1", "S-ROUTE-1", "S-ROUTE-2", "S-GATE-1", "S-EXPERT-1", "S-CAP-1", "S-AUX-1", "S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", "S-BACK-5"
)
@needs("drop", "empty_expert", only=ROUTED | WHOLE_PADS | MASKED | {"aux.f.drops": ("include", "exclude")})
@draws(
    examples=[TAILS, MANY_EXPERTS, LATE_EXPERTS, OVERFLOW_IN_GROUPS, SQUARE_ROUTER, Recipe("late-and-tight", S=23, D=5, E=13, F=4, capacity=2)],
    recipe=recipes(ties="", pads=""),
)
def test_switch_layer__expert_relabelling(implementation: Implementation, recipe: Recipe) -> None:
    """Experts in another order, weights and router's columns alike, serve the same tokens with the same results."""
    scene = play(implementation, recipe)
    target = implementation.target
    order = permutations(scene.E, recipe.name)
    other = replay(implementation, with_axis(scene.case, target, "E", order))
    certain(scene, other)
    assume(scene.is_single and other.is_single)  # between equals the lowest index wins
    name_of = np.argsort(order)

    def moved(name: str, array: np.ndarray) -> np.ndarray:
        if name == "expert" and array.dtype != bool:
            return name_of[array.astype(np.int64)]
        return reordered(array, letters_of(name, array, target), "E", order)

    assert_same(scene, other, EVERYTHING, move=moved)


@clause("S-CAP-1", "S-POS-1", "S-AUX-1", "S-Z-1", "S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", "S-BACK-5", "S-NOISE-1", "S-PACK-1")
@needs("several_groups", "drop_in_a_later_group", "pad", "noise", only=ROUTED)
@draws(
    examples=[
        replace(OVERFLOW_IN_GROUPS, G=2, noise=True),
        replace(OVERFLOW_IN_GROUPS, G=2, pads="scattered", noise=True),
        Recipe("own-share", S=43, D=5, E=3, F=4, G=2, hot=1, everyone=True),
    ],
    recipe=recipes(G=2, ties=""),
)
def test_switch_layer__groups_are_calls(implementation: Implementation, recipe: Recipe) -> None:
    """Two groups give what two calls give: the rows side by side, the mean balance loss, the sum of the weights' gradients."""
    target = implementation.target
    whole = play(implementation, recipe)
    assume(whole.case.sizes["G"] == 2)
    valid_G = whole.layer.inputs.valid_GS.sum(axis=1)
    if valid_G[0] != valid_G[1]:  # the z-loss's denominators differ between the two calls
        whole = replay(implementation, changed(whole.case, target, dz=0.0))
    halves = []
    for g in range(2):
        alone = with_axis(whole.case, target, "G", np.array([g]))
        share = {name: 0.5 * alone[name] for name in ("daux", "dz") if name in alone}
        halves.append(replay(implementation, changed(alone, target, **share)))
    certain(whole, *halves)
    for g, half in enumerate(halves):
        only = (np.arange(2) == g)[:, None] & np.ones_like(whole.claims_GS)
        assert_same(half, whole, (*FORWARD, "dx"), move=lambda name, array: np.broadcast_to(array, (2, *array.shape[1:])), only_GS=only)
    _assert_joint(whole, halves, "aux_loss", [0.5, 0.5])
    rows_G = valid_G if implementation.dialect.z.denom == "valid" else np.ones(2)
    if rows_G.all():
        _assert_joint(whole, halves, "z_loss", list(rows_G / rows_G.sum()))
    if FORMATS[implementation.profile.storage.gradients].precision >= FORMATS["float32"].precision:  # else each call rounds its own sum
        for name in (*OF_EXPERTS, *OF_ROUTER):
            _assert_joint(whole, halves, name, [1.0, 1.0])


def _assert_joint(whole: Scene, halves: list[Scene], name: str, weights: list[float]) -> None:
    """Assert that an output of the whole is the weighed sum of the halves'."""
    if not (whole.has(name) and all(half.has(name) for half in halves)):
        return
    parts = [half.around(name) for half in halves]
    value = sum(weight * part.value for weight, part in zip(weights, parts, strict=True))
    size = sum(weight * (part.radius + tubes.OWN_UNIT * np.abs(part.value)) for weight, part in zip(weights, parts, strict=True))
    assert_within(name, whole.outputs[name], Tube(value, size + whole.tube(name).radius))


@clause("S-AUX-1", "S-Z-1", "S-BACK-3", "S-BACK-4", "S-BACK-5", "S-PACK-1")
@needs("several_groups", "drop", only=ROUTED)
@draws(examples=[replace(OVERFLOW_IN_GROUPS, G=1)], recipe=recipes(G=1, ties="", noise=False))
def test_switch_layer__a_group_twice(implementation: Implementation, recipe: Recipe) -> None:
    """The same group twice: the losses and their gradients stay, the experts' gradients double."""
    target = implementation.target
    assume("groups" in target.features)
    once = play(implementation, recipe)
    twice = replay(implementation, joined([once.case, once.case], target, "G"))
    certain(once, twice)
    quiet = {name: 0.0 for name in ("daux", "dz") if name in once.case}
    assert_same(once, twice, LOSSES)
    assert_same(once, twice, FORWARD, move=lambda _, array: np.concatenate([array, array]))
    a, b = (replay(implementation, changed(scene.case, target, **quiet)) for scene in (once, twice))
    assert_same(a, b, (*OF_EXPERTS, *OF_ROUTER), times=2.0)
    silent = [
        replay(implementation, changed(scene.case, target, dout=np.zeros_like(scene.case.dout))) for scene in (once, twice) if "dout" in scene.case
    ]
    if silent:
        assert_same(*silent, OF_ROUTER)


@clause("S-PACK-1", "S-ROUTE-3", "S-COMBINE-1")
@needs(only=ROUTED)
@draws(recipe=recipes(capacity=None, noise=False, pads="", mask=False, ties=""))
def test_switch_layer__duplicate_tokens(implementation: Implementation, recipe: Recipe) -> None:
    """A token that comes twice gets the same output twice, when nothing is dropped; f, P and the z-loss do not see it."""
    target = implementation.target
    once = play(implementation, recipe)
    assume(not once.dropped_GS.any() and "select_noise" not in once.case)
    doubled = joined([once.case, once.case], target, "S")
    S = once.case.sizes["S"]
    extra = {"priority": np.concatenate([once.case.priority, once.case.priority + S], axis=1)} if "priority" in once.case else {}
    twice = replay(implementation, changed(doubled, target, capacity=2 * once.case.capacity, **extra))
    certain(once, twice)
    assume(not twice.dropped_GS.any())
    names = [name for name in FORWARD if name != "slot"]
    assert_same(once, twice, names, move=lambda _, array: np.concatenate([array, array], axis=1))
    assert_same(once, twice, LOSSES)


@clause("S-PACK-1", "S-EXPERT-1", "S-EXPERT-2")
@needs("over_10_experts", "over_128_experts", "drop")
@draws(examples=[MANY_EXPERTS, LATE_EXPERTS, TAILS, OVERFLOW_IN_GROUPS, replace(MANY_EXPERTS, name="many-2", capacity=1)], recipe=recipes(ties=""))
def test_experts__weights_touch_own_tokens_alone(implementation: Implementation, recipe: Recipe) -> None:
    """Another expert's weights reach none of a token's results: one expert is silenced, and its tokens alone change."""
    scene = play(implementation, recipe)
    assume(scene.route.kept_GS.any())
    g, s = np.argwhere(scene.route.kept_GS)[-1]
    chosen = int(scene.expert_GS[g, s])
    silenced = {
        name: np.where((np.arange(scene.E) == chosen).reshape(-1, *[1] * (scene.case[name].ndim - 1)), 0.0, scene.case[name]) for name in ("w_out",)
    }
    if "b_out" in scene.case and scene.case.b_out.ndim == 2:
        silenced["b_out"] = np.where((np.arange(scene.E) == chosen)[:, None], 0.0, scene.case.b_out)
    other = replay(implementation, changed(scene.case, implementation.target, **silenced))
    certain(scene)
    own_GS = scene.expert_GS == chosen
    assert_same(scene, other, (*ROUTE, *SCORES, *INSIDE, "out"), only_GS=~own_GS)
    shared = implementation.dialect.expert.bias == "shared_out"
    if not shared:
        assert_zero(other, ("out",), only=own_GS & other.route.kept_GS)


# combine and drop


@clause("S-COMBINE-1", "S-EXPERT-2", "S-DROP-1")
@needs("drop", only=DROPS_ZERO)
@draws(examples=[(OVERFLOW_IN_GROUPS, -1.0)], recipe=recipes(ties=""), factor=st.sampled_from((2.0, -1.0, -4.0, 0.125)))
def test_combine__linear_in_second_layer(implementation: Implementation, recipe: Recipe, factor: float) -> None:
    """Weights of the second layer times a power of two, or negated, give outputs times that, to the bit; nothing else is in the output."""
    scene = play(implementation, recipe)
    second = {name: scene.case[name] * factor for name in ("w_out", "b_out") if name in scene.case}
    other = replay(implementation, changed(scene.case, implementation.target, **second))
    assert_same(scene, other, (*ROUTE, *SCORES, "gate", "hidden", *LOSSES), is_exact=True)
    assert_same(scene, other, ("expert_out", "out"), times=factor, is_exact=True)


@clause("S-COMBINE-1", "S-GATE-1", "S-EXPERT-2")
@needs("bias", exports=("gate", "out"), only=OUTER_GATE)
@draws(recipe=recipes(ties=""))
def test_combine__bias_is_weighed_by_gate(implementation: Implementation, recipe: Recipe) -> None:
    """With w_out 0 a kept token's output is gate times b_out: the gate weighs the bias too, once, and the bias is added once."""
    scene = play(implementation, recipe)
    other = replay(implementation, changed(scene.case, implementation.target, w_out=np.zeros_like(scene.case.w_out)))
    bias_GSD = exact(np.asarray(other.case.b_out, np.float64)[other.expert_GS])
    gate_GS1 = exact(np.asarray(other.outputs["gate"], np.float64)[..., None])
    expected = tubes.store(tubes.multiply(gate_GS1, bias_GSD, other.layer.experts), other.layer.points.out)
    kept = np.broadcast_to(other.route.kept_GS[..., None], expected.value.shape)
    assert_within("out", other.outputs["out"], expected, kept, "GSD")


@clause("S-COMBINE-1")
@needs(exports=("gate", "expert_out"), only=OWN_BIAS | {"gate.site": ("output",)})
@draws(examples=[CROWD, TAILS, TOKENS_AS_EXPERTS], recipe=recipes())
def test_combine__gate_weighs_once(implementation: Implementation, recipe: Recipe) -> None:
    """A kept token's output is its own gate times its own expert's output, rounded as declared."""
    scene = play(implementation, recipe)
    gate_GS1, out_GSD = (exact(np.asarray(scene.outputs[name], np.float64)) for name in ("gate", "expert_out"))
    gate_GS1 = Tube(gate_GS1.value[..., None], gate_GS1.radius[..., None])
    expected = tubes.store(tubes.multiply(gate_GS1, out_GSD, scene.layer.experts), scene.layer.points.out)
    assert_within("out", scene.outputs["out"], expected, np.broadcast_to(scene.route.kept_GS[..., None], expected.value.shape), "GSD")


@clause("S-DROP-1")
@needs("drop")
@draws(examples=[OVERFLOW_IN_GROUPS, TAILS], recipe=recipes(capacity=st.sampled_from((1, 2, 0, 3))))
def test_drop__outputs_what_the_dialect_says(implementation: Implementation, recipe: Recipe) -> None:
    """A token without a slot outputs zero, its input, or its input times its gate; the experts' weights are not in it."""
    scene = play(implementation, recipe)
    assume(scene.dropped_GS.any())
    certain(scene)
    rule = implementation.dialect.drop.output
    if rule == "x_times_gate":
        gate = stages.gate_stage(scene.layer, scene.tube("probs"), scene.tube("logits"), scene.expert_GS)
        passed = tubes.multiply(Tube(gate.value[..., None], gate.radius[..., None]), stages.noise_stage(scene.layer)[1], scene.layer.experts)
    else:
        passed = exact(PASSED[rule] * scene.layer.x_GSD)
    if implementation.dialect.expert.bias == "shared_out":
        passed = tubes.add(passed, exact(np.broadcast_to(scene.layer.params.b_shared_D, passed.value.shape)), scene.layer.experts)
    passed = tubes.store(passed, scene.layer.points.out)
    assert_within("out", scene.outputs["out"], passed, np.broadcast_to(scene.dropped_GS[..., None], passed.value.shape), "GSD")


@clause("S-DROP-1", "S-PACK-1", "S-CAP-2", "S-BACK-3", "S-BACK-4")
@needs("drop", only=LINEAR_LOGITS | FIXED_ORDER | DROPS_ZERO | ROUTED, wide=True)
@draws(examples=[OVERFLOW_IN_GROUPS, TAILS], recipe=recipes(capacity=st.sampled_from((2, 1, 3)), ties="", losses=(0.0, 0.0), noise=False))
def test_drop__content_reaches_nobody(implementation: Implementation, recipe: Recipe) -> None:
    """A dropped token that grows by 2^20 goes where it went and is dropped: no other row, no expert's gradient sees it."""
    scene = play(implementation, recipe)
    assume(scene.dropped_GS.any())
    grown_GSD = np.where(scene.dropped_GS[..., None], scene.case.x * 2.0**20, scene.case.x)
    other = replay(implementation, changed(scene.case, implementation.target, x=grown_GSD))
    certain(scene, other)
    assert_same(scene, other, ROUTE)
    assert_same(scene, other, (*SCORES, *INSIDE, "out", "dx"), only_GS=~scene.dropped_GS)
    assert_same(scene, other, OF_EXPERTS)


# against another evaluation


@clause("S-PACK-1", "S-COMBINE-1", "S-DROP-1", "S-PAD-1", "S-PAD-2", is_oracle=True)
@needs("drop_not_on_expert_0", "over_128_experts")
@draws(examples=[MANY_EXPERTS, TAILS, CROWD, TOKENS_AS_EXPERTS], recipe=recipes())
def test_combine__matches_spec(implementation: Implementation, recipe: Recipe) -> None:
    """Each row of the output lies within the radius of what the spec makes of the layer's own stages."""
    scene = play(implementation, recipe)
    assert not scene.judged(("dispatch", "combine", "drop", "padding", "expert"))
