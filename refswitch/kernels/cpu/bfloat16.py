# May import: standard library, numpy, numba, refswitch.numbers, refswitch.errors, refswitch.kernels.cpu (jit, philox, workspace).
"""Rounding to bfloat16, where every kernel takes it from. The arithmetic is `refswitch.numbers.bfloat16`'s scalar twins, compiled as they stand.

Spec: numbers. Exactness: class E, equal bits to the functions of the same names there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from refswitch.errors import InputError
from refswitch.kernels.cpu.arrays import CHUNK, checked, chunks
from refswitch.kernels.cpu.jit import kernel, parallel_kernel, scalar_kernel
from refswitch.kernels.cpu.philox import words_of_run
from refswitch.kernels.cpu.workspace import Workspace
from refswitch.numbers import bfloat16, philox
from refswitch.numbers.precision import Format

round_bits: Any = scalar_kernel(bfloat16.round_bf16_bits)
stochastic_round_bits: Any = scalar_kernel(bfloat16.stochastic_round_bf16_bits)


def is_narrow(format: Format) -> bool:
    """Tell whether a rounding point rounds: float32 is what kernels compute in, and what is wider asks for no rounding.

    Raises
    ------
    InputError
        For a format that the kernels do not have.
    """
    if format.name not in ("float64", "float32", "bfloat16"):
        raise InputError(f"the cpu backend stores float32 and bfloat16, not {format.name}")
    return format.name == "bfloat16"


@scalar_kernel
def round_value(x: np.float32) -> np.float32:
    """Return a value, rounded to nearest."""
    return np.uint32(round_bits(np.float32(x).view(np.uint32))).view(np.float32)


@kernel
def round_row(out: np.ndarray, x: np.ndarray) -> None:
    """Write a row of values, rounded to nearest; out may be x."""
    for i in range(x.size):
        out[i] = round_value(x[i])


@kernel
def round_rows(x: np.ndarray) -> None:
    """Round the rows of a matrix in place."""
    for t in range(x.shape[0]):
        round_row(x[t], x[t])


@parallel_kernel
def round_bf16_kernel(out: np.ndarray, x: np.ndarray, chunk: int) -> None:
    """Round values, laid out flat. Task i owns out[i chunk : (i + 1) chunk]; 8 bytes moved per value; no value depends on another."""
    for i in prange(chunks(x.size, chunk)):
        part = slice(i * chunk, min((i + 1) * chunk, x.size))
        round_row(out[part], x[part])


@kernel
def stochastic_round_chunk(
    out: np.ndarray, x: np.ndarray, words: np.ndarray, seed: np.uint64, step: np.uint64, site: np.uint64, first: np.uint64
) -> None:
    """Round a chunk of values, the first of which has the global position `first`; `words` is scratch."""
    words_of_run(words, np.empty((philox.LANES, words.size // philox.LANES), np.uint32), seed, step, site, first)
    for i in range(x.size):
        out[i] = np.uint32(stochastic_round_bits(np.float32(x[i]).view(np.uint32), words[i])).view(np.float32)


@parallel_kernel
def stochastic_round_bf16_kernel(
    out: np.ndarray, x: np.ndarray, seed: np.uint64, step: np.uint64, site: np.uint64, offset: np.uint64, chunk: int
) -> None:
    """Round values, laid out flat, each by its own draw. Task i owns a chunk of out; 8 bytes moved per value; a draw depends on its place."""
    for i in prange(chunks(x.size, chunk)):
        part = slice(i * chunk, min((i + 1) * chunk, x.size))
        words = np.empty(out[part].size, np.uint32)
        stochastic_round_chunk(out[part], x[part], words, seed, step, site, offset + np.uint64(i) * np.uint64(chunk))


def round_bf16(x: np.ndarray, workspace: Workspace) -> np.ndarray:
    """Return float32 values, rounded to the nearest bfloat16, ties to even."""
    (x,) = checked("round_bf16", x=x)
    out = workspace.take(x.shape)
    round_bf16_kernel(out.reshape(-1), x.reshape(-1), CHUNK)
    return out


def stochastic_round_bf16(x: np.ndarray, seed: int, step: int, site: int, offset: int, workspace: Workspace) -> np.ndarray:
    """Return float32 values, rounded up or down by the draws of an address: those that `philox.random_bits` has for positions from `offset` on."""
    (x,) = checked("stochastic_round_bf16", x=x)
    for name, value, bits in (
        ("seed", seed, 64),
        ("step", step, 32),
        ("site", site, 32),
        ("offset", offset, 64),
        ("offset", offset + x.size - 1, 64),
    ):
        philox.checked("stochastic_round_bf16", name, value, bits)
    out = workspace.take(x.shape)
    address = (np.uint64(seed), np.uint64(step), np.uint64(site), np.uint64(offset))
    stochastic_round_bf16_kernel(out.reshape(-1), x.reshape(-1), *address, CHUNK)
    return out
