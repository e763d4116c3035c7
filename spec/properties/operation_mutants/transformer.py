# May import: properties.operation_mutants.record.
"""Wrong operations of the transformer around the layer. Where a mutant is a bug that was shipped, its comment has the link."""

from __future__ import annotations

from properties.operation_mutants.record import edited

# ---------------------------------------------------------------------------------------------------- embedding and logits

ROWS_ASSIGNED = edited(
    "rows_assigned",
    "T-EMBED-1",
    "embedding.embed_backward",
    "np.add.at(dembedding_VD, tokens_BL, dx_BLD)",
    "dembedding_VD[tokens_BL] = dx_BLD",
    "A token that occurs twice keeps its last gradient alone.",
)
NEXT_ROW = edited(
    "next_row",
    "T-EMBED-1",
    "embedding.embed_forward",
    "embedding_VD[tokens_BL]",
    "embedding_VD[tokens_BL - 1]",
    "Tokens are counted from 1.",
)
TIED_UNSCALED = edited(
    "tied_unscaled",
    "T-LOGITS-1",
    "embedding.tied_logits_forward",
    "x_BLD * x_BLD.shape[-1] ** -0.5",
    "x_BLD",
    "The tied logits are not scaled.",
)
TIED_SCALED_AFTER = edited(
    "tied_scaled_after",
    "T-LOGITS-1",
    "embedding.tied_logits_forward",
    "scaled_BLD = round_to(x_BLD * x_BLD.shape[-1] ** -0.5, points.activations)",
    "scaled_BLD = x_BLD * x_BLD.shape[-1] ** -0.5",
    "What the product reads is not rounded.",
)
TIED_GRADIENT_UNSCALED = edited(
    "tied_gradient_unscaled",
    "T-LOGITS-1",
    "embedding.tied_logits_backward",
    "round_to(x_BLD * scale, points.activations)",
    "x_BLD",
    "The table's gradient forgets the factor.",
)
# https://github.com/ml-explore/mlx-examples/pull/591
UNTIED_SCALED = edited(
    "untied_scaled",
    "T-LOGITS-2",
    "embedding.logits_forward",
    "x_BLD @ w_logits_DV",
    "x_BLD * x_BLD.shape[-1] ** -0.5 @ w_logits_DV",
    "Untied logits are scaled.",
)
UNTIED_GRADIENT_OF_THE_BATCH_S_FIRST_ROW = edited(
    "untied_gradient_of_the_batch_s_first_row",
    "T-LOGITS-2",
    "embedding.logits_backward",
    'np.einsum("bld,blv->dv", x_BLD, dlogits_BLV)',
    'np.einsum("ld,lv->dv", x_BLD[0], dlogits_BLV[0])',
    "The matrix learns from the first row of the batch.",
)

# -------------------------------------------------------------------------------------------------------------------- norm

MEAN_SUBTRACTED = edited(
    "mean_subtracted",
    "T-NORM-1",
    "norm.norm_forward",
    "mean_BL1 = np.mean(",
    "x_BLD = x_BLD - np.mean(x_BLD, axis=-1, keepdims=True)\n    mean_BL1 = np.mean(",
    "LayerNorm, which subtracts the mean.",
)
EPSILON_OUTSIDE_OF_THE_ROOT = edited(
    "epsilon_outside_of_the_root",
    "T-NORM-1",
    "norm.norm_forward",
    "1.0 / np.sqrt(mean_BL1 + epsilon)",
    "1.0 / (np.sqrt(mean_BL1) + epsilon)",
    "Epsilon is added to the root.",
)
SCALE_PLUS_ONE = edited(
    "scale_plus_one",
    "T-NORM-1",
    "norm.norm_forward",
    "normed_BLD * scale_D",
    "normed_BLD * (1.0 + scale_D)",
    "The scale is stored as its distance from 1, as Gemma has it.",
)
SUM_OF_SQUARES = edited(
    "sum_of_squares",
    "T-NORM-1",
    "norm.norm_forward",
    "np.mean(np",
    "np.sum(np",
    "The sum of squares for their mean.",
)
STATISTICS_AS_ACTIVATIONS = edited(
    "statistics_as_activations",
    "T-NORM-1",
    "norm.norm_forward",
    "points.statistics",
    "points.activations",
    "The inverse root is rounded as an activation.",
)
VARIANCE_IS_CONSTANT = edited(
    "variance_is_constant",
    "T-NORM-2",
    "norm.norm_backward",
    "dx_direct_BLD + dx_mean_BLD",
    "dx_direct_BLD",
    "No gradient through the mean square.",
)
HALF_THROUGH_THE_MEAN = edited(
    "half_through_the_mean",
    "T-NORM-2",
    "norm.norm_backward",
    "dmean_BL1 * 2.0 *",
    "dmean_BL1 *",
    "The square's 2 is forgotten.",
)
SCALE_GRADIENT_UNNORMED = edited(
    "scale_gradient_unnormed",
    "T-NORM-2",
    "norm.norm_backward",
    "dout_BLD * x_BLD * inverse_BL1, axis",
    "dout_BLD * x_BLD, axis",
    "The scale's gradient reads the input before it was normed.",
)

