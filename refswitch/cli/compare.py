# May import: standard library, numpy, rich, refswitch.verify, refswitch.checkpoints, refswitch.errors.
"""`refswitch compare-model`: runs a Hugging Face folder in both, prints the first stage that differs."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refswitch.checkpoints.models import is_own, read_model, resolve_folder
from refswitch.cli.files import check_writable, write_json
from refswitch.errors import InputError
from refswitch.verify.compare_model import StageCheck, compare_trace, draw_inputs, end_to_end, run_peer

PROFILE = "float32"


class Door(NamedTuple):
    """The command line as parsed."""

    source: str
    rows: int
    length: int
    seed: int
    deadline: float
    json_file: Path | None
    quiet: bool
    verbose: bool


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _as_json(source: str, seed: int, checks: list[StageCheck], distance: float) -> dict[str, Any]:
    stages = [
        {name: _finite(value) if isinstance(value, float) else value for name, value in check._asdict().items()} | {"ok": check.ok}
        for check in checks
    ]
    first = next((check.name for check in checks if not check.ok), None)
    return {"model": source, "seed": seed, "profile": PROFILE, "first_difference": first, "end_to_end": _finite(distance), "stages": stages}


def _print_difference(console: Console, check: StageCheck, others: int) -> None:
    console.print(f"  [red]FIRST DIFFERENCE[/] at [bold]{escape(check.name)}[/] {escape(check.place)}")
    console.print(
        f"       it is {check.got:.8g}, should be {check.expected:.8g} ± {check.radius:.2g}  (|error|/radius up to {check.worst:.3g};"
        f" {check.failing} of {check.elements} elements)"
    )
    for says in check.explanations:
        console.print(f"       it is right if [cyan]{escape(says)}[/]")
    if not check.explanations:
        console.print("       no known difference explains it")
    if others:
        console.print(f"       {others} later stage{'s' * (others != 1)} differ{'s' * (others == 1)} too, each judged on its own previous stage (-v)")


def _print_stages(console: Console, checks: list[StageCheck]) -> None:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("stage", "elements", "outside", "worst |error|/radius", "explained by"):
        table.add_column(column)
    for check in checks:
        colour = "green" if check.ok else "red"
        table.add_row(
            f"[{colour}]{check.name}[/]", str(check.elements), str(check.failing), f"{check.worst:.3g}", escape("; ".join(check.explanations))
        )  # fmt: skip
    console.print(table)


def run_compare(door: Door) -> int:
    """Compare what the command line names; return the exit status.

    Raises
    ------
    InputError
        In one line, whatever is wrong with the folder, or with transformers.
    """
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        raise InputError("transformers and torch are needed: pip install 'refswitch[peers]'")
    if door.json_file is not None:
        check_writable(door.json_file)
    console, errors = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160), Console(stderr=True)
    with errors.status(f"reading {escape(door.source)}") as status:
        folder = resolve_folder(door.source)
        if is_own(folder):
            raise InputError(f"{folder} is in our own format: refswitch convert it first")
        config, params = read_model(str(folder))
        inputs = draw_inputs(config, door.rows, door.length, door.length - 2, door.seed)
        status.update(f"running {escape(config.name)} in transformers")
        trace = run_peer(folder, inputs, door.deadline)
        checks = []
        for check in compare_trace(trace, config, params, inputs, PROFILE):
            checks.append(check)
            status.update(f"judged {check.name}")
        status.update("running the reference from end to end")
        distance = end_to_end(trace, config, params, inputs)
    failing = [check for check in checks if not check.ok]
    layers = config.encoder_layers + config.decoder_layers
    verdict = "[red bold]DIFFERS[/]" if failing else "[green bold]AGREES[/]"
    worst = max((check.worst for check in checks if check.ok), default=0.0)
    console.print(
        f"{verdict}  {escape(door.source)}: {len(checks)} stages of {layers} blocks in {PROFILE}, {len(failing)} outside their radius"
        f" (the others up to {worst:.2g} of it)"
    )
    if not door.quiet:
        if failing:
            _print_difference(console, failing[0], len(failing) - 1)
        console.print(f"  [dim]end to end, normwise, the logits differ by {distance:.2g} from the reference in float64: reported, not judged[/]")
    if door.verbose:
        _print_stages(console, checks)
    if door.json_file is not None:
        write_json(_as_json(door.source, door.seed, checks, distance), door.json_file)
    return 1 if failing else 0
