"""Adapter: `SwitchTransformersSparseMLP` of Hugging Face transformers, whichever release from 4.51 on is installed.

What     : the package's own layer, router and loss functions; nothing that it computes is computed again here. Hooks on its router and experts and a
           torch function mode around the call read the intermediate values. One case group is one batch row. The dialect follows the release:
           up to 4.51 a dropped token gets p*x; 4.52 to 4.57 zero, and f of the aux loss counts it for expert 0; 5.0 to 5.17 never drop and
           their losses cannot be had; from 5.18 on per-row capacity again, with f from the raw logits.
Version  : checked with transformers 4.51.3, 4.57.6, 5.0.0, 5.17.0, 5.18.0, 5.23.0 on torch 2.13.0. Before 5.5 the 5.x router cannot run in bfloat16.
Noise    : when training, the router multiplies its input in place by a fresh tensor filled with `uniform_`. The mode answers that one `uniform_` with
           `case.noise`; a case with noise therefore puts the layer in training mode. In float32 that input is the layer's own: the experts read the
           noise too, and x changes. x shares its memory with `case.x`, so that the caller sees it; autograd differentiates it as it is.
Padding  : the layer knows none: `case.valid` is not read.
May import: numpy, torch, transformers.
"""

from functools import partial

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers import modeling_switch_transformers as hf

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
BROKEN = (5, 0) <= VERSION < (5, 18)  # routes the flattened batch, ignores the capacity, has no usable losses

DIALECT = "hf_le_4_51" if VERSION < (4, 52) else "hf_4_57" if VERSION < (5, 0) else "hf_5_0_to_5_17" if BROKEN else "hf_ge_5_18"
PROFILE = "float32"
FEATURES = ["backward", "padding", "groups", "empty"] + ([] if BROKEN else ["aux_loss", "z_loss"])
REQUIRES = ["torch", "transformers"]
LIMITS = {"activation": {"one_of": ["relu"]}}

# The gate is rounded as well: that is the dialect's `router.prob_round: input`.
BFLOAT16 = {"base": "bfloat16", "storage.z": "bfloat16", "storage.expert_out": "bfloat16", "storage.gradients": "bfloat16"}


class Watch(TorchFunctionMode):
    """Answers the router's `uniform_` with the case's noise and keeps what passes through its first max, one_hot and cumsum."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.seen = noise, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name == "uniform_":
            return args[0].copy_(torch.from_numpy(self.noise).view_as(args[0]))
        result = func(*args, **(kwargs or {}))
        if name in ("max", "one_hot"):
            self.seen.setdefault(name, args[0])
        elif name == "cumsum":
            self.seen.setdefault(name, result)
        return result


class Borrow(torch.autograd.Function):
    """The caller's array as a tensor that may be written in place; its gradient arrives at `probe`, a leaf of the same shape."""

    @staticmethod
    def forward(ctx, probe, array):
        return torch.from_numpy(array).to(probe.dtype)  # no copy in float32

    @staticmethod
    def backward(ctx, dx):
        return dx, None


def weights(case):
    """The case's weights under the layer's own names; a torch Linear keeps (out, in)."""
    named = {"router.classifier.weight": case.w_router.T}
    for e in range(case.w_router.shape[1]):
        named[f"experts.expert_{e}.wi.weight"] = case.w_in[e].T
        named[f"experts.expert_{e}.wo.weight"] = case.w_out[e].T
    return {name: torch.tensor(np.ascontiguousarray(array)) for name, array in named.items()}


def build(case, dtype):
    """The package's layer with the case's sizes, capacity, weights and mode."""
    noise, (E, D, F) = case.get("noise"), case.w_in.shape
    config = SwitchTransformersConfig(
        d_model=D,
        d_ff=F,
        num_experts=E,
        expert_capacity=int(case.capacity),
        router_jitter_noise=0.0 if noise is None else 0.01,  # only switches it on: Watch gives the value
        router_bias=False,
        router_dtype="float32",
        dropout_rate=0.0,
        feed_forward_proj="relu",
    )
    layer = hf.SwitchTransformersSparseMLP(config)
    layer.load_state_dict(weights(case))
    return layer.to(dtype).train(bool(case.train) or noise is not None)


