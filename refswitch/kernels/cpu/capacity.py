# May import: standard library, numpy, refswitch.kernels.cpu.jit.
"""Capacity: which claim gets which slot, and where the row of each kept token lies among the experts' rows.

Paper: 2.2. Spec: S-CAP-1, S-CAP-2, S-POS-1, S-PACK-1. Integers, compared with `==`. Next: `pack`.

The reference gives an expert of a group C slots, used or not. Here an expert has as many rows as it has kept tokens of all groups, and no others:
expert e serves rows `start_E[e]` to `start_E[e + 1]`, in the order of its tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.kernels.cpu.jit import kernel


class Route(NamedTuple):
    """The discrete part of a Switch layer, under the reference's names."""

    expert_GS: np.ndarray
    slot_GS: np.ndarray
    kept_GS: np.ndarray


@kernel
def slots_forward(
    slot_GS: np.ndarray, kept_GS: np.ndarray, expert_GS: np.ndarray, claims_GS: np.ndarray, order_GS: np.ndarray, E: int, capacity: int
) -> None:
    """Serve the claims of each group in `order` (without elements: as they come); a claim is kept while its expert has a slot.

    One thread: one addition per token. A claim is compared before it is counted: slots start from 0.
    """
    G, S = expert_GS.shape
    for g in range(G):
        served_E = np.zeros(E, np.int64)
        for position in range(S):
            s = order_GS[g, position] if order_GS.size > 0 else position
            e = expert_GS[g, s]
            slot_GS[g, s] = served_E[e]
            kept_GS[g, s] = claims_GS[g, s] and served_E[e] < capacity
            served_E[e] += 1 if claims_GS[g, s] else 0


@kernel
def rows_of_experts(row_T: np.ndarray, token_T: np.ndarray, start_E: np.ndarray, expert_T: np.ndarray, kept_T: np.ndarray) -> None:
    """Number the kept tokens by expert, then by position: row_T and its inverse token_T (as long as there are rows), -1 for a token without one.

    `start_E` has E + 1 elements, the last the number of rows. One thread: a counting sort, three integers per token.
    """
    E = start_E.size - 1
    for e in range(E + 1):
        start_E[e] = 0
    for t in range(expert_T.size):
        if kept_T[t]:
            start_E[expert_T[t] + 1] += 1
    for e in range(E):
        start_E[e + 1] += start_E[e]
    next_E = np.empty(E, np.int64)
    for e in range(E):
        next_E[e] = start_E[e]
    for t in range(expert_T.size):
        row_T[t] = -1
        if kept_T[t]:
            row = next_E[expert_T[t]]
            next_E[expert_T[t]] += 1
            row_T[t], token_T[row] = row, t


@kernel
def row_cuts(cut_P: np.ndarray, start_E: np.ndarray, fixed: int) -> None:
    """Cut all rows into as many runs as threads, of equal work; an expert with rows costs `fixed` rows more, for its weights' way from memory.

    A cut falls where it falls, inside an expert too: a row's bits do not depend on it.
    """
    E, parts = start_E.size - 1, cut_P.size - 1
    work = start_E[E] - start_E[0]
    for e in range(E):
        work += fixed if start_E[e + 1] > start_E[e] else 0
    e, before = 0, 0
    cut_P[0] = 0
    for part in range(1, parts):
        wanted = work * part // parts
        while e < E:
            rows = start_E[e + 1] - start_E[e]
            cost = rows + fixed if rows > 0 else 0
            if before + cost >= wanted:
                break
            before += cost
            e += 1
        if e < E:
            rows = start_E[e + 1] - start_E[e]
            cut_P[part] = start_E[e] + (rows * (wanted - before) // (rows + fixed) if rows > 0 else 0)
        else:
            cut_P[part] = start_E[E]
    cut_P[parts] = start_E[E]
