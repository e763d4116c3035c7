# May import: standard library, numpy, scipy, refswitch.numbers, refswitch.config.
"""Tubes: values with a proven radius, and the arithmetic that carries both.

A `Tube` says: whatever an implementation of the declared profile computes here lies within `radius` of `value`, elementwise. Each
operation returns the exact result's float64 value and a radius that covers (a) the radii of its operands, (b) every rounding that
the profile allows the implementation, in any legal order, and (c) the rounding of this float64 evaluation itself.
Spec: numbers (the derivations). Source: Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import erf, ndtr

from refswitch.config import Functions, Profile
from refswitch.numbers.precision import FORMATS, Format, round_to, spacing

OWN_UNIT = 2.0**-53  # of the float64 in which values and radii are evaluated
RADIUS_SLACK = 1.0 + 2.0**-20  # radii are float64 sums of non-negative terms: relative error far below 2**-20 for fewer than 2**30 terms
GELU_CURVATURE = 0.8  # >= max |gelu''| = 2 * phi(0) = 0.7979, and >= that of the tanh form (0.7978)
SILU_CURVATURE = 0.5  # = max |silu''|, at 0
SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
CHUNK = 1 << 22  # elements of the widest temporary of the softmax box


class Tube(NamedTuple):
    """A value and the radius around it, both float64 of one shape."""

    value: np.ndarray
    radius: np.ndarray

    def at(self, index: Any) -> Tube:
        """Index value and radius alike."""
        return Tube(self.value[index], self.radius[index])


class Arithmetic(NamedTuple):
    """How one place of the layer rounds."""

    unit: float  # largest relative error of one addition of a sum; 0 where only the stored result is rounded
    element_unit: float  # of one elementwise operation: truncation is a manner of accumulators alone
    input_unit: float  # relative error of each operand of a product before it is multiplied
    tiny: float  # absolute error of one operation by underflow, flush to zero allowed
    block: int  # terms that are summed in one rounding; 1 for any order
    functions: Functions


def arithmetic_of(profile: Profile, format: Format | None = None) -> Arithmetic:
    """Return the arithmetic of the profile's products, or of `format` (the router's) with the profile's manners.

    Spec: numbers. A truncating accumulator has twice the unit of a rounding one.
    """
    accumulate, products = profile.accumulate, profile.products
    if accumulate.format == "exact":
        return Arithmetic(0.0, 0.0, 0.0, 0.0, 1, profile.functions)
    wide = max((FORMATS[accumulate.format], format or FORMATS[accumulate.format]), key=lambda candidate: candidate.precision)
    unit = wide.unit * (2.0 if accumulate.rounding == "truncate" else 1.0)
    input_unit = 0.0 if products.input == "stored" else FORMATS[products.input].unit * (2.0 if products.rounding == "truncate" else 1.0)
    block = accumulate.block if accumulate.order == "blocked" else 1
    return Arithmetic(unit, wide.unit, input_unit, wide.smallest_normal, block, profile.functions)


def gamma(n: np.ndarray | float, unit: float) -> np.ndarray:
    """Return n u / (1 - n u), infinite from n u = 1 on: the relative error of n roundings in any order."""
    product = np.asarray(n, np.float64) * unit
    return np.where(product < 1.0, product / np.where(product < 1.0, 1.0 - product, 1.0), np.inf)


def kappa(K: np.ndarray | float, arithmetic: Arithmetic) -> np.ndarray:
    """Return the relative error of an inner product of K terms against the sum of its absolute terms.

    Spec: numbers. Order-free: one rounding for the product and K - 1 for the sums, whatever the tree. Blocked: `block` terms are
    added in one rounding. `input_unit` counts twice, once for each operand.
    """
    sums = np.ceil(np.maximum(K, 1) / arithmetic.block) - (arithmetic.block == 1)
    order = gamma(sums + 1.0, arithmetic.unit)
    operands = 2.0 * arithmetic.input_unit + arithmetic.input_unit**2
    return order + (operands * (1.0 + order) if operands else 0.0) + gamma(K, OWN_UNIT)


def widen(a: Tube, extra: np.ndarray | float) -> Tube:
    """Return a with a larger radius."""
    return Tube(a.value, _up(a.radius + extra))


def exact(value: np.ndarray | float) -> Tube:
    """Return a tube around a value that is known exactly."""
    value = np.asarray(value, np.float64)
    return Tube(value, np.zeros_like(value))


def _up(radius: np.ndarray) -> np.ndarray:
    """Round a radius up; one that has become 0 * inf is vacuous."""
    return np.where(np.isnan(radius), np.inf, radius * RADIUS_SLACK)


def _is_exact(parts: Sequence[Tube], magnitude: np.ndarray, arithmetic: Arithmetic) -> bool:
    """Whether every partial sum, in any order, is an integer that the accumulator holds: then no rounding happens at all."""
    if arithmetic.unit == 0.0 or any(part.radius.any() or not (np.rint(part.value) == part.value).all() for part in parts):
        return False
    widest = max(np.max(np.abs(part.value), initial=0.0) for part in parts)
    return bool(np.max(magnitude, initial=0.0) * arithmetic.unit <= 1.0 and widest * arithmetic.input_unit <= 0.5)


def contract(subscripts: str, a: Tube, b: Tube, arithmetic: Arithmetic, terms: np.ndarray | float, plus: Sequence[Tube] = ()) -> Tube:
    """Return einsum(subscripts, a, b) plus further terms, a sum of `terms` products per element (a number, or an array that broadcasts).

    Spec: numbers. A term of `plus` (a bias) may come first, last or anywhere: an accumulator may start from it.
    """

    def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.einsum(subscripts, left, right, optimize=True)

    value = product(a.value, b.value)
    a_abs, b_abs = np.abs(a.value), np.abs(b.value)
    carried = np.zeros_like(value)
    if a.radius.any():
        carried = carried + product(a.radius, b_abs + b.radius)
    if b.radius.any():
        carried = carried + product(a_abs, b.radius)
    for term in plus:
        value, carried = value + term.value, carried + term.radius
    magnitude = product(a_abs, b_abs) + carried + sum(np.abs(term.value) for term in plus)
    if _is_exact([a, b, *plus], magnitude, arithmetic):
        return exact(value)
    count = np.asarray(terms) + len(plus)
    with np.errstate(invalid="ignore"):
        rounding = np.where(magnitude > 0.0, kappa(count, arithmetic) * magnitude, 0.0)  # 0 * inf where the bound is vacuous
    return Tube(value, _up(carried + rounding + np.where(magnitude > 0.0, count * arithmetic.tiny, 0.0)))


def multiply(a: Tube, b: Tube, arithmetic: Arithmetic) -> Tube:
    """Return a * b with one rounding; a factor that is exactly a power of two makes none.

    Where operands of products are rounded first, these are too: a combine may be done as a one-hot product.
    """
    a_abs, b_abs = np.abs(a.value), np.abs(b.value)
    carried = a.radius * (b_abs + b.radius) + a_abs * b.radius
    relative = arithmetic.element_unit + OWN_UNIT + 2.0 * arithmetic.input_unit + arithmetic.input_unit**2
    rounding = relative * (a_abs * b_abs + carried) + arithmetic.tiny
    is_free = (_is_power_of_two(a) | _is_power_of_two(b)) & (arithmetic.input_unit == 0.0)
    return Tube(a.value * b.value, _up(carried + np.where(is_free, 0.0, rounding)))


def _is_power_of_two(a: Tube) -> np.ndarray:
    """Whether an exactly known value is 1, 2, 1/2 or 0: far from over- and underflow of what it multiplies."""
    return (a.radius == 0.0) & np.isin(np.abs(a.value), (0.0, 0.5, 1.0, 2.0))


def add(a: Tube, b: Tube, arithmetic: Arithmetic) -> Tube:
    """Return a + b with one rounding."""
    value, carried = a.value + b.value, a.radius + b.radius
    return Tube(value, _up(carried + (arithmetic.element_unit + OWN_UNIT) * (np.abs(value) + carried) + arithmetic.tiny))


def scale(a: Tube, factor: np.ndarray | float, arithmetic: Arithmetic) -> Tube:
    """Return a * factor for a factor that is computed with one rounding of its own."""
    value = a.value * factor
    carried = a.radius * np.abs(factor)
    return Tube(value, _up(carried + 3.0 * (arithmetic.element_unit + OWN_UNIT) * (np.abs(value) + carried) + arithmetic.tiny))


def total(a: Tube, axis: int | tuple[int, ...], arithmetic: Arithmetic, terms: np.ndarray | float) -> Tube:
    """Return the sum over `axis` of `terms` numbers, in any order."""
    value, carried = a.value.sum(axis=axis), a.radius.sum(axis=axis)
    magnitude = np.abs(a.value).sum(axis=axis) + carried
    n = np.maximum(np.asarray(terms, np.float64) - 1.0, 0.0)
    relative = gamma(n, arithmetic.unit) + gamma(n + 1.0, OWN_UNIT) + arithmetic.input_unit  # a sum may be a product with ones
    with np.errstate(invalid="ignore"):
        rounding = np.where(magnitude > 0.0, relative * magnitude, 0.0)
    return Tube(value, _up(carried + rounding + n * arithmetic.tiny))


def where(mask: np.ndarray, a: Tube, b: Tube) -> Tube:
    """Return a where the mask is true, else b."""
    return Tube(np.where(mask, a.value, b.value), np.where(mask, a.radius, b.radius))


def hull(low: np.ndarray, high: np.ndarray) -> Tube:
    """Return the tube of the interval [low, high]."""
    same, bounded = low == high, np.isfinite(low) & np.isfinite(high)
    with np.errstate(invalid="ignore"):
        middle = np.where(bounded, 0.5 * low + 0.5 * high, np.where(np.isfinite(low), low, np.where(np.isfinite(high), high, 0.0)))
        value = np.where(same, low, middle)
        radius = np.where(same, 0.0, np.where(bounded, np.maximum(high - value, value - low), np.inf))
    return Tube(value, radius)


def store(a: Tube, format: Format) -> Tube:
    """Round to a storage format: rounding is monotone, so the interval's ends round to the ends of what may be stored.

    Spec: numbers. Below the normal range of the formats with float32's exponents a value may also be flushed to zero. Nothing is added
    for float64: its rounding is the last of the operation before.
    """
    if format.precision == FORMATS["float64"].precision:
        return a
    is_wide = a.radius > 0.0  # the ends are computed in float64: one step outward covers that rounding
    low = round_to(np.where(is_wide, np.nextafter(a.value - a.radius, -np.inf), a.value), format)
    high = round_to(np.where(is_wide, np.nextafter(a.value + a.radius, np.inf), a.value), format)
    if format.e_min == FORMATS["float32"].e_min:
        low = np.where(np.abs(low) < format.smallest_normal, np.minimum(low, 0.0), low)
        high = np.where(np.abs(high) < format.smallest_normal, np.maximum(high, 0.0), high)
    return hull(low, high)


def may_store(a: Tube, format: Format, size: np.ndarray | None = None) -> Tube:
    """Allow, without asking for it, that a value on the way is rounded to `format`; `size` bounds it where it is not the value itself."""
    if format.precision >= FORMATS["float64"].precision:
        return a
    size = np.abs(a.value) + a.radius if size is None else size
    fits = size <= format.largest
    step = np.where(fits, spacing(np.where(fits, size, 1.0), format), np.inf)
    return widen(a, np.where(size > 0.0, 0.5 * step, 0.0))


def softmax(logits: Tube, arithmetic: Arithmetic) -> Tube:
    """Return the softmax over the last axis: the exact image of the box of logits, widened by the error of evaluating it.

    Spec: S-ROUTE-2, numbers. p_e is largest where l_e is highest and all others lowest, so the image is sharp. Evaluating it with the
    maximum subtracted makes, with D_j the distance of l_j from the maximum, a relative error of 3 u D_e in the numerator (the subtraction,
    and a change of base), 3 u sum_j p_j D_j in the denominator, the error of exp in both, the sum and the division.
    """
    E = logits.value.shape[-1]
    if E == 1:
        return exact(np.where(np.isfinite(logits.value), 1.0, np.nan))  # exp(0) / exp(0)
    flat, radius = logits.value.reshape(-1, E), logits.radius.reshape(-1, E)
    parts = [_softmax_box(flat[i : i + step], radius[i : i + step]) for step in (max(1, CHUNK // (E * E)),) for i in range(0, len(flat), step)]
    shape = logits.value.shape
    value, low, high = (np.concatenate(column).reshape(shape) for column in zip(*parts, strict=True)) if parts else (logits.value,) * 3
    rho = _softmax_evaluation(logits, high, arithmetic)
    box = np.maximum(np.maximum(high - value, value - low), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(rho < 1.0, rho / (1.0 - rho), np.inf)
        evaluation = np.where(value + box > 0.0, (value + box) * relative, 0.0)  # exp of -1e9 is 0 however its argument is rounded
    return Tube(value, _up(box + evaluation + 2.0 * arithmetic.tiny))


def _softmax_evaluation(logits: Tube, p_high: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Return the relative error of evaluating each probability from stored logits."""
    E, unit = logits.value.shape[-1], arithmetic.element_unit
    distance = (logits.value + logits.radius).max(axis=-1, keepdims=True) - (logits.value - logits.radius)
    shifts = distance + np.sum(np.minimum(p_high, 1.0) * distance, axis=-1, keepdims=True)
    exp_error = 2.0 * arithmetic.functions.exp_ulp * unit
    return 3.0 * (unit + OWN_UNIT) * shifts + 2.0 * exp_error + gamma(E, arithmetic.unit) + 2.0 * unit + OWN_UNIT * (E + 16.0)


