# May import: standard library, numpy.
"""AdamW, and clipping by the global norm.

Paper: neither is in it; they are for comparisons with other trainers. Loshchilov and Hutter (2019) for decoupled weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class AdamWState(NamedTuple):
    """What AdamW remembers of one tensor."""

    step: int  # updates made
    mean: np.ndarray  # running mean of grad, biased towards 0
    mean_square: np.ndarray  # running mean of grad**2, biased towards 0


def adamw_init(shape: tuple[int, ...]) -> AdamWState:
    """Return the state of a tensor of this shape before its first update."""
    return AdamWState(0, np.zeros(shape), np.zeros(shape))


def bias_correction(beta: float, step: int) -> float:
    """Return 1 - beta**step, the weight that `step` updates have in a running mean that began at 0."""
    return 1.0 - beta**step


def adamw_update(
    w: np.ndarray,
    grad: np.ndarray,
    state: AdamWState,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[np.ndarray, AdamWState]:
    """Return the tensor and the state after one update, as torch.optim.AdamW defines it.

    The decay is learning_rate * weight_decay * w and passes through neither moment; epsilon is added to the root of the corrected mean square.
    """
    if not w.shape == grad.shape == state.mean.shape == state.mean_square.shape:
        raise ValueError(f"adamw_update: w has shape {w.shape}, but grad {grad.shape} and the state {state.mean.shape}, {state.mean_square.shape}")
    if w.dtype != np.float64 or grad.dtype != np.float64:
        raise ValueError(f"adamw_update: w is {w.dtype} and grad {grad.dtype}, but both should be float64")
    if not (np.isfinite(w).all() and np.isfinite(grad).all()):
        raise ValueError("adamw_update: w and grad should be finite")
    step = state.step + 1
    mean = beta1 * state.mean + (1.0 - beta1) * grad
    mean_square = beta2 * state.mean_square + (1.0 - beta2) * np.square(grad)
    root = np.sqrt(mean_square) / math.sqrt(bias_correction(beta2, step))
    kept = w * (1.0 - learning_rate * weight_decay)
    new_w = kept - learning_rate / bias_correction(beta1, step) * mean / (root + epsilon)
    return new_w, AdamWState(step, mean, mean_square)


def clip_by_global_norm(grads: Sequence[np.ndarray], limit: float) -> tuple[list[np.ndarray], float]:
    """Return the gradients, scaled together to the norm `limit` where their norm is greater, and the norm before.

    torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6 instead; here the clipped norm is the limit itself.
    """
    if not limit > 0:
        raise ValueError(f"clip_by_global_norm: limit is {limit}, but should be greater than 0")
    norm = math.sqrt(sum(float(np.sum(np.square(grad))) for grad in grads))
    if not math.isfinite(norm):
        raise ValueError(f"clip_by_global_norm: the norm of the gradients is {norm}, but should be finite")
    factor = limit / norm if norm > limit else 1.0
    return [grad * factor for grad in grads], norm
