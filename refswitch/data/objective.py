# May import: standard library, numpy, refswitch.data (config, spans, segments, vocabulary), refswitch.numbers, refswitch.errors.
"""What a model is asked: from a segment of text to inputs and targets, both with an end-of-sequence.

    span_corruption   runs of noise, as many as T5 draws; see `spans`
    iid               the same, each token noise on its own
    prefix_lm         inputs are a beginning of random length, targets the rest [`random_prefix_noise_mask`]
    lm                inputs are empty, targets the whole

What is drawn for a segment depends on the seed, the epoch and the segment's number alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.data.config import DataConfig
from refswitch.data.segments import below
from refswitch.data.spans import Ragged, flat_rows, iid_mask, span_counts, span_lengths, span_mask, with_sentinels
from refswitch.data.vocabulary import Vocabulary
from refswitch.errors import InputError
from refswitch.numbers.philox import LANES, Purpose, block_words, random_bits, site_of

SPANS = site_of(0, Purpose.DATA_SPANS)
IID_ROOM = 2.5  # T5 gives 512 inputs with 15 % noise 192 targets


class Objective(NamedTuple):
    """One objective with its shapes."""

    name: str
    density: float
    mean_span: float
    vocabulary: Vocabulary
    L: int  # tokens of a segment
    inputs_length: int  # of a row
    targets_length: int
    seed: int


def row_lengths(length: np.ndarray, density: float, mean_span: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs' and targets' lengths of corrupted texts of some lengths; a text without noise has one sentinel in its targets."""
    noise, spans = span_counts(length, density, mean_span)
    return length - noise + spans + 1, noise + np.maximum(spans, 1) + 1


def objective_of(config: DataConfig, vocabulary: Vocabulary, seed: int) -> Objective:
    """Return a configuration's objective.

    Raises
    ------
    InputError
        Where the targets do not fit their rows, or there are fewer sentinels than spans.
    """
    M, name, asked = config.inputs_length, config.objective, config.targets_length
    spans = 0
    if name == "span_corruption":
        L = span_lengths(M, config.density, config.mean_span).tokens
        while (lengths := row_lengths(np.arange(1, L + 1), config.density, config.mean_span))[0].max() > M:
            L -= 1
        needed = int(lengths[1].max())
        spans = int(span_counts(np.arange(1, L + 1), config.density, config.mean_span)[1].max())
    elif name == "iid":
        L, needed = M - 1, 3
        asked = asked or int(np.ceil(IID_ROOM * config.density * M)) + needed
    elif name == "prefix_lm":
        L, needed = M - 1, M
    else:
        L = (asked or M) - 1
        M, needed = (M if config.pack else 1), L + 1
    if asked and asked < needed:
        raise InputError(f"data.targets_length={asked}: {name} with data.inputs_length={config.inputs_length} needs {needed}")
    if spans > len(vocabulary.sentinels):
        raise InputError(f"data.sentinels={len(vocabulary.sentinels)}: rows of {M} inputs need {spans}; ask for more, or for shorter rows")
    return Objective(name, config.density, config.mean_span, vocabulary, L, M, asked or needed, seed)


def prefixes(objective: Objective, epoch: int, number: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return how many tokens of each segment are inputs: 1 to all but one, each as likely; none of a single token."""
    least = np.minimum(length - 1, 1)
    words = random_bits(objective.seed, epoch, SPANS, number.astype(np.int64) * LANES)
    return least + below(words, length - least)


def example_lengths(objective: Objective, epoch: int, number: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of the inputs and targets that segments will have, without reading them."""
    if objective.name == "span_corruption":
        return row_lengths(length, objective.density, objective.mean_span)
    if objective.name == "prefix_lm":
        prefix = prefixes(objective, epoch, number, length)
        return prefix + 1, length - prefix + 1
    return np.ones_like(length), length + 1


def ask(objective: Objective, epoch: int, number: np.ndarray, tokens_BL: np.ndarray) -> tuple[Ragged, Ragged]:
    """Return inputs and targets of segments of one length.

    Parameters
    ----------
    objective : Objective
        What is asked.
    epoch : int
        The epoch that is drawn for.
    number : int64
        The segments' numbers in the epoch, which are their addresses.
    tokens_BL : int64
        Their tokens.

    Returns
    -------
    tuple
        Inputs and targets, ragged, with their ends.
    """
    B, L = tokens_BL.shape
    vocabulary = objective.vocabulary
    if objective.name == "lm":
        nothing_BL = np.zeros((B, L), bool)
        return flat_rows(tokens_BL, nothing_BL, vocabulary.eos), flat_rows(tokens_BL, ~nothing_BL, vocabulary.eos)
    if objective.name == "prefix_lm":
        prefix_BL = np.arange(L) < prefixes(objective, epoch, number, np.full(B, L))[:, None]
        return flat_rows(tokens_BL, prefix_BL, vocabulary.eos), flat_rows(tokens_BL, ~prefix_BL, vocabulary.eos)
    blocks = -(-objective.L // LANES)
    address = (number[:, None] * blocks + np.arange(blocks)).astype(np.uint64)
    words_BL = block_words(objective.seed, epoch, SPANS, address.reshape(-1)).reshape(B, blocks * LANES)
    if objective.name == "iid":
        mask_BL = iid_mask(words_BL[:, :L], objective.density, len(vocabulary.sentinels), objective.targets_length)
    else:
        mask_BL = span_mask(words_BL, L, objective.density, objective.mean_span)
    inputs = with_sentinels(tokens_BL, mask_BL, vocabulary.sentinels, vocabulary.eos)
    return inputs, with_sentinels(tokens_BL, ~mask_BL, vocabulary.sentinels, vocabulary.eos)
