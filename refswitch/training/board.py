# May import: standard library, tensorboardX (inside a function), refswitch.errors.
"""A run's metrics for TensorBoard, where it is asked for: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from refswitch.errors import InputError


def open_board(root: Path, step: int) -> Callable[[dict[str, Any]], None]:
    """Return what writes a line of metrics; whatever was written after `step` is given up.

    Raises
    ------
    InputError
        Where tensorboardX is missing.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError("tensorboard=true needs tensorboardX: pip install 'refswitch[tensorboard]'") from None
    writer = SummaryWriter(str(root / "tensorboard"), purge_step=step + 1)

    def write(entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, entry["step"])
        for layer in entry["layers"]:
            for name in ("drop_rate", "gate", "entropy"):
                writer.add_scalar(f"{layer['name']}/{name}", layer[name], entry["step"])
            writer.add_scalars(f"{layer['name']}/load", {str(e): share for e, share in enumerate(layer["load"])}, entry["step"])
        for name, value in entry.get("eval", {}).items():
            if isinstance(value, float):
                writer.add_scalar(f"eval/{name}", value, entry["step"])
        writer.flush()

    return write
