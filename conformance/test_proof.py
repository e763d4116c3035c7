# May import: standard library, numpy, pytest, refswitch, conformance.
"""The instruments of `refswitch.proof`: each passes what is right and fails what is planted, and two of them run over the whole reference.

What the shape tracer and the tag lint find in the reference today stands in the sets KNOWN: a new finding fails, and so does one that is mended.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from properties.model_scenes import KINDS, Kind, setup_of

from conformance import test_variants
from conformance.test_reference_gradients import draw_data, plan_of
from refswitch.config import TRUTH, rounding_points
from refswitch.numbers.precision import FORMATS
from refswitch.proof.adjoint import adjoint_gap, dot
from refswitch.proof.exercised import TRIGGERS, Call, Exercised, call_of, triggers_of
from refswitch.proof.finite_difference import difference_ratio, difference_slope
from refswitch.proof.shape_tracer import REFERENCE, checked, letters_of, traced
from refswitch.proof.tag_lint import tag_problems, tag_problems_in
from refswitch.proof.ulp import coordinate, first_bad, ulp_distance
from refswitch.reference.beam_search import beam_search
from refswitch.reference.capacity import Route
from refswitch.reference.claims import Claims, pack_choices, unpack_choices
from refswitch.reference.decoding import decode
from refswitch.reference.distillation import distillation_backward, distillation_forward
from refswitch.reference.embedding import embed_backward, embed_forward
from refswitch.reference.expert_choice import gather, pick_tokens, scatter
from refswitch.reference.expert_parallel import ParallelInputs, ParallelStatics, expert_parallel_backward, expert_parallel_forward
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.pack import pack, unpack
from refswitch.reference.position import position_bias_backward, position_bias_forward
from refswitch.reference.switch import Statics, SwitchInputs, SwitchParams, switch_backward, switch_forward
from refswitch.reference.transformer import model_backward, model_forward
from refswitch.spec_data import load_dialect
from refswitch.verify.oracle import reference_outputs

# -------------------------------------------------------------------------------------------------------------- the reference, run

Run = Callable[[], Any]


def run_model(kind: Kind) -> None:
    """Run the model forward and backward."""
    setup = setup_of(kind)
    _, saved = model_forward(setup.batch, setup.params, setup.noise, setup.statics)
    model_backward(1.0, saved, setup.params, setup.statics)


def run_pooled() -> None:
    """Run a model with two Switch layers per stack, whose balance losses are pooled."""
    setup = setup_of(KINDS[2])
    encoder, decoder = (stack._replace(blocks=(stack.blocks[1],) * 2) for stack in (setup.params.encoder, setup.params.decoder))
    params = setup.params._replace(encoder=encoder, decoder=decoder)
    _, saved = model_forward(setup.batch, params, setup.noise, setup.statics)
    model_backward(1.0, saved, params, setup.statics)


def run_decoding(temperature: float, beams: int) -> None:
    """Decode greedily or by drawing, or search beams, from the model's own encoder."""
    setup = setup_of(KINDS[1])
    outputs, _ = model_forward(setup.batch, setup.params, setup.noise, setup.statics)
    memory_BMD, valid_BM = outputs.encoder.out_BLD, setup.batch.encoder_valid_BM
    B, length = memory_BMD.shape[0], 4
    statics = setup.statics.decoder._replace(groups=B * max(beams, 1))
    if beams:
        beam_search(memory_BMD, valid_BM, setup.params, statics, beams, length, start=0, end=1, pad=0)
    else:
        uniform_BL = np.random.default_rng(3).random((B, length))
        decode(memory_BMD, valid_BM, setup.params, statics, uniform_BL, start=0, end=1, pad=0, temperature=temperature)


def run_layer(knobs: dict[str, Any]) -> None:
    """Run the Switch layer forward and backward."""
    case, target = draw_data(plan_of(knobs))
    reference_outputs(case, target.dialect, rounding_points(target.dialect, target.profile))


def run_variant(layer: str, **rules: Any) -> None:
    """Run a routing variant forward and backward."""
    first = {name: test_variants.RULES[name][0] for name in test_variants.LAYERS[layer]}
    sizes = {"G": 2, "S": 13, "D": 5, "E": 6, "F": 7, "H": 8, "K": 3, "B": 1}
    test_variants.RUNS[layer](test_variants.Plan(layer, first | rules, sizes, 3, "plain", "scattered", 5))


