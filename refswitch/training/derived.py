# May import: standard library, refswitch.training (below), refswitch.errors.
"""Configurations that begin from a run: fine-tuning of its model on tasks, distillation of it into a student. Paper: 4.1, 4.2, table 4."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from refswitch.errors import InputError
from refswitch.records import Tree
from refswitch.training.config import TrainConfig, as_tree, config_of, laid_over, load_config, read_file, tree_of
from refswitch.training.run_folder import COMPLETE, CONFIG

# Paper: 4.1 and table 4: dropout 0.1, in the experts 0.4; T5: a constant rate of 0.001
FINETUNE: Tree = {
    "steps": 1000,
    "eval_every": 200,
    "checkpoint_every": 200,
    "best": "exact_match",
    "model.dropout": 0.1,
    "model.expert_dropout": 0.4,
    "optimizer.schedule": "constant",
    "optimizer.rate": 1e-3,
    "optimizer.warm_up": 0,
    "distill": None,
}
TASK = {"prefix": "", "inputs": "inputs", "targets": "targets"}
DISTILL = {"soft_share": 0.25, "temperature": 1.0, "from_teacher": True}  # Paper: 4.2, table 6


def run_config(given: str) -> TrainConfig:
    """Return the configuration of a run, by its folder or that of one of its checkpoints.

    Raises
    ------
    InputError
        Where there is no run.
    """
    path = Path(given)
    root = path.parent.parent if COMPLETE.fullmatch(path.name) else path
    if not (root / "checkpoints").is_dir():
        raise InputError(f"{given}: is no run's folder; `refswitch train tiny` makes one, runs/tiny")
    return load_config(str(root / CONFIG))


def _with_defaults(tasks: Any, run: TrainConfig, where: str) -> Any:
    """Return what a file says of tasks, with what it leaves out: everything in proportion, shapes and rows of the run."""
    tasks = {"tasks": tasks} if isinstance(tasks, list) else tasks
    if not isinstance(tasks, dict) or not isinstance(tasks.get("tasks"), list) or not all(isinstance(task, dict) for task in tasks["tasks"]):
        raise InputError(f"{where}: should say `tasks: [{{name: ..., train: [FILE], validation: [FILE]}}]`")
    targets_length = run.data.targets_length or max(run.data.inputs_length // 4, 8)
    shapes = {"inputs_length": run.data.inputs_length, "targets_length": targets_length, "batch": run.data.batch}
    return {"limit": 2**19, "exponent": 1.0, "pack": False, **shapes, **tasks, "tasks": [{**TASK, **task} for task in tasks["tasks"]]}


def finetune_config(given: str, file: str, assignments: Iterable[str]) -> TrainConfig:
    """Return the configuration that fine-tunes a run on the tasks of a file; what the file leaves out is the recipe's, then the run's.

    Raises
    ------
    InputError
        Where there is no run or no file, or a key is wrong.
    """
    run = run_config(given)
    own = read_file(file)
    if "base" in own:
        raise InputError(f"{file}: its base is the run {given}; leave `base` out")
    own["tasks"] = _with_defaults(own.get("tasks"), run, file)
    begun = {**as_tree(run), "name": Path(file).stem, "run_dir": "", "tasks": None}
    return config_of(laid_over(laid_over(begun, {**FINETUNE, "start": given}, "the recipe"), own, file), assignments, file)


def distill_config(teacher: str, given: str, assignments: Iterable[str]) -> TrainConfig:
    """Return the configuration of a student: a preset's or a file's, on the teacher's text and vocabulary.

    Raises
    ------
    InputError
        Where there is no run or no file, or a key is wrong.
    """
    run = as_tree(run_config(teacher))
    tree, name = tree_of(given)
    own = tree.get("distill") or {}
    tree = {**tree, "data": run["data"], "tasks": run["tasks"], "distill": {**DISTILL, **own, "teacher": teacher}}
    tree.setdefault("name", name)
    return config_of(tree, assignments, given)
