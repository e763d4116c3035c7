# May import: standard library, numpy, pytest, yaml, safetensors, typer, refswitch, its own folder.
"""A run over time: what is refused in one line, what is kept when a run ends early, and that it goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml
from typer.testing import CliRunner

from conformance.house.kill_and_resume import SMALL, command, digest, kill_and_resume, write_text
from refswitch.backends.registry import backend as backend_of
from refswitch.checkpoints.models import read_model
from refswitch.cli.main import app
from refswitch.errors import InputError
from refswitch.training.checkpoint import load_checkpoint
from refswitch.training.config import FREE, as_tree, hash_of, load_config, to_yaml
from refswitch.training.loop import learning_rate, setup_of, train
from refswitch.training.non_finite import Watching
from refswitch.training.presets import PRESETS
from refswitch.training.run_folder import opened, read_metrics, rewind_metrics
from refswitch.tree import leaves

RUNNER = CliRunner()


class Silent:
    """A reporter that says nothing, and may ask for an end."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at, self.made, self.saved_at = stop_at, 0, []

    def reading(self, done: int, total: int) -> None: ...

    def started(self, facts: Any) -> None:
        self.facts, self.made = facts, facts.start

    def stepped(self, entry: dict[str, Any]) -> None: ...

    def saved(self, place: Path) -> None:
        self.saved_at.append(place.name)

    def wants_to_stop(self) -> bool:
        self.made += 1
        return self.made == self.stop_at


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def small(text: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.sources=[{text}]", "data.held_out=0.2", f"run_dir={run_dir}", *more]


def run(text: Path, run_dir: Path, *more: str) -> tuple[int, str]:
    """Return the status and what the command prints, all together."""
    options = [word for word in more if word.startswith("-")]
    result = RUNNER.invoke(app, ["train", "tiny", *small(text, run_dir, *(word for word in more if not word.startswith("-"))), *options])
    return result.exit_code, result.output


def test_train__leaves_what_the_contract_names(text: Path, tmp_path: Path) -> None:
    """config.yaml, metrics.jsonl with a line per step, checkpoints/step-N that every command reads, plots."""
    status, printed = run(text, tmp_path / "run", "steps=4", "checkpoint_every=2", "eval_every=2")
    assert status == 0, printed
    folder = tmp_path / "run"
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert ["eval" in entry for entry in entries] == [False, True, False, True]
    for layer in entries[0]["layers"]:
        assert len(layer["load"]) == 8
        assert abs(sum(layer["load"]) - 1.0) < 8 * np.finfo(np.float64).eps
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-2", "step-4"]
    config, params = read_model(str(folder / "checkpoints" / "step-4"))
    assert config == load_config(str(folder / "config.yaml")).model
    assert all(np.isfinite(leaf).all() for leaf in leaves(params).values())
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "load.png", "drops.png", "entropy.png", "index.html"}
    assert "unigram entropy" in printed
    assert hash_of(config_of(folder)) in printed


def config_of(folder: Path) -> Any:
    return load_config(str(folder / "config.yaml"))


def test_resume__ends_in_the_same_bits(text: Path, tmp_path: Path) -> None:
    """A run that was stopped twice, between checkpoints too, is the run of one piece."""
    keys = ("steps=7", "checkpoint_every=3", "keep=2")
    whole, cut = (load_config("tiny", small(text, tmp_path / name, *keys)) for name in ("whole", "cut"))
    train(whole, Silent())
    first = train(cut, Silent(stop_at=2))
    assert first.interrupted
    assert first.step == 2
    second = train(cut, Silent(stop_at=5), resume=True)
    assert (second.step, second.interrupted) == (5, True)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-5")  # as if it had been killed after its metrics and before its checkpoint
    third = Silent()
    assert train(cut, third, resume=True).step == 7
    assert third.facts.start == 3
    assert digest(tmp_path / "cut", 7) == digest(tmp_path / "whole", 7)
    assert sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()) == ["step-6", "step-7"]


