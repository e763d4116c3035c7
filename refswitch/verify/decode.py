# May import: standard library, numpy, refswitch.reference, refswitch.config, refswitch.verify (below).
"""From a route to an output, and back: what an implementation that exports no choice must have chosen.

`follow` evaluates everything behind a route, each stage on what the implementation exports of the stage before. `guess_choices` and
`survivors_from_output` read the discrete part out of the output, where it is not exported. Spec: S-ROUTE-3. Next: `judge`.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from refswitch.reference.capacity import Route
from refswitch.verify import layer as stages
from refswitch.verify import tubes
from refswitch.verify.case import Case
from refswitch.verify.layer import Layer
from refswitch.verify.route import admissible_choices, expected_route, kept_is_forced
from refswitch.verify.tubes import Tube, exact

Outputs = dict[str, np.ndarray]
MAX_BRANCHES = 256  # combinations of uncertain choices that are tried


class Path(NamedTuple):
    """The forward tubes along one route."""

    route: Route
    gate_GS: Tube
    expertise: stages.Expertise
    expert_out_GSD: Tube
    out_GSD: Tube
    own_expertise: stages.Expertise  # with the implementation's own hidden, where it exports it
    own_expert_out_GSD: Tube  # the implementation's own, where it exports it


def pick(exported: np.ndarray | None, computed: Tube, looked_at: np.ndarray) -> Tube:
    """Return the exported values as exact where they are looked at, else what was computed."""
    if exported is None:
        return computed
    mask = looked_at.reshape(looked_at.shape + (1,) * (computed.value.ndim - looked_at.ndim))
    return tubes.where(mask, exact(exported), computed)


def follow(layer: Layer, route: Route, probs: Tube, logits: Tube, x_expert: Tube, outputs: Outputs) -> Path:
    """Evaluate gate, hidden, expert output and output along a route, each on what the implementation exports of the stage before."""
    kept_GS = route.kept_GS
    E = layer.params.w_router_DE.shape[1]
    gate = pick(outputs.get("gate"), stages.gate_stage(layer, probs, logits, route.expert_GS), kept_GS)
    expertise = stages.hidden_stage(layer, x_expert, gate, route)
    conditioned = expertise
    if "hidden" in outputs:
        own = stages.pack_tube(exact(np.where(kept_GS[..., None], outputs["hidden"], 0.0)), route, E)
        conditioned = expertise._replace(hidden_GECF=own)
    expert_out = stages.expert_out_stage(layer, conditioned, route)
    own_out = pick(outputs.get("expert_out"), expert_out, kept_GS)
    out = stages.out_stage(layer, own_out, gate, x_expert, route)
    return Path(route, gate, expertise, expert_out, out, conditioned, own_out)


class Guess(NamedTuple):
    """Choices read out of an output."""

    expert_GS: np.ndarray
    options_GSE: np.ndarray  # the experts that the output leaves possible: one where it tells, several where it does not
    is_searched: bool  # False: there were more combinations than are tried, and none of those tried explains who was dropped


def guess_choices(
    layer: Layer, expert_GS: np.ndarray, uncertain_GS: np.ndarray, scores: Tube, probs: Tube, logits: Tube, x_expert: Tube, outputs: Outputs
) -> Guess:
    """Return the choices of an implementation that does not export them, decoded from its output.

    For each admissible expert of a token its output is compared with what the token would output if kept and if dropped. The combinations
    of what is possible are tried; the first under which everybody who is served looks kept and everybody else looks dropped is taken.
    """
    admissible_GSE = admissible_choices(layer, scores, logits).admissible_GSE
    E = admissible_GSE.shape[-1]
    counts_GS = admissible_GSE.sum(axis=-1)
    out = np.asarray(outputs["out"], np.float64)
    nobody_GS = np.zeros_like(layer.claims_GS)
    looks_kept_GSE, looks_dropped_GSE = np.zeros_like(admissible_GSE), np.zeros_like(admissible_GSE)
    for rank in range(int(counts_GS[uncertain_GS].max())):
        ranked_GS = np.argsort(~admissible_GSE, axis=-1, kind="stable")[..., rank]
        trial_GS = np.where(uncertain_GS & (counts_GS > rank), ranked_GS, expert_GS)
        served = _everyone_served(layer, trial_GS, scores)
        for looks_GSE, kept_GS in ((looks_kept_GSE, served.kept_GS), (looks_dropped_GSE, nobody_GS)):
            path = follow(layer, served._replace(kept_GS=kept_GS), probs, logits, x_expert, {})
            fits_GS = np.all(tubes.ratio(out, path.out_GSD) <= 1.0, axis=-1)
            np.put_along_axis(looks_GSE, trial_GS[..., None], fits_GS[..., None], axis=-1)
    possible_GSE = admissible_GSE & (looks_kept_GSE | looks_dropped_GSE)
    options_GSE = np.where(uncertain_GS[..., None], np.where(possible_GSE.any(-1, keepdims=True), possible_GSE, admissible_GSE), False)
    tokens = np.argwhere(uncertain_GS)
    options = [np.flatnonzero(options_GSE[g, s]).tolist() for g, s in tokens]
    options_GSE = options_GSE | (~uncertain_GS[..., None] & (expert_GS[..., None] == np.arange(E)))
    looked_at = ~layer.sits_out_GS
    guess_GS = expert_GS.copy()
    for combination in itertools.islice(itertools.product(*options), MAX_BRANCHES):
        guess_GS[tuple(tokens.T)] = combination
        gate = stages.gate_stage(layer, probs, logits, guess_GS)
        kept_GS = expected_route(layer, guess_GS, gate.value, scores.value).kept_GS
        as_kept_GS, as_dropped_GS = (
            np.take_along_axis(looks_GSE, guess_GS[..., None], axis=-1)[..., 0] for looks_GSE in (looks_kept_GSE, looks_dropped_GSE)
        )
        explained_GS = np.where(kept_GS, as_kept_GS, as_dropped_GS) if kept_is_forced(layer) else as_kept_GS | as_dropped_GS
        if explained_GS[looked_at].all():
            return Guess(guess_GS, options_GSE, True)
    guess_GS[tuple(tokens.T)] = [option[0] for option in options]
    return Guess(guess_GS, options_GSE, math.prod(len(option) for option in options) <= MAX_BRANCHES)


def _everyone_served(layer: Layer, expert_GS: np.ndarray, scores: Tube) -> Route:
    """Return the route with a slot for every claim."""
    unlimited = layer._replace(case=Case({**layer.case.scalars, "capacity": layer.case.sizes["S"] + 1}, layer.case.arrays))
    return expected_route(unlimited, expert_GS, np.zeros(expert_GS.shape), scores.value)


def survivors_from_output(layer: Layer, route: Route, probs: Tube, logits: Tube, x_expert: Tube, outputs: Outputs) -> Route:
    """Return the route with the survivors decoded from the output, where the dialect leaves them open and they are not exported."""
    everyone = route._replace(kept_GS=layer.claims_GS & ~layer.sits_out_GS)
    path = follow(layer, everyone, probs, logits, x_expert, {})
    return route._replace(kept_GS=everyone.kept_GS & (tubes.ratio(outputs["out"], path.out_GSD) <= 1.0).all(axis=-1))
