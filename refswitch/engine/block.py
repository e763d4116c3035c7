# May import: standard library, numpy, refswitch.backends, refswitch.engine.switch, refswitch.reference (records), refswitch.config.
"""Blocks: x + dropout(F(norm(x))) for F = self-attention, cross-attention, dense feed-forward or Switch layer, and the mirror.

Paper: figure 2, the T5 body. The engine's own composition, which an identity test holds against the reference's. Next: `model`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.backends.protocol import UNROUNDED, Backend, Saved
from refswitch.engine.switch import SwitchLayerSaved, switch_layer_backward, switch_layer_forward
from refswitch.reference.block import AttentionLayerParams, FeedForwardLayerParams, StackStatics
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.reference.switch import SwitchOutputs, SwitchParams
from refswitch.reference.transformer import BlockNoise, BlockParams


class LayerSaved(NamedTuple):
    """What the backward of attention or of the dense sub-layer needs."""

    norm: Saved
    inner: Saved
    dropout_BLD: np.ndarray


class BlockSaved(NamedTuple):
    """What a block's backward needs."""

    self_attention: LayerSaved
    cross_attention: LayerSaved | None
    feed_forward: LayerSaved | SwitchLayerSaved


class Surroundings(NamedTuple):
    """What every block of a stack reads besides the stream: the same arrays for all of them."""

    memory_BMD: np.ndarray  # the encoder's output; the encoder itself has none and does not look
    bias_HLL: np.ndarray
    allowed_BLL: np.ndarray
    allowed_BLM: np.ndarray
    valid_BL: np.ndarray


def attention_layer_forward(
    x_BLD: np.ndarray,
    memory_BMD: np.ndarray | None,
    bias_HLM: np.ndarray,
    params: AttentionLayerParams,
    allowed_BLM: np.ndarray,
    factor_BHLM: np.ndarray,
    dropout_BLD: np.ndarray,
    statics: StackStatics,
    backend: Backend,
) -> tuple[np.ndarray, LayerSaved]:
    """Return x + dropout(attention(norm(x), memory)); without a memory it is the normed x itself."""
    normed_BLD, norm_saved = backend.norm_forward(x_BLD, params.norm_D, statics.norm_epsilon, statics.around)  # F1
    read_BMD = normed_BLD if memory_BMD is None else memory_BMD
    out_BLD, inner_saved = backend.attention_forward(normed_BLD, read_BMD, bias_HLM, params.attention, allowed_BLM, factor_BHLM, statics.around)  # F2
    y_BLD = backend.residual(x_BLD, out_BLD, dropout_BLD, statics.around.activations)  # F3  R11
    return y_BLD, LayerSaved(norm_saved, inner_saved, dropout_BLD)


def attention_layer_backward(
    dy_BLD: np.ndarray, is_self: bool, saved: LayerSaved, params: AttentionLayerParams, statics: StackStatics, backend: Backend
) -> tuple[np.ndarray, np.ndarray, np.ndarray, AttentionLayerParams]:
    """Return dx_BLD, dmemory_BMD, dbias_HLM and the parameters' gradients; self-attention's dmemory_BMD is in its dx_BLD."""
    around = statics.around
    dout_BLD = backend.scaled(dy_BLD, saved.dropout_BLD, UNROUNDED)  # B3
    dnormed_BLD, dmemory_BMD, dbias_HLM, dattention = backend.attention_backward(dout_BLD, saved.inner, params.attention, around)  # B2
    if is_self:
        dnormed_BLD = backend.added(dnormed_BLD, dmemory_BMD, around.gradients)  # R14
    dx_normed_BLD, dnorm_D = backend.norm_backward(dnormed_BLD, saved.norm, params.norm_D, around)  # B1
    return backend.added(dy_BLD, dx_normed_BLD, around.gradients), dmemory_BMD, dbias_HLM, AttentionLayerParams(dnorm_D, dattention)


def dense_layer_forward(
    x_BLD: np.ndarray, params: FeedForwardLayerParams, hidden_BLF: np.ndarray, dropout_BLD: np.ndarray, statics: StackStatics, backend: Backend
) -> tuple[np.ndarray, LayerSaved]:
    """Return x + dropout(feed_forward(norm(x)))."""
    norm_D, dense = params
    assert isinstance(dense, FeedForwardParams)
    normed_BLD, norm_saved = backend.norm_forward(x_BLD, norm_D, statics.norm_epsilon, statics.around)  # F1
    out_BLD, inner_saved = backend.feed_forward_forward(normed_BLD, dense, hidden_BLF, statics.activation, statics.around)  # F2
    y_BLD = backend.residual(x_BLD, out_BLD, dropout_BLD, statics.around.activations)  # F3  R11
    return y_BLD, LayerSaved(norm_saved, inner_saved, dropout_BLD)


