# May import: standard library, hypothesis, refswitch, spec/properties, mutate.
"""Which properties a function must fall to: from its clauses in spec/clauses.yaml to the tests of those clauses in spec/properties.

A helper that no clause names stands under the clauses of the functions of its file that call it, and so does a constant.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from refswitch.spec_data import data_root, every_clause

from .mutate import MODULE, parts_of

REFERENCE = data_root() / "refswitch" / "reference"


EXAMPLES = {"implementation": 4, "operations": 15}  # drawn after those that a property always tries; the suite draws 15


@cache
def settings_of(subject: str) -> Any:
    """Return how a property of a subject is run: the same examples in every run, and nothing said of them."""
    from hypothesis import HealthCheck, Phase, Verbosity, settings

    return settings(
        max_examples=EXAMPLES[subject], stateful_step_count=6, derandomize=True, deadline=None, database=None, print_blob=False,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate), verbosity=Verbosity.quiet,
    )  # fmt: skip


class Property(NamedTuple):
    """One property of spec/properties on one thing that it is tested on."""

    name: str
    clauses: frozenset[str]
    digest: str  # of its source, and of all that it is written with
    entry: Any
    subject: Any

    def run(self) -> None:
        """Run it; it raises where it does not hold."""
        self.entry.run(self.subject.fresh(), settings_of(self.entry.subject))


def files() -> list[Path]:
    """Return the files of the reference."""
    return sorted(path for path in REFERENCE.glob("*.py") if path.stem != "__init__")


def sources_of(file: str) -> dict[str, str]:
    """Return the source of each function of a file, and of its constants, without comments."""
    return {name: ast.unparse(tree) for name, tree in parts_of((REFERENCE / f"{file}.py").read_text(encoding="utf-8")).items()}


@cache
def clauses_of(file: str) -> dict[str, frozenset[str]]:
    """Return the clauses of each function of a file."""
    parts = parts_of((REFERENCE / f"{file}.py").read_text(encoding="utf-8"))
    own: dict[str, set[str]] = {name: set() for name in parts}
    for clause, entry in every_clause().items():
        for place in entry["functions"]:
            module, _, function = place.partition(".")
            if module == file:
                own[function].add(clause)
    mentions = {name: {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} for name, tree in parts.items() if name != MODULE}
    constants = {node.id for node in ast.walk(parts[MODULE]) if isinstance(node, ast.Name)} if MODULE in parts else set()

    def inherited(name: str, seen: frozenset[str]) -> set[str]:
        if own[name]:
            return own[name]
        called = constants if name == MODULE else {name}
        callers = [caller for caller, names in mentions.items() if names & called and caller not in seen]
        return set().union(*(inherited(caller, seen | {name}) for caller in callers))

    return {name: frozenset(inherited(name, frozenset())) for name in parts}


def digest_of(text: str) -> str:
    """Return a short name of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _common_source() -> str:
    """Return the source of the files that properties share."""
    shared = [path for path in (data_root() / "spec" / "properties").glob("*.py") if not path.stem.startswith("test_")]
    return "".join(path.read_text(encoding="utf-8") for path in sorted(shared))


@cache
def _helpers_source(path: str) -> str:
    """Return the source of what stands beside the properties of a file."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return "".join(ast.unparse(node) for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")))


def collect() -> list[Property]:
    """Return the properties on everything that `pytest spec` tries them on, those that do not speak of it left out."""
    folder = str(data_root() / "spec")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from properties.harness import PROPERTIES
    from properties.implementation import implementations
    from properties.killing import properties_by_clause
    from properties.operations import reference_operations

    properties_by_clause()  # imports the files of tests
    subjects = {"implementation": implementations("reference"), "operations": [reference_operations()]}
    found = []
    for entry in PROPERTIES.values():
        digest = digest_of(inspect.getsource(entry.body) + _helpers_source(inspect.getfile(entry.body)) + _common_source())
        for subject in subjects[entry.subject]:
            if not entry.unsupported(subject):
                found.append(Property(f"{entry.name}[{subject.label}]", frozenset(entry.clauses), digest, entry, subject))
    return found
