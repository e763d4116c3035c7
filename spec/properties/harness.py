# May import: standard library, pytest, hypothesis, refswitch.
"""What a property is: a test of one or more clauses on any implementation, which says what it needs in order to prove anything.

    @clause("S-CAP-1")
    @needs("drop", exports=("kept",))
    @draws(recipe=recipes())
    def test_slots_forward__serves_min_of_claims_and_capacity(implementation, recipe): ...

The body is called with an implementation, so that the same property runs under pytest and on a mutant. Where the implementation does not declare a
feature, the test is skipped with that reason; where all its examples together never met a trigger that it needs, it fails as vacuous.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, example, given, settings
from hypothesis.stateful import run_state_machine_as_test

from properties.implementation import Implementation
from properties.triggers import TRIGGERS, impossible
from refswitch.config import rounding_points
from refswitch.numbers.precision import FORMATS
from refswitch.spec_data import knobs_of, load_clauses
from refswitch.verify.cases import Target
from refswitch.verify.findings import applies
from refswitch.verify.process import AdapterFailure

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
settings.register_profile("refswitch", max_examples=15, stateful_step_count=12, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=300, stateful_step_count=40, **_COMMON)
KILLING = settings(
    settings.get_profile("refswitch"), max_examples=15, phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False, verbosity=Verbosity.quiet
)
PROFILE = ["refswitch"]  # the profile that is in force; conftest sets it from --hypothesis-profile


def _speaks(clause: dict[str, Any], target: Target) -> bool:
    return applies(clause, target) and clause.get("feature") in (None, *target.features)


@dataclass
class Property:
    """One property, and what it needs."""

    name: str
    text: str
    body: Callable[..., Any]
    strategies: dict[str, Any]
    examples: tuple[Any, ...]
    is_machine: bool
    clauses: tuple[str, ...] = ()
    triggers: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # knob values of the dialect under which it holds
    without: tuple[str, ...] = ()  # features under which it does not hold
    profiles: tuple[str, ...] = ()  # formats of storage.x under which it can be tested
    wide: bool = False  # it is an identity of real numbers: not to be seen through narrow storage
    fewer: int = 1  # it runs on one in so many of the profile's examples, being slow
    is_oracle: bool = False  # it compares with another evaluation of the layer rather than with another call

    def unsupported(self, implementation: Implementation) -> str:
        """Return why the property does not speak of this implementation, or nothing."""
        target = implementation.target
        knobs = knobs_of(target.dialect)
        if not any(_speaks(load_clauses()[name], target) for name in self.clauses):
            return f"{', '.join(self.clauses)}: not in this dialect, or not declared"
        missing = [feature for feature in self.features if feature not in target.features]
        if missing:
            return f"feature {missing[0]} is not declared"
        present = [feature for feature in self.without if feature in target.features]
        if present:
            return f"feature {present[0]} is declared"
        for knob, values in self.only.items():
            if knobs[knob] not in values:
                return f"the dialect has {knob}={knobs[knob]}"
        if self.profiles and target.profile.storage.x not in self.profiles:
            return f"it is tested in {', '.join(self.profiles)} alone"
        if self.wide and min(format.precision for format in rounding_points(target.dialect, target.profile)) < FORMATS["float32"].precision:
            return "it is an identity of real numbers, and something is stored in a narrow format"
        hidden = [name for name in self.exports if name not in implementation.exports]
        if hidden:
            return f"{hidden[0]} is not exported"
        return next((reason for reason in (impossible(trigger, target) for trigger in self.triggers) if reason), "")

    def run(self, implementation: Implementation, chosen: settings) -> None:
        """Run the property; it raises where it does not hold."""
        if self.is_machine:
            run_state_machine_as_test(self.body(implementation), settings=chosen)
            return
        if not self.strategies:
            self.body(implementation)
            return
        test = given(**self.strategies)(self.body)
        for value in self.examples:
            values = value if type(value) is tuple else (value,)  # a plan is a tuple of another type
            test = example(**dict(zip(self.strategies, values, strict=True)))(test)
        settings(chosen, max_examples=max(chosen.max_examples // self.fewer, 1))(test)(implementation)

    def vacuous(self, met: Counter[str]) -> list[str]:
        """Return the triggers that no example met."""
        return [trigger for trigger in self.triggers if not met[trigger]]


@dataclass
class Record:
    """What the run has seen, for the summary."""

    played: list[tuple[str, str, Counter[str]]] = field(default_factory=list)  # property, implementation, met
    vacuous: list[str] = field(default_factory=list)
    kills: dict[str, list[str]] = field(default_factory=dict)  # mutant to the properties that noticed it
    spared: list[str] = field(default_factory=list)  # mutants that no property noticed


PROPERTIES: dict[str, Property] = {}
RECORD = Record()


def _registered(body: Callable[..., Any], strategies: dict[str, Any], examples: Iterable[Any], is_machine: bool) -> Callable[[Implementation], None]:
    """Make the test of a property, and enter it into PROPERTIES."""
    entry = Property(body.__name__, (body.__doc__ or "").split("\n")[0], body, strategies, tuple(examples), is_machine)
    if entry.name in PROPERTIES and PROPERTIES[entry.name].body.__module__ != body.__module__:
        raise ValueError(f"two properties are called {entry.name}")
    PROPERTIES[entry.name] = entry

    def test(implementation: Implementation) -> None:
        why = entry.unsupported(implementation)
        if why:
            pytest.skip(why)
        watched = implementation.fresh().watched()
        entry.run(watched, settings.get_profile(PROFILE[0]))
        RECORD.played.append((entry.name, implementation.label, watched.met))
        missing = entry.vacuous(watched.met)
        if missing:
            RECORD.vacuous.append(f"{entry.name} on {implementation.label}: never met {', '.join(missing)}")
            pytest.fail(f"vacuous: {watched.met['cases']} calls never met {', '.join(missing)}")

    test.__name__, test.__doc__, test.__module__, test.__qualname__ = body.__name__, body.__doc__, body.__module__, body.__name__
    test.entry = entry  # type: ignore[attr-defined]
    return test


def draws(examples: Iterable[Any] = (), fewer: int = 1, **strategies: Any) -> Callable[[Callable[..., Any]], Callable[[Implementation], None]]:
    """Make a property that is tested on what hypothesis draws, after `examples`: values of its argument, or tuples of values of its arguments.

    A slow property runs on one in `fewer` of the profile's examples.
    """

    def make(body: Callable[..., Any]) -> Callable[[Implementation], None]:
        test = _registered(body, strategies, examples, is_machine=False)
        PROPERTIES[body.__name__].fewer = fewer
        return test

    return make


def machine(body: Callable[..., Any]) -> Callable[[Implementation], None]:
    """Make a property out of a function from an implementation to a state machine."""
    return _registered(body, {}, (), is_machine=True)


def clause(*names: str, is_oracle: bool = False) -> Callable[[Any], Any]:
    """Say which clauses a property is about."""
    for name in names:
        if name not in load_clauses():
            raise ValueError(f"there is no clause {name}")

    def mark(test: Any) -> Any:
        test.entry.clauses, test.entry.is_oracle = names, is_oracle
        return test

    return mark


def needs(
    *triggers: str,
    features: tuple[str, ...] = (),
    exports: tuple[str, ...] = (),
    only: dict[str, tuple[Any, ...]] | None = None,
    without: tuple[str, ...] = (),
    profiles: tuple[str, ...] = (),
    wide: bool = False,
) -> Callable[[Any], Any]:
    """Say which regimes a property must have met, and of which implementations it speaks."""
    unknown = [trigger for trigger in triggers if trigger not in TRIGGERS]
    if unknown:
        raise ValueError(f"there is no trigger {unknown[0]}")

    def mark(test: Any) -> Any:
        entry = test.entry
        entry.triggers, entry.features, entry.exports, entry.only = triggers, features, exports, only or {}
        entry.without, entry.profiles, entry.wide = without, profiles, wide
        return test

    return mark


def broken_by(entry: Property, implementation: Implementation, chosen: settings = KILLING) -> bool:
    """Whether a property fails on an implementation."""
    try:
        entry.run(implementation.fresh(), chosen)
    except (AssertionError, AdapterFailure):
        return True
    except ExceptionGroup as error:  # hypothesis bundles several distinct failures
        if error.subgroup((AssertionError, AdapterFailure)) is None:
            raise
        return True
    return False
