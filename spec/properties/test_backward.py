# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The gradients: S-BACK-1 to S-BACK-6."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from properties.conditions import DROPS_ZERO, GATE_IS_P, MASKED, NO_LEAK, OUTER_GATE, OWN_BIAS, UNCAPPED, UNGATED
from properties.harness import clause, draws, needs
from properties.implementation import Implementation
from properties.lattice import UNDERSTOOD, Plan, is_exact_backward, lattice_case, lattice_outputs, plans
from properties.scenes import (
    ALL_GRADIENTS,
    LOSS_OF,
    OF_EXPERTS,
    OF_ROUTER,
    Scene,
    assert_meet,
    assert_same,
    assert_within,
    assert_zero,
    certain,
    inner,
    play,
    quietly,
    replay,
)
from properties.strategies import (
    OVERFLOW_IN_GROUPS,
    SQUARE,
    TAILS,
    TIES,
    changed,
    plain,
    recipes,
)
from refswitch.verify import tubes
from refswitch.verify.case import GRADIENTS, Case
from refswitch.verify.cases import Recipe, bell
from refswitch.verify.tubes import Tube, exact

BACKWARD = ("backward",)
SINGLE_USE = OUTER_GATE | {"dispatch_grad": ("none",)}
STEPS = (2.0**-14, 2.0**-15)  # of the central difference: its error falls by four


def product_of(scene: Scene, name: str) -> Tube:
    """Return the inner product of a parameter and its gradient."""
    return inner(scene.case[name], scene.real(f"d{name}"))


def plus(*parts: Tube) -> Tube:
    """Return the sum of numbers and of their radii."""
    value = sum(part.value for part in parts)
    size = sum(part.radius + tubes.OWN_UNIT * np.abs(part.value) for part in parts)
    return Tube(np.asarray(value), np.asarray(size))


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
@needs("drop", features=(*BACKWARD, "z_loss"))
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
@needs(features=BACKWARD)
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


# identities between gradients


@clause("S-BACK-4", "S-COMBINE-1")
@needs("drop", features=BACKWARD, only=DROPS_ZERO | OWN_BIAS, wide=True)
@draws(examples=[OVERFLOW_IN_GROUPS, TAILS], recipe=recipes(ties=""))
def test_dw_out__adjoint(implementation: Implementation, recipe: Recipe) -> None:
    """The output is linear in the second layer: <w_out, dw_out> + <b_out, db_out> = <out, dout>, expert by expert."""
    scene = play(implementation, recipe)
    certain(scene)
    assume(scene.has("dw_out"))
    for e in range(scene.E):
        own_GS = (scene.route.expert_GS == e) & scene.route.kept_GS
        expected = inner(np.where(own_GS[..., None], scene.case.dout, 0.0), scene.real("out"))
        parts = [inner(scene.case[name][e], scene.real(f"d{name}").at(e)) for name in ("w_out", "b_out") if name in scene.case]
        assert_meet(f"<w_out, dw_out>[e={e}]", plus(*parts), expected)


@clause("S-BACK-3", "S-EXPERT-1")
@needs(
    "drop",
    features=BACKWARD,
    only=DROPS_ZERO | SINGLE_USE | OWN_BIAS | UNGATED | {"expert.act": ("relu",)},
    wide=True,
)
@draws(examples=[OVERFLOW_IN_GROUPS, TAILS], recipe=recipes(ties=""))
def test_dw_in__euler(implementation: Implementation, recipe: Recipe) -> None:
    """With ReLU the output is homogeneous in the first layer: <w_in, dw_in> + <b_in, db_in> = <w_out, dw_out>, expert by expert."""
    scene = play(implementation, recipe)
    certain(scene)
    assume(scene.has("dw_in"))
    for e in range(scene.E):
        first, second = (
            [inner(scene.case[n][e], scene.real(f"d{n}").at(e)) for n in names if n in scene.case] for names in (("w_in", "b_in"), ("w_out",))
        )
        assert_meet(f"<w_in, dw_in>[e={e}]", plus(*first), plus(*second))


