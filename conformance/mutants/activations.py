# May import: numpy, the standard library.
"""The activations of the contract, each with its derivative, evaluated in the dtype of their argument."""

import math

import numpy as np

_erf = np.frompyfunc(math.erf, 1, 1)


def normal_cdf(v):
    """Return the normal distribution function."""
    scaled = v * v.dtype.type(math.sqrt(0.5))
    return (1 + _erf(scaled).astype(v.dtype)) / 2


def normal_pdf(v):
    """Return the normal density."""
    return np.exp(-v * v / 2) * v.dtype.type(1 / math.sqrt(2 * math.pi))


def tanh_inside(v):
    """Return the argument of the tanh form and its derivative."""
    c = v.dtype.type(math.sqrt(2 / math.pi))
    return c * (v + v.dtype.type(0.044715) * v * v * v), c * (1 + v.dtype.type(3 * 0.044715) * v * v)


def sigmoid(v):
    """Return the logistic function without overflow."""
    small = np.exp(-np.abs(v))
    return np.where(v >= 0, 1, small) / (1 + small)


def gelu_tanh_derivative(v):
    """Return the derivative of the tanh form."""
    inside, slope = tanh_inside(v)
    tanh = np.tanh(inside)
    return (1 + tanh) / 2 + v / 2 * (1 - tanh) * (1 + tanh) * slope


ACTIVATIONS = {
    "relu": (lambda v: np.maximum(v, 0), lambda v: (v > 0).astype(v.dtype)),
    "gelu_erf": (lambda v: v * normal_cdf(v), lambda v: normal_cdf(v) + v * normal_pdf(v)),
    "gelu_tanh": (lambda v: v / 2 * (1 + np.tanh(tanh_inside(v)[0])), gelu_tanh_derivative),
    "silu": (lambda v: v * sigmoid(v), lambda v: sigmoid(v) * (1 + v * (1 - sigmoid(v)))),
}


def activation(tape, derivative=False):
    """Look up the case's activation or its derivative."""
    return ACTIVATIONS[tape.case.get("activation")][derivative]
