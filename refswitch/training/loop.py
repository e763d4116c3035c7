# May import: standard library, numpy, refswitch.training (below), refswitch.engine, refswitch.backends, refswitch.data and what lies below.
"""A training run: batches by number, a step after the other, and on the way metrics, evaluations, checkpoints and pictures.

Everything that decides a number is a function of (configuration, corpus, step), so a run that was killed at any moment goes on from its last
checkpoint to the same bits. Spec: contract 5; the chapter on training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from refswitch.backends.protocol import Backend
from refswitch.backends.registry import backend as backend_of
from refswitch.data import Corpus, Stream, open_corpus, open_stream, unigram_entropy
from refswitch.engine.metrics import LayerMetrics
from refswitch.engine.optimizer import Optimizer
from refswitch.engine.step import NonFiniteError, Setup, StepMetrics, TrainState, check, evaluate, initial_state, train_step
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.model_init import initial_params
from refswitch.precision import precision
from refswitch.reference.schedule import constant, inverse_square_root, linear
from refswitch.reference.transformer import Batch, ModelParams
from refswitch.training.checkpoint import load_checkpoint, save_checkpoint
from refswitch.training.config import OptimizerConfig, TrainConfig, as_tree, first_difference, hash_of, load_config, to_yaml
from refswitch.training.non_finite import first_operation, keep_batch
from refswitch.training.pictures import draw
from refswitch.training.run_folder import RunFolder, opened, read_metrics, rewind_metrics, write_whole

LAYOUT = "data=1,expert=1,model=1"


class Facts(NamedTuple):
    """What is known before the first step."""

    config: TrainConfig
    config_hash: str
    parameters: int
    corpus: str  # the digest of its text
    unigram_entropy: float  # nats per target token of the batches that evaluate
    start: int  # updates made before
    run_dir: Path


class Outcome(NamedTuple):
    """How a run ended."""

    step: int
    held_out_loss: float | None
    unigram_entropy: float
    interrupted: bool
    page: Path


class Reporter(Protocol):
    """Who tells the user."""

    def reading(self, done: int, total: int) -> None:
        """The corpus is being read: bytes done and in all."""

    def started(self, facts: Facts) -> None:
        """The first step is about to begin."""

    def stepped(self, entry: dict[str, Any]) -> None:
        """A step was made; the entry is its line of metrics."""

    def saved(self, place: Path) -> None:
        """A checkpoint is complete."""

    def wants_to_stop(self) -> bool:
        """Whether the user asked for an end after this step."""


def setup_of(config: TrainConfig) -> Setup:
    """Return what the engine keeps from step to step."""
    chosen = config.optimizer
    optimizer = Optimizer(chosen.name, chosen.expert_rule, chosen.weight_decay, chosen.clip_norm)
    loss = config.loss
    return Setup(
        config.model, precision(config.precision), optimizer, config.seed, loss.denominator, loss.label_smoothing, loss.logits_z_coef,
        config.microbatches, config.recompute,
    )  # fmt: skip


def learning_rate(step: int, optimizer: OptimizerConfig, steps: int) -> float:
    """Return the rate of the update that follows `step` updates."""
    if optimizer.schedule == "inverse_square_root":
        return inverse_square_root(step, optimizer.warm_up, optimizer.rate)
    if optimizer.schedule == "linear":
        return linear(step, optimizer.rate, steps, optimizer.warm_up)
    return constant(step, optimizer.rate, optimizer.warm_up)


def check_model(config: TrainConfig, corpus: Corpus) -> None:
    """Refuse a model that cannot hold the text's tokens."""
    if config.model.vocabulary < corpus.vocabulary.size:
        raise InputError(
            f"model.vocabulary={config.model.vocabulary}: data.vocabulary={config.data.vocabulary} has {corpus.vocabulary.size} ids; "
            f"say model.vocabulary={-(-corpus.vocabulary.size // 128) * 128}"
        )


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


