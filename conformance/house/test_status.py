# May import: standard library, pytest, refswitch, spec/status_table.
"""The status table says what is there: every operation, on every floor, and every hole."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from refswitch.spec_data import data_root


@pytest.fixture(scope="module")
def status() -> Any:
    """Return the module that writes the table."""
    sys.path.insert(0, str(data_root() / "spec"))
    return import_module("status_table")


def test_status__agrees_with_the_files(status: Any) -> None:
    """A file, a clause, a property or a mutant that came or went without the table is seen."""
    assert status.PATH.read_text(encoding="utf-8") == status.table(), "run: python spec/status_table.py"


def test_status__sees_kernels_come_and_go(status: Any, tmp_path: Path) -> None:
    """The operation's row, and no other, changes with its kernel."""
    before = status.table(tmp_path).splitlines()
    kernel = tmp_path / "kernels" / "cuda" / "router.py"
    kernel.parent.mkdir(parents=True)
    kernel.touch()
    after = status.table(tmp_path).splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) == 1
    assert changed[0][1].split(" | ")[:5] == [changed[0][0].split(" | ")[0], changed[0][0].split(" | ")[1], "-", "-", "yes"]
    kernel.unlink()
    assert status.table(tmp_path).splitlines() == before


def test_status__shows_holes(status: Any) -> None:
    """A clause without a property, and an operation without a clause, are a share and a dash."""
    assert status.share(["S-CAP-1", "S-CAP-2"], {"S-CAP-2", "S-POS-1"}) == "1 of 2"
    assert status.share([], {"S-POS-1"}) == status.share(["S-CAP-1"], set()) == "-"
    assert status.share(["S-CAP-1"], {"S-CAP-1"}) == "yes"
    assert status.series(["S-CAP-1", "S-CAP-2", "S-CAP-3", "S-POS-1", "T-X-1", "T-X-3"]) == "S-CAP-1 to 3, S-POS-1, T-X-1, T-X-3"
    assert status.series([]) == "-"
