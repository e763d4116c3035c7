# May import: standard library, numpy, refswitch.config, refswitch.errors, refswitch.kernels.cpu (bfloat16, experts, functions).
"""What the Switch kernels compute, and their arguments as they want them: checked, contiguous, matrices. Next: `switch`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refswitch.config import Dialect, RoundingPoints
from refswitch.errors import InputError
from refswitch.kernels.cpu.bfloat16 import is_narrow
from refswitch.kernels.cpu.experts import Experts, Form
from refswitch.kernels.cpu.functions import ACTIVATIONS

NOTHING = np.empty((0, 0), np.float32)  # a factor of 1, a term of 0, a bias that is not there


def refuse(dialect: Dialect, points: RoundingPoints) -> None:
    """Name the first knob that the kernels do not have.

    Raises
    ------
    InputError
        If there is one: the backend `reference` computes every dialect.
    """
    able = {
        "router.logit_cap": dialect.router.logit_cap == 0.0,
        "noise.gate_from": dialect.noise.kind == "none" or dialect.noise.gate_from == "noisy",
        "select.rule": dialect.select.rule == "argmax",
        "gate.value": dialect.gate.value == "p",
        "gate.site": dialect.gate.site == "output",
        "drop.output": dialect.drop.output == "zero",
        "pad.route": dialect.pad.route != "expert0_weight0",
        "pad.detect": dialect.pad.detect == "mask",
        "aux.form": dialect.aux.form == "product",
        "aux.f.count": dialect.aux.f.count == "choice",
        "aux.dtype": dialect.aux.dtype == "f32" or not is_narrow(points.x),
        "z.pads": dialect.z.pads != "zero_logits",
        "dispatch_grad": dialect.dispatch_grad == "none",
    }
    for knob, is_able in able.items():
        if not is_able:
            raise InputError(f"the cpu backend does not compute this dialect's {knob}; the backend reference does")
    if is_narrow(points.positions):
        raise InputError("the cpu backend counts slots in integers; the backend reference counts them in bfloat16 too")


def matrix(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array as C-contiguous float32 of its last axis and the others together."""
    if array.dtype != np.float32 or array.shape != shape:
        raise InputError(f"switch_forward: {name} is {array.dtype} of shape {array.shape}, but should be float32 of shape {shape}")
    return np.ascontiguousarray(array).reshape(math.prod(shape[:-1]), shape[-1])


def optional(name: str, array: np.ndarray, shape: tuple[int, ...], neutral: float) -> np.ndarray:
    """Return the array as a matrix, without elements where it is one neutral element for all."""
    is_neutral = array.size == 1 and (math.prod(shape) != 1 or array.item() == neutral)
    return NOTHING if is_neutral else matrix(name, array, shape)


def experts_of(experts: Any, E: int, D: int, F: int) -> Experts:
    """Return the parameters, checked; an absent gate has no elements."""
    shapes = {"w_in_EDF": (E, D, F), "w_gate_EDF": (E, D, F), "w_out_EFD": (E, F, D), "b_in_EF": (E, F), "b_gate_EF": (E, F), "b_out_ED": (E, D)}
    given = {name: getattr(experts, name) for name in shapes}
    arrays = {
        name: matrix(name, array, shapes[name]).reshape(shapes[name]) if array is not None else np.empty((E, 0, 0), np.float32)
        for name, array in given.items()
    }
    return Experts(**arrays)


def form_of(dialect: Dialect, points: RoundingPoints, activation: str, is_gated: bool) -> Form:
    """Return the numbers that say what the experts compute and where it is rounded."""
    stored = (points.z, points.hidden, points.expert_out, points.out, points.gradients)
    return Form(ACTIVATIONS[activation], is_gated, dialect.expert.bias == "per_expert", *(is_narrow(format) for format in stored))


def order_of(priority: str, gate_GS: np.ndarray, given_GS: np.ndarray) -> np.ndarray:
    """Return each group's positions in the order in which they are served, without elements where that is the order of arrival."""
    if priority not in ("gate_desc", "random"):
        return np.empty((0, 0), np.int64)
    if priority == "random" and given_GS.shape != gate_GS.shape:
        raise InputError(f"switch_forward: priority_GS has shape {given_GS.shape}, but should be {gate_GS.shape}")
    return np.argsort(given_GS if priority == "random" else -gate_GS, axis=-1, kind="stable")
