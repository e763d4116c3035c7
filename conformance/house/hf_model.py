# May import: standard library, numpy, torch, transformers, refswitch.
"""A random Hugging Face Switch or T5 model in float64, its own float32 casts replaced, and the same model as refswitch sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration, T5Config, T5ForConditionalGeneration
from transformers.models.switch_transformers import modeling_switch_transformers as switch_module

from refswitch.checkpoints.hugging_face import params_from
from refswitch.checkpoints.hugging_face_config import DENSE_DIALECT, dialect_text
from refswitch.model_config import ModelConfig
from refswitch.model_setup import model_statics
from refswitch.model_setup import no_noise as quiet
from refswitch.reference.transformer import Batch, ModelParams, ModelStatics, StackNoise

ROUTER_COEF = 0.25  # large, so that a fault in the routers' losses shows


@dataclass(frozen=True)
class Shape:
    """One random model and batch."""

    kind: str  # "switch" or "t5"
    layers: tuple[int, int]
    sparse: tuple[int, int]  # number of sparse layers of each stack, as Hugging Face's config counts them
    experts: int
    capacity: int
    gated: bool
    tied: bool
    pads: bool
    seed: int
    D: int = 10
    K: int = 3
    H: int = 2
    F: int = 7
    V: int = 23
    U: int = 8
    B: int = 3
    L: int = 9
    M: int = 11


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _balance(probs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    E = probs.shape[-1]
    mask = torch.nn.functional.one_hot(indices, E).to(probs.dtype)
    return torch.mean(mask.mean(-2) * probs.mean(-2)) * E**2


def peer_of(shape: Shape) -> Any:
    """Build the peer with random weights."""
    torch.manual_seed(shape.seed)
    common = {
        "vocab_size": shape.V, "d_model": shape.D, "d_kv": shape.K, "d_ff": shape.F, "num_heads": shape.H, "num_layers": shape.layers[0],
        "num_decoder_layers": shape.layers[1], "relative_attention_num_buckets": shape.U, "relative_attention_max_distance": 12,
        "dropout_rate": 0.0, "tie_word_embeddings": shape.tied, "decoder_start_token_id": 0,
    }  # fmt: skip
    if shape.kind == "t5":
        config = T5Config(**common, feed_forward_proj="gated-gelu" if shape.gated else "relu")
        model = T5ForConditionalGeneration(config)
    else:
        config = SwitchTransformersConfig(
            **common, num_experts=shape.experts, expert_capacity=shape.capacity, router_jitter_noise=0.0,
            num_sparse_encoder_layers=shape.sparse[0], num_sparse_decoder_layers=shape.sparse[1],
            router_z_loss_coef=ROUTER_COEF, router_aux_loss_coef=ROUTER_COEF,
        )  # fmt: skip
        model = SwitchTransformersForConditionalGeneration(config)
    model.config._attn_implementation = "eager"
    model = model.double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("LayerNorm"):
            module.forward = _norm.__get__(module)
        if isinstance(module, switch_module.SwitchTransformersTop1Router):
            module.dtype = torch.float64
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared  # which transformers 5 does only where the logits are tied too
    if not shape.tied:  # transformers 5 ties T5's table whatever the config says, unless a checkpoint holds two: then only the scale differs
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 2 else 0.1
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name))
    return model


def sparse_of(peer: Any, stack: str) -> tuple[int, ...]:
    """Read off the model itself which layers are sparse."""
    return tuple(i for i, block in enumerate(getattr(peer, stack).block) if getattr(block.layer[-1], "is_sparse", False))


def config_of(shape: Shape, peer: Any) -> ModelConfig:
    """Say in refswitch's words what the peer is."""
    return ModelConfig(
        name="random", vocabulary=shape.V, d_model=shape.D, d_kv=shape.K, heads=shape.H, d_ff=shape.F,
        encoder_layers=shape.layers[0], decoder_layers=shape.layers[1],
        encoder_sparse=sparse_of(peer, "encoder"), decoder_sparse=sparse_of(peer, "decoder"),
        experts=shape.experts if shape.kind == "switch" else 0, activation="gelu_tanh" if shape.gated else "relu", gated=shape.gated,
        tied=shape.tied, position_buckets=shape.U, max_distance=12, norm_epsilon=1e-6, dropout=0.0, expert_dropout=0.0,
        dialect=dialect_text(shape.capacity, ROUTER_COEF, ROUTER_COEF, 0.0) if shape.kind == "switch" else DENSE_DIALECT,
    )  # fmt: skip


def statics_of(shape: Shape, config: ModelConfig) -> ModelStatics:
    """Return the statics under which refswitch computes what the peer does."""
    return model_statics(config, shape.B, shape.M, shape.L, train=False)


def batch_of(shape: Shape) -> Batch:
    """Draw tokens; with `pads`, the rows end at different lengths."""
    rng = np.random.default_rng(shape.seed)
    encoder_tokens_BM = rng.integers(2, shape.V, (shape.B, shape.M))
    targets_BL = rng.integers(2, shape.V, (shape.B, shape.L))
    encoder_BM = np.ones((shape.B, shape.M), int)
    weight_BL = np.ones((shape.B, shape.L))
    if shape.pads:
        for b in range(shape.B):
            encoder_BM[b, shape.M - 2 * b :] = 0
            weight_BL[b, shape.L - b :] = 0.0
    encoder_tokens_BM = np.where(encoder_BM == 1, encoder_tokens_BM, 0)
    targets_BL = np.where(weight_BL == 1.0, targets_BL, 0)
    decoder_tokens_BL = np.concatenate([np.zeros((shape.B, 1), int), targets_BL[:, :-1]], axis=1)
    ones_BL = np.ones((shape.B, shape.L), int)  # Hugging Face masks no position of the decoder
    encoder = encoder_tokens_BM, np.ones_like(encoder_BM), encoder_BM == 1, np.arange(shape.M)  # its padding attends: one segment
    return Batch(*encoder, decoder_tokens_BL, ones_BL, ones_BL == 1, np.arange(shape.L), targets_BL, weight_BL)


def no_noise(shape: Shape, params: ModelParams, config: ModelConfig) -> tuple[StackNoise, StackNoise]:
    """Return the noise of a pass without any."""
    return quiet(params, statics_of(shape, config), shape.B, shape.M, shape.L)


def run_peer(peer: Any, batch: Batch, is_switch: bool) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Return the peer's logits, loss and gradients."""
    labels = np.where(batch.weight_BL == 1.0, batch.targets_BL, -100)
    peer.zero_grad()
    extra = {"output_router_logits": True} if is_switch else {}
    with patch.object(switch_module, "load_balancing_loss_func", _balance):
        outputs = peer(
            input_ids=torch.tensor(batch.encoder_tokens_BM), attention_mask=torch.tensor(batch.encoder_valid_BM.astype(int)),
            decoder_input_ids=torch.tensor(batch.decoder_tokens_BL), labels=torch.tensor(labels), **extra,
        )  # fmt: skip
    outputs.loss.backward()
    gradients = {
        name: np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy().copy() for name, parameter in peer.named_parameters()
    }
    return outputs.logits.detach().numpy(), float(outputs.loss.detach()), gradients


def tensors_of(peer: Any) -> dict[str, np.ndarray]:
    """Return the peer's tensors by name, copies of a tied table included."""
    return {name: tensor.detach().numpy().copy() for name, tensor in peer.state_dict().items()}


def params_of(peer: Any, config: ModelConfig) -> ModelParams:
    """Return the peer's parameters as refswitch's tree."""
    return params_from(tensors_of(peer), config)
