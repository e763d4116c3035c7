# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Padding: S-PAD-1, S-PAD-2; and where it may show in nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from properties.conditions import MASKED, ROUTED
from properties.harness import clause, draws, needs
from properties.implementation import Implementation
from properties.scenes import ALL_GRADIENTS, EVERYTHING, FORWARD, OF_EXPERTS, Scene, assert_same, assert_zero, certain, play, replay
from properties.strategies import OVERFLOW_IN_GROUPS, TOKENS_AS_EXPERTS, changed, letters_of, recipes, with_axis
from refswitch.verify.cases import Recipe

PADS = st.sampled_from(("right", "left", "scattered"))
OVERFLOW_PADDED = replace(OVERFLOW_IN_GROUPS, pads="scattered", losses=(0.0, 0.0))


@clause("S-PAD-1", "S-AUX-1", "S-Z-1", "S-BACK-1", "S-BACK-2")
@needs("pad", only={"pad.zero_input": (True,)})
@draws(examples=[(TOKENS_AS_EXPERTS, np.nan)], recipe=recipes(pads=PADS, ties=""), poison=st.sampled_from((np.nan, np.inf, 2.0**60)))
def test_padding__poison_stays_outside(implementation: Implementation, recipe: Recipe, poison: float) -> None:
    """Whatever padding holds, NaN and infinity too, where the layer zeroes it no output and no gradient sees it, and dx is 0 there."""
    scene = play(implementation, recipe)
    pad_GS = ~scene.layer.inputs.valid_GS
    quiet, loud = (
        replay(implementation, changed(scene.case, implementation.target, x=np.where(pad_GS[..., None], value, scene.case.x)))
        for value in (0.0, poison)
    )
    certain(quiet)
    assert_same(quiet, loud, EVERYTHING, is_exact=True)
    assert_zero(loud, ("dx",), only=pad_GS)


@clause("S-PAD-1", "S-PAD-2", "S-CAP-1", "S-BACK-3", "S-BACK-4")
@needs("pad_and_drop", only=ROUTED | MASKED | {"pad.route": ("exclude",)})
@draws(
    examples=[(OVERFLOW_PADDED, 2.0**20), (TOKENS_AS_EXPERTS, -1.0)],
    recipe=recipes(pads=PADS, ties="", capacity=st.sampled_from((2, 1, 3)), losses=(0.0, 0.0)),
    factor=st.sampled_from((2.0**20, -1.0, 0.0)),
)
def test_padding__content_reaches_nobody(implementation: Implementation, recipe: Recipe, factor: float) -> None:
    """What stands in a row that is not routed is in no token's results and in no expert's gradient, however large it is and wherever it would go."""
    scene = play(implementation, recipe)
    pad_GS = ~scene.layer.inputs.valid_GS
    x_GSD = np.where(pad_GS[..., None], scene.case.x * factor, scene.case.x)
    other = replay(implementation, changed(scene.case, implementation.target, x=x_GSD))
    certain(scene, other)
    assert_same(scene, other, (*FORWARD, "dx"), only_GS=~pad_GS)
    assert_same(scene, other, (*OF_EXPERTS, "z_loss") if implementation.dialect.z.pads == "exclude" else OF_EXPERTS)
    assert_zero(other, ("out", "dx"), only=pad_GS)


@clause("S-PAD-1", "S-PAD-2", "S-DROP-1")
@needs("pad", only={"pad.route": ("exclude", "expert0_weight0")})
@draws(examples=[TOKENS_AS_EXPERTS], recipe=recipes(pads=PADS | st.just("all")))
def test_padding__outputs_zero(implementation: Implementation, recipe: Recipe) -> None:
    """A row that sits out outputs exact zeros and is not kept."""
    scene = play(implementation, recipe)
    pad_GS = scene.layer.sits_out_GS
    assert_zero(scene, ("out",), only=pad_GS)
    assert "kept" not in scene.outputs or not scene.outputs["kept"][pad_GS].any()


