# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Rounding to the formats that values are stored in: N-ROUND-1, N-ROUND-2, N-BF-1, N-BF-2, N-SR-1. Everything to the bit."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from properties.harness import clause, draws, needs
from properties.operations import Operations
from refswitch.numbers.precision import FORMATS, Format

NAMES = st.sampled_from(("bfloat16", "float16", "tf32", "float32"))
LOW_HALVES = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
BOUNDARIES = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array(LOW_HALVES, np.uint32)).reshape(-1)
SPECIAL = (0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF, 0x00000001, 0x80008000)
EVERY_DRAW = np.arange(1 << 16, dtype=np.uint32)
IS_NAN = 0x7F800000


def nearest_of(value: float, format: Format) -> float:
    """Return the nearest value of a format, ties to even, in rational numbers: the two neighbours by their integer significands."""
    exact = abs(Fraction(value))
    exponent = max(exact.numerator.bit_length() - exact.denominator.bit_length() - 1, format.e_min)
    while exact >= Fraction(2) ** (exponent + 1):
        exponent += 1
    quantum = Fraction(2) ** (exponent - format.precision + 1)
    whole, rest = divmod(exact, quantum)
    half = 2 * rest - quantum
    rounded = (whole + (half > 0 or (half == 0 and whole % 2 == 1))) * quantum
    beyond = Fraction(2) ** (format.e_max + 1)
    return np.copysign(np.inf if rounded >= beyond else float(rounded), value)


@st.composite
def near_ties(draw: st.DrawFn) -> tuple[str, float]:
    """Draw a format and a number at, or a hair beside, a value or a tie of it, in any binade, subnormal and too large ones among them."""
    name = draw(NAMES)
    format = FORMATS[name]
    exponent = draw(st.sampled_from((format.e_min - format.precision, format.e_min - 1, format.e_min, -1, 0, format.e_max)) | st.integers(-14, 15))
    halves = draw(st.integers(2**format.precision - 2, 2 ** (format.precision + 1) + 2) | st.integers(0, 5))
    value = float(np.ldexp(float(halves), exponent - format.precision))
    beside = draw(st.sampled_from((value, float(np.nextafter(value, np.inf)), float(np.nextafter(value, -np.inf)))))
    return name, beside * draw(st.sampled_from((1.0, -1.0)))


@clause("N-ROUND-1")
@needs("tie", "subnormal", "infinity", "float32")
@draws(examples=[(("float32", 1.0 + 3.0 * 2.0**-24),), (("bfloat16", 2.0**128 - 2.0**119),), (("bfloat16", 2.0**-134),)], drawn=near_ties())
def test_round_to__is_the_nearest(operations: Operations, drawn: tuple[str, float]) -> None:
    """One rounding from float64, to nearest even, by rational numbers; half a spacing beyond the largest value is infinity; the sign stays."""
    name, value = drawn
    format = FORMATS[name]
    wanted = nearest_of(value, format)
    (got,) = operations.round_to(np.array([value]), format)
    operations.meets(
        "tie", abs(Fraction(value)) != 0 and np.isfinite(wanted) and 2 * abs(Fraction(value) - Fraction(wanted)) == quantum_of(value, format)
    )
    operations.meets("subnormal", 0.0 < abs(value) < format.smallest_normal)
    operations.meets("infinity", np.isinf(wanted))
    operations.meets("float32", name == "float32")
    assert np.float64(got).view(np.uint64) == np.float64(wanted).view(np.uint64), f"{name}: {value!r} becomes {got!r}, should become {wanted!r}"
    assert bool(operations.is_stored(np.array(value), format)) == (got == value)


def quantum_of(value: float, format: Format) -> Fraction:
    """Return the distance of the values of a format around a number."""
    exact = abs(Fraction(value))
    exponent = format.e_min
    while exact >= Fraction(2) ** (exponent + 1):
        exponent += 1
    return Fraction(2) ** (exponent - format.precision + 1)


