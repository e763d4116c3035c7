# May import: standard library, numpy, numba, llvmlite.
"""Matrix product of float32 matrices inside kernels: an operand may be a slice of rows or columns, or a transposed view of one; nothing is copied.

The reference's `@`; the answer goes where the caller wants it. In a kernel, `matmul(dw_DF, x_ND.T, dz_NF, False)` calls BLAS on the calling thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.linalg import ensure_blas

FLOAT = 4  # bytes


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
    ensure_blas()

    def product(out_MN: Any, a_MK: Any, b_KN: Any, accumulate: Any) -> Any:  # the outer function's annotations: Numba compares them
        (M, K), N = a_MK.shape, b_KN.shape[1]
        is_a_turned = a_MK.strides[1] != FLOAT and K > 1
        is_b_turned = b_KN.strides[1] != FLOAT and N > 1
        stride_a = max(a_MK.strides[1] // FLOAT, M, 1) if is_a_turned else max(a_MK.strides[0] // FLOAT, K, 1)
        stride_b = max(b_KN.strides[1] // FLOAT, K, 1) if is_b_turned else max(b_KN.strides[0] // FLOAT, N, 1)
        stride_out = max(out_MN.strides[0] // FLOAT, N, 1)
        # BLAS reads columns first: in its eyes every matrix is the transposed one, and out^T = b^T a^T
        _sgemm(out_MN, b_KN, a_MK, is_b_turned, is_a_turned, N, M, K, stride_out, stride_b, stride_a, np.float32(accumulate))

    return product


@intrinsic
def _sgemm(typing: Any, c: Any, a: Any, b: Any, turn_a: Any, turn_b: Any, m: Any, n: Any, k: Any, ldc: Any, lda: Any, ldb: Any, beta: Any) -> Any:
    """Call the sgemm that np.dot calls inside Numba, without np.dot's demand for contiguous operands."""
    sizes = [types.intp] * 6
    signature = types.void(c, a, b, types.boolean, types.boolean, *sizes, types.float32)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, char, size = ir.IntType(8).as_pointer(), ir.IntType(8), context.get_value_type(types.intp)
        c, a, b = (
            builder.bitcast(context.make_array(kind)(context, builder, arg).data, pointer)
            for kind, arg in zip(signature.args[:3], args[:3], strict=True)
        )
        turns = [builder.select(builder.trunc(turn, ir.IntType(1)), char(ord("t")), char(ord("n"))) for turn in args[3:5]]
        m, n, k, ldc, lda, ldb = args[5:11]
        one = builder.bitcast(cgutils.alloca_once_value(builder, ir.FloatType()(1.0)), pointer)
        beta = builder.bitcast(cgutils.alloca_once_value(builder, args[11]), pointer)
        kinds = [char, char, char, size, size, size, pointer, pointer, size, pointer, size, pointer, pointer, size]
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), kinds), "numba_xxgemm")
        builder.call(function, [char(ord("s")), *turns, m, n, k, one, a, lda, b, ldb, beta, c, ldc])
        return context.get_dummy_value()

    return signature, generate
