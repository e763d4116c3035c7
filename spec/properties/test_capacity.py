# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Who is served, slots: S-CAP-1 to S-CAP-3, S-POS-1, S-PAD-2. Next: `test_capacity_rules`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from properties.conditions import DROPS_ZERO, FIXED_ORDER, MASKED, OWN_BIAS, ROUTED, WHOLE_PADS
from properties.harness import clause, draws, machine, needs
from properties.implementation import Implementation
from properties.scenes import ALL_GRADIENTS, FORWARD, LOSSES, ROUTE, Scene, assert_same, assert_zero, certain, play, replay
from properties.strategies import (
    CROWD,
    OVERFLOW_IN_GROUPS,
    SIZES,
    TAILS,
    TOKENS_AS_EXPERTS,
    case_of,
    changed,
    plain,
    recipes,
)
from properties.test_capacity_rules import slots
from refswitch.verify.case import Case
from refswitch.verify.cases import Recipe

TIGHT = st.sampled_from((2, 1, 3, 4, 5))
OVERFLOWS = (OVERFLOW_IN_GROUPS, TAILS, CROWD)


def served_before(scene: Scene) -> np.ndarray:
    """Count, token by token in the order of priority, the routed claims on the same expert that come first."""
    G, S = scene.claims_GS.shape
    priority_GS = scene.layer.inputs.priority_GS if scene.implementation.dialect.priority == "random" else np.broadcast_to(np.arange(S), (G, S))
    slot_GS = np.zeros((G, S), np.int64)
    for g in range(G):
        count: Counter[int] = Counter()
        for s in np.argsort(priority_GS[g]):
            expert = int(scene.route.expert_GS[g, s])
            slot_GS[g, s] = count[expert]
            count[expert] += bool(scene.claims_GS[g, s])
    return slot_GS


def with_capacity(scene: Scene, capacity: int) -> Scene:
    """Play the same case with another capacity."""
    return replay(scene.implementation, changed(scene.case, scene.implementation.target, capacity=capacity))


@clause("S-CAP-1")
@needs("drop_not_on_expert_0", "empty_expert", exports=("kept",), only=WHOLE_PADS)
@draws(examples=OVERFLOWS, recipe=recipes(capacity=TIGHT))
def test_capacity__serves_min_of_claims_and_capacity(implementation: Implementation, recipe: Recipe) -> None:
    """kept(g, e) = min(claims(g, e), C): no slot is lost, none is used twice, none is taken from another group."""
    scene = play(implementation, recipe)
    expected_GE = np.minimum(scene.claims_GE, scene.capacity)
    wrong = np.argwhere(scene.kept_GE != expected_GE)
    assert not len(wrong), f"group and expert {tuple(wrong[0])}: {scene.kept_GE[tuple(wrong[0])]} served, should be {expected_GE[tuple(wrong[0])]}"


@clause("S-CAP-1", "S-CAP-2", "S-POS-1")
@needs("drop", "pad_and_drop", "several_groups", exports=("kept", "slot"), only=FIXED_ORDER | ROUTED)
@draws(examples=[*OVERFLOWS, TOKENS_AS_EXPERTS], recipe=recipes(capacity=TIGHT))
def test_slots__count_earlier_claims(implementation: Implementation, recipe: Recipe) -> None:
    """A slot is the number of claims on the same expert that come before in the order of priority, and it is kept where it is below the capacity."""
    scene = play(implementation, recipe)
    slot_GS, routed_GS = served_before(scene), scene.claims_GS & ~scene.layer.sits_out_GS
    own_slot_GS, own_kept_GS = scene.outputs["slot"], scene.outputs["kept"]
    wrong = np.argwhere((own_slot_GS != slot_GS) & routed_GS)
    assert not len(wrong), f"slot{tuple(wrong[0])} is {own_slot_GS[tuple(wrong[0])]}, should be {slot_GS[tuple(wrong[0])]}"
    wrong = np.argwhere((own_kept_GS != (slot_GS < scene.capacity)) & routed_GS)
    assert not len(wrong), f"kept{tuple(wrong[0])} is {own_kept_GS[tuple(wrong[0])]} at slot {slot_GS[tuple(wrong[0])]} of {scene.capacity}"
    assert not own_kept_GS[scene.layer.sits_out_GS].any()


