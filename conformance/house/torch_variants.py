# May import: standard library, numpy, torch.
"""The routing variants once more, in torch float64 for their gradients: dense one-hot einsums along a given route, differentiated by autograd.

Written from the sources (Shazeer 2017, GShard, Mesh TensorFlow's gates, the paper's appendices) and not from the reference, with which it shares no
mechanism: tokens move by products with one-hot tensors over token, choice, expert and slot, chosen entries are read by such products too, and a
softmax over the chosen is a masked softmax over all. Two tokens in one slot would be added here and overwritten there.

Each layer is a function of a `Problem`'s tensors and of `call`, through which every nonlinear function goes. The first run, `Exact`, keeps each
function's arguments; the second, `Absolute`, computes *the sum of the absolute terms* of every value and every gradient: each input is replaced by
its absolute value, differences become sums, and each nonlinear function becomes a linear one at the arguments that it really had, with the
absolute terms of its derivative:

    softmax        p;                     back p (d + sum p d)              from p (d - sum p d)
    renormalise    c / (sum c + eps);     back (d + sum g d) / total        from (d - sum g d) / total
    activation     L z;                   back L d                          |act(z)| <= L |z|, |act'| <= L
    log_sum_exp    |max| + |log total| + 1;  back d p
    softplus       its value and sigmoid(z) z_size;  back d sigmoid(z)
    quotient       a / b + |a| b_size / b^2;  back d / b, d a / b^2
    normal_cdf     Phi(z);                back d phi(z) (1 + |z| z_size)    the density's own error is |z| times that of its argument
    cv_squared     mean((x + m)^2) / (m^2 + eps), and the derivative's terms likewise
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-9  # of Mesh TensorFlow's renormalisations
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu_erf": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}
STEEPEST = {"relu": 1.0, "gelu_erf": 1.13, "gelu_tanh": 1.13, "silu": 1.1}  # upper bounds of |act'| and of |act(z) / z|


class Problem(NamedTuple):
    """One layer's call: what is differentiated, what is constant data, what is discrete."""

    leaves: dict[str, np.ndarray]
    data: dict[str, np.ndarray]  # enters products: its absolute value is taken in the second run
    facts: dict[str, np.ndarray]  # routes and masks
    settings: dict[str, Any]
    douts: dict[str, np.ndarray]  # by output


Values = dict[str, Tensor]
Layer = Callable[[Values, Values, Values, dict[str, Any], Any], Values]


# ----------------------------------------------------------------------------------------------------------- nonlinear functions


def _softmax(logits: Tensor, dim: int, mask: Tensor | None = None) -> Tensor:
    if mask is None:
        return torch.softmax(logits, dim=dim)
    readable = mask | ~mask.any(dim=dim, keepdim=True)  # where nothing is allowed all is read, and multiplied by 0
    return torch.softmax(logits.masked_fill(~readable, -math.inf), dim=dim) * mask


def _cv_squared(x: Tensor, epsilon: float) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1)
    return variance / (mean[..., 0] ** 2 + epsilon)


EXACT: dict[str, Callable[..., Tensor]] = {
    "softmax": _softmax,
    "renormalise": lambda c: c / (c.sum(dim=-1, keepdim=True) + EPSILON),
    "activation": lambda z, kind: ACTIVATIONS[kind](z),
    "log_sum_exp": lambda logits: torch.logsumexp(logits, dim=-1),
    "softplus": functional.softplus,
    "minus": lambda a, b: a - b,
    "quotient": lambda a, b: a / b,
    "normal_cdf": torch.special.ndtr,
    "cv_squared": _cv_squared,
}

Pull = Callable[[Tensor], tuple[Tensor, ...]]


def _absolute_softmax(met: list[Tensor], sizes: list[Tensor], dim: int, mask: Tensor | None = None) -> tuple[Tensor, Pull]:
    p = _softmax(met[0], dim, mask)
    return p, lambda d: (p * (d + (p * d).sum(dim=dim, keepdim=True)),)


def _absolute_renormalise(met: list[Tensor], sizes: list[Tensor]) -> tuple[Tensor, Pull]:
    total = met[0].sum(dim=-1, keepdim=True) + EPSILON
    share = met[0] / total
    return share, lambda d: ((d + (share * d).sum(dim=-1, keepdim=True)) / total,)


