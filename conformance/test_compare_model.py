# May import: standard library, numpy, pytest, torch, transformers, refswitch.
"""Stage by stage in float32: every stage of random Hugging Face models lies within its radius, and what is planted is found and named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5.18.0")

import torch
from transformers.models.switch_transformers import modeling_switch_transformers as switch_module
from typer.testing import CliRunner

from conformance.house import hf_model
from conformance.peers.hugging_face import trace
from refswitch.checkpoints.hugging_face import params_from
from refswitch.cli.main import app
from refswitch.model_config import ModelConfig
from refswitch.reference.transformer import ModelParams
from refswitch.verify.compare_model import Inputs, StageCheck, compare_trace, draw_inputs, end_to_end, run_peer

SIZES = [
    hf_model.Shape(kind, layers, sparse, experts, capacity, gated, tied, pads=True, seed=seed, D=D, K=3, H=2, F=F, V=29)
    for seed, (kind, layers, sparse, experts, capacity, gated, tied, D, F) in enumerate(
        [
            ("t5", (1, 1), (0, 0), 0, 0, False, True, 10, 7),
            ("t5", (2, 3), (0, 0), 0, 0, True, False, 16, 24),
            ("t5", (4, 4), (0, 0), 0, 0, True, True, 48, 80),
            ("switch", (2, 2), (1, 1), 4, 64, False, True, 12, 20),
            ("switch", (3, 4), (1, 2), 1, 3, False, True, 32, 64),
            ("switch", (4, 1), (2, 1), 16, 1, False, False, 24, 40),
            ("switch", (2, 4), (2, 4), 3, 3, False, True, 20, 28),
        ]
    )
]


def setting(shape: hf_model.Shape) -> tuple[Any, ModelConfig, ModelParams, Inputs]:
    """Return a random model in float32 with its own casts, and what refswitch knows of it."""
    peer = hf_model.peer_of(shape)
    config = hf_model.config_of(shape, peer)
    for module in peer.modules():  # the float64 form of the other tests is undone
        if type(module).__name__.endswith("LayerNorm"):
            del module.forward
        if isinstance(module, switch_module.SwitchTransformersTop1Router):
            module.dtype = torch.float32
    peer = peer.float()
    params = params_from(hf_model.tensors_of(peer), config)
    return peer, config, params, draw_inputs(config, 3, shape.M, shape.L, shape.seed)


def checks_of(shape: hf_model.Shape, plant: Callable[[Any], None] | None = None) -> list[StageCheck]:
    """Return every stage's check, with something planted in the peer."""
    peer, config, params, inputs = setting(shape)
    if plant:
        plant(peer)
    return list(compare_trace(trace(peer, inputs._asdict()), config, params, inputs))


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: f"{shape.kind}-{shape.seed}")
def test_compare_trace__every_stage_within_its_radius(shape: hf_model.Shape) -> None:
    """No stage of any model fails, the exact ones are equal, and there is one for every module."""
    checks = checks_of(shape)
    assert [check for check in checks if not check.ok] == []
    attentions = shape.layers[0] + 2 * shape.layers[1]
    assert sum(check.name.endswith("/mixed") for check in checks) == attentions
    assert sum(check.name.endswith(("/switch", "/hidden")) for check in checks) == sum(shape.layers)
    assert max(check.worst for check in checks) > 1e-3, "radii so wide that nothing could fail"


def test_end_to_end__is_reported() -> None:
    """The whole model's distance is of the order of float32."""
    peer, config, params, inputs = setting(SIZES[3])
    assert 0.0 < end_to_end(trace(peer, inputs._asdict()), config, params, inputs) < 1e-4


def wrap(path: str, change: Callable[..., Any]) -> Callable[[Any], None]:
    """Return a plant: the module at a dotted path computes change(module, its own forward, *arguments)."""

    def plant(peer: Any) -> None:
        module = peer.get_submodule(path)
        own = module.forward
        module.forward = lambda *args, **kwargs: change(module, own, *args, **kwargs)

    return plant


def set_attribute(path: str, **values: Any) -> Callable[[Any], None]:
    """Return a plant: attributes of the module at a dotted path."""

    def plant(peer: Any) -> None:
        for name, value in values.items():
            setattr(peer.get_submodule(path), name, value)

    return plant


def perturb(path: str, factor: float) -> Callable[[Any], None]:
    """Return a plant: one weight is off by a relative error."""

    def plant(peer: Any) -> None:
        with torch.no_grad():
            peer.get_submodule(path).weight.view(-1)[3] *= 1.0 + factor

    return plant


def narrow(path: str) -> Callable[[Any], None]:
    """Return a plant: a weight stored in bfloat16."""

    def plant(peer: Any) -> None:
        module = peer.get_submodule(path)
        module.weight = torch.nn.Parameter(module.weight.detach().bfloat16().float())

    return plant