@clause("S-BACK-3", "S-EXPERT-1")
@needs("gated", features=BACKWARD, only=DROPS_ZERO | SINGLE_USE, wide=True)
@draws(examples=[OVERFLOW_IN_GROUPS, TAILS], recipe=recipes(ties=""))
def test_dw_in__adjoint_where_gated(implementation: Implementation, recipe: Recipe) -> None:
    """A gated expert is linear in the half without the activation: <w_in, dw_in> + <b_in, db_in> = <w_out, dw_out>."""
    scene = play(implementation, recipe)
    certain(scene)
    assume(scene.has("dw_in"))
    parts = [product_of(scene, name) for name in ("w_in", "b_in") if name in scene.case]
    assert_meet("<w_in, dw_in>", plus(*parts), product_of(scene, "w_out"))


@clause("S-BACK-1", "S-BACK-2", "S-BACK-3")
@needs(
    features=BACKWARD,
    only=DROPS_ZERO | SINGLE_USE | UNGATED | UNCAPPED | NO_LEAK,
    wide=True,
)
@draws(examples=[OVERFLOW_IN_GROUPS, TAILS], recipe=recipes(ties=""))
def test_dx__meets_the_weights(implementation: Implementation, recipe: Recipe) -> None:
    """x is used where the first layers are: <x, dx> = <w_in, dw_in> + <w_router, dw_router>, group sums and noise included."""
    scene = play(implementation, recipe)
    certain(scene)
    assume(scene.has("dx") and scene.has("dw_in") and scene.has("dw_router"))
    # Of each product x w both factors see the same sum over tokens, experts and columns: of the gradient of the product, times the product.
    assert_meet("<x, dx>", inner(scene.layer.x_GSD, scene.real("dx")), plus(product_of(scene, "w_in"), product_of(scene, "w_router")))


@clause("S-BACK-1", "S-BACK-3")
@needs("gated", features=BACKWARD, only=DROPS_ZERO | SINGLE_USE | UNCAPPED | NO_LEAK, wide=True)
@draws(examples=[OVERFLOW_IN_GROUPS, TAILS], recipe=recipes(ties=""))
def test_dx__meets_the_weights_where_gated(implementation: Implementation, recipe: Recipe) -> None:
    """A gated expert reads x twice: <x, dx> = <w_in, dw_in> + <w_gate, dw_gate> + <w_router, dw_router>."""
    scene = play(implementation, recipe)
    certain(scene)
    assume(scene.has("dx") and scene.has("dw_in") and scene.has("dw_router"))
    parts = [product_of(scene, name) for name in ("w_in", "w_gate", "w_router")]
    assert_meet("<x, dx>", inner(scene.layer.x_GSD, scene.real("dx")), plus(*parts))


@clause("S-BACK-2", "S-BACK-3")
@needs("bias", features=BACKWARD, only=MASKED | SINGLE_USE)
@draws(recipe=recipes(ties="", pads="", noise=False))
def test_biases__are_rows_of_constant_tokens(implementation: Implementation, recipe: Recipe) -> None:
    """Where every token's last coordinate is 1, a bias and the last row of its weight have the same gradient, if the router's has no noise."""
    scene = play(implementation, recipe)
    assume("noise" not in scene.case)
    x_GSD = np.array(scene.case.x)
    x_GSD[..., -1] = 1.0
    other = replay(implementation, changed(scene.case, implementation.target, x=x_GSD))
    certain(other)
    for weight, bias in (("w_in", "b_in"), ("w_gate", "b_gate"), ("w_router", "b_router")):
        if other.has(f"d{weight}") and other.has(f"d{bias}"):
            assert_meet(f"d{bias}", other.around(f"d{bias}"), other.around(f"d{weight}").at(np.s_[..., -1, :]))


@clause("S-BACK-2", "S-BACK-1")
@needs("tie", features=BACKWARD, only=UNDERSTOOD)
@draws(examples=[Plan("torn", 17, 4, 3, 2, 18)], plan=plans(st.just(2)))
def test_dgate__at_a_tie_goes_to_the_chosen(implementation: Implementation, plan: Plan) -> None:
    """Of two experts with equal logits the chosen one alone has the gate's gradient: +dgate/4, and the other's logit gets -dgate/4."""
    case = lattice_case(implementation, plan._replace(pads=""))
    expected = lattice_outputs(case, implementation.target)
    assume(is_exact_backward(case, implementation.target, expected) and plan.E > 1)
    scene = replay(implementation, case)
    for name in OF_ROUTER:
        if scene.has(name):
            assert_within(name, scene.outputs[name], exact(expected[name]))


