# May import: standard library, refswitch, the mutants of conformance.
"""Which properties notice which mutant: each property's body is run on the mutant itself, with fewer examples and nothing printed."""

from __future__ import annotations

import sys
import zlib
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from properties.harness import PROPERTIES, RECORD, Property, broken_by
from properties.implementation import mutant_implementation
from properties.operation_mutants import OperationMutant
from refswitch.spec_data import data_root, every_clause, load_clauses


@cache
def properties_by_clause() -> dict[str, list[Property]]:
    """Return the properties of every clause, those that speak of the fewest clauses first."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        import_module(f"properties.{path.stem}")
    ordered = sorted(PROPERTIES.values(), key=lambda entry: len(entry.clauses))
    return {name: [entry for entry in ordered if name in entry.clauses] for name in every_clause()}


def conformance(module: str) -> Any:
    """Import a module of conformance, which is found by path."""
    folder = str(data_root() / "conformance")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(module)


@cache
def mutants() -> list[Any]:
    """Return the mutants."""
    return list(conformance("mutants.catalogue").MUTANTS)


@cache
def variants() -> list[Any]:
    """Return the correct variants."""
    return list(conformance("mutants.variants").VARIANTS)


def operation_kills(mutant: OperationMutant, everyone: bool = False) -> list[str]:
    """Return the properties of the mutant's clause that notice it; only the first, unless all are asked for."""
    operations, found = mutant.make(), []
    for entry in properties_by_clause()[mutant.clause]:
        if broken_by(entry, operations):
            found.append(entry.name)
            if not everyone:
                break
    return found


@cache
def named_by(name: str) -> tuple[str, ...]:
    """Return the clauses that a mutant is about: the one it is filed under, and one of the same stage whose feature it alone declares."""
    mutant = next(mutant for mutant in mutants() if mutant.name == name)
    extra = set(mutant.make().features) - set(conformance("mutants.subject").FEATURES)
    declared = [clause for clause, entry in load_clauses().items() if entry["stage"] == mutant.stage and entry.get("feature") in extra]
    return (mutant.clause, *declared)


def sample(of: list[Any], size: int) -> list[Any]:
    """Return a part of a list, always the same, in the list's order."""
    chosen = sorted(of, key=lambda item: zlib.crc32(item.name.encode()))[:size]
    return [item for item in of if item in chosen]


def kills(mutant: Any, profiles: tuple[str, ...] | None = None, everyone: bool = False) -> list[str]:
    """Return the properties of the mutant's clauses that notice it in one of its profiles; only the first, unless all are asked for.

    Another evaluation of the layer is asked only where no relation between calls notices anything in any profile.
    """
    layers = [mutant_implementation(mutant, profile) for profile in profiles or mutant.profiles]
    entries = [entry for clause in named_by(mutant.name) for entry in properties_by_clause()[clause]]
    found: list[str] = []
    for is_oracle in (False, True):
        for implementation in layers:
            for entry in entries:
                if entry.is_oracle != is_oracle or entry.name in found or entry.unsupported(implementation):
                    continue
                if broken_by(entry, implementation):
                    found.append(entry.name)
                    if not everyone:
                        return found
        if found:
            return found
    return found


def recorded(mutant: Any, clauses: tuple[str, ...], found: list[str]) -> list[str]:
    """Enter into the summary what noticed a mutant of these clauses."""
    if found:
        RECORD.kills[mutant.name] = found
    else:
        RECORD.spared.append(f"{mutant.name} ({', '.join(clauses)}): {mutant.summary}")
    return found
