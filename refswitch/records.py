# May import: standard library, yaml, pydantic, refswitch.errors.
"""Frozen records from mappings: a base with overrides laid over it, every key checked, every mistake one line that names the nearest right one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from refswitch.errors import InputError

Tree = dict[str, Any]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the most similar known name, else the list of what is known."""
    known = [str(item) for item in known]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def read_yaml(path: Path) -> Any:
    """Read one YAML file.

    Raises
    ------
    InputError
        If it is missing, not text or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def fields_of(record: type) -> dict[str, Any]:
    """Return the fields of a record with their types."""
    return get_type_hints(record)


def record_in(hint: Any) -> Any:
    """Return the record that a field holds, alone or as an alternative to None; None where it holds a value."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((part for part in parts if dataclasses.is_dataclass(part)), None)


def merge(tree: Tree, override: Mapping[str, Any], record: type, path: str, where: str, word: str = "knob") -> Tree:
    """Return `tree` with `override` laid over it.

    Raises
    ------
    InputError
        For a key that is no field of `record` (a `word`), or a value where a group of them stands.
    """
    fields, merged = fields_of(record), dict(tree)
    for key, value in override.items():
        inner = record_in(fields.get(key))
        if key not in fields:
            raise InputError(f"{where}: unknown {word} {path}{key}{nearest(path + str(key), [path + field for field in fields])}")
        if isinstance(value, Mapping):
            if inner is None:
                raise InputError(f"{where}: {path}{key} takes one value, not a mapping")
            value = merge(tree.get(key) or {}, value, inner, f"{path}{key}.", where, word)
        elif inner is not None and not (value is None and inner is not fields[key]):
            raise InputError(f"{where}: {path}{key} is a group of {word}s; set one of {', '.join(fields_of(inner))}")
        merged[key] = value
    return merged


def nested(overrides: Mapping[str, Any], where: str) -> Tree:
    """Turn {"capacity.min": 0} into {"capacity": {"min": 0}}."""
    tree: Tree = {}
    for dotted, value in overrides.items():
        *groups, leaf = str(dotted).split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise InputError(f"{where}: {dotted} contradicts another override")
        if isinstance(node.get(leaf), dict) and isinstance(value, Mapping):
            value = {**node[leaf], **value}
        node[leaf] = value
    return tree


def choices_of(record: type, dotted: str) -> tuple[Any, ...]:
    """Return the values that a knob may take, or () where it is a number or text."""
    head, _, rest = dotted.partition(".")
    hint = fields_of(record)[head]
    if rest:
        return choices_of(record_in(hint), rest)
    if get_origin(hint) is Literal:
        return get_args(hint)
    if hint is bool:
        return (False, True)
    if get_origin(hint) in (Union, UnionType):
        return tuple(
            value for part in get_args(hint) for value in ((False, True) if part is bool else get_args(part) if get_origin(part) is Literal else ())
        )
    return ()


def validate(tree: Tree, record: type, where: str) -> Any:
    """Return the record of a complete tree.

    Raises
    ------
    InputError
        Naming the first field that is missing or has a value of another type, and the nearest right value where there is a list of them.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(record, config=None if dataclasses.is_dataclass(record) else ConfigDict())
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        knob = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part.isidentifier() and part in _knob_words(record))
        if first["type"] == "missing":
            raise InputError(f"{where}: {knob} has no value") from None
        choices = choices_of(record, knob) if knob else ()
        hint = nearest(str(first["input"]), choices) if choices else f": {first['msg']}"
        raise InputError(f"{where}: {knob} has no value {first['input']!r}{hint}") from None


@functools.cache
def _knob_words(record: type) -> frozenset[str]:
    words = set()
    for name, hint in fields_of(record).items():
        words.add(name)
        inner = record_in(hint)
        if inner is not None:
            words |= _knob_words(inner)
    return frozenset(words)
