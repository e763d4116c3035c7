# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""RMSNorm, forward and backward: T-NORM-1, T-NORM-2."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from properties.drawn import Plan, Scene, assert_equal, assert_on_grid, assert_slopes, assert_within, in_every_format, noise_of, plans, powers
from properties.harness import clause, draws, needs
from properties.model_tubes import norm_tubes
from properties.operations import Operations
from refswitch.config import MODEL_TRUTH
from refswitch.proof.adjoint import dot

EPSILONS = st.sampled_from((2.0**-20, 0.0, 0.25))


@clause("T-NORM-1", "T-NORM-2", is_oracle=True)
@needs("narrow points", "epsilon", "no epsilon")
@draws(examples=in_every_format("BLD", 0.25, 2.0), plan=plans("BLD"), epsilon=EPSILONS, power=powers(3))
def test_norm__matches_its_derivation(operations: Operations, plan: Plan, epsilon: float, power: float) -> None:
    """Output, gradient of the input and of the scale lie in the tubes of the derivation, rounded where the points say."""
    scene = Scene(operations, plan)
    x_BLD, scale_D, dout_BLD = scene.normal("BLD", power), scene.normal("D"), scene.gradient("BLD")
    operations.meets("epsilon", epsilon > 0.0)
    operations.meets("no epsilon", epsilon == 0.0)
    out_BLD, saved = operations.norm_forward(x_BLD, scale_D, epsilon, scene.points)
    dx_BLD, dscale_D = operations.norm_backward(dout_BLD, saved, scale_D, scene.points)
    tube = norm_tubes(x_BLD, scale_D, epsilon, dout_BLD, scene.points, scene.arithmetic)
    assert_within(out_BLD, tube.out_BLD, "out_BLD", scene)
    assert_within(dx_BLD, tube.dx_BLD, "dx_BLD", scene)
    assert_within(dscale_D, tube.dscale_D, "dscale_D", scene)
    assert_on_grid(out_BLD, "activations", "out_BLD", scene)
    assert_on_grid(dx_BLD, "gradients", "dx_BLD", scene)


@clause("T-NORM-1")
@needs("narrow points")
@draws(plan=plans("BLD"), power=st.integers(-3, 3).map(lambda k: 4.0**k))
def test_norm_forward__scale_invariance(operations: Operations, plan: Plan, power: float) -> None:
    """A token times 2^k has the output of the token, to the bit, with an epsilon times 4^k; the scale times 2^k is an output times 2^k."""
    scene = Scene(operations, plan)
    x_BLD, scale_D = scene.normal("BLD"), scene.normal("D")
    one_BLD, _ = operations.norm_forward(x_BLD, scale_D, 2.0**-12, scene.points)
    other_BLD, _ = operations.norm_forward(power * x_BLD, scale_D, 2.0**-12 * power**2, scene.points)
    scaled_BLD, _ = operations.norm_forward(x_BLD, power * scale_D, 2.0**-12, scene.points)
    assert_equal(other_BLD, one_BLD, "out_BLD")
    assert_equal(scaled_BLD, power * one_BLD, "out_BLD")


@clause("T-NORM-1", "T-NORM-2")
@draws(plan=plans("BLD"))
def test_norm__each_token_by_itself(operations: Operations, plan: Plan) -> None:
    """A row alone has the output and the input's gradient that it has among others: nothing is averaged over tokens."""
    scene = Scene(operations, plan)
    x_BLD, scale_D, dout_BLD = scene.normal("BLD"), scene.normal("D"), scene.gradient("BLD")
    out_BLD, saved = operations.norm_forward(x_BLD, scale_D, 2.0**-20, scene.points)
    dx_BLD, _ = operations.norm_backward(dout_BLD, saved, scale_D, scene.points)
    alone_11D, alone = operations.norm_forward(x_BLD[-1:, -1:], scale_D, 2.0**-20, scene.points)
    dx_11D, _ = operations.norm_backward(dout_BLD[-1:, -1:], alone, scale_D, scene.points)
    assert_equal(alone_11D, out_BLD[-1:, -1:], "out_11D")
    assert_equal(dx_11D, dx_BLD[-1:, -1:], "dx_11D")


