# May import: standard library, numpy, scipy, numba, pytest, refswitch, conformance.
"""The CPU kernels around the Switch layer against tubes of the reference's text, their bits on any number of threads, and what they refuse.

Style 31 (radii are derived), 32 to 35. What Numba reads at import is tested in processes of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
from scipy.special import ndtr
from threadpoolctl import threadpool_info

from conformance import kernel_cases as cases
from refswitch.errors import InputError
from refswitch.kernels.cpu import attention, cross_entropy, elementwise, embedding, feed_forward, functions, jit, norm
from refswitch.kernels.cpu.workspace import Workspace
from refswitch.reference.attention import AttentionParams
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.spec_data import load_profile

ROOT = Path(__file__).resolve().parents[1]
FLOAT32 = cases.POINTS["float32"]
IN_FORMATS = [name for name in cases.CASES if name not in ("draws", "adafactor", "adamw", "position", "cross-entropy")]


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(autouse=True)
def _threads():
    with jit.on_threads():
        yield


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("sizes", [cases.TINY, cases.SMALL, cases.TALL], ids=["tiny", "small", "tall"])
def test_kernel__within_its_radius(name: str, sizes: cases.Sizes) -> None:
    assert list(cases.breaches(cases.play(name, sizes, FLOAT32))) == []


@pytest.mark.parametrize("name", IN_FORMATS)
@pytest.mark.parametrize("points", ["selective", "bfloat16"])
def test_kernel__rounds_at_its_points(name: str, points: str) -> None:
    assert list(cases.breaches(cases.play(name, cases.SMALL, cases.POINTS[points]))) == []


@jit.kernel
def _functions_rows(out: np.ndarray, x: np.ndarray) -> None:
    for i in range(x.size):
        out[0, i] = functions.exp(x[i])
        out[1, i] = functions.sigmoid(x[i])
        out[2, i] = functions.normal_cdf(x[i])
        out[3, i] = functions.exp_of_negative(-abs(x[i]))


def test_functions__errors_are_as_stated() -> None:
    """Over the range in which results are normal numbers; and the profile allows as much."""
    x = np.linspace(functions.LEAST, -functions.LEAST, (1 << 20) + 1).astype(np.float32)
    x[:: 1 << 10] = np.linspace(-1.0, 1.0, x[:: 1 << 10].size)
    out, wide = np.empty((4, x.size), np.float32), x.astype(np.float64)
    _functions_rows(out, x)
    with np.errstate(under="ignore"):
        exact = np.stack([np.exp(wide), 1.0 / (1.0 + np.exp(-wide)), ndtr(wide), np.exp(-np.abs(wide))])
    errors = np.abs(out - exact)
    ulps = (errors / np.spacing(exact.astype(np.float32))).max(axis=1)
    allowed = load_profile("float32").functions
    assert ulps[0] <= functions.EXP_ULP <= allowed.exp_ulp
    assert ulps[1] <= functions.SIGMOID_ULP
    assert ulps[3] <= functions.EXP_ULP
    assert errors[2].max() * 2**24 <= functions.NORMAL_CDF_UNITS <= allowed.erf_ulp


def test_functions__at_the_ends() -> None:
    x = np.array([-np.inf, np.nan, np.inf, 0.0], np.float32)
    out = np.empty((4, x.size), np.float32)
    _functions_rows(out, x)
    expected = [[0.0, np.nan, np.inf, 1.0], [0.0, np.nan, 1.0, 0.5], [0.0, np.nan, 1.0, 0.5], [0.0, np.nan, 0.0, 1.0]]
    assert np.array_equal(out, np.array(expected, np.float32), equal_nan=True)


def test_kernel__bits_do_not_depend_on_threads() -> None:
    found = child("-m", "conformance.kernel_cases", "bits", NUMBA_NUM_THREADS="5")
    assert (found.returncode, found.stdout) == (0, f"{len(cases.CASES)} cases played\n"), found.stderr


def test_kernel__a_sum_cut_by_threads_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of half the rows, as two threads might have got them, add the same numbers in another order."""
    before = cases.digest("norm", FLOAT32)
    assert cases.digest("norm", FLOAT32) == before
    monkeypatch.setattr(norm, "ROWS", norm.ROWS // 2)
    assert cases.digest("norm", FLOAT32) != before


def test_kernel__plain_python() -> None:
    found = child("-W", "error", "-m", "conformance.kernel_cases", "tiny", NUMBA_DISABLE_JIT="1")
    assert (found.returncode, found.stdout) == (0, f"{len(cases.CASES)} cases played\n"), found.stderr


def test_kernel__planted_bugs_are_noticed() -> None:
    found = child("-m", "conformance.kernel_cases", "planted", NUMBA_DISABLE_JIT="1")
    assert (found.returncode, found.stdout) == (0, f"{len(cases.PLANTED)} bugs planted\n"), found.stderr


def test_kernel__stays_in_bounds() -> None:
    """Numba loses an exception inside `prange`, but prints it before."""
    found = child("-m", "conformance.kernel_cases", "tiny", NUMBA_BOUNDSCHECK="1", NUMBA_FULL_TRACEBACKS="1")
    assert (found.returncode, found.stdout) == (0, f"{len(cases.CASES)} cases played\n"), found.stderr


def test_kernel__an_index_out_of_bounds_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "beyond.py").write_text(
        "import numpy as np\nfrom numba import prange\nfrom refswitch.kernels.cpu.jit import on_threads, parallel_kernel\n"
        "@parallel_kernel\ndef beyond(out):\n    for i in prange(out.size):\n        out[i + 1] = 1.0\n"
        "with on_threads(1):\n    beyond(np.zeros(3))\n"
    )
    found = child(str(tmp_path / "beyond.py"), NUMBA_BOUNDSCHECK="1", NUMBA_FULL_TRACEBACKS="1", NUMBA_CACHE_DIR=str(tmp_path))
    assert "IndexError" in found.stdout + found.stderr


