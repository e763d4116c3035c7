# May import: standard library, numpy, pytest, hypothesis, refswitch, conformance.
"""The reference's gradients against differences of its own forward pass, and the moves against their adjoints.

A gradient g is right along a direction d if the remainder L(p + h d) - L(p) - h <g, d> shrinks like h^2: that holds for any h small enough,
so that no step size has to be tuned and no tolerance chosen. The steps stay inside a radius, derived from the margins of the choice and of
the relu's arguments, within which no route and no activation pattern can change (and that none did is checked). Clauses: S-BACK-1 to S-BACK-6,
S-PACK-1. Next: `test_reference_planted`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.test_reference_gradients import Drawn, Plan, draw_data, judged, plan_of
from refswitch.config import TRUTH
from refswitch.reference.capacity import Route, no_token_left_behind, slots_forward
from refswitch.reference.pack import pack, slots_in_use, unpack
from refswitch.reference.router import choices_in_order
from refswitch.reference.switch import SwitchSaved, noise_terms
from refswitch.verify.case import GRADIENTS, Case
from refswitch.verify.oracle import call_reference, reference_outputs
from refswitch.verify.tubes import OWN_UNIT, gamma

# ------------------------------------------------------------------------------------------------------------------ the plans

SMOOTH = {"expert.act": "gelu"}
PLANS = {
    "relu": plan_of({"noise.kind": "x_mul_uniform"}),
    "hidden": plan_of(SMOOTH | {"gate.site": "hidden", "expert.bias": "per_expert", "priority": "gate_desc", "aux.f.drops": "exclude"}),
    "input-relu": plan_of(
        {"gate.site": "input", "router.bias": True, "noise.kind": "x_dropout", "noise.leak_to_experts": "if_same_dtype", "drop.output": "x"}, seed=12
    ),
    "both-gated": plan_of(
        {"gate.site": "input_and_output", "expert.act": "silu", "expert.glu": True, "expert.bias": "per_expert", "drop.output": "x_times_gate",
         "router.bias": True, "pad.route": "include", "pad.zero_input": False, "priority": "random", "aux.denom": "kept", "z.pads": "include"}
    ),
    "sigmoid-cap": plan_of(
        {"gate.value": "sigmoid", "router.logit_cap": 3.0, "router.bias": True, "expert.act": "gelu_tanh", "expert.bias": "shared_out",
         "drop.output": "x_times_gate", "noise.kind": "z_add_normal", "z.denom": "S", "aux.P_pads": "exclude", "aux.denom": "valid"}
    ),
    "ntlb-relu-gated": plan_of({"select.rule": "ntlb", "select.choices": 2, "expert.glu": True, "expert.bias": "per_expert"}, seed=9),
    "sample": plan_of(
        SMOOTH | {"select.rule": "sample", "aux.f.count": "logits", "aux.scale_E": "none", "z.pads": "zero_logits", "pad.zero_input": False},
        pads="right",
    ),
    "one": plan_of(SMOOTH | {"gate.value": "one", "drop.output": "x", "aux.f.drops": "to_expert0", "pad.route": "expert0_weight0"}),
}  # fmt: skip


class Point(NamedTuple):
    """The reference at one point: what is differentiated, and what must not move."""

    loss: float
    route: Route
    saved: SwitchSaved


def evaluate(drawn: Drawn, case: Case) -> Point:
    """Return sum(out * dout) + daux * aux_loss + dz * z_loss, and the discrete state."""
    outputs, saved, _, _ = call_reference(case, drawn.target.dialect, TRUTH)
    loss = np.sum(outputs.out_GSD * case.dout) + case.daux * outputs.aux_loss + case.dz * outputs.z_loss
    return Point(float(loss), outputs.route, saved)


def same_piece(a: Point, b: Point, activation: str) -> bool:
    """Whether both points lie on one smooth piece of the loss: equal route, padding, f and signs of the relu's arguments."""
    pairs = [*zip(a.route, b.route, strict=True), (a.saved.is_pad_GS, b.saved.is_pad_GS), (a.saved.balance, b.saved.balance)]
    if activation == "relu":
        pairs.append((a.saved.experts.z_act_GECF > 0.0, b.saved.experts.z_act_GECF > 0.0))
    return all(np.array_equal(left, right) for left, right in pairs)


# ----------------------------------------------------------------------------------------------------------------- the radius


