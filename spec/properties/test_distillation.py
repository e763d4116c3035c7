# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Distillation: D-SOFT-1, D-SOFT-2, D-MIX-1. Values lie in tubes of the formula, gradients are slopes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.drawn import noise_of
from properties.harness import clause, draws, needs
from properties.operations import Operations
from properties.refusals import refusal
from properties.variant_tubes import A64, STEP, assert_within
from refswitch.proof.finite_difference import difference_ratio
from refswitch.verify import tubes
from refswitch.verify.tubes import Tube, add, exact, multiply

SETTINGS = st.tuples(st.sampled_from((1.0, 2.0, 0.5, 3.0)), st.sampled_from((0.0, 0.25)))
SOFT = st.sampled_from((0.25, 0.75, 0.0, 1.0))


class Problem(NamedTuple):
    """One batch of logits."""

    logits_BLV: np.ndarray
    teacher_BLV: np.ndarray
    targets_BL: np.ndarray
    weight_BL: np.ndarray
    denominator: float


def problem(seed: int, spread: float = 2.0) -> Problem:
    """Draw logits, a teacher's, labels and weights with zeros among them."""
    random, (B, L, V) = np.random.Generator(np.random.Philox(seed)), (2, 3, 7)
    weight_BL = random.integers(0, 3, (B, L)) / 2.0
    weight_BL[0, 0] = 1.5
    logits_BLV, teacher_BLV = spread * random.normal(size=(2, B, L, V))
    return Problem(logits_BLV, teacher_BLV, random.integers(0, V, (B, L)), weight_BL, 8.0)


def soft_tube(data: Problem, temperature: float, z_coef: float) -> Tube:
    """Return the soft loss: sum of weight / denominator * (lse - sum_v q_v l_v + z_coef lse^2) with l of logits / T, q of teacher / T."""
    scaled, q = (tubes.scale(exact(x), 1.0 / temperature, A64) for x in (data.logits_BLV, data.teacher_BLV))
    lse, probs = tubes.log_sum_exp(scaled, A64), tubes.softmax(q, A64)
    V = data.logits_BLV.shape[-1]
    apart = add(lse.at((..., None)), Tube(-scaled.value, scaled.radius), A64)
    losses = add(tubes.total(multiply(probs, apart, A64), -1, A64, V), tubes.scale(multiply(lse, lse, A64), z_coef, A64), A64)
    weighed = multiply(losses, tubes.scale(exact(data.weight_BL), 1.0 / data.denominator, A64), A64)
    return tubes.total(weighed, (0, 1), A64, data.weight_BL.size)


@clause("D-SOFT-1")
@needs("weight of 0", "temperature", "z-loss")
@draws(examples=[(1, (2.0, 0.25)), (2, (0.5, 0.0))], seed=st.integers(0, 2**20), setting=SETTINGS)
def test_soft_cross_entropy_forward__its_formula(operations: Operations, seed: int, setting: tuple[float, float]) -> None:
    """The value lies in the tube of the formula, whatever the temperature, and with an offset on the teacher's logits and the student's."""
    (temperature, z_coef), data = setting, problem(seed)
    value, _ = operations.soft_cross_entropy_forward(*data[:2], *data[3:], temperature, z_coef)
    operations.meets("weight of 0", np.any(data.weight_BL == 0.0))
    operations.meets("temperature", temperature not in (0.0, 1.0))
    operations.meets("z-loss", z_coef > 0.0)
    tube = soft_tube(data, temperature, z_coef)
    assert type(value) is float
    assert_within(value, tube, "value")
    moved = data._replace(teacher_BLV=data.teacher_BLV + 1024.0, logits_BLV=data.logits_BLV + (1024.0 if z_coef == 0.0 else 0.0))
    there, _ = operations.soft_cross_entropy_forward(*moved[:2], *moved[3:], temperature, z_coef)
    assert_within(there, soft_tube(moved, temperature, z_coef), "value")


@clause("D-SOFT-1")
@draws()
def test_soft_cross_entropy_forward__does_not_overflow(operations: Operations) -> None:
    """Logits of +-3000 have finite losses, and what each row weighs is what it says."""
    logits = np.array([[[3000.0, -3000.0, 0.0]], [[1.0, 1.0, 1.0]]])
    teacher = np.array([[[3000.0, -3000.0, 0.0]], [[-3000.0, 3000.0, 0.0]]])
    value, saved = operations.soft_cross_entropy_forward(logits, teacher, np.array([[1.0], [0.5]]), 2.0, 1.0, 0.0)
    assert_within(value, tubes.scale(tubes.log_sum_exp(exact(np.zeros(3)), A64), 0.25, A64), "value")
    dlogits = operations.soft_cross_entropy_backward(1.0, saved)
    assert np.isfinite(dlogits).all()
    assert np.all(dlogits[0] == 0.0)


