# May import: standard library, numpy, pytest, torch, transformers, refswitch.
"""Greedy decoding equals Hugging Face's `generate` token by token. What it is without a peer: spec/properties/test_decoding.py."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5.18.0")

import torch

from conformance.house import hf_model
from conformance.test_model_peer import SHAPES
from refswitch.reference.decoding import decode
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
