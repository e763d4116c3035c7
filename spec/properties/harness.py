# May import: standard library, pytest, hypothesis, refswitch.
"""What a property is: a test of one or more clauses on whatever is under test, which says what it needs in order to prove anything.

    @clause("S-CAP-1")
    @needs("drop", exports=("kept",))
    @draws(recipe=recipes())
    def test_slots_forward__serves_min_of_claims_and_capacity(implementation, recipe): ...

The body is called with what is under test, so that the same property runs under pytest and on a mutant. Its first argument says what that is: an
`implementation` of the layer, or the `operations` around it. Where the implementation does not declare a feature, or an operation is missing, the
test is skipped with that reason; where all its examples together never met a trigger that it needs, it fails as vacuous.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, example, given, settings
from hypothesis.errors import HypothesisException, Unsatisfiable
from hypothesis.stateful import run_state_machine_as_test

from properties.implementation import Implementation
from properties.operations import Operations
from properties.triggers import SAID, TRIGGERS, impossible
from refswitch.config import rounding_points
from refswitch.numbers.precision import FORMATS
from refswitch.spec_data import every_clause, knobs_of, load_clauses, load_operations
from refswitch.verify.cases import Target
from refswitch.verify.findings import applies
from refswitch.verify.process import AdapterFailure

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
settings.register_profile("refswitch", max_examples=15, stateful_step_count=12, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=300, stateful_step_count=40, **_COMMON)
KILLING = settings(
    settings.get_profile("refswitch"), max_examples=15, phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False, verbosity=Verbosity.quiet
)
CONTROL = settings(KILLING, max_examples=5)  # beside the explicit ones: a correct variant is run on all properties
Subject = Implementation | Operations
SUBJECTS = ("implementation", "operations")
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
    subject: str  # which of SUBJECTS its body takes
    clauses: tuple[str, ...] = ()
    triggers: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # knob values of the dialect under which it holds
    without: tuple[str, ...] = ()  # features under which it does not hold
    profiles: tuple[str, ...] = ()  # formats of storage.x under which it can be tested
    wide: bool = False  # it is an identity of real numbers: not to be seen through narrow storage
    wide_gradients: bool = False  # ... nor through gradients that are stored narrowly
    exact_sums: bool = False  # it needs sums of small integers to be exact
    fewer: int = 1  # it runs on one in so many of the profile's examples, being slow
    is_oracle: bool = False  # it compares with another evaluation of the layer rather than with another call

    def unsupported(self, subject: Subject) -> str:
        """Return why the property does not speak of what is under test, or nothing."""
        if isinstance(subject, Operations) != (self.subject == "operations"):
            return f"it is about {self.subject}"
        if isinstance(subject, Operations):
            return self._unsupported_operations(subject)
        return self._unsupported_implementation(subject)

    def _unsupported_operations(self, operations: Operations) -> str:
        """Return which operation is missing: of those that its clauses name, or under a clause of the layer the one that its own name says."""
        around, of_layer = load_operations(), self.name.removeprefix("test_").partition("__")[0]
        named = [place.rpartition(".")[2] for name in self.clauses if name in around for place in around[name]["functions"]]
        named += [of_layer] if any(name not in around for name in self.clauses) else []
        missing = [name for name in named if name not in operations.functions]
        if missing:
            return f"{operations.label} has no operation {missing[0]}"
        return "it is an identity of real numbers, and tested in float64" if self.wide and operations.profile != "float64" else ""

    def _unsupported_implementation(self, implementation: Implementation) -> str:
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
        narrow = self._too_narrow(target)
        if narrow:
            return narrow
        hidden = [name for name in self.exports if name not in implementation.exports]
        if hidden:
            return f"{hidden[0]} is not exported"
        return next((reason for reason in (impossible(trigger, target) for trigger in self.triggers) if reason), "")

    def _too_narrow(self, target: Target) -> str:
        """Return why it cannot be seen through the formats, or nothing."""
        single, accumulate = FORMATS["float32"].precision, target.profile.accumulate.format
        if self.wide and min(format.precision for format in rounding_points(target.dialect, target.profile)) < single:
            return "it is an identity of real numbers, and something is stored in a narrow format"
        if self.wide_gradients and FORMATS[target.profile.storage.gradients].precision < single:
            return "it is an identity of real numbers, and the gradients are stored in a narrow format"
        has_room = accumulate == "exact" or FORMATS[accumulate].precision >= single
        if self.exact_sums and not (has_room and target.profile.products.input == "stored"):
            return "it needs sums of small integers to be exact"
        return ""

    def run(self, subject: Subject, chosen: settings) -> None:
        """Run the property; it raises where it does not hold."""
        if self.is_machine:
            run_state_machine_as_test(self.body(subject), settings=chosen)
            return
        if not self.strategies:
            self.body(subject)
            return
        test = given(**self.strategies)(self.body)
        for value in self.examples:
            values = value if type(value) is tuple else (value,)  # a plan is a tuple of another type
            test = example(**dict(zip(self.strategies, values, strict=True)))(test)
        settings(chosen, max_examples=max(chosen.max_examples // self.fewer, 1))(test)(subject)

    def vacuous(self, met: Counter[str]) -> list[str]:
        """Return the triggers that no example met."""
        return [trigger for trigger in self.triggers if not met[trigger]]


@dataclass
class Record:
    """What the run has seen, for the summary."""

    played: list[tuple[str, str, Counter[str]]] = field(default_factory=list)  # property, what was under test, met
    vacuous: list[str] = field(default_factory=list)
    kills: dict[str, list[str]] = field(default_factory=dict)  # mutant to the properties that noticed it
    spared: list[str] = field(default_factory=list)  # mutants that no property noticed


PROPERTIES: dict[str, Property] = {}
RECORD = Record()


def _registered(body: Callable[..., Any], strategies: dict[str, Any], examples: Iterable[Any], is_machine: bool) -> Callable[[Any], None]:
    """Make the test of a property, and enter it into PROPERTIES."""
    subject = next(iter(inspect.signature(body).parameters))
    if subject not in SUBJECTS:
        raise ValueError(f"{body.__name__}: its first argument is {subject}, should be one of {', '.join(SUBJECTS)}")
    entry = Property(body.__name__, (body.__doc__ or "").split("\n")[0], body, strategies, tuple(examples), is_machine, subject)
    if entry.name in PROPERTIES and PROPERTIES[entry.name].body.__module__ != body.__module__:
        raise ValueError(f"two properties are called {entry.name}")
    PROPERTIES[entry.name] = entry

    def test_implementation(implementation: Implementation) -> None:
        _play(entry, implementation)

    def test_operations(operations: Operations) -> None:
        _play(entry, operations)

    test = test_operations if subject == "operations" else test_implementation
    test.__name__, test.__doc__, test.__module__, test.__qualname__ = body.__name__, body.__doc__, body.__module__, body.__name__
    test.entry = entry  # type: ignore[attr-defined]
    return test


def _play(entry: Property, subject: Subject) -> None:
    """Run a property as a test, and enter it into the record."""
    why = entry.unsupported(subject)
    if why:
        pytest.skip(why)
    watched = subject.fresh().watched()
    try:
        entry.run(watched, settings.get_profile(PROFILE[0]))
    except Unsatisfiable:
        _is_vacuous(entry, subject, "no example")
    missing = entry.vacuous(watched.met)
    if missing:
        _is_vacuous(entry, subject, ", ".join(missing))
    RECORD.played.append((entry.name, subject.label, watched.met))


def _is_vacuous(entry: Property, subject: Subject, missing: str) -> NoReturn:
    """Enter it into the record, and fail, unless it is the adapter's own limits that leave nothing to meet."""
    RECORD.vacuous.append(f"{entry.name} on {subject.label}: never met {missing}")
    if isinstance(subject, Implementation) and subject.target.limits:
        pytest.skip(f"within LIMITS it never met {missing}")
    pytest.fail(f"vacuous: never met {missing}")


