# May import: standard library, numpy, hypothesis, refswitch.
"""Cases whose every bit is known: integers so small that every legal order, blocking and format gives the same result.

The router's logits are 0 or 1024, so that a probability is 0, 1, 1/2 or 1/4; pre-activations are odd multiples of a number so large that GELU and
SiLU are ReLU there, to the bit, and never at their kink. What must come out is computed here by loops over tokens: a second reading of the chapter,
which shares no line with the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from properties.implementation import Implementation
from properties.scenes import Scene, replay
from properties.strategies import case_of, changed
from refswitch.config import rounding_points
from refswitch.numbers.precision import round_to
from refswitch.verify.case import Case
from refswitch.verify.cases import Recipe, Target, integers, uniform

AXIS = 32.0  # a token's coordinate on the axis of the expert that it goes to, and the router's weight of it: a logit of 1024
EXACT_BITS = 24
UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    "gate.value": ("p",),
    "gate.site": ("output",),
    "select.rule": ("argmax",),
    "select.tie": ("lowest",),
    "priority": ("position", "random"),
    "router.logit_cap": (0.0,),
    "pad.route": ("exclude", "include"),
    "pad.detect": ("mask",),
    "dispatch_grad": ("none",),
    "noise.gate_from": ("noisy",),
}


class Plan(NamedTuple):
    """The structure of a case: sizes, how many experts each token is torn between, slots, padding, dropout."""

    name: str
    S: int
    E: int
    F: int
    ways: int
    capacity: int
    pads: str = ""
    mask: bool = False


def plans(ways: st.SearchStrategy[int] | None = None) -> st.SearchStrategy[Plan]:
    """Draw plans."""
    return st.builds(
        Plan,
        name=st.integers(0, 10**6).map(str),
        S=st.sampled_from((7, 1, 11, 17)),
        E=st.sampled_from((4, 2, 5, 1)),
        F=st.sampled_from((3, 6, 9)),
        ways=st.sampled_from((1, 2, 4)) if ways is None else ways,
        capacity=st.integers(0, 6) | st.just(18),
        pads=st.sampled_from(("", "scattered", "left")),
        mask=st.booleans(),
    )


def large(target: Target) -> float:
    """Return a power of two on whose multiples the activation is exactly ReLU."""
    if target.dialect.expert.act == "relu":
        return 1.0
    return 1024.0 if target.profile.storage.x == "float64" else 128.0


def lattice_case(implementation: Implementation, plan: Plan) -> Case:
    """Make the case of a plan; the example is dropped where the implementation takes none. Its property needs `exact_sums`."""
    target = implementation.target
    recipe = Recipe(plan.name, S=plan.S, D=plan.E + 3, E=plan.E, F=plan.F, capacity=plan.capacity, pads=plan.pads, mask=plan.mask)
    case = case_of(recipe, target)
    assume(case is not None)
    assert case is not None
    sizes = case.sizes
    assume(sizes["D"] > sizes["E"])
    arrays = {**_tokens(plan, sizes), **_weights(plan, case, target), "daux": 0.0, "dz": 0.0, "noise": None}
    if "hidden_mask" in case:
        arrays["hidden_mask"] = 2.0 * (np.asarray(case.hidden_mask) != 0.0)
    return changed(case, target, **{name: value for name, value in arrays.items() if name in case.arrays})


def _tokens(plan: Plan, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Return tokens on their experts' axes, even integers behind them, and a last coordinate of 1; dout, and the router that reads the axes."""
    S, D, E = sizes["S"], sizes["D"], sizes["E"]
    ways = min(plan.ways, E)
    ways = 1 if ways == 3 else ways
    first_S = np.floor(uniform(0, plan.name, "first", (S,)) * E).astype(int)
    axis_SE = np.zeros((S, E))
    for way in range(ways):
        axis_SE[np.arange(S), (first_S + way) % E] = AXIS
    x_SD = np.concatenate([axis_SE, 2.0 * integers(0, plan.name, "x", (S, D - E), 2)], axis=1)
    x_SD[:, -1] = 1.0
    return {"x": x_SD[None], "dout": integers(0, plan.name, "dout", (1, S, D), 3), "w_router": AXIS * np.eye(D, E)}


def _weights(plan: Plan, case: Case, target: Target) -> dict[str, np.ndarray]:
    """Return experts of -1, 0 and 1; the activated branch is odd and large, its bias even."""
    E, scale, is_gated = case.sizes["E"], large(target), "w_gate" in case
    shape = case.w_in.shape
    odd_EDF = integers(0, plan.name, "odd", shape, 1)
    odd_EDF[:, -1] = np.where(integers(0, plan.name, "sign", odd_EDF[:, -1].shape, 1) > 0, 1.0, -1.0)
    plain_EDF = integers(0, plan.name, "plain", shape, 1)
    if is_gated:
        odd_EDF[:, :E], plain_EDF[:, :E] = 0.0, 0.0
    even_EF = 2.0 * integers(0, plan.name, "even", (E, shape[2]), 1) * scale
    return {
        "w_in": plain_EDF if is_gated else odd_EDF * scale,
        "w_gate": odd_EDF * scale,
        "w_out": integers(0, plan.name, "w_out", case.w_out.shape, 1),
        "b_router": np.full(E, 3.0),
        "b_in": integers(0, plan.name, "b_in", even_EF.shape, 2) if is_gated else even_EF,
        "b_gate": even_EF,
        "b_out": integers(0, plan.name, "b_out", np.shape(case.get("b_out", np.zeros(1))), 3),
    }


