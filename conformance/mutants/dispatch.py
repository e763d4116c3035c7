# May import: numpy, the standard library, products.
"""Three ways to multiply each token by the matrix of its own expert; all of them give the same sums.

A form has three functions. `plan` turns the route into an index, once. `product` multiplies row t by the matrix of its expert and leaves 0
in the rows of tokens that have no slot. `outer` is its gradient by the matrix: for each expert, the sum over its tokens of the outer
products of their rows. D and F stand for any two widths.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Form(NamedTuple):
    """One way to dispatch: see the module."""

    plan: Callable  # (tape) -> plan
    product: Callable  # (tape, a_TD, w_EDF) -> (T, F)
    outer: Callable  # (tape, a_TD, b_TF) -> (E, D, F)


# gather: a list of token numbers for each expert


def gather_plan(tape):
    """List the tokens that each expert serves."""
    return tokens_of(tape, tape.expert_GS)


def tokens_of(tape, expert_GS):
    """List the kept tokens of each of the experts that are given."""
    return [np.flatnonzero(tape.kept_GS & (expert_GS == e)) for e in range(tape.E)]


def gather_product(tape, a_TD, w_EDF):
    """Multiply expert by expert, scattering the rows back."""
    out_TF = np.zeros((len(a_TD), w_EDF.shape[-1]), tape.dtype)
    for tokens, w_DF in zip(tape.plan, w_EDF, strict=True):
        out_TF[tokens] = tape.times(a_TD[tokens], w_DF)
    return out_TF


def gather_outer(tape, a_TD, b_TF):
    """Multiply expert by expert."""
    return np.stack([tape.times(a_TD[tokens].T, b_TF[tokens]) for tokens in tape.plan])


# sorted: one permutation that brings the tokens of an expert together, cut into segments


class Segments(NamedTuple):
    """Tokens by expert; those of expert e stand at `cuts[e]:cuts[e + 1]`."""

    tokens: np.ndarray  # the kept tokens' numbers
    cuts: np.ndarray  # E + 1 positions in it


def sorted_plan(tape):
    """Sort the kept tokens by expert, in their order."""
    return segments(tape, np.bincount(tape.expert_GS[tape.kept_GS], minlength=tape.E), sentinel=tape.E)


def segments(tape, counts_E, sentinel):
    """Sort the tokens by expert, who is not kept as `sentinel`, and cut by the counts."""
    order_T = np.argsort(np.where(tape.kept_GS, tape.expert_GS, sentinel).ravel(), kind="stable")
    return Segments(order_T[: tape.kept_GS.sum()], np.concatenate([[0], np.cumsum(counts_E)]))


def sorted_product(tape, a_TD, w_EDF):
    """Multiply segment by segment in sorted order, then undo the permutation."""
    tokens, cuts = tape.plan
    packed_ND = a_TD[tokens]
    segments = [tape.times(packed_ND[lo:hi], w_DF) for lo, hi, w_DF in zip(cuts, cuts[1:], w_EDF, strict=False)]
    out_TF = np.zeros((len(a_TD), w_EDF.shape[-1]), tape.dtype)
    out_TF[tokens] = np.concatenate(segments)
    return out_TF


def sorted_outer(tape, a_TD, b_TF):
    """Multiply segment by segment."""
    tokens, cuts = tape.plan
    packed_ND, packed_NF = a_TD[tokens], b_TF[tokens]
    return np.stack([tape.times(packed_ND[lo:hi].T, packed_NF[lo:hi]) for lo, hi in zip(cuts, cuts[1:], strict=False)])


# einsum: a 0-1 tensor moves the rows into slots (E, N = groups * slots) and back


def einsum_plan(tape):
    """Mark for each slot the token that it holds."""
    return slots_of(tape, tape.expert_GS, tape.slot_GS, tape.kept_GS)


def slots_of(tape, expert_GS, slot_GS, mask_GS):
    """Build the dispatch tensor for tokens of `mask_GS` at the given experts and slots."""
    G, S = expert_GS.shape
    slots = 1 + slot_GS.max(initial=-1, where=mask_GS)
    dispatch_ENT = np.zeros((tape.E, G * slots, G * S), tape.dtype)
    g, s = np.nonzero(mask_GS)
    dispatch_ENT[expert_GS[g, s], g * slots + slot_GS[g, s], g * S + s] = 1
    return dispatch_ENT


def einsum_product(tape, a_TD, w_EDF):
    """Move the rows into slots, multiply all slots, move them back."""
    # A move has one term in each sum, so that its order is of no consequence and BLAS may do it.
    packed_ENF = tape.times(tape.plan @ a_TD, w_EDF)
    return np.tensordot(tape.plan, packed_ENF, axes=((0, 1), (0, 1)))


def einsum_outer(tape, a_TD, b_TF):
    """Move both into slots and multiply over the slots; the empty ones add zeros."""
    packed_END, packed_ENF = tape.plan @ a_TD, tape.plan @ b_TF
    return tape.times(packed_END.swapaxes(1, 2), packed_ENF)


FORMS = {
    "einsum": Form(einsum_plan, einsum_product, einsum_outer),
    "gather": Form(gather_plan, gather_product, gather_outer),
    "sorted": Form(sorted_plan, sorted_product, sorted_outer),
}
