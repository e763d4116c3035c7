"""What all benchmarks share: the same threads for everybody, runs that alternate, limits measured in the same run, and the report.

A speed is never reported alone: it is a ratio to a named peer, or a fraction of a limit, whose runs alternated with ours. The limits
are what the machine's own libraries reach: a large square product (the faster of NumPy's BLAS and torch's) and a copy of memory.
May import: standard library, numpy, numba, threadpoolctl, torch, matplotlib, refswitch.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import threadpoolctl

SQUARE = 2048  # the matrices of the product's limit: 24 MiB of operands, far beyond a core's caches
COPIED = 64 << 20  # bytes of each array of the copy's limit, beyond the second-level caches
REST = 0.05  # seconds before each run: a library's threads spin on the cores for up to 20 ms after their work, and would be in the next one's way
PACKAGES = ("refswitch", "numpy", "scipy", "numba", "torch", "transformers")


class Timing(NamedTuple):
    """What one candidate took, in seconds."""

    median: float
    low: float  # quartiles
    high: float
    runs: int


def timing(seconds: list[float]) -> Timing:
    """Return the median and the quartiles of several runs."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Hold every library to so many threads: NumPy's BLAS, OpenMP, torch and Numba."""
    before = numba.get_num_threads()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)
    numba.set_num_threads(count)
    with threadpoolctl.threadpool_limits(count):
        yield
    numba.set_num_threads(before)


def say(text: str) -> None:
    """Print progress where somebody watches or a log is kept, at once."""
    print(text, file=sys.stderr, flush=True)


def alternate(candidates: Mapping[str, Callable[[], Any]], rounds: int, warmups: int = 1) -> dict[str, Timing]:
    """Run every candidate once per round, in turn, so that whatever disturbs the machine disturbs all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmups + rounds):
        for name, run in candidates.items():
            time.sleep(REST)
            start = time.perf_counter()
            run()
            if number >= warmups:
                seconds[name].append(time.perf_counter() - start)
    return {name: timing(taken) for name, taken in seconds.items()}


class Limits:
    """The machine's limits, as candidates that run along: `limits.candidates` goes into `alternate`, `limits.read` takes the result apart."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.a, self.b = (rng.standard_normal((SQUARE, SQUARE), np.float32) for _ in range(2))
        self.out = np.empty_like(self.a)
        self.source, self.target = np.ones(COPIED // 4, np.float32), np.empty(COPIED // 4, np.float32)
        self.candidates: dict[str, Callable[[], Any]] = {"limit: numpy product": lambda: np.matmul(self.a, self.b, out=self.out)}
        try:
            import torch
        except ImportError:
            self.candidates["limit: copy"] = lambda: np.copyto(self.target, self.source)
            return
        a, b, out, source, target = (torch.from_numpy(array) for array in (self.a, self.b, self.out, self.source, self.target))
        self.candidates["limit: torch product"] = lambda: torch.mm(a, b, out=out)
        self.candidates["limit: copy"] = lambda: target.copy_(source)

    @staticmethod
    def read(times: Mapping[str, Timing]) -> dict[str, float]:
        """Return the limits: floating-point operations per second of a product, bytes per second of a copy (read and written)."""
        products = [taken.median for name, taken in times.items() if name.startswith("limit:") and "product" in name]
        return {"flops": 2.0 * SQUARE**3 / min(products), "bytes": 2.0 * COPIED / times["limit: copy"].median}


def machine() -> dict[str, Any]:
    """Return what ran: processor, cores, versions."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": packages,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return rows as text, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in [heads, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write the report beside what ran it."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **report}, indent=1) + "\n", encoding="utf-8")
        say(f"wrote {path}")
