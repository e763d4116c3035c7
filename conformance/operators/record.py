# May import: standard library, rich, refswitch, mutate, properties, forked.
"""What is known: verdicts on disk, one line each, so that a campaign goes on where it was stopped; and the mutants that are argued to be no error.

A verdict holds as long as what it rests on is unchanged: a kill on the function, the error and the source of the property that failed; a survival
on the function, the error and the sources of all properties that were tried.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from refswitch.spec_data import data_root, read_yaml

from .forked import Verdict
from .mutate import Mutant, mutants_of_file
from .properties import Property, clauses_of, digest_of, files

EQUIVALENTS = data_root() / "conformance" / "operator_equivalents.yaml"
RESULTS = data_root() / ".operators" / "verdicts.jsonl"


class Argument(NamedTuple):
    """Why a mutant is no error."""

    id: str
    change: str  # "BEFORE -> AFTER", so that an edit of the function cannot make the argument speak of another mutant
    kind: str
    reason: str


@cache
def load_argued() -> dict[str, Argument]:
    """Return the arguments by mutant."""
    data = read_yaml(EQUIVALENTS)
    found = [Argument(str(id), entry["change"], kind, entry["reason"]) for kind, held in data["mutants"].items() for id, entry in held.items()]
    return {argument.id: argument for argument in found}


def kinds() -> dict[str, str]:
    """Return the classes of arguments, each with what all of its mutants have in common."""
    return read_yaml(EQUIVALENTS)["kinds"]


def change_of(mutant: Mutant) -> str:
    """Return what a mutant changes, on one line."""
    return " ".join(f"{mutant.before} -> {mutant.after}".split())


@cache
def all_mutants() -> dict[str, Mutant]:
    """Return every mutant of the reference by id."""
    return {mutant.id: mutant for path in files() for mutant in mutants_of_file(path)}


def stale(arguments: Iterable[Argument]) -> list[str]:
    """Return the arguments that speak of no mutant, of another one than there is now, or of an unknown kind."""
    found = []
    for argument in arguments:
        mutant = all_mutants().get(argument.id)
        if mutant is None:
            found.append(f"{argument.id}: there is no such mutant")
        elif change_of(mutant) != argument.change:
            found.append(f"{argument.id}: it is {change_of(mutant)}, not {argument.change}")
        elif argument.kind not in kinds():
            found.append(f"{argument.id}: {argument.kind} is no kind of argument")
    return found


class Verdicts:
    """The file of verdicts, and which of them still hold."""

    def __init__(self, path: Path, properties: list[Property]) -> None:
        self.path = path
        self.properties = {held.name: held for held in properties}
        self.lines: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the machine went down
                    continue
                self.lines[entry["id"]] = entry

    def tried_on(self, mutant: Mutant) -> list[Property]:
        """Return the properties of the mutant's clauses."""
        clauses = clauses_of(mutant.file)[mutant.function]
        return [held for held in self.properties.values() if held.clauses & clauses]

    def _basis(self, mutant: Mutant, killer: str) -> str:
        if killer:
            held = self.properties.get(killer)
            return held.digest if held is not None and held.clauses & clauses_of(mutant.file)[mutant.function] else "gone"
        return digest_of(" ".join(sorted(f"{held.name} {held.digest}" for held in self.tried_on(mutant))))

    def known(self, mutant: Mutant) -> dict[str, Any] | None:
        """Return what is known of a mutant, if it still holds."""
        entry = self.lines.get(mutant.id)
        if entry is None or entry["source"] != digest_of(mutant.source) or entry["basis"] != self._basis(mutant, entry["killer"]):
            return None
        return entry

    def enter(self, verdict: Verdict) -> None:
        """Write a verdict down; it is on disk when this returns."""
        mutant = verdict.mutant
        assert mutant is not None
        entry = {
            "id": mutant.id,
            "source": digest_of(mutant.source),
            "basis": self._basis(mutant, verdict.killer),
            "killer": verdict.killer,
            "how": verdict.how,
            "tried": verdict.tried,
            "seconds": round(verdict.seconds, 2),
        }
        self.lines[mutant.id] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
