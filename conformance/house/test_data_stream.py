# May import: standard library, numpy, pytest, hypothesis, refswitch.
"""Epochs and batches: nothing lost, nothing twice, the same on any number of ranks and from any position; packed rows keep their examples apart.

A synthetic corpus gives every token an id of its own, so that a token is recognised wherever it comes out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refswitch.data import (
    PYTHON_TEXT,
    Corpus,
    DataConfig,
    Stream,
    Tokens,
    open_corpus,
    open_stream,
    open_vocabulary,
    segments,
    shuffle,
    stream,
    unigram_entropy,
)
from refswitch.data.segments import epoch_of, read_segments, segment_order, segment_places
from refswitch.errors import InputError
from refswitch.model_config import PRESETS
from refswitch.model_init import initial_params
from refswitch.model_setup import model_statics, no_noise
from refswitch.reference.transformer import Batch, ModelParams, model_backward, model_forward

FIRST = 1000  # the first id of a synthetic corpus; ids of bytes and sentinels are below
OBJECTIVES = ("span_corruption", "iid", "prefix_lm", "lm")
PACKABLE = ("span_corruption", "prefix_lm", "lm")


def numbered(*lengths: int) -> Tokens:
    """Return documents of some lengths whose tokens are numbered through."""
    return Tokens(np.arange(FIRST, FIRST + sum(lengths), dtype=np.uint32), np.cumsum(np.array(lengths, np.int64)), "")


def stream_of(tokens: Tokens, seed: int = 3, **changes: Any) -> Stream:
    """Return the stream of a synthetic corpus."""
    defaults = {"inputs_length": 16, "batch": 5, "concatenate": 3, "chunk": 30}
    config: DataConfig = dataclasses.replace(PYTHON_TEXT, **{**defaults, **changes})
    vocabulary = open_vocabulary("bytes")
    return open_stream(Corpus(tokens, tokens, vocabulary, ""), tokens, config, seed)


def equal(one: Batch, other: Batch) -> bool:
    """Return whether two batches are the same bits."""
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def originals(tokens: np.ndarray) -> list[int]:
    """Return the tokens of the corpus among some ids."""
    return sorted(int(token) for token in tokens.reshape(-1) if token >= FIRST)


documents = st.lists(st.integers(1, 100), min_size=1, max_size=25).map(lambda lengths: numbered(*lengths))


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(1, 20), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 3))
def test_epoch__has_every_token_once(tokens: Tokens, L: int, chunk: int, concatenate: int, seed: int, number: int) -> None:
    """Joined and cut as T5 does it, here once more in plain Python from the order of the chunks; the segments' order is a permutation."""
    epoch = epoch_of(tokens, L, chunk, "all", concatenate, seed, number)
    order = segment_order(epoch, np.arange(epoch.segments), seed)
    assert sorted(order.tolist()) == list(range(epoch.segments))
    found = read_segments(tokens, epoch, *segment_places(epoch, np.arange(epoch.segments)))
    texts = [part.tolist() for part in np.split(found.flat, np.cumsum(found.length_B)[:-1])]
    bounds = [0, *tokens.end_I.tolist()]
    every = [list(range(FIRST + begin, FIRST + min(begin + chunk, b))) for a, b in itertools.pairwise(bounds) for begin in range(a, b, chunk)]
    by_first = {part[0]: part for part in every}
    joined = [by_first[int(start) + FIRST] for start in epoch.start_I]
    assert sorted(map(tuple, joined)) == sorted(map(tuple, every))
    groups = [list(itertools.chain(*joined[i : i + concatenate])) for i in range(0, len(joined), concatenate)]
    assert texts == [group[i : i + L] for group in groups for i in range(0, len(group), L)]


@settings(max_examples=30, deadline=None)
@given(documents, st.integers(1, 40), st.integers(0, 2**40))
def test_epoch__of_one_chunk_each(tokens: Tokens, chunk: int, seed: int) -> None:
    """T5's: of every document one chunk, begun at a multiple of the length; over many epochs every chunk is drawn."""
    bounds = [0, *tokens.end_I.tolist()]
    every = {(begin, min(begin + chunk, b)) for a, b in itertools.pairwise(bounds) for begin in range(a, b, chunk)}
    drawn = set()
    for number in range(3):
        epoch = epoch_of(tokens, 7, chunk, "one", 2, seed, number)
        chunks = list(zip(epoch.start_I.tolist(), (epoch.start_I + np.diff(epoch.end_I, prepend=0)).tolist(), strict=True))
        assert len(chunks) == len(tokens.end_I)
        assert set(chunks) <= every
        assert len({np.searchsorted(tokens.end_I, start, side="right") for start, _ in chunks}) == len(tokens.end_I)
        drawn |= set(chunks)
    if len(tokens.end_I) == len(every):
        assert drawn == every


