# May import: numpy, the standard library, products.
"""The tape: what every stage reads, and the few operations that many stages share."""

from types import SimpleNamespace

import numpy as np

from .products import matmul

ARRAYS = {  # the contract's names of a case's arrays, under the names of the tape
    "x": "raw_x_GSD",
    "w_router": "w_router_DE",
    "b_router": "b_router_E",
    "w_in": "w_in_EDF",
    "w_gate": "w_gate_EDF",
    "w_out": "w_out_EFD",
    "b_in": "b_in_EF",
    "b_gate": "b_gate_EF",
    "b_out": "b_out_ED",
    "noise": "noise_GSD",
    "hidden_mask": "hidden_mask_GSF",
    "dout": "dout_GSD",
    "daux": "daux",
    "dz": "dz",
}


class Tape(SimpleNamespace):
    """What a stage may read: the case's arrays (None where absent), the arithmetic, and the results so far."""


def read(case, order, form, numerics):
    """Start a tape for a case."""
    tape = Tape(case=case, form=form, numerics=numerics, dtype=numerics.dtype)
    for name, field in ARRAYS.items():
        value = case.get(name)
        setattr(tape, field, None if value is None else np.asarray(value, tape.dtype))
    tape.daux, tape.dz = (tape.dtype(0) if v is None else v for v in (tape.daux, tape.dz))
    tape.G, tape.S, _ = tape.raw_x_GSD.shape
    tape.E = tape.w_router_DE.shape[1]
    valid_GS = case.get("valid")
    tape.valid_GS = np.ones((tape.G, tape.S), bool) if valid_GS is None else np.asarray(valid_GS, bool)
    tape.times = lambda a, b: matmul(a, b, order)
    return tape


def by_expert(tape, a_GSD, w_EDF):
    """Multiply each token's row by the matrix of its expert; 0 without a slot."""
    return tape.form.product(tape, flat(a_GSD), w_EDF).reshape(tape.G, tape.S, w_EDF.shape[-1])


def sum_by_expert(tape, a_GSD, b_GSF):
    """Sum over each expert's tokens the outer products of their rows."""
    return tape.form.outer(tape, flat(a_GSD), flat(b_GSF))


def flat(a_GSD):
    """Join groups and tokens."""
    G, S, D = a_GSD.shape
    return a_GSD.reshape(G * S, D)


def bias_gradient(tape, b_GSF):
    """Sum over each expert's tokens their rows."""
    return sum_by_expert(tape, np.ones((tape.G, tape.S, 1), tape.dtype), b_GSF)[:, 0]


def at_expert(v_GSE, expert_GS):
    """Pick each token's value at its expert."""
    return np.take_along_axis(v_GSE, expert_GS[..., None], -1)[..., 0]


def one_hot(tape, expert_GS):
    """Mark each token's expert with 1."""
    return (expert_GS[..., None] == np.arange(tape.E)).astype(tape.dtype)


def ratio(part, count):
    """Divide by a count in the dtype of the part; nothing out of nothing is 0."""
    return part / max(int(count), 1)