def smallest(margin: np.ndarray, motion: np.ndarray) -> float:
    """Return the least margin / motion, over what moves."""
    margin, motion = np.broadcast_arrays(margin, motion)
    return float(np.min(margin[motion > 0.0] / motion[motion > 0.0], initial=np.inf))


def safe_radius(drawn: Drawn, name: str) -> float:
    """Return how far every element of an array may move, at most 1, with nothing discrete changing.

    A logit moves by at most |noise| |w| per unit of x, |x| of w_router and 1 of b_router; the cap's slope is at most 1. A choice holds while the two
    scores at its margin move by less than half of it each. A gate moves by at most half of what the logits move: |dp| <= 2 p (1 - p) max|dl|,
    and the sigmoid's slope is at most 1/4. An argument z = (g x) w + b of the relu keeps its sign while it moves by less than |z|, and with
    0 <= g <= 1: |g' x' - g x| <= |x' - x| + |g' - g| |x|.
    """
    case, dialect = drawn.case, drawn.target.dialect
    outputs, saved, params, _ = call_reference(case, dialect, TRUTH)
    E = case.sizes["E"]
    factor_GSD = saved.inputs.noise_factor_GSD * ~(~saved.inputs.valid_GS & (dialect.pad.zero_input is True))[..., None]
    logit_GSE = {
        "x": np.abs(factor_GSD) @ np.abs(params.w_router_DE),
        "w_router": np.abs(saved.logits.x_router_GSD).sum(axis=-1, keepdims=True) * np.ones(E),
        "b_router": np.ones((1, 1, E)),
    }.get(name, np.zeros((1, 1, E)))
    logit_GS = logit_GSE.max(axis=-1)
    radii = [1.0]

    _, term_GSE = noise_terms(saved.inputs, dialect)
    scores = [outputs.logits_GSE + term_GSE] + [outputs.logits_GSE] * (dialect.aux.f.count == "logits")
    places = min(dialect.select.choices, E - 1) if dialect.select.rule == "ntlb" else 1
    for scores_GSE in scores:
        falling_GSE = -np.sort(-scores_GSE, axis=-1)
        margin_GS = -np.diff(falling_GSE[..., : places + 1], axis=-1).max(axis=-1)
        radii.append(smallest(margin_GS, 2.0 * logit_GS))
    if dialect.priority == "gate_desc":
        # Only claims compete; the others stand in line far apart from everything.
        claims_GS = ~saved.is_pad_GS | (dialect.pad.route == "include")
        sorted_GS = np.sort(np.where(claims_GS, outputs.gate_GS, 2.0 + np.arange(case.sizes["S"])), axis=-1)
        radii.append(smallest(np.diff(sorted_GS, axis=-1).min(axis=-1), logit_GS.max(axis=-1)))
    if case.activation == "relu":
        w_act_EDF = params.experts.w_in_EDF if params.experts.w_gate_EDF is None else params.experts.w_gate_EDF
        w_GSDF = np.abs(w_act_EDF)[outputs.route.expert_GS]
        at_input = dialect.gate.site.startswith("input")
        step_GSD = np.abs(saved.x_expert_GSD) * 0.5 * (np.broadcast_to(logit_GS, saved.gate_GS.shape)[..., None] * at_input)
        if name == "x":
            leaks = dialect.noise.leak_to_experts == "if_same_dtype"
            step_GSD = step_GSD + (np.abs(factor_GSD) if leaks else 1.0)
        z_GSF = np.einsum("gsd,gsdf->gsf", step_GSD, w_GSDF)
        if name == ("w_in" if params.experts.w_gate_EDF is None else "w_gate"):
            z_GSF = z_GSF + np.abs(saved.x_scaled_GSD).sum(axis=-1, keepdims=True)
        if name == ("b_in" if params.experts.w_gate_EDF is None else "b_gate"):
            z_GSF = z_GSF + 1.0
        radii.append(smallest(np.abs(unpack(saved.experts.z_act_GECF, outputs.route)), z_GSF * outputs.route.kept_GS[..., None]))
    return min(radii)


# ------------------------------------------------------------------------------------------------------------------- the test

STEP = 4.0  # each step is a quarter of the one before
STEPS = range(2, 13)  # from a sixteenth of the radius, where the third order is small against the second, to 6e-8 of it
# Between two steps a remainder of first order (a wrong gradient) shrinks 4 times, one of second order 16 times. Half-way, in the exponent, is 8.
SHRINKS = STEP**1.5
# The largest step sees an error of this share of a gradient's terms, or the test says that it is blind. Float32 could not represent less than 2**-24.
BLIND = 2.0**-20


