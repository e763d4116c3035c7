# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Calls as such: inputs stay as they are, no call remembers another, what is stored lies on its grid: S-STATE-1, S-STATE-2, S-PREC-1."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, multiple, rule

from properties.harness import clause, draws, machine, needs
from properties.implementation import Implementation
from properties.scenes import ALL_GRADIENTS, EVERYTHING, Scene, assert_same, assert_within, certain, play, replay
from properties.strategies import (
    OVERFLOW_IN_GROUPS,
    SQUARE,
    TAILS,
    TIES,
    TOKENS_AS_EXPERTS,
    case_of,
    changed,
    plain,
    recipes,
)
from refswitch.numbers.precision import FORMATS, round_to
from refswitch.verify.cases import Recipe
from refswitch.verify.tubes import Tube

ENOUGH = 8  # values that all lie on a coarser grid by chance: one in 2^-13 each, at most


@clause("S-STATE-1")
@needs("noise", "pad_and_drop")
@draws(
    examples=[replace(OVERFLOW_IN_GROUPS, noise=True, pads="scattered", mask=True), replace(OVERFLOW_IN_GROUPS, noise=True, train=True)],
    recipe=recipes(),
)
def test_switch_layer__writes_to_no_input(implementation: Implementation, recipe: Recipe) -> None:
    """After a call every input holds the bits that it held."""
    case = case_of(recipe, implementation.target)
    assume(case is not None)
    assert case is not None
    _, mutated = implementation.call_and_watch(case)
    assert not mutated, f"wrote to {', '.join(mutated)}"


@clause("S-STATE-1")
@needs("drop")
@draws(examples=[OVERFLOW_IN_GROUPS], recipe=recipes())
def test_switch_layer__outputs_are_its_own(implementation: Implementation, recipe: Recipe) -> None:
    """The outputs are arrays of their own: writing to them changes nothing in the next call."""
    case = case_of(recipe, implementation.target)
    assume(case is not None)
    assert case is not None
    first = Scene(implementation, case, implementation.call(case))
    kept = Scene(implementation, case, {name: np.array(value) for name, value in first.outputs.items()})
    for value in first.outputs.values():
        if value.flags.writeable and value.dtype != bool:
            value[...] = 17
    second = replay(implementation, case)
    certain(second)
    assert_same(kept, second, EVERYTHING, is_exact=True)


@clause("S-STATE-2")
@needs("drop", "tie")
@draws(examples=[(OVERFLOW_IN_GROUPS, TAILS), (TIES, replace(TIES, name="other", capacity=2))], first=recipes(), second=recipes())
def test_switch_layer__repeats(implementation: Implementation, first: Recipe, second: Recipe) -> None:
    """f(x), g(x), f(x), f(x): the same case returns the same, whatever came between; to the bit, where the profile is deterministic."""
    a = play(implementation, first)
    assume(a.is_certain)
    play(implementation, second)
    for _ in range(3):
        assert_same(a, replay(implementation, a.case), EVERYTHING, is_exact=True)


@clause("S-STATE-2", "S-CAP-1")
@needs("drop", without=("own_capacity",))
@draws(
    examples=[(OVERFLOW_IN_GROUPS, 0), (replace(OVERFLOW_IN_GROUPS, name="other"), 5), (replace(SQUARE, capacity=1, hot=1), 10)],
    recipe=recipes(ties=""),
    capacity=st.integers(0, 12),
)
def test_switch_layer__remembers_no_call(implementation: Implementation, recipe: Recipe, capacity: int) -> None:
    """A call after others of the same shapes, with other tokens, weights and slots, returns what a layer returns that was never called before."""
    used = implementation.fresh()
    case = case_of(recipe, implementation.target)
    assume(case is not None)
    assert case is not None
    warm = case_of(replace(recipe, name=f"{recipe.name}-before"), implementation.target)
    assert warm is not None
    slots = warm.capacity if implementation.dialect.capacity.expr in ("inf", "max_count") else capacity
    used.call(changed(warm, implementation.target, capacity=slots))
    late, early = replay(used, case), replay(implementation.fresh(), case)
    certain(early)
    assert_same(early, late, EVERYTHING, is_exact=True)


