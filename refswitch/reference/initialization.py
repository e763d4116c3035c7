# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""How parameters start: a tensor's distribution from its fans, its values by address.

A `Rule` is a family with a scale and what divides it; `sigma_of` joins it with a tensor's `Fans`; `draw` turns the words of Philox into values,
one word for each global position of the tensor, so that a rank draws its slice of the whole. A tensor's address is its number and the seed.
Paper: 2.4, the smaller initialization, and table 3: truncated normal, mean 0, sigma = sqrt(s / fan-in), s = 0.1 in place of 1.0. Sigma so shrinks
by sqrt(10), not by 10. An expert's fan-in is its own: the experts are not counted.

Exactness: the uniform family is class E. The normals go through the logarithm of libm in their tails and are promised on no other machine: what
must be equal there is shipped as data. Next: `distillation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

from refswitch.config import Recipe
from refswitch.numbers.philox import Purpose, random_bits, site_of

Family = Literal["normal", "truncated", "truncated_corrected", "uniform"]
Divisor = Literal["one", "in", "average", "in_times_head_width", "model_width"]

STANDARD = NormalDist()
TRUNCATION = 2.0  # sigmas
MASS_BELOW = STANDARD.cdf(-TRUNCATION)
MASS_INSIDE = 1.0 - 2.0 * MASS_BELOW
TRUNCATED_STD = math.sqrt(1.0 - 2.0 * TRUNCATION * STANDARD.pdf(TRUNCATION) / MASS_INSIDE)  # 0.87962566: what cutting leaves of sigma = 1
WORD_BITS = 32


@dataclass(frozen=True)
class Rule:
    """How a tensor is drawn: sigma**2 = scale / divisor."""

    family: Family
    scale: float
    divisor: Divisor


class Fans(NamedTuple):
    """The sizes that a tensor's sigma may depend on; an expert's are those of one expert."""

    into: int
    out: int
    head_width: int
    model_width: int


def rule_of(recipe: Recipe, trunc_corrected: bool) -> Rule:
    """Return the rule of a dialect's recipe.

    The scale of `normal` and `fan_dim` is a standard deviation, that of the others a variance times the fan-in. `torch_linear` is the default of
    torch's Linear, uniform up to 1 / sqrt(fan-in), a third of the variance of `uniform_fan_in`. Only a truncated normal can be corrected.
    """
    if recipe.kind == "trunc_fan_in":
        return Rule("truncated_corrected" if trunc_corrected else "truncated", recipe.scale, "in")
    if recipe.kind == "normal_fan_in":
        return Rule("normal", recipe.scale, "in")
    if recipe.kind == "normal":
        return Rule("normal", recipe.scale**2, "one")
    if recipe.kind == "fan_dim":
        return Rule("normal", recipe.scale**2, "model_width")
    return Rule("uniform", recipe.scale if recipe.kind == "uniform_fan_in" else recipe.scale / 3.0, "in")


def sigma_of(rule: Rule, fans: Fans) -> float:
    """Return sqrt(scale / divisor): the standard deviation, but of a truncated normal the one before truncation."""
    divisor = {
        "one": 1.0,
        "in": fans.into,
        "average": (fans.into + fans.out) / 2.0,
        "in_times_head_width": fans.into * fans.head_width,
        "model_width": fans.model_width,
    }[rule.divisor]
    return math.sqrt(rule.scale / divisor)


def open_fraction_of(words: np.ndarray) -> np.ndarray:
    """Return (word + 1/2) * 2**-32: float64 in the open interval (0, 1), exact, symmetric about 1/2. All 32 bits, for the normal's tails."""
    return (words + 0.5) * 2.0**-WORD_BITS


def normal_of(fraction: np.ndarray) -> np.ndarray:
    """Return the standard normal's quantiles; from words they end at 6.34 sigmas."""
    quantiles = map(STANDARD.inv_cdf, fraction.reshape(-1).tolist())
    return np.fromiter(quantiles, np.float64, fraction.size).reshape(fraction.shape)


def standard_of(words: np.ndarray, family: Family) -> np.ndarray:
    """Return values with sigma = 1; the truncated normal lies within 2 sigmas by the quantiles of what is left, so nothing is drawn twice."""
    fraction = open_fraction_of(words)
    if family == "uniform":
        return math.sqrt(3.0) * (2.0 * fraction - 1.0)
    if family == "normal":
        return normal_of(fraction)
    inside = normal_of(MASS_BELOW + MASS_INSIDE * fraction)
    return inside / TRUNCATED_STD if family == "truncated_corrected" else inside


def draw(rule: Rule, fans: Fans, seed: int, number: int, index: range | np.ndarray) -> np.ndarray:
    """Draw the values at some positions of a tensor.

    Parameters
    ----------
    rule : Rule
        The distribution.
    fans : Fans
        Of the whole tensor, also where `index` is a part of it.
    seed : int, [0, 2**64)
        The run's seed.
    number : int, [0, 2**24)
        The number of the tensor in the whole model.
    index : range, or an array of integers
        Global positions in memory order.

    Returns
    -------
    np.ndarray
        float64 of the index's shape.

    Raises
    ------
    TypeError, ValueError
        From the address, where a number is out of range.
    """
    words = random_bits(seed, 0, site_of(number, Purpose.INITIAL_WEIGHT), index)
    return sigma_of(rule, fans) * standard_of(words, rule.family)


def draw_experts(rule: Rule, fans: Fans, seed: int, number: int, experts: range, shape: tuple[int, ...], is_identical: bool) -> np.ndarray:
    """Draw the tensors of consecutive experts, or one tensor for each of them alike.

    Parameters
    ----------
    rule, fans, seed, number
        As in `draw`; the fans are one expert's.
    experts : range
        The experts that this rank holds, in steps of 1.
    shape : tuple of int
        One expert's.
    is_identical : bool
        All experts start as copies of expert 0.

    Returns
    -------
    np.ndarray
        float64 of shape (experts, *shape): rows of the whole.

    Raises
    ------
    TypeError, ValueError
        As `draw`.
    """
    size = math.prod(shape)
    if is_identical:
        one = draw(rule, fans, seed, number, range(size)).reshape(shape)
        return np.repeat(one[None], len(experts), axis=0)
    return draw(rule, fans, seed, number, range(experts.start * size, experts.stop * size)).reshape(len(experts), *shape)
