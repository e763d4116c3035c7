# May import: standard library, rich, refswitch.checkpoints, refswitch.errors.
"""`refswitch convert`: between our checkpoints and Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from refswitch.checkpoints.folder import STORAGES, storage_of
from refswitch.checkpoints.hugging_face import write_hugging_face
from refswitch.checkpoints.models import is_own, read_model, resolve_folder
from refswitch.checkpoints.own import write_own
from refswitch.errors import InputError
from refswitch.tree import leaves

FORMATS = ("refswitch", "hugging-face")


class Door(NamedTuple):
    """The command line as parsed."""

    source: str
    dest: Path
    to: str | None
    storage: str | None
    shard_mb: int
    quiet: bool


def run_convert(door: Door) -> int:
    """Convert what the command line names; return the exit status.

    Raises
    ------
    InputError
        In one line, whatever is wrong with the source or the destination.
    """
    if door.storage is not None and door.storage not in STORAGES:
        raise InputError(f"--storage {door.storage} should be one of {', '.join(STORAGES)}")
    if door.to is not None and door.to not in FORMATS:
        raise InputError(f"--to {door.to} should be one of {', '.join(FORMATS)}")
    if not door.dest.absolute().parent.is_dir():
        raise InputError(f"{door.dest}: there is no folder {door.dest.absolute().parent}")
    console, errors = Console(highlight=False, soft_wrap=True), Console(stderr=True)
    with errors.status(f"reading {escape(door.source)}") as status:
        folder = resolve_folder(door.source)
        to = door.to or ("hugging-face" if is_own(folder) else "refswitch")
        storage = door.storage or storage_of(folder)
        config, params = read_model(str(folder))
        status.update(f"writing {escape(str(door.dest))}")
        write = write_own if to == "refswitch" else write_hugging_face
        write(door.dest, config, params, storage, door.shard_mb * 10**6)
    if not door.quiet:
        count = sum(leaf.size for leaf in leaves(params).values())
        console.print(f"{escape(str(door.dest))}: {escape(config.name)} for {to}, {count:,} numbers in {storage}; dialect {escape(config.dialect)}")
        if to == "hugging-face" and config.experts and not config.dialect.startswith("hf_"):
            console.print("note: Hugging Face's classes compute hf_ge_5_18 whatever the source's dialect: outputs differ where a token is dropped")
    return 0
