# May import: standard library, numpy, numba, refswitch.errors, refswitch.kernels.cpu (arrays, elementwise, jit, workspace).
"""AdamW; the tensor and its moments are updated in place. Loshchilov and Hutter (2019) for decoupled weight decay."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from refswitch.errors import InputError
from refswitch.kernels.cpu.arrays import CHUNK, chunks
from refswitch.kernels.cpu.elementwise import squared_norm
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.workspace import Workspace

Numbers = tuple[np.float32, ...]


@kernel
def adamw_chunk(w: np.ndarray, mean: np.ndarray, mean_square: np.ndarray, grad: np.ndarray, numbers: Numbers) -> None:
    """Update a chunk. The numbers: beta1, 1 - beta1, beta2, 1 - beta2, epsilon, what the decay leaves, the rate, the corrected root's factor."""
    beta1, rest1, beta2, rest2, epsilon, kept, rate, corrected = numbers
    for i in range(w.size):
        mean[i] = beta1 * mean[i] + rest1 * grad[i]
        mean_square[i] = beta2 * mean_square[i] + rest2 * (grad[i] * grad[i])
        w[i] = w[i] * kept - rate * mean[i] / (np.sqrt(mean_square[i]) * corrected + epsilon)


@parallel_kernel
def adamw_kernel(w: np.ndarray, mean: np.ndarray, mean_square: np.ndarray, grad: np.ndarray, numbers: Numbers, chunk: int) -> None:
    """Update a tensor, laid out flat. Task i owns a chunk of three arrays; 28 bytes moved per value; no value depends on another."""
    for i in prange(chunks(w.size, chunk)):
        part = slice(i * chunk, min((i + 1) * chunk, w.size))
        adamw_chunk(w[part], mean[part], mean_square[part], grad[part], numbers)


def adamw_update(
    w: np.ndarray,
    grad: np.ndarray,
    state: Any,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    workspace: Workspace,  # noqa: ARG001  operations are bound to one; this one needs no buffers
) -> tuple[np.ndarray, Any]:
    """Return w and the state after one update, both written over."""
    if not w.shape == grad.shape == state.mean.shape == state.mean_square.shape or w.size == 0:
        raise InputError(f"adamw_update: w has shape {w.shape}, but grad {grad.shape} and the state {state.mean.shape}, {state.mean_square.shape}")
    if w.dtype != np.float32 or grad.dtype != np.float32 or not w.flags.c_contiguous:
        raise InputError(f"adamw_update: w is {w.dtype} and grad {grad.dtype}, but both should be float32, and w in C order: it is written")
    if not (math.isfinite(squared_norm(w)) and math.isfinite(squared_norm(grad))):
        raise InputError("adamw_update: w and grad should be finite")
    step = state.step + 1
    mean, mean_square, grad = (np.ascontiguousarray(x, np.float32) for x in (state.mean, state.mean_square, grad))
    rate, kept = learning_rate / (1.0 - beta1**step), 1.0 - learning_rate * weight_decay
    corrected = 1.0 / math.sqrt(1.0 - beta2**step)
    numbers = tuple(np.float32(x) for x in (beta1, 1.0 - beta1, beta2, 1.0 - beta2, epsilon, kept, rate, corrected))
    adamw_kernel(w.reshape(-1), mean.reshape(-1), mean_square.reshape(-1), grad.reshape(-1), numbers, CHUNK)
    return w, state._replace(step=step, mean=mean, mean_square=mean_square)
