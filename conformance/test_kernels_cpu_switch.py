# May import: standard library, numpy, pytest, numba, refswitch, adapters.cpu.
"""The Switch layer in kernels: within the judge's radii, the same bits on any threads and in any batch, within bounds, and planted bugs are noticed.

No tolerance stands here: the layer is judged like anybody's, and what remains is equality of bits or of integers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refswitch.config import rounding_points
from refswitch.errors import InputError
from refswitch.kernels.cpu import losses, switch
from refswitch.kernels.cpu.capacity import row_cuts
from refswitch.kernels.cpu.jit import kernel, on_threads
from refswitch.kernels.cpu.matmul import DEPTH, WIDTH, matmul
from refswitch.kernels.cpu.switch_inputs import refuse
from refswitch.kernels.cpu.tile import TILE_COLUMNS, TILE_ROWS
from refswitch.kernels.cpu.workspace import Workspace
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.switch import Statics, SwitchInputs, SwitchParams
from refswitch.spec_data import load_dialect, load_profile, names_of
from refswitch.verify.cases import Target, prepare
from refswitch.verify.judge import judge_case

CPU = Path(__file__).resolve().parent / "adapters" / "cpu.py"
FORMS = {
    "base": {},
    "noise, padding, dropout": {"is_noised": True, "is_padded": True, "is_masked": True},
    "gated": {"is_gated": True, "activation": "gelu_tanh", "bias": "per_expert", "is_padded": True, "is_masked": True},
    "shared bias, bfloat16": {"activation": "silu", "bias": "shared_out", "profile": "bfloat16", "is_padded": True},
    "gelu, crowded": {"activation": "gelu_erf", "capacity": 3, "is_noised": True},
}


@cache
def adapter_file() -> Any:
    """Return adapters/cpu.py, loaded by its path as the judge does."""
    spec = importlib.util.spec_from_file_location("adapter_cpu", CPU)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


class Layer:
    """One layer's data, and its results as one dict of arrays."""

    def __init__(
        self, G: int = 2, S: int = 37, D: int = 20, E: int = 5, F: int = 33, *, seed: int = 0, activation: str = "relu", bias: str = "none",
        profile: str = "float32", capacity: int = 9, is_gated: bool = False, is_noised: bool = False, is_padded: bool = False,
        is_masked: bool = False,
    ):  # fmt: skip
        rng, self.dialect = np.random.default_rng(seed), load_dialect({"base": "mesh_tensorflow", "expert.glu": is_gated, "expert.bias": bias})
        one, zero = np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
        self.inputs = SwitchInputs(
            x_GSD=draw(rng, G, S, D),
            valid_GS=rng.random((G, S)) > 0.2 if is_padded else np.ones((G, S), bool),
            noise_factor_GSD=rng.uniform(0.99, 1.01, (G, S, D)).astype(np.float32) if is_noised else one,
            noise_term_GSE=zero,
            select_noise_GSE=zero,
            priority_GS=np.zeros((1, 1), np.float32),
            hidden_mask_GSF=rng.integers(0, 2, (G, S, F)).astype(np.float32) * np.float32(2.0) if is_masked else one,
        )
        each, shared = np.float32(bias == "per_expert"), np.float32(bias == "shared_out")
        experts = ExpertsParams(
            draw(rng, E, D, F), draw(rng, E, D, F) if is_gated else None, draw(rng, E, F, D), draw(rng, E, F) * each, draw(rng, E, F) * each,
            draw(rng, E, D) * each,
        )  # fmt: skip
        self.params = SwitchParams(draw(rng, D, E), draw(rng, E), experts, draw(rng, D) * shared)
        self.statics = Statics(self.dialect, rounding_points(self.dialect, load_profile(profile)), activation, capacity)
        self.dout_GSD = draw(rng, G, S, D)

    def run(self, daux: float = 0.5, dz: float = 0.25, threads: int | None = None) -> dict[str, np.ndarray]:
        workspace = Workspace()
        with on_threads(threads):
            outputs, saved = switch.switch_forward(self.inputs, self.params, self.statics, workspace)
            dx_GSD, dparams = switch.switch_backward(self.dout_GSD, daux, dz, saved, self.params, self.statics, workspace)
        named = {"out": outputs.out_GSD, "aux": outputs.aux_loss, "z": outputs.z_loss, "probs": outputs.probs_GSE, "gate": outputs.gate_GS}
        named |= outputs.route._asdict() | {"dx": dx_GSD, "dw_router": dparams.w_router_DE, "db_router": dparams.b_router_E}
        named |= dparams.experts._asdict() | {"db_shared": dparams.b_shared_D}
        return {name: np.asarray(value) for name, value in named.items() if value is not None}


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert value.shape == second[name].shape
        assert value.tobytes() == second[name].tobytes(), name