@clause("S-POS-1", "S-PACK-1")
@needs(
    "drop",
    "over_256_on_an_expert",
    exports=("kept", "slot", "expert"),
    only={"priority": ("position", "random", "gate_desc"), "capacity.slots_lost": (0,)},
)
@draws(examples=OVERFLOWS, recipe=recipes(capacity=st.sampled_from((2, 1, 5, 17, 18)), pads=""))
def test_slots__are_a_partial_injection(implementation: Implementation, recipe: Recipe) -> None:
    """No two kept tokens share a slot; those of an expert fill 0 to count - 1 without a gap."""
    scene = play(implementation, recipe)
    for g in range(scene.claims_GS.shape[0]):
        kept_S = scene.outputs["kept"][g]
        for e in np.unique(scene.expert_GS[g][kept_S]):
            held = np.sort(scene.outputs["slot"][g][kept_S & (scene.expert_GS[g] == e)])
            assert (held == np.arange(len(held))).all(), f"group {g}, expert {e} has slots {held.tolist()}"
            assert len(held) <= scene.capacity


@clause("S-CAP-2")
@needs("drop", exports=("kept", "gate"), only={"priority": ("gate_desc",)})
@draws(examples=OVERFLOWS, recipe=recipes(capacity=TIGHT, ties=""))
def test_slots__highest_gates_are_served(implementation: Implementation, recipe: Recipe) -> None:
    """No dropped token's probability is certainly above that of a token that its expert serves."""
    scene = play(implementation, recipe)
    probs = scene.tube("probs")
    index = (*np.indices(scene.expert_GS.shape), scene.expert_GS)
    chosen = probs.at(index)
    for g, s in np.argwhere(scene.dropped_GS):
        rivals_S = (scene.expert_GS[g] == scene.expert_GS[g, s]) & scene.route.kept_GS[g]
        assert not (chosen.value[g, s] - chosen.radius[g, s] > (chosen.value + chosen.radius)[g][rivals_S]).any()


@clause("S-CAP-1", "S-CAP-2", "S-DROP-1", "S-COMBINE-1")
@needs("drop", without=("own_capacity",), only=ROUTED | {"priority": ("position", "random", "gate_desc")})
@draws(examples=[OVERFLOW_IN_GROUPS, TAILS], recipe=recipes(capacity=TIGHT))
def test_capacity__monotone(implementation: Implementation, recipe: Recipe) -> None:
    """One slot more un-keeps nobody, and what was served before is served alike; the choices never change."""
    narrow = play(implementation, recipe)
    wide = with_capacity(narrow, narrow.case.capacity + 1)
    certain(narrow, wide)
    assert not (narrow.route.kept_GS & ~wide.route.kept_GS).any()
    assert_same(narrow, wide, ("expert", "slot", "logits", "probs"))
    assert_same(narrow, wide, ("gate", "hidden", "expert_out", "out"), only_GS=narrow.route.kept_GS)
    newly_GE = wide.kept_GE - narrow.kept_GE
    assert ((newly_GE == 0) | (newly_GE == 1)).all()
    assert ((newly_GE == 1) == (narrow.claims_GE > narrow.capacity))[:, 0 if implementation.dialect.pad.route != "expert0_weight0" else 1 :].all()


@clause("S-CAP-1", "S-DROP-1")
@needs("capacity_0", without=("own_capacity",), features=("backward",), only=DROPS_ZERO | OWN_BIAS)
@draws(examples=[replace(OVERFLOW_IN_GROUPS, capacity=0, losses=(0.0, 0.0))], recipe=recipes(losses=(0.0, 0.0), capacity=0))
def test_capacity__zero_drops_everyone(implementation: Implementation, recipe: Recipe) -> None:
    """Without slots the output and every gradient is exactly 0."""
    scene = play(implementation, recipe)
    assert_zero(scene, ("out", *ALL_GRADIENTS))
    assert "kept" not in scene.outputs or not scene.outputs["kept"].any()


@clause("S-CAP-1", "S-DROP-1")
@needs(without=("own_capacity",))
@draws(examples=[replace(CROWD, capacity=None)], recipe=recipes(capacity=None))
def test_capacity__enough_is_dropless(implementation: Implementation, recipe: Recipe) -> None:
    """With a slot for every token all claims are served, and more slots change nothing."""
    scene = play(implementation, recipe)
    if "kept" in scene.outputs:
        assert (scene.outputs["kept"] == (scene.claims_GS & ~scene.layer.sits_out_GS)).all()
    if implementation.dialect.capacity.expr in ("inf", "max_count"):
        return
    wide = with_capacity(scene, 2 * scene.case.capacity + 5)
    certain(scene)
    assert_same(scene, wide, (*FORWARD, *LOSSES, *ALL_GRADIENTS))


