# May import: standard library, numpy, hypothesis, refswitch.
"""A call that was played, what follows from it, and how two calls are compared.

A value of one call may differ from its partner in another by what the declared profile lets each of them round: the sum of the two radii that the
judge's tubes give along the implementation's own route. Integers and masks are compared with `==`; so are values whose every rounding is the
same in both calls, where the profile is deterministic. There is no other tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import assume, reject

from properties.implementation import Implementation
from properties.strategies import case_of, changed, letters_of
from refswitch.reference.capacity import Route
from refswitch.verify import layer as stages
from refswitch.verify import tubes
from refswitch.verify.case import GRADIENTS, Case
from refswitch.verify.cases import Prepared, Recipe
from refswitch.verify.decode import Path, follow
from refswitch.verify.gradients import Forward, gradient_tubes
from refswitch.verify.judge import Check, judge_case
from refswitch.verify.layer import Layer, prepare_layer
from refswitch.verify.route import admissible_choices, claims_per_expert, effective_capacity, expected_route
from refswitch.verify.tubes import Tube

Move = Callable[[str, np.ndarray], np.ndarray]

ROUTE = ("expert", "slot", "kept")
SCORES = ("logits", "probs")
INSIDE = ("gate", "hidden", "expert_out")
LOSSES = ("aux_loss", "z_loss")
OF_EXPERTS = ("dw_in", "dw_gate", "dw_out", "db_in", "db_gate", "db_out")
OF_ROUTER = ("dw_router", "db_router")
LOSS_OF = {"daux": "aux_loss", "dz": "z_loss"}
ALL_GRADIENTS = tuple(f"d{name}" for name in GRADIENTS)
FORWARD = (*ROUTE, *SCORES, *INSIDE, "out")
EVERYTHING = (*FORWARD, *LOSSES, *ALL_GRADIENTS)


@dataclass(frozen=True)
class Scene:
    """A case, the implementation that was called with it, and what it returned."""

    implementation: Implementation
    case: Case
    outputs: dict[str, np.ndarray]

    @cached_property
    def layer(self) -> Layer:
        """The case under what the implementation declares."""
        return prepare_layer(self.case, self.implementation.target)

    @cached_property
    def _scores(self) -> tuple[Tube, Tube, Tube, Tube, Tube, Tube]:
        x_router, x_expert = stages.noise_stage(self.layer)
        logits, raw = stages.logits_stage(self.layer, x_router)
        probs = stages.probs_stage(self.layer, logits)
        return x_router, x_expert, raw, logits, probs, stages.scores_stage(self.layer, probs, logits)

    @cached_property
    def is_certain(self) -> bool:
        """Whether no token's choice lies within the roundings of a tie."""
        *_, logits, _, scores = self._scores
        count_GS = admissible_choices(self.layer, scores, logits).admissible_GSE.sum(axis=-1)
        return bool((count_GS == 1)[~self.layer.sits_out_GS].all())

    @cached_property
    def is_single(self) -> bool:
        """Whether no two experts have the same highest score, as it is stored."""
        *_, scores = self._scores
        count_GS = (scores.value == scores.value.max(axis=-1, keepdims=True)).sum(axis=-1)
        return bool((count_GS == 1)[~self.layer.sits_out_GS].all())

    @cached_property
    def expert_GS(self) -> np.ndarray:
        """The chosen experts: its own, where it exports them."""
        *_, logits, _, scores = self._scores
        centre_GS = admissible_choices(self.layer, scores, logits).centre_GS
        if "expert" not in self.outputs:
            return centre_GS
        own_GS, E = self.outputs["expert"].astype(np.int64), scores.value.shape[-1]
        inside_GS = (own_GS >= 0) & (own_GS < E)
        assert (inside_GS | self.layer.sits_out_GS).all(), f"expert is {own_GS[~inside_GS & ~self.layer.sits_out_GS][0]}, with {E} experts"
        return np.where(inside_GS & ~self.layer.sits_out_GS, own_GS, centre_GS)

    @cached_property
    def route(self) -> Route:
        """The route along its own choices and survivors."""
        *_, logits, probs, scores = self._scores
        gate = stages.gate_stage(self.layer, probs, logits, self.expert_GS)
        route = expected_route(self.layer, self.expert_GS, gate.value, scores.value)
        return route if "kept" not in self.outputs else route._replace(kept_GS=self.outputs["kept"] & ~self.layer.sits_out_GS)

    @property
    def capacity(self) -> int:
        """How many claims an expert can serve."""
        return effective_capacity(self.layer)

    @property
    def claims_GS(self) -> np.ndarray:
        """The tokens that ask for a slot."""
        return self.layer.claims_GS

    @property
    def E(self) -> int:
        """The number of experts."""
        return self.case.sizes["E"]

    @cached_property
    def claims_GE(self) -> np.ndarray:
        """How many tokens ask each expert for a slot."""
        return claims_per_expert(self.layer, self.route.expert_GS, self.E)

    @cached_property
    def kept_GE(self) -> np.ndarray:
        """How many tokens each expert serves."""
        return ((self.route.expert_GS[..., None] == np.arange(self.E)) & self.route.kept_GS[..., None]).sum(axis=1)

    @cached_property
    def dropped_GS(self) -> np.ndarray:
        """The tokens that asked and were not served."""
        return self.claims_GS & ~self.route.kept_GS & ~self.layer.sits_out_GS

    def tube(self, name: str) -> Tube:
        """An output's tube from the inputs on, along the implementation's own route."""
        with np.errstate(all="ignore"):
            return (self._gradient_tubes if name in ALL_GRADIENTS else self._forward_tubes)[name]

    @cached_property
    def _path(self) -> Path:
        _, x_expert, _, logits, probs, _ = self._scores
        return follow(self.layer, self.route, probs, logits, x_expert, {})

    @cached_property
    def _counts(self) -> Tube:
        *_, logits, _, scores = self._scores
        return stages.counts_of(self.layer, self.route, logits, scores)

    @cached_property
    def _forward_tubes(self) -> dict[str, Tube]:
        layer, route, path = self.layer, self.route, self._path
        *_, logits, probs, _ = self._scores
        read = stages.read_probs(layer, probs)
        low, high = np.minimum(probs.value - probs.radius, read.value - read.radius), np.maximum(probs.value + probs.radius, read.value + read.radius)
        found = {
            "logits": logits,
            "probs": tubes.hull(low, high),
            "gate": path.gate_GS,
            "hidden": stages.unpack_tube(path.expertise.hidden_GECF, route),
            "expert_out": path.expert_out_GSD,
            "out": path.out_GSD,
            "z_loss": stages.z_stage(layer, logits)[0],
        }
        if layer.target.dialect.aux.form == "product":
            found["aux_loss"] = stages.aux_stage(layer, probs, self._counts, route)
        return found

    @cached_property
    def _gradient_tubes(self) -> dict[str, Tube]:
        x_router, x_expert, raw, logits, probs, _ = self._scores
        _, lse_GS, weight_GS = stages.z_stage(self.layer, logits)
        path = self._path
        forward = Forward(
            x_router, x_expert, raw, logits, probs, path.gate_GS, self.route, path.expertise, path.expert_out_GSD, self._counts, lse_GS, weight_GS
        )
        return {f"d{name}": tube for name, tube in gradient_tubes(self.layer, forward).items()}

    def around(self, name: str) -> Tube:
        """Return an output as it was returned, with the radius that the profile allows it."""
        return Tube(np.asarray(self.outputs[name], np.float64), self.tube(name).radius)

    def real(self, name: str) -> Tube:
        """Return an output with its distance from the function of real numbers.

        A tube's centre is that function but for the roundings on the way, and where nothing is stored narrowly each of these is below a radius
        that the tube already carries: one rounding of a sum is no more than one unit of its terms.
        """
        return Tube(np.asarray(self.outputs[name], np.float64), 2.0 * self.tube(name).radius)

    def looked_at(self, name: str) -> np.ndarray:
        """Return where an output means something: not in padding that sits out, nor in what a dropped token did not compute."""
        mask_GS = self.route.kept_GS if name in INSIDE else np.ones_like(self.claims_GS) if name == "out" else ~self.layer.sits_out_GS
        shape = np.shape(self.outputs[name])
        if name not in FORWARD:
            return np.ones(shape, bool)
        return np.broadcast_to(mask_GS.reshape(mask_GS.shape + (1,) * (len(shape) - 2)), shape)

    def has(self, name: str) -> bool:
        """Whether an output is there and is looked at."""
        return name in self.outputs and name in self.case.wants

    def judged(self, stages_judged: Iterable[str]) -> list[Check]:
        """Return the judge's failing checks of some stages."""
        recipe = Recipe("drawn", losses=(float(self.case.get("daux", 0.0)), float(self.case.get("dz", 0.0))))
        checks = judge_case(Prepared(recipe, self.case), self.implementation.target, self.outputs).checks
        return [check for check in checks if not check.ok and check.stage in stages_judged]


