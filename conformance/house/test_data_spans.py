# May import: standard library, numpy, pytest, hypothesis, refswitch.
"""Span corruption: lengths, masks and sentinels against T5's, and what must hold for any text.

The lengths are those of T5's `random_spans_helper`. The masks were printed once by t5 0.9.4 under TensorFlow 2.21, its shuffle replaced by one that
puts the ones where Philox' words say; in that run 3,594 lengths and 1,018 masks with their inputs and targets agreed with ours, every one.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refswitch.data import spans
from refswitch.numbers.philox import random_bits

T5_LENGTHS = {512: (568, 114), 1024: (1137, 229), 256: (284, 58), 128: (141, 29), 64: (70, 14), 32: (34, 8), 2048: (2274, 456)}
T5_RUNS = {  # lengths of text and noise in turn, density 0.15, mean span 3
    1: (1,),
    2: (1, 1),
    3: (2, 1),
    13: (11, 2),
    34: (12, 2, 17, 3),
    70: (12, 4, 44, 1, 4, 5),
    141: (16, 2, 20, 1, 27, 9, 20, 1, 22, 2, 9, 1, 6, 5),
    190: (3, 5, 2, 4, 1, 1, 16, 5, 83, 3, 5, 4, 33, 1, 4, 1, 5, 3, 9, 2),  # 29 tokens of noise, where exact arithmetic has 28
}
DENSITY, MEAN = 0.15, 3.0
SENTINELS, EOS = np.arange(999, 899, -1), 1
shapes = st.tuples(
    st.integers(1, 200), st.sampled_from([0.0, 0.1, 0.15, 0.25, 0.5, 0.9]), st.sampled_from([1.0, 2.0, 3.0, 10.0]), st.integers(0, 2**32)
)


def mask_of(L: int, density: float, mean: float, seed: int, B: int = 1) -> np.ndarray:
    """Return masks by the words of an address."""
    length = max(L, 3)
    return spans.span_mask(random_bits(seed, L, 1, range(B * length)).reshape(B, length), L, density, mean)


def asked(L: int, density: float, mean: float, seed: int) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """Return tokens (never an id of a sentinel), mask, inputs and targets of one text."""
    tokens_L, mask_BL = np.arange(10, 10 + L), mask_of(L, density, mean, seed)
    inputs, targets = (spans.with_sentinels(tokens_L[None], which_BL, SENTINELS, EOS) for which_BL in (mask_BL, ~mask_BL))
    return tokens_L, mask_BL[0], inputs.flat.tolist(), targets.flat.tolist()


def filled_in(inputs: list[int], targets: list[int]) -> list[int]:
    """Return the text that inputs and targets were made of: a reader's way, token by token, which shares nothing with the code."""
    assert inputs[-1] == targets[-1] == EOS
    answers: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token in SENTINELS:
            assert token not in answers, "a sentinel comes twice"
            answers[token] = []
        else:
            answers[next(reversed(answers))].append(token)
    assert list(answers) == SENTINELS[: len(answers)].tolist(), "sentinels go down from the top"
    return [word for token in inputs[:-1] for word in (answers[token] if token in SENTINELS else [token])]


def check_lengths() -> None:
    """T5's lengths."""
    assert {M: tuple(spans.span_lengths(M, DENSITY, MEAN)) for M in T5_LENGTHS} == T5_LENGTHS


def check_masks() -> None:
    """T5's masks."""
    for L, runs in T5_RUNS.items():
        turns = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        assert mask_of(L, DENSITY, MEAN, 7)[0].tolist() == turns.tolist(), L


@settings(max_examples=100, deadline=None, report_multiple_bugs=False)
@given(shapes)
def check_reconstruction(shape: tuple[int, float, float, int]) -> None:
    """The noise in its place gives the text back, and sentinels go down from the top."""
    L, density, mean, _ = shape
    if int(spans.span_counts(L, density, mean)[1]) <= len(SENTINELS):
        tokens_L, _, inputs, targets = asked(*shape)
        assert filled_in(inputs, targets) == tokens_L.tolist()


@settings(max_examples=200, deadline=None, report_multiple_bugs=False)
@given(shapes)
def check_density(shape: tuple[int, float, float, int]) -> None:
    """Text comes first and noise last; its share is right up to one token, and so is the number of spans up to what a text has room for."""
    L, density, mean, _ = shape
    mask_L = mask_of(*shape)[0]
    assert not mask_L[0]
    noise, wanted = int(mask_L.sum()), L * Fraction(density)
    if L >= 2 and density:
        assert mask_L[-1]
        assert abs(noise - wanted) <= 1
        P = int((mask_L[1:] & ~mask_L[:-1]).sum())
        assert abs(P - noise / Fraction(mean)) <= 1 or L - noise == P
    else:
        assert noise == 0


