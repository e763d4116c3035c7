# May import: standard library, numpy, refswitch.numbers, refswitch.reference, refswitch.config, refswitch.verify (below).
"""One case judged: every stage of an implementation's outputs against its tube, on the implementation's own previous stage.

Returns checks, not opinions: what they amount to is for `findings`. Spec: every clause of the switch layer. Next: `findings`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from refswitch.numbers.precision import FORMATS, Format, round_to, spacing
from refswitch.reference.capacity import Route
from refswitch.verify import layer as stages
from refswitch.verify import tubes
from refswitch.verify.case import GRADIENTS, INPUTS, OUTPUTS
from refswitch.verify.cases import Prepared, Target
from refswitch.verify.decode import Outputs, Path, follow, guess_choices, pick, survivors_from_output
from refswitch.verify.gradients import Forward, gradient_tubes
from refswitch.verify.layer import Layer, prepare_layer
from refswitch.verify.route import (
    admissible_choices,
    claims_per_expert,
    effective_capacity,
    expected_route,
    free_kept_violation,
    kept_is_forced,
    order_is_certain,
)
from refswitch.verify.tubes import Tube, exact

STAGES = (
    "state", "noise", "router", "softmax", "select", "capacity", "position", "dispatch", "expert", "gate", "combine", "drop", "padding",
    "aux_loss", "z_loss", "precision", "backward",
)  # fmt: skip
GRADIENT_CLAUSE = {
    "x": "S-BACK-1", "w_router": "S-BACK-2", "b_router": "S-BACK-2", "w_in": "S-BACK-3", "w_gate": "S-BACK-3", "b_in": "S-BACK-3",
    "b_gate": "S-BACK-3", "w_out": "S-BACK-4", "b_out": "S-BACK-4",
}  # fmt: skip


class Check(NamedTuple):
    """One comparison: a clause on one output of one case."""

    clause: str
    stage: str
    output: str
    case: str
    elements: int
    worst: float  # largest |error| / radius; infinite where an exact value differs
    failing: int
    coordinates: dict[str, int]
    got: float
    expected: float
    radius: float
    decisive: int = 1  # elements whose radius is below the largest value: where there is none, anything would have passed

    @property
    def ok(self) -> bool:
        """Whether every element lies within its radius."""
        return self.failing == 0


@dataclass
class Verdicts:
    """What one case yields."""

    case: Prepared
    checks: list[Check] = field(default_factory=list)
    ambiguous: int = 0  # tokens with more than one admissible choice
    tokens: int = 0
    ulps: dict[str, list[float]] = field(default_factory=dict)  # radius in units in the last place of the stored format
    evidence: set[str] = field(default_factory=set)  # regimes that were really met

    is_undecided: bool = False  # nothing behind the choice was judged

    @property
    def failing(self) -> set[tuple[str, str]]:
        """What failed: clause and output."""
        return {(check.clause, check.output) for check in self.checks if not check.ok}

    @property
    def forward_fails(self) -> bool:
        """Whether a check of the forward pass failed, so that the gradients were judged on what is already known to be wrong."""
        return any(not check.ok and check.stage not in ("backward", "state") for check in self.checks)


def _letters(output: str) -> str:
    return OUTPUTS[output] if output in OUTPUTS else INPUTS[output[1:]]


def _coordinates(output: str, index: tuple[int, ...]) -> dict[str, int]:
    letters = _letters(output)
    letters = letters[-len(index) :] if len(index) < len(letters) else letters
    return {letter.lower(): int(i) for letter, i in zip(letters, index, strict=False)}


def compare(verdicts: Verdicts, clause: str, stage: str, output: str, got: np.ndarray, tube: Tube, looked_at: np.ndarray | None = None) -> bool:
    """Record |got - value| <= radius wherever `looked_at` (broadcast over trailing axes) is true; return whether all of it holds."""
    got = np.asarray(got, np.float64)
    ratio = tubes.ratio(got, tube)
    mask = np.ones(got.shape, bool)
    if looked_at is not None:
        mask = np.broadcast_to(looked_at.reshape(looked_at.shape + (1,) * (got.ndim - looked_at.ndim)), got.shape)
    ratio = np.where(mask, ratio, 0.0)
    bad = np.argwhere(ratio > 1.0)
    index = tuple(bad[0]) if len(bad) else (np.unravel_index(int(np.argmax(ratio)), ratio.shape) if ratio.size else ())
    has_element = ratio.size > 0
    verdicts.checks.append(
        Check(
            clause=clause,
            stage=stage,
            output=output,
            case=verdicts.case.name,
            elements=int(mask.sum()),
            worst=float(ratio.max()) if has_element else 0.0,
            failing=len(bad),
            coordinates=_coordinates(output, tuple(int(i) for i in index)),
            got=float(got[index]) if has_element else 0.0,
            expected=float(tube.value[index]) if has_element else 0.0,
            radius=float(tube.radius[index]) if has_element else 0.0,
            decisive=int((mask & ((tube.radius < np.max(np.abs(tube.value), initial=0.0)) | (tube.radius == 0.0))).sum()),
        )
    )
    return not len(bad)


def _tightness(verdicts: Verdicts, output: str, tube: Tube, format: Format, looked_at: np.ndarray | None = None) -> None:
    mask = np.isfinite(tube.radius) & (tube.value != 0.0)
    if looked_at is not None:
        mask = mask & looked_at.reshape(looked_at.shape + (1,) * (tube.value.ndim - looked_at.ndim))
    if mask.any():
        ulps = tube.radius[mask] / spacing(tube.value[mask], format)
        verdicts.ulps.setdefault(output, []).append(float(np.median(ulps)))


def _mismatch(verdicts: Verdicts, clause: str, stage: str, output: str, got: np.ndarray, expected: np.ndarray, looked_at: np.ndarray) -> bool:
    """Record got == expected for integers and masks."""
    return compare(verdicts, clause, stage, output, got, exact(expected), looked_at)


def _checked_scores(verdicts: Verdicts, layer: Layer, outputs: Outputs, x_router: Tube) -> tuple[Tube, Tube, Tube, Tube]:
    """Check logits and probabilities; return raw, logits, probs and the scores of the choice, conditioned on what is exported."""
    looked_at = ~layer.sits_out_GS
    logits, raw = stages.logits_stage(layer, x_router)
    if "logits" in outputs:
        compare(verdicts, "S-ROUTE-1", "router", "logits", outputs["logits"], logits, looked_at)
        _tightness(verdicts, "logits", logits, layer.points.logits)
        logits = pick(outputs["logits"], logits, looked_at)
        raw = logits if not layer.target.dialect.router.logit_cap else raw
    probs = stages.probs_stage(layer, logits)
    if "probs" in outputs:
        read = stages.read_probs(layer, probs)
        low, high = np.minimum(probs.value - probs.radius, read.value - read.radius), np.maximum(probs.value + probs.radius, read.value + read.radius)
        either = probs if layer.points.choice == layer.points.probs else tubes.hull(low, high)
        compare(verdicts, "S-ROUTE-2", "softmax", "probs", outputs["probs"], either, looked_at)
        _tightness(verdicts, "probs", either, layer.points.probs)
        probs = pick(outputs["probs"], probs, looked_at)
    return raw, logits, probs, stages.scores_stage(layer, probs, logits)


def _chosen(verdicts: Verdicts, layer: Layer, outputs: Outputs, scores: Tube, logits: Tube) -> tuple[np.ndarray, np.ndarray]:
    """Return expert_GS and the mask of tokens whose choice had to be guessed; check an exported choice."""
    choices = admissible_choices(layer, scores, logits)
    looked_at = ~layer.sits_out_GS
    uncertain_GS = (choices.admissible_GSE.sum(axis=-1) > 1) & looked_at
    verdicts.ambiguous += int(uncertain_GS.sum())
    verdicts.tokens += int(looked_at.sum())
    if layer.target.dialect.select.rule == "ntlb":
        return choices.centre_GS, np.zeros_like(uncertain_GS)
    if "expert" not in outputs:
        return choices.centre_GS, uncertain_GS
    E = choices.admissible_GSE.shape[-1]
    got_GS = outputs["expert"].astype(np.int64)
    inside_GS = (got_GS >= 0) & (got_GS < E)
    safe_GS = np.where(inside_GS, got_GS, 0)
    right_GS = inside_GS & np.take_along_axis(choices.admissible_GSE, safe_GS[..., None], axis=-1)[..., 0]
    _mismatch(verdicts, "S-ROUTE-3", "select", "expert", got_GS, np.where(right_GS, got_GS, choices.centre_GS), looked_at)
    own_pads_GS = layer.sits_out_GS & right_GS
    return np.where((looked_at & inside_GS) | own_pads_GS, safe_GS, choices.centre_GS), np.zeros_like(uncertain_GS)


def _checked_route(verdicts: Verdicts, layer: Layer, outputs: Outputs, expert_GS: np.ndarray, gate: Tube, scores: Tube) -> Route:
    """Check who is kept and the slots; return the route under the implementation's own choices and survivors."""
    E = scores.value.shape[-1]
    route = expected_route(layer, expert_GS, gate.value, scores.value)
    looked_at = layer.claims_GS & ~layer.sits_out_GS
    if layer.target.dialect.select.rule == "ntlb" and "expert" in outputs:
        _mismatch(verdicts, "S-ROUTE-3", "select", "expert", outputs["expert"], route.expert_GS, looked_at & route.kept_GS)
    if "kept" in outputs:
        kept_GS = outputs["kept"] & ~layer.sits_out_GS
        if layer.sits_out_GS.any():
            _mismatch(verdicts, "S-PAD-1", "padding", "kept", outputs["kept"], np.zeros_like(kept_GS), layer.sits_out_GS)
        if kept_is_forced(layer):
            counts_differ = (claims_kept(expert_GS, kept_GS, E) != claims_kept(route.expert_GS, route.kept_GS, E)).any()
            clause = "S-CAP-1" if counts_differ else "S-CAP-2"
            _mismatch(verdicts, clause, "capacity", "kept", kept_GS, route.kept_GS, looked_at)
        else:
            breach = free_kept_violation(layer, expert_GS, kept_GS, gate, E)
            expected_GS = kept_GS.copy()
            if breach:
                expected_GS[breach[0]] = route.kept_GS[breach[0]]
            _mismatch(verdicts, breach[2] if breach else "S-CAP-1", "capacity", "kept", kept_GS, expected_GS, looked_at)
        route = route._replace(kept_GS=kept_GS)
    if "slot" in outputs and layer.target.dialect.priority != "unspecified":
        served = looked_at & route.kept_GS if layer.target.dialect.select.rule == "ntlb" or not kept_is_forced(layer) else looked_at
        if kept_is_forced(layer):
            _mismatch(verdicts, "S-POS-1", "position", "slot", outputs["slot"], route.slot_GS, served)
    return route