@clause("D-SOFT-2")
@draws(seed=st.integers(0, 2**20), temperature=st.sampled_from((1.0, 2.0, 0.5)))
def test_soft_cross_entropy_backward__nothing_to_learn(operations: Operations, seed: int, temperature: float) -> None:
    """A student that equals its teacher has no gradient, each row's gradients sum to nothing, and a row of weight 0 has none at all."""
    data = problem(seed)
    _, saved = operations.soft_cross_entropy_forward(data.teacher_BLV, data.teacher_BLV, *data[3:], temperature, 0.0)
    same = operations.soft_cross_entropy_backward(1.0, saved)
    scale_BLV = (data.weight_BL / data.denominator / temperature)[..., None]
    width_BLV = [tubes.softmax(tubes.scale(exact(x), 1.0 / temperature, A64), A64).radius for x in (data.teacher_BLV, data.logits_BLV)]
    assert np.all(np.abs(same) <= 4.0 * width_BLV[0] * scale_BLV)  # two evaluations of one probability, and the product
    _, saved = operations.soft_cross_entropy_forward(*data[:2], *data[3:], temperature, 0.0)
    dlogits = operations.soft_cross_entropy_backward(2.0, saved)
    assert np.all(np.abs(dlogits.sum(axis=-1)) <= 2.0 * np.sum(2.0 * sum(width_BLV) * scale_BLV, axis=-1))
    assert np.all(dlogits[data.weight_BL == 0.0] == 0.0)
    assert np.array_equal(dlogits, 2.0 * operations.soft_cross_entropy_backward(1.0, saved))


@clause("D-SOFT-2")
@draws(examples=[(1, (2.0, 0.25)), (2, (0.5, 0.0))], seed=st.integers(0, 2**20), setting=SETTINGS)
def test_soft_cross_entropy_backward__finite_difference(operations: Operations, seed: int, setting: tuple[float, float]) -> None:
    """The slope along a direction of the student's logits."""
    (temperature, z_coef), data = setting, problem(seed)
    direction = np.random.Generator(np.random.Philox(seed + 1)).normal(size=data.logits_BLV.shape)
    _, saved = operations.soft_cross_entropy_forward(*data[:2], *data[3:], temperature, z_coef)
    slope = float(np.sum(operations.soft_cross_entropy_backward(1.0, saved) * direction))

    def along(t: float) -> tuple[float, int]:
        return operations.soft_cross_entropy_forward(data.logits_BLV + t * direction, data.teacher_BLV, *data[3:], temperature, z_coef)[0], 0

    noise = noise_of([(soft_tube(data, temperature, z_coef), np.ones(()))])
    found = difference_ratio(along, slope, STEP, noise, np.array_equal)
    assert found.ok, f"off by {found.ratio:.3g} radii"


@clause("D-MIX-1")
@needs("both", "hard alone", "soft alone", wide=True)
@draws(examples=[(1, (2.0, 0.25), 0.25), (2, (0.5, 0.0), 0.0), (3, (3.0, 0.25), 1.0)], seed=st.integers(0, 2**20), setting=SETTINGS, soft=SOFT)
def test_distillation__is_the_mixture(operations: Operations, seed: int, setting: tuple[float, float], soft: float) -> None:
    """Value and gradient are (1 - soft) times the hard part's plus T^2 soft times the soft part's; the hard part alone is smoothed."""
    (temperature, z_coef), data, smoothing = setting, problem(seed), 0.125
    value, saved = operations.distillation_forward(*data, smoothing, z_coef, soft, temperature)
    hard, hard_saved = operations.cross_entropy_forward(data.logits_BLV, *data[2:], smoothing, z_coef)
    gentle, gentle_saved = operations.soft_cross_entropy_forward(*data[:2], *data[3:], temperature, z_coef)
    operations.meets("both", 0.0 < soft < 1.0)
    operations.meets("hard alone", soft == 0.0)
    operations.meets("soft alone", soft == 1.0)
    factors = (1.0 - soft, temperature**2 * soft)
    assert value == factors[0] * hard + factors[1] * gentle
    wanted = operations.cross_entropy_backward(3.0 * factors[0], hard_saved) + operations.soft_cross_entropy_backward(3.0 * factors[1], gentle_saved)
    assert np.array_equal(operations.distillation_backward(3.0, saved), wanted)


@clause("D-MIX-1")
@draws()
def test_distillation__refuses(operations: Operations) -> None:
    """A fraction beyond [0, 1], a temperature that is not positive, a teacher of another vocabulary."""
    data = problem(1)
    for soft, temperature in ((-0.25, 1.0), (1.25, 1.0), (0.5, 0.0), (0.5, -1.0), (np.nan, 1.0)):
        assert "soft is" in refusal(lambda s=soft, t=temperature: operations.distillation_forward(*data, 0.0, 0.0, s, t))
    short = data._replace(teacher_BLV=data.teacher_BLV[..., 1:])
    assert "teacher_BLV has shape" in refusal(lambda: operations.distillation_forward(*short, 0.0, 0.0, 0.25, 1.0))
    for soft in (0.0, 1.0):
        assert not refusal(lambda s=soft: operations.distillation_forward(*data, 0.0, 0.0, s, 0.5))
