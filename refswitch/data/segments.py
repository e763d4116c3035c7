# May import: standard library, numpy, refswitch.data (config, corpus, shuffle), refswitch.numbers.
"""An epoch of a corpus: its chunks in a random order, joined by groups, cut into segments; and any segment of it without the others.

    documents -> chunks (of at most 65,536 tokens) -> shuffled -> joined, 128 at a time -> cut every L tokens -> shuffled

As T5 does it [`select_random_chunk`, `reduce_concat_tokens`, `split_tokens`], but each order is a function of an address. A group's last segment is
shorter. No token of an epoch is lost and none comes twice; with chunks "one", T5's, an epoch reads one random chunk of each document. Memory: 24
bytes for each chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.data.corpus import Tokens
from refswitch.data.shuffle import shuffled
from refswitch.data.spans import Ragged
from refswitch.numbers.philox import Purpose, random_bits, site_of

CHUNK_ORDER, SEGMENT_ORDER, CHUNK_CHOICE = (site_of(layer, Purpose.DATA_ORDER) for layer in range(3))


class Epoch(NamedTuple):
    """One epoch's chunks as they stand one after the other, and where its groups and segments begin."""

    number: int
    start_I: np.ndarray  # of each chunk, in the corpus
    end_I: np.ndarray  # of each chunk, in the epoch
    token_G: np.ndarray  # where each group begins in the epoch, and the last ends
    segment_G: np.ndarray  # the first segment of each group, and how many there are
    L: int  # tokens of a segment

    @property
    def segments(self) -> int:
        """How many segments the epoch has."""
        return int(self.segment_G[-1])


def below(words: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Return an integer in [0, bound) of each word: the upper half of its product with the bound, which is below 2**31."""
    return ((words.astype(np.uint64) * np.asarray(bound, np.uint64)) >> np.uint64(32)).astype(np.int64)


def chunks_of(tokens: Tokens, chunk: int, which: str, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where an epoch's chunks begin in the corpus, and how long they are, in the corpus' order."""
    end_I = np.asarray(tokens.end_I)
    start_I = np.concatenate([np.zeros(1, np.int64), end_I[:-1]])
    count_I = -(-(end_I - start_I) // chunk)
    if which == "one":
        choice_I = below(random_bits(seed, epoch, CHUNK_CHOICE, range(len(end_I))), count_I)
        start_I = start_I + choice_I * chunk
        return start_I, np.minimum(end_I - start_I, chunk)
    document = np.repeat(np.arange(len(end_I)), count_I)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count_I) - count_I, count_I)
    start = start_I[document] + number * chunk
    return start, np.minimum(end_I[document] - start, chunk)


def epoch_of(tokens: Tokens, L: int, chunk: int, which: str, concatenate: int, seed: int, number: int) -> Epoch:
    """Return an epoch.

    Parameters
    ----------
    tokens : Tokens
        One part of a corpus.
    L : int, tokens
        Length of a segment.
    chunk, which, concatenate : int, str, int
        As in `DataConfig`: chunk, chunks, concatenate.
    seed, number : int
        The run's seed, and which epoch.

    Returns
    -------
    Epoch
        Where everything is; no token is read.
    """
    start, length = chunks_of(tokens, chunk, which, seed, number)
    order = shuffled(np.arange(len(start)), len(start), seed, number, CHUNK_ORDER)
    end_I = np.cumsum(length[order])
    token_G = np.concatenate([np.zeros(1, np.int64), end_I[concatenate - 1 :: concatenate]])
    if token_G[-1] != end_I[-1]:
        token_G = np.append(token_G, end_I[-1])
    segment_G = np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-np.diff(token_G) // L))])
    return Epoch(number, start[order], end_I, token_G, segment_G, L)


def segment_order(epoch: Epoch, position: np.ndarray, seed: int) -> np.ndarray:
    """Return the numbers of the segments at some positions of an epoch's random order."""
    return shuffled(position, epoch.segments, seed, epoch.number, SEGMENT_ORDER)


def segment_places(epoch: Epoch, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where segments begin in the epoch, and their lengths."""
    group = np.searchsorted(epoch.segment_G, number, side="right") - 1
    start = epoch.token_G[group] + (number - epoch.segment_G[group]) * epoch.L
    return start, np.minimum(epoch.token_G[group + 1] - start, epoch.L)


def ramp(length: np.ndarray) -> np.ndarray:
    """Return 0 ... n - 1 for each length n, one after the other."""
    return np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)


def read_segments(tokens: Tokens, epoch: Epoch, start: np.ndarray, length: np.ndarray) -> Ragged:
    """Return the tokens of some segments, each gathered from the chunks that it lies in."""
    first = np.searchsorted(epoch.end_I, start, side="right")
    last = np.searchsorted(epoch.end_I, start + length - 1, side="right")
    count = last - first + 1
    chunk = np.repeat(first, count) + ramp(count)
    chunk_start = np.where(chunk > 0, epoch.end_I[chunk - 1], 0)  # in the epoch; chunk 0 has none before it
    begin = np.maximum(chunk_start, np.repeat(start, count))
    end = np.minimum(epoch.end_I[chunk], np.repeat(start + length, count))
    source = np.repeat(epoch.start_I[chunk] + begin - chunk_start, end - begin) + ramp(end - begin)
    return Ragged(np.asarray(tokens.ids_N[source], np.int64), length)
