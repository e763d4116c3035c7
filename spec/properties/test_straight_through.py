# May import: standard library, numpy, refswitch, its own folder.
"""The gate that is 1 and learns as p / stop_gradient(p), by hand: S-GATE-1, S-BACK-2."""

from __future__ import annotations

import numpy as np

from properties.harness import clause, draws, needs
from properties.operations import Operations
from refswitch.config import TRUTH
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.switch import Statics, SwitchInputs, SwitchParams
from refswitch.spec_data import load_dialect

RATIO = load_dialect({"base": "mesh_tensorflow", "gate.value": "ratio_st", "pad.route": "expert0_weight0", "pad.zero_input": False})


def layer(operations: Operations, x_S: list[float], valid_S: list[bool], w_router_E: list[float], dout_S: list[float]) -> tuple[np.ndarray, ...]:
    """Return gate, dx and dw_router of two experts of one number, which return their input where it is positive."""
    S = len(x_S)
    ones, none = np.ones((1, S, 1)), np.zeros((1, S, 2))
    inputs = SwitchInputs(np.array(x_S).reshape(1, S, 1), np.array([valid_S]), ones, none, none, np.arange(S)[None], ones)
    w, zeros = np.ones((2, 1, 1)), np.zeros((2, 1))
    params = SwitchParams(np.array([w_router_E]), np.zeros(2), ExpertsParams(w, None, w, zeros, zeros, zeros), np.zeros(1))
    statics = Statics(RATIO, TRUTH, "relu", S)
    outputs, saved = operations.switch_forward(inputs, params, statics)
    dx_GSD, dparams = operations.switch_backward(np.array(dout_S).reshape(1, S, 1), 0.0, 0.0, saved, params, statics)
    return outputs.gate_GS[0], dx_GSD[0, :, 0], dparams.w_router_DE[0]


@clause("S-GATE-1", "S-BACK-2")
@needs(wide=True)
@draws()
def test_switch_backward__of_a_ratio(operations: Operations) -> None:
    """At equal probabilities d logit = dgate (1/p) p (1 - p) = dgate / 2, also where dgate is 1; the other logit gets its negative."""
    for x, dout in ((1.0, 1.0), (2.0, 1.0), (2.0, -4.0)):
        gate_S, dx_S, dw_E = layer(operations, [x], [True], [0.0, 0.0], [dout])
        dgate = dout * x  # the expert returns x
        assert gate_S.tolist() == [1.0]
        assert dw_E.tolist() == [x * dgate / 2.0, -x * dgate / 2.0]
        assert dx_S.tolist() == [dout]


@clause("S-PAD-1", "S-BACK-2")
@needs(wide=True)
@draws()
def test_switch_backward__of_a_ratio_with_probability_0(operations: Operations) -> None:
    """Padding that is sent to expert 0 may have probability 0 there: it sits out, so there is no quotient and no gradient."""
    _, dx_S, dw_E = layer(operations, [1.0, 1.0], [True, False], [-2000.0, 0.0], [1.0, 1.0])
    assert dx_S.tolist() == [1.0, 0.0]
    assert dw_E.tolist() == [0.0, 0.0]
