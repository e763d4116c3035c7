# May import: standard library, numpy, refswitch, conformance.kernel_tubes.
"""The kernels around the Switch layer at work: a case draws inputs, runs one operation forward and backward, and returns what it got beside its tube.

Run as a program it plays every case in a process of its own, for settings that Numba reads at import: `python -m conformance.kernel_cases tiny` where
nothing is compiled or bounds are checked, `... bits` compares every result on 1, 2 and 5 threads, `... planted` plays what is wrong on purpose.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from conformance import kernel_tubes as tube
from refswitch.config import ModelPoints
from refswitch.kernels.cpu import (
    adafactor,
    adamw,
    attention,
    bfloat16,
    cross_entropy,
    elementwise,
    embedding,
    feed_forward,
    functions,
    norm,
    philox,
    position,
)
from refswitch.kernels.cpu.jit import on_threads
from refswitch.kernels.cpu.workspace import Workspace
from refswitch.numbers import bfloat16 as bits_of_bfloat16
from refswitch.numbers import philox as words
from refswitch.numbers.precision import FORMATS
from refswitch.reference import adafactor as exact_adafactor
from refswitch.reference.adamw import adamw_init
from refswitch.reference.attention import AttentionParams, allowed_pairs
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.reference.position import position_buckets
from refswitch.verify.tubes import Tube, exact, ratio, store

F32, BF16 = FORMATS["float32"], FORMATS["bfloat16"]
POINTS = {
    "float32": ModelPoints(F32, F32, F32, F32),
    "selective": ModelPoints(BF16, F32, F32, BF16),
    "bfloat16": ModelPoints(BF16, BF16, BF16, BF16),
}
ONE, NONE = np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
Results = dict[str, tuple[np.ndarray, Tube]]


class Sizes(NamedTuple):
    """Sizes of a case, no two of them equal."""

    B: int
    L: int
    M: int
    D: int
    H: int
    K: int
    F: int
    V: int
    U: int


TINY = Sizes(B=2, L=5, M=7, D=6, H=3, K=4, F=9, V=13, U=8)
SMALL = Sizes(B=5, L=37, M=41, D=24, H=3, K=8, F=50, V=67, U=16)
TALL = Sizes(B=5, L=141, M=19, D=48, H=2, K=17, F=70, V=700, U=16)  # more rows than a task takes, by a part of one


class Draw(NamedTuple):
    """Where a case gets its arrays from."""

    rng: np.random.Generator

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Draw float32 values."""
        return (scale * self.rng.standard_normal(shape)).astype(np.float32)

    def factor(self, *shape: int) -> np.ndarray:
        """Draw dropout as a factor."""
        return np.where(self.rng.random(shape) < 0.75, np.float32(1.0 / 0.75), np.float32(0.0))


def norm_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """RMSNorm."""
    x, scale, dout = draw.normal(s.B, s.L, s.D), draw.normal(s.D), draw.normal(s.B, s.L, s.D)
    out, saved = norm.norm_forward(x, scale, 1e-6, points, ws)
    dx, dscale = norm.norm_backward(dout, saved, scale, points, ws)
    inverse_BL1 = saved.inverse_T.reshape(s.B, s.L, 1)
    expected, inverse = tube.norm_forward(x, scale, 1e-6, points)
    expected_dx, expected_dscale = tube.norm_backward(dout, x, inverse_BL1, scale, points)
    return {"out": (out, expected), "inverse": (inverse_BL1, inverse), "dx": (dx, expected_dx), "dscale": (dscale, expected_dscale)}


