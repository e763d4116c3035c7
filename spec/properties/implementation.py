# May import: standard library, numpy, refswitch, the mutants of conformance.
"""What is under test: a layer with its claims, called in this process.

An adapter file is imported here, not in a process of its own: a thousand small calls are then a matter of seconds, and a layer that hangs or
ends its process ends the test run (`refswitch verify` is the tool for such). Every call gets copies of the case's arrays, its outputs are held to
the contract, and inputs that were written to are reported, as in the judge.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from properties.triggers import met_by
from refswitch.config import Capacity, Dialect, Profile, rounding_points
from refswitch.errors import InputError
from refswitch.records import nearest
from refswitch.reference.capacity import capacity_in_eval, capacity_of
from refswitch.spec_data import load_dialect, load_profile
from refswitch.verify.case import Case
from refswitch.verify.cases import Target, check_target
from refswitch.verify.child import run_case
from refswitch.verify.oracle import reference_outputs
from refswitch.verify.process import AdapterFailure
from refswitch.verify.report import Options
from refswitch.verify.run import resolve_target, target_of

Layer = Callable[[Case], dict[str, np.ndarray]]
REFERENCE_FEATURES = ("backward", "aux_loss", "z_loss", "noise", "padding", "groups", "bias", "gated", "expert_dropout", "empty")

# The reference's parts: the base dialect in three formats, and readings that differ from it wherever a knob can.
PLAYED: dict[str, tuple[Any, str]] = {
    "float64": ("mesh_tensorflow", "float64"),
    "float32": ("mesh_tensorflow", "float32"),
    "bfloat16": ("mesh_tensorflow", "bfloat16"),
    "gated": ({"base": "mesh_tensorflow", "expert.act": "gelu", "expert.glu": True, "expert.bias": "per_expert", "router.bias": True}, "float64"),
    "own_capacity": ({"base": "mesh_tensorflow", "capacity.min": 1, "capacity.float": "f32"}, "float64"),
    "labml_switch": ("labml_switch", "float64"),
    "megatron_top1": ("megatron_top1", "float32"),
    "flax_scatter_ignore_pads": ({"base": "flax_scatter_ignore_pads", "expert.act": "silu", "noise.kind": "z_add_normal"}, "float64"),
}


class Implementation(NamedTuple):
    """A layer, what it declares, how to get a fresh one, and the regimes that its calls have met."""

    label: str
    target: Target
    make: Callable[[], Layer]
    layer: Layer
    exports: frozenset[str]  # the outputs that it returns
    met: Counter[str]

    def __repr__(self) -> str:
        return self.label

    @property
    def dialect(self) -> Dialect:
        """What it claims to compute."""
        return self.target.dialect

    @property
    def profile(self) -> Profile:
        """How it claims to round."""
        return self.target.profile

    @property
    def features(self) -> frozenset[str]:
        """What it can do beyond the forward pass."""
        return self.target.features

    def call(self, case: Case) -> dict[str, np.ndarray]:
        """Return the outputs of one call."""
        return self.call_and_watch(case)[0]

    def call_and_watch(self, case: Case) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the outputs of one call, and the inputs that were written to.

        Raises
        ------
        AdapterFailure
            If the layer raises or breaks the contract.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's warnings are the layer's own business
            outputs, reply = run_case(self.layer, case)
        if "error" in reply:
            raise AdapterFailure(reply["error"])
        self.met.update(["cases", *met_by(case, self.target, outputs)])
        return outputs, reply["mutated"]

    def meets(self, trigger: str, holds: Any = True) -> None:
        """Say that an example was in a regime that no call shows, where it was."""
        self.met[trigger] += bool(holds)

    def fresh(self) -> Implementation:
        """Return the implementation as it is before its first call."""
        return self._replace(layer=self.make())

    def watched(self) -> Implementation:
        """Return it with an empty record of what was met."""
        return self._replace(met=Counter())


def implementation_of(label: str, target: Target, make: Callable[[], Layer]) -> Implementation:
    """Join a layer with its claims; one small call tells which outputs it returns.

    Raises
    ------
    InputError
        Where the dialect cannot be judged, or the layer does not accept the smallest case.
    """
    check_target(target)
    layer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs, reply = run_case(make(), smallest_case(target))
    if "error" in reply:
        raise InputError(f"{label}: {reply['error']}")
    return Implementation(label, target, make, layer, frozenset(outputs), Counter())


def smallest_case(target: Target) -> Case:
    """Return a case that every implementation accepts."""
    from properties.strategies import case_of, plain

    case = case_of(plain(), target)
    if case is None:
        raise InputError("LIMITS and FEATURES leave no case to run")
    return case


def player(dialect: Dialect, profile: Profile) -> Layer:
    """Return the reference in a dialect and a format."""
    points = rounding_points(dialect, profile)
    return lambda case: {name: np.asarray(value) for name, value in reference_outputs(case, dialect, points).items()}


def with_own_capacity(layer: Layer, rule: Capacity) -> Layer:
    """Return the layer that does not read the case's capacity but computes it."""

    def call(case: Case) -> dict[str, np.ndarray]:
        S, E = case.sizes["S"], case.sizes["E"]
        slots = capacity_of(S, E, case.capacity_factor, rule) if case.train else capacity_in_eval(S, E, rule)
        return layer(Case({**case.scalars, "capacity": slots}, case.arrays))

    return call


