# May import: standard library.
"""What an operation says when it refuses its arguments; `pytest.raises` would end a hunt for mutants instead of failing in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def refusal(call: Callable[[], Any]) -> str:
    """Return the message with which a call raises ValueError or TypeError, or nothing where it does not."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return ""
