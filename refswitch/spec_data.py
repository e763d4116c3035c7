# May import: standard library, refswitch.records, refswitch.config, refswitch.errors.
"""The spec as data: dialects, profiles, knobs and clauses from `spec/`, validated on load.

An unknown record, knob or value is an `InputError` that names the nearest known one. Spec: decisions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from refswitch.config import Dialect, Profile
from refswitch.errors import InputError
from refswitch.records import Tree, merge, nearest, nested, read_yaml, validate

LARGEST_ULP = 1e4  # an elementary function that is wrong by more is not one that a profile can excuse


@functools.cache
def data_root() -> Path:
    """Return the folder that holds `spec/` and `conformance/`: the checkout's root if there is one, else the packaged copy."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    return checkout if (checkout / "spec" / "clauses.yaml").is_file() else package / "_data"


def names_of(kind: str) -> list[str]:
    """Return the names of the records of `kind`: "dialects" or "profiles"."""
    return sorted(path.stem for path in (data_root() / "spec" / kind).glob("*.yaml"))


def _record_tree(name: str, kind: str, record: type, seen: tuple[str, ...] = ()) -> Tree:
    if name in seen:
        raise InputError(f"spec/{kind}: {' -> '.join((*seen, name))} inherits from itself")
    known = names_of(kind)
    if name not in known:
        raise InputError(f"unknown {kind[:-1]} {name!r}{nearest(name, known)}")
    where = f"spec/{kind}/{name}.yaml"
    own = read_yaml(data_root() / "spec" / kind / f"{name}.yaml")
    if not isinstance(own, dict) or "base" not in own:
        raise InputError(f"{where}: a record is a mapping with the key `base`")
    base = own.pop("base")
    tree = _record_tree(base, kind, record, (*seen, name)) if base is not None else {}
    return {**merge(tree, own, record, "", where), "name": name}


@functools.cache
def _load_named(name: str, kind: str, record: type) -> Any:
    return validate(_record_tree(name, kind, record), record, f"spec/{kind}/{name}.yaml")


def _load(spec: str | Mapping[str, Any], kind: str, record: type) -> Any:
    if isinstance(spec, str):
        return _load_named(spec, kind, record)
    if not isinstance(spec, Mapping) or not isinstance(spec.get("base"), str):
        raise InputError(f"a {kind[:-1]} is a name or a mapping with `base`, not {spec!r}")
    where = f"{kind[:-1]} with base {spec['base']}"
    overrides = {key: value for key, value in spec.items() if key != "base"}
    tree = merge(_record_tree(spec["base"], kind, record), nested(overrides, where), record, "", where)
    changes = ", ".join(f"{key}={value}" for key, value in sorted(overrides.items()))
    return validate({**tree, "name": f"{spec['base']} with {changes}" if changes else spec["base"]}, record, where)


# No implementation combines these, and the clauses do not say what it would mean.
UNDEFINED = (
    (("select.rule", ("ntlb",)), ("priority", ("random", "gate_desc"))),
    (("select.rule", ("ntlb",)), ("pad.route", ("expert0_weight0",))),
    (("pad.route", ("expert0_weight0",)), ("priority", ("gate_desc",))),
)


def load_dialect(spec: str | Mapping[str, Any]) -> Dialect:
    """Load a dialect by name, or a base with dotted overrides such as {"base": "mesh_tensorflow", "capacity.min": 0}.

    Spec: decisions.

    Raises
    ------
    InputError
        For an unknown record, knob or value, naming the nearest known one, and for knobs that contradict each other.
    """
    dialect: Dialect = _load(spec, "dialects", Dialect)
    if dialect.noise.gate_from == "clean" and dialect.noise.kind in ("x_mul_uniform", "x_dropout"):
        raise InputError(f"dialect {dialect.name}: noise.gate_from=clean needs noise on the logits, not {dialect.noise.kind}")
    knobs = knobs_of(dialect)
    for (one, ones), (other, others) in UNDEFINED:
        if knobs[one] in ones and knobs[other] in others:
            raise InputError(f"dialect {dialect.name}: {one}={knobs[one]} with {other}={knobs[other]} is not defined")
    for name, text in (
        ("cf_train", dialect.capacity.cf_train),
        ("cf_eval", dialect.capacity.cf_eval),
        ("eval_fraction", dialect.capacity.eval_fraction),
    ):
        try:
            Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise InputError(f"dialect {dialect.name}: capacity.{name} should be a decimal such as 1.25, not {text!r}") from None
    return dialect


def load_profile(spec: str | Mapping[str, Any]) -> Profile:
    """Load a numerics profile by name, or a base with dotted overrides such as {"base": "bfloat16", "storage.z": "bfloat16"}.

    Spec: numbers.

    Raises
    ------
    InputError
        For an unknown record, key or value, naming the nearest known one.
    """
    profile: Profile = _load(spec, "profiles", Profile)
    for name, ulp in dataclasses.asdict(profile.functions).items():
        if not 0.0 <= ulp <= LARGEST_ULP:
            raise InputError(f"profile {profile.name}: functions.{name} should be between 0 and {LARGEST_ULP:g}, not {ulp:g}")
    if profile.accumulate.block < 1:
        raise InputError(f"profile {profile.name}: accumulate.block should be at least 1, not {profile.accumulate.block}")
    return profile


def parse_record(text: str) -> str | dict[str, Any]:
    """Read NAME, or NAME,knob=value,... as the command line gives it.

    Raises
    ------
    InputError
        If an override has no `=`.
    """
    name, *overrides = text.split(",")
    if not overrides:
        return name
    record: dict[str, Any] = {"base": name}
    for override in overrides:
        knob, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"{text!r}: {override!r} should be knob=value")
        try:
            record[knob.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"{text!r}: {value!r} is not a value") from None
    return record


def knobs_of(record: object, prefix: str = "") -> dict[str, Any]:
    """Return every knob of a loaded record by its dotted name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            found |= knobs_of(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


def with_knob(dialect: Dialect, dotted: str, value: Any) -> Dialect:
    """Return the dialect with one knob changed, its name kept."""
    tree = merge(dataclasses.asdict(dialect), nested({dotted: value}, dotted), Dialect, "", dialect.name)
    return validate(tree, Dialect, dialect.name)


@functools.cache
def load_clauses() -> dict[str, Tree]:
    """Return the layer's clauses by id, each with text, stage, class, paper and the knob values under which it holds: those that are judged."""
    return read_yaml(data_root() / "spec" / "clauses.yaml")["clauses"]


@functools.cache
def load_operations() -> dict[str, Tree]:
    """Return the clauses of everything around the layer by id, each with text, class, paper and the functions of the reference that it is about."""
    return read_yaml(data_root() / "spec" / "clauses.yaml")["operations"]


def every_clause() -> dict[str, Tree]:
    """Return the clauses of the layer and of everything around it."""
    return load_clauses() | load_operations()


@functools.cache
def load_knobs() -> dict[str, Tree]:
    """Return what is said of each judged knob: its stage, its meaning and a phrase for each value."""
    return read_yaml(data_root() / "spec" / "knobs.yaml")["knobs"]


@functools.cache
def load_mistakes() -> dict[str, Tree]:
    """Return what implementations do by mistake and no dialect does: its stage and its meaning."""
    return read_yaml(data_root() / "spec" / "knobs.yaml")["mistakes"]


@functools.cache
def load_index() -> dict[str, Tree]:
    """Return the paper's index: each place's words, clauses and functions, and a note where there is none."""
    return read_yaml(data_root() / "spec" / "index.yaml")
