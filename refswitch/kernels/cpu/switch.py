# May import: standard library, numpy, numba, refswitch.config, refswitch.errors, refswitch.kernels.cpu (below).
"""The Switch layer: decide, move, compute, move back, weigh; and the same doors in mirror order for the gradients.

Paper: 2.1, 2.2, figure 2. Spec: the chapter on the Switch layer. Read `router`, `capacity`, `pack`, `experts` and `losses` first.

Three passes over memory forward, four backward. Between `rows` and `tokens` a thread owns what it writes: a row belongs to one token, so the trip
to the expert, the expert and the way back are one pass. Float32 memory, in numbers (T tokens, F hidden width, k = 1 where ReLU is not gated, 2 where
another activation is not gated, 3 where gated), beside inputs and parameters:
forward T D (out) + 2 T E + 2 T D + k T F; backward T D (dx) + T E + 2 T D + (1, gated 2) T F + the parameters once more; and PANELS for each thread.
The router's copy of x is T D more where noise or padding changes it. Rows have room for every token: how many are kept changes from step to step,
and buffers of a size that changes would not be found again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numba import prange

from refswitch.errors import InputError
from refswitch.kernels.cpu.arrays import ROWS
from refswitch.kernels.cpu.bfloat16 import is_narrow
from refswitch.kernels.cpu.capacity import Route, row_cuts, rows_of_experts, slots_forward
from refswitch.kernels.cpu.experts import (
    ROWS_OF_AN_EXPERT,
    Experts,
    Form,
    experts_backward_rows,
    experts_biases_part,
    experts_forward,
    experts_weights_part,
)
from refswitch.kernels.cpu.functions import RELU, ZERO
from refswitch.kernels.cpu.jit import parallel_kernel
from refswitch.kernels.cpu.losses import BalanceSaved, balance_forward, counted_fraction, rows_of_mean, sum_of_probs, z_loss_forward
from refswitch.kernels.cpu.matmul import PANELS
from refswitch.kernels.cpu.pack import fill_dropped, pack, pack_weighed, unpack, unpack_weighed, zero_row
from refswitch.kernels.cpu.router import router_backward_kernel, router_forward_kernel, router_weights_part
from refswitch.kernels.cpu.switch_inputs import NOTHING, experts_of, form_of, matrix, optional, order_of, refuse
from refswitch.kernels.cpu.workspace import Workspace


class SwitchOutputs(NamedTuple):
    """The layer's outputs under the reference's names. What an expert made of a token is in `SwitchSaved`, row by row: `per_token` brings it home."""

    out_GSD: np.ndarray
    aux_loss: np.ndarray
    z_loss: np.ndarray
    logits_GSE: np.ndarray
    probs_GSE: np.ndarray
    route: Route
    gate_GS: np.ndarray


class Rows(NamedTuple):
    """Who lies where: the kept tokens in the order of their experts."""

    row_T: np.ndarray
    token_N: np.ndarray
    start_E: np.ndarray  # E + 1 of them


class SwitchSaved(NamedTuple):
    """What the layer's backward needs: activations, never parameters."""

    rows: Rows
    form: Form
    x_router_TD: np.ndarray  # left operand of dw_router; x itself where neither noise nor padding changes it
    factor_TD: np.ndarray
    mask_TF: np.ndarray
    zeroed_T: np.ndarray
    sits_out_T: np.ndarray  # rows whose output is the constant zero
    expert_T: np.ndarray
    gate_T: np.ndarray
    probs_TE: np.ndarray
    lse_T: np.ndarray
    z_weight_T: np.ndarray
    balance: BalanceSaved
    packed_ND: np.ndarray  # left operand of dw_in
    z_act_NF: np.ndarray  # the slope is read from it; hidden itself where that tells the slope
    z_linear_NF: np.ndarray
    hidden_NF: np.ndarray  # left operand of dw_out
    expert_out_ND: np.ndarray  # for the gate's gradient