def reference(name: str) -> Implementation:
    """Return the reference in one of its parts; being straight-line NumPy it is deterministic, which lets identities be tested to the bit."""
    dialect, profile = load_dialect(PLAYED[name][0]), dataclasses.replace(load_profile(PLAYED[name][1]), deterministic=True)
    features, layer = frozenset(REFERENCE_FEATURES), player(dialect, profile)
    if name == "own_capacity":
        features, layer = features | {"own_capacity"}, with_own_capacity(layer, dialect.capacity)
    return implementation_of(f"reference::{name}", Target(dialect, profile, features, {}), lambda: layer)


def mutant_implementation(mutant: Any, profile: str) -> Implementation:
    """Return a mutant of conformance/mutants (or a variant, whose `make` takes nothing); its NumPy is deterministic too."""
    return _of_layer_maker(mutant.name, lambda: mutant.make("all", profile))


def variant_implementation(variant: Any) -> Implementation:
    """Return a correct variant of conformance/mutants."""
    return _of_layer_maker(variant.name, variant.make)


def _of_layer_maker(label: str, make: Callable[[], Any]) -> Implementation:
    layer = make()
    declared = {"dialect": layer.dialect, "profile": layer.profile, "features": layer.features, "limits": {}}
    target = target_of(declared, Options())
    return implementation_of(label, target._replace(profile=dataclasses.replace(target.profile, deterministic=True)), make)


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("refswitch_property_adapter", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise InputError(f"{path}: cannot be imported: {error}") from None
    return module


def _layers_of(path: Path, name: str) -> dict[str, Any]:
    """Return the file's adapters by label; a name is looked up in ADAPTERS first, then among the file's callables."""
    module = _imported(path)
    layers = dict(getattr(module, "ADAPTERS", None) or ({"switch_layer": module.switch_layer} if hasattr(module, "switch_layer") else {}))
    if name:
        found = layers.get(name, getattr(module, name, None))
        if not callable(found):
            raise InputError(f"{path} has no adapter {name!r}{nearest(name, layers)}")
        layers = {name: found}
    if not layers:
        raise InputError(f"{path} defines neither `switch_layer` nor `ADAPTERS`")
    return {label: (layer, module) for label, layer in layers.items()}


def _declared(layer: Any, module: Any) -> dict[str, Any]:
    defaults = {"dialect": "mesh_tensorflow", "profile": "float32", "features": [], "limits": {}}
    return {key: getattr(layer, key, getattr(module, key.upper(), default)) for key, default in defaults.items()}


def of_file(path: Path, name: str, shown: str) -> list[Implementation]:
    """Return the adapters of a file; a fresh one is the file imported anew."""
    found = []
    for label, (layer, module) in _layers_of(path, name).items():
        target = target_of(_declared(layer, module), Options())
        found.append(implementation_of(f"{shown}::{label}", target, lambda label=label: _layers_of(path, label)[label][0]))
    return found


def implementations(text: str) -> list[Implementation]:
    """Return what `--refswitch` names: `reference`, `cpu`, either with `::NAME`, `FILE.py` or `FILE.py::NAME`.

    Raises
    ------
    InputError
        If there is nothing of that name, or what is there cannot be tested.
    """
    file, _, name = text.partition("::")
    if file == "reference":
        if name and name not in PLAYED:
            raise InputError(f"the reference plays no {name!r}{nearest(name, PLAYED)}")
        return [reference(part) for part in ([name] if name else PLAYED)]
    path, name = resolve_target(text)
    return of_file(path, name, path.name if path.suffix in file else file)
