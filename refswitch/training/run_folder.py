# May import: standard library, yaml, refswitch.records, refswitch.errors.
"""The folder of one training run: who may write to it, what lies in it, and what a killed run left behind. Spec: contract 5.

config.yaml          the resolved configuration
metrics.jsonl        a line per step
checkpoints/step-N/  complete or absent
best.yaml            which of them is the best, and by what
plots/               pictures and a page
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from refswitch.errors import InputError
from refswitch.records import read_yaml

CONFIG, METRICS, CHECKPOINTS, PLOTS, BEST, LOCK = "config.yaml", "metrics.jsonl", "checkpoints", "plots", "best.yaml", ".lock"
COMPLETE = re.compile(r"step-(\d+)")
CUT_SHORT = re.compile(r"\.step-\d+\.\d+")  # what a process that was killed while it wrote has left


class Best(NamedTuple):
    """The checkpoint that evaluated best."""

    step: int
    metric: str
    value: float


class RunFolder(NamedTuple):
    """The places of a run."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / CONFIG

    @property
    def metrics(self) -> Path:
        """A line of JSON per step."""
        return self.root / METRICS

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.root / CHECKPOINTS

    @property
    def plots(self) -> Path:
        """The folder of the pictures."""
        return self.root / PLOTS

    def checkpoint(self, step: int) -> Path:
        """Return the folder of one checkpoint."""
        return self.checkpoints / f"step-{step}"

    def steps(self) -> list[int]:
        """Return the steps of which there is a complete checkpoint, in order."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(found[1]) for path in self.checkpoints.iterdir() if (found := COMPLETE.fullmatch(path.name)))

    def best(self) -> Best | None:
        """Return the best checkpoint, if it is still there.

        Raises
        ------
        InputError
            Where the record is not what a run writes.
        """
        if not (self.root / BEST).is_file():
            return None
        try:
            found = Best(**read_yaml(self.root / BEST))
            return found if self.checkpoint(int(found.step)).is_dir() else None
        except (TypeError, ValueError):
            raise InputError(f"{self.root / BEST}: names no checkpoint; remove it") from None

    def keep_best(self, best: Best) -> Best:
        """Write down the best checkpoint and return it."""
        write_whole(self.root / BEST, yaml.safe_dump(best._asdict(), sort_keys=False))
        return best


@contextmanager
def opened(root: Path) -> Iterator[RunFolder]:
    """Give a run's folder to this process alone; the lock ends with the process, however it ends.

    Raises
    ------
    InputError
        Where the folder cannot be made or written to, or another process trains in it.
    """
    folder = RunFolder(root)
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        folder.plots.mkdir(exist_ok=True)
        descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"run_dir {root}: cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"run_dir {root}: another process trains in it; wait for it, or name another run_dir=...") from None
        for path in folder.checkpoints.iterdir():
            if CUT_SHORT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        yield folder
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside the file and rename it.

    Raises
    ------
    InputError
        Where it cannot be written; what stood there before stands there still.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def read_metrics(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run up to step `last`; a last line that was cut short does not count.

    Raises
    ------
    InputError
        Where a line in the middle is not what a run writes.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise InputError(f"{path}: line {number} is no line of metrics") from None
        if last is not None and step > last:
            break
        found.append(entry)
    return found


def rewind_metrics(path: Path, last: int) -> list[dict[str, Any]]:
    """Cut the metrics back to step `last`, from which the run goes on, and return them."""
    kept = read_metrics(path, last)
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept
