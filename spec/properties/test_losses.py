# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The balance loss and the z-loss: S-AUX-1, S-Z-1."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from properties.conditions import ARGMAX, BALANCE, LOWEST, MASKED, NOISY_GATE, PAPER_F, UNCAPPED, VALID_Z
from properties.harness import clause, draws, needs
from properties.implementation import Implementation
from properties.lattice import routed_as, with_flat_logits
from properties.scenes import (
    LOSS_OF,
    LOSSES,
    OF_EXPERTS,
    OF_ROUTER,
    Scene,
    assert_meet,
    assert_same,
    assert_within,
    assert_zero,
    certain,
    play,
    quietly,
    replay,
)
from properties.strategies import OVERFLOW_IN_GROUPS, TAILS, changed, recipes, stored
from refswitch.verify import tubes
from refswitch.verify.cases import Recipe
from refswitch.verify.tubes import Tube

PLAIN_LOGITS = UNCAPPED | NOISY_GATE | MASKED


def _aux_around(scene: Scene, value: float) -> None:
    assert_within("aux_loss", scene.outputs["aux_loss"], Tube(np.asarray(value), scene.real("aux_loss").radius))


@clause("S-AUX-1")
@needs(features=("aux_loss",), exports=("aux_loss",), only=PAPER_F | PLAIN_LOGITS | LOWEST, wide=True)
@draws(
    recipe=recipes(E=st.sampled_from((2, 4, 5)), D=st.sampled_from((7, 13)), S=st.sampled_from((20, 40)), pads="", train=True),
    capacity=st.sampled_from((0, 2, 40)),
)
def test_balance__golden_values(implementation: Implementation, recipe: Recipe, capacity: int) -> None:
    """1 at an exact balance, E where all tokens go to one expert, 1 where all probabilities are equal, whatever is dropped."""
    scene = play(implementation, recipe)
    assume(scene.has("aux_loss"))
    S, E = scene.case.sizes["S"], scene.E
    assume(S % E == 0)
    shape_GS = scene.claims_GS.shape
    fits = {} if "own_capacity" in implementation.features or implementation.dialect.capacity.expr in ("inf", "max_count") else {"capacity": capacity}
    _aux_around(routed_as(scene, np.broadcast_to(np.arange(S) % E, shape_GS), **fits), 1.0)
    _aux_around(routed_as(scene, np.full(shape_GS, E - 1), **fits), float(E))
    _aux_around(with_flat_logits(scene, 2.0), 1.0)


@clause("S-AUX-1")
@needs("drop_not_on_expert_0", features=("aux_loss",), exports=("aux_loss",), only=PAPER_F, without=("own_capacity",))
@draws(examples=[replace(OVERFLOW_IN_GROUPS, train=True), replace(TAILS, train=True)], recipe=recipes(ties="", train=True))
def test_balance__ignores_the_capacity(implementation: Implementation, recipe: Recipe) -> None:
    """f counts choices: who is dropped changes neither loss."""
    scene = play(implementation, recipe)
    for capacity in (0, 1, scene.case.sizes["S"]):
        other = replay(implementation, changed(scene.case, implementation.target, capacity=capacity))
        certain(scene, other)
        assert_same(scene, other, LOSSES)


@clause("S-AUX-1")
@needs(
    "empty_expert",
    "several_groups",
    features=("aux_loss",),
    exports=("aux_loss", "probs"),
    only=PAPER_F | ARGMAX | NOISY_GATE,
)
@draws(
    examples=[replace(OVERFLOW_IN_GROUPS, train=True), Recipe("noisy", G=2, S=12, D=5, E=3, F=4, noise=True, train=True)], recipe=recipes(train=True)
)
def test_balance__is_of_own_counts_and_probabilities(implementation: Implementation, recipe: Recipe) -> None:
    """E times the sum of f P, f counted from the layer's own choices and P averaged from its own probabilities; then the mean over groups."""
    scene = play(implementation, recipe)
    assume(scene.has("aux_loss"))
    pairs = [_group_term(scene, g) for g in range(scene.case.sizes["G"])]
    value, slack = (math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True))
    assert_within("aux_loss", scene.outputs["aux_loss"], Tube(np.asarray(value), scene.tube("aux_loss").radius + slack))


