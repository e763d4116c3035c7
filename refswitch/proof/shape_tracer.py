# May import: standard library, numpy, refswitch.dims.
"""Shape suffixes as assertions: while the tracer is on, every function that returns has its names compared with the shapes behind them.

A name that ends in `_` and axis letters, `x_GSD`, promises three axes, in this order, of sizes G, S and D. A digit is an axis of that very size
(`mean_GS1`), a lower-case letter this rank's share of its capital's axis, hence a size of its own (`w_in_eDF`). When a function of the traced files
returns, this must hold of its local variables and of their fields where they are named tuples:

    as many axes as letters;    letters of the legend, `refswitch.dims`;    one size per letter in one scope

A frame is a scope, and so are the fields of the records among its arguments (`inputs.x_GSD` beside `logits_GSE`). Any other record is a scope of
its own: the encoder's outputs stand in the decoder's company with another L. Comprehensions are left out, since not every version of Python gives
them a frame. Style: rules 1 to 6. Next: `tag_lint`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from refswitch.dims import LETTERS

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
SHOWN = 5  # violations in the message at the end


class Violation(NamedTuple):
    """One name that promises another shape than it has."""

    file: str
    function: str
    variable: str  # `saved.gates.expert_GSK` for a field
    letters: str
    shape: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.function}: {self.variable} has shape {self.shape}, but {self.reason}"


class Trace(NamedTuple):
    """What was seen while the tracer was on."""

    violations: list[Violation]  # the first one of each name of each function
    functions: set[tuple[str, str]]  # file and name of every function that returned


def letters_of(name: str) -> str:
    """Return the axis letters in which a name ends, or nothing where it ends in a word.

    After the last underscore stand capitals, lower-case shares and digits, at least one of them a capital: `w_in_eDF`, not `w_in`.
    """
    _, underscore, last = name.rpartition("_")
    is_suffix = underscore and last.isascii() and last.isalnum() and any(mark.isupper() for mark in last)
    return last if is_suffix else ""


def fault_of(letters: str, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]], name: str) -> str:
    """Return why these letters cannot have this shape, or nothing.

    Where they can, `sizes` learns the letters that it lacks, with the name that first had them.
    """
    unknown = [letter for letter in letters if not letter.isdigit() and letter.upper() not in LETTERS]
    if unknown:
        return f"no axis is called {', '.join(unknown)}"
    if len(letters) != len(shape):
        return f"{letters} has {len(letters)} axes"
    learned: dict[str, tuple[int, str]] = {}
    for letter, size in zip(letters, shape, strict=True):
        wanted, where = (int(letter), name) if letter.isdigit() else sizes.get(letter, learned.setdefault(letter, (size, name)))
        if size != wanted:
            return f"{letter} is {wanted}{'' if where == name else f' in {where}'}"
    sizes.update({letter: known for letter, known in learned.items() if letter not in sizes})
    return ""


def is_record(value: Any) -> bool:
    """Tell whether a value is a named tuple."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _arrays(names: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": np.asarray(value) for name, value in names.items() if isinstance(value, np.ndarray | np.generic) and letters_of(name)}


def _records_below(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every record in a value, itself included, through records, tuples and lists."""
    if is_record(value):
        yield name, value
        for field in value._fields:
            yield from _records_below(f"{name}.{field}", getattr(value, field))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _records_below(f"{name}[{i}]", item)


def scopes_of(frame: FrameType) -> Iterator[dict[str, np.ndarray]]:
    """Yield the suffixed arrays of each scope of a frame: the frame with the records among its arguments, then every other record."""
    names = dict(frame.f_locals)
    arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
    joined = {name: value._asdict() for name, value in names.items() if name in arguments and is_record(value)}
    own = _arrays(names)
    for name, fields in joined.items():
        own |= _arrays(fields, f"{name}.")
    yield own
    for name, value in names.items():
        for path, record in _records_below(name, value):
            if path not in joined:
                yield _arrays(record._asdict(), f"{path}.")


def violations_of(frame: FrameType) -> Iterator[Violation]:
    """Yield what the names of a frame promise and do not keep; a letter's size is the one under its first name, an argument's if it has one."""
    for scope in scopes_of(frame):
        sizes: dict[str, tuple[int, str]] = {}
        for name, array in scope.items():
            letters, shape = letters_of(name), np.shape(array)
            reason = fault_of(letters, shape, sizes, name)
            if reason:
                yield Violation(Path(frame.f_code.co_filename).name, frame.f_code.co_name, name, letters, shape, reason)


@contextmanager
def traced(folder: Path = REFERENCE) -> Iterator[Trace]:
    """Look at every return of a function of the folder's files, of which the frames of comprehensions are none.

    Yields
    ------
    Trace
        It grows while the context is open. This thread's profile function is taken and given back.
    """
    trace = Trace([], set())
    seen: set[tuple[str, str, str]] = set()
    is_traced: dict[str, bool] = {}
    before = sys.getprofile()

    def look(frame: FrameType, event: str, _: object) -> None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if event != "return" or (function.startswith("<") and function != "<lambda>"):
            return
        if file not in is_traced:
            is_traced[file] = Path(file).resolve().is_relative_to(folder.resolve())
        if is_traced[file]:
            new = [violation for violation in violations_of(frame) if violation[:3] not in seen]
            seen.update(violation[:3] for violation in new)
            trace.violations.extend(new)
            trace.functions.add((Path(file).name, function))

    sys.setprofile(look)
    try:
        yield trace
    finally:
        sys.setprofile(before)


@contextmanager
def checked(folder: Path = REFERENCE) -> Iterator[None]:
    """As `traced`, and raise at the end.

    Raises
    ------
    AssertionError
        With the first few violations; not where the body raised something itself.
    """
    with traced(folder) as trace:
        yield
    if found := trace.violations:
        shown = "\n".join(str(violation) for violation in found[:SHOWN])
        raise AssertionError(f"{len(found)} names promise another shape than they have, the first of them:\n{shown}")
