# May import: the standard library, record, the modules of wrong.
"""All mutants, in the order of a token's way."""

from .record import Mutant
from .wrong import backward, experts, losses, placement, precision, routing, state

MUTANTS = [
    value
    for module in (routing, placement, experts, losses, backward, precision, state)
    for value in vars(module).values()
    if isinstance(value, Mutant)
]
