# May import: standard library, numpy, pytest, refswitch, conformance.
"""Proof that the two tests before can fail: bugs planted in the reference, each of which their comparisons must notice.

Every bug is one that a Switch layer has had or could have. It is patched into the reference, where the judge's tubes and the independent layer do
not see it, and the very functions that `test_reference_gradients` and `test_reference_differences` assert on must then report the arrays that
it spoils. Clauses: S-BACK-1 to S-BACK-6, S-AUX-1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from conformance.test_reference_differences import PLANS as SMOOTH_PLANS
from conformance.test_reference_differences import difference_breaches
from conformance.test_reference_gradients import REQUIRED, disagreements, draw_data, plan_of, unmet
from refswitch.numbers.precision import FORMATS, round_to
from refswitch.reference import experts, losses, pack, router, switch
from refswitch.verify import oracle

PLANS = SMOOTH_PLANS | {
    "straight-through": plan_of({"dispatch_grad": "straight_through", "drop.output": "x"}),
    "ratio": plan_of({"gate.value": "ratio_st", "expert.bias": "shared_out"}),
    "ties": plan_of({"gate.site": "output"}, tokens="ties", noise=False, pads="none"),
    "leak": plan_of({"noise.kind": "x_mul_uniform", "noise.leak_to_experts": "if_same_dtype"}),
}


class Bug(NamedTuple):
    """A fault, where it is put, and what must report it."""

    place: Any  # module
    function: str
    faulty: Callable[..., Any]
    plan: str
    spoils: tuple[str, ...]  # arrays that both comparisons report
    autograd_alone: tuple[str, ...] = ()  # arrays that only the independent layer can report: forward and backward are wrong alike, or by decree


def _backward(**changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return the layer's backward with something changed in what forward saved or in the statics."""

    def faulty(dout_GSD: np.ndarray, daux: float, dz: float, saved: Any, params: Any, statics: Any) -> Any:
        for name, change in changes.items():
            if name == "dialect":
                statics = statics._replace(dialect=change(statics.dialect))
            else:
                saved = saved._replace(**{name: change(getattr(saved, name))})
        return switch.switch_backward(dout_GSD, daux, dz, saved, params, statics)

    return faulty