def draws(examples: Iterable[Any] = (), fewer: int = 1, **strategies: Any) -> Callable[[Callable[..., Any]], Callable[[Any], None]]:
    """Make a property that is tested on what hypothesis draws, after `examples`: values of its argument, or tuples of values of its arguments.

    A slow property runs on one in `fewer` of the profile's examples.
    """

    def make(body: Callable[..., Any]) -> Callable[[Implementation], None]:
        test = _registered(body, strategies, examples, is_machine=False)
        PROPERTIES[body.__name__].fewer = fewer
        return test

    return make


def machine(body: Callable[..., Any]) -> Callable[[Any], None]:
    """Make a property out of a function from what is under test to a state machine."""
    return _registered(body, {}, (), is_machine=True)


def clause(*names: str, is_oracle: bool = False) -> Callable[[Any], Any]:
    """Say which clauses a property is about."""
    for name in names:
        if name not in every_clause():
            raise ValueError(f"there is no clause {name}")

    def mark(test: Any) -> Any:
        known = every_clause() if test.entry.subject == "operations" else load_clauses()
        strange = [name for name in names if name not in known]
        if strange:
            raise ValueError(f"{test.entry.name}: {strange[0]} is not a clause of {test.entry.subject}")
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
    wide_gradients: bool = False,
    exact_sums: bool = False,
) -> Callable[[Any], Any]:
    """Say which regimes a property must have met, and of which implementations it speaks; a property of operations names regimes of its own."""

    def mark(test: Any) -> Any:
        entry = test.entry
        unknown = [trigger for trigger in triggers if trigger not in (*TRIGGERS, *SAID) and entry.subject == "implementation"]
        if unknown:
            raise ValueError(f"there is no trigger {unknown[0]}")
        entry.triggers, entry.features, entry.exports, entry.only = triggers, features, exports, only or {}
        entry.without, entry.profiles = without, profiles
        entry.wide, entry.wide_gradients, entry.exact_sums = wide, wide_gradients, exact_sums
        return test

    return mark


def broken_by(entry: Property, subject: Subject, chosen: settings = KILLING) -> bool:
    """Whether a property fails on something; of operations, whether it raises at all, since on the reference it does not."""
    failures = (AssertionError, AdapterFailure) if isinstance(subject, Implementation) else (Exception,)
    try:
        entry.run(subject.fresh(), chosen)
    except HypothesisException:
        raise
    except ExceptionGroup as error:  # hypothesis bundles several distinct failures
        if error.subgroup(failures) is None:
            raise
        return True
    except failures:
        return True
    return False
