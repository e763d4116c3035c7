# May import: nothing.
"""Backends: who computes an operation. `protocol` says what each has to offer, `registry` finds one by name."""
