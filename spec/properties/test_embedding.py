# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The table, read by index and as the logits' matrix; logits by a matrix of their own: T-EMBED-1, T-LOGITS-1, T-LOGITS-2."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from properties.drawn import Plan, Scene, assert_equal, assert_on_grid, assert_slopes, assert_within, in_every_format, noise_of, plans, powers
from properties.harness import clause, draws, needs
from properties.model_tubes import logits_tubes, tied_logits_tubes
from properties.operations import Operations
from refswitch.config import MODEL_TRUTH
from refswitch.proof.adjoint import dot


@clause("T-EMBED-1")
@needs("a token read twice", "a token never read")
@draws(plan=plans("BLD", V=st.integers(2, 30)))
def test_embed__adjoint(operations: Operations, plan: Plan) -> None:
    """Each token has its row's bits; <x(table), d> = <table, dtable(d)> exactly on integers; a row never read has no gradient."""
    scene, V = Scene(operations, plan), plan.sizes["V"]
    tokens_BL, table_VD, dx_BLD = scene.below("BL", V), scene.whole("VD"), scene.whole("BLD")
    count_V = np.bincount(tokens_BL.ravel(), minlength=V)
    operations.meets("a token read twice", (count_V > 1).any())
    operations.meets("a token never read", (count_V == 0).any())
    x_BLD, dtable_VD = operations.embed_forward(tokens_BL, table_VD), operations.embed_backward(dx_BLD, tokens_BL, V)
    assert (x_BLD.dtype, dtable_VD.dtype) == (scene.dtype, scene.dtype)
    for index, token in np.ndenumerate(tokens_BL):
        assert_equal(x_BLD[index], table_VD[token], "x_D")
    assert dot(x_BLD, dx_BLD) == dot(table_VD, dtable_VD)
    assert not dtable_VD[count_V == 0].any()


@clause("T-EMBED-1")
@draws()
def test_embed__by_hand(operations: Operations) -> None:
    """Three tokens of two kinds: the row read twice has two gradients."""
    scene = Scene(operations, Plan({}, 0, 0))
    table_VD = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], scene.dtype)
    assert operations.embed_forward(np.array([[2, 0, 2]]), table_VD).tolist() == [[[5.0, 6.0], [1.0, 2.0], [5.0, 6.0]]]
    dx_BLD = np.array([[[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]]], scene.dtype)
    assert operations.embed_backward(dx_BLD, np.array([[2, 0, 2]]), 3).tolist() == [[4.0, 8.0], [0.0, 0.0], [17.0, 34.0]]


@clause("T-LOGITS-1", "T-LOGITS-2", is_oracle=True)
@needs("narrow points")
@draws(examples=in_every_format("BLDV"), plan=plans("BLDV"))
def test_logits__match_their_derivation(operations: Operations, plan: Plan) -> None:
    """Logits and both gradients, tied and untied, lie in the tubes of the derivation, rounded where the points say."""
    scene = Scene(operations, plan)
    x_BLD, table_VD, dlogits_BLV = scene.normal("BLD"), scene.normal("VD"), scene.gradient("BLV")
    w_logits_DV = np.ascontiguousarray(table_VD.T)
    calls = (
        (operations.tied_logits_forward, operations.tied_logits_backward, table_VD, tied_logits_tubes, "dembedding_VD"),
        (operations.logits_forward, operations.logits_backward, w_logits_DV, logits_tubes, "dw_logits_DV"),
    )
    for forward, backward, weight, tubes_of, name in calls:
        tube = tubes_of(x_BLD, weight, dlogits_BLV, scene.points, scene.arithmetic)
        logits_BLV, (dx_BLD, dw) = forward(x_BLD, weight, scene.points), backward(dlogits_BLV, x_BLD, weight, scene.points)
        assert_within(logits_BLV, tube.logits_BLV, "logits_BLV", scene)
        assert_within(dx_BLD, tube.dx_BLD, "dx_BLD", scene)
        assert_within(dw, tube.dw, name, scene)
        assert_on_grid(logits_BLV, "logits", "logits_BLV", scene)
        assert_on_grid(dx_BLD, "gradients", "dx_BLD", scene)


