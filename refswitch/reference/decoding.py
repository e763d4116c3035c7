# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Decoding: one token at a time with a cache of keys and values, greedy or sampled.

Paper: 4.2 (greedy answers). Read `transformer` first. Each step routes groups of single tokens: `statics.groups` says how many.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import ModelPoints
from refswitch.numbers.precision import round_to
from refswitch.reference.attention import AttentionParams, masked_softmax
from refswitch.reference.block import RouterNoise, StackStatics, dense_layer_forward, switch_layer_forward
from refswitch.reference.embedding import embed_forward, logits_forward, tied_logits_forward
from refswitch.reference.norm import norm_forward
from refswitch.reference.position import position_bias_forward, position_buckets
from refswitch.reference.switch import SwitchParams
from refswitch.reference.transformer import ModelParams


class KeyValue(NamedTuple):
    """Keys and values of one attention, oldest first."""

    key_BMHK: np.ndarray
    value_BMHK: np.ndarray


class Cache(NamedTuple):
    """What a step needs of the steps before it."""

    position: int  # tokens decoded so far
    own: tuple[KeyValue, ...]  # per block, of the decoder's tokens
    cross: tuple[KeyValue, ...]  # per block, of the encoder's output: computed once
    memory_valid_BM: np.ndarray


def project(x_BMD: np.ndarray, params: AttentionParams, points: ModelPoints) -> KeyValue:
    """Return the keys and values of some tokens.

    Rounding: R11.
    """
    key_BMHK = round_to(np.einsum("bmd,dhk->bmhk", x_BMD, params.w_key_DHK), points.activations)
    return KeyValue(key_BMHK, round_to(np.einsum("bmd,dhk->bmhk", x_BMD, params.w_value_DHK), points.activations))


def attend(
    x_BLD: np.ndarray, memory: KeyValue, bias_HLM: np.ndarray, allowed_BLM: np.ndarray, params: AttentionParams, points: ModelPoints
) -> np.ndarray:
    """Return out_BLD, the values mixed by softmax(query key + bias), as `attention_forward` from its F4 on.

    Rounding: R11, R12.
    """
    query_BLHK = round_to(np.einsum("bld,dhk->blhk", x_BLD, params.w_query_DHK), points.activations)
    scores_BHLM = round_to(np.einsum("blhk,bmhk->bhlm", query_BLHK, memory.key_BMHK) + bias_HLM, points.statistics)
    probs_BHLM = round_to(masked_softmax(scores_BHLM, allowed_BLM), points.activations)
    mixed_BLHK = round_to(np.einsum("bhlm,bmhk->blhk", probs_BHLM, memory.value_BMHK), points.activations)
    return round_to(np.einsum("blhk,hkd->bld", mixed_BLHK, params.w_out_HKD), points.activations)


def start_cache(memory_BMD: np.ndarray, memory_valid_BM: np.ndarray, params: ModelParams, points: ModelPoints) -> Cache:
    """Return the cache before the first token: the memory's keys and values, none of our own."""
    B, (_, H, K) = memory_BMD.shape[0], params.decoder.blocks[0].self_attention.attention.w_key_DHK.shape
    empty = KeyValue(np.zeros((B, 0, H, K)), np.zeros((B, 0, H, K)))
    crosses = [block.cross_attention for block in params.decoder.blocks if block.cross_attention is not None]
    cross = tuple(project(memory_BMD, layer.attention, points) for layer in crosses)
    return Cache(0, (empty,) * len(cross), cross, memory_valid_BM)


