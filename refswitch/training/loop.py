# May import: standard library, numpy, refswitch.training (below), refswitch.engine, refswitch.backends, refswitch.data and what lies below.
"""A training run: batches by number, a step after the other, and on the way metrics, evaluations, checkpoints and pictures.

Everything that decides a number is a function of (configuration, what is read, step), so a run that was killed at any moment goes on from its last
checkpoint to the same bits. Pre-training, fine-tuning and distillation are the same loop over other material, first parameters and objective.
Spec: contract 5; the chapter on training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from refswitch.backends.protocol import Backend
from refswitch.backends.registry import backend as backend_of
from refswitch.engine.step import NonFiniteError, Setup, StepMetrics, TrainState, check, initial_state, train_step
from refswitch.errors import InputError
from refswitch.model_init import initial_params, student_from_teacher
from refswitch.reference.schedule import constant, inverse_square_root, linear
from refswitch.reference.transformer import Batch, ModelParams
from refswitch.training.board import open_board
from refswitch.training.checkpoint import load_checkpoint, prune, save_checkpoint
from refswitch.training.config import OptimizerConfig, TrainConfig, first_difference, hash_of, load_config, to_yaml
from refswitch.training.material import Material, layer_entries, layer_names, tasks_material, text_material
from refswitch.training.non_finite import first_operation, keep_batch
from refswitch.training.pictures import draw
from refswitch.training.run_folder import Best, RunFolder, opened, read_metrics, rewind_metrics, write_whole
from refswitch.training.runs import LAYOUT, Teacher, open_teacher, params_of, setup_of
from refswitch.tree import leaves

LOWER_IS_BETTER = ("loss",)


class Facts(NamedTuple):
    """What is known before the first step."""

    config: TrainConfig
    config_hash: str
    parameters: int
    material: str  # the digest of what is read
    unigram_entropy: float  # nats per target token of what evaluates
    start: int  # updates made before
    run_dir: Path


class Outcome(NamedTuple):
    """How a run ended."""

    step: int
    held_out_loss: float | None
    unigram_entropy: float
    best: Best | None
    interrupted: bool
    page: Path


class Reporter(Protocol):
    """Who tells the user."""

    def reading(self, done: int, total: int) -> None:
        """The text is being read: bytes done and in all."""

    def started(self, facts: Facts) -> None:
        """The first step is about to begin."""

    def stepped(self, entry: dict[str, Any]) -> None:
        """A step was made; the entry is its line of metrics."""

    def saved(self, place: Path) -> None:
        """A checkpoint is complete."""

    def wants_to_stop(self) -> bool:
        """Whether the user asked for an end after this step."""


class Run(NamedTuple):
    """What a run works with."""

    config: TrainConfig
    setup: Setup
    folder: RunFolder
    material: Material
    teacher: Teacher | None
    backend: Backend


def learning_rate(step: int, optimizer: OptimizerConfig, steps: int) -> float:
    """Return the rate of the update that follows `step` updates."""
    if optimizer.schedule == "inverse_square_root":
        return inverse_square_root(step, optimizer.warm_up, optimizer.rate)
    if optimizer.schedule == "linear":
        return linear(step, optimizer.rate, steps, optimizer.warm_up)
    return constant(step, optimizer.rate, optimizer.warm_up)


def check_vocabulary(config: TrainConfig, material: Material) -> None:
    """Refuse a model that cannot hold the text's tokens."""
    if config.model.vocabulary < material.vocabulary.size:
        raise InputError(
            f"model.vocabulary={config.model.vocabulary}: data.vocabulary={config.data.vocabulary} has {material.vocabulary.size} ids; "
            f"say model.vocabulary={-(-material.vocabulary.size // 128) * 128}"
        )


