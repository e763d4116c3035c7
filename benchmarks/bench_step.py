# May import: standard library, numpy, torch, transformers, threadpoolctl, refswitch, conformance (on the path).
"""A training step of the engine against one of transformers: forward, backward, Adafactor, in float32, on the same cores, in the same run.

    python benchmarks/bench_step.py [NAME ...] [--rounds 7] [--batch 8] [--peers eager,sdpa,eager+compile] [--json FILE]

Both train one model: 4 + 4 layers, every second sparse, ReLU, tied, sequences of 512 and 114 tokens, vocabulary 384, capacity factor 1.25 for each
sequence, no dropout unless asked for. The peer is SwitchTransformersForConditionalGeneration with transformers' Adafactor, on as many threads as the
engine, with each form of attention that it has, compiled or not: the fastest of those that were asked for counts. It runs without its router losses,
which saves it their work; the engine computes them. First both are judged stage by stage against the reference on a short batch, and their losses on
the long one are compared. Then steps alternate. A table says where the engine's time goes, another what it holds in memory beside what this formula
predicts (without dropout):

    4 bytes * (2 P + O + A + X)
    P   parameters, and as many gradients
    O   Adafactor's state: rows and columns of what is factored, the whole of what is not
    A   what forward keeps for backward. With T tokens of width D, I = heads * head width, F the hidden width, E experts:
          attention   3 T D (normed, out, stream) + 2 T I (query, mixed) + 2 U I (key, value of the U tokens of the memory)
          dense       3 T D + T F (hidden)
          sparse      5 T D (normed, out, stream, packed, out of the experts) + T F + 2 T E (logits, probabilities) + 12 T (route, gate, rows)
        and per stack 2 T D (embedded, normed) + H L L (bias) + B L (L + the memory's length) / 4 (masks), and 2 B L V (logits, their gradient)
    X   what the backward of the last blocks takes before it gives back; all blocks before find these buffers free:
          decoder     9 T D + 2 U D + 4 T I + 4 U I + 2 T F + T E + 5 H L L (queries', keys', values' gradients, the bias's in parts)
          encoder     T F + T E + 5 H L L; for the rest it takes what the decoder's cross-attention has given back
        and 1.1 MiB of panels for each thread

The workspace lends a free buffer to a request of its own size alone, so nothing that A has given back serves as a gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Limits, alternate, threads, write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conformance"))

ENCODER_LENGTH, DECODER_LENGTH, VOCABULARY, LAYERS = 512, 114, 384, 4
WARM_UP = 2
UPDATE = ("adafactor_update", "squared_norm", "scaled_by")


class Size(NamedTuple):
    """One model."""

    name: str
    width: int
    experts: int


SIZES = {size.name: size for size in (Size("w256e8", 256, 8), Size("w256e32", 256, 32), Size("w512e8", 512, 8))}


def peer_config(size: Size, capacity: int, attention: str, dropout: float) -> Any:
    """Say the model in transformers' words."""
    from transformers import SwitchTransformersConfig

    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=size.width, d_kv=64, d_ff=4 * size.width, num_heads=size.width // 64, num_layers=LAYERS,
        num_decoder_layers=LAYERS, num_sparse_encoder_layers=LAYERS // 2, num_sparse_decoder_layers=LAYERS // 2, num_experts=size.experts,
        expert_capacity=capacity, router_jitter_noise=0.0, dropout_rate=dropout, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = attention
    return config


def peer_of(size: Size, attention: str, dropout: float) -> Any:
    """Build the peer with its own initial weights, the same for every form of attention."""
    import torch
    from transformers import SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    capacity = math.ceil(1.25 * ENCODER_LENGTH / size.experts)
    model = SwitchTransformersForConditionalGeneration(peer_config(size, capacity, attention, dropout))
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    return model.train()