class Layer(NamedTuple):
    """The case, read."""

    x_SD: np.ndarray
    expert_S: np.ndarray
    probs_SE: np.ndarray
    sits_out_S: np.ndarray
    slot_S: np.ndarray
    kept_S: np.ndarray


def _read(case: Case, target: Target) -> Layer:
    dialect, (S, E) = target.dialect, (case.sizes["S"], case.sizes["E"])
    valid_S = case.get("valid", np.ones((1, S), bool))[0]
    x_SD = np.array(case.x[0], np.float64)
    if dialect.pad.zero_input is True:
        x_SD[~valid_S] = 0.0
    logits_SE = x_SD @ np.asarray(case.w_router, np.float64)
    is_top_SE = logits_SE == logits_SE.max(axis=1, keepdims=True)
    probs_SE = is_top_SE / is_top_SE.sum(axis=1, keepdims=True)
    expert_S = np.argmax(is_top_SE, axis=1)
    sits_out_S = ~valid_S & (dialect.pad.route == "exclude")
    order = np.argsort(case.priority[0]) if dialect.priority == "random" else np.arange(S)
    count_E, slot_S = np.zeros(E, int), np.zeros(S, int)
    for s in order:
        slot_S[s] = count_E[expert_S[s]]
        count_E[expert_S[s]] += not sits_out_S[s]
    kept_S = ~sits_out_S & (slot_S < case.capacity - dialect.capacity.slots_lost)
    return Layer(x_SD, expert_S, probs_SE, sits_out_S, slot_S, kept_S)


def lattice_outputs(case: Case, target: Target) -> dict[str, np.ndarray]:
    """Return what must come out, to the bit, token by token."""
    layer, points, dialect = _read(case, target), rounding_points(target.dialect, target.profile), target.dialect
    S, D = layer.x_SD.shape
    wide = {name: np.asarray(array, np.float64) for name, array in case.arrays.items() if name not in ("valid", "priority")}
    shared_D = wide["b_out"] if "b_out" in wide and wide["b_out"].ndim == 1 else np.zeros(D)
    own_ED = wide["b_out"] if "b_out" in wide and wide["b_out"].ndim == 2 else np.zeros((case.sizes["E"], D))
    gradients = {
        name: np.zeros_like(wide[name[1:]]) for name in (f"d{name}" for name in wide) if name[1:] not in ("dout", "daux", "dz", "hidden_mask")
    }
    found: dict[str, np.ndarray] = {"out": np.zeros((1, S, D)), "hidden": np.zeros((1, S, case.sizes["F"])), "expert_out": np.zeros((1, S, D))}
    for s in np.flatnonzero(~layer.sits_out_S):
        row = _Row(case, layer, wide, int(s), points)
        gate, passed = row.gate, {"zero": 0.0, "x": 1.0, "x_times_gate": row.gate}[dialect.drop.output]
        if layer.kept_S[s]:
            found["hidden"][0, s] = hidden = row.hidden()
            found["expert_out"][0, s] = out = round_to(hidden @ wide["w_out"][row.expert] + own_ED[row.expert], points.expert_out)
            found["out"][0, s] = round_to(gate * out + shared_D, points.out)
        else:
            found["out"][0, s] = round_to(passed * layer.x_SD[s] + shared_D, points.out)
        if "dout" in wide:
            row.backward(gradients, found, passed, dialect.drop.output == "x_times_gate")
    zeroed_S = ~case.get("valid", np.ones((1, S), bool))[0] & (dialect.pad.zero_input is True)
    gradients["dx"][0, zeroed_S] = 0.0
    found |= {"expert": layer.expert_S[None], "slot": layer.slot_S[None], "kept": layer.kept_S[None], "probs": layer.probs_SE[None]}
    found["gate"] = np.take_along_axis(layer.probs_SE, layer.expert_S[:, None], axis=1)[None, :, 0]
    return found | (gradients if "dout" in wide else {})


