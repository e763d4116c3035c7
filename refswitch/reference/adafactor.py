# May import: standard library, numpy.
"""Adafactor without momentum, with an explicit learning rate, as the paper trains.

Paper: the training regime; Shazeer and Stern (2018) for the algorithm; Mesh TensorFlow and T5X for what the expert axis is. Next: `adamw`.

Two rules say what a tensor's expert axis is. Under "mesh" it is an axis like any other: it may be factored over, and the root mean squares of
update clipping and of the parameter's scale go over all experts together. Under "t5x" it is a batch axis: each expert is a tensor of its own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

Rule = Literal["mesh", "t5x"]


class AdafactorState(NamedTuple):
    """What Adafactor remembers of one tensor; what is not in use has no elements."""

    step: int  # updates made
    v_row: np.ndarray  # running mean of grad**2 over d0, the largest axis, which its shape lacks
    v_column: np.ndarray  # running mean of grad**2 over d1, the second largest axis, which its shape lacks
    v: np.ndarray  # running mean of grad**2, where the tensor is not factored


def second_moment_decay(step: int) -> float:
    """Return beta = 1 - (step + 1)**-0.8, where step counts from 0: the first update remembers nothing."""
    return 1.0 - (step + 1) ** -0.8


def _expert_axis(shape: tuple[int, ...], expert_axis: int | None, rule: Rule) -> int | None:
    """Return the batch axis, counted from the front, or None where there is none."""
    if rule not in ("mesh", "t5x"):
        raise ValueError(f"adafactor: rule is {rule!r}, but should be 'mesh' or 't5x'")
    if expert_axis is not None and not -len(shape) <= expert_axis < len(shape):
        raise ValueError(f"adafactor: expert_axis is {expert_axis}, but the shape is {shape}")
    return expert_axis % len(shape) if expert_axis is not None and rule == "t5x" else None


def factored_axes(shape: tuple[int, ...], expert_axis: int | None = None, rule: Rule = "mesh", smallest: int = 128) -> tuple[int, int] | None:
    """Return (d0, d1), the largest and the second largest axis, or None where fewer than two axes have `smallest` elements.

    Of equal axes the first is the larger. Under "t5x" the expert axis is never one of the two.
    """
    batch = _expert_axis(shape, expert_axis, rule)
    ordered = sorted((axis for axis in range(len(shape)) if axis != batch), key=lambda axis: -shape[axis])  # stable
    if len(ordered) < 2 or shape[ordered[1]] < smallest:
        return None
    return ordered[0], ordered[1]


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def adafactor_init(shape: tuple[int, ...], expert_axis: int | None = None, rule: Rule = "mesh", smallest: int = 128) -> AdafactorState:
    """Return the state of a tensor of this shape before its first update."""
    axes = factored_axes(shape, expert_axis, rule, smallest)
    if axes is None:
        return AdafactorState(0, np.zeros(0), np.zeros(0), np.zeros(shape))
    d0, d1 = axes
    return AdafactorState(0, np.zeros(_without(shape, d0)), np.zeros(_without(shape, d1)), np.zeros(0))


def _root_mean_square(x: np.ndarray, batch: int | None) -> np.ndarray:
    """Return the root mean square over all axes but the batch axis, shaped to be multiplied with x."""
    axes = tuple(axis for axis in range(x.ndim) if axis != batch)
    return np.sqrt(np.mean(np.square(x), axis=axes, keepdims=True))


def _check(w: np.ndarray, grad: np.ndarray, state: AdafactorState, fresh: AdafactorState) -> None:
    if grad.shape != w.shape or w.size == 0:
        raise ValueError(f"adafactor_update: w has shape {w.shape} and grad {grad.shape}, but they should be equal and not empty")
    if w.dtype != np.float64 or grad.dtype != np.float64:
        raise ValueError(f"adafactor_update: w is {w.dtype} and grad {grad.dtype}, but both should be float64")
    if not (np.isfinite(w).all() and np.isfinite(grad).all()):
        raise ValueError("adafactor_update: w and grad should be finite")
    for name in ("v_row", "v_column", "v"):
        found, wanted = getattr(state, name).shape, getattr(fresh, name).shape
        if found != wanted:
            raise ValueError(f"adafactor_update: state.{name} has shape {found}, but should be {wanted} for w of shape {w.shape}")


def adafactor_update(
    w: np.ndarray,
    grad: np.ndarray,
    state: AdafactorState,
    learning_rate: float,
    expert_axis: int | None = None,
    rule: Rule = "mesh",
    smallest: int = 128,
    epsilon_square: float = 1e-30,
    epsilon_scale: float = 1e-3,
    clip: float = 1.0,
) -> tuple[np.ndarray, AdafactorState]:
    """Return the tensor and the state after one update.

    Paper: the training regime. Neither momentum nor weight decay; `epsilon_square` is added to grad**2, `epsilon_scale` is the least scale
    of the parameter, and `clip` the greatest root mean square of an update before it is scaled.
    """
    _check(w, grad, state, adafactor_init(w.shape, expert_axis, rule, smallest))
    axes = factored_axes(w.shape, expert_axis, rule, smallest)
    batch = _expert_axis(w.shape, expert_axis, rule)
    beta = second_moment_decay(state.step)
    square = np.square(grad) + epsilon_square
    if axes is None:
        v = beta * state.v + (1.0 - beta) * square
        new_state = AdafactorState(state.step + 1, state.v_row, state.v_column, v)
        step = grad / np.sqrt(v)
    else:
        d0, d1 = axes
        v_row = beta * state.v_row + (1.0 - beta) * np.mean(square, axis=d0)
        v_column = beta * state.v_column + (1.0 - beta) * np.mean(square, axis=d1)
        new_state = AdafactorState(state.step + 1, v_row, v_column, state.v)
        row, column = np.expand_dims(v_row, d0), np.expand_dims(v_column, d1)
        step = grad / np.sqrt(row / np.mean(row, axis=d1, keepdims=True)) / np.sqrt(column)
    clipped = step / np.maximum(1.0, _root_mean_square(step, batch) / clip)
    scale = np.maximum(_root_mean_square(w, batch), epsilon_scale)
    return w - learning_rate * scale * clipped, new_state
