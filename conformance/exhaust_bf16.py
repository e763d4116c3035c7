# May import: standard library, numpy, ml_dtypes, refswitch.
"""Round all 2**32 float32 values to bfloat16 and compare each with ml_dtypes.

    python conformance/exhaust_bf16.py

One line at the end: how many inputs, how many differ, and the seconds. Exit status: 0 if none differs, 1 otherwise. One core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from refswitch.numbers.bfloat16 import round_bf16

INPUTS = 1 << 32
CHUNK = 1 << 18  # values at a time, so that the temporary arrays stay in the cache
TOLD_EVERY = 1 << 26
SIGN = 0x80000000
QUIET = 0x00400000

Rounding = Callable[[np.ndarray], np.ndarray]


def differences(rounding: Rounding, bits: np.ndarray) -> int:
    """Count the float32 bit patterns that a rounding takes elsewhere than ml_dtypes.

    Bits are compared with bits, zeros in the lower half included. NaN is compared by class: it must be NaN, quiet and of its sign, whatever
    its payload.
    """
    x = bits.view(np.float32)
    got = rounding(x).view(np.uint32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        peer = x.astype(ml_dtypes.bfloat16)
    want = peer.view(np.uint16).astype(np.uint32) << 16
    same_nan = np.isnan(got.view(np.float32)) & (got & 0xFFFF == 0) & (got & QUIET != 0) & ((got ^ bits) & SIGN == 0)
    return int(np.count_nonzero(np.where(np.isnan(peer), ~same_nan, got != want)))


def exhaust(rounding: Rounding) -> int:
    """Count the differences over all inputs; progress goes to stderr where that is a terminal."""
    differ = 0
    chunk = np.arange(CHUNK, dtype=np.uint32)
    for first in range(0, INPUTS, CHUNK):
        differ += differences(rounding, chunk + np.uint32(first))
        if sys.stderr.isatty() and first % TOLD_EVERY == 0:
            print(f"\r{first / INPUTS:4.0%}, {differ} differ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return differ


def main() -> int:
    """Print the summary and return the exit status."""
    start = time.monotonic()
    differ = exhaust(round_bf16)
    print(f"{INPUTS} inputs, {differ} differ, {time.monotonic() - start:.0f} s")
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
