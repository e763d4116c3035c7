# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""How weights begin: I-RULE-1, I-DRAW-1, I-DRAW-2. Distributions are known by their quantiles, so that no statistic is needed."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from hypothesis import strategies as st

from properties.harness import clause, draws, needs
from properties.operations import Operations
from properties.refusals import refusal
from refswitch.config import Recipe
from refswitch.numbers.philox import Purpose
from refswitch.reference.initialization import TRUNCATED_STD, Fans, Rule

UNIT = 2.0**-52
WORDS = st.lists(st.integers(0, 2**32 - 1) | st.sampled_from((0, 1, 2**31 - 1, 2**31, 2**32 - 1)), min_size=1, max_size=30)
SIZES = st.integers(1, 50)
ADDRESS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**24 - 1))
INSIDE = NormalDist().cdf(2.0) - NormalDist().cdf(-2.0)  # of a normal distribution within two deviations
RULES = (Rule("normal", 0.1, "in"), Rule("truncated", 1.0, "in"), Rule("uniform", 2.0, "average"), Rule("truncated_corrected", 0.5, "one"))


@clause("I-RULE-1")
@draws(fans=st.builds(Fans, SIZES, SIZES, SIZES, SIZES), scale=st.sampled_from((0.1, 1.0, 2.0)))
def test_sigma_of__squared(operations: Operations, fans: Fans, scale: float) -> None:
    """sigma^2 divisor = scale for every divisor, within the roundings of a quotient and a root."""
    into, out, head_width, model_width = fans
    divisors = {"one": 1, "in": into, "average": Fraction(into + out, 2), "in_times_head_width": into * head_width, "model_width": model_width}
    for name, divisor in divisors.items():
        sigma = operations.sigma_of(Rule("normal", scale, name), fans)
        assert abs(Fraction(sigma) ** 2 * divisor / Fraction(scale) - 1) <= (1 + Fraction(UNIT)) ** 4 - 1, name


@clause("I-RULE-1")
@draws(scale=st.sampled_from((0.1, 1.0, 0.02)))
def test_rule_of__every_kind(operations: Operations, scale: float) -> None:
    """The scale is a variance times the fan-in, but for `normal` and `fan_dim` a deviation; only a truncated normal can be corrected."""
    for corrected in (False, True):
        wanted = {
            "trunc_fan_in": Rule("truncated_corrected" if corrected else "truncated", scale, "in"),
            "normal_fan_in": Rule("normal", scale, "in"),
            "normal": Rule("normal", scale * scale, "one"),
            "fan_dim": Rule("normal", scale * scale, "model_width"),
            "uniform_fan_in": Rule("uniform", scale, "in"),
            "torch_linear": Rule("uniform", scale / 3.0, "in"),
        }
        for kind, rule in wanted.items():
            assert operations.rule_of(Recipe(kind, scale), corrected) == rule, kind


@clause("I-DRAW-1")
@needs("a tail")
@draws(examples=[([0, 2**32 - 1, 2**31],)], words=WORDS)
def test_standard_of__is_the_quantile_of_its_word(operations: Operations, words: list[int]) -> None:
    """A word is the fraction (w + 1/2) / 2^32, and its value is where the distribution has that much below it: by the distribution function."""
    array = np.array(words, np.uint32)
    fraction = operations.open_fraction_of(array)
    operations.meets("a tail", min(words) < 2**20)
    assert [Fraction(float(value)) for value in fraction] == [Fraction(2 * word + 1, 2**33) for word in words]
    values = {family: operations.standard_of(array, family) for family in ("normal", "truncated", "truncated_corrected", "uniform")}
    assert all(value.shape == array.shape and value.dtype == np.float64 for value in values.values())
    assert np.array_equal(values["normal"], operations.normal_of(fraction))
    for i, word in enumerate(words):
        below = (word + 0.5) / 2**32
        for family, tail in (("normal", below), ("truncated", NormalDist().cdf(-2.0) + INSIDE * below)):
            z = float(values[family][i])
            near = min(tail, 1.0 - tail)  # the smaller tail, of which erfc keeps every digit
            found = 0.5 * math.erfc(abs(z) / math.sqrt(2.0))
            # 40 roundings of z move the tail by z^2 of them each, its complement loses what is rounded of 1
            assert abs(found - near) <= 64 * (40 + 64) * UNIT * near + (8 * UNIT if tail > 0.5 or family == "truncated" else 0.0)
            assert (z > 0.0) == (tail > 0.5)
        assert abs(values["uniform"][i] - math.sqrt(3.0) * (2.0 * below - 1.0)) <= 8 * UNIT
    assert np.all(np.abs(values["truncated"]) < 2.0)
    assert np.array_equal(values["truncated_corrected"], values["truncated"] / TRUNCATED_STD)


