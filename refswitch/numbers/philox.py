# May import: standard library, numpy.
"""Random numbers by address: what is drawn depends on where it is used, never on what was drawn before.

A draw is a word of Philox4x32-10, a block cipher of 128 bits: the key is the seed, the counter is (block, site, step). `index` is the *global*
position in the tensor, so a shard that knows where it lies draws its slice of the whole, on any number of ranks and in any order.
The four words of a block serve four consecutive positions (position i is word i % 4 of block i // 4), which costs a quarter of
a block per position. Nobody has to align to it: a shard that starts inside a block computes that block and leaves out the words before its own.

Reading order: the cipher (`philox_words`, `philox4x32`), the address (`Purpose`, `site_of`, `random_bits`), then what layers use
(`uniform`, `jitter`, `keep_factor`, `permutation`), each a function of words (`..._of`, for any slice by `random_bits`) and one of the address.
Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3 (SC 2011); constants and test vectors are those of Random123.
Paper: 2.4 (dropout, expert dropout), appendix C (input jitter). Exactness: class E; no function of libm is used.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np

ROUNDS = 10
MULTIPLIER_0 = np.uint64(0xD2511F53)
MULTIPLIER_1 = np.uint64(0xCD9E8D57)
WEYL_0 = np.uint64(0x9E3779B9)  # the golden ratio's fraction
WEYL_1 = np.uint64(0xBB67AE85)  # that of sqrt(3)
LOW = np.uint64(0xFFFFFFFF)
HIGH = np.uint64(32)
LANES = 4
CHUNK = 1 << 14  # blocks at a time: a dozen arrays of 128 KiB stay in the cache
UNIFORM_BITS = 24
UNIFORM_STEP = np.float32(2.0**-UNIFORM_BITS)
PURPOSE_BITS = 8

Words = np.uint64 | np.ndarray


def philox_words(c0: Words, c1: Words, c2: Words, c3: Words, key_0: Words, key_1: Words) -> tuple[Words, Words, Words, Words]:
    """Encrypt one counter: the ten rounds of Philox4x32-10.

    Source: Salmon et al., section 3.3. Written for one counter or for arrays of them, and plain enough for a compiler to take as it stands:
    everything is uint64 and below 2**32, so that a product is exact and a sum does not wrap. (uint64 with a Python int would become a
    float64 under Numba, uint32 with uint32 would lose the upper word of the product: hence the constants' type.)

    Parameters
    ----------
    c0, c1, c2, c3, key_0, key_1 : uint64, [0, 2**32)
        Counter and key, least significant words first.

    Returns
    -------
    tuple
        Four random words, uint64 in [0, 2**32).
    """
    for _ in range(ROUNDS):
        product_0 = MULTIPLIER_0 * c0
        product_1 = MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (product_1 >> HIGH) ^ c1 ^ key_0, product_1 & LOW, (product_0 >> HIGH) ^ c3 ^ key_1, product_0 & LOW
        key_0 = (key_0 + WEYL_0) & LOW
        key_1 = (key_1 + WEYL_1) & LOW
    return c0, c1, c2, c3


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Encrypt counters of shape (..., 4) under keys of shape (..., 2): Philox4x32-10.

    Source: Salmon et al., section 3.3; Random123's `philox4x32_R(10, counter, key)`.

    Parameters
    ----------
    counter : uint32
        Counters, the last axis least significant word first.
    key : uint32
        Keys, the last axis least significant word first; one key serves all counters.

    Returns
    -------
    np.ndarray
        uint32 words of shape (..., 4).

    Raises
    ------
    TypeError, ValueError
        If an argument is not uint32, or its last axis has another length.
    """
    for name, array, length in (("counter", counter, 4), ("key", key, 2)):
        if array.dtype != np.uint32:
            raise TypeError(f"philox4x32: {name} has dtype {array.dtype}, but should be uint32")
        if array.shape[-1:] != (length,):
            raise ValueError(f"philox4x32: {name} has shape {array.shape}, but should be (..., {length})")
    counters = np.moveaxis(counter.astype(np.uint64), -1, 0)
    keys = np.moveaxis(key.astype(np.uint64), -1, 0)
    return np.stack(philox_words(*counters, *keys), axis=-1).astype(np.uint32)


class Purpose(IntEnum):
    """What a layer draws for. A number is part of the address of every draw: append new ones, never renumber."""

    INITIAL_WEIGHT = 1  # layer: the number of the tensor
    EMBEDDING_DROPOUT = 2
    SELF_PROBS_DROPOUT = 3
    SELF_OUT_DROPOUT = 4
    CROSS_PROBS_DROPOUT = 5
    CROSS_OUT_DROPOUT = 6
    HIDDEN_DROPOUT = 7  # inside a dense layer or the experts
    OUT_DROPOUT = 8
    STACK_DROPOUT = 9  # after the last norm
    ROUTER_JITTER = 10
    ROUTER_NOISE = 11
    SELECT = 12
    SECOND_POLICY = 13
    PRIORITY = 14
    STOCHASTIC_ROUNDING = 15  # layer: the number of the tensor
    SAMPLING = 16
    DATA_ORDER = 17
    DATA_SPANS = 18


def site_of(layer: int, purpose: Purpose) -> int:
    """Pack layer and purpose into one word, so that no two pairs share a site.

    Parameters
    ----------
    layer : int, [0, 2**24)
        The number of the layer in the whole model: a decoder goes on where its encoder ends.
    purpose : Purpose
        What is drawn for.

    Returns
    -------
    int
        layer * 256 + purpose, in [0, 2**32).

    Raises
    ------
    ValueError
        If the layer is out of range, or the purpose none.
    """
    checked("site_of", "layer", layer, 32 - PURPOSE_BITS)
    return int(layer) << PURPOSE_BITS | Purpose(purpose)


def random_bits(seed: int, step: int, site: int, index: range | np.ndarray) -> np.ndarray:
    """Draw one 32-bit word for each global position.

    Position i has word i % 4 of the block with counter (i // 4 mod 2**32, i // 4 // 2**32, site, step), least significant word first.

    Parameters
    ----------
    seed : int, [0, 2**64)
        The run's seed: the key.
    step : int, [0, 2**32)
        The number of the training step, or whatever else numbers the draws of one site.
    site : int, [0, 2**32)
        Layer and purpose, by `site_of`.
    index : range, or an array of integers, [0, 2**64)
        Global positions. A range with step 1 is the fast way; an array may have any order and any shape.

    Returns
    -------
    np.ndarray
        uint32 words of the index's shape.

    Raises
    ------
    TypeError, ValueError
        If anything is no integer, or out of range.
    """
    for name, value, bits in (("seed", seed, 64), ("step", step, 32), ("site", site, 32)):
        checked("random_bits", name, value, bits)
    if isinstance(index, range) and index.step == 1:
        return run_of_words(seed, step, site, index)
    position = positions_of(index)
    words = block_words(seed, step, site, position.reshape(-1) // np.uint64(LANES))
    lane = (position.reshape(-1) % np.uint64(LANES)).astype(np.int64)
    return words[np.arange(len(lane)), lane].reshape(position.shape)


def run_of_words(seed: int, step: int, site: int, index: range) -> np.ndarray:
    """Return the words of consecutive positions: whole blocks, less what lies before the first position and behind the last."""
    if not index:
        return np.empty(0, np.uint32)
    checked("random_bits", "index", index[0], 64)
    checked("random_bits", "index", index[-1], 64)
    first = index[0] // LANES
    block = np.uint64(first) + np.arange(index[-1] // LANES - first + 1, dtype=np.uint64)
    return block_words(seed, step, site, block).reshape(-1)[index[0] % LANES :][: len(index)]


def block_words(seed: int, step: int, site: int, block: np.ndarray) -> np.ndarray:
    """Return the four words of each block of an address, uint32 (blocks, 4)."""
    words = np.empty((len(block), LANES), np.uint32)
    key_0, key_1 = np.uint64(seed) & LOW, np.uint64(seed) >> HIGH
    for start in range(0, len(block), CHUNK):
        part = block[start : start + CHUNK]
        for lane, word in enumerate(philox_words(part & LOW, part >> HIGH, np.uint64(site), np.uint64(step), key_0, key_1)):
            words[start : start + CHUNK, lane] = word
    return words


def positions_of(index: range | np.ndarray) -> np.ndarray:
    """Return positions as uint64; a negative one would wrap to a legal address, so it is refused."""
    position = np.asarray(index)
    if position.size == 0:
        return position.astype(np.uint64)
    if position.dtype.kind not in "iu":
        raise TypeError(f"random_bits: index has dtype {position.dtype}, but should be an integer")
    checked("random_bits", "index", int(position.min()), 64)
    return position.astype(np.uint64)


def checked(caller: str, name: str, value: int, bits: int) -> None:
    """Refuse a number that does not fit into its bits: it would wrap to somebody else's address."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{caller}: {name} is {value!r}, but should be an integer")
    if not 0 <= value < 2**bits:
        raise ValueError(f"{caller}: {name} is {value}, but should be in [0, 2**{bits})")


def fraction_of(words: np.ndarray) -> np.ndarray:
    """Return the upper 24 bits of each word: the integer that `uniform_of` scales."""
    if words.dtype != np.uint32:
        raise TypeError(f"fraction_of: words has dtype {words.dtype}, but should be uint32")
    return words >> (32 - UNIFORM_BITS)


def uniform_of(words: np.ndarray) -> np.ndarray:
    """Return `(word >> 8) * 2**-24`: float32 in [0, 1), all exact, the mean 2**-25 below one half."""
    return fraction_of(words).astype(np.float32) * UNIFORM_STEP


def jitter_of(words: np.ndarray, eps: float) -> np.ndarray:
    """Return `1 + eps (2 u - 1)` with u from `uniform_of`, as float32.

    `eps` is rounded to float32 first. `2 u - 1` and its product with eps (24 and 24 bits) are then exact in float64, so it makes no
    difference whether a compiler fuses product and sum; in float32 it would.
    """
    if not 0.0 <= eps <= 1.0:
        raise ValueError(f"jitter: eps is {eps}, but should be in [0, 1]")
    signed = 2.0 * uniform_of(words).astype(np.float64) - 1.0
    return (1.0 + np.float64(np.float32(eps)) * signed).astype(np.float32)


def keep_factor_of(words: np.ndarray, keep_prob: float) -> np.ndarray:
    """Return 1 / keep_prob where `uniform_of(words) < keep_prob` and 0 elsewhere, as float32.

    The comparison is made on integers and thus with keep_prob itself, not with the float32 next to it; the factor is the quotient in float64,
    stored in float32.
    """
    if not UNIFORM_STEP <= keep_prob <= 1.0:
        raise ValueError(f"keep_factor: keep_prob is {keep_prob}, but should be in [2**-24, 1]")
    threshold = np.uint32(math.ceil(keep_prob * 2**UNIFORM_BITS))  # scaling by a power of two is exact
    return np.where(fraction_of(words) < threshold, np.float32(1.0 / keep_prob), np.float32(0.0))


def permutation_of(words: np.ndarray) -> np.ndarray:
    """Return the order that sorts the last axis; equal words stay in order of position."""
    return np.argsort(words, axis=-1, kind="stable")


def words_for(seed: int, step: int, site: int, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Return the words of a tensor, or of the rows of one that begin at position `offset`, in memory order."""
    return random_bits(seed, step, site, range(offset, offset + math.prod(shape))).reshape(shape)


def uniform(seed: int, step: int, site: int, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
    """Draw float32 in [0, 1) on the grid of 2**-24.

    Parameters
    ----------
    seed, step, site : int
        The address, as in `random_bits`.
    shape : tuple of int
        Shape of the result.
    offset : int
        Global position of the first element; the others follow in memory order.

    Returns
    -------
    np.ndarray
        float32 of the given shape.
    """
    return uniform_of(words_for(seed, step, site, shape, offset))


def jitter(seed: int, step: int, site: int, shape: tuple[int, ...], eps: float, offset: int = 0) -> np.ndarray:
    """Draw the factor on a router's input, uniform from 1 - eps to 1 + eps.

    Paper: appendix C, input jitter (eps 1e-2). Address, shape and offset are those of `uniform`.

    Parameters
    ----------
    eps : float, [0, 1]
        Half the width; 0 gives ones.

    Returns
    -------
    np.ndarray
        float32 of the given shape.

    Raises
    ------
    ValueError
        If eps is out of range.
    """
    return jitter_of(words_for(seed, step, site, shape, offset), eps)


def keep_factor(seed: int, step: int, site: int, shape: tuple[int, ...], keep_prob: float, offset: int = 0) -> np.ndarray:
    """Draw dropout as a factor: 1 / keep_prob with probability keep_prob, else 0.

    Paper: 2.4. The probability is keep_prob rounded up to the grid of 2**-24. Address, shape and offset are those of `uniform`.

    Parameters
    ----------
    keep_prob : float, [2**-24, 1]
        Probability of a survivor.

    Returns
    -------
    np.ndarray
        float32 of the given shape.

    Raises
    ------
    ValueError
        If keep_prob is out of range.
    """
    return keep_factor_of(words_for(seed, step, site, shape, offset), keep_prob)


def permutation(seed: int, step: int, site: int, S: int, offset: int = 0) -> np.ndarray:
    """Draw an order of S tokens.

    Parameters
    ----------
    seed, step, site : int
        The address, as in `random_bits`.
    S : int, tokens
        Length of the order.
    offset : int
        Global position of the first token: g * S for group g, which is drawn as a whole.

    Returns
    -------
    np.ndarray
        int64, each of 0 to S - 1 once.
    """
    return permutation_of(words_for(seed, step, site, (S,), offset))
