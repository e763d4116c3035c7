# May import: standard library, numpy, torch.
"""An independent Switch layer in torch float64, for its gradients: the differentiable part alone, along a given route, by autograd.

Written from the contract (1.2, 1.3), the paper (2.1, 2.2) and the knobs' meanings. It moves tokens by the one-hot dispatch and combine
tensors of Mesh TensorFlow, where the reference moves rows by index, so that the two share no mechanism: two tokens in one slot would be added here
and overwritten there. Choices, slots and survivors are given; everything else (who is padding, what f counts, what the gate reads) is decided here.

The same chain runs a second time *in absolute terms*, which is what rounding errors are measured against. There every input is replaced by
its absolute value, so that every product and sum is one of absolute terms, and each nonlinear function is replaced by a linear one at the same
place, whose factor is the sum of the absolute terms of its derivative at the argument that it really had:

    activation     L z                     |act(z)| <= L |z| and |act'(z)| <= L
    softmax        p; back p (d + sum p d) from p (d - sum p d)
    sigmoid        s; back d s (1 + s)     from d s (1 - s)
    cap tanh(r/cap) its size; back d (1 + t^2)  from d (1 - t^2)
    log-sum-exp    |max| + |log total| + 1; back d p    total = sum exp(l - max): a relative error of it is an absolute one of its log
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Sign = Callable[[Tensor], Tensor]  # the identity, or the absolute value in the run in absolute terms
LEAVES = ("x", "w_router", "w_in", "w_gate", "w_out", "b_router", "b_in", "b_gate", "b_out")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu_erf": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}
# Upper bounds of max |act'|, which are 1, 1.1290, 1.1291 and 1.0999; all four functions are 0 at 0, so they bound |act(z) / z| too.
STEEPEST = {"relu": 1.0, "gelu_erf": 1.13, "gelu_tanh": 1.13, "silu": 1.1}


class Primitives:
    """The nonlinear functions of the layer; each call keeps its argument, for the run in absolute terms."""

    def __init__(self, activation: str, cap: float) -> None:
        self.name, self.cap, self.seen = activation, cap, {}

    def activation(self, z: Tensor) -> Tensor:
        self.seen["activation"] = z.detach()
        return ACTIVATIONS[self.name](z)

    def capped(self, raw: Tensor) -> Tensor:
        self.seen["capped"] = raw.detach()
        return self.cap * torch.tanh(raw / self.cap) if self.cap else raw

    def softmax(self, logits: Tensor) -> Tensor:
        self.seen["softmax"] = logits.detach()
        return torch.softmax(logits, dim=-1)

    def sigmoid(self, logit: Tensor) -> Tensor:
        self.seen["sigmoid"] = logit.detach()
        return torch.sigmoid(logit)

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        self.seen["log_sum_exp"] = logits.detach()
        return torch.logsumexp(logits, dim=-1)


class _Linear(torch.autograd.Function):
    """A value that is given, with a pull-back that is given."""

    @staticmethod
    def forward(ctx: Any, argument: Tensor, value: Tensor, pull: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.pull = pull
        return value.clone()

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pull(dvalue), None, None


class AbsoluteTerms:
    """The same functions in absolute terms, at the arguments that the exact run met."""

    def __init__(self, exact: Primitives) -> None:
        self.name, self.cap, self.seen = exact.name, exact.cap, exact.seen

    def activation(self, z: Tensor) -> Tensor:
        return STEEPEST[self.name] * z

    def capped(self, raw: Tensor) -> Tensor:
        if not self.cap:
            return raw
        t = torch.tanh(self.seen["capped"] / self.cap)
        return _Linear.apply(raw, self.cap * t.abs(), lambda d: d * (1.0 + t**2))

    def softmax(self, logits: Tensor) -> Tensor:
        p = torch.softmax(self.seen["softmax"], dim=-1)
        return _Linear.apply(logits, p, lambda d: p * (d + (p * d).sum(dim=-1, keepdim=True)))

    def sigmoid(self, logit: Tensor) -> Tensor:
        s = torch.sigmoid(self.seen["sigmoid"])
        return _Linear.apply(logit, s, lambda d: d * s * (1.0 + s))

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        read = self.seen["log_sum_exp"]
        highest = read.amax(dim=-1)
        log_total = torch.logsumexp(read - highest[..., None], dim=-1)
        return _Linear.apply(logits, highest.abs() + log_total.abs() + 1.0, lambda d: d[..., None] * torch.softmax(read, dim=-1))


class Facts(NamedTuple):
    """What has no gradient: the route, and everything counted."""

    pad_GS: Tensor
    silent_GS: Tensor  # rows whose output is the constant zero
    dispatch_GSEC: Tensor  # 1 where token s holds slot c of expert e
    chosen_GSE: Tensor  # one-hot of the chosen expert, kept or not
    kept_GS: Tensor
    f_GE: Tensor


class Losses(NamedTuple):
    """What the layer returns, differentiable."""

    out_GSD: Tensor
    aux_loss: Tensor
    z_loss: Tensor


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, np.float64))


def _one_hot(index: Tensor, size: int) -> Tensor:
    return (index[..., None] == torch.arange(size)).double()


def _is_zeroed(case: Any, dialect: Any) -> Tensor:
    G, S, _ = case.x.shape
    valid = case.get("valid")
    real_GS = torch.ones((G, S), dtype=torch.bool) if valid is None else torch.from_numpy(np.array(valid))
    return ~real_GS if dialect.pad.zero_input is True else torch.zeros_like(real_GS)


def _is_pad(case: Any, dialect: Any) -> Tensor:
    if dialect.pad.detect == "zero_row":
        read_GSD = _tensor(case.x).masked_fill(_is_zeroed(case, dialect)[..., None], 0.0)
        return (read_GSD == 0.0).all(dim=-1)
    valid = case.get("valid")
    return torch.zeros(case.x.shape[:2], dtype=torch.bool) if valid is None else ~torch.from_numpy(np.array(valid))


def router_logits(case: Any, leaves: dict[str, Tensor], x_GSD: Tensor, dialect: Any, primitives: Any, sign: Sign) -> Tensor:
    """Return the logits that the gate reads: x w + b, plus what the dialect adds before the cap."""
    raw_GSE = torch.einsum("gsd,de->gse", x_GSD, leaves["w_router"])
    if "b_router" in leaves:
        raw_GSE = raw_GSE + leaves["b_router"]
    noise = case.get("noise")
    if noise is not None and dialect.noise.kind.startswith("z_add") and dialect.noise.gate_from == "noisy":
        raw_GSE = raw_GSE + sign(_tensor(noise))
    if dialect.select.rule == "second_place":
        raw_GSE = raw_GSE + sign(_tensor(case.select_noise))
    return primitives.capped(raw_GSE)


def read_inputs(case: Any, leaves: dict[str, Tensor], dialect: Any, sign: Sign) -> tuple[Tensor, Tensor]:
    """Return what the router reads and what the experts read."""
    x_GSD = torch.where(_is_zeroed(case, dialect)[..., None], torch.zeros(()).double(), leaves["x"])
    noise = case.get("noise")
    if noise is None or not dialect.noise.kind.startswith("x_"):
        return x_GSD, x_GSD
    noised_GSD = x_GSD * sign(_tensor(noise))
    return noised_GSD, noised_GSD if dialect.noise.leak_to_experts == "if_same_dtype" else x_GSD  # float64 everywhere: the same dtype


def decide(case: Any, route: Any, dialect: Any) -> Facts:
    """Settle everything discrete: padding, dispatch, and the fraction f of the balance loss."""
    expert_GS, slot_GS, kept_GS = (torch.from_numpy(np.array(part)) for part in route)
    E = case.w_router.shape[1]
    pad_GS = _is_pad(case, dialect)
    C = int(slot_GS[kept_GS].max()) + 1 if kept_GS.any() else 1
    chosen_GSE = _one_hot(expert_GS, E)
    dispatch_GSEC = chosen_GSE[..., None] * _one_hot(slot_GS, C)[..., None, :] * kept_GS[..., None, None]
    claims_GS = ~pad_GS if dialect.pad.route == "exclude" else torch.ones_like(pad_GS)

    first_GS = expert_GS
    if dialect.select.rule == "ntlb" or dialect.aux.f.count == "logits":
        leaves = {name: _tensor(case[name]) for name in ("x", "w_router", "b_router") if name in case.arrays}
        x_router_GSD, _ = read_inputs(case, leaves, dialect, lambda data: data)
        scores_GSE = router_logits(case, leaves, x_router_GSD, dialect, Primitives("relu", dialect.router.logit_cap), lambda data: data)
        if dialect.aux.f.count == "choice" and dialect.noise.gate_from == "clean" and case.get("noise") is not None:
            scores_GSE = scores_GSE + _tensor(case.noise)
        first_GS = scores_GSE.argmax(dim=-1)

    counted_GS, booked_GS = torch.ones_like(pad_GS), first_GS
    for concerned_GS, treatment in ((claims_GS & ~kept_GS, dialect.aux.f.drops), (pad_GS, dialect.aux.f.pads)):
        if treatment == "exclude":
            counted_GS = counted_GS & ~concerned_GS
        elif treatment == "to_expert0":
            booked_GS = booked_GS.masked_fill(concerned_GS, 0)
    f_GE = (_one_hot(booked_GS, E) * counted_GS[..., None]).sum(dim=1) * _inverse_rows(pad_GS, kept_GS, dialect)[:, None]
    silent_GS = pad_GS & torch.tensor(dialect.pad.route != "include")
    return Facts(pad_GS, silent_GS, dispatch_GSEC, chosen_GSE, kept_GS, f_GE)


def _inverse_rows(pad_GS: Tensor, kept_GS: Tensor, dialect: Any) -> Tensor:
    """Return one over the denominator of f and P of each group, 0 for a group without rows."""
    rows_G = {"S": torch.ones_like(pad_GS), "valid": ~pad_GS, "kept": kept_GS}[dialect.aux.denom].sum(dim=1).double()
    return torch.where(rows_G > 0, 1.0 / rows_G.clamp(min=1.0), torch.zeros_like(rows_G))


def gate_of(probs_GSE: Tensor, logits_GSE: Tensor, facts: Facts, dialect: Any, primitives: Any) -> Tensor:
    """Return the factor of the chosen expert."""
    p_GS = (probs_GSE * facts.chosen_GSE).sum(dim=-1)
    value = dialect.gate.value
    if value == "sigmoid":
        return primitives.sigmoid((logits_GSE * facts.chosen_GSE).sum(dim=-1))
    if value == "ratio_st":
        is_zero_GS = (p_GS == 0.0).detach()  # a padding row that is sent to an expert that is ruled out: no 0 / 0
        return torch.where(is_zero_GS, torch.ones(()).double(), p_GS / p_GS.detach().masked_fill(is_zero_GS, 1.0))
    return p_GS if value == "p" else torch.ones_like(p_GS)  # norm_topk: p / p of one choice is the constant 1


def expert_path(
    x_GSD: Tensor, gate_GS: Tensor, case: Any, leaves: dict[str, Tensor], facts: Facts, dialect: Any, primitives: Any, sign: Sign
) -> Tensor:
    """Return what comes back to each token from its expert, weighed."""
    site, dispatch_GSEC = dialect.gate.site, facts.dispatch_GSEC
    if site in ("input", "input_and_output"):
        x_GSD = x_GSD * gate_GS[..., None]
    sent_GSEC = dispatch_GSEC
    if dialect.dispatch_grad == "straight_through":
        sent_GSEC = dispatch_GSEC * (1.0 + gate_GS - gate_GS.detach())[..., None, None]
    x_GECD = torch.einsum("gsec,gsd->gecd", sent_GSEC, x_GSD)

    def branch(kind: str) -> Tensor:
        z_GECF = torch.einsum("gecd,edf->gecf", x_GECD, leaves[f"w_{kind}"])
        return z_GECF + leaves[f"b_{kind}"][:, None] if f"b_{kind}" in leaves else z_GECF

    hidden_GECF = primitives.activation(branch("gate")) * branch("in") if "w_gate" in leaves else primitives.activation(branch("in"))
    if case.get("hidden_mask") is not None:
        hidden_GECF = hidden_GECF * torch.einsum("gsec,gsf->gecf", dispatch_GSEC, sign(_tensor(case.hidden_mask)))
    out_GECD = torch.einsum("gecf,efd->gecd", hidden_GECF, leaves["w_out"])
    if "b_out" in leaves and leaves["b_out"].ndim == 2:
        out_GECD = out_GECD + leaves["b_out"][:, None]
    combine_GSEC = dispatch_GSEC
    if site == "hidden":  # (gate * hidden) w_out + gate * b_out: the bias goes with the rest
        out_GECD = out_GECD * torch.einsum("gsec,gs->gec", dispatch_GSEC, gate_GS)[..., None]
    elif site != "input":
        combine_GSEC = dispatch_GSEC * gate_GS[..., None, None]
    return torch.einsum("gsec,gecd->gsd", combine_GSEC, out_GECD)


def balance_loss(probs_GSE: Tensor, facts: Facts, dialect: Any) -> Tensor:
    """Return the mean over groups of the dialect's group term scale * sum_e f_e P_e."""
    G, S, E = probs_GSE.shape
    if dialect.aux.P_pads == "exclude":
        probs_GSE = probs_GSE * ~facts.pad_GS[..., None]
    P_GE = probs_GSE.sum(dim=1) * _inverse_rows(facts.pad_GS, facts.kept_GS, dialect)[:, None]
    term_G = (facts.f_GE * P_GE).sum(dim=-1) * {"E": E, "local_E": E, "none": 1, "inverse_E": 1 / E}[dialect.aux.scale_E]
    if dialect.aux.pad_scale == "nonpad_fraction":
        term_G = term_G * (~facts.pad_GS).sum(dim=1) / max(S, 1)
    return term_G.sum() / G


