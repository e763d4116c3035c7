# May import: standard library, numpy, safetensors, refswitch.errors.
"""The tensors of a Hugging Face folder: one safetensors file, or shards with their index. Nothing in it is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from refswitch.errors import InputError

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def _array(name: str, record: dict[str, Any]) -> np.ndarray:
    """Return one tensor; bfloat16 as the float32 of the same value."""
    shape, data = tuple(record["shape"]), record["data"]
    if record["dtype"] == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if record["dtype"] not in DTYPES:
        raise InputError(f"checkpoint: tensor {name} is stored as {record['dtype']}, and should be F64, F32, F16 or BF16")
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


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a folder, sharded or not.

    Raises
    ------
    InputError
        As `read_file`; also where the index names a shard outside the folder, or a tensor that its shard does not hold.
    """
    if not (folder / INDEX).is_file():
        return read_file(folder / ONE_FILE)
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"checkpoint {folder / INDEX}: is not an index with a weight_map") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"checkpoint {folder / INDEX}: the shard {shard!r} should be a file of the same folder")
    held = {shard: read_file(folder / shard) for shard in shards}
    for name, shard in places.items():
        if name not in held[shard]:
            raise InputError(f"checkpoint {folder / shard}: tensor {name} is missing, which the index places there")
    return {name: tensor for tensors in held.values() for name, tensor in tensors.items()}
