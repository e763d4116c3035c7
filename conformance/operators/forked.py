# May import: standard library, mutate, properties.
"""One mutant, one process: the reference as it is loaded here is changed in a child, which then runs the properties until one fails.

What a child does cannot reach the next one. A property that takes longer than its limit ends its process: the mutant hangs, which is noticed.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest

from .mutate import MODULE, Mutant
from .properties import Property

PACKAGE = "refswitch.reference"
SECONDS = 20.0  # of the processor's time for one property: the slowest takes a few, and a busy machine takes none of it
MEMORY = 8 << 30  # bytes: a mutant that asks for more is noticed by the error


def apply(mutant: Mutant) -> None:
    """Make the mutant what everybody calls, in this process, for good.

    A function keeps its identity and gets other code, so whoever imported it by name calls the mutant; a constant is rebound everywhere.
    """
    module = sys.modules[f"{PACKAGE}.{mutant.file}"]
    namespace = dict(vars(module))
    code = compile(mutant.source, f"<{mutant.id}>", "exec", flags=annotations.compiler_flag, dont_inherit=True)
    exec(code, namespace)
    if mutant.function == MODULE:
        _rebind(module, namespace)
        return
    ours, theirs = getattr(module, mutant.function), namespace[mutant.function]
    assert isinstance(ours, FunctionType)
    ours.__code__, ours.__defaults__, ours.__kwdefaults__ = theirs.__code__, theirs.__defaults__, theirs.__kwdefaults__


def _rebind(module: ModuleType, namespace: dict[str, Any]) -> None:
    old = {name: value for name, value in vars(module).items() if namespace[name] is not value}
    for other in [other for name, other in sys.modules.items() if name.startswith("refswitch.")]:
        for name, value in old.items():
            if vars(other).get(name) is value:
                setattr(other, name, namespace[name])


class Verdict(NamedTuple):
    """What became of a mutant."""

    mutant: Mutant | None  # None: the reference as it is
    killer: str  # the property that failed, or nothing
    how: str  # "failed", the name of another error, or "hangs"
    seconds: float
    tried: int


def _work(mutant: Mutant | None, properties: list[Property], pipe: Connection) -> None:
    """Run the properties in the child; the pipe gets the number of each before it starts, and how it failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # nothing can catch it
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("error")  # as in the suite
    if mutant is not None:
        apply(mutant)
    for index, held in enumerate(properties):
        pipe.send(index)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        how = outcome_of(held.run)
        if how:
            pipe.send(how)
            break
    else:
        pipe.send("")
    pipe.close()
    os._exit(0)


def outcome_of(run: Callable[[], None]) -> str:
    """Return nothing where a property holds or does not speak, else what it failed with."""
    try:
        run()
    except pytest.skip.Exception:
        return ""
    except (AssertionError, pytest.fail.Exception):
        return "failed"
    except BaseException as error:  # noqa: BLE001
        return type(error).__name__
    return ""


class _Child:
    """A process at work."""

    def __init__(self, mutant: Mutant | None, properties: list[Property]) -> None:
        self.mutant, self.properties, self.index, self.how = mutant, properties, -1, None
        self.started = time.perf_counter()
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(target=_work, args=(mutant, properties, theirs))
        self.process.start()
        theirs.close()

    def read(self) -> Verdict | None:
        """Take what the child has sent; return the verdict when it is there."""
        try:
            message = self.pipe.recv()
        except EOFError:  # ended by the timer, or by a crash of the interpreter
            self.process.join()
            message = "hangs" if self.process.exitcode == -signal.SIGPROF else f"exit status {self.process.exitcode}"
        if isinstance(message, int):
            self.index = message
            return None
        self.process.join()
        self.pipe.close()
        killer = self.properties[self.index].name if message and self.properties else ""
        return Verdict(self.mutant, killer, message, time.perf_counter() - self.started, self.index + 1)

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.join()


def verdicts(mutants: Iterable[Mutant | None], properties_of: Callable[[Mutant | None], list[Property]], processes: int) -> Iterator[Verdict]:
    """Yield what becomes of each mutant, as soon as it is known; `properties_of` is asked when a mutant's turn comes."""
    waiting, running = deque(mutants), {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                mutant = waiting.popleft()
                child = _Child(mutant, properties_of(mutant))
                running[child.pipe] = child
            for pipe in wait(list(running)):
                verdict = running[pipe].read()
                if verdict is not None:
                    del running[pipe]
                    yield verdict
    finally:
        for child in running.values():
            child.end()
