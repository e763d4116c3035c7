# May import: standard library, refswitch, its own folder, two_oracles of conformance.
"""The whole layer in every dialect against exact rational numbers: S-NOISE-1 to S-BACK-6.

The other evaluation (refswitch/proof/exact_switch.py) is written apart from the reference, integers included, and knows no rounding: where it cannot
decide, it says so. A drawn case has a dialect of its own, so that knobs meet that no record has together.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from properties.harness import clause, draws, needs
from properties.killing import conformance
from properties.operations import Operations

RARE = (  # seeds at which readings meet that few dialects have, or none has together
    150, 151, 154, 155, 159, 170, 174, 178, 182, 211, 217, 237, 238, 246, 259, 260, 263, 274, 276, 282, 286, 291, 298, 310, 312, 313, 316, 330,
    343, 347, 376, 400, 414, 415, 436, 441, 445, 449, 466, 488, 495, 496, 511, 540, 541, 548, 554, 558, 564, 578, 619, 651, 728, 740, 748, 751,
    759, 763, 765, 775, 780, 855, 909, 973, 1035, 1070, 1084, 1143, 1227, 1324, 1369, 1477, 1487, 1531, 1550, 1552, 1646, 1719, 1922, 2004, 2042,
    2048, 2053, 2055, 2058, 2063, 2084, 2103, 2106, 2111,
)  # fmt: skip
SEEDS = (*range(150), *RARE)


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


def note_regimes(operations: Operations, drawn: Any, exact: dict[str, Any]) -> None:
    """Say which of the rare readings a case has."""
    dialect, has_noise, some = drawn.dialect, "noise" in drawn.case, bool(exact["kept"].any())
    operations.meets("second place with noise", dialect.select.rule == "second_place" and has_noise and some)
    operations.meets("left behind with noise", dialect.select.rule == "ntlb" and has_noise and some)
    operations.meets("a gate on a gated hidden activation", dialect.gate.site == "hidden" and dialect.expert.glu and some)
    operations.meets("a gate on the hidden activation and biases", dialect.gate.site == "hidden" and dialect.expert.bias == "per_expert" and some)
    operations.meets("a gate at both ends", dialect.gate.site == "input_and_output" and some)
    operations.meets("a sigmoid", dialect.gate.value == "sigmoid" and some)
    operations.meets("dropped tokens times their gate", dialect.drop.output == "x_times_gate" and not exact["kept"].all())
    operations.meets("padding for expert 0", dialect.pad.route == "expert0_weight0" and "valid" in drawn.case and some)
    operations.meets("straight through", dialect.dispatch_grad == "straight_through" and some)
    operations.meets("clean gates", dialect.noise.gate_from == "clean" and has_noise and some)
    operations.meets("a capped logit", bool(dialect.router.logit_cap) and some)


@clause(
    "S-NOISE-1", "S-NOISE-2", "S-ROUTE-1", "S-ROUTE-2", "S-ROUTE-3", "S-CAP-1", "S-CAP-2", "S-POS-1", "S-PACK-1", "S-EXPERT-1", "S-EXPERT-2",
    "S-GATE-1", "S-COMBINE-1", "S-DROP-1", "S-PAD-1", "S-PAD-2", "S-AUX-1", "S-Z-1", "S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", "S-BACK-5",
    "S-BACK-6", is_oracle=True,
)  # fmt: skip
@needs(
    "second place with noise", "left behind with noise", "a gate on a gated hidden activation", "a gate on the hidden activation and biases",
    "a gate at both ends", "a sigmoid", "dropped tokens times their gate", "padding for expert 0", "straight through", "clean gates",
    "a capped logit", wide=True,
)  # fmt: skip
@draws()
def test_switch_forward__equals_exact_arithmetic(operations: Operations) -> None:
    """Integers are those of exact arithmetic, and every number lies within its radius of the exact one, forward and backward, in any dialect."""
    oracles = conformance("two_oracles")
    for drawn, exact in exact_cases():
        note_regimes(operations, drawn, exact)
        of = oracles.witness(drawn, operations.switch_forward, operations.switch_backward)
        assert not oracles.disagreements(exact, of, oracles.new_summary())
