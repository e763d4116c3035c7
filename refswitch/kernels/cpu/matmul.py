# May import: standard library, numpy, numba, refswitch.kernels.cpu (jit, shared, tile).
# ruff: noqa: ARG001  (an overload has the parameters of what it overloads)
"""Matrix product of float32 matrices inside kernels; an operand may be a slice of rows or columns, or a transposed view of one.

The reference's `@`; the answer goes where the caller wants it: `matmul(dw_DF, x_ND.T, dz_NF, False)`. The calling thread does all of it.
The right operand is cut into blocks of DEPTH x WIDTH that stay in the second-level cache, and a block into panels of TILE_COLUMNS columns, which
register tiles walk (`tile`). No BLAS, for two reasons: an expert may have a handful of rows, where the libraries lose half of their speed; and here
a value's bits depend on its row of a and its column of b alone, on no other row, no number of rows, no thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from refswitch.kernels.cpu.jit import kernel
from refswitch.kernels.cpu.shared import shared
from refswitch.kernels.cpu.tile import FLOAT_BYTES, LANES, TILE_COLUMNS, TILE_ROWS, load, move_columns, move_rows, store, tile, turn

DEPTH = 256  # a panel of DEPTH x TILE_COLUMNS is 32 KiB, and a row longer: panels a power of two apart would share few sets of the cache
WIDTH = 1024  # a block of DEPTH x WIDTH is 1 MiB
STRIPS = 4  # tiles whose rows are copied together
ASIDE = TILE_ROWS * (TILE_COLUMNS + STRIPS * DEPTH)  # floats of a tile and of the strips of the left operand
PANELS = (DEPTH + 1) * WIDTH + ASIDE  # floats of the buffer that a product packs into


def matmul(out_MN: np.ndarray, a_MK: np.ndarray, b_KN: np.ndarray, accumulate: bool) -> None:
    """Write a @ b to out, or add it where `accumulate`; callable from Python and from kernels.

    Parameters
    ----------
    out_MN : float32
        Rows are contiguous; may be a slice of a wider matrix.
    a_MK, b_KN : float32
        One of the two strides is that of contiguous values: C order, a slice of rows or columns of it, or such a view transposed.
    accumulate : bool
        Add to what is there.
    """
    if accumulate:
        out_MN += np.matmul(a_MK, b_KN)
    else:
        np.matmul(a_MK, b_KN, out=out_MN)


@overload(matmul)
def _matmul_in_kernels(out_MN: Any, a_MK: Any, b_KN: Any, accumulate: Any) -> Any:
    def product(out_MN: Any, a_MK: Any, b_KN: Any, accumulate: Any) -> Any:  # the outer function's annotations: Numba compares them
        depth, width = min(a_MK.shape[1], DEPTH), min(b_KN.shape[1], WIDTH)
        columns = (width + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
        panels = np.empty((depth + 1) * columns + ASIDE, np.float32)
        matmul_in(panels, out_MN, a_MK, b_KN, accumulate)

    return product


def matmul_in(panels: np.ndarray, out_MN: np.ndarray, a_MK: np.ndarray, b_KN: np.ndarray, accumulate: bool) -> None:
    """Do as `matmul` with a buffer of PANELS floats of the caller's."""
    matmul(out_MN, a_MK, b_KN, accumulate)


@overload(matmul_in)
def _matmul_in_in_kernels(panels: Any, out_MN: Any, a_MK: Any, b_KN: Any, accumulate: Any) -> Any:
    def product(panels: Any, out_MN: Any, a_MK: Any, b_KN: Any, accumulate: Any) -> Any:
        (M, K), N = a_MK.shape, b_KN.shape[1]
        out, out_row = out_MN.ctypes.data, out_MN.strides[0] // FLOAT_BYTES
        a, a_row, a_step = a_MK.ctypes.data, a_MK.strides[0] // FLOAT_BYTES, a_MK.strides[1] // FLOAT_BYTES
        b, b_step, b_across = b_KN.ctypes.data, b_KN.strides[0] // FLOAT_BYTES, b_KN.strides[1] // FLOAT_BYTES
        if K == 0 and not accumulate:
            for m in range(M):
                for n in range(N):
                    out_MN[m, n] = 0.0
        edge = panels.ctypes.data + (panels.size - ASIDE) * FLOAT_BYTES
        call_blocked_product((panels.ctypes.data, edge, out, out_row, a, a_row, a_step, b, b_step, b_across, M, N, K, int(accumulate)))

    return product


