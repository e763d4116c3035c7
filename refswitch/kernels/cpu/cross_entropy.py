# May import: standard library, numpy, numba, refswitch.errors, refswitch.kernels.cpu (arrays, functions, jit, workspace).
"""Cross-entropy of the next token, in nats, with T5's z-loss and label smoothing.

Paper: 2.2 and its code. Forward reads the logits once and writes three numbers per token: neither probabilities nor one-hot targets exist. Backward
computes the exponentials again, straight into the gradient. Next: `embedding`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from refswitch.errors import InputError
from refswitch.kernels.cpu.arrays import checked, chunks, same_shape
from refswitch.kernels.cpu.functions import exp_of_negative, maximum, total
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.workspace import Workspace

PIECE = 512  # logits whose exponentials are summed in float32; the pieces' sums are added in float64
ROWS = 32  # tokens of a task


class CrossEntropySaved(NamedTuple):
    """What the loss's backward needs."""

    logits_BLV: np.ndarray
    targets_T: np.ndarray
    scale_T: np.ndarray  # weight / denominator, float64
    max_T: np.ndarray
    total_T: np.ndarray  # of exp(logits - max), float64
    smoothing: float
    z_coef: float


@kernel
def loss_row(logits_V: np.ndarray, target: int, smoothing: float, z_coef: float, scratch: np.ndarray) -> tuple[float, np.float32, float]:
    """Return one token's loss, the largest logit and the sum of exponentials."""
    V = logits_V.size
    highest = maximum(logits_V)
    over, logits_sum = 0.0, 0.0
    for first in range(0, V, PIECE):
        piece = logits_V[first : min(first + PIECE, V)]
        for i in range(piece.size):
            scratch[i] = exp_of_negative(piece[i] - highest)
        over += np.float64(total(scratch[: piece.size]))
        if smoothing > 0.0:
            logits_sum += np.float64(total(piece))
    lse = np.float64(highest) + np.log(over)
    chosen = np.float64(logits_V[target])
    value = lse - (1.0 - smoothing) * chosen + z_coef * lse * lse
    if smoothing > 0.0:
        value -= smoothing / (V - 1) * (logits_sum - chosen)
    return value, highest, over


@kernel
def dloss_row(
    dlogits_V: np.ndarray, logits_V: np.ndarray, target: int, highest: np.float32, over: float, scale: float, smoothing: float, z: float
) -> None:
    """Write scale * ((1 + 2 z lse) p - q)."""
    V = logits_V.size
    lse = np.float64(highest) + np.log(over)
    factor = np.float32(scale * (1.0 + 2.0 * z * lse) / over)
    off = np.float32(scale * smoothing / (V - 1))
    for v in range(V):
        dlogits_V[v] = exp_of_negative(logits_V[v] - highest) * factor - off
    dlogits_V[target] = exp_of_negative(logits_V[target] - highest) * factor - np.float32(scale * (1.0 - smoothing))


@parallel_kernel
def cross_entropy_kernel(
    loss_T: np.ndarray,
    max_T: np.ndarray,
    total_T: np.ndarray,
    logits_TV: np.ndarray,
    targets_T: np.ndarray,
    smoothing: float,
    z_coef: float,
    rows: int,
) -> None:
    """Compute every token's loss. Task i owns `rows` tokens' numbers; 4 T V bytes moved; a token depends on no other."""
    T = targets_T.size
    for i in prange(chunks(T, rows)):
        scratch = np.empty(PIECE, np.float32)
        for t in range(i * rows, min((i + 1) * rows, T)):
            loss_T[t], max_T[t], total_T[t] = loss_row(logits_TV[t], targets_T[t], smoothing, z_coef, scratch)


@parallel_kernel
def dcross_entropy_kernel(
    dlogits_TV: np.ndarray,
    logits_TV: np.ndarray,
    targets_T: np.ndarray,
    max_T: np.ndarray,
    total_T: np.ndarray,
    scale_T: np.ndarray,
    smoothing: float,
    z_coef: float,
    rows: int,
) -> None:
    """Compute the gradient of every token's loss. Task i owns `rows` rows of it; 8 T V bytes moved; a token depends on no other."""
    T = targets_T.size
    for i in prange(chunks(T, rows)):
        for t in range(i * rows, min((i + 1) * rows, T)):
            dloss_row(dlogits_TV[t], logits_TV[t], targets_T[t], max_T[t], total_T[t], scale_T[t], smoothing, z_coef)


def cross_entropy_forward(
    logits_BLV: np.ndarray,
    targets_BL: np.ndarray,
    weight_BL: np.ndarray,
    denominator: float,
    smoothing: float,
    z_coef: float,
    workspace: Workspace,
) -> tuple[float, CrossEntropySaved]:
    """Return sum(weight * (lse - sum_v q_v logit_v + z_coef * lse**2)) / denominator.

    Raises
    ------
    InputError
        If a target is no token of the vocabulary.
    """
    (logits_BLV,) = checked("cross_entropy_forward", logits_BLV=logits_BLV)
    B, L, V = logits_BLV.shape
    same_shape("cross_entropy_forward", (B, L), targets_BL=targets_BL, weight_BL=weight_BL)
    if V < 2:
        raise InputError("cross_entropy_forward: logits_BLV has a vocabulary of one token, which has no other to tell it from")
    if targets_BL.min() < 0 or targets_BL.max() >= V:
        raise InputError(f"cross_entropy_forward: targets_BL has {targets_BL.min()} to {targets_BL.max()}, but should be in [0, V={V})")
    targets_T, scale_T = targets_BL.reshape(-1).astype(np.int64), weight_BL.reshape(-1).astype(np.float64) / denominator
    loss_T, max_T, total_T = np.empty(B * L), workspace.take((B * L,)), workspace.take((B * L,), np.float64)
    cross_entropy_kernel(loss_T, max_T, total_T, logits_BLV.reshape(-1, V), targets_T, float(smoothing), float(z_coef), ROWS)
    saved = CrossEntropySaved(logits_BLV, targets_T, scale_T, max_T, total_T, float(smoothing), float(z_coef))
    return float(np.sum(loss_T * scale_T)), saved


def cross_entropy_backward(dvalue: float, saved: CrossEntropySaved, workspace: Workspace) -> np.ndarray:
    """Return dlogits_BLV. Gradient: weight / denominator * ((1 + 2 z_coef lse) p - q)."""
    dlogits_BLV, V = workspace.take(saved.logits_BLV.shape), saved.logits_BLV.shape[-1]
    dcross_entropy_kernel(
        dlogits_BLV.reshape(-1, V), saved.logits_BLV.reshape(-1, V), saved.targets_T, saved.max_T, saved.total_T, float(dvalue) * saved.scale_T,
        saved.smoothing, saved.z_coef, ROWS,
    )  # fmt: skip
    return dlogits_BLV
