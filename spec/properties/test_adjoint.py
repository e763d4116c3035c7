# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The gradients against each other, as adjoints on integers, and against differences of the forward pass: S-BACK-1 to S-BACK-6."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from properties.conditions import DROPS_ZERO, MASKED, NO_LEAK, OUTER_GATE, OWN_BIAS, UNCAPPED, UNGATED
from properties.harness import clause, draws, needs
from properties.implementation import Implementation
from properties.lattice import UNDERSTOOD, Plan, is_exact_backward, lattice_case, lattice_outputs, plans
from properties.scenes import ALL_GRADIENTS, LOSS_OF, OF_ROUTER, Scene, assert_meet, assert_within, certain, inner, play, plus, replay
from properties.strategies import OVERFLOW_IN_GROUPS, TAILS, changed, recipes
from refswitch.proof.adjoint import dot
from refswitch.proof.finite_difference import difference_ratio
from refswitch.verify.case import GRADIENTS
from refswitch.verify.cases import Recipe, bell
from refswitch.verify.tubes import Tube, exact

BACKWARD = ("backward",)
SINGLE_USE = OUTER_GATE | {"dispatch_grad": ("none",)}
STEP = 2.0**-15  # of the central difference


def product_of(scene: Scene, name: str) -> Tube:
    """Return the inner product of a parameter and its gradient."""
    return inner(scene.case[name], scene.real(f"d{name}"))


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
@needs("tie", features=BACKWARD, only=UNDERSTOOD, exact_sums=True, wide_gradients=True)
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
@needs("drop", "tie", features=BACKWARD, only=UNDERSTOOD, exact_sums=True, wide_gradients=True)
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


@clause("S-BACK-1", "S-BACK-3", "S-BACK-4")
@needs("drop", features=BACKWARD, only=UNDERSTOOD | DROPS_ZERO | OWN_BIAS, exact_sums=True, wide_gradients=True)
@draws(examples=[Plan("served", 17, 4, 3, 1, 3), Plan("padded", 11, 5, 6, 1, 2, "scattered", True)], plan=plans(st.just(1)))
def test_backward__adjoint_on_integers(implementation: Implementation, plan: Plan) -> None:
    """Out and back are adjoint, to the bit: <out, dout> = <w_out, dw_out> + <b_out, db_out>, and each layer's product is met from both its sides.

    On integers with a gate of 1 the layer is linear in the second layer, in the half without the activation, and, between the kinks, in the first.
    """
    case = lattice_case(implementation, plan)
    assume(is_exact_backward(case, implementation.target, lattice_outputs(case, implementation.target)))
    scene = replay(implementation, case)
    assume(all(scene.has(f"d{name}") for name in ("x", "w_in", "w_out")))

    def product(*names: str) -> float:
        present = [name for name in names if name in case]
        return dot(*(tuple(np.asarray(array, np.float64) for array in side) for side in _pairs(scene, present)))

    branch = ("w_gate", "b_gate") if "w_gate" in case else ("w_in", "b_in")
    assert product("w_out", "b_out") == dot(np.asarray(scene.outputs["out"], np.float64), np.asarray(case.dout, np.float64))
    assert product(*branch) == product("w_out")
    assert product("w_in", "b_in") == product("w_out")
    read_GSD = np.where(scene.layer.sits_out_GS[..., None], 0.0, scene.layer.x_GSD)
    assert product("w_in", "w_gate") == dot(read_GSD, np.asarray(scene.outputs["dx"], np.float64))


def _pairs(scene: Scene, names: list[str]) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    return tuple(scene.case[name] for name in names), tuple(scene.outputs[f"d{name}"] for name in names)


def _loss(scene: Scene) -> Tube:
    """Return sum(out * dout) + daux * aux_loss + dz * z_loss with the radius of its own evaluation."""
    parts = [inner(scene.case.dout, scene.around("out"))]
    for name, loss in LOSS_OF.items():
        weight = float(scene.case.get(name, 0.0))
        if weight:
            parts.append(inner(np.asarray(weight), scene.around(loss)))
    return plus(*parts)


@clause("S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", "S-BACK-5", "S-BACK-6")
@needs(
    "drop",
    "difference",
    features=BACKWARD,
    profiles=("float64",),
    only={"gate.value": ("p", "one", "norm_topk", "sigmoid"), "dispatch_grad": ("none",)},
)
@draws(
    examples=[
        replace(OVERFLOW_IN_GROUPS, losses=(0.7, 0.3), train=True),
        replace(OVERFLOW_IN_GROUPS, pads="scattered", noise=True, mask=True, losses=(2.0, 1.0)),
    ],
    fewer=3,
    recipe=recipes(S=st.sampled_from((8, 12)), E=st.sampled_from((4, 2)), ties="", scale=1.0, router_scale=1.0, losses=(0.7, 0.3)),
)
def test_backward__finite_difference(implementation: Implementation, recipe: Recipe) -> None:
    """A step along any direction moves the loss as the gradient says, with equal routes and no kink between its two sides."""
    scene = play(implementation, recipe)
    certain(scene)
    assume(all(loss in scene.outputs for name, loss in LOSS_OF.items() if float(scene.case.get(name, 0.0))))
    for name in GRADIENTS:
        if not scene.has(f"d{name}"):
            continue
        direction = bell(0, recipe.name, f"direction-{name}", scene.case[name].shape)
        slope = inner(direction, scene.around(f"d{name}"))
        sides = {t: _moved(scene, name, t * direction) for t in (0.0, STEP, -STEP, 2.0 * STEP, -2.0 * STEP)}
        losses = {t: _loss(side) for t, side in sides.items()}
        noise = max(float(loss.radius) for loss in losses.values()) + STEP * float(slope.radius)
        found = difference_ratio(lambda t, at=losses, on=sides: (float(at[t].value), on[t]), float(slope.value), STEP, noise, _same_piece)
        implementation.meets("difference", not found.refused)
        assert found.refused or found.ok, f"<d{name}, direction> is {float(slope.value)!r}, {found.ratio!r} radii from the difference of the losses"


def _moved(scene: Scene, name: str, step: np.ndarray) -> Scene:
    return replay(scene.implementation, changed(scene.case, scene.implementation.target, **{name: scene.case[name] + step})) if step.any() else scene


def _same_piece(scene: Scene, side: Scene) -> bool:
    """Whether nothing discrete lies between two points: no choice, no survivor, and no kink of ReLU."""
    same = (scene.route.expert_GS == side.route.expert_GS).all() and (scene.route.kept_GS == side.route.kept_GS).all()
    if scene.case.activation != "relu":
        return bool(same)
    return bool(same) and bool(((scene.tube("hidden").value > 0.0) == (side.tube("hidden").value > 0.0)).all())
