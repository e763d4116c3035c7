# May import: nothing.
"""Worlds: how the ranks of a run reach each other. `world` has the protocol, `one` the single process."""