def run_distillation() -> None:
    """Run the loss that reads a teacher."""
    random, (B, L, V) = np.random.default_rng(6), (2, 5, 11)
    logits_BLV, teacher_BLV = random.normal(size=(2, B, L, V))
    _, saved = distillation_forward(logits_BLV, teacher_BLV, random.integers(0, V, (B, L)), np.ones((B, L)), B * L, 0.1, 0.01, 0.25, 2.0)
    distillation_backward(1.0, saved)


def run_expert_parallel() -> None:
    """Run the Switch layer on ranks, forward and backward."""
    (A, R, g, S, D), (E, F), random = (2, 3, 4, 9, 5), (6, 7), np.random.default_rng(7)
    experts = ExpertsParams(*(random.normal(size=shape) for shape in ((E, D, F), (E, D, F), (E, F, D), (E, F), (E, F), (E, D))))
    params = SwitchParams(random.normal(size=(D, E)), random.normal(size=E), experts, random.normal(size=D))
    tokens, mesh = (A, R, g, S), load_dialect("mesh_tensorflow")
    inputs = ParallelInputs(random.normal(size=(*tokens, D)), random.random(tokens) < 0.75, np.ones((*tokens, D)), np.ones((*tokens, F)))
    statics = ParallelStatics(2, 3, mesh.aux, mesh.z, "silu", TRUTH)
    _, saved = expert_parallel_forward(inputs, params, statics)
    expert_parallel_backward(random.normal(size=(*tokens, D)), 0.5, 0.25, saved, params, statics)


RUNS: dict[str, Run] = {
    **{f"model {kind.dialect}": lambda kind=kind: run_model(kind) for kind in KINDS},
    "model, pooled": run_pooled,
    "decoding, greedy": lambda: run_decoding(0.0, 0),
    "decoding, sampled": lambda: run_decoding(0.7, 0),
    "decoding, beams": lambda: run_decoding(0.0, 3),
    "layer": lambda: run_layer({}),
    "layer, gated": lambda: run_layer({"expert.glu": True, "expert.act": "silu"}),
    "layer, sigmoid": lambda: run_layer({"gate.value": "sigmoid", "gate.site": "hidden"}),
    "layer, no token left behind": lambda: run_layer({"select.rule": "ntlb"}),
    "layer, by gate": lambda: run_layer({"priority": "gate_desc", "pad.route": "expert0_weight0"}),
    **{f"top_k {order}": lambda order=order: run_variant("top_k", order=order) for order in test_variants.RULES["order"]},
    "top_k, renormalised": lambda: run_variant("top_k", gate="renormalised", policy="random", second_loss=0.5),
    "top_k, softmax of chosen": lambda: run_variant("top_k", gate="softmax_of_chosen", choose_on="logits"),
    **{f"expert_choice {rule}": lambda rule=rule: run_variant("expert_choice", rule=rule) for rule in test_variants.RULES["rule"]},
    "noisy_top_k": lambda: run_variant("noisy_top_k"),
    "distillation": run_distillation,
    "expert_parallel": run_expert_parallel,
    "switch_attention": lambda: run_variant("switch_attention", causal=True),
}


# ------------------------------------------------------------------------------------------------------------- the shape tracer

KNOWN_SHAPES: set[tuple[str, str, str]] = set()


@pytest.fixture(scope="module")
def trace() -> Any:
    """Run everything under the tracer, once."""
    with traced() as found:
        for run in RUNS.values():
            run()
    return found


def test_shape_tracer__reference_keeps_its_suffixes(trace: Any) -> None:
    found = {violation[:3]: str(violation) for violation in trace.violations}
    assert set(found) == KNOWN_SHAPES, "\n".join(sorted(text for key, text in found.items() if key not in KNOWN_SHAPES))


def test_shape_tracer__saw_every_pair(trace: Any) -> None:
    """Every forward and backward function of the reference returned at least once."""
    pairs = {
        (path.name, name)
        for path in REFERENCE.glob("*.py")
        for name in re.findall(r"^def (\w+_(?:forward|backward))\(", path.read_text(encoding="utf-8"), re.M)
    }
    assert len(pairs) > 50
    assert pairs - trace.functions == set()


