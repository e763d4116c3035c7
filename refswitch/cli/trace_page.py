# May import: standard library, numpy, refswitch.tracing, refswitch.model_config.
"""The page of a trace: one file with its data in it, no network, light or dark as its reader is. Its HTML is `trace_page.html`."""

from __future__ import annotations

import html
import json
from pathlib import Path

from refswitch.model_config import ModelConfig
from refswitch.tracing import LayerTrace, Tokens

PAGE = Path(__file__).with_name("trace_page.html")
DROPPED = {
    "zero": "The layer gives 0, and the residual carries the token.",
    "x": "The layer gives x itself.",
    "x_times_gate": "The layer gives p · x.",
}


def _layer(trace: LayerTrace) -> dict[str, object]:
    return {
        "stack": trace.stack, "block": int(trace.block), "capacity": int(trace.capacity), "groups": int(trace.groups),
        "expert": trace.expert_L.tolist(), "slot": trace.slot_L.tolist(), "kept": trace.kept_L.tolist(),
        "gate": [round(float(gate), 4) for gate in trace.gate_L], "probs": [[round(p, 4) for p in row] for row in trace.probs_LE.tolist()],
        "balance": trace.balance, "entropy": float(trace.entropy_L.mean()),
    }  # fmt: skip


def page(tokens: Tokens, layers: list[LayerTrace], title: str, config: ModelConfig, drop: str) -> str:
    """Return the page; what stands in a text cannot leave the data's element."""
    content = {"tokens": list(tokens.shown), "experts": config.experts, "layers": [_layer(layer) for layer in layers], "drop": DROPPED[drop]}
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    page = PAGE.read_text(encoding="utf-8")
    return page.replace("@TITLE@", html.escape(title)).replace("@DIALECT@", html.escape(config.dialect)).replace("@DATA@", data)
