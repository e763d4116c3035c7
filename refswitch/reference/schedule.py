# May import: standard library.
"""Learning rates as functions of the step.

Paper: the training regime; T5 for the plateau. Next: `adafactor`.

The step counts from 0, the updates made before this one. The paper pre-trains with `inverse_square_root` and fine-tunes with `constant`.
T5's optional ramp down over the final 10 % of training is `ramp_down`, a factor on another schedule; the paper's pre-training leaves it off.
"""

from __future__ import annotations

import math
from fractions import Fraction


def _check(step: int, warm_up: int = 0) -> None:
    if step < 0 or warm_up < 0:
        raise ValueError(f"schedule: step is {step} and warm_up {warm_up}, but both should be at least 0")


def inverse_square_root(step: int, plateau: int = 10_000, multiplier: float = 1.0) -> float:
    """Return multiplier / sqrt(max(step, plateau)).

    Paper: the training regime. The first `plateau` steps have a constant rate: there is no linear warm-up.
    """
    _check(step)
    if plateau < 1:
        raise ValueError(f"inverse_square_root: plateau is {plateau}, but should be at least 1")
    return multiplier / math.sqrt(max(step, plateau))


def constant(step: int, rate: float, warm_up: int = 0) -> float:
    """Return the rate, reached in a straight line from 0 over the first `warm_up` steps.

    Paper: fine-tuning; T5 has no warm-up, T5X's recipe for mixtures of experts 1000 steps of it.
    """
    _check(step, warm_up)
    return rate * step / warm_up if step < warm_up else rate


def linear(step: int, rate: float, total: int, warm_up: int = 0) -> float:
    """Return a rate that rises from 0 over `warm_up` steps and falls in a straight line to 0 at step `total`, where it stays."""
    _check(step, warm_up)
    if total <= warm_up:
        raise ValueError(f"linear: total is {total}, but should be greater than warm_up={warm_up}")
    if step < warm_up:
        return rate * step / warm_up
    return rate * max(total - step, 0) / (total - warm_up)


def ramp_down(step: int, total: int, final: Fraction = Fraction(1, 10)) -> float:
    """Return the factor by which T5 optionally lowers a rate over the `final` part of training: 1 before it, 0 at step `total`.

    Paper: not used in it. T5 multiplies by min(1, (total - step) / (total * final)).
    """
    _check(step)
    if total < 1 or not 0 < final <= 1:
        raise ValueError(f"ramp_down: total is {total} and final {final}, but they should be at least 1 and in (0, 1]")
    return float(min(Fraction(1), max(total - step, 0) / (total * final)))