@pytest.mark.parametrize(
    ("name", "letters"),
    [("x_GSD", "GSD"), ("mean_GS1", "GS1"), ("w_in_eDF", "eDF"), ("w_in", ""), ("x", ""), ("new_w", ""), ("TOP_2", ""), ("G", ""), ("x_\u00c9", "")],
)
def test_letters_of(name: str, letters: str) -> None:
    assert letters_of(name) == letters


PLANTED = """
from typing import NamedTuple
import numpy as np

class Inputs(NamedTuple):
    x_GS: np.ndarray
    y_GS: np.ndarray

class Outer(NamedTuple):
    inner: tuple

def ndim(x_GS):
    y_GSD = x_GS
    return y_GSD

def unknown(x_GS):
    y_GX = x_GS
    return y_GX

def swapped(x_GS):
    y_SG = x_GS
    return y_SG

def repeated(x_GS):
    bias_LL = x_GS
    return bias_LL

def digit(x_GS):
    mean_G1 = x_GS
    return mean_G1

def share(w_ED):
    part_eD, other_eD = w_ED[:2], w_ED[:1]
    return part_eD, other_eD

def argument(inputs):
    z_GS = inputs.x_GS.T
    return z_GS

def record(x_GS):
    outer = Outer((Inputs(x_GS, x_GS.T),))
    return outer

def scalar(x_GS):
    total_G = x_GS.sum()
    return total_G

def right(x_GS, inputs):
    G, S = x_GS.shape
    other = Inputs(x_GS.T, x_GS.T)
    w_ED, w_eD, mean_G1, bias_LL = np.ones((7, 2)), np.ones((4, 2)), x_GS[:, :1], np.ones((4, 4))
    rows = list(row_GS for row_GS in x_GS)
    count_G = 0.0
    return x_GS

def raises(x_GS):
    y_G = x_GS
    raise ValueError("the body's own")
"""


def load(folder: Path, text: str) -> ModuleType:
    """Import a module from a text."""
    path = folder / "planted.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


X_GS = np.ones((3, 5))
NOTICED = {
    "ndim": ("y_GSD", "has shape (3, 5), but GSD has 3 axes"),
    "unknown": ("y_GX", "no axis is called X"),
    "swapped": ("y_SG", "S is 5 in x_GS"),
    "repeated": ("bias_LL", "has shape (3, 5), but L is 3"),
    "digit": ("mean_G1", "1 is 1"),
    "share": ("other_eD", "e is 2 in part_eD"),
    "scalar": ("total_G", "has shape (), but G has 1 axes"),
    "record": ("outer.inner[0].y_GS", "G is 3 in outer.inner[0].x_GS"),
}


@pytest.mark.parametrize("function", NOTICED)
def test_shape_tracer__notices(function: str, tmp_path: Path) -> None:
    module = load(tmp_path, PLANTED)
    with traced(tmp_path) as trace:
        getattr(module, function)(X_GS)
    assert trace.functions == {("planted.py", function)}
    assert [violation[:3] for violation in trace.violations] == [("planted.py", function, NOTICED[function][0])]
    assert NOTICED[function][1] in str(trace.violations[0])


def test_shape_tracer__joins_the_records_among_the_arguments(tmp_path: Path) -> None:
    module = load(tmp_path, PLANTED)
    with traced(tmp_path) as trace:
        module.argument(module.Inputs(X_GS, X_GS))
    assert [(violation.variable, violation.letters) for violation in trace.violations] == [("inputs.x_GS", "GS"), ("inputs.y_GS", "GS")]


def test_shape_tracer__accepts(tmp_path: Path) -> None:
    """Shares beside their capital, size-1 axes, another record's letters, a comprehension's rows, a plain number; and nobody else's files."""
    module = load(tmp_path, PLANTED)
    with checked(tmp_path):
        module.right(X_GS, module.Inputs(X_GS, X_GS))
    with checked():
        module.ndim(X_GS)


def test_checked__raises_at_the_end_and_hides_nothing(tmp_path: Path) -> None:
    module, before = load(tmp_path, PLANTED), sys.getprofile()
    with pytest.raises(AssertionError, match=r"^8 names [^$]*planted.py: ndim: y_GSD has shape \(3, 5\)") as error, checked(tmp_path):
        _ = [getattr(module, function)(X_GS) for function in (*NOTICED, *NOTICED)]
    assert str(error.value).count("\n") == 5
    with pytest.raises(ValueError, match="the body's own"), checked(tmp_path):
        module.raises(X_GS)
    assert sys.getprofile() is before


