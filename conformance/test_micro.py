# May import: standard library, numpy, pytest, refswitch.
"""Micro-tests: one small case each, on which the named dialects part company. T1 to T3, T11 and T17 are in `test_golden`.

A closed form and the reference's own order of evaluation may differ by a few roundings of float64: 2**-50 is eight of them.
T7 (the jitter leak) is seen on the real package in `test_adapters`; T14 and T15 are about training runs, not about one layer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from refswitch.config import TRUTH
from refswitch.spec_data import load_dialect, with_knob
from refswitch.verify.case import Case
from refswitch.verify.oracle import reference_outputs

LOG_ODDS = 40.0  # a router weight that makes the choice certain


def one_hot_case(expert_GS: np.ndarray, E: int, capacity: int, **arrays: Any) -> Case:
    """Return a case whose tokens choose the given experts, with experts that double their input."""
    G, S = expert_GS.shape
    D = E + 1
    x_GSD = np.zeros((G, S, D))
    np.put_along_axis(x_GSD, expert_GS[..., None], 1.0, axis=-1)
    x_GSD[..., E] = 1.0 + np.arange(G * S).reshape(G, S)  # tells the tokens apart, and the router does not look at it
    w_router_DE = np.zeros((D, E))
    w_router_DE[:E] = np.eye(E) * LOG_ODDS
    w_in_EDF = np.broadcast_to(np.eye(D), (E, D, D)).copy()
    scalars = {"capacity": capacity, "capacity_factor": "1.0", "top_k": 1, "train": False, "activation": "relu", "wants": ("out",)}
    own = {"x": x_GSD, "w_router": w_router_DE, "w_in": w_in_EDF, "w_out": 2.0 * w_in_EDF}
    return Case(scalars, own | arrays)


def outputs_of(case: Case, dialect: str, **knobs: object) -> dict[str, np.ndarray]:
    """Run the reference in float64 as a dialect, with knobs changed (`drop__output="x"`)."""
    record = load_dialect(dialect)
    for knob, value in knobs.items():
        record = with_knob(record, knob.replace("__", "."), value)
    return reference_outputs(case, record, TRUTH)


def test_t4__dropped_tokens_in_the_balance_loss() -> None:
    """f before dropping counts five tokens on expert 1; up to transformers 4.57 the three dropped ones count for expert 0."""
    case = one_hot_case(np.array([[1, 1, 1, 1, 1, 0, 2, 2]]), E=3, capacity=2)
    f_before = np.array([1, 5, 2]) / 8
    f_after = np.array([4, 2, 2]) / 8
    probs_GSE = outputs_of(case, "hf_ge_5_18")["probs"]
    P_E = probs_GSE.mean(axis=(0, 1))
    assert outputs_of(case, "hf_ge_5_18")["aux_loss"] == pytest.approx(3 * f_before @ P_E, rel=2**-50)
    assert outputs_of(case, "hf_4_57")["aux_loss"] == pytest.approx(3 * f_after @ P_E, rel=2**-50)


def test_t5__balance_loss_under_padding() -> None:
    """Mesh weighs each group by its share of real tokens and counts padding as uniform rows that choose expert 0; masked forms differ."""
    valid_GS = np.array([[True] * 8, [True] * 5 + [False] * 3])
    case = one_hot_case(np.array([[0, 1, 2, 0, 1, 2, 0, 1], [2, 2, 1, 1, 0, 0, 0, 0]]), E=3, capacity=8, valid=valid_GS)
    found = outputs_of(case, "mesh_tensorflow")
    f_GE = np.array([[3, 3, 2], [1 + 3, 2, 2]]) / 8
    P_GE = found["probs"].mean(axis=1)
    assert P_GE[1, 0] == pytest.approx((1 + 3 / 3) / 8, rel=2**-50)
    terms_G = 3 * np.sum(f_GE * P_GE, axis=1)
    assert found["aux_loss"] == pytest.approx(np.mean(terms_G * [1.0, 5 / 8]), rel=2**-50)
    unweighed = outputs_of(case, "mesh_tensorflow", aux__pad_scale="none")["aux_loss"]
    masked = outputs_of(case, "mesh_tensorflow", aux__f__pads="exclude", aux__P_pads="exclude", aux__denom="valid", aux__pad_scale="none")["aux_loss"]
    assert unweighed == pytest.approx(np.mean(terms_G), rel=2**-50)
    assert len({round(float(value), 6) for value in (found["aux_loss"], unweighed, masked)}) == 3


def test_t6__z_loss_under_padding() -> None:
    """In Flaxformer a zeroed row adds (log E)^2 and stays in the denominator; Mesh takes the mean over real tokens."""
    valid_GS = np.array([[True, True, False, False]])
    case = one_hot_case(np.array([[0, 1, 2, 3]]), E=4, capacity=4, valid=valid_GS)
    lse = LOG_ODDS + math.log1p(3 * math.exp(-LOG_ODDS))
    assert outputs_of(case, "mesh_tensorflow")["z_loss"] == pytest.approx(lse**2, rel=2**-50)
    pad = math.log(4) ** 2
    assert round(pad, 4) == 1.9218
    assert outputs_of(case, "flax_masked_ignore_pads")["z_loss"] == pytest.approx((2 * lse**2 + 2 * pad) / 4, rel=2**-50)


@pytest.mark.parametrize(("dialect", "factor"), [("mesh_tensorflow", 0), ("hf_4_57", 0), ("hf_le_4_51", 1), ("labml_switch", 1)])
def test_t8__dropped_value(dialect: str, factor: int) -> None:
    """A token without a slot outputs zero; up to transformers 4.51 and in labml its input times its gate."""
    case = one_hot_case(np.array([[0, 0, 1, 0]]), E=2, capacity=1)
    found = outputs_of(case, dialect)
    assert found["kept"].tolist() == [[True, False, True, False]]
    expected = factor * found["gate"][0, 3] * case.x[0, 3]
    assert found["out"][0, 3].tolist() == expected.tolist()


def test_t9__one_expert_per_token_with_512_experts() -> None:
    """Expert 257 is one expert: an index kept in bfloat16 would be 256, 257 or 258."""
    case = one_hot_case(np.array([[257, 301, 256]]), E=512, capacity=1)
    found = outputs_of(case, "flax_masked_ignore_pads")
    assert found["expert"].tolist() == [[257, 301, 256]]
    assert found["kept"].all()


def test_t10__double_gate() -> None:
    """The Keras example's combine tensor also dispatches: y = p * FFN(p x), which is p^2 FFN(x) for a bias-free ReLU expert."""
    case = one_hot_case(np.array([[0, 1]]), E=2, capacity=4)
    case.arrays["w_router"][...] = np.array([[0.7, 0.0], [0.0, 0.7], [0.0, 0.0]])
    once, twice = outputs_of(case, "mesh_tensorflow"), outputs_of(case, "keras_io")
    gate_GS1 = once["gate"][..., None]
    assert twice["out"] == pytest.approx(gate_GS1 * once["out"], rel=2**-50)
    assert not (twice["out"] == once["out"]).all()


