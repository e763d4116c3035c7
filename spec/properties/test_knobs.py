# May import: standard library, numpy, pytest, refswitch, its own folder.
"""No knob is ignored: each value of each judged knob changes some output of the reference on some input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from properties.implementation import PLAYED, REFERENCE_FEATURES, player
from properties.strategies import OVERFLOW_IN_GROUPS, TIES, case_of, changed
from refswitch.errors import InputError
from refswitch.spec_data import knobs_of, load_dialect, load_knobs, load_profile, names_of, with_knob
from refswitch.verify.case import Case
from refswitch.verify.cases import ACTIVATIONS, Recipe, Target

RECIPES = (
    replace(OVERFLOW_IN_GROUPS, train=True),
    replace(OVERFLOW_IN_GROUPS, pads="scattered", noise=True, train=True),
    replace(TIES, pads="left"),
    replace(TIES, name="near", ties="near", S=34, E=4),
    Recipe("surest-first", S=12, D=7, E=3, F=5, hot=1, everyone=True, capacity=3, pads="right", train=True),
)
# What no dialect on record has, or has together with what makes it matter.
UNRECORDED = (
    {"noise.kind": "z_add_normal", "noise.gate_from": "clean"},
    {"router.logit_cap": 3.0},
    {"router.prob_round": "input"},
    {"router.prob_round": "input", "select.on": "logits"},
    {"select.rule": "sample"},
    {"dispatch_grad": "straight_through"},
)
SETTINGS = [*({"base": "mesh_tensorflow", **knobs} for knobs in UNRECORDED), *(dialect for dialect, _ in PLAYED.values()), *names_of("dialects")]
# A case's first axis is its groups, whatever the dialect says of larger batches; and that equals may be chosen in any order is said to the judge.
SAID_TO_OTHERS = (("group.rule", "batch"), ("select.tie", "unspecified"))


def turned(case: Case, target: Target, knob: str, value: Any) -> tuple[Case, Target] | None:
    """Return the case and the target under another value of a knob, or None where nobody defines it."""
    try:
        other = target._replace(dialect=with_knob(target.dialect, knob, value))
    except InputError:
        return None
    changes: dict[str, Any] = {"noise": None} if (knob, value) == ("noise.kind", "none") else {}
    if knob == "expert.act":
        changes["activation"] = ACTIVATIONS[value]
    if (knob, value) == ("capacity.expr", "inf"):
        changes["capacity"] = case.sizes["S"]
    return changed(case, other, **changes), other


@cache
def targets() -> list[Target]:
    """Return what the reference plays here: all dialects in float64, and the unrecorded in bfloat16 too, where probabilities tie."""
    dialects = [load_dialect(setting) for setting in SETTINGS]
    pairs = [(dialect, load_profile("float64")) for dialect in dialects]
    pairs += [(dialect, load_profile("bfloat16")) for dialect in dialects[: len(UNRECORDED)]]
    return [Target(dialect, profile, frozenset(REFERENCE_FEATURES), {}) for dialect, profile in pairs]


def differences(knob: str, value: Any) -> Iterator[bool]:
    """Yield, for each setting in which the knob has another value and each recipe, whether turning it changes an output."""
    for target in targets():
        if knobs_of(target.dialect)[knob] == value:
            continue
        for recipe in RECIPES:
            case = case_of(recipe, target)
            found = None if case is None else turned(case, target, knob, value)
            if found is not None:
                yield differ(player(target.dialect, target.profile)(case), player(found[1].dialect, target.profile)(found[0]))


def differ(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether any output of two calls differs."""
    return any(not np.array_equal(a[name], b[name], equal_nan=True) for name in a if name in b)


VALUES = [(knob, value) for knob, entry in load_knobs().items() for value in entry["says"]]


@pytest.mark.parametrize(("knob", "value"), [pair for pair in VALUES if pair not in SAID_TO_OTHERS])
def test_knob__changes_an_output(knob: str, value: Any) -> None:
    """Somewhere it matters: an option that nothing reads is not an option."""
    assert any(differences(knob, value))


@pytest.mark.parametrize(("knob", "value"), SAID_TO_OTHERS)
def test_knob__that_is_said_to_others_changes_nothing(knob: str, value: Any) -> None:
    """The control: what the reference does not read, this test finds unread."""
    assert not any(differences(knob, value))
