# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Sub-layers: x + dropout(F(norm(x))) for F = attention, dense feed-forward, Switch layer.

Paper: figure 2, the T5 body (pre-norm throughout). Read `norm`, `attention`, `feed_forward` and `switch` first. Next: `transformer`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import Dialect, ModelPoints, RoundingPoints
from refswitch.numbers.precision import round_to
from refswitch.reference.attention import AttentionParams, AttentionSaved, attention_backward, attention_forward
from refswitch.reference.feed_forward import FeedForwardParams, FeedForwardSaved, feed_forward_backward, feed_forward_forward
from refswitch.reference.norm import NormSaved, norm_backward, norm_forward
from refswitch.reference.switch import Statics, SwitchInputs, SwitchOutputs, SwitchParams, SwitchSaved, switch_backward, switch_forward


class AttentionLayerParams(NamedTuple):
    """A norm and its attention."""

    norm_D: np.ndarray
    attention: AttentionParams


class FeedForwardLayerParams(NamedTuple):
    """A norm and its feed-forward network: dense, or a Switch layer."""

    norm_D: np.ndarray
    feed_forward: FeedForwardParams | SwitchParams


class StackStatics(NamedTuple):
    """What does not change from call to call for one stack."""

    dialect: Dialect
    points: RoundingPoints  # of its Switch layers
    around: ModelPoints  # of everything else
    activation: str
    norm_epsilon: float
    max_distance: int
    causal: bool
    groups: int  # routing groups into which the batch's tokens are cut, in order
    capacity: int  # slots of one expert in one group
    aux_coef: float  # of this stack's balance loss in the objective
    z_coef: float  # of this stack's router z-loss


class RouterNoise(NamedTuple):
    """A Switch layer's random draws as data; what the dialect does not read changes nothing."""

    factor_BLD: np.ndarray  # on the router's input; 1 where there is no noise
    term_BLE: np.ndarray  # on the logits; 0 where there is no noise
    select_BLE: np.ndarray  # the draw or term that the dialect's rule of choice names
    priority_GS: np.ndarray  # first served first, where the dialect draws it


class AttentionLayerSaved(NamedTuple):
    """What the attention sub-layer's backward needs."""

    norm: NormSaved
    attention: AttentionSaved
    dropout_BLD: np.ndarray


class FeedForwardLayerSaved(NamedTuple):
    """What the feed-forward sub-layer's backward needs."""

    norm: NormSaved
    feed_forward: FeedForwardSaved
    dropout_BLD: np.ndarray


class SwitchLayerSaved(NamedTuple):
    """What the sparse sub-layer's backward needs."""

    norm: NormSaved
    switch: SwitchSaved
    dropout_BLD: np.ndarray


def self_attention_layer_forward(
    x_BLD: np.ndarray,
    bias_HLL: np.ndarray,
    params: AttentionLayerParams,
    allowed_BLL: np.ndarray,
    factor_BHLL: np.ndarray,
    dropout_BLD: np.ndarray,
    statics: StackStatics,
) -> tuple[np.ndarray, AttentionLayerSaved]:
    """Return x + dropout(attention(norm(x), norm(x)))."""
    normed_BLD, norm = norm_forward(x_BLD, params.norm_D, statics.norm_epsilon, statics.around)  # F1
    out_BLD, attention = attention_forward(normed_BLD, normed_BLD, bias_HLL, params.attention, allowed_BLL, factor_BHLL, statics.around)  # F2
    y_BLD = round_to(x_BLD + out_BLD * dropout_BLD, statics.around.activations)  # F3  R11
    return y_BLD, AttentionLayerSaved(norm, attention, dropout_BLD)


def self_attention_layer_backward(
    dy_BLD: np.ndarray, saved: AttentionLayerSaved, params: AttentionLayerParams, statics: StackStatics
) -> tuple[np.ndarray, np.ndarray, AttentionLayerParams]:
    """Return dx_BLD, dbias_HLL and the parameters' gradients."""
    dout_BLD = dy_BLD * saved.dropout_BLD  # B3
    dquery_BLD, dmemory_BLD, dbias_HLL, dattention = attention_backward(dout_BLD, saved.attention, params.attention, statics.around)  # B2
    dnormed_BLD = round_to(dquery_BLD + dmemory_BLD, statics.around.gradients)  # R14
    dx_normed_BLD, dnorm_D = norm_backward(dnormed_BLD, saved.norm, params.norm_D, statics.around)  # B1
    return round_to(dy_BLD + dx_normed_BLD, statics.around.gradients), dbias_HLL, AttentionLayerParams(dnorm_D, dattention)


def cross_attention_layer_forward(
    x_BLD: np.ndarray,
    memory_BMD: np.ndarray,
    params: AttentionLayerParams,
    allowed_BLM: np.ndarray,
    factor_BHLM: np.ndarray,
    dropout_BLD: np.ndarray,
    statics: StackStatics,
) -> tuple[np.ndarray, AttentionLayerSaved]:
    """Return x + dropout(attention(norm(x), memory)); no position bias, and the memory is normed already."""
    normed_BLD, norm = norm_forward(x_BLD, params.norm_D, statics.norm_epsilon, statics.around)  # F1
    none_HLM = np.zeros((params.attention.w_query_DHK.shape[1], x_BLD.shape[1], memory_BMD.shape[1]))
    out_BLD, attention = attention_forward(normed_BLD, memory_BMD, none_HLM, params.attention, allowed_BLM, factor_BHLM, statics.around)  # F2
    y_BLD = round_to(x_BLD + out_BLD * dropout_BLD, statics.around.activations)  # F3  R11
    return y_BLD, AttentionLayerSaved(norm, attention, dropout_BLD)


