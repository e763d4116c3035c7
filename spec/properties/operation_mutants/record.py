# May import: standard library, properties.operations.
"""What a wrong operation is, and two ways to make one: a function in place of another, or the module's source with one passage changed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from properties.operations import Operations, public_functions, reference_modules, reference_operations


class OperationMutant(NamedTuple):
    """A reference that is wrong in one place."""

    name: str
    clause: str
    summary: str  # what is wrong, in a line
    make: Callable[[], Operations]


def operation_mutant(clause: str, replaces: str) -> Callable[[Callable[..., Any]], OperationMutant]:
    """Turn a function into the mutant of its name, its docstring being the summary.

    It stands in for the operation `replaces`, and is called with the correct one before the operation's own arguments.
    """

    def record(function: Callable[..., Any]) -> OperationMutant:
        def make() -> Operations:
            correct = reference_operations()
            wrong = functools.partial(function, correct.functions[replaces])
            return correct.replaced(function.__name__, **{replaces: wrong})

        return OperationMutant(function.__name__, clause, (function.__doc__ or "").split("\n")[0], make)

    return record


def edited(name: str, clause: str, place: str, old: str, new: str, summary: str) -> OperationMutant:
    """Return the mutant that a slip of the pen makes: in the source of `place` (module.function), `old`, which stands there once, becomes `new`."""

    def make() -> Operations:
        module = reference_modules()[place.partition(".")[0]]
        source, passage = inspect.getsource(module), inspect.getsource(getattr(module, place.partition(".")[2]))
        if passage.count(old) != 1:
            raise ValueError(f"{name}: {old!r} stands {passage.count(old)} times in {place}, should stand there once")
        changed = ModuleType(module.__name__)
        changed.__file__ = module.__file__
        exec(compile(source.replace(passage, passage.replace(old, new)), f"{module.__file__} ({name})", "exec"), changed.__dict__)
        return reference_operations().replaced(name, **public_functions(changed))

    return OperationMutant(name, clause, summary, make)