def _attention(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace, causal: bool, has_bias: bool, has_factor: bool) -> Results:
    M = s.L if causal else s.M
    x, memory, dout = draw.normal(s.B, s.L, s.D), draw.normal(s.B, M, s.D), draw.normal(s.B, s.L, s.D)
    inner = (s.D, s.H, s.K)
    params = AttentionParams(draw.normal(*inner, scale=0.3), draw.normal(*inner, scale=0.3), draw.normal(*inner), draw.normal(s.H, s.K, s.D))
    query_segment_BL, memory_segment_BM = np.sort(draw.rng.integers(0, 3, (s.B, s.L))), np.sort(draw.rng.integers(0, 3, (s.B, M)))
    allowed_BLM = allowed_pairs(query_segment_BL, memory_segment_BM, draw.rng.random((s.B, M)) < 0.9, causal)
    allowed_BLM[0, 1] = False  # a query that sees nothing
    bias_HLM = draw.normal(s.H, s.L, M) if has_bias else NONE
    factor_BHLM = draw.factor(s.B, s.H, s.L, M) if has_factor else ONE[None]
    out, saved = attention.attention_forward(x, memory, bias_HLM, params, allowed_BLM, factor_BHLM, points, ws)
    dx, dmemory, dbias, dparams = attention.attention_backward(dout, saved, params, points, ws)
    found = {"query": saved.query_BLHK, "key": saved.key_BMHK, "value": saved.value_BMHK, "mixed": saved.mixed_BLHK, "out": out}
    inputs = tube.attention_inputs(x, memory, params, points)
    expected = (*inputs, tube.attention_mixed(saved, points), tube.attention_out(saved, params, points))
    results = {name: (array, want) for (name, array), want in zip(found.items(), expected, strict=True)}
    gradients = {"dx_BLD": dx, "dmemory_BMD": dmemory, "dbias_HLM": dbias} | {f"d{name}": array for name, array in dparams._asdict().items()}
    wanted = tube.attention_backward(dout, saved, params, points)
    return results | {name: (gradients[name], want) for name, want in wanted.items() if name != "dbias_HLM" or has_bias}


def self_attention_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """Attention of a decoder to itself: causal, with a bias and dropout."""
    return _attention(s, points, draw, ws, causal=True, has_bias=True, has_factor=True)


def encoder_attention_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """Attention with a bias and without dropout."""
    return _attention(s, points, draw, ws, causal=False, has_bias=True, has_factor=False)


def cross_attention_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """Attention to a memory: no bias."""
    return _attention(s, points, draw, ws, causal=False, has_bias=False, has_factor=False)


def _feed_forward(activation: str, is_gated: bool, has_factor: bool) -> Callable[[Sizes, ModelPoints, Draw, Workspace], Results]:
    def case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
        x, dout = draw.normal(s.B, s.L, s.D), draw.normal(s.B, s.L, s.D)
        gate = draw.normal(s.D, s.F) if is_gated else None
        params = FeedForwardParams(draw.normal(s.D, s.F), gate, draw.normal(s.F, s.D))
        factor = draw.factor(s.B, s.L, s.F) if has_factor else ONE
        out, saved = feed_forward.feed_forward_forward(x, params, factor, activation, points, ws)
        dx, dparams = feed_forward.feed_forward_backward(dout, saved, params, activation, points, ws)
        expected, _, _, hidden = tube.feed_forward_forward(x, params, factor, activation, points)
        gradients = {"dx_BLD": dx} | {f"d{name}": array for name, array in dparams._asdict().items()}
        wanted = tube.feed_forward_backward(dout, x, params, factor, activation, points)
        results = {"out": (out, expected), "hidden": (saved.hidden_TF.reshape(s.B, s.L, s.F), hidden)}
        return results | {name: (gradients[name], want) for name, want in wanted.items()}

    return case


def cross_entropy_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """Loss with weights, with and without smoothing and z-loss: many tokens of few words, and few tokens of many."""
    results: Results = {}
    for smoothing, z_coef, shape in ((0.0, 0.0, (s.B, s.L, s.U)), (0.1, 1e-2, (2, 3, s.V))):
        logits, targets, weight = draw.normal(*shape, scale=3.0), draw.rng.integers(0, shape[-1], shape[:2]), draw.factor(*shape[:2])
        value, saved = cross_entropy.cross_entropy_forward(logits, targets, weight, 31.0, smoothing, z_coef, ws)
        dlogits = cross_entropy.cross_entropy_backward(1.5, saved, ws)
        expected, wanted = tube.cross_entropy(logits, targets, weight, 31.0, smoothing, z_coef, 1.5)
        results |= {f"value {smoothing}": (np.float64(value), expected), f"dlogits {smoothing}": (dlogits, wanted)}
    return results


def embedding_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """The table, and the logits from it or from a matrix of its own."""
    table, tokens = draw.normal(s.V, s.D), np.minimum(draw.rng.geometric(0.3, (s.B, s.L)) - 1, s.V - 1)
    x, dx, dlogits = embedding.embed_forward(tokens, table, ws), draw.normal(s.B, s.L, s.D), draw.normal(s.B, s.L, s.V)
    tied, tied_dx, tied_dtable = embedding.tied_logits_forward(dx, table, points, ws), *embedding.tied_logits_backward(dlogits, dx, table, points, ws)
    own = np.ascontiguousarray(table.T)
    logits, own_dx, dw = embedding.logits_forward(dx, own, points, ws), *embedding.logits_backward(dlogits, dx, own, points, ws)
    wanted_dx, wanted_dtable = tube.tied_logits_backward(dlogits, dx, table, points)
    return {
        "x": (x, exact(table[tokens])),
        "dtable": (embedding.embed_backward(dx, tokens, s.V, ws), tube.embed_backward(dx, tokens, s.V)),
        "tied": (tied, tube.tied_logits(dx, table, points)),
        "tied dx": (tied_dx, wanted_dx),
        "tied dtable": (tied_dtable, wanted_dtable),
        "logits": (logits, store(tube.projected(exact(dx), own, "bld,dv->blv", s.D), points.logits)),
        "logits dx": (own_dx, store(tube.projected(exact(dlogits), own, "blv,dv->bld", s.V), points.gradients)),
        "logits dw": (dw, tube.contract("bld,blv->dv", exact(dx), exact(dlogits), tube.FLOAT32, s.B * s.L)),
    }


