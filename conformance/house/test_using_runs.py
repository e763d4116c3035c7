# May import: standard library, numpy, pytest, yaml, typer, refswitch, its own folder.
"""What becomes of a run: evaluation, answers, fine-tuning on tasks, distillation into a student, export to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from conformance.house.kill_and_resume import SMALL, write_text
from refswitch.backends import reference
from refswitch.checkpoints.models import read_model
from refswitch.cli.main import app
from refswitch.engine.optimizer import Optimizer
from refswitch.engine.step import Setup, initial_state, logits_of, loss_and_gradients
from refswitch.errors import InputError
from refswitch.model_config import preset
from refswitch.model_init import initial_params
from refswitch.precision import precision
from refswitch.reference.transformer import Batch
from refswitch.training.config import load_config
from refswitch.training.derived import distill_config, finetune_config
from refswitch.training.loop import first_params
from refswitch.training.run_folder import Best, RunFolder, read_metrics
from refswitch.training.runs import filled_in, open_run, params_of, place_of, prompt_ids
from refswitch.training.scores import scores_of
from refswitch.tree import leaves

RUNNER = CliRunner()
WORDS = ("cat", "dog", "sun", "sea", "tree", "book")


def command(*words: Any) -> tuple[int, str]:
    """Return the status of a command and all that it prints."""
    result = RUNNER.invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, in the dialect that transformers computes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").mkdir()
    text = write_text(folder / "text")
    keys = (*SMALL, "precision=float64", "model.dropout=0.0", "model.expert_dropout=0.0", "model.dialect=hf_ge_5_18", f"data.sources=[{text}]")
    status, printed = command("train", "tiny", *keys, "data.held_out=0.2", "steps=3", "checkpoint_every=1", f"run_dir={folder / 'run'}", "-q")
    assert status == 0, printed
    return folder / "run"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small tasks and their configuration."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, words in (("train", WORDS * 3), ("dev", WORDS)):
        lines = [json.dumps({"inputs": word, "targets": word[0]}) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "last.tsv").write_text("word\tletter\n" + "".join(f"{word}\t{word[-1]}\n" for word in WORDS), encoding="utf-8")
    first = {"name": "first", "train": [str(folder / "train.jsonl")], "validation": [str(folder / "dev.jsonl")], "prefix": "first: "}
    last = {"name": "last", "train": [str(folder / "last.tsv")], "validation": [str(folder / "last.tsv")], "inputs": "word", "targets": "letter"}
    shape = {"tasks.inputs_length": 16, "tasks.targets_length": 4, "tasks.batch": 4}
    (folder / "letters.yaml").write_text(yaml.safe_dump({"tasks": [first, last], "steps": 4, "eval_every": 2, "eval_batches": 9, **shape}))
    return folder / "letters.yaml"


def test_eval__measures_what_the_run_measured(trained: Path, tmp_path: Path) -> None:
    """The loss that `eval` finds is that of the run's own line of metrics, and its report is JSON."""
    status, printed = command("eval", trained, "--json", tmp_path / "told.json")
    assert status == 0, printed
    told = json.loads((tmp_path / "told.json").read_text())
    entry = next(entry for entry in read_metrics(trained / "metrics.jsonl") if entry["step"] == told["step"])
    assert {name: told[name] for name in entry["eval"]} == entry["eval"]
    assert f"{told['loss']:.4f}" in printed
    status, printed = command("eval", trained, "--step", 77)
    assert status == 2
    assert "has no checkpoint of step 77; it has 1, 2, 3" in printed


