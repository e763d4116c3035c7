# May import: standard library, numpy, refswitch.numbers, refswitch.proof.shape_tracer.
"""Distances in units in the last place of a named format, and where the first bad element is, by letter.

A value's place on the grid of a format is a number that grows by 1 from each value of the format to the next, linearly between them, through zero
and subnormals and across binades. A distance is the difference of two places: neighbours are 1 apart everywhere. The tempting |a - b| / spacing(b)
is 1/2 or 1 across a power of two, depending on who is b. Exactness: class E for values on the grid. Style: rules 30 and 54. Next: `exercised`.
"""

from __future__ import annotations

import numpy as np

from refswitch.numbers.precision import Format, spacing
from refswitch.proof.shape_tracer import letters_of


def _place(x: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """Return the whole and the fractional part of the place of each finite |x|."""
    x_abs = np.where(np.isfinite(x), np.abs(x), 0.0)
    exponent = np.frexp(spacing(x_abs, format))[1] - 1  # of the last place
    scaled = np.ldexp(x_abs, -exponent)  # in [2**(precision - 1), 2**precision) where normal
    whole = np.floor(scaled)
    binades = (exponent - (format.e_min - format.precision + 1)).astype(np.int64)
    return whole.astype(np.int64) + (binades << (format.precision - 1)), scaled - whole


def ulp_distance(a: np.ndarray, b: np.ndarray, format: Format) -> np.ndarray:
    """Return the distance of each pair in units in the last place of `format`; equal infinities and two NaN are 0 apart, all else there is infinite.

    The sign of zero is ignored. Float64 arrays of one shape; what lies beyond the largest value of the format is measured on its grid continued.

    Raises
    ------
    ValueError
        Where the shapes differ.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"ulp_distance: shapes are {a.shape} and {b.shape}, but should be equal")
    (whole_a, part_a), (whole_b, part_b) = _place(a, format), _place(b, format)
    apart = np.abs((whole_a - whole_b).astype(np.float64) + (part_a - part_b))
    across = whole_a.astype(np.float64) + whole_b.astype(np.float64) + (part_a + part_b)
    distance = np.where(np.signbit(a) == np.signbit(b), apart, across)
    agrees = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(np.isfinite(a) & np.isfinite(b), distance, np.where(agrees, 0.0, np.inf))


def coordinate(name: str, index: tuple[int, ...]) -> str:
    """Return a name with its index by letter: `packed[e=2, c=1, d=4]` for `packed_ECD`; a digit's axis has no name."""
    letters = letters_of(name)
    if not letters:
        return f"{name}[{', '.join(map(str, index))}]" if index else name
    named = (f"{letter.lower()}={i}" for letter, i in zip(letters, index, strict=True) if not letter.isdigit())
    return f"{name.removesuffix(f'_{letters}')}[{', '.join(named)}]"


def first_bad(name: str, got: np.ndarray, wanted: np.ndarray, format: Format, limit: float) -> str:
    """Return one line on the first element that is more than `limit` units in the last place off, or nothing."""
    distance = ulp_distance(got, wanted, format)
    bad = distance > limit
    if not bad.any():
        return ""
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    here = f"{coordinate(name, index)} is {float(np.asarray(got)[index])!r}, should be {float(np.asarray(wanted)[index])!r}"
    return f"{here}: {distance[index]:.3g} ulp of {format.name} ({np.count_nonzero(bad)} of {bad.size} elements)"