def position_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """The bias of each pair, and its gradient by bucket."""
    table, bucket = draw.normal(s.U, s.H), position_buckets(np.arange(s.L), np.arange(s.M), s.U, 20, True)
    dbias = draw.normal(s.H, s.L, s.M)
    return {
        "bias": (position.position_bias_forward(table, bucket, ws), exact(np.moveaxis(table[bucket], -1, 0))),
        "dtable": (position.position_bias_backward(dbias, bucket, s.U), tube.position_bias_backward(dbias, bucket, s.U)),
    }


def glue_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """Sums, factors and residuals; what one element says is skipped."""
    shape, format = (s.B, s.L, s.D), points.activations
    x, y, factor = draw.normal(*shape), draw.normal(*shape), draw.factor(*shape)
    a, b, f = exact(x), exact(y), exact(factor)
    sum_ab, product = store(tube.add(a, b, tube.FLOAT32), format), store(tube.multiply(a, f, tube.FLOAT32), format)
    squares = tube.total(tube.multiply(a, a, tube.FLOAT32), (0, 1, 2), tube.FLOAT32, x.size)
    return {
        "added": (elementwise.added(x, y, format, ws), sum_ab),
        "added nothing": (elementwise.added(x, NONE, format, ws), store(a, format)),
        "scaled": (elementwise.scaled(x, factor, format, ws), product),
        "scaled by one": (elementwise.scaled(x, ONE, format, ws), store(a, format)),
        "residual": (elementwise.residual(x, y, factor, format, ws), store(tube.add(a, tube.multiply(b, f, tube.FLOAT32), tube.FLOAT32), format)),
        "residual of one": (elementwise.residual(x, y, ONE, format, ws), sum_ab),
        "squared norm": (np.float64(elementwise.squared_norm(x)), squares),
        "scaled by a third": (elementwise.scaled_by(x.copy(), 1 / 3), tube.scale(a, 1 / 3, tube.FLOAT32)),
    }


def draws_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """Draws by address and rounding: equal bits, also where a run begins inside a block and ends in the last one there is."""
    results: Results = {}
    x = draw.rng.integers(0, 2**32, s.B * s.L * s.D, dtype=np.uint32).view(np.float32)
    n = x.size
    for offset in (0, 3, 2**34 + 2, 2**64 - n):
        for name, got, wanted in (
            ("keep_factor", philox.keep_factor(2**40 + 7, 3, 9, (n,), 0.9, offset, ws), words.keep_factor(2**40 + 7, 3, 9, (n,), 0.9, offset)),
            ("jitter", philox.jitter(7, 3, 9, (n,), 0.01, offset, ws), words.jitter(7, 3, 9, (n,), 0.01, offset)),
            (
                "stochastic",
                bfloat16.stochastic_round_bf16(x, 7, 3, 9, offset, ws),
                bits_of_bfloat16.stochastic_round_bf16(x, words.random_bits(7, 3, 9, range(offset, offset + n))),
            ),
        ):
            results[f"{name} {offset}"] = (got.view(np.uint32), exact(wanted.view(np.uint32)))
    rounded = bits_of_bfloat16.round_bf16(x).view(np.uint32)
    return results | {"nearest": (bfloat16.round_bf16(x, ws).view(np.uint32), exact(rounded))}


ADAFACTOR_SHAPES = (  # every pair of factored axes, in every order of sizes, and tensors that are not factored
    ((5, 7, 9), 0, 4), ((5, 9, 7), 0, 4), ((9, 5, 7), 0, 4), ((9, 7, 5), 0, 4), ((7, 5, 9), 0, 4), ((7, 9, 5), 0, 4), ((6, 6, 6), 0, 4),
    ((40, 30), None, 8), ((30, 40), None, 8), ((13,), None, 8), ((5, 7), 0, 128), ((7, 5), 1, 128), ((3, 5, 7), 1, 4),
)  # fmt: skip


