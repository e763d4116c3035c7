"""refswitch's own kernels for the CPU as an adapter, in float32 and in simulated bfloat16 (float32 whose values lie on the bfloat16 grid).

`refswitch verify cpu` judges both under the base dialect. The form of the experts follows the case: gated where it has `w_gate`, biased where it has
biases; `gated` and `shared_bias` claim dialects in which such cases come, and `refswitch verify cpu::vmoe_top1` judges another record.
Deterministic on any number of threads, and `out` and `dx` of a token have
the same bits whatever else is in the batch, but for the losses' own gradients, which ask about the others.
May import: numpy, refswitch.
"""

from functools import partial

import numpy as np

from refswitch.config import rounding_points
from refswitch.kernels.cpu.jit import on_threads
from refswitch.kernels.cpu.switch import per_token, switch_backward, switch_forward
from refswitch.kernels.cpu.workspace import Workspace
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.switch import Statics, SwitchInputs, SwitchParams
from refswitch.spec_data import load_dialect, load_profile, names_of

FEATURES = ["backward", "aux_loss", "z_loss", "noise", "padding", "groups", "bias", "gated", "expert_dropout", "empty"]
ONE, ZERO = np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)


def params_of(case):
    """The parameters under the reference's names; an absent bias is zero."""
    E, D, F = case.w_in.shape
    bias = case.get("b_out")
    is_shared = bias is not None and bias.ndim == 1
    zeros = {"b_router": (E,), "b_in": (E, F), "b_gate": (E, F)}
    b = {name: np.zeros(shape, np.float32) if case.get(name) is None else case[name] for name, shape in zeros.items()}
    b_out_ED = np.zeros((E, D), np.float32) if bias is None or is_shared else bias
    experts = ExpertsParams(case.w_in, case.get("w_gate"), case.w_out, b["b_in"], b["b_gate"], b_out_ED)
    return SwitchParams(case.w_router, b["b_router"], experts, bias if is_shared else np.zeros(D, np.float32))


def inputs_of(case):
    """The call's data; what the case does not have is one neutral element."""
    G, S, D = case.x.shape
    noise, valid, mask, priority = (case.get(name) for name in ("noise", "valid", "hidden_mask", "priority"))
    is_factor = noise is not None and noise.shape == (G, S, D)
    return SwitchInputs(
        x_GSD=case.x,
        valid_GS=np.ones((G, S), bool) if valid is None else valid,
        noise_factor_GSD=noise if is_factor else ONE,
        noise_term_GSE=ZERO if noise is None or is_factor else noise,
        select_noise_GSE=ZERO,
        priority_GS=np.zeros((1, 1), np.int64) if priority is None else priority,
        hidden_mask_GSF=ONE if mask is None else mask,
    )


def dialect_of(case, base):
    """The claimed dialect, with the experts' form as the case has it."""
    bias = case.get("b_out")
    kind = "none" if bias is None else "shared_out" if bias.ndim == 1 else "per_expert"
    return load_dialect({**base, "expert.glu": case.get("w_gate") is not None, "expert.bias": kind})


def switch_layer(case, base, profile):
    """Forward and, where the case asks for it, backward; everything that the contract names."""
    dialect, workspace = dialect_of(case, base), Workspace()
    params, statics = params_of(case), Statics(dialect, rounding_points(dialect, load_profile(profile)), case.activation, case.capacity)
    with on_threads():
        outputs, saved = switch_forward(inputs_of(case), params, statics, workspace)
        named = {
            "out": outputs.out_GSD, "logits": outputs.logits_GSE, "probs": outputs.probs_GSE, "expert": outputs.route.expert_GS,
            "slot": outputs.route.slot_GS, "kept": outputs.route.kept_GS, "gate": outputs.gate_GS, "aux_loss": outputs.aux_loss,
            "z_loss": outputs.z_loss, "hidden": per_token(saved.hidden_NF, saved).reshape(*case.x.shape[:2], case.w_in.shape[2]),
            "expert_out": per_token(saved.expert_out_ND, saved).reshape(case.x.shape),
        }  # fmt: skip
        if case.get("dout") is None:
            return named
        daux, dz = float(case.get("daux", 0.0)), float(case.get("dz", 0.0))
        dx_GSD, dparams = switch_backward(case.dout, daux, dz, saved, params, statics, workspace)
    experts, bias = dparams.experts, case.get("b_out")
    gradients = {
        "x": dx_GSD, "w_router": dparams.w_router_DE, "w_in": experts.w_in_EDF, "w_gate": experts.w_gate_EDF, "w_out": experts.w_out_EFD,
        "b_router": dparams.b_router_E, "b_in": experts.b_in_EF, "b_gate": experts.b_gate_EF,
        "b_out": dparams.b_shared_D if bias is not None and bias.ndim == 1 else experts.b_out_ED,
    }  # fmt: skip
    return named | {f"d{name}": value for name, value in gradients.items() if case.get(name) is not None}


def adapter(profile, base="mesh_tensorflow", **knobs):
    """The kernels as one adapter, with their claim."""
    layer = partial(switch_layer, base={"base": base, **knobs}, profile=profile)
    layer.dialect = {"base": base, **knobs} if knobs else base
    layer.profile = {"base": profile, "deterministic": True, "batch_invariant": True}
    return layer


ADAPTERS = {"float32": adapter("float32"), "bfloat16": adapter("bfloat16")}
gated = adapter("float32", **{"expert.glu": True, "expert.act": "gelu_tanh", "expert.bias": "per_expert", "router.bias": True})
shared_bias = adapter("bfloat16", **{"expert.act": "silu", "expert.bias": "shared_out", "pad.route": "include", "aux.P_pads": "exclude"})
globals().update({name: adapter("float32", name) for name in names_of("dialects")})
