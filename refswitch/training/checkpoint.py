# May import: standard library, numpy, yaml, safetensors, refswitch.training (below), refswitch.engine, refswitch.checkpoints and what lies below.
"""A training state as a folder: the model in our own format, what the optimizer remembers, and a record of what belongs together.

    config.yaml, model.safetensors   the model, which every command reads
    optimizer.safetensors            each tensor's state by its path
    training.yaml                    step, configuration's hash, corpus, digests of the files

Step N has made N updates; batch N is its next, and its draws have the address N: position in the data and randomness are the step.
Spec: contract 5.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import yaml

from refswitch.backends.protocol import Backend
from refswitch.checkpoints.folder import new_folder
from refswitch.checkpoints.own import CONFIG, read_own, write_own_into
from refswitch.engine.step import Setup, TrainState, initial_state, state_arrays, state_from
from refswitch.errors import InputError
from refswitch.records import read_yaml
from refswitch.training.run_folder import RunFolder

FORMAT, VERSION = "refswitch-checkpoint", 1
OPTIMIZER, RECORD = "optimizer.safetensors", "training.yaml"
SHARD_BYTES = 5 * 10**9


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(folder: RunFolder, state: TrainState, setup: Setup, config_hash: str, corpus: str) -> Path:
    """Write a checkpoint, complete or absent.

    Raises
    ------
    InputError
        Where it cannot be written or holds a value that is not finite; the checkpoints before it stand.
    """
    place = folder.checkpoint(state.step)
    optimizer = {name: np.asarray(array, order="C") for name, array in state_arrays(state).items() if name.startswith("optimizer.")}
    storage = "float64" if state.params.embedding_VD.dtype == np.float64 else "float32"
    try:
        with new_folder(place) as beside:
            write_own_into(beside, setup.config, state.params, storage, SHARD_BYTES)
            safetensors.numpy.save_file(optimizer, beside / OPTIMIZER)
            digests = {path.name: _digest(path) for path in sorted(beside.iterdir())}
            record = {"format": FORMAT, "version": VERSION, "step": state.step, "config": config_hash, "corpus": corpus, "digests": digests}
            (beside / RECORD).write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")
    except safetensors.SafetensorError as error:
        raise InputError(f"{place}: cannot be written: {error}") from None
    return place


def prune(folder: RunFolder, keep: int) -> None:
    """Give up the oldest checkpoints beyond `keep` (0: none), but for the best."""
    best = folder.best()
    for step in folder.steps()[:-keep] if keep else []:
        if best is None or step != best.step:
            _remove(folder.checkpoint(step))


def _remove(place: Path) -> None:
    """Remove a checkpoint so that it is never there in part: out of sight first."""
    hidden = place.with_name(f".{place.name}.0")
    place.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def read_record(place: Path) -> dict[str, Any]:
    """Return a checkpoint's record, its files compared with their digests.

    Raises
    ------
    InputError
        Where it is of another format or version, or a file is not the one that was written.
    """
    record = read_yaml(place / RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{place / RECORD}: should say format: {FORMAT}")
    if record.get("version") != VERSION:
        raise InputError(f"{place}: is of version {record.get('version')!r}, and this program reads version {VERSION}")
    digests = record.get("digests")
    if not isinstance(digests, dict) or not isinstance(record.get("step"), int):
        raise InputError(f"{place / RECORD}: has no step or no digests")
    for name, digest in digests.items():
        path = place / Path(str(name)).name
        if not path.is_file() or _digest(path) != digest:
            raise InputError(f"{path}: is missing or changed since it was written; remove {place} to go on from the checkpoint before it")
    return record


def load_checkpoint(place: Path, setup: Setup, config_hash: str, corpus: str, backend: Backend) -> TrainState:
    """Return the training state of a checkpoint, to the same bits.

    Raises
    ------
    InputError
        Where it belongs to another model, configuration or corpus, or a file is not what it should be.
    """
    record = read_record(place)
    config, params = read_own(place)
    if config != setup.config:
        raise InputError(f"{place / CONFIG}: holds another architecture ({config.name}) than the configuration's model ({setup.config.name})")
    if record.get("config") != config_hash:
        raise InputError(f"{place}: was trained under configuration {record.get('config')}, not {config_hash}")
    if record.get("corpus") != corpus:
        raise InputError(f"{place}: was trained on corpus {record.get('corpus')}, and it is now {corpus}; restore its files, or name another run_dir")
    like = initial_state(params, setup, backend)
    try:
        optimizer = safetensors.numpy.load_file(place / OPTIMIZER)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{place / OPTIMIZER}: cannot be read: {error}") from None
    arrays = {name: array for name, array in state_arrays(like).items() if name.startswith("params.")}
    return state_from(arrays | optimizer | {"step": np.asarray(record["step"])}, like)
