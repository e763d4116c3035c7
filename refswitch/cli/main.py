# May import: standard library, typer, rich, refswitch (inside the commands, so that --help is instant).
"""The command `refswitch`. Spec: contract 3.

Exit status: 0 done, 1 a judged difference, 2 an error, 130 interrupted.
"""

from __future__ import annotations

import enum
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from refswitch import SPEC_VERSION, __version__
from refswitch.errors import InputError

app = typer.Typer(
    name="refswitch",
    help="The executable standard for Switch Transformers: judge any implementation of a Switch layer, forward and backward.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


# The options that every command which trains has.
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of run_dir, to the same bits.")]
Silent = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")]
EachCheckpoint = Annotated[bool, typer.Option("--verbose", "-v", help="Print every checkpoint.")]


class Tier(str, enum.Enum):
    """How much is judged."""

    quick = "quick"
    full = "full"
    exhaustive = "exhaustive"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"refswitch {__version__} (spec {SPEC_VERSION})")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Judge, study and train Switch Transformers."""


@app.command(epilog="Example: `refswitch verify my_adapter.py` or `refswitch verify my_adapter.py::float32 --dialect hf_ge_5_18 --json report.json`")
def verify(
    target: Annotated[
        Optional[str],
        typer.Argument(help="reference, or FILE.py[::NAME]. Without it, every shipped adapter whose package is importable.", show_default=False),
    ] = None,
    dialect: Annotated[
        Optional[str], typer.Option(help="Judge it as this dialect, NAME or NAME,knob=value,... (spec/dialects), instead of the one it declares.")
    ] = None,
    profile: Annotated[
        Optional[str], typer.Option(help="Judge it under these numerics, NAME or NAME,key=value,... (spec/profiles), instead of those it declares.")
    ] = None,
    tier: Annotated[Tier, typer.Option(help="How many draws of each case.")] = Tier.quick,
    seed: Annotated[int, typer.Option(min=0, help="Every case is drawn from it.")] = 0,
    deadline: Annotated[float, typer.Option(min=0.1, max=86400.0, help="Seconds that one call, or the import, may take.")] = 60.0,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the report to this file as JSON.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print one line for each adapter.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every clause, and what passing would have noticed.")] = False,
) -> None:
    """Judge whether an adapter computes the Switch layer that it declares.

    Exit status: 0 all conform, 1 at least one deviates, 2 otherwise.
    """
    from refswitch.cli.verify import Door, run_verify

    door = Door(target, dialect, profile, tier.value, seed, deadline, json_file, quiet, verbose)
    raise typer.Exit(_status_of(lambda: run_verify(door)))


@app.command(epilog="Example: `refswitch convert google/switch-base-8 mine` or `refswitch convert mine for_transformers --storage bfloat16`")
def convert(
    source: Annotated[str, typer.Argument(help="A folder of ours, a Hugging Face folder, or a hub name OWNER/NAME[@REVISION].", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="The new folder.", show_default=False)],
    to: Annotated[Optional[str], typer.Option(help="refswitch or hugging-face; without it, the one that the source is not.")] = None,
    storage: Annotated[Optional[str], typer.Option(help="float64, float32, float16 or bfloat16; without it, the source's widest.")] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Largest file in megabytes; a larger model is cut into shards.")] = 5000,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Convert a checkpoint between refswitch and Hugging Face (Switch and T5, safetensors)."""
    from refswitch.cli.convert import Door, run_convert

    raise typer.Exit(_status_of(lambda: run_convert(Door(source, dest, to, storage, shard_mb, quiet))))


@app.command(
    name="compare-model", epilog="Example: `refswitch compare-model google/switch-base-8` or `refswitch compare-model my_folder --length 64 -v`"
)
def compare_model(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A Hugging Face folder, or a hub name OWNER/NAME[@REVISION].", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, max=1024, help="Sequences; the last of several is padded.")] = 2,
    length: Annotated[int, typer.Option(min=3, max=4096, help="Tokens of an encoder's sequence; the decoder's has two fewer.")] = 13,
    seed: Annotated[int, typer.Option(min=0, help="The tokens are drawn from it.")] = 0,
    deadline: Annotated[float, typer.Option(min=1.0, max=86400.0, help="Seconds that transformers may take.")] = 600.0,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write every stage to this file as JSON.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print one line.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every stage.")] = False,
) -> None:
    """Run a Hugging Face Switch or T5 checkpoint in transformers and judge it stage by stage; name the first layer that differs.

    Exit status: 0 every stage lies within its radius, 1 one does not, 2 otherwise.
    """
    from refswitch.cli.compare import Door, run_compare

    raise typer.Exit(_status_of(lambda: run_compare(Door(source, rows, length, seed, deadline, json_file, quiet, verbose))))


@app.command(epilog="Example: `refswitch trace 'to be or not to be'` or `refswitch trace notes.txt --model my_model --html notes.html`")
def trace(
    text: Annotated[Optional[str], typer.Argument(help="A text, or a file that holds one.", show_default=False)] = None,
    model: Annotated[str, typer.Option(help="A preset with random weights, a folder of ours or of Hugging Face, or a hub name.")] = "byte_tiny",
    seed: Annotated[int, typer.Option(min=0, help="Of a preset's random weights.")] = 0,
    length: Annotated[int, typer.Option(min=1, max=4096, help="Read at most so many tokens.")] = 128,
    png: Annotated[Optional[Path], typer.Option(help="Draw the routes to this file (needs the extra plots).")] = None,
    html: Annotated[Optional[Path], typer.Option(help="Write one self-contained page to click through.")] = None,
    index: Annotated[bool, typer.Option("--index", help="Print the paper's index instead: place, clauses, functions.")] = False,
) -> None:
    """Show where each token of a text goes: its expert in each sparse layer, what was dropped, gates, entropy, load."""
    from refswitch.cli.trace import Door, run_trace

    raise typer.Exit(_status_of(lambda: run_trace(Door(text, model, seed, length, png, html, index))))


