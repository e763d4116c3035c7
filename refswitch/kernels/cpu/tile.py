# May import: standard library, llvmlite, numba.
# ruff: noqa: ARG001  (an intrinsic's parameters are read by the code that it generates)
"""The register tile: the innermost loop of every matrix product, written in LLVM because no compiler finds it in a loop nest.

A tile holds `rows` x TILE_COLUMNS sums in vector registers while it walks along the products' inner axis: per step two vectors of b are loaded, each
value of a is spread over a vector, and one fused multiply-add per register follows. Every sum runs over the steps in order, one rounding each, and
does not know how many rows its tile has: a value's bits depend on its row of a and its column of b alone. `turn` transposes a square of a matrix for
`pack` in registers. Read `matmul` next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _shape_of_tile() -> tuple[int, int]:
    """Return floats of a vector register and rows of a tile: 2 * rows sums, two vectors of b and one value of a fill the registers."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 12  # 32 registers
    return (8, 6) if features.get("avx2") else (4, 6)  # 16 registers


LANES, TILE_ROWS = _shape_of_tile()
TILE_COLUMNS = 2 * LANES
UNROLLED = 4  # steps per turn of the loop
FLOAT_BYTES = 4

FLOAT, INDEX, INT, BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)
VECTOR = ir.VectorType(FLOAT, LANES)


def primitive(generator: Callable[..., Any]) -> Any:
    """Make an intrinsic: a function of kernels whose LLVM code `generator` writes."""
    return intrinsic(generator)


class _Memory:
    """Loads and stores of floats and vectors of floats."""

    def __init__(self, builder: Any):
        self.builder = builder

    def at(self, address: Any, offset: Any) -> Any:
        """Return the address `offset` floats further."""
        return self.builder.gep(address, [INDEX(offset) if isinstance(offset, int) else offset])

    def vector(self, address: Any) -> Any:
        """Load LANES floats."""
        loaded = self.builder.load(self.builder.bitcast(address, VECTOR.as_pointer()))
        loaded.align = FLOAT_BYTES
        return loaded

    def put(self, vector: Any, address: Any) -> None:
        """Store LANES floats."""
        self.builder.store(vector, self.builder.bitcast(address, VECTOR.as_pointer())).align = FLOAT_BYTES

    def spread(self, address: Any) -> Any:
        """Load one float into every lane."""
        undefined = ir.Constant(VECTOR, ir.Undefined)
        one = self.builder.insert_element(undefined, self.builder.load(address), INT(0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(INT, LANES), [0] * LANES))

    def variable(self, value: Any) -> Any:
        """Return a slot that holds the value; LLVM makes registers of such slots."""
        slot = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, slot)
        return slot


class Left(NamedTuple):
    """The left operand of a tile: addresses and strides in floats."""

    a: Any
    row: Any
    step: Any


