# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Switch attention: the weights of queries, keys and values are experts, and each token is routed once for all of them.

Paper: appendix A, figure 10, table 10; Mesh TensorFlow's attention by experts. Spec: S-ROUTE-1 to S-CAP-1 for the route. Read `switch` and
`attention` first.

    x -> route, gate;  h = act(x w_in_e);  query = gate * (h w_query_e) * K**-0.5;  key = value = gate * (h w_key_e);  attention;  dense w_out

Keys are the values. A dropped token has query, key and value 0: it reads the mean of what it may see, weighed by the bias alone, and others see a
key of score 0 there. The queries are scaled at run time, unlike those of `attention`, whose initialisation has the factor. Self-attention only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import Aux, RoundingPoints, Z
from refswitch.reference.attention import masked_softmax
from refswitch.reference.capacity import Route, arrival_order, slots_forward
from refswitch.reference.experts import activate, activation_slope
from refswitch.reference.losses import (
    BalanceSaved,
    ZSaved,
    balance_backward,
    balance_forward,
    counted_fraction,
    rows_of_mean,
    z_loss_backward,
    z_loss_forward,
)
from refswitch.reference.pack import pack, slots_in_use, unpack
from refswitch.reference.router import (
    GateSaved,
    LogitsSaved,
    SoftmaxSaved,
    choose,
    gate_backward,
    gate_forward,
    logits_backward,
    logits_forward,
    softmax_backward,
    softmax_forward,
)


class SwitchAttentionParams(NamedTuple):
    """The layer's parameters; gradients use the same type. Router and output projection are dense, the rest are experts."""

    w_router_DE: np.ndarray
    w_in_EDF: np.ndarray
    w_query_EFHK: np.ndarray
    w_key_EFHK: np.ndarray  # keys and values
    w_out_HKD: np.ndarray


class HeadsSaved(NamedTuple):
    """What the backward of the experts' heads needs."""

    route: Route
    gate_GS: np.ndarray
    packed_GECD: np.ndarray  # left operand of dw_in
    z_GECF: np.ndarray  # the slope is read from it
    factor_GECF: np.ndarray
    hidden_GECF: np.ndarray  # left operand of dw_query, dw_key
    query_GSHK: np.ndarray  # before the gate, for the gate's gradient
    key_GSHK: np.ndarray


def pack_heads(x_GSHK: np.ndarray, route: Route, E: int, C: int) -> np.ndarray:
    """Move each kept token's heads to its slot; returns packed_GECHK. Spec: S-PACK-1. Its backward is `unpack_heads`."""
    G, S, H, K = x_GSHK.shape
    return pack(x_GSHK.reshape(G, S, H * K), route, E, C).reshape(G, E, C, H, K)


def unpack_heads(packed_GECHK: np.ndarray, route: Route) -> np.ndarray:
    """Move each slot's heads back to its token; returns x_GSHK, zero for a dropped token. Its backward is `pack_heads`."""
    G, E, C, H, K = packed_GECHK.shape
    return unpack(packed_GECHK.reshape(G, E, C, H * K), route).reshape(*route.kept_GS.shape, H, K)


def heads_forward(
    x_GSD: np.ndarray, gate_GS: np.ndarray, route: Route, hidden_mask_GSF: np.ndarray, params: SwitchAttentionParams, activation: str
) -> tuple[np.ndarray, np.ndarray, HeadsSaved]:
    """Return query_GSHK, scaled, and key_GSHK, which is the value too. Paper: appendix A."""
    E, C, gate_GS11 = params.w_in_EDF.shape[0], slots_in_use(route), gate_GS[..., None, None]
    packed_GECD = pack(x_GSD, route, E, C)  # F1
    factor_GECF = pack(hidden_mask_GSF, route, E, C)
    z_GECF = np.einsum("gecd,edf->gecf", packed_GECD, params.w_in_EDF)  # F2
    hidden_GECF = activate(z_GECF, activation) * factor_GECF  # F3
    key_GSHK = unpack_heads(np.einsum("gecf,efhk->gechk", hidden_GECF, params.w_key_EFHK), route)  # F4
    query_GSHK = unpack_heads(np.einsum("gecf,efhk->gechk", hidden_GECF, params.w_query_EFHK), route)  # F5
    gated_key_GSHK = gate_GS11 * key_GSHK  # F6
    scaled_query_GSHK = gate_GS11 * query_GSHK * query_GSHK.shape[-1] ** -0.5  # F7
    saved = HeadsSaved(route, gate_GS, packed_GECD, z_GECF, factor_GECF, hidden_GECF, query_GSHK, key_GSHK)
    return scaled_query_GSHK, gated_key_GSHK, saved


