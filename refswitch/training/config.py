# May import: standard library, yaml, refswitch.data, refswitch.model_config, refswitch.records, refswitch.errors.
"""The configuration of a training run: a preset, a file or both, with dotted overrides; every key has a value, and an unknown one is an error.

    base: tiny                     a preset, whose values hold where the file is silent
    steps: 500
    model.experts: 16              dotted, or nested:
    model: {base: byte_tiny, experts: 16}

Paper: the training regime (3.3 of its code's defaults are in `spec/training.md`). Spec: contract 3 for the keys that scripts rely on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from refswitch.data import DataConfig, MixtureConfig, TaskConfig
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig, preset
from refswitch.records import Tree, merge, nearest, nested, read_yaml, validate

FORMAT, VERSION = "refswitch-training", 1
FREE = ("run_dir", "steps", "threads", "checkpoint_every", "keep", "eval_every", "eval_batches", "tensorboard")  # they change no step that was made


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move. Paper: Adafactor, 1 / sqrt(max(step, plateau)), no clipping of gradients."""

    name: Literal["adafactor", "adamw"]
    schedule: Literal["inverse_square_root", "constant", "linear"]
    rate: float  # the constant rate, the top of `linear`, the multiplier of `inverse_square_root`
    warm_up: int  # steps; the plateau of `inverse_square_root`
    expert_rule: Literal["mesh", "t5x"]  # of Adafactor: whether the expert axis is an axis like any other
    weight_decay: float  # of AdamW
    clip_norm: float  # of the gradients' global norm; 0: none


@dataclass(frozen=True)
class LossConfig:
    """The cross-entropy. Paper: its code's z-loss 1e-4 on the logits; padding counts in the denominator there."""

    denominator: Literal["targets", "weights"]
    label_smoothing: float
    logits_z_coef: float


@dataclass(frozen=True)
class DistillConfig:
    """Learning from a teacher beside the labels. Paper: 4.2; its code's lambda 0.25, temperature 1."""

    teacher: str  # a run, or one of its checkpoints
    soft_share: float  # lambda, the weight of the teacher's distribution
    temperature: float
    from_teacher: bool  # the student begins with the teacher's weights outside its sparse layers


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    name: str
    run_dir: str
    seed: int
    steps: int
    backend: str
    layout: str  # "data=1,expert=1,model=1"
    threads: int  # 0: as many as there are cores
    precision: str
    init: str  # the recipe of the first parameters
    start: str  # a run, or one of its checkpoints, whose parameters are the first; empty: drawn by `init`
    model: ModelConfig
    data: DataConfig
    tasks: MixtureConfig | None  # what is trained on instead of `data`, whose vocabulary it reads
    best: Literal["loss", "exact_match", "f1", "rouge2"]  # by which the best checkpoint of tasks is chosen, on their validation files
    optimizer: OptimizerConfig
    loss: LossConfig
    distill: DistillConfig | None
    microbatches: int
    recompute: bool
    checkpoint_every: int
    keep: int  # checkpoints that are kept; 0: all
    eval_every: int
    eval_batches: int
    tensorboard: bool


def _check(config: TrainConfig) -> TrainConfig:
    """Refuse values that contradict each other or cannot be."""
    for key, least in (("steps", 1), ("seed", 0), ("threads", 0), ("microbatches", 1), ("checkpoint_every", 1), ("keep", 0), ("eval_batches", 1)):
        if getattr(config, key) < least:
            raise InputError(f"{key}={getattr(config, key)}: should be at least {least}")
    if config.eval_every < 1:
        raise InputError(f"eval_every={config.eval_every}: should be at least 1; a number above steps={config.steps} evaluates at the end alone")
    optimizer = config.optimizer
    if not optimizer.rate > 0.0:
        raise InputError(f"optimizer.rate={optimizer.rate}: should be positive")
    if optimizer.warm_up < (1 if optimizer.schedule == "inverse_square_root" else 0):
        raise InputError(f"optimizer.warm_up={optimizer.warm_up}: is too small for {optimizer.schedule}")
    if optimizer.schedule == "linear" and config.steps <= optimizer.warm_up:
        raise InputError(f"optimizer.warm_up={optimizer.warm_up}: should be below steps={config.steps} for schedule linear")
    rows = config.data.batch if config.tasks is None else config.tasks.batch
    if rows % config.microbatches:
        raise InputError(f"microbatches={config.microbatches}: should divide {'data' if config.tasks is None else 'tasks'}.batch={rows}")
    if config.distill is not None and not (0.0 <= config.distill.soft_share <= 1.0 and config.distill.temperature > 0.0):
        raise InputError("distill: soft_share should be in [0, 1], and temperature positive")
    return config