# ------------------------------------------------------------------------------------------------------------------ the tag lint

KNOWN_TAGS: set[str] = set()


def test_tag_lint__reference() -> None:
    """Every pair of the reference numbers its lines; there is one exact set of what is known to be out of order."""
    assert {re.sub(r":\d+:", ":", problem) for problem in tag_problems_in(REFERENCE)} == KNOWN_TAGS


TAGGED = """
def op_forward(x, gated):
    a = x + 1  # F1
    b = a * 2  # F2  R11: why
    if gated:
        c = b * b  # F3
    else:
        c = b  # F3
    return c - a  # F4


def op_backward(dout, gated):
    dc, da_direct = dout, -dout  # B4
    if gated:
        db = 2 * dc  # B3
    else:
        db = dc  # B3
    da = 2 * db + da_direct  # B2
    dx = da  # B1
    return dx
"""
WRONG_TAGS = {
    "a forward goes back": ("a = x + 1  # F1", "a = x + 1  # F2", "planted.py:4: F2 comes after F2"),
    "a forward leaves a number out": ("b = a * 2  # F2  R11: why", "b = a * 2", "planted.py:2: op_forward has no F2"),
    "a backward goes up": ("db = 2 * dc  # B3", "db = 2 * dc  # B1", "planted.py:18: B2 comes after B1"),
    "a backward leaves a number out": ("dx = da  # B1", "dx = da", "planted.py:12: op_backward has no B1"),
    "a backward undoes what is not there": (
        "dc, da_direct = dout, -dout  # B4",
        "dc, da_direct = dout, -dout  # B5",
        "planted.py:13: B5 undoes no line of the forward",
    ),
}


def test_tag_lint__accepts() -> None:
    assert tag_problems(TAGGED, "planted.py") == []
    assert tag_problems(re.sub("# [FB].*", "", TAGGED), "planted.py") == []


@pytest.mark.parametrize("label", WRONG_TAGS)
def test_tag_lint__notices(label: str) -> None:
    right, wrong, problem = WRONG_TAGS[label]
    assert TAGGED.count(right) == 1
    assert problem in tag_problems(TAGGED.replace(right, wrong), "planted.py")


# ------------------------------------------------------------------------------------------------------------------- the dot test

G, S, D, E, C, H, K, U, V = 2, 7, 5, 3, 3, 4, 2, 8, 11
RANDOM = np.random.Generator(np.random.Philox(1))
CHOSEN_GS = np.array([[0, 1, 2, 0, 1, 2, 0], [1, 1, 1, 2, 2, 0, 1]])
SLOT_GS = np.array([[0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 0, 1, 0, 3]])
ROUTE = Route(CHOSEN_GS, SLOT_GS, SLOT_GS < C)
CLAIMS = Claims(*(np.stack([part_GS, (part_GS + 1) % 3], axis=-1) for part_GS in ROUTE[:2]), np.stack([ROUTE.kept_GS] * 2, axis=-1))
PICKS = pick_tokens(RANDOM.random((G, S, E)), RANDOM.random((G, S, E)) < 0.75, C)
TOKENS_GS = RANDOM.integers(0, V, (G, S))
BUCKET_SD = RANDOM.integers(0, U, (S, D))
ADJOINTS: dict[str, tuple[Any, Any, Any, Any]] = {
    "pack": (lambda x: pack(x, ROUTE, E, C), lambda y: unpack(y, ROUTE), (G, S, D), (G, E, C, D)),
    "pack_choices": (lambda x: pack_choices(x, CLAIMS, E, C), lambda y: unpack_choices(y, CLAIMS), (G, S, 2, D), (G, E, C, D)),
    "gather": (lambda x: gather(x, PICKS), lambda y: scatter(y, PICKS, S), (G, S, D), (G, E, C, D)),
    "embed": (lambda x: embed_forward(TOKENS_GS, x), lambda y: embed_backward(y, TOKENS_GS, V), (V, D), (G, S, D)),
    "position_bias": (
        lambda x: position_bias_forward(x, BUCKET_SD), lambda y: position_bias_backward(y, BUCKET_SD, U), (U, H), (H, S, D),
    ),
    "a tree": (lambda x: (x[0] + 2 * x[1][0], x[1][0] * 3), lambda y: (y[0], (2 * y[0] + 3 * y[1],)), ((D,), ((D,),)), ((D,), (D,))),
    "to a scalar": (lambda x: 2 * x.sum(), lambda y: np.full(D, 2 * y), (D,), ()),
}  # fmt: skip