# every bit known, and differences


@clause("S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", is_oracle=True)
@needs("drop", "tie", features=BACKWARD, only=UNDERSTOOD)
@draws(examples=[Plan("two-ways", 17, 4, 3, 2, 2), Plan("one-way", 11, 5, 6, 1, 3, "scattered", True)], plan=plans())
def test_backward__exact_on_lattice(implementation: Implementation, plan: Plan) -> None:
    """On integers every gradient is known to the bit."""
    case = lattice_case(implementation, plan)
    expected = lattice_outputs(case, implementation.target)
    assume(is_exact_backward(case, implementation.target, expected))
    scene = replay(implementation, case)
    for name in ALL_GRADIENTS:
        if scene.has(name):
            assert_within(name, scene.outputs[name], exact(expected[name]))


def _loss(scene: Scene) -> Tube:
    """Return sum(out * dout) + daux * aux_loss + dz * z_loss with the radius of its own evaluation."""
    parts = [inner(scene.case.dout, scene.around("out"))]
    for name, loss in LOSS_OF.items():
        weight = float(scene.case.get(name, 0.0))
        if weight:
            parts.append(inner(np.asarray(weight), scene.around(loss)))
    return plus(*parts)


def _ahead(case: Case, scene: Scene, name: str, step: np.ndarray) -> Scene:
    return replay(scene.implementation, changed(case, scene.implementation.target, **{name: case[name] + step}))


@clause("S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", "S-BACK-5", "S-BACK-6")
@needs("drop", features=BACKWARD, profiles=("float64",), only={"gate.value": ("p", "one", "norm_topk", "sigmoid"), "dispatch_grad": ("none",)})
@draws(
    examples=[
        replace(OVERFLOW_IN_GROUPS, losses=(0.7, 0.3), train=True),
        replace(OVERFLOW_IN_GROUPS, pads="scattered", noise=True, mask=True, losses=(2.0, 1.0)),
    ],
    fewer=3,
    recipe=recipes(S=st.sampled_from((8, 12)), E=st.sampled_from((4, 2)), ties="", scale=1.0, router_scale=1.0, losses=(0.7, 0.3)),
)
def test_backward__finite_difference(implementation: Implementation, recipe: Recipe) -> None:
    """A step along any direction moves the loss as the gradient says, with equal routes and no kink between its two sides.

    The difference that remains must fall by four when the step is halved, down to what the two losses may be rounded by.
    """
    scene = play(implementation, recipe)
    certain(scene)
    assume(all(loss in scene.outputs for name, loss in LOSS_OF.items() if float(scene.case.get(name, 0.0))))
    for name in GRADIENTS:
        if not scene.has(f"d{name}"):
            continue
        direction = bell(0, recipe.name, f"direction-{name}", scene.case[name].shape)
        slope = inner(direction, scene.around(f"d{name}"))
        errors, floor = [], 0.0
        for h in STEPS:
            sides = [_ahead(scene.case, scene, name, sign * h * direction) for sign in (1.0, -1.0)]
            if not all(_same_piece(scene, side) for side in sides):
                break
            up, down = (_loss(side) for side in sides)
            errors.append(abs(float((up.value - down.value) / (2.0 * h) - slope.value)))
            floor = float((up.radius + down.radius) / (2.0 * h) + slope.radius)
        if len(errors) == len(STEPS):
            assert errors[1] <= errors[0] / 3.0 + 2.0 * floor, (
                f"d{name}: the difference is off by {errors[0]!r}, and by {errors[1]!r} at half the step"
            )


def _same_piece(scene: Scene, side: Scene) -> bool:
    """Whether nothing discrete lies between two points: no choice, no survivor, and no kink of ReLU."""
    same = (scene.route.expert_GS == side.route.expert_GS).all() and (scene.route.kept_GS == side.route.kept_GS).all()
    if scene.case.activation != "relu":
        return bool(same)
    return bool(same) and bool(((scene.tube("hidden").value > 0.0) == (side.tube("hidden").value > 0.0)).all())


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