def check_rows() -> None:
    """A row of the length that was planned is full, and shorter texts fit; in one more token a row would overflow."""
    for M in (32, 64, 128, 512):
        L, targets_length = spans.span_lengths(M, DENSITY, MEAN)
        lengths = [(len(inputs), len(targets)) for *_, inputs, targets in (asked(n, DENSITY, MEAN, 3) for n in (L - 1, L, L + 1))]
        assert lengths[1] == (M, targets_length)
        assert lengths[0][0] <= M < lengths[2][0]


def check_cuts() -> None:
    """Every way to cut 5 items into 3 parts is as likely: of 5 degrees, chance alone gives a chi-square above 25.745 once in 10,000."""
    words = random_bits(1, 0, 1, range(6000 * 4)).reshape(6000, 4)
    _, counts = np.unique(spans.segmentation(words, 3), axis=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 1000) ** 2).sum() < 25_745


@settings(max_examples=200, deadline=None, report_multiple_bugs=False)
@given(st.integers(1, 60), st.sampled_from([0.15, 0.5, 0.9]), st.integers(1, 20), st.integers(3, 40), st.integers(0, 2**32))
def check_iid(L: int, density: float, sentinels: int, room: int, seed: int) -> None:
    """Whatever is drawn, sentinels and targets do not run out, and nothing of the text is lost; a prefix of what is drawn is noise."""
    words_BL = random_bits(seed, 0, 1, range(L)).reshape(1, L)
    mask_L = spans.iid_mask(words_BL, density, sentinels, room)[0]
    drawn_L = words_BL[0] < density * 2**32
    end = int(np.flatnonzero(mask_L)[-1]) + 1 if mask_L.any() else 0
    assert (mask_L == drawn_L)[:end].all()
    tokens_L = np.arange(10, 10 + L)
    inputs, targets = (spans.with_sentinels(tokens_L[None], which_L[None], SENTINELS, EOS).flat.tolist() for which_L in (mask_L, ~mask_L))
    assert len(targets) <= room
    assert len(inputs) <= L + 1
    used = [[token for token in row if token in SENTINELS] for row in (inputs, targets)]
    assert all(row == SENTINELS[: len(row)].tolist() and len(row) <= sentinels for row in used)
    assert sorted(token for token in inputs + targets if token not in SENTINELS and token != EOS) == tokens_L.tolist()


def check_iid_density() -> None:
    """Of 60,000 tokens a share of 0.15, within five standard deviations: chance alone fails less than once in a million."""
    words_BL = random_bits(3, 0, 1, range(60_000)).reshape(100, 600)
    mask_BL = spans.iid_mask(words_BL, 0.15, 1000, 10_000)
    assert (mask_BL == (words_BL < 0.15 * 2**32)).all()
    expected, variance = 60_000 * Fraction("0.15"), 60_000 * Fraction("0.15") * Fraction("0.85")
    assert (int(mask_BL.sum()) - expected) ** 2 < 25 * variance


EVERY = (check_lengths, check_masks, check_density, check_reconstruction, check_rows, check_cuts, check_iid, check_iid_density)
CHECKS = {check.__name__: check for check in EVERY}


@pytest.mark.parametrize("name", CHECKS)
def test_spans__are_those_of_t5(name: str) -> None:
    """Every check holds."""
    CHECKS[name]()


def short_helper(inputs_length: int, density: float, mean_span: float) -> spans.SpanLengths:
    """The end-of-sequence is forgotten."""
    return TRUE["span_lengths"](inputs_length + 1, density, mean_span)


def exact_counts(length: object, density: float, mean_span: float) -> tuple[np.ndarray, np.ndarray]:
    """Noise is counted exactly, as in T5's helper, where its mask multiplies in float32."""
    noise, P = TRUE["span_counts"](length, density, mean_span)
    return np.where(noise > 0, round(int(length) * Fraction(str(density))), noise).clip(int(int(length) > 1 and density > 0)), P  # type: ignore[call-overload]


def noise_first(words_BL: np.ndarray, L: int, density: float, mean_span: float) -> np.ndarray:
    """The mask begins with noise."""
    return TRUE["span_mask"](words_BL, L, density, mean_span)[:, ::-1]


def ascending(tokens_BL: np.ndarray, mask_BL: np.ndarray, sentinels: np.ndarray, eos: int) -> spans.Ragged:
    """Sentinels go up."""
    return TRUE["with_sentinels"](tokens_BL, mask_BL, sentinels[::-1], eos)