def claims_kept(expert_GS: np.ndarray, kept_GS: np.ndarray, E: int) -> np.ndarray:
    """Return count_GE of kept tokens."""
    return ((expert_GS[..., None] == np.arange(E)) & kept_GS[..., None]).sum(axis=1)


def _check_formats(verdicts: Verdicts, layer: Layer, outputs: Outputs, kept_GS: np.ndarray) -> None:
    """Check that what is declared to be stored narrowly lies on its grid. Spec: S-PREC-1."""
    points, real = layer.points, ~layer.sits_out_GS
    declared = {
        "out": (points.out, real),
        "hidden": (points.hidden, kept_GS),
        "expert_out": (points.expert_out, kept_GS),
        "gate": (points.gate, kept_GS),
    }
    for output, (format, looked_at) in declared.items():
        if output in outputs and format.precision < FORMATS["float32"].precision:
            compare(verdicts, "S-PREC-1", "precision", output, outputs[output], exact(round_to(outputs[output], format)), looked_at)


def _check_experts(verdicts: Verdicts, layer: Layer, path: Path, outputs: Outputs) -> None:
    """Check hidden, expert output and the output of kept, dropped and padded rows."""
    route, points = path.route, layer.points
    kept_GS = route.kept_GS
    if "hidden" in outputs:
        hidden = stages.unpack_tube(path.expertise.hidden_GECF, route)
        compare(verdicts, "S-EXPERT-1", "expert", "hidden", outputs["hidden"], hidden, kept_GS)
        _tightness(verdicts, "hidden", hidden, points.hidden, kept_GS)
    if "expert_out" in outputs:
        compare(verdicts, "S-EXPERT-2", "expert", "expert_out", outputs["expert_out"], path.expert_out_GSD, kept_GS)
        _tightness(verdicts, "expert_out", path.expert_out_GSD, points.expert_out, kept_GS)
    compare(verdicts, "S-COMBINE-1", "combine", "out", outputs["out"], path.out_GSD, kept_GS)
    _tightness(verdicts, "out", path.out_GSD, points.out, kept_GS)
    dropped_GS = ~kept_GS & ~layer.sits_out_GS
    if dropped_GS.any():
        compare(verdicts, "S-DROP-1", "drop", "out", outputs["out"], path.out_GSD, dropped_GS)
    if layer.sits_out_GS.any():
        compare(verdicts, "S-PAD-1", "padding", "out", outputs["out"], path.out_GSD, layer.sits_out_GS)