@clause("T-LOGITS-1", "T-LOGITS-2")
@draws(plan=plans("BLV", D=st.sampled_from((4, 16))))
def test_tied_logits__are_untied_ones_of_the_transposed_table(operations: Operations, plan: Plan) -> None:
    """With D = 4 or 16 the factor is a power of two: tied logits are the untied ones of the transposed table times D^(-1/2), to the bit."""
    scene, D = Scene(operations, plan), plan.sizes["D"]
    x_BLD, table_VD, dlogits_BLV = scene.whole("BLD"), scene.whole("VD"), scene.whole("BLV")
    factor, w_logits_DV = {4: 0.5, 16: 0.25}[D], np.ascontiguousarray(table_VD.T)
    tied = operations.tied_logits_forward(x_BLD, table_VD, scene.points)
    assert_equal(tied, factor * operations.logits_forward(x_BLD, w_logits_DV, scene.points), "logits_BLV")
    dx_BLD, dtable_VD = operations.tied_logits_backward(dlogits_BLV, x_BLD, table_VD, scene.points)
    untied_dx_BLD, dw_logits_DV = operations.logits_backward(dlogits_BLV, x_BLD, w_logits_DV, scene.points)
    assert_equal(dx_BLD, factor * untied_dx_BLD, "dx_BLD")
    assert_equal(dtable_VD, factor * dw_logits_DV.T, "dembedding_VD")


@clause("T-LOGITS-1", "T-LOGITS-2")
@draws(plan=plans("BLV", points=0, D=4), power=powers())
def test_logits__adjoint(operations: Operations, plan: Plan, power: float) -> None:
    """Linear in the input and in the matrix: each gradient is its map's transpose, exactly on integers; a matrix times 2^k has logits times 2^k."""
    scene = Scene(operations, plan)
    x_BLD, table_VD, dlogits_BLV = 2.0 * scene.whole("BLD"), scene.whole("VD"), 2.0 * scene.whole("BLV")
    for forward, backward, weight in (
        (operations.tied_logits_forward, operations.tied_logits_backward, table_VD),
        (operations.logits_forward, operations.logits_backward, np.ascontiguousarray(table_VD.T)),
    ):
        logits_BLV, (dx_BLD, dw) = forward(x_BLD, weight, scene.points), backward(dlogits_BLV, x_BLD, weight, scene.points)
        assert dot(logits_BLV, dlogits_BLV) == dot(x_BLD, dx_BLD) == dot(weight, dw)
        assert_equal(forward(x_BLD, (power * weight).astype(scene.dtype), scene.points), power * logits_BLV, "logits_BLV")


@clause("T-LOGITS-1", "T-LOGITS-2")
@needs(wide=True)
@draws(plan=plans("BLDV", points=0))
def test_logits__finite_difference(operations: Operations, plan: Plan) -> None:
    """The slopes along the input and the matrix are the gradients."""
    scene = Scene(operations, plan)
    x_BLD, table_VD, dlogits_BLV = scene.normal("BLD"), scene.normal("VD"), scene.gradient("BLV")
    for forward, backward, weight, tubes_of in (
        (operations.tied_logits_forward, operations.tied_logits_backward, table_VD, tied_logits_tubes),
        (operations.logits_forward, operations.logits_backward, np.ascontiguousarray(table_VD.T), logits_tubes),
    ):

        def value(x: np.ndarray, w: np.ndarray, forward: object = forward) -> tuple[float, int]:
            return float(np.sum(dlogits_BLV * forward(x, w, MODEL_TRUTH))), 0  # type: ignore[operator]

        dx_BLD, dw = backward(dlogits_BLV, x_BLD, weight, MODEL_TRUTH)
        noise = noise_of([(tubes_of(x_BLD, weight, dlogits_BLV, MODEL_TRUTH, scene.arithmetic).logits_BLV, dlogits_BLV)])
        assert_slopes(value, {"x": x_BLD, "w": weight}, {"x": dx_BLD, "w": dw}, noise, scene.random)


@clause("T-LOGITS-1", "T-LOGITS-2")
@draws()
def test_logits__by_hand(operations: Operations) -> None:
    """Four features, two words: tied has half of untied."""
    scene = Scene(operations, Plan({}, 0, 0))
    x_BLD, table_VD = np.array([[[1.0, 2.0, 3.0, 4.0]]], scene.dtype), np.array([[1.0, 0, 1.0, 0], [0, 0, 0, 1.0]], scene.dtype)
    w_logits_DV, dlogits_BLV = np.ascontiguousarray(table_VD.T), np.array([[[2.0, 4.0]]], scene.dtype)
    assert operations.tied_logits_forward(x_BLD, table_VD, scene.points).tolist() == [[[2.0, 2.0]]]
    assert operations.logits_forward(x_BLD, w_logits_DV, scene.points).tolist() == [[[4.0, 4.0]]]
    dx_BLD, dtable_VD = operations.tied_logits_backward(dlogits_BLV, x_BLD, table_VD, scene.points)
    assert (dx_BLD.tolist(), dtable_VD.tolist()) == ([[[1.0, 0, 1.0, 2.0]]], [[1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]])
    dx_BLD, dw_logits_DV = operations.logits_backward(dlogits_BLV, x_BLD, w_logits_DV, scene.points)
    assert (dx_BLD.tolist(), dw_logits_DV.tolist()) == ([[[2.0, 0, 2.0, 4.0]]], [[2.0, 4.0], [4.0, 8.0], [6.0, 12.0], [8.0, 16.0]])
