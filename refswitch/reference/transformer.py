# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""The encoder-decoder: two stacks of blocks around one embedding, and the way back through all of it.

Paper: 2.1 and the T5 body. Read `block` first.

    tokens -> embed -> encoder blocks -> norm -> memory
    tokens shifted right -> embed -> decoder blocks (self, cross, feed-forward) -> norm -> logits -> cross-entropy + aux + z
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.numbers.precision import round_to
from refswitch.reference.attention import allowed_pairs
from refswitch.reference.block import (
    AttentionLayerParams,
    AttentionLayerSaved,
    FeedForwardLayerParams,
    FeedForwardLayerSaved,
    RouterNoise,
    StackStatics,
    SwitchLayerSaved,
    cross_attention_layer_backward,
    cross_attention_layer_forward,
    dense_layer_backward,
    dense_layer_forward,
    self_attention_layer_backward,
    self_attention_layer_forward,
    switch_layer_backward,
    switch_layer_forward,
)
from refswitch.reference.cross_entropy import CrossEntropySaved, cross_entropy_backward, cross_entropy_forward
from refswitch.reference.embedding import (
    embed_backward,
    embed_forward,
    logits_backward,
    logits_forward,
    tied_logits_backward,
    tied_logits_forward,
)
from refswitch.reference.losses import BalanceSaved, balance_forward, counted_fraction, rows_of_mean
from refswitch.reference.norm import NormSaved, norm_backward, norm_forward
from refswitch.reference.position import position_bias_backward, position_bias_forward, position_buckets
from refswitch.reference.router import choose
from refswitch.reference.switch import SwitchOutputs, SwitchParams


class BlockParams(NamedTuple):
    """One block; the encoder's has no cross-attention."""

    self_attention: AttentionLayerParams
    cross_attention: AttentionLayerParams | None
    feed_forward: FeedForwardLayerParams


class StackParams(NamedTuple):
    """One stack: its blocks, the position table that they share, the norm after the last."""

    blocks: tuple[BlockParams, ...]
    position_UH: np.ndarray
    norm_D: np.ndarray


class ModelParams(NamedTuple):
    """The whole model; gradients use the same type. `w_logits_DV` is None where the logits are tied to the embedding."""

    embedding_VD: np.ndarray
    encoder: StackParams
    decoder: StackParams
    w_logits_DV: np.ndarray | None


class BlockNoise(NamedTuple):
    """Dropout of one block as factors, already scaled, 1 where there is none; and its router's noise."""

    self_probs_BHLL: np.ndarray
    self_out_BLD: np.ndarray
    cross_probs_BHLM: np.ndarray
    cross_out_BLD: np.ndarray
    router: RouterNoise
    hidden_BLF: np.ndarray
    out_BLD: np.ndarray


class StackNoise(NamedTuple):
    """Dropout of one stack: after the embedding, in the blocks, after the last norm."""

    embedded_BLD: np.ndarray
    blocks: tuple[BlockNoise, ...]
    out_BLD: np.ndarray


class Batch(NamedTuple):
    """One batch. Segments number the packed sequences of a row; positions are those of the row, whose differences are all that counts."""

    encoder_tokens_BM: np.ndarray
    encoder_segment_BM: np.ndarray
    encoder_valid_BM: np.ndarray  # False marks padding
    encoder_position_M: np.ndarray
    decoder_tokens_BL: np.ndarray  # the targets, shifted right
    decoder_segment_BL: np.ndarray
    decoder_valid_BL: np.ndarray
    decoder_position_L: np.ndarray
    targets_BL: np.ndarray
    weight_BL: np.ndarray


class ModelStatics(NamedTuple):
    """What does not change from call to call."""

    encoder: StackStatics
    decoder: StackStatics
    loss_denominator: str  # "targets": every position; "weights": the sum of weights
    label_smoothing: float
    logits_z_coef: float


