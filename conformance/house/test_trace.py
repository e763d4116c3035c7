# May import: standard library, numpy, pytest, refswitch.
"""`refswitch trace`: the routes it shows are the reference's, its files are whole, what is wrong is said in a line."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from refswitch.checkpoints.own import write_own
from refswitch.cli.main import app
from refswitch.cli.trace_page import page
from refswitch.model_config import PRESETS
from refswitch.model_init import initial_params
from refswitch.tracing import tokens_of, trace_text

CONFIG = PRESETS["byte_tiny"]
TEXT = "to be or not to be </script> Ä"


def test_trace_text__shows_the_routes_of_the_layer() -> None:
    """Loads, drops and slots agree with one another; kept is slot < capacity; probabilities sum to 1 and the gate is the chosen one."""
    tokens = tokens_of(TEXT, None, CONFIG.vocabulary)
    assert bytes((tokens.number_L - 3).astype(np.uint8)).decode() == TEXT
    layers = trace_text(tokens, CONFIG, initial_params(CONFIG, 0, "mesh"))
    assert [(layer.stack, layer.block) for layer in layers] == [("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)]
    for layer in layers:
        assert np.array_equal(layer.kept_L, layer.slot_L < layer.capacity)
        assert layer.load_E.sum() + layer.dropped == len(tokens.shown)
        assert layer.load_E.max() <= layer.capacity
        assert np.array_equal(layer.gate_L, layer.probs_LE.max(axis=1))
        assert np.array_equal(layer.expert_L, layer.probs_LE.argmax(axis=1))
        assert 0.0 < layer.entropy_L.mean() < np.log(CONFIG.experts)
    assert sum(layer.dropped for layer in layers) > 0


def test_page__holds_its_data_and_nothing_else() -> None:
    """The data come back whole, a text with markup stays inside them, and nothing is fetched."""
    tokens = tokens_of(TEXT, None, CONFIG.vocabulary)
    layers = trace_text(tokens, CONFIG, initial_params(CONFIG, 0, "mesh"))
    text = page(tokens, layers, "a <b>", CONFIG, "zero")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["tokens"] == list(tokens.shown)
    assert [layer["expert"] for layer in data["layers"]] == [layer.expert_L.tolist() for layer in layers]
    assert text.count("</script>") == 2
    assert "a &lt;b&gt;" in text
    assert not re.search(r"https?:|//cdn|src=|@[A-Z]+@", text)


def test_trace__command(tmp_path: Path) -> None:
    """A preset, a file, a folder of ours, the index; files appear beside."""
    runner = CliRunner()
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    write_own(tmp_path / "model", CONFIG, initial_params(CONFIG, 0, "mesh"), "float64", 10**9)
    arguments = ["trace", str(tmp_path / "text.txt"), "--html", str(tmp_path / "t.html")]
    if importlib.util.find_spec("matplotlib"):
        arguments += ["--png", str(tmp_path / "t.png")]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    again = runner.invoke(app, ["trace", TEXT, "--model", str(tmp_path / "model")])
    assert again.output.split("\n")[1:] == done.output.split("\n")[1:]
    assert (tmp_path / "t.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    index = runner.invoke(app, ["trace", "--index"])
    assert "eq. (7)" in index.output
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name a text or a file"),
        ([""], "the text is empty"),
        (["x", "--model", "t5_base_x/y/z"], "neither a folder nor a name"),
        (["x", "--model", "tiny_dense"], "token 123 is not in the model's vocabulary of 32"),
        (["x", "--html", "/no/where.html"], "there is no folder"),
    ],
)
def test_trace__rejects(arguments: list[str], says: str) -> None:
    """One line and status 2."""
    done = CliRunner().invoke(app, ["trace", *arguments])
    assert done.exit_code == 2
    assert says in done.output
    assert done.output.count("\n") == 1
