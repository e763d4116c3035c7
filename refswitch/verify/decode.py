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
from refswitch.verify.route import admissible_choices, expected_route
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
    return Path(route, gate, expertise, expert_out, out)


class Guess(NamedTuple):
    """Choices read out of an output."""

    expert_GS: np.ndarray
    options_GSE: np.ndarray  # the experts that the output leaves possible: one where it tells, several where it does not
    is_searched: bool  # False: there were more combinations than are tried, and none of those tried explains who was dropped


def guess_choices(
    layer: Layer, expert_GS: np.ndarray, uncertain_GS: np.ndarray, scores: Tube, probs: Tube, logits: Tube, x_expert: Tube, outputs: Outputs
) -> Guess:
    """Return the choices of an implementation that does not export them, decoded from its output.

    Each uncertain token takes the admissible expert whose tube its output lies in. Where that leaves several (dropped tokens look alike)
    the combinations are tried; the first that explains who was dropped is taken.
    """
    admissible = admissible_choices(layer, scores, logits).admissible_GSE
    out = np.asarray(outputs["out"], np.float64)
    options: list[list[int]] = []
    tokens = np.argwhere(uncertain_GS)
    unlimited = layer._replace(case=Case({**layer.case.scalars, "capacity": layer.case.sizes["S"] + 1}, layer.case.arrays))
    most = int(admissible[uncertain_GS].sum(axis=-1).max())
    fits_by_rank = []
    for rank in range(most):
        ranked = np.argsort(~admissible, axis=-1, kind="stable")[..., rank]
        trial_GS = np.where(uncertain_GS & (admissible.sum(axis=-1) > rank), ranked, expert_GS)
        route = expected_route(unlimited, trial_GS, np.zeros(trial_GS.shape), scores.value)
        path = follow(unlimited, route, probs, logits, x_expert, {})
        fits_by_rank.append((trial_GS, np.all(tubes.ratio(out, path.out_GSD) <= 1.0, axis=-1)))
    for g, s in tokens:
        fitting = [int(trial_GS[g, s]) for trial_GS, fits_GS in fits_by_rank if fits_GS[g, s] and admissible[g, s, trial_GS[g, s]]]
        options.append(sorted(set(fitting)) or [int(e) for e in np.flatnonzero(admissible[g, s])])
    nonzero_GS = (out != 0.0).any(axis=-1)
    guess_GS = expert_GS.copy()
    options_GSE = expert_GS[..., None] == np.arange(admissible.shape[-1])
    for (g, s), option in zip(tokens, options, strict=True):
        options_GSE[g, s] = np.isin(np.arange(admissible.shape[-1]), option)
    for combination in itertools.islice(itertools.product(*options), MAX_BRANCHES):
        guess_GS[tuple(tokens.T)] = combination
        gate = stages.gate_stage(layer, probs, logits, guess_GS)
        if (expected_route(layer, guess_GS, gate.value, scores.value).kept_GS == nonzero_GS)[~layer.sits_out_GS].all():
            return Guess(guess_GS, options_GSE, True)
    guess_GS[tuple(tokens.T)] = [option[0] for option in options]
    return Guess(guess_GS, options_GSE, math.prod(len(option) for option in options) <= MAX_BRANCHES)


def survivors_from_output(layer: Layer, route: Route, probs: Tube, logits: Tube, x_expert: Tube, outputs: Outputs) -> Route:
    """Return the route with the survivors decoded from the output, where the dialect leaves them open and they are not exported."""
    everyone = route._replace(kept_GS=layer.claims_GS & ~layer.sits_out_GS)
    path = follow(layer, everyone, probs, logits, x_expert, {})
    return route._replace(kept_GS=everyone.kept_GS & (tubes.ratio(outputs["out"], path.out_GSD) <= 1.0).all(axis=-1))