def router_z_loss(logits_GSE: Tensor, facts: Facts, dialect: Any, primitives: Any) -> Tensor:
    """Return the sum of squared log-sum-exp over the number of rows that the dialect divides by."""
    if dialect.z.pads == "zero_logits":
        logits_GSE = torch.where(facts.pad_GS[..., None], torch.zeros(()).double(), logits_GSE)
    square_GS = primitives.log_sum_exp(logits_GSE) ** 2
    if dialect.z.pads == "exclude":
        square_GS = square_GS * ~facts.pad_GS
    rows = int((~facts.pad_GS).sum()) if dialect.z.denom == "valid" else facts.pad_GS.numel()
    return square_GS.sum() / rows if rows else square_GS.sum() * 0.0


def forward(case: Any, leaves: dict[str, Tensor], facts: Facts, dialect: Any, primitives: Any, sign: Sign) -> Losses:
    """Compute the layer along the route in `facts`; `sign` is applied to data that has no gradient."""
    x_router_GSD, x_expert_GSD = read_inputs(case, leaves, dialect, sign)
    logits_GSE = router_logits(case, leaves, x_router_GSD, dialect, primitives, sign)
    probs_GSE = primitives.softmax(logits_GSE)
    gate_GS = gate_of(probs_GSE, logits_GSE, facts, dialect, primitives)
    out_GSD = expert_path(x_expert_GSD, gate_GS, case, leaves, facts, dialect, primitives, sign)
    if dialect.drop.output != "zero":
        passed_GSD = x_expert_GSD if dialect.drop.output == "x" else x_expert_GSD * gate_GS[..., None]
        out_GSD = out_GSD + passed_GSD * ~facts.kept_GS[..., None]
    if "b_out" in leaves and leaves["b_out"].ndim == 1:
        out_GSD = out_GSD + leaves["b_out"]
    out_GSD = out_GSD.masked_fill(facts.silent_GS[..., None], 0.0)
    return Losses(out_GSD, balance_loss(probs_GSE, facts, dialect), router_z_loss(logits_GSE, facts, dialect, primitives))


