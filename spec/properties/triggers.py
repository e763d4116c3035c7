# May import: standard library, numpy, refswitch.
"""The regimes in which Switch layers are known to go wrong, as predicates of a call: a property that never met what it is about proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refswitch.reference.capacity import Route
from refswitch.verify.case import Case
from refswitch.verify.cases import Target
from refswitch.verify.layer import prepare_layer
from refswitch.verify.route import effective_capacity, expected_route


class Call(NamedTuple):
    """What the predicates read."""

    case: Case
    route: Route
    logits_GSE: np.ndarray
    claims_GS: np.ndarray
    claims_GE: np.ndarray
    capacity: int
    sizes: dict[str, int]


def _tied(call: Call) -> bool:
    highest_GS1 = call.logits_GSE.max(axis=-1, keepdims=True)
    return bool((((call.logits_GSE == highest_GS1).sum(axis=-1) > 1) & call.claims_GS).any())


TRIGGERS: dict[str, Callable[[Call], Any]] = {
    "drop": lambda call: (call.claims_GE > call.capacity).any(),
    "drop_not_on_expert_0": lambda call: (call.claims_GE[:, 1:] > call.capacity).any(),
    "drop_in_a_later_group": lambda call: (call.claims_GE[1:] > call.capacity).any(),
    "empty_expert": lambda call: (call.claims_GE == 0).any(),
    "tie": _tied,
    "pad": lambda call: not call.case.get("valid", np.ones(1, bool)).all(),
    "pad_and_drop": lambda call: not call.case.get("valid", np.ones(1, bool)).all() and (call.claims_GE > call.capacity).any(),
    "noise": lambda call: "noise" in call.case,
    "dropout": lambda call: "hidden_mask" in call.case,
    "bias": lambda call: "b_in" in call.case,
    "router_bias": lambda call: "b_router" in call.case,
    "gated": lambda call: "w_gate" in call.case,
    "several_groups": lambda call: call.sizes["G"] > 1,
    "over_256_on_an_expert": lambda call: (call.claims_GE > 256).any(),
    "over_128_experts": lambda call: call.sizes["E"] > 128,
    "over_10_experts": lambda call: call.sizes["E"] > 10,
    "one_expert": lambda call: call.sizes["E"] == 1,
    "one_token": lambda call: call.sizes["S"] == 1,
    "capacity_0": lambda call: call.capacity == 0,
    "square_expert": lambda call: call.sizes["D"] == call.sizes["F"],
    "square_router": lambda call: call.sizes["D"] == call.sizes["E"],
    "logits_below_0": lambda call: (call.logits_GSE < 0.0).all(axis=-1).any(),
    "logits_above_89": lambda call: (np.abs(call.logits_GSE) > 89.0).any(),
}

SAID = ("difference",)  # what a property itself says that it met: two points on one piece, so that their difference means something


def met_by(case: Case, target: Target, outputs: dict[str, np.ndarray]) -> list[str]:
    """Return the regimes that a call was in, judged by its own choices where it exports them."""
    layer = prepare_layer(case, target)
    if 0 in layer.x_GSD.shape:
        return []
    with np.errstate(all="ignore"):
        logits_GSE = (layer.x_GSD * layer.inputs.noise_factor_GSD) @ layer.params.w_router_DE + layer.params.b_router_E + layer.inputs.noise_term_GSE
    E = logits_GSE.shape[-1]
    expert_GS = np.argmax(logits_GSE, axis=-1)
    if "expert" in outputs:
        own_GS = outputs["expert"]
        expert_GS = np.where((own_GS >= 0) & (own_GS < E), own_GS, expert_GS)
    route = expected_route(layer, expert_GS, np.zeros(expert_GS.shape), logits_GSE)
    claims_GE = ((route.expert_GS[..., None] == np.arange(E)) & layer.claims_GS[..., None]).sum(axis=1)
    call = Call(case, route, logits_GSE, layer.claims_GS, claims_GE, effective_capacity(layer), case.sizes)
    return [name for name, holds in TRIGGERS.items() if holds(call)]


def impossible(trigger: str, target: Target) -> str:
    """Return why no case of this target can be in a regime, or nothing."""
    dialect, features = target.dialect, target.features
    never_drops = dialect.capacity.expr in ("inf", "max_count")
    reasons = {
        "drop": "the dialect never drops" if never_drops else "",
        "noise": "the dialect has no noise" if dialect.noise.kind == "none" or dialect.noise.when == "never" else _undeclared("noise", features),
        "pad": _undeclared("padding", features),
        "several": _undeclared("groups", features),
        "dropout": _undeclared("expert_dropout", features),
        "bias": "" if dialect.expert.bias == "per_expert" else "the dialect's experts have no biases of their own",
        "router": "" if dialect.router.bias else "the dialect's router has no bias",
        "gated": "" if dialect.expert.glu else "the dialect's experts are not gated",
        "capacity": "the dialect never drops" if never_drops else "it computes its capacity" if "own_capacity" in features else "",
    }
    found = [reasons.get(trigger.split("_")[0], "")]
    if trigger == "pad_and_drop":
        found.append(reasons["drop"])
    if trigger == "drop_in_a_later_group":
        found.append(reasons["several"])
    return next((reason for reason in found if reason), "")


def _undeclared(feature: str, features: frozenset[str]) -> str:
    return "" if feature in features else f"feature {feature} is not declared"