def play(implementation: Implementation, recipe: Recipe) -> Scene:
    """Play a recipe, folded into what the implementation accepts; the example is dropped where nothing is left of it."""
    case = case_of(recipe, implementation.target)
    if case is None:
        reject()
    return replay(implementation, case)


def replay(implementation: Implementation, case: Case) -> Scene:
    """Play a case."""
    return Scene(implementation, case, implementation.call(case))


def quietly(scene: Scene, *keep: str) -> Scene:
    """Play the scene with all of dout, daux, dz at 0 but those to keep."""
    quiet = {name: np.zeros_like(scene.case[name]) for name in ("dout", "daux", "dz") if name in scene.case and name not in keep}
    return replay(scene.implementation, changed(scene.case, scene.implementation.target, **quiet))


def certain(*scenes: Scene) -> None:
    """Drop the example where a choice could legally have fallen otherwise in one of the calls."""
    for scene in scenes:
        assume(scene.is_certain)


def assert_within(name: str, got: np.ndarray, expected: Tube, looked_at: np.ndarray | None = None, letters: str = "") -> None:
    """Assert |got - value| <= radius, naming the first element that is outside."""
    with np.errstate(all="ignore"):
        ratio = tubes.ratio(got, expected)
    ratio = np.where(looked_at, ratio, 0.0) if looked_at is not None else ratio
    bad = np.argwhere(ratio > 1.0)
    if len(bad):
        index = tuple(bad[0])
        where = ", ".join(f"{letter.lower()}={i}" for letter, i in zip(letters or "?" * len(index), index, strict=False))
        got, value, radius = np.asarray(got)[index], expected.value[index], expected.radius[index]
        raise AssertionError(f"{name}[{where}] is {got!r}, should be {value!r} +- {radius!r}; {len(bad)} of {ratio.size} elements are outside")


