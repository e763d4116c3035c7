# May import: standard library, numpy.
"""Bfloat16 inside float32: the upper half of the bits is the number, the lower half is zero.

`round_bf16` is the one way in: to nearest, ties to even, decided on the bits. `stochastic_round_bf16` goes up or down by chance such that
the expectation is the value. Each has a twin for one element (`..._bits`), the same arithmetic in plain Python, which
a compiler takes as it stands. Source: bfloat16 is float32 with 8 instead of 24 significant bits, so both have the same exponents,
and a carry out of the significand steps to the next binade and, after the last one, to infinity.
Spec: numbers. Paper: 2.4 (selective precision). Exactness: class E. From float64 round with `precision.round_to`: by way of float32 it would be
two roundings.
"""

from __future__ import annotations

import numpy as np

SIGNLESS = 0x7FFFFFFF
INFINITY = 0x7F800000  # whose sign is masked; what lies above are the NaNs
QUIET = 0x00400000
UPPER = 0xFFFF0000
LOWER = 0x0000FFFF
BELOW_HALF = 0x00007FFF


def round_bf16_bits(bits: int) -> int:
    """Round the bits of one float32 to those of the nearest bfloat16, ties to even.

    Spec: numbers. The scalar twin of `round_bf16`. Nothing here leaves 32 bits: NaN, the only one that could, returns before the sum.

    Parameters
    ----------
    bits : uint32 (under a compiler that, and not uint64), or int in [0, 2**32)
        A float32, as bits.

    Returns
    -------
    int
        A float32 whose lower 16 bits are zero, as bits.
    """
    if bits & SIGNLESS > INFINITY:
        return (bits | QUIET) & UPPER  # the sum would carry the NaN 0x7fffffff to -0, and cutting 0x7f800001 gives infinity
    return (bits + BELOW_HALF + (bits >> 16 & 1)) & UPPER


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 values to the nearest bfloat16, ties to even.

    Spec: numbers. Infinity stays, what is half a spacing beyond the largest bfloat16 becomes infinity, NaN is quieted and keeps its sign,
    the sign of zero stays, subnormal numbers round like the others.

    Parameters
    ----------
    x : float32
        Any values, any shape; never written.

    Returns
    -------
    np.ndarray
        float32 of x's shape, the lower 16 bits zero.

    Raises
    ------
    TypeError
        If x is not float32.
    """
    bits = bits_of(x, "round_bf16")
    rounded = (bits + BELOW_HALF + (bits >> 16 & 1)) & UPPER
    return values_of(np.where(is_nan(bits), (bits | QUIET) & UPPER, rounded), x)


def stochastic_round_bf16_bits(bits: int, random: int) -> int:
    """Round the bits of one float32 up or down to bfloat16 by chance.

    Spec: numbers. The scalar twin of `stochastic_round_bf16`.

    Parameters
    ----------
    bits : uint32 (under a compiler that, and not uint64), or int in [0, 2**32)
        A float32, as bits.
    random : uint32, or int in [0, 2**32)
        A draw, of which the lower 16 bits count.

    Returns
    -------
    int
        A float32 whose lower 16 bits are zero, as bits.
    """
    if bits & SIGNLESS > INFINITY:
        return (bits | QUIET) & UPPER
    return (bits + (random & LOWER)) & UPPER


def stochastic_round_bf16(x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Round float32 values up or down to bfloat16 by chance, so that the mean over all draws is the value.

    Spec: numbers. Between two neighbours float32 values are as evenly spaced as their bits, so a value that lies k / 65536 of the way goes
    up for k of the 65536 draws: exactly unbiased. A value on the grid does not move, infinity stays, NaN is quieted, and beyond the
    largest bfloat16 the neighbour is infinity.

    Parameters
    ----------
    x : float32
        Any values, any shape; never written.
    random : uint16 or uint32
        One draw per value, of which the lower 16 bits count.

    Returns
    -------
    np.ndarray
        float32 of x's shape, the lower 16 bits zero.

    Raises
    ------
    TypeError
        If x is not float32, or random neither uint16 nor uint32.
    ValueError
        If the shapes differ: nothing is broadcast, because a shared draw is a correlated one.
    """
    bits = bits_of(x, "stochastic_round_bf16")
    random = np.asarray(random)
    if random.dtype not in (np.uint16, np.uint32):
        raise TypeError(f"stochastic_round_bf16: random has dtype {random.dtype}, but should be uint16 or uint32")
    if random.shape != np.shape(x):
        raise ValueError(f"stochastic_round_bf16: random has shape {random.shape}, but should be {np.shape(x)}, the shape of x")
    rounded = (bits + (random.reshape(-1).astype(np.uint32) & LOWER)) & UPPER
    return values_of(np.where(is_nan(bits), (bits | QUIET) & UPPER, rounded), x)


def is_nan(bits: np.ndarray) -> np.ndarray:
    """Tell from the bits where a float32 is NaN."""
    return (bits & SIGNLESS) > INFINITY


def bits_of(x: np.ndarray, caller: str) -> np.ndarray:
    """Return the bits of float32 values as a flat uint32 array, on which sums wrap silently, as they do not on a NumPy scalar."""
    x = np.asarray(x)
    if x.dtype != np.float32:
        raise TypeError(f"{caller}: x has dtype {x.dtype}, but should be float32")
    return x.reshape(-1).view(np.uint32)


def values_of(bits: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return uint32 bits as float32 values of x's shape."""
    return bits.view(np.float32).reshape(np.shape(x))
