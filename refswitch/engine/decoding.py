# May import: standard library, numpy, refswitch.backends, refswitch.engine (below), refswitch.model_setup, refswitch.reference (records, choices).
"""Answers: the encoder once, then one token at a time with a cache of keys and values, greedy or sampled.

Paper: 4.2 (greedy answers). Each step routes single tokens, in groups by the dialect's rule and with the capacity of evaluation. Draws of a sampled
answer are by address too: site SAMPLING, the number of the token as the step, the row as the index.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from refswitch.backends.protocol import Backend
from refswitch.engine.block import dense_layer_forward
from refswitch.engine.model import head_forward, stack_forward
from refswitch.engine.noise import Address, draw_noise, one
from refswitch.engine.step import Setup, rounded_tree
from refswitch.engine.switch import switch_layer_forward
from refswitch.model_setup import model_statics
from refswitch.numbers.philox import Purpose, site_of, uniform
from refswitch.reference.block import StackStatics
from refswitch.reference.decoding import Cache, KeyValue, pick_greedy, pick_sampled
from refswitch.reference.position import position_buckets
from refswitch.reference.switch import SwitchParams
from refswitch.reference.transformer import BlockNoise, BlockParams, ModelParams


class Picking(NamedTuple):
    """How a token is picked: temperature 0 is greedy; else a draw from the fewest most probable tokens that reach `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0


GREEDY = Picking()


def start_cache(memory_BMD: np.ndarray, memory_valid_BM: np.ndarray, params: ModelParams, statics: StackStatics, backend: Backend) -> Cache:
    """Return the cache before the first token: the memory's keys and values, none of our own."""
    B, (_, H, K) = memory_BMD.shape[0], params.decoder.blocks[0].self_attention.attention.w_key_DHK.shape
    empty = KeyValue(np.zeros((B, 0, H, K), backend.dtype), np.zeros((B, 0, H, K), backend.dtype))
    crosses = [block.cross_attention for block in params.decoder.blocks if block.cross_attention is not None]
    cross = tuple(backend.project(memory_BMD, layer.attention, statics.around) for layer in crosses)
    return Cache(0, (empty,) * len(cross), cross, memory_valid_BM)


def decode_block(
    x_BLD: np.ndarray,
    bias_HLP: np.ndarray,
    before: KeyValue,
    cross: KeyValue,
    memory_valid_BM: np.ndarray,
    params: BlockParams,
    noise: BlockNoise,
    statics: StackStatics,
    backend: Backend,
) -> tuple[np.ndarray, KeyValue]:
    """Return the residual stream of one token after one block, and the block's keys and values with those of this token."""
    layer, around, none = params.self_attention, statics.around, one(3, backend)
    normed_BLD, _ = backend.norm_forward(x_BLD, layer.norm_D, statics.norm_epsilon, around)
    new = backend.project(normed_BLD, layer.attention, around)
    seen = KeyValue(*[np.concatenate(pair, axis=1) for pair in zip(before, new, strict=True)])
    all_BLP = np.ones((x_BLD.shape[0], 1, seen.key_BMHK.shape[1]), bool)
    out_BLD = backend.attend(normed_BLD, seen, bias_HLP, all_BLP, layer.attention, around)
    x_BLD = backend.residual(x_BLD, out_BLD, none, around.activations)
    assert params.cross_attention is not None, "a decoder's block"
    layer = params.cross_attention
    normed_BLD, _ = backend.norm_forward(x_BLD, layer.norm_D, statics.norm_epsilon, around)
    out_BLD = backend.attend(normed_BLD, cross, np.zeros((1, 1, 1), backend.dtype), memory_valid_BM[:, None], layer.attention, around)
    x_BLD = backend.residual(x_BLD, out_BLD, none, around.activations)
    if isinstance(params.feed_forward.feed_forward, SwitchParams):
        valid_BL = np.ones(x_BLD.shape[:2], bool)
        x_BLD, _, _ = switch_layer_forward(x_BLD, params.feed_forward, valid_BL, noise.router, none, none, statics, backend)
    else:
        x_BLD, _ = dense_layer_forward(x_BLD, params.feed_forward, none, none, statics, backend)
    return x_BLD, seen


def decode_step(
    token_B: np.ndarray, cache: Cache, params: ModelParams, blocks: tuple[BlockNoise, ...], statics: StackStatics, backend: Backend
) -> tuple[np.ndarray, Cache]:
    """Return out_BLD of one token, from which the next is picked, and the cache with this one in it."""
    position, decoder, none = cache.position, params.decoder, one(3, backend)
    x_BLD = backend.scaled(backend.embed_forward(token_B[:, None], params.embedding_VD), none, statics.around.activations)
    past_P = np.arange(position + 1)
    bucket_LP = position_buckets(past_P[-1:], past_P, decoder.position_UH.shape[0], statics.max_distance, bidirectional=False)
    bias_HLP = backend.position_bias_forward(decoder.position_UH, bucket_LP)
    own = []
    for block, noise, before, cross in zip(decoder.blocks, blocks, cache.own, cache.cross, strict=True):
        x_BLD, seen = decode_block(x_BLD, bias_HLP, before, cross, cache.memory_valid_BM, block, noise, statics, backend)
        own.append(seen)
    out_BLD, _ = backend.norm_forward(x_BLD, decoder.norm_D, statics.norm_epsilon, statics.around)
    return out_BLD, Cache(position + 1, tuple(own), cache.cross, cache.memory_valid_BM)


def generate(
    encoder_tokens_BM: np.ndarray,
    encoder_valid_BM: np.ndarray,
    params: ModelParams,
    setup: Setup,
    backend: Backend,
    length: int,
    start: int,
    end: int,
    pad: int,
    picking: Picking = GREEDY,
) -> Iterator[np.ndarray]:
    """Yield token_B, the next token of each row: at most `length` of them, `pad` after a row's `end`, and no more once every row has ended."""
    B, M = encoder_tokens_BM.shape
    statics = model_statics(setup.config, B, M, 1, train=False, setting=setup.setting)
    segment_BM, address = np.ones((B, M), np.int64), Address(setup.seed, 0, 0)
    with backend.running():
        backend.begin()
        read = rounded_tree(params, setup.setting.read, backend)
        noise = draw_noise(setup.config, statics, address, (B, M, 1), False, backend)
        x_BMD = backend.embed_forward(encoder_tokens_BM, read.embedding_VD)
        marks = segment_BM, encoder_valid_BM
        encoder, _ = stack_forward(x_BMD, x_BMD, read.encoder, *marks, *marks, np.arange(M), noise[0], statics.encoder, backend, recompute=True)
        cache = start_cache(encoder.out_BLD, encoder_valid_BM, read, statics.decoder, backend)
    token_B, done_B = np.full(B, start), np.zeros(B, bool)
    for step in range(length):
        with backend.running():
            since = backend.mark()
            blocks = tuple(draw_noise(setup.config, statics, address._replace(step=step), (B, M, 1), False, backend)[1].blocks)
            out_BLD, cache = decode_step(token_B, cache, read, blocks, statics.decoder, backend)
            logits_BV = head_forward(out_BLD, read, statics, backend)[:, 0]
            if picking.temperature > 0.0:
                uniform_B = uniform(setup.seed, step, site_of(0, Purpose.SAMPLING), (B,))
                token_B = pick_sampled(logits_BV.astype(np.float64), uniform_B, *picking)
            else:
                token_B = pick_greedy(logits_BV)
            backend.release(since, backend.mark(), cache)
        token_B = np.where(done_B, pad, token_B)
        done_B = done_B | (token_B == end)
        yield token_B
        if done_B.all():
            return