def test_generate__answers(trained: Path) -> None:
    """A prompt with places to fill, held-out text without one; draws are by the seed alone; bad prompts are one line."""
    status, printed = command("generate", trained, "the <extra_id_0> gate", "--length", 5)
    assert status == 0, printed
    assert "prompt  the <extra_id_0> gate" in printed
    drawn = [command("generate", trained, "the gate", "--length", 12, "--temperature", 1.5, "--seed", seed, "-q") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert command("generate", trained, "--length", 3)[0] == 0
    for prompt, message in (("<extra_id_999>", "125 sentinels"), (" ", "the prompt is empty")):
        status, printed = command("generate", trained, prompt)
        assert status == 2
        assert message in printed
    status, printed = command("generate", trained.parent)
    assert status == 2
    assert "is no run's folder" in printed


def test_prompt__places_are_filled() -> None:
    """Each sentinel takes what stands behind it in the answer; one that is not answered stays."""
    assert filled_in("a <extra_id_0> b <extra_id_1> c", "<extra_id_0>x y<extra_id_1>z") == "a x y b z c"
    assert filled_in("a <extra_id_0> b <extra_id_1>", "<extra_id_1>z") == "a <extra_id_0> b z"
    vocabulary = load_vocabulary()
    assert prompt_ids("a<extra_id_1>b", vocabulary).tolist() == [ord("a") + 3, 382, ord("b") + 3, 1]


def load_vocabulary() -> Any:
    from refswitch.data import open_vocabulary

    return open_vocabulary("bytes")


def test_place_of__takes_the_best_then_the_last(trained: Path, tmp_path: Path) -> None:
    """Without a step the best checkpoint, without a best one the last."""
    folder = RunFolder(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        place_of(str(tmp_path))
    for step in (2, 5, 11):
        folder.checkpoint(step).mkdir(parents=True)
    assert place_of(str(tmp_path))[1] == 11
    folder.keep_best(Best(5, "loss", 1.0))
    assert place_of(str(tmp_path))[1] == 5
    assert place_of(str(folder.checkpoint(2)))[1] == 2
    (tmp_path / "best.yaml").write_text("step: 5\n")
    with pytest.raises(InputError, match="names no checkpoint"):
        place_of(str(tmp_path))


def test_finetune__keeps_the_best_and_resumes(trained: Path, tasks: Path, tmp_path: Path) -> None:
    """The recipe's dropout over the run's model, every task scored, the best kept; the run is one like any other."""
    status, printed = command("finetune", trained, tasks, f"run_dir={tmp_path / 'tuned'}", "keep=1", "-q")
    assert status == 0, printed
    config = load_config(str(tmp_path / "tuned" / "config.yaml"))
    assert (config.model.dropout, config.model.expert_dropout, config.optimizer.schedule, config.start) == (0.1, 0.4, "constant", str(trained))
    told = [entry["eval"] for entry in read_metrics(tmp_path / "tuned" / "metrics.jsonl") if "eval" in entry]
    assert len(told) == 2
    assert set(told[0]["tasks"]) == {"first", "last"}
    assert told[0]["exact_match"] == np.mean([task["exact_match"] for task in told[0]["tasks"].values()])
    status, printed = command("eval", tmp_path / "tuned")
    assert status == 0, printed
    assert "first: loss" in printed
    status, printed = command("train", tmp_path / "tuned" / "config.yaml", "steps=5", "--resume", "-q")
    assert status == 0, printed
    assert RunFolder(tmp_path / "tuned").best() is not None


def test_finetune__begins_with_the_run(trained: Path, tasks: Path) -> None:
    """The first parameters are the checkpoint's, bit for bit; another architecture is refused."""
    config = finetune_config(str(trained), str(tasks), [])
    begun, own = leaves(first_params(config)), leaves(open_run(str(trained)).params)
    assert all(np.array_equal(begun[path], own[path]) for path in own)
    with pytest.raises(InputError, match="holds another architecture"):
        first_params(finetune_config(str(trained), str(tasks), ["model.d_ff=64"]))


REFUSED_TASKS = {
    "steps: 3\n": "should say `tasks: ",
    "base: tiny\ntasks: []\n": "its base is the run",
    "tasks: []\n": "should be at least one",
    "tasks: [{name: a, train: [x.jsonl], validation: [x.jsonl], rows: 3}]\n": "unknown key tasks.tasks.0.rows",
    "tasks: [{name: a, train: [x.jsonl], validation: [x.jsonl]}]\n": "x.jsonl",
}


@pytest.mark.parametrize("content", REFUSED_TASKS)
def test_finetune__refuses(content: str, trained: Path, tmp_path: Path) -> None:
    """One line each, status 2, no run left behind."""
    (tmp_path / "tasks.yaml").write_text(content)
    status, printed = command("finetune", trained, tmp_path / "tasks.yaml", f"run_dir={tmp_path / 'tuned'}", "-q")
    assert status == 2
    assert printed.count("\n") == 1
    assert REFUSED_TASKS[content] in printed
    assert not (tmp_path / "tuned" / "config.yaml").exists()


def test_scores__by_hand() -> None:
    """Three of four answers are the target; by label 2/3 + 1 + 0 over the three labels; ROUGE-2 by bigrams."""
    told = scores_of(["a", "a", "b ", "a"], ["a", "c", "b", "a"])
    assert told["exact_match"] == 0.75
    assert told["f1"] == np.mean([2 * (2 / 3) * 1 / (2 / 3 + 1), 1.0, 0.0])
    told = scores_of(["the sea is blue"], ["the sea was blue"])
    assert told["rouge2"] == 1 / 3  # one of three bigrams each way


def test_distill__student_learns_from_both(trained: Path, tmp_path: Path) -> None:
    """A dense student begins with the teacher's weights outside the sparse layers and reads its text; other vocabularies are refused."""
    dense = ("model.experts=0", "model.encoder_sparse=[]", "model.decoder_sparse=[]")
    keys = (*SMALL, "precision=float64", *dense, "steps=2")
    status, printed = command("distill", trained, "tiny", *keys, f"run_dir={tmp_path / 'student'}", "-q")
    assert status == 0, printed
    config = load_config(str(tmp_path / "student" / "config.yaml"))
    assert config.distill is not None
    assert (config.distill.soft_share, config.distill.temperature) == (0.25, 1.0)
    assert config.data.sources == load_config(str(trained / "config.yaml")).data.sources
    begun, teacher = first_params(distill_config(str(trained), "tiny", list(keys))), params_of(str(trained))
    assert np.array_equal(begun.embedding_VD, teacher.embedding_VD)
    assert np.array_equal(begun.decoder.blocks[1].self_attention.attention.w_key_DHK, teacher.decoder.blocks[1].self_attention.attention.w_key_DHK)
    status, printed = command(
        "distill", trained, "tiny", *keys, "model.vocabulary=512", "distill.from_teacher=false", f"run_dir={tmp_path / 's'}", "-q"
    )
    assert status == 2
    assert "reads another vocabulary" in printed


def small_batch() -> tuple[Setup, Any, Batch]:
    config = preset("tiny_dense")
    setup = Setup(config, precision("float64"), Optimizer("adafactor"), 0, soft_share=0.5)
    rng = np.random.default_rng(0)
    encoder, targets = rng.integers(1, 32, (4, 7)), rng.integers(1, 32, (4, 5))
    marks = np.ones_like(encoder), np.ones(encoder.shape, bool), np.arange(7), targets, np.ones_like(targets), np.ones(targets.shape, bool)
    batch = Batch(encoder, *marks[:3], *marks[3:], np.arange(5), targets, np.ones(targets.shape))
    return setup, initial_params(config, 0, "mesh"), batch


def test_soft_loss__its_gradient_vanishes_where_the_teacher_is_the_student() -> None:
    """With equal logits the soft part pulls nowhere: half the hard gradient is left, to the bit; with others it does not vanish."""
    setup, params, batch = small_batch()
    state = initial_state(params, setup, reference)
    logits_BLV = logits_of(state.params, batch, setup, 0, reference)
    _, hard, _ = loss_and_gradients(state.params, batch, setup, 0, reference)
    _, both, _ = loss_and_gradients(state.params, batch, setup, 0, reference, teacher_BLV=logits_BLV)
    halves, found = leaves(hard), leaves(both)
    assert all(np.array_equal(0.5 * halves[path], found[path]) for path in halves)
    _, other, _ = loss_and_gradients(state.params, batch, setup, 0, reference, teacher_BLV=logits_BLV[::-1])
    assert not np.array_equal(leaves(other)["embedding_VD"], found["embedding_VD"])


def test_soft_loss__microbatches_take_their_rows_of_the_teacher() -> None:
    """Two microbatches are the whole batch: the losses differ by no more than the order of so many additions can move them."""
    setup, params, batch = small_batch()
    state = initial_state(params, setup, reference)
    teacher_BLV = np.random.default_rng(1).normal(size=(4, 5, 32)) * 3.0
    whole, _, _ = loss_and_gradients(state.params, batch, setup, 0, reference, teacher_BLV=teacher_BLV)
    parts, _, _ = loss_and_gradients(state.params, batch, setup._replace(microbatches=2), 0, reference, teacher_BLV=teacher_BLV)
    swapped, _, _ = loss_and_gradients(state.params, batch, setup._replace(microbatches=2), 0, reference, teacher_BLV=teacher_BLV[[2, 3, 0, 1]])
    slack = 2 * batch.targets_BL.size * np.finfo(np.float64).eps * whole.cross_entropy
    assert abs(parts.cross_entropy - whole.cross_entropy) <= slack < abs(swapped.cross_entropy - whole.cross_entropy)


def test_export__transformers_loads_it_with_matching_logits(trained: Path, tmp_path: Path) -> None:
    """`convert` of a checkpoint, loaded by transformers, judged stage by stage; and the logits of both, end to end."""
    pytest.importorskip("transformers", minversion="5.18.0")
    status, printed = command("convert", trained / "checkpoints" / "step-3", tmp_path / "hf", "--storage", "float32")
    assert status == 0, printed
    status, printed = command("compare-model", tmp_path / "hf")
    assert status == 0, printed
    assert "AGREES" in printed
    config, params = read_model(str(tmp_path / "hf"))
    own = leaves(params_of(str(trained / "checkpoints" / "step-3")))
    assert config.experts == 8
    assert all(np.array_equal(leaf, own[path].astype(np.float32)) for path, leaf in leaves(params).items())


def test_board__writes_events(trained: Path, tmp_path: Path) -> None:
    """`tensorboard=true` leaves a file of events."""
    pytest.importorskip("tensorboardX")
    text = load_config(str(trained / "config.yaml")).data.sources[0]
    keys = (*SMALL, f"data.sources=[{text}]", "data.held_out=0.2", "steps=2", "tensorboard=true", f"run_dir={tmp_path / 'run'}")
    status, printed = command("train", "tiny", *keys, "-q")
    assert status == 0, printed
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
