# May import: standard library, numpy, pytest, refswitch.
"""Fine-tuning tasks: pairs from files, rates, orders, truncation, and the same batches from any position."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refswitch.data import MixtureConfig, TaskConfig, open_mixture, open_pairs, open_vocabulary, read_pairs, tasks, validation_batches
from refswitch.data.tasks import shares_of
from refswitch.errors import InputError

VOCABULARY = open_vocabulary("bytes")
SIZES = {"a": 40, "b": 10, "c": 3}


def task(folder: Path, name: str, **changes: Any) -> TaskConfig:
    """Write a task whose examples say what they are, and return it: `a` as a table, the others as JSON lines."""
    rows = [(f"{name}{i} is the input", f"{name}{i}") for i in range(SIZES[name])]
    path = folder / (f"{name}.tsv" if name == "a" else f"{name}.jsonl")
    if name == "a":
        path.write_text("id\tinputs\ttargets\n" + "".join(f"{i}\t{one}\t{two}\n" for i, (one, two) in enumerate(rows)))
    else:
        path.write_text("".join(json.dumps({"inputs": one, "targets": two}) + "\n" for one, two in rows))
    return TaskConfig(
        **{
            "name": name,
            "train": (str(path),),
            "validation": (str(path),),
            "prefix": f"task {name}: ",
            "inputs": "inputs",
            "targets": "targets",
            **changes,
        }
    )


def mixture(folder: Path, names: str = "abc", **changes: Any) -> MixtureConfig:
    """Return a mixture of those tasks."""
    defaults: dict[str, Any] = {"limit": 0, "exponent": 1.0, "inputs_length": 40, "targets_length": 8, "pack": False, "batch": 6}
    return MixtureConfig(tasks=tuple(task(folder, name) for name in names), **{**defaults, **changes})


def drawn(config: MixtureConfig, batches: int, seed: int = 1) -> list[str]:
    """Return the targets' texts of some batches, in order, one for each example."""
    stream = open_mixture(config, VOCABULARY, seed)
    rows = np.concatenate([stream.batch(n).targets_BL.reshape(-1) for n in range(batches)])
    return [VOCABULARY.decode(part) for part in np.split(rows, np.flatnonzero(rows == 1) + 1) if VOCABULARY.decode(part)]


def test_pairs__are_read_from_tables_and_json_lines(tmp_path: Path) -> None:
    """The text with its prefix, in the files' order; columns by name."""
    for name in "ab":
        one = task(tmp_path, name)
        assert list(read_pairs(one, one.train)) == [(f"task {name}: {name}{i} is the input", f"{name}{i}") for i in range(SIZES[name])]


def test_mixture__every_example_of_a_task_before_any_comes_twice(tmp_path: Path) -> None:
    """In another order each epoch, mixed with the others'; inputs and targets belong together, and so do packed ones."""
    for pack in (False, True):
        config = mixture(tmp_path, pack=pack, inputs_length=80 if pack else 40, targets_length=20 if pack else 8)
        found = drawn(config, 60)
        for name, size in SIZES.items():
            mine = [text for text in found if text[0] == name]
            epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
            assert len(epochs) >= 2
            assert all(sorted(epoch) == sorted(f"{name}{i}" for i in range(size)) for epoch in epochs)
            assert name == "c" or epochs[0] != epochs[1]
        batch = open_mixture(config, VOCABULARY, 1).batch(3)
        for row in range(config.batch):
            for segment in range(1, int(batch.encoder_segment_BM[row].max()) + 1):
                inputs, targets = (
                    VOCABULARY.decode(tokens[row][segments[row] == segment])
                    for tokens, segments in ((batch.encoder_tokens_BM, batch.encoder_segment_BM), (batch.targets_BL, batch.decoder_segment_BL))
                )
                assert inputs == f"task {targets[0]}: {targets} is the input"


def test_mixture__starts_anywhere(tmp_path: Path) -> None:
    """Batch n by a fresh stream, by ranks, across windows of the draws."""
    for pack in (False, True):
        config = mixture(tmp_path, pack=pack, inputs_length=80 if pack else 40, targets_length=20 if pack else 8)
        in_order = open_mixture(config, VOCABULARY, 1)
        for n in range(0, 800, 57):
            whole, fresh = in_order.batch(n), open_mixture(config, VOCABULARY, 1)
            shares = [fresh.batch(n, rows) for rows in (range(2), range(2, 6))]
            assert np.array_equal(np.concatenate([share.targets_BL for share in shares]), whole.targets_BL)
            assert np.array_equal(np.concatenate([share.encoder_tokens_BM for share in shares]), whole.encoder_tokens_BM)
    assert drawn(config, 3, seed=2) != drawn(config, 3)


