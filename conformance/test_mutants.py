# May import: standard library, pytest, refswitch, campaign and the mutants beside this file.
"""The measure of the judge in the suite: every mutant is caught, no correct variant is accused.

The suite runs each mutant twice, exporting and black box, in one profile each, and every variant at a seed of its own; `campaign.py` runs all.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from campaign import is_caught, judge_layer, mutant_runs
from mutants.catalogue import MUTANTS
from mutants.variants import VARIANTS

from refswitch.spec_data import load_clauses
from refswitch.verify.judge import STAGES

RUNS = {(mutant.name, exports): (mutant, exports) for mutant, exports, _ in mutant_runs()}


def _turn(name: str, choices: int) -> int:
    return zlib.crc32(name.encode()) % choices


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_mutant__is_caught(run: tuple[str, str]) -> None:
    """A wrong layer deviates."""
    mutant, exports = RUNS[run]
    assert is_caught(mutant.make(exports, mutant.profiles[_turn(mutant.name + exports, len(mutant.profiles))])), mutant.trigger


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_variant__is_never_accused(variant: object) -> None:
    """A right layer conforms, whatever its order, dispatch and format, and nothing stays inconclusive."""
    report = judge_layer(variant.make(), seed=_turn(variant.name, 1000))  # type: ignore[attr-defined]
    assert (report.verdict, report.findings, report.why) == ("conforms", [], "")


def test_catalogue__covers_every_stage() -> None:
    """Every stage of the judge has mutants, each filed under a clause that exists; names are unique."""
    assert {mutant.stage for mutant in MUTANTS} == set(STAGES)
    assert {mutant.clause for mutant in MUTANTS} <= set(load_clauses())
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
