# May import: standard library, numpy, numba, refswitch.numbers, refswitch.kernels.cpu (arrays, bfloat16, functions, jit, workspace).
"""The glue between operations, each in one pass: sums, factors, residuals, squared norms.

Where the reference writes `x + out * factor` in a line of its own, this is that line. Rounding: whatever format is asked for.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from refswitch.kernels.cpu.arrays import CHUNK, checked, chunks, same_shape
from refswitch.kernels.cpu.bfloat16 import is_narrow, round_bf16, round_row
from refswitch.kernels.cpu.functions import squares
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.workspace import Workspace
from refswitch.numbers.precision import Format

ADD, SCALE, RESIDUAL = 0, 1, 2


@kernel
def glue_chunk(out: np.ndarray, x: np.ndarray, y: np.ndarray, factor: np.ndarray, form: int, narrow: bool) -> None:
    """Write a chunk of x + y, x * factor or x + y * factor."""
    if form == ADD:
        for i in range(x.size):
            out[i] = x[i] + y[i]
    elif form == SCALE:
        for i in range(x.size):
            out[i] = x[i] * factor[i]
    else:
        for i in range(x.size):
            out[i] = x[i] + y[i] * factor[i]
    if narrow:
        round_row(out, out)


@parallel_kernel
def glue_kernel(out: np.ndarray, x: np.ndarray, y: np.ndarray, factor: np.ndarray, chunk: int, form: int, narrow: bool) -> None:
    """Add, scale or do both, laid out flat. Task i owns out[i chunk : (i + 1) chunk]; 12 or 16 bytes moved per value; no value depends on another."""
    for i in prange(chunks(x.size, chunk)):
        part = slice(i * chunk, min((i + 1) * chunk, x.size))
        glue_chunk(out[part], x[part], y[part], factor[part], form, narrow)


def _glue(x: np.ndarray, y: np.ndarray, factor: np.ndarray, form: int, narrow: bool, workspace: Workspace) -> np.ndarray:
    out = workspace.take(x.shape)
    glue_kernel(out.reshape(-1), x.reshape(-1), y.reshape(-1), factor.reshape(-1), CHUNK, form, narrow)
    return out


def rounded(x: np.ndarray, format: Format, workspace: Workspace) -> np.ndarray:
    """Return x on the grid of a format; x itself where that is no narrower than float32."""
    return round_bf16(x, workspace) if is_narrow(format) else x


def added(x: np.ndarray, y: np.ndarray, format: Format, workspace: Workspace) -> np.ndarray:
    """Return round(x + y); x, rounded, where y is 0 everywhere and thus has one element."""
    x, y = checked("added", x=x, y=y)
    if y.size == 1 and x.size > 1 and y.item() == 0.0:
        return rounded(x, format, workspace)
    same_shape("added", x.shape, y=y)
    return _glue(x, y, x, ADD, is_narrow(format), workspace)


def scaled(x: np.ndarray, factor: np.ndarray, format: Format, workspace: Workspace) -> np.ndarray:
    """Return round(x * factor); x, rounded, where the factor is 1 everywhere and thus has one element."""
    x, factor = checked("scaled", x=x, factor=factor)
    if factor.size == 1 and factor.item() == 1.0:
        return rounded(x, format, workspace)
    same_shape("scaled", x.shape, factor=factor)
    return _glue(x, x, factor, SCALE, is_narrow(format), workspace)


def residual(x: np.ndarray, out: np.ndarray, factor: np.ndarray, format: Format, workspace: Workspace) -> np.ndarray:
    """Return round(x + out * factor)."""
    x, out, factor = checked("residual", x=x, out=out, factor=factor)
    if factor.size == 1 and factor.item() == 1.0:
        return added(x, out, format, workspace)
    same_shape("residual", x.shape, out=out, factor=factor)
    return _glue(x, out, factor, RESIDUAL, is_narrow(format), workspace)


@parallel_kernel
def squared_norm_kernel(part: np.ndarray, x: np.ndarray, chunk: int) -> None:
    """Sum the squares of each chunk. Task i owns part[i]; 4 bytes moved per value; the caller adds the parts in order."""
    for i in prange(part.size):
        part[i] = squares(x[i * chunk : min((i + 1) * chunk, x.size)])


def squared_norm(grad: np.ndarray) -> float:
    """Return the sum of squares."""
    (grad,) = checked("squared_norm", grad=grad)
    part = np.empty(chunks(grad.size, CHUNK))
    squared_norm_kernel(part, grad.reshape(-1), CHUNK)
    return float(part.sum())


@kernel
def times_chunk(out: np.ndarray, x: np.ndarray, factor: np.float32, narrow: bool) -> None:
    """Write a chunk of x * factor; out may be x."""
    for i in range(x.size):
        out[i] = x[i] * factor
    if narrow:
        round_row(out, out)


@parallel_kernel
def times_kernel(out: np.ndarray, x: np.ndarray, factor: np.float32, chunk: int, narrow: bool) -> None:
    """Scale values. Task i owns out[i chunk : (i + 1) chunk]; 8 bytes moved per value; no value depends on another."""
    for i in prange(chunks(x.size, chunk)):
        part = slice(i * chunk, min((i + 1) * chunk, x.size))
        times_chunk(out[part], x[part], factor, narrow)


def times(x: np.ndarray, factor: float, format: Format, workspace: Workspace) -> np.ndarray:
    """Return round(x * factor) for one factor."""
    (x,) = checked("times", x=x)
    out = workspace.take(x.shape)
    times_kernel(out.reshape(-1), x.reshape(-1), np.float32(factor), CHUNK, is_narrow(format))
    return out


def scaled_by(grad: np.ndarray, factor: float) -> np.ndarray:
    """Return grad * factor, written over grad."""
    (grad,) = checked("scaled_by", grad=grad)
    times_kernel(grad.reshape(-1), grad.reshape(-1), np.float32(factor), CHUNK, False)
    return grad
