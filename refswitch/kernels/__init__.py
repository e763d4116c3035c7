# May import: nothing.
"""Kernels: the operations of the reference, fast, one file for each. Each wing is independent of the others."""
