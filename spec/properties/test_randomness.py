# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Random numbers by address: R-CIPHER-1 to R-PERM-1. Everything to the bit."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from properties.harness import clause, draws, needs
from properties.operations import Operations
from refswitch.numbers.philox import Purpose

WORD = 0xFFFFFFFF
KNOWN_ANSWERS = (  # Random123, kat_vectors, "philox4x32 10": counter, key, words
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
INTEGERS_32, INTEGERS_64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
ENDS = st.sampled_from((0, 2**16 - 3, 2**34 - 6, 2**64 - 40))  # around a chunk of blocks, a carry into the counter's second word, the last positions
STARTS = st.builds(lambda end, more: min(end + more, 2**64 - 64), ENDS, st.integers(0, 9))


def encrypted(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Return the four words in Python's integers, after the paper's figure."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (high_0, low_0), (high_1, low_1) = divmod(0xD2511F53 * c0, 2**32), divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def word_of(seed: int, step: int, site: int, index: int) -> int:
    """Return the word of one position by the contract's own words."""
    block, lane = divmod(index, 4)
    return encrypted((block & WORD, block >> 32, site, step), (seed & WORD, seed >> 32))[lane]


@clause("R-CIPHER-1")
@draws()
def test_philox4x32__known_answers(operations: Operations) -> None:
    """Random123's vectors, one by one and as rows of one array."""
    rows = [[np.array([int(word, 16) for word in part.split()], np.uint32) for part in line] for line in KNOWN_ANSWERS]
    for counter, key, words in rows:
        assert np.array_equal(operations.philox4x32(counter, key), words)
        assert [int(word) for word in operations.philox_words(*map(np.uint64, counter), *map(np.uint64, key))] == words.tolist()
    counters, keys, words = (np.stack(column) for column in zip(*rows, strict=True))
    assert np.array_equal(operations.philox4x32(counters, keys), words)


@clause("R-CIPHER-1")
@draws(counter=st.tuples(*[INTEGERS_32] * 4), key=st.tuples(*[INTEGERS_32] * 2))
def test_philox4x32__in_integers(operations: Operations, counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    """Ten rounds by hand."""
    got = operations.philox4x32(np.array([counter, counter], np.uint32), np.array(key, np.uint32))
    assert (got.dtype, got.tolist()) == (np.uint32, [encrypted(counter, key)] * 2)


@clause("R-ADDR-1")
@needs("carry", "inside a block")
@draws(
    examples=[(7, 2**32 + 5, 3, (2**34 - 6) + 1)],
    step=INTEGERS_32,
    seed=INTEGERS_64,
    site=INTEGERS_32,
    start=STARTS,
)
def test_random_bits__is_the_word_of_its_position(operations: Operations, step: int, seed: int, site: int, start: int) -> None:
    """Position i is word i % 4 of block i // 4 under the seed, whether asked for in a range, in an array, alone or backwards."""
    index = range(start, start + 23)
    wanted = [word_of(seed, step, site, i) for i in index]
    array = np.uint64(start) + np.arange(23, dtype=np.uint64)
    operations.meets("carry", start < 2**34 < start + 23)
    operations.meets("inside a block", start % 4 > 0)
    got = operations.random_bits(seed, step, site, index)
    assert (got.dtype, got.tolist()) == (np.uint32, wanted)
    assert operations.random_bits(seed, step, site, array[::-1]).tolist() == wanted[::-1]
    assert operations.random_bits(seed, step, site, array[7:19].reshape(3, 4)).tolist() == np.reshape(wanted[7:19], (3, 4)).tolist()


@clause("R-ADDR-1")
@draws()
def test_random_bits__chunks_leave_no_seam(operations: Operations) -> None:
    """Over several chunks of blocks, from inside a block, a range is what its positions are; nothing is drawn of nothing."""
    index = range(5, 5 + 9 * 2**14)
    whole = operations.random_bits(9, 1, 2, index)
    assert np.array_equal(whole, operations.random_bits(9, 1, 2, np.arange(index.start, index.stop)))
    assert [whole[i - 5] for i in (4 * 2**14 - 1, 4 * 2**14, 8 * 2**14)] == [word_of(9, 1, 2, i) for i in (4 * 2**14 - 1, 4 * 2**14, 8 * 2**14)]
    assert operations.random_bits(9, 1, 2, range(7, 7)).shape == (0,)


@clause("R-SITE-1")
@draws(layer=st.integers(0, 2**24 - 1))
def test_site_of__no_two_collide(operations: Operations, layer: int) -> None:
    """A site is layer * 256 + purpose, within 32 bits; the purposes have their numbers for good."""
    assert [operations.site_of(layer, purpose) for purpose in Purpose] == [layer * 256 + number for number in range(1, len(Purpose) + 1)]
    assert operations.site_of(2**24 - 1, Purpose.DATA_SPANS) < 2**32


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """Draw where 13 rows are cut, and how many columns they have."""
    return (0, *sorted(draw(st.lists(st.integers(0, 13), max_size=7))), 13), draw(st.sampled_from((5, 7, 4)))


@clause("R-ADDR-2")
@needs("rank without rows")
@draws(examples=[(((0, 3, 3, 6, 13), 5), 7, 1)], cut=cuts(), seed=INTEGERS_64, step=INTEGERS_32)
def test_draws__a_shard_is_the_slice_of_the_whole(operations: Operations, cut: tuple[tuple[int, ...], int], seed: int, step: int) -> None:
    """However the rows are cut over ranks, each draws what the whole has there, and every row has its own."""
    (ends, columns), site = cut, operations.site_of(3, Purpose.HIDDEN_DROPOUT)
    shards = list(pairwise(ends))
    operations.meets("rank without rows", any(start == stop for start, stop in shards))
    for name, extra in (("uniform", ()), ("jitter", (0.01,)), ("keep_factor", (0.9,))):
        draw = getattr(operations, name)
        whole = draw(seed, step, site, (13, columns), *extra)
        parts = [draw(seed, step, site, (stop - start, columns), *extra, offset=start * columns) for start, stop in shards]
        assert np.array_equal(np.concatenate(parts), whole), name
    assert len(np.unique(operations.uniform(seed, step, site, (13, columns)))) == 13 * columns


@clause("R-ADDR-2")
@draws(seed=st.integers(0, 2**64 - 2**33), step=st.integers(0, 2**32 - 2))
def test_draws__every_part_of_the_address_counts(operations: Operations, seed: int, step: int) -> None:
    """Another seed (either word), step, layer, purpose or position has other words: of 64 two sets share one with a probability of 2^-20."""
    site = operations.site_of(3, Purpose.ROUTER_JITTER)
    here = (seed, step, site, 0)
    others = [(seed + 1, step, site, 0), (seed + 2**32, step, site, 0), (seed, step + 1, site, 0), (seed, step, site + 256, 0)]
    others += [(seed, step, site + 1, 0), (seed, step, site, 64)]
    sets = [set(operations.random_bits(*address, range(start, start + 64)).tolist()) for *address, start in (here, *others)]
    assert sum(len(a & b) for i, a in enumerate(sets) for b in sets[:i]) <= 1
    assert np.array_equal(operations.random_bits(seed, step, site, range(64)), operations.random_bits(seed, step, site, range(64)))


@clause("R-UNIFORM-1")
@draws(words=st.lists(INTEGERS_32 | st.sampled_from((0, 0xFF, 0x100, WORD)), min_size=1, max_size=30), seed=INTEGERS_64)
def test_uniform__is_24_bits_of_a_word(operations: Operations, words: list[int], seed: int) -> None:
    """(w >> 8) 2^-24 in float32, exact, below 1; the tensor has the words of its positions."""
    array = np.array(words, np.uint32)
    got = operations.uniform_of(array)
    assert got.dtype == np.float32
    assert [Fraction(float(value)) for value in got] == [Fraction(word >> 8, 2**24) for word in words]
    assert operations.fraction_of(array).tolist() == [word >> 8 for word in words]
    assert np.array_equal(
        operations.uniform(seed, 1, 2, (3, 5), 7), operations.uniform_of(operations.random_bits(seed, 1, 2, range(7, 22))).reshape(3, 5)
    )


@clause("R-JITTER-1")
@draws(
    words=st.lists(INTEGERS_32 | st.sampled_from((0, 1 << 31, WORD)), min_size=1, max_size=30),
    eps=st.sampled_from((0.01, 0.0, 1.0, 2.0**-7, 0.3)),
    seed=INTEGERS_64,
)
def test_jitter__is_the_exact_value_rounded(operations: Operations, words: list[int], eps: float, seed: int) -> None:
    """1 + eps (2 u - 1) with eps as the nearest float32, in rational numbers, rounded to float64 and stored; within 1 - eps and 1 + eps."""
    stored = Fraction(float(np.float32(eps)))
    array = np.concatenate([np.array(words, np.uint32), operations.random_bits(seed, 1, 2, range(200))])
    wanted = [np.float32(float(1 + stored * (Fraction(word >> 8, 2**23) - 1))) for word in array.tolist()]
    got = operations.jitter_of(array, eps)
    assert (got.dtype, got.tolist()) == (np.float32, [float(value) for value in wanted])
    assert np.all(np.abs(got.astype(np.float64) - 1.0) <= float(np.float32(eps)) + 2.0**-24)
    assert np.array_equal(
        operations.jitter(seed, 1, 2, (3, 5), eps, 7), operations.jitter_of(operations.random_bits(seed, 1, 2, range(7, 22)), eps).reshape(3, 5)
    )


@clause("R-KEEP-1")
@needs("between two uniforms")
@draws(keep_prob=st.sampled_from((0.9, 0.6, 0.5, 2.0**-24, 1.0, 0.75)) | st.floats(2.0**-24, 1.0), seed=INTEGERS_64)
def test_keep_factor__keeps_what_lies_below(operations: Operations, keep_prob: float, seed: int) -> None:
    """1 / keep_prob where the uniform lies below keep_prob itself, not the float32 beside it, else 0: as rational numbers, at the edge too."""
    edge = math.ceil(Fraction(keep_prob) * 2**24)
    at_edge = np.array([min(k, 2**24 - 1) << 8 | low for k in (0, edge - 1, edge, 2**24 - 1) for low in (0, 0xFF)], np.uint32)
    words = np.concatenate([operations.random_bits(seed, 1, 2, range(40)), at_edge])
    operations.meets("between two uniforms", Fraction(keep_prob) * 2**24 % 1 != 0)
    scale = float(np.float32(1.0 / keep_prob))
    got = operations.keep_factor_of(words, keep_prob)
    assert got.dtype == np.float32
    assert got.tolist() == [scale if Fraction(int(word) >> 8, 2**24) < Fraction(keep_prob) else 0.0 for word in words]
    drawn = operations.keep_factor(seed, 1, 2, (5, 8), keep_prob)
    assert np.array_equal(drawn.reshape(-1), got[:40])


@clause("R-PERM-1")
@draws(seed=INTEGERS_64, ties=st.lists(st.integers(0, 3), min_size=20, max_size=60))
def test_permutation__sorts_the_words(operations: Operations, seed: int, ties: list[int]) -> None:
    """Each position once, in the order of the words, equal ones by position; groups draw apart, each as a whole."""
    words = operations.random_bits(seed, 1, 2, range(50, 100))
    order = operations.permutation(seed, 1, 2, 50, 50)
    assert order.tolist() == sorted(range(50), key=lambda i: (words[i], i))
    assert operations.permutation_of(np.array([ties, ties[::-1]], np.uint32)).tolist() == [
        sorted(range(len(row)), key=lambda i, row=row: (row[i], i)) for row in (ties, ties[::-1])
    ]
    assert not np.array_equal(order, operations.permutation(seed, 1, 2, 50, 0))