def read_file(given: str) -> Tree:
    """Return what a configuration's file says, its own keys and `base`.

    Raises
    ------
    InputError
        Where it is no mapping, or of another format or version.
    """
    content = read_yaml(Path(given))
    if not isinstance(content, dict):
        raise InputError(f"{given}: should be a mapping such as `base: tiny`")
    if content.get("format", FORMAT) != FORMAT or content.get("version", VERSION) != VERSION:
        raise InputError(f"{given}: should be of format {FORMAT}, version {VERSION}, not {content.get('format')!r}, {content.get('version')!r}")
    return {key: value for key, value in content.items() if key not in ("format", "version", "hash")}


def tree_of(given: str, seen: tuple[str, ...] = ()) -> tuple[Tree, str]:
    """Return the tree of a preset or a file, and the name of a run of it."""
    from refswitch.training.presets import PRESETS

    if given in PRESETS:
        return dict(PRESETS[given]), given
    if not Path(given).is_file():
        raise InputError(f"there is no preset and no file {given!r}{nearest(given, PRESETS)}")
    if given in seen:
        raise InputError(f"{given}: is its own base")
    own = read_file(given)
    base = own.pop("base", None)
    tree, _ = tree_of(str(base), (*seen, given)) if base is not None else ({}, "")
    return laid_over(tree, own, given), Path(given).stem


def laid_over(tree: Tree, overrides: Mapping[str, Any], where: str) -> Tree:
    """Return a configuration's tree with overrides, dotted or nested; `model.base` begins the model anew from its preset."""
    changes = nested(overrides, where)
    model = changes.get("model")
    if isinstance(model, str):
        model = changes["model"] = {"base": model}
    if isinstance(model, dict) and "base" in model:
        tree = {**tree, "model": dataclasses.asdict(preset(str(model["base"])))}
        changes["model"] = {key: value for key, value in model.items() if key != "base"}
    return merge(tree, changes, TrainConfig, "", where, "key")


def _parsed(assignments: Iterable[str]) -> dict[str, Any]:
    """Return key=value words as a mapping; a value is read as YAML."""
    found: dict[str, Any] = {}
    for word in assignments:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InputError(f"{word!r}: should be key=value, for example steps=500")
        try:
            found[key] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            raise InputError(f"{word!r}: {value!r} is not a value") from None
    return found


def config_of(tree: Tree, assignments: Iterable[str], where: str) -> TrainConfig:
    """Return the configuration of a tree, with key=value words laid over it.

    Raises
    ------
    InputError
        As `load_config`.
    """
    tree = laid_over(tree, _parsed(assignments), "the command line")
    if not tree.get("run_dir"):
        tree["run_dir"] = f"runs/{tree['name']}"
    for key in ("encoder_sparse", "decoder_sparse"):
        if isinstance(tree.get("model"), dict) and isinstance(tree["model"].get(key), list):
            tree["model"][key] = tuple(tree["model"][key])
    tasks = tree.get("tasks")
    for number, task in enumerate(tasks["tasks"] if isinstance(tasks, dict) and isinstance(tasks.get("tasks"), list) else ()):
        merge({}, task if isinstance(task, dict) else {}, TaskConfig, f"tasks.tasks.{number}.", where, "key")  # a list's own keys
    return _check(validate(tree, TrainConfig, where))


def load_config(given: str, assignments: Iterable[str] = ()) -> TrainConfig:
    """Return the configuration of a preset or a file, with key=value words laid over it.

    Raises
    ------
    InputError
        For an unknown preset, file, key or value, naming the nearest known one, and for values that contradict each other.
    """
    tree, name = tree_of(given)
    tree.setdefault("name", name)
    return config_of(tree, assignments, given)


def as_tree(config: TrainConfig) -> Tree:
    """Return the configuration as plain values, as it stands in a file."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def hash_of(config: TrainConfig) -> str:
    """Return twelve hexadecimal digits of everything that decides a run's numbers: all but `FREE`; the steps where the rate depends on them."""
    free = [key for key in FREE if key != "steps" or config.optimizer.schedule != "linear"]
    tree = {key: value for key, value in as_tree(config).items() if key not in free}
    return hashlib.sha256(yaml.safe_dump(tree, sort_keys=True).encode()).hexdigest()[:12]


def to_yaml(config: TrainConfig) -> str:
    """Return the file that `load_config` reads back as the same configuration."""
    return yaml.safe_dump({"format": FORMAT, "version": VERSION, "hash": hash_of(config), **as_tree(config)}, sort_keys=False)


def first_difference(one: TrainConfig, other: TrainConfig) -> str | None:
    """Return the first key in which two configurations make other steps, with both values, or None."""

    def flat(tree: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {path: tree}
        return {key: leaf for name, value in tree.items() for key, leaf in flat(value, f"{path}.{name}" if path else name).items()}

    left, right = flat(as_tree(one)), flat(as_tree(other))
    for key, value in left.items():
        if key.split(".")[0] not in (*FREE, "name") and right.get(key) != value:
            return f"{key} is {value!r} there and {right.get(key)!r} here"
    return None
