# May import: standard library, numpy, pytest, hypothesis, refswitch, properties.
"""`pytest spec`: the options, what is under test, and what the run reports at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
from properties import harness
from properties.harness import PROPERTIES, RECORD
from properties.implementation import Implementation, implementations
from properties.operations import Operations, operations_of, reference_operations

from refswitch.backends.registry import BACKENDS, backend
from refswitch.errors import InputError
from refswitch.spec_data import every_clause, load_clauses, load_operations

LAYERS = pytest.StashKey[list[Implementation]]()
OPERATIONS = pytest.StashKey[list[Operations]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what is under test, and how much of it."""
    group = parser.getgroup("refswitch")
    group.addoption(
        "--refswitch",
        default="reference",
        metavar="TARGET",
        help="what spec/properties tests: reference, cpu, either with ::NAME, FILE.py or FILE.py::NAME (imported into this process)",
    )
    group.addoption("--all-variants", action="store_true", help="hold every correct variant to spec/properties, not a sample (half an hour)")


def pytest_configure(config: pytest.Config) -> None:
    """Take the profile that hypothesis was given, else the suite's."""
    name = config.getoption("--hypothesis-profile", default=None)
    if name:
        harness.PROFILE[0] = name
    if config.getoption("--refswitch") != "reference":
        _implementations(config)  # a name that nobody has is a usage error, before anything is collected


def _implementations(config: pytest.Config) -> list[Implementation]:
    """Return the layers under test, found once."""
    if LAYERS not in config.stash:
        try:
            config.stash[LAYERS] = implementations(config.getoption("--refswitch"))
        except InputError as error:
            raise pytest.UsageError(f"--refswitch: {error}") from None
    return config.stash[LAYERS]


def _operations(config: pytest.Config) -> list[Operations]:
    """Return the operations under test, found once: the reference's or a backend's; a file's adapters have none, being layers."""
    if OPERATIONS not in config.stash:
        target = config.getoption("--refswitch")
        config.stash[OPERATIONS] = []
        if target == "reference":
            config.stash[OPERATIONS] = [reference_operations()]
        elif target in BACKENDS:
            found = backend(target)
            threads = ExitStack()
            threads.enter_context(found.running())
            config.add_cleanup(threads.close)
            config.stash[OPERATIONS] = [operations_of(target, found, np.dtype(found.dtype).name)]
    return config.stash[OPERATIONS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each property on each implementation of what it is about."""
    for fixture, find in (("implementation", _implementations), ("operations", _operations)):
        if fixture in metafunc.fixturenames:
            found = find(metafunc.config)
            metafunc.parametrize(fixture, found, ids=[subject.label for subject in found], scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the properties of operations where none are under test; and of what is no property where it is not the reference that is."""
    subjects = {"implementation"} | ({"operations"} if _operations(config) else set())
    unasked = {item for item in items if not subjects & set(getattr(item, "fixturenames", ()))}
    if config.getoption("--refswitch") == "reference" or config.getoption("--all-variants"):
        unasked = {item for item in unasked if "operations" in getattr(item, "fixturenames", ())}
    config.hook.pytest_deselected(items=list(unasked))
    items[:] = [item for item in items if item not in unasked]


def _counted(names: list[str]) -> str:
    return ", ".join(f"{name} {count}" if count > 1 else name for name, count in Counter(names).most_common())


def _say_what_was_played(write: Callable[[str], None]) -> None:
    """Say which clauses were tested on what, and in which regimes the calls were."""
    met: Counter[str] = Counter()
    for _, _, counts in RECORD.played:
        met.update(counts)
    played, labels = {name for name, _, _ in RECORD.played}, sorted({label for _, label, _ in RECORD.played})
    clauses, subjects = ({one for name in played for one in PROPERTIES[name].clauses}, {PROPERTIES[name].subject for name in played})
    write(f"{len(clauses)} of {len(every_clause())} clauses by {len(played)} properties on {', '.join(labels)}: {met.pop('cases', 0)} calls")
    write(f"calls in each regime: {', '.join(f'{name} {count}' for name, count in met.most_common())}")
    asked = (load_clauses() if "implementation" in subjects else {}) | (load_operations() if "operations" in subjects else {})
    untold = sorted(set(asked) - clauses)
    if untold:
        write(f"not spoken of in this run: {', '.join(untold)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was exercised: clauses, properties, calls, what was never met, which property noticed which mutant."""
    if not RECORD.played and not RECORD.kills:
        return
    write = terminalreporter.write_line
    terminalreporter.section("clauses, properties, mutants")
    if RECORD.played:
        _say_what_was_played(write)
    for line in RECORD.vacuous:
        write(f"vacuous: {line}")
    if RECORD.kills:
        by_property: dict[str, list[str]] = {}
        for mutant, names in RECORD.kills.items():
            for name in names:
                by_property.setdefault(name, []).append(mutant)
        write(f"{len(RECORD.kills)} mutants noticed, {len(RECORD.spared)} not; noticed by")
        for name, mutants in sorted(by_property.items(), key=lambda item: -len(item[1])):
            write(f"  {name}{' (oracle)' if PROPERTIES[name].is_oracle else ''}: {_counted(mutants)}")
    for name in RECORD.spared:
        write(f"not noticed: {name}")