def _spoiled(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    """Return the layer's backward with one of the experts' gradients changed afterwards."""

    def faulty(*arguments: Any) -> Any:
        dx_GSD, dparams = switch.switch_backward(*arguments)
        return dx_GSD, dparams._replace(experts=dparams.experts._replace(**{name: change(getattr(dparams.experts, name))}))

    return faulty


def _ungated_dw_out(dout_GSD: np.ndarray, daux: float, dz: float, saved: Any, params: Any, statics: Any) -> Any:
    dx_GSD, dparams = switch.switch_backward(dout_GSD, daux, dz, saved, params, statics)
    _, ungated = switch.switch_backward(dout_GSD, daux, dz, saved._replace(gate_GS=np.ones_like(saved.gate_GS)), params, statics)
    return dx_GSD, dparams._replace(experts=dparams.experts._replace(w_out_EFD=ungated.experts.w_out_EFD))


def _unpack_leaving_old_rows(packed_GECD: np.ndarray, route: Any) -> np.ndarray:
    """Give a dropped token what happens to lie in its expert's first slot, as a gather with a clipped slot does."""
    g, s = np.nonzero(~route.kept_GS)
    x_GSD = pack.unpack(packed_GECD, route)
    x_GSD[g, s] = packed_GECD[g, route.expert_GS[g, s], 0]
    return x_GSD


def _gate_backward_to_every_tie(dgate_GS: np.ndarray, saved: Any, value: str, probs_GSE: np.ndarray) -> Any:
    equal_GSE = probs_GSE == saved.chosen_GS[..., None]
    return dgate_GS[..., None] * equal_GSE / equal_GSE.sum(axis=-1, keepdims=True), np.zeros_like(probs_GSE)


def _switch_backward_splitting_ties(dout_GSD: np.ndarray, daux: float, dz: float, saved: Any, params: Any, statics: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switch, "gate_backward", functools.partial(_gate_backward_to_every_tie, probs_GSE=saved.softmax.probs_GSE))
        return switch.switch_backward(dout_GSD, daux, dz, saved, params, statics)


def _balance_without_scale(*arguments: Any) -> Any:
    *others, aux = arguments
    return losses.balance_forward(*others, dataclasses.replace(aux, scale_E="none"))


def _with(group: str, knob: str, value: Any) -> Callable[[Any], Any]:
    def changed(dialect: Any) -> Any:
        return dataclasses.replace(dialect, **{group: dataclasses.replace(getattr(dialect, group), **{knob: value})})

    return changed


ROUTER = ("dx", "dw_router")
BUGS = {
    "softmax's backward without the mean": Bug(switch, "softmax_backward", lambda d_GSE, saved: saved.probs_GSE * d_GSE, "relu", ROUTER),
    "the gate's gradient halved": Bug(
        switch, "gate_backward", lambda d_GS, saved, value: router.gate_backward(0.5 * d_GS, saved, value), "relu", ROUTER
    ),
    "the gate's gradient of a sigmoid taken for that of p": Bug(
        switch, "gate_backward", lambda d_GS, saved, value: router.gate_backward(d_GS, saved, "p"), "sigmoid-cap", (*ROUTER, "db_router")
    ),
    "the gate's gradient shared among ties": Bug(oracle, "switch_backward", _switch_backward_splitting_ties, "ties", (), ROUTER),
    "dw_out from the ungated dout": Bug(oracle, "switch_backward", _ungated_dw_out, "relu", ("dw_out",)),
    "db_out unaware of the gate on hidden": Bug(
        oracle, "switch_backward", _backward(experts=lambda saved: saved._replace(bias_scale_GEC=1.0 * (saved.bias_scale_GEC > 0.0))), "hidden",
        ("db_out",),
    ),
    "unpack that leaves a dropped token what was there": Bug(switch, "unpack", _unpack_leaving_old_rows, "relu", ("dx",)),
    "the balance loss without E": Bug(switch, "balance_forward", _balance_without_scale, "relu", (), ("aux_loss", *ROUTER)),
    "the balance loss's gradient without E": Bug(
        switch, "balance_backward", lambda daux, saved: losses.balance_backward(daux / saved.dvalue_dprobs_GSE.shape[-1], saved), "relu", ROUTER
    ),
    "no balance gradient at all (NeMo)": Bug(switch, "balance_backward", lambda daux, saved: 0.0 * saved.dvalue_dprobs_GSE, "one", ("dw_router",)),
    "the z-loss's gradient without its 2": Bug(switch, "z_loss_backward", lambda dz, saved: losses.z_loss_backward(0.5 * dz, saved), "relu", ROUTER),
    "the slope of the cap forgotten": Bug(
        oracle, "switch_backward", _backward(logits=lambda saved: saved._replace(slope_GSE=np.ones_like(saved.slope_GSE))), "sigmoid-cap",
        (*ROUTER, "db_router"),
    ),
    "dx without the noise's factor": Bug(
        oracle, "switch_backward", _backward(inputs=lambda saved: saved._replace(noise_factor_GSD=np.ones_like(saved.noise_factor_GSD))), "relu",
        ("dx",),
    ),
    "dx without the noise's factor on the experts' branch": Bug(
        oracle, "switch_backward", _backward(dialect=_with("noise", "leak_to_experts", "never")), "leak", ("dx",)
    ),
    "dx of padding that the layer zeroes": Bug(
        oracle, "switch_backward", _backward(inputs=lambda saved: saved._replace(valid_GS=np.ones_like(saved.valid_GS))), "relu", ("dx",)
    ),
    "expert dropout forgotten in backward": Bug(
        oracle, "switch_backward", _backward(experts=lambda saved: saved._replace(factor_GECF=1.0 * (saved.factor_GECF > 0.0))), "relu",
        ("dx", "dw_in"),
    ),
    "a dropped token's own gradient forgotten": Bug(
        oracle, "switch_backward", _backward(dialect=_with("drop", "output", "zero")), "both-gated", ROUTER
    ),
    "the gate's gradient from the experts' input forgotten": Bug(
        oracle, "switch_backward", _backward(x_expert_GSD=np.zeros_like), "input-relu", (*ROUTER, "db_router")
    ),
    "gelu with the slope of its tanh form": Bug(
        experts, "activation_slope", lambda z, name, true=experts.activation_slope: true(z, "gelu_tanh"), "hidden", ("dx", "dw_in", "db_in")
    ),
    "relu with the slope of gelu": Bug(
        experts, "activation_slope", lambda z, name, true=experts.activation_slope: true(z, "gelu_erf"), "relu", ("dx", "dw_in")
    ),
    "straight-through forgotten": Bug(
        oracle, "switch_backward", _backward(dialect=lambda dialect: dataclasses.replace(dialect, dispatch_grad="none")), "straight-through",
        (), ROUTER,
    ),
    "p / stop_gradient(p) with the gradient of p": Bug(
        switch, "gate_backward", lambda d_GS, saved, value: router.gate_backward(d_GS, saved, "p"), "ratio", (), ROUTER
    ),
    "dw_in in float32": Bug(oracle, "switch_backward", _spoiled("w_in_EDF", lambda d: round_to(d, FORMATS["float32"])), "relu", (), ("dw_in",)),
    "dw_in of dtype float32": Bug(oracle, "switch_backward", _spoiled("w_in_EDF", lambda d: d.astype(np.float32)), "relu", (), ("dw_in: dtype",)),
    "dw_in with its axes exchanged": Bug(oracle, "switch_backward", _spoiled("w_in_EDF", lambda d: d.swapaxes(1, 2)), "relu", (), ("dw_in: shape",)),
    "a NaN in dw_in": Bug(oracle, "switch_backward", _spoiled("w_in_EDF", lambda d: np.where(d == d[0, 0, 0], np.nan, d)), "relu", ("dw_in",)),
    "dw_in too large by 2**-40": Bug(oracle, "switch_backward", _spoiled("w_in_EDF", lambda d: d * (1.0 + 2.0**-40)), "relu", (), ("dw_in",)),
    "dw_in too large by 2**-15": Bug(oracle, "switch_backward", _spoiled("w_in_EDF", lambda d: d * (1.0 + 2.0**-15)), "relu", ("dw_in",)),
}  # fmt: skip


@pytest.mark.parametrize("label", PLANS)
def test_disagreements__none_without_a_bug(label: str) -> None:
    found = disagreements(draw_data(PLANS[label]))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("label", BUGS)
def test_disagreements__notice(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS[label]
    drawn = draw_data(PLANS[bug.plan])
    monkeypatch.setattr(bug.place, bug.function, bug.faulty)
    found = disagreements(drawn)
    for name in (*bug.spoils, *bug.autograd_alone):
        assert any(line.startswith(name) for line in found), f"{label}: nothing said of {name}: {found}"


@pytest.mark.parametrize("label", [label for label, bug in BUGS.items() if bug.spoils])
def test_difference_breaches__notice(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS[label]
    drawn = draw_data(PLANS[bug.plan])
    monkeypatch.setattr(bug.place, bug.function, bug.faulty)
    for name in bug.spoils:
        assert difference_breaches(drawn, name.removeprefix("d")), f"{label}: the differences of {name[1:]} did not notice"


@pytest.mark.parametrize(("plan", "name"), sorted({(bug.plan, name) for bug in BUGS.values() for name in bug.spoils}))
def test_difference_breaches__none_without_a_bug(plan: str, name: str) -> None:
    found = difference_breaches(draw_data(PLANS[plan]), name.removeprefix("d"))
    assert not found, "\n".join(found)


def test_sweep__fails_without_a_regime() -> None:
    assert not unmet(Counter(REQUIRED))
    for regime in REQUIRED:
        assert unmet(Counter(REQUIRED - {regime})) == {regime}