def rounding_of_loss(drawn: Drawn, point: Point) -> float:
    """Return a bound of the rounding errors of one evaluation of the loss: the radii of what it sums, and the sum itself."""
    case = drawn.case
    tubes = judged(drawn, point.route).tubes
    carried = terms = 0.0
    for name, weight in {"out": case.dout, "aux_loss": case.daux, "z_loss": case.dz}.items():
        carried += float(np.sum(tubes[name].radius * np.abs(weight)))
        terms += float(np.sum(np.abs(tubes[name].value * weight)))
    return carried + float(gamma(case.dout.size + 3, OWN_UNIT)) * terms


def directions(gradient: np.ndarray) -> dict[str, np.ndarray]:
    """Return a direction without and one with regard to the gradient: along the second nothing cancels in <g, d>."""
    random = np.random.Generator(np.random.Philox(3)).standard_normal(gradient.shape)
    random = random / np.abs(random).max()
    return {"random": random, "along": np.where(gradient < 0.0, -1.0, 1.0) * np.abs(random)}


def difference_breaches(drawn: Drawn, name: str) -> list[str]:
    """Return every step of every direction at which the remainder does not shrink as that of a gradient does; none where all is well.

    The remainder is the larger one of both sides: a h^2 + b h^3 and a h^2 - b h^3 do not both vanish.
    """
    case = drawn.case
    gradient = reference_outputs(case, drawn.target.dialect, TRUTH)[f"d{name}"]
    here, radius = evaluate(drawn, case), safe_radius(drawn, name)
    gradient_radius = judged(drawn, here.route).tubes[f"d{name}"].radius
    found = []
    for label, direction in directions(gradient).items():
        # Radii vary with the point as the layer does, by far less than their double between here and the far ends.
        ends = [moved_by(drawn, name, side * radius / STEP ** STEPS[0] * direction) for side in (1.0, -1.0)]
        noise = 2.0 * max(rounding_of_loss(point, here) for point in (drawn, *ends))
        last: tuple[float, float] | None = None
        for k in STEPS:
            remainders, floor = [], 0.0
            for side in (1.0, -1.0):
                there = moved_by(drawn, name, side * radius / STEP**k * direction)
                point = evaluate(drawn, there.case)
                if not same_piece(here, point, case.activation):
                    found.append(f"{name}: the route, f or the relu's pattern changed at step {k} inside the radius {radius:.3g}")
                step = there.case[name] - case[name]  # what was really added, after rounding
                terms = float(np.sum(np.abs(gradient * step)))
                remainders.append(abs(point.loss - here.loss - float(np.sum(gradient * step))))
                rounding = 2.0 * noise + float(np.sum(gradient_radius * np.abs(step))) + float(gamma(step.size + 3, OWN_UNIT)) * terms
                floor = max(floor, rounding)
                if k == STEPS[0] and gradient.any() and not rounding <= BLIND * terms:
                    found.append(f"{name}, {label}: rounding {rounding:.3g} hides too much of {terms:.3g}")
            remainder = float(np.max(remainders))  # which keeps a NaN
            if last is not None and not remainder <= last[0] / SHRINKS + last[1] / SHRINKS + floor:
                found.append(f"{name}, {label}, step {k}: the remainder went from {last[0]:.3g} to {remainder:.3g}, rounding {floor:.3g}")
            last = remainder, floor
    return found


def moved_by(drawn: Drawn, name: str, step: np.ndarray) -> Drawn:
    """Return the case with one array moved."""
    return drawn._replace(case=Case(drawn.case.scalars, {**drawn.case.arrays, name: drawn.case[name] + step}))


def _arrays_of(plan: Plan) -> list[str]:
    return [name for name in GRADIENTS if name in draw_data(plan).case.arrays]


@pytest.mark.parametrize(("label", "name"), [(label, name) for label, plan in PLANS.items() for name in _arrays_of(plan)])
def test_switch_backward__finite_difference(label: str, name: str) -> None:
    found = difference_breaches(draw_data(PLANS[label]), name)
    assert not found, "\n".join(found)


def test_plans__cover_every_array_and_a_drop() -> None:
    assert {name for plan in PLANS.values() for name in _arrays_of(plan)} == set(GRADIENTS)
    for label, plan in PLANS.items():
        drawn = draw_data(plan)
        route = evaluate(drawn, drawn.case).route
        valid_GS = drawn.case.get("valid")
        assert (~route.kept_GS & valid_GS).any(), label
        assert route.kept_GS.any(), label