def _check_losses(
    verdicts: Verdicts, layer: Layer, probs: Tube, logits: Tube, scores: Tube, route: Route, options_GSE: np.ndarray, outputs: Outputs
) -> tuple[Tube, Tube, np.ndarray]:
    """Check both losses; return the counts, the log-sum-exp and the z-loss's weights, which the gradients need."""
    counts = stages.counts_of(layer, route, logits, scores)
    untold_GSE = options_GSE & (options_GSE.sum(axis=-1, keepdims=True) > 1)  # choices that the output does not tell: any of them may be counted
    counts = Tube(counts.value, counts.radius + untold_GSE.sum(axis=1))
    z_value, lse_GS, weight_GS = stages.z_stage(layer, logits)
    wants = layer.case.wants
    if "aux_loss" in outputs and "aux_loss" in wants and layer.x_GSD.size and layer.target.dialect.aux.form == "product":
        aux = stages.aux_stage(layer, probs if layer.points.choice == layer.points.probs else stages.probs_stage(layer, logits), counts, route)
        compare(verdicts, "S-AUX-1", "aux_loss", "aux_loss", outputs["aux_loss"], aux)
        _tightness(verdicts, "aux_loss", aux, layer.points.router)
    if "z_loss" in outputs and "z_loss" in wants and layer.x_GSD.size and (~layer.is_pad_GS).any():
        compare(verdicts, "S-Z-1", "z_loss", "z_loss", outputs["z_loss"], z_value)
        _tightness(verdicts, "z_loss", z_value, layer.points.router)
    return counts, lse_GS, weight_GS


