# May import: standard library, refswitch.backends, refswitch.records, refswitch.errors.
"""Backends by name. A backend's module is imported when it is asked for: the reference's user waits for no compiler."""

from __future__ import annotations

from refswitch.backends.protocol import Backend
from refswitch.errors import InputError
from refswitch.records import nearest

BACKENDS = ("reference", "cpu")


def backend(name: str, threads: int | None = None) -> Backend:
    """Return the named backend; each call of `cpu` has buffers of its own.

    Parameters
    ----------
    name : str
        One of BACKENDS.
    threads : int, optional
        On how many threads kernels run; by default one per core. NumPy under `reference` has its own.

    Raises
    ------
    InputError
        For an unknown name.
    """
    if name == "reference":
        from refswitch.backends import reference

        return reference
    if name == "cpu":
        from refswitch.backends.cpu import Cpu

        return Cpu(threads)
    raise InputError(f"unknown backend {name!r}{nearest(name, BACKENDS)}; known: {', '.join(BACKENDS)}")
