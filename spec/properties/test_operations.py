# May import: standard library, pytest, refswitch, its own folder, the mutants of conformance.
"""From each clause of an operation to its properties and mutants: no clause without a test, no function of it uncalled, no mutant unnoticed."""

from __future__ import annotations

import pkgutil
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from properties.operations import OPERATION_PROPERTIES, REFERENCE, OperationProperty, notices, operation
from refswitch.spec_data import data_root, load_operations


@cache
def properties_by_clause() -> dict[str, list[OperationProperty]]:
    """Return the properties of every clause, those that speak of the fewest clauses first."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        import_module(f"properties.{path.stem}")
    ordered = sorted(OPERATION_PROPERTIES.values(), key=lambda entry: (len(entry.clauses), entry.fewer))
    return {name: [entry for entry in ordered if name in entry.clauses] for name in load_operations()}


@cache
def mutants() -> list[Any]:
    """Return the wrong operations of conformance, which is found by path."""
    folder = str(data_root() / "conformance")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    package = import_module("mutants.operations")
    kind = import_module("mutants.operations.record").Mutant
    modules = [import_module(f"mutants.operations.{info.name}") for info in pkgutil.iter_modules(package.__path__)]
    return [value for module in modules for value in getattr(module, "MUTANTS", ()) if isinstance(value, kind)]


def noticed_by(mutant: Any) -> str:
    """Return the first property of its clause that notices a mutant, or nothing."""
    ops = REFERENCE.with_mutant(mutant.function, mutant.wrong)
    return next((entry.name for entry in properties_by_clause()[mutant.clause] if notices(entry, ops)), "")


@pytest.mark.parametrize("clause", load_operations())
def test_operation_clause__has_properties_and_mutants(clause: str) -> None:
    """A clause that nothing tests, or whose tests nothing has tested, is a hole."""
    assert properties_by_clause()[clause], f"{clause} has no property"
    assert [mutant for mutant in mutants() if mutant.clause == clause], f"{clause} has no mutant"


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.name)
def test_operation_mutant__is_noticed(mutant: Any) -> None:
    """A property of the clause that a wrong operation breaks fails on it."""
    assert mutant.function in REFERENCE.functions
    assert mutant.function in {place.partition(".")[2] for place in load_operations()[mutant.clause]["functions"]}
    assert noticed_by(mutant), f"{mutant.name} breaks {mutant.clause} unnoticed; it shows with: {mutant.trigger or 'any call'}"


def test_operation_properties__name_their_function() -> None:
    """Names follow the function: test_FUNCTION__PROPERTY, each with a sentence."""
    properties_by_clause()
    assert not [name for name, entry in OPERATION_PROPERTIES.items() if "__" not in name or not entry.text.endswith(".")]
    assert len({mutant.name for mutant in mutants()}) == len(mutants())


# What follows shows that the harness can say no.


def test_operation__sees_vacuity_and_failure() -> None:
    """A property that never met what it needs is vacuous, one that is false is noticed, one of an unknown clause is refused."""
    some = next(iter(load_operations()))

    @operation(some, needs=("a thing",))
    def test_made_up__is_true(ops: Any) -> None:
        ops.meets("a thing", False)

    @operation(some)
    def test_made_up__is_false(ops: Any) -> None:
        raise AssertionError

    true, false = (OPERATION_PROPERTIES.pop(f"test_made_up__is_{word}") for word in ("true", "false"))
    assert not notices(true, REFERENCE)
    assert true.vacuous(REFERENCE.fresh()) == ["a thing"]
    assert notices(false, REFERENCE)
    with pytest.raises(ValueError, match="there is no clause"):
        operation("T-NONE-1")
