# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Capacity: how many slots an expert has, and which token gets which.

Paper: eq. (3), 2.2, appendix B, appendix F with its off-by-one. Spec: S-CAP-1 to S-CAP-3, S-POS-1. Next: `pack`.

Everything here is an integer and is compared with `==`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from refswitch.config import Capacity, Group
from refswitch.numbers.precision import FORMATS, Format, round_to


class Route(NamedTuple):
    """The discrete part of a Switch layer: no gradient passes through it."""

    expert_GS: np.ndarray  # the chosen expert
    slot_GS: np.ndarray  # claims on that expert that were served before this one
    kept_GS: np.ndarray  # the token has a slot


def capacity_of(S: int, E: int, factor: str, rule: Capacity) -> int:
    """Return the slots of one expert for S tokens and E experts, by the dialect's literal expression in its float type.

    Spec: S-CAP-3. Paper: eq. (3), which leaves the rounding open. Where nothing is ever dropped the answer is max(S, 1).

    The expression is evaluated as written: `(S*cf)/E` and `(S/E)*cf` differ in their last bit, and then by one slot.
    """
    if rule.expr in ("inf", "max_count"):
        return max(S, 1)
    real = np.float32 if rule.float == "f32" else np.float64
    tokens, experts, cf = real(S), real(E), real(float(factor))
    value = {
        "floor_SxCF_divE": lambda: math.floor((tokens * cf) / experts),
        "rhe_CFxS_divE": lambda: round(float(cf * tokens / experts)),
        "ceil_SdivE_xCF": lambda: math.ceil((tokens / experts) * cf),
        "ceil_SxCF_divE": lambda: math.ceil((tokens * cf) / experts),
        "floor_CFx_ceilSdivE": lambda: math.floor(cf * real(math.ceil(S / E))),
        "floor_CFx_SdivE": lambda: math.floor(cf * (tokens / experts)),
        "int_div": lambda: S // E,
        "const": lambda: rule.constant,
    }[rule.expr]()
    if rule.clamp_to_group:
        value = min(value, S)
    multiple = rule.multiple_of if isinstance(rule.multiple_of, int) else 1
    value = -(-value // multiple) * multiple
    if rule.zero_means_inf and value == 0:
        return max(S, 1)
    return max(value, rule.min)


def capacity_in_eval(S: int, E: int, rule: Capacity) -> int:
    """Return the slots in evaluation: by the evaluation's factor, or a fraction of the group's tokens.

    Spec: S-CAP-3.
    """
    if rule.eval_rule == "token_fraction":
        return max(math.ceil(Fraction(rule.eval_fraction) * S), rule.min)
    return capacity_of(S, E, rule.cf_eval, rule)


def groups_of(sequences: int, length: int, E: int, rule: Group) -> int:
    """Return into how many routing groups the tokens of a batch are cut, in order.

    Spec: decisions (groups). Paper: 2.2 ("per core"). Mesh TensorFlow's size is no upper bound: it starts from tokens // size groups and goes
    up until the groups are even, so that a group may hold nearly twice its size.

    Raises
    ------
    ValueError
        Where the rule cannot cut so many tokens evenly, or leaves its size to the run.
    """
    tokens = sequences * length
    if rule.rule in ("sequence", "batch", "ep_world"):
        return sequences if rule.rule == "sequence" else 1
    multiple_of = 1 if rule.multiple_of == "external" else rule.multiple_of  # replicas: one process has one
    multiple_of = multiple_of * E if rule.rule == "flax" else multiple_of
    if rule.size == "external":
        raise ValueError(f"group.rule {rule.rule} needs group.size")
    if tokens % multiple_of:
        raise ValueError(f"{tokens} tokens cannot be cut into a multiple of {multiple_of} groups: pad the batch")
    if rule.rule in ("mesh", "flax"):
        least = max(tokens // rule.size, 1)
        return next(groups for groups in range(least, tokens + 1) if groups % multiple_of == 0 and tokens % groups == 0)
    if tokens % rule.size:
        raise ValueError(f"{tokens} tokens cannot be cut evenly by group.rule {rule.rule} with group.size {rule.size}")
    return rule.size if rule.rule == "n_groups" else tokens // rule.size


def arrival_order(S: int, G: int) -> np.ndarray:
    """Return priority_GS for first come, first served."""
    return np.broadcast_to(np.arange(S), (G, S))


def order_by_gate(gate_GS: np.ndarray) -> np.ndarray:
    """Return priority_GS for the highest gate first, equal gates in order of arrival (batch-prioritised routing)."""
    order_GS = np.argsort(-gate_GS, axis=-1, kind="stable")
    return np.argsort(order_GS, axis=-1)


def slots_forward(
    expert_GS: np.ndarray, claims_GS: np.ndarray, priority_GS: np.ndarray, E: int, capacity: int, positions: Format = FORMATS["float64"]
) -> Route:
    """Serve the claims of each group in order of priority; a claim is kept while its expert has a slot.

    Spec: S-CAP-1, S-CAP-2, S-POS-1. Paper: 2.2; Mesh-TensorFlow. The count is exclusive: the first claim has slot 0. (Figure 15
    of the paper compares an inclusive count with `< capacity`, which loses a slot.) `positions` is the format that counts are stored in: from
    257 claims on an expert bfloat16 gives two claims the same slot, which is what naive bfloat16 does.
    """
    order_GS = np.argsort(priority_GS, axis=-1, kind="stable")
    served_GS = np.take_along_axis(expert_GS, order_GS, axis=-1)
    claimed_GS = np.take_along_axis(claims_GS, order_GS, axis=-1)
    mask_GSE = (served_GS[..., None] == np.arange(E)) & claimed_GS[..., None]
    counted_GSE = round_to(np.cumsum(mask_GSE, axis=1, dtype=np.float64), positions)
    before_GSE = counted_GSE.astype(np.int64) - mask_GSE
    slot_served_GS = np.take_along_axis(before_GSE, served_GS[..., None], axis=-1)[..., 0]
    slot_GS = np.zeros_like(slot_served_GS)
    np.put_along_axis(slot_GS, order_GS, slot_served_GS, axis=-1)
    return Route(expert_GS, slot_GS, claims_GS & (slot_GS < capacity))


def no_token_left_behind(choices_GSK: np.ndarray, claims_GS: np.ndarray, E: int, capacity: int) -> Route:
    """Serve first choices, then offer those left over to their next choice, and so on.

    Spec: S-CAP-2. Paper: appendix B, figure 11. A token that no choice has room for keeps its first choice and is dropped.
    """
    G, S, _ = choices_GSK.shape
    expert_GS, slot_GS, kept_GS = choices_GSK[..., 0], np.zeros((G, S), np.int64), np.zeros((G, S), bool)
    used_G1E = np.zeros((G, 1, E), np.int64)
    for choice_GS in np.moveaxis(choices_GSK, -1, 0):
        mask_GSE = (choice_GS[..., None] == np.arange(E)) & (claims_GS & ~kept_GS)[..., None]
        before_GSE = used_G1E + np.cumsum(mask_GSE, axis=1, dtype=np.int64) - mask_GSE
        placed_GSE = mask_GSE & (before_GSE < capacity)
        placed_GS = placed_GSE.any(axis=-1)
        expert_GS = np.where(placed_GS, choice_GS, expert_GS)
        slot_GS = np.where(placed_GS, np.take_along_axis(before_GSE, choice_GS[..., None], axis=-1)[..., 0], slot_GS)
        kept_GS = kept_GS | placed_GS
        used_G1E = used_G1E + placed_GSE.sum(axis=1, keepdims=True)
    return Route(expert_GS, slot_GS, kept_GS)
