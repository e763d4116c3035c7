# May import: standard library, pytest, refswitch, its own folder, the mutants of conformance.
"""From each clause to its properties, and from each mutant to the property that notices it: no clause without a test, no test without teeth.

Every mutant is let loose on its clause's properties. The control is correct layers, on all properties: a few, or with `--all-variants` all of them.
"""

from __future__ import annotations

from typing import Any

import pytest

from properties.harness import CONTROL, KILLING, PROPERTIES, broken_by, clause, draws, needs
from properties.implementation import Implementation, variant_implementation
from properties.killing import kills, mutants, named_by, operation_kills, properties_by_clause, recorded, sample, variants
from properties.operation_mutants import OperationMutant, operation_mutants
from properties.strategies import recipes
from refswitch.spec_data import every_clause, load_operations
from refswitch.verify.cases import Recipe

CONTROLS = 3  # correct variants in the sample


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Draw the controls."""
    if "variant" in metafunc.fixturenames:
        is_everything = metafunc.config.getoption("--all-variants", default=False)
        metafunc.parametrize("variant", variants() if is_everything else sample(variants(), CONTROLS), ids=lambda variant: variant.name)


@pytest.mark.parametrize("name", every_clause())
def test_clause__has_properties_and_mutants(name: str) -> None:
    """A clause that nothing tests, or whose tests nothing has tested, is a hole."""
    entries = properties_by_clause()[name]
    assert entries, f"{name} has no property"
    assert any(not entry.is_oracle for entry in entries), f"{name} is only compared with another evaluation"
    if name in load_operations():
        assert [mutant.name for mutant in operation_mutants() if mutant.clause == name], f"{name} has no mutant"
    else:
        assert [mutant.name for mutant in mutants() if name in named_by(mutant.name)], f"{name} has no mutant"


def test_properties__name_their_function() -> None:
    """Names follow the clause: test_FUNCTION__PROPERTY, each with a sentence."""
    properties_by_clause()
    assert not [name for name, entry in PROPERTIES.items() if "__" not in name or not entry.text.endswith((".", ":"))]
    assert not [name for name, entry in PROPERTIES.items() if not entry.clauses]


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.name)
def test_mutant__is_noticed(mutant: Any) -> None:
    """One of the properties of the clause that a mutant breaks fails on it.

    That is a relation between calls, or a value known beforehand, except where a rounding is wrong: only a radius around another evaluation tells it.
    """
    clauses = named_by(mutant.name)
    found = recorded(mutant, clauses, kills(mutant))
    assert found, f"{mutant.name} breaks {', '.join(clauses)} unnoticed; it shows with: {mutant.trigger or 'any case'}"
    assert mutant.stage == "precision" or not PROPERTIES[found[0]].is_oracle, f"only {found[0]} notices it, by another evaluation"


@pytest.mark.parametrize("operation_mutant", operation_mutants(), ids=lambda mutant: mutant.name)
def test_operation_mutant__is_noticed(operation_mutant: OperationMutant) -> None:
    """One of the properties of the clause that a wrong operation breaks fails on it."""
    found = recorded(operation_mutant, (operation_mutant.clause,), operation_kills(operation_mutant))
    assert found, f"{operation_mutant.name} breaks {operation_mutant.clause} unnoticed: {operation_mutant.summary}"


def test_catalogue__has_each_name_once() -> None:
    """No two mutants share a name, and each is of a clause of its kind."""
    names = [mutant.name for mutant in [*mutants(), *operation_mutants()]]
    assert len(set(names)) == len(names)
    assert {mutant.clause for mutant in operation_mutants()} <= set(load_operations())
    assert all(mutant.summary.endswith(".") for mutant in operation_mutants())


def test_variant__breaks_no_property(variant: Any) -> None:
    """On a correct layer, in whatever order it sums and however it dispatches, no property fails."""
    implementation = variant_implementation(variant)
    properties_by_clause()
    spoken = [entry for entry in PROPERTIES.values() if entry.subject == "implementation" and not entry.unsupported(implementation)]
    assert not [entry.name for entry in spoken if broken_by(entry, implementation, CONTROL)]


# What follows shows that the harness can say no.


def test_harness__sees_vacuity_and_failure() -> None:
    """A property that never met its trigger is vacuous, one that is false fails, one whose feature is missing says so."""
    from properties.implementation import reference

    @clause("S-CAP-1")
    @needs("over_128_experts", features=("top_k",))
    @draws(recipe=recipes(E=2))
    def test_made_up__is_false(implementation: Implementation, recipe: Recipe) -> None:
        assert recipe.E != 2

    entry = PROPERTIES.pop("test_made_up__is_false")
    layer = reference("float64").watched()
    assert entry.unsupported(layer) == "feature top_k is not declared"
    assert broken_by(entry, layer, KILLING)
    layer.call(layer_case(layer))
    assert entry.vacuous(layer.met) == ["over_128_experts"]
    assert test_made_up__is_false.entry is entry


def layer_case(implementation: Implementation) -> Any:
    """Return a small case."""
    from properties.implementation import smallest_case

    return smallest_case(implementation.target)
