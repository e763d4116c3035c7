# May import: standard library, numpy, refswitch.
"""A forward pass of the engine as a trace: every stage under the name by which `refswitch.verify.compare_model` judges it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from refswitch.engine.model import model_forward
from refswitch.engine.noise import Address, draw_noise
from refswitch.model_config import ModelConfig
from refswitch.model_setup import model_statics
from refswitch.precision import Precision
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.reference.transformer import ModelParams, StackParams
from refswitch.verify.compare_model import Inputs

STAGES = ("norm_forward", "attention_forward", "feed_forward_forward", "switch_forward", "residual", "position_bias_forward")


class Recorder:
    """A backend that keeps what its stages took and gave."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.calls = backend, list[tuple[str, tuple[Any, ...], Any]]()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.backend, name)
        if name not in STAGES:
            return operation

        def recorded(*args: Any) -> Any:
            result = operation(*args)
            self.calls.append((name, args, result))
            return result

        return recorded


def _dense_stages(shape: tuple[int, ...], normed_BLD: np.ndarray, params: FeedForwardParams, saved: Any) -> dict[str, np.ndarray]:
    """Return pre-activations and hidden. Kernels keep none that hidden tells: where hidden is 0 under ReLU the product is formed again."""
    z_act, z_linear, hidden = (saved._asdict()[name] for name in saved._fields if name.startswith(("z_act", "z_linear", "hidden")))
    z_act, z_linear, hidden = (array.reshape(*shape[:2], -1) for array in (z_act, z_linear, hidden))
    if params.w_gate_DF is not None:
        return {"wi_0": z_act, "wi_1": z_linear, "hidden": hidden}
    return {"wi": np.where(hidden == 0.0, normed_BLD @ params.w_in_DF, hidden) if np.shares_memory(z_act, hidden) else z_act, "hidden": hidden}


def _sub_layer(place: str, calls: Iterator[tuple[str, tuple[Any, ...], Any]]) -> dict[str, np.ndarray]:
    (_, (x_BLD, *_), (normed_BLD, _)), (name, args, result), (_, _, y_BLD) = (next(calls) for _ in range(3))
    found = {"x": x_BLD, "normed": normed_BLD, "y": y_BLD}
    if name == "switch_forward":
        found |= {"out": result[0].out_GSD.reshape(x_BLD.shape), "logits": result[0].logits_GSE}
    else:
        out_BLD, saved = result
        found["out"] = out_BLD
        if name == "attention_forward":
            heads = {"q": saved.query_BLHK, "k": saved.key_BMHK, "v": saved.value_BMHK, "mixed": saved.mixed_BLHK}
            found |= {name: array.reshape(*array.shape[:2], -1) for name, array in heads.items()}
        else:
            found |= _dense_stages(x_BLD.shape, normed_BLD, args[1], saved)
    return {f"{place}/{stage}": array for stage, array in found.items()}


def _stack(stack: str, params: StackParams, calls: Iterator[tuple[str, tuple[Any, ...], Any]]) -> dict[str, np.ndarray]:
    found = {f"{stack}/bias": np.moveaxis(next(calls)[2], 0, -1)}
    for i, block in enumerate(params.blocks):
        for sub in ("self", "cross", "ff") if block.cross_attention is not None else ("self", "ff"):
            found |= _sub_layer(f"{stack}/{i}/{sub}", calls)
    _, (last_BLD, *_), (out_BLD, _) = next(calls)
    return found | {f"{stack}/last": last_BLD, f"{stack}/out": out_BLD}


def trace_of(config: ModelConfig, params: ModelParams, inputs: Inputs, setting: Precision, backend: Any) -> dict[str, np.ndarray]:
    """Run the engine without noise, in evaluation as the judge expects it; return copies of every stage."""
    (B, M), (_, L) = inputs.encoder_tokens.shape, inputs.targets.shape
    statics = model_statics(config, B, M, L, train=False, setting=setting)
    recorder = Recorder(backend)
    with backend.running():
        backend.begin()
        noise = draw_noise(config, statics, Address(0, 0, 0), (B, M, L), False, backend)
        outputs, _ = model_forward(inputs.batch(), params, noise, statics, recorder)  # type: ignore[arg-type]
        calls = iter(recorder.calls)
        found = _stack("encoder", params.encoder, calls) | _stack("decoder", params.decoder, calls)
        found |= {"encoder/embedded": outputs.encoder.stream[0], "decoder/embedded": outputs.decoder.stream[0], "head/logits": outputs.logits_BLV}
        return {name: np.array(array) for name, array in found.items()} | {"loss": np.array(outputs.losses.cross_entropy)}