def _emit_tile(builder: Any, rows: int, c: Any, c_row: Any, left: Left, b: Any, steps: Any, add: Any) -> None:
    memory = _Memory(builder)
    multiply_add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32")
    prefetch = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT]), "llvm.prefetch.p0")
    places = [[memory.at(c, builder.add(builder.mul(c_row, INDEX(row)), INDEX(half * LANES))) for half in range(2)] for row in range(rows)]
    for place in (place for pair in places for place in pair):  # on its way while the sums are built
        builder.call(prefetch, [builder.bitcast(place, BYTE.as_pointer()), INT(1), INT(3), INT(1)])
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    sums = [[memory.variable(zero) for _ in range(2)] for _ in range(rows)]
    # three rows share a base: base, base + row and base + 2 row are addresses that one instruction forms
    bases = [memory.variable(memory.at(left.a, builder.mul(left.row, INDEX(first)))) for first in range(0, rows, 3)]
    right = memory.variable(b)

    def step() -> None:
        here = builder.load(right)
        b_vectors = [memory.vector(here), memory.vector(memory.at(here, LANES))]
        for row in range(rows):
            value = memory.spread(memory.at(builder.load(bases[row // 3]), builder.mul(left.row, INDEX(row % 3))))
            for slot, b_vector in zip(sums[row], b_vectors, strict=True):
                builder.store(builder.call(multiply_add, [value, b_vector, builder.load(slot)]), slot)
        builder.store(memory.at(here, TILE_COLUMNS), right)
        for slot in bases:
            builder.store(memory.at(builder.load(slot), left.step), slot)

    with cgutils.for_range(builder, builder.udiv(steps, INDEX(UNROLLED))):
        for _ in range(UNROLLED):
            step()
    with cgutils.for_range(builder, builder.urem(steps, INDEX(UNROLLED))):
        step()
    with builder.if_else(add) as (then, otherwise):
        for branch, is_added in ((then, True), (otherwise, False)):
            with branch:
                for pair, pair_of_places in zip(sums, places, strict=True):
                    for slot, place in zip(pair, pair_of_places, strict=True):
                        value = builder.load(slot)
                        memory.put(builder.fadd(memory.vector(place), value) if is_added else value, place)


def _pointers(builder: Any, *addresses: Any) -> list[Any]:
    return [builder.inttoptr(address, FLOAT.as_pointer()) for address in addresses]


@primitive
def tile(typing: Any, c: Any, c_row: Any, a: Any, a_row: Any, a_step: Any, b: Any, rows: Any, steps: Any, add: Any) -> Any:
    """Write or add a[rows, steps] @ b[steps, TILE_COLUMNS] to c at their addresses; strides in floats, from 1 to TILE_ROWS rows, b without gaps."""
    signature = types.void(*[types.intp] * 8, types.boolean)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c_row, a_row, a_step, rows, steps = (args[number] for number in (1, 3, 4, 6, 7))
        c, a, b = _pointers(builder, args[0], args[2], args[5])
        add = cgutils.as_bool_bit(builder, args[8])
        done = builder.append_basic_block("tile.done")
        switch = builder.switch(rows, done)
        for count in range(1, TILE_ROWS + 1):
            block = builder.append_basic_block(f"tile.{count}")
            switch.add_case(INDEX(count), block)
            builder.position_at_end(block)
            _emit_tile(builder, count, c, c_row, Left(a, a_row, a_step), b, steps, add)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, generate


@primitive
def turn(typing: Any, out: Any, out_row: Any, x: Any, x_row: Any) -> Any:
    """Write a square of LANES x LANES of x, transposed, to out, at their addresses; strides in floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = _Memory(builder)
        target, source = _pointers(builder, args[0], args[2])
        rows = [memory.vector(memory.at(source, builder.mul(args[3], INDEX(row)))) for row in range(LANES)]
        bit = LANES // 2
        while bit:  # exchange one bit of the row's number with that of the column's
            lower = [(e & ~bit) + (LANES if e & bit else 0) for e in range(LANES)]
            taken = [ir.Constant(ir.VectorType(INT, LANES), [e + offset for e in lower]) for offset in (0, bit)]
            rows = [builder.shuffle_vector(rows[row & ~bit], rows[row | bit], taken[1 if row & bit else 0]) for row in range(LANES)]
            bit //= 2
        for row, vector in enumerate(rows):
            memory.put(vector, memory.at(target, builder.mul(args[1], INDEX(row))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


def _emit_move(builder: Any, width: int, out: Any, x: Any) -> None:
    kind = ir.VectorType(FLOAT, width).as_pointer()
    target, source = (builder.bitcast(address, kind) for address in _pointers(builder, out, x))
    loaded = builder.load(source)
    loaded.align = FLOAT_BYTES
    builder.store(loaded, target).align = FLOAT_BYTES


@primitive
def move_columns(typing: Any, out: Any, x: Any) -> Any:
    """Copy TILE_COLUMNS floats from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_move(builder, TILE_COLUMNS, *args)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@primitive
def move_rows(typing: Any, out: Any, x: Any) -> Any:
    """Copy TILE_ROWS floats from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_move(builder, TILE_ROWS, *args)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@primitive
def load(typing: Any, address: Any) -> Any:
    """Return the float at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(*_pointers(builder, args[0]))

    return types.float32(types.intp), generate


@primitive
def store(typing: Any, address: Any, value: Any) -> Any:
    """Write a float to an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], *_pointers(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate
