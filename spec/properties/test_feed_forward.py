# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The dense feed-forward network and its backward: T-FFN-1, T-FFN-2."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from properties.drawn import (
    Plan,
    Scene,
    assert_equal,
    assert_near,
    assert_on_grid,
    assert_slopes,
    assert_within,
    in_every_format,
    noise_of,
    plans,
    powers,
)
from properties.harness import clause, draws, needs
from properties.model_tubes import FeedForwardTubes, feed_forward_tubes
from properties.operations import Operations
from refswitch.proof.adjoint import dot
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.verify.tubes import Tube

ACTIVATIONS = st.sampled_from(("relu", "gelu_tanh", "gelu_erf", "silu"))
SMOOTH = st.sampled_from(("gelu_tanh", "gelu_erf", "silu"))
NAMES = ("out_BLD", "dx_BLD", "dw_in_DF", "dw_gate_DF", "dw_out_FD")


def params_of(scene: Scene, gated: bool) -> FeedForwardParams:
    """Draw the matrices."""
    return FeedForwardParams(scene.normal("DF"), scene.normal("DF") if gated else None, scene.normal("FD"))


def play(
    operations: Operations, x_BLD: np.ndarray, params: FeedForwardParams, factor_BLF: np.ndarray, activation: str, dout_BLD: np.ndarray, scene: Scene
) -> list[np.ndarray]:
    """Return the output and the gradients; that of w_gate where there is one."""
    out_BLD, saved = operations.feed_forward_forward(x_BLD, params, factor_BLF, activation, scene.points)
    dx_BLD, dparams = operations.feed_forward_backward(dout_BLD, saved, params, activation, scene.points)
    assert (dparams.w_gate_DF is None) == (params.w_gate_DF is None)
    return [array for array in (out_BLD, dx_BLD, *dparams) if array is not None]


def tubes_in_order(tube: FeedForwardTubes) -> list[tuple[str, Tube]]:
    """Return the tubes of what `play` returns, with their names."""
    return [(name, wanted) for name, wanted in zip(NAMES, tube, strict=True) if wanted is not None]


@clause("T-FFN-1", "T-FFN-2", is_oracle=True)
@needs("narrow points", "gated", "not gated")
@draws(
    examples=[*in_every_format("BLDF", "gelu_tanh", True), *in_every_format("BLDF", "relu", False)],
    plan=plans("BLDF"),
    activation=ACTIVATIONS,
    gated=st.booleans(),
)
def test_feed_forward__matches_its_derivation(operations: Operations, plan: Plan, activation: str, gated: bool) -> None:
    """Output and gradients lie in the tubes of the derivation, rounded where the points say, for every activation, gated and not."""
    scene = Scene(operations, plan)
    operations.meets("gated" if gated else "not gated")
    x_BLD, params, factor_BLF, dout_BLD = scene.normal("BLD"), params_of(scene, gated), scene.factor("BLF"), scene.gradient("BLD")
    found = play(operations, x_BLD, params, factor_BLF, activation, dout_BLD, scene)
    tube = feed_forward_tubes(x_BLD, tuple(params), factor_BLF, activation, dout_BLD, scene.points, scene.arithmetic)
    for got, (name, wanted) in zip(found, tubes_in_order(tube), strict=True):
        assert_within(got, wanted, name, scene)
    assert_on_grid(found[0], "activations", "out_BLD", scene)
    assert_on_grid(found[1], "gradients", "dx_BLD", scene)


