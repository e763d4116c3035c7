# May import: standard library, numpy, pytest, refswitch, engine_trace and properties (on the path).
"""The engine on the CPU's kernels: every stage of a forward pass and every gradient of a training pass within the radius of its own inputs.

No tolerance is chosen: each operation is judged on what it really took, forward and backward, as other people's models are, and a Switch layer goes
to the judge of the layer. That the pass is composed of these operations as it should be is the identity with the reference. Spec: numbers.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "spec"))
from engine_trace import trace_of
from properties.model_tubes import attention_tubes, cross_entropy_tubes, feed_forward_tubes, norm_tubes, tied_logits_tubes

from refswitch.backends import reference
from refswitch.backends.cpu import Cpu
from refswitch.checkpoints.template import template_of
from refswitch.engine.decoding import generate
from refswitch.engine.optimizer import Optimizer
from refswitch.engine.step import (
    Setup,
    TrainState,
    check,
    initial_state,
    loss_and_gradients,
    part_forward,
    part_statics,
    rounded_tree,
    state_arrays,
    state_from,
    train_step,
)
from refswitch.errors import InputError
from refswitch.model_config import PRESETS, ModelConfig
from refswitch.numbers.bfloat16 import round_bf16
from refswitch.precision import PRECISIONS, rounded
from refswitch.reference.switch import Statics
from refswitch.reference.transformer import Batch, ModelParams
from refswitch.spec_data import load_profile, parse_record
from refswitch.tree import leaves, with_leaves
from refswitch.verify import tubes
from refswitch.verify.case import Case
from refswitch.verify.cases import Prepared, Recipe, Target
from refswitch.verify.compare_model import compare_trace, draw_inputs
from refswitch.verify.judge import judge_case
from refswitch.verify.tubes import Tube
from refswitch.worlds.one import ONE

HF = "hf_ge_5_18,capacity.constant=3,aux.f.count=choice,aux.layers=sum,noise.kind=none"
TINY = replace(PRESETS["tiny_switch"], vocabulary=19, d_model=6, d_kv=3, d_ff=7, experts=3, dialect=HF)
CONFIGS = {
    "sparse": TINY,
    "every layer sparse": replace(TINY, encoder_sparse=(0, 1), decoder_sparse=(0, 1)),
    "gated, untied": replace(TINY, activation="gelu_tanh", gated=True, tied=False),
    "dense": replace(PRESETS["tiny_dense"], vocabulary=19, d_model=6, d_kv=3, d_ff=7, activation="silu"),
    "dense, ReLU": replace(PRESETS["tiny_dense"], vocabulary=19, d_model=6, d_kv=3, d_ff=7),
}
MESH = replace(TINY, dialect="mesh_tensorflow", dropout=0.25, expert_dropout=0.4, encoder_sparse=(0, 1), decoder_sparse=(0, 1))
B, M, L, SEED = 4, 10, 6, 11


def params_of(config: ModelConfig, format: str = "float32") -> ModelParams:
    """Draw weights that a format holds."""
    rng = np.random.default_rng(3)
    shapes = {path: leaf.shape for path, leaf in leaves(template_of(config)).items()}
    values = {path: rng.normal(size=shape) * (0.0 if "b_" in path else 0.4) + ("norm" in path) for path, shape in shapes.items()}
    narrow = leaves(rounded(with_leaves(template_of(config), values), PRECISIONS["selective" if format == "bfloat16" else "float32"].weights))
    return with_leaves(template_of(config), {path: leaf.astype(np.float32) for path, leaf in narrow.items()})


def batch_of() -> Batch:
    """Draw packed and padded rows."""
    rng = np.random.default_rng(5)
    encoder_BM, targets_BL = rng.integers(1, 19, (B, M)), rng.integers(1, 19, (B, L))
    encoder_segment_BM = np.array([[1] * 4 + [2] * 4 + [0] * 2, [1] * 10, [1] * 9 + [2], [1] * 2 + [2] * 3 + [3] * 4 + [0]])
    decoder_segment_BL = np.array([[1, 1, 2, 2, 2, 0], [1] * 6, [1] * 5 + [2], [1, 1, 2, 2, 3, 0]])
    encoder = encoder_BM, encoder_segment_BM, encoder_segment_BM != 0, np.arange(M)
    decoder = np.roll(targets_BL, 1, axis=1), decoder_segment_BL, decoder_segment_BL != 0, np.arange(L)
    return Batch(*encoder, *decoder, targets_BL, (decoder_segment_BL != 0).astype(np.float32))


@pytest.fixture(scope="module")
def cpu() -> Cpu:
    return Cpu(1)


@pytest.mark.parametrize("name", CONFIGS)
def test_engine__every_stage_within_its_radius(name: str, cpu: Cpu) -> None:
    """A forward pass of the engine, judged as `refswitch compare-model` judges other people's; one wrong element of one stage is noticed."""
    config = CONFIGS[name]
    params, inputs = params_of(config), draw_inputs(config, 3, 11, 7, 0)
    trace = trace_of(config, params, inputs, PRECISIONS["float32"], cpu)
    exact = with_leaves(params, {path: leaf.astype(np.float64) for path, leaf in leaves(params).items()})
    assert [check for check in compare_trace(trace, config, exact, inputs) if not check.ok] == []
    for stage in ("encoder/1/self/mixed", "decoder/0/cross/out", "decoder/1/ff/out", "head/logits"):
        wrong = trace[stage].copy()
        wrong.flat[np.argmax(np.abs(wrong))] *= np.float32(1.0 + 2.0**-15)
        assert not all(check.ok for check in compare_trace(trace | {stage: wrong}, config, exact, inputs)), stage


