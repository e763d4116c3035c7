# May import: standard library, numpy, refswitch.numbers.
"""Span corruption as T5 computes it: how long everything is, which tokens are noise, what stands in their place.

Paper: 2.3 ("we drop out 15% of tokens and replace the masked sequence with a single sentinel token"); the rest is T5's code, whose names stand in
brackets.

    tokens     We hold these truths to be self evident
    noise                 ^^^^^ ^^^^^^       ^^^^ ^^^^^^^
    inputs     We hold <s0> to be <s1> </s>
    targets    <s0> these truths <s1> self evident </s>

A span of text between two noises is, in the targets, what a noise is in the inputs; there is no closing sentinel. Letters: B rows, L tokens, P spans.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.numbers.philox import permutation_of


class Ragged(NamedTuple):
    """Rows of different lengths, one after the other."""

    flat: np.ndarray
    length_B: np.ndarray


class SpanLengths(NamedTuple):
    """How many tokens of a text make a row of inputs, and how long its targets are. Both rows count their end-of-sequence."""

    tokens: int
    targets: int


def span_lengths(inputs_length: int, density: float, mean_span: float) -> SpanLengths:
    """Return the longest text whose inputs fit a row, and its targets' length [`random_spans_helper`].

    Parameters
    ----------
    inputs_length : int, tokens
        Length of a row of inputs.
    density : float, [0, 1)
        Share of the tokens that are noise.
    mean_span : float, tokens
        Mean length of a span of noise.

    Returns
    -------
    SpanLengths
        For example 568 and 114 for 512, 0.15 and 3.
    """

    def rows_of(tokens: int) -> tuple[int, int]:
        noise = round(tokens * density)
        spans = round(noise / mean_span)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length - 1
    while rows_of(tokens + 1)[0] <= inputs_length:
        tokens += 1
    targets = rows_of(tokens)[1]
    if density == 0.5 and targets > inputs_length:  # T5 prefers two rows of the same round number
        return SpanLengths(tokens - 1, targets - 1)
    return SpanLengths(tokens, targets)


def span_counts(length: np.ndarray | int, density: float, mean_span: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how many tokens of texts of some lengths are noise, and in how many spans [`random_spans_noise_mask`].

    T5 multiplies in float32 here and in float64 in its helper: of 190 tokens, 28.5 are noise and become 29 here, 28 there. Both are kept, as they
    are what its models were trained on. A text of one token has no noise: T5 takes it for one of two and loses the second, which is the noise.
    """
    L = np.asarray(length, np.int64)
    if density == 0.0:
        return np.zeros_like(L), np.zeros_like(L)
    least = np.maximum(L, 2)
    noise = np.clip(np.rint(least.astype(np.float32) * np.float32(density)).astype(np.int64), 1, least - 1)
    spans = np.maximum(np.rint(noise.astype(np.float32) / np.float32(mean_span)).astype(np.int64), 1)
    spans = np.minimum(spans, least - noise)  # a density near 1 leaves fewer tokens than spans to part
    return np.where(L < 2, 0, noise), np.where(L < 2, 0, spans)


def segmentation(words_BN: np.ndarray, segments: int) -> np.ndarray:
    """Return the lengths of `segments` non-empty parts of N + 1 items, every choice of cuts equally likely; a word for each place where a cut may be.

    The cuts are the first `segments - 1` places of a random order [`_random_segmentation` shuffles as many ones among zeros].
    """
    B, N = words_BN.shape
    cut_BP = np.sort(permutation_of(words_BN)[:, : segments - 1], axis=1) + 1
    edge_BP = np.concatenate([np.zeros((B, 1), np.int64), cut_BP, np.full((B, 1), N + 1)], axis=1)
    return np.diff(edge_BP, axis=1)


def span_mask(words_BL: np.ndarray, L: int, density: float, mean_span: float) -> np.ndarray:
    """Return which tokens are noise, for rows of L tokens [`random_spans_noise_mask`].

    Text and noise take turns, text first and noise last: the first token is never noise.

    Parameters
    ----------
    words_BL : uint32
        At least L - 2 words for each row.
    L : int, tokens
        Length of the rows.
    density, mean_span : float
        As in `span_lengths`.

    Returns
    -------
    np.ndarray
        mask_BL, True where a token is noise.
    """
    B = words_BL.shape[0]
    noise, P = (int(count) for count in span_counts(L, density, mean_span))
    if P == 0:
        return np.zeros((B, L), bool)
    noise_BP = segmentation(words_BL[:, : noise - 1], P)
    text_BP = segmentation(words_BL[:, noise - 1 : L - 2], P)
    edge_BP = np.cumsum(np.stack([text_BP, noise_BP], axis=2).reshape(B, 2 * P), axis=1)[:, :-1]
    turn_BL = np.zeros((B, L), np.int64)
    np.put_along_axis(turn_BL, edge_BP, 1, axis=1)
    return np.cumsum(turn_BL, axis=1) % 2 == 1


def iid_mask(words_BL: np.ndarray, density: float, sentinels: int, targets_length: int) -> np.ndarray:
    """Return which tokens are noise where each is so on its own [`iid_noise_mask`].

    DEVIATES: noise stops where the sentinels, or the row of targets, would run out. T5 goes on to spell spans with ids of its text and cuts the
    targets.
    """
    mask_BL = words_BL < np.uint32(round(density * 2**32))
    target_BL = np.cumsum(mask_BL, axis=1) + np.cumsum(starts_of(~mask_BL), axis=1)
    span_BL = np.cumsum(starts_of(mask_BL), axis=1)
    return mask_BL & (target_BL + 2 <= targets_length) & (span_BL < sentinels)  # 2: the last text's sentinel and the end


def starts_of(mask_BL: np.ndarray) -> np.ndarray:
    """Return where a run of True begins."""
    before_BL = np.zeros_like(mask_BL)
    before_BL[:, 1:] = mask_BL[:, :-1]
    return mask_BL & ~before_BL


def with_sentinels(tokens_BL: np.ndarray, mask_BL: np.ndarray, sentinels: np.ndarray, eos: int) -> Ragged:
    """Return the rows with sentinel i in place of the i-th run of True, and an end-of-sequence [`noise_span_to_unique_sentinel`].

    The targets are the same function of the mask's opposite [`nonnoise_span_to_unique_sentinel`].
    """
    start_BL = starts_of(mask_BL)
    number_BL = np.cumsum(start_BL, axis=1) - 1
    marked_BL = np.where(start_BL, sentinels[np.minimum(number_BL, len(sentinels) - 1)], tokens_BL)
    return flat_rows(marked_BL, ~mask_BL | start_BL, eos)


def flat_rows(tokens_BL: np.ndarray, keep_BL: np.ndarray, eos: int) -> Ragged:
    """Return the tokens that are kept, row by row, each row with an end-of-sequence."""
    B = len(tokens_BL)
    ended_BL = np.concatenate([tokens_BL, np.full((B, 1), eos, tokens_BL.dtype)], axis=1)
    kept_BL = np.concatenate([keep_BL, np.ones((B, 1), bool)], axis=1)
    return Ragged(ended_BL[kept_BL], kept_BL.sum(axis=1))
