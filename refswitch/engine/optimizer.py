# May import: standard library, numpy, refswitch.backends, refswitch.precision, refswitch.reference (records), refswitch.config, refswitch.tree.
"""The update: which tensors move, clipping, Adafactor or AdamW on a backend. Paper: the training regime. Next: `step`."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from refswitch.backends.protocol import Backend
from refswitch.config import Dialect
from refswitch.numbers.precision import Format
from refswitch.precision import Precision
from refswitch.reference.adafactor import AdafactorState, Rule, adafactor_init
from refswitch.reference.adamw import AdamWState, adamw_init
from refswitch.reference.transformer import ModelParams
from refswitch.tree import leaves, with_leaves

Arrays = dict[str, Any]
OptimizerTree = Any  # a parameter tree with an AdafactorState or AdamWState in the place of each tensor that moves, None in the others


class NonFiniteError(ArithmeticError):
    """The objective or a gradient is no number; the message names the first place that holds none."""


class Optimizer(NamedTuple):
    """One rule of update; the rate comes with each step."""

    name: Literal["adafactor", "adamw"]
    rule: Rule = "mesh"  # Adafactor: what the expert axis is
    weight_decay: float = 0.01  # AdamW
    clip_norm: float = 0.0  # of all gradients together; 0: none


def moves(path: str, dialect: Dialect) -> bool:
    """Whether the model has this tensor: an absent bias is an array of zeros, and has to stay one."""
    name = path.rsplit(".", 1)[-1]
    if name == "b_router_E":
        return dialect.router.bias
    if name == "b_shared_D":
        return dialect.expert.bias == "shared_out"
    if name == "b_gate_EF":
        return dialect.expert.bias == "per_expert" and dialect.expert.glu
    return dialect.expert.bias == "per_expert" or name not in ("b_in_EF", "b_out_ED")


def expert_axis(path: str) -> int | None:
    """Return the axis that counts the experts."""
    return 0 if ".experts." in path else None


def initial_optimizer(params: ModelParams, optimizer: Optimizer, dialect: Dialect, backend: Backend) -> OptimizerTree:
    """Return the state before the first update."""
    states: Arrays = {}
    for path, leaf in leaves(params).items():
        fresh: AdafactorState | AdamWState
        if optimizer.name == "adafactor":
            fresh = adafactor_init(leaf.shape, expert_axis(path), optimizer.rule)
        else:
            fresh = adamw_init(leaf.shape)
        states[path] = type(fresh)(fresh.step, *(part.astype(backend.dtype) for part in fresh[1:])) if moves(path, dialect) else None
    return with_leaves(params, states)


def states_of(tree: OptimizerTree, params: ModelParams) -> Arrays:
    """Return each tensor's state by the tensor's path."""
    found: Arrays = {}
    for path in leaves(params):
        node = tree
        for name in path.split("."):
            node = node[int(name)] if name.isdigit() else getattr(node, name)
        found[path] = node
    return found


def clipped(gradients: Arrays, limit: float, backend: Backend) -> tuple[Arrays, float]:
    """Return the gradients, scaled together to the norm `limit` where their norm is greater and there is a limit, and the norm before.

    Raises
    ------
    NonFiniteError
        Where a gradient holds a NaN or an infinity.
    """
    squares = {path: backend.squared_norm(gradient) for path, gradient in gradients.items()}
    norm = math.sqrt(sum(squares.values()))
    if not math.isfinite(norm):
        raise NonFiniteError(f"the gradient of {next(path for path, square in squares.items() if not math.isfinite(square))} is no number")
    if not (limit and norm > limit):
        return gradients, norm
    return {path: backend.scaled_by(gradient, limit / norm) for path, gradient in gradients.items()}, norm


def stored(x: np.ndarray, format: Format, backend: Backend) -> np.ndarray:
    """Return x on the grid of a format, in x's own memory: it outlives the step."""
    narrow = backend.rounded(x, format) if x.size else x
    if narrow is not x:
        np.copyto(x, narrow)
    return x


def update(
    params: ModelParams,
    gradients: ModelParams,
    tree: OptimizerTree,
    optimizer: Optimizer,
    learning_rate: float,
    setting: Precision,
    dialect: Dialect,
    backend: Backend,
) -> tuple[ModelParams, OptimizerTree, float]:
    """Return parameters, state and the gradients' norm before clipping. What is passed is given away: its arrays may be overwritten."""
    weights, states = leaves(params), states_of(tree, params)
    moving = {path: gradient for path, gradient in leaves(gradients).items() if moves(path, dialect)}
    moving, norm = clipped(moving, optimizer.clip_norm, backend)
    for path, gradient in moving.items():
        since, state = backend.mark(), states[path]
        if optimizer.name == "adafactor":
            updated, state = backend.adafactor_update(weights[path], gradient, state, learning_rate, expert_axis(path), optimizer.rule)
        else:
            updated, state = backend.adamw_update(weights[path], gradient, state, learning_rate, weight_decay=optimizer.weight_decay)
        weights[path] = stored(updated, setting.weights, backend)
        states[path] = type(state)(state.step, *(stored(part, setting.optimizer, backend) for part in state[1:]))
        backend.release(since, backend.mark(), ())
    return with_leaves(params, weights), with_leaves(params, states), norm
