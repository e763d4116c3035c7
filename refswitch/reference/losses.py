# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Balance loss and router z-loss, without their coefficients.

Paper: eqs. (4) to (6); ST-MoE for the z-loss. Spec: S-AUX-1, S-Z-1, S-BACK-5, S-BACK-6. Next: `switch`.

The fraction f is a count and has no gradient; P and the log-sum-exp do.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import Aux, Z
from refswitch.reference.capacity import Route


def counted_fraction(route: Route, choice_GS: np.ndarray, claims_GS: np.ndarray, valid_GS: np.ndarray, E: int, aux: Aux) -> np.ndarray:
    """Return count_GE, how many rows the dialect books to each expert.

    Spec: S-AUX-1. Paper: eq. (5), where f counts the choice before capacity drops anything.
    """
    dropped_GS = claims_GS & ~route.kept_GS
    counted_GS = np.ones_like(valid_GS)
    booked_GS = choice_GS
    for affected_GS, treatment in ((dropped_GS, aux.f.drops), (~valid_GS, aux.f.pads)):
        if treatment == "exclude":
            counted_GS = counted_GS & ~affected_GS
        if treatment == "to_expert0":
            booked_GS = np.where(affected_GS, 0, booked_GS)
    mask_GSE = (booked_GS[..., None] == np.arange(E)) & counted_GS[..., None]
    return mask_GSE.sum(axis=1)


def rows_of_mean(valid_GS: np.ndarray, kept_GS: np.ndarray, aux: Aux) -> tuple[np.ndarray, np.ndarray]:
    """Return the denominator_G of f and P, and group_scale_G, the factor on each group's term.

    Spec: S-AUX-1. A group whose denominator is 0 has no loss.
    """
    S = valid_GS.shape[1]
    per_group = {"S": np.full(valid_GS.shape[0], S), "valid": valid_GS.sum(axis=1), "kept": kept_GS.sum(axis=1)}
    fraction_G = valid_GS.sum(axis=1) / max(S, 1)
    return per_group[aux.denom], fraction_G if aux.pad_scale == "nonpad_fraction" else np.ones_like(fraction_G)


class BalanceSaved(NamedTuple):
    """What the balance loss's backward needs."""

    dvalue_dprobs_GSE: np.ndarray  # the loss is linear in the probabilities: this is its whole gradient


def balance_forward(
    probs_GSE: np.ndarray, count_GE: np.ndarray, denominator_G: np.ndarray, group_scale_G: np.ndarray, valid_GS: np.ndarray, aux: Aux
) -> tuple[np.ndarray, BalanceSaved]:
    """Return the mean over groups of scale * sum_e f_e P_e.

    Spec: S-AUX-1. Paper: eqs. (4), (6); alpha is not in it. f_e = count_e / denominator, P_e = sum_s p_se / denominator.
    """
    G, _, E = probs_GSE.shape
    scale = {"E": E, "local_E": E, "none": 1.0, "inverse_E": 1.0 / E}[aux.scale_E]
    in_mean_GS = valid_GS if aux.P_pads == "exclude" else np.ones_like(valid_GS)
    inverse_G = np.where(denominator_G > 0, 1.0 / np.maximum(denominator_G, 1), 0.0)
    f_GE = count_GE * inverse_G[:, None]
    P_GE = np.sum(probs_GSE * in_mean_GS[..., None], axis=1) * inverse_G[:, None]
    value = np.sum(group_scale_G * scale * np.sum(f_GE * P_GE, axis=1)) / max(G, 1)  # F1
    per_row_GE = (group_scale_G * inverse_G)[:, None] * scale * f_GE / max(G, 1)
    return value, BalanceSaved(per_row_GE[:, None, :] * in_mean_GS[..., None])


def balance_backward(dvalue: float, saved: BalanceSaved) -> np.ndarray:
    """Return dprobs_GSE. Spec: S-BACK-5. Gradient: dp_se = dvalue * scale * f_e / (denominator * G)."""
    return dvalue * saved.dvalue_dprobs_GSE  # B1


class ZSaved(NamedTuple):
    """What the z-loss's backward needs."""

    lse_GS: np.ndarray  # log of the softmax's denominator
    probs_GSE: np.ndarray  # its derivative
    weight_GS: np.ndarray  # 1 / denominator on the rows whose logits count


def z_loss_forward(logits_GSE: np.ndarray, valid_GS: np.ndarray, z: Z) -> tuple[np.ndarray, ZSaved]:
    """Return the sum of squared log-sum-exp over the sum of the dialect's denominators.

    Spec: S-Z-1. Paper: ST-MoE eq. (5); the maximum is subtracted first.
    """
    keep_GS = valid_GS if z.pads != "include" else np.ones_like(valid_GS)
    read_GSE = np.where((valid_GS | (z.pads != "zero_logits"))[..., None], logits_GSE, 0.0)
    max_GS1 = read_GSE.max(axis=-1, keepdims=True)
    exp_GSE = np.exp(read_GSE - max_GS1)
    total_GS1 = exp_GSE.sum(axis=-1, keepdims=True)
    lse_GS = (max_GS1 + np.log(total_GS1))[..., 0]
    denominator = valid_GS.sum() if z.denom == "valid" else valid_GS.size
    summed_GS = np.ones_like(valid_GS) if z.pads == "zero_logits" else keep_GS
    inverse = 1.0 / denominator if denominator else 0.0
    value = np.sum(np.square(lse_GS) * summed_GS) * inverse  # F1
    return value, ZSaved(lse_GS, exp_GSE / total_GS1, keep_GS * inverse)


def z_loss_backward(dvalue: float, saved: ZSaved) -> np.ndarray:
    """Return dlogits_GSE. Spec: S-BACK-6. Gradient: dlogits = dvalue * 2 * lse * p / denominator."""
    return dvalue * (2.0 * saved.lse_GS * saved.weight_GS)[..., None] * saved.probs_GSE  # B1
