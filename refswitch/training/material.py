# May import: standard library, numpy, refswitch.training (below), refswitch.engine, refswitch.data and what lies below.
"""What a run trains on and is measured by: text with its held-out part, or tasks with their validation files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refswitch.backends.protocol import Backend
from refswitch.data import (
    MixtureConfig,
    Pairs,
    TaskConfig,
    Vocabulary,
    mixture_of,
    open_corpus,
    open_pairs,
    open_stream,
    open_vocabulary,
    read_pairs,
    unigram_entropy,
    validation_batches,
)
from refswitch.data.corpus import Progress
from refswitch.data.vocabulary import digest_of
from refswitch.engine.decoding import generate
from refswitch.engine.metrics import LayerMetrics
from refswitch.engine.step import Evaluation, Setup, evaluate
from refswitch.model_config import ModelConfig
from refswitch.reference.transformer import Batch, ModelParams
from refswitch.training.config import TrainConfig
from refswitch.training.scores import check_scores, scores_of

TOKENS = "tokens"  # the folder of a run in which its text lies as tokens


class Material(NamedTuple):
    """Batches by number, and what measures a state."""

    vocabulary: Vocabulary
    digest: str  # of all that is read
    batch: Callable[[int], Batch]
    unigram_entropy: float  # nats per target token of what measures
    measure: Callable[[ModelParams, int], dict[str, Any]]  # by the parameters and the step


class Validation(NamedTuple):
    """A task's validation examples: as batches, and the targets as text."""

    task: TaskConfig
    batches: list[Batch]
    targets: list[str]


def layer_names(config: ModelConfig) -> list[str]:
    """Return the names of the sparse layers in the order of a step's metrics."""
    return [f"{stack}/{i}" for stack, sparse in (("encoder", config.encoder_sparse), ("decoder", config.decoder_sparse)) for i in sparse]


def layer_entries(names: list[str], layers: tuple[LayerMetrics, ...]) -> list[dict[str, Any]]:
    """Return the sparse layers' metrics as plain values."""
    return [
        {
            "name": name,
            "drop_rate": float(layer.dropped),
            "gate": float(layer.gate),
            "entropy": float(layer.entropy),
            "load": [float(share) for share in layer.load_E],
        }
        for name, layer in zip(names, layers, strict=True)
    ]


def joined(found: list[Evaluation], names: list[str]) -> dict[str, Any]:
    """Return loss and accuracy per target token over batches, and the mean of what their sparse layers did."""
    weight = max(sum(each.weight for each in found), 1.0)
    layers = [layer_entries(names, each.layers) for each in found]
    mean = [
        {
            "name": name,
            **{field: float(np.mean([each[i][field] for each in layers])) for field in ("drop_rate", "gate", "entropy")},
            "load": np.mean([each[i]["load"] for each in layers], axis=0).tolist(),
        }
        for i, name in enumerate(names)
    ]
    loss, correct = sum(each.cross_entropy for each in found), sum(each.correct for each in found)
    return {"loss": loss / weight, "accuracy": correct / weight, "target_tokens": int(weight), "layers": mean}


def text_material(config: TrainConfig, setup: Setup, root: Path, backend: Backend, progress: Progress, batches: int) -> Material:
    """Return the text of a configuration: trained on in one part, measured by `batches` batches of the other.

    Raises
    ------
    InputError
        In one line, whatever is wrong with the text.
    """
    corpus = open_corpus(config.data, root / TOKENS, progress)
    stream, evaluating = (open_stream(corpus, part, config.data, config.seed) for part in (corpus.train, corpus.held_out))
    held_out = [evaluating.batch(n) for n in range(batches)]
    names = layer_names(config.model)

    def measure(params: ModelParams, step: int) -> dict[str, Any]:
        return joined([evaluate(params, batch, setup, step, backend) for batch in held_out], names)

    return Material(corpus.vocabulary, corpus.digest, stream.batch, unigram_entropy(held_out), measure)


def answers_of(batch: Batch, params: ModelParams, setup: Setup, backend: Backend, vocabulary: Vocabulary) -> list[str]:
    """Return the greedy answer to each row of a batch."""
    B, L = batch.targets_BL.shape
    tokens = generate(
        batch.encoder_tokens_BM, batch.encoder_valid_BM, params, setup, backend, L, vocabulary.pad, vocabulary.eos, vocabulary.pad
    )  # fmt: skip
    answer_BL = np.stack(list(tokens), axis=1)
    return [vocabulary.decode(answer_BL[b]) for b in range(B)]


def validation_of(task: TaskConfig, pairs: Pairs, vocabulary: Vocabulary, mixture: MixtureConfig, batches: int) -> Validation:
    """Return a task's first validation examples."""
    drawn = [batch for _, batch in zip(range(batches), validation_batches(pairs, vocabulary, mixture), strict=False)]
    texts = [pair.targets for _, pair in zip(range(batches * mixture.batch), read_pairs(task, task.validation), strict=False)]
    return Validation(task, drawn, texts)


def tasks_material(config: TrainConfig, setup: Setup, backend: Backend, batches: int) -> Material:
    """Return the tasks of a configuration, measured by greedy answers to at most `batches` batches of each task's validation files.

    Raises
    ------
    InputError
        In one line, whatever is wrong with a task's files.
    """
    assert config.tasks is not None, "the configuration has tasks"
    mixture, vocabulary, names = config.tasks, open_vocabulary(config.data.vocabulary, config.data.sentinels), layer_names(config.model)
    check_scores()
    read = [open_pairs(task, task.train, vocabulary) for task in mixture.tasks]
    pairs = {task.name: open_pairs(task, task.validation, vocabulary) for task in mixture.tasks}
    validations = [validation_of(task, pairs[task.name], vocabulary, mixture, batches) for task in mixture.tasks]
    digests = [part.digest for each in (*read, *pairs.values()) for part in (each.inputs, each.targets)]

    def measure(params: ModelParams, step: int) -> dict[str, Any]:
        told: dict[str, Any] = {"tasks": {}}
        losses = []
        for validation in validations:
            found = joined([evaluate(params, batch, setup, step, backend) for batch in validation.batches], names)
            answers = [text for batch in validation.batches for text in answers_of(batch, params, setup, backend, vocabulary)]
            losses.append(found["loss"])
            told["tasks"][validation.task.name] = {"loss": found["loss"], **scores_of(answers[: len(validation.targets)], validation.targets)}
        scores = list(told["tasks"].values())
        return told | {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}

    entropy = unigram_entropy(batch for validation in validations for batch in validation.batches)
    stream = mixture_of(read, vocabulary, mixture, config.seed)
    return Material(vocabulary, digest_of(*[digest.encode() for digest in digests]), stream.batch, entropy, measure)
