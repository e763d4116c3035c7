# May import: numpy, numba, refswitch.numbers, refswitch.kernels.cpu (arrays, jit, workspace).
"""Random numbers by address in kernels: dropout and jitter. The cipher is `refswitch.numbers.philox.philox_words`, compiled as it stands.

Spec: randomness. Paper: 2.4 (dropout, expert dropout), appendix C (input jitter). Exactness: class E, equal bits to the functions of the same names
there; they check the address and say what it means.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from refswitch.kernels.cpu.arrays import CHUNK, chunks
from refswitch.kernels.cpu.jit import kernel, parallel_kernel, scalar_kernel
from refswitch.kernels.cpu.workspace import Workspace
from refswitch.numbers import philox

LANES = np.uint64(philox.LANES)
LOW, HIGH = philox.LOW, philox.HIGH
FRACTION_SHIFT = np.uint32(32 - philox.UNIFORM_BITS)
UNIFORM_STEP = np.float64(philox.UNIFORM_STEP)
philox_words: Any = scalar_kernel(philox.philox_words)


@kernel
def words_of_blocks(
    out: np.ndarray, lanes: np.ndarray, start: np.uint64, step: np.uint64, site: np.uint64, key_0: np.uint64, key_1: np.uint64
) -> None:
    """Write the words of consecutive blocks, a row each. `lanes` holds each word's own array: four values side by side are not vectorized."""
    blocks = out.shape[0]
    for j in range(blocks):
        block = start + np.uint64(j)
        w0, w1, w2, w3 = philox_words(block & LOW, block >> HIGH, site, step, key_0, key_1)
        lanes[0, j] = np.uint32(w0)
        lanes[1, j] = np.uint32(w1)
        lanes[2, j] = np.uint32(w2)
        lanes[3, j] = np.uint32(w3)
    for j in range(blocks):
        for k in range(philox.LANES):
            out[j, k] = lanes[k, j]


@kernel
def words_of_run(out: np.ndarray, lanes: np.ndarray, seed: np.uint64, step: np.uint64, site: np.uint64, first: np.uint64) -> None:
    """Write the words of consecutive positions, from `first` on: whole blocks, and parts of two at the ends; `lanes` is scratch."""
    key_0, key_1 = seed & LOW, seed >> HIGH
    lane: Any = np.int64(first % LANES)
    lead = min((philox.LANES - lane) % philox.LANES, out.size)
    if lead > 0:
        block = first // LANES
        words = philox_words(block & LOW, block >> HIGH, site, step, key_0, key_1)
        for i in range(lead):
            out[i] = np.uint32(words[lane + i])
    whole = (out.size - lead) // philox.LANES
    start = (first + np.uint64(lead)) // LANES
    words_of_blocks(out[lead : lead + philox.LANES * whole].reshape((whole, philox.LANES)), lanes, start, step, site, key_0, key_1)
    done = lead + philox.LANES * whole
    if done < out.size:
        block = start + np.uint64(whole)
        words = philox_words(block & LOW, block >> HIGH, site, step, key_0, key_1)
        for i in range(out.size - done):
            out[done + i] = np.uint32(words[i])


@kernel
def keep_factor_chunk(
    out: np.ndarray, words: np.ndarray, seed: np.uint64, step: np.uint64, site: np.uint64, first: np.uint64, threshold: np.uint32, factor: np.float32
) -> None:
    """Write the factors of consecutive positions; `words` is scratch."""
    words_of_run(words, np.empty((philox.LANES, words.size // philox.LANES), np.uint32), seed, step, site, first)
    for i in range(out.size):
        out[i] = factor if words[i] >> FRACTION_SHIFT < threshold else np.float32(0.0)


@kernel
def jitter_chunk(out: np.ndarray, words: np.ndarray, seed: np.uint64, step: np.uint64, site: np.uint64, first: np.uint64, eps: float) -> None:
    """Write the factors of consecutive positions; `words` is scratch."""
    words_of_run(words, np.empty((philox.LANES, words.size // philox.LANES), np.uint32), seed, step, site, first)
    for i in range(out.size):
        out[i] = np.float32(1.0 + eps * (2.0 * (np.float64(words[i] >> FRACTION_SHIFT) * UNIFORM_STEP) - 1.0))


@parallel_kernel
def factor_kernel(
    out: np.ndarray,
    seed: np.uint64,
    step: np.uint64,
    site: np.uint64,
    offset: np.uint64,
    chunk: int,
    threshold: np.uint32,
    factor: np.float32,
    eps: float,
) -> None:
    """Draw dropout's factors, or jitter's where the threshold is 0, laid out flat.

    Task i owns out[i chunk : (i + 1) chunk]; 4 bytes moved per factor; a draw depends on its position alone.
    """
    for i in prange(chunks(out.size, chunk)):
        part = out[i * chunk : min((i + 1) * chunk, out.size)]
        words = np.empty(part.size, np.uint32)
        first = offset + np.uint64(i) * np.uint64(chunk)
        if threshold > 0:
            keep_factor_chunk(part, words, seed, step, site, first, threshold, factor)
        else:
            jitter_chunk(part, words, seed, step, site, first, eps)


def _draw(
    caller: str, seed: int, step: int, site: int, shape: tuple[int, ...], offset: int, threshold: int, factor: float, eps: float, workspace: Workspace
) -> np.ndarray:
    for name, value, bits in (("seed", seed, 64), ("step", step, 32), ("site", site, 32), ("offset", offset + max(math.prod(shape) - 1, 0), 64)):
        philox.checked(caller, name, value, bits)
    philox.checked(caller, "offset", offset, 64)
    out = workspace.take(shape)
    address = (np.uint64(seed), np.uint64(step), np.uint64(site), np.uint64(offset))
    factor_kernel(out.reshape(-1), *address, CHUNK, np.uint32(threshold), np.float32(factor), np.float64(np.float32(eps)))
    return out


def keep_factor(seed: int, step: int, site: int, shape: tuple[int, ...], keep_prob: float, offset: int, workspace: Workspace) -> np.ndarray:
    """Draw dropout as a factor: 1 / keep_prob with probability keep_prob, else 0."""
    if not philox.UNIFORM_STEP <= keep_prob <= 1.0:
        raise ValueError(f"keep_factor: keep_prob is {keep_prob}, but should be in [2**-24, 1]")
    threshold = math.ceil(keep_prob * 2**philox.UNIFORM_BITS)
    return _draw("keep_factor", seed, step, site, shape, offset, threshold, 1.0 / keep_prob, 0.0, workspace)


def jitter(seed: int, step: int, site: int, shape: tuple[int, ...], eps: float, offset: int, workspace: Workspace) -> np.ndarray:
    """Draw the factor on a router's input, uniform from 1 - eps to 1 + eps."""
    if not 0.0 <= eps <= 1.0:
        raise ValueError(f"jitter: eps is {eps}, but should be in [0, 1]")
    return _draw("jitter", seed, step, site, shape, offset, 0, 0.0, eps, workspace)