@clause("T-FFN-1", "T-FFN-2")
@draws(plan=plans("BLDF", points=0), activation=ACTIVATIONS, gated=st.booleans())
def test_feed_forward__hidden_permutation(operations: Operations, plan: Plan, activation: str, gated: bool) -> None:
    """The hidden units may come in any order, columns of the first matrices and rows of the second alike; each token has its own row."""
    scene = Scene(operations, plan)
    x_BLD, params, factor_BLF, dout_BLD = scene.normal("BLD"), params_of(scene, gated), scene.factor("BLF"), scene.gradient("BLD")
    order, tokens = scene.random.permutation(plan.sizes["F"]), scene.random.permutation(plan.sizes["L"])
    w_gate_DF = None if params.w_gate_DF is None else params.w_gate_DF[:, order]
    moved = FeedForwardParams(params.w_in_DF[:, order], w_gate_DF, params.w_out_FD[order])
    one = play(operations, x_BLD, params, factor_BLF, activation, dout_BLD, scene)
    two = play(operations, x_BLD[:, tokens], moved, factor_BLF[:, tokens][..., order], activation, dout_BLD[:, tokens], scene)
    tube = feed_forward_tubes(x_BLD, tuple(params), factor_BLF, activation, dout_BLD, scene.points, scene.arithmetic)
    for got, other, (name, wanted) in zip(one, two, tubes_in_order(tube), strict=True):
        index = {"BLD": np.s_[:, tokens], "DF": np.s_[:, order], "FD": np.s_[order]}[name.rpartition("_")[2]]
        assert_near(other, got[index], wanted.at(index), name)


@clause("T-FFN-1", "T-FFN-2")
@needs("narrow points")
@draws(plan=plans("BLDF"), power=powers(4), gated=st.booleans())
def test_feed_forward__relu_is_homogeneous(operations: Operations, plan: Plan, power: float, gated: bool) -> None:
    """The matrix under ReLU times 2^k is an output times 2^k with unchanged gradients of its own; the linear half and w_out likewise."""
    scene = Scene(operations, plan)
    x_BLD, params, factor_BLF, dout_BLD = scene.normal("BLD"), params_of(scene, gated), scene.factor("BLF"), scene.gradient("BLD")
    out_BLD, *_ = play(operations, x_BLD, params, factor_BLF, "relu", dout_BLD, scene)
    for place, name in enumerate(name for name in params._fields if getattr(params, name) is not None):
        scaled = params._replace(**{name: (getattr(params, name) * power).astype(scene.dtype)})
        other_BLD, dx_BLD, *dparams = play(operations, x_BLD, scaled, factor_BLF, "relu", dout_BLD, scene)
        _, one_dx_BLD, *one_dparams = play(operations, x_BLD, params, factor_BLF, "relu", dout_BLD, scene)
        assert_equal(other_BLD, power * out_BLD, "out_BLD")
        assert_equal(dx_BLD, power * one_dx_BLD, "dx_BLD")
        for at, (other, one) in enumerate(zip(dparams, one_dparams, strict=True)):
            assert_equal(other, one if at == place else power * one, f"gradient {at}")


@clause("T-FFN-2")
@needs("gated", "not gated")
@draws(plan=plans("BLDF", points=0), gated=st.booleans())
def test_feed_forward_backward__adjoint(operations: Operations, plan: Plan, gated: bool) -> None:
    """Linear in w_out, in the linear half, and (ReLU) in the matrix under the activation: each gradient is the transpose, exactly on integers."""
    scene = Scene(operations, plan)
    operations.meets("gated" if gated else "not gated")
    x_BLD, factor_BLF, dout_BLD = scene.whole("BLD"), scene.factor("BLF"), scene.whole("BLD")
    params = FeedForwardParams(scene.whole("DF"), scene.whole("DF") if gated else None, scene.whole("FD"))
    out_BLD, dx_BLD, *dparams = play(operations, x_BLD, params, factor_BLF, "relu", dout_BLD, scene)
    wanted = dot(out_BLD, dout_BLD)
    for weight, dweight in zip([weight for weight in params if weight is not None], dparams, strict=True):
        assert dot(weight, dweight) == wanted
    assert dot(x_BLD, dx_BLD) == (2.0 if gated else 1.0) * wanted  # of degree 2 in the input where gated


