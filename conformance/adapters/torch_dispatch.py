"""Adapter: a plain PyTorch Switch layer of our own, in the two ways such layers are usually dispatched; gradients by autograd.

What     : `einsum` packs the tokens with a one-hot dispatch tensor and brings them back with a combine tensor (Mesh-TensorFlow's way);
           `gather` sorts the tokens by expert, runs each expert on its own rows and adds the rows back. The router is shared.
Version  : any PyTorch >= 2.1; checked with 2.13.0 on the CPU. It claims the dialect `mesh_tensorflow`, with every feature but top_k.
Noise    : `case.noise` is multiplied into the router's copy of x and nowhere else; nothing is drawn here.
Rounding : float32 or float64 throughout. `gather_bfloat16` keeps x, the experts and everything between them in bfloat16 and the router, the gate
           and the losses in float32: beyond the profile's own points it rounds the pre-activation, the expert's output and every gradient.
Letters  : G groups, S tokens of one group, T = G*S, D model width, E experts, F hidden width, C slots, N rows that one expert serves.
May import: torch.
"""

from functools import partial

import torch
from torch.nn import functional

DIALECT = "mesh_tensorflow"
PROFILE = "float32"
FEATURES = ["backward", "aux_loss", "z_loss", "noise", "padding", "groups", "bias", "gated", "expert_dropout", "empty"]
REQUIRES = ["torch"]

BFLOAT16 = {"base": "bfloat16", "storage.z": "bfloat16", "storage.expert_out": "bfloat16", "storage.gradients": "bfloat16"}
VALUES = ("x", "w_router", "b_router", "w_in", "w_gate", "w_out", "b_in", "b_gate", "b_out")
ACTIVATIONS = {"relu": torch.relu, "gelu_erf": functional.gelu, "gelu_tanh": partial(functional.gelu, approximate="tanh"), "silu": functional.silu}


def route(case, value, x_GSD, valid_GS, wide):
    """Everything the router decides, under the contract's names, and the two losses; all of it in the wide format."""
    S = x_GSD.shape[1]
    x_router_GSD = x_GSD.to(wide)
    if case.get("noise") is not None:
        x_router_GSD = x_router_GSD * torch.tensor(case.noise, dtype=wide)
    logits_GSE = x_router_GSD @ value["w_router"]
    if "b_router" in value:
        logits_GSE = logits_GSE + value["b_router"]
    E = logits_GSE.shape[-1]
    probs_GSE = torch.softmax(logits_GSE, dim=-1)
    expert_GS = torch.argmax(probs_GSE, dim=-1)
    gate_GS = torch.gather(probs_GSE, -1, expert_GS[..., None])[..., 0]  # not amax: at a tie that splits the gradient

    chosen_GSE = functional.one_hot(expert_GS, E)
    claims_GSE = chosen_GSE * valid_GS[..., None]  # padding claims no slot
    earlier_GSE = torch.cumsum(claims_GSE, dim=1) - claims_GSE
    slot_GS = torch.gather(earlier_GSE, -1, expert_GS[..., None])[..., 0]
    kept_GS = valid_GS & (slot_GS < case.capacity)

    # Mesh-TensorFlow: padding takes part in both means, and the group's term is then scaled by its share of real tokens.
    total = max(S, 1)
    f_GE, p_GE = chosen_GSE.to(wide).sum(1) / total, probs_GSE.sum(1) / total
    share_G = valid_GS.to(wide).sum(1) / total
    aux_loss = (share_G * E * (f_GE * p_GE).sum(-1)).mean()
    lse_GS = torch.where(valid_GS, torch.logsumexp(logits_GSE, dim=-1), 0)
    z_loss = lse_GS.square().sum() / valid_GS.sum().clamp(min=1)
    routed = {"logits": logits_GSE, "probs": probs_GSE, "expert": expert_GS, "slot": slot_GS, "kept": kept_GS, "gate": gate_GS}
    return routed | {"aux_loss": aux_loss, "z_loss": z_loss}


def affine(x_ENI, w_EIO, b_EO):
    """x w + b for E experts at once; one fused call, so that bfloat16 rounds the sum once and not the product before it."""
    return x_ENI @ w_EIO if b_EO is None else torch.baddbmm(b_EO[:, None], x_ENI, w_EIO)


def ffn(value, x_END, mask_ENF, activation, wide):
    """Hidden values and outputs of E experts on N rows each. The hidden value is computed in the wide format and rounded once."""
    act, narrow = ACTIVATIONS[activation], x_END.dtype
    hidden_ENF = affine(x_END, value["w_in"], value.get("b_in")).to(wide)
    if "w_gate" in value:
        hidden_ENF = act(affine(x_END, value["w_gate"], value.get("b_gate")).to(wide)) * hidden_ENF
    else:
        hidden_ENF = act(hidden_ENF)
    if mask_ENF is not None:
        hidden_ENF = hidden_ENF * mask_ENF
    hidden_ENF = hidden_ENF.to(narrow)
    return hidden_ENF, affine(hidden_ENF, value["w_out"], value.get("b_out"))