def entry_of(step: int, rate: float, told: StepMetrics, names: list[str], batch: Batch, seconds: float) -> dict[str, Any]:
    """Return a step's line of metrics."""
    layers = layer_entries(names, told.layers)
    tokens = int(batch.encoder_valid_BM.sum() + batch.decoder_valid_BL.sum())
    balance = max((max(layer["load"]) * len(layer["load"]) for layer in layers), default=1.0)
    return {
        "step": step,
        "loss": float(told.losses.objective),
        "cross_entropy": float(told.losses.cross_entropy),
        "aux_loss": float(told.losses.aux_loss),
        "z_loss": float(told.losses.z_loss),
        "gradient_norm": float(told.gradient_norm),
        "learning_rate": rate,
        "target_tokens": int(told.target_weight),
        "tokens": tokens,
        "drop_rate": sum(layer["drop_rate"] for layer in layers) / max(len(layers), 1),
        "largest_load": balance,  # of all layers' experts; 1 where all have equally much
        "layers": layers,
        "seconds": seconds,
    }


def held_out(params: ModelParams, batches: list[Batch], setup: Setup, step: int, backend: Backend) -> dict[str, Any]:
    """Return the loss and accuracy on held-out batches, in nats per target token."""
    sums = [evaluate(params, batch, setup, step, backend) for batch in batches]
    weight = max(sum(each.weight for each in sums), 1.0)
    loss = sum(each.cross_entropy for each in sums) / weight
    return {
        "loss": loss,
        "accuracy": sum(each.correct for each in sums) / weight,
        "target_tokens": int(weight),
    }


def check_folder(folder: RunFolder, config: TrainConfig, resume: bool) -> None:
    """Refuse to begin where a run stands, or to go on under another configuration."""
    if folder.config.is_file():
        before = load_config(str(folder.config))
        difference = first_difference(before, config)
        if not resume:
            raise InputError(
                f"run_dir {folder.root}: holds a run already (step {max(folder.steps(), default=0)}); "
                "--resume goes on with it, run_dir=... begins another"
            )
        if difference is not None:
            raise InputError(f"run_dir {folder.root}: holds a run of another configuration: {difference}")
    elif resume:
        raise InputError(f"run_dir {folder.root}: holds no run to resume")


class Run(NamedTuple):
    """What a run works with."""

    config: TrainConfig
    setup: Setup
    folder: RunFolder
    corpus: Corpus
    stream: Stream
    eval_batches: list[Batch]
    backend: Backend
    names: list[str]


def first_state(run: Run, resume: bool) -> TrainState:
    """Return the state of the last checkpoint, or of a run that begins."""
    steps = run.folder.steps()
    if resume and steps:
        place = run.folder.checkpoint(steps[-1])
        return load_checkpoint(place, run.setup, hash_of(run.config), run.corpus.digest, run.backend)
    params = initial_params(run.config.model, run.config.seed, run.config.init)
    return initial_state(params, run.setup, run.backend)


def append(file: IO[str], entry: dict[str, Any]) -> None:
    """Write a line of metrics, so that it is there if the process is killed."""
    try:
        file.write(json.dumps(entry) + "\n")
        file.flush()
    except OSError as error:
        raise InputError(f"{file.name}: cannot be written: {error.strerror}") from None


def stepped(run: Run, state: TrainState, batch: Batch, rate: float) -> tuple[TrainState, StepMetrics]:
    """Make a step; where its loss is no number keep the batch and say where that began."""
    try:
        return train_step(state, batch, run.setup, rate, run.backend)
    except NonFiniteError as error:
        place = keep_batch(run.folder, state.step, batch)
        operation = first_operation(state, batch, run.setup, run.backend)
        save(run, state)
        where = f", by {operation}" if operation else ""
        raise InputError(f"{error}{where}; the batch is in {place}, the state before it in {run.folder.checkpoint(state.step)}") from None


def save(run: Run, state: TrainState) -> Path:
    """Write a checkpoint if there is none of this step."""
    place = run.folder.checkpoint(state.step)
    return place if place.exists() else save_checkpoint(run.folder, state, run.setup, hash_of(run.config), run.corpus.digest, run.config.keep)