def transpose(path: str) -> Callable[[Any], None]:
    """Return a plant: a square weight transposed."""

    def plant(peer: Any) -> None:
        module = peer.get_submodule(path)
        module.weight = torch.nn.Parameter(module.weight.detach().T.contiguous())

    return plant


def never_drops(peer: Any) -> None:
    """Let each Switch layer serve everyone."""
    for module in peer.modules():
        if isinstance(module, switch_module.SwitchTransformersTop1Router):
            module.expert_capacity = 1000


SQUARE = dataclasses.replace(SIZES[1], D=6)
PLANTS = [
    (0, set_attribute("encoder.block.0.layer.1.layer_norm", variance_epsilon=1e-5), "encoder/0/ff/normed", "epsilon is 1e-05"),
    (1, wrap("decoder.block.1.layer.0.layer_norm", lambda m, own, x: own(x - x.mean(-1, keepdim=True))), "decoder/1/self/normed", "LayerNorm"),
    (1, set_attribute("decoder.block.2.layer.1.EncDecAttention", scaling=3**-0.5), "decoder/2/cross/mixed", "divided by sqrt(K)"),
    (0, set_attribute("encoder.block.0.layer.0.SelfAttention", relative_attention_max_distance=128), "encoder/bias", "largest distance is 128"),
    (0, set_attribute("decoder.block.0.layer.0.SelfAttention", is_decoder=False), "decoder/bias", "other stack's direction"),
    (2, set_attribute("encoder.block.3.layer.1.DenseReluDense", act=torch.nn.GELU()), "encoder/3/ff/hidden", "activation is gelu_erf"),
    (2, wrap("decoder.block.0.layer.2", lambda m, own, x, *rest: m.DenseReluDense(m.layer_norm(x))), "decoder/0/ff/y", "residual is left out"),
    (0, wrap("encoder.embed_tokens", lambda m, own, x: own(x) * math.sqrt(10)), "encoder/embedded", ""),
    (1, narrow("decoder.block.1.layer.1.EncDecAttention.k"), "decoder/1/cross/k", "rounded to bfloat16"),
    (7, transpose("encoder.block.1.layer.0.SelfAttention.v"), "encoder/1/self/v", "transposed"),
    (2, perturb("decoder.block.3.layer.2.DenseReluDense.wo", 1e-3), "decoder/3/ff/out", ""),
    (1, wrap("lm_head", lambda m, own, x: own(x * 16**-0.5)), "head/logits", "D**-0.5"),
    (6, never_drops, "encoder/0/ff/switch", "never dropped"),
    (3, perturb("decoder.block.1.layer.2.mlp.router.classifier", 1e-2), "decoder/1/ff/switch", ""),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PLANTS)))
def test_compare_trace__names_the_first_difference(number: int) -> None:
    """The first stage that fails is the one where it was planted, and the known difference is named."""
    place, plant, name, says = PLANTS[number]
    checks = checks_of([*SIZES, SQUARE][place], plant)
    first = next(check for check in checks if not check.ok)
    assert first.name == name
    assert first.worst > 1.0
    if says:
        assert any(says in said for said in first.explanations), first


def test_compare_model__command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder agrees; with one stage of the trace changed the command names it and its status is 1; a folder of ours is refused."""
    peer = hf_model.peer_of(SIZES[4]).float()
    peer.save_pretrained(tmp_path / "model")
    runner = CliRunner()
    report = tmp_path / "report.json"
    done = runner.invoke(app, ["compare-model", str(tmp_path / "model"), "-v", "--json", str(report)])
    assert done.exit_code == 0, done.output
    assert "AGREES" in done.output
    told = json.loads(report.read_text(encoding="utf-8"))
    assert told["first_difference"] is None
    assert all(stage["ok"] for stage in told["stages"])

    def run_changed(folder: Path, inputs: Inputs, deadline_s: float) -> dict[str, np.ndarray]:
        found = run_peer(folder, inputs, deadline_s)
        return found | {"decoder/1/cross/out": found["decoder/1/cross/out"] * np.float32(1.001)}

    monkeypatch.setattr("refswitch.cli.compare.run_peer", run_changed)
    done = runner.invoke(app, ["compare-model", str(tmp_path / "model")])
    assert done.exit_code == 1
    assert "FIRST DIFFERENCE at decoder/1/cross/out" in done.output
    assert runner.invoke(app, ["convert", str(tmp_path / "model"), str(tmp_path / "ours")]).exit_code == 0
    done = runner.invoke(app, ["compare-model", str(tmp_path / "ours")])
    assert done.exit_code == 2
    assert "refswitch convert it first" in done.output