def decode_step(token_B: np.ndarray, cache: Cache, params: ModelParams, statics: StackStatics) -> tuple[np.ndarray, Cache]:
    """Return logits_BV of the next token, and the cache with this one in it. Nothing is dropped out."""
    B, position, decoder = token_B.shape[0], cache.position, params.decoder
    x_BLD = round_to(embed_forward(token_B[:, None], params.embedding_VD), statics.around.activations)
    past_P = np.arange(position + 1)
    bucket_LP = position_buckets(past_P[-1:], past_P, decoder.position_UH.shape[0], statics.max_distance, bidirectional=False)
    bias_HLP = position_bias_forward(decoder.position_UH, bucket_LP)
    all_BLP, valid_BL = np.ones((B, 1, position + 1), bool), np.ones((B, 1), bool)
    own = []
    for block, before, cross in zip(decoder.blocks, cache.own, cache.cross, strict=True):
        normed_BLD, _ = norm_forward(x_BLD, block.self_attention.norm_D, statics.norm_epsilon, statics.around)
        new = project(normed_BLD, block.self_attention.attention, statics.around)
        seen = KeyValue(*[np.concatenate(pair, axis=1) for pair in zip(before, new, strict=True)])
        own.append(seen)
        out_BLD = attend(normed_BLD, seen, bias_HLP, all_BLP, block.self_attention.attention, statics.around)
        x_BLD = round_to(x_BLD + out_BLD, statics.around.activations)
        assert block.cross_attention is not None, "a decoder's block"
        normed_BLD, _ = norm_forward(x_BLD, block.cross_attention.norm_D, statics.norm_epsilon, statics.around)
        none_HLM = np.zeros((bias_HLP.shape[0], 1, cross.key_BMHK.shape[1]))
        out_BLD = attend(normed_BLD, cross, none_HLM, cache.memory_valid_BM[:, None], block.cross_attention.attention, statics.around)
        x_BLD = round_to(x_BLD + out_BLD, statics.around.activations)
        norm_D, layer = block.feed_forward
        kept_BLD = np.ones_like(x_BLD)
        if isinstance(layer, SwitchParams):
            hidden_BLF = np.ones((B, 1, layer.experts.w_in_EDF.shape[2]))
            none_BLE = np.zeros((B, 1, layer.w_router_DE.shape[1]))
            quiet = RouterNoise(kept_BLD, none_BLE, none_BLE, np.broadcast_to(np.arange(B // statics.groups), (statics.groups, B // statics.groups)))
            x_BLD, _, _ = switch_layer_forward(x_BLD, norm_D, layer, valid_BL, quiet, hidden_BLF, kept_BLD, statics)
        else:
            x_BLD, _ = dense_layer_forward(x_BLD, norm_D, layer, np.ones((B, 1, layer.w_in_DF.shape[1])), kept_BLD, statics)
    out_BLD, _ = norm_forward(x_BLD, decoder.norm_D, statics.norm_epsilon, statics.around)
    if params.w_logits_DV is None:
        logits_BLV = tied_logits_forward(out_BLD, params.embedding_VD, statics.around)
    else:
        logits_BLV = logits_forward(out_BLD, params.w_logits_DV, statics.around)
    return logits_BLV[:, 0], Cache(position + 1, tuple(own), cache.cross, cache.memory_valid_BM)


def pick_greedy(logits_BV: np.ndarray) -> np.ndarray:
    """Return token_B, the highest logit, the lowest index where several are equal."""
    return np.argmax(logits_BV, axis=-1)


def pick_sampled(logits_BV: np.ndarray, uniform_B: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Return token_B, drawn by the given uniforms in [0, 1) from softmax(logits / temperature) cut to its nucleus.

    The nucleus is the fewest most probable tokens whose probabilities reach top_p; equal ones enter by index.
    """
    scaled_BV = logits_BV / temperature
    exp_BV = np.exp(scaled_BV - scaled_BV.max(axis=-1, keepdims=True))
    order_BV = np.argsort(-exp_BV, axis=-1, kind="stable")
    sorted_BV = np.take_along_axis(exp_BV / exp_BV.sum(axis=-1, keepdims=True), order_BV, axis=-1)
    before_BV = np.cumsum(sorted_BV, axis=-1) - sorted_BV
    nucleus_BV = np.where((before_BV < top_p) | (np.arange(order_BV.shape[1]) == 0), sorted_BV, 0.0)
    reached_BV = np.cumsum(nucleus_BV, axis=-1)
    rank_B = np.sum(reached_BV <= uniform_B[:, None] * reached_BV[:, -1:], axis=-1)
    rank_B = np.minimum(rank_B, np.sum(nucleus_BV > 0.0, axis=-1) - 1)  # a uniform that rounding carries to the end
    return np.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0]


def decode(
    memory_BMD: np.ndarray,
    memory_valid_BM: np.ndarray,
    params: ModelParams,
    statics: StackStatics,
    uniform_BL: np.ndarray,
    start: int,
    end: int,
    pad: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens_BL and margin_BL, by how much the highest logit exceeded the next.

    As many tokens as there are uniforms, `pad` after a row's `end`; temperature 0 is greedy and reads no uniform.
    """
    cache = start_cache(memory_BMD, memory_valid_BM, params, statics.around)
    token_B = np.full(memory_BMD.shape[0], start)
    done_B = np.zeros(memory_BMD.shape[0], bool)
    tokens, margins = [], []
    for uniform_B in uniform_BL.T:
        logits_BV, cache = decode_step(token_B, cache, params, statics)
        picked_B = pick_sampled(logits_BV, uniform_B, temperature, top_p) if temperature > 0.0 else pick_greedy(logits_BV)
        token_B = np.where(done_B, pad, picked_B)
        done_B = done_B | (token_B == end)
        highest_BV = np.sort(logits_BV, axis=-1)
        tokens.append(token_B)
        margins.append(highest_BV[:, -1] - highest_BV[:, -2])
    return np.stack(tokens, axis=1), np.stack(margins, axis=1)
