# May import: standard library, numpy, properties.operation_mutants.record.
"""Wrong rates, optimizers, first weights and distillation. Where a mutant is a bug that was shipped, its comment has the link."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from properties.operation_mutants.record import edited, operation_mutant

Function = Callable[..., Any]
UPDATE = "adafactor.adafactor_update"
ADAMW = "adamw.adamw_update"

LINEAR_WARM_UP = edited(
    "linear_warm_up",
    "O-RATE-1",
    "schedule.inverse_square_root",
    "multiplier / math.sqrt(max(step, plateau))",
    "multiplier * min(step / plateau, 1.0) / math.sqrt(max(step, plateau))",
    "A warm-up for the plateau.",
)
NO_PLATEAU = edited(
    "no_plateau",
    "O-RATE-1",
    "schedule.inverse_square_root",
    "sqrt(max(step, plateau))",
    "sqrt(max(step, 1))",
    "The rate falls from the first step on.",
)
MULTIPLIER_INSIDE = edited(
    "multiplier_inside",
    "O-RATE-1",
    "schedule.inverse_square_root",
    "multiplier / math.sqrt(max(step, plateau))",
    "1.0 / math.sqrt(max(step, plateau) / multiplier)",
    "The multiplier stands under the root.",
)
RISES_AFTER_WARM_UP = edited(
    "rises_after_warm_up",
    "O-RATE-2",
    "schedule.constant",
    "if step < warm_up else rate",
    "if step < warm_up else rate * step",
    "The rate goes on rising.",
)
FALLS_FROM_THE_START = edited(
    "falls_from_the_start", "O-RATE-2", "schedule.linear", "/ (total - warm_up)", "/ total", "The way down is as long as all of training."
)
BELOW_ZERO = edited("below_zero", "O-RATE-2", "schedule.linear", "max(total - step, 0)", "(total - step)", "After its end the rate is negative.")
RAMP_IN_FLOATS = edited(
    "ramp_in_floats",
    "O-RATE-2",
    "schedule.ramp_down",
    "max(total - step, 0) / (total * final)",
    "Fraction(max(total - step, 0)) / Fraction(float(total) * 0.1)",
    "The part of training is always a tenth.",
)

TIES_TO_THE_LAST = edited(
    "ties_to_the_last",
    "O-ADAF-1",
    "adafactor.factored_axes",
    "key=lambda axis: -shape[axis]",
    "key=lambda axis: (-shape[axis], -axis)",
    "Of equal axes the last is the larger.",
)
LAST_TWO_AXES = edited(
    "last_two_axes",
    "O-ADAF-1",
    "adafactor.factored_axes",
    "return ordered[0], ordered[1]",
    "return len(shape) - 1, len(shape) - 2",
    "Always the last two axes.",
)
ONE_LARGE_AXIS = edited(
    "one_large_axis",
    "O-ADAF-1",
    "adafactor.factored_axes",
    "shape[ordered[1]] < smallest",
    "shape[ordered[0]] < smallest",
    "One large axis is enough.",
)
EXPERTS_FACTORED_OVER = edited(
    "experts_factored_over", "O-ADAF-1", "adafactor.factored_axes", "if axis != batch)", "if True)", "The batch axis may be one of the two."
)


@operation_mutant("O-ADAF-2", replaces="second_moment_decay")
def decay_without_its_one(second_moment_decay: Function, step: int) -> float:
    """The step counts from 1: 1 - step^-0.8."""
    return 1.0 - max(step, 1) ** -0.8


@operation_mutant("O-ADAF-2", replaces="second_moment_decay")
def decay_of_adam(second_moment_decay: Function, step: int) -> float:
    """A constant decay, whatever the step."""
    return 0.999 if step else 0.0


NO_CLIP = edited("no_clip", "O-ADAF-3", UPDATE, "step / np.maximum(1.0, _root_mean_square(step, batch) / clip)", "step", "Updates are not clipped.")
CLIPPED_UPWARDS = edited(
    "clipped_upwards",
    "O-ADAF-3",
    UPDATE,
    "np.maximum(1.0, _root_mean_square(step, batch) / clip)",
    "(_root_mean_square(step, batch) / clip)",
    "Small updates are blown up to the limit.",
)
NO_SCALE = edited(
    "no_scale", "O-ADAF-3", UPDATE, "np.maximum(_root_mean_square(w, batch), epsilon_scale)", "1.0", "The update is not scaled by the parameter."
)
SCALE_OF_THE_GRADIENT = edited(
    "scale_of_the_gradient", "O-ADAF-3", UPDATE, "_root_mean_square(w, batch)", "_root_mean_square(grad, batch)", "Scaled by the gradient."
)
ALL_EXPERTS_TOGETHER = edited(
    "all_experts_together",
    "O-ADAF-3",
    UPDATE,
    "batch = _expert_axis(w.shape, expert_axis, rule)",
    "batch = None",
    "Under t5x the root mean squares go over all experts.",
)
ROW_MEAN_OVER_THE_WRONG_AXIS = edited(
    "row_mean_over_the_wrong_axis",
    "O-ADAF-3",
    UPDATE,
    "np.mean(row, axis=d1, keepdims=True)",
    "np.mean(row, axis=d0, keepdims=True)",
    "The row's mean is taken over the axis that it lacks.",
)
LARGEST_FOR_MEAN = edited(
    "largest_for_mean", "O-ADAF-3", UPDATE, "np.mean(square, axis=d0)", "np.max(square, axis=d0)", "Rows hold the largest square."
)
EPSILON_AFTER_THE_ROOT = edited(
    "epsilon_after_the_root",
    "O-ADAF-3",
    UPDATE,
    "np.square(grad) + epsilon_square",
    "np.square(grad + epsilon_scale)",
    "Another epsilon is added before the square.",
)
MEMORY_OF_THE_FIRST_STEP = edited(
    "memory_of_the_first_step",
    "O-ADAF-3",
    UPDATE,
    "beta = second_moment_decay(state.step)",
    "beta = second_moment_decay(state.step + 1)",
    "The first update remembers the zeros.",
)
STEP_DOES_NOT_COUNT = edited(
    "step_does_not_count",
    "O-ADAF-3",
    UPDATE,
    "AdafactorState(state.step + 1, v_row, v_column, state.v)",
    "AdafactorState(state.step, v_row, v_column, state.v)",
    "A factored tensor's step stays 0.",
)


# https://github.com/huggingface/transformers/pull/9751
@operation_mutant("O-ADAF-3", replaces="adafactor_update")
def scaled_rate_written_back(
    adafactor_update: Function, w: np.ndarray, grad: np.ndarray, state: Any, learning_rate: float, *rest: Any, **more: Any
) -> Any:
    """The rate is multiplied by the parameter's scale and stays so: it is scaled twice."""
    return adafactor_update(w, grad, state, learning_rate * max(float(np.sqrt(np.mean(np.square(w)))), 1e-3), *rest, **more)


