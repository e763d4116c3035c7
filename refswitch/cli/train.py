# May import: standard library, rich, refswitch.cli (below), refswitch.training, refswitch.errors.
"""`refswitch train`: trains what a preset or a file says, and tells how it goes."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from refswitch.training.config import TrainConfig, as_tree, hash_of, load_config
from refswitch.training.derived import distill_config, finetune_config
from refswitch.training.loop import Facts, Outcome, train

LINE_EVERY = 10.0  # seconds, where the output is no terminal


class Door(NamedTuple):
    """The command line as parsed; `source` is the run to fine-tune, or the teacher."""

    config: str
    assignments: list[str]
    source: str
    resume: bool
    quiet: bool
    verbose: bool


class Display:
    """The user's view of a run: a progress bar in a terminal, a line now and then elsewhere."""

    def __init__(self, door: Door, steps: int) -> None:
        self.door, self.steps = door, steps
        self.console = Console(highlight=False, soft_wrap=True)
        self.is_live = self.console.is_terminal and not door.quiet
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn(),
            console=self.console, transient=True, disable=not self.is_live,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.stop = False
        self.last_line = self.last_step = time.monotonic()
        self.rate = 0.0

    def say(self, text: str) -> None:
        """Print a line, unless the user wants silence."""
        if not self.door.quiet:
            self.console.print(text)

    def reading(self, done: int, total: int) -> None:
        """Show that the corpus is being read."""
        if self.is_live:
            if self.task is None:
                self.task = self.progress.add_task("reading the text", total=total, told="")
            self.progress.update(self.task, completed=done)

    def started(self, facts: Facts) -> None:
        """Say what is about to be trained."""
        if self.task is not None:
            self.progress.remove_task(self.task)
        config = facts.config
        self.say(
            f"{escape(config.model.name)}: {facts.parameters:,} parameters, {config.model.experts} experts; backend {config.backend}, "
            f"precision {config.precision}; text {facts.material}; run {escape(str(facts.run_dir))}"
        )
        self.say(f"to beat: {facts.unigram_entropy:.4f} nats per target token, the unigram entropy of the held-out targets")
        if facts.start:
            self.say(f"going on from step {facts.start}")
        self.task = self.progress.add_task("training", total=self.steps, completed=facts.start, told="")
        self.last_step = time.monotonic()

    def stepped(self, entry: dict[str, Any]) -> None:
        """Show a step."""
        now = time.monotonic()
        speed = entry["tokens"] / max(now - self.last_step, 1e-9)
        self.rate = speed if self.rate == 0.0 else 0.9 * self.rate + 0.1 * speed
        self.last_step = now
        told = (
            f"loss {entry['cross_entropy']:.4f}  {self.rate:,.0f} tokens/s  dropped {entry['drop_rate']:.1%}  "
            f"fullest expert {entry['largest_load']:.2f} of an even share"
        )
        assert self.task is not None, "started comes before stepped"
        self.progress.update(self.task, completed=entry["step"], told=told)
        if "eval" in entry:
            told = ", ".join(f"{name} {value:.4f}" for name, value in entry["eval"].items() if isinstance(value, float))
            self.say(f"step {entry['step']}: held out: {told}")
        if not self.is_live and now - self.last_line >= LINE_EVERY:
            self.last_line = now
            self.say(f"step {entry['step']} of {self.steps}: {told}")

    def saved(self, place: Path) -> None:
        """Say where a checkpoint is."""
        if self.door.verbose:
            self.say(f"saved {escape(str(place))}")

    def wants_to_stop(self) -> bool:
        """Whether Ctrl-C was pressed, or the process was asked to end."""
        return self.stop

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Let the first Ctrl-C end the run after its step, and the second one at once."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            print("\nending after this step; once more to end at once", file=sys.stderr)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _tell(display: Display, outcome: Outcome, run_dir: str) -> None:
    if outcome.interrupted:
        print(f"stopped at step {outcome.step} and saved; go on with: refswitch train {run_dir}/config.yaml --resume", file=sys.stderr)
        return
    if outcome.held_out_loss is not None:
        gain = outcome.unigram_entropy - outcome.held_out_loss
        side = "below" if gain >= 0.0 else "above"
        told = f"held-out loss {outcome.held_out_loss:.4f} nats per target token, {abs(gain):.4f} {side} the unigram entropy"
        display.say(f"{told} {outcome.unigram_entropy:.4f}")
    if outcome.best is not None:
        display.say(f"best checkpoint: step {outcome.best.step}, {outcome.best.metric} {outcome.best.value:.4f}")
    display.say(f"pictures: {escape(str(outcome.page))}; try: refswitch generate {escape(run_dir)}")


def run_train(door: Door) -> int:
    """Train what the command line says; return the exit status."""
    return _run(door, load_config(door.config, door.assignments))


def run_finetune(door: Door) -> int:
    """Fine-tune what the command line says; return the exit status."""
    return _run(door, finetune_config(door.source, door.config, door.assignments))


def run_distill(door: Door) -> int:
    """Distill what the command line says; return the exit status."""
    return _run(door, distill_config(door.source, door.config, door.assignments))


def _run(door: Door, config: TrainConfig) -> int:
    """Train; whatever is wrong is an InputError of one line.

    Raises
    ------
    InputError
        In one line, whatever is wrong.
    """
    display = Display(door, config.steps)
    if not door.quiet:
        shown = yaml.safe_dump(as_tree(config), sort_keys=False, default_flow_style=True, width=10**6).strip()
        display.console.print(f"configuration {hash_of(config)}: {escape(shown)}")
    with display.signals(), display.progress:
        outcome = train(config, display, door.resume)
    _tell(display, outcome, config.run_dir)
    return 130 if outcome.interrupted else 0
