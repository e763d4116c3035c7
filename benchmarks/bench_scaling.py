"""What a Switch layer costs as experts, tokens, width and skew grow, against what the roofline of the same run predicts; and its memory.

    python benchmarks/bench_scaling.py --json scaling.json --png scaling.png

Each series changes one size. The prediction is the roofline of the three passes (forward, rows backward, weights backward): a pass takes the longer
of its operations at the product's limit and its bytes at the copy's, weights, gradients and activations once each. Results are checked against
float64 first; `bench_switch.py` has the peers. Peak memory is the high-water mark of a process of its own over one step in new buffers.
May import: standard library, numpy, refswitch, bench_switch, common.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_switch import Ours, check, problem_of, truth
from common import Limits, alternate, say, table, threads, write_json

from refswitch.kernels.cpu.jit import on_threads
from refswitch.kernels.cpu.matmul import PANELS

BASE = {"E": 8, "T": 8192, "D": 256, "F": 1024, "load": "balanced"}
SERIES: dict[str, list[dict[str, Any]]] = {
    "experts": [{"E": E} for E in (8, 32, 64, 128)],
    "tokens": [{"T": T} for T in (1024, 2048, 4096, 8192)],
    "width": [{"D": D, "F": 4 * D, "T": 4096} for D in (128, 256, 512)],
    "skew": [{"E": 32, "load": load} for load in ("balanced", "skewed")],
}
FLOAT = 4


def passes(size: dict[str, Any], kept: int) -> list[tuple[float, float]]:
    """Return operations and bytes of the three passes over the experts; the router's are a part in 6 F / E of the first, and left out."""
    E, T, D, F = (size[letter] for letter in "ETDF")
    products, weights = 4.0 * kept * D * F, FLOAT * 2.0 * E * D * F
    forward = weights + FLOAT * (2.0 * T * D + kept * (2 * D + F))  # x, out; packed, expert_out, hidden
    rows = weights + FLOAT * (2.0 * T * D + kept * (3 * D + 2 * F))  # dout, dx; expert_out, dexpert_out, dpacked, hidden, dz
    gradients = weights + FLOAT * kept * (2.0 * D + 2 * F)
    return [(products, forward), (products, rows), (products, gradients)]


def predicted_seconds(size: dict[str, Any], kept: int, limits: dict[str, float]) -> float:
    """Return what the roofline says."""
    return sum(max(operations / limits["flops"], moved / limits["bytes"]) for operations, moved in passes(size, kept))


def predicted_bytes(size: dict[str, Any], kept: int, count: int) -> int:
    """Return the memory of a step beside inputs and parameters, by the formula of `refswitch.kernels.cpu.switch` for ReLU that is not gated."""
    E, T, D, F = (size[letter] for letter in "ETDF")
    forward = T * D + 2 * T * E + 2 * kept * D + kept * F
    backward = T * D + T * E + 2 * kept * D + kept * F + 2 * E * D * F
    return FLOAT * (forward + backward + count * PANELS)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found.group(1)) * 1024 if found else 0


def peak_here(size: dict[str, Any], count: int) -> int:
    """Return by how much this process grows at its highest during its first step of this size; for a process that has done nothing before (Linux)."""
    ours, small = (Ours(problem_of(E, T, D, F, size["load"])) for E, T, D, F in ([size[letter] for letter in "ETDF"], (2, 64, 32, 32)))
    with on_threads(count):
        small.run()  # the machine code is in memory
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark begins here
        before = _status("VmRSS")
        ours.run()
    return _status("VmHWM") - before


def peak_bytes(size: dict[str, Any], count: int) -> int:
    """Return `peak_here` of a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory", json.dumps(size), "--threads", str(count)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(series: str, rounds: int, count: int) -> list[dict[str, Any]]:
    """Time the sizes of a series in turn, with the limits, and measure the memory of each."""
    sizes = [BASE | change for change in SERIES[series]]
    layers, kept = [], []
    for size in sizes:
        problem = problem_of(size["E"], size["T"], size["D"], size["F"], size["load"])
        ours = Ours(problem)
        ours.run()
        exact, bound, rows = truth(problem)
        check("refswitch", ours.results(), exact, bound)
        layers.append(ours)
        kept.append(rows)
    limits = Limits()
    times = alternate({str(number): ours.run for number, ours in enumerate(layers)} | limits.candidates, rounds)
    found = limits.read(times)
    results = []
    for number, (size, rows) in enumerate(zip(sizes, kept, strict=True)):
        taken = times[str(number)]
        results.append(
            {
                "series": series, **size, "kept": rows, "seconds": taken._asdict(), "limits": found,
                "predicted_seconds": predicted_seconds(size, rows, found), "predicted_bytes": predicted_bytes(size, rows, count),
            }
        )  # fmt: skip
    for result, size in zip(results, sizes, strict=True):
        result["peak_bytes"] = peak_bytes(size, count)
    return results


def show(results: list[dict[str, Any]]) -> str:
    """Return one series as text; ratios are to its first size."""
    first, rows = results[0], []
    for result in results:
        per_token, predicted = result["seconds"]["median"] / result["kept"], result["predicted_seconds"] / result["kept"]
        ratio = per_token / (first["seconds"]["median"] / first["kept"])
        ratio_predicted = predicted / (first["predicted_seconds"] / first["kept"])
        name = f"E {result['E']}, T {result['T']}, D {result['D']}, F {result['F']}, {result['load']}"
        times = [f"{per_token * 1e6:.2f}", f"{predicted * 1e6:.2f}", f"{ratio:.2f}", f"{ratio_predicted:.2f}", f"{ratio / ratio_predicted:.2f}"]
        memory = [f"{result['peak_bytes'] / 2**20:.0f}", f"{result['peak_bytes'] / result['predicted_bytes']:.2f}"]
        rows.append([name, *times, *memory])
    heads = [first["series"], "us/token", "roofline", "to first", "roofline's", "over it", "peak MiB", "of formula"]
    limits = f"limits: product {first['limits']['flops'] / 1e9:.0f} GFLOP/s, copy {first['limits']['bytes'] / 1e9:.1f} GB/s"
    return "\n".join([table(heads, rows), limits, ""])


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the cost of a token in each series, measured and predicted."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result["series"] for result in results))
    figure, panels = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.5), squeeze=False)
    letters = {"experts": "E", "tokens": "T", "width": "D", "skew": "load"}
    for axes, name in zip(panels[0], names, strict=True):
        mine = [result for result in results if result["series"] == name]
        where = [str(result[letters[name]]) for result in mine]
        axes.plot(where, [result["seconds"]["median"] / result["kept"] * 1e6 for result in mine], "o-", label="refswitch")
        axes.plot(where, [result["predicted_seconds"] / result["kept"] * 1e6 for result in mine], "k--", label="roofline")
        axes.set(xlabel=name, ylabel="microseconds per token", ylim=(0, None))
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    say(f"wrote {path}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", action="append", choices=tuple(SERIES), help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--memory", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(peak_here(options.memory, options.threads))
        return
    results: list[dict[str, Any]] = []
    with on_threads(options.threads), threads(options.threads):
        for series in options.series or SERIES:
            say(f"{series}: checking and timing")
            found = measure(series, options.rounds, options.threads)
            results += found
            print(show(found), flush=True)
    write_json(options.json, {"benchmark": "scaling", "threads": options.threads, "results": results})
    if options.png:
        draw(results, options.png)


if __name__ == "__main__":
    main()