def _absolute_log_sum_exp(met: list[Tensor], sizes: list[Tensor]) -> tuple[Tensor, Pull]:
    highest = met[0].amax(dim=-1)
    log_total = torch.logsumexp(met[0] - highest[..., None], dim=-1)
    return highest.abs() + log_total.abs() + 1.0, lambda d: (d[..., None] * torch.softmax(met[0], dim=-1),)


def _absolute_normal_cdf(met: list[Tensor], sizes: list[Tensor]) -> tuple[Tensor, Pull]:
    density = torch.exp(-0.5 * met[0] ** 2) / math.sqrt(2.0 * math.pi)
    return torch.special.ndtr(met[0]), lambda d: (d * density * (1.0 + met[0].abs() * sizes[0]),)


def _absolute_cv_squared(met: list[Tensor], sizes: list[Tensor], epsilon: float) -> tuple[Tensor, Pull]:
    mean = met[0].mean(dim=-1, keepdim=True)
    deviation = sizes[0] + sizes[0].mean(dim=-1, keepdim=True)
    variance = (deviation**2).mean(dim=-1, keepdim=True)
    inverse, E = 1.0 / (mean**2 + epsilon), met[0].shape[-1]
    slope = 2.0 / E * (deviation * inverse + variance * mean * inverse**2)
    return (variance * inverse)[..., 0], lambda d: (d[..., None] * slope,)


ABSOLUTE: dict[str, Callable[..., tuple[Tensor, Pull]]] = {
    "softmax": _absolute_softmax,
    "renormalise": _absolute_renormalise,
    "activation": lambda met, sizes, kind: (STEEPEST[kind] * sizes[0], lambda d: (STEEPEST[kind] * d,)),
    "log_sum_exp": _absolute_log_sum_exp,
    "softplus": lambda met, sizes: (
        functional.softplus(met[0]) + torch.sigmoid(met[0]) * sizes[0],
        lambda d: (d * torch.sigmoid(met[0]),),
    ),
    "minus": lambda met, sizes: (sizes[0] + sizes[1], lambda d: (d, d)),
    "quotient": lambda met, sizes: (
        (sizes[0] + met[0].abs() * sizes[1] / met[1]) / met[1],
        lambda d: (d / met[1], d * sizes[0] / met[1] ** 2),
    ),
    "normal_cdf": _absolute_normal_cdf,
    "cv_squared": _absolute_cv_squared,
}


class Exact:
    """The functions themselves; each call keeps its arguments."""

    def __init__(self) -> None:
        self.tape: list[list[Tensor]] = []

    def __call__(self, name: str, *arguments: Tensor, **settings: Any) -> Tensor:
        self.tape.append([argument.detach() for argument in arguments])
        return EXACT[name](*arguments, **settings)


