"""The Switch layer, forward and backward: ours against its peers, and against the matrix product's limit, in one run.

    python benchmarks/bench_switch.py --size 8,4096,256,1024 --load balanced --json switch.json --png switch.png

Every candidate gets the same tokens, weights and capacity, routes them itself, and is checked against float64 before it is timed. Then they run in
turn. Counted is useful work alone: 12 kept D F operations, forward and backward, whatever padding a candidate adds. Balanced: each expert is chosen
equally often, capacity factor 1.25. Skewed: experts are chosen as 1 / rank, and nothing is dropped.
May import: standard library, numpy, refswitch, common, peers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import peers
from common import Limits, alternate, say, table, threads, write_json

from refswitch.config import rounding_points
from refswitch.errors import Mismatch
from refswitch.kernels.cpu.jit import on_threads
from refswitch.kernels.cpu.switch import switch_backward, switch_forward
from refswitch.kernels.cpu.workspace import Workspace
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.switch import Statics, SwitchInputs, SwitchParams
from refswitch.spec_data import load_dialect, load_profile

SIZES = ((8, 4096, 256, 1024), (32, 4096, 256, 1024), (128, 4096, 256, 1024), (8, 4096, 512, 2048), (8, 1024, 768, 3072), (64, 8192, 768, 3072))
LOADS = ("balanced", "skewed")
UNIT = 2.0**-24  # of float32


def problem_of(E: int, T: int, D: int, F: int, load: str, seed: int = 0) -> peers.Problem:
    """Return tokens that lean towards the experts that the load gives them, and weights at the scale of an initialised layer."""
    rng = np.random.default_rng(seed)
    share_E = np.ones(E) if load == "balanced" else 1.0 / np.arange(1, E + 1)
    expert_T = rng.permutation(np.repeat(np.arange(E), np.diff(np.rint(np.cumsum(np.r_[0.0, share_E]) / share_E.sum() * T).astype(int))))
    w_router_DE = rng.standard_normal((D, E)) * D**-0.5
    x_TD = rng.standard_normal((T, D)) + 8.0 * w_router_DE[:, expert_T].T
    arrays = (x_TD, w_router_DE, rng.standard_normal((E, D, F)) * D**-0.5, rng.standard_normal((E, F, D)) * F**-0.5, rng.standard_normal((T, D)))
    capacity = T * 5 // (4 * E) if load == "balanced" else int(np.bincount(expert_T).max() * 5 // 4)
    return peers.Problem(*(array.astype(np.float32) for array in arrays), capacity)


class Ours:
    """The layer in kernels, as the peers are: `run` and `results`."""

    def __init__(self, problem: peers.Problem):
        (T, D), (E, _, F) = problem.x_TD.shape, problem.w_in_EDF.shape
        one, zero = np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
        dialect = load_dialect("mesh_tensorflow")
        self.inputs = SwitchInputs(problem.x_TD[None], np.ones((1, T), bool), one, zero, zero, np.zeros((1, 1), np.float32), one)
        biases = (np.zeros((E, F), np.float32), np.zeros((E, F), np.float32), np.zeros((E, D), np.float32))
        experts = ExpertsParams(problem.w_in_EDF, None, problem.w_out_EFD, *biases)
        self.params = SwitchParams(problem.w_router_DE, np.zeros(E, np.float32), experts, np.zeros(D, np.float32))
        self.statics = Statics(dialect, rounding_points(dialect, load_profile("float32")), "relu", problem.capacity)
        self.workspace, self.dout_GSD = Workspace(), problem.dout_TD[None]

    def run(self) -> None:
        """Compute forward and backward in the buffers of the run before."""
        self.workspace.reset()
        self.outputs, saved = switch_forward(self.inputs, self.params, self.statics, self.workspace)
        self.dx_GSD, self.dparams = switch_backward(self.dout_GSD, 0.0, 0.0, saved, self.params, self.statics, self.workspace)

    def results(self) -> dict[str, np.ndarray]:
        """Return what is checked."""
        experts = self.dparams.experts
        return {"out": self.outputs.out_GSD[0], "dx": self.dx_GSD[0], "dw_in": experts.w_in_EDF, "dw_out": experts.w_out_EFD}


def truth(problem: peers.Problem) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """Return results in float64, a bound on the error of each in float32 (gamma of its longest sum, on the magnitudes), and the kept tokens."""
    x, w_router, w_in, w_out, dout = (array.astype(np.float64) for array in problem[:5])
    (T, D), (E, _, F) = x.shape, w_in.shape
    logits = x @ w_router
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    expert, size = probs.argmax(1), np.abs
    out, dx, dw_in, dw_out, dgate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(w_in), np.zeros_like(w_out), np.zeros(T)
    b_out, b_dx, b_in, b_dw_out, b_gate = (np.zeros_like(array) for array in (out, dx, dw_in, dw_out, dgate))
    kept = 0
    for e in range(E):
        t = np.flatnonzero(expert == e)[: problem.capacity]
        kept, gate = kept + t.size, probs[t, e][:, None]
        z, m_hidden = x[t] @ w_in[e], size(x[t]) @ size(w_in[e])
        hidden, up, m_up = np.maximum(z, 0.0), gate * dout[t], gate * size(dout[t])
        raw, m_raw = hidden @ w_out[e], m_hidden @ size(w_out[e])
        dz, m_dz = np.where(z > 0.0, up @ w_out[e].T, 0.0), m_up @ size(w_out[e]).T
        out[t], b_out[t], dgate[t], b_gate[t] = gate * raw, gate * m_raw, (dout[t] * raw).sum(1), (size(dout[t]) * m_raw).sum(1)
        dx[t], b_dx[t], dw_in[e], b_in[e] = dz @ w_in[e].T, m_dz @ size(w_in[e]).T, x[t].T @ dz, size(x[t]).T @ m_dz
        dw_out[e], b_dw_out[e] = hidden.T @ up, m_hidden.T @ m_up
    chosen, every = np.eye(E)[expert], probs[np.arange(T), expert][:, None]
    dx += (dgate[:, None] * every * (chosen - probs)) @ w_router.T
    b_dx += (b_gate[:, None] * every * (chosen + probs)) @ size(w_router).T
    # Each magnitude passes through the sums of its path, D + F or D + F + T terms and the router's D + E; the gate's own error is that of its logits.
    path = 4 * D + 2 * F + 2 * E + T
    steepness = 1.0 + float((size(x) @ size(w_router)).max())
    gamma = path * UNIT / (1.0 - path * UNIT) * steepness
    return (
        {"out": out, "dx": dx, "dw_in": dw_in, "dw_out": dw_out},
        {"out": gamma * b_out, "dx": gamma * b_dx, "dw_in": gamma * b_in, "dw_out": gamma * b_dw_out},
        kept,
    )


def check(name: str, results: dict[str, np.ndarray], exact: dict[str, np.ndarray], bound: dict[str, np.ndarray]) -> None:
    """Refuse to time what is wrong.

    Raises
    ------
    Mismatch
        If a value lies outside its bound.
    """
    for what, value in results.items():
        error = np.abs(value - exact[what])
        if not np.all(error <= bound[what]):
            place = np.unravel_index(np.argmax(error - bound[what]), error.shape)
            raise Mismatch(
                f"{name}: {what}{list(map(int, place))} is {value[place]}, but should be {exact[what][place]} within {bound[what][place]:.1e}"
            )


def measure(size: tuple[int, int, int, int], load: str, rounds: int, names: list[str], with_compiled: bool) -> dict[str, Any]:
    """Check and time ours, the peers and the limits at one size."""
    E, T, D, F = size
    problem = problem_of(E, T, D, F, load)
    exact, bound, kept = truth(problem)
    ours, limits = Ours(problem), Limits()
    ours.run()
    candidates, missing = {"refswitch": ours}, {}
    for name in names:
        for is_compiled in (False, True) if with_compiled else (False,):
            label = f"{name} compiled" if is_compiled else name
            made = peers.peer(name, problem, is_compiled)
            if isinstance(made, str):
                missing[label] = made
            else:
                candidates[label] = made
    for label, candidate in candidates.items():
        check(label, candidate.results(), exact, bound)
    del exact, bound
    times = alternate({label: candidate.run for label, candidate in candidates.items()} | limits.candidates, rounds)
    found = limits.read(times)
    work = 12.0 * kept * D * F
    fastest = min((label for label in candidates if label != "refswitch"), key=lambda label: times[label].median, default="")
    speed = {label: work / times[label].median for label in candidates}
    return {
        "E": E, "T": T, "D": D, "F": F, "load": load, "kept": kept, "seconds": {label: taken._asdict() for label, taken in times.items()},
        "limits": found, "flops": speed, "of_limit": speed["refswitch"] / found["flops"], "fastest_peer": fastest,
        "ratio": times[fastest].median / times["refswitch"].median if fastest else None, "not_run": missing,
    }  # fmt: skip


def show(result: dict[str, Any]) -> str:
    """Return one size's result as text."""
    head = f"E {result['E']}, {result['T']} tokens ({result['kept']} kept, {result['load']}), D {result['D']}, F {result['F']}"
    rows = []
    for label, taken in result["seconds"].items():
        flops = result["flops"].get(label)
        cells = [f"{flops / 1e9:.0f}", f"{flops / result['limits']['flops']:.0%}"] if flops else ["", ""]
        ratio = f"{taken['median'] / result['seconds']['refswitch']['median']:.2f}" if flops else ""
        rows.append([label, f"{taken['median'] * 1e3:.1f}", f"{taken['low'] * 1e3:.1f} - {taken['high'] * 1e3:.1f}", *cells, ratio])
    limits = f"limits: product {result['limits']['flops'] / 1e9:.0f} GFLOP/s, copy {result['limits']['bytes'] / 1e9:.1f} GB/s"
    missing = [f"not run: {label}: {why}" for label, why in result["not_run"].items()]
    return "\n".join([head, table(["", "ms", "quartiles", "GFLOP/s", "of limit", "time / ours"], rows), limits, *missing, ""])


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw each size's speed over its intensity, useful operations per byte of weights, gradients and activations, under the roof."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, result in enumerate(results):
        flops = 12.0 * result["kept"] * result["D"] * result["F"]
        moved = 4.0 * (6 * result["E"] * result["D"] * result["F"] + result["kept"] * (8 * result["D"] + 6 * result["F"]))
        intensity = flops / moved
        shown = [("refswitch", "o", "C0"), (result["fastest_peer"], "x", "C1")]
        for label, marker, color in shown:
            if label:
                axes.plot(
                    intensity,
                    result["flops"][label] / 1e9,
                    marker,
                    color=color,
                    label=("fastest peer" if marker == "x" else label) if not number else None,
                )
        axes.annotate(f"E {result['E']}, D {result['D']}, {result['load']}", (intensity, result["flops"]["refswitch"] / 1e9), fontsize=7)
    limits = {name: max(result["limits"][name] for result in results) for name in ("flops", "bytes")}
    grid = np.logspace(0, 3, 50)
    axes.plot(grid, np.minimum(grid * limits["bytes"], limits["flops"]) / 1e9, "k-", linewidth=1, label="roof")
    axes.set(xscale="log", yscale="log", xlabel="useful operations per byte", ylabel="GFLOP/s", title="Switch layer, forward and backward")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    say(f"wrote {path}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", help="E,T,D,F; may be repeated; default: the six of the project")
    parser.add_argument("--load", action="append", choices=LOADS, help="default: both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", action="append", choices=peers.NAMES, help="default: all")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="each peer under torch.compile too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    sizes = [tuple(int(part) for part in text.split(",")) for text in options.size] if options.size else SIZES
    results = []
    with on_threads(options.threads), threads(options.threads):
        for size in sizes:
            for load in options.load or LOADS:
                say(f"{size} {load}: checking and timing")
                results.append(measure(size, load, options.rounds, list(options.peer or peers.NAMES), options.compiled))
                print(show(results[-1]), flush=True)
    write_json(options.json, {"benchmark": "switch", "threads": options.threads, "results": results})
    if options.png:
        draw(results, options.png)


if __name__ == "__main__":
    main()
