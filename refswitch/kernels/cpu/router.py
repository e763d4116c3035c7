# May import: standard library, numpy, numba, refswitch.kernels.cpu (functions, bfloat16, jit, matmul).
"""Router: noise, logits, softmax, choice and gate in one pass over a chunk of tokens; the same backwards.

Paper: eqs. (1), (2). Spec: S-NOISE-1, S-ROUTE-1 to S-ROUTE-3, S-GATE-1, S-BACK-2, S-BACK-5, S-BACK-6. Next: `capacity`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from refswitch.kernels.cpu.arrays import chunks
from refswitch.kernels.cpu.bfloat16 import round_row, round_rows, round_value
from refswitch.kernels.cpu.functions import ZERO, exp, maximum, total
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.matmul import matmul
from refswitch.kernels.cpu.pack import copy_row, zero_row

TWO = np.float32(2.0)


@kernel
def softmax_row(probs_E: np.ndarray, logits_E: np.ndarray) -> np.float32:
    """Write the probabilities of one token and return the log of the softmax's denominator, for the z-loss."""
    most = maximum(logits_E)
    for e in range(logits_E.size):
        probs_E[e] = exp(logits_E[e] - most)
    denominator = total(probs_E)
    for e in range(logits_E.size):
        probs_E[e] /= denominator
    return most + np.float32(math.log(denominator))


@kernel
def highest(scores_E: np.ndarray) -> int:
    """Return the index of the highest score, the lowest where several are equal."""
    best = 0
    for e in range(1, scores_E.size):
        best = e if scores_E[e] > scores_E[best] else best
    return best


@kernel
def decide_row(
    logits_E: np.ndarray, probs_E: np.ndarray, read_E: np.ndarray, b_router_E: np.ndarray, term_E: np.ndarray, rounds: np.ndarray, on_logits: bool
) -> tuple[np.float32, int, np.float32]:
    """Finish the logits of one token and return its log-sum-exp, expert and gate; `rounds` says which of R2 to R5 round, in order."""
    for e in range(logits_E.size):
        logits_E[e] += b_router_E[e]
    for e in range(term_E.size):
        logits_E[e] += term_E[e]
    if rounds[1]:
        round_row(logits_E, logits_E)
    lse = softmax_row(probs_E, logits_E)
    if rounds[2]:
        round_row(probs_E, probs_E)
    for e in range(probs_E.size):
        read_E[e] = probs_E[e]
    if rounds[3]:
        round_row(read_E, read_E)
    expert = highest(logits_E) if on_logits else highest(read_E)
    return lse, expert, round_value(read_E[expert]) if rounds[4] else read_E[expert]


@kernel
def noised_rows(out_TD: np.ndarray, x_TD: np.ndarray, factor_TD: np.ndarray, zeroed_T: np.ndarray, first: int, last: int, is_rounded: bool) -> None:
    """Write the router's copy of some tokens. A factor without elements is 1."""
    for t in range(first, last):
        out_D, x_D = out_TD[t], x_TD[t]
        if zeroed_T[t]:
            zero_row(out_D)
        elif factor_TD.size == 0:
            copy_row(out_D, x_D)
        else:
            factor_D = factor_TD[t]
            for d in range(x_D.size):
                out_D[d] = x_D[d] * factor_D[d]
        if is_rounded:
            round_row(out_D, out_D)


@parallel_kernel
def router_forward_kernel(
    x_router_TD: np.ndarray, logits_TE: np.ndarray, probs_TE: np.ndarray, lse_T: np.ndarray, expert_T: np.ndarray, gate_T: np.ndarray,
    x_TD: np.ndarray, factor_TD: np.ndarray, term_TE: np.ndarray, zeroed_T: np.ndarray, w_router_DE: np.ndarray, b_router_E: np.ndarray,
    rounds: np.ndarray, on_logits: bool, is_copied: bool, chunk: int,
) -> None:  # fmt: skip
    """Task i owns the tokens of chunk i. Reads x once; where `is_copied` the router's copy of x differs from x and is written, else x_router is x."""
    for i in prange(chunks(x_TD.shape[0], chunk)):
        first, last = i * chunk, min((i + 1) * chunk, x_TD.shape[0])
        read_E = np.empty(w_router_DE.shape[1], np.float32)
        if is_copied:
            noised_rows(x_router_TD, x_TD, factor_TD, zeroed_T, first, last, rounds[0])
        matmul(logits_TE[first:last], x_router_TD[first:last], w_router_DE, False)
        for t in range(first, last):
            term_E = term_TE[t] if term_TE.size > 0 else b_router_E[:0]
            lse_T[t], expert_T[t], gate_T[t] = decide_row(logits_TE[t], probs_TE[t], read_E, b_router_E, term_E, rounds, on_logits)