# https://github.com/NVIDIA-NeMo/Automodel/pull/2995
@operation_mutant("O-ADAF-3", replaces="adafactor_update")
def no_tokens_no_update(adafactor_update: Function, w: np.ndarray, grad: np.ndarray, state: Any, *rest: Any, **more: Any) -> Any:
    """A gradient of zero is taken for none: the memory does not fade, the step does not count."""
    return adafactor_update(w, grad, state, *rest, **more) if np.any(grad) else (w, state)


@operation_mutant("O-ADAF-3", replaces="adafactor_update")
def weights_written(adafactor_update: Function, w: np.ndarray, *rest: Any, **more: Any) -> Any:
    """The caller's weights are overwritten."""
    new, state = adafactor_update(w, *rest, **more)
    w[...] = new
    return new, state


DECAY_IN_THE_GRADIENT = edited(
    "decay_in_the_gradient",
    "O-ADAMW-1",
    ADAMW,
    "    step = state.step + 1\n",
    "    step, grad = state.step + 1, grad + weight_decay * w\n",
    "The decay passes through the moments: Adam, not AdamW.",
)
DECAY_WITHOUT_THE_RATE = edited(
    "decay_without_the_rate",
    "O-ADAMW-1",
    ADAMW,
    "(1.0 - learning_rate * weight_decay)",
    "(1.0 - weight_decay)",
    "The decay is not multiplied by the rate.",
)
MEAN_NOT_CORRECTED = edited(
    "mean_not_corrected", "O-ADAMW-1", ADAMW, "learning_rate / bias_correction(beta1, step) * mean", "learning_rate * mean", "The mean's bias stays."
)
SQUARE_NOT_CORRECTED = edited(
    "square_not_corrected", "O-ADAMW-1", ADAMW, " / math.sqrt(bias_correction(beta2, step))", "", "The mean square's bias stays."
)
EPSILON_UNDER_THE_ROOT = edited(
    "epsilon_under_the_root", "O-ADAMW-1", ADAMW, "np.sqrt(mean_square)", "np.sqrt(mean_square + epsilon)", "Epsilon is added to the mean square too."
)
BETAS_SWAPPED = edited(
    "betas_swapped",
    "O-ADAMW-1",
    ADAMW,
    "beta1 * state.mean + (1.0 - beta1) * grad",
    "beta2 * state.mean + (1.0 - beta2) * grad",
    "The mean has the square's decay.",
)


# https://github.com/huggingface/transformers/issues/34506
@operation_mutant("O-ADAMW-1", replaces="adamw_update")
def mean_of_scaled_updates(adamw_update: Function, w: np.ndarray, grad: np.ndarray, state: Any, learning_rate: float, *rest: Any, **more: Any) -> Any:
    """The mean is one of updates that were multiplied by the rate: it changes with a schedule."""
    return adamw_update(w, grad * learning_rate, state, learning_rate, *rest, **more)


NORM_OF_EACH = edited(
    "norm_of_each",
    "O-CLIP-1",
    "adamw.clip_by_global_norm",
    "[grad * factor for grad in grads]",
    "[grad * min(1.0, limit / max(float(np.sqrt(np.sum(np.square(grad)))), 1e-300)) for grad in grads]",
    "Every tensor has its own norm.",
)
# https://github.com/laekov/fastmoe/commit/b6d280c
SUM_OF_NORMS = edited(
    "sum_of_norms",
    "O-CLIP-1",
    "adamw.clip_by_global_norm",
    "math.sqrt(sum(float(np.sum(np.square(grad))) for grad in grads))",
    "sum(math.sqrt(float(np.sum(np.square(grad)))) for grad in grads)",
    "Norms are added before they are squared.",
)
# https://github.com/NVIDIA/Megatron-LM/issues/1628
NORM_OF_SOME = edited(
    "norm_of_some",
    "O-CLIP-1",
    "adamw.clip_by_global_norm",
    "np.square(grad))) for grad in grads)",
    "np.square(grad))) for grad in grads[:1])",
    "The norm of a part of the tensors.",
)
SCALED_UP = edited(
    "scaled_up",
    "O-CLIP-1",
    "adamw.clip_by_global_norm",
    "limit / norm if norm > limit else 1.0",
    "limit / max(norm, 1e-300)",
    "Small gradients are scaled up to the limit.",
)
