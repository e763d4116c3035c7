# May import: standard library, numpy.
"""The World protocol: a rank among ranks, and the five things that they do together.

Spec: the chapter on expert parallelism. Every rank calls every collective, in the same order, with arrays of equal dtype; a world of one does so too,
so nobody above asks how many there are. Reductions add in the order of the ranks, so that a sum does not depend on the library underneath.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class World(Protocol):
    """What the engine knows of its ranks."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0 to size - 1."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def all_to_all(self, send: list[np.ndarray]) -> list[np.ndarray]:
        """Return what each rank sent to this one: recv@r[s] = send@s[r]."""

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        """Return the sum over ranks, added in their order: out@r = sum_s array@s."""

    def all_gather(self, array: np.ndarray) -> list[np.ndarray]:
        """Return every rank's array: out@r[s] = array@s."""

    def barrier(self) -> None:
        """Wait until every rank is here."""
