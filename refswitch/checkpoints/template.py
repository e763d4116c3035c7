# May import: standard library, numpy, refswitch.reference, refswitch.model_config.
"""The parameter tree of a config without its values: every leaf has its shape and costs no memory, also of a model of 1.6 trillion parameters."""

from __future__ import annotations

import numpy as np

from refswitch.model_config import ModelConfig
from refswitch.reference.attention import AttentionParams
from refswitch.reference.block import AttentionLayerParams, FeedForwardLayerParams
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.reference.switch import SwitchParams
from refswitch.reference.transformer import BlockParams, ModelParams, StackParams


def _shape(*sizes: int) -> np.ndarray:
    return np.broadcast_to(np.float64(0.0), sizes)


def template_of(config: ModelConfig) -> ModelParams:
    """Return the tree; its arrays are read-only zeros of stride 0. A gate's matrix or the logits' is None where the model has none."""
    D, F, H, K, E, V = config.d_model, config.d_ff, config.heads, config.d_kv, config.experts, config.vocabulary

    def attention() -> AttentionLayerParams:
        return AttentionLayerParams(_shape(D), AttentionParams(_shape(D, H, K), _shape(D, H, K), _shape(D, H, K), _shape(H, K, D)))

    def feed_forward(is_sparse: bool) -> FeedForwardLayerParams:
        if not is_sparse:
            return FeedForwardLayerParams(_shape(D), FeedForwardParams(_shape(D, F), _shape(D, F) if config.gated else None, _shape(F, D)))
        experts = ExpertsParams(
            w_in_EDF=_shape(E, D, F),
            w_gate_EDF=_shape(E, D, F) if config.gated else None,
            w_out_EFD=_shape(E, F, D),
            b_in_EF=_shape(E, F),
            b_gate_EF=_shape(E, F),
            b_out_ED=_shape(E, D),
        )
        return FeedForwardLayerParams(_shape(D), SwitchParams(_shape(D, E), _shape(E), experts, _shape(D)))

    def stack(layers: int, sparse: tuple[int, ...], is_decoder: bool) -> StackParams:
        blocks = tuple(BlockParams(attention(), attention() if is_decoder else None, feed_forward(i in sparse)) for i in range(layers))
        return StackParams(blocks, _shape(config.position_buckets, H), _shape(D))

    encoder = stack(config.encoder_layers, config.encoder_sparse, is_decoder=False)
    decoder = stack(config.decoder_layers, config.decoder_sparse, is_decoder=True)
    return ModelParams(_shape(V, D), encoder, decoder, None if config.tied else _shape(D, V))