def _same(name: str, array: np.ndarray) -> np.ndarray:
    return array


def assert_same(
    a: Scene,
    b: Scene,
    names: Iterable[str],
    move: Move = _same,
    times: np.ndarray | float = 1.0,
    plus: np.ndarray | float = 0.0,
    is_exact: bool = False,
    only_GS: np.ndarray | None = None,
) -> None:
    """Assert that b's outputs are a's, moved, times a factor, plus a term; `is_exact` says that both calls round alike.

    `only_GS` restricts what is looked at to some rows of b.
    """
    bitwise = is_exact and b.implementation.profile.deterministic
    for name in names:
        if not (a.has(name) and b.has(name)):
            continue
        looked_at = b.looked_at(name) & np.asarray(move(name, a.looked_at(name)))
        if only_GS is not None and name in (*FORWARD, "dx"):
            looked_at = looked_at & only_GS.reshape(only_GS.shape + (1,) * (looked_at.ndim - 2))
        expected = move(name, np.asarray(a.outputs[name], np.float64)) * times + plus
        radius = np.zeros(expected.shape)
        if name not in ROUTE and not bitwise:
            radius = move(name, a.tube(name).radius) * np.abs(times) + b.tube(name).radius
        assert_within(name, b.outputs[name], Tube(expected, radius), looked_at, letters_of(name, expected, b.implementation.target))


def assert_zero(scene: Scene, names: Iterable[str], only: np.ndarray | None = None) -> None:
    """Assert exact zeros, along the rows or experts of `only` where given."""
    for name in names:
        if scene.has(name):
            value = np.asarray(scene.outputs[name])
            mask = (
                np.ones(value.shape, bool)
                if only is None
                else np.broadcast_to(only.reshape(only.shape + (1,) * (value.ndim - only.ndim)), value.shape)
            )
            letters = letters_of(name, value, scene.implementation.target)
            assert_within(name, value, Tube(np.zeros(value.shape), np.zeros(value.shape)), mask, letters)


def inner(array: np.ndarray, tube: Tube, axis: Any = None) -> Tube:
    """Return the inner product of exact numbers with an output's tube; its own rounding is far below one unit of the accumulator's."""
    flat = np.asarray(array, np.float64)
    products = flat * tube.value
    own = tubes.OWN_UNIT * products.size * np.abs(products).sum(axis=axis)
    return Tube(products.sum(axis=axis), (np.abs(flat) * tube.radius).sum(axis=axis) + own)


def assert_meet(name: str, a: Tube, b: Tube) -> None:
    """Assert that two tubes around one number can both be right."""
    assert_within(name, a.value, Tube(b.value, a.radius + b.radius))


def plus(*parts: Tube) -> Tube:
    """Return the sum of numbers and of their radii."""
    value = sum(part.value for part in parts)
    size = sum(part.radius + tubes.OWN_UNIT * np.abs(part.value) for part in parts)
    return Tube(np.asarray(value), np.asarray(size))
