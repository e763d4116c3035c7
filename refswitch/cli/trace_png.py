# May import: standard library, numpy, matplotlib (inside a function), refswitch.tracing, refswitch.errors.
"""The picture of a trace: a strip of tokens per sparse layer, coloured by expert, and beside it each expert's load."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from refswitch.errors import InputError
from refswitch.tracing import LayerTrace, Tokens

LEGEND_EXPERTS = 16  # more have a colour bar


def draw(tokens: Tokens, layers: list[LayerTrace], title: str, path: Path) -> None:
    """Draw to a PNG, written beside the file and renamed.

    Raises
    ------
    InputError
        Where matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
    except ImportError:
        raise InputError("--png needs matplotlib: pip install 'refswitch[plots]'") from None
    L, E = layers[0].probs_LE.shape
    base = pyplot.get_cmap("tab20" if E > 10 else "tab10")
    colours = [base(e % base.N) for e in range(E)] if E <= 20 else list(pyplot.get_cmap("turbo")(np.linspace(0.03, 0.97, E)))
    cmap = ListedColormap(colours)
    widths = [max(4.0, min(0.16 * L, 14.0)), 3.2]
    figure, axes = pyplot.subplots(
        len(layers), 2, figsize=(sum(widths) + 1.2, 1.0 + 1.25 * len(layers)), width_ratios=widths, squeeze=False, layout="constrained"
    )  # fmt: skip
    figure.suptitle(f"Where the tokens go: {title}")
    for (strip, bars), layer in zip(axes, layers, strict=True):
        strip.imshow(layer.expert_L[None], aspect="auto", cmap=cmap, norm=BoundaryNorm(np.arange(-0.5, E), E), interpolation="nearest")
        lost = np.flatnonzero(~layer.kept_L)
        strip.plot(lost, np.zeros(len(lost)), "x", color="black", markersize=7, markeredgewidth=2.5)
        strip.plot(lost, np.zeros(len(lost)), "x", color="white", markersize=6, markeredgewidth=1.2)
        strip.set_yticks([])
        read = tokens.shown if layer.stack == "encoder" else ("", *tokens.shown[:-1])  # shifted right
        strip.set_ylabel(f"{layer.stack}\nblock {layer.block}", rotation=0, ha="right", va="center")
        step = 1 if L <= 64 else -(-L // 64)
        strip.set_xticks(range(0, L, step), [shown.replace("$", r"\$") for shown in read[::step]], fontsize=8)
        bars.bar(range(E), layer.load_E, color=colours)
        full = layer.capacity * layer.groups
        if full <= 2 * layer.load_E.max(initial=1):
            bars.axhline(full, color="black", linestyle="--", linewidth=1)
        bars.set_ylabel("tokens")
        bars.set_title(f"{layer.dropped} of {L} dropped; {full} slots an expert", fontsize=9)
    axes[-1][0].set_xlabel("token")
    axes[-1][1].set_xlabel("expert")
    if E <= LEGEND_EXPERTS:
        handles: list[Patch | Line2D] = [Patch(color=colour, label=f"expert {e}") for e, colour in enumerate(colours)]
        handles.append(Line2D([], [], marker="x", linestyle="", color="black", label="no slot"))
        handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="slots of an expert"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10), fontsize=8)
    else:
        figure.colorbar(pyplot.cm.ScalarMappable(BoundaryNorm(np.arange(-0.5, E), E), cmap), ax=axes[:, 0], location="bottom", label="expert")
    beside = path.with_name(f".{path.stem}.{os.getpid()}.png")
    try:
        figure.savefig(beside, dpi=150)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"--png {path}: cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)