class HeadsGradients(NamedTuple):
    """Gradients of `heads_forward`."""

    dx_GSD: np.ndarray
    dgate_GS: np.ndarray
    dw_in_EDF: np.ndarray
    dw_query_EFHK: np.ndarray
    dw_key_EFHK: np.ndarray


def heads_backward(
    dscaled_query_GSHK: np.ndarray, dgated_key_GSHK: np.ndarray, saved: HeadsSaved, params: SwitchAttentionParams, activation: str
) -> HeadsGradients:
    """Return the gradients of input, gate and experts: query and key share hidden activation and gate, so each gets two and one visible sum."""
    route, (E, _, _), C, gate_GS11 = saved.route, params.w_in_EDF.shape, saved.packed_GECD.shape[2], saved.gate_GS[..., None, None]
    dgated_query_GSHK = dscaled_query_GSHK * saved.query_GSHK.shape[-1] ** -0.5  # B7
    dgate_query_GS = np.sum(dgated_query_GSHK * saved.query_GSHK, axis=(2, 3))  # B7
    dgate_key_GS = np.sum(dgated_key_GSHK * saved.key_GSHK, axis=(2, 3))  # B6
    dquery_GECHK = pack_heads(dgated_query_GSHK * gate_GS11, route, E, C)  # B5
    dhidden_query_GECF = np.einsum("gechk,efhk->gecf", dquery_GECHK, params.w_query_EFHK)  # B5
    dw_query_EFHK = np.einsum("gecf,gechk->efhk", saved.hidden_GECF, dquery_GECHK)  # B5
    dkey_GECHK = pack_heads(dgated_key_GSHK * gate_GS11, route, E, C)  # B4
    dhidden_key_GECF = np.einsum("gechk,efhk->gecf", dkey_GECHK, params.w_key_EFHK)  # B4
    dw_key_EFHK = np.einsum("gecf,gechk->efhk", saved.hidden_GECF, dkey_GECHK)  # B4
    dz_GECF = (dhidden_query_GECF + dhidden_key_GECF) * saved.factor_GECF * activation_slope(saved.z_GECF, activation)  # B3
    dw_in_EDF = np.einsum("gecd,gecf->edf", saved.packed_GECD, dz_GECF)  # B2
    dpacked_GECD = np.einsum("gecf,edf->gecd", dz_GECF, params.w_in_EDF)  # B2
    return HeadsGradients(unpack(dpacked_GECD, route), dgate_query_GS + dgate_key_GS, dw_in_EDF, dw_query_EFHK, dw_key_EFHK)  # B1


class MixSaved(NamedTuple):
    """What the attention's backward needs."""

    query_BLHK: np.ndarray
    key_BMHK: np.ndarray
    probs_BHLM: np.ndarray
    factor_BHLM: np.ndarray
    mixed_BLHK: np.ndarray  # left operand of dw_out


