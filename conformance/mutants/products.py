# May import: numpy, the standard library.
"""Arithmetic that a correct implementation may choose: the order of every sum of products, and the storage formats.

Arrays stay in their own dtype throughout: a float32 product is multiplied and added in float32. Here K is the summed axis, M and N are
the axes of the result; leading axes broadcast as in `np.matmul`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BLOCK = 16  # terms that a tensor core adds before it touches the accumulator


def matmul(a, b, order):
    """Multiply matrices, summing in the named order of `ORDERS` (or by the function that is given instead of a name)."""
    product = order if callable(order) else ORDERS[order]
    result = product(a, b)
    if result.dtype != a.dtype:
        raise TypeError(f"matmul: {order} turned {a.dtype} into {result.dtype}")
    return result


def terms(a, b):
    """Yield the K outer products whose sum is the matrix product."""
    for k in range(a.shape[-1]):
        yield a[..., :, k, None] * b[..., None, k, :]


def zeros(a, b):
    """Return the product of no terms."""
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return np.zeros((*lead, a.shape[-2], b.shape[-1]), a.dtype)


def sequential(a, b):
    """Add the terms from the first to the last."""
    total = zeros(a, b)
    for term in terms(a, b):
        total = total + term
    return total


def backwards(a, b):
    """Add the terms from the last to the first."""
    return sequential(a[..., ::-1], b[..., ::-1, :])


def pairwise(a, b):
    """Add the two halves, each of them pairwise."""
    K = a.shape[-1]
    if K < 2:
        return sequential(a, b)
    half = K // 2
    return pairwise(a[..., :half], b[..., :half, :]) + pairwise(a[..., half:], b[..., half:, :])


def split4(a, b):
    """Add four partial sums over K, as a split-K kernel does."""
    cuts = [a.shape[-1] * i // 4 for i in range(5)]
    parts = [sequential(a[..., lo:hi], b[..., lo:hi, :]) for lo, hi in zip(cuts, cuts[1:], strict=False)]
    return (parts[0] + parts[1]) + (parts[2] + parts[3])


def blocked16(a, b):
    """Add blocks of 16 terms to the accumulator, rounding each addition to nearest."""
    return blocked(a, b, lambda total, block: total + block)


def blocked16_truncating(a, b):
    """Add blocks of 16 terms to a float32 accumulator, rounding each addition toward zero; nearest in float64."""
    return blocked(a, b, add_truncating if a.dtype == np.float32 else np.add)


def blocked(a, b, add):
    """Sum blocks of 16 terms by themselves and `add` each block to the accumulator."""
    total = zeros(a, b)
    for k in range(0, a.shape[-1], BLOCK):
        total = add(total, np.matmul(a[..., k : k + BLOCK], b[..., k : k + BLOCK, :]))
    return total


def add_truncating(a, b):
    """Add float32 arrays toward zero: the float64 sum, cut."""
    wide = a.astype(np.float64) + b
    near = wide.astype(np.float32)
    return np.where(np.abs(near) > np.abs(wide), np.nextafter(near, np.float32(0)), near)


ORDERS = {
    "blas": np.matmul,
    "sequential": sequential,
    "reversed": backwards,
    "pairwise": pairwise,
    "split4": split4,
    "blocked16": blocked16,
    "blocked16_truncating": blocked16_truncating,
}


def round_bf16(v):
    """Round float32 to bfloat16, nearest even, held in float32; infinities and NaN pass."""
    bits = np.asarray(v, np.float32).view(np.uint32)
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    near = ((bits + up) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(v), near, v)


def as_is(v):
    """Store in the working format: no rounding point."""
    return v


class Numerics(NamedTuple):
    """The working format of the layer, and how the two tensors that leave the chip are stored."""

    profile: str  # the profile's name in the contract
    dtype: type  # of every array and every sum
    store_hidden: Callable = as_is
    store_out: Callable = as_is


NUMERICS = {
    "float64": Numerics("float64", np.float64),
    "float32": Numerics("float32", np.float32),
    "bfloat16": Numerics("bfloat16", np.float32, round_bf16, round_bf16),
}