def one_sentinel(tokens_BL: np.ndarray, mask_BL: np.ndarray, sentinels: np.ndarray, eos: int) -> spans.Ragged:
    """Every span has the same sentinel."""
    return TRUE["with_sentinels"](tokens_BL, mask_BL, sentinels[:1], eos)


def sentinel_each(tokens_BL: np.ndarray, mask_BL: np.ndarray, sentinels: np.ndarray, eos: int) -> spans.Ragged:
    """A sentinel stands beside the noise instead of in its place."""
    return TRUE["flat_rows"](tokens_BL, np.ones_like(mask_BL), eos)


def even_parts(words_BN: np.ndarray, segments: int) -> np.ndarray:
    """Parts are of equal length, as nearly as may be."""
    N = words_BN.shape[1] + 1
    return np.broadcast_to(np.diff(np.arange(segments + 1) * N // segments), (len(words_BN), segments))


def empty_parts(words_BN: np.ndarray, segments: int) -> np.ndarray:
    """Cuts are drawn one by one, so that two may fall together and a part may be empty."""
    N = words_BN.shape[1]
    cut_BP = np.sort(words_BN[:, : segments - 1] % max(N, 1), axis=1).astype(np.int64) + 1
    return np.diff(np.pad(cut_BP, ((0, 0), (1, 1)), constant_values=((0, 0), (0, N + 1))), axis=1)


def unlimited(words_BL: np.ndarray, density: float, sentinels: int, targets_length: int) -> np.ndarray:
    """Noise goes on when sentinels or targets run out, as T5's does."""
    return TRUE["iid_mask"](words_BL, density, 10**6, 10**6)


def coarse(words_BL: np.ndarray, density: float, sentinels: int, targets_length: int) -> np.ndarray:
    """The last sentinel is given to text and noise alike: one span too many."""
    return TRUE["iid_mask"](words_BL, density, sentinels + 1, targets_length)


def half_as_dense(words_BL: np.ndarray, density: float, sentinels: int, targets_length: int) -> np.ndarray:
    """A word is taken for one of 33 bits."""
    return TRUE["iid_mask"](words_BL, density / 2, sentinels, targets_length)


TRUE: dict[str, Callable] = {
    name: getattr(spans, name) for name in ("span_lengths", "span_counts", "span_mask", "with_sentinels", "flat_rows", "iid_mask")
}
PLANTED = {
    "short_helper": ("span_lengths", short_helper, {"check_lengths", "check_rows"}),
    "exact_counts": ("span_counts", exact_counts, {"check_masks"}),
    "noise_first": ("span_mask", noise_first, {"check_masks", "check_density"}),
    "ascending": ("with_sentinels", ascending, {"check_reconstruction"}),
    "one_sentinel": ("with_sentinels", one_sentinel, {"check_reconstruction"}),
    "sentinel_each": ("with_sentinels", sentinel_each, {"check_reconstruction", "check_rows"}),
    "even_parts": ("segmentation", even_parts, {"check_masks", "check_cuts"}),
    "unlimited": ("iid_mask", unlimited, {"check_iid"}),
    "coarse": ("iid_mask", coarse, {"check_iid"}),
    "half_as_dense": ("iid_mask", half_as_dense, {"check_iid_density"}),
    "empty_parts": ("segmentation", empty_parts, {"check_masks", "check_cuts"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_spans__a_planted_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each named check fails on it."""
    where, wrong, noticing = PLANTED[name]
    monkeypatch.setattr(spans, where, wrong)
    for check in sorted(noticing):
        with pytest.raises((AssertionError, StopIteration)):
            CHECKS[check]()


def test_spans__density_0_is_the_identity() -> None:
    """No noise, no sentinel in the inputs; the targets are one sentinel, which stands for the whole text."""
    tokens_L, mask_L, inputs, targets = asked(40, 0.0, MEAN, 5)
    assert not mask_L.any()
    assert inputs == [*tokens_L.tolist(), EOS]
    assert targets == [SENTINELS[0], EOS]


def test_counts__differ_from_exact_ones_where_t5s_do() -> None:
    """Float32 goes the other way at 190 = 28.5 / 0.15, the first such length; at no planned length of `T5_LENGTHS`."""
    L = np.arange(4, 2400)
    exact = np.array([round(int(n) * Fraction("0.15")) for n in L])
    odd = L[spans.span_counts(L, DENSITY, MEAN)[0] != exact]
    assert odd[0] == 190
    assert not np.isin([tokens for tokens, _ in T5_LENGTHS.values()], odd).any()