class _Given(torch.autograd.Function):
    """A value that is given, with a pull-back that is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, pull: Pull, *arguments: Tensor) -> Tensor:
        ctx.pull = pull
        return value.clone()

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> Any:
        return (None, None, *ctx.pull(dvalue))


class Absolute:
    """The same functions in absolute terms, call by call at the arguments that the exact run met."""

    def __init__(self, exact: Exact) -> None:
        self.tape = iter(exact.tape)

    def __call__(self, name: str, *arguments: Tensor, **settings: Any) -> Tensor:
        value, pull = ABSOLUTE[name](next(self.tape), [argument.detach() for argument in arguments], **settings)
        return _Given.apply(value, pull, *arguments)


# -------------------------------------------------------------------------------------------------------------------- the layers


def one_hot(index: Tensor, size: int) -> Tensor:
    return (index[..., None] == torch.arange(size)).double()


def _slots(slot: Tensor, kept: Tensor) -> int:
    return int(slot[kept].max()) + 1 if kept.any() else 1


def _experts(x_GECD: Tensor, mask_GECF: Tensor, leaves: Values, settings: dict[str, Any], call: Any) -> Tensor:
    def branch(kind: str) -> Tensor:
        return torch.einsum("gecd,edf->gecf", x_GECD, leaves[f"w_{kind}"]) + leaves[f"b_{kind}"][:, None]

    if "w_gate" in leaves:
        hidden_GECF = call("activation", branch("gate"), kind=settings["activation"]) * branch("in")
    else:
        hidden_GECF = call("activation", branch("in"), kind=settings["activation"])
    return torch.einsum("gecf,efd->gecd", hidden_GECF * mask_GECF, leaves["w_out"]) + leaves["b_out"][:, None]


def _z_loss(logits_GSE: Tensor, valid_GS: Tensor, call: Any) -> Tensor:
    square_GS = call("log_sum_exp", logits_GSE) ** 2 * valid_GS
    return square_GS.sum() / max(int(valid_GS.sum()), 1)


def _balance(probs_GSE: Tensor, f_GE: Tensor, valid_GS: Tensor, excludes_pads: bool) -> Tensor:
    """Return the mean over groups of E sum f P, both over S; padding is left out of P, or in, with the group weighed by its share of real tokens."""
    G, S, E = probs_GSE.shape
    P_GE = (probs_GSE * valid_GS[..., None] if excludes_pads else probs_GSE).sum(dim=1) / max(S, 1)
    rho_G = torch.ones(G).double() if excludes_pads else valid_GS.double().sum(dim=1) / max(S, 1)
    return (rho_G * E * (f_GE * P_GE).sum(dim=-1)).sum() / G


def top_k(leaves: Values, data: Values, facts: Values, settings: dict[str, Any], call: Any) -> Values:
    """Several experts for each token; facts: expert, slot, kept (G, S, K), second (G, S), valid."""
    expert_GSK, kept_GSK, valid_GS = facts["expert"], facts["kept"], facts["valid"]
    E, C, S = leaves["w_router"].shape[1], _slots(facts["slot"], facts["kept"]), valid_GS.shape[1]
    logits_GSE = torch.einsum("gsd,de->gse", leaves["x"] * data["noise_factor"], leaves["w_router"]) + leaves["b_router"] + data["noise_term"]
    probs_GSE = call("softmax", logits_GSE, dim=-1)
    chosen_GSKE = one_hot(expert_GSK, E)
    if settings["gate"] == "softmax_of_chosen":
        among_GSE = chosen_GSKE.sum(dim=2) > 0
        gate_GSK = torch.einsum("gse,gske->gsk", call("softmax", logits_GSE, dim=-1, mask=among_GSE), chosen_GSKE)
    else:
        gate_GSK = torch.einsum("gse,gske->gsk", probs_GSE, chosen_GSKE)
        gate_GSK = call("renormalise", gate_GSK) if settings["gate"] == "renormalised" else gate_GSK
    held_GSKEC = chosen_GSKE[..., None] * one_hot(facts["slot"], C)[..., None, :] * kept_GSK[..., None, None]
    x_GECD = torch.einsum("gskec,gsd->gecd", held_GSKEC, leaves["x"])
    mask_GECF = torch.einsum("gskec,gskf->gecf", held_GSKEC, data["hidden_mask"])
    out_GECD = _experts(x_GECD, mask_GECF, leaves, settings, call)
    combine_GSEC = torch.einsum("gskec,gsk->gsec", held_GSKEC, gate_GSK)
    out_GSD = (torch.einsum("gsec,gecd->gsd", combine_GSEC, out_GECD) + leaves["b_shared"]) * valid_GS[..., None]

    booked_GSKE = chosen_GSKE[:, :, : settings["counted_choices"]] * (valid_GS[..., None, None] if settings["excludes_pads"] else 1.0)
    f_GE = booked_GSKE.sum(dim=(1, 2)) / (max(S, 1) * settings["counted_choices"])
    aux_loss = _balance(probs_GSE, f_GE, valid_GS, settings["excludes_pads"])
    if settings["second_loss"]:
        without_first_GSE = 1.0 - chosen_GSKE[:, :, 0] * valid_GS[..., None]
        P_GE = call("renormalise", probs_GSE * without_first_GSE).sum(dim=1) / max(S, 1)
        f2_GE = (one_hot(facts["second"], E) * valid_GS[..., None]).sum(dim=1) / max(S, 1)
        aux_loss = aux_loss + settings["second_loss"] * E * (f2_GE * P_GE).sum() / len(P_GE)
    return {"out": out_GSD, "aux_loss": aux_loss, "z_loss": _z_loss(logits_GSE, valid_GS, call)}


def expert_choice(leaves: Values, data: Values, facts: Values, settings: dict[str, Any], call: Any) -> Values:
    """Experts that choose tokens; facts: token, kept (G, E, C), first (G, S), valid."""
    valid_GS, is_selection = facts["valid"], settings["rule"] == "expert_selection"
    (G, S), E = valid_GS.shape, leaves["w_router"].shape[1]
    logits_GSE = torch.einsum("gsd,de->gse", leaves["x"] * data["noise_factor"], leaves["w_router"]) + leaves["b_router"]
    if is_selection:
        probs_GSE = call("softmax", logits_GSE, dim=1, mask=valid_GS[..., None].expand(G, S, E))
    else:
        probs_GSE = call("softmax", logits_GSE, dim=-1)
    held_GSEC = (one_hot(facts["token"], S) * facts["kept"][..., None]).permute(0, 3, 1, 2)
    weight_GSEC = held_GSEC * probs_GSE[..., None]
    if is_selection:
        weight_GSEC = weight_GSEC / held_GSEC.sum(dim=(2, 3), keepdim=True).clamp(min=1.0)
    out_GECD = _experts(torch.einsum("gsec,gsd->gecd", held_GSEC, leaves["x"]), data["hidden_mask"], leaves, settings, call)
    out_GSD = (torch.einsum("gsec,gecd->gsd", weight_GSEC, out_GECD) + leaves["b_shared"]) * valid_GS[..., None]
    if is_selection:
        share_GS = probs_GSE.sum(dim=2) / E
        aux_loss = (valid_GS.double().sum(dim=1) * (share_GS**2).sum(dim=1)).sum() / G
    elif settings["rule"] == "switch_max":
        f_GE = one_hot(facts["first"], E).sum(dim=1) / max(S, 1)
        aux_loss = _balance(probs_GSE, f_GE, valid_GS, excludes_pads=False)
    else:
        aux_loss = probs_GSE.sum() * 0.0
    return {"out": out_GSD, "aux_loss": aux_loss, "z_loss": _z_loss(logits_GSE, valid_GS, call)}


def _threshold(noisy_GSE: Tensor, K: int) -> Tensor:
    """Return the one-hot of the K-th highest of the others, for each expert; ties to the lowest index."""
    E = noisy_GSE.shape[-1]
    others_GSEE = noisy_GSE[:, :, None, :].expand(-1, -1, E, E).masked_fill(torch.eye(E, dtype=torch.bool), -math.inf)
    return one_hot(others_GSEE.sort(dim=-1, descending=True, stable=True).indices[..., K - 1], E)


def noisy_top_k(leaves: Values, data: Values, facts: Values, settings: dict[str, Any], call: Any) -> Values:
    """Shazeer's gate with both losses; facts: expert, slot, kept (G, S, K), noisy (G, S, E) as the choice read it."""
    expert_GSK, kept_GSK, K = facts["expert"], facts["kept"], facts["expert"].shape[-1]
    E, C = leaves["w_gate_router"].shape[1], _slots(facts["slot"], facts["kept"])
    clean_GSE = torch.einsum("gsd,de->gse", leaves["x"], leaves["w_gate_router"])
    scale_GSE = call("softplus", torch.einsum("gsd,de->gse", leaves["x"], leaves["w_noise"])) + settings["noise_floor"]
    noisy_GSE = clean_GSE + data["noise"] * scale_GSE
    chosen_GSKE = one_hot(expert_GSK, E)
    gate_GSE = call("softmax", noisy_GSE, dim=-1, mask=chosen_GSKE.sum(dim=2) > 0)
    held_GSKEC = chosen_GSKE[..., None] * one_hot(facts["slot"], C)[..., None, :] * kept_GSK[..., None, None]
    held_GSEC = held_GSKEC.sum(dim=2)
    x_GECD = torch.einsum("gsec,gsd->gecd", held_GSEC, leaves["x"])
    mask_GECF = torch.einsum("gskec,gskf->gecf", held_GSKEC, data["hidden_mask"])
    out_GECD = _experts(x_GECD, mask_GECF, leaves, settings, call)
    out_GSD = torch.einsum("gsec,gse,gecd->gsd", held_GSEC, gate_GSE, out_GECD)
    importance_loss = call("cv_squared", gate_GSE.sum(dim=1), epsilon=settings["epsilon"]).mean()
    load_loss = clean_GSE.sum() * 0.0
    if K < E:
        passed_GSE = torch.einsum("gsef,gsf->gse", _threshold(facts["noisy"], K), noisy_GSE)
        chance_GSE = call("normal_cdf", call("quotient", call("minus", clean_GSE, passed_GSE), scale_GSE))
        load_loss = call("cv_squared", chance_GSE.sum(dim=1), epsilon=settings["epsilon"]).mean()
    return {"out": out_GSD, "importance_loss": importance_loss, "load_loss": load_loss}