def test_import__compiles_nothing() -> None:
    found = child(
        "-c",
        "import numba.core.event as event\n"
        "with event.install_recorder('numba:compile') as recorder:\n"
        "    import conformance.kernel_cases, refswitch.kernels.cpu.matmul\n"
        "print(len(recorder.buffer))",
    )
    assert found.stdout == "0\n", found.stderr


def _package(folder: Path, callee: str) -> Path:
    package = folder / "package"
    package.mkdir(exist_ok=True)
    (package / "caller.py").write_text("from package.middle import g\n")
    (package / "middle.py").write_text("import package.callee\n")
    (package / "callee.py").write_text(callee)
    (package / "stranger.py").write_text(callee)
    return package


def test_cache__key_sees_a_change_in_a_callee(tmp_path: Path) -> None:
    """Numba's own index does not: it looks at the file of the function."""
    (tmp_path / "before").mkdir(), (tmp_path / "after").mkdir()
    before, after = _package(tmp_path / "before", "A = 1\n"), _package(tmp_path / "after", "A = 2\n")
    keys = [jit.source_key(package / "caller.py", "options", package) for package in (before, after)]
    assert keys[0] != keys[1]
    assert {path.name for path in jit.imported_sources(before / "caller.py", before)} == {"caller.py", "middle.py", "callee.py"}
    assert jit.source_key(before / "caller.py", "other options", before) != keys[0]
    assert jit.source_key(before / "caller.py", "options", before) == keys[0]


def test_cache__lies_apart_from_the_host_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "refswitch" in norm.norm_rows._cache.cache_path or numba.config.CACHE_DIR
    host = numba.njit(cache=True)(_package)
    assert "kernels" not in host._cache.cache_path


def test_on_threads__refuses_more_than_there_are() -> None:
    most = numba.config.NUMBA_NUM_THREADS
    with pytest.raises(InputError, match=f"{most + 1} threads were asked for"), jit.on_threads(most + 1):
        pass