def test_resume__is_noticed_where_it_is_not_the_same(text: Path, tmp_path: Path) -> None:
    """A part of the optimizer's state decides the bits at the end: the comparison can fail."""
    keys = ("steps=4", "checkpoint_every=2")
    for name in ("whole", "cut"):
        train(load_config("tiny", small(text, tmp_path / name, *keys)), Silent())
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-4")
    place = tmp_path / "cut" / "checkpoints" / "step-2"
    arrays = safetensors.numpy.load_file(place / "optimizer.safetensors")
    name = next(name for name, array in arrays.items() if array.size > 1)
    arrays[name] *= 2.0
    safetensors.numpy.save_file(arrays, place / "optimizer.safetensors")
    config = load_config("tiny", small(text, tmp_path / "cut", *keys))
    with pytest.raises(InputError, match=r"optimizer\.safetensors: is missing or changed since it was written"):
        train(config, Silent(), resume=True)
    record = yaml.safe_load((place / "training.yaml").read_text())
    record["digests"]["optimizer.safetensors"] = hashlib.sha256((place / "optimizer.safetensors").read_bytes()).hexdigest()
    (place / "training.yaml").write_text(yaml.safe_dump(record))
    train(config, Silent(), resume=True)
    assert digest(tmp_path / "cut", 4) != digest(tmp_path / "whole", 4)


def test_killed__goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL at random moments; `kill_and_resume.py 20` is the longer form."""
    seen = kill_and_resume(tmp_path, kills=4, steps=40, seed=3)
    assert seen.killed == 4


def test_interrupted__ends_the_step_saves_and_says_how_to_go_on(text: Path, tmp_path: Path) -> None:
    """Ctrl-C once: status 130, a checkpoint, one line that says how."""
    process = subprocess.Popen(
        [word for word in command(tmp_path / "run", text, 100_000) if word not in ("-q", "checkpoint_every=1")] + ["checkpoint_every=100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"refswitch train {tmp_path / 'run'}/config.yaml --resume" in errors
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step-{read_metrics(metrics)[-1]['step']}"
    result = RUNNER.invoke(app, ["train", str(tmp_path / "run" / "config.yaml"), f"steps={int(saved.name[5:]) + 1}", "--resume", "-q"])
    assert result.exit_code == 0, result.output


REFUSED = {
    "steps=0": "steps=0: should be at least 1",
    "stepz=5": "unknown key stepz; did you mean steps?",
    "model.expert=4": "unknown key model.expert; did you mean model.experts?",
    "model=3": "model is a group of keys",
    "model.base=nothing": "unknown model nothing",
    "backend=gpu": "unknown backend 'gpu'",
    "precision=float31": "unknown precision 'float31'; did you mean float32?",
    "optimizer.name=sgd": "optimizer.name has no value 'sgd'",
    "microbatches=3": "microbatches=3: should divide data.batch=4",
    "optimizer.schedule=linear optimizer.warm_up=9 steps=4": "should be below steps=4",
    "layout=data=2": "one process trains as",
    "data.sources=[/nowhere]": "/nowhere",
    "data.vocabulary=missing.json": "missing.json",
    "model.vocabulary=128": "model.vocabulary=128: data.vocabulary=bytes has 384 ids; say model.vocabulary=384",
    "model.dialect=mesh": "unknown dialect 'mesh'",
    "model.dialect=vmoe_top1": "not drawn by the engine",
    "threads=-1": "threads=-1: should be at least 0",
    "eval_every": "'eval_every': should be key=value",
}


@pytest.mark.parametrize("words", REFUSED)
def test_train__refuses(words: str, text: Path, tmp_path: Path) -> None:
    """Bad input: one line that says what is wrong, status 2, and no run is begun that would bar the right one."""
    status, printed = run(text, tmp_path / "run", "steps=1", *words.split())
    (line,) = [line for line in printed.splitlines() if line.startswith("refswitch: ")]
    assert status == 2
    assert REFUSED[words] in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_train__refuses_a_corpus_that_is_empty_or_no_text(tmp_path: Path) -> None:
    """An empty folder, an empty file, bytes that are no UTF-8."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    for name in ("empty", "blank", "latin", "absent"):
        status, printed = run(tmp_path / name, tmp_path / "run", "steps=1", "-q")
        assert status == 2
        assert printed.startswith("refswitch: ")
        assert printed.count("\n") == 1
        assert name in printed or "data" in printed