# ---------------------------------------------------------------------------------------------------------------- position

BUCKETS_BY_LOGARITHM = edited(
    "buckets_by_logarithm",
    "T-POS-1",
    "position.bucket_starts",
    "distance**wide * exact**j < max_distance**j * exact**wide",
    "int(np.log(distance / exact) * (wide / np.log(max_distance / exact))) < j",
    "A rounded logarithm decides: 64 lands in the bucket before its own.",
)
EXACT_HALF_TOO_LONG = edited(
    "exact_half_too_long",
    "T-POS-1",
    "position.bucket_starts",
    "exact = buckets // 2",
    "exact = buckets // 2 + 1",
    "One distance more has a bucket of its own.",
)
# https://github.com/lucidrains/x-transformers/pull/10
OTHER_DIRECTION = edited(
    "other_direction",
    "T-POS-2",
    "position.position_buckets",
    "memory_M[None, :] - query_L[:, None]",
    "query_L[:, None] - memory_M[None, :]",
    "Ahead and behind are exchanged.",
)
# https://github.com/tensorflow/mesh/commit/2a46475
KEYS_ARE_COUNTED = edited(
    "keys_are_counted",
    "T-POS-2",
    "position.position_buckets",
    "memory_M[None, :] -",
    "np.arange(len(memory_M))[None, :] -",
    "Explicit positions are used for queries alone.",
)
AHEAD_AS_BEHIND = edited(
    "ahead_as_behind",
    "T-POS-2",
    "position.position_buckets",
    "one_way * (ahead_LM > 0)",
    "one_way * (ahead_LM >= 0)",
    "A token is ahead of itself.",
)
AHEAD_FOLDED = edited(
    "ahead_folded",
    "T-POS-2",
    "position.position_buckets",
    "np.maximum(-ahead_LM, 0)",
    "np.abs(ahead_LM)",
    "Causal buckets see ahead as behind.",
)
BIAS_ASSIGNED = edited(
    "bias_assigned",
    "T-POS-3",
    "position.position_bias_backward",
    "np.add.at(dtable_UH, bucket_LM, np.moveaxis(dbias_HLM, 0, -1))",
    "dtable_UH[bucket_LM] = np.moveaxis(dbias_HLM, 0, -1)",
    "A bucket keeps its last pair's gradient.",
)
BIAS_BY_MEMORY_AND_QUERY = edited(
    "bias_by_memory_and_query",
    "T-POS-3",
    "position.position_bias_forward",
    "table_UH[bucket_LM], -1, 0)",
    "table_UH[bucket_LM[:, ::-1]], -1, 0)",
    "The bias is read from the far end of the memory.",
)

# --------------------------------------------------------------------------------------------------------------- attention

