# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Attention: T5's, without 1/sqrt(K) (the initialisation of w_query has it), with a bias per head and a mask.

Paper: the T5 body. Self-attention passes the same tokens twice, cross-attention the encoder's output as memory. Next: `feed_forward`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import ModelPoints
from refswitch.numbers.precision import round_to


class AttentionParams(NamedTuple):
    """Four matrices, no biases; gradients use the same type."""

    w_query_DHK: np.ndarray
    w_key_DHK: np.ndarray
    w_value_DHK: np.ndarray
    w_out_HKD: np.ndarray


class AttentionSaved(NamedTuple):
    """What attention's backward needs."""

    x_BLD: np.ndarray
    memory_BMD: np.ndarray
    query_BLHK: np.ndarray
    key_BMHK: np.ndarray
    value_BMHK: np.ndarray
    probs_BHLM: np.ndarray
    factor_BHLM: np.ndarray  # dropout on the probabilities, already scaled
    mixed_BLHK: np.ndarray  # left operand of dw_out


def allowed_pairs(query_segment_BL: np.ndarray, memory_segment_BM: np.ndarray, memory_valid_BM: np.ndarray, causal: bool) -> np.ndarray:
    """Return allowed_BLM, which memory each query may see.

    Segments number the packed sequences: a query sees its own segment alone, and nobody sees padding. Padding as a segment of its own sees
    nothing (Mesh TensorFlow); padding that keeps its row's segment sees what the row sees (Hugging Face), and routers read the difference.
    """
    same_BLM = query_segment_BL[:, :, None] == memory_segment_BM[:, None, :]
    allowed_BLM = same_BLM & memory_valid_BM[:, None, :]
    L, M = allowed_BLM.shape[1:]
    return allowed_BLM & (np.arange(M) <= np.arange(L)[:, None]) if causal else allowed_BLM


def masked_softmax(scores_BHLM: np.ndarray, allowed_BLM: np.ndarray) -> np.ndarray:
    """Return probs_BHLM, exactly 0 where hidden; a query that sees nothing (padding) has zeros, not NaN.

    The tempting -1e9 gives such a query the mean of what it may not see.
    """
    allowed_B1LM = allowed_BLM[:, None]
    max_BHL1 = np.max(scores_BHLM, axis=-1, keepdims=True, where=allowed_B1LM, initial=-np.inf)
    shifted_BHLM = np.where(allowed_B1LM, scores_BHLM - np.where(np.isfinite(max_BHL1), max_BHL1, 0.0), -np.inf)
    exp_BHLM = np.exp(shifted_BHLM)
    total_BHL1 = exp_BHLM.sum(axis=-1, keepdims=True)
    return exp_BHLM / np.where(total_BHL1 > 0.0, total_BHL1, 1.0)


def attention_forward(
    x_BLD: np.ndarray,
    memory_BMD: np.ndarray,
    bias_HLM: np.ndarray,
    params: AttentionParams,
    allowed_BLM: np.ndarray,
    factor_BHLM: np.ndarray,
    points: ModelPoints,
) -> tuple[np.ndarray, AttentionSaved]:
    """Return out_BLD, the memory's values mixed by softmax(query key + bias).

    Rounding: R11 for what is handed on, R12 for the scores.
    """
    query_BLHK = round_to(np.einsum("bld,dhk->blhk", x_BLD, params.w_query_DHK), points.activations)  # F1  R11
    key_BMHK = round_to(np.einsum("bmd,dhk->bmhk", memory_BMD, params.w_key_DHK), points.activations)  # F2  R11
    value_BMHK = round_to(np.einsum("bmd,dhk->bmhk", memory_BMD, params.w_value_DHK), points.activations)  # F3  R11
    scores_BHLM = round_to(np.einsum("blhk,bmhk->bhlm", query_BLHK, key_BMHK) + bias_HLM, points.statistics)  # F4  R12
    probs_BHLM = round_to(masked_softmax(scores_BHLM, allowed_BLM), points.activations)  # F5  R11
    mixed_BLHK = round_to(np.einsum("bhlm,bmhk->blhk", probs_BHLM * factor_BHLM, value_BMHK), points.activations)  # F6  R11
    out_BLD = round_to(np.einsum("blhk,hkd->bld", mixed_BLHK, params.w_out_HKD), points.activations)  # F7  R11
    return out_BLD, AttentionSaved(x_BLD, memory_BMD, query_BLHK, key_BMHK, value_BMHK, probs_BHLM, factor_BHLM, mixed_BLHK)


def attention_backward(
    dout_BLD: np.ndarray, saved: AttentionSaved, params: AttentionParams, points: ModelPoints
) -> tuple[np.ndarray, np.ndarray, np.ndarray, AttentionParams]:
    """Return dx_BLD, dmemory_BMD, dbias_HLM and the parameters' gradients; self-attention adds the first two.

    Rounding: R14.
    """
    dw_out_HKD = np.einsum("blhk,bld->hkd", saved.mixed_BLHK, dout_BLD)  # B7
    dmixed_BLHK = round_to(np.einsum("bld,hkd->blhk", dout_BLD, params.w_out_HKD), points.gradients)  # B7  R14
    dvalue_BMHK = round_to(np.einsum("bhlm,blhk->bmhk", saved.probs_BHLM * saved.factor_BHLM, dmixed_BLHK), points.gradients)  # B6  R14
    dprobs_BHLM = np.einsum("blhk,bmhk->bhlm", dmixed_BLHK, saved.value_BMHK) * saved.factor_BHLM  # B6
    mean_BHL1 = np.sum(saved.probs_BHLM * dprobs_BHLM, axis=-1, keepdims=True)
    dscores_BHLM = saved.probs_BHLM * (dprobs_BHLM - mean_BHL1)  # B5
    dbias_HLM = dscores_BHLM.sum(axis=0)  # B4
    dquery_BLHK = round_to(np.einsum("bhlm,bmhk->blhk", dscores_BHLM, saved.key_BMHK), points.gradients)  # B4  R14
    dkey_BMHK = round_to(np.einsum("bhlm,blhk->bmhk", dscores_BHLM, saved.query_BLHK), points.gradients)  # B4  R14
    dw_value_DHK = np.einsum("bmd,bmhk->dhk", saved.memory_BMD, dvalue_BMHK)  # B3
    dmemory_value_BMD = np.einsum("bmhk,dhk->bmd", dvalue_BMHK, params.w_value_DHK)  # B3
    dw_key_DHK = np.einsum("bmd,bmhk->dhk", saved.memory_BMD, dkey_BMHK)  # B2
    dmemory_key_BMD = np.einsum("bmhk,dhk->bmd", dkey_BMHK, params.w_key_DHK)  # B2
    dw_query_DHK = np.einsum("bld,blhk->dhk", saved.x_BLD, dquery_BLHK)  # B1
    dx_BLD = np.einsum("blhk,dhk->bld", dquery_BLHK, params.w_query_DHK)  # B1
    dparams = AttentionParams(dw_query_DHK, dw_key_DHK, dw_value_DHK, dw_out_HKD)
    dmemory_BMD = dmemory_key_BMD + dmemory_value_BMD
    return round_to(dx_BLD, points.gradients), round_to(dmemory_BMD, points.gradients), dbias_HLM, dparams  # R14