def switch_attention(leaves: Values, data: Values, facts: Values, settings: dict[str, Any], call: Any) -> Values:
    """Attention whose queries and shared keys and values come from the routed expert; facts: expert, slot, kept, valid (G, S), allowed (B, L, L)."""
    valid_GS = facts["valid"]
    (B, L, D), (G, S), (H, K, _) = leaves["x"].shape, valid_GS.shape, leaves["w_attention_out"].shape
    E, C = leaves["w_router"].shape[1], _slots(facts["slot"], facts["kept"])
    x_GSD = leaves["x"].reshape(G, S, D)
    logits_GSE = torch.einsum("gsd,de->gse", x_GSD * data["noise_factor"], leaves["w_router"])
    probs_GSE = call("softmax", logits_GSE, dim=-1)
    chosen_GSE = one_hot(facts["expert"], E)
    gate_GS = (probs_GSE * chosen_GSE).sum(dim=-1)
    held_GSEC = chosen_GSE[..., None] * one_hot(facts["slot"], C)[..., None, :] * facts["kept"][..., None, None]
    z_GECF = torch.einsum("gsec,gsd,edf->gecf", held_GSEC, x_GSD, leaves["w_in"])
    mask_GECF = torch.einsum("gsec,gsf->gecf", held_GSEC, data["hidden_mask"])
    hidden_GECF = call("activation", z_GECF, kind=settings["activation"]) * mask_GECF
    combine_GSEC = held_GSEC * gate_GS[..., None, None]
    query, key = (torch.einsum("gsec,gecf,efhk->gshk", combine_GSEC, hidden_GECF, leaves[name]).reshape(B, L, H, K) for name in ("w_query", "w_key"))
    scores_BHLM = torch.einsum("blhk,bmhk->bhlm", query / math.sqrt(K), key) + leaves["bias"]
    allowed_BHLM = facts["allowed"][:, None].expand(B, H, L, L)
    probs_BHLM = call("softmax", scores_BHLM, dim=-1, mask=allowed_BHLM) * data["factor"]
    out_BLD = torch.einsum("bhlm,bmhk,hkd->bld", probs_BHLM, key, leaves["w_attention_out"])
    aux_loss = _balance(probs_GSE, chosen_GSE.sum(dim=1) / max(S, 1), valid_GS, excludes_pads=False)
    return {"out": out_BLD, "aux_loss": aux_loss, "z_loss": _z_loss(logits_GSE, valid_GS, call)}


