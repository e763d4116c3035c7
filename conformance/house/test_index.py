# May import: standard library, pytest, refswitch.
"""The index of the paper: every place of it is there once, and what it names exists."""

from __future__ import annotations

import ast

import pytest

from refswitch.spec_data import data_root, every_clause, load_clauses, load_index

PLACES = [
    *(f"eq. ({i})" for i in range(1, 8)), *(f"figure {i}" for i in range(1, 17)), *(f"table {i}" for i in range(1, 12)),
    *(f"appendix {letter}" for letter in "ABCDEF"),
    *(f"section {number}" for number in ("2.1", "2.2", "2.3", "2.4", "3", "4.1", "4.2", "4.3", "5", "5.6")),
]  # fmt: skip


def functions_of(file: str) -> set[str]:
    """Return the names of the functions that a file defines."""
    tree = ast.parse((data_root() / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def problems(index: dict[str, dict[str, object]]) -> list[str]:
    """Return what an index names and nobody has, and places that say nothing."""
    found = []
    for place, entry in index.items():
        found += [f"{place}: {clause}" for clause in entry["clauses"] if clause not in every_clause()]
        for code in entry["code"]:
            file, _, function = code.partition(":")
            if not (data_root() / file).is_file() or function not in functions_of(file):
                found.append(f"{place}: {code}")
        if not entry["code"] and not entry.get("note"):
            found.append(f"{place}: neither code nor a note")
    return found


def test_index__has_every_place_of_the_paper() -> None:
    """Every equation, figure, table and appendix, once."""
    assert sorted(load_index()) == sorted(PLACES)


def test_index__names_what_exists() -> None:
    """Clauses, files and functions."""
    assert problems(load_index()) == []


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        ({"says": "x", "clauses": ["S-NONE-1"], "code": [], "note": "y"}, 1),
        ({"says": "x", "clauses": [], "code": ["refswitch/reference/norm.py:norm_sideways"]}, 1),
        ({"says": "x", "clauses": [], "code": []}, 1),
    ],
)
def test_index__check_notices(entry: dict[str, object], count: int) -> None:
    """An unknown clause, an unknown function, an empty place."""
    assert len(problems({"eq. (0)": entry})) == count


def test_index__leaves_out_no_clause() -> None:
    """A clause that cites a numbered place of this paper is in the index somewhere, or stands for a convention of ours."""
    cited = {name for name, clause in load_clauses().items() if any(word in str(clause["paper"]) for word in ("eq", "appendix C", "figure"))}
    cited = {name for name in cited if not str(load_clauses()[name]["paper"]).startswith("ST-MoE")}
    held = {clause for entry in load_index().values() for clause in entry["clauses"]}
    assert {name for name in cited if not name.startswith("S-BACK")} - held == set()