@clause("S-CAP-1", "S-CAP-2", "S-ROUTE-1")
@needs("drop")
@draws(recipe=recipes(capacity=TIGHT, ties=""), power=st.sampled_from((-2, 1, 3)))
def test_capacity__drops_by_routing_alone(implementation: Implementation, recipe: Recipe, power: int) -> None:
    """Who is dropped does not depend on what the experts make of a token."""
    scene = play(implementation, recipe)
    target = implementation.target
    other = replay(implementation, changed(scene.case, target, w_in=-scene.case.w_in, w_out=scene.case.w_out * 2.0**power))
    certain(scene)
    assert_same(scene, other, (*ROUTE, "logits", "probs", *LOSSES), is_exact=True)
    passes = implementation.dialect.drop.output != "zero" or implementation.dialect.expert.bias == "shared_out"
    if not passes and "kept" not in scene.outputs:
        assert (scene.outputs["out"].any(axis=-1) | ~other.outputs["out"].any(axis=-1)).all()


@clause("S-CAP-1", "S-DROP-1", "S-BACK-1", "S-BACK-3", "S-BACK-4")
@needs("drop", features=("backward",), without=("own_capacity",), only=DROPS_ZERO | OWN_BIAS)
@draws(examples=[OVERFLOW_IN_GROUPS, TAILS], recipe=recipes(capacity=TIGHT, ties=""))
def test_capacity__dropped_tokens_are_as_if_absent(implementation: Implementation, recipe: Recipe) -> None:
    """What a dropped token's dout is reaches no expert and no other token: clearing it, or making it huge, changes nothing at all."""
    scene = play(implementation, recipe)
    assume(scene.dropped_GS.any())
    target, dropped_GS1 = implementation.target, scene.dropped_GS[..., None]
    for dout_GSD in (np.where(dropped_GS1, 0.0, scene.case.dout), np.where(dropped_GS1, 2.0**40, scene.case.dout)):
        other = replay(implementation, changed(scene.case, target, dout=dout_GSD))
        certain(scene)
        assert_same(scene, other, ("out", *ALL_GRADIENTS))
    quiet = replay(implementation, changed(scene.case, target, daux=0.0, dz=0.0))
    assert_zero(quiet, ("dx",), only=scene.dropped_GS)


@clause("S-PAD-2", "S-CAP-1", "S-POS-1")
@needs("pad_and_drop", exports=("kept",), only=FIXED_ORDER | ROUTED)
@draws(examples=[TOKENS_AS_EXPERTS], recipe=recipes(pads=st.sampled_from(("left", "scattered", "right")), hot=0, capacity=TIGHT, ties=""))
def test_padding__takes_slots_where_it_is_routed(implementation: Implementation, recipe: Recipe) -> None:
    """Padding uses up a slot exactly where the dialect routes it, and then of the expert that the dialect says."""
    scene = play(implementation, recipe)
    real_GS, kept_GS = ~scene.layer.is_pad_GS, scene.outputs["kept"]
    wrong = np.argwhere((kept_GS != (served_before(scene) < scene.capacity)) & real_GS)
    assert not len(wrong), f"kept{tuple(wrong[0])} is {kept_GS[tuple(wrong[0])]}, with padding at {np.argwhere(~real_GS).tolist()}"


@clause("S-CAP-3")
@needs("drop", features=("own_capacity",), exports=("kept",), only=WHOLE_PADS)
@draws(
    examples=[Recipe("own-minimum", S=9, D=5, E=7, F=4, hot=1, everyone=True), Recipe("own-share", S=43, D=5, E=3, F=4, G=2, hot=1, everyone=True)],
    recipe=recipes(hot=st.integers(0, 3), everyone=True, factor=st.sampled_from(("1.25", "1.0", "1.05", "0.5")), train=True, pads=""),
)
def test_capacity__is_the_dialects_expression(implementation: Implementation, recipe: Recipe) -> None:
    """Whoever computes the capacity arrives at the dialect's, by the training's factor or the evaluation's: that many of a crowd are served."""
    scene = play(implementation, recipe)
    rule, sizes = implementation.dialect.capacity, scene.case.sizes
    training = slots(sizes["S"], sizes["E"], scene.case.capacity_factor, rule) - rule.slots_lost
    assert (scene.kept_GE == np.minimum(scene.claims_GE, training)).all()
    if rule.eval_rule == "factor":
        evaluated = play(implementation, replace(recipe, train=False))
        evaluation = slots(sizes["S"], sizes["E"], rule.cf_eval, rule) - rule.slots_lost
        assert (evaluated.kept_GE == np.minimum(evaluated.claims_GE, evaluation)).all()