def test_epoch__every_chunk_is_drawn_in_time() -> None:
    """One document of 6 chunks over 100 epochs; all but once in 10**7 runs each comes."""
    tokens = numbered(55)
    assert {int(epoch_of(tokens, 7, 10, "one", 1, 0, number).start_I[0]) for number in range(100)} == set(range(0, 60, 10))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 4097])
def test_shuffled__is_a_permutation(size: int) -> None:
    """Of exactly the positions there are, another one for each epoch, seed and site."""
    orders = [shuffle.shuffled(np.arange(size), size, seed, epoch, site) for seed, epoch, site in ((1, 0, 17), (2, 0, 17), (1, 1, 17), (1, 0, 273))]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
        assert np.array_equal(shuffle.shuffled(np.arange(size)[::-1], size, 1, 0, 17), orders[0][::-1])
    if size > 60:
        assert len({order.tobytes() for order in orders}) == 4
    assert len(np.unique(shuffle.shuffled(np.arange(999) + 2**50, 2**60 - 1, 1, 0, 17))) == 999


def test_shuffled__every_order_is_as_likely() -> None:
    """By words and by the network, 24 orders of 4: of 23 degrees, chance alone gives a chi-square above 58.6 once in 20,000."""
    for order in (lambda seed: shuffle.shuffled(np.arange(4), 4, seed, 0, 17), lambda seed: shuffle.network(np.arange(4), 2, seed, 0, 17)):
        _, counts = np.unique([order(seed) for seed in range(2400)], axis=0, return_counts=True)
        assert len(counts) == 24
        assert 10 * ((counts - 100) ** 2).sum() < 586 * 100