def experts_by_einsum(case, value, x_GSD, mask_GSF, routed, wide):
    """Pack with a one-hot (G, S, E, C), run all slots of all experts, bring back with the same tensor times the gate."""
    (G, S, D), (E, _, F) = x_GSD.shape, case.w_in.shape
    C = min(case.capacity, S)  # a slot from S on can never fill
    to_expert_GSE = functional.one_hot(routed["expert"], E) * routed["kept"][..., None]
    to_slot_GSC = routed["slot"][..., None] == torch.arange(C)
    pack_GSEC = torch.einsum("gse,gsc->gsec", to_expert_GSE.to(wide), to_slot_GSC.to(wide))

    x_END = torch.einsum("gsec,gsd->egcd", pack_GSEC, x_GSD).reshape(E, G * C, D)
    mask_ENF = None
    if mask_GSF is not None:
        mask_ENF = torch.einsum("gsec,gsf->egcf", pack_GSEC, mask_GSF).reshape(E, G * C, F)
    hidden_ENF, expert_out_END = ffn(value, x_END, mask_ENF, case.activation, wide)

    hidden_EGCF, expert_out_EGCD = hidden_ENF.reshape(E, G, C, F), expert_out_END.reshape(E, G, C, D)
    out_GSD = torch.einsum("gsec,egcd->gsd", pack_GSEC * routed["gate"][..., None, None], expert_out_EGCD)
    return out_GSD, torch.einsum("gsec,egcf->gsf", pack_GSEC, hidden_EGCF), torch.einsum("gsec,egcd->gsd", pack_GSEC, expert_out_EGCD)


def experts_by_gather(case, value, x_GSD, mask_GSF, routed, wide):
    """Sort the kept tokens by expert, run each expert on its own rows, put the rows back; a dropped token's row stays zero."""
    (G, S, D), (E, _, F) = x_GSD.shape, case.w_in.shape
    x_TD, expert_T, kept_T = x_GSD.reshape(G * S, D), routed["expert"].reshape(-1), routed["kept"].reshape(-1)
    row_T = torch.argsort(torch.where(kept_T, expert_T, E), stable=True)[: int(kept_T.sum())]
    blocks, start = [], 0
    for e, rows in enumerate(torch.bincount(expert_T[kept_T], minlength=E).tolist()):
        row_N = row_T[start : start + rows]
        mask_ENF = None if mask_GSF is None else mask_GSF.reshape(G * S, F)[row_N][None]
        mine = {name: array[e : e + 1] for name, array in value.items() if name not in ("x", "w_router", "b_router")}
        blocks.append(ffn(mine, x_TD[row_N][None], mask_ENF, case.activation, wide))
        start += rows
    hidden_NF, expert_out_ND = (torch.cat(parts, dim=1)[0] for parts in zip(*blocks, strict=True))
    hidden_TF = hidden_NF.new_zeros(G * S, F).index_add(0, row_T, hidden_NF)
    expert_out_TD = torch.zeros_like(x_TD).index_add(0, row_T, expert_out_ND)
    expert_out_GSD = expert_out_TD.reshape(G, S, D)
    out_GSD = routed["gate"][..., None] * expert_out_GSD.to(wide)
    return out_GSD, hidden_TF.reshape(G, S, F), expert_out_GSD


def switch_layer(case, experts, wide, narrow):
    """The whole layer: parameters and x in the narrow format (the router's own in the wide one), results under the contract's names."""
    leaf = {
        name: torch.tensor(case[name], dtype=wide if name.endswith("_router") else narrow, requires_grad=True)
        for name in VALUES
        if case.get(name) is not None
    }
    valid_GS = torch.ones(leaf["x"].shape[:2], dtype=torch.bool) if case.get("valid") is None else torch.tensor(case.valid)
    mask_GSF = None if case.get("hidden_mask") is None else torch.tensor(case.hidden_mask, dtype=wide)
    x_GSD = torch.where(valid_GS[..., None], leaf["x"], 0)  # a product with the mask would let NaN through

    result = route(case, leaf, x_GSD, valid_GS, wide)
    value, shared_D = dict(leaf), None
    if "b_out" in leaf and leaf["b_out"].ndim == 1:  # one bias for every token, the dropped ones too, outside the gate
        shared_D = value.pop("b_out")
    out_GSD, result["hidden"], result["expert_out"] = experts(case, value, x_GSD, mask_GSF, result, wide)
    if shared_D is not None:
        out_GSD = out_GSD + shared_D.to(wide) * valid_GS[..., None]
    result["out"] = out_GSD.to(narrow)

    if case.get("dout") is not None:
        loss = (result["out"].to(wide) * torch.tensor(case.dout, dtype=wide)).sum()
        loss = loss + float(case.get("daux") or 0) * result["aux_loss"] + float(case.get("dz") or 0) * result["z_loss"]
        grads = torch.autograd.grad(loss, list(leaf.values()), allow_unused=True, materialize_grads=True)
        result |= {f"d{name}": grad for name, grad in zip(leaf, grads, strict=True)}
    return {name: (t.detach().to(wide) if t.is_floating_point() else t).numpy() for name, t in result.items()}


def adapter(experts, profile, wide, narrow):
    """One way of dispatch in one precision, with its claim."""
    layer = partial(switch_layer, experts=experts, wide=wide, narrow=narrow)
    layer.profile = profile
    return layer


ADAPTERS = {
    "einsum": adapter(experts_by_einsum, "float32", torch.float32, torch.float32),
    "gather": adapter(experts_by_gather, "float32", torch.float32, torch.float32),
    "einsum_float64": adapter(experts_by_einsum, "float64", torch.float64, torch.float64),
    "gather_float64": adapter(experts_by_gather, "float64", torch.float64, torch.float64),
    "gather_bfloat16": adapter(experts_by_gather, BFLOAT16, torch.float32, torch.bfloat16),
}
