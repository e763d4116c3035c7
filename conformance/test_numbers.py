# May import: standard library, numpy, pytest, numba, ml_dtypes, refswitch, the script beside this file.
"""Rounding to bfloat16, the other formats' peers, and random numbers by address.

Everything is compared bit for bit. Means are exact rational numbers whose distance from the expectation obeys Hoeffding's inequality: n independent
values in an interval of width w have P(|mean - expectation| >= t) <= 2 exp(-2 n t**2 / w**2). `hoeffding` gives the t at which that
is 2**-40; seeds are fixed, so a test that passes stays passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numba
import numpy as np
import pytest
from exhaust_bf16 import differences

from refswitch.numbers import philox
from refswitch.numbers.bfloat16 import round_bf16, round_bf16_bits, stochastic_round_bf16, stochastic_round_bf16_bits
from refswitch.numbers.philox import Purpose, site_of
from refswitch.numbers.precision import FORMATS, round_to

BF16 = FORMATS["bfloat16"]
LOW_HALVES = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
BOUNDARIES = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array(LOW_HALVES, np.uint32)).reshape(-1)
SAMPLE = np.random.Generator(np.random.PCG64(1)).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
SPECIAL = [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF, 0x00000001, 0x80008000]
WORD = 0xFFFFFFFF
N = 1 << 20  # draws of a statistic
SEED, STEP = 0x0123456789ABCDEF, 77
SITE = site_of(3, Purpose.ROUTER_JITTER)


# bfloat16


def from_bits(rule: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a rounding of float32 values from one of their bits."""
    return lambda x: np.asarray(rule(x.view(np.uint32)), np.uint32).view(np.float32)


