# May import: nothing.
"""The letters of the axes: the one legend for the whole project.

Every array's name ends in its letters in memory order (`x_GSD`), and lower case is this rank's share of the capital axis.
"""

from __future__ import annotations

LETTERS = {
    "B": "batch",
    "L": "query length",
    "M": "memory length",
    "D": "model width",
    "H": "heads",
    "K": "head width; choices per token in an adapter's case",
    "F": "expert hidden width",
    "V": "vocabulary",
    "G": "routing groups",
    "S": "tokens of one group",
    "T": "tokens: G * S",
    "E": "experts",
    "C": "slots per expert",
    "R": "ranks",
    "A": "copies of the weights",
    "N": "slots one expert serves: R * C",
    "U": "position buckets",
    "P": "tokens decoded so far, this one included",
    "W": "beams",
    "J": "candidates of one step of beam search",
}
