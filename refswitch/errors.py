# May import: nothing.
"""The three kinds of error that refswitch raises on purpose.

A caller's mistake is an `InputError`, a check that was made and failed is a `Mismatch`, and what cannot happen is a `Bug`.
The command line prints the first two in one line; a `Bug` keeps its traceback, because it is ours.
"""

from __future__ import annotations


class InputError(Exception):
    """The caller's mistake: the message says in one line what is wrong and what would be right."""


class Mismatch(Exception):
    """Two things that should agree do not."""


class Bug(Exception):
    """A state that refswitch believed impossible."""
