# May import: standard library, numpy.
"""The dot test of a linear function and its adjoint: <A x, y> = <x, A^T y>, exact, because everything in it is a small integer.

The tempting test compares both sides within a tolerance, and a gradient that loses one row in a thousand passes it. Here x and y are integers in
float64, a move or a product with integer weights keeps them integers, and sums of integers below 2**53 have no rounding. Style: rules 16 and 53.
Next: `finite_difference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

LARGEST = 3  # of a drawn integer
EXACT = 2.0**53  # integers up to here, and their sums, are float64 values


def draw(shape: Any, random: np.random.Generator) -> Any:
    """Return small integers in float64; `shape` is a tuple of sizes, or a tuple of shapes for a tuple of arrays, nested as one likes."""
    if all(isinstance(size, int) for size in shape):
        return random.integers(-LARGEST, LARGEST, shape, endpoint=True).astype(np.float64)
    return tuple(draw(inner, random) for inner in shape)


def arrays_of(tree: Any) -> list[np.ndarray]:
    """Return the arrays of a tuple, nested or named, in order."""
    return [array for inner in tree for array in arrays_of(inner)] if isinstance(tree, tuple) else [np.asarray(tree)]


def dot(one: Any, other: Any) -> float:
    """Return the sum of the products of two trees of arrays, exactly.

    Raises
    ------
    AssertionError
        Where their shapes differ, an element is no integer, or the sum could reach 2**53, so that it might round.
    """
    ones, others = arrays_of(one), arrays_of(other)
    shapes, wanted = [array.shape for array in ones], [array.shape for array in others]
    assert shapes == wanted, f"the function returns shapes {shapes}, but should return {wanted}"
    for array in ones + others:
        assert np.array_equal(array, np.rint(array)), "a dot test needs integers: give the function integer parameters"
    largest = sum(float(np.sum(np.abs(a) * np.abs(b))) for a, b in zip(ones, others, strict=True))
    assert largest < EXACT, f"a sum of {largest} may round: give the function smaller parameters"
    return sum(float(np.sum(a * b)) for a, b in zip(ones, others, strict=True))


def adjoint_gap(linear: Callable[[Any], Any], adjoint: Callable[[Any], Any], x_shape: Any, y_shape: Any, seed: int) -> float:
    """Return <A x, y> - <x, A^T y> for drawn integers x and y: 0.0 where one function is the other's adjoint.

    Parameters
    ----------
    linear : Callable
        A, from an array (or tuple of arrays) of `x_shape` to one of `y_shape`; what else it reads must be integers.
    adjoint : Callable
        A^T, the other way.
    x_shape : tuple
        Sizes, or a tuple of shapes.
    y_shape : tuple
        The same for A x.
    seed : int
        Of the draw. A wrong adjoint has a gap for all but few draws.

    Returns
    -------
    float
        An integer, exact.

    Raises
    ------
    AssertionError
        Where a function returns another shape or something else than integers, or a sum may round.
    """
    random = np.random.Generator(np.random.Philox(seed))
    x, y = draw(x_shape, random), draw(y_shape, random)
    return dot(linear(x), y) - dot(adjoint(y), x)
