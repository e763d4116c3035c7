# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Cross-entropy with z-loss and label smoothing, and its gradient: T-LOSS-1, T-LOSS-2."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from properties.drawn import Plan, Scene, assert_equal, assert_slopes, assert_within, noise_of, plans, powers
from properties.harness import clause, draws, needs
from properties.model_tubes import CrossEntropyTubes, cross_entropy_tubes
from properties.operations import Operations
from refswitch.verify import tubes
from refswitch.verify.tubes import Tube

SMOOTHINGS, Z_COEFS, DENOMINATORS = st.sampled_from((0.0, 0.125)), st.sampled_from((0.0, 0.25)), st.sampled_from((1.0, 13.0, 0.5))

VOCABULARIES = st.sampled_from((7, 3, 2, 13))  # smoothing shares among V - 1 others


class Case:
    """Logits, targets, weights."""

    def __init__(self, scene: Scene, size: float = 1.0) -> None:
        self.logits_BLV = scene.normal("BLV", 3.0 * size, "logits")
        self.targets_BL = scene.below("BL", scene.sizes["V"])
        self.weight_BL = np.where(scene.random.random(scene.shape("BL")) < 0.6, 1.0 + scene.below("BL", 3), 0.0).astype(scene.dtype)

    def play(self, operations: Operations, *statics: float, dvalue: float = 1.0) -> tuple[float, np.ndarray]:
        """Return the loss and the gradient of the logits."""
        value, saved = operations.cross_entropy_forward(self.logits_BLV, self.targets_BL, self.weight_BL, *statics)
        return value, operations.cross_entropy_backward(dvalue, saved)

    def tube(self, scene: Scene, *statics: float) -> CrossEntropyTubes:
        """Return both tubes."""
        return cross_entropy_tubes(self.logits_BLV, self.targets_BL, self.weight_BL, *statics, scene.arithmetic)


def assert_value(value: float, tube: Tube, word: str = "the loss") -> None:
    """Assert that a Python number lies in a tube."""
    assert type(value) is float
    ratio = float(tubes.ratio(np.float64(value), tube))
    assert ratio <= 1.0, f"{word} is {value!r}, should be {float(tube.value)!r} within {float(tube.radius):.3g}"


@clause("T-LOSS-1", "T-LOSS-2", is_oracle=True)
@needs("an ignored target", "smoothing", "z-loss", "large logits")
@draws(
    examples=[
        (Plan({"B": 3, "L": 5, "V": 7}, 1, 0), 300.0, 13.0, 0.125, 0.25),
        (Plan({"B": 2, "L": 3, "V": 4}, 2, 0), 1.0, 0.5, 0.125, 0.25),
        (Plan({"B": 2, "L": 3, "V": 4}, 3, 1), 1.0, 1.0, 0.0, 0.0),
    ],
    plan=plans("BLV", V=VOCABULARIES),
    size=st.sampled_from((1.0, 300.0)),
    denominator=DENOMINATORS,
    smoothing=SMOOTHINGS,
    z_coef=Z_COEFS,
)
def test_cross_entropy__matches_its_derivation(
    operations: Operations, plan: Plan, size: float, denominator: float, smoothing: float, z_coef: float
) -> None:
    """Loss and gradient lie in the tubes of the derivation, also where exp of a logit would overflow."""
    scene = Scene(operations, plan)
    case = Case(scene, size)
    operations.meets("an ignored target", (case.weight_BL == 0.0).any())
    operations.meets("smoothing", smoothing > 0.0)
    operations.meets("z-loss", z_coef > 0.0)
    operations.meets("large logits", case.logits_BLV.max() > 710.0)
    value, dlogits_BLV = case.play(operations, denominator, smoothing, z_coef)
    tube = case.tube(scene, denominator, smoothing, z_coef)
    assert_value(value, tube.value)
    assert_within(dlogits_BLV, tube.dlogits_BLV, "dlogits_BLV", scene)


@clause("T-LOSS-1", "T-LOSS-2")
@needs("an ignored target")
@draws(plan=plans("BLV", V=VOCABULARIES), denominator=DENOMINATORS, smoothing=SMOOTHINGS, z_coef=Z_COEFS)
def test_cross_entropy__ignored_targets(operations: Operations, plan: Plan, denominator: float, smoothing: float, z_coef: float) -> None:
    """Where the weight is 0 neither target nor logits matter, to the bit, and no gradient arises."""
    scene = Scene(operations, plan)
    case = Case(scene)
    is_ignored_BL = case.weight_BL == 0.0
    operations.meets("an ignored target", is_ignored_BL.any())
    value, dlogits_BLV = case.play(operations, denominator, smoothing, z_coef)
    case.targets_BL = np.where(is_ignored_BL, (case.targets_BL + 1) % plan.sizes["V"], case.targets_BL)
    case.logits_BLV = np.where(is_ignored_BL[..., None], -case.logits_BLV, case.logits_BLV)
    other, dother_BLV = case.play(operations, denominator, smoothing, z_coef)
    assert value == other
    assert_equal(dother_BLV, dlogits_BLV, "dlogits_BLV")
    assert not dlogits_BLV[is_ignored_BL].any()