# https://github.com/tensorflow/mesh/commit/c29ae04
PADDING_IS_SEEN = edited(
    "padding_is_seen",
    "T-MASK-1",
    "attention.allowed_pairs",
    "same_BLM & memory_valid_BM[:, None, :]",
    "same_BLM | ~memory_valid_BM[:, None, :]",
    "Everybody sees padding.",
)
SEGMENTS_ARE_IGNORED = edited(
    "segments_are_ignored",
    "T-MASK-1",
    "attention.allowed_pairs",
    "same_BLM & memory_valid_BM[:, None, :]",
    "memory_valid_BM[:, None, :] & np.ones_like(same_BLM)",
    "Packed sequences see each other.",
)
NOT_ITSELF = edited(
    "not_itself",
    "T-MASK-1",
    "attention.allowed_pairs",
    "np.arange(M) <=",
    "np.arange(M) <",
    "A query does not see its own place.",
)
NEVER_CAUSAL = edited(
    "never_causal",
    "T-MASK-1",
    "attention.allowed_pairs",
    " if causal else allowed_BLM",
    " if False else allowed_BLM",
    "The future is seen.",
)
BLIND_QUERY_GETS_THE_MEAN = edited(
    "blind_query_gets_the_mean",
    "T-MASK-2",
    "attention.masked_softmax",
    "shifted_BHLM = np.where(allowed_B1LM, scores_BHLM - np.where(np.isfinite(max_BHL1), max_BHL1, 0.0), -np.inf)",
    "hidden_BHLM = np.where(allowed_B1LM, scores_BHLM, -1e9)\n    shifted_BHLM = hidden_BHLM - hidden_BHLM.max(axis=-1, keepdims=True)",
    "-1e9 for what is hidden: who sees nothing has the mean of it.",
)
MAXIMUM_OF_THE_HIDDEN = edited(
    "maximum_of_the_hidden",
    "T-MASK-2",
    "attention.masked_softmax",
    ", where=allowed_B1LM, initial=-np.inf",
    ", initial=-np.inf",
    "The maximum is taken of what is hidden too: all that is seen may underflow.",
)
NO_MAXIMUM = edited(
    "no_maximum",
    "T-MASK-2",
    "attention.masked_softmax",
    "np.where(np.isfinite(max_BHL1), max_BHL1, 0.0)",
    "0.0",
    "No maximum is subtracted.",
)
SCALED_SCORES = edited(
    "scaled_scores",
    "T-ATT-1",
    "attention.attention_forward",
    "query_BLHK, key_BMHK) +",
    "query_BLHK / np.sqrt(query_BLHK.shape[-1]), key_BMHK) +",
    "The factor K^(-1/2) of other transformers.",
)
SOFTMAX_OF_ACTIVATIONS = edited(
    "softmax_of_activations",
    "T-ATT-1",
    "attention.attention_forward",
    "bias_HLM, points.statistics",
    "bias_HLM, points.activations",
    "Scores are rounded as activations.",
)
PROBS_UNROUNDED = edited(
    "probs_unrounded",
    "T-ATT-1",
    "attention.attention_forward",
    "round_to(masked_softmax(scores_BHLM, allowed_BLM), points.activations)",
    "masked_softmax(scores_BHLM, allowed_BLM)",
    "The probabilities are not rounded before they weigh.",
)
DROPOUT_BEFORE_THE_SOFTMAX = edited(
    "dropout_before_the_softmax",
    "T-ATT-1",
    "attention.attention_forward",
    "masked_softmax(scores_BHLM, allowed_BLM)",
    "masked_softmax(scores_BHLM, allowed_BLM & factor_BHLM.any(axis=1))",
    "What is dropped out is renormalised away.",
)
BIAS_FORGOTTEN = edited(
    "bias_forgotten",
    "T-ATT-1",
    "attention.attention_forward",
    " + bias_HLM",
    "",
    "No position bias.",
)
VALUES_FROM_KEYS = edited(
    "values_from_keys",
    "T-ATT-1",
    "attention.attention_forward",
    'np.einsum("bmd,dhk->bmhk", memory_BMD, params.w_value_DHK)',
    'np.einsum("bmd,dhk->bmhk", memory_BMD, params.w_key_DHK)',
    "Keys are mixed for values.",
)
SOFTMAX_GRADIENT_WITHOUT_MEAN = edited(
    "softmax_gradient_without_mean",
    "T-ATT-2",
    "attention.attention_backward",
    "(dprobs_BHLM - mean_BHL1)",
    "dprobs_BHLM",
    "The softmax's gradient forgets the denominator.",
)
BIAS_GRADIENT_AVERAGED = edited(
    "bias_gradient_averaged",
    "T-ATT-2",
    "attention.attention_backward",
    "dscores_BHLM.sum(axis=0)",
    "dscores_BHLM.mean(axis=0)",
    "The bias' gradient is averaged over the batch.",
)
DROPOUT_FORGOTTEN_ON_THE_WAY_BACK = edited(
    "dropout_forgotten_on_the_way_back",
    "T-ATT-2",
    "attention.attention_backward",
    "saved.value_BMHK) * saved.factor_BHLM",
    "saved.value_BMHK)",
    "Dropped probabilities have a gradient.",
)
MEMORY_WITHOUT_KEYS = edited(
    "memory_without_keys",
    "T-ATT-2",
    "attention.attention_backward",
    "dmemory_key_BMD + dmemory_value_BMD",
    "dmemory_value_BMD",
    "The memory's gradient comes through the values alone.",
)
QUERY_GRADIENT_UNROUNDED = edited(
    "query_gradient_unrounded",
    "T-ATT-2",
    "attention.attention_backward",
    'dquery_BLHK = round_to(np.einsum("bhlm,bmhk->blhk", dscores_BHLM, saved.key_BMHK), points.gradients)',
    'dquery_BLHK = np.einsum("bhlm,bmhk->blhk", dscores_BHLM, saved.key_BMHK)',
    "The query's gradient is not rounded.",
)

