# May import: standard library, numpy, numba, refswitch.config, refswitch.kernels.cpu (arrays, bfloat16, dense, functions, jit, matmul, workspace).
"""Attention: T5's, without 1/sqrt(K), with a bias per head and a mask.

Paper: the T5 body. The scores of one head and TILE rows at a time live in a core's cache and nowhere else: backward computes them again, by the same
function and to the same bits, because that costs less than storing B H L M probabilities. Next: `feed_forward`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from refswitch.config import ModelPoints
from refswitch.errors import InputError
from refswitch.kernels.cpu.arrays import CHUNK, checked, chunks, same_shape
from refswitch.kernels.cpu.bfloat16 import is_narrow, round_row, round_rows
from refswitch.kernels.cpu.dense import BLOCK, ROWS, project, weight_gradient
from refswitch.kernels.cpu.functions import INFINITY, ONE, ZERO, exp_of_negative, maximum, product, total
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.matmul import matmul
from refswitch.kernels.cpu.workspace import Workspace

TILE = 128  # rows of scores at a time
TILE_VALUES = 1 << 16  # at most, but for a memory so long that TILE_LEAST rows are more
TILE_LEAST = 16
PARTS = 4  # of a batch, for the gradient of a bias that all sequences share


class Form(NamedTuple):
    """What a call has, as statics of its kernels."""

    has_bias: bool
    has_factor: bool
    is_score_narrow: bool
    is_prob_narrow: bool  # and all else that is handed on
    is_gradient_narrow: bool


class AttentionSaved(NamedTuple):
    """What attention's backward needs; the probabilities are not kept."""

    x_BLD: np.ndarray
    memory_BMD: np.ndarray
    query_BLHK: np.ndarray
    key_BMHK: np.ndarray
    value_BMHK: np.ndarray
    mixed_BLHK: np.ndarray  # left operand of dw_out
    bias_HLM: np.ndarray
    allowed_BLM: np.ndarray
    factor_BHLM: np.ndarray  # dropout on the probabilities, already scaled


@kernel
def probs_rows(probs_LM: np.ndarray, query_LK: np.ndarray, key_MK: np.ndarray, bias_LM: np.ndarray, allowed_LM: np.ndarray, form: Form) -> None:
    """Write softmax(query key + bias) over the allowed; a row that may see nothing is 0."""
    matmul(probs_LM, query_LK, key_MK.T, False)
    L, M = probs_LM.shape
    for i in range(L):
        row_M, allowed_M = probs_LM[i], allowed_LM[i]
        if form.has_bias:
            bias_M = bias_LM[i]
            for j in range(M):
                row_M[j] = row_M[j] + bias_M[j] if allowed_M[j] else -INFINITY
        else:
            for j in range(M):
                row_M[j] = row_M[j] if allowed_M[j] else -INFINITY
        if form.is_score_narrow:
            round_row(row_M, row_M)
        highest = maximum(row_M)
        shift = ZERO if highest == -INFINITY else highest
        for j in range(M):
            row_M[j] = exp_of_negative(row_M[j] - shift)
        over = total(row_M)
        inverse = ONE if over == ZERO else ONE / over
        for j in range(M):
            row_M[j] *= inverse
        if form.is_prob_narrow:
            round_row(row_M, row_M)


@kernel
def scale_rows(out_LM: np.ndarray, x_LM: np.ndarray, factor_LM: np.ndarray) -> None:
    """Write x * factor; out may be x."""
    for i in range(out_LM.shape[0]):
        out_M, x_M, factor_M = out_LM[i], x_LM[i], factor_LM[i]
        for j in range(out_M.size):
            out_M[j] = x_M[j] * factor_M[j]


@kernel
def head_forward(
    mixed_LK: np.ndarray,
    query_LK: np.ndarray,
    key_MK: np.ndarray,
    value_MK: np.ndarray,
    bias_LM: np.ndarray,
    allowed_LM: np.ndarray,
    factor_LM: np.ndarray,
    form: Form,
    tile: int,
) -> None:
    """Mix the values of one sequence and head."""
    L, M = allowed_LM.shape
    scratch_LM = np.empty((min(tile, L), M), np.float32)
    for first in range(0, L, tile):
        end = min(first + tile, L)
        probs_LM = scratch_LM[: end - first]
        probs_rows(probs_LM, query_LK[first:end], key_MK, bias_LM[first:end], allowed_LM[first:end], form)
        if form.has_factor:
            scale_rows(probs_LM, probs_LM, factor_LM[first:end])
        matmul(mixed_LK[first:end], probs_LM, value_MK, False)
    if form.is_prob_narrow:
        round_rows(mixed_LK)