@kernel
def dlogits_row(
    dlogits_E: np.ndarray, probs_E: np.ndarray, dprobs_E: np.ndarray, expert: int, dgate: np.float32, balance: np.float32, slope: np.float32
) -> None:
    """Write p (dp - sum p dp) + slope p of one token; dp is `balance` times the balance loss's row, and dgate more at the chosen expert."""
    mean = ZERO
    for e in range(probs_E.size):
        dlogits_E[e] = balance * dprobs_E[e] + (dgate if e == expert else ZERO)
    for e in range(probs_E.size):
        mean += probs_E[e] * dlogits_E[e]
    for e in range(probs_E.size):
        dlogits_E[e] = probs_E[e] * (dlogits_E[e] - mean) + slope * probs_E[e]


@parallel_kernel
def router_backward_kernel(
    dx_TD: np.ndarray, dlogits_TE: np.ndarray, probs_TE: np.ndarray, lse_T: np.ndarray, expert_T: np.ndarray, dgate_T: np.ndarray,
    balance_T: np.ndarray, dprobs_GE: np.ndarray, z_weight_T: np.ndarray, factor_TD: np.ndarray, zeroed_T: np.ndarray, w_router_DE: np.ndarray,
    dz: np.float32, is_rounded: bool, chunk: int,
) -> None:  # fmt: skip
    """Write the logits' gradient and add what the router sends to dx. Task i owns the tokens of chunk i; reads and writes dx once."""
    (T, D), G = dx_TD.shape, dprobs_GE.shape[0]
    for i in prange(chunks(T, chunk)):
        first, last = i * chunk, min((i + 1) * chunk, T)
        for t in range(first, last):
            slope = dz * TWO * lse_T[t] * z_weight_T[t]
            dlogits_row(dlogits_TE[t], probs_TE[t], dprobs_GE[t * G // T], expert_T[t], dgate_T[t], balance_T[t], slope)
        if factor_TD.size == 0:
            matmul(dx_TD[first:last], dlogits_TE[first:last], w_router_DE.T, True)
        else:
            dx_router_ND = np.empty((last - first, D), np.float32)
            matmul(dx_router_ND, dlogits_TE[first:last], w_router_DE.T, False)
            for t in range(first, last):
                for d in range(D):
                    dx_TD[t, d] += dx_router_ND[t - first, d] * factor_TD[t, d]
        for t in range(first, last):
            if zeroed_T[t]:
                zero_row(dx_TD[t])
            if is_rounded:
                round_row(dx_TD[t], dx_TD[t])


@kernel
def router_weights_part(
    dw_router_DE: np.ndarray, db_router_E: np.ndarray, x_router_TD: np.ndarray, dlogits_TE: np.ndarray, is_rounded: bool, part: int, parts: int
) -> None:
    """Write this part's rows of dw_router and values of db_router. A sum runs over the tokens in order, whatever the number of parts."""
    (T, D), E = x_router_TD.shape, dlogits_TE.shape[1]
    first, last = D * part // parts, D * (part + 1) // parts
    if last > first:
        matmul(dw_router_DE[first:last], x_router_TD[:, first:last].T, dlogits_TE, False)
        if is_rounded:
            round_rows(dw_router_DE[first:last])
    first, last = E * part // parts, E * (part + 1) // parts
    sums_E = np.zeros(last - first, np.float64)
    for t in range(T):
        for e in range(first, last):
            sums_E[e - first] += dlogits_TE[t, e]
    for e in range(first, last):
        db_router_E[e] = round_value(np.float32(sums_E[e - first])) if is_rounded else np.float32(sums_E[e - first])
