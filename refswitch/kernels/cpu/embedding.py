# May import: standard library, numpy, numba, refswitch.config, refswitch.errors, refswitch.kernels.cpu (the files above).
"""Embedding: a token's row of the table, and the table's other use as the logits' matrix.

Paper: the T5 body; v1.0 ties the logits to the table and scales them by D**-0.5, v1.1 has a matrix of its own. Next: `norm`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from refswitch.config import ModelPoints
from refswitch.errors import InputError
from refswitch.kernels.cpu.arrays import checked, chunks, same_shape
from refswitch.kernels.cpu.bfloat16 import is_narrow
from refswitch.kernels.cpu.dense import BLOCK, ROWS, project, weight_gradient
from refswitch.kernels.cpu.elementwise import times
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.workspace import Workspace

COLUMNS = 128  # of a row that one task owns: a frequent token's sum is shared among threads by columns


@kernel
def copy_rows(out_TD: np.ndarray, tokens_T: np.ndarray, table_VD: np.ndarray) -> None:
    """Write the rows of some tokens."""
    for t in range(tokens_T.size):
        out_D, row_D = out_TD[t], table_VD[tokens_T[t]]
        for d in range(row_D.size):
            out_D[d] = row_D[d]


@kernel
def sum_rows(out: np.ndarray, dx_TD: np.ndarray, rows: np.ndarray, first: int) -> None:
    """Write the sum of some rows' columns from `first` on, in order, in float64."""
    sums = np.zeros(out.size, np.float64)
    for t in rows:
        row = dx_TD[t, first : first + out.size]
        for i in range(out.size):
            sums[i] += np.float64(row[i])
    for i in range(out.size):
        out[i] = np.float32(sums[i])


@parallel_kernel
def embed_kernel(out_TD: np.ndarray, tokens_T: np.ndarray, table_VD: np.ndarray, rows: int) -> None:
    """Look up every token. Task i owns `rows` rows of out; 8 T D bytes moved; nothing is computed."""
    for i in prange(chunks(tokens_T.size, rows)):
        part = slice(i * rows, min((i + 1) * rows, tokens_T.size))
        copy_rows(out_TD[part], tokens_T[part], table_VD)


@parallel_kernel
def dembed_kernel(dtable_VD: np.ndarray, dx_TD: np.ndarray, order_T: np.ndarray, start_V: np.ndarray, columns: int) -> None:
    """Add every token's gradient to its row.

    Tokens come sorted: order[start[v] : start[v + 1]] are those that are v, in order. Task c V + v owns `columns` columns of row v;
    4 (T + V) D bytes moved; each sum is one task's and in the tokens' order.
    """
    V, D = dtable_VD.shape
    for i in prange(chunks(D, columns) * V):
        v, first = i % V, i // V * columns
        sum_rows(dtable_VD[v, first : min(first + columns, D)], dx_TD, order_T[start_V[v] : start_V[v + 1]], first)


def _tokens(caller: str, tokens_BL: np.ndarray, V: int) -> np.ndarray:
    if tokens_BL.size == 0 or tokens_BL.dtype.kind not in "iu":
        raise InputError(f"{caller}: tokens_BL has shape {tokens_BL.shape} and dtype {tokens_BL.dtype}, but should have elements, and integers")
    if tokens_BL.min() < 0 or tokens_BL.max() >= V:
        raise InputError(f"{caller}: tokens_BL has {tokens_BL.min()} to {tokens_BL.max()}, but should be in [0, V={V})")
    return tokens_BL.reshape(-1).astype(np.int64)


def embed_forward(tokens_BL: np.ndarray, embedding_VD: np.ndarray, workspace: Workspace) -> np.ndarray:
    """Return x_BLD, the row of each token."""
    (embedding_VD,) = checked("embed_forward", embedding_VD=embedding_VD)
    V, D = embedding_VD.shape
    x_BLD = workspace.take((*tokens_BL.shape, D))
    embed_kernel(x_BLD.reshape(-1, D), _tokens("embed_forward", tokens_BL, V), embedding_VD, ROWS)
    return x_BLD


def embed_backward(dx_BLD: np.ndarray, tokens_BL: np.ndarray, V: int, workspace: Workspace) -> np.ndarray:
    """Return dembedding_VD: a token that occurs twice adds twice."""
    (dx_BLD,) = checked("embed_backward", dx_BLD=dx_BLD)
    same_shape("embed_backward", (*tokens_BL.shape, dx_BLD.shape[-1]), dx_BLD=dx_BLD)
    tokens_T, D = _tokens("embed_backward", tokens_BL, V), dx_BLD.shape[-1]
    order_T = np.argsort(tokens_T, kind="stable")
    start_V = np.concatenate([[0], np.cumsum(np.bincount(tokens_T, minlength=V))])
    dembedding_VD = workspace.take((V, D))
    dembed_kernel(dembedding_VD, dx_BLD.reshape(-1, D), order_T, start_V, COLUMNS)
    return dembedding_VD


