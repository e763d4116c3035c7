"""The Switch layer as people run it today: each peer is PyTorch, float32, gradients by autograd, and does its own routing.

All get the same tokens, weights and capacity: a claim beyond the capacity is dropped. `einsum` multiplies by one-hot tensors (Mesh-TensorFlow's way);
`bmm` packs into experts x slots and multiplies batches; `grouped_mm` sorts the tokens and calls torch's grouped product; `loop` sorts them and runs
expert after expert; `mask` picks each expert's tokens by a mask; `transformers` is the package's own layer.
May import: numpy, torch, transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

DENSE_LIMIT = 1 << 30  # elements of a one-hot tensor beyond which `einsum` is not run


class Problem(NamedTuple):
    """One layer's data: x (T, D), weights, the gradient of the output, and the capacity."""

    x_TD: np.ndarray
    w_router_DE: np.ndarray
    w_in_EDF: np.ndarray
    w_out_EFD: np.ndarray
    dout_TD: np.ndarray
    capacity: int


def route(x_TD: torch.Tensor, w_router_DE: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each token's expert, slot, whether it is kept, and its gate."""
    probs_TE = torch.softmax(x_TD @ w_router_DE, dim=-1)
    expert_T = torch.argmax(probs_TE, dim=-1)
    gate_T = torch.gather(probs_TE, 1, expert_T[:, None])[:, 0]
    chosen_TE = torch.nn.functional.one_hot(expert_T, w_router_DE.shape[1])
    slot_T = torch.gather(torch.cumsum(chosen_TE, dim=0), 1, expert_T[:, None])[:, 0] - 1
    return expert_T, slot_T, slot_T < capacity, gate_T


def einsum(x: torch.Tensor, w_router: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, capacity: int) -> torch.Tensor:
    """Dispatch and combine by products with one-hot tensors."""
    expert_T, slot_T, kept_T, gate_T = route(x, w_router, capacity)
    E = w_in.shape[0]
    to_expert_TE = torch.nn.functional.one_hot(expert_T, E).to(x.dtype) * kept_T[:, None]
    to_slot_TC = torch.nn.functional.one_hot(slot_T.clamp(max=capacity - 1), capacity).to(x.dtype)
    pack_TEC = to_expert_TE[:, :, None] * to_slot_TC[:, None, :]
    hidden_ECF = torch.relu(torch.bmm(torch.einsum("tec,td->ecd", pack_TEC, x), w_in))
    return torch.einsum("tec,ecd->td", pack_TEC * gate_T[:, None, None], torch.bmm(hidden_ECF, w_out))


def bmm(x: torch.Tensor, w_router: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, capacity: int) -> torch.Tensor:
    """Copy into experts x slots, multiply batches, copy back."""
    expert_T, slot_T, kept_T, gate_T = route(x, w_router, capacity)
    (E, D, _), place_T = w_in.shape, torch.where(kept_T, expert_T * capacity + slot_T, w_in.shape[0] * capacity)
    packed_ND = x.new_zeros(E * capacity + 1, D).index_copy(0, place_T, x)  # the last row takes what is dropped
    out_ECD = torch.bmm(torch.relu(torch.bmm(packed_ND[:-1].view(E, capacity, D), w_in)), w_out)
    out_ND = torch.cat([out_ECD.reshape(E * capacity, D), x.new_zeros(1, D)])
    return gate_T[:, None] * out_ND[place_T]


def _sorted(expert_T: torch.Tensor, kept_T: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor]:
    token_N = torch.argsort(torch.where(kept_T, expert_T, E), stable=True)[: int(kept_T.sum())]
    return token_N, torch.bincount(expert_T[kept_T], minlength=E)


def grouped_mm(x: torch.Tensor, w_router: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, capacity: int) -> torch.Tensor:
    """Sort by expert and call the grouped product."""
    expert_T, _, kept_T, gate_T = route(x, w_router, capacity)
    token_N, count_E = _sorted(expert_T, kept_T, w_in.shape[0])
    ends_E = torch.cumsum(count_E, 0).to(torch.int32)
    hidden_NF = torch.relu(torch._grouped_mm(x[token_N], w_in, offs=ends_E))
    out_ND = torch._grouped_mm(hidden_NF, w_out, offs=ends_E)
    return torch.zeros_like(x).index_add(0, token_N, gate_T[token_N, None] * out_ND)


def loop(x: torch.Tensor, w_router: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, capacity: int) -> torch.Tensor:
    """Sort by expert and run one expert after another."""
    expert_T, _, kept_T, gate_T = route(x, w_router, capacity)
    token_N, count_E = _sorted(expert_T, kept_T, w_in.shape[0])
    parts = [
        torch.relu(rows_ND @ w_in_DF) @ w_out_FD
        for rows_ND, w_in_DF, w_out_FD in zip(x[token_N].split(count_E.tolist()), w_in.unbind(), w_out.unbind(), strict=True)
    ]
    return torch.zeros_like(x).index_add(0, token_N, gate_T[token_N, None] * torch.cat(parts))


def mask(x: torch.Tensor, w_router: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, capacity: int) -> torch.Tensor:
    """Pick each expert's tokens by a mask, and add them back."""
    expert_T, _, kept_T, gate_T = route(x, w_router, capacity)
    out = torch.zeros_like(x)
    for e, (w_in_DF, w_out_FD) in enumerate(zip(w_in.unbind(), w_out.unbind(), strict=True)):
        token_N = torch.nonzero((expert_T == e) & kept_T)[:, 0]
        out = out.index_add(0, token_N, gate_T[token_N, None] * (torch.relu(x[token_N] @ w_in_DF) @ w_out_FD))
    return out


FORMS = {form.__name__: form for form in (einsum, bmm, grouped_mm, loop, mask)}


class Peer(NamedTuple):
    """Something to run: `run` does forward and backward, `results` returns out, dx, dw_in, dw_out of the last run."""

    run: Callable[[], None]
    results: Callable[[], dict[str, np.ndarray]]


def torch_peer(name: str, problem: Problem, is_compiled: bool) -> Peer:
    """Return one of FORMS as a peer."""
    form = torch.compile(FORMS[name]) if is_compiled else FORMS[name]
    leaves = [torch.tensor(array, requires_grad=True) for array in problem[:4]]
    dout, kept = torch.from_numpy(problem.dout_TD), {}

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        out = form(*leaves, problem.capacity)
        out.backward(dout)
        kept["out"] = out

    def results() -> dict[str, np.ndarray]:
        x, _, w_in, w_out = leaves
        return {"out": kept["out"].detach().numpy(), "dx": x.grad.numpy(), "dw_in": w_in.grad.numpy(), "dw_out": w_out.grad.numpy()}

    return Peer(run, results)


def transformers_peer(problem: Problem, is_compiled: bool) -> Peer:
    """Return the Switch layer of Hugging Face transformers, with our weights; all tokens are one sequence, so that they are one group."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    (E, D, F), capacity = problem.w_in_EDF.shape, problem.capacity
    config = SwitchTransformersConfig(d_model=D, d_ff=F, num_experts=E, expert_capacity=capacity, router_jitter_noise=0.0, dropout_rate=0.0)
    layer: Any = SwitchTransformersSparseMLP(config)
    experts = [layer.experts[f"expert_{e}"] for e in range(E)]
    with torch.no_grad():
        layer.router.classifier.weight.copy_(torch.from_numpy(problem.w_router_DE.T))
        for e, expert in enumerate(experts):
            expert.wi.weight.copy_(torch.from_numpy(problem.w_in_EDF[e].T))
            expert.wo.weight.copy_(torch.from_numpy(problem.w_out_EFD[e].T))
    call = torch.compile(layer) if is_compiled else layer
    x, dout, kept = torch.tensor(problem.x_TD[None], requires_grad=True), torch.from_numpy(problem.dout_TD[None]), {}

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        out = call(x)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(dout)
        kept["out"] = out

    def gradient(weight: torch.Tensor) -> np.ndarray:
        return (torch.zeros_like(weight) if weight.grad is None else weight.grad).T.numpy()

    def results() -> dict[str, np.ndarray]:
        dw_in, dw_out = (np.stack([gradient(getattr(expert, name).weight) for expert in experts]) for name in ("wi", "wo"))
        return {"out": kept["out"].detach().numpy()[0], "dx": x.grad.numpy()[0], "dw_in": dw_in, "dw_out": dw_out}

    return Peer(run, results)


def peer(name: str, problem: Problem, is_compiled: bool) -> Peer | str:
    """Return a peer that has run once, or why it does not run."""
    (T, _), E = problem.x_TD.shape, problem.w_router_DE.shape[1]
    if name == "einsum" and T * E * problem.capacity > DENSE_LIMIT:
        return f"its one-hot tensor has {T * E * problem.capacity:.1e} elements"
    try:
        made = transformers_peer(problem, is_compiled) if name == "transformers" else torch_peer(name, problem, is_compiled)
        made.run()
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a package raises, the others still run
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return made


NAMES = (*FORMS, "transformers")