def _check_gradients(verdicts: Verdicts, layer: Layer, forward: Forward, outputs: Outputs) -> None:
    """Check every gradient; a case with only one loss blames that loss's gradient."""
    recipe = verdicts.case.recipe
    only_loss = {(1.0, 0.0): "S-BACK-5", (0.0, 1.0): "S-BACK-6"}.get(recipe.losses) if recipe.out_scale == 0.0 else None
    for name, tube in gradient_tubes(layer, forward).items():
        output = f"d{name}"
        if name in GRADIENTS and output in outputs:
            clause = only_loss if only_loss and name in ("x", "w_router", "b_router") else GRADIENT_CLAUSE[name]
            compare(verdicts, clause, "backward", output, outputs[output], tube)
            _tightness(verdicts, output, tube, layer.points.gradients)


def _note_evidence(verdicts: Verdicts, layer: Layer, route: Route) -> None:
    """Record which regimes the case really met."""
    E = layer.params.w_router_DE.shape[1]
    claims_GE = claims_per_expert(layer, route.expert_GS, E)
    capacity = effective_capacity(layer)
    met = {
        "drop": bool((layer.claims_GS & ~route.kept_GS).any()),
        "drop_not_on_expert_0": bool((claims_GE[:, 1:] > capacity).any()),
        "empty_expert": bool((claims_GE == 0).any()),
        "pad": bool(layer.is_pad_GS.any()),
        "pad_and_drop": bool(layer.is_pad_GS.any() and (claims_GE > capacity).any()),
        "tie": bool(verdicts.case.recipe.ties),
        "noise": "noise" in layer.case,
        "more_than_256_on_an_expert": bool((claims_GE > 256).any()),
        "several_groups": layer.case.sizes["G"] > 1,
    }
    verdicts.evidence |= {name for name, seen in met.items() if seen}


