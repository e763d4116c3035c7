# May import: standard library, numpy, refswitch.reference, refswitch.checkpoints (below), refswitch.model_config, refswitch.errors.
"""Hugging Face's names for the parameters of a Switch or T5 model, both ways.

A linear layer is stored there as (out, in) and here as (in, out). A tied model's table may be stored under up to four names; they must agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refswitch.checkpoints.folder import check_shapes, new_folder, write_tensors
from refswitch.checkpoints.hugging_face_config import content_of
from refswitch.checkpoints.template import template_of
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.reference.attention import AttentionParams
from refswitch.reference.block import AttentionLayerParams, FeedForwardLayerParams
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.reference.switch import SwitchParams
from refswitch.reference.transformer import BlockParams, ModelParams, StackParams

COPIES_OF_EMBEDDING = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def check_tensors(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    """Refuse what is not exactly this model.

    Raises
    ------
    InputError
        Naming the first tensor that is missing, extra, misshapen or not finite, or a copy of the embedding that differs from it.
    """
    shapes = {name: tensor.shape for name, tensor in tensors_from(template_of(config)).items()}
    copies = (*COPIES_OF_EMBEDDING, "lm_head.weight") if config.tied else COPIES_OF_EMBEDDING
    check_shapes({name: tensor for name, tensor in tensors.items() if name not in copies or name in shapes}, shapes)
    for name in copies:
        if name in tensors and name not in shapes and not np.array_equal(tensors[name], tensors["shared.weight"]):
            raise InputError(f"checkpoint: tensor {name} should be a copy of shared.weight, but differs from it")


def params_from(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> ModelParams:
    """Return the parameter tree, in float64.

    Raises
    ------
    InputError
        As `check_tensors`.
    """
    check_tensors(tensors, config)
    H, K = config.heads, config.d_kv

    def read(name: str) -> np.ndarray:
        return np.asarray(tensors[f"{name}.weight"], np.float64)

    def attention(layer: str, name: str) -> AttentionLayerParams:
        query, key, value = (read(f"{layer}.{name}.{matrix}").T.reshape(-1, H, K) for matrix in "qkv")
        return AttentionLayerParams(read(f"{layer}.layer_norm"), AttentionParams(query, key, value, read(f"{layer}.{name}.o").T.reshape(H, K, -1)))

    def dense(home: str) -> FeedForwardParams:
        if config.gated:
            return FeedForwardParams(read(f"{home}.wi_1").T, read(f"{home}.wi_0").T, read(f"{home}.wo").T)
        return FeedForwardParams(read(f"{home}.wi").T, None, read(f"{home}.wo").T)

    def switch(home: str) -> SwitchParams:
        experts = [dense(f"{home}.experts.expert_{e}") for e in range(config.experts)]
        E, D, F = config.experts, config.d_model, config.d_ff
        gates = [expert.w_gate_DF for expert in experts if expert.w_gate_DF is not None]
        stacked = ExpertsParams(
            w_in_EDF=np.stack([expert.w_in_DF for expert in experts]),
            w_gate_EDF=np.stack(gates) if gates else None,
            w_out_EFD=np.stack([expert.w_out_FD for expert in experts]),
            b_in_EF=np.zeros((E, F)),
            b_gate_EF=np.zeros((E, F)),
            b_out_ED=np.zeros((E, D)),
        )
        return SwitchParams(read(f"{home}.router.classifier").T, np.zeros(E), stacked, np.zeros(D))

    def block(prefix: str, is_decoder: bool, is_sparse: bool) -> BlockParams:
        last = f"{prefix}.layer.{2 if is_decoder else 1}"
        home = f"{last}.mlp" if config.experts else f"{last}.DenseReluDense"
        feed_forward = FeedForwardLayerParams(read(f"{last}.layer_norm"), switch(home) if is_sparse else dense(home))
        cross = attention(f"{prefix}.layer.1", "EncDecAttention") if is_decoder else None
        return BlockParams(attention(f"{prefix}.layer.0", "SelfAttention"), cross, feed_forward)

    def stack(name: str, layers: int, sparse: tuple[int, ...]) -> StackParams:
        blocks = tuple(block(f"{name}.block.{i}", name == "decoder", i in sparse) for i in range(layers))
        position_UH = read(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias")
        return StackParams(blocks, position_UH, read(f"{name}.final_layer_norm"))

    return ModelParams(
        read("shared"),
        stack("encoder", config.encoder_layers, config.encoder_sparse),
        stack("decoder", config.decoder_layers, config.decoder_sparse),
        None if config.tied else read("lm_head").T,
    )


def tensors_from(params: ModelParams) -> dict[str, np.ndarray]:
    """Return Hugging Face's tensors of a parameter tree, or of a tree of gradients; a tied table appears once, as `shared.weight`."""
    is_switch = any(isinstance(block.feed_forward.feed_forward, SwitchParams) for stack in (params.encoder, params.decoder) for block in stack.blocks)
    tensors = {"shared.weight": params.embedding_VD}
    if params.w_logits_DV is not None:
        tensors["lm_head.weight"] = params.w_logits_DV.T

    def write_dense(home: str, w_in_DF: np.ndarray, w_gate_DF: np.ndarray | None, w_out_FD: np.ndarray) -> None:
        if w_gate_DF is None:
            tensors[f"{home}.wi.weight"] = w_in_DF.T
        else:
            tensors[f"{home}.wi_0.weight"], tensors[f"{home}.wi_1.weight"] = w_gate_DF.T, w_in_DF.T
        tensors[f"{home}.wo.weight"] = w_out_FD.T

    def write_attention(layer: str, name: str, params: AttentionLayerParams) -> None:
        tensors[f"{layer}.layer_norm.weight"] = params.norm_D
        D = params.norm_D.shape[0]
        for matrix, value in zip("qkv", params.attention[:3], strict=True):
            tensors[f"{layer}.{name}.{matrix}.weight"] = value.reshape(D, -1).T
        tensors[f"{layer}.{name}.o.weight"] = params.attention.w_out_HKD.reshape(-1, D).T

    for name, stack in (("encoder", params.encoder), ("decoder", params.decoder)):
        tensors[f"{name}.final_layer_norm.weight"] = stack.norm_D
        tensors[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = stack.position_UH
        for i, block in enumerate(stack.blocks):
            prefix = f"{name}.block.{i}.layer"
            write_attention(f"{prefix}.0", "SelfAttention", block.self_attention)
            if block.cross_attention is not None:
                write_attention(f"{prefix}.1", "EncDecAttention", block.cross_attention)
            last = f"{prefix}.{1 if block.cross_attention is None else 2}"
            tensors[f"{last}.layer_norm.weight"] = block.feed_forward.norm_D
            layer = block.feed_forward.feed_forward
            if isinstance(layer, SwitchParams):
                tensors[f"{last}.mlp.router.classifier.weight"] = layer.w_router_DE.T
                for e in range(layer.w_router_DE.shape[1]):
                    w_gate_EDF = layer.experts.w_gate_EDF
                    gate_DF = None if w_gate_EDF is None else w_gate_EDF[e]
                    write_dense(f"{last}.mlp.experts.expert_{e}", layer.experts.w_in_EDF[e], gate_DF, layer.experts.w_out_EFD[e])
            else:
                write_dense(f"{last}.{'mlp' if is_switch else 'DenseReluDense'}", *layer)
    return tensors


def write_hugging_face(folder: Path, config: ModelConfig, params: ModelParams, storage: str, shard_bytes: int) -> None:
    """Write a model into a new folder as `transformers` reads it.

    Raises
    ------
    InputError
        Where its classes have no such model, the folder exists already or cannot be written, or a value does not fit the storage format.
    """
    content = content_of(config) | {"dtype": storage}
    tensors = tensors_from(params)
    if config.experts and not config.tied:  # an untied Switch of transformers 5 reads three tables
        tensors |= dict.fromkeys(COPIES_OF_EMBEDDING, tensors["shared.weight"])
    with new_folder(folder) as beside:
        write_tensors(beside, tensors, storage, shard_bytes)
        (beside / "config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
