# May import: standard library, numpy, refswitch.numbers, refswitch.reference, refswitch.config, refswitch.verify (below).
"""The stages of the model around the Switch layer, in tubes: each from what the implementation itself computed before it.

Every stage takes the differences that are known from other implementations as keyword arguments; the defaults are the T5 body. So a stage that
does not hold is evaluated again with each of them, and the one under which it holds says what was computed instead.
Spec: numbers (the radii). Next: `compare_model`.
"""

from __future__ import annotations

import numpy as np

from refswitch.numbers.precision import FORMATS, round_to
from refswitch.reference.attention import allowed_pairs
from refswitch.reference.position import position_buckets
from refswitch.verify import tubes
from refswitch.verify.tubes import Arithmetic, Tube, exact

HIDDEN = -1.0e9  # exp of it is 0 however its argument is rounded
RSQRT_ULP = 2.0  # of 1 / sqrt: two roundings, or one instruction that promises as much


def _weight(weight: np.ndarray, narrow: bool) -> Tube:
    return exact(round_to(weight, FORMATS["bfloat16"]) if narrow else weight)


def embedded(tokens_BL: np.ndarray, embedding_VD: np.ndarray, scaled: bool = False, narrow: bool = False) -> Tube:
    """Return the rows of the table; equal bits."""
    rows_BLD = _weight(embedding_VD, narrow).value[tokens_BL]
    return exact(rows_BLD * np.sqrt(rows_BLD.shape[-1]) if scaled else rows_BLD)


def bias(
    table_UH: np.ndarray, L: int, max_distance: int, bidirectional: bool, other_direction: bool = False, mirrored: bool = False, distance: int = 0
) -> Tube:
    """Return bias_LLH of every pair; equal bits."""
    here_L = -np.arange(L) if mirrored else np.arange(L)
    bucket_LL = position_buckets(here_L, here_L, table_UH.shape[0], distance or max_distance, bidirectional != other_direction)
    return exact(table_UH[bucket_LL])


def inverse_root(x: Tube, epsilon: float, arithmetic: Arithmetic) -> Tube:
    """Return 1 / sqrt(mean(x**2) + epsilon), its axis kept."""
    D = x.value.shape[-1]
    mean_square = tubes.scale(tubes.total(tubes.multiply(x, x, arithmetic), -1, arithmetic, D), 1.0 / D, arithmetic)
    under_root = tubes.add(mean_square, exact(np.float64(epsilon)), arithmetic)
    low = np.maximum(under_root.value - under_root.radius, 0.0)
    with np.errstate(divide="ignore"):
        value, high = under_root.value**-0.5, low**-0.5
    evaluation = (RSQRT_ULP * 2.0 * arithmetic.element_unit + 8.0 * tubes.OWN_UNIT) * high
    return tubes.widen(Tube(value, high - value), evaluation).at((..., None))


def normed(x: Tube, scale_D: np.ndarray, epsilon: float, arithmetic: Arithmetic, centred: bool = False, other_epsilon: float = 0.0) -> Tube:
    """Return x / sqrt(mean(x**2) + epsilon) * scale."""
    D = x.value.shape[-1]
    if centred:
        mean = tubes.scale(tubes.total(x, -1, arithmetic, D), 1.0 / D, arithmetic)
        x = tubes.add(x, Tube(-mean.value[..., None], mean.radius[..., None]), arithmetic)
    # x * (inverse * scale) or (x * inverse) * scale: two roundings either way
    return tubes.multiply(tubes.multiply(x, inverse_root(x, other_epsilon or epsilon, arithmetic), arithmetic), exact(scale_D), arithmetic)


def linear(x: Tube, weight_IO: np.ndarray, arithmetic: Arithmetic, transposed: bool = False, narrow: bool = False) -> Tube:
    """Return x @ weight."""
    weight = _weight(weight_IO.T if transposed else weight_IO, narrow)
    return tubes.contract("bli,io->blo", x, weight, arithmetic, weight_IO.shape[0])