def _machine_case(implementation: Implementation, choices: list[int], is_real: list[bool], capacity: int, E: int) -> Case:
    """Return a case whose tokens choose as told: each is a large multiple of its expert's axis."""
    target = implementation.target
    recipe = replace(plain(), name="machine", S=len(choices), D=E, E=E, F=4, capacity=capacity)
    case = case_of(recipe, target)
    assert case is not None
    x_GSD = 32.0 * np.eye(E)[choices][None]
    arrays = {"x": x_GSD, "w_router": 32.0 * np.eye(E)}
    if "padding" in implementation.features and not all(is_real):
        arrays["valid"] = np.array(is_real)[None]
    if implementation.dialect.router.bias:
        arrays["b_router"] = np.zeros(E)
    if "priority" in case:
        arrays["priority"] = np.arange(len(choices))[None]
    return changed(case, target, **arrays)


@clause("S-CAP-1", "S-CAP-2", "S-POS-1", "S-PAD-2")
@needs("drop", exports=("kept", "slot"), without=("own_capacity",), only=FIXED_ORDER | ROUTED | MASKED | WHOLE_PADS)
@machine
def test_capacity__counts_like_a_machine(implementation: Implementation) -> type[RuleBasedStateMachine]:
    """Tokens arrive one by one, real or padding, and the capacity may grow: the layer serves whom a row of counters serves."""
    pads_are_routed = implementation.dialect.pad.route == "include"

    class Counters(RuleBasedStateMachine):
        """One counter for each expert."""

        def __init__(self) -> None:
            super().__init__()
            self.choices: list[int] = []
            self.is_real: list[bool] = []
            self.changed = False

        @initialize(capacity=st.integers(0, 4), experts=st.sampled_from((3, 2, 5)))
        def open(self, capacity: int, experts: int) -> None:
            self.capacity, self.experts = capacity, experts

        @rule(expert=st.integers(0, 4), tokens=st.integers(1, 3))
        def arrive(self, expert: int, tokens: int) -> None:
            self.choices += [expert % self.experts] * tokens
            self.is_real += [True] * tokens
            self.changed = True

        @precondition(lambda self: "padding" in implementation.features)
        @rule(expert=st.integers(0, 4))
        def pad(self, expert: int) -> None:
            self.choices.append(expert % self.experts)
            self.is_real.append(False)
            self.changed = True

        @rule()
        def grow(self) -> None:
            self.capacity += 1
            self.changed = True

        @precondition(lambda self: self.changed and bool(self.choices))
        @invariant()
        def serves_whom_the_counters_serve(self) -> None:
            self.changed = False
            outputs = implementation.call(_machine_case(implementation, self.choices, self.is_real, self.capacity, self.experts))
            count: Counter[int] = Counter()
            zeroed = implementation.dialect.pad.zero_input is True
            for s, (choice, real) in enumerate(zip(self.choices, self.is_real, strict=True)):
                if not real and not pads_are_routed:
                    assert not outputs["kept"][0, s]
                    continue
                e = 0 if zeroed and not real else choice
                assert outputs["slot"][0, s] == count[e], f"token {s} of {self.choices}"
                assert outputs["kept"][0, s] == (count[e] < self.capacity - implementation.dialect.capacity.slots_lost)
                count[e] += 1

    return Counters


@clause("S-CAP-1", "S-CAP-2", "S-POS-1", "S-PAD-1", "S-PAD-2", is_oracle=True)
@needs("drop_not_on_expert_0", "over_256_on_an_expert")
@draws(
    examples=[
        *OVERFLOWS,
        TOKENS_AS_EXPERTS,
        Recipe("own-minimum", S=9, D=5, E=7, F=4, hot=1, everyone=True),
        Recipe("own-share", S=43, D=5, E=3, F=4, hot=1),
    ],
    recipe=recipes(S=st.sampled_from(SIZES["S"][2:]), capacity=st.sampled_from((2, 1, 0, 3, 5))),
)
def test_capacity__matches_spec(implementation: Implementation, recipe: Recipe) -> None:
    """Slots and survivors are those that follow from the layer's own choices."""
    scene = play(implementation, recipe)
    assert not scene.judged(("capacity", "position", "padding"))
