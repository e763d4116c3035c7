# May import: standard library, numpy, llvmlite, numba.
# ruff: noqa: ARG001  (an overload has the parameters of what it overloads, an intrinsic those of its code)
"""Sums and maxima of a row in vector registers, in an order that is written here and does not depend on the machine.

A compiler may not reorder a sum, so it makes no vector instructions of a loop that adds; allowing it to would leave the order to its choice. Here
REGISTERS * LANES sums run side by side, each over every such element, and are added in a tree. `functions` has the
rows' ends, and is what to call. `fma` is the processor's instruction, of which Numba itself makes none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

LANES, REGISTERS = 8, 4
STRIDE = LANES * REGISTERS  # elements of one turn
FLOAT_BYTES = 4
FLOAT, DOUBLE, INDEX = ir.FloatType(), ir.DoubleType(), ir.IntType(64)


def sum_of_turns(x: np.ndarray, whole: int) -> np.float32:
    """Return the sum of the first `whole` values, a multiple of STRIDE."""
    return np.float32(x[:whole].sum())


def product_of_turns(x: np.ndarray, y: np.ndarray, whole: int) -> np.float32:
    """Return the sum of x * y over the first `whole` values, each product and sum rounded once together."""
    return np.float32((x[:whole] * y[:whole]).sum())


def squares_of_turns(x: np.ndarray, whole: int) -> np.float64:
    """Return the sum of squares of the first `whole` values in float64, where a square is exact."""
    return np.square(x[:whole], dtype=np.float64).sum()


def maximum_of_turns(x: np.ndarray, whole: int) -> np.float32:
    """Return the largest of the first `whole` values; a NaN may not be seen."""
    return np.fmax.reduce(x[:whole], initial=np.float32(-np.inf))


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = a.type
    name = f"llvm.fma.v{LANES}f{32 if kind.element == FLOAT else 64}"
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name), [a, b, c])


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _reduction(element: Any, start: float, step: Callable[..., Any], join: Callable[..., Any]) -> Callable[..., Any]:
    """Return a generator of LLVM code: `step` takes in one vector of each operand, `join` brings two results together."""
    vector, narrow = ir.VectorType(element, LANES), ir.VectorType(FLOAT, LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = [context.make_array(kind)(context, builder, arg).data for kind, arg in zip(signature.args[:-1], args[:-1], strict=True)]
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [start] * LANES)) for _ in range(REGISTERS)]
        with cgutils.for_range_slice(builder, INDEX(0), args[-1], INDEX(STRIDE), INDEX, inc=True) as (i, _):
            for number, slot in enumerate(sums):
                at = builder.add(i, INDEX(number * LANES))
                loaded = [builder.load(builder.bitcast(builder.gep(row, [at]), narrow.as_pointer()), align=FLOAT_BYTES) for row in rows]
                values = [value if element == FLOAT else builder.fpext(value, vector) for value in loaded]
                builder.store(step(builder, builder.load(slot), *values), slot)
        parts = [builder.load(slot) for slot in sums]
        while len(parts) > 1:
            parts = [join(builder, parts[k], parts[k + 1]) for k in range(0, len(parts), 2)]
        lanes = [builder.extract_element(parts[0], ir.IntType(32)(k)) for k in range(LANES)]
        while len(lanes) > 1:
            lanes = [join(builder, lanes[k], lanes[k + len(lanes) // 2]) for k in range(len(lanes) // 2)]
        return lanes[0]

    return generate


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


_SUM = _reduction(FLOAT, 0.0, _add, _add)
_PRODUCT = _reduction(FLOAT, 0.0, lambda builder, total, x, y: _fused(builder, x, y, total), _add)
_SQUARES = _reduction(DOUBLE, 0.0, lambda builder, total, x: _fused(builder, x, x, total), _add)
_MAXIMUM = _reduction(FLOAT, float("-inf"), lambda builder, most, x: _larger(builder, x, most), _larger)


def _of_one_row(result: Any, code: Callable[..., Any]) -> Any:
    def reduction(typing: Any, x: Any, whole: Any) -> Any:
        return result(x, types.intp), code

    return intrinsic(reduction)


def _of_two_rows(result: Any, code: Callable[..., Any]) -> Any:
    def reduction(typing: Any, x: Any, y: Any, whole: Any) -> Any:
        return result(x, y, types.intp), code

    return intrinsic(reduction)


_sum, _maximum, _squares = _of_one_row(types.float32, _SUM), _of_one_row(types.float32, _MAXIMUM), _of_one_row(types.float64, _SQUARES)
_product = _of_two_rows(types.float32, _PRODUCT)


def _contiguous(*rows: Any) -> bool:
    return all(isinstance(row, types.Array) and row.dtype == types.float32 and row.layout == "C" and row.ndim == 1 for row in rows)


@overload(sum_of_turns, strict=False)
def _sum_in_kernels(x: Any, whole: Any) -> Any:
    return (lambda x, whole: _sum(x, whole)) if _contiguous(x) else None


@overload(product_of_turns, strict=False)
def _product_in_kernels(x: Any, y: Any, whole: Any) -> Any:
    return (lambda x, y, whole: _product(x, y, whole)) if _contiguous(x, y) else None


@overload(squares_of_turns, strict=False)
def _squares_in_kernels(x: Any, whole: Any) -> Any:
    return (lambda x, whole: _squares(x, whole)) if _contiguous(x) else None


@overload(maximum_of_turns, strict=False)
def _maximum_in_kernels(x: Any, whole: Any) -> Any:
    return (lambda x, whole: _maximum(x, whole)) if _contiguous(x) else None


def fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """Return a * b + c, rounded once."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))  # but for a rare second rounding


def _fused_code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.fma(*args)


def _fused_of_three(typing: Any, a: Any, b: Any, c: Any) -> Any:
    return types.float32(types.float32, types.float32, types.float32), _fused_code


_fma: Any = intrinsic(_fused_of_three)


@overload(fma, strict=False, jit_options={"forceinline": True})
def _fma_in_kernels(a: Any, b: Any, c: Any) -> Any:
    return lambda a, b, c: _fma(a, b, c)
