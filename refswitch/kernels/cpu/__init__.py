# May import: nothing.
"""Numba kernels for the CPU, and the host functions around them: the names and signatures of the reference, then a `Workspace`."""
