# May import: standard library, numpy, refswitch.data (config, corpus, examples, segments), refswitch.reference.transformer, refswitch.errors.
"""A stream of batches: batch n is a function of the seed, the corpus and n, so that a run resumes at any batch and a rank takes its rows of it.

Without packing a row is an example. With packing a row takes examples in their order until the next does not fit, in inputs or in targets; which
examples a row has follows from their lengths alone, so that finding row r counts lengths and reads no text. Rows and segments carry on across
epochs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from refswitch.data.config import DataConfig
from refswitch.data.corpus import Corpus, Tokens
from refswitch.data.examples import Examples, Segments
from refswitch.data.segments import ramp
from refswitch.data.spans import Ragged
from refswitch.errors import InputError
from refswitch.reference.transformer import Batch

SCAN = 1 << 8, 1 << 14  # examples whose lengths are looked at together: at first, and at most


class Stream:
    """Batches by number. `batch(n)` is what a trainer asks for; `resume at n` is nothing but the next call."""

    def __init__(self, examples: Examples, rows: int, pack: bool) -> None:
        self.examples, self.rows, self.pack = examples, rows, pack
        self.inputs_length, self.targets_length = examples.inputs_length, examples.targets_length
        self.first = [0]  # with packing: the first example of each row that is known
        self.scanned = 0

    def first_examples(self, first: int, count: int) -> np.ndarray:
        """Return the first example of some rows and of the one behind them."""
        if not self.pack:
            return np.arange(first, first + count + 1)
        while len(self.first) <= first + count:
            self.scan()
        return np.array(self.first[first : first + count + 1])

    def scan(self) -> None:
        """Look at more examples' lengths and note where rows begin. The last row is left open: an example that follows may fit into it."""
        begin = self.first[-1]
        count = max(min(max(len(self.first), SCAN[0]), SCAN[1]), self.inputs_length + self.targets_length)  # more than a row can hold
        inputs, targets = self.examples.lengths(np.arange(begin, begin + count))
        ends = np.cumsum(inputs), np.cumsum(targets)
        i = 0
        while True:
            room = ((ends[0][i - 1] if i else 0) + self.inputs_length, (ends[1][i - 1] if i else 0) + self.targets_length)
            following = min(int(np.searchsorted(end, limit, side="right")) for end, limit in zip(ends, room, strict=True))
            if following >= count:
                return
            i = following
            self.first.append(begin + i)

    def batch(self, n: int, rows: range | None = None) -> Batch:
        """Return batch n, or some of its rows.

        Parameters
        ----------
        n : int, from 0
            The number of the batch.
        rows : range
            The rows that are wanted, all of them where None: a rank asks for its share and gets that slice of the whole.

        Returns
        -------
        Batch
            Tokens and targets int64, segments numbered from 1 in each row and 0 for padding, weights float32.
        """
        rows = range(self.rows) if rows is None else rows
        if n < 0 or (len(rows) and not 0 <= rows[0] <= rows[-1] < self.rows) or rows.step != 1:
            raise InputError(f"batch {n}, rows {rows}: batches count from 0, and have rows 0 ... {self.rows - 1}")
        B, M, L, pad = len(rows), self.inputs_length, self.targets_length, self.examples.pad
        first = self.first_examples(n * self.rows + rows.start, B)
        number = np.arange(first[0], first[-1])
        row = np.repeat(np.arange(B), np.diff(first))
        segment = number - first[:-1][row] + 1
        encoder = np.full((B, M), pad, np.int64), np.zeros((B, M), np.int64)
        targets = np.full((B, L), pad, np.int64), np.zeros((B, L), np.int64)
        column = self.columns(number, first) if self.pack else (np.zeros_like(number), np.zeros_like(number))
        for which, part_inputs, part_targets in self.examples.parts(number):
            place(encoder, part_inputs, row[which], column[0][which], segment[which])
            place(targets, part_targets, row[which], column[1][which], segment[which])
        return assemble(encoder, targets, pad)

    def columns(self, number: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where each example begins in its row, in inputs and in targets."""
        begins = []
        for length in self.examples.lengths(number):
            begin = np.cumsum(length) - length
            begins.append(begin - np.repeat(begin[first[:-1] - first[0]], np.diff(first)))
        return begins[0], begins[1]


def place(arrays: tuple[np.ndarray, np.ndarray], rows: Ragged, row: np.ndarray, column: np.ndarray, segment: np.ndarray) -> None:
    """Write ragged rows into tokens and segments, each at its row and column."""
    tokens, segments = arrays
    where = np.repeat(row * tokens.shape[1] + column, rows.length_B) + ramp(rows.length_B)
    tokens.reshape(-1)[where] = rows.flat
    segments.reshape(-1)[where] = np.repeat(segment, rows.length_B)


def assemble(encoder: tuple[np.ndarray, np.ndarray], targets: tuple[np.ndarray, np.ndarray], pad: int) -> Batch:
    """Return the batch: the decoder reads each segment's targets shifted right by one, from the padding id on."""
    encoder_tokens_BM, encoder_segment_BM = encoder
    targets_BL, decoder_segment_BL = targets
    before_BL = np.full_like(targets_BL, pad)
    before_BL[:, 1:] = targets_BL[:, :-1]
    is_first_BL = np.ones(targets_BL.shape, bool)
    is_first_BL[:, 1:] = decoder_segment_BL[:, 1:] != decoder_segment_BL[:, :-1]
    valid_BL = decoder_segment_BL > 0
    return Batch(
        encoder_tokens_BM=encoder_tokens_BM,
        encoder_segment_BM=encoder_segment_BM,
        encoder_valid_BM=encoder_segment_BM > 0,
        encoder_position_M=np.arange(encoder_tokens_BM.shape[1]),
        decoder_tokens_BL=np.where(is_first_BL | ~valid_BL, pad, before_BL),
        decoder_segment_BL=decoder_segment_BL,
        decoder_valid_BL=valid_BL,
        decoder_position_L=np.arange(targets_BL.shape[1]),
        targets_BL=targets_BL,
        weight_BL=valid_BL.astype(np.float32),
    )


def open_stream(corpus: Corpus, part: Tokens, config: DataConfig, seed: int) -> Stream:
    """Return the batches of one part of a corpus.

    Parameters
    ----------
    corpus : Corpus
        From `open_corpus`.
    part : Tokens
        `corpus.train` or `corpus.held_out`.
    config : DataConfig
        Objective, shapes, packing, rows.
    seed : int, [0, 2**64)
        The run's seed.

    Returns
    -------
    Stream
        Endless: epochs follow each other, each in its own order.

    Raises
    ------
    InputError
        Where the part is empty, or the objective does not fit the shapes.
    """
    if not part.end_I.size:
        raise InputError("data: the part has no document; data.held_out=0.05 holds some out")
    return Stream(Segments(part, corpus.vocabulary, config, seed), config.batch, config.pack)


def unigram_entropy(batches: Iterable[Batch]) -> float:
    """Return the entropy of the targets' distribution in nats per target token.

    What a model reaches that knows how often each token comes and no more.
    """
    counts = np.zeros(0, np.int64)
    for batch in batches:
        more = np.bincount(batch.targets_BL[batch.weight_BL > 0])
        counts = np.pad(counts, (0, max(len(more) - len(counts), 0)))
        counts[: len(more)] += more
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
