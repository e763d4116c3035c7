# May import: standard library, numpy, pytest, refswitch.
"""What somebody else's program may do to the judge: each mishap is one clear line and exit status 2, or a finding, never our traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
import sys
sys.path.insert(0, {reference!r})
from reference import player
layer = player("mesh_tensorflow", "float32")
"""
HEAD = 'DIALECT = "mesh_tensorflow"\nPROFILE = "float32"\nimport numpy as np\n'
ADAPTERS = Path(__file__).resolve().parents[1] / "adapters"


def run_verify(folder: Path, source: str | bytes, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Write an adapter and judge it as a user would."""
    path = folder / "adapter.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    return verify("adapter.py", *arguments, folder=folder)


def verify(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder."""
    command = [sys.executable, "-m", "refswitch", "verify", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def good(body: str) -> str:
    """Return an adapter that is right but for `body`, which sees `out`, the right outputs, and `case`."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return GOOD.format(reference=str(ADAPTERS)) + HEAD + f"def switch_layer(case):\n    out = layer(case)\n{indented}\n    return out\n"


MISHAPS = {
    "raises": (good('raise ValueError("no such\\nluck")'), "raised ValueError: no such luck"),
    "missing_out": (good('del out["out"]'), "returned no `out`"),
    "misshapen": (good('out["out"] = out["out"][..., :-1]'), "returned out with shape"),
    "wrong_type": (good('out["out"] = out["out"].astype(np.int32)'), "should be float32 or float64"),
    "float_expert": (good('out["expert"] = out["expert"].astype(np.float64)'), "should be an integer type"),
    "integer_kept": (good('out["kept"] = out["kept"].astype(np.int8)'), "should be bool"),
    "unknown_output": (good('out["logit"] = out["logits"]'), "unknown output 'logit'"),
    "not_a_dict": (good('out = out["out"]'), "should return a dict"),
    "object_array": (good('out["out"] = np.array([None, "x"], dtype=object)'), "returned out with shape"),
    "exits": (good("import sys; sys.exit(3)"), "raised SystemExit: 3"),
    "dies": (good("import os; os._exit(3)"), "ended its process with status 3"),
    "hangs": (good("import time; time.sleep(60)"), "did not answer within 3 s"),
    "not_python": ("def switch_layer(:\n", "not a Python file"),
    "binary": (b"\x00\xff\xfe", "not a Python file"),
    "import_fails": ("import no_such_module_anywhere\n", "cannot be imported: ModuleNotFoundError"),
    "no_adapter": ("x = 1\n", "defines neither `switch_layer` nor `ADAPTERS`"),
    "not_callable": ("ADAPTERS = {'a': 3}\n", "ADAPTERS['a'] is not callable"),
    "unknown_dialect": ("DIALECT = 'mesh_tensorflo'\nswitch_layer = print\n", "unknown dialect 'mesh_tensorflo'; did you mean mesh_tensorflow?"),
    "unknown_profile": ("PROFILE = 'float33'\nswitch_layer = print\n", "unknown profile 'float33'; did you mean float32?"),
    "unknown_knob": ("DIALECT = {'base': 'hf_4_57', 'capacity.mim': 0}\nswitch_layer = print\n", "did you mean capacity.min?"),
    "unknown_feature": ("FEATURES = ['backwards']\nswitch_layer = print\n", "did you mean backward?"),
    "unknown_limit": ("LIMITS = {'T': {'max': 3}}\nswitch_layer = print\n", "LIMITS has an unknown key 'T'"),
    "empty_limit": ("LIMITS = {'E': {'one_of': []}}\nswitch_layer = print\n", "should be a list that is not empty"),
    "zero_multiple": ("LIMITS = {'D': {'multiple_of': 0}}\nswitch_layer = print\n", "should hold whole numbers"),
    "crossed_limits": ("LIMITS = {'D': {'min': 9, 'max': 3}}\nswitch_layer = print\n", "has min above max"),
    "requires_text": ("REQUIRES = 'torch'\nswitch_layer = print\n", "REQUIRES should be a list of names"),
    "absurd_profile": ("PROFILE = {'base': 'float32', 'functions.exp_ulp': 1e30}\nswitch_layer = print\n", "should be between 0 and 10000"),
    "unreadable_dialect": ("DIALECT = object()\nswitch_layer = print\n", "declares what cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("mishap", MISHAPS)
def test_verify__one_line_for_a_mishap(mishap: str, tmp_path: Path) -> None:
    """One line that names what is wrong, exit status 2, no traceback."""
    source, expected = MISHAPS[mishap]
    done = run_verify(tmp_path, source, "-q", "--deadline", "3")
    assert expected in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 2


def test_verify__prints_are_captured(tmp_path: Path) -> None:
    """An adapter that prints, from Python and past it, is judged as if it did not."""
    noisy = good('import os, sys; print("hello"); sys.stderr.write("hello"); os.write(1, b"{}\\n")')
    done = run_verify(tmp_path, noisy, "-q")
    assert "CONFORMS" in done.stdout
    assert "hello" not in done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("body", "clause", "stage"),
    [
        ('out["out"] = np.full_like(out["out"], np.nan)', "S-COMBINE-1", "combine"),
        ("case.x[...] = 0", "S-STATE-1", "state"),
        ('out["out"][0, -1, -1] = np.inf', "S-COMBINE-1", "combine"),
    ],
)
def test_verify__finding_for_the_implementations_fault(body: str, clause: str, stage: str, tmp_path: Path) -> None:
    """NaN, infinity and a written input are the implementation's fault: a finding and exit status 1."""
    done = run_verify(tmp_path, good(body), "--json", "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (clause, stage) in [(finding["clause"], finding["stage"]) for finding in report["findings"]]
    assert report["verdict"] == "deviates"
    assert done.returncode == 1


def test_verify__missing_package_is_not_run(tmp_path: Path) -> None:
    """REQUIRES is read before anything is imported, wherever it stands in the file."""
    done = run_verify(tmp_path, "import no_such_module_anywhere\nREQUIRES = ['no_such_module_anywhere']\n", "-q")
    assert "NOT RUN" in done.stdout
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("no_such_file.py",), "there is no file"),
        (("adapter",), "neither FILE.py[::NAME] nor a built-in"),
        (("reference::nothing",), "has no adapter 'nothing'"),
        (("reference", "--dialect", "mesh"), "unknown dialect 'mesh'"),
        (("reference", "--dialect", "mesh_tensorflow,capacity.min"), "should be knob=value"),
        (("reference", "--profile", "bf16"), "unknown profile 'bf16'"),
        (("reference", "--json", "no/such/folder/report.json"), "there is no folder"),
        (("reference", "--tier", "huge"), "huge"),
    ],
)
def test_verify__one_line_for_a_wrong_command(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    """A user's mistake says what to do, without a traceback, with exit status 2."""
    done = verify(*arguments, folder=tmp_path)
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_verify__report_is_the_same_bytes(tmp_path: Path) -> None:
    """Two runs give the same JSON but for the seconds."""
    texts = []
    for name in ("first.json", "second.json"):
        assert verify("reference::float32", "--json", name, folder=tmp_path).returncode == 0
        lines = (tmp_path / name).read_text().splitlines()
        texts.append([line for line in lines if not line.strip().startswith('"seconds"')])
    assert texts[0] == texts[1]
    assert json.loads((tmp_path / "first.json").read_text())["verdict"] == "conforms"


def test_verify__promised_outputs_that_never_come(tmp_path: Path) -> None:
    """A declared feature whose outputs are missing, in any case that wants them, is inconclusive and never a pass."""
    names = 'FEATURES = ["backward", "aux_loss", "z_loss", "noise", "padding", "groups", "expert_dropout", "empty"]\n'
    source = names + good('out.pop("dw_out")\nif case.x.shape[1] > 20: out.pop("dx")')
    done = run_verify(tmp_path, source, "--json", "report.json")
    clauses = json.loads((tmp_path / "report.json").read_text())["clauses"]
    assert {name for name, clause in clauses.items() if clause["status"] == "inconclusive"} >= {"S-BACK-1", "S-BACK-4"}
    assert clauses["S-BACK-3"]["status"] == "pass"
    assert done.returncode == 2


def test_verify__output_that_cannot_be_written_is_no_verdict(tmp_path: Path) -> None:
    """A full disk on standard output is an error and not a deviation."""
    (tmp_path / "adapter.py").write_text(good(""))
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "refswitch", "verify", "adapter.py"]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_verify__state_across_calls(tmp_path: Path) -> None:
    """An answer that depends on the calls before it is found by repeating the first case."""
    source = good('global calls\ncalls = globals().get("calls", 0) + 1\nout["out"] = out["out"] * (1.0 + 0.001 * (calls > 3))')
    done = run_verify(tmp_path, source)
    assert "S-STATE-2" in done.stdout
    assert done.returncode == 1
