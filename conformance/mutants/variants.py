# May import: numpy, the standard library, the subject's files and record.
"""All correct layers: every legal order, dispatch and format, and rewrites that look like faults and are none."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import forward
from .dispatch import FORMS
from .products import NUMERICS, ORDERS
from .record import OWN_CAPACITY
from .subject import Stages, make
from .tape import one_hot


class Variant(NamedTuple):
    """A layer that is right."""

    name: str
    profile: str
    exports: str
    make: Callable  # () -> layer


def legal_orders(profile):
    """List the orders of summing that a profile allows: toward zero in bfloat16 alone."""
    return [order for order in ORDERS if order != ("blocked16" if profile == "bfloat16" else "blocked16_truncating")]


def variants():
    """Yield every legal combination."""
    for profile in NUMERICS:
        for order in legal_orders(profile):
            for dispatch in FORMS:
                for exports in ("all", "black_box"):
                    settings = {"order": order, "dispatch": dispatch, "numerics": profile, "exports": exports}
                    yield Variant("-".join((profile, order, dispatch, exports)), profile, exports, functools.partial(make, **settings))


# equivalent rewrites


def gate_masked_twice(tape):
    """Multiply the gate by the mask of who is kept, once more than it needs (CMB10)."""
    return forward.gate(tape) * tape.kept_GS * tape.kept_GS


def keep_where_weighed(tape):
    """Keep who has a weight in the combine tensor (CMB11): a chosen probability is never 0."""
    return forward.keep(tape) & (forward.gate(tape) > 0)


def aux_as_mean_of_products(tape):
    """Scale the mean over experts by E^2 instead of the sum by E."""
    mean_G = (tape.fraction_GE * tape.mean_prob_GE).mean(1)
    return (tape.valid_fraction_G * tape.dtype(tape.E) ** 2 * mean_G).mean(dtype=tape.dtype)


def gate_by_einsum(tape):
    """Pick the chosen probability with a one-hot product."""
    return (tape.probs_GSE * one_hot(tape, tape.expert_GS)).sum(-1)


def relu_slope_one_at_zero(tape):
    """Take 1 for the derivative of ReLU at 0, where anything in [0, 1] is right."""
    if tape.case.get("activation") != "relu" or tape.pre_gate_GSF is not None:
        return Stages().dpre_in_GSF(tape)
    return np.where(tape.pre_in_GSF >= 0, tape.dactivated_GSF, 0)


def capacity_by_expression(tape):
    """Compute the capacity from its factor as the dialect does."""
    return max(min(tape.S, int(tape.S * float(tape.case["capacity_factor"]) / tape.E)), 4)


REWRITES = {
    "gate_masked_twice": {"stages": Stages(gate_GS=gate_masked_twice)},
    "keep_where_weighed": {"stages": Stages(kept_GS=keep_where_weighed)},
    "aux_as_mean_of_products": {"stages": Stages(aux_loss=aux_as_mean_of_products)},
    "gate_by_einsum": {"stages": Stages(gate_GS=gate_by_einsum)},
    "relu_slope_one_at_zero": {"stages": Stages(dpre_in_GSF=relu_slope_one_at_zero)},
    "own_capacity": {"stages": Stages(capacity=capacity_by_expression), "features": OWN_CAPACITY},
}


def rewrites():
    """Yield the rewrites in every format."""
    for profile in NUMERICS:
        for name, settings in REWRITES.items():
            for exports in ("all", "black_box"):
                layer = functools.partial(make, numerics=profile, exports=exports, **settings)
                yield Variant("-".join((profile, name, exports)), profile, exports, layer)


VARIANTS = [*variants(), *rewrites()]