def transposed_unpack(packed_GECD: np.ndarray) -> np.ndarray:
    """Read slot and expert in the wrong order; the shape is right where E == C."""
    return unpack(packed_GECD.swapaxes(1, 2), ROUTE)


@pytest.mark.parametrize("label", ADJOINTS)
def test_adjoint_gap__is_0(label: str) -> None:
    for seed in range(3):
        assert adjoint_gap(*ADJOINTS[label], seed) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        transposed_unpack,
        lambda y: 2 * unpack(y, ROUTE),
        lambda y: unpack(y, ROUTE._replace(kept_GS=ROUTE.kept_GS & (np.arange(S) != 3))),
        lambda y: unpack(y, ROUTE) + 1,
    ],
)
def test_adjoint_gap__notices(wrong: Any) -> None:
    linear, _, x_shape, y_shape = ADJOINTS["pack"]
    assert adjoint_gap(linear, wrong, x_shape, y_shape, 0) != 0.0


def test_adjoint_gap__refuses() -> None:
    """A shape that is wrong, numbers that round, numbers that could."""
    with pytest.raises(AssertionError, match=r"returns shapes \[\(5,\)\], but should return \[\(2,\)\]"):
        adjoint_gap(lambda x: x, lambda y: y, (D,), (K,), 0)
    with pytest.raises(AssertionError, match="needs integers"):
        adjoint_gap(lambda x: x / 2, lambda y: y / 2, (D,), (D,), 0)
    with pytest.raises(AssertionError, match="needs integers"):
        adjoint_gap(lambda x: x * math.nan, lambda y: y, (D,), (D,), 0)
    with pytest.raises(AssertionError, match="may round"):
        adjoint_gap(lambda x: x * 2.0**52, lambda y: y * 2.0**52, (D,), (D,), 0)
    assert dot((np.full(2, 2.0**50), np.ones(3)), (np.ones(2), np.ones(3))) == 2.0**51 + 3


# ------------------------------------------------------------------------------------------------------- the difference quotient

EPS = float(np.finfo(np.float64).eps)


def smooth(t: float) -> tuple[float, int]:
    """Return exp(sin(t + 1)), of one piece; the argument's error counts with the slope."""
    return math.exp(math.sin(t + 1.0)), 0


SMOOTH_SLOPE = math.cos(1.0) * math.exp(math.sin(1.0))
SMOOTH_NOISE = 4 * EPS * math.exp(1.0)
EQUAL = np.array_equal


def kinked(t: float) -> tuple[float, bool]:
    """Return max(t + 0.001, 0)**3, whose pieces meet at -0.001."""
    return max(t + 0.001, 0.0) ** 3, t > -0.001


def test_difference_ratio__right_and_wrong() -> None:
    for step in (2.0**-8, 2.0**-12, 2.0**-18):
        assert difference_ratio(smooth, SMOOTH_SLOPE, step, SMOOTH_NOISE, EQUAL).ok
    assert difference_ratio(smooth, SMOOTH_SLOPE * (1 + 1e-6), 2.0**-16, SMOOTH_NOISE, EQUAL).ratio > 10.0
    assert not difference_ratio(smooth, math.nan, 2.0**-16, SMOOTH_NOISE, EQUAL).ok
    assert difference_ratio(lambda t: (t, 0), 1.0, 0.25, 0.0, EQUAL) == (0.0, False)
    assert difference_ratio(lambda t: (t, 0), 1.5, 0.25, 0.0, EQUAL) == (math.inf, False)
    off = {0.0: 0.0, 0.25: 1.0, 0.5: 1.0, -0.25: -1.0, -0.5: -1.0}  # each value off by the noise, the differences by as much as can be
    assert difference_ratio(lambda t: (t + off[t] / 16, 0), 1.0, 0.25, 1.0 / 16, EQUAL).ratio == 0.5


def test_difference_ratio__refuses_another_piece() -> None:
    ratio, refused = difference_ratio(kinked, 3e-6, 0.001, EPS, EQUAL)
    assert refused
    assert math.isnan(ratio)
    assert not difference_ratio(kinked, 3e-6, 0.001, EPS, EQUAL).ok
    assert difference_ratio(kinked, 3e-6, 2.0**-16, EPS * 1e-6, EQUAL).ok


