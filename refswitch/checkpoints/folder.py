# May import: standard library, numpy, safetensors, refswitch.numbers, refswitch.errors.
"""Tensors in a folder: one safetensors file, or shards with their index. Nothing that is read is executed; what is written appears whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from refswitch.errors import InputError
from refswitch.numbers.precision import FORMATS, round_to

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORAGES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # the widest first
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def _array(name: str, record: dict[str, Any]) -> np.ndarray:
    """Return one tensor; bfloat16 as the float32 of the same value."""
    shape, data = tuple(record["shape"]), record["data"]
    if record["dtype"] == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if record["dtype"] not in DTYPES:
        raise InputError(f"checkpoint: tensor {name} is stored as {record['dtype']}, and should be {', '.join(STORAGES.values())}")
    return np.frombuffer(data, DTYPES[record["dtype"]]).reshape(shape)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of one file.

    Raises
    ------
    InputError
        Where there is no such file, or it is cut short or otherwise no safetensors file.
    """
    try:
        records = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except OSError as error:
        raise InputError(f"checkpoint {path}: {error.strerror}") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"checkpoint {path}: cut short or not a safetensors file ({error})") from None
    return {name: _array(name, record) for name, record in records}


def _places(folder: Path) -> dict[str, str]:
    """Return which shard holds each tensor, as the index says."""
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"checkpoint {folder / INDEX}: is not an index with a weight_map") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"checkpoint {folder / INDEX}: the shard {shard!r} should be a file of the same folder")
    return places


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a folder, sharded or not.

    Raises
    ------
    InputError
        As `read_file`; also where the index names a shard outside the folder, or a tensor that its shard does not hold.
    """
    if not (folder / INDEX).is_file():
        if not (folder / ONE_FILE).is_file() and any(folder.glob("*.bin")):
            raise InputError(f"checkpoint {folder}: holds pickled weights alone, which are never read; save it anew with transformers")
        return read_file(folder / ONE_FILE)
    places = _places(folder)
    held = {shard: read_file(folder / shard) for shard in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in held[shard]:
            raise InputError(f"checkpoint {folder / shard}: tensor {name} is missing, which the index places there")
    return {name: tensor for tensors in held.values() for name, tensor in tensors.items()}


def check_shapes(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse what is not exactly these tensors.

    Raises
    ------
    InputError
        Naming the first tensor that is missing, extra, misshapen or not finite.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise InputError(f"checkpoint: tensor {name} of shape {shape} is missing")
        if tensors[name].shape != shape:
            raise InputError(f"checkpoint: tensor {name} has shape {tensors[name].shape}, but by the config it should be {shape}")
        if not np.all(np.isfinite(tensors[name])):
            raise InputError(f"checkpoint: tensor {name} has values that are not finite")
    for name in tensors:
        if name not in shapes:
            raise InputError(f"checkpoint: tensor {name} has no place in the model that the config describes")


def storage_of(folder: Path) -> str:
    """Return the widest format in which a tensor of the folder is stored; the headers alone are read.

    Raises
    ------
    InputError
        As `read_file`.
    """
    shards = sorted(set(_places(folder).values())) if (folder / INDEX).is_file() else [ONE_FILE]
    found = set()
    for shard in shards:
        try:
            with safetensors.safe_open(folder / shard, framework="numpy") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no dictionary
        except OSError:
            raise InputError(f"checkpoint {folder / shard}: No such file or directory") from None
        except safetensors.SafetensorError as error:
            raise InputError(f"checkpoint {folder / shard}: cut short or not a safetensors file ({error})") from None
    return next((storage for storage, code in STORAGES.items() if code in found), "float32")


def _stored(name: str, tensor: np.ndarray, storage: str) -> np.ndarray:
    """Return one tensor as it lies in the file, rounded once to nearest-even; bfloat16 as its upper halves."""
    stored = round_to(np.asarray(tensor, np.float64), FORMATS[storage])
    if not np.all(np.isfinite(stored)):
        raise InputError(f"checkpoint: tensor {name} has values that {storage} cannot hold")
    if storage == "bfloat16":
        return (np.ascontiguousarray(stored.astype(np.float32)).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(stored.astype(storage))


def _write_file(path: Path, names: list[str], tensors: Mapping[str, np.ndarray], storage: str) -> None:
    arrays = {name: _stored(name, tensors[name], storage) for name in names}  # kept until the file is written: the records point into them
    records = {
        name: safetensors.TensorSpec(dtype=storage, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in arrays.items()
    }
    safetensors.serialize_file(records, str(path), {"format": "pt"})


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], storage: str, shard_bytes: int) -> None:
    """Write the tensors into a folder: one file, or shards of at most `shard_bytes` (a larger tensor has a shard of its own) with an index.

    Raises
    ------
    InputError
        Where a value is not finite in the storage format, with the tensor's name.
    """
    width = FORMATS[storage].precision
    bytes_each = {53: 8, 24: 4}.get(width, 2)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.size * bytes_each
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        _write_file(folder / ONE_FILE, shards[0], tensors, storage)
        return
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, names, tensors, storage)
    index = {
        "metadata": {"total_size": sum(tensor.size for tensor in tensors.values()) * bytes_each},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder beside the one that is wanted, and rename it when everything in it is written; after an error nothing is left.

    Raises
    ------
    InputError
        Where the folder exists and is not empty, its parent does not exist, or it cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} exists already; name a new folder")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir()
        yield beside
        for path in beside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(beside, folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