@kernel
def dscores_rows(dprobs_LM: np.ndarray, probs_LM: np.ndarray) -> None:
    """Turn dprobs into dscores in place."""
    for i in range(probs_LM.shape[0]):
        dprobs_M, probs_M = dprobs_LM[i], probs_LM[i]
        mean = product(probs_M, dprobs_M)
        for j in range(probs_M.size):
            dprobs_M[j] = probs_M[j] * (dprobs_M[j] - mean)


@kernel
def add_rows(out_LM: np.ndarray, x_LM: np.ndarray, accumulate: bool) -> None:
    """Write x, or add it."""
    for i in range(x_LM.shape[0]):
        out_M, x_M = out_LM[i], x_LM[i]
        if accumulate:
            for j in range(x_M.size):
                out_M[j] += x_M[j]
        else:
            for j in range(x_M.size):
                out_M[j] = x_M[j]


@kernel
def head_backward(
    dquery_LK: np.ndarray,
    dkey_MK: np.ndarray,
    dvalue_MK: np.ndarray,
    dbias_LM: np.ndarray,
    dmixed_LK: np.ndarray,
    query_LK: np.ndarray,
    key_MK: np.ndarray,
    value_MK: np.ndarray,
    bias_LM: np.ndarray,
    allowed_LM: np.ndarray,
    factor_LM: np.ndarray,
    form: Form,
    tile: int,
    add_bias: bool,
) -> None:
    """Undo one sequence and head; the gradient of the bias is added to those of the sequences before."""
    L, M = allowed_LM.shape
    scratch_LM = np.empty((min(tile, L), M), np.float32)
    dscratch_LM = np.empty((min(tile, L), M), np.float32)
    for first in range(0, L, tile):
        end, add = min(first + tile, L), first > 0
        probs_LM, dprobs_LM = scratch_LM[: end - first], dscratch_LM[: end - first]
        probs_rows(probs_LM, query_LK[first:end], key_MK, bias_LM[first:end], allowed_LM[first:end], form)
        if form.has_factor:
            scale_rows(dprobs_LM, probs_LM, factor_LM[first:end])  # for a moment these are the probabilities that mixed the values
            matmul(dvalue_MK, dprobs_LM.T, dmixed_LK[first:end], add)
            matmul(dprobs_LM, dmixed_LK[first:end], value_MK.T, False)
            scale_rows(dprobs_LM, dprobs_LM, factor_LM[first:end])
        else:
            matmul(dvalue_MK, probs_LM.T, dmixed_LK[first:end], add)
            matmul(dprobs_LM, dmixed_LK[first:end], value_MK.T, False)
        dscores_rows(dprobs_LM, probs_LM)
        if form.has_bias:
            add_rows(dbias_LM[first:end], dprobs_LM, add_bias)
        matmul(dquery_LK[first:end], dprobs_LM, key_MK, False)
        matmul(dkey_MK, dprobs_LM.T, query_LK[first:end], add)
    if form.is_gradient_narrow:
        round_rows(dquery_LK)
        round_rows(dkey_MK)
        round_rows(dvalue_MK)


@parallel_kernel
def attention_kernel(
    mixed_BLHK: np.ndarray,
    query_BLHK: np.ndarray,
    key_BMHK: np.ndarray,
    value_BMHK: np.ndarray,
    bias_HLM: np.ndarray,
    allowed_BLM: np.ndarray,
    factor_BHLM: np.ndarray,
    form: Form,
    tile: int,
) -> None:
    """Mix the values of every sequence and head.

    Task b H + h owns mixed[b, :, h]; 4 (2 B L + 2 B M) H K + B H L M bytes moved, and 4 B H L M more where there is dropout. Tasks share nothing.
    """
    B, _, H, _ = query_BLHK.shape
    for i in prange(B * H):
        b, h = i // H, i % H
        bias_LM = bias_HLM[h] if form.has_bias else bias_HLM[0]
        factor_LM = factor_BHLM[b, h] if form.has_factor else factor_BHLM[0, 0]
        head_forward(mixed_BLHK[b, :, h], query_BLHK[b, :, h], key_BMHK[b, :, h], value_BMHK[b, :, h], bias_LM, allowed_BLM[b], factor_LM, form, tile)


