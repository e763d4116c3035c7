# May import: standard library, numpy.
"""Distillation: a student learns from the labels and from a teacher's probabilities.

Paper: 4.2, tables 6 to 8: a quarter soft, three quarters hard; the temperature is not stated, so it is 1 unless said otherwise. The soft part has the
hard part's weights, denominator and z-loss, as in Mesh TensorFlow; its z-loss is on the logits divided by the temperature. The teacher is a constant.
Read `cross_entropy` first.

    loss = (1 - soft) * CE(targets, student) + T**2 * soft * CE(softmax(teacher / T), student / T)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.reference.cross_entropy import CrossEntropySaved, cross_entropy_backward, cross_entropy_forward


class SoftCrossEntropySaved(NamedTuple):
    """What the soft loss's backward needs."""

    dvalue_dlogits_BLV: np.ndarray  # as large as the logits, in place of the teacher's and the student's probabilities


class DistillationSaved(NamedTuple):
    """What distillation's backward needs."""

    hard: CrossEntropySaved
    soft: SoftCrossEntropySaved
    hard_factor: float  # 1 - soft
    soft_factor: float  # T**2 * soft: with 1 / T from each of logits and gradient gone, the two parts keep their ratio at any temperature


def soft_cross_entropy_forward(
    logits_BLV: np.ndarray, teacher_BLV: np.ndarray, weight_BL: np.ndarray, denominator: float, temperature: float, z_coef: float
) -> tuple[float, SoftCrossEntropySaved]:
    """Return sum(weight * (lse - sum_v q_v logit_v / T + z_coef * lse**2)) / denominator, with q = softmax(teacher / T), lse of logits / T.

    q's entropy, a constant, is not subtracted.
    """
    scaled_BLV, teacher_BLV = logits_BLV / temperature, teacher_BLV / temperature
    teacher_exp_BLV = np.exp(teacher_BLV - teacher_BLV.max(axis=-1, keepdims=True))
    q_BLV = teacher_exp_BLV / teacher_exp_BLV.sum(axis=-1, keepdims=True)
    max_BL1 = scaled_BLV.max(axis=-1, keepdims=True)
    exp_BLV = np.exp(scaled_BLV - max_BL1)
    total_BL1 = exp_BLV.sum(axis=-1, keepdims=True)
    lse_BL1 = max_BL1 + np.log(total_BL1)
    losses_BL1 = np.sum(q_BLV * (lse_BL1 - scaled_BLV), axis=-1, keepdims=True) + z_coef * lse_BL1**2
    scale_BL1 = weight_BL[..., None] / denominator
    dvalue_dlogits_BLV = scale_BL1 * ((1.0 + 2.0 * z_coef * lse_BL1) * exp_BLV / total_BL1 - q_BLV) / temperature
    return float(np.sum(losses_BL1 * scale_BL1)), SoftCrossEntropySaved(dvalue_dlogits_BLV)  # F1


def soft_cross_entropy_backward(dvalue: float, saved: SoftCrossEntropySaved) -> np.ndarray:
    """Return dlogits_BLV. Gradient: weight / denominator * ((1 + 2 z_coef lse) p - q) / T, with p = softmax(logits / T)."""
    return dvalue * saved.dvalue_dlogits_BLV  # B1


def distillation_forward(
    logits_BLV: np.ndarray,
    teacher_BLV: np.ndarray,
    targets_BL: np.ndarray,
    weight_BL: np.ndarray,
    denominator: float,
    smoothing: float,
    z_coef: float,
    soft: float,
    temperature: float,
) -> tuple[float, DistillationSaved]:
    """Return (1 - soft) * hard + T**2 * soft * soft loss; label smoothing is the hard part's alone.

    Paper: 4.2, soft = 0.25.

    Raises
    ------
    ValueError
        If `soft` is no fraction, the temperature not positive, or the teacher has another shape.
    """
    if not 0.0 <= soft <= 1.0 or not temperature > 0.0:
        raise ValueError(f"distillation: soft is {soft} and temperature {temperature}, but they should be in [0, 1] and positive")
    if teacher_BLV.shape != logits_BLV.shape:
        raise ValueError(f"distillation: teacher_BLV has shape {teacher_BLV.shape}, but should be {logits_BLV.shape}, the student's")
    hard_value, hard_saved = cross_entropy_forward(logits_BLV, targets_BL, weight_BL, denominator, smoothing, z_coef)  # F1
    soft_value, soft_saved = soft_cross_entropy_forward(logits_BLV, teacher_BLV, weight_BL, denominator, temperature, z_coef)  # F2
    hard_factor, soft_factor = 1.0 - soft, temperature**2 * soft
    return hard_factor * hard_value + soft_factor * soft_value, DistillationSaved(hard_saved, soft_saved, hard_factor, soft_factor)  # F3


def distillation_backward(dvalue: float, saved: DistillationSaved) -> np.ndarray:
    """Return dlogits_BLV, the student's. Gradient: the sum of both parts'; the teacher has none."""
    dhard, dsoft = dvalue * saved.hard_factor, dvalue * saved.soft_factor  # B3
    dlogits_soft_BLV = soft_cross_entropy_backward(dsoft, saved.soft)  # B2
    dlogits_hard_BLV = cross_entropy_backward(dhard, saved.hard)  # B1
    return dlogits_hard_BLV + dlogits_soft_BLV
