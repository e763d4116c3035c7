# May import: standard library, numpy, refswitch.reference, refswitch.spec_data, refswitch.records, refswitch.config, and what lies below.
"""Precision of a whole model as one setting: forward, backward and update. Paper: 2.4, table 2. Spec: numbers.

The reference computes in float64 and rounds where a value is stored. A setting says to which format, for the weights as they are stored and as
products read them, for what operations hand on, for the router and its counts, for gradients, and for what the optimizer keeps.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np

from refswitch.config import Dialect, ModelPoints, RoundingPoints, rounding_points
from refswitch.errors import InputError
from refswitch.numbers.precision import FORMATS, Format, round_to
from refswitch.records import nearest
from refswitch.reference.transformer import ModelParams
from refswitch.spec_data import load_profile
from refswitch.tree import leaves, with_leaves

T = TypeVar("T", bound=tuple)
F64, F32, BF16 = (FORMATS[name] for name in ("float64", "float32", "bfloat16"))


class Precision(NamedTuple):
    """One setting."""

    name: str
    profile: str  # of the Switch layers (spec/profiles)
    positions: Format  # in which slots are counted
    around: ModelPoints  # everything else in forward and backward
    weights: Format  # as they are stored and updated
    read: Format  # as products read them
    weight_gradients: Format
    optimizer: Format  # what the optimizer keeps; its arithmetic is float64


PRECISIONS = {
    setting.name: setting
    for setting in (
        Precision("float64", "float64", F64, ModelPoints(F64, F64, F64, F64), F64, F64, F64, F64),
        Precision("float32", "float32", F32, ModelPoints(F32, F32, F32, F32), F32, F32, F32, F32),
        # bfloat16 but for the router, statistics and loss (paper 2.4); weights are stored in bfloat16, as Mesh TensorFlow's master copy is by default
        Precision("selective", "bfloat16", F32, ModelPoints(BF16, F32, F32, BF16), BF16, BF16, F32, F32),
        # table 2's first row: the router, its counts and the statistics too
        Precision("bfloat16", "bfloat16_naive", BF16, ModelPoints(BF16, BF16, BF16, BF16), BF16, BF16, BF16, BF16),
        # selective, with a float32 copy of the weights that the optimizer updates
        Precision("selective_master", "bfloat16", F32, ModelPoints(BF16, F32, F32, BF16), F32, BF16, F32, F32),
    )
}


def precision(name: str) -> Precision:
    """Return a setting.

    Raises
    ------
    InputError
        For an unknown name.
    """
    if name not in PRECISIONS:
        raise InputError(f"unknown precision {name!r}{nearest(name, PRECISIONS)}; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def layer_points(dialect: Dialect, setting: Precision) -> RoundingPoints:
    """Return the rounding points of a Switch layer under a setting: its profile's, with the setting's counts and gradients."""
    points = rounding_points(dialect, load_profile(setting.profile))
    return points._replace(positions=setting.positions, gradients=setting.around.gradients)


def rounded(tree: T, format: Format) -> T:
    """Return a tree with every array rounded."""
    return with_leaves(tree, {path: round_to(np.asarray(leaf), format) for path, leaf in leaves(tree).items()})


def weights_as_read(params: ModelParams, setting: Precision) -> ModelParams:
    """Return the weights that forward and backward read; the rounding has derivative 1."""
    return rounded(params, setting.read)


def stored_gradients(gradients: ModelParams, setting: Precision) -> ModelParams:
    """Return the weights' gradients as the optimizer gets them."""
    return rounded(gradients, setting.weight_gradients)


def stored_weights(params: ModelParams, setting: Precision) -> ModelParams:
    """Return updated weights as they are stored: where that is bfloat16, an update below half a unit in the last place is lost."""
    return rounded(params, setting.weights)