@clause("T-NORM-1", "T-NORM-2")
@draws(plan=plans("BLD"))
def test_norm__a_token_of_zeros(operations: Operations, plan: Plan) -> None:
    """A token of zeros is a token of zeros, and its gradient is dout scale / sqrt(epsilon), finite."""
    scene = Scene(operations, plan)
    zeros_BLD, scale_D, dout_BLD = np.zeros_like(scene.normal("BLD")), scene.whole("D"), scene.whole("BLD")
    out_BLD, saved = operations.norm_forward(zeros_BLD, scale_D, 2.0**-12, scene.points)
    dx_BLD, dscale_D = operations.norm_backward(dout_BLD, saved, scale_D, scene.points)
    assert_equal(out_BLD, zeros_BLD, "out_BLD")
    assert_equal(dx_BLD, 64.0 * dout_BLD * scale_D, "dx_BLD")
    assert_equal(dscale_D, np.zeros(scale_D.shape), "dscale_D")


@clause("T-NORM-2")
@draws(plan=plans("BL", points=0, D=4))
def test_norm_backward__adjoint(operations: Operations, plan: Plan) -> None:
    """<y(s), d> = <s, ds(d)> exactly on integers: the output is linear in the scale, and the scale's gradient is that map's transpose."""
    scene = Scene(operations, plan)
    x_BLD = np.where(scene.whole("BLD") > 0, 2.0, -2.0).astype(scene.dtype)  # its root mean square is 2
    scale_D, dout_BLD = scene.whole("D"), scene.whole("BLD")
    out_BLD, saved = operations.norm_forward(x_BLD, scale_D, 0.0, scene.points)
    _, dscale_D = operations.norm_backward(dout_BLD, saved, scale_D, scene.points)
    assert dot(out_BLD, dout_BLD) == dot(dscale_D, scale_D)


@clause("T-NORM-2")
@needs(wide=True)
@draws(plan=plans("BLD", points=0), epsilon=EPSILONS)
def test_norm_backward__finite_difference(operations: Operations, plan: Plan, epsilon: float) -> None:
    """The slope along a direction of the input and of the scale is the gradient times the direction."""
    scene = Scene(operations, plan)
    x_BLD, scale_D, dout_BLD = scene.normal("BLD"), scene.normal("D"), scene.gradient("BLD")
    _, saved = operations.norm_forward(x_BLD, scale_D, epsilon, MODEL_TRUTH)
    dx_BLD, dscale_D = operations.norm_backward(dout_BLD, saved, scale_D, MODEL_TRUTH)
    noise = noise_of([(norm_tubes(x_BLD, scale_D, epsilon, dout_BLD, MODEL_TRUTH, scene.arithmetic).out_BLD, dout_BLD)])

    def value(x: np.ndarray, scale: np.ndarray) -> tuple[float, int]:
        return float(np.sum(dout_BLD * operations.norm_forward(x, scale, epsilon, MODEL_TRUTH)[0])), 0

    assert_slopes(value, {"x": x_BLD, "scale": scale_D}, {"x": dx_BLD, "scale": dscale_D}, noise, scene.random)


@clause("T-NORM-1", "T-NORM-2")
@draws()
def test_norm__by_hand(operations: Operations) -> None:
    """(1, 7) has mean square 25: r = 1/5 with no epsilon, 1/10 with 75; the gradient is n r - x (n . x) r^3 / D."""
    scene = Scene(operations, Plan({"B": 1, "L": 1, "D": 2}, 0, 0))
    x_BLD, scale_D = np.array([[[1.0, 7.0]]], scene.dtype), np.array([10.0, 20.0], scene.dtype)
    dout_BLD = np.array([[[5.0, -1.0]]], scene.dtype)
    for epsilon, out, dx, dscale in ((0.0, [2.0, 28.0], [10.36, -1.48], [1.0, -1.4]), (75.0, [1.0, 14.0], [5.045, -1.685], [0.5, -0.7])):
        out_BLD, saved = operations.norm_forward(x_BLD, scale_D, epsilon, MODEL_TRUTH)
        dx_BLD, dscale_D = operations.norm_backward(dout_BLD, saved, scale_D, MODEL_TRUTH)
        tube = norm_tubes(x_BLD, scale_D, epsilon, dout_BLD, MODEL_TRUTH, scene.arithmetic)
        for got, wanted, within in ((out_BLD, out, tube.out_BLD), (dx_BLD, dx, tube.dx_BLD), (dscale_D, dscale, tube.dscale_D)):
            assert np.all(np.abs(np.ravel(got) - wanted) <= 2.0 * np.ravel(within.radius))