class BlockSaved(NamedTuple):
    """What a block's backward needs."""

    self_attention: AttentionLayerSaved
    cross_attention: AttentionLayerSaved | None
    feed_forward: FeedForwardLayerSaved | SwitchLayerSaved


class StackSaved(NamedTuple):
    """What a stack's backward needs."""

    bucket_LL: np.ndarray
    blocks: tuple[BlockSaved, ...]
    norm: NormSaved


class StackOutputs(NamedTuple):
    """A stack's answer, the residual stream before the first and after each block, and its Switch layers' outputs in order."""

    out_BLD: np.ndarray
    stream: tuple[np.ndarray, ...]
    switches: tuple[SwitchOutputs, ...]


class Losses(NamedTuple):
    """The parts of the objective, without coefficients, and their weighted sum."""

    cross_entropy: float
    aux_loss: float
    z_loss: float
    objective: float


class ModelOutputs(NamedTuple):
    """What one forward pass of the model computes."""

    logits_BLV: np.ndarray
    losses: Losses
    encoder: StackOutputs
    decoder: StackOutputs


class ModelSaved(NamedTuple):
    """What the model's backward needs."""

    batch: Batch
    noise: tuple[StackNoise, StackNoise]
    encoder: StackSaved
    decoder: StackSaved
    decoder_out_BLD: np.ndarray
    cross_entropy: CrossEntropySaved
    aux_share: float  # weight of each layer's balance loss in its stack's
    z_shares: tuple[float, float]  # the same for the z-loss of an encoder's and a decoder's layer


def block_forward(
    x_BLD: np.ndarray,
    memory_BMD: np.ndarray,
    bias_HLL: np.ndarray,
    params: BlockParams,
    allowed_BLL: np.ndarray,
    allowed_BLM: np.ndarray,
    valid_BL: np.ndarray,
    noise: BlockNoise,
    statics: StackStatics,
) -> tuple[np.ndarray, tuple[SwitchOutputs, ...], BlockSaved]:
    """Return the residual stream after one block, the Switch layer's outputs if it has one, and what backward needs."""
    x1_BLD, self_saved = self_attention_layer_forward(
        x_BLD, bias_HLL, params.self_attention, allowed_BLL, noise.self_probs_BHLL, noise.self_out_BLD, statics
    )  # F1
    x2_BLD, cross_saved = x1_BLD, None
    if params.cross_attention is not None:
        x2_BLD, cross_saved = cross_attention_layer_forward(
            x1_BLD, memory_BMD, params.cross_attention, allowed_BLM, noise.cross_probs_BHLM, noise.cross_out_BLD, statics
        )  # F2
    norm_D, feed_forward = params.feed_forward
    if isinstance(feed_forward, SwitchParams):
        y_BLD, outputs, switch_saved = switch_layer_forward(
            x2_BLD, norm_D, feed_forward, valid_BL, noise.router, noise.hidden_BLF, noise.out_BLD, statics
        )  # F3
        return y_BLD, (outputs,), BlockSaved(self_saved, cross_saved, switch_saved)
    y_BLD, dense_saved = dense_layer_forward(x2_BLD, norm_D, feed_forward, noise.hidden_BLF, noise.out_BLD, statics)  # F3
    return y_BLD, (), BlockSaved(self_saved, cross_saved, dense_saved)


