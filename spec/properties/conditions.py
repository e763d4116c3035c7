# May import: nothing.
"""Knob values of a dialect under which properties hold, by the names that several of them use."""

from __future__ import annotations

from typing import Any

Knobs = dict[str, tuple[Any, ...]]

ROUTED: Knobs = {"select.rule": ("argmax", "sample", "second_place")}  # a token has one claim, decided by its own logits
ARGMAX: Knobs = {"select.rule": ("argmax",)}
LOWEST: Knobs = {"select.rule": ("argmax",), "select.tie": ("lowest",)}
FIXED_ORDER: Knobs = {"priority": ("position", "random")}  # who is served first does not depend on the gates
WHOLE_PADS: Knobs = {"pad.route": ("exclude", "include")}  # padding is a token or none, not half of one
MASKED: Knobs = {"pad.detect": ("mask",)}  # a token of zeros is a token
LINEAR_LOGITS: Knobs = {"router.bias": (False,), "router.logit_cap": (0.0,)}
UNCAPPED: Knobs = {"router.logit_cap": (0.0,)}
NOISY_GATE: Knobs = {"noise.gate_from": ("noisy",)}
NO_LEAK: Knobs = {"noise.leak_to_experts": ("never",)}
DROPS_ZERO: Knobs = {"drop.output": ("zero",)}
NO_BIAS: Knobs = {"expert.bias": ("none",)}
OWN_BIAS: Knobs = {"expert.bias": ("none", "per_expert")}  # none outside the experts
BARE_EXPERTS: Knobs = {"expert.bias": ("none", "shared_out")}
OUTER_GATE: Knobs = {"gate.site": ("output", "hidden")}  # the expert's input is the token
GATE_IS_P: Knobs = {"gate.value": ("p",)}
UNGATED: Knobs = {"expert.glu": (False,)}
BALANCE: Knobs = {"aux.available": (True,), "aux.form": ("product",)}
PAPER_F: Knobs = BALANCE | {"aux.f.drops": ("include",), "aux.f.count": ("choice",), "aux.scale_E": ("E",), "aux.denom": ("S", "valid")}
VALID_Z: Knobs = {"z.pads": ("exclude",), "z.denom": ("valid",)}