@clause("S-PAD-1", "S-PAD-2", "S-CAP-1", "S-POS-1", "S-Z-1", "S-BACK-3", "S-BACK-4")
@needs("pad_and_drop", only=ROUTED | MASKED | {"pad.route": ("exclude",)}, without=("own_capacity",))
@draws(
    examples=[(OVERFLOW_IN_GROUPS, 1, 1), (Recipe("crowded-0", S=9, D=5, E=7, F=4, hot=0, capacity=2), 3, 0)],
    recipe=recipes(ties="", pads="", capacity=st.sampled_from((2, 1, 3))),
    before=st.integers(0, 3),
    after=st.integers(0, 4),
)
def test_padding__appended_changes_nothing(implementation: Implementation, recipe: Recipe, before: int, after: int) -> None:
    """Padding before or behind the tokens changes nothing of theirs, who is dropped included, nor the z-loss, nor an expert's gradient."""
    target = implementation.target
    bare = play(implementation, recipe)
    before, after = (before, after) if before + after else (1, 1)
    wide = _with_padding(bare, before, after)
    certain(bare, wide)
    S = bare.case.sizes["S"]
    pad_GS = ~wide.layer.inputs.valid_GS

    def moved(name: str, array: np.ndarray) -> np.ndarray:
        letters = letters_of(name, array, target)
        widths = [(before, after) if letter == "S" else (0, 0) for letter in letters]
        return np.pad(array, widths) if "S" in letters else array

    z = ("z_loss",) if implementation.dialect.z.pads == "exclude" and implementation.dialect.z.denom == "valid" else ()
    assert_same(bare, wide, (*FORWARD, *z), move=moved, only_GS=~pad_GS)
    quiet = {name: 0.0 for name in ("daux", "dz") if name in bare.case}
    a, b = (replay(implementation, changed(scene.case, target, **quiet)) for scene in (bare, wide))
    assert_same(a, b, ALL_GRADIENTS, move=moved)
    aux = implementation.dialect.aux
    if (aux.f.pads, aux.P_pads, aux.denom, aux.pad_scale) == ("exclude", "exclude", "valid", "none"):
        assert_same(bare, wide, ("aux_loss", "dw_router"))
    assert S + before + after == wide.case.sizes["S"]


def _with_padding(scene: Scene, before: int, after: int) -> Scene:
    """Play the scene with padding around every group's tokens; it holds copies of tokens."""
    case, target = scene.case, scene.implementation.target
    S = case.sizes["S"]
    order = np.concatenate([np.arange(before) % S, np.arange(S), np.arange(after) % S])
    wide = with_axis(case, target, "S", order)
    valid_GS = np.broadcast_to((np.arange(len(order)) >= before) & (np.arange(len(order)) < before + S), wide.x.shape[:2])
    extra = {}
    if "priority" in case:
        around_GS = np.arange(len(order)) - before + S * (np.arange(len(order)) < before) * 9 + S
        extra["priority"] = np.where(valid_GS, np.take(case.priority, np.clip(np.arange(len(order)) - before, 0, S - 1), axis=1), around_GS)
        extra["priority"] = np.argsort(np.argsort(extra["priority"], axis=-1, kind="stable"), axis=-1, kind="stable")
    capacity = max(len(order), 1) if target.dialect.capacity.expr in ("inf", "max_count") else case.capacity
    return replay(scene.implementation, changed(wide, target, valid=valid_GS, capacity=capacity, **extra))


@clause("S-PAD-1", "S-PAD-2", "S-AUX-1", "S-Z-1")
@needs(features=("padding",), only=MASKED)
@draws(recipe=recipes(pads="", ties=""))
def test_padding__mask_of_all_ones(implementation: Implementation, recipe: Recipe) -> None:
    """A mask that says that every token is real is no mask."""
    bare = play(implementation, recipe)
    masked = replay(implementation, changed(bare.case, implementation.target, valid=np.ones_like(bare.claims_GS)))
    certain(bare)
    assert_same(bare, masked, EVERYTHING)


@clause("S-PAD-2")
@needs("pad", only={"pad.route": ("include",), "pad.zero_input": (False,)})
@draws(recipe=recipes(pads=PADS, ties=""))
def test_padding__included_is_a_token(implementation: Implementation, recipe: Recipe) -> None:
    """Where the dialect routes padding, it is a token like any other in every row."""
    masked = play(implementation, recipe)
    bare = replay(implementation, changed(masked.case, implementation.target, valid=None))
    certain(bare)
    assert_same(bare, masked, FORWARD)
