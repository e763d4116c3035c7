# May import: standard library, pytest, refswitch.
"""The shipped adapters, judged by the command as a user runs it: ours conform, and each release of transformers shows what it is known for.

Peers that are not installed are reported as not run by the command itself; here their tests are skipped, and CI installs them.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ADAPTERS = Path(__file__).resolve().parent / "adapters"
HUGGINGFACE = str(ADAPTERS / "huggingface.py")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")


def judged(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Run `refswitch verify`; return its exit status and the reports."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "refswitch", "verify", *arguments, "-q", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert "Traceback" not in done.stderr
    content = json.loads(file.read_text())
    return done.returncode, content if isinstance(content, list) else [content]


def failing(report: dict[str, Any]) -> set[tuple[str, str]]:
    """Return (clause, stage) of every finding."""
    return {(finding["clause"], finding["stage"]) for finding in report["findings"]}


def test_reference__conforms(tmp_path: Path) -> None:
    """The reference is judged like anybody else."""
    status, reports = judged(tmp_path, "reference")
    assert status == 0
    assert {report["verdict"] for report in reports} == {"conforms"}
    assert [report["profile"]["name"] for report in reports] == ["float64", "float32", "bfloat16"]


@needs_torch
def test_torch_dispatch__conforms(tmp_path: Path) -> None:
    """One-hot einsum and gather, in three formats."""
    status, reports = judged(tmp_path, str(ADAPTERS / "torch_dispatch.py"))
    assert status == 0
    assert len(reports) >= 5
    assert {report["verdict"] for report in reports} == {"conforms"}


@cache
def _era() -> str:
    major, minor = (int(part) for part in version("transformers").split(".")[:2])
    if (major, minor) < (4, 52):
        return "hf_le_4_51"
    if major < 5:
        return "hf_4_57"
    return "hf_5_0_to_5_17" if (major, minor) < (5, 18) else "hf_ge_5_18"


@needs_transformers
def test_huggingface__conforms_in_evaluation_and_bfloat16(tmp_path: Path) -> None:
    """The installed release computes its own record; in float32 training alone its jitter writes to the caller's tensor."""
    status, reports = judged(tmp_path, HUGGINGFACE)
    found = {report["target"].split("::")[1]: failing(report) for report in reports}
    assert found.pop("training") == {("S-STATE-1", "state")}
    assert set(map(frozenset, found.values())) == {frozenset()}
    assert {report["dialect"]["name"] for report in reports} == {_era()}
    assert status == 1


@needs_transformers
def test_huggingface__leak_is_named(tmp_path: Path) -> None:
    """Judged as if noise never reached the experts, the same release deviates at the noise too, and the replay says why."""
    _, (report,) = judged(tmp_path, f"{HUGGINGFACE}::training", "--dialect", f"{_era()},noise.leak_to_experts=never")
    assert failing(report) == {("S-STATE-1", "state"), ("S-NOISE-2", "noise")}
    noise = next(finding for finding in report["findings"] if finding["stage"] == "noise")
    assert noise["diagnosis"][0]["name"] == "noise.leak_to_experts=if_same_dtype"
    assert noise["diagnosis"][0]["agreement"] == 1.0


EXPECTED = {  # era judged as another -> clause, stage, diagnosis
    ("hf_le_4_51", "hf_4_57"): ("S-DROP-1", "drop", "drop.output=x_times_gate"),
    ("hf_4_57", "hf_ge_5_18"): ("S-AUX-1", "aux_loss", "aux.f.drops=to_expert0"),
    ("hf_5_0_to_5_17", "hf_ge_5_18"): ("S-CAP-1", "capacity", "capacity.expr=inf"),
    ("hf_ge_5_18", "hf_4_57"): ("S-AUX-1", "aux_loss", "aux.f.drops=include"),
}


@needs_transformers
def test_huggingface__judged_as_its_neighbour(tmp_path: Path) -> None:
    """Judged as the record of another era, the installed release deviates in one clause, and the fault is named."""
    other, (clause, stage, diagnosis) = next((pair[1], expected) for pair, expected in EXPECTED.items() if pair[0] == _era())
    status, (report,) = judged(tmp_path, f"{HUGGINGFACE}::evaluation", "--dialect", other)
    assert status == 1
    assert failing(report) == {(clause, stage)}
    assert report["findings"][0]["diagnosis"][0]["name"] == diagnosis
    assert report["findings"][0]["diagnosis"][0]["agreement"] == 1.0
