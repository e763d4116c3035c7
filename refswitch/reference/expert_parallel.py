# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""The Switch layer on many ranks: the ranks are axes of one array, and the all-to-all swaps two of them.

Paper: 5, eq. (7), figure 9, appendix F. Spec: E-CROSS-1 to E-SUM-1. Read `switch` first: on one rank this is that layer in Mesh TensorFlow's dialect.

A rank has a place on three axes: its copy of the weights (A), its share of the experts (R), its part of their hidden width (one of `cuts`). Ranks
that differ in the part alone hold the same tokens, so the tokens have no such axis. The paper's five layouts on n * m ranks are

    data                     A = n           model            cuts = m          model and data    A = n, cuts = m
    expert and data          R = n           expert, model and data             R = n, cuts = m

and experts that are fewer than ranks have A > 1 and R > 1. The route of a token, out and home:

    x_ARgSD -> packed_ARgECD -> cross_out -> arrived_ARGeCD -> experts -> cross_home -> returned_ARgECD -> gate * returned -> out_ARgSD
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refswitch.config import Aux, RoundingPoints, Z
from refswitch.numbers.precision import round_to
from refswitch.reference.capacity import Route, arrival_order, slots_forward
from refswitch.reference.experts import ExpertsParams, ExpertsSaved
from refswitch.reference.losses import (
    BalanceSaved,
    ZSaved,
    balance_backward,
    balance_forward,
    counted_fraction,
    rows_of_mean,
    z_loss_backward,
    z_loss_forward,
)
from refswitch.reference.model_parallel import cut_experts_backward, cut_experts_forward, slices_of
from refswitch.reference.pack import pack, unpack
from refswitch.reference.router import (
    GateSaved,
    LogitsSaved,
    SoftmaxSaved,
    choose,
    gate_backward,
    gate_forward,
    logits_backward,
    logits_forward,
    softmax_backward,
    softmax_forward,
)
from refswitch.reference.switch import SwitchParams


class ParallelInputs(NamedTuple):
    """One call's data by rank; randomness is data too. Groups lie on the ranks in order: group (a * R + r) * g + i is the i-th of rank (a, r)."""

    x_ARgSD: np.ndarray
    valid_ARgS: np.ndarray  # False marks padding, which is not routed
    noise_factor_ARgSD: np.ndarray  # 1 where there is no noise on the router's input
    hidden_mask_ARgSF: np.ndarray  # expert dropout as a factor, already scaled; by address it can be drawn on either side of the crossing


class ParallelStatics(NamedTuple):
    """What does not change from call to call."""

    cuts: int  # parts of the experts' hidden width
    capacity: int  # slots of one expert in one group
    aux: Aux
    z: Z
    activation: str
    points: RoundingPoints


