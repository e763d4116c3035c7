# May import: the standard library, numpy, record, refswitch.
"""Wrong norms."""

from typing import Any

import numpy as np

from refswitch.reference.norm import norm_forward

from .record import Mutant


def _with_an_offset(x_BLD: np.ndarray, scale_D: np.ndarray, epsilon: float, points: Any) -> Any:
    return norm_forward(x_BLD, 1.0 + scale_D, epsilon, points)


MUTANTS = (Mutant("norm_scale_plus_one", "T-NORM-1", "norm_forward", _with_an_offset, link="Gemma's norm, taken for T5's"),)