def test_difference_slope() -> None:
    """2 where the derivative is right, down to where rounding begins, 0 where it is off by 1e-6; steps across a kink do not count."""
    steps = [2.0**-n for n in range(3, 30)]
    assert abs(difference_slope(smooth, SMOOTH_SLOPE, steps, SMOOTH_NOISE, EQUAL) - 2.0) < 0.05
    assert abs(difference_slope(smooth, SMOOTH_SLOPE * (1 + 1e-6), steps[15:], SMOOTH_NOISE, EQUAL)) < 0.05
    assert abs(difference_slope(kinked, 3e-6, steps, 1e-24, EQUAL) - 2.0) < 0.05
    with pytest.raises(ValueError, match="0 of 27 steps"):
        difference_slope(lambda t: (t * t + t, 0), 1.0, steps, EPS, EQUAL)


# ------------------------------------------------------------------------------------------------------------------- a small layer


def experts_of(random: np.random.Generator, E: int, D: int, F: int) -> ExpertsParams:
    """Draw experts without biases, of positive numbers in the first product."""
    w_in_EDF, w_out_EFD = np.abs(random.normal(size=(E, D, F))), random.normal(size=(E, F, D))
    return ExpertsParams(w_in_EDF, None, w_out_EFD, np.zeros((E, F)), np.zeros((E, F)), np.zeros((E, D)))


def inputs_of(x_GSD: np.ndarray, E: int, F: int, valid_GS: np.ndarray | None = None) -> SwitchInputs:
    """Return a quiet call."""
    G, S, _ = x_GSD.shape
    none_GSE = np.zeros((G, S, E))
    valid_GS = np.ones((G, S), bool) if valid_GS is None else valid_GS
    return SwitchInputs(x_GSD, valid_GS, np.ones_like(x_GSD), none_GSE, none_GSE, np.broadcast_to(np.arange(S), (G, S)), np.ones((G, S, F)))


MESH = load_dialect("mesh_tensorflow")


def test_difference_ratio__switch_layer() -> None:
    """A direction of all of the router's weights: its gradient stands, off by 1e-6 it falls, and a long step that changes the route is refused."""
    random = np.random.Generator(np.random.Philox(4))
    F, statics = 9, Statics(MESH, TRUTH, "gelu_tanh", 3)
    inputs = inputs_of(random.normal(size=(G, S, D)), E, F)
    params = SwitchParams(random.normal(size=(D, E)), np.zeros(E), experts_of(random, E, D, F), np.zeros(D))
    dout_GSD, way_DE = random.normal(size=(G, S, D)), random.normal(size=(D, E))
    outputs, saved = switch_forward(inputs, params, statics)
    _, dparams = switch_backward(dout_GSD, 0.375, 0.0625, saved, params, statics)

    def along(t: float) -> tuple[float, Route]:
        there, _ = switch_forward(inputs, params._replace(w_router_DE=params.w_router_DE + t * way_DE), statics)
        return float(np.sum(there.out_GSD * dout_GSD) + 0.375 * there.aux_loss + 0.0625 * there.z_loss), there.route

    def same(one: Route, other: Route) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    hidden_GSF = np.einsum("gsd,gsdf->gsf", np.abs(inputs.x_GSD), params.experts.w_in_EDF[outputs.route.expert_GS])
    terms = np.einsum("gsf,gsfd,gsd->", hidden_GSF, np.abs(params.experts.w_out_EFD[outputs.route.expert_GS]), np.abs(dout_GSD))
    noise = EPS * (D + F + E + 32) * (float(terms) + float(outputs.aux_loss + outputs.z_loss))
    slope = float(np.sum(dparams.w_router_DE * way_DE))
    step = 2.0**-12
    assert difference_ratio(along, slope, step, noise, same).ok
    assert difference_ratio(along, slope * (1 + 1e-6), step, noise, same).ratio > 1.0
    assert difference_ratio(along, slope, 4.0, noise, same).refused
    assert abs(difference_slope(along, slope, [2.0**-n for n in range(4, 30)], noise, same) - 2.0) < 0.05


# ------------------------------------------------------------------------------------------------------------------------- places

