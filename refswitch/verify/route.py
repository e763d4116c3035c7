# May import: standard library, numpy, refswitch.reference, refswitch.config, refswitch.verify (below).
"""The discrete part: which choices are admissible, and what follows from the implementation's own.

A choice is admissible if exact arithmetic under the declared profile could have made it. Everything behind a choice (slots, kept) is
an integer: recomputed under the implementation's own choices and compared with `==`. Spec: S-ROUTE-3, S-CAP-1, S-CAP-2, S-POS-1.
Next: `decode`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.reference.capacity import Route, arrival_order, no_token_left_behind, order_by_gate, slots_forward
from refswitch.reference.router import choices_in_order, choose
from refswitch.verify.layer import Layer
from refswitch.verify.tubes import Tube


class Choices(NamedTuple):
    """What may be chosen, and the admissible choice whose score is the highest at the centre."""

    admissible_GSE: np.ndarray
    centre_GS: np.ndarray


def admissible_choices(layer: Layer, scores_GSE: Tube, logits_GSE: Tube) -> Choices:
    """Return the admissible experts of every token.

    Spec: S-ROUTE-3. On exactly known scores: the ties' rule, exactly. Else every expert whose score can reach the highest, except one
    behind an expert with exactly the same logit: equal logits have equal probabilities, of which the lowest index is chosen.
    """
    lowest_tie = layer.target.dialect.select.tie == "lowest"
    centre_GS = choose(scores_GSE.value)
    E = scores_GSE.value.shape[-1]
    if not scores_GSE.radius.any():
        if lowest_tie:
            return Choices(centre_GS[..., None] == np.arange(E), centre_GS)
        return Choices(scores_GSE.value == scores_GSE.value.max(axis=-1, keepdims=True), centre_GS)
    highest_low_GS1 = (scores_GSE.value - scores_GSE.radius).max(axis=-1, keepdims=True)
    admissible_GSE = scores_GSE.value + scores_GSE.radius >= highest_low_GS1
    reads_the_gates_logits = layer.target.dialect.select.rule != "sample" and layer.target.dialect.noise.gate_from != "clean"
    if lowest_tie and not logits_GSE.radius.any() and reads_the_gates_logits:
        equal_GSE = logits_GSE.value == logits_GSE.value.max(axis=-1, keepdims=True)
        first_GS1 = np.argmax(equal_GSE, axis=-1)[..., None]
        admissible_GSE = admissible_GSE & ~(equal_GSE & (np.arange(E) > first_GS1))
    return Choices(admissible_GSE, choose(np.where(admissible_GSE, scores_GSE.value, -np.inf)))


def order_is_certain(layer: Layer, scores_GSE: Tube) -> bool:
    """Whether no two scores of a token can change places: what rules with several choices per token need in order to be judged."""
    if not scores_GSE.radius.any():
        return True
    order_GSE = np.argsort(scores_GSE.value, axis=-1)
    low_GSE = np.take_along_axis(scores_GSE.value - scores_GSE.radius, order_GSE, axis=-1)
    high_GSE = np.take_along_axis(scores_GSE.value + scores_GSE.radius, order_GSE, axis=-1)
    return bool((low_GSE[..., 1:] > high_GSE[..., :-1])[~layer.sits_out_GS].all())


def effective_capacity(layer: Layer) -> int:
    """Return how many claims an expert can serve."""
    return max(layer.case.capacity - layer.target.dialect.capacity.slots_lost, 0)


def expected_route(layer: Layer, expert_GS: np.ndarray, gate_GS: np.ndarray, scores_GSE: np.ndarray) -> Route:
    """Return the route that follows from the choices.

    Spec: S-CAP-1, S-CAP-2, S-POS-1.
    """
    dialect, E = layer.target.dialect, scores_GSE.shape[-1]
    G, S = expert_GS.shape
    capacity = effective_capacity(layer)
    if dialect.select.rule == "ntlb":
        return no_token_left_behind(choices_in_order(scores_GSE, dialect.select.choices), layer.claims_GS, E, capacity)
    if dialect.pad.route == "expert0_weight0":
        expert_GS = np.where(layer.is_pad_GS, 0, expert_GS)
    priority_GS = {"gate_desc": order_by_gate(gate_GS), "random": layer.inputs.priority_GS}.get(dialect.priority, arrival_order(S, G))
    route = slots_forward(expert_GS, layer.claims_GS, priority_GS, E, capacity)
    return route._replace(kept_GS=route.kept_GS & ~layer.sits_out_GS)


def kept_is_forced(layer: Layer) -> bool:
    """Whether the dialect's priority leaves no freedom in who is kept."""
    return layer.target.dialect.priority in ("position", "random") or layer.target.dialect.select.rule == "ntlb"


def claims_per_expert(layer: Layer, expert_GS: np.ndarray, E: int) -> np.ndarray:
    """Return count_GE of claims."""
    return ((expert_GS[..., None] == np.arange(E)) & layer.claims_GS[..., None]).sum(axis=1)


def free_kept_violation(layer: Layer, expert_GS: np.ndarray, kept_GS: np.ndarray, gate_GS: Tube, E: int) -> tuple[int, int, str] | None:
    """Return (g, e, clause) of the first breach where the dialect leaves who is kept open, or None.

    Spec: S-CAP-1: each expert serves min(claims, capacity). S-CAP-2, by falling gate: no dropped token's gate is certainly above a kept one's.
    """
    claims_GE = claims_per_expert(layer, expert_GS, E)
    of_GSE = (expert_GS[..., None] == np.arange(E)) & layer.claims_GS[..., None]
    kept_GE = (of_GSE & kept_GS[..., None]).sum(axis=1)
    wrong = np.argwhere(kept_GE != np.minimum(claims_GE, effective_capacity(layer)))
    if len(wrong):
        return int(wrong[0][0]), int(wrong[0][1]), "S-CAP-1"
    if layer.target.dialect.priority != "gate_desc":
        return None
    low_GS1, high_GS1 = (gate_GS.value - gate_GS.radius)[..., None], (gate_GS.value + gate_GS.radius)[..., None]
    best_dropped_GE = np.max(np.where(of_GSE & ~kept_GS[..., None], low_GS1, -np.inf), axis=1, initial=-np.inf)
    worst_kept_GE = np.min(np.where(of_GSE & kept_GS[..., None], high_GS1, np.inf), axis=1, initial=np.inf)
    wrong = np.argwhere(best_dropped_GE > worst_kept_GE)
    return (int(wrong[0][0]), int(wrong[0][1]), "S-CAP-2") if len(wrong) else None
