# May import: standard library, numpy, rich, refswitch.cli (below), refswitch.tracing, refswitch.checkpoints, refswitch.errors.
"""`refswitch trace`: runs a text through a model and shows where its tokens went."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refswitch.checkpoints.models import read_model, resolve_folder
from refswitch.cli.files import check_writable, write_text
from refswitch.errors import InputError
from refswitch.model_config import PRESETS, ModelConfig, preset
from refswitch.model_init import initial_params
from refswitch.model_setup import dialect_of
from refswitch.reference.transformer import ModelParams
from refswitch.spec_data import load_index
from refswitch.tracing import LayerTrace, Tokens, tokens_of, trace_text

ROWS_SHOWN = 60


class Door(NamedTuple):
    """The command line as parsed."""

    text: str | None
    model: str
    seed: int
    length: int
    png: Path | None
    html: Path | None
    wants_index: bool


def _print_index(console: Console) -> None:
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for column in ("place", "what it says", "clauses", "computed by"):
        table.add_column(column, overflow="fold")
    for place, entry in load_index().items():
        code = ", ".join(entry["code"]) or f"[dim]{escape(entry['note'])}[/]"
        table.add_row(place, escape(entry["says"]), ", ".join(entry["clauses"]), code)
    console.print(table)


def _model(door: Door) -> tuple[ModelConfig, ModelParams, Path | None, str]:
    """Return the model, the folder it is from, and what to say of its weights."""
    if door.model in PRESETS:
        config = preset(door.model)
        return config, initial_params(config, door.seed, "mesh"), None, f"random weights, seed {door.seed}"
    folder = resolve_folder(door.model)
    config, params = read_model(str(folder))
    return config, params, folder, "its own weights"


def _text_of(given: str) -> str:
    path = Path(given)
    try:
        is_file = len(given) < 1024 and path.is_file()
    except OSError:
        is_file = False
    if not is_file:
        return given
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: byte {error.start}") from None


def _name(layer: LayerTrace) -> str:
    return f"{layer.stack[:3]} {layer.block}"


def _print_tokens(console: Console, tokens: Tokens, layers: list[LayerTrace]) -> None:
    table = Table(
        box=None,
        padding=(0, 1),
        header_style="bold",
        title="expert and gate of each token; × has no slot; in the decoder a row reads the token before",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("token")
    for layer in layers:
        table.add_column(_name(layer), justify="right")
    for t, shown in enumerate(tokens.shown[:ROWS_SHOWN]):
        cells = []
        for layer in layers:
            text = f"{layer.expert_L[t]:>3} {layer.gate_L[t]:.2f}"
            cells.append(text if layer.kept_L[t] else f"[red]×{text}[/]")
        table.add_row(str(t), escape(shown), *cells)
    console.print(table)
    if len(tokens.shown) > ROWS_SHOWN:
        console.print(f"[dim]... {len(tokens.shown) - ROWS_SHOWN} more tokens: --html shows all[/]")


def _print_layers(console: Console, layers: list[LayerTrace]) -> None:
    table = Table(box=None, padding=(0, 1), header_style="bold", title="each sparse layer", title_justify="left")
    for column in ("layer", "slots", "dropped", "mean gate", "entropy", "of log E", "balance", "tokens per expert"):
        table.add_column(column, justify="left" if column in ("layer", "tokens per expert") else "right", no_wrap=True)
    for layer in layers:
        L, E = layer.probs_LE.shape
        entropy = float(layer.entropy_L.mean())
        share = f"{entropy / math.log(E):.0%}" if E > 1 else "-"
        slots = f"{layer.capacity}" + (f" x {layer.groups}" if layer.groups > 1 else "")
        row = f"{layer.dropped / L:.1%}", f"{layer.gate_L.mean():.3f}", f"{entropy:.3f}", share, f"{layer.balance:.3f}"
        table.add_row(_name(layer), slots, *row, " ".join(map(str, layer.load_E)))
    console.print(table)


def run_trace(door: Door) -> int:
    """Trace what the command line names; return the exit status.

    Raises
    ------
    InputError
        In one line, whatever is wrong with the text, the model or a file to write.
    """
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    if door.wants_index:
        _print_index(console)
        return 0
    if door.text is None:
        raise InputError("name a text or a file, or ask for --index")
    for option, path in (("--png", door.png), ("--html", door.html)):
        if path is not None:
            check_writable(path, option)
    config, params, folder, weights = _model(door)
    tokens = tokens_of(_text_of(door.text), folder, config.vocabulary)
    total = len(tokens.shown)
    tokens = Tokens(tokens.number_L[: door.length], tokens.shown[: door.length])
    layers = trace_text(tokens, config, params)
    more = f" of {total} (--length)" if total > len(tokens.shown) else ""
    console.print(f"{escape(config.name)}, {weights}, dialect {escape(config.dialect)}: {len(tokens.shown)} tokens{more}")
    _print_tokens(console, tokens, layers)
    _print_layers(console, layers)
    title = f"{config.name}, {weights}"
    if door.png is not None:
        from refswitch.cli.trace_png import draw

        draw(tokens, layers, title, door.png)
    if door.html is not None:
        from refswitch.cli.trace_page import page

        write_text(page(tokens, layers, title, config, dialect_of(config).drop.output), door.html, "--html")
    return 0
