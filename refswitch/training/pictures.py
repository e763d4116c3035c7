# May import: standard library, numpy, matplotlib (inside functions), refswitch.training (below), refswitch.errors.
"""What a run looked like: loss, load of the experts, drop rate, entropy of the gates, as PNG and on one page that needs no network."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refswitch.training.run_folder import RunFolder, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = {
    "loss": "Loss, nats per target token",
    "load": "Load: the share of an expert in its layer's claims, times the number of experts (1: balanced)",
    "drops": "Dropped: claims without a slot",
    "entropy": "Entropy of the router's probabilities, nats (dashed: log E)",
}
COLUMNS = 400  # of a picture of the load: more steps are averaged
PAGE = Path(__file__).with_name("page.html")


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over the last `window` values at each place, fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def _layer_series(entries: Sequence[dict[str, Any]], field: str) -> dict[str, np.ndarray]:
    """Return a field of every sparse layer over the steps."""
    names = [layer["name"] for layer in entries[0]["layers"]]
    return {name: np.array([entry["layers"][i][field] for entry in entries], np.float64) for i, name in enumerate(names)}


def _loss(figure: Figure, entries: Sequence[dict[str, Any]], unigram: float | None) -> None:
    axes = figure.subplots()
    steps, loss = np.array([entry["step"] for entry in entries]), np.array([entry["cross_entropy"] for entry in entries])
    axes.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(steps, _smooth(loss, max(len(loss) // 50, 1)), color="tab:blue", label="training, running mean")
    held_out = [(entry["step"], entry["eval"]["loss"]) for entry in entries if "eval" in entry]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    if unigram is not None:
        axes.axhline(unigram, color="black", linestyle="--", linewidth=1, label="unigram entropy of the held-out targets")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per target token")
    axes.legend()


def _lines(figure: Figure, entries: Sequence[dict[str, Any]], field: str, label: str, level: float | None) -> None:
    axes = figure.subplots()
    steps = np.array([entry["step"] for entry in entries])
    for name, series in _layer_series(entries, field).items():
        axes.plot(steps, _smooth(series, max(len(series) // 50, 1)), label=name)
    if level is not None:
        axes.axhline(level, color="black", linestyle="--", linewidth=1, label="log E")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend()


def _load(figure: Figure, entries: Sequence[dict[str, Any]]) -> None:
    series = {name: load_NE.T for name, load_NE in _layer_series(entries, "load").items()}
    rows = figure.subplots(len(series), 1, squeeze=False, sharex=True)[:, 0]
    picture = None
    for axes, (name, load_EN) in zip(rows, series.items(), strict=True):
        E, columns = load_EN.shape[0], np.array_split(np.arange(load_EN.shape[1]), min(COLUMNS, load_EN.shape[1]))
        image = np.stack([load_EN[:, column].mean(axis=1) for column in columns], axis=1) * E
        extent = (entries[0]["step"] - 0.5, entries[-1]["step"] + 0.5, E - 0.5, -0.5)
        picture = axes.imshow(image, aspect="auto", extent=extent, cmap="viridis", vmin=0.0, vmax=2.0, interpolation="nearest")
        axes.set_ylabel(f"{name}\nexpert")
    rows[-1].set_xlabel("step")
    assert picture is not None
    figure.colorbar(picture, ax=list(rows), label="load (1: balanced)", extend="max")


def _drawn(name: str, entries: Sequence[dict[str, Any]], unigram: float | None) -> bytes:
    from matplotlib.figure import Figure

    layers = entries[0]["layers"]
    figure = Figure(figsize=(9.0, 4.0 if name != "load" else 1.2 + 1.5 * len(layers)), layout="constrained")
    figure.suptitle(PICTURES[name], fontsize=11)
    if name == "loss":
        _loss(figure, entries, unigram)
    elif name == "load":
        _load(figure, entries)
    elif name == "drops":
        _lines(figure, entries, "drop_rate", "share of claims", None)
    else:
        _lines(figure, entries, "entropy", "nats", math.log(len(layers[0]["load"])))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def draw(folder: RunFolder, entries: Sequence[dict[str, Any]], title: str, facts: Iterable[tuple[str, str]], unigram: float | None) -> list[Path]:
    """Write the pictures and `plots/index.html`; without matplotlib the page alone, which says so.

    Raises
    ------
    InputError
        Where a file cannot be written.
    """
    names = [name for name in PICTURES if name == "loss" or (entries and entries[0]["layers"])] if entries else []
    written, parts = [], []
    try:
        for name in names:
            content = _drawn(name, entries, unigram)
            path = folder.plots / f"{name}.png"
            write_whole(path, content)
            written.append(path)
            source = base64.b64encode(content).decode()
            parts.append(f'<h2>{html.escape(PICTURES[name])}</h2><img alt="{html.escape(PICTURES[name])}" src="data:image/png;base64,{source}">')
    except ImportError:
        parts.append("<p class=faint>Pictures need matplotlib: pip install 'refswitch[plots]'; then go on with --resume.</p>")
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in facts)
    page = folder.plots / "index.html"
    filled = {"@TITLE@": html.escape(title), "@FACTS@": rows, "@PICTURES@": "".join(parts)}
    text = PAGE.read_text(encoding="utf-8")
    for mark, content_of in filled.items():
        text = text.replace(mark, content_of)
    write_whole(page, text)
    return [*written, page]
