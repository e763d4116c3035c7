# May import: standard library, numpy, refswitch.data (all of it but cleaning, objective), refswitch.reference, refswitch.numbers, refswitch.errors.
"""Text-to-text tasks: pairs from files, mixed by rates, each task in its own order by address. Paper: 4.2 and T5's mixtures [`rate_num_examples`].

Example k of a mixture belongs to a task that is drawn for k, and is that task's next one: every example of a task comes once before any comes twice.
Inputs and targets that are too long are cut and still end with an end-of-sequence [`append_eos_after_trim`].
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refswitch.data.config import MixtureConfig, TaskConfig
from refswitch.data.corpus import Part as Store
from refswitch.data.corpus import Tokens
from refswitch.data.examples import Part
from refswitch.data.segments import ramp
from refswitch.data.shuffle import shuffled
from refswitch.data.sources import find_sources, is_json_lines, json_records, lines
from refswitch.data.spans import Ragged
from refswitch.data.stream import Stream
from refswitch.data.vocabulary import Vocabulary
from refswitch.errors import InputError
from refswitch.numbers.philox import Purpose, random_bits, site_of
from refswitch.reference.transformer import Batch

MIXING = site_of(3, Purpose.DATA_ORDER)
FIRST_TASK = 8  # the layers of the sites of the tasks' orders
WINDOW = 1 << 11  # examples that are drawn together
KEPT_WINDOWS = 16


class Pair(NamedTuple):
    """One example of a task, as text; the prefix stands before the inputs."""

    inputs: str
    targets: str


class Pairs(NamedTuple):
    """The examples of a task as tokens."""

    name: str
    inputs: Tokens
    targets: Tokens


def table_records(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the named columns of a table with tabs, whose first line names its columns; nothing is quoted, a blank line is skipped."""
    columns: list[str] = []
    where: list[int] = []
    for number, line in enumerate(lines(path), 1):
        cells = line.split("\t")
        if not columns:
            columns = cells
            if missing := [field for field in fields if field not in columns]:
                raise InputError(f"{path}, line 1: has no column {missing[0]!r}; it has {', '.join(columns)[:200]}")
            where = [columns.index(field) for field in fields]
        elif line:
            if len(cells) != len(columns):
                raise InputError(f"{path}, line {number}: has {len(cells)} columns, and the first line {len(columns)}")
            yield tuple(cells[i] for i in where)


def read_pairs(task: TaskConfig, sources: tuple[str, ...]) -> Iterator[Pair]:
    """Yield the pairs of a task's files, in their order.

    Parameters
    ----------
    task : TaskConfig
        The prefix, and which fields are inputs and targets.
    sources : tuple of str
        `task.train` or `task.validation`.

    Yields
    ------
    Pair
        Text, as a metric compares it.

    Raises
    ------
    InputError
        Where a file is missing or damaged, or a line lacks a field.
    """
    if not sources:
        raise InputError(f"task {task.name}: no file is named")
    for source in find_sources(sources):
        reader = json_records if is_json_lines(source.path) else table_records
        for inputs, targets in reader(source.path, (task.inputs, task.targets)):
            yield Pair(task.prefix + inputs, targets)


def open_pairs(task: TaskConfig, sources: tuple[str, ...], vocabulary: Vocabulary) -> Pairs:
    """Return a task's examples as tokens, in files without a name that end with the process.

    Raises
    ------
    InputError
        As `read_pairs`, and where there is no example.
    """
    dtype = "<u2" if vocabulary.size <= 1 << 16 else "<u4"
    with tempfile.TemporaryFile() as a, tempfile.TemporaryFile() as b, tempfile.TemporaryFile() as c, tempfile.TemporaryFile() as d:
        inputs, targets = Store(a, b, dtype), Store(c, d, dtype)
        for pair in read_pairs(task, sources):
            inputs.add(vocabulary.encode(pair.inputs))
            targets.add(vocabulary.encode(pair.targets))
        if not inputs.documents:
            raise InputError(f"task {task.name}: has no example")
        return Pairs(task.name, inputs.finish(), targets.finish())


def shares_of(sizes: list[int], limit: int, exponent: float) -> np.ndarray:
    """Return how often each task is drawn: min(size, limit) ** exponent, over their sum. T5's temperature is 1 / exponent."""
    rate = np.array([min(size, limit or size) for size in sizes], np.float64) ** exponent
    return rate / rate.sum()


def texts(tokens: Tokens, item: np.ndarray, longest: int, eos: int) -> Ragged:
    """Return some texts, cut so that they end inside `longest` with their end-of-sequence."""
    end = np.asarray(tokens.end_I)[item]
    start = np.where(item > 0, np.asarray(tokens.end_I)[item - 1], 0)
    length = np.minimum(end - start, longest - 1)
    flat = np.full(int(length.sum()) + len(item), eos, np.int64)
    flat[np.arange(len(flat) - len(item)) + np.repeat(np.arange(len(item)), length)] = tokens.ids_N[np.repeat(start, length) + ramp(length)]
    return Ragged(flat, length + 1)


