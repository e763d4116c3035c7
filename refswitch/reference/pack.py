# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Pack and unpack: the token's trip to its expert's slot and back.

Paper: eq. (7), 5.4 (a gather instead of the one-hot product). Spec: S-PACK-1. Next: `experts`.

One linear move and its adjoint, so the backward of one is the other and there is no third function. Moves are exact: equal bits.
"""

from __future__ import annotations

import numpy as np

from refswitch.reference.capacity import Route


def pack(x_GSD: np.ndarray, route: Route, E: int, C: int) -> np.ndarray:
    """Move the row of each kept token to its slot; a slot that nobody claimed is zero.

    Spec: S-PACK-1. Returns packed_GECD. Its backward is `unpack`.
    """
    G, _, D = x_GSD.shape
    g, s = np.nonzero(route.kept_GS)
    packed_GECD = np.zeros((G, E, C, D))
    np.add.at(packed_GECD, (g, route.expert_GS[g, s], route.slot_GS[g, s]), x_GSD[g, s])  # not =: where counts collide a slot holds a sum
    return packed_GECD


def unpack(packed_GECD: np.ndarray, route: Route) -> np.ndarray:
    """Move the row of each slot back to the token that holds it; a token without a slot gets zero.

    Spec: S-PACK-1, S-DROP-1. Returns x_GSD. Its backward is `pack`.
    """
    G, S = route.kept_GS.shape
    g, s = np.nonzero(route.kept_GS)
    x_GSD = np.zeros((G, S, packed_GECD.shape[-1]))
    x_GSD[g, s] = packed_GECD[g, route.expert_GS[g, s], route.slot_GS[g, s]]
    return x_GSD


def slots_in_use(route: Route) -> int:
    """Return one more than the highest slot that is held: the C that `pack` needs, however large the capacity is."""
    return int(np.max(route.slot_GS, where=route.kept_GS, initial=-1)) + 1