class _Row:
    """One token at its expert."""

    def __init__(self, case: Case, layer: Layer, wide: dict[str, np.ndarray], s: int, points: Any) -> None:
        self.layer, self.wide, self.s, self.points = layer, wide, s, points
        self.expert = e = int(layer.expert_S[s])
        self.gate = float(layer.probs_SE[s, e])
        self.mask_F = wide["hidden_mask"][0, s] if "hidden_mask" in wide else np.ones(case.sizes["F"])
        self.z_in_F, self.z_gate_F = self._branch("w_in", "b_in"), self._branch("w_gate", "b_gate") if "w_gate" in wide else None

    def _branch(self, weight: str, bias: str) -> np.ndarray:
        z_F = self.layer.x_SD[self.s] @ self.wide[weight][self.expert]
        return round_to(z_F + (self.wide[bias][self.expert] if bias in self.wide else 0.0), self.points.z)

    def hidden(self) -> np.ndarray:
        """Return the hidden row: the activation is ReLU here."""
        acted_F = np.maximum(self.z_in_F, 0.0) if self.z_gate_F is None else np.maximum(self.z_gate_F, 0.0) * self.z_in_F
        return round_to(acted_F * self.mask_F, self.points.hidden)

    def backward(self, gradients: dict[str, np.ndarray], found: dict[str, np.ndarray], passed: float, passes_gate: bool) -> None:
        """Add the row's part to every gradient."""
        layer, wide, s, e = self.layer, self.wide, self.s, self.expert
        dout_D, x_D = wide["dout"][0, s], layer.x_SD[s]
        if "db_out" in gradients and gradients["db_out"].ndim == 1:
            gradients["db_out"] += dout_D
        if not layer.kept_S[s]:
            gradients["dx"][0, s] += passed * dout_D
            dgate = float(dout_D @ x_D) if passes_gate else 0.0
        else:
            dgate = float(dout_D @ found["expert_out"][0, s])
            dexpert_out_D = self.gate * dout_D
            gradients["dw_out"][e] += np.outer(found["hidden"][0, s], dexpert_out_D)
            if "db_out" in gradients and gradients["db_out"].ndim == 2:
                gradients["db_out"][e] += dexpert_out_D
            dhidden_F = wide["w_out"][e] @ dexpert_out_D * self.mask_F
            if self.z_gate_F is None:
                self._branch_backward(gradients, "w_in", "b_in", dhidden_F * (self.z_in_F > 0.0))
            else:
                self._branch_backward(gradients, "w_gate", "b_gate", dhidden_F * self.z_in_F * (self.z_gate_F > 0.0))
                self._branch_backward(gradients, "w_in", "b_in", dhidden_F * np.maximum(self.z_gate_F, 0.0))
        dlogits_E = dgate * self.gate * ((np.arange(len(layer.probs_SE[s])) == e) - layer.probs_SE[s])
        gradients["dw_router"] += np.outer(x_D, dlogits_E)
        gradients["dx"][0, s] += wide["w_router"] @ dlogits_E
        if "db_router" in gradients:
            gradients["db_router"] += dlogits_E

    def _branch_backward(self, gradients: dict[str, np.ndarray], weight: str, bias: str, dz_F: np.ndarray) -> None:
        gradients[f"d{weight}"][self.expert] += np.outer(self.layer.x_SD[self.s], dz_F)
        gradients["dx"][0, self.s] += self.wide[weight][self.expert] @ dz_F
        if f"d{bias}" in gradients:
            gradients[f"d{bias}"][self.expert] += dz_F


def is_exact_backward(case: Case, target: Target, expected: dict[str, np.ndarray]) -> bool:
    """Whether every partial sum of the gradients is a multiple of 1/16 that 24 bits hold. Its property needs `wide_gradients`."""
    dgate = np.abs(np.asarray(case.dout, np.float64)) * np.abs(expected["expert_out"])
    through_router = AXIS * 16.0 * dgate.sum() if (expected["probs"][~np.isin(expected["probs"], (0.0, 1.0))]).size else 0.0
    sixteenths = 16.0 * AXIS * np.abs(expected["hidden"]).sum() * np.abs(np.asarray(case.dout)).max(initial=0.0)
    return max(float(through_router), float(sixteenths)) <= 2.0 ** (53 if target.profile.storage.x == "float64" else EXACT_BITS)


def routed_as(scene: Scene, choices_GS: np.ndarray, **changes: object) -> Scene:
    """Play the scene with tokens on the axes of the experts that they shall go to: a gap of 1024 to every other logit."""
    sizes = scene.case.sizes
    D, E = sizes["D"], sizes["E"]
    assume(D >= E)
    x_GSD = AXIS * (choices_GS[..., None] == np.arange(D))
    arrays = {"x": x_GSD, "w_router": AXIS * np.eye(D, E), "noise": None}
    if "b_router" in scene.case:
        arrays["b_router"] = np.zeros(E)
    return replay(scene.implementation, changed(scene.case, scene.implementation.target, **arrays, **changes))


def with_flat_logits(scene: Scene, level: float) -> Scene:
    """Play the scene with all logits at one level."""
    x_GSD, w_DE = np.zeros_like(scene.case.x), np.zeros_like(scene.case.w_router)
    x_GSD[..., 0], w_DE[0] = 1.0, level
    arrays = {"x": x_GSD, "w_router": w_DE, "noise": None}
    if "b_router" in scene.case:
        arrays["b_router"] = np.zeros(scene.E)
    return replay(scene.implementation, changed(scene.case, scene.implementation.target, **arrays))