@clause("I-DRAW-1")
@draws()
def test_standard_of__has_a_deviation_of_one(operations: Operations) -> None:
    """By the midpoint rule over 2^16 evenly spread words: 1 for a normal, a uniform and a corrected truncated normal; 0.8796 for an uncorrected one.

    The rule's error for x^2 with a density that falls off is below the last cell's square, 5^2 / 2^16.
    """
    words = (np.arange(1 << 16, dtype=np.uint64) << 16 | np.uint64(1 << 15)).astype(np.uint32)
    for family, variance in (("normal", 1.0), ("uniform", 1.0), ("truncated_corrected", 1.0), ("truncated", TRUNCATED_STD**2)):
        values = operations.standard_of(words, family)
        assert abs(np.mean(values**2) - variance) <= 25.0 / 2**16, family
        assert abs(np.mean(values)) <= 25.0 / 2**16
    exact = 1.0 - 2.0 * 2.0 * math.exp(-2.0) / math.sqrt(2.0 * math.pi) / INSIDE
    assert abs(TRUNCATED_STD**2 - exact) <= 16 * UNIT


@clause("I-DRAW-2")
@draws(address=ADDRESS, rule=st.sampled_from(RULES), start=st.integers(0, 2**34), size=st.integers(0, 40))
def test_draw__scales_the_words_of_its_address(operations: Operations, address: tuple[int, int], rule: Rule, start: int, size: int) -> None:
    """The values of positions are sigma times the standard ones of the words at (seed, 0, the tensor's number, position); any slice, in any shape."""
    (seed, number), fans = address, Fans(5, 7, 3, 11)
    index = range(start, start + size)
    words = operations.random_bits(seed, 0, operations.site_of(number, Purpose.INITIAL_WEIGHT), index)
    wanted = operations.sigma_of(rule, fans) * operations.standard_of(words, rule.family)
    assert np.array_equal(operations.draw(rule, fans, seed, number, index), wanted)
    backwards = np.arange(start, start + size)[::-1].reshape(1, -1)
    assert np.array_equal(operations.draw(rule, fans, seed, number, backwards), wanted[::-1].reshape(1, -1))


@clause("I-DRAW-2")
@needs("a later share")
@draws(examples=[((7, 3), 2, 5)], address=ADDRESS, start=st.integers(0, 5), stop=st.integers(0, 6))
def test_draw_experts__a_rank_has_its_rows(operations: Operations, address: tuple[int, int], start: int, stop: int) -> None:
    """A rank's experts are the rows of the whole, no two alike; identical ones are all expert 0, on every rank."""
    (seed, number), fans, shape, rule = address, Fans(5, 7, 3, 11), (3, 2), RULES[0]
    experts = range(start, max(stop, start))
    whole = operations.draw_experts(rule, fans, seed, number, range(6), shape, False)
    operations.meets("a later share", start > 0 and len(experts) > 0)
    assert whole.shape == (6, 3, 2)
    assert np.array_equal(whole.reshape(-1), operations.draw(rule, fans, seed, number, range(36)))
    assert np.array_equal(operations.draw_experts(rule, fans, seed, number, experts, shape, False), whole[experts.start : experts.stop])
    same = operations.draw_experts(rule, fans, seed, number, experts, shape, True)
    assert same.shape == (len(experts), 3, 2)
    assert all(np.array_equal(row, whole[0]) for row in same)
    assert len(np.unique(whole)) == 36


@clause("I-DRAW-2")
@draws()
def test_draw__refuses(operations: Operations) -> None:
    """A seed or a number that is out of range: it would be another tensor's address."""
    for seed, number in ((-1, 0), (2**64, 0), (0, -1), (0, 2**24)):
        assert "should be in" in refusal(lambda s=seed, n=number: operations.draw(RULES[0], Fans(1, 1, 1, 1), s, n, range(4)))
