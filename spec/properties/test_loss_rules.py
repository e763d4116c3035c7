# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""What the balance loss counts and divides by, function by function, row by row: S-AUX-1, S-BACK-5.

Probabilities are sixteenths and every denominator is a power of two or 0, so that sums and quotients are exact in any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.harness import clause, draws
from properties.operations import Operations
from refswitch.config import Aux
from refswitch.reference.capacity import Route
from refswitch.reference.losses import BalanceSaved
from refswitch.spec_data import load_dialect

BASE = load_dialect("mesh_tensorflow").aux
TREATMENTS = ("include", "exclude", "to_expert0")
G, S, E = 3, 8, 4


class Rows(NamedTuple):
    """Three groups of rows: all of the first are real, half of the second, none of the third."""

    route: Route
    claims_GS: np.ndarray
    valid_GS: np.ndarray
    probs_GSE: np.ndarray


def rows(seed: int) -> Rows:
    """Draw rows: who is real, who asks for a slot, who has one; padding may ask and may be kept."""
    random = np.random.Generator(np.random.Philox(seed))
    valid_GS = np.stack([np.ones(S, bool), random.permutation(S) < S // 2, np.zeros(S, bool)])
    claims_GS = valid_GS | (random.random((G, S)) < 0.5)
    kept_GS = np.zeros((G, S), bool)
    for g, count in enumerate((4, 2, 0)):  # a power of two, or nobody
        kept_GS[g, random.permutation(np.flatnonzero(claims_GS[g]))[:count]] = True
    route = Route(random.integers(0, E, (G, S)), np.zeros((G, S), np.int64), kept_GS)
    return Rows(route, claims_GS, valid_GS, random.integers(0, 17, (G, S, E)) / 16.0)


def knobs() -> Iterator[Aux]:
    """Yield every way to count."""
    for drops, pads in product(TREATMENTS, TREATMENTS):
        yield dataclasses.replace(BASE, f=dataclasses.replace(BASE.f, drops=drops, pads=pads))


def counts(drawn: Rows, choice_GS: np.ndarray, aux: Aux) -> np.ndarray:
    """Return what each expert is booked, row by row: padding that was dropped falls under both rules, and where both have a say it is left out."""
    found = np.zeros((G, E), np.int64)
    for g, s in np.ndindex(G, S):
        is_dropped, is_pad = bool(drawn.claims_GS[g, s] and not drawn.route.kept_GS[g, s]), not drawn.valid_GS[g, s]
        says = {treatment for holds, treatment in ((is_dropped, aux.f.drops), (is_pad, aux.f.pads)) if holds}
        if "exclude" not in says:
            found[g, 0 if "to_expert0" in says else choice_GS[g, s]] += 1
    return found


@clause("S-AUX-1", is_oracle=True)
@draws(seed=st.integers(0, 2**20))
def test_counted_fraction__row_by_row(operations: Operations, seed: int) -> None:
    """Each row is counted for its choice, for expert 0 or not at all, as the dialect says of dropped rows and of padding."""
    drawn = rows(seed)
    choice_GS = (drawn.route.expert_GS + 1) % E  # what is counted need not be where a token went
    for aux in knobs():
        got_GE = operations.counted_fraction(drawn.route, choice_GS, drawn.claims_GS, drawn.valid_GS, E, aux)
        assert (got_GE == counts(drawn, choice_GS, aux)).all(), aux.f


@clause("S-AUX-1", is_oracle=True)
@draws(seed=st.integers(0, 2**20))
def test_rows_of_mean__row_by_row(operations: Operations, seed: int) -> None:
    """The denominator is the number of rows, of real ones or of kept ones; a group's scale is 1 or its share of real rows."""
    drawn = rows(seed)
    for denom, of in (("S", np.ones((G, S))), ("valid", drawn.valid_GS), ("kept", drawn.route.kept_GS)):
        for pad_scale in ("none", "nonpad_fraction"):
            aux = dataclasses.replace(BASE, denom=denom, pad_scale=pad_scale)
            denominator_G, scale_G = operations.rows_of_mean(drawn.valid_GS, drawn.route.kept_GS, aux)
            assert [int(count) for count in denominator_G] == [sum(map(bool, row)) for row in of]
            assert [float(scale) for scale in scale_G] == [1.0 if pad_scale == "none" else sum(map(bool, row)) / S for row in drawn.valid_GS]
    empty_GS = np.zeros((G, 0), bool)
    _, scale_G = operations.rows_of_mean(empty_GS, empty_GS, dataclasses.replace(BASE, pad_scale="nonpad_fraction"))
    assert [float(scale) for scale in scale_G] == [0.0] * G


@clause("S-AUX-1", is_oracle=True)
@draws(seed=st.integers(0, 2**20))
def test_balance_forward__by_the_sum(operations: Operations, seed: int) -> None:
    """The mean over groups of scale * sum_e f_e P_e, term by term; a group whose denominator is 0 has no term."""
    drawn = rows(seed)
    count_GE = np.random.Generator(np.random.Philox(seed)).integers(0, S, (G, E))
    for scale_name, scale in (("E", Fraction(E)), ("local_E", Fraction(E)), ("none", Fraction(1)), ("inverse_E", Fraction(1, E))):
        for pads in ("include", "exclude"):
            for denominators in ([8, 4, 0], [1, 2, 16]):
                aux = dataclasses.replace(BASE, scale_E=scale_name, P_pads=pads)
                group_scale_G = np.array([1.0, 0.5, 0.25])
                arguments = (drawn.probs_GSE, count_GE, np.array(denominators), group_scale_G, drawn.valid_GS, aux)
                value, saved = operations.balance_forward(*arguments)
                terms = [Fraction(0)]
                for g, e in np.ndindex(G, E):
                    if denominators[g]:
                        P = sum(
                            (Fraction(float(drawn.probs_GSE[g, s, e])) for s in range(S) if drawn.valid_GS[g, s] or pads == "include"), Fraction(0)
                        )
                        weight = Fraction(float(group_scale_G[g])) * scale
                        terms.append(weight * Fraction(int(count_GE[g, e]), denominators[g]) * P / denominators[g])
                assert float(value) == float(sum(terms) / G), (scale_name, pads, denominators)
                check_slopes(operations, arguments, saved)
    nobody_GSE = np.zeros((0, S, E))
    value, _ = operations.balance_forward(nobody_GSE, np.zeros((0, E)), np.zeros(0), np.zeros(0), np.zeros((0, S), bool), BASE)
    assert float(value) == 0.0


def check_slopes(operations: Operations, arguments: tuple[np.ndarray, ...], saved: BalanceSaved) -> None:
    """Assert that the gradient that is returned is the slope of a loss that is linear in the probabilities."""
    probs_GSE, *rest = arguments
    dprobs_GSE = operations.balance_backward(-2.0, saved)
    at_0, _ = operations.balance_forward(np.zeros_like(probs_GSE), *rest)
    assert float(at_0) == 0.0
    for place in ((0, 0, 0), (0, 3, 1), (1, 2, 3), (1, 5, 0), (2, 7, 2)):
        one_GSE = np.zeros_like(probs_GSE)
        one_GSE[place] = 1.0
        slope, _ = operations.balance_forward(one_GSE, *rest)
        assert float(dprobs_GSE[place]) == -2.0 * float(slope), place
