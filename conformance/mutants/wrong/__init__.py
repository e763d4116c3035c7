# May import: nothing.
"""The mutants, one module for each part of a token's way: routing, placement, experts, losses, backward, precision, state."""