# The product.


@kernel
def product(out_MN: np.ndarray, a_MK: np.ndarray, b_KN: np.ndarray, accumulate: bool) -> None:
    matmul(out_MN, a_MK, b_KN, accumulate)


SIDES = st.sampled_from([0, 1, 2, TILE_ROWS - 1, TILE_ROWS, TILE_ROWS + 1, TILE_COLUMNS - 1, TILE_COLUMNS, TILE_COLUMNS + 1, 3 * TILE_COLUMNS + 5])
LONG = st.sampled_from([0, 1, 3, 17, DEPTH - 1, DEPTH, DEPTH + 1, 2 * DEPTH + 3])


def laid_out(values: np.ndarray, layout: str) -> np.ndarray:
    """Return the values as a view that is C-contiguous, transposed, or a slice of something wider, of either kind."""
    if layout == "whole":
        return np.ascontiguousarray(values)
    if layout == "transposed":
        return np.ascontiguousarray(values.T).T
    wide = np.full((values.shape[0] + 3, values.shape[1] + 5), np.float32(np.nan))
    wide = wide.T.copy().T if layout == "transposed slice" else wide
    wide[1:-2, 2:-3] = values
    return wide[1:-2, 2:-3]


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, LONG, st.integers(0, 2**31), st.booleans(), st.data())
def test_matmul__integers_are_exact(M: int, N: int, K: int, seed: int, accumulate: bool, data: st.DataObject) -> None:
    """On small integers every order gives the same bits: those of int64. Beside the result nothing is written, beside an operand nothing read."""
    layouts = st.sampled_from(["whole", "transposed", "slice", "transposed slice"])
    rng = np.random.default_rng(seed)
    a, b, before = (rng.integers(-8, 9, shape) for shape in ((M, K), (K, N), (M, N)))
    frame = np.full((M + 2, N + 3), np.float32(7.0))
    out = frame[1:-1, 1:-2]
    out[...] = before
    product(out, laid_out(a.astype(np.float32), data.draw(layouts)), laid_out(b.astype(np.float32), data.draw(layouts)), accumulate)
    assert np.array_equal(out, a @ b + (before if accumulate else 0))
    out[...] = 7.0
    assert np.all(frame == 7.0)


@pytest.mark.parametrize("layout", ["whole", "transposed"])
def test_matmul__bits_depend_on_row_and_column_alone(layout: str) -> None:
    """However many rows and columns are computed together, each value is the same: no other row decides how its sum is rounded."""
    rng = np.random.default_rng(5)
    M, N, K = 3 * TILE_ROWS + 1, WIDTH + TILE_COLUMNS + 3, DEPTH + 9
    a, b, whole = draw(rng, M, K), laid_out(draw(rng, K, N), layout), np.empty((M, N), np.float32)
    product(whole, a, b, False)
    for rows, columns in itertools.product([slice(0, 1), slice(2, 5), slice(M - 13, M)], [slice(0, 1), slice(7, 40), slice(N - 70, N)]):
        part = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        product(part, a[rows], b[:, columns], False)
        assert part.tobytes() == np.ascontiguousarray(whole[rows, columns]).tobytes()