def mixed(
    query_BLHK: Tube,
    key_BMHK: Tube,
    value_BMHK: Tube,
    bias_LMH: np.ndarray | None,
    marks: tuple[np.ndarray, np.ndarray, np.ndarray],
    causal: bool,
    arithmetic: Arithmetic,
    scaled: bool = False,
    without_bias: bool = False,
    other_causal: bool = False,
    sees_padding: bool = False,
) -> Tube:
    """Return mixed_BLHK, the values weighed by softmax(query key + bias). `marks` are the segments of queries and memory, and its validity."""
    K, M = query_BLHK.value.shape[-1], key_BMHK.value.shape[1]
    query_segment_BL, memory_segment_BM, valid_BM = marks
    valid_BM = np.ones_like(valid_BM) if sees_padding else valid_BM
    allowed_BLM = allowed_pairs(query_segment_BL, memory_segment_BM, valid_BM, causal != other_causal)
    plus = [exact(np.moveaxis(bias_LMH, -1, 0))] if bias_LMH is not None and not without_bias else []
    scores_BHLM = tubes.contract("blhk,bmhk->bhlm", query_BLHK, key_BMHK, arithmetic, K, [] if scaled else plus)
    if scaled:
        scores_BHLM = tubes.scale(scores_BHLM, K**-0.5, arithmetic)
        scores_BHLM = tubes.add(scores_BHLM, plus[0], arithmetic) if plus else scores_BHLM
    scores_BHLM = tubes.where(allowed_BLM[:, None], scores_BHLM, exact(np.full(scores_BHLM.value.shape, HIDDEN)))
    probs_BHLM = tubes.softmax(scores_BHLM, arithmetic)
    return tubes.contract("bhlm,bmhk->blhk", probs_BHLM, value_BMHK, arithmetic, M)


def hidden(z: Tube, z_linear: Tube | None, activation: str, arithmetic: Arithmetic, other: str = "", swapped: bool = False) -> Tube:
    """Return act(z), times the linear branch where there is one."""
    if swapped and z_linear is not None:
        z, z_linear = z_linear, z
    active = tubes.activate(z, other or activation, arithmetic)
    return active if z_linear is None else tubes.multiply(active, z_linear, arithmetic)


def residual(x: Tube, out: Tube, arithmetic: Arithmetic, alone: bool = False) -> Tube:
    """Return x + out."""
    return out if alone else tubes.add(x, out, arithmetic)


def logits(
    x: Tube, embedding_VD: np.ndarray, w_logits_DV: np.ndarray | None, arithmetic: Arithmetic, other_scale: bool = False, narrow: bool = False
) -> Tube:
    """Return logits_BLV: by the table and D**-0.5 where tied, else by a matrix of its own and unscaled."""
    tied = w_logits_DV is None
    if tied != other_scale:
        x = tubes.scale(x, x.value.shape[-1] ** -0.5, arithmetic)
    return linear(x, embedding_VD.T if w_logits_DV is None else w_logits_DV, arithmetic, narrow=narrow)


def loss(
    logits_BLV: Tube, targets_BL: np.ndarray, weight_BL: np.ndarray, arithmetic: Arithmetic, all_positions: bool = False, z_coef: float = 0.0
) -> Tube:
    """Return the mean cross-entropy in nats over the positions that count."""
    lse = tubes.log_sum_exp(logits_BLV, arithmetic)
    index = (*np.indices(targets_BL.shape), targets_BL)
    chosen = logits_BLV.at(index)
    each = tubes.add(lse, Tube(-chosen.value, chosen.radius), arithmetic)
    # log p may be stored as (logit - maximum) - log(sum): one rounding more, of the size of the logits
    spread = np.max(np.abs(logits_BLV.value), axis=-1) + np.abs(lse.value)
    each = tubes.widen(each, 2.0 * arithmetic.element_unit * spread)
    if z_coef:
        each = tubes.add(each, tubes.scale(tubes.multiply(lse, lse, arithmetic), z_coef, arithmetic), arithmetic)
    counted = tubes.multiply(each, exact(weight_BL), arithmetic)
    denominator = weight_BL.size if all_positions else max(float(weight_BL.sum()), 1.0)
    return tubes.scale(tubes.total(counted, (0, 1), arithmetic, weight_BL.size), 1.0 / denominator, arithmetic)


def same(x: Tube) -> Tube:
    """Return what came before: the residual stream goes on unchanged; equal bits."""
    return x