# ----------------------------------------------------------------------------------------------------------------- the moves

MOVED: Counter[str] = Counter()


class Moves(NamedTuple):
    """A route that the reference's own functions made, and how large things are."""

    route: Route
    G: int
    S: int
    D: int
    E: int
    C: int
    random: Any  # of the data


@st.composite
def moves(draw: st.DrawFn) -> Moves:
    """Draw claims, a rule and a capacity; sizes are pairwise distinct."""
    sizes: dict[str, int] = {}
    for letter, pool in {"G": range(1, 4), "E": range(1, 7), "S": range(14), "D": range(1, 8), "C": range(12)}.items():
        sizes[letter] = draw(st.sampled_from([size for size in pool if size not in sizes.values()]), label=letter)
    random = np.random.Generator(np.random.Philox(draw(st.integers(0, 2**32 - 1), label="seed")))
    G, S, D, E, C = (sizes[letter] for letter in "GSDEC")
    scores_GSE, claims_GS = random.standard_normal((G, S, E)), random.random((G, S)) < draw(st.sampled_from((0.0, 0.75, 1.0)), label="claims")
    capacity = draw(st.integers(0, C), label="capacity")
    if draw(st.booleans(), label="no token left behind"):
        route = no_token_left_behind(choices_in_order(scores_GSE, 3), claims_GS, E, capacity)
    else:
        expert_GS = np.argmax(scores_GSE, axis=-1)
        route = slots_forward(expert_GS, claims_GS, np.argsort(random.random((G, S)), axis=-1), E, capacity)
    return Moves(route, G, S, D, E, C, random)


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(moved=moves())
def test_pack__adjoint(moved: Moves) -> None:
    route, G, S, D, E, C, random = moved
    kept_GS = route.kept_GS
    assert slots_in_use(route) <= C
    # Integers up to 9: every product and every sum is exact, so that both sides are equal or a row went astray.
    x_GSD = random.integers(-9, 10, (G, S, D)).astype(np.float64)
    y_GECD = random.integers(-9, 10, (G, E, C, D)).astype(np.float64)
    packed_GECD, unpacked_GSD = pack(x_GSD, route, E, C), unpack(y_GECD, route)
    assert packed_GECD.dtype == unpacked_GSD.dtype == np.float64
    assert packed_GECD.shape == (G, E, C, D)
    assert unpacked_GSD.shape == (G, S, D)
    assert np.sum(packed_GECD * y_GECD) == np.sum(x_GSD * unpacked_GSD)
    # Both are moves: there and back is the identity on what is kept, zero elsewhere, and no slot is held twice.
    assert np.array_equal(unpack(packed_GECD, route), np.where(kept_GS[..., None], x_GSD, 0.0))
    held_GECD = pack(np.ones((G, S, D)), route, E, C)
    assert held_GECD.sum() == kept_GS.sum() * D
    assert np.array_equal(pack(unpacked_GSD, route, E, C), y_GECD * held_GECD)
    MOVED.update(
        name
        for name, seen in {
            "examples": True, "dropped": bool((~kept_GS).any()), "nobody": S > 0 and not kept_GS.any(), "everyone": S > 0 and bool(kept_GS.all()),
            "no tokens": S == 0, "no slots": C == 0, "a free slot": bool((held_GECD == 0.0).any()) and bool(kept_GS.any()), "groups": G > 1,
        }.items()
        if seen
    )  # fmt: skip


def test_moves__met_every_regime() -> None:
    if not MOVED["examples"]:
        test_pack__adjoint()
    missing = {"dropped", "nobody", "everyone", "no tokens", "no slots", "a free slot", "groups"} - set(MOVED)
    assert not missing, f"the moves never met: {missing}"


@pytest.mark.parametrize("label", PLANS)
def test_pack__adjoint_on_routes_of_the_layer(label: str) -> None:
    drawn = draw_data(PLANS[label])
    route = evaluate(drawn, drawn.case).route
    G, S, D, E = (drawn.case.sizes[letter] for letter in "GSDE")
    C = next(size for size in range(slots_in_use(route), 20) if size not in (G, S, D, E))
    random = np.random.Generator(np.random.Philox(1))
    x_GSD, y_GECD = random.integers(-9, 10, (G, S, D)).astype(np.float64), random.integers(-9, 10, (G, E, C, D)).astype(np.float64)
    assert np.sum(pack(x_GSD, route, E, C) * y_GECD) == np.sum(x_GSD * unpack(y_GECD, route))