def _group_term(scene: Scene, g: int) -> tuple[float, float]:
    """Return a group's E sum f P of its own probabilities, and what those may differ by from the exact ones."""
    aux, pad_S, sits_out_S = scene.implementation.dialect.aux, scene.layer.is_pad_GS[g], scene.layer.sits_out_GS[g]
    everyone_S = np.ones_like(pad_S)
    probs = scene.tube("probs").at(g)
    own_SE = np.where(sits_out_S[:, None], probs.value, np.asarray(scene.outputs["probs"][g], np.float64))
    counted_S = ~pad_S if aux.f.pads == "exclude" else everyone_S
    averaged_S = ~pad_S if aux.P_pads == "exclude" else everyone_S
    expert_S = np.where(pad_S & (aux.f.pads == "to_expert0"), 0, scene.expert_GS[g])
    n = max(len(pad_S) if aux.denom == "S" else int((~pad_S).sum()), 1)
    share = float((~pad_S).mean()) if aux.pad_scale == "nonpad_fraction" else 1.0
    f_E = np.bincount(expert_S[counted_S], minlength=scene.E) / n
    mean_E, slack_E = (array[averaged_S].sum(axis=0) / n for array in (own_SE, probs.radius))
    return share * scene.E * float(f_E @ mean_E), share * scene.E * float(f_E @ slack_E)


@clause("S-Z-1", "S-AUX-1")
@needs("drop", features=("z_loss",))
@draws(examples=[(replace(OVERFLOW_IN_GROUPS, train=True), 0.0)], recipe=recipes(ties=""), factor=st.sampled_from((0.0, -2.0)))
def test_losses__do_not_see_the_experts(implementation: Implementation, recipe: Recipe, factor: float) -> None:
    """Neither the experts' weights, nor dropout, nor what becomes of the output is in a loss of the router."""
    scene = play(implementation, recipe)
    changes = {name: scene.case[name] * factor for name in ("w_in", "w_out", "dout") if name in scene.case}
    other = replay(implementation, changed(scene.case, implementation.target, hidden_mask=None, **changes))
    certain(scene)
    assert_same(scene, other, LOSSES)


@clause("S-Z-1")
@needs(features=("z_loss",), exports=("z_loss",), only=PLAIN_LOGITS)
@draws(recipe=recipes(pads=""), level=st.sampled_from((0.0, 1.0, -3.0, 96.0, -10240.0, 10240.0)))
def test_z_loss__golden_value(implementation: Implementation, recipe: Recipe, level: float) -> None:
    """All logits at c: the z-loss is (c + ln E)^2, at c = 10240 and -10240 too, and c^2 for the only expert."""
    scene = play(implementation, recipe)
    assume(scene.has("z_loss"))
    flat = with_flat_logits(scene, level)
    value = (level + math.log(scene.E)) ** 2
    assert_within("z_loss", flat.outputs["z_loss"], Tube(np.asarray(value), flat.tube("z_loss").radius + tubes.OWN_UNIT * value))


