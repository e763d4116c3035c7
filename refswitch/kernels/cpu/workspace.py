# May import: standard library, numpy.
"""Workspace: buffers that steps share, so that a step in steady state asks the system for no memory.

A fresh array costs more than its kernel where the system hands out pages one fault at a time. What is taken stays its taker's until it is given back
or the workspace is reset, which the owner does when a step's results have been used. Contents are whatever the last user left: a kernel writes every
element of its outputs, so nothing is cleared.
"""

from __future__ import annotations

import math

import numpy as np

ALIGNMENT = 64  # bytes of a cache line, and of the widest vector register


def _aligned(nbytes: int) -> np.ndarray:
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


class Workspace:
    """Buffers by size in bytes; not shared between threads of Python."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._taken: dict[int, np.ndarray] = {}  # by address
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
        self._taken[buffer.__array_interface__["data"][0]] = buffer
        self.taken_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.taken_bytes)
        return buffer.view(dtype).reshape(shape)

    def _new(self, size: int) -> np.ndarray:
        self.held_bytes += size
        return _aligned(size)

    def give(self, *arrays: np.ndarray) -> None:
        """Take arrays back, once, that nobody will read any more. What did not come from here is let alone."""
        for array in arrays:
            buffer = self._taken.pop(array.__array_interface__["data"][0], None)
            if buffer is not None:
                self.taken_bytes -= buffer.nbytes
                self._free[buffer.nbytes].append(buffer)

    def reset(self) -> None:
        """Take everything back: a new step begins."""
        for buffer in self._taken.values():
            self._free[buffer.nbytes].append(buffer)
        self._taken.clear()
        self.taken_bytes = 0
