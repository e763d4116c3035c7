# May import: standard library, numpy.
"""Floating-point formats and the one way into each of them.

A value is *stored* in a format, *computed* in another and *accumulated* in a third. In refswitch's reference every array is
float64 and a rounding point (`round_to(x_TD, FORMATS["bfloat16"])`) puts its values on the grid of the format in which an
implementation would have stored them. Spec: numbers. Exactness: class E (equal bits), nearest, ties to even.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Format(NamedTuple):
    """A binary floating-point format: `precision` significant bits, normal exponents from `e_min` to `e_max`."""

    name: str
    precision: int
    e_min: int
    e_max: int

    @property
    def unit(self) -> float:
        """Unit roundoff of round-to-nearest, 2**-precision."""
        return 2.0**-self.precision

    @property
    def largest(self) -> float:
        """Largest finite value."""
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0**self.e_max

    @property
    def smallest_normal(self) -> float:
        """Smallest positive normal value."""
        return 2.0**self.e_min

    @property
    def smallest(self) -> float:
        """Smallest positive subnormal value: the spacing of the grid around zero."""
        return 2.0 ** (self.e_min - self.precision + 1)


FORMATS = {
    format.name: format
    for format in (
        Format("float64", 53, -1022, 1023),
        Format("float32", 24, -126, 127),
        Format("tf32", 11, -126, 127),
        Format("float16", 11, -14, 15),
        Format("bfloat16", 8, -126, 127),
    )
}


def spacing(x: np.ndarray, format: Format) -> np.ndarray:
    """Distance between neighbours of `format` in the binade of each |x| (subnormal spacing below the normal range).

    Spec: numbers. Returns float64 of x's shape; infinities and NaN give NaN.
    """
    x_abs = np.abs(np.asarray(x, np.float64))
    _, exponent = np.frexp(x_abs)
    exponent = np.where(x_abs > 0.0, exponent - 1, format.e_min)  # frexp calls the exponent of 0 zero
    result = np.ldexp(1.0, np.maximum(exponent, format.e_min) - format.precision + 1)
    return np.where(np.isfinite(x_abs), result, np.nan)


def round_to(x: np.ndarray, format: Format) -> np.ndarray:
    """Round float64 values to the nearest value of `format`, ties to even.

    Spec: numbers. One rounding from the float64 value, never two. Overflow gives infinity, NaN stays NaN, the sign of zero is kept.
    Returns float64 values that `format` holds exactly.
    """
    x = np.asarray(x, np.float64)
    if format.precision == 53:
        return x
    _, exponent = np.frexp(x)
    quantum_exponent = np.maximum(exponent, format.e_min + 1) - format.precision
    # Scaling by a power of two is exact, and rint is nearest-even, so the only rounding is the one that is wanted.
    rounded = np.ldexp(np.rint(np.ldexp(x, -quantum_exponent)), quantum_exponent)
    rounded = np.where(np.abs(rounded) > format.largest, np.copysign(np.inf, x), rounded)
    return np.where(np.isfinite(x), rounded, x)


def is_stored(x: np.ndarray, format: Format) -> np.ndarray:
    """True where a finite value lies on the grid of `format` (non-finite values count as stored)."""
    return ~np.isfinite(x) | (round_to(x, format) == x)
