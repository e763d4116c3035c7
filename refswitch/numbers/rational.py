# May import: standard library.
"""Exact rationals, and certified enclosures of what is not rational: exp, log, tanh, the logistic function, the normal distribution, erf.

A number is an `Interval` of two `Fraction`s that contains it. A rational number is a point, an interval of width 0, and sums, differences,
products and quotients of points are points: nothing is rounded. Everything else is rounded outward, to dyadic ends of `bits` significant bits and
nothing finer than 2**-FINEST, so that sizes stay bounded. No float takes part. The elementary functions are summed in integers, a lower sum with
every step rounded down beside an upper sum with every step rounded up; each function says what bounds the rest of its series. A result contains
the true value whatever `bits` is: more bits make it narrower, not truer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from math import isqrt
from typing import NamedTuple

FINEST = 4096  # exponent of the finest dyadic grid: what is smaller becomes [0, 2**-FINEST]
GUARD = 24  # bits beside those that are asked for: a sum of n terms, rounded downward at each, loses log2(n) of them
HALVINGS = 8  # exp is summed for arguments up to 2**-8


class Interval(NamedTuple):
    """A number known to lie between two rationals, both included."""

    low: Fraction
    high: Fraction


def point(x: Fraction | float | str) -> Interval:
    """Return the interval of width 0 at x; a float is the dyadic rational that it stores."""
    exactly = Fraction(x)
    return Interval(exactly, exactly)


ZERO, ONE = point(0), point(1)


def is_point(a: Interval) -> bool:
    """Whether the number is known exactly."""
    return a.low == a.high


def _down(x: Fraction, bits: int) -> Fraction:
    """Return the largest q / 2**shift that is at most x, for the shift that leaves q about `bits` bits."""
    n, d = x.numerator, x.denominator
    shift = min(bits - n.bit_length() + d.bit_length(), FINEST)
    if shift <= 0:
        return Fraction((n // (d << -shift)) << -shift)
    return Fraction((n << shift) // d, 1 << shift)


def outward(low: Fraction, high: Fraction, bits: int) -> Interval:
    """Return the smallest interval with dyadic ends of about `bits` bits that contains [low, high]; a point stays what it is."""
    return Interval(low, high) if low == high else Interval(_down(low, bits), -_down(-high, bits))


def add(a: Interval, b: Interval, bits: int) -> Interval:
    """Return a + b."""
    return outward(a.low + b.low, a.high + b.high, bits)


def neg(a: Interval) -> Interval:
    """Return -a."""
    return Interval(-a.high, -a.low)


def sub(a: Interval, b: Interval, bits: int) -> Interval:
    """Return a - b."""
    return outward(a.low - b.high, a.high - b.low, bits)


def mul(a: Interval, b: Interval, bits: int) -> Interval:
    """Return a * b: a product is monotone in each factor, so its extremes lie among the four corners."""
    if a.low == a.high:
        a, b = b, a
    if b.low == b.high:
        ends = (a.low * b.low, a.high * b.low)
        return outward(min(ends), max(ends), bits)
    if a.low >= 0 and b.low >= 0:
        return outward(a.low * b.low, a.high * b.high, bits)
    corners = (a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high)
    return outward(min(corners), max(corners), bits)


def div(a: Interval, b: Interval, bits: int) -> Interval:
    """Return a / b.

    Raises
    ------
    ZeroDivisionError
        If b may be 0.
    """
    if b.low <= 0 <= b.high:
        raise ZeroDivisionError("division by an interval that contains 0")
    return mul(a, Interval(1 / b.high, 1 / b.low), bits)


def _on_ends(function: Callable[[Fraction, int], Interval], x: Interval, bits: int) -> Interval:
    """Return the image of an interval under an increasing function that is enclosed at rationals."""
    low = function(x.low, bits)
    high = low if x.low == x.high else function(x.high, bits)
    return outward(low.low, high.high, bits)


def _scaled(x: Fraction, w: int) -> tuple[int, int]:
    """Return floor and ceiling of x * 2**w."""
    n, d = x.numerator << w, x.denominator
    return n // d, -(-n // d)


def _extra(x: Fraction) -> int:
    """Return the bits by which |x| < 1 is small: an absolute error must be smaller by as many to be small against x."""
    return max(0, x.denominator.bit_length() - x.numerator.bit_length())


# -------------------------------------------------------------------------------------------------------------- exponential


def _exp_of_positive(q: Fraction, bits: int) -> Interval:
    """Enclose e**q, q > 0, as (e**r)**(2**k) with r = q / 2**k.

    k is such that r <= 2**-HALVINGS. The sum of r**j / j! for j <= n is below e**r; the rest is at most r**n / n!, since r**(n+i) / (n+i)! <=
    r**n / n! * r**i and the sum of r**i over i >= 1 is below 1. Each of the k squarings is monotone, and is rounded down for the lower end and up
    for the upper one. It doubles the relative width, which the k bits more of `w` make good.
    """
    k = max(0, q.numerator.bit_length() - q.denominator.bit_length() + 1) + HALVINGS
    w = bits + k + GUARD
    r_low, r_high = _scaled(q / (1 << k), w)
    low = high = low_term = high_term = 1 << w
    n = 0
    while high_term > 1:
        n += 1
        low_term = low_term * r_low // (n << w)
        high_term = -(-high_term * r_high // (n << w))
        low, high = low + low_term, high + high_term
    high += high_term
    for _ in range(k):
        low, high = low * low >> w, -(-high * high >> w)
    return Interval(Fraction(low, 1 << w), Fraction(high, 1 << w))


def _exp(q: Fraction, bits: int) -> Interval:
    """Enclose e**q; e**-q <= 2**-FINEST for q >= FINEST, because e > 2."""
    if q == 0:
        return ONE
    if q <= -FINEST:
        return Interval(Fraction(0), Fraction(1, 1 << FINEST))
    if q >= FINEST:
        raise OverflowError(f"exp of {float(q):g} is outside of what is enclosed")
    if q > 0:
        return _exp_of_positive(q, bits)
    inverse = _exp_of_positive(-q, bits)
    return Interval(1 / inverse.high, 1 / inverse.low)


def exp(x: Interval, bits: int) -> Interval:
    """Enclose e**x.

    Raises
    ------
    OverflowError
        If x may exceed FINEST.
    """
    return _on_ends(_exp, x, bits)


def _logistic(q: Fraction, bits: int) -> Interval:
    """Enclose 1 / (1 + e**-q), by the exponential that does not overflow; t / (1 + t) and 1 / (1 + t) are monotone in t."""
    t = _exp(-abs(q), bits + 2)
    if q < 0:
        return Interval(t.low / (1 + t.low), t.high / (1 + t.high))
    return Interval(1 / (1 + t.high), 1 / (1 + t.low))


def logistic(x: Interval, bits: int) -> Interval:
    """Enclose 1 / (1 + e**-x)."""
    return _on_ends(_logistic, x, bits)


def _tanh(q: Fraction, bits: int) -> Interval:
    """Enclose tanh(q) = (1 - t) / (1 + t) with t = e**(-2 q), decreasing in t, for q > 0; the function is odd."""
    if q == 0:
        return ZERO
    if q < 0:
        return neg(_tanh(-q, bits))
    t = _exp(-2 * q, bits + GUARD + _extra(q))
    return Interval((1 - t.high) / (1 + t.high), (1 - t.low) / (1 + t.low))


def tanh(x: Interval, bits: int) -> Interval:
    """Enclose tanh(x)."""
    return _on_ends(_tanh, x, bits)


# ---------------------------------------------------------------------------------------------------------------- logarithm


def _atanh(t: Fraction, bits: int) -> Interval:
    """Enclose atanh(t), 0 <= t <= 1/3: the sum of t**(2j+1) / (2j+1).

    Each power is at most 1/9 of the one before, so what follows the term of j is at most t**(2j+1) / (2j+1) * (1/9 + 1/81 + ...), an eighth of it.
    """
    w = bits + GUARD + _extra(t)
    low_power, high_power = _scaled(t, w)
    t_low, t_high = _scaled(t * t, w)
    low = high = 0
    n, high_term = 1, high_power
    while True:
        high_term = -(-high_power // n)
        low, high = low + low_power // n, high + high_term
        if high_term <= 1:
            break
        low_power, high_power = low_power * t_low >> w, -(-high_power * t_high >> w)
        n += 2
    return Interval(Fraction(low, 1 << w), Fraction(high + high_term, 1 << w))


@functools.cache
def log_2(bits: int) -> Interval:
    """Enclose log(2) = 2 atanh(1/3)."""
    third = _atanh(Fraction(1, 3), bits + 1)
    return outward(2 * third.low, 2 * third.high, bits + 1)


def _log(q: Fraction, bits: int) -> Interval:
    """Enclose log(q), q > 0, as 2 atanh((m - 1) / (m + 1)) + k log(2), with q = m 2**k and m in [2/3, 4/3], so that |t| <= 1/5."""
    if q == 1:
        return ZERO
    k = q.numerator.bit_length() - q.denominator.bit_length()
    k += 1 if 3 * q > 4 * Fraction(2) ** k else -1 if 3 * q < 2 * Fraction(2) ** k else 0
    m = q / Fraction(2) ** k
    t = (m - 1) / (m + 1)
    part = _atanh(abs(t), bits + GUARD)
    if t < 0:
        part = neg(part)
    two = mul(point(k), log_2(bits + GUARD + abs(k).bit_length()), bits + GUARD)
    return Interval(2 * part.low + two.low, 2 * part.high + two.high)


def log(x: Interval, bits: int) -> Interval:
    """Enclose log(x).

    Raises
    ------
    ValueError
        If x may be 0 or negative.
    """
    if x.low <= 0:
        raise ValueError("log of an interval that is not positive")
    return _on_ends(_log, x, bits)


# --------------------------------------------------------------------------------------------------------------- the normal


@functools.cache
def pi(bits: int) -> Interval:
    """Enclose pi = 16 atan(1/5) - 4 atan(1/239) (Machin); atan(1/n) is the alternating sum of n**-(2j+1) / (2j+1).

    In integers a power is short by less than 2 (each division loses less than 1, and what was lost before is divided by 25 at least), a term by
    less than 2, and the first term that is left out, which bounds all that follow, is less than 3.
    """

    def atan_of_inverse(n: int) -> Interval:
        w = bits + GUARD
        total, power, j = 0, (1 << w) // n, 0
        while power > 0:
            total += (-1) ** j * (power // (2 * j + 1))
            power //= n * n
            j += 1
        error = 2 * j + 3
        return Interval(Fraction(total - error, 1 << w), Fraction(total + error, 1 << w))

    large, small = atan_of_inverse(5), atan_of_inverse(239)
    return outward(16 * large.low - 4 * small.high, 16 * large.high - 4 * small.low, bits)


def _sqrt(q: Fraction, bits: int) -> Interval:
    """Enclose the square root of q > 0: the integer square root of floor(q 4**w) is at most sqrt(q) 2**w, its successor above it."""
    w = bits + GUARD + _extra(q)
    root = isqrt(_scaled(q, 2 * w)[0])
    return Interval(Fraction(root, 1 << w), Fraction(root + 1, 1 << w))


def sqrt(x: Interval, bits: int) -> Interval:
    """Enclose the square root of x > 0."""
    return _on_ends(_sqrt, x, bits)


def _odd_factorial_series(y: Fraction, bits: int) -> Interval:
    """Enclose the sum over n of y**n / (1 * 3 * 5 * ... * (2n+1)), y >= 0.

    Its terms are positive, each the one before times y / (2n + 1). The sum ends where that factor is at most 1/2 from then on, so that what follows
    is at most the last term.
    """
    w = bits + GUARD
    y_low, y_high = _scaled(y, w)
    low = high = low_term = high_term = 1 << w
    n = 0
    while high_term > 1 or 2 * y > 2 * n + 3:
        n += 1
        low_term = low_term * y_low // ((2 * n + 1) << w)
        high_term = -(-high_term * y_high // ((2 * n + 1) << w))
        low, high = low + low_term, high + high_term
    return Interval(Fraction(low, 1 << w), Fraction(high + high_term, 1 << w))


def _erf(q: Fraction, bits: int) -> Interval:
    """Enclose erf(q) = 2 / sqrt(pi) q e**(-q**2) * sum of (2 q**2)**n / (2n+1)!!, for q > 0; the function is odd.

    F(q) = e**(q**2) times the integral of e**(-t**2) over [0, q] solves F' = 1 + 2 q F, whose power series has the coefficients 2**n / (2n+1)!!.
    Far out 1 - erf(q) <= e**(-q**2) <= 2**(-q**2), since (q + t)**2 >= q**2 + t**2 under the integral.
    """
    if q == 0:
        return ZERO
    if q < 0:
        return neg(_erf(-q, bits))
    if q * q >= bits + GUARD:
        return Interval(1 - Fraction(1, 1 << (bits + GUARD)), Fraction(1))
    w = bits + GUARD
    slope = div(mul(point(2 * q), _exp(-q * q, w), w), sqrt(pi(w), w), w)
    value = mul(slope, _odd_factorial_series(2 * q * q, w), w)
    return Interval(value.low, min(value.high, Fraction(1)))


def erf(x: Interval, bits: int) -> Interval:
    """Enclose erf(x)."""
    return _on_ends(_erf, x, bits)


def normal_density(z: Interval, bits: int) -> Interval:
    """Enclose e**(-z**2 / 2) / sqrt(2 pi)."""
    w = bits + 4
    return div(exp(mul(mul(z, z, w), point(Fraction(-1, 2)), w), w), sqrt(mul(point(2), pi(w), w), w), bits)


def _normal_cdf(q: Fraction, bits: int) -> Interval:
    """Enclose the normal distribution at q, 1/2 + q density(q) * sum of q**(2n) / (2n+1)!!: the series of erf at q / sqrt(2).

    For q < 0 it is 1 minus the value at -q. Far out it differs from 1 by at most e**(-q**2 / 2).
    """
    if q < 0:
        above = _normal_cdf(-q, bits)
        return Interval(1 - above.high, 1 - above.low)
    if q * q >= 2 * (bits + GUARD):
        return Interval(1 - Fraction(1, 1 << (bits + GUARD)), Fraction(1))
    w = bits + GUARD
    half = mul(mul(point(q), normal_density(point(q), w), w), _odd_factorial_series(q * q, w), w)
    return Interval(Fraction(1, 2) + half.low, min(Fraction(1, 2) + half.high, Fraction(1)))


def normal_cdf(z: Interval, bits: int) -> Interval:
    """Enclose the probability that a standard normal number is at most z; its width is small against 1, not against a far tail."""
    return _on_ends(_normal_cdf, z, bits)
