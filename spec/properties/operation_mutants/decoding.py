# May import: properties.operation_mutants.record.
"""Wrong steps, choices and searches. Where a mutant is a bug that was shipped, its comment has the link."""

from __future__ import annotations

from properties.operation_mutants.record import edited

# ---------------------------------------------------------------------------------------------------------------- decoding

# https://github.com/NVIDIA/TensorRT-LLM/pull/13870
BIAS_DROPPED_WITH_A_CACHE = edited(
    "bias_dropped_with_a_cache",
    "T-DEC-1",
    "decoding.decode_step",
    "bias_HLP = position_bias_forward(decoder.position_UH, bucket_LP)",
    "bias_HLP = position_bias_forward(decoder.position_UH, bucket_LP) * (position == 0)",
    "No position bias from the second token on.",
)
CACHE_FORGETS = edited(
    "cache_forgets",
    "T-DEC-1",
    "decoding.decode_step",
    "own.append(seen)",
    "own.append(before if position > 1 else seen)",
    "From the third token on the cache keeps what it had.",
)
NEWEST_FIRST = edited(
    "newest_first",
    "T-DEC-1",
    "decoding.decode_step",
    "np.concatenate(pair, axis=1) for pair in zip(before, new, strict=True)",
    "np.concatenate(pair, axis=1) for pair in zip(new, before, strict=True)",
    "The newest key lies first.",
)
DECODING_SEES_PADDING = edited(
    "decoding_sees_padding",
    "T-DEC-1",
    "decoding.decode_step",
    "cache.memory_valid_BM[:, None], block",
    "np.ones_like(cache.memory_valid_BM[:, None]), block",
    "A step sees the encoder's padding.",
)
VALUES_CACHED_UNROUNDED = edited(
    "values_cached_unrounded",
    "T-DEC-1",
    "decoding.project",
    'KeyValue(key_BMHK, round_to(np.einsum("bmd,dhk->bmhk", x_BMD, params.w_value_DHK), points.activations))',
    'KeyValue(key_BMHK, np.einsum("bmd,dhk->bmhk", x_BMD, params.w_value_DHK))',
    "Cached values keep more digits.",
)
LAST_OF_EQUAL_LOGITS = edited(
    "last_of_equal_logits",
    "T-DEC-2",
    "decoding.pick_greedy",
    "np.argmax(logits_BV, axis=-1)",
    "logits_BV.shape[-1] - 1 - np.argmax(logits_BV[:, ::-1], axis=-1)",
    "The last of equal logits is taken.",
)
NUCLEUS_WITHOUT_THE_ONE_THAT_REACHES = edited(
    "nucleus_without_the_one_that_reaches",
    "T-DEC-3",
    "decoding.pick_sampled",
    "before_BV = np.cumsum(sorted_BV, axis=-1) - sorted_BV",
    "before_BV = np.cumsum(sorted_BV, axis=-1)",
    "The token that reaches top_p is left out.",
)
NUCLEUS_NOT_RENORMALISED = edited(
    "nucleus_not_renormalised",
    "T-DEC-3",
    "decoding.pick_sampled",
    "uniform_B[:, None] * reached_BV[:, -1:]",
    "uniform_B[:, None]",
    "The rest of the mass falls to the last token.",
)
TEMPERATURE_MULTIPLIES = edited(
    "temperature_multiplies",
    "T-DEC-3",
    "decoding.pick_sampled",
    "logits_BV / temperature",
    "logits_BV * temperature",
    "A high temperature sharpens.",
)
DRAWN_BY_INDEX = edited(
    "drawn_by_index",
    "T-DEC-3",
    "decoding.pick_sampled",
    "np.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0]",
    "rank_B",
    "A rank is taken for a token.",
)
GOES_ON_AFTER_THE_END = edited(
    "goes_on_after_the_end",
    "T-DEC-4",
    "decoding.decode",
    "np.where(done_B, pad, picked_B)",
    "picked_B",
    "Rows go on after their end.",
)
END_OF_ONE_ENDS_ALL = edited(
    "end_of_one_ends_all",
    "T-DEC-4",
    "decoding.decode",
    "done_B | (token_B == end)",
    "done_B | (token_B == end).any()",
    "A row ends with the first that does.",
)
STARTS_WITH_PADDING = edited(
    "starts_with_padding",
    "T-DEC-4",
    "decoding.decode",
    "np.full(memory_BMD.shape[0], start)",
    "np.full(memory_BMD.shape[0], pad)",
    "The first token fed is padding.",
)