def mix_forward(
    query_BLHK: np.ndarray,
    key_BMHK: np.ndarray,
    bias_HLM: np.ndarray,
    w_out_HKD: np.ndarray,
    allowed_BLM: np.ndarray,
    factor_BHLM: np.ndarray,
) -> tuple[np.ndarray, MixSaved]:
    """Return out_BLD, the keys mixed by softmax(query key + bias) and projected."""
    scores_BHLM = np.einsum("blhk,bmhk->bhlm", query_BLHK, key_BMHK) + bias_HLM  # F1
    probs_BHLM = masked_softmax(scores_BHLM, allowed_BLM)  # F2
    mixed_BLHK = np.einsum("bhlm,bmhk->blhk", probs_BHLM * factor_BHLM, key_BMHK)  # F3: the keys are the values
    out_BLD = np.einsum("blhk,hkd->bld", mixed_BLHK, w_out_HKD)  # F4
    return out_BLD, MixSaved(query_BLHK, key_BMHK, probs_BHLM, factor_BHLM, mixed_BLHK)


def mix_backward(dout_BLD: np.ndarray, saved: MixSaved, w_out_HKD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return dquery_BLHK, dkey_BMHK, dbias_HLM and dw_out_HKD."""
    dw_out_HKD = np.einsum("blhk,bld->hkd", saved.mixed_BLHK, dout_BLD)  # B4
    dmixed_BLHK = np.einsum("bld,hkd->blhk", dout_BLD, w_out_HKD)  # B4
    dkey_value_BMHK = np.einsum("bhlm,blhk->bmhk", saved.probs_BHLM * saved.factor_BHLM, dmixed_BLHK)  # B3
    dprobs_BHLM = np.einsum("blhk,bmhk->bhlm", dmixed_BLHK, saved.key_BMHK) * saved.factor_BHLM  # B3
    mean_BHL1 = np.sum(saved.probs_BHLM * dprobs_BHLM, axis=-1, keepdims=True)
    dscores_BHLM = saved.probs_BHLM * (dprobs_BHLM - mean_BHL1)  # B2
    dquery_BLHK = np.einsum("bhlm,bmhk->blhk", dscores_BHLM, saved.key_BMHK)  # B1
    dkey_score_BMHK = np.einsum("bhlm,blhk->bmhk", dscores_BHLM, saved.query_BLHK)  # B1
    return dquery_BLHK, dkey_score_BMHK + dkey_value_BMHK, dscores_BHLM.sum(axis=0), dw_out_HKD


class SwitchAttentionInputs(NamedTuple):
    """One call's data; randomness is data too. The B * L tokens are cut in order into G groups of S."""

    x_BLD: np.ndarray
    valid_GS: np.ndarray  # False marks padding, which is not routed
    noise_factor_GSD: np.ndarray  # 1 where there is no noise on the router's input
    hidden_mask_GSF: np.ndarray  # expert dropout as a factor, already scaled
    bias_HLL: np.ndarray  # of positions
    allowed_BLL: np.ndarray  # which memory each query may see
    factor_BHLL: np.ndarray  # dropout on the attention's probabilities, already scaled


class SwitchAttentionStatics(NamedTuple):
    """What does not change from call to call."""

    capacity: int
    aux: Aux
    z: Z
    activation: str
    points: RoundingPoints  # of the router; attention and experts are float64 throughout


class SwitchAttentionOutputs(NamedTuple):
    """Everything that the layer computes."""

    out_BLD: np.ndarray
    aux_loss: np.ndarray
    z_loss: np.ndarray
    route: Route
    gate_GS: np.ndarray
    query_BLHK: np.ndarray
    key_BLHK: np.ndarray


class SwitchAttentionSaved(NamedTuple):
    """What the layer's backward needs: activations, never parameters."""

    inputs: SwitchAttentionInputs
    logits: LogitsSaved
    softmax: SoftmaxSaved
    gate: GateSaved
    heads: HeadsSaved
    mix: MixSaved
    balance: BalanceSaved
    z: ZSaved


def switch_attention_forward(
    inputs: SwitchAttentionInputs, params: SwitchAttentionParams, statics: SwitchAttentionStatics
) -> tuple[SwitchAttentionOutputs, SwitchAttentionSaved]:
    """Compute the layer. Paper: appendix A; one balance loss, since there is one route."""
    points, valid_GS, E = statics.points, inputs.valid_GS, params.w_router_DE.shape[1]
    (B, L, D), (G, S), (H, K, _) = inputs.x_BLD.shape, valid_GS.shape, params.w_out_HKD.shape
    x_GSD = inputs.x_BLD.reshape(G, S, D)
    x_router_GSD = x_GSD * inputs.noise_factor_GSD  # F1
    logits_GSE, logits = logits_forward(x_router_GSD, np.zeros((G, S, E)), params.w_router_DE, np.zeros(E), 0.0, points)  # F2
    probs_GSE, softmax = softmax_forward(logits_GSE, points)  # F3
    route = slots_forward(choose(probs_GSE), valid_GS, arrival_order(S, G), E, statics.capacity)
    gate_GS, gate = gate_forward(probs_GSE, logits_GSE, route.expert_GS, "p", points)  # F4
    query_GSHK, key_GSHK, heads = heads_forward(x_GSD, gate_GS, route, inputs.hidden_mask_GSF, params, statics.activation)  # F5
    query_BLHK, key_BLHK = query_GSHK.reshape(B, L, H, K), key_GSHK.reshape(B, L, H, K)
    out_BLD, mix = mix_forward(query_BLHK, key_BLHK, inputs.bias_HLL, params.w_out_HKD, inputs.allowed_BLL, inputs.factor_BHLL)  # F6
    count_GE = counted_fraction(route, route.expert_GS, valid_GS, valid_GS, E, statics.aux)
    denominator_G, scale_G = rows_of_mean(valid_GS, route.kept_GS, statics.aux)
    aux_loss, balance = balance_forward(probs_GSE, count_GE, denominator_G, scale_G, valid_GS, statics.aux)  # F7
    z_loss, z = z_loss_forward(logits_GSE, valid_GS, statics.z)  # F8
    outputs = SwitchAttentionOutputs(out_BLD, aux_loss, z_loss, route, gate_GS, query_BLHK, key_BLHK)
    return outputs, SwitchAttentionSaved(inputs, logits, softmax, gate, heads, mix, balance, z)


def switch_attention_backward(
    dout_BLD: np.ndarray,
    daux: float,
    dz: float,
    saved: SwitchAttentionSaved,
    params: SwitchAttentionParams,
    statics: SwitchAttentionStatics,
) -> tuple[np.ndarray, np.ndarray, SwitchAttentionParams]:
    """Return dx_BLD, dbias_HLL and the parameters' gradients of sum(out * dout) + daux * aux_loss + dz * z_loss."""
    shape_GSHK = saved.heads.query_GSHK.shape
    dlogits_z_GSE = z_loss_backward(dz, saved.z)  # B8
    dprobs_aux_GSE = balance_backward(daux, saved.balance)  # B7
    dquery_BLHK, dkey_BLHK, dbias_HLL, dw_out_HKD = mix_backward(dout_BLD, saved.mix, params.w_out_HKD)  # B6
    dheads = heads_backward(dquery_BLHK.reshape(shape_GSHK), dkey_BLHK.reshape(shape_GSHK), saved.heads, params, statics.activation)  # B5
    dprobs_gate_GSE, _ = gate_backward(dheads.dgate_GS, saved.gate, "p")  # B4
    dlogits_probs_GSE = softmax_backward(dprobs_gate_GSE + dprobs_aux_GSE, saved.softmax)  # B3
    dx_router_GSD, dw_router_DE, _ = logits_backward(dlogits_probs_GSE + dlogits_z_GSE, saved.logits, params.w_router_DE)  # B2
    dx_GSD = dheads.dx_GSD + dx_router_GSD * saved.inputs.noise_factor_GSD  # B1
    dparams = SwitchAttentionParams(dw_router_DE, dheads.dw_in_EDF, dheads.dw_query_EFHK, dheads.dw_key_EFHK, dw_out_HKD)
    return dx_GSD.reshape(dout_BLD.shape), dbias_HLL, dparams
