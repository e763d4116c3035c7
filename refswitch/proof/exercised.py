# May import: standard library, numpy.
"""What the calls of a Switch layer met: a check that never saw a dropped token has proven nothing about dropping.

Each trigger is a situation that some implementation gets wrong, as a predicate over one call's inputs and outputs. `Exercised` counts over calls, and
`missing` names what a sweep never met, so that the sweep fails instead of passing over nothing. Before: `ulp`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

SMALL_GATE = 2.0**-8  # bfloat16 has 8 significant bits: what is multiplied by less is lost beside a summand of the size of x
MANY = 256  # bfloat16 holds no 257: positions counted in it collide


class Call(NamedTuple):
    """What the triggers read of one call."""

    valid_GS: np.ndarray
    logits_GSE: np.ndarray
    expert_GS: np.ndarray
    kept_GS: np.ndarray
    gate_GS: np.ndarray
    hidden_GSF: np.ndarray
    capacity: int


def call_of(inputs: Any, outputs: Any, capacity: int) -> Call:
    """Return what the triggers read of a layer's records: `inputs.valid_GS`, and `outputs` with its `route`."""
    route = outputs.route
    return Call(inputs.valid_GS, outputs.logits_GSE, route.expert_GS, route.kept_GS, outputs.gate_GS, outputs.hidden_GSF, capacity)


def chosen_counts(call: Call) -> np.ndarray:
    """Return count_GE, how many valid tokens chose each expert."""
    return np.sum((call.expert_GS[..., None] == np.arange(call.logits_GSE.shape[-1])) & call.valid_GS[..., None], axis=1)


def kept_counts(call: Call) -> np.ndarray:
    """Return count_GE, how many tokens hold a slot of each expert."""
    return np.sum((call.expert_GS[..., None] == np.arange(call.logits_GSE.shape[-1])) & call.kept_GS[..., None], axis=1)


def _has_tie(call: Call) -> bool:
    sorted_GSE = np.sort(call.logits_GSE, axis=-1)
    return bool(np.any((sorted_GSE[..., -1:] == sorted_GSE[..., -2:-1]) & call.valid_GS[..., None]))


def _is_all_to_one(call: Call) -> bool:
    chosen_GE = chosen_counts(call)
    return chosen_GE.shape[1] > 1 and bool(np.any((chosen_GE.max(axis=1) > 1) & (np.count_nonzero(chosen_GE, axis=1) == 1)))


TRIGGERS: dict[str, Callable[[Call], bool]] = {
    "drop": lambda call: bool(np.any(call.valid_GS & ~call.kept_GS)),
    "empty expert": lambda call: call.kept_GS.size > 0 and bool(np.any(kept_counts(call) == 0)),
    "full expert": lambda call: call.capacity > 0 and bool(np.any(kept_counts(call) == call.capacity)),
    "tie": _has_tie,  # of the two highest logits of a token
    "pad": lambda call: not call.valid_GS.all(),
    "all-pad group": lambda call: call.valid_GS.shape[1] > 0 and bool(np.any(~call.valid_GS.any(axis=1))),
    "more than 256 tokens on one expert": lambda call: bool(np.any(chosen_counts(call) > MANY)),
    "capacity 0": lambda call: call.capacity == 0,
    "capacity above S": lambda call: call.capacity > call.valid_GS.shape[1] > 0,
    "one expert": lambda call: call.logits_GSE.shape[-1] == 1,
    "group without tokens": lambda call: call.valid_GS.shape[1] == 0,
    "all to one": _is_all_to_one,  # several tokens of a group and all on one of several experts
    "gate below 2^-8": lambda call: bool(np.any(call.kept_GS & (np.abs(call.gate_GS) < SMALL_GATE))),
    "dead relu row": lambda call: bool(np.any(call.kept_GS & ~np.any(call.hidden_GSF != 0.0, axis=-1))),  # no gradient passes it
    "negative logits only": lambda call: bool(np.any(np.all(call.logits_GSE < 0.0, axis=-1))),  # a maximum that starts at 0 is wrong
}


def triggers_of(call: Call) -> set[str]:
    """Return what one call meets."""
    return {name for name, is_met in TRIGGERS.items() if is_met(call)}


@dataclass
class Exercised:
    """How many calls met each trigger."""

    calls: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def see(self, call: Call) -> set[str]:
        """Count one call, and return what it met."""
        met = triggers_of(call)
        self.calls += 1
        self.counts.update(met)
        return met

    def missing(self, required: Iterable[str] = TRIGGERS) -> list[str]:
        """Return the required triggers that no call met, sorted.

        Raises
        ------
        ValueError
            Where there is no such trigger: a misspelt one would never be met, or never be missed.
        """
        required = {*required}
        if not required <= {*TRIGGERS}:
            raise ValueError(f"exercised: no trigger is called {sorted(required - {*TRIGGERS})}; there are {', '.join(TRIGGERS)}")
        return sorted(required - {name for name, count in self.counts.items() if count})
