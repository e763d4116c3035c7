# May import: standard library.
"""The operations of `refswitch.reference` for the CPU: float32 arrays, Numba, a matrix product of our own.

One operation per file, under the reference's name. A file has kernels (outputs | inputs | statics, nothing returned) and below them host functions
with the reference's signature. The answer has the same bits on any number of threads. Simulated bfloat16 is float32 on the bfloat16 grid.
Reading order: `jit`, `matmul`, then any operation.
"""
