# May import: standard library, numpy, refswitch.reference, refswitch.config, refswitch.verify.case.
"""The reference, called with a case: from the contract's names to the reference's records and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refswitch.config import Dialect, RoundingPoints
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.switch import (
    Statics,
    SwitchInputs,
    SwitchOutputs,
    SwitchParams,
    SwitchSaved,
    switch_backward,
    switch_forward,
)
from refswitch.verify.case import Case

FACTOR_NOISE = ("x_mul_uniform", "x_dropout")


def _array(case: Case, name: str, default: np.ndarray) -> np.ndarray:
    found = case.get(name)
    return default if found is None else np.asarray(found, np.float64)


def inputs_of(case: Case, dialect: Dialect) -> SwitchInputs:
    """Return the call's data, with the neutral element where the case has none."""
    G, S, D, E, F = (case.sizes[letter] for letter in "GSDEF")
    noise = case.get("noise")
    is_factor = noise is not None and dialect.noise.kind in FACTOR_NOISE
    valid = case.get("valid")
    return SwitchInputs(
        x_GSD=np.asarray(case.x, np.float64),
        valid_GS=np.ones((G, S), bool) if valid is None else valid,
        noise_factor_GSD=np.asarray(noise, np.float64) if is_factor else np.ones((G, S, D)),
        noise_term_GSE=np.asarray(noise, np.float64) if noise is not None and not is_factor else np.zeros((G, S, E)),
        select_noise_GSE=_array(case, "select_noise", np.zeros((G, S, E))),
        priority_GS=_array(case, "priority", np.broadcast_to(np.arange(S, dtype=np.float64), (G, S))),
        hidden_mask_GSF=_array(case, "hidden_mask", np.ones((G, S, F))),
    )


def params_of(case: Case) -> SwitchParams:
    """Return the parameters; an absent bias is zero."""
    D, E, F = (case.sizes[letter] for letter in "DEF")
    b_out = _array(case, "b_out", np.zeros((E, D)))
    shared = b_out.ndim == 1
    w_gate = case.get("w_gate")
    experts = ExpertsParams(
        w_in_EDF=np.asarray(case.w_in, np.float64),
        w_gate_EDF=None if w_gate is None else np.asarray(w_gate, np.float64),
        w_out_EFD=np.asarray(case.w_out, np.float64),
        b_in_EF=_array(case, "b_in", np.zeros((E, F))),
        b_gate_EF=_array(case, "b_gate", np.zeros((E, F))),
        b_out_ED=np.zeros((E, D)) if shared else b_out,
    )
    return SwitchParams(np.asarray(case.w_router, np.float64), _array(case, "b_router", np.zeros(E)), experts, b_out if shared else np.zeros(D))


def call_reference(
    case: Case, dialect: Dialect, points: RoundingPoints, forward: Callable[..., Any] | None = None
) -> tuple[SwitchOutputs, SwitchSaved, SwitchParams, Statics]:
    """Run the reference's forward pass on a case, or another of its signature."""
    params = params_of(case)
    statics = Statics(dialect, points, case.activation, case.capacity)
    outputs, saved = (forward or switch_forward)(inputs_of(case, dialect), params, statics)  # looked up now: a test may have planted a bug there
    return outputs, saved, params, statics


def reference_outputs(
    case: Case,
    dialect: Dialect,
    points: RoundingPoints,
    forward: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
) -> dict[str, np.ndarray]:
    """Return everything that the contract names, computed by the reference, or by another layer of its signature."""
    outputs, saved, params, statics = call_reference(case, dialect, points, forward)
    named = {
        "out": outputs.out_GSD, "logits": outputs.logits_GSE, "probs": outputs.probs_GSE, "expert": outputs.route.expert_GS,
        "slot": outputs.route.slot_GS, "kept": outputs.route.kept_GS, "gate": outputs.gate_GS, "hidden": outputs.hidden_GSF,
        "expert_out": outputs.expert_out_GSD, "aux_loss": np.asarray(outputs.aux_loss), "z_loss": np.asarray(outputs.z_loss),
    }  # fmt: skip
    dout = case.get("dout")
    if dout is None:
        return named
    daux, dz = float(case.get("daux", 0.0)), float(case.get("dz", 0.0))
    dx, dparams = (backward or switch_backward)(np.asarray(dout, np.float64), daux, dz, saved, params, statics)
    experts = dparams.experts
    shared = case.get("b_out") is not None and case.b_out.ndim == 1
    gradients = {
        "x": dx, "w_router": dparams.w_router_DE, "w_in": experts.w_in_EDF, "w_gate": experts.w_gate_EDF, "w_out": experts.w_out_EFD,
        "b_router": dparams.b_router_E, "b_in": experts.b_in_EF, "b_gate": experts.b_gate_EF,
        "b_out": dparams.b_shared_D if shared else experts.b_out_ED,
    }  # fmt: skip
    return named | {f"d{name}": value for name, value in gradients.items() if name in case.arrays and value is not None}