class Call(NamedTuple):
    """One operation of a pass: what it took, and what it gave."""

    name: str
    args: tuple[Any, ...]
    result: Any


class Recorder:
    """A backend that keeps copies of everything that its operations take and give."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.calls = backend, list[Call]()
        self.saved: list[tuple[Any, Call]] = []  # by identity: which call saved it

    def forward_of(self, saved: Any) -> Call:
        return next(call for kept, call in self.saved if kept is saved)

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.backend, name)
        if not name.endswith(("_forward", "_backward")) and name not in ("residual", "added", "scaled"):
            return operation

        def recorded(*args: Any) -> Any:
            taken = copied(args)
            result = operation(*args)
            call = Call(name, taken, copied(result))
            if name.endswith("_forward") and isinstance(result, tuple):
                self.saved.append((result[-1], call))
            elif name.endswith("_backward"):
                call = call._replace(args=(taken, next((self.forward_of(arg) for arg in args if any(arg is kept for kept, _ in self.saved)), None)))
            self.calls.append(call)
            return result

        return recorded


def copied(tree: Any) -> Any:
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if isinstance(tree, tuple):
        parts = [copied(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def whole(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.asarray(x, np.float64), shape)


def judged(call: Call, setting: str) -> Iterator[tuple[str, Any, Tube]]:
    """Yield each array that one backward operation, or the forward one behind it, gave, with its tube."""
    precision = PRECISIONS[setting]
    points, arithmetic = precision.around, tubes.arithmetic_of(load_profile(precision.profile))
    taken, forward = call.args
    if call.name == "norm_backward":
        x_BLD, scale_D, epsilon, _ = forward.args
        tube = norm_tubes(x_BLD.astype(np.float64), scale_D.astype(np.float64), epsilon, taken[0].astype(np.float64), points, arithmetic)
        yield from zip(("out_BLD", "dx_BLD", "dscale_D"), (forward.result[0], *call.result), tube, strict=True)
    elif call.name == "attention_backward":
        x_BLD, memory_BMD, bias_HLM, params, allowed_BLM, factor_BHLM, _ = forward.args
        (rows, length, _), memory, H = x_BLD.shape, memory_BMD.shape[1], params.w_query_DHK.shape[1]
        bias, factor = whole(bias_HLM, (H, length, memory)), whole(factor_BHLM, (rows, H, length, memory))
        weights = tuple(leaf.astype(np.float64) for leaf in params)
        dout_BLD = taken[0].astype(np.float64)
        tube = attention_tubes(x_BLD.astype(float), memory_BMD.astype(float), bias, weights, allowed_BLM, factor, dout_BLD, points, arithmetic)
        dx_BLD, dmemory_BMD, dbias_HLM, dparams = call.result
        given = (forward.result[0], dx_BLD, dmemory_BMD, dbias_HLM if bias_HLM.size > 1 else None, *dparams)
        yield from zip(tube._fields, given, tube, strict=True)
    elif call.name == "feed_forward_backward":
        x_BLD, params, factor_BLF, activation, _ = forward.args
        factor = whole(factor_BLF, (*x_BLD.shape[:2], params.w_in_DF.shape[1]))
        weights = (params.w_in_DF.astype(float), None if params.w_gate_DF is None else params.w_gate_DF.astype(float), params.w_out_FD.astype(float))
        tube = feed_forward_tubes(x_BLD.astype(float), weights, factor, activation, taken[0].astype(float), points, arithmetic)
        dx_BLD, dparams = call.result
        given = (forward.result[0], dx_BLD, dparams.w_in_DF, dparams.w_gate_DF, dparams.w_out_FD)
        yield from ((name, array, each) for name, array, each in zip(tube._fields, given, tube, strict=True) if each is not None)
    elif call.name == "cross_entropy_backward":
        logits_BLV, targets_BL, weight_BL, *rest = forward.args
        tube = cross_entropy_tubes(logits_BLV.astype(float), targets_BL, weight_BL.astype(float), *rest, arithmetic)
        yield "loss", np.asarray(forward.result[0]), tube.value
        yield "dlogits_BLV", call.result, tube.dlogits_BLV
    elif call.name == "tied_logits_backward":
        dlogits_BLV, x_BLD, table_VD, _ = taken
        tube = tied_logits_tubes(x_BLD.astype(float), table_VD.astype(float), dlogits_BLV.astype(float), points, arithmetic)
        yield from zip(("dx_BLD", "dtable_VD"), call.result, tube[1:], strict=True)


def judged_switch(call: Call, setting: str) -> list[Any]:
    """Return what the judge of the layer says against one Switch layer of the pass."""
    (dout_GSD, daux, dz, *_), forward = call.args
    inputs, params, statics = forward.args
    outputs, (dx_GSD, dparams) = forward.result[0], call.result
    (G, S, D), E, F = inputs.x_GSD.shape, params.w_router_DE.shape[1], params.experts.w_in_EDF.shape[2]
    case = {
        "x": inputs.x_GSD, "w_router": params.w_router_DE, "w_in": params.experts.w_in_EDF, "w_out": params.experts.w_out_EFD, "dout": dout_GSD,
        "hidden_mask": whole(inputs.hidden_mask_GSF, (G, S, F)), "valid": inputs.valid_GS,
        "daux": daux, "dz": dz,
    }  # fmt: skip
    if statics.dialect.noise.kind != "none":
        case["noise"] = whole(inputs.noise_factor_GSD, (G, S, D))
    arrays = {name: np.array(array, bool if name == "valid" else np.float32, order="C") for name, array in case.items()}
    told = {
        "out": outputs.out_GSD, "logits": outputs.logits_GSE, "probs": outputs.probs_GSE, "expert": outputs.route.expert_GS,
        "slot": outputs.route.slot_GS, "kept": outputs.route.kept_GS, "gate": outputs.gate_GS, "aux_loss": np.asarray(outputs.aux_loss),
        "z_loss": np.asarray(outputs.z_loss), "dx": dx_GSD, "dw_router": dparams.w_router_DE, "dw_in": dparams.experts.w_in_EDF,
        "dw_out": dparams.experts.w_out_EFD,
    }  # fmt: skip
    scalars = {
        "capacity": statics.capacity, "capacity_factor": "1.25", "top_k": 1, "train": True, "activation": statics.activation, "wants": tuple(told),
    }  # fmt: skip
    recipe = Recipe("pass", G=G, S=S, D=D, E=E, F=F, capacity=statics.capacity)
    features = frozenset({"groups", "backward", "aux_loss", "z_loss", "padding", "expert_dropout", "noise"})
    profile = load_profile(parse_record(f"{PRECISIONS[setting].profile},storage.gradients={statics.points.gradients.name}"))
    target = Target(statics.dialect, profile, features, {})
    verdicts = judge_case(Prepared(recipe, Case(scalars, arrays)), target, told)
    assert len(verdicts.checks) > len(told) // 2
    return [check for check in verdicts.checks if check.failing]


def glue_differences(call: Call, setting: str) -> list[str]:
    """Return whether a sum, a factor or a residual is not what float32 says, rounded."""
    *operands, format = call.args
    x, y = operands[0], operands[1]
    with np.errstate(all="ignore"):
        exact = {"added": lambda: x + y, "scaled": lambda: x * y, "residual": lambda: x + y * operands[2]}[call.name]()
        fused = (x.astype(np.float64) + y.astype(np.float64) * operands[2]).astype(np.float32) if call.name == "residual" else exact
    allowed = [round_bf16(value.astype(np.float32)) if format.name == "bfloat16" else value for value in (exact, fused)]
    return [] if any(np.array_equal(call.result, value) for value in allowed) or _either(call.result, allowed) else [call.name]


def _either(found: np.ndarray, allowed: list[np.ndarray]) -> bool:
    return bool(np.all((found == allowed[0]) | (found == allowed[1])))


def recorded_pass(config: ModelConfig, setting: str, cpu: Cpu) -> list[Call]:
    setup = Setup(config, PRECISIONS[setting], Optimizer("adafactor"), SEED, label_smoothing=0.1, logits_z_coef=0.05)
    state, recorder = initial_state(params_of(config), setup, cpu), Recorder(cpu)
    with cpu.running():
        cpu.begin()
        read = rounded_tree(state.params, setup.setting.read, cpu)
        loss_and_gradients(read, batch_of(), setup, 3, recorder)  # type: ignore[arg-type]
    return recorder.calls


def outside(calls: list[Call], setting: str) -> tuple[list[Any], Counter[str]]:
    """Return what lies outside its radius, and how many different arrays of each operation were looked at."""
    found: list[Any] = []
    seen: set[tuple[str, str]] = set()
    for i, call in enumerate(calls):
        if call.name == "switch_backward":
            found += [(i, call.name, check) for check in judged_switch(call, setting)]
        elif call.name in ("added", "scaled", "residual"):
            found += [(i, difference) for difference in glue_differences(call, setting)]
        elif call.name.endswith("_backward"):
            for name, array, tube in judged(call, setting):
                if array is not None:
                    found += [(i, call.name, name)] if np.any(tubes.ratio(array.astype(np.float64), tube) > 1.0) else []
                    seen.add((call.name, name))
    return found, Counter(operation for operation, _ in seen)


ARRAYS = {"norm_backward": 3, "attention_backward": 8, "cross_entropy_backward": 2, "tied_logits_backward": 2}
PASSES = [("mesh", MESH, "float32", {}), ("mesh", MESH, "selective", {}), ("hf", TINY, "float32", {"feed_forward_backward": 4})]


@pytest.mark.parametrize(("name", "config", "setting", "more"), PASSES)
def test_engine__every_gradient_within_its_radius(name: str, config: ModelConfig, setting: str, more: dict[str, int], cpu: Cpu) -> None:
    """Each operation of a training pass, forward and backward, on what it took; sums and residuals to the bit."""
    found, seen = outside(recorded_pass(config, setting, cpu), setting)
    assert found == [], name
    assert seen == ARRAYS | more


def test_engine__radius_notices(cpu: Cpu) -> None:
    """One element of each operation's first gradient that is off by 2**-13 of the array's largest is outside."""
    calls = recorded_pass(TINY, "float32", cpu)
    for operation in (*ARRAYS, "feed_forward_backward", "switch_backward", "residual"):
        i = next(i for i, call in enumerate(calls) if call.name == operation)
        call = copied(calls[i].result), *calls[i][:2]
        first = call[0] if isinstance(call[0], np.ndarray) else call[0][0]
        first.flat[np.argmax(np.abs(first))] *= np.float32(1.0 + 2.0**-13)
        assert outside([calls[i]._replace(result=call[0])], "float32")[0] != [], operation


def steps(setup: Setup, backend: Any, number: int) -> TrainState:
    """Train on one batch."""
    state = initial_state(params_of(setup.config), setup, backend)
    for _ in range(number):
        state, _ = train_step(state, batch_of(), setup, 0.05, backend)
    return state


def setup_of(setting: str = "float32", **changes: Any) -> Setup:
    return Setup(MESH, PRECISIONS[setting], Optimizer("adafactor"), SEED)._replace(**changes)


def different(found: TrainState, expected: TrainState) -> list[str]:
    own, wanted = state_arrays(found), state_arrays(expected)
    assert own.keys() == wanted.keys()
    return [name for name, array in own.items() if not np.array_equal(array, wanted[name])]


@pytest.mark.parametrize("setting", ["float32", "selective", "selective_master"])
def test_train_step__same_bits_on_any_number_of_threads(setting: str, cpu: Cpu) -> None:
    """Parameters and optimizer state after three steps; another seed is another run."""
    setup = setup_of(setting, microbatches=2)
    assert different(steps(setup, Cpu(2), 3), steps(setup, cpu, 3)) == []
    assert different(steps(setup, cpu, 3), steps(setup._replace(seed=SEED + 1), cpu, 3)) != []


class Poisoned(Cpu):
    """A backend that fills with NaN whatever it takes back: who still reads it computes nonsense."""

    def release(self, since: int, until: int, keep: Any) -> None:
        """Release, and spoil."""
        super().release(since, until, keep)
        for buffers in self.workspace._free.values():
            for buffer in buffers:
                buffer.view(np.uint8)[:] = 0xFF


@pytest.mark.parametrize("changes", [{}, {"microbatches": 2}, {"recompute": True}])
def test_train_step__reads_nothing_that_it_gave_back(changes: dict[str, Any], cpu: Cpu) -> None:
    """Buffers spoiled as soon as they are given back, and activations computed again, change no bit."""
    assert different(steps(setup_of(**changes), Poisoned(1), 3), steps(setup_of(**changes | {"recompute": False}), cpu, 3)) == []


def test_poisoned__notices() -> None:
    """A step that releases what it still needs is caught: the stream is given back in the middle of a forward pass."""

    class Hasty(Poisoned):
        def mark(self) -> int:
            super().release(0, self.workspace.mark(), ())
            return super().mark()

    with pytest.raises((ArithmeticError, AssertionError, IndexError)):
        assert different(steps(setup_of(), Hasty(1), 1), steps(setup_of(), Cpu(1), 1)) == []


def test_train_step__takes_no_new_memory() -> None:
    """After a few steps every request finds a buffer, though the number of kept tokens changes; recomputation holds less at a time."""
    peaks = {}
    for recompute in (False, True):
        setup = setup_of(recompute=recompute)._replace(config=replace(MESH, encoder_layers=4, encoder_sparse=(1, 3)))
        backend = Cpu(1)
        state = initial_state(params_of(setup.config), setup, backend)
        held = []
        for _ in range(12):
            state, _ = train_step(state, batch_of(), setup, 0.05, backend)
            held.append(backend.workspace.held_bytes)
        assert held[-1] == held[-3], held
        peaks[recompute] = backend.workspace.peak_bytes
    assert peaks[True] < peaks[False]


def test_train_step__resumes_to_the_same_bits(cpu: Cpu) -> None:
    """Two steps, the state as arrays and back into another backend, one step: as three steps."""
    setup = setup_of("selective_master")
    stored = {name: array.copy() for name, array in state_arrays(steps(setup, cpu, 2)).items()}
    resumed, _ = train_step(state_from(stored, steps(setup, cpu, 1)), batch_of(), setup, 0.05, Cpu(1))
    assert different(resumed, steps(setup, cpu, 3)) == []


def test_engine__routes_of_the_reference(cpu: Cpu) -> None:
    """End to end, on the same weights and draws: a token goes elsewhere only where its two best logits are nearer than they moved."""
    setup = setup_of()._replace(config=replace(MESH, d_model=24, d_ff=32))
    tokens = batch_of()
    outputs = []
    for backend in (cpu, reference):
        state = initial_state(params_of(setup.config), setup, backend)
        with backend.running():
            backend.begin()
            outputs.append(copied(part_forward(state.params, tokens, setup, 3, 0, 16.0, backend, ONE, None)[0]))
    moved = 0
    for own, wanted in zip(*[each.encoder.switches + each.decoder.switches for each in outputs], strict=True):
        distance_GS = np.max(np.abs(own.logits_GSE - wanted.logits_GSE), axis=-1)
        best_GSE = np.sort(wanted.logits_GSE, axis=-1)
        is_other_GS = own.route.expert_GS != wanted.route.expert_GS
        moved += int(is_other_GS.sum())
        assert np.all(~is_other_GS | (best_GSE[..., -1] - best_GSE[..., -2] <= 2.0 * distance_GS))
    losses = [each.losses.cross_entropy for each in outputs]
    ranges_BL = np.ptp(outputs[0].logits_BLV - outputs[1].logits_BLV, axis=-1)
    rounding = float(model_loss_radius(outputs[0].logits_BLV, tokens))
    assert abs(losses[0] - losses[1]) <= float(np.sum(ranges_BL * tokens.weight_BL)) / 16.0 + rounding
    assert moved < tokens.weight_BL.size // 8, "near-ties are rare"


def model_loss_radius(logits_BLV: np.ndarray, batch: Batch) -> np.ndarray:
    arithmetic = tubes.arithmetic_of(load_profile("float32"))
    return cross_entropy_tubes(logits_BLV.astype(float), batch.targets_BL, batch.weight_BL.astype(float), 16.0, 0.0, 0.0, arithmetic).value.radius


@pytest.mark.parametrize(("changes", "setting", "said"), [
    ({}, "float64", "precision float64: the backend cpu computes float32"), ({}, "bfloat16", "precision bfloat16"),
    ({"dialect": "mesh_tensorflow,drop.output=x"}, "float32", "drop.output"),
    ({"dialect": "mesh_tensorflow,aux.f.count=logits"}, "float32", "aux.f.count"),
])  # fmt: skip
def test_cpu__rejects_what_it_does_not_compute(changes: dict[str, Any], setting: str, said: str, cpu: Cpu) -> None:
    """One line that names the knob."""
    with pytest.raises(InputError, match=said):
        check(Setup(replace(MESH, **changes), PRECISIONS[setting], Optimizer("adafactor"), SEED), cpu)


def test_generate__is_the_references_answer(cpu: Cpu) -> None:
    """Greedy answers of both backends agree as long as no two logits are near-tied, which they are not here."""
    setup, batch = setup_of(), batch_of()
    answers = []
    for backend in (cpu, reference):
        state = initial_state(params_of(MESH), setup, backend)
        answers.append(np.stack(list(generate(batch.encoder_tokens_BM, batch.encoder_valid_BM, state.params, setup, backend, 6, 0, 1, 0)), axis=1))
    assert np.array_equal(*answers)


def test_pool_balance__matches_reference(cpu: Cpu) -> None:
    """The pooled balance loss of the CPU's layers, of its own probabilities, beside the reference's: sums in another order, a gradient in float32."""
    dialect = "mesh_tensorflow,aux.layers=average_then_product,aux.P_pads=exclude,aux.denom=valid"
    setup = setup_of()._replace(config=replace(MESH, dialect=dialect), microbatches=1)
    statics = part_statics(setup, batch_of(), 1.0).encoder
    recorder = Recorder(cpu)
    with cpu.running():
        cpu.begin()
        part_forward(initial_state(params_of(setup.config), setup, cpu).params, batch_of(), setup, 3, 0, 16.0, recorder, ONE, None)
        layers = [(call.args[0], call.result) for call in recorder.calls if call.name == "switch_forward"][:2]
        valid_GS, switches = layers[0][0].valid_GS, [outputs for _, (outputs, _) in layers]
        value, pooled = cpu.pool_balance(switches, [saved for _, (_, saved) in layers], valid_GS, statics)
    shaped = [reference_saved(layer, statics, setup) for layer in layers]
    wide = [each._replace(probs_GSE=each.probs_GSE.astype(np.float64)) for each in switches]
    expected, expected_saved = reference.pool_balance(wide, shaped, valid_GS, statics)
    assert abs(value - expected) <= tubes.gamma(2 * valid_GS.size + 8, np.finfo(np.float64).eps) * abs(expected)
    assert value != pytest.approx(sum(float(each.aux_loss) for each in switches) / 2, abs=0.0), "pooling is another loss than the mean"
    for own, wanted in zip(pooled, expected_saved, strict=True):
        gradient_GSE = own.balance.dprobs_GE[:, None] * own.balance.counts_GS[..., None]
        wide_GSE = wanted.balance.dvalue_dprobs_GSE
        assert np.all(np.abs(gradient_GSE - wide_GSE) <= np.spacing(np.abs(wide_GSE).astype(np.float32)))


def reference_saved(layer: Any, statics: Any, setup: Setup) -> Any:
    """Return what the reference saves of the same layer."""
    inputs, _ = layer
    experts = params_of(setup.config).encoder.blocks[0].feed_forward.feed_forward
    wide = with_leaves(experts, {path: leaf.astype(np.float64) for path, leaf in leaves(experts).items()})
    return reference.switch_forward(inputs, wide, Statics(statics.dialect, statics.points, statics.activation, statics.capacity))[1]