def adafactor_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """Two updates under both rules, each from the state that the kernels left."""
    results: Results = {}
    for shape, axis, smallest in (*ADAFACTOR_SHAPES, ((3, s.V, s.D), 0, 4)):
        for rule in ("mesh", "t5x"):
            w = draw.normal(*shape)
            state = exact_adafactor.adafactor_init(shape, axis, rule, smallest)
            for step in range(2):
                before, grad = w.copy(), (draw.normal(*shape) * np.exp(draw.normal(*shape))).astype(np.float32)
                wide = state._replace(**{name: getattr(state, name).astype(np.float64) for name in ("v_row", "v_column", "v")})
                want_w, want = exact_adafactor.adafactor_update(w.astype(np.float64), grad.astype(np.float64), wide, 0.1, axis, rule, smallest)
                state = state._replace(**{name: getattr(state, name).astype(np.float32) for name in ("v_row", "v_column", "v")})
                w, state = adafactor.adafactor_update(w, grad, state, 0.1, axis, rule, smallest, workspace=ws)
                label = f"{shape} {axis} {rule} {step}"
                results[f"w {label}"] = (w.copy(), tube.adafactor_update(before, want_w))
                results |= {f"{name} {label}": (getattr(state, name), tube.second_moment(getattr(want, name))) for name in ("v_row", "v_column", "v")}
    return results


def adamw_case(s: Sizes, points: ModelPoints, draw: Draw, ws: Workspace) -> Results:
    """Two updates, each from the state that the kernels left."""
    results: Results = {}
    w, settings = draw.normal(s.V, s.F), (0.01, 0.9, 0.999, 1e-8, 0.01)
    state = adamw_init(w.shape)
    state = state._replace(mean=state.mean.astype(np.float32), mean_square=state.mean_square.astype(np.float32))
    for step in range(2):
        grad = draw.normal(s.V, s.F)
        expected = tube.adamw_update(w.copy(), grad, state._replace(mean=state.mean.copy(), mean_square=state.mean_square.copy()), *settings)
        w, state = adamw.adamw_update(w, grad, state, *settings, workspace=ws)
        arrays = (w.copy(), state.mean.copy(), state.mean_square.copy())
        results |= {f"{name} {step}": (a, e) for name, a, e in zip(("w", "mean", "mean_square"), arrays, expected, strict=True)}
    return results


CASES: dict[str, Callable[[Sizes, ModelPoints, Draw, Workspace], Results]] = {
    "norm": norm_case,
    "self-attention": self_attention_case,
    "encoder attention": encoder_attention_case,
    "cross-attention": cross_attention_case,
    "feed-forward relu": _feed_forward("relu", is_gated=False, has_factor=True),
    "feed-forward gelu_erf": _feed_forward("gelu_erf", is_gated=False, has_factor=False),
    "feed-forward gelu_tanh, gated": _feed_forward("gelu_tanh", is_gated=True, has_factor=True),
    "feed-forward silu, gated": _feed_forward("silu", is_gated=True, has_factor=False),
    "cross-entropy": cross_entropy_case,
    "embedding": embedding_case,
    "position": position_case,
    "glue": glue_case,
    "draws": draws_case,
    "adafactor": adafactor_case,
    "adamw": adamw_case,
}