def block_backward(
    dy_BLD: np.ndarray, daux: float, dz: float, saved: BlockSaved, params: BlockParams, statics: StackStatics
) -> tuple[np.ndarray, np.ndarray | float, np.ndarray, BlockParams]:
    """Return dx_BLD, dmemory_BMD (0 in the encoder), dbias_HLL and the parameters' gradients."""
    norm_D, feed_forward = params.feed_forward
    if isinstance(saved.feed_forward, SwitchLayerSaved):
        assert isinstance(feed_forward, SwitchParams)
        dx2_BLD, dfeed_forward = switch_layer_backward(dy_BLD, daux, dz, saved.feed_forward, norm_D, feed_forward, statics)  # B3
    else:
        assert not isinstance(feed_forward, SwitchParams)
        dx2_BLD, dfeed_forward = dense_layer_backward(dy_BLD, saved.feed_forward, norm_D, feed_forward, statics)  # B3
    dmemory_BMD: np.ndarray | float = 0.0
    dx1_BLD, dcross = dx2_BLD, None
    if saved.cross_attention is not None:
        assert params.cross_attention is not None
        dx1_BLD, dmemory_BMD, dcross = cross_attention_layer_backward(dx2_BLD, saved.cross_attention, params.cross_attention, statics)  # B2
    dx_BLD, dbias_HLL, dself = self_attention_layer_backward(dx1_BLD, saved.self_attention, params.self_attention, statics)  # B1
    return dx_BLD, dmemory_BMD, dbias_HLL, BlockParams(dself, dcross, dfeed_forward)


def stack_forward(
    x_BLD: np.ndarray,
    memory_BMD: np.ndarray,
    params: StackParams,
    segment_BL: np.ndarray,
    valid_BL: np.ndarray,
    memory_segment_BM: np.ndarray,
    memory_valid_BM: np.ndarray,
    position_L: np.ndarray,
    noise: StackNoise,
    statics: StackStatics,
) -> tuple[StackOutputs, StackSaved]:
    """Run every block and the last norm on embedded tokens. The encoder has no memory: it gets its own tokens and ignores them."""
    bucket_LL = position_buckets(position_L, position_L, params.position_UH.shape[0], statics.max_distance, not statics.causal)
    allowed_BLL = allowed_pairs(segment_BL, segment_BL, valid_BL, statics.causal)
    allowed_BLM = allowed_pairs(segment_BL, memory_segment_BM, memory_valid_BM, causal=False)
    bias_HLL = position_bias_forward(params.position_UH, bucket_LL)  # F1
    x_BLD = round_to(x_BLD * noise.embedded_BLD, statics.around.activations)  # F2  R11
    stream, saved = [x_BLD], []
    switches: list[SwitchOutputs] = []
    for block, block_noise in zip(params.blocks, noise.blocks, strict=True):
        x_BLD, outputs, block_saved = block_forward(
            x_BLD, memory_BMD, bias_HLL, block, allowed_BLL, allowed_BLM, valid_BL, block_noise, statics
        )  # F3
        stream.append(x_BLD)
        switches.extend(outputs)
        saved.append(block_saved)
    normed_BLD, norm_saved = norm_forward(x_BLD, params.norm_D, statics.norm_epsilon, statics.around)  # F4
    out_BLD = round_to(normed_BLD * noise.out_BLD, statics.around.activations)  # F5  R11
    return StackOutputs(out_BLD, tuple(stream), tuple(switches)), StackSaved(bucket_LL, tuple(saved), norm_saved)


def stack_backward(
    dout_BLD: np.ndarray, daux: float, dz: float, saved: StackSaved, params: StackParams, noise: StackNoise, statics: StackStatics
) -> tuple[np.ndarray, np.ndarray | float, StackParams]:
    """Return dx_BLD, dmemory_BMD (0 in the encoder) and the parameters' gradients."""
    dnormed_BLD = round_to(dout_BLD * noise.out_BLD, statics.around.gradients)  # B5  R14
    dx_BLD, dnorm_D = norm_backward(dnormed_BLD, saved.norm, params.norm_D, statics.around)  # B4
    dmemory_BMD: np.ndarray | float = 0.0
    dbias_HLL = np.zeros((params.position_UH.shape[1], *saved.bucket_LL.shape))
    dblocks: list[BlockParams] = []
    for block, block_saved in zip(reversed(params.blocks), reversed(saved.blocks), strict=True):
        dx_BLD, dmemory_block_BMD, dbias_block_HLL, dblock = block_backward(dx_BLD, daux, dz, block_saved, block, statics)  # B3
        dmemory_BMD = dmemory_BMD + dmemory_block_BMD
        dbias_HLL = dbias_HLL + dbias_block_HLL
        dblocks.insert(0, dblock)
    dx_BLD = dx_BLD * noise.embedded_BLD  # B2
    dposition_UH = position_bias_backward(dbias_HLL, saved.bucket_LL, params.position_UH.shape[0])  # B1
    return dx_BLD, dmemory_BMD, StackParams(tuple(dblocks), dposition_UH, dnorm_D)


