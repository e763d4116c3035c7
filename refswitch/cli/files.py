# May import: standard library, refswitch.errors.
"""Files that a command writes: refused before the work where they cannot be, and whole or absent after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from refswitch.errors import InputError


def check_writable(path: Path, option: str = "--json") -> None:
    """Refuse before the work what could not be written after it."""
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: cannot be written there")


def write_text(text: str, path: Path, option: str) -> None:
    """Write beside the file and rename it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{option} {path}: cannot be written: {error.strerror}") from None


def write_json(content: Any, path: Path) -> None:
    """Write a report."""
    write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", path, "--json")