@app.command(
    epilog="Example: `refswitch train tiny` or `refswitch train my_config.yaml steps=500 model.experts=16 run_dir=runs/mine`; "
    "a run that was stopped goes on with `refswitch train runs/mine/config.yaml --resume`"
)
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml|PRESET", help="A file (base: tiny, and what differs), or a preset: tiny, small.")],
    assignments: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Laid over it, dotted: steps=500 model.experts=16.", show_default=False)
    ] = None,
    resume: Resume = False,
    quiet: Silent = False,
    verbose: EachCheckpoint = False,
) -> None:
    """Train a small Switch Transformer: text to checkpoint to picture.

    Exit status: 0 trained, 130 stopped by Ctrl-C and saved, 2 otherwise.
    """
    from refswitch.cli.train import Door, run_train

    raise typer.Exit(_status_of(lambda: run_train(Door(config, assignments or [], "", resume, quiet, verbose))))


@app.command(
    epilog="Example: `refswitch finetune runs/tiny my_tasks.yaml steps=500`, where my_tasks.yaml says "
    "`tasks: [{name: rte, train: [rte/train.jsonl], validation: [rte/dev.jsonl]}]`"
)
def finetune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, one of its checkpoints, or a model's folder.", show_default=False)],
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The tasks, and what differs from run and recipe.", show_default=False)],
    assignments: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Laid over it, dotted: steps=500 best=rouge2.", show_default=False)
    ] = None,
    resume: Resume = False,
    quiet: Silent = False,
    verbose: EachCheckpoint = False,
) -> None:
    """Fine-tune a run on text-to-text tasks: dropout 0.1, expert dropout 0.4, a constant rate; the best checkpoint is kept.

    Exit status: 0 trained, 130 stopped by Ctrl-C and saved, 2 otherwise.
    """
    from refswitch.cli.train import Door, run_finetune

    raise typer.Exit(_status_of(lambda: run_finetune(Door(config, assignments or [], run, resume, quiet, verbose))))


@app.command(epilog="Example: `refswitch distill runs/tiny tiny model.experts=0 model.encoder_sparse=[] model.decoder_sparse=[] run_dir=runs/dense`")
def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A run's folder, or one of its checkpoints.", show_default=False)],
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml|PRESET", help="The student's run; its text is the teacher's.", show_default=False)],
    assignments: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Laid over it, dotted: distill.soft_share=0.25.", show_default=False)
    ] = None,
    resume: Resume = False,
    quiet: Silent = False,
    verbose: EachCheckpoint = False,
) -> None:
    """Train a student on labels and on a teacher's distribution: 0.75 and 0.25, begun with the teacher's weights outside its sparse layers.

    Exit status: 0 trained, 130 stopped by Ctrl-C and saved, 2 otherwise.
    """
    from refswitch.cli.train import Door, run_distill

    raise typer.Exit(_status_of(lambda: run_distill(Door(config, assignments or [], teacher, resume, quiet, verbose))))


@app.command(
    name="eval", epilog="Example: `refswitch eval runs/tiny` or `refswitch eval runs/tiny/checkpoints/step-200 --batches 32 --json told.json`"
)
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.", show_default=False)],
    step: Annotated[Optional[int], typer.Option(min=0, help="Which checkpoint; the last without it.")] = None,
    batches: Annotated[Optional[int], typer.Option(min=1, help="Held-out batches; without it, as many as the run evaluated.")] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the result to this file as JSON.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Evaluate a trained run on its held-out text: loss, accuracy, and what each sparse layer does."""
    from refswitch.cli.use_run import EvalDoor, run_eval

    raise typer.Exit(_status_of(lambda: run_eval(EvalDoor(run, step, batches, json_file, quiet))))


@app.command(epilog="Example: `refswitch generate runs/tiny` or `refswitch generate runs/tiny 'def main(<extra_id_0>):' --temperature 0.7`")
def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.", show_default=False)],
    prompt: Annotated[
        Optional[str],
        typer.Argument(help="A text; <extra_id_0>, <extra_id_1>, ... are the places to fill. Without it, held-out text.", show_default=False),
    ] = None,
    step: Annotated[Optional[int], typer.Option(min=0, help="Which checkpoint; the last without it.")] = None,
    length: Annotated[int, typer.Option(min=1, max=4096, help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Draw from the fewest tokens that have so much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer alone.")] = False,
) -> None:
    """Let a trained run answer a prompt."""
    from refswitch.cli.use_run import GenerateDoor, run_generate

    raise typer.Exit(_status_of(lambda: run_generate(GenerateDoor(run, prompt, step, length, temperature, top_p, seed, quiet))))


def _status_of(command: Callable[[], int]) -> int:
    """Run a command; turn a caller's mistake into one line and status 2, an interruption into status 130."""
    try:
        return command()
    except InputError as error:
        print(f"refswitch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("refswitch: interrupted", file=sys.stderr)
        return 130
    except (OSError, SystemExit) as error:
        # What stands on standard output could not be written, so nothing was told: that must not look like a verdict.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            print(f"refswitch: {error.strerror or error}", file=sys.stderr)
        return 2
    except Exception:  # noqa: BLE001 - ours: it keeps its traceback, but it is no verdict
        traceback.print_exc()
        return 2


def main() -> None:
    """Run the command line."""
    app()
