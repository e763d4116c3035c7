"""Rounding float32 to bfloat16 against a plain copy of the same memory, in one run.

    python benchmarks/bench_bf16.py --threads 2 --json bf16.json

Both are bound by memory. Bandwidth counts what each has to move: 4 bytes read and 4 written per value, for the copy, for ours (bfloat16 stays in
float32) and for torch's round trip through its own type, which moves 4 more; caches that fetch what will be written over are not counted. The copy is
torch's, on as many threads. All results are checked first: to nearest against ml_dtypes on random bits, NaN and infinities among them, stochastic
rounding against the words that its address has.
May import: standard library, numpy, ml_dtypes, torch, refswitch, common.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from common import Timing, alternate, say, table, threads, write_json

from refswitch.errors import Mismatch
from refswitch.kernels.cpu.bfloat16 import round_bf16, stochastic_round_bf16
from refswitch.kernels.cpu.jit import on_threads
from refswitch.kernels.cpu.workspace import Workspace
from refswitch.numbers import bfloat16
from refswitch.numbers.philox import random_bits

ADDRESS = (7, 3, 9)  # seed, step and site of the draws
BYTES = 8  # per value: read and written
CHECKED = 1 << 22


def check(workspace: Workspace) -> None:
    """Compare every candidate's bits with somebody else's.

    Raises
    ------
    Mismatch
        With the number of values that differ.
    """
    bits = np.random.default_rng(0).integers(0, 2**32, CHECKED, dtype=np.uint32)
    bits[:4] = 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7F7FFFFF  # both infinities, a NaN that a carry would turn to zero, the largest float32
    x = bits.view(np.float32)
    with np.errstate(invalid="ignore"):  # NaNs among them
        wanted = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    draws = random_bits(*ADDRESS, range(CHECKED))
    for name, got, want in (
        ("nearest", round_bf16(x, workspace), wanted),
        ("stochastic", stochastic_round_bf16(x, *ADDRESS, 0, workspace), bfloat16.stochastic_round_bf16(x, draws)),
    ):
        differs = (got.view(np.uint32) != want.view(np.uint32)) & ~(np.isnan(got) & np.isnan(want))
        if differs.any() or (got.view(np.uint32) & 0xFFFF).any():
            raise Mismatch(f"{name}: {differs.sum()} of {CHECKED} values differ")
    workspace.reset()


def candidates(x: np.ndarray, workspace: Workspace) -> dict[str, Callable[[], Any]]:
    """Return what is timed, each of which writes the same number of values."""
    source, target = torch.from_numpy(x), torch.empty(x.size)
    narrow = torch.empty(x.size, dtype=torch.bfloat16)

    def with_buffers(run: Callable[[], Any]) -> Callable[[], Any]:
        def reset_and_run() -> None:
            workspace.reset()
            run()

        return reset_and_run

    return {
        "copy": lambda: target.copy_(source),
        "nearest": with_buffers(lambda: round_bf16(x, workspace)),
        "stochastic": with_buffers(lambda: stochastic_round_bf16(x, *ADDRESS, 0, workspace)),
        "torch, there and back": lambda: target.copy_(narrow.copy_(source)),
    }


def report(size: int, times: dict[str, Timing]) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Return rows of the table and of the JSON for one size."""
    rows, records = [], []
    for name, taken in times.items():
        rate, share = BYTES * size / taken.median, times["copy"].median / taken.median
        cells = [f"{1e3 * taken.median:.2f}", f"{1e3 * taken.low:.2f} to {1e3 * taken.high:.2f}", f"{rate / 1e9:.1f}", f"{share:.2f}"]
        rows.append([name, f"{size:,}", *cells])
        records.append({"name": name, "values": size, "seconds": taken._asdict(), "bytes_per_second": rate, "share_of_copy": share})
    return rows, records


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", action="append", type=int, help="how many; may be repeated; default: 2**20, 2**24 and 2**26")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, records = [], []
    with threads(options.threads), on_threads(options.threads):
        workspace = Workspace()
        check(workspace)
        say(f"checked {CHECKED:,} values of each candidate; {options.threads} threads")
        for size in options.values or (1 << 20, 1 << 24, 1 << 26):
            x = np.random.default_rng(1).standard_normal(size, np.float32)
            more_rows, more = report(size, alternate(candidates(x, workspace), options.rounds))
            rows, records = rows + more_rows, records + more
    print(table(["", "values", "median ms", "quartiles", "GB/s", "of copy"], rows))
    write_json(options.json, {"benchmark": "bf16", "threads": options.threads, "bytes_per_value": BYTES, "rows": records})


if __name__ == "__main__":
    main()