# ------------------------------------------------------------------------------------------------------------ feed-forward

GATE_ON_THE_LINEAR_HALF = edited(
    "gate_on_the_linear_half",
    "T-FFN-1",
    "feed_forward.feed_forward_forward",
    "round_to(x_BLD @ params.w_gate_DF, points.activations), z_in_BLF",
    "z_in_BLF, round_to(x_BLD @ params.w_gate_DF, points.activations)",
    "The activation is on the other half.",
)
HIDDEN_DROPOUT_IGNORED = edited(
    "hidden_dropout_ignored",
    "T-FFN-1",
    "feed_forward.feed_forward_forward",
    " * z_linear_BLF * factor_BLF",
    " * z_linear_BLF",
    "The dropout inside is ignored.",
)
PRE_ACTIVATION_UNROUNDED = edited(
    "pre_activation_unrounded",
    "T-FFN-1",
    "feed_forward.feed_forward_forward",
    "round_to(x_BLD @ params.w_in_DF, points.activations)",
    "x_BLD @ params.w_in_DF",
    "The pre-activation is not rounded.",
)
HIDDEN_DROPOUT_FORGOTTEN_ON_THE_WAY_BACK = edited(
    "hidden_dropout_forgotten_on_the_way_back",
    "T-FFN-2",
    "feed_forward.feed_forward_backward",
    "dhidden_BLF * saved.factor_BLF",
    "dhidden_BLF",
    "Dropped units have a gradient.",
)
SLOPE_OF_THE_ACTIVATION_FORGOTTEN = edited(
    "slope_of_the_activation_forgotten",
    "T-FFN-2",
    "feed_forward.feed_forward_backward",
    " * activation_slope(saved.z_act_BLF, activation)",
    "",
    "The activation has slope 1.",
)
GATE_S_INPUT_GRADIENT_FORGOTTEN = edited(
    "gate_s_input_gradient_forgotten",
    "T-FFN-2",
    "feed_forward.feed_forward_backward",
    "dx_gate_BLD + dz_in_BLF",
    "dz_in_BLF",
    "The input's gradient comes through the linear half alone.",
)

# -------------------------------------------------------------------------------------------------------------------- loss

SMOOTHING_OVER_ALL_WORDS = edited(
    "smoothing_over_all_words",
    "T-LOSS-1",
    "cross_entropy.cross_entropy_forward",
    "1.0 - smoothing, smoothing / (V - 1)",
    "1.0 - smoothing, smoothing / V",
    "The smoothing is shared among all words, and q sums to less than 1.",
)
LOG_SUM_EXP_OVERFLOWS = edited(
    "log_sum_exp_overflows",
    "T-LOSS-1",
    "cross_entropy.cross_entropy_forward",
    "max_BL1 = logits_BLV.max(axis=-1, keepdims=True)",
    "max_BL1 = np.zeros((*logits_BLV.shape[:2], 1))",
    "exp of the logits themselves.",
)
Z_LOSS_UNWEIGHTED = edited(
    "z_loss_unweighted",
    "T-LOSS-1",
    "cross_entropy.cross_entropy_forward",
    "float(np.sum(losses_BL1 * scale_BL1))",
    "float(np.sum((losses_BL1 - z_coef * lse_BL1**2) * scale_BL1) + np.sum(z_coef * lse_BL1**2) / denominator)",
    "Padding has a z-loss.",
)
DENOMINATOR_OF_THE_VOCABULARY = edited(
    "denominator_of_the_vocabulary",
    "T-LOSS-1",
    "cross_entropy.cross_entropy_forward",
    "float(np.sum(losses_BL1 * scale_BL1))",
    "float(np.sum(losses_BL1 * scale_BL1)) / V",
    "The mean over words too.",
)
Z_LOSS_GRADIENT_WITHOUT_ITS_TWO = edited(
    "z_loss_gradient_without_its_two",
    "T-LOSS-2",
    "cross_entropy.cross_entropy_forward",
    "1.0 + 2.0 * z_coef",
    "1.0 + z_coef",
    "The square's 2 is forgotten.",
)
GRADIENT_AT_THE_TARGET_ALONE = edited(
    "gradient_at_the_target_alone",
    "T-LOSS-2",
    "cross_entropy.cross_entropy_forward",
    "total_BL1 - q_BLV)",
    "total_BL1 - is_target_BLV)",
    "The gradient knows no smoothing.",
)
LOSS_GRADIENT_IGNORED = edited(
    "loss_gradient_ignored",
    "T-LOSS-2",
    "cross_entropy.cross_entropy_backward",
    "dvalue * saved",
    "saved",
    "The gradient of the loss is taken for 1.",
)