def steps_of(run: Run, state: TrainState, reporter: Reporter, write: Callable[[dict[str, Any]], None], seconds: float) -> tuple[TrainState, bool]:
    """Make the steps that are left; return the last state and whether the user stopped before the end."""
    config, begun = run.config, time.monotonic() - seconds
    while state.step < config.steps:
        batch, rate = run.stream.batch(state.step), learning_rate(state.step, config.optimizer, config.steps)
        state, told = stepped(run, state, batch, rate)
        entry = entry_of(state.step, rate, told, run.names, batch, time.monotonic() - begun)
        stop = reporter.wants_to_stop()
        if state.step % config.eval_every == 0 or state.step == config.steps:
            entry["eval"] = held_out(state.params, run.eval_batches, run.setup, state.step, run.backend)
        write(entry)
        reporter.stepped(entry)
        if state.step % config.checkpoint_every == 0 or state.step == config.steps or stop:
            reporter.saved(save(run, state))
        if stop and state.step < config.steps:
            return state, True
    return state, False


def train(config: TrainConfig, reporter: Reporter, resume: bool = False) -> Outcome:
    """Train to the end, or until the reporter wants to stop.

    Raises
    ------
    InputError
        In one line, whatever is wrong with configuration, corpus, folder or checkpoint; also where the loss is no number. Nothing is lost.
    """
    if config.layout != LAYOUT:
        raise InputError(f"layout={config.layout}: one process trains as {LAYOUT}")
    setup, backend = setup_of(config), backend_of(config.backend)
    check(setup, backend)
    with opened(Path(config.run_dir)) as folder:
        check_folder(folder, config, resume)
        corpus = open_corpus(config.data, folder.root / "tokens", reporter.reading)
        check_model(config, corpus)
        stream, evaluating = (open_stream(corpus, part, config.data, config.seed) for part in (corpus.train, corpus.held_out))
        eval_batches = [evaluating.batch(n) for n in range(config.eval_batches)]
        entropy = unigram_entropy(eval_batches)
        run = Run(config, setup, folder, corpus, stream, eval_batches, backend, layer_names(config.model))
        state = first_state(run, resume)
        write_whole(folder.config, to_yaml(config))  # nothing was wrong: only now does the folder hold a run
        entries = rewind_metrics(folder.metrics, state.step)
        facts = Facts(config, hash_of(config), parameters_of(state.params), corpus.digest, entropy, state.step, folder.root)
        reporter.started(facts)
        with folder.metrics.open("a", encoding="utf-8") as file:
            state, interrupted = steps_of(run, state, reporter, lambda entry: append(file, entry), entries[-1]["seconds"] if entries else 0.0)
        return finish(run, facts, state, interrupted)


def parameters_of(params: ModelParams) -> int:
    """Return how many numbers the model has."""
    from refswitch.tree import leaves

    return sum(leaf.size for leaf in leaves(params).values())


def finish(run: Run, facts: Facts, state: TrainState, interrupted: bool) -> Outcome:
    """Draw the pictures and say how the run ended."""
    entries = read_metrics(run.folder.metrics, state.step)
    loss = next((entry["eval"]["loss"] for entry in reversed(entries) if "eval" in entry), None)
    tree = as_tree(run.config)
    rows = [
        ("step", f"{state.step} of {run.config.steps}"),
        ("held-out loss", f"{loss:.4f} nats per target token" if loss is not None else "not evaluated yet"),
        ("unigram entropy of the held-out targets", f"{facts.unigram_entropy:.4f} nats per target token"),
        ("parameters", f"{facts.parameters:,}"),
        ("model", f"{run.config.model.name}, {run.config.model.experts} experts, dialect {run.config.model.dialect}"),
        ("corpus", facts.corpus),
        ("configuration", f"{facts.config_hash}; backend {tree['backend']}, precision {tree['precision']}, seed {tree['seed']}"),
    ]
    pages = draw(run.folder, entries, f"Run {run.config.name}", rows, facts.unigram_entropy)
    return Outcome(state.step, loss, facts.unigram_entropy, interrupted, pages[-1])
