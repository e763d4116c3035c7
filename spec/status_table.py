# May import: standard library, refswitch, properties.
"""The status table: every operation on every floor of the house, found in the files, as spec/status.md has it.

python spec/status_table.py          writes spec/status.md anew
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from refswitch.spec_data import data_root, every_clause

ROOT = data_root()
PATH = ROOT / "spec" / "status.md"
HOMES = ("reference", "numbers")  # folders of refswitch in which operations are defined
ALL, NONE = "yes", "-"
HEAD = """# Status

One operation, one name on every floor: its clauses, the file of the reference (or of the numbers), of the kernels for the CPU and for CUDA;
whether each of its clauses has properties, and mutants of its own that these notice. A hole is a dash or a share. `python spec/status_table.py`
writes this file from the others, and a test fails where they disagree. Operator mutants are planted in every function of the reference:
`python conformance/operator_campaign.py`.

| operation | clauses | reference | cpu | cuda | properties | mutants |
|---|---|---|---|---|---|---|
"""


def clauses_by_operation() -> dict[str, list[str]]:
    """Return the clauses of every operation in the order of clauses.yaml, then the files of the reference that no clause names."""
    found: dict[str, list[str]] = {}
    for name, clause in every_clause().items():
        for operation in dict.fromkeys(place.partition(".")[0] for place in clause["functions"]):
            found.setdefault(operation, []).append(name)
    for path in sorted((ROOT / "refswitch" / "reference").glob("[!_]*.py")):
        found.setdefault(path.stem, [])
    return found


def clauses_with_properties() -> set[str]:
    """Return the clauses that a property speaks of."""
    from properties.killing import properties_by_clause

    return {name for name, held in properties_by_clause().items() if held}


def clauses_with_mutants() -> set[str]:
    """Return the clauses that a wrong layer or a wrong operation was written for."""
    from properties.killing import mutants, named_by
    from properties.operation_mutants import operation_mutants

    return {mutant.clause for mutant in operation_mutants()} | {name for mutant in mutants() for name in named_by(mutant.name)}


def series(names: list[str]) -> str:
    """Return clauses in short: S-CAP-1, S-CAP-2 as S-CAP-1 to 2."""
    groups: dict[str, list[int]] = {}
    for name in names:
        stem, _, number = name.rpartition("-")
        groups.setdefault(stem, []).append(int(number))
    runs = []
    for stem, numbers in groups.items():
        while numbers:
            run = [numbers.pop(0)]
            while numbers and numbers[0] == run[-1] + 1:
                run.append(numbers.pop(0))
            runs.append(f"{stem}-{run[0]}" + (f" to {run[-1]}" if len(run) > 1 else ""))
    return ", ".join(runs) or NONE


def share(names: list[str], having: set[str]) -> str:
    """Return how many of the clauses are among those that have something."""
    count = len(set(names) & having)
    return NONE if not count else ALL if count == len(names) else f"{count} of {len(names)}"


def standing(operation: str, folders: tuple[str, ...], package: Path) -> str:
    """Return whether a file of the operation's name stands in one of these folders."""
    return ALL if any((package / folder / f"{operation}.py").is_file() for folder in folders) else NONE


def table(package: Path = ROOT / "refswitch") -> str:
    """Return the text of spec/status.md."""
    tested, broken = clauses_with_properties(), clauses_with_mutants()
    rows = []
    for operation, names in clauses_by_operation().items():
        files = (standing(operation, folders, package) for folders in (HOMES, ("kernels/cpu",), ("kernels/cuda",)))
        rows.append(f"| {' | '.join((operation, series(names), *files, share(names, tested), share(names, broken)))} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PATH.write_text(table(), encoding="utf-8")
    print(f"wrote {PATH}")
