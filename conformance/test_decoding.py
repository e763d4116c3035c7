# May import: standard library, numpy, pytest, torch, transformers, refswitch.
"""Decoding with a cache equals the whole forward pass, and greedy decoding equals Hugging Face's `generate` token by token."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5.18.0")

import torch

from conformance.house import hf_model
from conformance.test_model_peer import SHAPES
from refswitch.reference.decoding import decode, decode_step, pick_sampled, start_cache
from refswitch.reference.transformer import model_forward

MARGIN = 1e-5  # what the project promises: below it, float32 logits of generate may choose otherwise
LENGTH = 12


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.kind}-{shape.seed}")
def test_decode__greedy_equals_generate(shape: hf_model.Shape) -> None:
    """Every token up to the end, and up to the first near-tie of its row."""
    peer = hf_model.peer_of(shape)
    config = hf_model.config_of(shape, peer)
    params, batch = hf_model.params_of(peer, config), hf_model.batch_of(shape)
    statics = hf_model.statics_of(shape, config)
    outputs, _ = model_forward(batch, params, hf_model.no_noise(shape, params, config), statics)
    ours_BL, margin_BL = decode(
        outputs.encoder.out_BLD, batch.encoder_valid_BM, params, statics.decoder, np.zeros((shape.B, LENGTH)), start=0, end=1, pad=0
    )
    # its cache has as many layers as the encoder, and a decoder with more cannot use it
    theirs = peer.generate(
        input_ids=torch.tensor(batch.encoder_tokens_BM), attention_mask=torch.tensor(batch.encoder_valid_BM.astype(int)),
        max_new_tokens=LENGTH, do_sample=False, num_beams=1, use_cache=shape.layers[1] <= shape.layers[0],
    ).numpy()[:, 1:]  # fmt: skip
    is_clear_BL = np.cumprod(margin_BL > MARGIN, axis=1)[:, : theirs.shape[1]] == 1
    print(f"{np.sum(~is_clear_BL)} of {is_clear_BL.size} tokens came at or after a margin below {MARGIN} and were not compared")
    assert np.mean(is_clear_BL) > 0.9
    assert np.array_equal(ours_BL[:, : theirs.shape[1]][is_clear_BL], theirs[is_clear_BL])


def test_decode_step__equals_the_whole_pass() -> None:
    """Teacher-forced steps give the logits of one forward pass, where no capacity binds; to the roundings of float64."""
    shape = SHAPES[3]
    peer = hf_model.peer_of(shape)
    config = hf_model.config_of(shape, peer)
    params, batch = hf_model.params_of(peer, config), hf_model.batch_of(shape)
    statics = hf_model.statics_of(shape, config)
    outputs, _ = model_forward(batch, params, hf_model.no_noise(shape, params, config), statics)
    cache = start_cache(outputs.encoder.out_BLD, batch.encoder_valid_BM, params, statics.decoder.around)
    worst = 0.0
    for position in range(shape.L):
        logits_BV, cache = decode_step(batch.decoder_tokens_BL[:, position], cache, params, statics.decoder)
        worst = max(worst, float(np.max(np.abs(logits_BV - outputs.logits_BLV[:, position]))))
    terms = shape.D * shape.F * shape.H * shape.K * sum(shape.layers)
    assert worst <= terms * np.finfo(np.float64).eps * float(np.abs(outputs.logits_BLV).max())
    assert cache.position == shape.L


def test_pick_sampled__nucleus() -> None:
    """Probabilities 0.5, 0.3, 0.2: a nucleus of 0.6 holds two tokens, renormalised; a uniform picks by their cumulated share."""
    logits_BV = np.log(np.array([[0.2, 0.5, 0.3]] * 4))
    uniform_B = np.array([0.0, 0.6, 0.63, 0.999])
    assert pick_sampled(logits_BV, uniform_B, 1.0, 0.6).tolist() == [1, 1, 2, 2]
    assert pick_sampled(logits_BV, uniform_B, 1.0, 1.0).tolist() == [1, 2, 2, 0]
    assert pick_sampled(logits_BV, uniform_B, 1.0, 0.0).tolist() == [1, 1, 1, 1]