@clause("T-LOSS-1")
@draws(plan=plans("BLV", V=VOCABULARIES, points=0), shift=st.sampled_from((-512.0, 2.0, 2048.0)), smoothing=SMOOTHINGS)
def test_cross_entropy_forward__shift_and_order(operations: Operations, plan: Plan, shift: float, smoothing: float) -> None:
    """Without a z-loss a shift of all logits changes nothing, and words may be numbered in any order."""
    scene = Scene(operations, plan)
    case, moved = Case(scene), Case(scene)
    order = scene.random.permutation(plan.sizes["V"])
    moved.weight_BL, moved.targets_BL = case.weight_BL, np.argsort(order)[case.targets_BL]
    moved.logits_BLV = (case.logits_BLV[..., order] + shift).astype(scene.dtype)
    value, _ = case.play(operations, 1.0, smoothing, 0.0)
    other, _ = moved.play(operations, 1.0, smoothing, 0.0)
    here, there = (drawn.tube(scene, 1.0, smoothing, 0.0).value for drawn in (case, moved))
    rounded = 2.0 * scene.points.logits.unit * np.abs(moved.logits_BLV).max() * case.weight_BL.sum()  # of the shifted logits
    assert abs(value - other) <= here.radius + there.radius + rounded


@clause("T-LOSS-1", "T-LOSS-2")
@draws(plan=plans("BLV", V=VOCABULARIES), power=powers(), smoothing=SMOOTHINGS, z_coef=Z_COEFS)
def test_cross_entropy__homogeneity(operations: Operations, plan: Plan, power: float, smoothing: float, z_coef: float) -> None:
    """Weights times 2^k, or a denominator times 2^-k, are a loss and a gradient times 2^k; so is the gradient of a loss times 2^k."""
    scene = Scene(operations, plan)
    case = Case(scene)
    value, dlogits_BLV = case.play(operations, 13.0, smoothing, z_coef)
    by_denominator = case.play(operations, 13.0 / power, smoothing, z_coef)
    by_gradient = case.play(operations, 13.0, smoothing, z_coef, dvalue=power)
    case.weight_BL = (power * case.weight_BL).astype(scene.dtype)
    by_weight = case.play(operations, 13.0, smoothing, z_coef)
    for name, (other, dother_BLV) in {"denominator": by_denominator, "weight": by_weight}.items():
        assert other == power * value, name
        assert_equal(dother_BLV, power * dlogits_BLV, "dlogits_BLV")
    assert by_gradient[0] == value
    assert_equal(by_gradient[1], power * dlogits_BLV, "dlogits_BLV")


@clause("T-LOSS-2")
@needs(wide=True)
@draws(plan=plans("BLV", V=VOCABULARIES, points=0), denominator=DENOMINATORS, smoothing=SMOOTHINGS, z_coef=Z_COEFS)
def test_cross_entropy_backward__finite_difference(operations: Operations, plan: Plan, denominator: float, smoothing: float, z_coef: float) -> None:
    """The slope along a direction of the logits is the gradient times it."""
    scene = Scene(operations, plan)
    case = Case(scene)
    _, dlogits_BLV = case.play(operations, denominator, smoothing, z_coef)

    def value(logits: np.ndarray) -> tuple[float, int]:
        return operations.cross_entropy_forward(logits, case.targets_BL, case.weight_BL, denominator, smoothing, z_coef)[0], 0

    noise = noise_of([(case.tube(scene, denominator, smoothing, z_coef).value, np.ones(()))])
    assert_slopes(value, {"logits": case.logits_BLV}, {"logits": dlogits_BLV}, noise, scene.random)


@clause("T-LOSS-1", "T-LOSS-2")
@draws()
def test_cross_entropy__by_hand(operations: Operations) -> None:
    """Four equal logits: the loss is ln 4 whatever q is, plus the square of 1 + ln 4 with a z-loss; gradients are p - q, a target's p - 1."""
    scene = Scene(operations, Plan({"B": 1, "L": 2, "V": 4}, 0, 0))
    case = Case(scene)
    case.logits_BLV, case.targets_BL, case.weight_BL = scene.ones("BLV"), np.array([[2, 0]]), np.array([[1.0, 3.0]], scene.dtype)
    lse, unit = 1.0 + math.log(4.0), 8.0 * scene.arithmetic.element_unit * scene.arithmetic.functions.log_ulp
    for smoothing, z_coef in ((0.0, 0.0), (0.75, 0.0), (0.0, 0.5), (0.375, 0.5)):
        value, dlogits_BLV = case.play(operations, 2.0, smoothing, z_coef)
        wanted = 2.0 * (math.log(4.0) + z_coef * lse**2)  # (1 + 3) / 2 positions
        assert abs(value - wanted) <= unit * wanted
        slope = 0.25 * (1.0 + 2.0 * z_coef * lse)
        others, target = slope - smoothing / 3.0, slope - 1.0 + smoothing
        rows = np.array([[[others, others, target, others], [3.0 * target, 3.0 * others, 3.0 * others, 3.0 * others]]])
        assert np.all(np.abs(dlogits_BLV - 0.5 * rows) <= unit * lse)