def test_shares__are_those_of_t5() -> None:
    """min(n, K) in proportion; mT5's exponent 0.3; all alike at 0."""
    assert shares_of([100, 50, 1], 50, 1.0).tolist() == [50 / 101, 50 / 101, 1 / 101]
    assert shares_of([7, 5], 0, 0.0).tolist() == [0.5, 0.5]
    share = shares_of([1024, 1], 0, 0.3)
    assert abs(share[0] / share[1] - 8.0) <= 4 * np.spacing(8.0)  # 1024 ** 0.3 = 2 ** 3: a power and two quotients


@pytest.mark.parametrize(("limit", "exponent"), [(0, 1.0), (10, 1.0), (0, 0.3), (0, 0.0)])
def test_mixture__draws_by_its_shares(tmp_path: Path, limit: int, exponent: float) -> None:
    """Of 6,000 draws, each task's count within five standard deviations of its share."""
    found = drawn(mixture(tmp_path, limit=limit, exponent=exponent, batch=600), 10)
    weights = [min(size, limit or size) ** exponent for size in SIZES.values()]
    for name, weight in zip(SIZES, weights, strict=True):
        share = Fraction(weight / sum(weights))
        count = sum(text[0] == name for text in found)
        assert (count - 6000 * share) ** 2 <= 25 * 6000 * share * (1 - share)


def test_mixture__long_texts_are_cut_and_end(tmp_path: Path) -> None:
    """The last token is an end-of-sequence whatever was cut; a text that fits to the token is whole."""
    config = mixture(tmp_path, "a", inputs_length=12, targets_length=3)
    batch = open_mixture(config, VOCABULARY, 1).batch(0)
    assert (batch.encoder_tokens_BM[:, -1] == 1).all()
    assert {VOCABULARY.decode(row) for row in batch.encoder_tokens_BM} == {
        "task a: a" + VOCABULARY.decode(row)[9:] for row in batch.encoder_tokens_BM
    }
    assert all(len(VOCABULARY.decode(row)) == 2 and (row == 1).sum() == 1 for row in batch.targets_BL)


def test_validation__is_every_example_once_in_order(tmp_path: Path) -> None:
    """The last batch's rest is padding without weight."""
    config = mixture(tmp_path, "b")
    pairs = open_pairs(config.tasks[0], config.tasks[0].validation, VOCABULARY)
    batches = list(validation_batches(pairs, VOCABULARY, config))
    assert [VOCABULARY.decode(row) for batch in batches for row in batch.targets_BL] == [f"b{i}" for i in range(10)] + [""] * 2
    assert batches[1].weight_BL.sum() == 4 * 3
    assert not batches[1].encoder_valid_BM[4:].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no example"),
        ("inputs\ttargets\n", "has no example"),
        ("text\tlabel\n1\t2\n", "line 1: has no column 'inputs'; it has text, label"),
        ("inputs\ttargets\n1\t2\n3\n", "line 3: has 1 columns, and the first line 2"),
    ],
)
def test_pairs__refuse_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    """Tables that are none; no file at all."""
    one = task(tmp_path, "a")
    Path(one.train[0]).write_text(content)
    with pytest.raises(InputError, match=message):
        open_pairs(one, one.train, VOCABULARY)
    with pytest.raises(InputError, match="no file is named"):
        open_pairs(one, (), VOCABULARY)
    with pytest.raises(InputError, match="different names"):
        mixture(tmp_path, "aa")


def test_mixture__planted_mistakes_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws with replacement; rates without the limit; an end that is cut off."""
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "shuffled", lambda position, size, seed, epoch, site: (position * 7 + epoch) % max(size - 1, 1))
        with pytest.raises(AssertionError):
            test_mixture__every_example_of_a_task_before_any_comes_twice(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "shares_of", lambda sizes, limit, exponent: shares_of(sizes, 0, exponent))
        with pytest.raises(AssertionError):
            test_mixture__draws_by_its_shares(tmp_path, 10, 1.0)
    with monkeypatch.context() as patch:
        true = tasks.texts
        patch.setattr(tasks, "texts", lambda tokens, item, longest, eos: true(tokens, item, longest, 5))
        with pytest.raises(AssertionError):
            test_mixture__long_texts_are_cut_and_end(tmp_path)