def pool_balance(outputs: StackOutputs, saved: StackSaved, valid_BL: np.ndarray, statics: StackStatics) -> tuple[float, StackSaved]:
    """Return a stack's balance loss with f and P each averaged over its layers before they are multiplied, and saved with its gradient.

    Spec: S-AUX-1. Hugging Face concatenates the layers along the tokens; the loss is still linear in each probability.
    """
    switches, aux = outputs.switches, statics.dialect.aux
    if not switches:
        return 0.0, saved
    valid_GS = valid_BL.reshape(statics.groups, -1)
    E = switches[0].probs_GSE.shape[-1]
    claims_GS = valid_GS if statics.dialect.pad.route == "exclude" else np.ones_like(valid_GS)
    choices = [choose(switch.logits_GSE) if aux.f.count == "logits" else switch.route.expert_GS for switch in switches]
    counts = [counted_fraction(switch.route, choice_GS, claims_GS, valid_GS, E, aux) for switch, choice_GS in zip(switches, choices, strict=True)]
    rows = [rows_of_mean(valid_GS, switch.route.kept_GS, aux) for switch in switches]
    denominator_G = np.sum([row[0] for row in rows], axis=0)
    value, pooled = balance_forward(
        np.concatenate([switch.probs_GSE for switch in switches], axis=1), np.sum(counts, axis=0), denominator_G, rows[0][1],
        np.concatenate([valid_GS] * len(switches), axis=1), aux,
    )  # fmt: skip
    slices = iter(np.split(pooled.dvalue_dprobs_GSE, len(switches), axis=1))
    blocks = [
        block._replace(feed_forward=layer._replace(switch=layer.switch._replace(balance=BalanceSaved(next(slices)))))
        if isinstance(layer := block.feed_forward, SwitchLayerSaved)
        else block
        for block in saved.blocks
    ]
    return float(value), saved._replace(blocks=tuple(blocks))


