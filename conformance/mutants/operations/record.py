# May import: standard library.
"""What a wrong operation is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Mutant(NamedTuple):
    """A wrong copy of one function of the reference."""

    name: str
    clause: str  # that it breaks, of spec/clauses.yaml
    function: str  # that it stands in for
    wrong: Callable[..., Any]  # with the same arguments
    link: str = ""  # where it is a real bug
    trigger: str = ""  # what it takes to show; nothing where any call shows it
