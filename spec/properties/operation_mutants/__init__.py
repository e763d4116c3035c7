# May import: standard library, its own folder.
"""Wrong operations, each filed under the clause that it breaks: the proof that the properties of operations bite. One file for each chapter."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from properties.operation_mutants.record import OperationMutant


@cache
def operation_mutants() -> list[OperationMutant]:
    """Return all of them, in the order of the files; a file holds them one by one, or in lists."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__) if found.name != "record"]
    held = [value if isinstance(value, list) else [value] for module in modules for value in vars(module).values()]
    return [value for values in held for value in values if isinstance(value, OperationMutant)]
