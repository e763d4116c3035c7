# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Noise, logits, softmax, choice, gate: S-NOISE-1 to S-GATE-1."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from properties.conditions import ARGMAX, FIXED_ORDER, GATE_IS_P, LINEAR_LOGITS, LOWEST, MASKED, NO_LEAK, NOISY_GATE, UNCAPPED
from properties.harness import clause, draws, needs
from properties.implementation import Implementation
from properties.scenes import FORWARD, INSIDE, LOSSES, OF_ROUTER, ROUTE, SCORES, Scene, assert_same, assert_within, certain, play, replay
from properties.strategies import (
    CROWD,
    ENORMOUS,
    MANY_EXPERTS,
    ONE_EXPERT,
    OVERFLOW_IN_GROUPS,
    SQUARE_ROUTER,
    TAILS,
    TIES,
    changed,
    letters_of,
    permutations,
    recipes,
    reordered,
    with_axis,
)
from refswitch.verify import layer as stages
from refswitch.verify import tubes
from refswitch.verify.cases import Recipe, uniform
from refswitch.verify.oracle import FACTOR_NOISE
from refswitch.verify.route import admissible_choices
from refswitch.verify.tubes import Tube, exact

FACTORS = {"noise.kind": FACTOR_NOISE}
TERMS = {"noise.kind": ("z_add_uniform", "z_add_normal", "z_add_gumbel")}
MADE_OF_PROBS = {"gate.value": ("p", "one", "norm_topk", "ratio_st")} | UNCAPPED
POWERS = st.sampled_from((1, -1, 2, 3))