def test_train__does_not_write_over_a_run(text: Path, tmp_path: Path) -> None:
    """A folder with a run is neither begun anew nor resumed under another configuration, and stays as it was."""
    assert run(text, tmp_path / "run", "steps=2", "-q")[0] == 0
    before = digest(tmp_path / "run", 2)
    status, printed = run(text, tmp_path / "run", "steps=3", "-q")
    assert status == 2
    assert "holds a run already (step 2); --resume goes on with it" in printed
    status, printed = run(text, tmp_path / "run", "steps=3", "seed=1", "-q", "--resume")
    assert status == 2
    assert "seed is 0 there and 1 here" in printed
    assert digest(tmp_path / "run", 2) == before
    status, printed = run(text, tmp_path / "other", "-q", "--resume")
    assert status == 2
    assert "holds no run to resume" in printed
    assert run(text, tmp_path / "run", "steps=3", "-q", "--resume")[0] == 0


def test_checkpoint__refuses_another_architecture_version_or_corpus(text: Path, tmp_path: Path) -> None:
    """Each in one line, with the checkpoint named."""
    assert run(text, tmp_path / "run", "steps=2", "-q")[0] == 0
    place = tmp_path / "run" / "checkpoints" / "step-2"
    config = config_of(tmp_path / "run")
    backend = backend_of("reference")
    other = load_config(str(tmp_path / "run" / "config.yaml"), ["model.d_ff=48"])
    with pytest.raises(InputError, match="holds another architecture"):
        load_checkpoint(place, setup_of(other), hash_of(config), "x", backend)
    with pytest.raises(InputError, match="was trained under configuration"):
        load_checkpoint(place, setup_of(config), "x", "x", backend)
    with pytest.raises(InputError, match="was trained on corpus"):
        load_checkpoint(place, setup_of(config), hash_of(config), "x", backend)
    record = yaml.safe_load((place / "training.yaml").read_text())
    for key, value, message in (("version", 2, "is of version 2"), ("format", "x", "should say format"), ("digests", 1, "has no step or no digests")):
        (place / "training.yaml").write_text(yaml.safe_dump(record | {key: value}))
        status, printed = run(text, tmp_path / "run", "steps=3", "-q", "--resume")
        assert status == 2
        assert message in printed
    (place / "training.yaml").write_text(yaml.safe_dump(record))
    (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:-4])
    status, printed = run(text, tmp_path / "run", "steps=3", "-q", "--resume")
    assert status == 2
    assert "model.safetensors: is missing or changed since it was written" in printed


def test_run_folder__is_for_one_process(text: Path, tmp_path: Path) -> None:
    """A second run in the same folder is refused while the first one lasts."""
    with opened(tmp_path / "run"):
        status, printed = run(text, tmp_path / "run", "steps=1", "-q")
    assert status == 2
    assert "another process trains in it" in printed