def dense_layer_backward(
    dy_BLD: np.ndarray, saved: LayerSaved, params: FeedForwardLayerParams, statics: StackStatics, backend: Backend
) -> tuple[np.ndarray, FeedForwardLayerParams]:
    """Return dx_BLD and the parameters' gradients."""
    norm_D, dense = params
    assert isinstance(dense, FeedForwardParams)
    dout_BLD = backend.scaled(dy_BLD, saved.dropout_BLD, UNROUNDED)  # B3
    dnormed_BLD, ddense = backend.feed_forward_backward(dout_BLD, saved.inner, dense, statics.activation, statics.around)  # B2
    dx_normed_BLD, dnorm_D = backend.norm_backward(dnormed_BLD, saved.norm, norm_D, statics.around)  # B1
    return backend.added(dy_BLD, dx_normed_BLD, statics.around.gradients), FeedForwardLayerParams(dnorm_D, ddense)


def block_forward(
    x_BLD: np.ndarray, around: Surroundings, params: BlockParams, noise: BlockNoise, statics: StackStatics, backend: Backend
) -> tuple[np.ndarray, tuple[SwitchOutputs, ...], BlockSaved]:
    """Return the residual stream after one block, the Switch layer's outputs if it has one, and what backward needs."""
    x1_BLD, self_saved = attention_layer_forward(
        x_BLD, None, around.bias_HLL, params.self_attention, around.allowed_BLL, noise.self_probs_BHLL, noise.self_out_BLD, statics, backend
    )  # F1
    x2_BLD, cross_saved = x1_BLD, None
    if params.cross_attention is not None:
        no_bias = np.zeros((1, 1, 1), backend.dtype)
        x2_BLD, cross_saved = attention_layer_forward(
            x1_BLD,
            around.memory_BMD,
            no_bias,
            params.cross_attention,
            around.allowed_BLM,
            noise.cross_probs_BHLM,
            noise.cross_out_BLD,
            statics,
            backend,
        )  # F2
    if isinstance(params.feed_forward.feed_forward, SwitchParams):
        y_BLD, outputs, switch_saved = switch_layer_forward(
            x2_BLD, params.feed_forward, around.valid_BL, noise.router, noise.hidden_BLF, noise.out_BLD, statics, backend
        )  # F3
        return y_BLD, (outputs,), BlockSaved(self_saved, cross_saved, switch_saved)
    y_BLD, dense_saved = dense_layer_forward(x2_BLD, params.feed_forward, noise.hidden_BLF, noise.out_BLD, statics, backend)  # F3
    return y_BLD, (), BlockSaved(self_saved, cross_saved, dense_saved)


def block_backward(
    dy_BLD: np.ndarray, daux: float, dz: float, saved: BlockSaved, params: BlockParams, statics: StackStatics, backend: Backend
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, BlockParams]:
    """Return dx_BLD, dmemory_BMD (None in the encoder), dbias_HLL and the parameters' gradients."""
    if isinstance(saved.feed_forward, SwitchLayerSaved):
        dx2_BLD, dfeed_forward = switch_layer_backward(dy_BLD, daux, dz, saved.feed_forward, params.feed_forward, statics, backend)  # B3
    else:
        dx2_BLD, dfeed_forward = dense_layer_backward(dy_BLD, saved.feed_forward, params.feed_forward, statics, backend)  # B3
    dx1_BLD, dmemory_BMD, dcross = dx2_BLD, None, None
    if saved.cross_attention is not None:
        assert params.cross_attention is not None
        dx1_BLD, dmemory_BMD, _, dcross = attention_layer_backward(
            dx2_BLD, False, saved.cross_attention, params.cross_attention, statics, backend
        )  # B2
    dx_BLD, _, dbias_HLL, dself = attention_layer_backward(dx1_BLD, True, saved.self_attention, params.self_attention, statics, backend)  # B1
    return dx_BLD, dmemory_BMD, dbias_HLL, BlockParams(dself, dcross, dfeed_forward)
