# May import: standard library, numpy, properties.operation_mutants.record.
"""Wrong roundings and wrong draws. Where a mutant is a bug that was shipped, its comment has the link."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from properties.operation_mutants.record import edited, operation_mutant

Function = Callable[..., Any]

# ------------------------------------------------------------------------------------------------------------------------- formats


@operation_mutant("N-ROUND-1", replaces="round_to")
def rounds_twice(round_to: Function, x: np.ndarray, format: Any) -> np.ndarray:
    """Through float32 on the way."""
    return round_to(np.asarray(x).astype(np.float32).astype(np.float64), format)


TRUNCATES = edited("truncates", "N-ROUND-1", "precision.round_to", "np.rint(", "np.trunc(", "Towards zero.")
HALF_UP = edited(
    "half_up",
    "N-ROUND-1",
    "precision.round_to",
    "np.rint(np.ldexp(x, -quantum_exponent))",
    "np.floor(np.ldexp(x, -quantum_exponent) + 0.5)",
    "Ties upwards.",
)
NO_SUBNORMALS = edited(
    "no_subnormals", "N-ROUND-1", "precision.round_to", "np.maximum(exponent, format.e_min + 1)", "exponent", "Full precision below the normal range."
)
SATURATES = edited(
    "saturates", "N-ROUND-1", "precision.round_to", "np.copysign(np.inf, x)", "np.copysign(format.largest, x)", "The largest value for infinity."
)
ZERO_HAS_NO_BINADE = edited(
    "zero_has_no_binade",
    "N-ROUND-2",
    "precision.spacing",
    "np.where(x_abs > 0.0, exponent - 1, format.e_min)",
    "exponent - 1",
    "frexp's exponent of 0 is taken at its word.",
)
SPACING_OF_THE_NEXT_BINADE = edited(
    "spacing_of_the_next_binade", "N-ROUND-2", "precision.spacing", "exponent - 1", "exponent", "frexp's exponent is one more than the binade's."
)
NAN_IS_NOT_STORED = edited(
    "nan_is_not_stored", "N-ROUND-2", "precision.is_stored", "~np.isfinite(x) | ", "", "NaN equals nothing, so it is said not to be stored."
)

# ------------------------------------------------------------------------------------------------------------------------ bfloat16


def wrong_bits(name: str, summary: str, rule: Callable[[np.ndarray], np.ndarray], keeps_nan: bool = True) -> Any:
    """Return the mutant of `round_bf16` that a rule on the bits makes."""

    def wrong(round_bf16: Function, x: np.ndarray) -> np.ndarray:
        bits = np.asarray(x).view(np.uint32)
        is_nan = (bits & 0x7FFFFFFF > 0x7F800000) & keeps_nan
        return np.where(is_nan, (bits | 0x400000) & 0xFFFF0000, rule(bits)).astype(np.uint32).view(np.float32)

    wrong.__name__, wrong.__doc__ = name, summary
    return operation_mutant("N-BF-1", replaces="round_bf16")(wrong)


def even(bits: np.ndarray) -> np.ndarray:
    """Round to nearest even, right but for NaN."""
    return (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)


# https://github.com/stillwater-sc/universal/issues/1133, https://github.com/tenstorrent/tt-metal/pull/19882, https://github.com/groonga/groonga/pull/2961
BF16_CUTS = wrong_bits("bf16_cuts", "The lower half is cut off: a bias of half a unit.", lambda bits: bits & 0xFFFF0000)
BF16_HALF_UP = wrong_bits("bf16_half_up", "Ties away from zero.", lambda bits: (bits + 0x8000) & 0xFFFF0000)
BF16_HALF_DOWN = wrong_bits("bf16_half_down", "Ties towards zero.", lambda bits: (bits + 0x7FFF) & 0xFFFF0000)
BF16_NAN_CARRIES = wrong_bits("bf16_nan_carries", "NaN is rounded like a number, and some become zero.", even, keeps_nan=False)
# https://github.com/dotnet/runtime/pull/130583
BF16_NAN_BECOMES_INFINITY = wrong_bits(
    "bf16_nan_becomes_infinity",
    "A NaN whose payload lies in the lower half is cut to infinity.",
    lambda bits: np.where(bits & 0x7FFFFFFF > 0x7F800000, bits & 0xFFFF0000, even(bits)),
    keeps_nan=False,
)
BF16_SATURATES = wrong_bits(
    "bf16_saturates",
    "No carry from the last binade to infinity.",
    lambda bits: np.where((even(bits) & 0x7FFFFFFF == 0x7F800000) & (bits & 0x7FFFFFFF != 0x7F800000), (bits & 0x80000000) | 0x7F7F0000, even(bits)),
)
BF16_FLUSHES = wrong_bits(
    "bf16_flushes", "Subnormal numbers become zero.", lambda bits: np.where(bits & 0x7F800000 == 0, bits & 0x80000000, even(bits))
)
BF16_LOSES_THE_SIGN = wrong_bits("bf16_loses_the_sign", "Minus zero becomes zero.", lambda bits: np.where(even(bits) == 0x80000000, 0, even(bits)))


@operation_mutant("N-BF-1", replaces="round_bf16")
def bf16_writes_its_input(round_bf16: Function, x: np.ndarray) -> np.ndarray:
    """The caller's array is rounded in place."""
    x[...] = round_bf16(x)
    return x.copy()


