# May import: standard library, numpy, refswitch.kernels.cpu (arrays, workspace).
"""Relative positions: a bucket becomes one bias per head, and a bucket's gradient is the sum over its pairs.

Paper: the T5 body. One table serves all layers of a stack: this is done once per step, on arrays of H L M values. Next: `attention`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from refswitch.kernels.cpu.arrays import checked
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.workspace import Workspace


@kernel
def spread_buckets(bias_LM: np.ndarray, table_U: np.ndarray, bucket_LM: np.ndarray) -> None:
    """Write the bias of one head's pairs."""
    L, M = bucket_LM.shape
    for i in range(L):
        for j in range(M):
            bias_LM[i, j] = table_U[bucket_LM[i, j]]


@kernel
def collect_buckets(dtable_U: np.ndarray, dbias_LM: np.ndarray, bucket_LM: np.ndarray) -> None:
    """Sum one head's pairs by bucket, in order, in float64."""
    L, M = bucket_LM.shape
    for u in range(dtable_U.size):
        dtable_U[u] = 0.0
    for i in range(L):
        for j in range(M):
            dtable_U[bucket_LM[i, j]] += np.float64(dbias_LM[i, j])


@parallel_kernel
def position_bias_kernel(table_HU: np.ndarray, bias_HLM: np.ndarray, bucket_LM: np.ndarray, forward: bool) -> None:
    """Write the bias from the table, or add the bias's gradient into the table's. Task h owns head h and all its sums; 12 H L M bytes moved."""
    for h in prange(bias_HLM.shape[0]):
        if forward:
            spread_buckets(bias_HLM[h], table_HU[h], bucket_LM)
        else:
            collect_buckets(table_HU[h], bias_HLM[h], bucket_LM)


def position_bias_forward(table_UH: np.ndarray, bucket_LM: np.ndarray, workspace: Workspace) -> np.ndarray:
    """Return bias_HLM."""
    (table_UH,) = checked("position_bias_forward", table_UH=table_UH)
    bias_HLM = workspace.take((table_UH.shape[1], *bucket_LM.shape))
    position_bias_kernel(np.ascontiguousarray(table_UH.T, np.float64), bias_HLM, np.ascontiguousarray(bucket_LM, np.int64), True)
    return bias_HLM


def position_bias_backward(dbias_HLM: np.ndarray, bucket_LM: np.ndarray, U: int) -> np.ndarray:
    """Return dtable_UH: every pair of the same bucket adds to its row."""
    (dbias_HLM,) = checked("position_bias_backward", dbias_HLM=dbias_HLM)
    dtable_HU = np.empty((dbias_HLM.shape[0], U))
    position_bias_kernel(dtable_HU, dbias_HLM, np.ascontiguousarray(bucket_LM, np.int64), False)
    return np.ascontiguousarray(dtable_HU.T, np.float32)
