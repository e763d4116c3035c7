# May import: standard library.
"""Directional derivatives against central differences, with the differences' own error as the tolerance.

Along a direction a function is f(t), its derivative f'(0). A central difference with step h has the error c h**2 + O(h**4) and rounding: where f is
off by at most `noise`, by noise / h. That with step 2 h has the error 4 c h**2 and rounding noise / (2 h). So

    |far - near| >= 3 |c| h**2 - 3/2 noise / h    and    |near - f'(0)| <= |c| h**2 + noise / h <= |far - near| + 3/2 noise / h

and the right side is the radius: nothing is chosen but h. A piecewise smooth function (a layer that routes) has a derivative only where all points
lie on one piece: the function returns with its value what tells the pieces apart, and a direction that crosses a border is refused. Next: `ulp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import linear_regression
from typing import Any, NamedTuple

Along = Callable[[float], tuple[float, Any]]  # t to f(t) and its piece, for example the routes
Same = Callable[[Any, Any], bool]  # whether two pieces are one


class Difference(NamedTuple):
    """One derivative compared with one difference."""

    ratio: float  # |difference - derivative| / radius; above 1 it is wrong; NaN where refused, or where a value is NaN
    refused: bool  # the points lie on different pieces

    @property
    def ok(self) -> bool:
        """Whether the derivative was compared and lies within the radius."""
        return not self.refused and self.ratio <= 1.0


def difference_ratio(along: Along, derivative: float, step: float, noise: float, same: Same) -> Difference:
    """Return how far a derivative is from a central difference, in radii.

    Parameters
    ----------
    along : Callable
        The function of t, with its piece.
    derivative : float
        The claimed f'(0).
    step : float
        The h above, greater than 0.
    noise : float
        Bound of the error that rounding makes in any f(t): the sum of absolute terms times their number times the unit roundoff.
    same : Callable
        Whether the pieces of two points are equal.

    Returns
    -------
    Difference
        Its ratio is at most 1 where the derivative is right and the step small.
    """
    assert step > 0.0
    values, pieces = zip(*(along(t) for t in (0.0, -2.0 * step, -step, step, 2.0 * step)), strict=True)
    if not all(same(pieces[0], piece) for piece in pieces[1:]):
        return Difference(math.nan, True)
    _, far_before, before, after, far_after = values
    near, far = (after - before) / (2.0 * step), (far_after - far_before) / (4.0 * step)
    radius, error = abs(far - near) + 1.5 * noise / step, abs(near - derivative)
    return Difference(error / radius if radius > 0.0 else (0.0 if error == 0.0 else math.inf), False)


def difference_slope(along: Along, derivative: float, steps: Sequence[float], noise: float, same: Same) -> float:
    """Return the slope of log |central difference - derivative| over log h: 2 where the derivative is right, 0 where it is wrong.

    Only steps count whose points lie on one piece and whose error is above the rounding, noise / h.

    Parameters
    ----------
    along : Callable
        The function of t, with its piece.
    derivative : float
        The claimed f'(0).
    steps : Sequence of float
        The h, best a falling geometric sequence.
    noise : float
        Bound of the error that rounding makes in any f(t).
    same : Callable
        Whether the pieces of two points are equal.

    Returns
    -------
    float
        Of the line of least squares.

    Raises
    ------
    ValueError
        Where fewer than two steps count: they are too small, or f is a polynomial of degree 2, whose central differences are exact.
    """
    _, here = along(0.0)
    points = []
    for step in steps:
        (before, piece_before), (after, piece_after) = along(-step), along(step)
        error = abs((after - before) / (2.0 * step) - derivative)
        if same(here, piece_before) and same(here, piece_after) and error > noise / step:
            points.append((math.log(step), math.log(error)))
    if len(points) < 2:
        raise ValueError(f"difference_slope: {len(points)} of {len(steps)} steps have an error above rounding, but two are needed")
    log_step, log_error = zip(*points, strict=True)
    return linear_regression(log_step, log_error).slope
