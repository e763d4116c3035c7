# May import: standard library, numpy, numba, refswitch.kernels.cpu (arrays, bfloat16, jit, matmul).
"""Products of all tokens with one matrix, and the matrix's gradient: the dense layers' `@` and its two adjoints, on all threads.

`project` is also the adjoint in x, with the matrix transposed: a view costs nothing.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from refswitch.kernels.cpu.arrays import chunks
from refswitch.kernels.cpu.bfloat16 import round_rows
from refswitch.kernels.cpu.jit import kernel, parallel_kernel
from refswitch.kernels.cpu.matmul import matmul

ROWS = 256  # tokens of one task: the matrix is packed once per task
BLOCK = 256  # rows and columns of a gradient that one task owns


@kernel
def project_rows(out_TN: np.ndarray, x_TK: np.ndarray, w_KN: np.ndarray, accumulate: bool, narrow: bool) -> None:
    """Write some rows of x @ w."""
    matmul(out_TN, x_TK, w_KN, accumulate)
    if narrow:
        round_rows(out_TN)


@parallel_kernel
def project(out_TN: np.ndarray, x_TK: np.ndarray, w_KN: np.ndarray, accumulate: bool, narrow: bool, rows: int) -> None:
    """Write x @ w, or add it, and round.

    Task i owns `rows` rows of out; 4 (T K + T N + tasks K N) bytes moved; each value is one sum over K in an order that its row alone decides.
    """
    for i in prange(chunks(x_TK.shape[0], rows)):
        part = slice(i * rows, min((i + 1) * rows, x_TK.shape[0]))
        project_rows(out_TN[part], x_TK[part], w_KN, accumulate, narrow)


@kernel
def weight_gradient_block(dw_KN: np.ndarray, x_TK: np.ndarray, dy_TN: np.ndarray) -> None:
    """Write a block of x^T dy."""
    matmul(dw_KN, x_TK.T, dy_TN, False)


@parallel_kernel
def weight_gradient(dw_KN: np.ndarray, x_TK: np.ndarray, dy_TN: np.ndarray, block: int) -> None:
    """Write dw = x^T dy. A task owns a square of dw and sums over all tokens; each value is one sum over T in the same order on any threads."""
    K, N = dw_KN.shape
    across = chunks(N, block)
    for i in prange(chunks(K, block) * across):
        rows = slice(i // across * block, min((i // across + 1) * block, K))
        columns = slice(i % across * block, min((i % across + 1) * block, N))
        weight_gradient_block(dw_KN[rows, columns], x_TK[:, rows], dy_TN[:, columns])