@parallel_kernel
def attention_backward_kernel(
    dquery_BLHK: np.ndarray,
    dkey_BMHK: np.ndarray,
    dvalue_BMHK: np.ndarray,
    dbias_PHLM: np.ndarray,
    dmixed_BLHK: np.ndarray,
    query_BLHK: np.ndarray,
    key_BMHK: np.ndarray,
    value_BMHK: np.ndarray,
    bias_HLM: np.ndarray,
    allowed_BLM: np.ndarray,
    factor_BHLM: np.ndarray,
    form: Form,
    tile: int,
    parts: int,
) -> None:
    """Undo every sequence and head.

    Task p H + h owns head h of the sequences of part p, in order, and dbias[p, h], which `bias_gradient_kernel` adds. The parts are as many on any
    number of threads.
    """
    B, _, H, _ = query_BLHK.shape
    for i in prange(parts * H):
        p, h = i // H, i % H
        bias_LM = bias_HLM[h] if form.has_bias else bias_HLM[0]
        dbias_LM = dbias_PHLM[p, h] if form.has_bias else dbias_PHLM[0, 0]
        for b in range(p * B // parts, (p + 1) * B // parts):
            factor_LM = factor_BHLM[b, h] if form.has_factor else factor_BHLM[0, 0]
            head_backward(
                dquery_BLHK[b, :, h], dkey_BMHK[b, :, h], dvalue_BMHK[b, :, h], dbias_LM, dmixed_BLHK[b, :, h],
                query_BLHK[b, :, h], key_BMHK[b, :, h], value_BMHK[b, :, h], bias_LM, allowed_BLM[b], factor_LM,
                form, tile, b > p * B // parts,
            )  # fmt: skip


@parallel_kernel
def sum_parts_kernel(out: np.ndarray, parts: np.ndarray, chunk: int) -> None:
    """Add rows of parts, in order. Task i owns out[i chunk : (i + 1) chunk]; 4 (parts + 1) bytes moved per value."""
    for i in prange(chunks(out.size, chunk)):
        columns = slice(i * chunk, min((i + 1) * chunk, out.size))
        add_rows(out[columns].reshape((1, -1)), parts[:1, columns], False)
        for p in range(1, parts.shape[0]):
            add_rows(out[columns].reshape((1, -1)), parts[p : p + 1, columns], True)


def _tile(M: int) -> int:
    return max(TILE_LEAST, min(TILE, TILE_VALUES // M))


def _operands(caller: str, query_shape: tuple[int, ...], M: int, bias_HLM: np.ndarray, factor_BHLM: np.ndarray, points: ModelPoints) -> Form:
    B, L, H, _ = query_shape
    has_bias, has_factor = bias_HLM.shape == (H, L, M), factor_BHLM.shape == (B, H, L, M)
    if not has_bias and not (bias_HLM.size == 1 and bias_HLM.item() == 0.0):
        raise InputError(f"{caller}: bias_HLM has shape {bias_HLM.shape}, but should be {(H, L, M)}, or one 0")
    if not has_factor and not (factor_BHLM.size == 1 and factor_BHLM.item() == 1.0):
        raise InputError(f"{caller}: factor_BHLM has shape {factor_BHLM.shape}, but should be {(B, H, L, M)}, or one 1")
    return Form(has_bias, has_factor, is_narrow(points.statistics), is_narrow(points.activations), is_narrow(points.gradients))


def attention_forward(
    x_BLD: np.ndarray,
    memory_BMD: np.ndarray,
    bias_HLM: np.ndarray,
    params: Any,
    allowed_BLM: np.ndarray,
    factor_BHLM: np.ndarray,
    points: ModelPoints,
    workspace: Workspace,
) -> tuple[np.ndarray, AttentionSaved]:
    """Return out_BLD, the memory's values mixed by softmax(query key + bias).

    Rounding: R11 for what is handed on, R12 for the scores.
    """
    x_BLD, memory_BMD, bias_HLM, factor_BHLM = checked(
        "attention_forward", x_BLD=x_BLD, memory_BMD=memory_BMD, bias_HLM=bias_HLM, factor_BHLM=factor_BHLM
    )
    w_query_DHK, w_key_DHK, w_value_DHK, w_out_HKD = checked("attention_forward", **params._asdict())
    (B, L, D), M, (H, K) = x_BLD.shape, memory_BMD.shape[1], w_query_DHK.shape[1:]
    same_shape("attention_forward", (B, M, D), memory_BMD=memory_BMD)
    same_shape("attention_forward", (B, L, M), allowed_BLM=allowed_BLM)
    same_shape("attention_forward", (D, H, K), w_key_DHK=w_key_DHK, w_value_DHK=w_value_DHK)
    form = _operands("attention_forward", (B, L, H, K), M, bias_HLM, factor_BHLM, points)
    query_BLHK, key_BMHK, value_BMHK = workspace.take((B, L, H, K)), workspace.take((B, M, H, K)), workspace.take((B, M, H, K))
    for out, x, w in ((query_BLHK, x_BLD, w_query_DHK), (key_BMHK, memory_BMD, w_key_DHK), (value_BMHK, memory_BMD, w_value_DHK)):
        project(out.reshape(-1, H * K), x.reshape(-1, D), w.reshape(D, H * K), False, form.is_prob_narrow, ROWS)
    mixed_BLHK, out_BLD = workspace.take((B, L, H, K)), workspace.take((B, L, D))
    allowed_BLM = np.ascontiguousarray(allowed_BLM, np.bool_)
    attention_kernel(mixed_BLHK, query_BLHK, key_BMHK, value_BMHK, bias_HLM, allowed_BLM, factor_BHLM, form, _tile(M))
    project(out_BLD.reshape(-1, D), mixed_BLHK.reshape(-1, H * K), w_out_HKD.reshape(H * K, D), False, form.is_prob_narrow, ROWS)
    saved = AttentionSaved(x_BLD, memory_BMD, query_BLHK, key_BMHK, value_BMHK, mixed_BLHK, bias_HLM, allowed_BLM, factor_BHLM)
    return out_BLD, saved


def attention_backward(
    dout_BLD: np.ndarray, saved: AttentionSaved, params: Any, points: ModelPoints, workspace: Workspace
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    """Return dx_BLD, dmemory_BMD, dbias_HLM (one 0 where there was no bias) and the parameters' gradients; self-attention adds the first two.

    Rounding: R14.
    """
    (dout_BLD,) = checked("attention_backward", dout_BLD=dout_BLD)
    same_shape("attention_backward", saved.x_BLD.shape, dout_BLD=dout_BLD)
    w_query_DHK, w_key_DHK, w_value_DHK, w_out_HKD = checked("attention_backward", **params._asdict())
    (B, L, H, K), M, D = saved.query_BLHK.shape, saved.key_BMHK.shape[1], dout_BLD.shape[-1]
    I, take = H * K, workspace.take  # noqa: E741  the heads side by side
    form = _operands("attention_backward", (B, L, H, K), M, saved.bias_HLM, saved.factor_BHLM, points)
    narrow = form.is_gradient_narrow
    x_TD, memory_ND, dout_TD = (x.reshape(-1, D) for x in (saved.x_BLD, saved.memory_BMD, dout_BLD))

    dw_out_HKD, dmixed_BLHK = take((H, K, D)), take((B, L, H, K))
    weight_gradient(dw_out_HKD.reshape(I, D), saved.mixed_BLHK.reshape(-1, I), dout_TD, BLOCK)  # B7
    project(dmixed_BLHK.reshape(-1, I), dout_TD, w_out_HKD.reshape(I, D).T, False, narrow, ROWS)  # B7  R14

    parts = min(B, PARTS) if form.has_bias else B
    dbias_PHLM = take((parts, H, L, M)) if form.has_bias else np.zeros((1, 1, 1, 1), np.float32)
    dquery_BLHK, dkey_BMHK, dvalue_BMHK = take((B, L, H, K)), take((B, M, H, K)), take((B, M, H, K))
    attention_backward_kernel(
        dquery_BLHK, dkey_BMHK, dvalue_BMHK, dbias_PHLM, dmixed_BLHK, saved.query_BLHK, saved.key_BMHK, saved.value_BMHK,
        saved.bias_HLM, saved.allowed_BLM, saved.factor_BHLM, form, _tile(M), parts,
    )  # B6, B5, B4  R14  # fmt: skip
    dbias_HLM = take((H, L, M)) if form.has_bias else np.zeros((1, 1, 1), np.float32)
    sum_parts_kernel(dbias_HLM.reshape(-1), dbias_PHLM.reshape(dbias_PHLM.shape[0], -1), CHUNK)

    dquery_TI, dkey_NI, dvalue_NI = (d.reshape(-1, I) for d in (dquery_BLHK, dkey_BMHK, dvalue_BMHK))
    dparams = params._replace(w_query_DHK=take((D, H, K)), w_key_DHK=take((D, H, K)), w_value_DHK=take((D, H, K)), w_out_HKD=dw_out_HKD)
    weight_gradient(dparams.w_value_DHK.reshape(D, I), memory_ND, dvalue_NI, BLOCK)  # B3
    weight_gradient(dparams.w_key_DHK.reshape(D, I), memory_ND, dkey_NI, BLOCK)  # B2
    weight_gradient(dparams.w_query_DHK.reshape(D, I), x_TD, dquery_TI, BLOCK)  # B1
    dx_BLD, dmemory_BMD = take((B, L, D)), take((B, M, D))
    project(dmemory_BMD.reshape(-1, D), dkey_NI, w_key_DHK.reshape(D, I).T, False, False, ROWS)  # B2
    project(dmemory_BMD.reshape(-1, D), dvalue_NI, w_value_DHK.reshape(D, I).T, True, narrow, ROWS)  # B3  R14
    project(dx_BLD.reshape(-1, D), dquery_TI, w_query_DHK.reshape(D, I).T, False, narrow, ROWS)  # B1  R14
    workspace.give(dmixed_BLHK, dquery_BLHK, dkey_BMHK, dvalue_BMHK, dbias_PHLM)
    return dx_BLD, dmemory_BMD, dbias_HLM, dparams