@clause("S-Z-1", "S-NOISE-1")
@needs("logits_above_89", features=("z_loss",), exports=("z_loss",), only=PLAIN_LOGITS)
@draws(recipe=recipes(pads="", ties="exact", noise=False), shift=st.sampled_from((0.0, 96.0, -1000.0, 10240.0)))
def test_z_loss__of_own_logits(implementation: Implementation, recipe: Recipe, shift: float) -> None:
    """The mean over tokens of the squared log-sum-exp: of all experts' logits, squared, before any normalisation."""
    scene = play(implementation, recipe)
    assume(scene.has("z_loss"))
    x_GSD, w_DE = np.array(scene.case.x), np.array(scene.case.w_router)
    x_GSD[..., -1], w_DE[-1] = 1.0, shift
    other = replay(implementation, changed(scene.case, implementation.target, x=x_GSD, w_router=stored(w_DE, implementation.target, "w")))
    b_router_E = np.asarray(other.case.get("b_router", np.zeros(scene.E)), np.float64)
    logits = np.asarray(x_GSD, np.float64) @ np.asarray(other.case.w_router, np.float64) + b_router_E  # integers
    lse = [max(row) + math.log(math.fsum(math.exp(value - max(row)) for value in row)) for row in logits.reshape(-1, scene.E).tolist()]
    value = math.fsum(row**2 for row in lse) / len(lse)
    own = tubes.OWN_UNIT * (scene.E + len(lse) + 16.0) * value
    assert_within("z_loss", other.outputs["z_loss"], Tube(np.asarray(value), other.tube("z_loss").radius + own))


@clause("S-Z-1")
@needs("pad", features=("z_loss",), exports=("z_loss",), only=VALID_Z | PLAIN_LOGITS)
@draws(
    examples=[Recipe("unequal", G=2, S=9, D=5, E=3, F=4, pads="scattered"), Recipe("noisy", S=9, D=5, E=3, F=4, pads="left", noise=True)],
    recipe=recipes(pads=st.sampled_from(("right", "left", "scattered")), ties=""),
)
def test_z_loss__is_of_real_tokens(implementation: Implementation, recipe: Recipe) -> None:
    """The z-loss of a padded call is that of its real tokens in one group: the sum over all groups' tokens over their number."""
    scene = play(implementation, recipe)
    assume(scene.has("z_loss") and "select_noise" not in scene.case)
    valid_GS = scene.layer.inputs.valid_GS
    assume(valid_GS.any())
    arrays = {name: scene.case[name][valid_GS][None] for name in ("x", "noise", "dout", "hidden_mask") if name in scene.case}
    arrays |= {"priority": np.arange(int(valid_GS.sum()))[None]} if "priority" in scene.case else {}
    alone = replay(implementation, changed(scene.case, implementation.target, valid=None, **arrays))
    assert_meet("z_loss", alone.around("z_loss"), scene.around("z_loss"))


# the losses' own gradients


@clause("S-BACK-6")
@needs(
    "drop",
    "pad",
    features=("backward", "z_loss"),
    only=VALID_Z | UNCAPPED | MASKED,
    wide=True,
)
@draws(
    examples=[replace(OVERFLOW_IN_GROUPS, pads="scattered"), replace(TAILS, train=True)],
    recipe=recipes(ties="", noise=False, out_scale=0.0, losses=(0.0, 1.0)),
)
def test_dz__of_a_common_shift(implementation: Implementation, recipe: Recipe) -> None:
    """A common shift of all logits moves every real token's log-sum-exp by as much: that slope is 2 mean(lse), dropped tokens included."""
    scene = play(implementation, recipe)
    x_GSD = np.array(scene.case.x)
    x_GSD[..., -1] = 1.0
    other = replay(implementation, changed(quietly(scene, "dz").case, implementation.target, x=x_GSD, noise=None))
    valid_GS = other.layer.inputs.valid_GS
    assume(other.has("dw_router") and valid_GS.any())
    lse = tubes.log_sum_exp(other.tube("logits"), other.layer.router)
    slope = 2.0 * float(other.case.dz) * np.mean(lse.value[valid_GS])
    row = other.real("dw_router").at(-1)
    radius = row.radius.sum() + 2.0 * np.max(lse.radius[valid_GS]) + tubes.OWN_UNIT * (lse.value.size + 8.0) * np.max(np.abs(lse.value))
    assert_within("sum of dw_router[d=-1]", row.value.sum(), Tube(np.asarray(slope), np.asarray(radius)))