@kernel
def pack_panels(panels: int, b: int, step: int, across: int, K: int, N: int) -> None:
    """Copy a block of the right operand into panels of TILE_COLUMNS columns, row after row; columns beyond the block are zero."""
    whole = N // TILE_COLUMNS * TILE_COLUMNS
    panel_size, squares = (K + 1) * TILE_COLUMNS, 0 if across == 1 or step != 1 else K // LANES * LANES
    for k in range(0 if across == 1 else squares, K if across == 1 else squares):
        for panel in range(whole // TILE_COLUMNS):
            move_columns(panels + (panel * panel_size + k * TILE_COLUMNS) * FLOAT_BYTES, b + (k * step + panel * TILE_COLUMNS) * FLOAT_BYTES)
    for n in range(0, 0 if across == 1 else whole, LANES):
        column = panels + (n // TILE_COLUMNS * panel_size + n % TILE_COLUMNS) * FLOAT_BYTES
        for k in range(0, squares, LANES):
            turn(column + k * TILE_COLUMNS * FLOAT_BYTES, TILE_COLUMNS, b + (n * across + k) * FLOAT_BYTES, across)
        for k in range(squares, K):
            for lane in range(LANES):
                store(column + (k * TILE_COLUMNS + lane) * FLOAT_BYTES, load(b + (k * step + (n + lane) * across) * FLOAT_BYTES))
    if whole < N:
        for k in range(K):
            for n in range(whole, whole + TILE_COLUMNS):
                value = load(b + (k * step + n * across) * FLOAT_BYTES) if n < N else np.float32(0.0)
                store(panels + (whole * (K + 1) + k * TILE_COLUMNS + n - whole) * FLOAT_BYTES, value)


@kernel
def pack_strip(strip: int, a: int, row: int, step: int, M: int, K: int) -> None:
    """Copy the rows of one tile, step after step: where the steps lie far apart they would push each other out of the cache."""
    if M == TILE_ROWS and row == 1:
        for k in range(K):
            move_rows(strip + k * TILE_ROWS * FLOAT_BYTES, a + k * step * FLOAT_BYTES)
    else:
        for k in range(K):
            for m in range(M):
                store(strip + (k * TILE_ROWS + m) * FLOAT_BYTES, load(a + (m * row + k * step) * FLOAT_BYTES))


@kernel
def pack_strips(strips: int, a: int, row: int, step: int, M: int, K: int) -> None:
    """Copy the rows of up to STRIPS tiles; side by side where they are whole, so that each line of memory is fetched once."""
    if M == STRIPS * TILE_ROWS and row == 1:
        for k in range(K):
            for strip in range(STRIPS):
                move_rows(strips + (strip * K + k) * TILE_ROWS * FLOAT_BYTES, a + (k * step + strip * TILE_ROWS) * FLOAT_BYTES)
    else:
        for top in range(0, M, TILE_ROWS):
            pack_strip(strips + top * K * FLOAT_BYTES, a + top * row * FLOAT_BYTES, row, step, min(TILE_ROWS, M - top), K)


@kernel
def blocked_product(
    panels: int, edge: int, out: int, out_row: int, a: int, a_row: int, a_step: int, b: int, b_step: int, b_across: int,
    M: int, N: int, K: int, accumulate: int,
) -> None:  # fmt: skip
    """Multiply block by block. The sum over K runs in steps of one inside DEPTH, and the sums of the depths are added in order."""
    strips, tiles = edge + TILE_ROWS * TILE_COLUMNS * FLOAT_BYTES, (M + TILE_ROWS - 1) // TILE_ROWS
    is_packed = a_step != 1
    for n in range(0, N, WIDTH):
        width = min(WIDTH, N - n)
        for k in range(0, K, DEPTH):
            depth, add = min(DEPTH, K - k), accumulate != 0 or k > 0
            pack_panels(panels, b + (k * b_step + n * b_across) * FLOAT_BYTES, b_step, b_across, depth, width)
            for i in range(tiles):
                # few rows are shared out evenly among their tiles: a tile of one row would cost as much as one of four
                top, bottom = (i * TILE_ROWS, min((i + 1) * TILE_ROWS, M)) if is_packed else (i * M // tiles, (i + 1) * M // tiles)
                left, left_row, left_step = a + (top * a_row + k * a_step) * FLOAT_BYTES, a_row, a_step
                if is_packed:
                    if i % STRIPS == 0:
                        pack_strips(strips, left, a_row, a_step, min(STRIPS * TILE_ROWS, M - top), depth)
                    left, left_row, left_step = strips + i % STRIPS * depth * TILE_ROWS * FLOAT_BYTES, 1, TILE_ROWS
                for j in range(0, width, TILE_COLUMNS):
                    columns, panel = min(TILE_COLUMNS, width - j), panels + j * (depth + 1) * FLOAT_BYTES
                    is_whole, corner = columns == TILE_COLUMNS, out + (top * out_row + n + j) * FLOAT_BYTES
                    # a tile that sticks out on the right is computed beside the matrix
                    target, target_row = (corner, out_row) if is_whole else (edge, TILE_COLUMNS)
                    tile(target, target_row, left, left_row, left_step, panel, bottom - top, depth, add and is_whole)
                    if not is_whole:
                        copy_edge(corner, out_row, edge, bottom - top, columns, add)


@kernel
def copy_edge(out: int, out_row: int, edge: int, rows: int, columns: int, add: bool) -> None:
    """Write or add the columns of a tile that belong to the matrix."""
    for m in range(rows):
        for n in range(columns):
            place, value = out + (m * out_row + n) * FLOAT_BYTES, load(edge + (m * TILE_COLUMNS + n) * FLOAT_BYTES)
            store(place, load(place) + value if add else value)


call_blocked_product = shared(blocked_product, 14)