def test_on_threads__holds_blas_for_everybody() -> None:
    """The first to come limits it and the last to leave restores it, in whatever order they do."""

    def blas() -> set[int]:
        return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}

    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with jit.on_threads(1):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    with jit.on_threads(1):
        assert (blas(), numba.get_num_threads()) == ({1}, 1)
    assert blas() == {1}
    leave.set()
    thread.join()
    assert blas() == {1}  # the fixture is still inside
    assert numba.threading_layer() != "workqueue"


def _turned(x: np.ndarray) -> np.ndarray:
    """Return the same values, laid out the other way round."""
    return np.asfortranarray(x)


def test_kernel__other_layouts_give_the_same_bits() -> None:
    draw, ws = cases.Draw(np.random.default_rng(5)), Workspace()
    x, scale, w_in, w_out = draw.normal(3, 5, 4), draw.normal(4), draw.normal(4, 7), draw.normal(7, 4)
    for layout in (_turned, lambda x: np.repeat(x, 2, axis=-1)[..., ::2]):
        assert not layout(x).flags.c_contiguous
        straight, other = (norm.norm_forward(a, scale, 1e-6, FLOAT32, ws)[0] for a in (x, layout(x)))
        assert (straight == other).all()
        plain, turned = FeedForwardParams(w_in, None, w_out), FeedForwardParams(layout(w_in), None, layout(w_out))
        straight, other = (feed_forward.feed_forward_forward(x, p, cases.ONE, "relu", FLOAT32, ws)[0] for p in (plain, turned))
        assert (straight == other).all()
        assert (elementwise.added(x, layout(x), cases.F32, ws) == x + x).all()


X = np.zeros((2, 3, 4), np.float32)
REFUSED = {
    "no tokens": (lambda ws: norm.norm_forward(X[:0], X[0, 0], 1e-6, FLOAT32, ws), "x_BLD has shape"),
    "float64": (lambda ws: norm.norm_forward(X.astype(np.float64), X[0, 0], 1e-6, FLOAT32, ws), "x_BLD has dtype float64"),
    "scale": (lambda ws: norm.norm_forward(X, X[0, 0, :3], 1e-6, FLOAT32, ws), "scale_D has shape"),
    "sum": (lambda ws: elementwise.added(X, X[:1], cases.F32, ws), "y has shape"),
    "target": (lambda ws: cross_entropy.cross_entropy_forward(X, np.full((2, 3), 4), X[..., 0], 1.0, 0.0, 0.0, ws), "targets_BL has 4"),
    "token": (lambda ws: embedding.embed_forward(np.full((2, 3), -1), X[0], ws), "tokens_BL has -1"),
    "factor": (
        lambda ws: feed_forward.feed_forward_forward(X, FeedForwardParams(X[0].T, None, X[0]), X[:1], "relu", FLOAT32, ws), "factor_BLF has shape"
    ),
    "bias": (
        lambda ws: attention.attention_forward(X, X, X, AttentionParams(*[np.zeros((4, 2, 2), np.float32)] * 3, np.zeros((2, 2, 4), np.float32)),
                                               np.ones((2, 3, 3), bool), cases.ONE[None], FLOAT32, ws), "bias_HLM has shape"
    ),
    "format": (lambda ws: elementwise.rounded(X, cases.FORMATS["float16"], ws), "float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_kernel__refuses_in_one_line(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(InputError, match=words) as caught:
        call(Workspace())
    assert "\n" not in str(caught.value)


def test_update__leaves_everything_alone_where_a_gradient_is_not_finite() -> None:
    for update, init in ((cases.adafactor.adafactor_update, cases.exact_adafactor.adafactor_init), (cases.adamw.adamw_update, cases.adamw_init)):
        w = cases.Draw(np.random.default_rng(6)).normal(130, 140)
        grad, before, state = np.where(w > 3.0, np.float32(np.inf), w), w.copy(), init(w.shape)
        with pytest.raises(InputError, match="finite"):
            update(w, grad, state, 0.1, workspace=Workspace())
        assert (w == before).all()
        assert all((np.asarray(field) == 0).all() for field in state)
