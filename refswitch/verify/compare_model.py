# May import: standard library, numpy, safetensors, refswitch.model_setup and what lies below it, refswitch.verify (below).
"""A whole model, stage by stage: what another implementation's modules took and gave, each judged on its own previous stage.

The first stage that lies outside its radius is where it differs; a known difference explains it if the stage holds under that difference. A Switch
layer is a case like any other, and goes to the judge of the layer. Spec: numbers. The trace's names: conformance/peers.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from refswitch.config import Profile
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.model_setup import dialect_of, model_statics, no_noise
from refswitch.reference.block import AttentionLayerParams
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.reference.switch import SwitchParams
from refswitch.reference.transformer import Batch, BlockParams, ModelParams, ModelStatics, StackParams, model_forward
from refswitch.spec_data import data_root, load_profile
from refswitch.verify import model_stages as stages
from refswitch.verify import tubes
from refswitch.verify.case import Case
from refswitch.verify.cases import Prepared, Recipe, Target
from refswitch.verify.diagnose import diagnose
from refswitch.verify.findings import collect
from refswitch.verify.judge import judge_case
from refswitch.verify.tubes import Tube, exact

Trace = Mapping[str, np.ndarray]
Evaluate = Callable[..., Tube]
ACTIVATIONS = ("relu", "gelu_erf", "gelu_tanh", "silu")

# What other implementations do instead, per stage: the argument of the stage's function, and what it says.
KNOWN: dict[str, list[tuple[dict[str, Any], str]]] = {
    "embedded": [({"scaled": True}, "the embedding is multiplied by sqrt(D)")],
    "bias": [
        ({"other_direction": True}, "the buckets of the other stack's direction"),
        ({"mirrored": True}, "the distance has the other sign"),
        ({"distance": 128}, "the largest distance is 128, whatever the config says"),
        ({"distance": 20}, "the largest distance is 20"),
    ],
    "normed": [
        ({"centred": True}, "the mean is subtracted: LayerNorm, not RMSNorm"),
        *[({"other_epsilon": epsilon}, f"epsilon is {epsilon:g}") for epsilon in (1e-5, 1e-6, 1e-8, 1e-12)],
    ],
    "linear": [({"transposed": True}, "the matrix is transposed")],
    "mixed": [
        ({"scaled": True}, "the scores are divided by sqrt(K)"),
        ({"without_bias": True}, "the position bias is left out"),
        ({"other_causal": True}, "the causal mask is there where it should not be, or missing"),
        ({"sees_padding": True}, "padding is not masked"),
    ],
    "hidden": [
        *[({"other": activation}, f"the activation is {activation}") for activation in ACTIVATIONS],
        ({"swapped": True}, "the gate and the linear branch are exchanged"),
    ],
    "y": [({"alone": True}, "the residual is left out")],
    "logits": [({"other_scale": True}, "the factor D**-0.5 is there where it should not be, or missing")],
    "loss": [({"all_positions": True}, "the mean is over all positions, padding too"), ({"z_coef": 1e-4}, "a z-loss of 1e-4 is added")],
}  # fmt: skip
NARROW = ({"narrow": True}, "the matrix is rounded to bfloat16")
for _stage in ("embedded", "linear", "logits"):
    KNOWN[_stage].append(NARROW)


class Inputs(NamedTuple):
    """What both sides run on; targets of -100 do not count."""

    encoder_tokens: np.ndarray
    encoder_valid: np.ndarray
    decoder_tokens: np.ndarray
    targets: np.ndarray

    def batch(self) -> Batch:
        """Return it as the reference reads it: padding keeps its row's segment, and no position of the decoder is masked (Hugging Face)."""
        weight_BL = 1.0 * (self.targets >= 0)
        ones_BM, ones_BL = np.ones_like(self.encoder_tokens), np.ones_like(self.decoder_tokens)
        encoder = self.encoder_tokens, ones_BM, self.encoder_valid, np.arange(ones_BM.shape[1])
        decoder = self.decoder_tokens, ones_BL, ones_BL == 1, np.arange(ones_BL.shape[1])
        return Batch(*encoder, *decoder, np.maximum(self.targets, 0), weight_BL)


class StageCheck(NamedTuple):
    """One stage against its tube."""

    name: str
    elements: int
    failing: int
    worst: float  # largest |error| / radius; infinite where an exact value differs
    place: str
    got: float
    expected: float
    radius: float
    explanations: tuple[str, ...]  # known differences under which it holds

    @property
    def ok(self) -> bool:
        """Whether every element lies within its radius."""
        return self.failing == 0


