# May import: standard library, numpy, pytest, torch, transformers, refswitch.
"""Beam search against Hugging Face's `generate`. What it is without a peer: spec/properties/test_beam_search.py."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5.18.0")

import torch

from conformance.house import hf_model
from conformance.test_model_peer import SHAPES
from refswitch.reference import beam_search as module
from refswitch.reference.beam_search import beam_search
from refswitch.reference.decoding import decode
from refswitch.reference.transformer import Batch, ModelParams, ModelStatics, model_forward

MARGIN = 1e-5  # what the project promises: generate sums float32 logits, and below it may order otherwise
LENGTH = 9


class Setting(NamedTuple):
    """One random model on both sides."""

    shape: hf_model.Shape
    peer: Any
    params: ModelParams
    batch: Batch
    statics: ModelStatics
    memory_BMD: np.ndarray


def setting(number: int) -> Setting:
    """Build a model. The peer's cache has as many layers as the encoder; without it each step routes the whole prefix, so no capacity may bind."""
    shape = SHAPES[number]
    if shape.layers[1] > shape.layers[0]:
        shape = dataclasses.replace(shape, capacity=max(shape.capacity, LENGTH, shape.M))
    peer = hf_model.peer_of(shape)
    config = hf_model.config_of(shape, peer)
    params, batch = hf_model.params_of(peer, config), hf_model.batch_of(shape)
    statics = hf_model.statics_of(shape, config)
    outputs, _ = model_forward(batch, params, hf_model.no_noise(shape, params, config), statics)
    return Setting(shape, peer, params, batch, statics, outputs.encoder.out_BLD)


def frequent_token(it: Setting) -> int:
    """Return the token that greedy decoding likes best: taken as the end, it makes beams end early and late."""
    valid_BM, noise_BL = it.batch.encoder_valid_BM, np.zeros((it.shape.B, LENGTH))
    tokens_BL, _ = decode(it.memory_BMD, valid_BM, it.params, it.statics.decoder, noise_BL, start=0, end=-1, pad=0)
    return int(np.bincount(tokens_BL[:, 1:].ravel()).argmax())


def compare(number: int, beams: int, alpha: float, early: bool = False) -> tuple[int, int, int]:
    """Return rows whose beams had clear margins, of those the rows that differ from the peer's, and all rows."""
    it = setting(number)
    B, end = it.shape.B, frequent_token(it) if early else 1
    statics, valid_BM = it.statics.decoder._replace(groups=B * beams), it.batch.encoder_valid_BM
    found, margin_B = beam_search(it.memory_BMD, valid_BM, it.params, statics, beams, LENGTH, start=0, end=end, pad=0, alpha=alpha)
    theirs_BL = it.peer.generate(
        input_ids=torch.tensor(it.batch.encoder_tokens_BM), attention_mask=torch.tensor(valid_BM.astype(int)),
        max_new_tokens=LENGTH, do_sample=False, num_beams=beams, length_penalty=alpha, early_stopping=False, eos_token_id=end, pad_token_id=0,
        use_cache=it.shape.layers[1] <= it.shape.layers[0],
    ).numpy()[:, 1:]  # fmt: skip
    theirs_BL = np.where(np.cumsum(theirs_BL == end, axis=1) - (theirs_BL == end) > 0, 0, theirs_BL)  # it fills with the end where the pad is 0
    clear_B = margin_B > MARGIN
    return int(clear_B.sum()), int(np.any(found.tokens_BWL[:, 0, : theirs_BL.shape[1]] != theirs_BL, axis=1)[clear_B].sum()), B


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("beams", "alpha"), [(4, 0.6), (2, 1.0), (3, 0.0)])
def test_beam_search__equals_generate(beams: int, alpha: float, early: bool) -> None:
    """The best beam of every model, token by token, in every row whose order was never within the margin; the others are counted."""
    clear, different, rows = np.sum([compare(number, beams, alpha, early) for number in range(len(SHAPES))], axis=0)
    print(f"{rows - clear} of {rows} rows had two scores within {MARGIN} and were not compared")
    assert different == 0
    assert 10 * clear > 9 * rows


@pytest.mark.parametrize("plant", ["no penalty", "ends count beyond the first W", "cache not reordered"])
def test_beam_search__comparison_notices(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted difference shows in some model."""
    if plant == "no penalty":
        monkeypatch.setattr(module, "length_penalty", lambda length, alpha, rule: 1.0)
    elif plant == "cache not reordered":
        monkeypatch.setattr(module, "reorder", lambda cache, index_N: cache)
    else:
        keep_all = module.best_of
        monkeypatch.setattr(module, "best_of", lambda beams, count: keep_all(beams, count)[:1] + (np.zeros_like(keep_all(beams, count)[1]),))
    assert sum(compare(number, 4, 1.0, early=True)[1] for number in (0, 1, 3, 4, 6)) > 0
