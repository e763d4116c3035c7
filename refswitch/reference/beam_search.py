# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Beam search with a length penalty: the W likeliest continuations side by side, the best finished ones kept.

Paper: the T5 body (beam 4, alpha 0.6 for long outputs). Read `decoding` first; this is the last file of the reading order.

Each step scores all W * V continuations of a row and takes the 2 W best as candidates, so that W of them go on even if W end. A candidate that
ends counts only where it is among the first W. A row is closed when its best running beam, at its present length, would not beat its worst
finished one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.reference.block import StackStatics
from refswitch.reference.decoding import Cache, KeyValue, decode_step, start_cache
from refswitch.reference.transformer import ModelParams


class Beams(NamedTuple):
    """W sequences of each row, the best first; a score of -inf is none."""

    tokens_BWL: np.ndarray
    score_BW: np.ndarray  # sum of log-probabilities in nats; of a finished beam divided by the penalty


def length_penalty(length: int, alpha: float, rule: str) -> float:
    """Return what a sum of log-probabilities over `length` tokens, the end included, is divided by.

    "power": length**alpha (Hugging Face). "wu": ((5 + length) / 6)**alpha (Wu et al., 2016; Mesh TensorFlow, T5X).
    """
    return {"power": float(length), "wu": (5.0 + length) / 6.0}[rule] ** alpha


def log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities, in nats."""
    shifted_NV = logits_NV - logits_NV.max(axis=-1, keepdims=True)
    return shifted_NV - np.log(np.exp(shifted_NV).sum(axis=-1, keepdims=True))


def best_of(beams: Beams, count: int) -> tuple[Beams, np.ndarray]:
    """Return the `count` best beams, equal ones by index, and their indices."""
    index_BW = np.argsort(-beams.score_BW, axis=-1, kind="stable")
    tokens_BWL = np.take_along_axis(beams.tokens_BWL, index_BW[..., None], axis=1)
    return Beams(tokens_BWL[:, :count], np.take_along_axis(beams.score_BW, index_BW, axis=1)[:, :count]), index_BW[:, :count]


def closest(score_BJ: np.ndarray, count: int) -> np.ndarray:
    """Return gap_B, the smallest distance between two neighbours among the `count` best scores and the first that is left out."""
    falling_BJ = -np.sort(-score_BJ, axis=-1)
    next_BJ = np.append(falling_BJ[:, 1:], np.full((len(score_BJ), 1), -np.inf), axis=1)
    gap_BJ = np.where(np.isfinite(next_BJ), falling_BJ - np.where(np.isfinite(next_BJ), next_BJ, 0.0), np.inf)
    return gap_BJ[:, :count].min(axis=-1, initial=np.inf)


def reorder(cache: Cache, index_N: np.ndarray) -> Cache:
    """Return the cache whose row n is the old row index_N[n]; the encoder's part is the same in all beams of a row."""
    own = tuple(KeyValue(each.key_BMHK[index_N], each.value_BMHK[index_N]) for each in cache.own)
    return cache._replace(own=own)


def beam_search(
    memory_BMD: np.ndarray,
    memory_valid_BM: np.ndarray,
    params: ModelParams,
    statics: StackStatics,
    beams: int,
    length: int,
    start: int,
    end: int,
    pad: int,
    alpha: float = 1.0,
    rule: str = "power",
) -> tuple[Beams, np.ndarray]:
    """Return the finished beams of each row, `length` tokens each with `pad` after the end, and margin_B.

    margin_B is the smallest distance between two scores whose order mattered: where it is below the error of another implementation's
    scores, that one may find other beams. `statics.groups` says into how many groups the B * W tokens of a step are cut.
    """
    B, W = memory_BMD.shape[0], beams
    cache = start_cache(np.repeat(memory_BMD, W, axis=0), np.repeat(memory_valid_BM, W, axis=0), params, statics.around)
    score_BW = np.broadcast_to(np.where(np.arange(W) == 0, 0.0, -np.inf), (B, W))  # all beams start alike: one of them counts
    running = Beams(np.full((B, W, length), pad), score_BW)
    finished = Beams(np.full((B, W, length), pad), np.full((B, W), -np.inf))
    token_N, margin_B, is_open_B = np.full(B * W, start), np.full(B, np.inf), np.ones(B, bool)
    for position in range(length):
        logits_NV, cache = decode_step(token_N, cache, params, statics)
        V = logits_NV.shape[-1]
        total_BWV = running.score_BW[..., None] + log_softmax(logits_NV).reshape(B, W, V)
        order_BJ = np.argsort(-total_BWV.reshape(B, W * V), axis=-1, kind="stable")[:, : 2 * W]
        beam_BJ, token_BJ = order_BJ // V, order_BJ % V
        tokens_BJL = np.take_along_axis(running.tokens_BWL, beam_BJ[..., None], axis=1)
        tokens_BJL[:, :, position] = token_BJ
        candidates = Beams(tokens_BJL, np.take_along_axis(total_BWV.reshape(B, W * V), order_BJ, axis=1))

        penalty = length_penalty(position + 1, alpha, rule)
        ended_BJ = (token_BJ == end) | (position + 1 == length)
        counts_BJ = ended_BJ & (np.arange(order_BJ.shape[1]) < W) & is_open_B[:, None]
        ended = Beams(tokens_BJL, np.where(counts_BJ, candidates.score_BW / penalty, -np.inf))
        merged = Beams(*[np.concatenate(pair, axis=1) for pair in zip(finished, ended, strict=True)])
        gap_B = np.minimum(closest(total_BWV.reshape(B, W * V), 2 * W), closest(merged.score_BW, W))
        finished, _ = best_of(merged, W)
        running, kept_BW = best_of(candidates._replace(score_BW=np.where(ended_BJ, -np.inf, candidates.score_BW)), W)

        worst_B, best_B = finished.score_BW[:, -1], running.score_BW[:, 0] / penalty
        with np.errstate(invalid="ignore"):  # the last step leaves nothing running
            gap_B = np.fmin(gap_B, np.abs(best_B - worst_B))
        margin_B = np.where(is_open_B, np.minimum(margin_B, gap_B), margin_B)
        is_open_B = is_open_B & (best_B > worst_B)
        if not is_open_B.any():
            break
        parent_BW = np.take_along_axis(beam_BJ, kept_BW, axis=1)
        cache = reorder(cache, (parent_BW + W * np.arange(B)[:, None]).reshape(-1))
        token_N = running.tokens_BWL[:, :, position].reshape(-1)
    return finished, margin_B
