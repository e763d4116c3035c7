# May import: standard library, numpy, refswitch.precision, refswitch.reference, refswitch.model_config, refswitch.config, refswitch.numbers.
"""The reference as a backend: its functions as they are, in float64, and the glue that it writes out in its own lines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from refswitch.config import ModelPoints
from refswitch.model_config import ModelConfig
from refswitch.numbers.philox import jitter, keep_factor
from refswitch.numbers.precision import Format, round_to
from refswitch.precision import Precision
from refswitch.reference import attention
from refswitch.reference.adafactor import adafactor_update
from refswitch.reference.adamw import adamw_update
from refswitch.reference.attention import AttentionParams, AttentionSaved, attention_backward
from refswitch.reference.block import StackStatics
from refswitch.reference.cross_entropy import cross_entropy_backward, cross_entropy_forward
from refswitch.reference.decoding import attend, project
from refswitch.reference.distillation import distillation_backward, distillation_forward
from refswitch.reference.embedding import (
    embed_backward,
    embed_forward,
    logits_backward,
    logits_forward,
    tied_logits_backward,
    tied_logits_forward,
)
from refswitch.reference.feed_forward import feed_forward_backward, feed_forward_forward
from refswitch.reference.losses import BalanceSaved, balance_forward, counted_fraction, rows_of_mean
from refswitch.reference.norm import norm_backward, norm_forward
from refswitch.reference.position import position_bias_backward, position_bias_forward
from refswitch.reference.router import choose
from refswitch.reference.switch import SwitchOutputs, SwitchSaved, switch_backward, switch_forward

__all__ = [
    "adafactor_update",
    "adamw_update",
    "added",
    "attend",
    "attention_backward",
    "attention_forward",
    "begin",
    "cross_entropy_backward",
    "cross_entropy_forward", "distillation_backward", "distillation_forward",
    "dtype",
    "embed_backward",
    "embed_forward",
    "feed_forward_backward",
    "feed_forward_forward",
    "jitter",
    "keep_factor",
    "logits_backward",
    "logits_forward",
    "mark",
    "name",
    "norm_backward",
    "norm_forward",
    "pool_balance",
    "position_bias_backward",
    "position_bias_forward",
    "project",
    "release",
    "residual",
    "rounded",
    "running",
    "scaled",
    "scaled_by",
    "squared_norm",
    "supports",
    "switch_backward",
    "switch_forward",
    "tied_logits_backward",
    "tied_logits_forward",
]  # fmt: skip

name = "reference"
dtype: type[np.floating] = np.float64


def supports(config: ModelConfig, setting: Precision) -> None:
    """Return: the reference computes every model."""


def running() -> AbstractContextManager:
    """Hold nothing: NumPy has its own threads."""
    return nullcontext()


def begin() -> None:
    """Do nothing: every array is new."""


def mark() -> int:
    """Return 0: no moment differs."""
    return 0


def release(since: int, until: int, keep: Any) -> None:
    """Do nothing: what nobody reads is collected."""


def rounded(x: np.ndarray, format: Format) -> np.ndarray:
    """Return x on the grid of a format."""
    return round_to(x, format)


def added(x: np.ndarray, y: np.ndarray, format: Format) -> np.ndarray:
    """Return round(x + y)."""
    return round_to(x + y, format)


def scaled(x: np.ndarray, factor: np.ndarray, format: Format) -> np.ndarray:
    """Return round(x * factor)."""
    return round_to(x * factor, format)


def residual(x: np.ndarray, out: np.ndarray, factor: np.ndarray, format: Format) -> np.ndarray:
    """Return round(x + out * factor)."""
    return round_to(x + out * factor, format)


def attention_forward(
    x_BLD: np.ndarray,
    memory_BMD: np.ndarray,
    bias_HLM: np.ndarray,
    params: AttentionParams,
    allowed_BLM: np.ndarray,
    factor_BHLM: np.ndarray,
    points: ModelPoints,
) -> tuple[np.ndarray, AttentionSaved]:
    """Return the memory's values, mixed. What is one element is spread out: NumPy's order of summation follows the layout of sums and products."""
    B, L, M, H = *x_BLD.shape[:2], memory_BMD.shape[1], params.w_query_DHK.shape[1]
    whole_HLM = np.full((H, L, M), bias_HLM) if bias_HLM.size == 1 else bias_HLM
    whole_BHLM = np.full((B, H, L, M), factor_BHLM) if factor_BHLM.size == 1 else factor_BHLM
    return attention.attention_forward(x_BLD, memory_BMD, whole_HLM, params, allowed_BLM, whole_BHLM, points)


def pool_balance(
    switches: Sequence[SwitchOutputs], saved: Sequence[SwitchSaved], valid_GS: np.ndarray, statics: StackStatics
) -> tuple[float, tuple[SwitchSaved, ...]]:
    """Return the balance loss with f and P averaged over the layers before they are multiplied, as one layer with all layers' rows.

    Spec: S-AUX-1.
    """
    aux, is_excluded = statics.dialect.aux, statics.dialect.pad.route == "exclude"
    claims_GS = valid_GS if is_excluded else np.ones_like(valid_GS)
    E, layers = switches[0].probs_GSE.shape[-1], len(switches)
    count_GE, denominator_G = np.zeros((valid_GS.shape[0], E), np.int64), np.zeros(valid_GS.shape[0], np.int64)
    for switch in switches:
        choice_GS = choose(switch.logits_GSE) if aux.f.count == "logits" else switch.route.expert_GS
        count_GE = count_GE + counted_fraction(switch.route, choice_GS, claims_GS, valid_GS, E, aux)
        rows_G, scale_G = rows_of_mean(valid_GS, switch.route.kept_GS, aux)
        denominator_G = denominator_G + rows_G
    probs_GSE = np.concatenate([switch.probs_GSE for switch in switches], axis=1)
    value, pooled = balance_forward(probs_GSE, count_GE, denominator_G, scale_G, np.concatenate([valid_GS] * layers, axis=1), aux)
    parts = np.split(pooled.dvalue_dprobs_GSE, layers, axis=1)
    return float(value), tuple(each._replace(balance=BalanceSaved(part)) for each, part in zip(saved, parts, strict=True))


def squared_norm(grad: np.ndarray) -> float:
    """Return the sum of squares."""
    return float(np.sum(np.square(grad)))


def scaled_by(grad: np.ndarray, factor: float) -> np.ndarray:
    """Return grad * factor."""
    return grad * factor
