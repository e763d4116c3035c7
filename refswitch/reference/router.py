# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Router: noise, logits, softmax, choice, gate.

Paper: eqs. (1), (2), 2.2, 2.4, appendix C. Spec: S-NOISE-1, S-ROUTE-1 to S-ROUTE-3, S-GATE-1. Next: `capacity`.

The choice is discrete and has no gradient; the gate reads the chosen probability, and that is the router's only gradient from
the output. Every array is float64 with its values on the grid of its rounding point.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import RoundingPoints
from refswitch.numbers.precision import round_to


class LogitsSaved(NamedTuple):
    """What the logits' backward needs."""

    x_router_GSD: np.ndarray  # left operand of dw_router; it has the noise in it
    slope_GSE: np.ndarray  # derivative of the cap; recomputing it would need the uncapped logits


def logits_forward(
    x_router_GSD: np.ndarray,
    noise_GSE: np.ndarray,
    w_router_DE: np.ndarray,
    b_router_E: np.ndarray,
    logit_cap: float,
    points: RoundingPoints,
) -> tuple[np.ndarray, LogitsSaved]:
    """Score every expert for every token.

    Spec: S-ROUTE-1. Paper: h(x) = W_r x, 2.1. Additive noise and bias are zero where the dialect has none; a cap of 0 is none.

    Rounding: R2.
    """
    scores_GSE = x_router_GSD @ w_router_DE  # F1
    raw_GSE = scores_GSE + b_router_E + noise_GSE  # F2
    capped_GSE = logit_cap * np.tanh(raw_GSE / logit_cap) if logit_cap else raw_GSE  # F3
    slope_GSE = 1.0 - np.square(capped_GSE / logit_cap) if logit_cap else np.ones_like(raw_GSE)
    logits_GSE = round_to(capped_GSE, points.logits)  # R2: what the softmax reads
    return logits_GSE, LogitsSaved(x_router_GSD, slope_GSE)


def logits_backward(dlogits_GSE: np.ndarray, saved: LogitsSaved, w_router_DE: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return dx_router_GSD, dw_router_DE, db_router_E.

    Spec: S-BACK-2. Gradient: dw_router = sum_gs x_router^T (dlogits * slope).
    """
    draw_GSE = dlogits_GSE * saved.slope_GSE  # B3
    db_router_E = draw_GSE.sum(axis=(0, 1))  # B2
    dx_router_GSD = draw_GSE @ w_router_DE.T  # B1
    dw_router_DE = np.einsum("gsd,gse->de", saved.x_router_GSD, draw_GSE)  # B1
    return dx_router_GSD, dw_router_DE, db_router_E


class SoftmaxSaved(NamedTuple):
    """What the softmax's backward needs."""

    probs_GSE: np.ndarray  # its own output


def softmax_forward(logits_GSE: np.ndarray, points: RoundingPoints) -> tuple[np.ndarray, SoftmaxSaved]:
    """Turn logits into probabilities.

    Spec: S-ROUTE-2. Paper: eq. (1). The maximum is subtracted first: without it exp overflows from a logit of 89 on in float32.

    Rounding: R3.
    """
    shifted_GSE = logits_GSE - logits_GSE.max(axis=-1, keepdims=True)
    exp_GSE = np.exp(shifted_GSE)
    probs_GSE = round_to(exp_GSE / exp_GSE.sum(axis=-1, keepdims=True), points.probs)  # F1  R3
    return probs_GSE, SoftmaxSaved(probs_GSE)


def softmax_backward(dprobs_GSE: np.ndarray, saved: SoftmaxSaved) -> np.ndarray:
    """Return dlogits_GSE.

    Spec: S-BACK-2. Gradient: dlogits = p * (dp - sum_e p dp).
    """
    mean_GS1 = np.sum(saved.probs_GSE * dprobs_GSE, axis=-1, keepdims=True)
    return saved.probs_GSE * (dprobs_GSE - mean_GS1)  # B1


def choose(scores_GSE: np.ndarray) -> np.ndarray:
    """Return expert_GS, the index of the highest score, the lowest index where several are equal.

    Spec: S-ROUTE-3. Paper: 2.1, i* = argmax p. Integers; no gradient passes.
    """
    return np.argmax(scores_GSE, axis=-1)


def choices_in_order(scores_GSE: np.ndarray, choices: int) -> np.ndarray:
    """Return the first `choices` experts of each token by falling score, ties to the lowest index, shape (G, S, choices).

    Spec: S-ROUTE-3. Paper: appendix B.
    """
    return np.argsort(-scores_GSE, axis=-1, kind="stable")[..., :choices]


def _pick(values_GSE: np.ndarray, expert_GS: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values_GSE, expert_GS[..., None], axis=-1)[..., 0]


def _place(values_GS: np.ndarray, expert_GS: np.ndarray, E: int) -> np.ndarray:
    placed_GSE = np.zeros((*values_GS.shape, E))
    np.put_along_axis(placed_GSE, expert_GS[..., None], values_GS[..., None], axis=-1)
    return placed_GSE


class GateSaved(NamedTuple):
    """What the gate's backward needs."""

    expert_GS: np.ndarray  # where the gradient goes
    chosen_GS: np.ndarray  # the chosen probability, or its sigmoid
    E: int


def gate_forward(
    probs_GSE: np.ndarray, logits_GSE: np.ndarray, expert_GS: np.ndarray, value: str, points: RoundingPoints
) -> tuple[np.ndarray, GateSaved]:
    """Return gate_GS, the factor on the chosen expert's output.

    Spec: S-GATE-1. Paper: eq. (2) with k = 1: the raw probability, not renormalised, so that the router has a gradient.

    Rounding: R4 (the probability as the choice read it), R5.
    """
    read_GSE = round_to(probs_GSE, points.choice)  # R4
    chosen_GS = _pick(read_GSE, expert_GS)  # F1
    if value == "sigmoid":
        chosen_GS = np.exp(-np.logaddexp(0.0, -_pick(logits_GSE, expert_GS)))  # 1 / (1 + exp(-z)) without its overflow
    gate_GS = np.ones_like(chosen_GS) if value in ("one", "norm_topk", "ratio_st") else chosen_GS
    return round_to(gate_GS, points.gate), GateSaved(expert_GS, chosen_GS, probs_GSE.shape[-1])  # R5


def gate_backward(dgate_GS: np.ndarray, saved: GateSaved, value: str) -> tuple[np.ndarray, np.ndarray]:
    """Return dprobs_GSE and dlogits_GSE; all of it goes to the chosen entry, at ties too.

    Spec: S-BACK-2. Gradient: dp_e = dgate for the chosen e; a gate of one has none; `ratio_st` is p / stop_gradient(p).
    """
    E = saved.E
    zeros_GSE = np.zeros((*dgate_GS.shape, E))
    if value == "sigmoid":
        return zeros_GSE, _place(dgate_GS * saved.chosen_GS * (1.0 - saved.chosen_GS), saved.expert_GS, E)  # B1
    if value in ("one", "norm_topk"):
        return zeros_GSE, zeros_GSE
    if value == "ratio_st":  # a row that sits out has no gradient, and may have probability 0
        dgate_GS = np.divide(dgate_GS, saved.chosen_GS, out=np.zeros_like(dgate_GS), where=dgate_GS != 0.0)
    return _place(dgate_GS, saved.expert_GS, E), zeros_GSE  # B1