@pytest.mark.parametrize(("objective", "pack"), [*itertools.product(OBJECTIVES, [False]), *itertools.product(PACKABLE, [True])])
def test_batch__is_a_function_of_its_number(objective: str, pack: bool) -> None:
    """In any order, by a stream that begins there, and as slices on 1, 2, 3 and 4 ranks; across the borders of epochs."""
    tokens = numbered(40, 3, 77, 12, 1, 9, 30, 2)
    asked = {"objective": objective, "pack": pack, "batch": 7, "inputs_length": 24 if pack else 16}
    in_order = stream_of(tokens, **asked)
    whole = [in_order.batch(n) for n in range(12)]
    assert equal(stream_of(tokens, **asked).batch(7), whole[7])
    backwards = stream_of(tokens, **asked)
    for n in reversed(range(12)):
        assert equal(backwards.batch(n), whole[n])
    if not pack:
        assert len(backwards.examples.kept) <= 2, "epochs pile up"  # type: ignore[attr-defined]
    for ranks in (1, 2, 3, 4):
        bounds = [7 * r // ranks for r in range(ranks + 1)]
        one = stream_of(tokens, **asked)
        for n in (0, 5, 11):
            shares = [one.batch(n, range(a, b)) for a, b in itertools.pairwise(bounds)]
            joined = [np.concatenate(parts) if parts[0].ndim == 2 else parts[0] for parts in zip(*shares, strict=True)]
            assert equal(Batch(*joined), whole[n])
    assert not equal(stream_of(tokens, seed=4, **asked).batch(0), whole[0])
    if not pack:
        assert not np.array_equal(whole[0].targets_BL, whole[1].targets_BL)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batch__an_epoch_of_rows_has_every_token_once(objective: str) -> None:
    """Inputs and targets together, then the next epoch begins, in the same batch."""
    tokens = numbered(40, 3, 77, 12, 1, 9, 30, 2)
    found = stream_of(tokens, objective=objective, batch=1)
    rows = found.examples.epoch(0).segments  # type: ignore[attr-defined]
    batches = [found.batch(n) for n in range(rows)]
    assert originals(np.concatenate([tokens for b in batches for tokens in (b.encoder_tokens_BM[0], b.targets_BL[0])])) == tokens.ids_N.tolist()


def pieces_of(batch: Batch) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Yield inputs, targets and decoder inputs of each segment of each row."""
    for row in range(len(batch.targets_BL)):
        for segment in range(1, int(batch.encoder_segment_BM[row].max()) + 1):
            here = batch.decoder_segment_BL[row] == segment
            yield (
                batch.encoder_tokens_BM[row][batch.encoder_segment_BM[row] == segment].tolist(),
                batch.targets_BL[row][here].tolist(),
                batch.decoder_tokens_BL[row][here].tolist(),
            )


def check_batch(batch: Batch, pad: int = 0, eos: int = 1) -> None:
    """What every batch has: padding and segments agree, ends are in their place, the decoder reads each segment's targets shifted by one."""
    assert np.array_equal(batch.encoder_valid_BM, batch.encoder_segment_BM > 0)
    assert np.array_equal(batch.decoder_valid_BL, batch.decoder_segment_BL > 0)
    assert np.array_equal(batch.weight_BL > 0, batch.decoder_valid_BL)
    assert (batch.encoder_tokens_BM[~batch.encoder_valid_BM] == pad).all()
    assert (batch.targets_BL[~batch.decoder_valid_BL] == pad).all()
    assert (batch.decoder_tokens_BL[~batch.decoder_valid_BL] == pad).all()
    assert np.array_equal(batch.encoder_position_M, np.arange(batch.encoder_tokens_BM.shape[1]))
    assert np.array_equal(batch.decoder_position_L, np.arange(batch.targets_BL.shape[1]))
    for inputs, targets, before in pieces_of(batch):
        assert inputs[-1] == targets[-1] == eos
        assert eos not in inputs[:-1] + targets[:-1]
        assert before == [pad, *targets[:-1]]


@pytest.mark.parametrize("objective", PACKABLE)
def test_pack__has_the_same_examples_next_fit(objective: str) -> None:
    """The examples of the unpacked stream in their order, each row as full as next-fit makes it, here once more in plain Python."""
    tokens = numbered(*(1 + i * 7 % 23 for i in range(40)))
    asked = {"objective": objective, "concatenate": 1, "chunk": 12, "inputs_length": 24}
    packed, single = stream_of(tokens, pack=True, **asked), stream_of(tokens, batch=1, **asked)
    M, L = packed.inputs_length, packed.targets_length
    examples = (next(pieces_of(single.batch(n))) for n in itertools.count())
    waiting = next(examples)
    for n in range(12):
        batch = packed.batch(n)
        check_batch(batch)
        for row in range(5):
            expected: list[tuple] = []
            while sum(len(e[0]) for e in expected) + len(waiting[0]) <= M and sum(len(e[1]) for e in expected) + len(waiting[1]) <= L:
                expected.append(waiting)
                waiting = next(examples)
            assert list(pieces_of(Batch(*(array[row : row + 1] if array.ndim == 2 else array for array in batch)))) == expected
    assert max(batch.encoder_segment_BM.max(), batch.decoder_segment_BL.max()) > 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batch__is_well_formed(objective: str) -> None:
    """Without packing too; of a corpus of one token as well."""
    for tokens in (numbered(40, 3, 77, 12), numbered(1)):
        for n in range(4):
            check_batch(stream_of(tokens, objective=objective).batch(n))


def test_stream__refuses() -> None:
    """Impossible shapes and numbers, each in one line."""
    tokens = numbered(50)
    for changes, message in (
        ({"objective": "iid", "pack": True}, "pack=true"),
        ({"targets_length": 4}, "targets_length=4"),
        ({"objective": "prefix_lm", "targets_length": 15}, "needs 16"),
        ({"inputs_length": 4096}, "sentinels=125"),
        ({"density": 1.0}, "density"),
        ({"mean_span": 0.5}, "mean_span"),
        ({"batch": 0}, "batch"),
        ({"objective": "spans"}, "objective=spans: should be one of span_corruption"),
    ):
        with pytest.raises(InputError, match=message):
            stream_of(tokens, **changes)
    for n, rows in ((-1, None), (0, range(3, 6)), (0, range(0, 4, 2))):
        with pytest.raises(InputError):
            stream_of(tokens).batch(n, rows)
    with pytest.raises(InputError, match="no document"):
        stream_of(Tokens(np.empty(0, np.uint16), np.empty(0, np.int64), ""))


def test_prefix_lm__every_length_is_as_likely() -> None:
    """Of 15 tokens, prefixes of 1 to 14, in 2,800 rows: of 13 degrees, chance alone gives a chi-square above 42 once in 15,000."""
    found = stream_of(numbered(*([15] * 2800)), objective="prefix_lm", batch=2800, concatenate=1)
    length = (found.batch(0).encoder_tokens_BM >= FIRST).sum(axis=1)
    counts = np.bincount(length, minlength=15)
    assert counts[0] == 0
    assert counts.sum() == 2800
    assert ((counts[1:] - 200) ** 2).sum() < 42 * 200


@pytest.mark.parametrize("objective", ["span_corruption", "iid"])
def test_batch__density_0_is_the_identity(objective: str) -> None:
    """The inputs are the text and its end, the targets one sentinel and an end."""
    batch = stream_of(numbered(30), objective=objective, density=0.0, batch=2).batch(0)  # rows of 15 tokens and an end: an epoch is 2
    rows = sorted(pieces_of(batch))
    assert [inputs for inputs, _, _ in rows] == [[*range(FIRST, FIRST + 15), 1], [*range(FIRST + 15, FIRST + 30), 1]]
    assert all(targets == [383, 1] for _, targets, _ in rows)


def test_unigram_entropy__of_known_counts() -> None:
    """Ids 4 and 9 three to one, padding not counted: 2 ln 2 - (3/4) ln 3, to the last place but two of four roundings."""
    batch = stream_of(numbered(3)).batch(0)
    targets = np.array([[4, 4, 4, 9, 0]])
    known = batch._replace(targets_BL=targets, weight_BL=(targets > 0).astype(np.float32))
    exact = 2 * np.log(2) - 0.75 * np.log(3)
    assert abs(unigram_entropy([known, known]) - exact) <= 4 * np.spacing(exact)


PACKED = dataclasses.replace(PYTHON_TEXT, sources=(), held_out=0.0, documents="line", concatenate=1, pack=True, inputs_length=24, batch=2)


def lettered(tmp_path: Any) -> Batch:
    """Return packed rows of documents that are each one letter, so that a letter belongs to one segment."""
    path = tmp_path / "letters.txt"
    path.write_text("".join(letter * length + "\n" for letter, length in zip("abcdefgh", (9, 6, 8, 5, 9, 7, 6, 8), strict=True)))
    config = dataclasses.replace(PACKED, sources=(str(path),))
    corpus = open_corpus(config)
    batch = open_stream(corpus, corpus.train, config, 0).batch(0)
    check_batch(batch)
    return batch


def segments_by_ends(batch: Batch) -> np.ndarray:
    """Return which tokens of the targets belong together: from their ends, not from the segments that are under test."""
    ended_BL = np.cumsum(batch.targets_BL == 1, axis=1)
    before_BL = np.pad(ended_BL, ((0, 0), (1, 0)))[:, :-1]
    return np.where(batch.targets_BL != 0, before_BL + 1, 0)


def leaks(batch: Batch) -> tuple[int, int]:
    """Return how many letters of other segments, and how many of its own, have a gradient from one segment's loss, over all segments.

    The model has a table of its own for the logits, so that a letter's row of the embedding is touched by its tokens alone; its experts have room for
    every token, and its balance losses, which do join all tokens, are switched off.
    """
    model = dataclasses.replace(PRESETS["byte_tiny"], tied=False, d_model=8, d_kv=4, heads=2, d_ff=16, experts=2)
    params: ModelParams = initial_params(model, 3, "mesh")
    B, M = batch.encoder_tokens_BM.shape
    L = batch.targets_BL.shape[1]
    statics = model_statics(model, B, M, L, train=True)
    statics = statics._replace(
        encoder=statics.encoder._replace(aux_coef=0.0, capacity=B * M), decoder=statics.decoder._replace(aux_coef=0.0, capacity=B * L)
    )
    noise = no_noise(params, statics, B, M, L)
    foreign = own = 0
    for row, segment in itertools.product(range(B), range(1, M)):
        if not (segments_by_ends(batch)[row] == segment).any():
            continue
        loss_BL = np.zeros_like(batch.weight_BL)
        loss_BL[row] = segments_by_ends(batch)[row] == segment
        _, saved = model_forward(batch._replace(weight_BL=loss_BL), params, noise, statics)
        gradient_VD = model_backward(1.0, saved, params, statics).embedding_VD
        mine = {int(token) for token in batch.targets_BL[row][segments_by_ends(batch)[row] == segment] if 3 <= token < 259}
        assert len(mine) == 1
        for letter in "abcdefgh":
            touched = bool((gradient_VD[ord(letter) + 3] != 0.0).any())
            own += touched and ord(letter) + 3 in mine
            foreign += touched and ord(letter) + 3 not in mine
    return foreign, own


def test_pack__no_gradient_crosses_segments(tmp_path: Any) -> None:
    """Exactly zero from one segment's loss to another's tokens, in encoder and decoder; not zero to its own."""
    batch = lettered(tmp_path)
    assert batch.encoder_segment_BM.max() > 1
    letters = {int(token) - 3 for token in batch.encoder_tokens_BM.reshape(-1)} & set(b"abcdefgh")
    assert len(letters) >= 4
    assert leaks(batch) == (0, len(letters))


def one_segment(segment_BL: np.ndarray) -> np.ndarray:
    """All of a row is one segment."""
    return (segment_BL > 0).astype(segment_BL.dtype)


def off_by_one(segment_BL: np.ndarray) -> np.ndarray:
    """A segment begins one token late: its first token belongs to the one before."""
    return np.where(segment_BL > 0, np.pad(segment_BL, ((0, 0), (1, 0)), mode="edge")[:, :-1], 0)


@pytest.mark.parametrize("wrong", [one_segment, off_by_one])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_pack__a_planted_leak_is_noticed(tmp_path: Any, stack: str, wrong: Any) -> None:
    """Segments that are wrong in one stack alone, and a gradient crosses."""
    batch = lettered(tmp_path)
    name = "encoder_segment_BM" if stack == "encoder" else "decoder_segment_BL"
    assert leaks(batch._replace(**{name: wrong(getattr(batch, name))}))[0] > 0


def plant_late_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's beginning is looked up one chunk too far."""
    true = segments.read_segments
    monkeypatch.setattr("refswitch.data.examples.read_segments", lambda tokens, epoch, start, length: true(tokens, epoch, start + 1, length))


def plant_rank_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank counts its rows from 0."""
    true = Stream.first_examples
    monkeypatch.setattr(Stream, "first_examples", lambda self, first, count: true(self, first // self.rows * self.rows, count))


def plant_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is drawn from how often it was asked."""
    true, calls = segments.segment_order, itertools.count()
    monkeypatch.setattr("refswitch.data.examples.segment_order", lambda epoch, position, seed: true(epoch, position, seed + next(calls)))


def plant_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A position beyond the last is taken modulo their number instead of going on."""
    monkeypatch.setattr(
        shuffle, "shuffled", lambda position, size, seed, epoch, site: shuffle.network(position, (size - 1).bit_length(), seed, epoch, site) % size
    )


def plant_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder reads its targets unshifted."""
    true = stream.assemble
    monkeypatch.setattr(stream, "assemble", lambda encoder, targets, pad: true(encoder, targets, pad)._replace(decoder_tokens_BL=targets[0]))


def plant_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that would be full to the last token is closed before it."""
    true = Stream.scan

    def scan(self: Stream) -> None:
        self.inputs_length -= 1
        true(self)
        self.inputs_length += 1

    monkeypatch.setattr(Stream, "scan", scan)


PLANTED = {
    "late_chunk": (plant_late_chunk, lambda: test_batch__an_epoch_of_rows_has_every_token_once("span_corruption")),
    "rank_order": (plant_rank_order, lambda: test_batch__is_a_function_of_its_number("lm", False)),
    "history": (plant_history, lambda: test_batch__is_a_function_of_its_number("lm", False)),
    "no_walk": (plant_no_walk, lambda: test_shuffled__is_a_permutation(4097)),
    "shift": (plant_shift, lambda: test_batch__is_well_formed("lm")),
    "tight": (plant_tight, lambda: test_pack__has_the_same_examples_next_fit("prefix_lm")),
}


@pytest.mark.parametrize("name", PLANTED)
def test_stream__a_planted_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by the test that is there for it."""
    plant, check = PLANTED[name]
    check()
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        check()