def check_folder(folder: RunFolder, config: TrainConfig, resume: bool) -> None:
    """Refuse to begin where a run stands, or to go on under another configuration."""
    if folder.config.is_file():
        if not resume:
            raise InputError(
                f"run_dir {folder.root}: holds a run already (step {max(folder.steps(), default=0)}); "
                "--resume goes on with it, run_dir=... begins another"
            )
        difference = first_difference(load_config(str(folder.config)), config)
        if difference is not None:
            raise InputError(f"run_dir {folder.root}: holds a run of another configuration: {difference}")
    elif resume:
        raise InputError(f"run_dir {folder.root}: holds no run to resume")


def entry_of(step: int, rate: float, told: StepMetrics, names: list[str], batch: Batch, seconds: float) -> dict[str, Any]:
    """Return a step's line of metrics."""
    layers = layer_entries(names, told.layers)
    return {
        "step": step,
        "loss": float(told.losses.objective),
        "cross_entropy": float(told.losses.cross_entropy),
        "aux_loss": float(told.losses.aux_loss),
        "z_loss": float(told.losses.z_loss),
        "gradient_norm": float(told.gradient_norm),
        "learning_rate": rate,
        "target_tokens": int(told.target_weight),
        "tokens": int(batch.encoder_valid_BM.sum() + batch.decoder_valid_BL.sum()),
        "drop_rate": sum(layer["drop_rate"] for layer in layers) / max(len(layers), 1),
        "largest_load": max((max(layer["load"]) * len(layer["load"]) for layer in layers), default=1.0),  # 1 where all experts have equally much
        "layers": layers,
        "seconds": seconds,
    }


def first_params(config: TrainConfig) -> ModelParams:
    """Return the parameters that a run begins with: drawn, those of another run, or a teacher's outside the sparse layers."""
    if config.start:
        return params_of(config.start, config.model)
    drawn = initial_params(config.model, config.seed, config.init)
    if config.distill is not None and config.distill.from_teacher:
        return student_from_teacher(params_of(config.distill.teacher), drawn)
    return drawn


def first_state(run: Run, resume: bool) -> TrainState:
    """Return the state of the last checkpoint, or of a run that begins."""
    steps = run.folder.steps()
    if resume and steps:
        return load_checkpoint(run.folder.checkpoint(steps[-1]), run.setup, hash_of(run.config), run.material.digest, run.backend)
    return initial_state(first_params(run.config), run.setup, run.backend)


def append(file: IO[str], entry: dict[str, Any]) -> None:
    """Write a line of metrics, so that it is there if the process is killed."""
    try:
        file.write(json.dumps(entry) + "\n")
        file.flush()
    except OSError as error:
        raise InputError(f"{file.name}: cannot be written: {error.strerror}") from None


def save(run: Run, state: TrainState) -> Path:
    """Write a checkpoint if there is none of this step."""
    place = run.folder.checkpoint(state.step)
    return place if place.exists() else save_checkpoint(run.folder, state, run.setup, hash_of(run.config), run.material.digest)


def stepped(run: Run, state: TrainState, batch: Batch, rate: float) -> tuple[TrainState, StepMetrics]:
    """Make a step; where its loss is no number keep the batch and say where that began."""
    try:
        teacher_BLV = run.teacher.logits(batch, state.step) if run.teacher is not None else None
        return train_step(state, batch, run.setup, rate, run.backend, teacher_BLV=teacher_BLV)
    except NonFiniteError as error:
        place = keep_batch(run.folder, state.step, batch)
        operation = first_operation(state, batch, run.setup, run.backend)
        where = f", by {operation}" if operation else ""
        raise InputError(f"{error}{where}; the batch is in {place}, the state before it in {save(run, state)}") from None


def is_better(told: dict[str, Any], name: str, best: Best | None) -> bool:
    """Whether an evaluation is the best so far."""
    return best is None or (told[name] < best.value if name in LOWER_IS_BETTER else told[name] > best.value)


