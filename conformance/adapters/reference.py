"""refswitch's own reference as an adapter: in float64, float32 and simulated bfloat16, and playing any dialect record.

`refswitch verify reference` judges the base dialect; `refswitch verify reference::hf_ge_5_18` lets it play that record, and judges it so.
The reference is judged like anybody else: the judge's tubes are a second, independent evaluation.
May import: numpy, refswitch.
"""

from functools import partial

import numpy as np

from refswitch.config import rounding_points
from refswitch.spec_data import load_dialect, load_profile, names_of
from refswitch.verify.oracle import reference_outputs

FEATURES = ["backward", "aux_loss", "z_loss", "noise", "padding", "groups", "bias", "gated", "expert_dropout", "empty"]


def play(case, dialect_name, profile_name):
    """Run the reference on a case in the given dialect and numerics."""
    dialect, profile = load_dialect(dialect_name), load_profile(profile_name)
    outputs = reference_outputs(case, dialect, rounding_points(dialect, profile))
    return {name: np.asarray(value) for name, value in outputs.items()}


def player(dialect_name, profile_name):
    """The reference as one adapter, with its claim."""
    layer = partial(play, dialect_name=dialect_name, profile_name=profile_name)
    layer.dialect, layer.profile = dialect_name, profile_name
    return layer


ADAPTERS = {name: player("mesh_tensorflow", name) for name in ("float64", "float32", "bfloat16")}
globals().update({name: player(name, "float64") for name in names_of("dialects")})