GRIDS = {
    "float64": np.array([0.0, 5e-324, 1e-310, np.nextafter(2.0**-1022, 0), 2.0**-1022, 0.75, np.nextafter(1.0, 0), 1.0, 1.5, 1e300]),
    "float32": np.array([0.0, 2.0**-149, 3e-40, 2.0**-126, 0.75, np.nextafter(np.float32(1.0), np.float32(0.0)), 1.0, 1e38], np.float32),
    "bfloat16": (np.arange(0, 0x7F7F, 13, dtype=np.uint32) << 16).view(np.float32),
    "float16": np.arange(0, 0x7BFF, 7, dtype=np.uint16).view(np.float16),
}


def next_up(x: np.ndarray, name: str) -> np.ndarray:
    """Return each value's neighbour in its format, in float64, by its bits."""
    bits = {"float64": np.uint64, "float32": np.uint32, "bfloat16": np.uint32, "float16": np.uint16}[name]
    return (x.view(bits) + bits(1 << 16 if name == "bfloat16" else 1)).view(x.dtype).astype(np.float64)


@pytest.mark.parametrize("name", GRIDS)
def test_ulp_distance__neighbours_are_1_apart(name: str) -> None:
    """Everywhere: at zero, among subnormals, across powers of two, and mirrored."""
    x = GRIDS[name]
    here, above, format = x.astype(np.float64), next_up(x, name), FORMATS[name]
    assert np.all(ulp_distance(here, above, format) == 1.0)
    assert np.all(ulp_distance(-above, -here, format) == 1.0)
    assert np.all(ulp_distance(here, here, format) == 0.0)
    assert ulp_distance(-here, here, format).tolist() == (2 * ulp_distance(np.zeros_like(here), here, format)).tolist()


def test_ulp_distance__counts_the_values_between() -> None:
    one = np.ones(1)
    assert ulp_distance(one, one + 2.0**-8, FORMATS["bfloat16"]).tolist() == [0.5]
    assert ulp_distance(one, 2 * one, FORMATS["float32"]).tolist() == [2.0**23]
    assert ulp_distance(one, np.nextafter(2 * one, 3.0), FORMATS["float64"]).tolist() == [2.0**52 + 1]
    assert ulp_distance(one * 2.0**-149, one * -(2.0**-149), FORMATS["float32"]).tolist() == [2.0]
    assert ulp_distance(one * 1.7e308, one * -1.7e308, FORMATS["float64"])[0] > 2.0**63


def test_ulp_distance__compares_what_is_no_number() -> None:
    a = np.array([0.0, np.inf, -np.inf, np.nan, np.inf, np.nan, np.nan, 1.0])
    b = np.array([-0.0, np.inf, -np.inf, np.nan, -np.inf, 1.0, np.inf, np.inf])
    assert ulp_distance(a, b, FORMATS["float32"]).tolist() == [0.0, 0.0, 0.0, 0.0, *[math.inf] * 4]
    with pytest.raises(ValueError, match="shapes"):
        ulp_distance(a, b[:1], FORMATS["float32"])


def test_first_bad__by_letter() -> None:
    wanted_ECD = np.ones((3, 2, 5))
    got_ECD = wanted_ECD.copy()
    assert first_bad("packed_ECD", got_ECD, wanted_ECD, FORMATS["float32"], 0.0) == ""
    got_ECD[2, 1, 4] += 3 * 2.0**-23
    assert first_bad("packed_ECD", got_ECD, wanted_ECD, FORMATS["float32"], 3.0) == ""
    message = "packed[e=2, c=1, d=4] is 1.0000003576278687, should be 1.0: 3 ulp of float32 (1 of 30 elements)"
    assert first_bad("packed_ECD", got_ECD, wanted_ECD, FORMATS["float32"], 2.5) == message
    got_ECD[0, 0, 1] = np.nan
    assert first_bad("packed_ECD", got_ECD, wanted_ECD, FORMATS["float32"], 2.5).startswith("packed[e=0, c=0, d=1] is nan, should be 1.0: inf ulp")
    assert first_bad("loss", np.asarray(1.5), np.asarray(1.0), FORMATS["bfloat16"], 1.0).startswith("loss is 1.5, should be 1.0: 64 ulp of bfloat16")


def test_coordinate() -> None:
    assert coordinate("mean_GS1", (1, 2, 0)) == "mean[g=1, s=2]"
    assert coordinate("w_in_eDF", (1, 2, 0)) == "w_in[e=1, d=2, f=0]"
    assert coordinate("w_in", (1, 2)) == "w_in[1, 2]"