def steps_of(
    run: Run, state: TrainState, reporter: Reporter, write: Callable[[dict[str, Any]], None], seconds: float
) -> tuple[TrainState, Best | None, bool]:
    """Make the steps that are left; return the last state, the best checkpoint, and whether the user stopped before the end."""
    config, begun, names, best = run.config, time.monotonic() - seconds, layer_names(run.config.model), run.folder.best()
    while state.step < config.steps:
        batch, rate = run.material.batch(state.step), learning_rate(state.step, config.optimizer, config.steps)
        state, told = stepped(run, state, batch, rate)
        entry = entry_of(state.step, rate, told, names, batch, time.monotonic() - begun)
        stop, is_last, improved = reporter.wants_to_stop(), state.step == config.steps, False
        if state.step % config.eval_every == 0 or is_last:
            entry["eval"] = run.material.measure(state.params, state.step)
            improved = is_better(entry["eval"], config.best, best)
        write(entry)
        reporter.stepped(entry)
        if state.step % config.checkpoint_every == 0 or is_last or stop or improved:
            reporter.saved(save(run, state))
        if improved:
            best = run.folder.keep_best(Best(state.step, config.best, entry["eval"][config.best]))
        prune(run.folder, config.keep)
        if stop and not is_last:
            return state, best, True
    return state, best, False


def train(config: TrainConfig, reporter: Reporter, resume: bool = False) -> Outcome:
    """Train to the end, or until the reporter wants to stop.

    Raises
    ------
    InputError
        In one line, whatever is wrong with configuration, text, folder or checkpoint; also where the loss is no number. Nothing is lost.
    """
    if config.layout != LAYOUT:
        raise InputError(f"layout={config.layout}: one process trains as {LAYOUT}")
    setup, backend = setup_of(config), backend_of(config.backend, config.threads or None)
    check(setup, backend)
    with opened(Path(config.run_dir)) as folder:
        check_folder(folder, config, resume)
        if config.tasks is None:
            material = text_material(config, setup, folder.root, backend, reporter.reading, config.eval_batches)
        else:
            material = tasks_material(config, setup, backend, config.eval_batches)
        check_vocabulary(config, material)
        run = Run(config, setup, folder, material, open_teacher(config), backend)
        state = first_state(run, resume)
        write_whole(folder.config, to_yaml(config))  # nothing was wrong: only now does the folder hold a run
        entries = rewind_metrics(folder.metrics, state.step)
        parameters = sum(leaf.size for leaf in leaves(state.params).values())
        facts = Facts(config, hash_of(config), parameters, material.digest, material.unigram_entropy, state.step, folder.root)
        reporter.started(facts)
        with folder.metrics.open("a", encoding="utf-8") as file:
            seconds, board = entries[-1]["seconds"] if entries else 0.0, open_board(folder.root, state.step) if config.tensorboard else None

            def write(entry: dict[str, Any]) -> None:
                append(file, entry)
                if board is not None:
                    board(entry)

            state, best, interrupted = steps_of(run, state, reporter, write, seconds)
        return finish(run, facts, state, best, interrupted)


def finish(run: Run, facts: Facts, state: TrainState, best: Best | None, interrupted: bool) -> Outcome:
    """Draw the pictures and say how the run ended."""
    entries, config = read_metrics(run.folder.metrics, state.step), run.config
    loss = next((entry["eval"]["loss"] for entry in reversed(entries) if "eval" in entry), None)
    rows = [
        ("step", f"{state.step} of {config.steps}"),
        ("held-out loss", f"{loss:.4f} nats per target token" if loss is not None else "not evaluated yet"),
        ("unigram entropy of the held-out targets", f"{facts.unigram_entropy:.4f} nats per target token"),
        ("best checkpoint", f"step {best.step}, {best.metric} {best.value:.4f}" if best is not None else "none yet"),
        ("parameters", f"{facts.parameters:,}"),
        ("model", f"{config.model.name}, {config.model.experts} experts, dialect {config.model.dialect}"),
        ("text", facts.material),
        ("configuration", f"{facts.config_hash}; backend {config.backend}, precision {config.precision}, seed {config.seed}"),
    ]
    pages = draw(run.folder, entries, f"Run {config.name}", rows, facts.unigram_entropy)
    return Outcome(state.step, loss, facts.unigram_entropy, best, interrupted, pages[-1])
