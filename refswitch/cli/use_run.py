# May import: standard library, rich, refswitch.cli (below), refswitch.training, refswitch.engine, refswitch.errors.
"""`refswitch eval` and `refswitch generate`: what a trained run achieves on held-out text, and what it answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refswitch.cli.files import check_writable, write_json
from refswitch.engine.decoding import Picking
from refswitch.errors import InputError
from refswitch.training.runs import Answer, answers, held_out_prompts, material_of, open_run

PROMPTS_SHOWN = 3


class EvalDoor(NamedTuple):
    """The command line of `eval` as parsed."""

    run: str
    step: int | None
    batches: int | None
    json: Path | None
    quiet: bool


class GenerateDoor(NamedTuple):
    """The command line of `generate` as parsed."""

    run: str
    prompt: str | None
    step: int | None
    length: int
    temperature: float
    top_p: float
    seed: int
    quiet: bool


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def run_eval(door: EvalDoor) -> int:
    """Evaluate what the command line names; return the exit status.

    Raises
    ------
    InputError
        In one line, whatever is wrong with the run or its text.
    """
    if door.json is not None:
        check_writable(door.json)
    console = _console()
    with Console(stderr=True).status("evaluating"):
        run = open_run(door.run, door.step)
        material = material_of(run, door.batches or run.config.eval_batches)
        measured = material.measure(run.params, run.step)
    told = {"step": run.step, "text": material.digest, "unigram_entropy": material.unigram_entropy, **measured}
    if not door.quiet:
        console.print(f"{escape(door.run)}, step {run.step}: {escape(run.config.model.name)}, text {material.digest}")
        console.print(f"held-out loss {told['loss']:.4f} nats per target token; unigram entropy {told['unigram_entropy']:.4f}")
        for name, scores in told.get("tasks", {}).items():
            console.print(f"{escape(name)}: {', '.join(f'{metric} {value:.4f}' for metric, value in scores.items())}")
    if not door.quiet and "layers" in told:
        table = Table(box=None, padding=(0, 1), header_style="bold")
        for column in ("layer", "dropped", "gate", "entropy", "share of each expert"):
            table.add_column(column, justify="left" if column in ("layer", "share of each expert") else "right")
        for layer in told["layers"]:
            shares = " ".join(f"{share:.2f}" for share in layer["load"])
            table.add_row(layer["name"], f"{layer['drop_rate']:.1%}", f"{layer['gate']:.3f}", f"{layer['entropy']:.3f}", shares)
        console.print(table)
    if door.json is not None:
        write_json(told, door.json)
    return 0


def _tell(console: Console, answer: Answer) -> None:
    console.print(f"[dim]prompt[/]  {escape(answer.prompt)}")
    console.print(f"[dim]answer[/]  {escape(answer.answer)}")
    if answer.filled != answer.prompt:
        console.print(f"[dim]filled[/]  {escape(answer.filled)}")
    console.print()


def run_generate(door: GenerateDoor) -> int:
    """Answer what the command line asks; return the exit status.

    Raises
    ------
    InputError
        In one line, whatever is wrong with the run or the prompt.
    """
    if door.prompt is not None and not door.prompt.strip():
        raise InputError("the prompt is empty; leave it out to see held-out text")
    run = open_run(door.run, door.step)
    prompts = [door.prompt] if door.prompt is not None else held_out_prompts(run, PROMPTS_SHOWN)
    console = _console()
    if not door.quiet:
        how = "greedy" if door.temperature == 0.0 else f"temperature {door.temperature:g}, top-p {door.top_p:g}, seed {door.seed}"
        console.print(f"{escape(door.run)}, step {run.step}: {escape(run.config.model.name)}, {how}\n")
    for answer in answers(run, prompts, door.length, Picking(door.temperature, door.top_p), door.seed):
        if door.quiet:
            print(answer.answer)
        else:
            _tell(console, answer)
    return 0
