# May import: standard library, numpy, safetensors, refswitch.training (below), refswitch.engine, refswitch.checkpoints and what lies below.
"""A loss that is no number: the batch is kept, and the operation that first produced a NaN or an infinity is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from refswitch.backends.protocol import Backend
from refswitch.checkpoints.folder import new_folder
from refswitch.engine.step import NonFiniteError, Setup, TrainState, loss_and_gradients
from refswitch.reference.transformer import Batch
from refswitch.training.run_folder import RunFolder
from refswitch.tree import leaves


class _FirstFound(Exception):
    """The operation whose result holds the first value that is no number."""


class Watching:
    """A backend that looks at every result of another."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.backend, name)
        return self._watched(name, found) if name.endswith(("_forward", "_backward")) else found

    def _watched(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            result = operation(*arguments, **named)
            first = result[0] if name.endswith("_forward") and type(result) is tuple else result
            for path, array in leaves(first).items():
                if not np.isfinite(array).all():
                    raise _FirstFound(f"{name}{f', {path}' if path else ''}")
            return result

        return call


def first_operation(state: TrainState, batch: Batch, setup: Setup, backend: Backend) -> str:
    """Return the operation of a step that first gives a value that is no number, or an empty string."""
    watching: Any = Watching(backend)
    try:
        with np.errstate(all="ignore"):
            loss_and_gradients(state.params, batch, setup, state.step, watching)
    except _FirstFound as found:
        return str(found)
    except NonFiniteError:
        return ""
    return ""


def keep_batch(folder: RunFolder, step: int, batch: Batch) -> Path:
    """Write the batch of a step that failed, and return its folder.

    Raises
    ------
    InputError
        Where it cannot be written.
    """
    place = folder.root / "non_finite" / f"step-{step}"
    place.parent.mkdir(exist_ok=True)
    if not place.exists():
        with new_folder(place) as beside:
            safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in batch._asdict().items()}, beside / "batch.safetensors")
    return place