def powers_of_two(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return factors 1/4 to 4: a product with them makes no rounding."""
    return 2.0 ** np.floor(5.0 * uniform(0, name, "powers", shape) - 2.0)


def own(scene: Scene, name: str) -> Tube:
    """Return an exported value as what the next stage starts from."""
    return exact(np.asarray(scene.outputs[name], np.float64))


# noise


@clause("S-NOISE-1", "S-AUX-1", "S-Z-1", "S-GATE-1")
@needs("noise", only=FACTORS)
@draws(examples=[Recipe("noise-eval", S=7, D=5, E=3, F=4, noise=True, G=2)], recipe=recipes(noise=True, ties=""))
def test_noise_factor__equals_noised_tokens(implementation: Implementation, recipe: Recipe) -> None:
    """What the router and the losses make of a token and its factor is what they make of the product: logits, choice, gate, losses."""
    scene = play(implementation, recipe)
    factor_GSD = powers_of_two(recipe.name, scene.case.x.shape)
    noised = replay(implementation, changed(scene.case, implementation.target, noise=factor_GSD))
    plain = replay(implementation, changed(scene.case, implementation.target, x=scene.case.x * factor_GSD, noise=None))
    certain(noised, plain)
    assert_same(plain, noised, (*ROUTE, *SCORES, "gate", *LOSSES))


@clause("S-NOISE-1", "S-BACK-1", "S-BACK-2")
@needs("noise", features=("backward",), only=FACTORS)
@draws(recipe=recipes(noise=True, ties="", out_scale=0.0))
def test_noise_factor__gradient_of_losses(implementation: Implementation, recipe: Recipe) -> None:
    """The losses' gradient of the router is that of the product, and the token's is that of the product times the factor."""
    scene = play(implementation, recipe)
    factor_GSD = powers_of_two(recipe.name, scene.case.x.shape)
    noised = replay(implementation, changed(scene.case, implementation.target, noise=factor_GSD))
    plain = replay(implementation, changed(scene.case, implementation.target, x=scene.case.x * factor_GSD, noise=None))
    certain(noised, plain)
    assert_same(plain, noised, OF_ROUTER)
    assert_same(plain, noised, ("dx",), times=factor_GSD)


@clause("S-NOISE-2")
@needs("noise", only=FACTORS | LINEAR_LOGITS | ARGMAX | FIXED_ORDER | NO_LEAK | MASKED, wide=True)
@draws(recipe=recipes(noise=True, ties="", router_scale=st.sampled_from((1.0, 2.0))))
def test_noise_factor__never_reaches_experts(implementation: Implementation, recipe: Recipe) -> None:
    """One factor for all of a token moves all its logits alike: it goes where it went, and its expert computes what it computed."""
    scene = play(implementation, recipe)
    quiet = replay(implementation, changed(scene.case, implementation.target, noise=None))
    factor_GS1 = powers_of_two(recipe.name, scene.case.x.shape[:2])[..., None]
    noised = replay(implementation, changed(scene.case, implementation.target, noise=np.broadcast_to(factor_GS1, scene.case.x.shape)))
    certain(quiet, noised)
    inside = () if implementation.dialect.gate.site != "output" else ("hidden", "expert_out")
    assert_same(quiet, noised, (*ROUTE, *inside), is_exact=True)
    assert_same(quiet, noised, ("logits",), times=factor_GS1)


@clause("S-NOISE-1")
@needs("noise", only=TERMS | UNCAPPED | NOISY_GATE, wide=True)
@draws(recipe=recipes(noise=True))
def test_noise_term__is_added_to_logits(implementation: Implementation, recipe: Recipe) -> None:
    """The logits with the term are the logits without it, plus the term."""
    noised = play(implementation, recipe)
    quiet = replay(implementation, changed(noised.case, implementation.target, noise=None))
    assert_same(quiet, noised, ("logits",), plus=np.asarray(noised.case.noise, np.float64))


@clause("S-NOISE-1", "S-CAP-1", "S-PAD-2")
@needs(without=("own_capacity",))
@draws(
    examples=[Recipe("noise-and-overflow", S=12, D=5, E=3, F=4, noise=True, hot=1, capacity=2)],
    recipe=recipes(ties="", capacity=st.integers(0, 5)),
)
def test_switch_layer__train_is_only_a_word(implementation: Implementation, recipe: Recipe) -> None:
    """Noise, masks and capacity come as data: whether the case says that it trains changes nothing."""
    scene = play(implementation, recipe)
    other = replay(implementation, changed(scene.case, implementation.target, train=not scene.case.train))
    certain(scene)
    assert_same(scene, other, FORWARD)


# logits


@clause("S-ROUTE-1")
@needs(exports=("logits",), only=LINEAR_LOGITS)
@draws(recipe=recipes(noise=False), power=POWERS)
def test_logits__power_of_two_scaling(implementation: Implementation, recipe: Recipe, power: int) -> None:
    """Logits are linear in the tokens: twice the token has twice the logits, to the bit."""
    scene = play(implementation, recipe)
    doubled = replay(implementation, changed(scene.case, implementation.target, x=scene.case.x * 2.0**power))
    assert_same(scene, doubled, ("logits",), times=2.0**power, is_exact=True)


@clause("S-ROUTE-1", "S-EXPERT-1", "S-BACK-3")
@needs(only=MASKED)
@draws(examples=[TAILS, SQUARE_ROUTER], recipe=recipes(ties=""))
def test_logits__width_permutation(implementation: Implementation, recipe: Recipe) -> None:
    """The columns of x may come in any order, if the rows of w_router, w_in and w_gate come in the same."""
    scene = play(implementation, recipe)
    order = permutations(scene.case.sizes["D"], recipe.name)
    target = implementation.target
    other = replay(implementation, with_axis(scene.case, target, "D", order, keep=("w_out", "b_out", "dout")))
    certain(scene, other)
    assert_same(scene, other, (*ROUTE, *SCORES, *INSIDE, *LOSSES))
    assert_same(scene, other, ("out", "dw_out", "db_out", "db_in", "db_gate"), only_GS=scene.route.kept_GS)

    def moved(name: str, array: np.ndarray) -> np.ndarray:
        return reordered(array, letters_of(name, array, target), "D", order)

    passes = implementation.dialect.drop.output != "zero" and scene.dropped_GS.any()  # what is passed comes in x's columns, what is computed does not
    assert_same(scene, other, () if passes else ("dx", "dw_in", "dw_gate", *OF_ROUTER), move=moved)


@clause("S-ROUTE-1")
@needs("router_bias", exports=("logits",), only=UNCAPPED, wide=True)
@draws(recipe=recipes(noise=False, ties=""))
def test_logits__bias_is_added(implementation: Implementation, recipe: Recipe) -> None:
    """With all tokens 0 the logits are the bias, to the bit; and the bias moves every token alike."""
    scene = play(implementation, recipe)
    assume("noise" not in scene.case)
    zeros = replay(implementation, changed(scene.case, implementation.target, x=np.zeros_like(scene.case.x)))
    bias_GSE = np.broadcast_to(np.asarray(scene.case.b_router, np.float64), zeros.outputs["logits"].shape)
    assert_within("logits", zeros.outputs["logits"], exact(bias_GSE), zeros.looked_at("logits"), "GSE")
    unbiased = replay(implementation, changed(scene.case, implementation.target, b_router=np.zeros(scene.E)))
    assert_same(unbiased, scene, ("logits",), plus=bias_GSE)


# softmax


@clause("S-ROUTE-2")
@needs("one_expert", exports=("probs",), wide=True)
@draws(examples=[ONE_EXPERT], recipe=recipes())
def test_softmax__sums_to_one(implementation: Implementation, recipe: Recipe) -> None:
    """The probabilities of a token are not negative and sum to 1; the only expert has exactly 1."""
    scene = play(implementation, recipe)
    probs = scene.real("probs")
    mask_GS = ~scene.layer.sits_out_GS
    assert (probs.value[mask_GS] >= 0.0).all()
    total = Tube(probs.value.sum(axis=-1), probs.radius.sum(axis=-1) + tubes.OWN_UNIT * scene.E)
    assert_within("probs", total.value, Tube(np.ones_like(total.value), total.radius), mask_GS, "GS")
    if scene.E == 1:
        assert (probs.value[mask_GS] == 1.0).all()


@clause("S-ROUTE-2")
@needs("logits_above_89", exports=("logits", "probs"))
@draws(examples=[MANY_EXPERTS, ENORMOUS], recipe=recipes())
def test_softmax__ratio_is_exponential_of_difference(implementation: Implementation, recipe: Recipe) -> None:
    """p_i / p_j = exp(l_i - l_j) on the layer's own logits: no temperature, no epsilon, no other base, no overflow."""
    scene = play(implementation, recipe)
    own_probs = stages.probs_stage(scene.layer, own(scene, "logits"))
    read = stages.read_probs(scene.layer, own_probs)
    low, high = (
        np.minimum(own_probs.value - own_probs.radius, read.value - read.radius),
        np.maximum(own_probs.value + own_probs.radius, read.value + read.radius),
    )
    assert_within("probs", scene.outputs["probs"], tubes.hull(low, high), scene.looked_at("probs"), "GSE")
    logits, probs = scene.outputs["logits"], scene.outputs["probs"]
    is_highest = (logits == logits.max(axis=-1, keepdims=True)) & scene.looked_at("probs")
    highest_GS1 = probs.max(axis=-1, keepdims=True)
    assert (probs == np.broadcast_to(highest_GS1, probs.shape))[is_highest].all(), "equal largest logits have unequal probabilities"


@clause("S-ROUTE-2", "S-ROUTE-3", "S-GATE-1", "S-AUX-1")
@needs("logits_below_0", "logits_above_89", exports=("probs",), only=UNCAPPED | MASKED, wide=True)
@draws(recipe=recipes(ties="exact", noise=False), shift=st.sampled_from((-1000.0, 1000.0, -96.0, 64.0, 3.0)))
def test_softmax__shift_invariance(implementation: Implementation, recipe: Recipe, shift: float) -> None:
    """A constant on all logits of a token changes no probability, no choice and no gate, however large or negative it is."""
    scene = play(implementation, recipe)
    x_GSD, w_DE = np.array(scene.case.x), np.array(scene.case.w_router)
    x_GSD[..., -1], w_DE[-1] = 1.0, 0.0
    still = changed(scene.case, implementation.target, x=x_GSD, w_router=w_DE)
    moved = changed(still, implementation.target, w_router=np.vstack([w_DE[:-1], np.full_like(w_DE[-1:], shift)]))
    a, b = replay(implementation, still), replay(implementation, moved)
    certain(a, b)
    assert_same(a, b, (*ROUTE, "probs", "gate", "aux_loss"))


@clause("S-ROUTE-2", "S-BACK-2")
@needs(features=("backward",), only=MADE_OF_PROBS, wide=True)
@draws(recipe=recipes(losses=(0.25, 0.0), ties=""))
def test_softmax_backward__ignores_a_common_shift(implementation: Implementation, recipe: Recipe) -> None:
    """A common shift of the logits changes nothing but the z-loss: without it, the rows of dw_router and db_router sum to 0."""
    scene = play(implementation, recipe)
    certain(scene)
    for name in OF_ROUTER:
        if scene.has(name):
            found = scene.real(name)
            radius = found.radius.sum(axis=-1) + tubes.OWN_UNIT * scene.E * np.abs(found.value).sum(axis=-1)
            assert_within(name, found.value.sum(axis=-1), Tube(np.zeros(found.value.shape[:-1]), radius))


# choice


@clause("S-ROUTE-3")
@needs("tie", "over_10_experts", "logits_below_0", exports=("expert", "probs"), only=ARGMAX)
@draws(examples=[TIES, MANY_EXPERTS, replace(TIES, name="near", ties="near", S=34, E=4)], recipe=recipes(ties=st.sampled_from(("exact", "", "near"))))
def test_choose__highest_stored_score(implementation: Implementation, recipe: Recipe) -> None:
    """No expert scores higher than the chosen one, and none with a lower index as high, on the scores as stored."""
    scene = play(implementation, recipe)
    layer = scene.layer
    probs = own(scene, "probs")
    logits = own(scene, "logits") if "logits" in scene.outputs else stages.logits_stage(layer, stages.noise_stage(layer)[0])[0]
    allowed_GSE = admissible_choices(layer, stages.scores_stage(layer, probs, logits), logits).admissible_GSE
    right_GS = np.take_along_axis(allowed_GSE, scene.expert_GS[..., None], axis=-1)[..., 0]
    wrong = np.argwhere(~right_GS & ~layer.sits_out_GS)
    assert not len(wrong), f"token {tuple(wrong[0])} chose expert {scene.expert_GS[tuple(wrong[0])]} of {probs.value[tuple(wrong[0])]}"


@clause("S-ROUTE-3")
@needs("tie", only=LOWEST | LINEAR_LOGITS | NOISY_GATE)
@draws(recipe=recipes(E=st.sampled_from((2, 4, 6)), ties="exact", noise=False, pads="", capacity=None))
def test_choose__later_twins_are_never_chosen(implementation: Implementation, recipe: Recipe) -> None:
    """Of experts with equal logits only the first is ever chosen: what the others would do shows in no output."""
    scene = play(implementation, recipe)
    w_DE = np.asarray(scene.case.w_router)
    is_twin_E = np.array([any((w_DE[:, e] == w_DE[:, earlier]).all() for earlier in range(e)) for e in range(scene.E)])
    assume(is_twin_E.any())
    weights = {name: np.where(is_twin_E.reshape(-1, *[1] * (scene.case[name].ndim - 1)), 1.0, scene.case[name]) for name in ("w_in", "w_out")}
    other = replay(implementation, changed(scene.case, implementation.target, **weights))
    assert_same(scene, other, ("out", "expert", "kept"))
    if "expert" in scene.outputs:
        assert not is_twin_E[scene.outputs["expert"]].any()


@clause("S-ROUTE-3", "S-CAP-2")
@needs(only=ARGMAX | LINEAR_LOGITS | FIXED_ORDER | MASKED, wide=True)
@draws(recipe=recipes(ties="", noise=False), power=POWERS)
def test_choose__scale_invariance(implementation: Implementation, recipe: Recipe, power: int) -> None:
    """Tokens that are scaled by a power of two go where they went: who goes where and who is dropped depends on the order of the logits alone."""
    scene = play(implementation, recipe)
    scaled = replay(implementation, changed(scene.case, implementation.target, x=scene.case.x * 2.0**power))
    certain(scene, scaled)
    assert_same(scene, scaled, ROUTE)


# gate


@clause("S-GATE-1")
@needs(exports=("gate", "probs"), only=GATE_IS_P)
@draws(examples=[CROWD, OVERFLOW_IN_GROUPS], recipe=recipes())
def test_gate__is_chosen_probability(implementation: Implementation, recipe: Recipe) -> None:
    """The gate is the chosen probability, as stored: not 1, not renormalised, of this token and no other."""
    scene = play(implementation, recipe)
    gate = stages.gate_stage(scene.layer, own(scene, "probs"), own(scene, "probs"), scene.expert_GS)
    assert_within("gate", scene.outputs["gate"], gate, scene.looked_at("gate"), "GS")


# against another evaluation


@clause("S-NOISE-1", "S-ROUTE-1", "S-ROUTE-2", "S-ROUTE-3", "S-GATE-1", "S-PREC-1", is_oracle=True)
@needs("tie", "logits_above_89")
@draws(examples=[TIES, MANY_EXPERTS, ENORMOUS], recipe=recipes(ties=st.sampled_from(("", "exact", "near"))))
def test_router__matches_spec(implementation: Implementation, recipe: Recipe) -> None:
    """Each stage of the router lies within the radius of the spec's formula on the layer's own stage before."""
    scene = play(implementation, recipe)
    assert not scene.judged(("noise", "router", "softmax", "select", "gate"))
