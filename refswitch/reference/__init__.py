# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""The reference Switch layer: straight-line NumPy, forward and backward by hand.

Reading order: `router`, `capacity`, `pack`, `experts`, `losses`, `switch`.
"""
