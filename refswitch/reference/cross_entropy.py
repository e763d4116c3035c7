# May import: standard library, numpy.
"""Cross-entropy of the next token, in nats, with T5's z-loss and label smoothing.

Paper: 2.2 and its code (Z_LOSS = 1e-4 in training). Next: `transformer`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class CrossEntropySaved(NamedTuple):
    """What the loss's backward needs."""

    dvalue_dlogits_BLV: np.ndarray  # logits are large, but one array of them is what any backward needs


def cross_entropy_forward(
    logits_BLV: np.ndarray, targets_BL: np.ndarray, weight_BL: np.ndarray, denominator: float, smoothing: float, z_coef: float
) -> tuple[float, CrossEntropySaved]:
    """Return sum(weight * (lse - sum_v q_v logit_v + z_coef * lse**2)) / denominator.

    q is 1 - smoothing at the target and smoothing / (V - 1) elsewhere; its entropy, a constant, is not subtracted. The denominator is the
    number of positions (Mesh TensorFlow, padding counted) or the sum of weights (T5X).
    """
    V = logits_BLV.shape[-1]
    max_BL1 = logits_BLV.max(axis=-1, keepdims=True)
    exp_BLV = np.exp(logits_BLV - max_BL1)
    total_BL1 = exp_BLV.sum(axis=-1, keepdims=True)
    lse_BL1 = max_BL1 + np.log(total_BL1)
    is_target_BLV = targets_BL[..., None] == np.arange(V)
    q_BLV = np.where(is_target_BLV, 1.0 - smoothing, smoothing / (V - 1))
    losses_BL1 = np.sum(q_BLV * (lse_BL1 - logits_BLV), axis=-1, keepdims=True) + z_coef * lse_BL1**2
    scale_BL1 = weight_BL[..., None] / denominator
    dvalue_dlogits_BLV = scale_BL1 * ((1.0 + 2.0 * z_coef * lse_BL1) * exp_BLV / total_BL1 - q_BLV)
    return float(np.sum(losses_BL1 * scale_BL1)), CrossEntropySaved(dvalue_dlogits_BLV)  # F1


def cross_entropy_backward(dvalue: float, saved: CrossEntropySaved) -> np.ndarray:
    """Return dlogits_BLV. Gradient: weight / denominator * ((1 + 2 z_coef lse) p - q)."""
    return dvalue * saved.dvalue_dlogits_BLV  # B1