# ------------------------------------------------------------------------------------------------------------- beam search

END_NOT_COUNTED = edited(
    "end_not_counted",
    "T-BEAM-1",
    "beam_search.length_penalty",
    "(5.0 + length) / 6.0",
    "(4.0 + length) / 6.0",
    "The length counts without the end.",
)
PENALTY_MULTIPLIES = edited(
    "penalty_multiplies",
    "T-BEAM-1",
    "beam_search.length_penalty",
    "** alpha",
    "** -alpha",
    "Long beams are punished.",
)
PROBABILITIES_FOR_LOGITS = edited(
    "probabilities_for_logits",
    "T-BEAM-1",
    "beam_search.log_softmax",
    "shifted_NV - np.log(np.exp(shifted_NV).sum(axis=-1, keepdims=True))",
    "shifted_NV",
    "Logits minus their maximum are taken for log-probabilities.",
)
UNSTABLE_ORDER = edited(
    "unstable_order",
    "T-BEAM-2",
    "beam_search.best_of",
    'np.argsort(-beams.score_BW, axis=-1, kind="stable")',
    'np.argsort(beams.score_BW, axis=-1, kind="stable")[:, ::-1]',
    "The last of equal beams comes first.",
)
CACHE_NOT_REORDERED = edited(
    "cache_not_reordered",
    "T-BEAM-2",
    "beam_search.reorder",
    "each.key_BMHK[index_N], each",
    "each.key_BMHK, each",
    "Beams keep the keys of others.",
)
MARGIN_WITHOUT_THE_FIRST_LEFT_OUT = edited(
    "margin_without_the_first_left_out",
    "T-BEAM-2",
    "beam_search.closest",
    "gap_BJ[:, :count]",
    "gap_BJ[:, : count - 1]",
    "A near miss leaves the margin wide.",
)
CACHE_OF_ANOTHER_ROW = edited(
    "cache_of_another_row",
    "T-BEAM-3",
    "beam_search.beam_search",
    "(parent_BW + W * np.arange(B)[:, None])",
    "parent_BW + 0 * np.arange(B)[:, None]",
    "Every row goes on with the first row's keys.",
)
ALL_BEAMS_COUNT_AT_THE_START = edited(
    "all_beams_count_at_the_start",
    "T-BEAM-3",
    "beam_search.beam_search",
    "np.where(np.arange(W) == 0, 0.0, -np.inf)",
    "np.zeros(W)",
    "W equal beams at the start fill the search with copies.",
)
LATE_ENDS_COUNT = edited(
    "late_ends_count",
    "T-BEAM-3",
    "beam_search.beam_search",
    "(np.arange(order_BJ.shape[1]) < W)",
    "(np.arange(order_BJ.shape[1]) < 2 * W)",
    "An end counts beyond the first W.",
)
CLOSES_AT_THE_FIRST_END = edited(
    "closes_at_the_first_end",
    "T-BEAM-3",
    "beam_search.beam_search",
    "is_open_B & (best_B > worst_B)",
    "is_open_B & ~np.isfinite(finished.score_BW).any(axis=1)",
    "A row is closed with its first finished beam.",
)
RUNNING_UNPENALISED = edited(
    "running_unpenalised",
    "T-BEAM-3",
    "beam_search.beam_search",
    "running.score_BW[:, 0] / penalty",
    "running.score_BW[:, 0]",
    "The running beam is compared without its penalty.",
)