# ----------------------------------------------------------------------------------------------------------------------- running


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(layer: Layer, problem: Problem, call: Any, sign: Callable[[Tensor], Tensor]) -> dict[str, np.ndarray]:
    leaves = {name: sign(torch.from_numpy(np.array(value))).requires_grad_() for name, value in problem.leaves.items()}
    data = {name: sign(torch.from_numpy(np.array(value))) for name, value in problem.data.items()}
    facts = {name: torch.from_numpy(np.array(value)) for name, value in problem.facts.items()}
    values = layer(leaves, data, facts, problem.settings, call)
    objective = sum(
        ((values[name] * sign(torch.from_numpy(np.asarray(dout, np.float64)))).sum() for name, dout in problem.douts.items()),
        start=torch.zeros(()).double(),
    )
    gradients = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
    found = {name: value.detach().numpy() for name, value in values.items()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"d{name}"] = (torch.zeros_like(leaf) if gradient is None else gradient).detach().numpy()
    return found


@_one_thread()
def autograd_of(layer: Layer, problem: Problem) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the outputs and every leaf's gradient of sum over outputs of <output, dout>, and the sums of the absolute terms of each element."""
    exact = Exact()
    values = _run(layer, problem, exact, lambda tensor: tensor)
    return values, _run(layer, problem, Absolute(exact), torch.abs)