@clause("N-ROUND-1")
@draws()
def test_round_to__leaves_what_is_no_number(operations: Operations) -> None:
    """Infinities, NaN and zeros stay in every format; float64 stays as it is; shape and input too."""
    special = np.array([[np.inf, -np.inf, np.nan], [0.0, -0.0, 1.5]])
    for format in FORMATS.values():
        got = operations.round_to(special, format)
        assert np.array_equal(got, special, equal_nan=True)
        assert np.array_equal(np.signbit(got[1]), np.signbit(special[1]))
    odd = np.array([1.0 + 2.0**-52, 2.0**-1074])
    assert np.array_equal(operations.round_to(odd, FORMATS["float64"]), odd)


@clause("N-ROUND-2")
@draws(examples=[(("bfloat16", 0.0),)], drawn=near_ties())
def test_spacing__is_the_distance_of_neighbours(operations: Operations, drawn: tuple[str, float]) -> None:
    """The spacing is 2^(exponent - precision + 1), that of the smallest normal binade from there to zero; what is no number has none."""
    name, value = drawn
    (got,) = operations.spacing(np.array([value]), FORMATS[name])
    assert Fraction(float(got)) == quantum_of(value, FORMATS[name])
    assert np.isnan(operations.spacing(np.array([np.inf, np.nan]), FORMATS[name])).all()


@clause("N-ROUND-2")
@draws()
def test_is_stored__tells_the_grid(operations: Operations) -> None:
    """A value of the format is stored, the float64 beside it is not; what is no number counts as stored."""
    for name in ("bfloat16", "float16", "tf32", "float32"):
        format = FORMATS[name]
        on = np.array([1.0, format.largest, format.smallest, format.smallest_normal, 0.0, np.inf, np.nan])
        assert operations.is_stored(on, format).all()
        assert not operations.is_stored(np.nextafter(on[:4], 0.0), format).any()


def bf16_by_hand(bits: np.ndarray) -> np.ndarray:
    """Return the nearest bfloat16 by its two neighbours' distances, as bits; NaN quieted. Another way than the carry of a sum."""
    wide = bits.astype(np.int64)
    low = wide & 0xFFFF
    down = wide - low
    is_up = (low > 0x8000) | ((low == 0x8000) & (down >> 16 & 1 == 1))
    return np.where(wide & 0x7FFFFFFF > IS_NAN, down | 0x400000, down + 0x10000 * is_up).astype(np.uint32)


@clause("N-BF-1")
@draws()
def test_round_bf16__every_upper_half(operations: Operations) -> None:
    """For each of the 2^16 upper halves, at, below and above its tie: nearest, ties to even, signs, carries, infinities, NaN by class and sign."""
    x = BOUNDARIES.view(np.float32)
    got, wanted = operations.round_bf16(x).view(np.uint32), bf16_by_hand(BOUNDARIES)
    is_nan = BOUNDARIES & 0x7FFFFFFF > IS_NAN
    assert np.array_equal(got[~is_nan], wanted[~is_nan])
    assert np.isnan(got[is_nan].view(np.float32)).all()
    assert np.array_equal(got[is_nan] & 0x80400000, wanted[is_nan] & 0x80400000)
    assert not np.any(got & 0xFFFF)