def ours_of(size: Size, peer: Any) -> tuple[Any, Any]:
    """Return the peer's model as refswitch's config and parameters. The dialect's routing is transformers'; its losses are Mesh TensorFlow's sums."""
    from refswitch.checkpoints.hugging_face import params_from
    from refswitch.model_config import ModelConfig, sparse_layers

    capacity = peer.config.expert_capacity
    config = ModelConfig(
        name=size.name, vocabulary=VOCABULARY, d_model=size.width, d_kv=64, heads=size.width // 64, d_ff=4 * size.width, encoder_layers=LAYERS,
        decoder_layers=LAYERS, encoder_sparse=sparse_layers(LAYERS, 2, 1), decoder_sparse=sparse_layers(LAYERS, 2, 1), experts=size.experts,
        activation="relu", gated=False, tied=True, position_buckets=32, max_distance=128, norm_epsilon=1e-6,
        dropout=peer.config.dropout_rate, expert_dropout=peer.config.dropout_rate,
        dialect=f"hf_ge_5_18,capacity.constant={capacity},aux.f.count=choice,aux.layers=sum,noise.kind=none",
    )  # fmt: skip
    return config, params_from({name: tensor.detach().numpy().copy() for name, tensor in peer.state_dict().items()}, config)


def draw_batch(rows: int, encoder_length: int, decoder_length: int) -> Any:
    """Draw a batch without padding."""
    from refswitch.reference.transformer import Batch

    rng = np.random.default_rng(1)
    encoder_BM, targets_BL = rng.integers(2, VOCABULARY, (rows, encoder_length)), rng.integers(2, VOCABULARY, (rows, decoder_length))
    decoder_BL = np.concatenate([np.zeros((rows, 1), np.int64), targets_BL[:, :-1]], axis=1)
    ones_BM, ones_BL = np.ones_like(encoder_BM), np.ones_like(targets_BL)
    encoder = encoder_BM, ones_BM, ones_BM == 1, np.arange(encoder_length)
    return Batch(*encoder, decoder_BL, ones_BL, ones_BL == 1, np.arange(decoder_length), targets_BL, ones_BL.astype(np.float32))


class Ours:
    """The engine's side: one state that its steps move."""

    def __init__(self, config: Any, params: Any, batch: Any, backend: Any) -> None:
        """Begin with the peer's weights."""
        from refswitch.engine.optimizer import Optimizer
        from refswitch.engine.step import Setup, check, initial_state
        from refswitch.precision import precision

        self.setup = Setup(config, precision("float32"), Optimizer("adafactor"), seed=0)
        check(self.setup, backend)
        self.batch, self.backend, self.params, self.state = batch, backend, params, initial_state(params, self.setup, backend)
        self.told: Any = None

    def __call__(self) -> float:
        """Make one step; return its cross-entropy."""
        from refswitch.engine.step import train_step

        self.state, self.told = train_step(self.state, self.batch, self.setup, 1e-3, self.backend)
        return float(self.told.losses.cross_entropy)

    def logits(self) -> tuple[np.ndarray, float]:
        """Return the logits and cross-entropy of a pass without dropout."""
        from refswitch.engine.model import model_forward
        from refswitch.engine.noise import Address, draw_noise
        from refswitch.engine.step import part_statics

        (B, M), (_, L) = self.batch.encoder_tokens_BM.shape, self.batch.targets_BL.shape
        quiet = dataclasses.replace(self.setup.config, dropout=0.0, expert_dropout=0.0)
        statics = part_statics(self.setup, self.batch, 1.0)
        with self.backend.running():
            self.backend.begin()
            noise = draw_noise(quiet, statics, Address(0, 0, 0), (B, M, L), True, self.backend)
            outputs, _ = model_forward(self.batch, self.state.params, noise, statics, self.backend)
            return np.array(outputs.logits_BLV), outputs.losses.cross_entropy