def play(name: str, sizes: Sizes, points: ModelPoints) -> Results:
    """Return what a case got beside what it should have got."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return CASES[name](sizes, points, Draw(np.random.default_rng(seed)), Workspace())


def breaches(results: Results) -> Iterator[str]:
    """Yield one line for each array that leaves its tube, or has another shape."""
    for name, (got, want) in results.items():
        if np.shape(got) != np.shape(want.value):
            yield f"{name} has shape {np.shape(got)}, but should be {np.shape(want.value)}"
        elif np.size(got):
            over = ratio(got, want)
            if not over.max() <= 1.0:
                at = np.unravel_index(np.argmax(over), np.shape(over))
                yield f"{name}{[int(i) for i in at]} is {np.asarray(got)[at]!r}, but should be {want.value[at]!r} within {want.radius[at]:.3g}"


def digest(name: str, points: ModelPoints) -> str:
    """Return a digest of every bit that a case got."""
    arrays = (np.ascontiguousarray(got).tobytes() for got, _ in play(name, TALL, points).values())
    return hashlib.sha256(b"".join(arrays)).hexdigest()


def _unfinished_probs(probs_LM: np.ndarray, *arguments: Any) -> None:
    """Softmax of half of the scores."""
    PLAIN["probs_rows"](probs_LM, arguments[0] * np.float32(0.5), *arguments[1:])


def _truncated(out: np.ndarray, x: np.ndarray) -> None:
    """Cut instead of rounding."""
    out[:] = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _last_row(out: np.ndarray, dx_TD: np.ndarray, rows: np.ndarray, first: int) -> None:
    """A token that occurs twice keeps the last gradient."""
    out[:] = dx_TD[rows[-1], first : first + out.size] if len(rows) else 0.0


def _without_mean(dprobs_LM: np.ndarray, probs_LM: np.ndarray) -> None:
    """A softmax whose probabilities need not sum to 1."""
    dprobs_LM *= probs_LM


def _first_bucket(dtable_U: np.ndarray, dbias_LM: np.ndarray, bucket_LM: np.ndarray) -> None:
    """Buckets without the last key."""
    PLAIN["collect_buckets"](dtable_U, dbias_LM[:, :-1], bucket_LM[:, :-1])


PLAIN = {"probs_rows": attention.probs_rows, "collect_buckets": position.collect_buckets, "philox_words": philox.philox_words}
PLANTED: tuple[tuple[Any, str, Callable[..., Any], str, str], ...] = (  # module, function, what it becomes, the case and the setting that must notice
    (norm, "product", lambda x, y: np.float32(np.sum(x)) ** 2 / np.float32(x.size), "norm", "float32"),
    (norm, "round_row", _truncated, "norm", "selective"),
    (attention, "probs_rows", _unfinished_probs, "encoder attention", "float32"),
    (attention, "dscores_rows", _without_mean, "cross-attention", "float32"),
    (attention, "scale_rows", lambda out, x, factor: out.__setitem__(..., x), "self-attention", "float32"),
    (attention, "add_rows", lambda out, x, accumulate: out.__setitem__(..., x), "encoder attention", "float32"),
    (feed_forward, "activate", lambda out, z, kind: functions.activate(out, z, functions.GELU_ERF), "feed-forward gelu_tanh, gated", "float32"),
    (feed_forward, "activation_slope", lambda out, z, kind: out.fill(1.0), "feed-forward relu", "float32"),
    (feed_forward, "round_row", _truncated, "feed-forward silu, gated", "selective"),
    (functions, "exp", lambda x: np.float32(np.exp(np.float64(x)) * (1.0 + 2.0**-17)), "feed-forward silu, gated", "float32"),
    (cross_entropy, "total", lambda x: np.float32(x.sum() * (1.0 + 2.0**-15)), "cross-entropy", "float32"),
    (embedding, "sum_rows", _last_row, "embedding", "float32"),
    (position, "collect_buckets", _first_bucket, "position", "float32"),
    (philox, "philox_words", lambda *words: PLAIN["philox_words"](*words)[::-1], "draws", "float32"),
    (adafactor, "step_task", lambda *arguments: 0.0, "adafactor", "float32"),
    (adafactor, "second_moment_decay", lambda step: 1.0 - (step + 2) ** -0.8, "adafactor", "float32"),
    (adamw, "adamw_chunk", lambda w, *arguments: None, "adamw", "float32"),
)


def unnoticed() -> list[str]:
    """Return the planted bugs that no tube notices; where nothing is compiled a kernel calls what its module names at the moment."""
    missed = []
    for module, name, wrong, case, points in PLANTED:
        right = getattr(module, name)
        setattr(module, name, wrong)
        try:
            if not list(breaches(play(case, TINY, POINTS[points]))):
                missed.append(f"{module.__name__}.{name} is wrong, and {case} does not notice")
        finally:
            setattr(module, name, right)
    return missed


def main(mode: str) -> int:
    """Play every case: `tiny` for breaches, `bits` for digests on 1, 2 and 5 threads; `planted` plays what is wrong on purpose."""
    if mode == "planted":
        missed = unnoticed()
        print("\n".join([*missed, f"{len(PLANTED)} bugs planted"]))
        return int(bool(missed))
    failures = 0
    for name in CASES:
        if mode == "bits":
            found = {}
            for threads in (1, 2, 5):
                with on_threads(threads):
                    found[threads] = digest(name, POINTS["float32"])
            lines = [] if len(set(found.values())) == 1 else [f"bits depend on the number of threads: {found}"]
        else:
            with on_threads(1):
                lines = [line for points in POINTS.values() for line in breaches(play(name, TINY, points))]
        for line in lines:
            print(f"{name}: {line}")
        failures += len(lines)
    print(f"{len(CASES)} cases played")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