def judge_case(prepared: Prepared, target: Target, outputs: Outputs) -> Verdicts:
    """Judge one case's outputs under a declared dialect and profile.

    Spec: the chapter on the switch layer. The outputs already keep the contract's shapes and types.
    """
    with np.errstate(all="ignore"):  # overflow and NaN are values here: `tubes.ratio` compares them as such
        return _judge(Verdicts(prepared), prepare_layer(prepared.case, target), outputs)


def _judge(verdicts: Verdicts, layer: Layer, outputs: Outputs) -> Verdicts:
    prepared = verdicts.case
    if layer.x_GSD.shape[1] == 0:
        compare(verdicts, "S-COMBINE-1", "combine", "out", outputs["out"], exact(np.zeros(layer.x_GSD.shape)))
        for name in GRADIENTS:
            if name in prepared.case.arrays and f"d{name}" in outputs:
                compare(
                    verdicts, GRADIENT_CLAUSE[name], "backward", f"d{name}", outputs[f"d{name}"], exact(np.zeros(prepared.case.arrays[name].shape))
                )
        return verdicts
    x_router, x_expert = stages.noise_stage(layer)
    raw, logits, probs, scores = _checked_scores(verdicts, layer, outputs, x_router)
    expert_GS, uncertain_GS = _chosen(verdicts, layer, outputs, scores, logits)
    options_GSE = expert_GS[..., None] == np.arange(scores.value.shape[-1])
    if uncertain_GS.any():
        guess = guess_choices(layer, expert_GS, uncertain_GS, scores, probs, logits, x_expert, outputs)
        expert_GS, options_GSE = guess.expert_GS, guess.options_GSE
        verdicts.is_undecided = not guess.is_searched
    if layer.target.dialect.select.rule == "ntlb" and not order_is_certain(layer, scores):
        verdicts.is_undecided = True
    if verdicts.is_undecided:
        return verdicts
    gate = stages.gate_stage(layer, probs, logits, expert_GS)
    route = _checked_route(verdicts, layer, outputs, expert_GS, gate, scores)
    if "kept" not in outputs and not kept_is_forced(layer):
        route = survivors_from_output(layer, route, probs, logits, x_expert, outputs)
        breach = free_kept_violation(layer, route.expert_GS, route.kept_GS, gate, scores.value.shape[-1])
        compare(verdicts, breach[2] if breach else "S-CAP-1", "capacity", "out", np.asarray(float(breach is not None)), exact(0.0))
    gate = stages.gate_stage(layer, probs, logits, route.expert_GS)
    if "gate" in outputs:
        compare(verdicts, "S-GATE-1", "gate", "gate", outputs["gate"], gate, route.kept_GS)
        _tightness(verdicts, "gate", gate, layer.points.gate, route.kept_GS)
    path = follow(layer, route, probs, logits, x_expert, outputs)
    _check_experts(verdicts, layer, path, outputs)
    _check_formats(verdicts, layer, outputs, route.kept_GS)
    counts, lse_GS, weight_GS = _check_losses(verdicts, layer, probs, logits, scores, route, options_GSE, outputs)
    _note_evidence(verdicts, layer, route)
    if "dout" in prepared.case and (options_GSE.sum(axis=-1) == 1).all():
        backward_probs = probs if layer.points.choice == layer.points.probs else stages.probs_stage(layer, logits)
        forward = Forward(
            x_router, x_expert, raw, logits, backward_probs, path.gate_GS, route, path.own_expertise, path.own_expert_out_GSD,
            counts, lse_GS, weight_GS,
        )  # fmt: skip
        _check_gradients(verdicts, layer, forward, outputs)
    return verdicts