@clause("N-BF-1")
@draws(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_round_bf16__any_bits(operations: Operations, bits: list[int]) -> None:
    """Any pattern; what goes in is not written, and the shape stays."""
    x = np.array(bits, np.uint32).view(np.float32).reshape(-1, 1)
    before = x.copy()
    got = operations.round_bf16(x)
    assert (got.dtype, got.shape) == (np.float32, x.shape)
    numbers = x == x
    assert np.array_equal(got[numbers].view(np.uint32), bf16_by_hand(x[numbers].view(np.uint32)))
    assert np.array_equal(x.view(np.uint32), before.view(np.uint32))


@clause("N-BF-1")
@draws()
def test_round_bf16__counters_collide_at_257(operations: Operations) -> None:
    """Of the counts 1 to 1024 half are distinct, 257 looks like 256, and a counter that is stored after every step stays at 256."""
    stored = operations.round_bf16(np.arange(1, 1025, dtype=np.float32))
    assert len(np.unique(stored)) == 512
    assert np.flatnonzero(stored[1:] == stored[:-1])[0] == 255
    count = np.zeros(1, np.float32)
    for _ in range(300):
        count = operations.round_bf16(count + np.float32(1.0))
    assert count[0] == 256.0


@clause("N-BF-2")
@draws(draw=st.integers(0, 2**32 - 1))
def test_bf16_bits__equal_their_array_twins(operations: Operations, draw: int) -> None:
    """On one number as on many: plain integers, every special pattern and every 997th boundary."""
    bits = np.array([*SPECIAL, *BOUNDARIES[::997]], np.uint32)
    x, draws_ = bits.view(np.float32), np.full(bits.shape, draw, np.uint32)
    assert [operations.round_bf16_bits(int(b)) for b in bits] == operations.round_bf16(x).view(np.uint32).tolist()
    assert [operations.stochastic_round_bf16_bits(int(b), draw) for b in bits] == operations.stochastic_round_bf16(x, draws_).view(np.uint32).tolist()


@st.composite
def uneven(draw: st.DrawFn) -> int:
    """Draw the bits of a finite number that is no bfloat16 and below the largest one."""
    return (
        draw(st.integers(0, 1)) << 31
        | draw(st.sampled_from((0, 1, 0x3F80, 0x007F, 0x7F7E)) | st.integers(0, 0x7F7E)) << 16
        | draw(st.integers(1, 0xFFFF))
    )


@clause("N-SR-1")
@draws(bits=uneven())
def test_stochastic_round_bf16__expectation_is_exact(operations: Operations, bits: int) -> None:
    """Over all 65536 draws the mean is the value, as a rational number: up for as many draws as the value lies sixteenths of a bit up the way."""
    x = np.full(1 << 16, bits, np.uint32).view(np.float32)
    got = operations.stochastic_round_bf16(x, EVERY_DRAW).view(np.uint32)
    down, up = bits & 0xFFFF0000, (bits & 0xFFFF0000) + 0x10000
    assert np.array_equal(np.unique(got), [down, up])
    assert np.count_nonzero(got == up) == bits & 0xFFFF
    assert not np.any(np.diff((got == up).astype(int)) < 0), "a greater draw does not go down where a smaller one went up"


@clause("N-SR-1")
@draws(draw=st.integers(0, 2**32 - 1))
def test_stochastic_round_bf16__the_grid_stays(operations: Operations, draw: int) -> None:
    """A bfloat16 does not move whatever is drawn, infinity included; NaN stays NaN; 16 of the draw's bits count, in either type."""
    stored = (EVERY_DRAW << 16).view(np.float32)
    draws_ = np.full(1 << 16, draw, np.uint32)
    got = operations.stochastic_round_bf16(stored, draws_)
    assert np.array_equal(got, stored, equal_nan=True)
    assert np.array_equal(got[stored == stored].view(np.uint32), stored[stored == stored].view(np.uint32))
    x = (EVERY_DRAW << 8 | 0x3F800000).view(np.float32)
    narrow = operations.stochastic_round_bf16(x, (draws_ & 0xFFFF).astype(np.uint16))
    assert np.array_equal(operations.stochastic_round_bf16(x, draws_).view(np.uint32), narrow.view(np.uint32))
    nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(operations.stochastic_round_bf16(nan, draws_[:2])).all()


@clause("N-SR-1")
@draws(seed=st.integers(0, 2**20))
def test_stochastic_round_bf16__each_by_its_own_draw(operations: Operations, seed: int) -> None:
    """Numbers and draws in another order give the results in that order: no draw serves two numbers."""
    random = np.random.Generator(np.random.Philox(seed))
    x, draws_, order = random.normal(size=60).astype(np.float32), random.integers(0, 1 << 32, 60, dtype=np.uint32), random.permutation(60)
    got = operations.stochastic_round_bf16(x, draws_)
    assert np.array_equal(operations.stochastic_round_bf16(x[order], draws_[order]), got[order])
    same = operations.stochastic_round_bf16(np.full(60, np.float32(1.0 + 2.0**-8)), draws_)  # halfway
    assert len(np.unique(same)) == 2, "sixty draws of one number go both ways"