def watched_call(layer, case, x):
    """Run the layer once; return its output and what its router and experts did, under the contract's names, and 4.x's indices after dropping."""
    (G, S, _), E = x.shape, case.w_router.shape[1]
    routed, logits, rows = [], [], {}
    layer.router.register_forward_hook(lambda module, args, result: routed.extend(result))
    layer.router.classifier.register_forward_hook(lambda module, args, result: logits.append(result))
    for e in range(E):
        layer.experts[f"expert_{e}"].wo.register_forward_hook(lambda module, args, result, e=e: rows.update({e: (args[0], result)}))
    with Watch(case.get("noise")) as watch:
        out = layer(x)
    out, dropped_index_GS = (out[0], out[1][1]) if isinstance(out, tuple) else (out, None)  # 4.x returns the indices after dropping too

    mask_GSE = routed[1 if BROKEN else 0].reshape(G, S, E).bool()  # after the package's capacity step
    seen = {
        "out": out,
        "logits": logits[0].reshape(G, S, E),
        "probs": watch.seen["max"].reshape(G, S, E),
        "expert": watch.seen["one_hot"].reshape(G, S),
        "kept": mask_GSE.any(-1),
        "gate": routed[2 if BROKEN else 1].reshape(G, S),
    }
    if not BROKEN:  # there the count runs along an axis of length one
        seen["slot"] = torch.gather(watch.seen["cumsum"], -1, seen["expert"][..., None])[..., 0] - 1
    seen["hidden"], seen["expert_out"] = out.new_zeros(G, S, case.w_in.shape[2]), torch.zeros_like(out)
    for e, (hidden_NF, expert_out_ND) in rows.items():  # rows of one expert come in the tokens' order
        seen["hidden"][mask_GSE[..., e]], seen["expert_out"][mask_GSE[..., e]] = hidden_NF.detach(), expert_out_ND.detach()
    return seen, dropped_index_GS


def losses(logits_GSE, dropped_index_GS):
    """The package's two losses, called as its language model head of that release calls them for one layer."""
    index_GS = logits_GSE.argmax(dim=-1) if dropped_index_GS is None else dropped_index_GS
    probs_GSE = torch.softmax(logits_GSE, dim=-1)
    return {"aux_loss": hf.load_balancing_loss_func(probs_GSE, index_GS), "z_loss": hf.router_z_loss_func(logits_GSE)}


def gradients(case, layer, probe):
    """What autograd left in the leaves, under the contract's names; a leaf that nothing depends on has none, which is zero."""
    leaves = dict(layer.named_parameters(), x=probe)
    grad = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    experts = range(case.w_router.shape[1])
    return {
        "dx": grad["x"],
        "dw_router": grad["router.classifier.weight"].T,
        "dw_in": torch.stack([grad[f"experts.expert_{e}.wi.weight"].T for e in experts]),
        "dw_out": torch.stack([grad[f"experts.expert_{e}.wo.weight"].T for e in experts]),
    }


def switch_layer(case, dtype):
    """One call of the package's layer, its losses where they can be had, and autograd through all of it."""
    layer = build(case, dtype)
    probe = torch.zeros(case.x.shape, dtype=dtype, requires_grad=True)
    x = Borrow.apply(probe, case.x)
    result, dropped_index_GS = watched_call(layer, case, x)
    np.copyto(case.x, x.detach().float().numpy())  # in bfloat16 x is a copy: a write to it shall be seen all the same
    if "aux_loss" in FEATURES:
        result |= losses(result["logits"], dropped_index_GS)
    if case.get("dout") is not None:
        loss = (result["out"].float() * torch.from_numpy(case.dout)).sum()
        for name, weight in (("aux_loss", case.get("daux")), ("z_loss", case.get("dz"))):
            if name in result and weight is not None:
                loss = loss + float(weight) * result[name]
        if loss.requires_grad:  # where no expert served a token the layer may return a constant
            loss.backward()
        result |= gradients(case, layer, probe)
    return {name: (t.detach().float() if t.is_floating_point() else t).contiguous().numpy() for name, t in result.items()}


def adapter(dtype, profile, features):
    """The layer in one precision, with its claim."""
    layer = partial(switch_layer, dtype=dtype)
    layer.profile, layer.features = profile, features
    return layer


ADAPTERS = {
    "evaluation": adapter(torch.float32, "float32", FEATURES),
    "training": adapter(torch.float32, "float32", [*FEATURES, "noise"]),
}
if not (5, 0) <= VERSION < (5, 5):  # those releases do not cast the router's weights: a bfloat16 layer raises
    ADAPTERS["bfloat16"] = adapter(torch.bfloat16, BFLOAT16, [*FEATURES, "noise"])
