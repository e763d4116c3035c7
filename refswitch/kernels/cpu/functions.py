# May import: standard library, numpy, numba, refswitch.kernels.cpu (jit, lanes).
"""Sums, maxima and elementary functions of float32 that a compiler turns into vector instructions.

libm's exponential is scalar, ten times slower than what follows. Largest errors: `exp` EXP_ULP and `sigmoid` SIGMOID_ULP units in the last place,
`normal_cdf` NORMAL_CDF_UNITS * 2**-24; both GELUs and SiLU are z times one of these. The profiles allow more.
"""

from __future__ import annotations

import math

import numpy as np

from refswitch.kernels.cpu.jit import kernel, scalar_kernel
from refswitch.kernels.cpu.lanes import STRIDE, fma, maximum_of_turns, product_of_turns, squares_of_turns, sum_of_turns

ONE, ZERO, HALF = np.float32(1.0), np.float32(0.0), np.float32(0.5)
INFINITY = np.float32(np.inf)

EXP_ULP, SIGMOID_ULP, NORMAL_CDF_UNITS = 1.0, 3.0, 4.0

# exp(x) = 2**n * exp(r), |r| <= log(2) / 2; LN2_HIGH has 10 bits, so that n * LN2_HIGH is exact. Coefficients: Cephes, expf.c (Moshier).
LOG2_E = np.float32(math.log2(math.e))
TO_INTEGER = np.float32(1.5 * 2**23)  # adding it leaves an integer in the lower bits
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_5, EXP_4, EXP_3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
EXP_2, EXP_1, EXP_0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
LEAST = np.float32(-87.33654)  # below, the result is no normal number, and 0 is returned
LARGEST = np.float32(88.37626)  # above, 2**n is no number, and infinity is returned

# erfc(x) = t exp(-x**2 + polynomial(t)), t = 1 / (1 + x / 2), to a relative 1.2e-7 for x >= 0. Coefficients: Numerical Recipes, 6.2 (erfcc).
ERFC = tuple(
    np.float32(c)
    for c in (-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277)
)

ROOT_HALF = np.float32(math.sqrt(0.5))
INVERSE_ROOT_TWO_PI = np.float32(1.0 / math.sqrt(2.0 * math.pi))
TWO_ROOT_TWO_OVER_PI = np.float32(2.0 * math.sqrt(2.0 / math.pi))
GELU_CUBE, THREE_GELU_CUBE = np.float32(0.044715), np.float32(3 * 0.044715)
RELU, GELU_ERF, GELU_TANH, SILU = 0, 1, 2, 3
ACTIVATIONS = {"relu": RELU, "gelu_erf": GELU_ERF, "gelu_tanh": GELU_TANH, "silu": SILU}


@kernel
def total(x: np.ndarray) -> np.float32:
    """Return the sum of a row."""
    whole = x.size // STRIDE * STRIDE
    result = sum_of_turns(x, whole)
    for i in range(whole, x.size):
        result += x[i]
    return result


@kernel
def product(x: np.ndarray, y: np.ndarray) -> np.float32:
    """Return the sum of x * y of two rows."""
    whole = x.size // STRIDE * STRIDE
    result = product_of_turns(x, y, whole)
    for i in range(whole, x.size):
        result += x[i] * y[i]
    return result


@kernel
def squares(x: np.ndarray) -> np.float64:
    """Return the sum of squares of a row in float64: a square is exact there, and none overflows."""
    whole = x.size // STRIDE * STRIDE
    result = squares_of_turns(x, whole)
    for i in range(whole, x.size):
        result += np.float64(x[i]) * np.float64(x[i])
    return result


@kernel
def maximum(x: np.ndarray) -> np.float32:
    """Return the largest of a row, -inf where it is empty. A NaN may stay unseen: what is computed with the row carries it on."""
    whole = x.size // STRIDE * STRIDE
    result = maximum_of_turns(x, whole)
    for i in range(whole, x.size):
        result = x[i] if x[i] > result else result
    return result


@scalar_kernel
def _exp_inside(x: np.float32) -> np.float32:
    shifted = fma(x, LOG2_E, TO_INTEGER)
    n = shifted - TO_INTEGER
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x))
    series = fma(fma(fma(fma(fma(EXP_5, r, EXP_4), r, EXP_3), r, EXP_2), r, EXP_1), r, EXP_0)
    power = np.int32((np.float32(shifted).view(np.int32) + 127) << 23).view(np.float32)
    return (fma(series, r * r, r) + ONE) * power


@scalar_kernel
def exp(x: np.float32) -> np.float32:
    """Return exp(x): 0 for -inf, NaN for NaN."""
    result = _exp_inside(LEAST if x < LEAST else (LARGEST if x > LARGEST else x))
    return ZERO if x < LEAST else (INFINITY if x > LARGEST else result)


@scalar_kernel
def exp_of_negative(x: np.float32) -> np.float32:
    """Return exp(x) of a number that is not positive, a NaN or -inf."""
    return ZERO if x < LEAST else _exp_inside(LEAST if x < LEAST else x)


@scalar_kernel
def sigmoid(z: np.float32) -> np.float32:
    """Return 1 / (1 + exp(-z))."""
    return ONE / (ONE + exp(-z))


@scalar_kernel
def normal_cdf(z: np.float32) -> np.float32:
    """Return erfc(-z / sqrt(2)) / 2."""
    x = abs(z) * ROOT_HALF
    t = ONE / (ONE + HALF * x)
    c = ERFC
    series = ((((c[9] * t + c[8]) * t + c[7]) * t + c[6]) * t + c[5]) * t + c[4]
    series = (((series * t + c[3]) * t + c[2]) * t + c[1]) * t + c[0]
    tail = HALF * t * exp(series - x * x)
    return tail if z < ZERO else ONE - tail


@kernel
def activate(out: np.ndarray, z: np.ndarray, activation: int) -> None:
    """Write the activation of a row; out may be z. The tanh form is z sigmoid(2 a): 1 + tanh(a) cancels."""
    if activation == RELU:
        for i in range(z.size):
            out[i] = ZERO if z[i] < ZERO else z[i]
    elif activation == GELU_ERF:
        for i in range(z.size):
            out[i] = z[i] * normal_cdf(z[i])
    elif activation == GELU_TANH:
        for i in range(z.size):
            out[i] = z[i] * sigmoid(TWO_ROOT_TWO_OVER_PI * (z[i] + GELU_CUBE * (z[i] * z[i] * z[i])))
    else:
        for i in range(z.size):
            out[i] = z[i] * sigmoid(z[i])


@kernel
def activation_slope(out: np.ndarray, z: np.ndarray, activation: int) -> None:
    """Write the derivative of `activate` of a row; out may be z. With s = sigmoid(2 a), 1 - tanh(a)**2 is 4 s (1 - s)."""
    if activation == RELU:
        for i in range(z.size):
            out[i] = ONE if z[i] > ZERO else ZERO
    elif activation == GELU_ERF:
        for i in range(z.size):
            out[i] = normal_cdf(z[i]) + z[i] * INVERSE_ROOT_TWO_PI * exp(-HALF * z[i] * z[i])
    elif activation == GELU_TANH:
        for i in range(z.size):
            square = z[i] * z[i]
            s = sigmoid(TWO_ROOT_TWO_OVER_PI * (z[i] + GELU_CUBE * (square * z[i])))
            out[i] = s + z[i] * s * (ONE - s) * TWO_ROOT_TWO_OVER_PI * (ONE + THREE_GELU_CUBE * square)
    else:
        for i in range(z.size):
            s = sigmoid(z[i])
            out[i] = s * (ONE + z[i] * (ONE - s))
