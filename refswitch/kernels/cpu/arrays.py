# May import: standard library, numpy, refswitch.kernels.cpu.jit, refswitch.errors.
"""What host functions do before a kernel: check arrays, lay them out, cut work into tasks whose number does not depend on the number of threads."""

from __future__ import annotations

import numpy as np

from refswitch.errors import InputError
from refswitch.kernels.cpu.jit import kernel

CHUNK = 1 << 15  # values of one elementwise task: 128 KiB, several operands of which fit a core's own cache
ROWS = 128  # rows of one task of a row-wise operation


@kernel
def chunks(size: int, chunk: int) -> int:
    """Return the number of chunks that hold `size` elements."""
    return (size + chunk - 1) // chunk


def checked(caller: str, **arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return float32 arrays, C-contiguous: what lies otherwise is copied.

    Raises
    ------
    InputError
        If one is not float32, or has no elements.
    """
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise InputError(f"{caller}: {name} has dtype {array.dtype}, but should be float32")
        if array.size == 0:
            raise InputError(f"{caller}: {name} has shape {array.shape}, but should have elements")
    return tuple(np.ascontiguousarray(array) for array in arrays.values())


def same_shape(caller: str, wanted: tuple[int, ...], **arrays: np.ndarray) -> None:
    """Refuse arrays of another shape.

    Raises
    ------
    InputError
        For the first that differs.
    """
    for name, array in arrays.items():
        if array.shape != wanted:
            raise InputError(f"{caller}: {name} has shape {array.shape}, but should be {wanted}")