def _softmax_box(logits_TE: np.ndarray, radius_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the softmax at the centre, and its lowest and highest value over the box."""
    E = logits_TE.shape[-1]
    others = ~np.eye(E, dtype=bool)
    difference_TEE = logits_TE[:, None, :] - logits_TE[:, :, None]  # of j against e
    width_TEE = radius_TE[:, None, :] + radius_TE[:, :, None]
    with np.errstate(over="ignore"):
        ratios = [np.sum(np.exp(difference_TEE + sign * width_TEE), axis=-1, where=others) for sign in (1.0, -1.0)]
    low, high = (1.0 / (1.0 + ratio) for ratio in ratios)
    exp_TE = np.exp(logits_TE - logits_TE.max(axis=-1, keepdims=True))  # equal logits have equal probabilities, to the bit
    return exp_TE / exp_TE.sum(axis=-1, keepdims=True), low, high


def _lse(logits: np.ndarray) -> np.ndarray:
    high = logits.max(axis=-1, keepdims=True)
    return (high + np.log(np.sum(np.exp(logits - high), axis=-1, keepdims=True)))[..., 0]


def log_sum_exp(logits: Tube, arithmetic: Arithmetic) -> Tube:
    """Return log(sum(exp)) over the last axis: increasing in each argument, so that the box's corners give its image.

    Spec: S-Z-1, numbers.
    """
    E = logits.value.shape[-1]
    value = _lse(logits.value)
    box = np.maximum(_lse(logits.value + logits.radius) - value, value - _lse(logits.value - logits.radius))
    distance = (logits.value + logits.radius).max(axis=-1, keepdims=True) - (logits.value - logits.radius)
    shift = np.sum(np.exp(np.minimum(logits.value + logits.radius - (value - box)[..., None], 0.0)) * distance, axis=-1)
    functions, unit = arithmetic.functions, arithmetic.element_unit
    relative = gamma(E, arithmetic.unit) + 2.0 * functions.exp_ulp * unit + 3.0 * unit * shift
    own = OWN_UNIT * (E + 16.0 + 3.0 * shift + 8.0 * np.abs(value))
    logarithm = (2.0 * functions.log_ulp + 2.0) * unit * (np.abs(value) + math.log(max(E, 2)))
    return Tube(value, _up(box + relative + logarithm + own))


def _silu_sigmoid(z: np.ndarray) -> np.ndarray:
    return np.where(z >= 0, 1.0 / (1.0 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1.0 + np.exp(-np.abs(z))))


def _tanh_argument(z: np.ndarray) -> np.ndarray:
    return SQRT_2_OVER_PI * (z + 0.044715 * z**3)


def sigmoid(z: Tube, arithmetic: Arithmetic) -> Tube:
    """Return s = 1 / (1 + exp(-z)), whose slope is s (1 - s), at most 1/4, and moves by at most 0.0963 per unit of z."""
    value = _silu_sigmoid(z.value)
    carried = np.minimum(0.25, value * (1.0 - value) + 0.0482 * z.radius) * z.radius
    shift = 3.0 * (np.abs(z.value) + z.radius)  # a change of base rounds the argument
    evaluation = ((2.0 * arithmetic.functions.exp_ulp + 3.0 + shift) * arithmetic.element_unit + 8.0 * OWN_UNIT) * (value + carried)
    return Tube(value, _up(carried + evaluation + arithmetic.tiny))


def activate(z: Tube, activation: str, arithmetic: Arithmetic) -> Tube:
    """Return act(z).

    Spec: S-EXPERT-1, numbers. ReLU is monotone, its image is exact. For the others |f(z + b) - f(z)| <= |f'| b + max|f''| b^2 / 2, and the
    evaluation error is absolute in |z| because 1 + erf and 1 + tanh cancel for negative z.
    """
    v, r, u, functions = z.value, z.radius, arithmetic.element_unit, arithmetic.functions
    if activation == "relu":
        value = np.maximum(v, 0.0)
        return Tube(value, np.maximum(np.maximum(v + r, 0.0) - value, value - np.maximum(v - r, 0.0)))
    magnitude = np.abs(v) + r
    slope = np.abs(_slope(v, activation))
    if activation == "gelu_erf":
        value = v * ndtr(v)
        evaluation = (u * (functions.erf_ulp + 4.0) + 8.0 * OWN_UNIT) * magnitude
        curvature = GELU_CURVATURE
    elif activation == "gelu_tanh":
        value = 0.5 * v * (1.0 + np.tanh(_tanh_argument(v)))
        evaluation = (u * (functions.tanh_ulp + 5.0) + 8.0 * OWN_UNIT) * magnitude
        curvature = GELU_CURVATURE
    else:
        value = v * _silu_sigmoid(v)
        evaluation = (u * (2.0 * functions.exp_ulp + 4.0 + 3.0 * magnitude) + 8.0 * OWN_UNIT) * (np.abs(value) + 1.1 * r)
        curvature = SILU_CURVATURE
    # Underflow inside is multiplied by |z|: z / (1 + exp(-z)) is 0 where exp overflows.
    return Tube(value, _up(slope * r + 0.5 * curvature * r**2 + evaluation + arithmetic.tiny * (1.0 + magnitude)))


def _slope(v: np.ndarray, activation: str) -> np.ndarray:
    if activation == "gelu_erf":
        return 0.5 * (1.0 + erf(v / math.sqrt(2.0))) + v * np.exp(-0.5 * v**2) / math.sqrt(2.0 * math.pi)
    if activation == "gelu_tanh":
        t = np.tanh(_tanh_argument(v))
        return 0.5 * (1.0 + t) + 0.5 * v * (1.0 - t**2) * SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * v**2)
    s = _silu_sigmoid(v)
    return s * (1.0 + v * (1.0 - s))


def activation_slope(z: Tube, activation: str, arithmetic: Arithmetic) -> Tube:
    """Return act'(z).

    Spec: S-BACK-3, numbers. ReLU: 0 or 1 where the sign is certain, else anything in [0, 1], which is also the rule at z = 0.
    """
    v, r, u, functions = z.value, z.radius, arithmetic.element_unit, arithmetic.functions
    if activation == "relu":
        return hull(np.where(v - r > 0.0, 1.0, 0.0), np.where(v + r < 0.0, 0.0, 1.0))
    magnitude = np.abs(v) + r
    if activation == "gelu_erf":
        evaluation = u * (functions.erf_ulp + functions.exp_ulp + 4.0) + 16.0 * OWN_UNIT
        curvature = GELU_CURVATURE
    elif activation == "gelu_tanh":
        # 1 - t^2 cancels: its absolute error is 2 dt, times |z| sqrt(2/pi) (1 + 0.135 z^2) / 2
        amplified = 1.0 + SQRT_2_OVER_PI * magnitude * (1.0 + 0.135 * magnitude**2)
        evaluation = (u * (2.0 * functions.tanh_ulp + 6.0) + 16.0 * OWN_UNIT) * amplified
        curvature = GELU_CURVATURE
    else:
        # s (1 + z (1 - s)): an argument rounded by a change of base moves s by 3 u |z| s (1 - s), and |z| s (1 - s) < 0.23
        evaluation = (u * (2.0 * functions.exp_ulp + 5.0) + 16.0 * OWN_UNIT) * (1.0 + magnitude)
        curvature = SILU_CURVATURE
    return Tube(_slope(v, activation), _up(curvature * r + evaluation))


def ratio(got: np.ndarray, tube: Tube) -> np.ndarray:
    """Return |got - value| / radius elementwise: 0 where equal, infinite where it differs from an exact value or is not a number.

    A value that must be NaN or an infinity is compared as such.
    """
    got = np.asarray(got, np.float64)
    same = (got == tube.value) | (np.isnan(got) & np.isnan(tube.value))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        result = np.abs(got - tube.value) / tube.radius
    return np.where(same, 0.0, np.where(np.isnan(result), np.inf, result))
