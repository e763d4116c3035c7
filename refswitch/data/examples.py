# May import: standard library, numpy, refswitch.data (config, corpus, objective, segments, spans).
"""Numbered examples: the one sequence that a stream cuts into rows. Example k is a function of the seed, the corpus and k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from refswitch.data.config import DataConfig
from refswitch.data.corpus import Tokens
from refswitch.data.objective import ask, example_lengths, objective_of
from refswitch.data.segments import Epoch, epoch_of, read_segments, segment_order, segment_places
from refswitch.data.spans import Ragged
from refswitch.data.vocabulary import Vocabulary

KEPT_EPOCHS = 2  # a batch lies in one, or across the border of two
WINDOW = 1 << 11  # examples whose order is drawn together
KEPT_WINDOWS = 16


class Part(NamedTuple):
    """Some of the examples that were asked for: which, and what they are."""

    which: np.ndarray
    inputs: Ragged
    targets: Ragged


class Examples(Protocol):
    """An endless sequence of examples by number."""

    inputs_length: int  # no example is longer
    targets_length: int
    pad: int

    def lengths(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lengths of some examples' inputs and targets."""

    def parts(self, number: np.ndarray) -> Iterator[Part]:
        """Yield some examples, in parts."""


class Segments:
    """The examples of a corpus, epoch after epoch."""

    def __init__(self, tokens: Tokens, vocabulary: Vocabulary, config: DataConfig, seed: int) -> None:
        self.tokens, self.config, self.seed = tokens, config, seed
        self.objective = objective_of(config, vocabulary, seed)
        self.inputs_length, self.targets_length, self.pad = self.objective.inputs_length, self.objective.targets_length, vocabulary.pad
        self.first = [0]  # the first example of each epoch whose size is known
        self.kept: dict[int, Epoch] = {}
        self.windows: dict[tuple[int, int], np.ndarray] = {}

    def epoch(self, number: int) -> Epoch:
        """Return an epoch; the last ones that were asked for are kept."""
        if number not in self.kept:
            config = self.config
            fresh = epoch_of(self.tokens, self.objective.L, config.chunk, config.chunks, config.concatenate, self.seed, number)
            if len(self.kept) >= KEPT_EPOCHS:
                del self.kept[next(iter(self.kept))]
            self.kept[number] = fresh
            if number == len(self.first) - 1:
                self.first.append(self.first[-1] + fresh.segments)
        return self.kept[number]

    def epoch_of_example(self, number: int) -> int:
        """Return the epoch that an example lies in. Epochs differ in size by their groups' last segments, so those before it are counted."""
        while self.first[-1] <= number:
            self.epoch(len(self.first) - 1)
        return int(np.searchsorted(self.first, number, side="right")) - 1

    def located(self, number: np.ndarray) -> Iterator[tuple[np.ndarray, Epoch, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield, for each epoch that some examples lie in, which they are and their segments' numbers, beginnings and lengths."""
        if not number.size:
            return
        last = self.epoch_of_example(int(number.max()))
        for epoch in range(self.epoch_of_example(int(number.min())), last + 1):
            which = np.flatnonzero((number >= self.first[epoch]) & (number < self.first[epoch + 1]))
            if which.size:
                whole = self.epoch(epoch)
                segment = self.segments_at(whole, number[which] - self.first[epoch])
                yield which, whole, segment, *segment_places(whole, segment)

    def segments_at(self, epoch: Epoch, position: np.ndarray) -> np.ndarray:
        """Return the segments at some positions of an epoch's order, by windows of it: a shuffle of many costs little more than that of a few."""
        segment = np.empty_like(position)
        for window in np.unique(position // WINDOW).tolist():
            key = epoch.number, window
            if key not in self.windows:
                if len(self.windows) >= KEPT_WINDOWS:
                    del self.windows[next(iter(self.windows))]
                around = np.arange(window * WINDOW, min((window + 1) * WINDOW, epoch.segments))
                self.windows[key] = segment_order(epoch, around, self.seed)
            inside = position // WINDOW == window
            segment[inside] = self.windows[key][position[inside] - window * WINDOW]
        return segment

    def lengths(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lengths of some examples' inputs and targets, without reading them."""
        inputs, targets = np.empty_like(number), np.empty_like(number)
        for which, epoch, segment, _, length in self.located(number):
            inputs[which], targets[which] = example_lengths(self.objective, epoch.number, segment, length)
        return inputs, targets

    def parts(self, number: np.ndarray) -> Iterator[Part]:
        """Yield some examples, those of one epoch and one length together."""
        for which, epoch, segment, start, length in self.located(number):
            for L in np.unique(length):
                same = length == L
                tokens = read_segments(self.tokens, epoch, start[same], length[same])
                yield Part(which[same], *ask(self.objective, epoch.number, segment[same], tokens.flat.reshape(-1, L)))
