# May import: numpy, the standard library, dispatch, forward, gradients, products, tape.
"""A Switch layer that is right, as a table of small stages that can be replaced one at a time.

A stage is a function of the tape, which holds the case and the results of the stages before it; its own result is put on the tape under its
name in `Stages`, which is the whole layer in order of execution.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import forward, gradients
from .dispatch import FORMS
from .products import NUMERICS
from .tape import Tape, read

DIALECT = "mesh_tensorflow"
FEATURES = ("backward", "aux_loss", "z_loss", "noise", "padding", "groups", "bias", "gated", "expert_dropout", "empty")
Stage = Callable[[Tape], np.ndarray]


class Stages(NamedTuple):
    """The layer: each field is computed by its function, in this order, and put on the tape under the field's name."""

    x_GSD: Stage = forward.zero_padding
    router_x_GSD: Stage = forward.perturb
    logits_GSE: Stage = forward.logits
    probs_GSE: Stage = forward.probs
    expert_GS: Stage = forward.choose
    routed_GS: Stage = forward.claims
    slot_GS: Stage = forward.slots
    capacity: Stage = forward.given_capacity
    kept_GS: Stage = forward.keep
    gate_GS: Stage = forward.gate
    expert_x_GSD: Stage = forward.expert_input
    plan: Stage = forward.plan
    pre_in_GSF: Stage = forward.pre_in
    pre_gate_GSF: Stage = forward.pre_gate
    hidden_GSF: Stage = forward.hidden
    expert_out_GSD: Stage = forward.expert_out
    combined_GSD: Stage = forward.combine
    out_GSD: Stage = forward.output
    fraction_GE: Stage = forward.fractions
    mean_prob_GE: Stage = forward.mean_probs
    valid_fraction_G: Stage = forward.valid_fractions
    aux_loss: Stage = forward.aux_loss
    lse_GS: Stage = forward.log_partition
    z_loss: Stage = forward.z_loss
    dexpert_out_GSD: Stage = gradients.dexpert_out
    dgate_GS: Stage = gradients.dgate
    dw_out_EFD: Stage = gradients.dw_out
    db_out_ED: Stage = gradients.db_out
    dactivated_GSF: Stage = gradients.dactivated
    dpre_in_GSF: Stage = gradients.dpre_in
    dpre_gate_GSF: Stage = gradients.dpre_gate
    dw_in_EDF: Stage = gradients.dw_in
    db_in_EF: Stage = gradients.db_in
    dw_gate_EDF: Stage = gradients.dw_gate
    db_gate_EF: Stage = gradients.db_gate
    dx_expert_GSD: Stage = gradients.dx_expert
    dprobs_gate_GSE: Stage = gradients.dprobs_gate
    dprobs_aux_GSE: Stage = gradients.dprobs_aux
    dlogits_z_GSE: Stage = gradients.dlogits_z
    dlogits_GSE: Stage = gradients.dlogits
    dw_router_DE: Stage = gradients.dw_router
    db_router_E: Stage = gradients.db_router
    dx_router_GSD: Stage = gradients.dx_router
    dx_GSD: Stage = gradients.dx


VALUES = {  # the contract's names of results, for who looks from outside
    "out": "out_GSD",
    "aux_loss": "aux_loss",
    "z_loss": "z_loss",
}
INSIDE = {  # and for who looks inside
    "logits": "logits_GSE",
    "probs": "probs_GSE",
    "expert": "expert_GS",
    "slot": "slot_GS",
    "kept": "kept_GS",
    "gate": "gate_GS",
    "hidden": "hidden_GSF",
    "expert_out": "expert_out_GSD",
}
GRADIENTS = {
    "dx": "dx_GSD",
    "dw_router": "dw_router_DE",
    "dw_in": "dw_in_EDF",
    "dw_gate": "dw_gate_EDF",
    "dw_out": "dw_out_EFD",
    "db_router": "db_router_E",
    "db_in": "db_in_EF",
    "db_gate": "db_gate_EF",
    "db_out": "db_out_ED",
}
FORWARD = Stages._fields[: Stages._fields.index("z_loss") + 1]


def make(stages=None, order="blas", dispatch="gather", numerics="float32", exports="all", dialect=DIALECT, features=FEATURES):
    """Make a layer that can be put under test.

    Parameters
    ----------
    stages : Stages, the table of functions; by default all of them right
    order : str or function, a name of `products.ORDERS`, or a product (a, b) of its own
    dispatch : str or Form, a name of `dispatch.FORMS`, or a form of its own
    numerics : str or Numerics, a name of `products.NUMERICS`, or formats of its own
    exports : str, "all" results or "black_box": none from the inside
    dialect, features : what the layer declares, as in the contract

    Returns
    -------
    function of a case, with the attributes `dialect`, `profile` and `features`
    """
    table = Stages() if stages is None else stages
    form = FORMS[dispatch] if isinstance(dispatch, str) else dispatch
    formats = NUMERICS[numerics] if isinstance(numerics, str) else numerics
    looked_at = {"all": VALUES | INSIDE | GRADIENTS, "black_box": VALUES | GRADIENTS}[exports]

    def layer(case):
        tape = run(case, table, order, form, formats)
        results = {name: getattr(tape, field, None) for name, field in looked_at.items()}
        return {name: np.asarray(value) for name, value in results.items() if value is not None}

    layer.dialect, layer.profile, layer.features = dialect, formats.profile, list(features)
    return layer


def run(case, stages, order, form, numerics):
    """Fill a tape: all stages where the case asks for gradients, else the forward ones."""
    tape = read(case, order, form, numerics)
    backward = tape.dout_GSD is not None
    with np.errstate(all="ignore"):  # a mutant may overflow; the judge sees what comes of it
        for field in Stages._fields if backward else FORWARD:
            setattr(tape, field, getattr(stages, field)(tape))
    return tape