def even(bits: np.ndarray) -> np.ndarray:
    """Round to nearest even and let NaN carry: right but for NaN."""
    return (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000


def nan_or(rule: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Return the rule with NaN as it should be."""
    return from_bits(lambda bits: np.where(bits & 0x7FFFFFFF > 0x7F800000, (bits | 0x400000) & 0xFFFF0000, rule(bits)))


WRONG_ROUNDINGS = {
    "half_up": nan_or(lambda bits: (bits + 0x8000) & 0xFFFF0000),
    "half_down": nan_or(lambda bits: (bits + 0x7FFF) & 0xFFFF0000),
    "half_to_odd": nan_or(lambda bits: (bits + 0x8000 - (bits >> 16 & 1)) & 0xFFFF0000),
    "truncation": nan_or(lambda bits: bits & 0xFFFF0000),
    "nan_carries": from_bits(even),
    "nan_becomes_infinity": from_bits(lambda bits: np.where(bits & 0x7FFFFFFF > 0x7F800000, bits & 0xFF800000, even(bits))),
    "nan_loses_its_sign": from_bits(lambda bits: np.where(bits & 0x7FFFFFFF > 0x7F800000, 0x7FC00000, even(bits))),
    "saturates": nan_or(lambda bits: np.where(even(bits) & 0x7FFFFFFF == 0x7F800000, (bits & 0x80000000) | 0x7F7F0000, even(bits))),
    "flushes_subnormals": nan_or(lambda bits: np.where(bits & 0x7F800000 == 0, bits & 0x80000000, even(bits))),
    "drops_the_sign_of_zero": nan_or(lambda bits: np.where(even(bits) == 0x80000000, 0, even(bits))),
    "leaves_low_bits": nan_or(lambda bits: even(bits) | (bits & 1)),
}


@pytest.mark.parametrize("bits", [BOUNDARIES, SAMPLE], ids=["boundaries", "sample"])
def test_round_bf16__equals_ml_dtypes(bits: np.ndarray) -> None:
    """Every upper half at, below and above each tie, and 2**20 patterns; all 2**32 are `exhaust_bf16.py`'s."""
    assert differences(round_bf16, bits) == 0


@pytest.mark.parametrize("name", WRONG_ROUNDINGS)
def test_round_bf16__comparison_notices(name: str) -> None:
    """Planted: each wrong rounding differs on the boundaries; and nearest even with NaN as it should be does not."""
    assert differences(WRONG_ROUNDINGS[name], BOUNDARIES) > 0
    assert differences(nan_or(even), BOUNDARIES) == 0


@pytest.mark.parametrize("bits", [BOUNDARIES, SAMPLE], ids=["boundaries", "sample"])
def test_round_bf16__agrees_with_round_to(bits: np.ndarray) -> None:
    """Two descriptions of one rounding: by bits, and by scaling to integers. Subnormal numbers are among the inputs."""
    number = bits[bits & 0x7FFFFFFF <= 0x7F800000].view(np.float32)
    assert np.any((np.abs(number) < BF16.smallest_normal) & (number != 0))
    want = round_to(number.astype(np.float64), BF16)
    got = round_bf16(number).astype(np.float64)
    assert np.array_equal(got.view(np.uint64), want.view(np.uint64))


def test_round_bf16_bits__equals_its_array_twin() -> None:
    """In plain Python on every 7th boundary, on NumPy scalars for the special ones, and compiled on all; no warning anywhere."""
    every = BOUNDARIES[::7]
    assert [round_bf16_bits(bits) for bits in every.tolist()] == round_bf16(every.view(np.float32)).view(np.uint32).tolist()
    assert [int(round_bf16_bits(np.uint32(bits))) for bits in SPECIAL] == [round_bf16_bits(bits) for bits in SPECIAL]
    compiled = numba.vectorize(["uint32(uint32)"])(round_bf16_bits)
    assert np.array_equal(compiled(BOUNDARIES), round_bf16(BOUNDARIES.view(np.float32)).view(np.uint32))


def test_round_bf16__keeps_shape_and_input() -> None:
    """Any shape, zero axes and none included; a transposed array; and what goes in is not written."""
    x = np.arange(15, dtype=np.float32).reshape(3, 5) + np.float32(1000.5)
    before = x.copy()
    assert np.array_equal(round_bf16(x.T), round_bf16(x).T)
    assert round_bf16(x).dtype == np.float32
    assert np.array_equal(x, before)
    assert round_bf16(np.zeros((3, 0), np.float32)).shape == (3, 0)
    assert np.isnan(round_bf16(np.array(np.nan, np.float32)))


def test_round_bf16__rejects_other_dtypes() -> None:
    """No promotion: float64 would be rounded twice, bits are not values."""
    for dtype in (np.float64, np.float16, np.uint32, ">f4"):
        with pytest.raises(TypeError, match=r"round_bf16: x has dtype .*, but should be float32"):
            round_bf16(np.zeros(3, dtype))
    x = np.zeros(3, np.float32)
    with pytest.raises(TypeError, match="random has dtype int64, but should be uint16 or uint32"):
        stochastic_round_bf16(x, np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"random has shape \(1,\), but should be \(3,\), the shape of x"):
        stochastic_round_bf16(x, np.zeros(1, np.uint32))


# stochastic rounding


def test_stochastic_round_bf16_bits__equals_its_array_twin() -> None:
    """In plain Python and compiled, on boundaries and a draw for each."""
    draws = SAMPLE[: len(BOUNDARIES)]
    want = stochastic_round_bf16(BOUNDARIES.view(np.float32), draws).view(np.uint32)
    plain = [stochastic_round_bf16_bits(bits, draw) for bits, draw in zip(BOUNDARIES[::7].tolist(), draws[::7].tolist(), strict=True)]
    assert plain == want[::7].tolist()
    compiled = numba.vectorize(["uint32(uint32, uint32)"])(stochastic_round_bf16_bits)
    assert np.array_equal(compiled(BOUNDARIES, draws), want)


# the other formats


def test_round_to__float16_equals_numpy() -> None:
    """From float64 in one rounding: float32 values of every kind, exact ties between float16 neighbours, and a hair beside them."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    finite = np.sort(halves[np.isfinite(halves)])
    ties = (finite[1:] + finite[:-1]) / 2
    values = np.concatenate([SAMPLE[SAMPLE & 0x7F800000 != 0x7F800000].view(np.float32).astype(np.float64), halves[~np.isnan(halves)]])
    values = np.concatenate([values, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), [65519.99, 65520.0, -65520.0]])
    with np.errstate(over="ignore"):
        want = values.astype(np.float16).astype(np.float64)
    assert np.array_equal(round_to(values, FORMATS["float16"]).view(np.uint64), want.view(np.uint64))


@pytest.mark.parametrize("bits", [BOUNDARIES, SAMPLE, SAMPLE & 0xFFFFF000], ids=["boundaries", "sample", "ties"])
def test_round_to__tf32_equals_bit_arithmetic(bits: np.ndarray) -> None:
    """The last 13 bits of a float32 go, to nearest even; in the third sample every second is a tie."""
    bits = bits[bits & 0x7FFFFFFF <= 0x7F800000]
    want = ((bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000).view(np.float32).astype(np.float64)
    got = round_to(bits.view(np.float32).astype(np.float64), FORMATS["tf32"])
    assert np.array_equal(got.view(np.uint64), want.view(np.uint64))


# the cipher

Cipher = Callable[[np.ndarray, np.ndarray], np.ndarray]
KNOWN_ANSWERS = [  # Random123, kat_vectors, "philox4x32 10": counter, key, words
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(text: str) -> np.ndarray:
    """Return the words of a line of known answers."""
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def unknown_answers(cipher: Cipher) -> int:
    """Count the known answers that a cipher does not give."""
    return sum(not np.array_equal(cipher(hexadecimal(counter), hexadecimal(key)), hexadecimal(words)) for counter, key, words in KNOWN_ANSWERS)


def by_hand(
    counter: np.ndarray,
    key: np.ndarray,
    rounds: int = 10,
    multipliers: tuple[int, int] = (0xD2511F53, 0xCD9E8D57),
    weyl: tuple[int, int] = (0x9E3779B9, 0xBB67AE85),
    bump_first: bool = False,
    swapped: bool = False,
) -> np.ndarray:
    """Encrypt one counter in Python integers, after the paper's figure: the peer, and with other arguments the planted bugs."""
    (c0, c1, c2, c3), (k0, k1) = counter.tolist(), key.tolist()
    for i in range(rounds):
        if i > 0 or bump_first:
            k0, k1 = (k0 + weyl[0]) % 2**32, (k1 + weyl[1]) % 2**32
        high_0, low_0 = divmod(multipliers[0] * c0, 2**32)
        high_1, low_1 = divmod(multipliers[1] * c2, 2**32)
        if swapped:
            high_0, high_1 = high_1, high_0
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
    return np.array([c0, c1, c2, c3], np.uint32)


def test_philox4x32__known_answers() -> None:
    """Random123's vectors, by the array form and by the peer in Python integers."""
    assert unknown_answers(philox.philox4x32) == 0
    assert unknown_answers(by_hand) == 0


def test_philox4x32__broadcasts_leading_axes() -> None:
    """Many counters under one key and each under its own are what they are one by one."""
    counters = SAMPLE[:60].reshape(3, 5, 4)
    keys = SAMPLE[60:90].reshape(3, 5, 2)
    own, shared = philox.philox4x32(counters, keys), philox.philox4x32(counters, keys[1, 2])
    assert own.dtype == np.uint32
    assert own.shape == (3, 5, 4)
    for i in np.ndindex(3, 5):
        assert np.array_equal(own[i], by_hand(counters[i], keys[i]))
        assert np.array_equal(shared[i], by_hand(counters[i], keys[1, 2]))


def test_philox_words__compiles_as_it_stands() -> None:
    """Under Numba, and on NumPy scalars, the known answers come out."""
    compiled = numba.njit(philox.philox_words)
    for function in (philox.philox_words, compiled):
        assert unknown_answers(lambda counter, key, f=function: np.array(f(*map(np.uint64, counter), *map(np.uint64, key)), np.uint32)) == 0


def test_philox4x32__rejects_wrong_arguments() -> None:
    """Dtype and last axis."""
    good = np.zeros(4, np.uint32)
    with pytest.raises(TypeError, match="philox4x32: counter has dtype uint64, but should be uint32"):
        philox.philox4x32(good.astype(np.uint64), good[:2])
    with pytest.raises(ValueError, match=r"philox4x32: key has shape \(4,\), but should be \(..., 2\)"):
        philox.philox4x32(good, good)


# addresses


def test_address__rejects_what_is_out_of_range() -> None:
    """Nothing wraps: a negative position or a layer too many would be somebody else's address."""
    for arguments in ((-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 2**32, 0), (0, 0, -1), (0, 0, 2**32)):
        with pytest.raises(ValueError, match=r"random_bits: (seed|step|site) is .*, but should be in \[0, 2\*\*"):
            philox.random_bits(*arguments, range(4))
    for index in (range(-1, 3), range(2**64 - 3, 2**64 + 1), np.array([3, -1])):
        with pytest.raises(ValueError, match=r"random_bits: index is .*, but should be in \[0, 2\*\*64\)"):
            philox.random_bits(0, 0, 0, index)
    with pytest.raises(TypeError, match=r"random_bits: seed is 1\.5, but should be an integer"):
        philox.random_bits(1.5, 0, 0, range(4))
    with pytest.raises(TypeError, match="random_bits: index has dtype float64, but should be an integer"):
        philox.random_bits(0, 0, 0, np.zeros(3))
    for layer in (-1, 2**24):
        with pytest.raises(ValueError, match=r"site_of: layer is .*, but should be in \[0, 2\*\*24\)"):
            site_of(layer, Purpose.SELECT)
    with pytest.raises(ValueError, match="0 is not a valid Purpose"):
        site_of(0, 0)
    with pytest.raises(TypeError, match="words has dtype uint64, but should be uint32"):
        philox.uniform_of(np.zeros(3, np.uint64))


def test_random_bits__of_nothing() -> None:
    """A rank may have no rows."""
    assert philox.random_bits(SEED, STEP, SITE, range(7, 7)).shape == (0,)
    assert philox.random_bits(SEED, STEP, SITE, np.zeros((0, 3), np.int64)).shape == (0, 3)
    assert philox.uniform(SEED, STEP, SITE, (0, 5), 35).shape == (0, 5)
    assert philox.uniform(SEED, STEP, SITE, ()) == philox.uniform(SEED, STEP, SITE, (1,))[0]


# distributions


def hoeffding(n: int, width: Fraction) -> float:
    """Return the distance that the mean of n independent values exceeds with a probability of at most 2**-40."""
    return float(width) * math.sqrt(41 * math.log(2) / (2 * n))


def exact_mean(integers: np.ndarray, scale: Fraction) -> Fraction:
    """Return the mean of scaled integers as a rational number; the sum is taken in Python, where it has no size."""
    return Fraction(sum(integers.tolist()), integers.size) * scale


def statistics(words: np.ndarray) -> dict[str, float]:
    """Return how far statistics of words lie from their expectation, in units of Hoeffding's distance: above 1 is a proof.

    Values are u - mean = (2 k - (2**24 - 1)) / 2**25 with k the upper 24 bits; products are those of words of one block, and of
    word 0 of neighbouring blocks.
    """
    centred = 2 * (words >> 8).astype(np.int64) - (2**24 - 1)
    quads = centred.reshape(-1, 4)
    variance = Fraction(2**48 - 1, 3)  # of 2 k
    scale = Fraction(1, 2**50)
    half = Fraction(1, 2)  # a product lies in [-1/4, 1/4]
    result = {"mean": float(abs(exact_mean(centred, Fraction(1, 2**25)))) / hoeffding(words.size, Fraction(1))}
    result["variance"] = float(abs(exact_mean(centred**2, scale) - variance * scale)) / hoeffding(words.size, Fraction(1, 4))
    for a, b in ((0, 1), (0, 2), (1, 3), (2, 3)):
        result[f"lanes {a}, {b}"] = float(abs(exact_mean(quads[:, a] * quads[:, b], scale))) / hoeffding(len(quads), half)
    result["next block"] = float(abs(exact_mean(quads[::2, 0] * quads[1::2, 0], scale))) / hoeffding(len(quads) // 2, half)
    for bit in range(32):
        ones = Fraction(int(np.count_nonzero(words >> bit & 1)), words.size)
        result[f"bit {bit}"] = float(abs(ones - Fraction(1, 2))) / hoeffding(words.size, Fraction(1))
    return result


def test_random_bits__statistics() -> None:
    """Mean, variance, neighbours and every bit: 39 statistics, so a good generator fails with a probability below 2**-34."""
    found = statistics(philox.random_bits(SEED, STEP, SITE, range(N)))
    assert {name: value for name, value in found.items() if value > 1} == {}


def test_random_bits__statistics_notice() -> None:
    """Planted: a counter that is not encrypted, one word for all four lanes, and a bit that is stuck."""
    words = philox.random_bits(SEED, STEP, SITE, range(N))
    planted = {
        "a counter": np.arange(N, dtype=np.uint32),
        "one lane": np.repeat(words[::4], 4),
        "a stuck bit": words | np.uint32(1 << 5),
        "a seed reused": np.tile(words[:4], N // 4),
    }
    for name, wrong in planted.items():
        assert max(statistics(wrong).values()) > 1, name


def test_uniform__lies_on_its_grid() -> None:
    """float32 in [0, 1), multiples of 2**-24; the extreme words give the extreme values."""
    u = philox.uniform(SEED, STEP, SITE, (N,))
    scaled = u.astype(np.float64) * 2**24
    assert u.dtype == np.float32
    assert np.array_equal(scaled, np.floor(scaled))
    assert u.min() >= 0.0
    assert u.max() < 1.0
    assert np.array_equal(scaled, philox.random_bits(SEED, STEP, SITE, range(N)) >> 8)
    ends = philox.uniform_of(np.array([0, 0xFF, 0x100, WORD], np.uint32))
    assert ends.tolist() == [0.0, 0.0, 2.0**-24, 1.0 - 2.0**-24]


@pytest.mark.parametrize("keep_prob", [0.9, 0.6, 0.5, 2.0**-24, 1.0])
def test_keep_factor__keeps_what_lies_below(keep_prob: float) -> None:
    """A value is kept where its uniform lies below keep_prob, compared as rational numbers, and then scaled; the share obeys Hoeffding."""
    factor = philox.keep_factor(SEED, STEP, SITE, (N,), keep_prob)
    u = philox.uniform(SEED, STEP, SITE, (N,))
    assert factor.dtype == np.float32
    assert set(factor.tolist()) <= {0.0, float(np.float32(1.0 / keep_prob))}
    kept = factor != 0
    assert kept[:1000].tolist() == [Fraction(value) < Fraction(keep_prob) for value in u[:1000].tolist()]
    probability = Fraction(math.ceil(Fraction(keep_prob) * 2**24), 2**24)
    assert abs(Fraction(int(kept.sum()), N) - probability) < hoeffding(N, Fraction(1))


def test_permutation__places_are_uniform() -> None:
    """Over 4096 groups of 5 tokens the first is each token's as often as Hoeffding says (five shares, below 2**-37)."""
    words = philox.random_bits(SEED, STEP, SITE, range(5 * 4096)).reshape(4096, 5)
    first = philox.permutation_of(words)[:, 0]
    assert philox.permutation(SEED, STEP, SITE, 5, 5 * 17)[0] == first[17]
    for token in range(5):
        assert abs(Fraction(int(np.count_nonzero(first == token)), 4096) - Fraction(1, 5)) < hoeffding(4096, Fraction(1))