def test_t12__gradient_at_a_tie() -> None:
    """At p1 = p2 the whole gate gradient goes to the chosen, lowest index; a maximum that splits it gives both half."""
    case = one_hot_case(np.array([[0]]), E=2, capacity=1, dout=np.ones((1, 1, 3)))
    case.arrays["w_router"][...] = 0.0
    found = outputs_of(case, "mesh_tensorflow")
    assert found["expert"].tolist() == [[0]]
    dgate = float(np.sum(found["expert_out"]))
    assert found["dw_router"][0].tolist() == [0.25 * dgate, -0.25 * dgate]  # p (1 - p) dgate = dgate / 4; split it would be 0


@pytest.mark.parametrize("value", ["one", "norm_topk"])
def test_t13__a_gate_of_one_has_no_router_gradient(value: str) -> None:
    """Softmax after top-1, or renormalisation, makes the gate 1 and the router blind to the output."""
    case = one_hot_case(np.array([[0, 1, 1]]), E=2, capacity=4, dout=np.ones((1, 3, 3)))
    found = outputs_of(case, "mesh_tensorflow", gate__value=value)
    assert found["gate"].tolist() == [[1.0, 1.0, 1.0]]
    assert not found["dw_router"].any()
    assert outputs_of(case, "mesh_tensorflow", gate__value="ratio_st")["dw_router"].any()


def test_t16__capacity_per_group() -> None:
    """Two rows with one slot per expert keep one token each; as one group they keep one in all; 5.0 to 5.17 keep everyone."""
    expert_GS = np.array([[0, 0, 0], [0, 0, 0]])
    per_row = outputs_of(one_hot_case(expert_GS, E=2, capacity=1), "hf_ge_5_18")
    as_one = outputs_of(one_hot_case(expert_GS.reshape(1, 6), E=2, capacity=1), "deepspeed_top1")
    never = outputs_of(one_hot_case(expert_GS, E=2, capacity=3), "hf_5_0_to_5_17")
    assert [found["kept"].sum() for found in (per_row, as_one, never)] == [2, 1, 6]