def tied_logits_forward(x_BLD: np.ndarray, embedding_VD: np.ndarray, points: ModelPoints, workspace: Workspace) -> np.ndarray:
    """Return logits_BLV, each token's product with every row of the table, times D**-0.5 (T5 v1.0).

    Rounding: R11, R13.
    """
    x_BLD, embedding_VD = checked("tied_logits_forward", x_BLD=x_BLD, embedding_VD=embedding_VD)
    (B, L, D), V = x_BLD.shape, embedding_VD.shape[0]
    same_shape("tied_logits_forward", (V, D), embedding_VD=embedding_VD)
    scaled_BLD, logits_BLV = times(x_BLD, D**-0.5, points.activations, workspace), workspace.take((B, L, V))
    project(logits_BLV.reshape(-1, V), scaled_BLD.reshape(-1, D), embedding_VD.T, False, is_narrow(points.logits), ROWS)
    workspace.give(scaled_BLD)
    return logits_BLV


def tied_logits_backward(
    dlogits_BLV: np.ndarray, x_BLD: np.ndarray, embedding_VD: np.ndarray, points: ModelPoints, workspace: Workspace
) -> tuple[np.ndarray, np.ndarray]:
    """Return dx_BLD and dembedding_VD.

    Rounding: R11, R14.
    """
    dlogits_BLV, x_BLD, embedding_VD = checked("tied_logits_backward", dlogits_BLV=dlogits_BLV, x_BLD=x_BLD, embedding_VD=embedding_VD)
    V, D = embedding_VD.shape
    same_shape("tied_logits_backward", (*x_BLD.shape[:2], V), dlogits_BLV=dlogits_BLV)
    dlogits_TV, dscaled_BLD, dembedding_VD = dlogits_BLV.reshape(-1, V), workspace.take(x_BLD.shape), workspace.take((V, D))
    project(dscaled_BLD.reshape(-1, D), dlogits_TV, embedding_VD, False, is_narrow(points.gradients), ROWS)  # B2  R14
    scaled_BLD = times(x_BLD, D**-0.5, points.activations, workspace)  # R11, as the forward pass read it
    weight_gradient(dembedding_VD, dlogits_TV, scaled_BLD.reshape(-1, D), BLOCK)  # B2
    dx_BLD = times(dscaled_BLD, D**-0.5, points.gradients, workspace)  # B1  R14
    workspace.give(scaled_BLD, dscaled_BLD)
    return dx_BLD, dembedding_VD


def logits_forward(x_BLD: np.ndarray, w_logits_DV: np.ndarray, points: ModelPoints, workspace: Workspace) -> np.ndarray:
    """Return logits_BLV by a matrix of its own, unscaled (T5 v1.1).

    Rounding: R13.
    """
    x_BLD, w_logits_DV = checked("logits_forward", x_BLD=x_BLD, w_logits_DV=w_logits_DV)
    (B, L, D), V = x_BLD.shape, w_logits_DV.shape[1]
    same_shape("logits_forward", (D, V), w_logits_DV=w_logits_DV)
    logits_BLV = workspace.take((B, L, V))
    project(logits_BLV.reshape(-1, V), x_BLD.reshape(-1, D), w_logits_DV, False, is_narrow(points.logits), ROWS)
    return logits_BLV


def logits_backward(
    dlogits_BLV: np.ndarray, x_BLD: np.ndarray, w_logits_DV: np.ndarray, points: ModelPoints, workspace: Workspace
) -> tuple[np.ndarray, np.ndarray]:
    """Return dx_BLD and dw_logits_DV.

    Rounding: R14.
    """
    dlogits_BLV, x_BLD, w_logits_DV = checked("logits_backward", dlogits_BLV=dlogits_BLV, x_BLD=x_BLD, w_logits_DV=w_logits_DV)
    D, V = w_logits_DV.shape
    same_shape("logits_backward", (*x_BLD.shape[:2], V), dlogits_BLV=dlogits_BLV)
    dx_BLD, dw_logits_DV = workspace.take(x_BLD.shape), workspace.take((D, V))
    project(dx_BLD.reshape(-1, D), dlogits_BLV.reshape(-1, V), w_logits_DV.T, False, is_narrow(points.gradients), ROWS)
    weight_gradient(dw_logits_DV, x_BLD.reshape(-1, D), dlogits_BLV.reshape(-1, V), BLOCK)
    return dx_BLD, dw_logits_DV