# -------------------------------------------------------------------------------------------------------------- sub-layers

POST_NORM = edited(
    "post_norm",
    "T-BLOCK-1",
    "block.self_attention_layer_forward",
    "y_BLD = round_to(x_BLD + out_BLD",
    "y_BLD = round_to(normed_BLD + out_BLD",
    "The stream goes on normed.",
)
NO_RESIDUAL = edited(
    "no_residual",
    "T-BLOCK-1",
    "block.dense_layer_forward",
    "x_BLD + out_BLD * dropout_BLD",
    "out_BLD * dropout_BLD",
    "The stream ends in the sub-layer.",
)
DROPOUT_ON_THE_SUM = edited(
    "dropout_on_the_sum",
    "T-BLOCK-1",
    "block.dense_layer_forward",
    "x_BLD + out_BLD * dropout_BLD",
    "(x_BLD + out_BLD) * dropout_BLD",
    "The stream is dropped out with the sub-layer.",
)
QUERIES_OF_THE_STREAM = edited(
    "queries_of_the_stream",
    "T-BLOCK-1",
    "block.self_attention_layer_forward",
    "attention_forward(normed_BLD, normed_BLD",
    "attention_forward(x_BLD, normed_BLD",
    "Queries are not normed.",
)
# https://github.com/huggingface/transformers/pull/8518
CROSS_ATTENTION_WITH_A_BIAS = edited(
    "cross_attention_with_a_bias",
    "T-BLOCK-2",
    "block.cross_attention_layer_forward",
    "none_HLM = np.zeros((params.attention.w_query_DHK.shape[1], x_BLD.shape[1], memory_BMD.shape[1]))",
    "none_HLM = np.zeros((params.attention.w_query_DHK.shape[1], x_BLD.shape[1], 1)) - np.arange(memory_BMD.shape[1])",
    "Cross-attention has a relative bias.",
)
MEMORY_NORMED_AGAIN = edited(
    "memory_normed_again",
    "T-BLOCK-2",
    "block.cross_attention_layer_forward",
    "attention_forward(normed_BLD, memory_BMD,",
    "attention_forward(normed_BLD, norm_forward(memory_BMD, params.norm_D, statics.norm_epsilon, statics.around)[0],",
    "The memory passes the sub-layer's norm.",
)
GROUPS_ACROSS_ROWS = edited(
    "groups_across_rows",
    "T-BLOCK-3",
    "block.switch_layer_forward",
    "x_GSD=normed_BLD.reshape(G, S, D)",
    "x_GSD=normed_BLD.swapaxes(0, 1).reshape(G, S, D)",
    "Tokens are cut into groups column by column.",
)
# https://github.com/NVIDIA/Megatron-LM/pull/5542
EVERYBODY_IS_VALID = edited(
    "everybody_is_valid",
    "T-BLOCK-3",
    "block.switch_layer_forward",
    "valid_BL.reshape(G, S)",
    "np.ones((G, S), bool)",
    "The Switch layer does not know the padding.",
)
ROUTER_NOISE_LEFT_OUT = edited(
    "router_noise_left_out",
    "T-BLOCK-3",
    "block.switch_layer_forward",
    "noise.factor_BLD.reshape(G, S, D)",
    "np.ones((G, S, D))",
    "The router hears no noise.",
)
STREAM_S_GRADIENT_CUT = edited(
    "stream_s_gradient_cut",
    "T-BLOCK-4",
    "block.self_attention_layer_backward",
    "dy_BLD + dx_normed_BLD",
    "dx_normed_BLD",
    "The gradient goes through the sub-layer alone.",
)
MEMORY_ROLE_FORGOTTEN = edited(
    "memory_role_forgotten",
    "T-BLOCK-4",
    "block.self_attention_layer_backward",
    "dquery_BLD + dmemory_BLD",
    "dquery_BLD",
    "Self-attention's input has its gradient as a query alone.",
)
DROPOUT_OF_THE_LAYER_FORGOTTEN = edited(
    "dropout_of_the_layer_forgotten",
    "T-BLOCK-4",
    "block.dense_layer_backward",
    "dy_BLD * saved.dropout_BLD",
    "dy_BLD",
    "A dropped sub-layer has a gradient.",
)
# https://github.com/laekov/fastmoe/pull/50
BALANCE_WITHOUT_GRADIENT = edited(
    "balance_without_gradient",
    "T-BLOCK-4",
    "block.switch_layer_backward",
    "switch_backward(dout_GSD, daux, dz,",
    "switch_backward(dout_GSD, 0.0, dz,",
    "The balance loss is detached.",
)

