# May import: standard library, refswitch.
"""The operations around the layer as something under test: a namespace of the reference's names, whose functions can be replaced one by one."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

PACKAGES = ("refswitch.reference", "refswitch.numbers")
NOT_OPERATIONS = ("refswitch.numbers.rational", "refswitch.reference.router")  # an instrument; and the layer's own, whose logits are the layer's


@dataclass(frozen=True)
class Operations:
    """Functions by name, as attributes; what a property met is counted in `met`."""

    label: str
    functions: Mapping[str, Callable[..., Any]]
    met: Counter[str] = field(default_factory=Counter)
    profile: str = "float64"  # of spec/profiles: how they compute between rounding points, from which radii follow

    def __repr__(self) -> str:
        return self.label

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self.functions:
            raise AttributeError(f"{self.label} has no operation {name}")
        self.met["cases"] += 1
        return self.functions[name]

    def meets(self, trigger: str, holds: Any = True) -> None:
        """Say that an example was in a regime, where it was: what `needs` asks for must have been met in one example at least."""
        self.met[trigger] += bool(holds)

    def fresh(self) -> Operations:
        """Return the operations as they are before their first call: they are pure functions."""
        return self

    def watched(self) -> Operations:
        """Return them with an empty record of what was met."""
        return replace(self, met=Counter())

    def replaced(self, label: str, **functions: Callable[..., Any]) -> Operations:
        """Return them with other functions of some names."""
        unknown = sorted(set(functions) - set(self.functions))
        if unknown:
            raise ValueError(f"{label}: there is no operation {unknown[0]}")
        return Operations(label, {**self.functions, **functions}, profile=self.profile)


def public_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the functions that a module defines and does not hide."""
    return {
        name: value for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }


@cache
def reference_modules() -> dict[str, ModuleType]:
    """Return the modules of the reference whose functions are operations, by their last name."""
    names = [f"{package}.{found.name}" for package in PACKAGES for found in iter_modules(import_module(package).__path__)]
    return {name.rpartition(".")[2]: import_module(name) for name in names if name not in NOT_OPERATIONS}


def reference_operations() -> Operations:
    """Return the reference's operations as they are now."""
    return Operations(
        "reference", {name: found for module in reference_modules().values() for name, found in public_functions(module).items()}, Counter()
    )


def operations_of(label: str, backend: object, profile: str) -> Operations:
    """Return the operations of a backend: its public callables, by the reference's names; and the profile in which it computes."""
    names = [name for name in dir(backend) if name[0] != "_" and callable(getattr(backend, name))]
    return Operations(label, {name: getattr(backend, name) for name in names}, profile=profile)