@clause("S-BACK-5")
@needs("drop", features=("backward", "aux_loss"), only=BALANCE | {"aux.f.drops": ("include",)}, without=("own_capacity",))
@draws(
    examples=[replace(OVERFLOW_IN_GROUPS, train=True), replace(TAILS, train=True)],
    recipe=recipes(ties="", train=True, out_scale=0.0, losses=(1.0, 0.0)),
)
def test_daux__is_of_all_choices(implementation: Implementation, recipe: Recipe) -> None:
    """The balance loss pulls dropped tokens like served ones: its gradient does not know the capacity."""
    scene = quietly(play(implementation, recipe), "daux")
    for capacity in (0, 1, scene.case.sizes["S"]):
        other = replay(implementation, changed(scene.case, implementation.target, capacity=capacity))
        certain(scene, other)
        assert_same(scene, other, ("dx", *OF_ROUTER))


@clause("S-BACK-5")
@needs("several_groups", features=("backward", "aux_loss"), only=PAPER_F | PLAIN_LOGITS | LOWEST, wide=True)
@draws(
    examples=[replace(OVERFLOW_IN_GROUPS, train=True, out_scale=0.0, losses=(1.0, 0.0))],
    recipe=recipes(ties="", train=True, pads="", E=st.sampled_from((2, 4, 6)), out_scale=0.0, losses=(1.0, 0.0)),
)
def test_daux__golden_value(implementation: Implementation, recipe: Recipe) -> None:
    """All logits equal and all tokens at expert 0: the mean over groups of E sum f P has the slope 1 - 1/E on expert 0 and -1/E on each other.

    At an exact balance of tokens that are sure of their experts the slope is exactly 0: nothing divides by what is 0 there.
    """
    scene = with_flat_logits(quietly(play(implementation, recipe), "daux"), 2.0)
    assume(scene.has("dw_router") and scene.has("aux_loss"))
    daux = float(scene.case.get("daux", 0.0))
    slope_E = daux * ((np.arange(scene.E) == 0) - 1.0 / scene.E)
    assert_within("dw_router", scene.outputs["dw_router"][0], Tube(slope_E, scene.real("dw_router").radius[0]), letters="E")
    assert_zero(scene, OF_EXPERTS)
    if scene.case.sizes["S"] % scene.E == 0 and scene.case.sizes["D"] >= scene.E:
        balanced = routed_as(scene, np.broadcast_to(np.arange(scene.case.sizes["S"]) % scene.E, scene.claims_GS.shape))
        assert_zero(balanced, (*OF_ROUTER, "dx"))


@clause("S-BACK-5", "S-BACK-6")
@needs("drop", features=("backward", "aux_loss", "z_loss"), only=BALANCE)
@draws(
    examples=[replace(OVERFLOW_IN_GROUPS, train=True), replace(TAILS, train=True)], recipe=recipes(ties="", train=True, E=st.sampled_from((2, 4, 6)))
)
def test_losses__move_the_router(implementation: Implementation, recipe: Recipe) -> None:
    """Each loss has a gradient that is not 0, wherever it is large enough to be told from 0; it is finite everywhere."""
    scene = play(implementation, recipe)
    certain(scene)
    for name in ("daux", "dz"):
        if name in scene.case and scene.has("dw_router"):
            alone = quietly(scene, name)
            assert np.isfinite(alone.outputs["dw_router"]).all()
            tube = alone.tube("dw_router")
            if np.any(np.abs(tube.value) > tube.radius):
                assert np.any(alone.outputs["dw_router"] != 0.0), f"{LOSS_OF[name]} has no gradient"


# against another evaluation


@clause("S-AUX-1", "S-Z-1", "S-PREC-1", is_oracle=True)
@needs("pad", "several_groups", features=("aux_loss",))
@draws(
    examples=[replace(OVERFLOW_IN_GROUPS, train=True), replace(OVERFLOW_IN_GROUPS, train=True, pads="scattered")],
    recipe=recipes(train=True),
)
def test_losses__match_spec(implementation: Implementation, recipe: Recipe) -> None:
    """Both losses lie within the radius of the spec's formula on the layer's own logits, probabilities and choices."""
    scene = play(implementation, recipe)
    assert not scene.judged(("aux_loss", "z_loss"))