@clause("S-STATE-2", "S-STATE-1")
@machine
def test_switch_layer__sequence_of_calls(implementation: Implementation) -> type[RuleBasedStateMachine]:
    """Any sequence of calls, new shapes and old ones: each case returns what a fresh layer returned for it."""

    class Calls(RuleBasedStateMachine):
        """A layer in use, and the cases that it has seen."""

        cases = Bundle("cases")

        def __init__(self) -> None:
            super().__init__()
            self.used = implementation.fresh()

        @rule(
            target=cases,
            recipe=recipes(ties="", S=st.sampled_from((5, 8)), D=3, E=st.sampled_from((2, 4)), F=9, G=1, pads=st.sampled_from(("", "left"))),
        )
        def arrive(self, recipe: Recipe) -> object:
            case = case_of(recipe, implementation.target)
            if case is None:
                return multiple()
            alone = replay(implementation.fresh(), case)
            if not alone.is_certain:
                return multiple()
            self.compare(alone)
            return alone

        @rule(alone=cases)
        def again(self, alone: Scene) -> None:
            self.compare(alone)

        @rule(alone=cases, capacity=st.integers(0, 3))
        def with_other_slots(self, alone: Scene, capacity: int) -> None:
            if implementation.dialect.capacity.expr not in ("inf", "max_count") and "own_capacity" not in implementation.features:
                self.used.call(changed(alone.case, implementation.target, capacity=capacity))

        def compare(self, alone: Scene) -> None:
            outputs, mutated = self.used.call_and_watch(alone.case)
            assert not mutated
            assert_same(alone, Scene(self.used, alone.case, outputs), EVERYTHING, is_exact=True)

    return Calls


@clause("S-STATE-2", "S-COMBINE-1", "S-BACK-1")
@needs(features=("empty",))
@draws(recipe=recipes(S=0, pads="", hot=None, avoid=None))
def test_switch_layer__no_tokens(implementation: Implementation, recipe: Recipe) -> None:
    """No token, no output, and gradients of exactly 0."""
    scene = play(implementation, recipe)
    assert scene.outputs["out"].shape == scene.case.x.shape
    for name, value in scene.outputs.items():
        if name.startswith("d"):
            assert (value == 0.0).all(), name


# formats


@clause("S-PREC-1")
@draws(examples=[TAILS, TOKENS_AS_EXPERTS, SQUARE], recipe=recipes())
def test_store__lies_on_its_grid(implementation: Implementation, recipe: Recipe) -> None:
    """What is declared to be stored narrowly is a number of that format."""
    scene = play(implementation, recipe)
    points = scene.layer.points
    for name, format in (("out", points.out), ("hidden", points.hidden), ("expert_out", points.expert_out), ("gate", points.gate)):
        if name in scene.outputs and format.precision < FORMATS["float32"].precision:
            value = np.asarray(scene.outputs[name], np.float64)
            assert_within(name, value, Tube(round_to(value, format), np.zeros_like(value)), scene.looked_at(name), "GSDE")


@clause("S-PREC-1", "S-ROUTE-1", "S-ROUTE-2", "S-GATE-1")
@draws(
    examples=[replace(plain(), name="wide", S=23, D=13)],
    recipe=recipes(S=st.sampled_from((12, 17)), D=13, scale=1.0, router_scale=1.0, ties="", capacity=None, pads=""),
)
def test_store__is_no_narrower_than_declared(implementation: Implementation, recipe: Recipe) -> None:
    """Values that all lie on a coarser grid than declared were rounded to it: the router's in float32, the experts' in what the profile says."""
    scene = play(implementation, recipe)
    points, coarser = scene.layer.points, sorted({format.precision for format in FORMATS.values()})
    declared = {
        "logits": points.logits,
        "probs": points.choice,
        "gate": points.gate,
        "hidden": points.hidden,
        "expert_out": points.expert_out,
        "out": points.out,
    }
    declared |= dict.fromkeys(ALL_GRADIENTS, points.gradients)
    for name, format in declared.items():
        if name not in scene.outputs:
            continue
        value = np.asarray(scene.outputs[name], np.float64)[scene.looked_at(name)]
        value = value[(value != 0.0) & (value != 1.0)]
        below = [precision for precision in coarser if precision < format.precision]
        if below and len(value) >= ENOUGH:
            grid = next(candidate for candidate in FORMATS.values() if candidate.precision == below[-1])
            assert (round_to(value, grid) != value).any(), f"all {len(value)} values of {name} lie on the grid of {grid.name}"


@clause("S-STATE-1", "S-STATE-2", "S-PREC-1", is_oracle=True)
@draws(examples=[TAILS, SQUARE, Recipe("integers", S=27, D=7, E=1, F=5, integers=True)], recipe=recipes())
def test_switch_layer__matches_spec_after_other_calls(implementation: Implementation, recipe: Recipe) -> None:
    """Every stage lies within its radius, in the middle of other calls."""
    scene = play(implementation, recipe)
    assert not scene.judged(("noise", "router", "softmax", "select", "capacity", "dispatch", "expert", "gate", "combine", "drop", "precision"))
