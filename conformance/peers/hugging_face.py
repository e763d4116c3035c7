# May import: standard library, numpy, safetensors, torch, transformers.
"""A Hugging Face Switch or T5 folder run once in float32, and what each of its modules took and gave.

    python hugging_face.py FOLDER INPUTS.safetensors OUTPUTS.safetensors

The inputs are `encoder_tokens`, `encoder_valid`, `decoder_tokens`, `targets` (batch, length); a target of -100 does not count. The outputs are named
`encoder/0/self/q` and so on: stack, block, sub-layer (`self`, `cross`, `ff`), stage. `trace` does the same for a model that is there already.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def _float(value: Any) -> np.ndarray:
    tensor = value[0] if isinstance(value, tuple) else value
    return tensor.detach().float().numpy().copy()


def _watch(model: Any, found: dict[str, np.ndarray]) -> list[Any]:
    """Hang a hook on every module that is a stage; the first call of each is kept."""
    hooks = []

    def keep(module: Any, name: str, taken: str = "", given: str = "") -> None:
        def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if taken:
                found.setdefault(f"{name}/{taken}", _float(inputs[0]))
            if given:
                found.setdefault(f"{name}/{given}", _float(output))

        hooks.append(module.register_forward_hook(hook))

    for stack_name in ("encoder", "decoder"):
        stack = getattr(model, stack_name)
        keep(stack.final_layer_norm, stack_name, taken="last", given="out")
        for i, block in enumerate(stack.block):
            for sub, layer in zip(("self", "cross", "ff") if len(block.layer) == 3 else ("self", "ff"), block.layer, strict=True):
                place = f"{stack_name}/{i}/{sub}"
                keep(layer.layer_norm, place, taken="x", given="normed")
                keep(layer, place, given="y")
                if sub != "ff":
                    attention = layer.SelfAttention if sub == "self" else layer.EncDecAttention
                    for matrix in "qkv":
                        keep(getattr(attention, matrix), place, given=matrix)
                    keep(attention.o, place, taken="mixed", given="out")
                    if hasattr(attention, "relative_attention_bias"):
                        keep(attention.relative_attention_bias, stack_name, given="bias")
                    continue
                home = layer.mlp if hasattr(layer, "mlp") else layer.DenseReluDense
                keep(home, place, given="out")
                if hasattr(home, "router"):
                    keep(home.router.classifier, place, given="logits")
                    continue
                for matrix in ("wi", "wi_0", "wi_1"):
                    if hasattr(home, matrix):
                        keep(getattr(home, matrix), place, given=matrix)
                keep(home.wo, place, taken="hidden")
    keep(model.lm_head, "head", given="logits")

    def embedded(output: Any) -> None:
        found[next(turn)] = _float(output)

    tables = [model.encoder.embed_tokens, model.decoder.embed_tokens]
    turn = iter(("encoder/embedded", "decoder/embedded"))  # one table may serve both stacks, the encoder first
    for table in {id(table): table for table in tables}.values():
        hooks.append(table.register_forward_hook(lambda _module, _inputs, output: embedded(output)))
    return hooks


def trace(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a model once; return every stage that a hook sees, and the loss."""
    import torch

    found: dict[str, np.ndarray] = {}
    hooks = _watch(model, found)
    extra = {"output_router_logits": False} if "Switch" in type(model).__name__ else {}
    try:
        with torch.no_grad():
            outputs = model(
                input_ids=torch.tensor(inputs["encoder_tokens"]),
                attention_mask=torch.tensor(inputs["encoder_valid"]).long(),
                decoder_input_ids=torch.tensor(inputs["decoder_tokens"]),
                labels=torch.tensor(inputs["targets"]),
                **extra,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return found | {"loss": np.asarray(float(outputs.loss.detach()), np.float32)}


def load(folder: str) -> Any:
    """Load the folder's model in float32, with the plain form of attention, ready for evaluation."""
    import torch
    import transformers

    kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"]
    name = {"switch_transformers": "SwitchTransformers", "t5": "T5", "mt5": "MT5"}[kind]
    model = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def main(folder: str, inputs: str, outputs: str) -> None:
    """Run the folder's model."""
    from safetensors.numpy import load_file, save_file

    save_file(trace(load(folder), load_file(inputs)), outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
