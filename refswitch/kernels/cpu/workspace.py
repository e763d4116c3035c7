# May import: standard library, numpy.
"""Workspace: buffers that steps share, so that a step in steady state asks the system for no memory.

A fresh array costs more than its kernel where the system hands out pages one fault at a time. What is taken stays its taker's until it is given back
or the workspace is reset, which the owner does when a step's results have been used. Contents are whatever the last user left: a kernel writes every
element of its outputs, so nothing is cleared. A free buffer serves requests of its own size alone; so sizes should not depend on data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

ALIGNMENT = 64  # bytes of a cache line, and of the widest vector register


def _aligned(nbytes: int) -> np.ndarray:
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


class Workspace:
    """Buffers by size in bytes; not shared between threads of Python."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._taken: dict[int, tuple[int, np.ndarray]] = {}  # by address: when it was taken, in takes since the beginning; the buffer
        self._takes = 0
        self.held_bytes = 0  # of every buffer, free or taken
        self.taken_bytes = 0
        self.peak_bytes = 0  # largest taken_bytes since the beginning

    def take(self, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """Return a C-contiguous array that nobody else holds, with arbitrary contents."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size == 0:
            return np.empty(shape, dtype)
        free = self._free.setdefault(size, [])
        buffer = free.pop() if free else self._new(size)
        self._taken[_address(buffer)] = (self._takes, buffer)
        self._takes += 1
        self.taken_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.taken_bytes)
        return buffer.view(dtype).reshape(shape)

    def _new(self, size: int) -> np.ndarray:
        self.held_bytes += size
        return _aligned(size)

    def give(self, *arrays: np.ndarray) -> None:
        """Take arrays back, once, that nobody will read any more. What did not come from here is let alone."""
        for array in arrays:
            self._give(_address(array))

    def _give(self, address: int) -> None:
        if address in self._taken:
            _, buffer = self._taken.pop(address)
            self.taken_bytes -= buffer.nbytes
            self._free[buffer.nbytes].append(buffer)

    def mark(self) -> int:
        """Return a number for this moment: what is taken from now on is not older."""
        return self._takes

    def give_between(self, since: int, until: int, keep: Iterable[np.ndarray]) -> None:
        """Take back what was taken between two moments, but for arrays that are kept. An array is known by its first element."""
        kept = {_address(array) for array in keep}
        for address in [address for address, (when, _) in self._taken.items() if since <= when < until and address not in kept]:
            self._give(address)

    def reset(self) -> None:
        """Take everything back: a new step begins."""
        self.give_between(0, self._takes, ())
