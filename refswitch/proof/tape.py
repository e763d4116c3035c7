# May import: standard library, refswitch.numbers.
"""Scalars that remember what they were made from: reverse-mode differentiation over intervals.

A `Value` is an `Interval` with a place on a `Tape`, which records for every value its parents and the slope along each, an interval too. A
constant has no place, so nothing flows into it. The chain rule is then one loop, from the last value to the first. Next: `exact_rows`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from refswitch.numbers import rational
from refswitch.numbers.rational import ONE, ZERO, Interval, point

CONSTANT = -1  # the index of a value that is on no tape


class Undecided(ValueError):
    """A comparison that the enclosures cannot decide: an exact tie that is not seen to be one, or too few bits."""


@dataclass(slots=True)
class Tape:
    """The values of one computation in the order of their making: each one's parents, with slopes."""

    bits: int
    parents: list[tuple[tuple[int, Interval], ...]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A scalar on a tape, or a constant beside it."""

    interval: Interval
    tape: Tape
    index: int = CONSTANT

    def __add__(self, other: Value | Fraction | int) -> Value:
        other = _lifted(other, self.tape)
        return node(rational.add(self.interval, other.interval, self.tape.bits), (self, ONE), (other, ONE))

    def __sub__(self, other: Value | Fraction | int) -> Value:
        other = _lifted(other, self.tape)
        return node(rational.sub(self.interval, other.interval, self.tape.bits), (self, ONE), (other, point(-1)))

    def __mul__(self, other: Value | Fraction | int) -> Value:
        other = _lifted(other, self.tape)
        return node(rational.mul(self.interval, other.interval, self.tape.bits), (self, other.interval), (other, self.interval))

    def __truediv__(self, other: Value | Fraction | int) -> Value:
        other, bits = _lifted(other, self.tape), self.tape.bits
        inverse = rational.div(ONE, other.interval, bits)
        value = rational.mul(self.interval, inverse, bits)
        return node(value, (self, inverse), (other, rational.neg(rational.mul(value, inverse, bits))))


def constant(x: Fraction | float | Interval, tape: Tape) -> Value:
    """Return a value without a gradient."""
    return Value(x if isinstance(x, Interval) else point(x), tape)


def variable(x: Fraction | float, tape: Tape) -> Value:
    """Return a value whose gradient will be asked for."""
    tape.parents.append(())
    return Value(point(x), tape, len(tape.parents) - 1)


def node(interval: Interval, *parents: tuple[Value, Interval]) -> Value:
    """Return a value made from others, with the slope along each; it is a constant where all of them are.

    The slopes are whatever the caller says they are: this is how a rule replaces the derivative of a formula.
    """
    tape = parents[0][0].tape
    traced = tuple((parent.index, slope) for parent, slope in parents if parent.index != CONSTANT)
    if not traced:
        return Value(interval, tape)
    tape.parents.append(traced)
    return Value(interval, tape, len(tape.parents) - 1)


def _lifted(x: Value | Fraction | int, tape: Tape) -> Value:
    return x if isinstance(x, Value) else constant(x, tape)


def total(values: Iterable[Value], tape: Tape) -> Value:
    """Return the sum, 0 for no values."""
    result = None
    for value in values:
        result = value if result is None else result + value
    return constant(0, tape) if result is None else result


def gradients(loss: Value) -> list[Interval]:
    """Return d(loss)/d(value) for every value on the tape, by its index."""
    tape = loss.tape
    found = [ZERO] * len(tape.parents)
    if loss.index == CONSTANT:
        return found
    found[loss.index] = ONE
    for index in range(loss.index, -1, -1):
        arrived = found[index]
        if arrived == ZERO:
            continue
        for parent, slope in tape.parents[index]:
            found[parent] = rational.add(found[parent], rational.mul(arrived, slope, tape.bits), tape.bits)
    return found


# ---------------------------------------------------------------------------------------------------- functions of one value


def exp(x: Value) -> Value:
    """Return e**x, its own slope."""
    value = rational.exp(x.interval, x.tape.bits)
    return node(value, (x, value))


def log(x: Value) -> Value:
    """Return log(x), slope 1 / x."""
    return node(rational.log(x.interval, x.tape.bits), (x, rational.div(ONE, x.interval, x.tape.bits)))


def tanh(x: Value) -> Value:
    """Return tanh(x), slope 1 - tanh(x)**2."""
    bits = x.tape.bits
    value = rational.tanh(x.interval, bits)
    return node(value, (x, rational.sub(ONE, rational.mul(value, value, bits), bits)))


def logistic(x: Value) -> Value:
    """Return s = 1 / (1 + e**-x), slope s (1 - s)."""
    bits = x.tape.bits
    value = rational.logistic(x.interval, bits)
    return node(value, (x, rational.mul(value, rational.sub(ONE, value, bits), bits)))


def normal_cdf(x: Value) -> Value:
    """Return the normal distribution at x, its slope the density."""
    return node(rational.normal_cdf(x.interval, x.tape.bits), (x, rational.normal_density(x.interval, x.tape.bits)))


def relu(x: Value) -> Value:
    """Return max(x, 0), whose slope at 0 is taken to be 0.

    Raises
    ------
    Undecided
        If the sign of x is not known.
    """
    low, high = x.interval
    if low > 0:
        return x
    if high > 0:
        raise Undecided("relu of an interval around 0")
    return constant(0, x.tape)