# https://github.com/laekov/fastmoe/commit/a797580
@operation_mutant("N-BF-1", replaces="round_bf16")
def bf16_read_as_float16(round_bf16: Function, x: np.ndarray) -> np.ndarray:
    """The upper half is taken for a float16."""
    return (round_bf16(x).view(np.uint32) >> 16).astype(np.uint16).view(np.float16).astype(np.float32)


@operation_mutant("N-BF-2", replaces="round_bf16_bits")
def one_number_half_up(round_bf16_bits: Function, bits: int) -> int:
    """The scalar twin sends ties away from zero."""
    return round_bf16_bits(bits) if bits & 0x7FFFFFFF > 0x7F800000 else (bits + 0x8000) & 0xFFFF0000


@operation_mutant("N-BF-2", replaces="stochastic_round_bf16_bits")
def one_number_by_a_longer_draw(stochastic_round_bf16_bits: Function, bits: int, random: int) -> int:
    """The scalar twin adds all 32 bits of the draw."""
    return stochastic_round_bf16_bits(bits, random) if bits & 0x7FFFFFFF > 0x7F800000 else (bits + random) & 0xFFFF0000


# https://github.com/Nerogar/OneTrainer/issues/994
@operation_mutant("N-SR-1", replaces="stochastic_round_bf16")
def overwritten_by_the_nearest(stochastic_round_bf16: Function, x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """The result is replaced by that of nearest rounding: small updates vanish."""
    return even(x.view(np.uint32)).view(np.float32)


# https://github.com/uxlfoundation/oneDNN/pull/2903
@operation_mutant("N-SR-1", replaces="stochastic_round_bf16")
def noise_shifted_right(stochastic_round_bf16: Function, x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """The noise is four bits too small, so that rounding goes down nearly always."""
    return stochastic_round_bf16(x, (random & 0xFFFF) >> 4)


# https://github.com/AMD-AGI/Primus-Turbo/pull/365
@operation_mutant("N-SR-1", replaces="stochastic_round_bf16")
def seed_of_zero(stochastic_round_bf16: Function, x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """A seed of 0 turns it off: always down."""
    return stochastic_round_bf16(x, np.zeros_like(random))


# https://github.com/karpathy/llm.c/pull/597, https://github.com/karpathy/llm.c/pull/601
@operation_mutant("N-SR-1", replaces="stochastic_round_bf16")
def one_word_for_all(stochastic_round_bf16: Function, x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Every number has the first one's draw: roundings are correlated."""
    return stochastic_round_bf16(x, np.full_like(random, random.reshape(-1)[0]))


@operation_mutant("N-SR-1", replaces="stochastic_round_bf16")
def half_is_added(stochastic_round_bf16: Function, x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Half a unit is added before the draw: up too often."""
    return stochastic_round_bf16((x.view(np.uint32) + np.uint32(0x8000)).view(np.float32), random)


# -------------------------------------------------------------------------------------------------------------------------- draws

NINE_ROUNDS = edited("nine_rounds", "R-CIPHER-1", "philox.philox_words", "range(ROUNDS)", "range(ROUNDS - 1)", "A round too few.")
KEYS_SWAPPED = edited(
    "keys_swapped", "R-CIPHER-1", "philox.philox_words", "key_0 + WEYL_0", "key_0 + WEYL_1", "The first key grows by the second one's constant."
)
HIGH_WORDS_SWAPPED = edited(
    "high_words_swapped",
    "R-CIPHER-1",
    "philox.philox_words",
    "(product_1 >> HIGH) ^ c1",
    "(product_0 >> HIGH) ^ c1",
    "One product's upper word twice.",
)
PURPOSE_ADDED = edited(
    "purpose_added",
    "R-SITE-1",
    "philox.site_of",
    "int(layer) << PURPOSE_BITS | Purpose(purpose)",
    "int(layer) + Purpose(purpose)",
    "Layer and purpose are added, and neighbours collide.",
)
LANE_LOST = edited("lane_lost", "R-ADDR-1", "philox.random_bits", "% np.uint64(LANES)", "% np.uint64(1)", "Four positions share a word.")
UPPER_INDEX_LOST = edited("upper_index_lost", "R-ADDR-1", "philox.block_words", "part >> HIGH", "part & np.uint64(0)", "Positions repeat after 2^34.")
SITE_AND_STEP_SWAPPED = edited(
    "site_and_step_swapped",
    "R-ADDR-1",
    "philox.block_words",
    "np.uint64(site), np.uint64(step)",
    "np.uint64(step), np.uint64(site)",
    "Site and step stand in each other's place.",
)
ALIGNED_TO_BLOCKS = edited("aligned_to_blocks", "R-ADDR-1", "philox.run_of_words", "[index[0] % LANES :]", "", "A run begins at its block.")
# https://github.com/PaddlePaddle/PaddleFleetX/pull/1005
LOCAL_POSITION = edited(
    "local_position",
    "R-ADDR-2",
    "philox.words_for",
    "range(offset, offset + math.prod(shape))",
    "range(math.prod(shape))",
    "A shard counts from its own first element: masks repeat.",
)
RANK_IN_THE_SEED = edited(
    "rank_in_the_seed", "R-ADDR-2", "philox.words_for", "random_bits(seed,", "random_bits(seed + offset,", "The rank goes into the seed."
)
STEP_LEFT_OUT = edited(
    "step_left_out",
    "R-ADDR-2",
    "philox.random_bits",
    "run_of_words(seed, step, site, index)",
    "run_of_words(seed, 0, site, index)",
    "Every step draws the same.",
)
UNIFORM_OF_32_BITS = edited(
    "uniform_of_32_bits",
    "R-UNIFORM-1",
    "philox.uniform_of",
    "fraction_of(words).astype(np.float32) * UNIFORM_STEP",
    "words.astype(np.float32) * np.float32(2.0**-32)",
    "All 32 bits in float32: rounded, and up to 1.",
)
JITTER_IN_FLOAT32 = edited(
    "jitter_in_float32",
    "R-JITTER-1",
    "philox.jitter_of",
    "(1.0 + np.float64(np.float32(eps)) * signed).astype(np.float32)",
    "np.float32(1.0) + np.float32(eps) * signed.astype(np.float32)",
    "Product and sum are rounded to float32 each.",
)
JITTER_ONE_SIDED = edited(
    "jitter_one_sided",
    "R-JITTER-1",
    "philox.jitter_of",
    "2.0 * uniform_of(words).astype(np.float64) - 1.0",
    "uniform_of(words).astype(np.float64)",
    "From 1 to 1 + eps.",
)
# https://github.com/tensorflow/mesh/commit/7ba6fa0
RATE_IGNORED = edited(
    "rate_ignored",
    "R-KEEP-1",
    "philox.keep_factor",
    "keep_factor_of(words_for(seed, step, site, shape, offset), keep_prob)",
    "keep_factor_of(words_for(seed, step, site, shape, offset), 1.0)",
    "The rate is not used.",
)
DROPOUT_UNSCALED = edited(
    "dropout_unscaled", "R-KEEP-1", "philox.keep_factor_of", "np.float32(1.0 / keep_prob)", "np.float32(1.0)", "Survivors are not scaled."
)
KEEPS_AT_THE_EDGE = edited(
    "keeps_at_the_edge", "R-KEEP-1", "philox.keep_factor_of", "< threshold", "<= threshold", "A uniform that lies above keep_prob is kept."
)
KEEP_PROB_IN_FLOAT32 = edited(
    "keep_prob_in_float32",
    "R-KEEP-1",
    "philox.keep_factor_of",
    "math.ceil(keep_prob * 2**UNIFORM_BITS)",
    "math.floor(keep_prob * 2**UNIFORM_BITS)",
    "The threshold is rounded down.",
)
TIES_BACKWARDS = edited(
    "ties_backwards",
    "R-PERM-1",
    "philox.permutation_of",
    'np.argsort(words, axis=-1, kind="stable")',
    'words.shape[-1] - 1 - np.argsort(words[..., ::-1], axis=-1, kind="stable")',
    "Equal words are ordered from the last.",
)
RANKS_FOR_ORDER = edited(
    "ranks_for_order",
    "R-PERM-1",
    "philox.permutation_of",
    'np.argsort(words, axis=-1, kind="stable")',
    'np.argsort(np.argsort(words, axis=-1, kind="stable"), axis=-1)',
    "The inverse permutation.",
)
ONE_ORDER_FOR_ALL_GROUPS = edited(
    "one_order_for_all_groups", "R-PERM-1", "philox.permutation", "offset)", "0)", "Every group is served in the same order."
)