@parallel_kernel
def rows_forward_kernel(
    out_TD: np.ndarray, packed_ND: np.ndarray, z_act_NF: np.ndarray, z_linear_NF: np.ndarray, hidden_NF: np.ndarray, expert_out_ND: np.ndarray,
    panels_PX: np.ndarray, x_TD: np.ndarray, gate_T: np.ndarray, zeroed_T: np.ndarray, sits_out_T: np.ndarray, mask_TF: np.ndarray, rows: Rows,
    cut_P: np.ndarray, experts: Experts, b_shared_D: np.ndarray, form: Form,
) -> None:  # fmt: skip
    """Take each kept token to its expert and back. Thread p owns rows cut_P[p] to cut_P[p + 1] and their tokens, and of the tokens without
    a row an equal share. Reads x, writes out, and reads the weights of the experts that its rows have.
    """
    parts, T = cut_P.size - 1, out_TD.shape[0]
    for thread in prange(parts):
        p: Any = np.int64(thread)  # prange counts in unsigned integers, and a signed times an unsigned one is a float
        first, last = cut_P[p], cut_P[p + 1]
        pack(packed_ND[first:last], x_TD, rows.token_N[first:last], zeroed_T)
        experts_forward(
            expert_out_ND, hidden_NF, z_act_NF, z_linear_NF, packed_ND, rows.token_N, mask_TF, rows.start_E, experts, form, first, last, panels_PX[p]
        )  # fmt: skip
        unpack_weighed(out_TD, expert_out_ND[first:last], gate_T, b_shared_D, rows.token_N[first:last], form.rounds_out)
        fill_dropped(out_TD, rows.row_T, sits_out_T, b_shared_D, T * p // parts, T * (p + 1) // parts, form.rounds_out)


@parallel_kernel
def rows_backward_kernel(
    dx_TD: np.ndarray, dgate_T: np.ndarray, dexpert_out_ND: np.ndarray, dpacked_ND: np.ndarray, dz_act_NF: np.ndarray, dz_linear_NF: np.ndarray,
    panels_PX: np.ndarray, dout_TD: np.ndarray, gate_T: np.ndarray, expert_out_ND: np.ndarray, hidden_NF: np.ndarray, z_act_NF: np.ndarray,
    z_linear_NF: np.ndarray, mask_TF: np.ndarray, rows: Rows, cut_P: np.ndarray, experts: Experts, form: Form,
) -> None:  # fmt: skip
    """Undo `rows_forward_kernel` for tokens and gates; owners as there. Dropped tokens get a gradient of 0."""
    parts, T = cut_P.size - 1, dx_TD.shape[0]
    for thread in prange(parts):
        p: Any = np.int64(thread)  # prange counts in unsigned integers, and a signed times an unsigned one is a float
        first, last = cut_P[p], cut_P[p + 1]
        token_M = rows.token_N[first:last]
        pack_weighed(dexpert_out_ND[first:last], dgate_T, dout_TD, expert_out_ND[first:last], gate_T, token_M)
        experts_backward_rows(
            dpacked_ND, dz_act_NF, dz_linear_NF, dexpert_out_ND, hidden_NF, z_act_NF, z_linear_NF, rows.token_N, mask_TF, rows.start_E, experts,
            form, first, last, panels_PX[p],
        )  # fmt: skip
        unpack(dx_TD, dpacked_ND[first:last], token_M)
        for t in range(T * p // parts, T * (p + 1) // parts):
            if rows.row_T[t] < 0:
                dgate_T[t] = ZERO
                zero_row(dx_TD[t])


@parallel_kernel
def weights_backward_kernel(
    dexperts: Experts, dw_router_DE: np.ndarray, db_router_E: np.ndarray, panels_PX: np.ndarray, packed_ND: np.ndarray, dz_act_NF: np.ndarray,
    dz_linear_NF: np.ndarray, hidden_NF: np.ndarray, dexpert_out_ND: np.ndarray, start_E: np.ndarray, x_router_TD: np.ndarray,
    dlogits_TE: np.ndarray, form: Form,
) -> None:  # fmt: skip
    """Write the gradients of all weights. Thread p owns its part of each; reads what the rows left, and writes every gradient once."""
    parts = panels_PX.shape[0]
    for thread in prange(parts):
        p: Any = np.int64(thread)
        experts_weights_part(dexperts, packed_ND, dz_act_NF, dz_linear_NF, hidden_NF, dexpert_out_ND, start_E, form, p, parts, panels_PX[p])
        experts_biases_part(dexperts, dz_act_NF, dz_linear_NF, dexpert_out_ND, start_E, form, p, parts)
        router_weights_part(dw_router_DE, db_router_E, x_router_TD, dlogits_TE, form.rounds_gradients, p, parts)


def switch_forward(inputs: Any, params: Any, statics: Any, workspace: Workspace) -> tuple[SwitchOutputs, SwitchSaved]:
    """Compute the layer.

    Spec: S-NOISE-1 to S-Z-1. Paper: y = p_i(x) E_i(x), 2.1.

    Parameters
    ----------
    inputs, params, statics : the reference's SwitchInputs, SwitchParams and Statics, or what has their fields
        Arrays of float32. A factor or term of one element is the same everywhere: 1 or 0.
    workspace : Workspace
        Where outputs and what is saved come from.

    Returns
    -------
    tuple
        Outputs and what backward needs.

    Raises
    ------
    InputError
        For a dialect, dtype or shape that the kernels do not compute.
    """
    dialect, points, take = statics.dialect, statics.points, workspace.take
    refuse(dialect, points)
    (G, S, D), E, F = inputs.x_GSD.shape, params.w_router_DE.shape[1], params.experts.w_in_EDF.shape[2]
    T, threads = G * S, numba.get_num_threads()
    experts, form = experts_of(params.experts, E, D, F), form_of(dialect, points, statics.activation, params.experts.w_gate_EDF is not None)
    x_TD = matrix("x_GSD", inputs.x_GSD, (G, S, D))
    factor_TD = optional("noise_factor_GSD", inputs.noise_factor_GSD, (G, S, D), 1.0)
    if factor_TD.size and dialect.noise.leak_to_experts == "if_same_dtype" and points.router == points.x:
        raise InputError("the cpu backend does not compute noise.leak_to_experts; the backend reference does")
    term_TE = optional("noise_term_GSE", inputs.noise_term_GSE, (G, S, E), 0.0)
    mask_TF = optional("hidden_mask_GSF", inputs.hidden_mask_GSF, (G, S, F), 1.0)
    valid_GS = np.array(np.broadcast_to(inputs.valid_GS, (G, S)), order="C")  # writable: Numba compiles anew for what is not
    is_pad_T = ~valid_GS.reshape(T)
    zeroed_T = is_pad_T if dialect.pad.zero_input is True else np.zeros(T, bool)
    sits_out_T = is_pad_T if dialect.pad.route != "include" else np.zeros(T, bool)

    is_copied = bool(factor_TD.size or np.any(zeroed_T) or is_narrow(points.router))
    x_router_TD = take((T, D)) if is_copied else x_TD
    logits_TE, probs_TE, lse_T, gate_T, expert_T = take((T, E)), take((T, E)), take((T,)), take((T,)), take((T,), np.int64)
    rounds = np.array([is_narrow(format) for format in (points.router, points.logits, points.probs, points.choice, points.gate)])
    router_forward_kernel(
        x_router_TD, logits_TE, probs_TE, lse_T, expert_T, gate_T, x_TD, factor_TD, term_TE, zeroed_T,
        matrix("w_router_DE", params.w_router_DE, (D, E)), matrix("b_router_E", params.b_router_E, (E,)).reshape(E), rounds,
        dialect.select.on == "logits", is_copied, ROWS,
    )  # fmt: skip

    claims_GS = valid_GS if dialect.pad.route == "exclude" else np.ones((G, S), bool)
    route = Route(expert_T.reshape(G, S), take((G, S), np.int64), take((G, S), np.bool_))
    order_GS = order_of(dialect.priority, gate_T.reshape(G, S), inputs.priority_GS)
    slots_forward(route.slot_GS, route.kept_GS, route.expert_GS, claims_GS, order_GS, E, max(statics.capacity - dialect.capacity.slots_lost, 0))
    rows = Rows(take((T,), np.int64), take((T,), np.int64), take((E + 1,), np.int64))
    rows_of_experts(rows.row_T, rows.token_N, rows.start_E, expert_T, route.kept_GS.reshape(T))
    N = int(rows.start_E[E])
    rows, cut_P = rows._replace(token_N=rows.token_N[:N]), np.empty(threads + 1, np.int64)
    row_cuts(cut_P, rows.start_E, ROWS_OF_AN_EXPERT)

    packed_ND, expert_out_ND, hidden_NF = take((T, D))[:N], take((T, D))[:N], take((T, F))[:N]
    z_act_NF = hidden_NF if form.activation == RELU and not form.is_gated else take((T, F))[:N]
    z_linear_NF = take((T, F))[:N] if form.is_gated else NOTHING
    out_TD, panels_PX = take((T, D)), take((threads, PANELS))
    b_shared_D = matrix("b_shared_D", params.b_shared_D, (D,)).reshape(D) if dialect.expert.bias == "shared_out" else NOTHING[0:0].reshape(0)
    rows_forward_kernel(
        out_TD, packed_ND, z_act_NF, z_linear_NF, hidden_NF, expert_out_ND, panels_PX, x_TD, gate_T, zeroed_T, sits_out_T, mask_TF, rows, cut_P,
        experts, b_shared_D, form,
    )  # fmt: skip
    workspace.give(panels_PX)

    counts_GS = valid_GS if dialect.aux.P_pads == "exclude" else np.ones((G, S), bool)
    sum_GE = np.empty((G, E))
    sum_of_probs(sum_GE, probs_TE.reshape(G, S, E), counts_GS)
    count_GE = counted_fraction(route, claims_GS, valid_GS, E, dialect.aux)
    aux_loss, balance = balance_forward(sum_GE, count_GE, *rows_of_mean(valid_GS, route.kept_GS, dialect.aux), counts_GS, dialect.aux)
    z_loss, z_weight_GS = z_loss_forward(lse_T.reshape(G, S), valid_GS, dialect.z)
    outputs = SwitchOutputs(
        out_TD.reshape(G, S, D), np.asarray(aux_loss), np.asarray(z_loss), logits_TE.reshape(G, S, E), probs_TE.reshape(G, S, E), route,
        gate_T.reshape(G, S),
    )  # fmt: skip
    saved = SwitchSaved(
        rows, form, x_router_TD, factor_TD, mask_TF, zeroed_T, sits_out_T, expert_T, gate_T, probs_TE, lse_T, z_weight_GS.reshape(T), balance,
        packed_ND, z_act_NF, z_linear_NF, hidden_NF, expert_out_ND,
    )  # fmt: skip
    return outputs, saved


def switch_backward(
    dout_GSD: np.ndarray, daux: float, dz: float, saved: SwitchSaved, params: Any, statics: Any, workspace: Workspace
) -> tuple[np.ndarray, Any]:
    """Return dx_GSD and the parameters' gradients, of the parameters' types, of sum(out * dout) + daux * aux_loss + dz * z_loss.

    Spec: S-BACK-1 to S-BACK-6.

    Parameters
    ----------
    dout_GSD : float32
        Gradient of the output.
    daux, dz : float
        Gradients of the two losses.
    saved : SwitchSaved
        Of the forward pass; not written.
    params, statics : as in the forward pass
        The same.
    workspace : Workspace
        Where the gradients come from.

    Returns
    -------
    tuple
        dx_GSD, dparams.
    """
    take, form, rows = workspace.take, saved.form, saved.rows
    (G, S, D), (E, _, F), threads = dout_GSD.shape, params.experts.w_in_EDF.shape, numba.get_num_threads()
    T, N = G * S, rows.token_N.size
    dout_TD, experts = matrix("dout_GSD", dout_GSD, (G, S, D)), experts_of(params.experts, E, D, F)
    cut_P, panels_PX = np.empty(threads + 1, np.int64), take((threads, PANELS))
    row_cuts(cut_P, rows.start_E, ROWS_OF_AN_EXPERT)
    dx_TD, dgate_T, dexpert_out_ND, dpacked_ND, dz_act_NF = take((T, D)), take((T,)), take((T, D))[:N], take((T, D))[:N], take((T, F))[:N]
    dz_linear_NF = take((T, F))[:N] if form.is_gated else NOTHING
    rows_backward_kernel(
        dx_TD, dgate_T, dexpert_out_ND, dpacked_ND, dz_act_NF, dz_linear_NF, panels_PX, dout_TD, saved.gate_T, saved.expert_out_ND,
        saved.hidden_NF, saved.z_act_NF, saved.z_linear_NF, saved.mask_TF, rows, cut_P, experts, form,
    )  # fmt: skip
    workspace.give(dpacked_ND)

    dlogits_TE, balance_T = take((T, E)), np.float32(daux) * saved.balance.counts_GS.reshape(T).astype(np.float32)
    router_backward_kernel(
        dx_TD, dlogits_TE, saved.probs_TE, saved.lse_T, saved.expert_T, dgate_T, balance_T, saved.balance.dprobs_GE, saved.z_weight_T,
        saved.factor_TD, saved.zeroed_T, matrix("w_router_DE", params.w_router_DE, (D, E)), np.float32(dz), form.rounds_gradients, ROWS,
    )  # fmt: skip
    dexperts = Experts(*(take(array.shape) for array in experts))
    dw_router_DE, db_router_E = take((D, E)), take((E,))
    weights_backward_kernel(
        dexperts, dw_router_DE, db_router_E, panels_PX, saved.packed_ND, dz_act_NF, dz_linear_NF, saved.hidden_NF, dexpert_out_ND, rows.start_E,
        saved.x_router_TD, dlogits_TE, form,
    )  # fmt: skip
    workspace.give(dz_act_NF, dz_linear_NF, dexpert_out_ND, dlogits_TE, dgate_T, panels_PX)
    db_shared_D = np.zeros(D, np.float32)
    if statics.dialect.expert.bias == "shared_out":
        db_shared_D[:] = np.sum(dout_TD[~saved.sits_out_T], axis=0, dtype=np.float64)
    fields = dexperts._asdict() | ({} if form.is_gated else {"w_gate_EDF": None})
    dparams = params._replace(
        w_router_DE=dw_router_DE, b_router_E=db_router_E, experts=params.experts._replace(**fields), b_shared_D=db_shared_D
    )  # fmt: skip
    return dx_TD.reshape(G, S, D), dparams


def per_token(rows_NX: np.ndarray, saved: SwitchSaved) -> np.ndarray:
    """Return what an expert made of each token (hidden, its output) as x_TX, 0 for a token without a row; for whoever wants to see it."""
    values_TX = np.zeros((saved.rows.row_T.size, rows_NX.shape[1]), rows_NX.dtype)
    values_TX[saved.rows.token_N] = rows_NX
    return values_TX
