# May import: standard library, numpy, refswitch.config, refswitch.kernels.cpu.jit.
"""Balance loss and router z-loss, without their coefficients, from what the router's pass left; no pass over the logits of its own.

Paper: eqs. (4) to (6); ST-MoE for the z-loss. Spec: S-AUX-1, S-Z-1, S-BACK-5, S-BACK-6. Next: `switch`. Sums run in float64, token after token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import Aux, Z
from refswitch.kernels.cpu.capacity import Route
from refswitch.kernels.cpu.jit import kernel


@kernel
def sum_of_probs(sum_GE: np.ndarray, probs_GSE: np.ndarray, counts_GS: np.ndarray) -> None:
    """Sum the probabilities of the tokens that count. One thread: reads the probabilities once, from the cache while they are few."""
    G, S, E = probs_GSE.shape
    for g in range(G):
        for e in range(E):
            sum_GE[g, e] = 0.0
        for s in range(S):
            if counts_GS[g, s]:
                for e in range(E):
                    sum_GE[g, e] += probs_GSE[g, s, e]


def counted_fraction(route: Route, claims_GS: np.ndarray, valid_GS: np.ndarray, E: int, aux: Aux) -> np.ndarray:
    """Return count_GE, how many rows the dialect books to each expert."""
    G, S = valid_GS.shape
    booked_GS, counted_GS = route.expert_GS, np.ones((G, S), bool)
    for affected_GS, treatment in ((claims_GS & ~route.kept_GS, aux.f.drops), (~valid_GS, aux.f.pads)):
        if treatment == "exclude":
            counted_GS = counted_GS & ~affected_GS
        if treatment == "to_expert0":
            booked_GS = np.where(affected_GS, 0, booked_GS)
    place_GS = booked_GS + E * np.arange(G)[:, None]
    return np.bincount(place_GS[counted_GS], minlength=G * E).reshape(G, E)


def rows_of_mean(valid_GS: np.ndarray, kept_GS: np.ndarray, aux: Aux) -> tuple[np.ndarray, np.ndarray]:
    """Return the denominator_G of f and P, and group_scale_G, the factor on each group's term."""
    G, S = valid_GS.shape
    per_group = {"S": np.full(G, S), "valid": valid_GS.sum(axis=1), "kept": kept_GS.sum(axis=1)}
    fraction_G = valid_GS.sum(axis=1) / max(S, 1)
    return per_group[aux.denom], fraction_G if aux.pad_scale == "nonpad_fraction" else np.ones(G)


class BalanceSaved(NamedTuple):
    """What the balance loss's backward needs."""

    dprobs_GE: np.ndarray  # the loss is linear in the probabilities, with the same gradient for all tokens of a group that count
    counts_GS: np.ndarray  # which tokens count


def balance_forward(
    sum_GE: np.ndarray, count_GE: np.ndarray, denominator_G: np.ndarray, group_scale_G: np.ndarray, counts_GS: np.ndarray, aux: Aux
) -> tuple[float, BalanceSaved]:
    """Return the mean over groups of scale * sum_e f_e P_e, from the sums of probabilities."""
    G, E = sum_GE.shape
    scale = {"E": E, "local_E": E, "none": 1.0, "inverse_E": 1.0 / E}[aux.scale_E]
    inverse_G = np.where(denominator_G > 0, 1.0 / np.maximum(denominator_G, 1), 0.0)
    weight_GE = (group_scale_G * inverse_G)[:, None] * scale * (count_GE * inverse_G[:, None]) / max(G, 1)
    return float(np.sum(weight_GE * sum_GE)), BalanceSaved(weight_GE.astype(np.float32), counts_GS)


def z_loss_forward(lse_GS: np.ndarray, valid_GS: np.ndarray, z: Z) -> tuple[float, np.ndarray]:
    """Return the loss and weight_GS, 1 / denominator on the rows whose logits count."""
    keep_GS = valid_GS if z.pads != "include" else np.ones_like(valid_GS)
    denominator = valid_GS.sum() if z.denom == "valid" else valid_GS.size
    inverse = 1.0 / denominator if denominator else 0.0
    value = np.sum(np.square(lse_GS, dtype=np.float64), where=keep_GS) * inverse
    return float(value), (keep_GS * inverse).astype(np.float32)