# ---------------------------------------------------------------------------------------------------------------- what was met


def call(logits_GSE: Any, capacity: int, valid_GS: Any = None) -> Call:
    """Run a layer whose router's matrix is the identity: x is the logits, and the experts' first weights are positive."""
    x_GSE = np.array(logits_GSE, np.float64)
    E, F = x_GSE.shape[2], 3
    params = SwitchParams(np.eye(E), np.zeros(E), experts_of(np.random.Generator(np.random.Philox(2)), E, E, F), np.zeros(E))
    statics = Statics(MESH, TRUTH, "relu", capacity)
    outputs, saved = switch_forward(inputs_of(x_GSE, E, F, None if valid_GS is None else np.array(valid_GS)), params, statics)
    return call_of(saved.inputs, outputs, statics.capacity)


PLAIN = [[[2, 1], [1, 2], [3, 1]], [[1, 2], [1, 3], [2, 1]]]
MET: dict[str, Callable[[], Call]] = {
    "drop": lambda: call(PLAIN, 1),
    "empty expert": lambda: call([[[2, 1], [3, 1]]], 5),
    "full expert": lambda: call(PLAIN, 2),
    "tie": lambda: call([[[2, 2, 1]]], 5),
    "pad": lambda: call(PLAIN, 3, [[True] * 3, [True, False, True]]),
    "all-pad group": lambda: call(PLAIN, 3, [[True] * 3, [False] * 3]),
    "more than 256 tokens on one expert": lambda: call([[[2, 1]] * 257], 300),
    "capacity 0": lambda: call(PLAIN, 0),
    "capacity above S": lambda: call(PLAIN, 4),
    "one expert": lambda: call([[[2], [3]]], 2),
    "group without tokens": lambda: call(np.zeros((2, 0, 3)), 1),
    "all to one": lambda: call([[[2, 1], [3, 1]]], 5),
    "gate below 2^-8": lambda: call(np.arange(300).reshape(1, 1, 300) / 1e3, 5),
    "dead relu row": lambda: call([[[-1, -2]]], 5),
    "negative logits only": lambda: call([[[-1, -2]]], 5),
}


@pytest.mark.parametrize("name", TRIGGERS)
def test_exercised__meets(name: str) -> None:
    assert triggers_of(call(PLAIN, 3)) == set()
    assert name in triggers_of(MET[name]())


def test_exercised__borders() -> None:
    """Not met by one less: 256 tokens, a capacity of S, a tie below the highest, a pad's tie, one token on one of two experts, a dropped row."""
    assert "more than 256 tokens on one expert" not in triggers_of(call([[[2, 1]] * 256], 300))
    assert "tie" not in triggers_of(call([[[3, 2, 2]]], 5)) | triggers_of(call([[[2, 2], [2, 1]]], 5, [[False, True]]))
    assert "all to one" not in triggers_of(call([[[2, 1]]], 5)) | triggers_of(call([[[2], [3]]], 2))
    assert {"capacity above S", "drop", "full expert", "empty expert", "pad", "all-pad group"}.isdisjoint(triggers_of(call(np.zeros((2, 0, 3)), 1)))
    assert {"dead relu row", "full expert"}.isdisjoint(triggers_of(call([[[-1, -2]]], 0)))
    assert "gate below 2^-8" not in triggers_of(call(np.arange(300).reshape(1, 1, 300) / 1e3, 0))
    assert "more than 256 tokens on one expert" not in triggers_of(call([[[2, 1]] * 257], 300, [[False] + [True] * 256]))
    assert "drop" not in triggers_of(call(PLAIN, 3, [[True] * 3, [True, False, True]]))


def test_exercised__accumulates() -> None:
    exercised = Exercised()
    assert exercised.missing() == sorted(TRIGGERS)
    assert exercised.missing(["drop", "tie"]) == ["drop", "tie"]
    assert "drop" in exercised.see(MET["drop"]())
    exercised.see(call(PLAIN, 3))
    assert (exercised.calls, exercised.counts["drop"], exercised.missing(["drop", "tie"])) == (2, 1, ["tie"])
    for made in MET.values():
        exercised.see(made())
    assert exercised.missing() == []
    with pytest.raises(ValueError, match="no trigger is called \\['drops'\\]"):
        exercised.missing(["drops"])
