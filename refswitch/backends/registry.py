# May import: standard library, refswitch.backends, refswitch.records, refswitch.errors.
"""Backends by name. A backend's module is imported when it is asked for: the reference's user waits for no compiler."""

from __future__ import annotations

from refswitch.backends.protocol import Backend
from refswitch.errors import InputError
from refswitch.records import nearest

BACKENDS = ("reference",)


def backend(name: str) -> Backend:
    """Return the named backend.

    Raises
    ------
    InputError
        For an unknown name.
    """
    if name == "reference":
        from refswitch.backends import reference

        return reference
    raise InputError(f"unknown backend {name!r}{nearest(name, BACKENDS)}; known: {', '.join(BACKENDS)}")