def draw_inputs(config: ModelConfig, rows: int, encoder_length: int, decoder_length: int, seed: int) -> Inputs:
    """Draw tokens; the last row is padded to two thirds of its length where there are several."""
    rng = np.random.Generator(np.random.Philox(seed))
    lowest = min(2, config.vocabulary - 1)
    encoder_BM = rng.integers(lowest, config.vocabulary, (rows, encoder_length))
    targets_BL = rng.integers(lowest, config.vocabulary, (rows, decoder_length))
    valid_BM = np.ones(encoder_BM.shape, bool)
    decoder_BL = np.concatenate([np.zeros((rows, 1), np.int64), targets_BL[:, :-1]], axis=1)
    if rows > 1:
        valid_BM[-1, -(encoder_length // 3) or encoder_length :] = False
        targets_BL[-1, -(decoder_length // 3) or decoder_length :] = -100
    return Inputs(np.where(valid_BM, encoder_BM, 0), valid_BM, decoder_BL, targets_BL)


def _check(name: str, got: np.ndarray, evaluate: Evaluate, kind: str) -> StageCheck:
    """Compare one stage; where it does not hold, try the known differences of its kind."""
    tube = evaluate()
    shape = tube.value.shape
    got = np.asarray(got, np.float64)
    if got.size != tube.value.size:
        return StageCheck(name, tube.value.size, tube.value.size, np.inf, f"shape {got.shape}, not {shape}", np.nan, np.nan, 0.0, ())
    got = got.reshape(shape)
    ratio = tubes.ratio(got, tube)
    failing = int(np.sum(ratio > 1.0))
    index = np.unravel_index(int(np.argmax(ratio)), shape) if ratio.size else ()
    said = []
    for arguments, says in KNOWN.get(kind, []) if failing else []:
        if arguments.get("transposed") and not _is_square(evaluate):
            continue
        if np.all(tubes.ratio(got, evaluate(**arguments)) <= 1.0):
            said.append(says)
    shown, expected, radius = (float(np.asarray(array)[index]) if ratio.size else 0.0 for array in (got, *np.broadcast_arrays(*tube)))
    place = str([int(i) for i in index])
    return StageCheck(name, got.size, failing, float(ratio.max(initial=0.0)), place, shown, expected, radius, tuple(said))


def _is_square(evaluate: Evaluate) -> bool:
    weight = evaluate.args[1] if isinstance(evaluate, functools.partial) else np.zeros((1, 2))
    return weight.shape[0] == weight.shape[1]


class Comparison(NamedTuple):
    """What a trace is compared with."""

    trace: Trace
    config: ModelConfig
    inputs: Inputs
    profile: Profile

    @property
    def arithmetic(self) -> tubes.Arithmetic:
        """How the implementation may round."""
        return tubes.arithmetic_of(self.profile)

    def at(self, name: str) -> Tube:
        """Return a stage of the trace as it is."""
        if name not in self.trace:
            raise InputError(f"the trace has no {name}")
        return exact(np.asarray(self.trace[name], np.float64))

    def check(self, name: str, evaluate: Evaluate, kind: str = "") -> StageCheck:
        """Judge one stage."""
        return _check(name, self.at(name).value, evaluate, kind or name.rsplit("/", 1)[-1])


def _attention_checks(it: Comparison, place: str, layer: AttentionLayerParams, stack: str, causal: bool) -> Iterator[StageCheck]:
    is_self, arithmetic = place.endswith("self"), it.arithmetic
    D, H, K = layer.attention.w_query_DHK.shape
    batch = it.inputs.batch()
    own = (batch.encoder_segment_BM, batch.encoder_valid_BM) if stack == "encoder" else (batch.decoder_segment_BL, batch.decoder_valid_BL)
    memory_marks = own if is_self else (batch.encoder_segment_BM, batch.encoder_valid_BM)
    normed = it.at(f"{place}/normed")
    memory = normed if is_self else it.at("encoder/out")
    for matrix, operand in (("q", normed), ("k", memory), ("v", memory)):
        weight_DHK = layer.attention[("q", "k", "v").index(matrix)]
        yield it.check(f"{place}/{matrix}", functools.partial(stages.linear, operand, weight_DHK.reshape(D, H * K), arithmetic), "linear")
    query, key, value = (exact(part.reshape(*part.shape[:2], H, K)) for part in (it.at(f"{place}/{matrix}").value for matrix in "qkv"))
    bias_LMH = it.at(f"{stack}/bias").value if is_self else None
    marks = own[0], *memory_marks
    yield it.check(f"{place}/mixed", functools.partial(stages.mixed, query, key, value, bias_LMH, marks, causal and is_self, arithmetic))
    weight_FD = layer.attention.w_out_HKD.reshape(H * K, D)
    yield it.check(f"{place}/out", functools.partial(stages.linear, it.at(f"{place}/mixed"), weight_FD, arithmetic), "linear")


def _dense_checks(it: Comparison, place: str, params: FeedForwardParams) -> Iterator[StageCheck]:
    normed, arithmetic = it.at(f"{place}/normed"), it.arithmetic
    names = {"wi": params.w_in_DF} if params.w_gate_DF is None else {"wi_0": params.w_gate_DF, "wi_1": params.w_in_DF}
    for name, weight_DF in names.items():
        yield it.check(f"{place}/{name}", functools.partial(stages.linear, normed, weight_DF, arithmetic), "linear")
    branches = [it.at(f"{place}/{name}") for name in names]
    z, z_linear = branches[0], branches[1] if len(branches) > 1 else None
    yield it.check(f"{place}/hidden", functools.partial(stages.hidden, z, z_linear, it.config.activation, arithmetic))
    yield it.check(f"{place}/out", functools.partial(stages.linear, it.at(f"{place}/hidden"), params.w_out_FD, arithmetic), "linear")


def _switch_check(it: Comparison, place: str, params: SwitchParams, groups: int, capacity: int) -> StageCheck:
    """Judge a sparse layer as a case, with what the trace has of its outputs."""
    normed_BLD = it.at(f"{place}/normed").value.astype(np.float32)
    E, D, F = params.experts.w_in_EDF.shape
    x_GSD = np.ascontiguousarray(normed_BLD.reshape(groups, -1, D))
    outputs = {"out": it.at(f"{place}/out").value.reshape(x_GSD.shape), "logits": it.at(f"{place}/logits").value.reshape(*x_GSD.shape[:2], E)}
    arrays = {"x": x_GSD, "w_router": params.w_router_DE, "w_in": params.experts.w_in_EDF, "w_out": params.experts.w_out_EFD}
    if params.experts.w_gate_EDF is not None:
        arrays["w_gate"] = params.experts.w_gate_EDF
    scalars = {
        "capacity": capacity, "capacity_factor": "1.0", "top_k": 1, "train": False, "activation": it.config.activation, "wants": tuple(outputs),
    }  # fmt: skip
    recipe = Recipe(place, G=groups, S=x_GSD.shape[1], D=D, E=E, F=F, capacity=capacity)
    target = Target(dialect_of(it.config), it.profile, frozenset({"groups"} | ({"gated"} if it.config.gated else set())), {})
    prepared = Prepared(recipe, Case(scalars, {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}))
    verdicts = [judge_case(prepared, target, outputs)]
    findings = collect(verdicts)
    checks = [check for finding in findings for check in finding.checks]
    elements = sum(check.elements for check in verdicts[0].checks)
    worst = max((check.worst for check in verdicts[0].checks), default=0.0)
    if not findings:
        return StageCheck(f"{place}/switch", elements, 0, worst, "", 0.0, 0.0, 0.0, ())
    first, check = findings[0], findings[0].first
    said = tuple(f"{item.says} ({item.name})" for item in diagnose(first, verdicts, {place: outputs}, target) if item.agreement == 1.0)
    where = f"{first.clause} at {first.stage}, {check.output} {list(check.coordinates.values())}"
    failing = sum(each.failing for each in checks)
    return StageCheck(f"{place}/switch", elements, failing, worst, where, check.got, check.expected, check.radius, said)


def _stack_checks(it: Comparison, stack: str, params: StackParams, groups: int, capacity: int) -> Iterator[StageCheck]:
    arithmetic, epsilon = it.arithmetic, it.config.norm_epsilon
    tokens = it.inputs.encoder_tokens if stack == "encoder" else it.inputs.decoder_tokens
    bidirectional = stack == "encoder"

    def norm(place: str, taken: str, given: str, scale_D: np.ndarray) -> StageCheck:
        x = it.at(f"{place}/{taken}")
        return it.check(f"{place}/{given}", functools.partial(stages.normed, x, scale_D, epsilon, arithmetic), "normed")

    def block_checks(place: str, block: BlockParams) -> Iterator[StageCheck]:
        sublayers: list[tuple[str, Any]] = [("self", block.self_attention), ("cross", block.cross_attention), ("ff", block.feed_forward)]
        for sub, layer in sublayers:
            if layer is None:
                continue
            here = f"{place}/{sub}"
            yield norm(here, "x", "normed", layer.norm_D)
            if sub != "ff":
                yield from _attention_checks(it, here, layer, stack, not bidirectional)
            elif isinstance(layer.feed_forward, SwitchParams):
                yield _switch_check(it, here, layer.feed_forward, groups, capacity)
            else:
                yield from _dense_checks(it, here, layer.feed_forward)
            yield it.check(f"{here}/y", functools.partial(stages.residual, it.at(f"{here}/x"), it.at(f"{here}/out"), arithmetic))

    yield it.check(f"{stack}/bias", functools.partial(stages.bias, params.position_UH, tokens.shape[1], it.config.max_distance, bidirectional))
    stream = f"{stack}/embedded"
    for i, block in enumerate(params.blocks):
        first = f"{stack}/{i}/self"
        yield it.check(f"{first}/x", functools.partial(stages.same, it.at(stream)))
        yield from block_checks(f"{stack}/{i}", block)
        stream = f"{stack}/{i}/ff/y"
    yield it.check(f"{stack}/last", functools.partial(stages.same, it.at(stream)))
    yield norm(stack, "last", "out", params.norm_D)


def _statics_of(config: ModelConfig, inputs: Inputs) -> ModelStatics:
    (B, M), (_, L) = inputs.encoder_tokens.shape, inputs.targets.shape
    return model_statics(config, B, M, L, train=False)


def compare_trace(trace: Trace, config: ModelConfig, params: ModelParams, inputs: Inputs, profile: str = "float32") -> Iterator[StageCheck]:
    """Yield every stage's check, in the order in which a token meets them.

    Raises
    ------
    InputError
        Where the trace lacks a stage.
    """
    it = Comparison(trace, config, inputs, load_profile(profile))
    batch = inputs.batch()
    statics = _statics_of(config, inputs)
    for stack, tokens, stack_params, stack_statics in (
        ("encoder", inputs.encoder_tokens, params.encoder, statics.encoder),
        ("decoder", inputs.decoder_tokens, params.decoder, statics.decoder),
    ):
        yield it.check(f"{stack}/embedded", functools.partial(stages.embedded, tokens, params.embedding_VD))
        yield from _stack_checks(it, stack, stack_params, stack_statics.groups, stack_statics.capacity)
    head = functools.partial(stages.logits, it.at("decoder/out"), params.embedding_VD, params.w_logits_DV, it.arithmetic)
    yield it.check("head/logits", head)
    loss = functools.partial(stages.loss, it.at("head/logits"), batch.targets_BL, batch.weight_BL, it.arithmetic)
    yield it.check("loss", loss)


def end_to_end(trace: Trace, config: ModelConfig, params: ModelParams, inputs: Inputs) -> float:
    """Return the normwise distance of the trace's logits to the reference's in float64; it is reported and judged by nothing."""
    statics = _statics_of(config, inputs)
    (B, M), (_, L) = inputs.encoder_tokens.shape, inputs.targets.shape
    noise = no_noise(params, statics, B, M, L)
    outputs, _ = model_forward(inputs.batch(), params, noise, statics)
    theirs = np.asarray(trace["head/logits"], np.float64)
    return float(np.linalg.norm(outputs.logits_BLV - theirs) / np.linalg.norm(theirs))


def run_peer(folder: Path, inputs: Inputs, deadline_s: float) -> dict[str, np.ndarray]:
    """Run a Hugging Face folder in a process of its own; return its trace.

    Raises
    ------
    InputError
        Where it cannot be run: its last words.
    """
    script = data_root() / "conformance" / "peers" / "hugging_face.py"
    with tempfile.TemporaryDirectory() as scratch:
        files = [str(Path(scratch) / name) for name in ("inputs.safetensors", "outputs.safetensors")]
        save_file({name: np.ascontiguousarray(array) for name, array in inputs._asdict().items()}, files[0])
        try:
            done = subprocess.run(
                [sys.executable, str(script), str(folder), *files], capture_output=True, text=True, timeout=deadline_s, check=False
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise InputError(f"transformers did not finish within {deadline_s:g} s; say --deadline") from None
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
            raise InputError(f"transformers cannot run {folder}: {last[0][:300]}")
        return load_file(files[1])