def cross_out(packed_ARgECD: np.ndarray) -> np.ndarray:
    """Send each slot to the rank that holds its expert; returns arrived_ARGeCD, all groups of a copy on each rank's share of the experts.

    Spec: E-CROSS-1, E-CROSS-2. Paper: eq. (7). Expert e lives on rank e // E_here. Its backward is `cross_home`.
    """
    A, R, g, E, C, D = packed_ARgECD.shape
    if E % R:
        raise ValueError(f"cross_out: {E} experts cannot be shared evenly by {R} ranks")
    sent_ARRgeCD = np.moveaxis(packed_ARgECD.reshape(A, R, g, R, E // R, C, D), 3, 2)  # the buffer of each rank, by destination
    arrived_ARRgeCD = np.swapaxes(sent_ARRgeCD, 1, 2)  # recv@r[s] = send@s[r]
    return arrived_ARRgeCD.reshape(A, R, R * g, E // R, C, D)


def cross_home(arrived_ARGeCD: np.ndarray) -> np.ndarray:
    """Send each slot back to the rank that it came from; returns returned_ARgECD. Spec: E-CROSS-1. Its backward is `cross_out`."""
    A, R, G, E_here, C, D = arrived_ARGeCD.shape
    sent_ARRgeCD = np.swapaxes(arrived_ARGeCD.reshape(A, R, R, G // R, E_here, C, D), 1, 2)  # recv@r[s] = send@s[r]
    return np.moveaxis(sent_ARRgeCD, 2, 3).reshape(A, R, G // R, R * E_here, C, D)


class DecisionSaved(NamedTuple):
    """What the backward of one rank's decision needs."""

    noise_factor_gSD: np.ndarray
    logits: LogitsSaved
    softmax: SoftmaxSaved
    gate: GateSaved
    balance: BalanceSaved
    z: ZSaved


class Decision(NamedTuple):
    """What one rank decides about its own tokens; its losses are the means over these."""

    route: Route
    gate_gS: np.ndarray
    aux_loss: np.ndarray
    z_loss: np.ndarray


def decide_forward(
    x_gSD: np.ndarray, valid_gS: np.ndarray, noise_factor_gSD: np.ndarray, params: SwitchParams, statics: ParallelStatics
) -> tuple[Decision, DecisionSaved]:
    """Choose an expert and a slot for each token of one rank; the router is replicated, so nobody is asked. Spec: E-CAP-1. Paper: 5.4.

    Rounding: R1, R4.
    """
    points, aux, (g, S, _), E = statics.points, statics.aux, x_gSD.shape, params.w_router_DE.shape[1]
    x_router_gSD = round_to(x_gSD * noise_factor_gSD, points.router)  # F1  R1
    logits_gSE, logits = logits_forward(x_router_gSD, np.zeros((g, S, E)), params.w_router_DE, params.b_router_E, 0.0, points)  # F2
    probs_gSE, softmax = softmax_forward(logits_gSE, points)  # F3
    expert_gS = choose(round_to(probs_gSE, points.choice))  # R4
    route = slots_forward(expert_gS, valid_gS, arrival_order(S, g), E, statics.capacity, points.positions)
    gate_gS, gate = gate_forward(probs_gSE, logits_gSE, expert_gS, "p", points)  # F4
    count_gE = counted_fraction(route, expert_gS, valid_gS, valid_gS, E, aux)
    aux_loss, balance = balance_forward(probs_gSE, count_gE, *rows_of_mean(valid_gS, route.kept_GS, aux), valid_gS, aux)  # F5
    z_loss, z = z_loss_forward(logits_gSE, valid_gS, statics.z)  # F6
    return Decision(route, gate_gS, aux_loss, z_loss), DecisionSaved(noise_factor_gSD, logits, softmax, gate, balance, z)


def decide_backward(
    dgate_gS: np.ndarray, daux: float, dz: float, saved: DecisionSaved, params: SwitchParams
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return dx_gSD, and this rank's part of dw_router_DE and db_router_E."""
    dlogits_z_gSE = z_loss_backward(dz, saved.z)  # B6
    dprobs_aux_gSE = balance_backward(daux, saved.balance)  # B5
    dprobs_gate_gSE, _ = gate_backward(dgate_gS, saved.gate, "p")  # B4
    dlogits_gSE = softmax_backward(dprobs_gate_gSE + dprobs_aux_gSE, saved.softmax) + dlogits_z_gSE  # B3
    dx_router_gSD, dw_router_DE, db_router_E = logits_backward(dlogits_gSE, saved.logits, params.w_router_DE)  # B2
    return dx_router_gSD * saved.noise_factor_gSD, dw_router_DE, db_router_E  # B1


class ParallelOutputs(NamedTuple):
    """Everything that the ranks compute."""

    out_ARgSD: np.ndarray
    aux_loss: np.ndarray
    z_loss: np.ndarray
    decisions: list[Decision]  # by rank


class ParallelSaved(NamedTuple):
    """What the backward needs: activations, never parameters."""

    valid_ARgS: np.ndarray
    gate_ARgS: np.ndarray
    returned_ARgSD: np.ndarray  # for the gate's gradient
    share_of_z: np.ndarray  # by rank
    decisions: list[Decision]
    decided: list[DecisionSaved]
    experts: list[list[ExpertsSaved]]


def stack_ranks(by_rank: list[np.ndarray], A: int, R: int) -> np.ndarray:
    """Return the ranks' arrays as one, with the ranks as its first two axes."""
    return np.stack(by_rank).reshape(A, R, *by_rank[0].shape)


def expert_parallel_forward(inputs: ParallelInputs, params: SwitchParams, statics: ParallelStatics) -> tuple[ParallelOutputs, ParallelSaved]:
    """Compute the layer on all ranks. Spec: E-SAME-1, E-LOSS-1. Paper: 5.4, 5.5. A buffer has room for every slot, so nobody asks how many are used.

    Rounding: R9.
    """
    (A, R, _, S, _), E = inputs.x_ARgSD.shape, params.w_router_DE.shape[1]
    ranks, shares, C = list(np.ndindex(A, R)), slices_of(E, R), min(statics.capacity, S)
    read = [(inputs.x_ARgSD[rank], inputs.valid_ARgS[rank], inputs.noise_factor_ARgSD[rank]) for rank in ranks]
    decided = [decide_forward(x_gSD, valid_gS, noise_gSD, params, statics) for x_gSD, valid_gS, noise_gSD in read]  # F1
    decisions = [decision for decision, _ in decided]
    by_rank = list(zip(ranks, (decision.route for decision in decisions), strict=True))
    packed_ARgECD = stack_ranks([pack(inputs.x_ARgSD[rank], route, E, C) for rank, route in by_rank], A, R)  # F2
    mask_ARgECF = stack_ranks([pack(inputs.hidden_mask_ARgSF[rank], route, E, C) for rank, route in by_rank], A, R)
    arrived_ARGeCD, arrived_mask_ARGeCF = cross_out(packed_ARgECD), cross_out(mask_ARgECF)  # F3
    worked = [
        cut_experts_forward(
            arrived_ARGeCD[rank], arrived_mask_ARGeCF[rank], shares[rank[1]], params.experts, statics.cuts, statics.activation, statics.points
        )
        for rank in ranks
    ]  # F4
    returned_ARgECD = cross_home(stack_ranks([out_GeCD for out_GeCD, _ in worked], A, R))  # F5
    returned_ARgSD = stack_ranks([unpack(returned_ARgECD[rank], route) for rank, route in by_rank], A, R)  # F6
    gate_ARgS = stack_ranks([decision.gate_gS for decision in decisions], A, R)
    sum_ARgSD = gate_ARgS[..., None] * returned_ARgSD + params.b_shared_D  # F7
    out_ARgSD = np.where(inputs.valid_ARgS[..., None], round_to(sum_ARgSD, statics.points.out), 0.0)  # F8  R9
    aux_loss = np.mean([decision.aux_loss for decision in decisions])  # F9: all-reduce; every rank has as many groups as every other
    rows = np.array([inputs.valid_ARgS[rank].sum() if statics.z.denom == "valid" else inputs.valid_ARgS[rank].size for rank in ranks])
    share_of_z = rows / max(rows.sum(), 1)
    z_loss = np.sum(share_of_z * [decision.z_loss for decision in decisions])  # F10: all-reduce; ranks may have few or no rows
    saved = ParallelSaved(
        inputs.valid_ARgS, gate_ARgS, returned_ARgSD, share_of_z, decisions, [kept for _, kept in decided], [kept for _, kept in worked]
    )  # fmt: skip
    return ParallelOutputs(out_ARgSD, aux_loss, z_loss, decisions), saved


def expert_parallel_backward(
    dout_ARgSD: np.ndarray, daux: float, dz: float, saved: ParallelSaved, params: SwitchParams, statics: ParallelStatics
) -> tuple[np.ndarray, SwitchParams]:
    """Return dx_ARgSD and the gradients of the whole parameters: sums over all ranks that hold a copy, never means. Spec: E-SAME-1, E-SUM-1.

    Rounding: R10.
    """
    (A, R, _, S, _), E, points = dout_ARgSD.shape, params.w_router_DE.shape[1], statics.points
    ranks, shares, C = list(np.ndindex(A, R)), slices_of(E, R), min(statics.capacity, S)
    by_rank = list(zip(ranks, (decision.route for decision in saved.decisions), strict=True))
    dz_by_rank = dz * saved.share_of_z  # B10
    daux_of_each = daux / len(ranks)  # B9
    dsum_ARgSD = np.where(saved.valid_ARgS[..., None], dout_ARgSD, 0.0)  # B8
    dgate_ARgS = np.sum(dsum_ARgSD * saved.returned_ARgSD, axis=-1)  # B7
    dreturned_ARgSD = dsum_ARgSD * saved.gate_ARgS[..., None]  # B7
    dreturned_ARgECD = stack_ranks([pack(dreturned_ARgSD[rank], route, E, C) for rank, route in by_rank], A, R)  # B6
    dworked_ARGeCD = cross_out(dreturned_ARgECD)  # B5
    back = [
        cut_experts_backward(dworked_ARGeCD[rank], kept, shares[rank[1]], params.experts, statics.cuts, statics.activation)
        for rank, kept in zip(ranks, saved.experts, strict=True)
    ]  # B4
    dpacked_ARgECD = cross_home(stack_ranks([darrived_GeCD for darrived_GeCD, _ in back], A, R))  # B3
    dx_expert_ARgSD = stack_ranks([unpack(dpacked_ARgECD[rank], route) for rank, route in by_rank], A, R)  # B2
    decided = [
        decide_backward(dgate_ARgS[rank], daux_of_each, dz_of_rank, kept, params)
        for rank, dz_of_rank, kept in zip(ranks, dz_by_rank, saved.decided, strict=True)
    ]  # B1
    dx_router_ARgSD = stack_ranks([dx_gSD for dx_gSD, _, _ in decided], A, R)
    dw_router_DE = np.sum([dw_DE for _, dw_DE, _ in decided], axis=0)  # all-reduce over all ranks
    db_router_E = np.sum([db_E for _, _, db_E in decided], axis=0)
    db_shared_D = dsum_ARgSD.sum(axis=(0, 1, 2, 3))
    fields: list[Any] = [
        None if values[0] is None else stack_ranks(list(values), A, R).sum(axis=0)  # all-reduce over the copies
        for values in zip(*(dshare for _, dshare in back), strict=True)
    ]
    rounded: list[Any] = [None if field is None else round_to(field.reshape(E, *field.shape[2:]), points.gradients) for field in fields]
    dexperts = ExpertsParams(*rounded)
    dw_router_DE, db_router_E, db_shared_D = (round_to(part, points.gradients) for part in (dw_router_DE, db_router_E, db_shared_D))  # R10
    dparams = SwitchParams(dw_router_DE, db_router_E, dexperts, db_shared_D)
    return round_to(dx_expert_ARgSD + dx_router_ARgSD, points.gradients), dparams
