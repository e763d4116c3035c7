# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The gradients as functions of what comes from above, and where they must be 0: S-BACK-1 to S-BACK-6. Next: `test_adjoint`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from properties.conditions import GATE_IS_P
from properties.harness import clause, draws, needs
from properties.implementation import Implementation
from properties.scenes import (
    ALL_GRADIENTS,
    OF_EXPERTS,
    OF_ROUTER,
    Scene,
    assert_same,
    assert_within,
    assert_zero,
    certain,
    play,
    plus,
    quietly,
    replay,
)
from properties.strategies import OVERFLOW_IN_GROUPS, SQUARE, TAILS, TIES, changed, plain, recipes
from refswitch.verify.cases import Recipe
from refswitch.verify.tubes import Tube

BACKWARD = ("backward",)


# linear in what comes from above


@clause("S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", "S-BACK-5", "S-BACK-6")
@needs("drop", "empty_expert", features=BACKWARD)
@draws(examples=[(OVERFLOW_IN_GROUPS, -1.0)], recipe=recipes(ties=""), factor=st.sampled_from((2.0, -1.0, 0.125, 0.0)))
def test_backward__linear_in_dout(implementation: Implementation, recipe: Recipe, factor: float) -> None:
    """All that comes from above times a power of two: all gradients times that, to the bit; nothing from above: exact zeros."""
    scene = play(implementation, recipe)
    above = {name: scene.case[name] * factor for name in ("dout", "daux", "dz") if name in scene.case}
    other = replay(implementation, changed(scene.case, implementation.target, **above))
    assert_same(scene, other, ALL_GRADIENTS, times=factor, is_exact=True)


@clause("S-BACK-1", "S-BACK-2", "S-BACK-5", "S-BACK-6")
@needs("drop", features=(*BACKWARD, "z_loss"), wide_gradients=True)
@draws(examples=[OVERFLOW_IN_GROUPS, replace(TAILS, train=True)], recipe=recipes(ties=""))
def test_backward__losses_superpose(implementation: Implementation, recipe: Recipe) -> None:
    """The gradient of a sum of losses is the sum of their gradients; the router's losses give the experts exact zeros."""
    scene = play(implementation, recipe)
    certain(scene)
    names = [name for name in ("dout", "daux", "dz") if name in scene.case]
    parts = [quietly(scene, name) for name in names]
    for name in ALL_GRADIENTS:
        if scene.has(name):
            expected = plus(*(part.around(name) for part in parts))
            assert_within(name, scene.outputs[name], Tube(expected.value, expected.radius + scene.tube(name).radius))
    for part in parts[1:]:
        assert_zero(part, OF_EXPERTS)


@clause("S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4")
@needs(features=BACKWARD, wide_gradients=True)
@draws(recipe=recipes(ties="", losses=(0.0, 0.0)))
def test_backward__additive_in_dout(implementation: Implementation, recipe: Recipe) -> None:
    """What half of the tokens and what the other half send back add up."""
    scene = play(implementation, recipe)
    certain(scene)
    even_GS1 = (np.arange(scene.claims_GS.size) % 2 == 0).reshape(scene.claims_GS.shape)[..., None]
    parts = [replay(implementation, changed(scene.case, implementation.target, dout=scene.case.dout * half)) for half in (even_GS1, ~even_GS1)]
    for name in ALL_GRADIENTS:
        if scene.has(name):
            expected = plus(*(part.around(name) for part in parts))
            assert_within(name, scene.outputs[name], Tube(expected.value, expected.radius + scene.tube(name).radius))
    for half, part in zip((even_GS1, ~even_GS1), parts, strict=True):
        assert_zero(part, ("dx",), only=~half[..., 0])


# support


@clause("S-BACK-3", "S-BACK-4")
@needs("empty_expert", "drop", features=BACKWARD)
@draws(examples=[OVERFLOW_IN_GROUPS, replace(SQUARE, avoid=1), Recipe("one-of-many", S=3, D=5, E=11, F=4)], recipe=recipes(losses=(0.0, 0.0)))
def test_backward__experts_without_tokens_get_zeros(implementation: Implementation, recipe: Recipe) -> None:
    """An expert that served no token has gradients of exactly 0: there, and not left over from anybody."""
    scene = play(implementation, recipe)
    idle_E = scene.kept_GE.sum(axis=0) == 0
    certain(scene)
    names = [name for name in OF_EXPERTS if name in scene.outputs and scene.outputs[name].shape[:1] == idle_E.shape and not _is_shared(scene, name)]
    assert_zero(scene, names, only=idle_E)
    assert all(np.isfinite(scene.outputs[name]).all() for name in ALL_GRADIENTS if name in scene.outputs)


def _is_shared(scene: Scene, name: str) -> bool:
    return name == "db_out" and scene.case.b_out.ndim == 1


@clause("S-BACK-2", "S-BACK-5", "S-BACK-6")
@needs("one_expert", features=BACKWARD, only=GATE_IS_P)
@draws(examples=[Recipe("one-expert", S=6, D=5, E=1, F=7, losses=(0.5, 0.0), train=True)], recipe=recipes(E=1, losses=(0.5, 0.0)))
def test_backward__the_only_expert_teaches_nothing(implementation: Implementation, recipe: Recipe) -> None:
    """With one expert its probability is 1 whatever the router does: output and balance loss give the router exact zeros."""
    scene = play(implementation, recipe)
    assert_zero(scene, OF_ROUTER)


@clause("S-BACK-2", "S-GATE-1")
@needs(features=BACKWARD, only=GATE_IS_P)
@draws(
    examples=[plain(), replace(SQUARE, name="learns")],
    recipe=recipes(
        E=st.sampled_from((2, 4)), S=st.sampled_from((8, 12)), capacity=None, pads="", router_scale=1.0, scale=1.0, ties="", losses=(0.0, 0.0)
    ),
)
def test_backward__router_learns_from_output(implementation: Implementation, recipe: Recipe) -> None:
    """The chosen probability is differentiable: the output's gradient reaches the router, and is not 0."""
    scene = play(implementation, recipe)
    assume(scene.has("dw_router") and np.any(np.abs(scene.tube("dw_router").value) > scene.tube("dw_router").radius))
    certain(scene)
    assert np.any(scene.outputs["dw_router"] != 0.0)


# against another evaluation


@clause("S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", "S-BACK-5", "S-BACK-6", "S-PREC-1", is_oracle=True)
@needs("drop", "tie", "several_groups", features=BACKWARD)
@draws(
    examples=[
        TIES,
        replace(OVERFLOW_IN_GROUPS, train=True, pads="scattered", noise=True, mask=True),
        replace(OVERFLOW_IN_GROUPS, train=True, out_scale=0.0, losses=(1.0, 0.0)),
        TAILS,
    ],
    recipe=recipes(),
)
def test_backward__matches_spec(implementation: Implementation, recipe: Recipe) -> None:
    """Every gradient lies within the radius of the spec's formula on the layer's own forward pass."""
    scene = play(implementation, recipe)
    assert not scene.judged(("backward",))
