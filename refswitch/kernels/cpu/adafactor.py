# May import: standard library, numpy, numba, refswitch.errors, refswitch.kernels.cpu (functions, jit, workspace).
"""Adafactor without momentum, with an explicit learning rate, as the paper trains; the tensor is updated in place.

Paper: the training regime; Shazeer and Stern (2018). Both rules of the expert axis are as in the reference. Bound by memory: three passes, 24 bytes
per parameter. (1) Squares of the gradient, summed along both factored axes, and of the tensor; (2) squares of the step, whose root mean square clips
it; (3) the update. Sums are in float64, by task and then over the tasks in order. Nothing is written before all is known to be finite.
A tensor is seen as O matrices of I rows and J columns, J contiguous: the factored axes are I and J. Next: `adamw`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from refswitch.errors import InputError
from refswitch.kernels.cpu.functions import squares
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.workspace import Workspace

VALUES = 1 << 15  # of a task
MEASURE, STEP, UPDATE = 0, 1, 2
LARGEST = float(np.finfo(np.float32).max)


class Layout(NamedTuple):
    """How the flat tensor is cut: matrices, rows, columns, their strides, and the rows of a task."""

    O: int  # noqa: E741
    I: int  # noqa: E741
    J: int
    stride_O: int
    stride_I: int
    rows: int
    blocks: int  # tasks of one matrix


@kernel
def measure_task(
    columns_J: np.ndarray, rows_I: np.ndarray, w: np.ndarray, grad: np.ndarray, first: int, last: int, base: int, layout: Layout
) -> float:
    """Write the squares of the gradient, summed over the task's rows and over each row's columns; return the sum of squares of the tensor."""
    for j in range(layout.J):
        columns_J[j] = 0.0
    of_w = 0.0
    for i in range(first, last):
        here = base + i * layout.stride_I
        grad_J = grad[here : here + layout.J]
        rows_I[i] = squares(grad_J)
        for j in range(layout.J):
            columns_J[j] += np.float64(grad_J[j]) * np.float64(grad_J[j])
        of_w += squares(w[here : here + layout.J])
    return of_w


@kernel
def step_task(grad: np.ndarray, row_I: np.ndarray, column_J: np.ndarray, first: int, last: int, base: int, layout: Layout) -> float:
    """Return the sum of squares of the step."""
    step_J = np.empty(layout.J, np.float32)
    total = 0.0
    for i in range(first, last):
        here = base + i * layout.stride_I
        grad_J = grad[here : here + layout.J]
        factor = row_I[i]
        for j in range(layout.J):
            step_J[j] = grad_J[j] * factor * column_J[j]
        total += squares(step_J)
    return total


@kernel
def update_task(
    w: np.ndarray, grad: np.ndarray, row_I: np.ndarray, column_J: np.ndarray, rate: np.float32, first: int, last: int, base: int, layout: Layout
) -> None:
    """Subtract the step."""
    for i in range(first, last):
        here = base + i * layout.stride_I
        w_J, grad_J = w[here : here + layout.J], grad[here : here + layout.J]
        factor = row_I[i]
        for j in range(layout.J):
            w_J[j] -= rate * (grad_J[j] * factor * column_J[j])


@parallel_kernel
def factored_kernel(
    of_w_P: np.ndarray,
    of_step_P: np.ndarray,
    rows_OI: np.ndarray,
    columns_PJ: np.ndarray,
    w: np.ndarray,
    grad: np.ndarray,
    row_OI: np.ndarray,
    column_OJ: np.ndarray,
    rate_O: np.ndarray,
    layout: Layout,
    stage: int,
) -> None:
    """Do one of the three passes over a factored tensor. Task p owns `layout.rows` rows of one matrix and element p of the sums.

    8, 4 and 12 bytes moved per value; sums of one task run in the order of memory.
    """
    for p in prange(of_w_P.size):
        o, first = p // layout.blocks, p % layout.blocks * layout.rows
        last, base = min(first + layout.rows, layout.I), o * layout.stride_O
        if stage == MEASURE:
            of_w_P[p] = measure_task(columns_PJ[p], rows_OI[o], w, grad, first, last, base, layout)
        elif stage == STEP:
            of_step_P[p] = step_task(grad, row_OI[o], column_OJ[o], first, last, base, layout)
        else:
            update_task(w, grad, row_OI[o], column_OJ[o], rate_O[o], first, last, base, layout)


@kernel
def whole_step(v: np.ndarray, grad: np.ndarray, beta: np.float32, rest: np.float32, epsilon: np.float32) -> float:
    """Update the second moments of a task; return the sum of squares of the step."""
    for i in range(v.size):
        v[i] = beta * v[i] + rest * (grad[i] * grad[i] + epsilon)
    step = np.empty(v.size, np.float32)
    for i in range(v.size):
        step[i] = grad[i] / np.sqrt(v[i])
    return squares(step)


@kernel
def whole_update(w: np.ndarray, grad: np.ndarray, v: np.ndarray, rate: np.float32) -> None:
    """Subtract the step."""
    for i in range(w.size):
        w[i] -= rate * (grad[i] / np.sqrt(v[i]))


@parallel_kernel
def whole_kernel(
    of_w_P: np.ndarray,
    of_grad_P: np.ndarray,
    v: np.ndarray,
    w: np.ndarray,
    grad: np.ndarray,
    rate_O: np.ndarray,
    layout: Layout,
    stage: int,
    beta: np.float32,
    rest: np.float32,
    epsilon: np.float32,
) -> None:
    """Do one of the three passes over a tensor that is not factored. Task p owns a part of one of O rows; 8, 12 and 16 bytes moved per value."""
    for p in prange(of_w_P.size):
        o, first = p // layout.blocks, p % layout.blocks * VALUES
        part = slice(o * layout.J + first, o * layout.J + min(first + VALUES, layout.J))
        if stage == MEASURE:
            of_w_P[p], of_grad_P[p] = squares(w[part]), squares(grad[part])
        elif stage == STEP:
            of_grad_P[p] = whole_step(v[part], grad[part], beta, rest, epsilon)
        else:
            whole_update(w[part], grad[part], v[part], rate_O[o])


def second_moment_decay(step: int) -> float:
    """Return beta = 1 - (step + 1)**-0.8, where step counts from 0."""
    return 1.0 - (step + 1) ** -0.8


def factored_axes(shape: tuple[int, ...], batch: int | None, smallest: int) -> tuple[int, int] | None:
    """Return (d0, d1), the largest and the second largest axis but for the batch axis, or None where fewer than two have `smallest` elements."""
    ordered = sorted(
        (axis for axis in range(len(shape)) if axis != batch), key=lambda axis: -shape[axis]
    )  # stable: of equal axes the first is larger
    return None if len(ordered) < 2 or shape[ordered[1]] < smallest else (ordered[0], ordered[1])


def _checked(w: np.ndarray, grad: np.ndarray, state: Any, axes: tuple[int, int] | None) -> None:
    """Refuse what is no update of this tensor."""
    if grad.shape != w.shape or w.size == 0:
        raise InputError(f"adafactor_update: w has shape {w.shape} and grad {grad.shape}, but they should be equal and not empty")
    if w.dtype != np.float32 or grad.dtype != np.float32 or not w.flags.c_contiguous:
        raise InputError(f"adafactor_update: w is {w.dtype} and grad {grad.dtype}, but both should be float32, and w in C order: it is written")
    wanted = {"v_row": (0,), "v_column": (0,), "v": w.shape}
    if axes is not None:
        wanted = {"v_row": _without(w.shape, axes[0]), "v_column": _without(w.shape, axes[1]), "v": (0,)}
    for name, shape in wanted.items():
        if getattr(state, name).shape != shape:
            raise InputError(f"adafactor_update: state.{name} has shape {getattr(state, name).shape}, but should be {shape} for w of shape {w.shape}")


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _in_range(sums: np.ndarray, name: str) -> None:
    if not (sums <= LARGEST).all():
        raise InputError(f"adafactor_update: {name} should be finite, and the sum of its squares a float32")


class _Rates(NamedTuple):
    """What turns root mean squares into the factor of the step."""

    learning_rate: float
    epsilon_scale: float
    clip: float
    is_batched: bool

    def of(self, of_w_P: np.ndarray, of_step_P: np.ndarray, O: int, values: int) -> np.ndarray:  # noqa: E741
        """Return the factor of each of O parts: their own where each is a tensor of its own, else one for all."""
        w_O, step_O = of_w_P.reshape(O, -1).sum(axis=1), of_step_P.reshape(O, -1).sum(axis=1)
        if not self.is_batched:
            w_O, step_O, values = np.full(O, w_O.sum()), np.full(O, step_O.sum()), values * O
        clipped_O = np.maximum(1.0, np.sqrt(step_O / values) / self.clip)
        scale_O = np.maximum(np.sqrt(w_O / values), self.epsilon_scale)
        return (self.learning_rate * scale_O / clipped_O).astype(np.float32)


def adafactor_update(
    w: np.ndarray,
    grad: np.ndarray,
    state: Any,
    learning_rate: float,
    expert_axis: int | None = None,
    rule: str = "mesh",
    smallest: int = 128,
    epsilon_square: float = 1e-30,
    epsilon_scale: float = 1e-3,
    clip: float = 1.0,
    *,
    workspace: Workspace,
) -> tuple[np.ndarray, Any]:
    """Return w, which is written over, and the state after one update.

    Paper: the training regime. The expert axis is an axis like any other under "mesh" and a batch axis under "t5x".
    """
    if rule not in ("mesh", "t5x"):
        raise InputError(f"adafactor_update: rule is {rule!r}, but should be 'mesh' or 't5x'")
    if expert_axis is not None and not -w.ndim <= expert_axis < w.ndim:
        raise InputError(f"adafactor_update: expert_axis is {expert_axis}, but the shape is {w.shape}")
    batch = expert_axis % w.ndim if expert_axis is not None and rule == "t5x" else None
    axes = factored_axes(w.shape, batch, smallest)
    _checked(w, grad, state, axes)
    beta, rates = second_moment_decay(state.step), _Rates(learning_rate, epsilon_scale, clip, batch is not None)
    if axes is None:
        return _whole_update(w, grad, state, rates, batch, beta, epsilon_square)
    # the outer axes first, then the two that are factored, in the order of memory: a view where the last axis is one of them, else a copy
    outer = tuple(axis for axis in range(w.ndim) if axis not in axes)
    order = (*outer, min(axes), max(axes))
    fits = len(outer) <= 1 and max(axes) == w.ndim - 1
    seen = w if fits else np.ascontiguousarray(w.transpose(order))
    grad = np.ascontiguousarray(grad if fits else grad.transpose(order))
    sizes, strides = [w.shape[axis] for axis in order], [w.strides[axis] // w.itemsize for axis in order]
    O, (I, J) = math.prod(sizes[:-2]), sizes[-2:]  # noqa: E741
    stride_O, stride_I = (strides[0] if outer else 0, strides[-2]) if fits else (I * J, J)
    rows = max(1, VALUES // J)
    layout = Layout(O, I, J, stride_O, stride_I, rows, -(-I // rows))
    new_state = _factored_update(seen, grad, state, rates, axes, outer, layout, beta, epsilon_square, workspace)
    if not fits:
        w[...] = seen.transpose(np.argsort(order))
    return w, new_state


def _factored_update(
    w: np.ndarray,
    grad: np.ndarray,
    state: Any,
    rates: _Rates,
    axes: tuple[int, int],
    outer: tuple[int, ...],
    layout: Layout,
    beta: float,
    epsilon_square: float,
    workspace: Workspace,
) -> Any:
    O, I, J = layout[:3]  # noqa: E741
    (d0, d1), tasks = axes, O * layout.blocks
    of_w_P, of_step_P, columns_PJ = np.empty(tasks), np.empty(tasks), workspace.take((tasks, J), np.float64)
    rows_OI, row_OI, column_OJ = np.empty((O, I)), np.empty((O, I), np.float32), np.empty((O, J), np.float32)
    arrays = (of_w_P, of_step_P, rows_OI, columns_PJ, w.reshape(-1), grad.reshape(-1), row_OI, column_OJ)
    factored_kernel(*arrays, np.empty(O, np.float32), layout, MEASURE)
    columns_OJ = columns_PJ.reshape(O, layout.blocks, J).sum(axis=1)
    workspace.give(columns_PJ)
    _in_range(of_w_P, "w")
    _in_range(rows_OI, "grad")
    over_J, over_I = rows_OI / J + epsilon_square, columns_OJ / I + epsilon_square  # means over either axis, (O, I) and (O, J)

    def seen(v: np.ndarray, lacks: int) -> np.ndarray:
        """Return moments as (O, the axis that is left), whatever the order of their axes."""
        kept = [axis for axis in range(v.ndim + 1) if axis != lacks]
        left = d1 if lacks == d0 else d0
        return np.moveaxis(v, kept.index(left), -1).reshape(O, -1)

    def restored(v_O: np.ndarray, like: np.ndarray, lacks: int) -> np.ndarray:
        kept = [axis for axis in range(like.ndim + 1) if axis != lacks]
        left = d1 if lacks == d0 else d0
        shape = [like.shape[kept.index(axis)] for axis in (*outer, left)]
        return np.ascontiguousarray(np.moveaxis(v_O.reshape(shape), -1, kept.index(left)), like.dtype)

    is_d0_last = d0 > d1  # then the mean over d0 is the one over J
    v_row_O = beta * seen(state.v_row, d0) + (1.0 - beta) * (over_J if is_d0_last else over_I)
    v_column_O = beta * seen(state.v_column, d1) + (1.0 - beta) * (over_I if is_d0_last else over_J)
    by_row, by_column = 1.0 / np.sqrt(v_row_O / v_row_O.mean(axis=1, keepdims=True)), 1.0 / np.sqrt(v_column_O)
    row_OI[...], column_OJ[...] = (by_row, by_column) if is_d0_last else (by_column, by_row)
    factored_kernel(*arrays, np.empty(O, np.float32), layout, STEP)
    factored_kernel(*arrays, rates.of(of_w_P, of_step_P, O, I * J), layout, UPDATE)
    return state._replace(step=state.step + 1, v_row=restored(v_row_O, state.v_row, d0), v_column=restored(v_column_O, state.v_column, d1))


def _whole_update(
    w: np.ndarray, grad: np.ndarray, state: Any, rates: _Rates, batch: int | None, beta: float, epsilon_square: float
) -> tuple[np.ndarray, Any]:
    axis = batch or 0
    seen, grad = (np.ascontiguousarray(np.moveaxis(x, axis, 0)) for x in (w, grad))
    v = np.ascontiguousarray(np.moveaxis(state.v, axis, 0), np.float32)
    O = 1 if batch is None else w.shape[batch]  # noqa: E741
    J = w.size // O
    layout = Layout(O, 1, J, J, J, 1, -(-J // VALUES))
    of_w_P, of_grad_P = np.empty(O * layout.blocks), np.empty(O * layout.blocks)
    arrays = (of_w_P, of_grad_P, v.reshape(-1), seen.reshape(-1), grad.reshape(-1))
    numbers = (np.float32(beta), np.float32(1.0 - beta), np.float32(epsilon_square))
    whole_kernel(*arrays, np.empty(O, np.float32), layout, MEASURE, *numbers)
    _in_range(of_w_P, "w")
    _in_range(of_grad_P, "grad")
    whole_kernel(*arrays, np.empty(O, np.float32), layout, STEP, *numbers)
    whole_kernel(*arrays, rates.of(of_w_P, of_grad_P, O, J), layout, UPDATE, *numbers)
    if not np.shares_memory(seen, w):
        w[...] = np.moveaxis(seen, 0, axis)
    return w, state._replace(step=state.step + 1, v=np.ascontiguousarray(np.moveaxis(v, 0, axis), state.v.dtype))
