# May import: standard library, numpy.
"""Claims: the discrete part of a layer with several experts for each token. Who makes use of which choice, who is served first, what moves.

Paper: eq. (2) with k > 1, the top-2 baseline of table 1, appendix B (no token left behind). Spec: V-WANT-1, V-SERVE-1, V-MOVE-1. Read `capacity` and
`pack` first. Next: `top_k`, the layer around it. In this file K counts the choices of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.reference.capacity import Route, slots_forward
from refswitch.reference.pack import pack, unpack

EPSILON = 1e-9  # Mesh TensorFlow's, in every quotient of shares


class Claims(NamedTuple):
    """The discrete part: up to K claims of each token; no gradient passes through it."""

    expert_GSK: np.ndarray  # in order of preference, all different
    slot_GSK: np.ndarray  # claims on that expert that the order of service counts before this one
    kept_GSK: np.ndarray  # the claim was made and has a slot


def wanted_choices(chosen_GSK: np.ndarray, uniform_GSK: np.ndarray, policy: str, threshold: float) -> np.ndarray:
    """Return wanted_GSK, the choices that a token makes use of: the first one always, the later ones by policy.

    Paper: the top-2 baseline. `all`; `none`; `threshold`: gate > threshold; `random`: with probability min(1, gate / threshold), Mesh's default with
    0.2; `gshard`: with probability min(1, 2 gate). The gate here is the share p_k / sum_j p_j, whatever the layer multiplies by: on the raw p a
    threshold of 0.2 would refuse nearly all of 64 experts. `uniform_GSK` is the draw, in [0, 1).
    """
    share_GSK = chosen_GSK / (chosen_GSK.sum(axis=-1, keepdims=True) + EPSILON)
    later_GSK = {
        "all": np.ones_like(share_GSK, bool),
        "none": np.zeros_like(share_GSK, bool),
        "threshold": share_GSK > threshold,
        "random": uniform_GSK < share_GSK / max(threshold, EPSILON),
        "gshard": uniform_GSK < 2.0 * share_GSK,
    }[policy]
    return later_GSK | (np.arange(chosen_GSK.shape[-1]) == 0)


def serve(expert_GSK: np.ndarray, wanted_GSK: np.ndarray, priority_GS: np.ndarray, E: int, capacity: int, order: str) -> Claims:
    """Serve the wanted claims of each group; a claim is kept while its expert has a slot. Counts are exclusive.

    Spec: S-CAP-1, S-CAP-2. The order of service: `after_kept`, all first choices before all second ones, whose slots start at the number of first
    choices that were kept (Mesh TensorFlow); `after_all`, at the number of all first choices (GShard): the same claims are kept, in the same slots;
    `by_token`, all choices of a token before the next token's; `until_placed`, a token asks its next choice only where the one before had no
    room (appendix B, no token left behind). Within a choice the tokens come in order of priority.
    """
    if order == "by_token":
        return _serve_by_token(expert_GSK, wanted_GSK, priority_GS, E, capacity)
    G, S, K = expert_GSK.shape
    slots: list[np.ndarray] = []
    kepts: list[np.ndarray] = []
    left_GS, used_GE = np.ones((G, S), bool), np.zeros((G, E), np.int64)
    for k in range(K):
        expert_GS, claims_GS = expert_GSK[..., k], wanted_GSK[..., k] & left_GS
        slot_GS = slots_forward(expert_GS, claims_GS, priority_GS, E, capacity).slot_GS + np.take_along_axis(used_GE, expert_GS, axis=1)
        kept_GS = claims_GS & (slot_GS < capacity)
        counted_GS1 = (claims_GS if order == "after_all" else kept_GS)[..., None]
        used_GE = used_GE + ((expert_GS[..., None] == np.arange(E)) & counted_GS1).sum(axis=1)
        left_GS = left_GS & ~kept_GS if order == "until_placed" else left_GS
        slots, kepts = [*slots, slot_GS], [*kepts, kept_GS]
    return Claims(expert_GSK, np.stack(slots, axis=-1), np.stack(kepts, axis=-1))


def _serve_by_token(expert_GSK: np.ndarray, wanted_GSK: np.ndarray, priority_GS: np.ndarray, E: int, capacity: int) -> Claims:
    G, S, K = expert_GSK.shape
    priority_GSK = priority_GS[..., None] * K + np.arange(K)
    route = slots_forward(expert_GSK.reshape(G, S * K), wanted_GSK.reshape(G, S * K), priority_GSK.reshape(G, S * K), E, capacity)
    return Claims(*(row.reshape(G, S, K) for row in route))


def route_of(claims: Claims) -> Route:
    """Return the claims as rows of their own, token by token: what `pack` and `unpack` move."""
    G, S, K = claims.kept_GSK.shape
    return Route(*(part_GSK.reshape(G, S * K) for part_GSK in claims))


def pack_choices(x_GSKD: np.ndarray, claims: Claims, E: int, C: int) -> np.ndarray:
    """Move the row of each kept claim to its slot; returns packed_GECD. Spec: S-PACK-1. Its backward is `unpack_choices`."""
    G, S, K, D = x_GSKD.shape
    return pack(x_GSKD.reshape(G, S * K, D), route_of(claims), E, C)


def unpack_choices(packed_GECD: np.ndarray, claims: Claims) -> np.ndarray:
    """Move the row of each slot back to its claim, zero where it was not kept; returns x_GSKD. Its backward is `pack_choices`."""
    return unpack(packed_GECD, route_of(claims)).reshape(*claims.kept_GSK.shape, packed_GECD.shape[-1])