# ------------------------------------------------------------------------------------------------------- blocks and stacks

CROSS_ATTENTION_FIRST = edited(
    "cross_attention_first",
    "T-STACK-1",
    "transformer.block_forward",
    "x1_BLD, memory_BMD, params.cross_attention",
    "x_BLD, memory_BMD, params.cross_attention",
    "Cross-attention reads the stream before self-attention.",
)
SELF_ATTENTION_S_GRADIENT_SKIPPED = edited(
    "self_attention_s_gradient_skipped",
    "T-STACK-1",
    "transformer.block_backward",
    "self_attention_layer_backward(dx1_BLD,",
    "self_attention_layer_backward(dx2_BLD,",
    "Self-attention gets the gradient past cross-attention.",
)
# https://github.com/huggingface/transformers/pull/4499
WEIGHTS_FOR_A_BIAS = edited(
    "weights_for_a_bias",
    "T-STACK-2",
    "transformer.stack_forward",
    "        saved.append(block_saved)",
    "        saved.append(block_saved)\n        bias_HLL = block_saved.self_attention.attention.probs_BHLM[0]",
    "From the second block on the attention weights stand where the bias should.",
)
NO_LAST_NORM = edited(
    "no_last_norm",
    "T-STACK-2",
    "transformer.stack_forward",
    "round_to(normed_BLD * noise.out_BLD",
    "round_to(x_BLD * noise.out_BLD",
    "The last stream is not normed.",
)
SAME_BUCKETS_FOR_BOTH = edited(
    "same_buckets_for_both",
    "T-STACK-2",
    "transformer.stack_forward",
    "statics.max_distance, not statics.causal)",
    "statics.max_distance, True)",
    "The decoder has the encoder's buckets.",
)
EMBEDDED_DROPOUT_IGNORED = edited(
    "embedded_dropout_ignored",
    "T-STACK-2",
    "transformer.stack_forward",
    "x_BLD * noise.embedded_BLD",
    "x_BLD",
    "No dropout of what is embedded.",
)
LAST_BLOCK_S_MEMORY = edited(
    "last_block_s_memory",
    "T-STACK-3",
    "transformer.stack_backward",
    "dmemory_BMD = dmemory_BMD + dmemory_block_BMD",
    "dmemory_BMD = dmemory_block_BMD",
    "The encoder learns from the decoder's first block alone.",
)
FIRST_BLOCK_S_BIAS = edited(
    "first_block_s_bias",
    "T-STACK-3",
    "transformer.stack_backward",
    "dbias_HLL = dbias_HLL + dbias_block_HLL",
    "dbias_HLL = dbias_block_HLL",
    "The position table learns from one block.",
)

# ------------------------------------------------------------------------------------------------------------------- model