@pytest.mark.parametrize(("features", "lanes"), [({"avx2": True}, 8), ({}, 4)])
def test_matmul__narrower_registers(features: dict[str, bool], lanes: int, tmp_path: Path) -> None:
    """The tile of a processor with shorter vectors computes the same: the features are planted, in a process with a cache of its own."""
    script = (
        f"import llvmlite.binding as binding; binding.get_host_cpu_features = lambda: binding.FeatureMap({features})\n"
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {Path(__file__).stem} as t\n"
        f"assert t.TILE_COLUMNS == 2 * {lanes}\n"
        "t.few_products()"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def few_products() -> None:
    """Compare products of small integers with int64's, on sides around the tile's."""
    rng = np.random.default_rng(0)
    sides = (1, TILE_ROWS + 1, TILE_COLUMNS, 2 * TILE_COLUMNS + 3)
    for M, N, K, layout in itertools.product(sides, sides, (1, DEPTH + 3), ("whole", "transposed")):
        a, b, out = rng.integers(-8, 9, (M, K)), rng.integers(-8, 9, (K, N)), np.empty((M, N), np.float32)
        product(out, laid_out(a.astype(np.float32), layout), laid_out(b.astype(np.float32), layout), False)
        assert np.array_equal(out, a @ b)


# The layer, judged.


def verdicts_of(label: str, every: int = 1) -> Iterator[tuple[str, set]]:
    """Judge one of the adapter's layers in this process, on every so many cases; yield each case's name and the clauses that fail."""
    layer = getattr(adapter_file(), label, None) or adapter_file().ADAPTERS[label]
    target = Target(load_dialect(layer.dialect), load_profile(layer.profile), frozenset(adapter_file().FEATURES), {})
    for prepared in itertools.islice(prepare(target, "quick", seed=3), 0, None, every):
        outputs = {name: np.asarray(value) for name, value in layer(prepared.case.writable_copy()).items()}
        yield prepared.name, judge_case(prepared, target, outputs).failing


@pytest.mark.parametrize("label", ["float32", "bfloat16", "gated", "shared_bias"])
def test_switch__conforms(label: str) -> None:
    """Every output and gradient of every case lies within the radius that follows from the profile; integers are equal."""
    found = dict(verdicts_of(label))
    assert found
    assert {name: failing for name, failing in found.items() if failing} == {}


def _computes(name: str) -> bool:
    dialect = load_dialect(name)
    try:
        refuse(dialect, rounding_points(dialect, load_profile("float32")))
    except InputError:
        return False
    return dialect.noise.leak_to_experts != "if_same_dtype"


@pytest.mark.parametrize("dialect", [name for name in names_of("dialects") if _computes(name)])
def test_switch__conforms_in_every_dialect_that_it_computes(dialect: str) -> None:
    """What is not refused is right: priorities, padding, counts, formats, biases and activations of the other records."""
    found = dict(verdicts_of(dialect, every=5))
    assert found
    assert {name: failing for name, failing in found.items() if failing} == {}


def _late_slots(slot_GS, kept_GS, expert_GS, claims_GS, order_GS, E, capacity):
    original_slots(slot_GS, kept_GS, expert_GS, claims_GS, order_GS, E, capacity + 1)


def _short_cuts(cut_P, start_E, fixed):
    row_cuts(cut_P, start_E, fixed)
    cut_P[-1] = max(cut_P[-1] - 1, cut_P[-2])


def _whole_z(lse_GS, valid_GS, z):
    return losses.z_loss_forward(lse_GS, np.ones_like(valid_GS), z)


def _kept_counts(route, claims_GS, valid_GS, E, aux):
    return losses.counted_fraction(route._replace(expert_GS=np.where(route.kept_GS, route.expert_GS, 0)), claims_GS, valid_GS, E, aux)


def _unrounded(dialect, points, activation, is_gated):
    return original_form(dialect, points, activation, is_gated)._replace(rounds_hidden=False)


def _leaky(name, array, shape, neutral):
    return original_optional(name, array, shape, neutral) if name != "hidden_mask_GSF" else switch.NOTHING


original_slots, original_form, original_optional = switch.slots_forward, switch.form_of, switch.optional
PLANTED: dict[str, tuple[str, str, Callable]] = {
    "a slot too many": ("float32", "slots_forward", _late_slots),
    "the last row is nobody's": ("float32", "row_cuts", _short_cuts),
    "the z-loss counts padding": ("float32", "z_loss_forward", _whole_z),
    "f counts the dropped for expert 0": ("float32", "counted_fraction", _kept_counts),
    "hidden is not rounded": ("bfloat16", "form_of", _unrounded),
    "expert dropout is forgotten": ("float32", "optional", _leaky),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_switch__planted_bug_is_noticed(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would see, if it were there."""
    label, name, wrong = PLANTED[planted]
    monkeypatch.setattr(switch, name, wrong)
    assert any(failing for _, failing in verdicts_of(label))


# Bits.


def test_switch__same_bits_on_any_threads() -> None:
    """One, two and five threads, whatever the form, in a process that may have five."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {Path(__file__).stem} as t; t.print_digests([1, 2, 5])"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"NUMBA_NUM_THREADS": "5"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    digests = [line.split() for line in done.stdout.splitlines()]
    assert len(digests) == len(FORMS) + 1
    for one, two, five in digests:
        assert one == two == five
    assert len({one for one, _, _ in digests}) == len(digests)


def print_digests(threads: list[int]) -> None:
    """Print one line per form: a digest of everything for each number of threads. The last has a crowd at one expert, and one without tokens."""
    layers = [Layer(**form) for form in FORMS.values()]
    crowd = Layer(1, 300, 24, 4, 40, capacity=300)
    crowd.params.b_router_E[:] = [6.0, 0.0, 0.0, -100.0]
    for layer in [*layers, crowd]:
        results = [layer.run(threads=count) for count in threads]
        print(*(hashlib.sha256(b"".join(result[name].tobytes() for name in sorted(result))).hexdigest() for result in results))


@pytest.mark.parametrize("form", FORMS)
def test_switch__token_does_not_depend_on_the_batch(form: str) -> None:
    """Out and dx of a token have the same bits alone, among others and at another place, while it has a slot and no loss asks about the others."""
    layer = Layer(**FORMS[form] | {"capacity": 99})
    together = layer.run(daux=0.0, dz=0.0)
    S = layer.inputs.x_GSD.shape[1]
    for g, tokens in [(0, [4]), (1, [30, 2, 17]), (0, list(range(S))[::-1]), (1, list(range(5, 36)))]:
        rows = partial(_rows_of, g=g, tokens=tokens)
        layer_few = Layer(**FORMS[form] | {"capacity": 99})
        layer_few.inputs = SwitchInputs(*(value if value.size == 1 else rows(value) for value in layer.inputs))
        layer_few.dout_GSD = rows(layer.dout_GSD)
        few = layer_few.run(daux=0.0, dz=0.0)
        for name in ("out", "dx"):
            assert few[name].tobytes() == rows(together[name]).tobytes(), (name, g, tokens)


def _rows_of(value: np.ndarray, g: int, tokens: list[int]) -> np.ndarray:
    return np.ascontiguousarray(value[g : g + 1, tokens])


def test_switch__same_bits_again_in_used_buffers() -> None:
    """What the buffers held before is never read."""
    layer, workspace, results = Layer(**FORMS["gated"]), Workspace(), []
    with on_threads():
        for _ in range(2):
            outputs, saved = switch.switch_forward(layer.inputs, layer.params, layer.statics, workspace)
            dx_GSD, dparams = switch.switch_backward(layer.dout_GSD, 0.5, 0.25, saved, layer.params, layer.statics, workspace)
            arrays = {"out": outputs.out_GSD, "dx": dx_GSD, "dw_router": dparams.w_router_DE} | dparams.experts._asdict()
            results.append({name: array.copy() for name, array in arrays.items()})
            workspace.reset()
            for buffers in workspace._free.values():
                for buffer in buffers:
                    buffer[:] = 255  # a NaN, or -1
    assert_same_bits(*results)


# Inputs.


def test_switch__other_layouts_give_the_same_bits() -> None:
    """A view that is not contiguous is read as its values say."""
    layer, other = Layer(**FORMS["gated"]), Layer(**FORMS["gated"])
    wide = np.zeros((2, 37, 40), np.float32)
    wide[..., ::2] = layer.inputs.x_GSD
    other.inputs = other.inputs._replace(x_GSD=wide[..., ::2])
    other.dout_GSD = np.asfortranarray(other.dout_GSD)
    experts = other.params.experts
    other.params = other.params._replace(
        w_router_DE=np.asfortranarray(other.params.w_router_DE),
        experts=experts._replace(w_in_EDF=np.asfortranarray(experts.w_in_EDF), w_out_EFD=experts.w_out_EFD[::-1].copy()[::-1]),
    )
    assert_same_bits(layer.run(), other.run())


@pytest.mark.parametrize(("G", "S"), [(1, 0), (3, 0), (0, 4)])
def test_switch__no_tokens(G: int, S: int) -> None:
    """Nothing comes of nothing, and every gradient is 0."""
    found = Layer(G, S).run()
    assert found["out"].shape == found["dx"].shape == (G, S, 20)
    assert found["aux"] == found["z"] == 0.0
    assert not any(np.any(value) for name, value in found.items() if name.startswith(("dw", "w_", "b_")))


def test_switch__no_slots() -> None:
    """With a capacity of 0 every token is dropped, and only the losses have gradients."""
    found = Layer(capacity=0).run()
    assert not found["kept_GS"].any()
    assert not found["out"].any()
    assert not found["w_in_EDF"].any()
    assert found["dw_router"].any()


def test_switch__refuses_what_it_does_not_compute() -> None:
    """One line that names the array or the knob, before anything is computed."""
    layer = Layer()
    layer.inputs = layer.inputs._replace(x_GSD=layer.inputs.x_GSD.astype(np.float64))
    with pytest.raises(InputError, match="x_GSD is float64"):
        layer.run()
    layer = Layer()
    layer.params = layer.params._replace(w_router_DE=layer.params.w_router_DE[:-1])
    with pytest.raises(InputError, match=r"w_router_DE is float32 of shape \(19, 5\)"):
        layer.run()
    for name, knob in [("hf_le_4_51", "drop.output"), ("keras_io", "gate.site"), ("t2t_noisy_top1", "gate.value"), ("mesh_ntlb", "select.rule")]:
        dialect = load_dialect(name)
        with pytest.raises(InputError, match=knob):
            refuse(dialect, rounding_points(dialect, load_profile("float32")))


# Processes of their own.


def judged_in_a_process(environment: dict[str, str]) -> None:
    """Judge the layer in a process with another Numba."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {Path(__file__).stem} as t\n"
        "found = [failing for label in ('float32', 'gated') for _, failing in t.verdicts_of(label)]\n"
        "assert found and not any(found), found"
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_switch__plain_python() -> None:
    """The functions as written, without a compiler, conform too: what Numba makes of them is what they say."""
    judged_in_a_process({"NUMBA_DISABLE_JIT": "1"})


def test_switch__stays_in_bounds() -> None:
    """Compiled with every index checked, nothing reaches beside its array."""
    judged_in_a_process({"NUMBA_BOUNDSCHECK": "1"})
