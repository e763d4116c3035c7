# May import: standard library, numpy, yaml, pydantic, refswitch.reference, refswitch.checkpoints (below), refswitch.model_config, refswitch.errors.
"""Our own format: `model.safetensors`, whose tensor names are the parameter tree's paths, and `config.yaml`. Spec: contract 5."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import yaml

from refswitch.checkpoints.folder import check_shapes, new_folder, read_folder, write_tensors
from refswitch.checkpoints.template import template_of
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.reference.transformer import ModelParams
from refswitch.tree import leaves, with_leaves

CONFIG = "config.yaml"
FORMAT = "refswitch-model"
VERSION = 1


def config_from_yaml(content: Any, where: str) -> ModelConfig:
    """Return the config that a file's content describes.

    Raises
    ------
    InputError
        Where it is of another format or version, or a key is unknown, missing or of another type.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"config {where}: should say format: {FORMAT}")
    if content.get("version") != VERSION:
        raise InputError(f"config {where}: is of version {content.get('version')!r}, and this program reads version {VERSION}")
    model = content.get("model")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if not isinstance(model, dict) or set(model) != known:
        odd = sorted(known ^ set(model if isinstance(model, dict) else ()))
        raise InputError(f"config {where}: model has missing or unknown keys: {', '.join(map(str, odd))}")
    try:
        return pydantic.TypeAdapter(ModelConfig).validate_python(model)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"config {where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_own(folder: Path) -> tuple[ModelConfig, ModelParams]:
    """Return the model of a folder, in float64.

    Raises
    ------
    InputError
        Where a file is missing, cut short or of another format, or a tensor is not what the config describes.
    """
    path = folder / CONFIG
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"config {path}: is not YAML") from None
    config = config_from_yaml(content, str(path))
    template, tensors = template_of(config), read_folder(folder)
    check_shapes(tensors, {name: leaf.shape for name, leaf in leaves(template).items()})
    return config, with_leaves(template, {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()})


def write_own_into(folder: Path, config: ModelConfig, params: ModelParams, storage: str, shard_bytes: int) -> None:
    """Write a model's files into a folder that is there.

    Raises
    ------
    InputError
        Where a value does not fit the storage format.
    """
    model = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()}
    content = {"format": FORMAT, "version": VERSION, "model": model}
    write_tensors(folder, leaves(params), storage, shard_bytes)
    (folder / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def write_own(folder: Path, config: ModelConfig, params: ModelParams, storage: str, shard_bytes: int) -> None:
    """Write a model into a new folder.

    Raises
    ------
    InputError
        Where the folder exists already or cannot be written, or a value does not fit the storage format.
    """
    with new_folder(folder) as beside:
        write_own_into(beside, config, params, storage, shard_bytes)