def cross_attention_layer_backward(
    dy_BLD: np.ndarray, saved: AttentionLayerSaved, params: AttentionLayerParams, statics: StackStatics
) -> tuple[np.ndarray, np.ndarray, AttentionLayerParams]:
    """Return dx_BLD, dmemory_BMD and the parameters' gradients."""
    dout_BLD = dy_BLD * saved.dropout_BLD  # B3
    dquery_BLD, dmemory_BMD, _, dattention = attention_backward(dout_BLD, saved.attention, params.attention, statics.around)  # B2
    dx_normed_BLD, dnorm_D = norm_backward(dquery_BLD, saved.norm, params.norm_D, statics.around)  # B1
    return round_to(dy_BLD + dx_normed_BLD, statics.around.gradients), dmemory_BMD, AttentionLayerParams(dnorm_D, dattention)


def dense_layer_forward(
    x_BLD: np.ndarray, norm_D: np.ndarray, params: FeedForwardParams, hidden_BLF: np.ndarray, dropout_BLD: np.ndarray, statics: StackStatics
) -> tuple[np.ndarray, FeedForwardLayerSaved]:
    """Return x + dropout(feed_forward(norm(x))); `hidden_BLF` is the dropout inside."""
    normed_BLD, norm = norm_forward(x_BLD, norm_D, statics.norm_epsilon, statics.around)  # F1
    out_BLD, feed_forward = feed_forward_forward(normed_BLD, params, hidden_BLF, statics.activation, statics.around)  # F2
    y_BLD = round_to(x_BLD + out_BLD * dropout_BLD, statics.around.activations)  # F3  R11
    return y_BLD, FeedForwardLayerSaved(norm, feed_forward, dropout_BLD)


def dense_layer_backward(
    dy_BLD: np.ndarray, saved: FeedForwardLayerSaved, norm_D: np.ndarray, params: FeedForwardParams, statics: StackStatics
) -> tuple[np.ndarray, FeedForwardLayerParams]:
    """Return dx_BLD and the parameters' gradients."""
    dout_BLD = dy_BLD * saved.dropout_BLD  # B3
    dnormed_BLD, dfeed_forward = feed_forward_backward(dout_BLD, saved.feed_forward, params, statics.activation, statics.around)  # B2
    dx_normed_BLD, dnorm_D = norm_backward(dnormed_BLD, saved.norm, norm_D, statics.around)  # B1
    return round_to(dy_BLD + dx_normed_BLD, statics.around.gradients), FeedForwardLayerParams(dnorm_D, dfeed_forward)


def switch_layer_forward(
    x_BLD: np.ndarray,
    norm_D: np.ndarray,
    params: SwitchParams,
    valid_BL: np.ndarray,
    noise: RouterNoise,
    hidden_BLF: np.ndarray,
    dropout_BLD: np.ndarray,
    statics: StackStatics,
) -> tuple[np.ndarray, SwitchOutputs, SwitchLayerSaved]:
    """Return x + dropout(switch(norm(x))), the layer's own outputs, and what backward needs.

    The tokens of the batch are cut, in order, into the routing groups.
    """
    B, L, D = x_BLD.shape
    G, E = statics.groups, params.w_router_DE.shape[1]
    S = B * L // G
    normed_BLD, norm = norm_forward(x_BLD, norm_D, statics.norm_epsilon, statics.around)  # F1
    inputs = SwitchInputs(
        x_GSD=normed_BLD.reshape(G, S, D),
        valid_GS=valid_BL.reshape(G, S),
        noise_factor_GSD=noise.factor_BLD.reshape(G, S, D),
        noise_term_GSE=noise.term_BLE.reshape(G, S, E),
        select_noise_GSE=noise.select_BLE.reshape(G, S, E),
        priority_GS=noise.priority_GS,
        hidden_mask_GSF=hidden_BLF.reshape(G, S, -1),
    )
    outputs, switch = switch_forward(inputs, params, _layer_statics(statics))  # F2
    y_BLD = round_to(x_BLD + outputs.out_GSD.reshape(B, L, D) * dropout_BLD, statics.around.activations)  # F3  R11
    return y_BLD, outputs, SwitchLayerSaved(norm, switch, dropout_BLD)


def switch_layer_backward(
    dy_BLD: np.ndarray,
    daux: float,
    dz: float,
    saved: SwitchLayerSaved,
    norm_D: np.ndarray,
    params: SwitchParams,
    statics: StackStatics,
) -> tuple[np.ndarray, FeedForwardLayerParams]:
    """Return dx_BLD and the parameters' gradients; `daux` and `dz` are the gradients of this layer's two losses."""
    B, L, D = dy_BLD.shape
    dout_GSD = (dy_BLD * saved.dropout_BLD).reshape(statics.groups, -1, D)  # B3
    dnormed_GSD, dswitch = switch_backward(dout_GSD, daux, dz, saved.switch, params, _layer_statics(statics))  # B2
    dx_normed_BLD, dnorm_D = norm_backward(dnormed_GSD.reshape(B, L, D), saved.norm, norm_D, statics.around)  # B1
    return round_to(dy_BLD + dx_normed_BLD, statics.around.gradients), FeedForwardLayerParams(dnorm_D, dswitch)


def _layer_statics(statics: StackStatics) -> Statics:
    return Statics(statics.dialect, statics.points, statics.activation, statics.capacity)
