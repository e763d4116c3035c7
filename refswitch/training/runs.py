# May import: standard library, numpy, refswitch.training (below), refswitch.engine, refswitch.checkpoints, refswitch.data and what lies below.
"""A run that was trained, opened again: its configuration and a checkpoint's parameters; as a teacher, or to answer prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refswitch.backends.protocol import Backend
from refswitch.backends.registry import backend as backend_of
from refswitch.checkpoints.models import read_model
from refswitch.checkpoints.own import read_own
from refswitch.data import Vocabulary, open_corpus, open_stream, open_vocabulary
from refswitch.engine.decoding import Picking, generate
from refswitch.engine.optimizer import Optimizer
from refswitch.engine.step import Setup, check, initial_state, logits_of
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.precision import precision
from refswitch.reference.transformer import Batch, ModelParams
from refswitch.training.config import TrainConfig, load_config
from refswitch.training.material import TOKENS, Material, tasks_material, text_material
from refswitch.training.run_folder import COMPLETE, CONFIG, RunFolder

LAYOUT = "data=1,expert=1,model=1"
SENTINEL = re.compile(r"<extra_id_(\d+)>")


class OpenRun(NamedTuple):
    """A run and one of its checkpoints."""

    config: TrainConfig
    setup: Setup
    folder: RunFolder
    step: int
    params: ModelParams  # as the backend stores them
    backend: Backend


class Teacher(NamedTuple):
    """A model whose distribution is learnt from."""

    setup: Setup
    params: ModelParams
    backend: Backend  # its own, whose buffers the student's step does not reuse

    def logits(self, batch: Batch, step: int) -> np.ndarray:
        """Return its logits_BLV, without dropout and with the capacity of evaluation."""
        return logits_of(self.params, batch, self.setup, step, self.backend)


class Answer(NamedTuple):
    """What a model made of a prompt."""

    prompt: str
    answer: str
    filled: str  # the prompt with the answer's spans in the places of its sentinels


def setup_of(config: TrainConfig) -> Setup:
    """Return what the engine keeps from step to step."""
    chosen, loss, distill = config.optimizer, config.loss, config.distill
    return Setup(
        config=config.model,
        setting=precision(config.precision),
        optimizer=Optimizer(chosen.name, chosen.expert_rule, chosen.weight_decay, chosen.clip_norm),
        seed=config.seed,
        loss_denominator=loss.denominator,
        label_smoothing=loss.label_smoothing,
        logits_z_coef=loss.logits_z_coef,
        microbatches=config.microbatches,
        recompute=config.recompute,
        soft_share=distill.soft_share if distill is not None else 0.0,
        temperature=distill.temperature if distill is not None else 1.0,
    )


def place_of(given: str, step: int | None = None) -> tuple[RunFolder, int]:
    """Return a run's folder and a step of which it has a checkpoint: the named one, else the best, else the last.

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
    steps, best = folder.steps(), folder.best()
    if not steps:
        raise InputError(f"{given}: has no checkpoint yet")
    if step is not None and step not in steps:
        raise InputError(f"{given}: has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return folder, step if step is not None else best.step if best is not None else steps[-1]


def open_run(given: str, step: int | None = None) -> OpenRun:
    """Return a run by its folder, or by the folder of one of its checkpoints; the best one if none is named.

    Raises
    ------
    InputError
        As `place_of`, and where the checkpoint is damaged or of another architecture.
    """
    folder, step = place_of(given, step)
    config = load_config(str(folder.config))
    setup, backend = setup_of(config), backend_of(config.backend, config.threads or None)
    check(setup, backend)
    params = params_of(str(folder.checkpoint(step)), config.model)
    return OpenRun(config, setup, folder, step, initial_state(params, setup, backend).params, backend)


def params_of(given: str, expected: ModelConfig | None = None) -> ModelParams:
    """Return the parameters of a run, of one of its checkpoints, or of a model's folder.

    Raises
    ------
    InputError
        Where there are none, or the architecture is not the expected one.
    """
    if (Path(given) / "checkpoints").is_dir() or COMPLETE.fullmatch(Path(given).name):
        folder, step = place_of(given)
        model, params = read_own(folder.checkpoint(step))
    else:
        model, params = read_model(given)
    if expected is not None and not same_architecture(model, expected):
        raise InputError(f"{given}: holds another architecture ({model.name}) than the configuration's model ({expected.name})")
    return params


def same_architecture(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two models have the same parameters: everything but their names, dropout and dialect is equal."""
    own = {"name", "dropout", "expert_dropout", "dialect"}
    return all(getattr(one, field) == getattr(other, field) for field in ModelConfig.__dataclass_fields__ if field not in own)


def open_teacher(config: TrainConfig) -> Teacher | None:
    """Return the teacher that a configuration names, or None.

    Raises
    ------
    InputError
        Where there is no such run, or its vocabulary is another.
    """
    if config.distill is None:
        return None
    run = open_run(config.distill.teacher)
    if run.config.model.vocabulary != config.model.vocabulary or run.config.data.vocabulary != config.data.vocabulary:
        raise InputError(f"distill.teacher={config.distill.teacher}: reads another vocabulary than the student")
    return Teacher(run.setup, run.params, run.backend)


def material_of(run: OpenRun, batches: int) -> Material:
    """Return what measures a run, with so many batches."""
    if run.config.tasks is not None:
        return tasks_material(run.config, run.setup, run.backend, batches)
    return text_material(run.config, run.setup, run.folder.root, run.backend, lambda _done, _total: None, batches)


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
    ends = [mark.start() for mark in marks[1:]] + [len(answer)] * bool(marks)
    spans = {mark[0]: answer[mark.end() : end] for mark, end in zip(marks, ends, strict=True)}
    return SENTINEL.sub(lambda mark: spans.get(mark[0], mark[0]), prompt)


def held_out_prompts(run: OpenRun, count: int) -> list[str]:
    """Return inputs of the held-out text as the model was trained to read them."""
    corpus = open_corpus(run.config.data, run.folder.root / TOKENS)
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
        tokens = generate(
            ids_M[None], valid_BM, run.params, setup, run.backend, length, vocabulary.pad, vocabulary.eos, vocabulary.pad, picking
        )  # fmt: skip
        answer = vocabulary.decode([int(token_B[0]) for token_B in tokens])
        yield Answer(prompt, answer, filled_in(prompt, answer))