BALANCE_AVERAGED = edited(
    "balance_averaged",
    "T-MODEL-1",
    "transformer.model_forward",
    'if pooling == "mean" else 1.0',
    'if pooling != "none" else 1.0',
    "The balance losses are always averaged.",
)
ONE_COEFFICIENT = edited(
    "one_coefficient",
    "T-MODEL-1",
    "transformer.model_forward",
    "statics.decoder.aux_coef * aux_decoder",
    "statics.encoder.aux_coef * aux_decoder",
    "The decoder's losses have the encoder's coefficient.",
)
LOSSES_OF_THE_ENCODER = edited(
    "losses_of_the_encoder",
    "T-MODEL-1",
    "transformer.model_forward",
    "switches = encoder.switches + decoder.switches",
    "switches = encoder.switches",
    "The decoder's layers are not counted.",
)
# transformers 5.0.0 to 5.23.0, T5Config(tie_word_embeddings=False)
UNTIED_FORCED_TIED = edited(
    "untied_forced_tied",
    "T-MODEL-1",
    "transformer.model_forward",
    "if params.w_logits_DV is None:",
    "if True:",
    "The model's own matrix is ignored.",
)
MEAN_OF_PRODUCTS = edited(
    "mean_of_products",
    "T-MODEL-2",
    "transformer.model_forward",
    '    if pooling == "average_then_product":\n        aux_encoder',
    "    if False:\n        aux_encoder",
    "Each layer's own product is summed.",
)
POOLED_GRADIENT_OF_EACH_LAYER = edited(
    "pooled_gradient_of_each_layer",
    "T-MODEL-2",
    "transformer.pool_balance",
    "float(value), saved._replace(blocks=tuple(blocks))",
    "float(value), saved",
    "The gradient is that of the layers' own losses.",
)
Z_LOSS_POOLED_OVER_THE_MODEL = edited(
    "z_loss_pooled_over_the_model",
    "T-MODEL-2",
    "transformer.model_forward",
    'by_stack if pooling == "average_then_product" else',
    "",
    "The z-loss is summed where a stack's mean is meant.",
)
MEAN_OVER_POSITIONS = edited(
    "mean_over_positions",
    "T-MODEL-3",
    "transformer.model_forward",
    'if statics.loss_denominator == "targets"',
    "if statics.loss_denominator",
    "Padding is in the denominator.",
)
NO_WEIGHTS_DIVIDED_BY_NOTHING = edited(
    "no_weights_divided_by_nothing",
    "T-MODEL-3",
    "transformer.model_forward",
    "max(float(batch.weight_BL.sum()), 1.0)",
    "max(float(batch.weight_BL.sum()), 0.0001)",
    "Weights that sum to less than 1 are blown up.",
)
DECODER_SEES_ALL_MEMORY = edited(
    "decoder_sees_all_memory",
    "T-MODEL-4",
    "transformer.model_forward",
    "*decoder_marks, *encoder_marks, batch.decoder_position_L",
    "*decoder_marks, encoder_marks[0], np.ones_like(encoder_marks[1]), batch.decoder_position_L",
    "The decoder sees the encoder's padding.",
)
DECODER_IS_NOT_CAUSAL = edited(
    "decoder_is_not_causal",
    "T-MODEL-4",
    "transformer.model_forward",
    "batch.decoder_position_L, noise[1], statics.decoder\n",
    "batch.decoder_position_L, noise[1], statics.decoder._replace(causal=False)\n",
    "The decoder sees what it is to predict.",
)
ENCODER_S_READING_FORGOTTEN = edited(
    "encoder_s_reading_forgotten",
    "T-MODEL-5",
    "transformer.model_backward",
    "dembedding_logits_VD + dembedding_decoder_VD + dembedding_encoder_VD",
    "dembedding_logits_VD + dembedding_decoder_VD",
    "The table learns nothing from the encoder's reading.",
)
LOGITS_GRADIENT_FORGOTTEN = edited(
    "logits_gradient_forgotten",
    "T-MODEL-5",
    "transformer.model_backward",
    "dembedding_logits_VD + dembedding_decoder_VD + dembedding_encoder_VD",
    "dembedding_decoder_VD + dembedding_encoder_VD",
    "A tied table learns nothing from the logits.",
)
OBJECTIVE_S_GRADIENT_IGNORED = edited(
    "objective_s_gradient_ignored",
    "T-MODEL-5",
    "transformer.model_backward",
    "(dobjective * stack.aux_coef",
    "(stack.aux_coef",
    "The balance losses' gradients do not scale with the objective's.",
)
