# May import: standard library, numpy, refswitch.training (below), refswitch.engine, refswitch.checkpoints, refswitch.data and what lies below.
"""A run that was trained, opened again: its configuration, a checkpoint's parameters, its held-out text; evaluation and answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refswitch.backends.protocol import Backend
from refswitch.backends.registry import backend as backend_of
from refswitch.checkpoints.own import read_own
from refswitch.data import Vocabulary, open_corpus, open_stream, open_vocabulary, unigram_entropy
from refswitch.engine.decoding import Picking, generate
from refswitch.engine.step import Setup, check, evaluate, initial_state
from refswitch.errors import InputError
from refswitch.reference.transformer import ModelParams
from refswitch.training.config import TrainConfig, load_config
from refswitch.training.loop import layer_entries, layer_names, setup_of
from refswitch.training.run_folder import COMPLETE, CONFIG, RunFolder

SENTINEL = re.compile(r"<extra_id_(\d+)>")


class OpenRun(NamedTuple):
    """A run and one of its checkpoints."""

    config: TrainConfig
    setup: Setup
    folder: RunFolder
    step: int
    params: ModelParams  # as the backend stores them
    backend: Backend


class Answer(NamedTuple):
    """What a model made of a prompt."""

    prompt: str
    answer: str
    filled: str  # the prompt with the answer's spans in the places of its sentinels


def open_run(given: str, step: int | None = None) -> OpenRun:
    """Return a run by its folder, or by the folder of one of its checkpoints; the last one if none is named.

    Raises
    ------
    InputError
        Where there is no run, no checkpoint, or no such one.
    """
    path = Path(given)
    if COMPLETE.fullmatch(path.name) and (path.parent.parent / CONFIG).is_file():
        path, step = path.parent.parent, int(path.name.removeprefix("step-"))
    if not (path / CONFIG).is_file():
        raise InputError(f"{given}: is no run's folder; `refswitch train tiny` makes one, runs/tiny")
    folder = RunFolder(path)
    steps = folder.steps()
    if not steps:
        raise InputError(f"{given}: has no checkpoint yet")
    if step is not None and step not in steps:
        raise InputError(f"{given}: has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    config = load_config(str(folder.config))
    setup, backend = setup_of(config), backend_of(config.backend)
    check(setup, backend)
    model, params = read_own(folder.checkpoint(step))
    if model != config.model:
        raise InputError(f"{folder.checkpoint(step)}: holds another architecture ({model.name}) than {folder.config}")
    return OpenRun(config, setup, folder, step, initial_state(params, setup, backend).params, backend)


def evaluate_run(run: OpenRun, batches: int) -> dict[str, Any]:
    """Return what a checkpoint achieves on held-out text: loss and accuracy per target token, the unigram entropy, and every sparse layer."""
    corpus = open_corpus(run.config.data, run.folder.root / "tokens")
    stream = open_stream(corpus, corpus.held_out, run.config.data, run.config.seed)
    drawn = [stream.batch(n) for n in range(batches)]
    found = [evaluate(run.params, batch, run.setup, run.step, run.backend) for batch in drawn]
    weight = max(sum(each.weight for each in found), 1.0)
    names = layer_names(run.config.model)
    layers = [layer_entries(names, each.layers) for each in found]
    return {
        "step": run.step,
        "loss": sum(each.cross_entropy for each in found) / weight,
        "accuracy": sum(each.correct for each in found) / weight,
        "target_tokens": int(weight),
        "unigram_entropy": unigram_entropy(drawn),
        "corpus": corpus.digest,
        "layers": [
            {"name": name, **{field: float(np.mean([each[i][field] for each in layers])) for field in ("drop_rate", "gate", "entropy")},
             "load": np.mean([each[i]["load"] for each in layers], axis=0).tolist()}
            for i, name in enumerate(names)
        ],
    }  # fmt: skip


def prompt_ids(prompt: str, vocabulary: Vocabulary) -> np.ndarray:
    """Return a prompt's tokens; <extra_id_0>, <extra_id_1>, ... are sentinels, the places to fill.

    Raises
    ------
    InputError
        For a sentinel that the vocabulary does not have.
    """
    parts: list[np.ndarray] = []
    end = 0
    for found in SENTINEL.finditer(prompt):
        number = int(found[1])
        if number >= len(vocabulary.sentinels):
            raise InputError(f"{found[0]}: the vocabulary has {len(vocabulary.sentinels)} sentinels, from <extra_id_0>")
        parts += [vocabulary.encode(prompt[end : found.start()]), vocabulary.sentinels[number : number + 1]]
        end = found.end()
    return np.concatenate([*parts, vocabulary.encode(prompt[end:]), [vocabulary.eos]]).astype(np.int64)


def filled_in(prompt: str, answer: str) -> str:
    """Return the prompt with each sentinel replaced by what follows it in the answer; one that the answer leaves out stays."""
    marks = list(SENTINEL.finditer(answer))
    ends = [mark.start() for mark in marks[1:]] + [len(answer)]
    spans = {mark[0]: answer[mark.end() : end] for mark, end in zip(marks, ends, strict=True)}
    return SENTINEL.sub(lambda mark: spans.get(mark[0], mark[0]), prompt)


def held_out_prompts(run: OpenRun, count: int) -> list[str]:
    """Return inputs of the held-out text as the model was trained to read them."""
    corpus = open_corpus(run.config.data, run.folder.root / "tokens")
    batch = open_stream(corpus, corpus.held_out, run.config.data, run.config.seed).batch(0)
    return [corpus.vocabulary.decode(row) for row in batch.encoder_tokens_BM[:count]]


def answers(run: OpenRun, prompts: list[str], length: int, picking: Picking, seed: int) -> Iterator[Answer]:
    """Yield the model's answer to each prompt.

    Raises
    ------
    InputError
        For a prompt that holds a sentinel of none.
    """
    vocabulary = open_vocabulary(run.config.data.vocabulary, run.config.data.sentinels)
    for number, prompt in enumerate(prompts):
        ids_M = prompt_ids(prompt, vocabulary)
        valid_BM = np.ones((1, len(ids_M)), bool)
        setup = run.setup._replace(seed=seed + number)
        tokens = generate(ids_M[None], valid_BM, run.params, setup, run.backend, length, vocabulary.pad, vocabulary.eos, vocabulary.pad, picking)
        answer = vocabulary.decode([int(token_B[0]) for token_B in tokens])
        yield Answer(prompt, answer, filled_in(prompt, answer))