def test_run_folder__forgets_what_a_killed_process_left(tmp_path: Path) -> None:
    """A checkpoint that was cut short goes; everything else stays."""
    for name in (".step-3.4711", "step-2", "notes"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    with opened(tmp_path / "run") as folder:
        assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["notes", "step-2"]
        assert folder.steps() == [2]


def test_metrics__are_cut_back_and_a_torn_line_does_not_count(tmp_path: Path) -> None:
    """A line that a kill tore is dropped, one that is broken in the middle is an error."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3]
    assert [entry["step"] for entry in rewind_metrics(path, 2)] == [1, 2]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)


def _limited(size: int) -> Any:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("size", [200, 60_000])
def test_train__full_disk_is_one_line_and_loses_nothing(size: int, text: Path, tmp_path: Path) -> None:
    """A file that may not grow: no traceback, and what was complete before stays and goes on."""
    assert subprocess.run(command(tmp_path / "run", text, 2), check=True).returncode == 0
    before = digest(tmp_path / "run", 2)
    result = subprocess.run(command(tmp_path / "run", text, 5, "--resume"), capture_output=True, text=True, preexec_fn=_limited(size))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("refswitch: ")], result.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir()
    subprocess.run(command(tmp_path / "run", text, 2, "--resume"), check=True)
    assert digest(tmp_path / "run", 2) == before


def test_train__read_only_folder_is_one_line(text: Path, tmp_path: Path) -> None:
    """A folder below a file cannot be made, by root neither."""
    (tmp_path / "file").write_text("")
    status, printed = run(text, tmp_path / "file" / "run", "steps=1", "-q")
    assert status == 2
    assert "cannot be written" in printed
    assert "Traceback" not in printed


def test_train__stops_at_a_loss_that_is_no_number(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation that began it is named, the batch and the state before it are kept, status 2."""
    from refswitch.backends import reference

    norm = reference.norm_forward

    def broken(x_BLD: Any, *rest: Any) -> Any:
        y_BLD, saved = norm(x_BLD, *rest)
        return (y_BLD * np.nan if broken.calls > 12 else y_BLD), saved  # type: ignore[attr-defined]

    broken.calls = 0  # type: ignore[attr-defined]

    def counted(*arguments: Any) -> Any:
        broken.calls += 1  # type: ignore[attr-defined]
        return broken(*arguments)

    monkeypatch.setattr(reference, "norm_forward", counted)
    status, printed = run(text, tmp_path / "run", "steps=9", "eval_every=100", "-q")
    assert status == 2
    (line,) = printed.splitlines()
    assert "the objective is nan" in line
    assert "norm_forward" in line
    (kept,) = (tmp_path / "run" / "non_finite").iterdir()
    batch = safetensors.numpy.load_file(kept / "batch.safetensors")
    assert batch["targets_BL"].shape[0] == 4
    assert (tmp_path / "run" / "checkpoints" / kept.name).is_dir()


def test_watching__passes_everything_on() -> None:
    """What is finite goes through; what a backend keeps is its own business."""
    watching: Any = Watching(backend_of("reference"))
    assert watching.name == "reference"
    assert watching.squared_norm(np.array([3.0])) == 9.0


@pytest.mark.parametrize("name", PRESETS)
def test_presets__are_complete_and_read_back(name: str, tmp_path: Path) -> None:
    """A preset is a whole configuration, and its file says the same."""
    config = load_config(name)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config
    assert config.run_dir == f"runs/{name}"


def test_hash__changes_with_everything_that_changes_numbers(tmp_path: Path) -> None:
    """Each key but the free ones is in it."""
    config = load_config("tiny")
    assert hash_of(load_config("tiny", ["steps=7", "run_dir=elsewhere", "keep=0"])) == hash_of(config)
    for change in ("seed=1", "model.experts=4", "data.batch=32", "optimizer.rate=0.5", "loss.label_smoothing=0.1", "precision=float64", "init=hf"):
        assert hash_of(load_config("tiny", [change])) != hash_of(config), change
    linear = ["optimizer.schedule=linear", "optimizer.warm_up=5"]
    assert hash_of(load_config("tiny", [*linear, "steps=70"])) != hash_of(load_config("tiny", [*linear, "steps=71"]))
    assert set(FREE) <= set(as_tree(config))


def test_config__base_and_nesting(tmp_path: Path) -> None:
    """A file lies over its base; `model.base` begins from that preset; a file that is its own base is refused."""
    path = tmp_path / "mine.yaml"
    path.write_text("base: tiny\nsteps: 5\nmodel: {base: byte_tiny, experts: 4}\noptimizer.rate: 0.5\n")
    config = load_config(str(path), ["model.d_ff=128"])
    assert (config.name, config.steps, config.model.experts, config.model.d_model, config.model.d_ff) == ("mine", 5, 4, 32, 128)
    assert config.optimizer.rate == 0.5
    path.write_text(f"base: {path}\n")
    with pytest.raises(InputError, match="is its own base"):
        load_config(str(path))
    path.write_text("- 1\n")
    with pytest.raises(InputError, match="should be a mapping"):
        load_config(str(path))
    path.write_text("format: something\n")
    with pytest.raises(InputError, match="should be of format"):
        load_config(str(path))
    with pytest.raises(InputError, match="did you mean tiny"):
        load_config("tyny")


def test_learning_rate__follows_the_schedule() -> None:
    """The paper's plateau, a constant with a warm-up, a line to zero."""
    config = load_config("tiny").optimizer
    assert learning_rate(0, config, 100) == 0.01
    assert learning_rate(40_000, config, 100_000) == 0.005
    constant = load_config("tiny", ["optimizer.schedule=constant", "optimizer.rate=0.001", "optimizer.warm_up=10"]).optimizer
    assert [learning_rate(step, constant, 100) for step in (0, 5, 10, 99)] == [0.0, 0.0005, 0.001, 0.001]
    falling = load_config("tiny", ["optimizer.schedule=linear", "optimizer.rate=1.0", "optimizer.warm_up=0", "steps=4"]).optimizer
    assert [learning_rate(step, falling, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