def _run(case: Any, facts: Facts, dialect: Any, primitives: Any, sign: Sign) -> dict[str, np.ndarray]:
    leaves = {name: sign(_tensor(case[name])).requires_grad_() for name in LEAVES if name in case.arrays}
    losses = forward(case, leaves, facts, dialect, primitives, sign)
    douts = [sign(_tensor(case.get(name, 0.0))) for name in ("dout", "daux", "dz")]
    total = sum(((value * dvalue).sum() for value, dvalue in zip(losses, douts, strict=True)), start=torch.zeros(()).double())
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named = dict(zip(("out", "aux_loss", "z_loss"), losses, strict=True))
    for name, gradient in zip(leaves, gradients, strict=True):
        named[f"d{name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return {name: value.detach().numpy() for name, value in named.items()}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: for arrays of a few hundred numbers, waking the others takes most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def autograd_outputs(case: Any, route: Any, dialect: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return out, both losses and every gradient along a given route, and the sum of the absolute terms of each element.

    Parameters
    ----------
    case : Case
        The contract's case.
    route : (expert_GS, slot_GS, kept_GS)
        Taken as it is.
    dialect : Dialect
        Read by its knobs' names.
    """
    facts = decide(case, route, dialect)
    primitives = Primitives(case.activation, dialect.router.logit_cap)
    values = _run(case, facts, dialect, primitives, lambda data: data)
    return values, _run(case, facts, dialect, AbsoluteTerms(primitives), torch.abs)
