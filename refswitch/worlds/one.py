# May import: standard library, numpy, refswitch.worlds.
"""The world of one process: every collective is the identity, and its results are the arrays that it was given."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class One(NamedTuple):
    """One rank that is all ranks."""

    rank: int = 0
    size: int = 1

    def all_to_all(self, send: list[np.ndarray]) -> list[np.ndarray]:
        """Return what was sent: recv@0[0] = send@0[0]."""
        assert len(send) == self.size
        return send

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        """Return the array, the sum of one."""
        return array

    def all_gather(self, array: np.ndarray) -> list[np.ndarray]:
        """Return the array alone."""
        return [array]

    def barrier(self) -> None:
        """Return at once: everybody is here."""


ONE = One()