def model_forward(batch: Batch, params: ModelParams, noise: tuple[StackNoise, StackNoise], statics: ModelStatics) -> tuple[ModelOutputs, ModelSaved]:
    """Compute logits and the objective: cross-entropy + the stacks' aux_coef * aux + z_coef * z."""
    encoder_x_BMD = embed_forward(batch.encoder_tokens_BM, params.embedding_VD)  # F1
    encoder_marks = batch.encoder_segment_BM, batch.encoder_valid_BM
    encoder, encoder_saved = stack_forward(
        encoder_x_BMD, encoder_x_BMD, params.encoder, *encoder_marks, *encoder_marks, batch.encoder_position_M, noise[0], statics.encoder
    )  # F2
    decoder_x_BLD = embed_forward(batch.decoder_tokens_BL, params.embedding_VD)  # F3
    decoder_marks = batch.decoder_segment_BL, batch.decoder_valid_BL
    decoder, decoder_saved = stack_forward(
        decoder_x_BLD, encoder.out_BLD, params.decoder, *decoder_marks, *encoder_marks, batch.decoder_position_L, noise[1], statics.decoder
    )  # F4
    if params.w_logits_DV is None:
        logits_BLV = tied_logits_forward(decoder.out_BLD, params.embedding_VD, statics.decoder.around)  # F5
    else:
        logits_BLV = logits_forward(decoder.out_BLD, params.w_logits_DV, statics.decoder.around)  # F5
    denominator = batch.weight_BL.size if statics.loss_denominator == "targets" else max(float(batch.weight_BL.sum()), 1.0)
    cross_entropy, cross_entropy_saved = cross_entropy_forward(
        logits_BLV, batch.targets_BL, batch.weight_BL, denominator, statics.label_smoothing, statics.logits_z_coef
    )  # F6
    switches = encoder.switches + decoder.switches
    pooling = statics.encoder.dialect.aux.layers
    aux_share = 1.0 / max(len(switches), 1) if pooling == "mean" else 1.0
    by_stack = (1.0 / max(len(encoder.switches), 1), 1.0 / max(len(decoder.switches), 1))
    z_shares = by_stack if pooling == "average_then_product" else (aux_share, aux_share)
    aux_encoder, aux_decoder = (aux_share * sum(float(switch.aux_loss) for switch in stack.switches) for stack in (encoder, decoder))
    if pooling == "average_then_product":
        aux_encoder, encoder_saved = pool_balance(encoder, encoder_saved, batch.encoder_valid_BM, statics.encoder)
        aux_decoder, decoder_saved = pool_balance(decoder, decoder_saved, batch.decoder_valid_BL, statics.decoder)
    z_encoder = z_shares[0] * sum(float(switch.z_loss) for switch in encoder.switches)
    z_decoder = z_shares[1] * sum(float(switch.z_loss) for switch in decoder.switches)
    weighted_encoder = statics.encoder.aux_coef * aux_encoder + statics.encoder.z_coef * z_encoder
    weighted_decoder = statics.decoder.aux_coef * aux_decoder + statics.decoder.z_coef * z_decoder
    objective = cross_entropy + weighted_encoder + weighted_decoder  # F7
    losses = Losses(cross_entropy, aux_encoder + aux_decoder, z_encoder + z_decoder, objective)
    outputs = ModelOutputs(logits_BLV, losses, encoder, decoder)
    return outputs, ModelSaved(batch, noise, encoder_saved, decoder_saved, decoder.out_BLD, cross_entropy_saved, aux_share, z_shares)


def model_backward(dobjective: float, saved: ModelSaved, params: ModelParams, statics: ModelStatics) -> ModelParams:
    """Return the gradient of the objective in every parameter."""
    batch, V = saved.batch, params.embedding_VD.shape[0]
    daux_encoder, daux_decoder = (dobjective * stack.aux_coef * saved.aux_share for stack in (statics.encoder, statics.decoder))  # B7
    dz_encoder, dz_decoder = dobjective * statics.encoder.z_coef * saved.z_shares[0], dobjective * statics.decoder.z_coef * saved.z_shares[1]  # B7
    dlogits_BLV = round_to(cross_entropy_backward(dobjective, saved.cross_entropy), statics.decoder.around.gradients)  # B6  R14
    if params.w_logits_DV is None:
        dout_BLD, dembedding_logits_VD = tied_logits_backward(dlogits_BLV, saved.decoder_out_BLD, params.embedding_VD, statics.decoder.around)  # B5
        dw_logits_DV = None
    else:
        dout_BLD, dw_logits_DV = logits_backward(dlogits_BLV, saved.decoder_out_BLD, params.w_logits_DV, statics.decoder.around)  # B5
        dembedding_logits_VD = np.zeros_like(params.embedding_VD)
    ddecoder_x_BLD, dmemory_BMD, ddecoder = stack_backward(
        dout_BLD, daux_decoder, dz_decoder, saved.decoder, params.decoder, saved.noise[1], statics.decoder
    )  # B4
    dembedding_decoder_VD = embed_backward(ddecoder_x_BLD, batch.decoder_tokens_BL, V)  # B3
    dencoder_x_BMD, _, dencoder = stack_backward(
        np.asarray(dmemory_BMD), daux_encoder, dz_encoder, saved.encoder, params.encoder, saved.noise[0], statics.encoder
    )  # B2
    dembedding_encoder_VD = embed_backward(dencoder_x_BMD, batch.encoder_tokens_BM, V)  # B1
    return ModelParams(dembedding_logits_VD + dembedding_decoder_VD + dembedding_encoder_VD, dencoder, ddecoder, dw_logits_DV)
