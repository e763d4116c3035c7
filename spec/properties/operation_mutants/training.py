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
    "math.sqrt(max(step, plateau))",
    "math.sqrt(max(step, 1))",
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


ALWAYS_CORRECTED_BY_ONE = edited(
    "correction_of_the_step_before",
    "O-ADAMW-2",
    "adamw.bias_correction",
    "1.0 - beta**step",
    "1.0 - beta**(step - 1)",
    "The correction is one step behind.",
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

# https://github.com/lucidrains/mixture-of-experts/commit/45537f8
NO_FAN_IN = edited("no_fan_in", "I-RULE-1", "initialization.sigma_of", '"in": fans.into', '"in": 1.0', "A deviation of 1, whatever the fan-in.")
FAN_OUT = edited("fan_out", "I-RULE-1", "initialization.sigma_of", '"in": fans.into', '"in": fans.out', "The fan-out stands for the fan-in.")
SCALE_FOR_ITS_ROOT = edited(
    "scale_for_its_root",
    "I-RULE-1",
    "initialization.sigma_of",
    "math.sqrt(rule.scale / divisor)",
    "rule.scale / math.sqrt(divisor)",
    "The scale is not under the root.",
)
DEVIATION_FOR_VARIANCE = edited(
    "deviation_for_variance",
    "I-RULE-1",
    "initialization.rule_of",
    'Rule("normal", recipe.scale**2, "one")',
    'Rule("normal", recipe.scale, "one")',
    "A deviation is taken for a variance.",
)
TORCH_WITHOUT_ITS_THIRD = edited(
    "torch_without_its_third", "I-RULE-1", "initialization.rule_of", "recipe.scale / 3.0", "recipe.scale", "torch's Linear without its third."
)
# https://github.com/tensorflow/mesh/commit/4144c5e
TRUNCATED_FALLS_TO_UNIFORM = edited(
    "truncated_falls_to_uniform",
    "I-DRAW-1",
    "initialization.standard_of",
    'if family == "uniform":',
    'if family in ("uniform", "truncated", "truncated_corrected"):',
    "An unrecognised name falls to uniform, of the same deviation.",
)
ALWAYS_CORRECTED = edited(
    "always_corrected",
    "I-DRAW-1",
    "initialization.standard_of",
    'if family == "truncated_corrected" else inside',
    "if True else inside",
    "Every truncated normal is corrected.",
)
NEVER_TRUNCATED = edited(
    "never_truncated",
    "I-DRAW-1",
    "initialization.standard_of",
    "normal_of(MASS_BELOW + MASS_INSIDE * fraction)",
    "normal_of(fraction)",
    "Nothing is cut off.",
)
CLOSED_INTERVAL = edited(
    "closed_interval",
    "I-DRAW-1",
    "initialization.open_fraction_of",
    "(words + 0.5)",
    "(words + 0.0)",
    "The word 0 has the quantile of 0, minus infinity.",
)
# https://github.com/laekov/fastmoe/pull/4
EVERY_RANK_THE_SAME = edited(
    "every_rank_the_same",
    "I-DRAW-2",
    "initialization.draw_experts",
    "range(experts.start * size, experts.stop * size)",
    "range(len(experts) * size)",
    "Every rank draws the first experts.",
)
IDENTICAL_BY_THE_RANKS_FIRST = edited(
    "identical_by_the_ranks_first",
    "I-DRAW-2",
    "initialization.draw_experts",
    "draw(rule, fans, seed, number, range(size)).reshape(shape)",
    "draw(rule, fans, seed, number, range(experts.start * size, experts.start * size + size)).reshape(shape)",
    "Identical experts are copies of the rank's first.",
)
# https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5396
ONE_NUMBER_FOR_ALL_TENSORS = edited(
    "one_number_for_all_tensors",
    "I-DRAW-2",
    "initialization.draw",
    "site_of(number, Purpose.INITIAL_WEIGHT)",
    "site_of(0, Purpose.INITIAL_WEIGHT)",
    "All tensors have the same words.",
)

SOFT = "distillation.soft_cross_entropy_forward"
TEACHER_WITHOUT_TEMPERATURE = edited(
    "teacher_without_temperature",
    "D-SOFT-1",
    SOFT,
    "logits_BLV / temperature, teacher_BLV / temperature",
    "logits_BLV / temperature, teacher_BLV",
    "The teacher is not softened.",
)
ROLES_EXCHANGED = edited(
    "roles_exchanged",
    "D-SOFT-1",
    SOFT,
    "scaled_BLV, teacher_BLV = logits_BLV / temperature, teacher_BLV / temperature",
    "scaled_BLV, teacher_BLV = teacher_BLV / temperature, logits_BLV / temperature",
    "The divergence is taken the other way round.",
)
SOFT_WITHOUT_Z = edited("soft_without_z", "D-SOFT-1", SOFT, " + z_coef * lse_BL1**2", "", "The soft part has no z-loss.")
SOFT_OVERFLOWS = edited(
    "soft_overflows",
    "D-SOFT-1",
    SOFT,
    "max_BL1 = scaled_BLV.max(axis=-1, keepdims=True)",
    "max_BL1 = np.zeros_like(scaled_BLV[..., :1])",
    "The maximum is not subtracted.",
)
GRADIENT_WITHOUT_TEMPERATURE = edited(
    "gradient_without_temperature", "D-SOFT-2", SOFT, "- q_BLV) / temperature", "- q_BLV)", "The gradient lacks its 1 / T."
)
GRADIENT_WITHOUT_Z = edited("gradient_without_z", "D-SOFT-2", SOFT, "(1.0 + 2.0 * z_coef * lse_BL1)", "1.0", "The gradient lacks the z-loss.")
GRADIENT_WITHOUT_WEIGHT = edited(
    "gradient_without_weight",
    "D-SOFT-2",
    SOFT,
    "dvalue_dlogits_BLV = scale_BL1 *",
    "dvalue_dlogits_BLV = scale_BL1.max() *",
    "Every token has the largest weight.",
)
NO_SQUARED_TEMPERATURE = edited(
    "no_squared_temperature", "D-MIX-1", "distillation.distillation_forward", "temperature**2 * soft", "soft", "T^2 is left out."
)
FRACTIONS_SWAPPED = edited(
    "fractions_swapped",
    "D-MIX-1",
    "distillation.distillation_forward",
    "1.0 - soft, temperature**2 * soft",
    "soft, temperature**2 * (1.0 - soft)",
    "The fractions stand in each other's place.",
)
HARD_NOT_SMOOTHED = edited(
    "hard_not_smoothed",
    "D-MIX-1",
    "distillation.distillation_forward",
    "denominator, smoothing, z_coef)",
    "denominator, 0.0, z_coef)",
    "The labels are not smoothed.",
)
HARD_GRADIENT_ALONE = edited(
    "hard_gradient_alone",
    "D-MIX-1",
    "distillation.distillation_backward",
    "dlogits_hard_BLV + dlogits_soft_BLV",
    "dlogits_hard_BLV",
    "The soft part has no gradient.",
)
