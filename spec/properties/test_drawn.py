# May import: standard library, numpy, pytest, refswitch, its own folder.
"""What the comparisons of `drawn` see: a difference in an array, in a single number, in one that is none, in a shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from properties.drawn import Plan, Scene, assert_equal, assert_near, assert_within
from properties.operations import reference_operations
from refswitch.verify.tubes import Tube


def within(got: Any, wanted: Any) -> None:
    """Compare with a tube of no radius."""
    value = np.asarray(wanted, np.float64)
    assert_within(np.asarray(got, np.float64), Tube(value, np.zeros(value.shape)), "x", Scene(reference_operations(), Plan({}, 0, 0)))


def near(got: Any, wanted: Any) -> None:
    """Compare two evaluations that may not differ."""
    assert_near(np.asarray(got, np.float64), np.asarray(wanted, np.float64), Tube(np.asarray(wanted), np.zeros(np.shape(wanted))), "x")


@pytest.mark.parametrize("compare", [lambda got, wanted: assert_equal(got, wanted, "x"), within, near], ids=["equal", "within", "near"])
def test_comparisons__see_single_numbers(compare: Callable[[Any, Any], None]) -> None:
    """A number by itself is compared like an element of an array: its place has no coordinates, and is there."""
    for wanted in (1.0, [1.0, 2.0], [[1.0], [2.0]]):
        compare(wanted, wanted)
        for got in (np.asarray(wanted) + 1.0, np.full(np.shape(wanted), np.nan), np.zeros((3, 3))):
            with pytest.raises(AssertionError):
                compare(got, wanted)