class Theirs:
    """The peer's side."""

    def __init__(self, model: Any, batch: Any, compiled: bool) -> None:
        """Begin with transformers' Adafactor at a fixed rate."""
        import torch
        from transformers.optimization import Adafactor

        tensors = {"input_ids": batch.encoder_tokens_BM, "decoder_input_ids": batch.decoder_tokens_BL, "labels": batch.targets_BL}
        self.inputs = {name: torch.tensor(array) for name, array in tensors.items()}
        self.optimizer = Adafactor(model.parameters(), lr=1e-3, scale_parameter=True, relative_step=False, warmup_init=False)
        self.plain, self.model = model, torch.compile(model) if compiled else model

    def __call__(self) -> float:
        """Make one step; return its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def logits(self) -> tuple[np.ndarray, float]:
        """Return the logits and the loss of a pass without dropout."""
        import torch

        self.plain.eval()
        with torch.no_grad():
            outputs = self.plain(**self.inputs)
        self.plain.train()
        return outputs.logits.numpy(), float(outputs.loss)


class Timed:
    """A backend that notes the time of each operation."""

    def __init__(self, backend: Any) -> None:
        """Stand before a backend."""
        self._backend, self.seconds = backend, dict[str, float]()

    def __getattr__(self, name: str) -> Any:
        """Return the backend's operation with a clock around it."""
        attribute = getattr(self._backend, name)
        if not callable(attribute) or name in ("running", "mark", "dtype"):
            return attribute

        def timed(*args: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            result = attribute(*args, **keywords)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            return result

        return timed


def check_stages(name: str, config: Any, params: Any, run: Callable[[Any], dict[str, np.ndarray]]) -> None:
    """Judge every stage of a short forward pass on its own previous stage, with a capacity that drops tokens.

    Raises
    ------
    SystemExit
        With the first stage outside its radius.
    """
    from refswitch.verify.compare_model import compare_trace, draw_inputs

    inputs = draw_inputs(config, 2, 64, 32, 0)
    checks = list(compare_trace(run(inputs), config, params, inputs))
    failing = [check for check in checks if not check.ok]
    if failing:
        raise SystemExit(f"{name} deviates at {failing[0].name} {failing[0].place}: {failing[0].worst:.3g} times its radius")
    print(f"  {name}: {len(checks)} stages within their radius, the largest at {max(check.worst for check in checks):.2f} of it")


def peer_trace(peer: Any) -> Callable[[Any], dict[str, np.ndarray]]:
    """Return what runs the peer on inputs and gives its trace."""
    sys.path.insert(0, str(ROOT / "conformance" / "peers"))
    from hugging_face import trace

    return lambda inputs: trace(peer, inputs._asdict())


def compare_losses(ours: Ours, theirs: Theirs) -> dict[str, float]:
    """Compare both sides' losses on the long batch, where they start from the same weights.

    Raises
    ------
    SystemExit
        Where the losses differ by more than the logits explain: a mean of log-softmaxes moves by no more than the mean over the targets of
        the range of its logits' differences, and float32 evaluates it to within its own radius.
    """
    from refswitch.spec_data import load_profile
    from refswitch.verify import model_stages, tubes

    (own_BLV, own), (peer_BLV, peer) = ours.logits(), theirs.logits()
    difference_BLV = own_BLV.astype(np.float64) - peer_BLV
    targets_BL, weight_BL = ours.batch.targets_BL, ours.batch.weight_BL.astype(np.float64)
    arithmetic = tubes.arithmetic_of(load_profile("float32"))
    own_tube, peer_tube = (model_stages.loss(tubes.exact(x.astype(np.float64)), targets_BL, weight_BL, arithmetic) for x in (own_BLV, peer_BLV))
    radius = float(np.mean(np.ptp(difference_BLV, axis=-1)) + own_tube.radius + peer_tube.radius)
    if not abs(own - peer) <= radius:
        raise SystemExit(f"the losses are {own!r} and {peer!r}, which differ by more than {radius:.3g}")
    distance = float(np.linalg.norm(difference_BLV) / np.linalg.norm(peer_BLV))
    print(f"  losses {own:.7f} and {peer:.7f}: within {radius:.2e}; the logits differ by {distance:.1e}, normwise")
    return {"ours": own, "peer": peer, "radius": radius, "logits_normwise": distance}


def predicted_bytes(config: Any, params: Any, state: Any, rows: int, threads: int) -> float:
    """Return what the formula above says."""
    from refswitch.kernels.cpu.matmul import PANELS
    from refswitch.tree import leaves

    D, I, F, E, H = config.d_model, config.heads * config.d_kv, config.d_ff, config.experts, config.heads  # noqa: E741
    moments = sum(np.size(leaf) for leaf in leaves(state).values())
    words = 2 * sum(leaf.size for leaf in leaves(params).values()) + moments + 2 * rows * DECODER_LENGTH * config.vocabulary + threads * PANELS
    U = rows * ENCODER_LENGTH
    for length, sparse, seen in (
        (ENCODER_LENGTH, config.encoder_sparse, ENCODER_LENGTH),
        (DECODER_LENGTH, config.decoder_sparse, ENCODER_LENGTH + DECODER_LENGTH),
    ):
        T, is_decoder = rows * length, seen != length
        words += 2 * T * D + H * length**2 + rows * length * seen // 4
        attention = 3 * T * D + 4 * T * I + is_decoder * (3 * T * D + 2 * T * I + 2 * U * I)
        words += sum(attention + (5 * T * D + T * F + 2 * T * E + 12 * T if i in sparse else 3 * T * D + T * F) for i in range(LAYERS))
        more = 9 * T * D + 2 * U * D + 4 * T * I + 4 * U * I + T * F if is_decoder else 0
        words += more + T * F + T * E + 5 * H * length**2
    return 4.0 * words


def measured_bytes(ours: Ours) -> dict[str, float]:
    """Return the most that Python and NumPy hold while a side is built and makes three steps, and what its last step allocates."""
    tracemalloc.start()
    fresh = Ours(ours.setup.config, ours.params, ours.batch, type(ours.backend)())
    for _ in range(3):
        fresh()
    _, peak = tracemalloc.get_traced_memory()
    before, held = tracemalloc.get_traced_memory()[0], fresh.backend.workspace.held_bytes
    tracemalloc.reset_peak()
    fresh()
    _, last = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "peak": peak, "buffers": held, "last_step_over_what_is_held": last - before, "new_buffers": fresh.backend.workspace.held_bytes - held,
        "process_peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip


def breakdown(ours: Ours, steps: int = 3) -> dict[str, float]:
    """Return the seconds of each operation in one step, and what is left of the step."""
    backend = ours.backend
    ours.backend = timed = Timed(backend)
    begin = time.perf_counter()
    for _ in range(steps):
        ours()
    whole = (time.perf_counter() - begin) / steps
    ours.backend = backend
    parts = {name: seconds / steps for name, seconds in sorted(timed.seconds.items(), key=lambda item: -item[1])}
    return parts | {"everything else": whole - sum(parts.values()), "step": whole}


def bench(size: Size, rows: int, rounds: int, forms: list[str], dropout: float) -> dict[str, Any]:
    """Check one model, then time it."""
    from engine_trace import trace_of

    from refswitch import tree
    from refswitch.backends.cpu import Cpu
    from refswitch.planning.counts import full_flops_per_sequence
    from refswitch.precision import PRECISIONS

    peer = peer_of(size, "eager", dropout).eval()
    config, params = ours_of(size, peer)
    backend = Cpu()
    batch = draw_batch(rows, ENCODER_LENGTH, DECODER_LENGTH)
    narrow = {path: leaf.astype(np.float32) for path, leaf in tree.leaves(params).items()}
    single = tree.with_leaves(params, narrow)
    check_stages("refswitch", config, params, lambda inputs: trace_of(config, single, inputs, PRECISIONS["float32"], backend))
    check_stages("transformers", config, params, peer_trace(peer))
    ours = Ours(config, params, batch, backend)
    sides: dict[str, Any] = {"refswitch": ours}
    refused = {}
    for form in forms:
        attention, _, compiled = form.partition("+")
        try:
            sides[form] = Theirs(peer_of(size, attention, dropout), batch, bool(compiled))
        except ValueError as error:  # transformers has no such attention for this model
            refused[form] = str(error).split(". ")[0]
            print(f"  {form}: {refused[form]}")
    losses = compare_losses(ours, next(side for side in sides.values() if side is not ours))
    limits = Limits()
    with threads(os.cpu_count() or 1):
        times = alternate(sides | limits.candidates, rounds, WARM_UP)
    limit = limits.read(times)["flops"]
    tokens = rows * (ENCODER_LENGTH + DECODER_LENGTH)
    flops = 3 * rows * full_flops_per_sequence(config, ENCODER_LENGTH, DECODER_LENGTH)
    best = min((name for name in sides if name != "refswitch"), key=lambda name: times[name].median)
    for name in sides:
        taken = times[name]
        print(f"  {name:16} {taken.median:7.3f} s  [{taken.low:.3f} {taken.high:.3f}]  {tokens / taken.median:8.0f} tokens/s")
    ratio, fraction = times[best].median / times["refswitch"].median, flops / times["refswitch"].median / limit
    print(f"  {ratio:.2f} times {best}; {fraction:.0%} of the {limit / 1e9:.0f} GFLOP/s of a matrix product")
    parts = breakdown(ours)
    for name, part in parts.items():
        print(f"    {name:24} {1e3 * part:8.1f} ms  {part / parts['step']:5.1%}")
    update = sum(parts.get(name, 0.0) for name in UPDATE)
    print(f"    of which the update {1e3 * update:.1f} ms: forward and backward alone are {tokens / (parts['step'] - update):.0f} tokens/s")
    memory = measured_bytes(ours)
    predicted = predicted_bytes(config, params, ours.state.optimizer, rows, os.cpu_count() or 1)
    print(f"  memory: {memory['peak'] / 2**20:.0f} MiB, {memory['peak'] / predicted:.2f} of {predicted / 2**20:.0f} MiB that the formula predicts;")
    brief, lasting = memory["last_step_over_what_is_held"], memory["new_buffers"]
    print(f"    a step then takes {brief / 2**20:.2f} MiB for a while and {lasting} bytes for good")
    return {
        "size": size._asdict(), "batch": rows, "dropout": dropout, "tokens": tokens,
        "times": {name: taken._asdict() for name, taken in times.items()},
        "best_peer": best, "refused": refused, "threads": os.cpu_count(), "ratio": ratio,
        "flops": flops, "limit_flops_per_second": limit, "fraction_of_limit": fraction, "losses": losses, "parts": parts,
        "memory": memory | {"predicted": predicted},
    }  # fmt: skip


def main() -> None:
    """Parse, check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=list(SIZES), choices=[*SIZES, []], help="which models")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument(
        "--peers", default="eager,sdpa,eager+compile", help="forms of the peer, comma-separated: eager, sdpa, eager+compile, sdpa+compile"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="rate on both sides; 0.1 is what transformers' config has by default")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    given = parser.parse_args()
    results = []
    for name in given.sizes:
        print(f"{name}: 4 + 4 layers, {given.batch} x ({ENCODER_LENGTH} + {DECODER_LENGTH}) tokens, float32, dropout {given.dropout:g}", flush=True)
        results.append(bench(SIZES[name], given.batch, given.rounds, given.peers.split(","), given.dropout))
    write_json(given.json, {"benchmark": "step", "results": results})


if __name__ == "__main__":
    main()
