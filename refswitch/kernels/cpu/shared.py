# May import: standard library, llvmlite, numba.
# ruff: noqa: ARG001  (an intrinsic's parameters are read by the code that it generates)
"""A kernel whose machine code all other kernels share: they call it through a cell in memory.

Numba compiles a kernel again into each kernel that calls it. For the matrix product that would be seconds each time, so its callers look
its address up at run time. The cell's own address is a symbol, which cached code finds again in the next process. Until the first call the cell
holds a callback that compiles the kernel, or loads it from the disk, and replaces itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_KEPT_ALIVE: list[object] = []  # callbacks and cells live as long as the process: machine code holds their addresses


def shared(dispatcher: Any, arguments: int) -> Callable[..., None]:
    """Return a function for kernels that calls `dispatcher`, a kernel of so many integers (addresses, sizes, strides)."""
    symbol = f"refswitch_{dispatcher.__name__}"
    cell = ctypes.c_void_p()
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)

    def compile_and_call(*numbers: int) -> None:
        dispatcher.compile((types.int64,) * arguments)
        compiled = dispatcher.overloads[(types.int64,) * arguments]
        cell.value = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)
        dispatcher(*numbers)

    callback = prototype(compile_and_call)
    cell.value = ctypes.cast(callback, ctypes.c_void_p).value
    llvmlite.binding.add_symbol(symbol, ctypes.addressof(cell))
    _KEPT_ALIVE.extend((cell, callback))

    @intrinsic
    def call(typing: Any, numbers: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * arguments).as_pointer()
            cell_of = cgutils.add_global_variable(builder.module, function, symbol)
            cell_of.linkage = "external"
            builder.call(builder.load(cell_of), cgutils.unpack_tuple(builder, args[0], arguments))
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.int64, arguments)), generate

    return call