@clause("T-FFN-2")
@needs(wide=True)
@draws(plan=plans("BLDF", points=0), activation=SMOOTH, gated=st.booleans())
def test_feed_forward_backward__finite_difference(operations: Operations, plan: Plan, activation: str, gated: bool) -> None:
    """The slopes along the input and each matrix are the gradients."""
    scene = Scene(operations, plan)
    x_BLD, params, factor_BLF, dout_BLD = scene.normal("BLD"), params_of(scene, gated), scene.factor("BLF"), scene.gradient("BLD")
    _, *gradients = play(operations, x_BLD, params, factor_BLF, activation, dout_BLD, scene)
    tube = feed_forward_tubes(x_BLD, tuple(params), factor_BLF, activation, dout_BLD, scene.points, scene.arithmetic)
    arguments = {"x_BLD": x_BLD, **{name: weight for name, weight in params._asdict().items() if weight is not None}}

    def value(x_BLD: np.ndarray, **weights: np.ndarray) -> tuple[float, int]:
        out_BLD, _ = operations.feed_forward_forward(x_BLD, params._replace(**weights), factor_BLF, activation, scene.points)
        return float(np.sum(dout_BLD * out_BLD)), 0

    assert_slopes(value, arguments, dict(zip(arguments, gradients, strict=True)), noise_of([(tube.out_BLD, dout_BLD)]), scene.random)


@clause("T-FFN-1", "T-FFN-2")
@draws()
def test_feed_forward__by_hand(operations: Operations) -> None:
    """ReLU of (3, -2) is (3, 0), the second unit has no gradient; gated, the halves are 5 and 7 and multiply."""
    scene = Scene(operations, Plan({}, 0, 0))
    x_BLD, dout_BLD, ones_BLF = (np.array([[values]], scene.dtype) for values in ([1.0, 2.0], [10.0, 100.0], [2.0, 1.0]))
    w_in_DF, w_gate_DF, w_out_FD = (
        np.array(values, scene.dtype) for values in ([[1.0, 0.0], [1.0, -1.0]], [[5.0, 0.0], [0.0, 7.0]], [[1.0, 2.0], [3.0, 4.0]])
    )
    params = FeedForwardParams(w_in_DF, None, w_out_FD)
    out_BLD, dx_BLD, dw_in_DF, dw_out_FD = play(operations, x_BLD, params, ones_BLF, "relu", dout_BLD, scene)
    # hidden = (3 * 2, 0), dhidden = (210, 430), dz = (420, 0)
    assert (out_BLD.tolist(), dx_BLD.tolist()) == ([[[6.0, 12.0]]], [[[420.0, 420.0]]])
    assert (dw_in_DF.tolist(), dw_out_FD.tolist()) == ([[420.0, 0.0], [840.0, 0.0]], [[60.0, 600.0], [0.0, 0.0]])
    gated = FeedForwardParams(w_in_DF, w_gate_DF, w_out_FD)
    out_BLD, dx_BLD, dw_in_DF, dw_gate_DF, dw_out_FD = play(operations, x_BLD, gated, ones_BLF, "relu", dout_BLD, scene)
    # gate = (5, 14), linear = (3, -2), hidden = (30, -28); d gate = (210 * 2 * 3, 430 * -2), d linear = (420 * 5, 430 * 14)
    assert out_BLD.tolist() == [[[30.0 - 84.0, 60.0 - 112.0]]]
    assert dw_gate_DF.tolist() == [[1260.0, -860.0], [2520.0, -1720.0]]
    assert dw_in_DF.tolist() == [[2100.0, 6020.0], [4200.0, 12040.0]]
    assert dw_out_FD.tolist() == [[300.0, 3000.0], [-280.0, -2800.0]]
    assert dx_BLD.tolist() == [[[5.0 * 1260.0 + 2100.0, 7.0 * -860.0 + 2100.0 - 6020.0]]]