class Mixture:
    """The examples of several tasks: an endless sequence, as `Examples` asks for."""

    def __init__(self, tasks: list[Pairs], vocabulary: Vocabulary, config: MixtureConfig, seed: int) -> None:
        self.tasks, self.eos, self.pad, self.seed = tasks, vocabulary.eos, vocabulary.pad, seed
        self.inputs_length, self.targets_length = config.inputs_length, config.targets_length
        self.sizes = [len(task.inputs.end_I) for task in tasks]
        self.shares = shares_of(self.sizes, config.limit, config.exponent)
        self.bounds = np.round(np.cumsum(self.shares) * 2.0**32).astype(np.uint64)[:-1]  # the last task has what remains
        self.before = [np.zeros(len(tasks), np.int64)]  # how many of each task stand before each window
        self.windows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def drawn(self, window: int) -> np.ndarray:
        """Return the task of each example of a window."""
        words = random_bits(self.seed, 0, MIXING, range(window * WINDOW, (window + 1) * WINDOW))
        return np.searchsorted(self.bounds, words.astype(np.uint64), side="right")

    def window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return task and item of each example of a window; the windows before it are counted, not read."""
        if number not in self.windows:
            while len(self.before) <= number:
                self.before.append(self.before[-1] + np.bincount(self.drawn(len(self.before) - 1), minlength=len(self.tasks)))
            task = self.drawn(number)
            item = np.empty(WINDOW, np.int64)
            for which, size in enumerate(self.sizes):
                mine = np.flatnonzero(task == which)
                visit = self.before[number][which] + np.arange(len(mine))
                for epoch in np.unique(visit // size).tolist():
                    inside = visit // size == epoch
                    site = site_of(FIRST_TASK + which, Purpose.DATA_ORDER)
                    item[mine[inside]] = shuffled(visit[inside] % size, size, self.seed, epoch, site)
            if len(self.windows) >= KEPT_WINDOWS:
                del self.windows[next(iter(self.windows))]
            self.windows[number] = task, item
        return self.windows[number]

    def located(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return task and item of some examples."""
        task, item = np.empty_like(number), np.empty_like(number)
        for window in np.unique(number // WINDOW).tolist():
            inside = number // WINDOW == window
            known = self.window(window)
            task[inside], item[inside] = (array[number[inside] - window * WINDOW] for array in known)
        return task, item

    def lengths(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lengths of some examples' inputs and targets."""
        task, item = self.located(number)
        found = np.empty_like(number), np.empty_like(number)
        for which, pairs in enumerate(self.tasks):
            mine = task == which
            for length, tokens, longest in zip(found, pairs[1:], (self.inputs_length, self.targets_length), strict=True):
                begin = np.concatenate([np.zeros(1, np.int64), tokens.end_I[:-1]])
                length[mine] = np.minimum((tokens.end_I - begin)[item[mine]], longest - 1) + 1
        return found

    def parts(self, number: np.ndarray) -> Iterator[Part]:
        """Yield some examples, those of one task together."""
        task, item = self.located(number)
        for which, pairs in enumerate(self.tasks):
            mine = np.flatnonzero(task == which)
            if mine.size:
                inputs = texts(pairs.inputs, item[mine], self.inputs_length, self.eos)
                yield Part(mine, inputs, texts(pairs.targets, item[mine], self.targets_length, self.eos))


class InOrder:
    """The examples of one task in the order of its files, and nothing behind the last."""

    def __init__(self, pairs: Pairs, vocabulary: Vocabulary, config: MixtureConfig) -> None:
        self.pairs, self.eos, self.pad = pairs, vocabulary.eos, vocabulary.pad
        self.inputs_length, self.targets_length = config.inputs_length, config.targets_length

    def lengths(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lengths of some examples' inputs and targets, 0 behind the last."""
        inputs, targets = np.zeros_like(number), np.zeros_like(number)
        for part in self.parts(number):
            inputs[part.which], targets[part.which] = part.inputs.length_B, part.targets.length_B
        return inputs, targets

    def parts(self, number: np.ndarray) -> Iterator[Part]:
        """Yield some examples."""
        which = np.flatnonzero(number < len(self.pairs.inputs.end_I))
        item = number[which]
        inputs = texts(self.pairs.inputs, item, self.inputs_length, self.eos)
        yield Part(which, inputs, texts(self.pairs.targets, item, self.targets_length, self.eos))


def open_mixture(config: MixtureConfig, vocabulary: Vocabulary, seed: int) -> Stream:
    """Return the training batches of a mixture of tasks.

    Parameters
    ----------
    config : MixtureConfig
        The tasks, their rates, the shapes.
    vocabulary : Vocabulary
        The model's.
    seed : int, [0, 2**64)
        The run's seed.

    Returns
    -------
    Stream
        Endless, as `open_stream` returns it.

    Raises
    ------
    InputError
        As `open_pairs`.
    """
    return mixture_of([open_pairs(task, task.train, vocabulary) for task in config.tasks], vocabulary, config, seed)


def mixture_of(tasks: list[Pairs], vocabulary: Vocabulary, config: MixtureConfig, seed: int) -> Stream:
    """Return the training batches of tasks that are open already, in the order of the configuration."""
    return Stream(Mixture(tasks, vocabulary, config, seed), config.batch, config.pack)


def validation_batches(pairs: Pairs, vocabulary: Vocabulary, config: MixtureConfig) -> Iterator[Batch]:
    """Yield a task's examples once, in the order of its files, one to a row; the last batch's rest is padding."""
    stream = Stream(InOrder(pairs, vocabulary, config), config.batch, pack=False)
    for n in range(-(-len(pairs.inputs.end_I) // config.batch)):
        yield stream.batch(n)
