# May import: standard library, numpy, refswitch.numbers.
"""An order by address: where position i of an epoch goes, without writing down the others.

A Feistel network on the bits of a position is a permutation of 2**bits positions for any round function; its round function is a word of Philox. A
result beyond the last position is fed in again until one falls inside (its cycle leads back, so it does), which permutes exactly the positions that
there are. An order of few is written down after all: to sort words costs less than a network, and makes all orders as likely, which eight rounds on
a few bits do nearly. Exactness: class E, integers only.
"""

from __future__ import annotations

import numpy as np

from refswitch.numbers.philox import permutation, random_bits

ROUNDS = 8
ROUND_SHIFT = 40  # a round's words begin there: no half has so many bits
FEW = 1 << 12
WORD = 4  # one word of each block: a block per position


def network(position: np.ndarray, bits: int, seed: int, epoch: int, site: int) -> np.ndarray:
    """Return each position of [0, 2**bits) permuted; left and right half differ by one bit where bits is odd, and change places each round."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = position >> right_bits, position & ((1 << right_bits) - 1)
    for turn in range(ROUNDS):
        word = random_bits(seed, epoch, site, (right + (turn << ROUND_SHIFT)) * WORD).astype(np.int64)
        left, right = right, left ^ (word & ((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return left << right_bits | right


def shuffled(position: np.ndarray, size: int, seed: int, epoch: int, site: int) -> np.ndarray:
    """Return where each position of an epoch goes.

    Parameters
    ----------
    position : int64, [0, size)
        Any positions, in any order.
    size : int, [1, 2**62)
        How many there are.
    seed, epoch, site : int
        The address, as in `random_bits`.

    Returns
    -------
    np.ndarray
        int64 in [0, size), different for different positions.
    """
    if size <= FEW:
        return permutation(seed, epoch, site, size)[position]
    bits = (size - 1).bit_length()
    found = network(np.asarray(position, np.int64), bits, seed, epoch, site)
    while (outside := found >= size).any():
        found[outside] = network(found[outside], bits, seed, epoch, site)
    return found
