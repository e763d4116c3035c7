# May import: standard library, refswitch, its own folder, two_oracles of conformance.
"""The whole layer in every dialect against exact rational numbers: S-NOISE-1 to S-BACK-6.

The other evaluation (refswitch/proof/exact_switch.py) is written apart from the reference, integers included, and knows no rounding: where it cannot
decide, it says so. A drawn case has a dialect of its own, so that knobs meet that no record has together.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from properties.harness import clause, draws
from properties.killing import conformance
from properties.operations import Operations

SEEDS = range(150)


@cache
def exact_cases() -> list[tuple[Any, Any]]:
    """Return the cases and what comes out of them exactly."""
    oracles = conformance("two_oracles")
    found = []
    for seed in SEEDS:
        drawn = oracles.draw(seed)
        try:
            found.append((drawn, oracles.exactly(drawn.case, drawn.dialect)))
        except oracles.Undecided:
            continue
    assert len(found) > len(SEEDS) // 2
    return found


@clause(
    "S-NOISE-1", "S-NOISE-2", "S-ROUTE-1", "S-ROUTE-2", "S-ROUTE-3", "S-CAP-1", "S-CAP-2", "S-POS-1", "S-PACK-1", "S-EXPERT-1", "S-EXPERT-2",
    "S-GATE-1", "S-COMBINE-1", "S-DROP-1", "S-PAD-1", "S-PAD-2", "S-AUX-1", "S-Z-1", "S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", "S-BACK-5",
    "S-BACK-6", is_oracle=True,
)  # fmt: skip
@draws()
def test_switch_forward__equals_exact_arithmetic(operations: Operations) -> None:
    """Integers are those of exact arithmetic, and every number lies within its radius of the exact one, forward and backward, in any dialect."""
    oracles = conformance("two_oracles")
    for drawn, exact in exact_cases():
        of = oracles.witness(drawn, operations.switch_forward, operations.switch_backward)
        assert not oracles.disagreements(exact, of, oracles.new_summary())
