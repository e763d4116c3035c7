# May import: standard library, numpy.
"""Relative positions: a distance becomes a bucket, a bucket becomes one bias per head.

Paper: the T5 body (Raffel et al., 2.1). One table serves all layers of a stack. Next: `attention`.
"""

from __future__ import annotations

import numpy as np


def bucket_starts(buckets: int, max_distance: int) -> np.ndarray:
    """Return the smallest distance of each bucket of one direction; integers.

    The first half holds one distance each. Bucket exact + j begins where log(n/exact) / log(max_distance/exact) * wide >= j, which is
    n**wide * exact**j >= max_distance**j * exact**wide: integers decide it, so no logarithm can be off by one at n = 16, 32, 64.
    """
    exact = buckets // 2
    wide = buckets - exact
    starts = list(range(exact))
    distance = exact
    for j in range(wide):
        while distance**wide * exact**j < max_distance**j * exact**wide:
            distance += 1
        starts.append(distance)
    return np.array(starts)


def position_buckets(query_L: np.ndarray, memory_M: np.ndarray, U: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """Return bucket_LM for the positions of queries and memory; integers.

    Bidirectional: half of the buckets for each direction, the upper half where the memory lies ahead. Causal: all of them look back, and
    what lies ahead (which a mask hides) shares bucket 0.
    """
    ahead_LM = memory_M[None, :] - query_L[:, None]
    one_way = U // 2 if bidirectional else U
    distance_LM = np.abs(ahead_LM) if bidirectional else np.maximum(-ahead_LM, 0)
    bucket_LM = np.searchsorted(bucket_starts(one_way, max_distance), distance_LM, side="right") - 1
    return bucket_LM + one_way * (ahead_LM > 0) if bidirectional else bucket_LM


def position_bias_forward(table_UH: np.ndarray, bucket_LM: np.ndarray) -> np.ndarray:
    """Return bias_HLM."""
    return np.moveaxis(table_UH[bucket_LM], -1, 0)  # F1


def position_bias_backward(dbias_HLM: np.ndarray, bucket_LM: np.ndarray, U: int) -> np.ndarray:
    """Return dtable_UH: every pair of the same bucket adds to its row."""
    dtable_UH = np.zeros((U, dbias_HLM.shape[0]))
    np.add.at(dtable_UH, bucket_LM, np.moveaxis(dbias_HLM, 0, -1))  # B1
    return dtable_UH
