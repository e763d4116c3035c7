# May import: standard library, numpy, refswitch.backends, refswitch.engine.block, refswitch.reference (records, masks, buckets), refswitch.errors.
"""The encoder-decoder on a backend: stacks, embedding, logits, objective, and the way back.

    tokens -> embed -> encoder blocks -> norm -> memory
    tokens shifted right -> embed -> decoder blocks -> norm -> logits -> cross-entropy + aux + z

Where a block is recomputed its backward first runs its forward again, with noise from the same addresses: the same bits, and one block's
activations in memory instead of all. Next: `step`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.backends.protocol import UNROUNDED, Backend, Saved
from refswitch.engine.block import BlockSaved, Surroundings, block_backward, block_forward
from refswitch.engine.noise import StackNoise
from refswitch.engine.switch import SwitchLayerSaved
from refswitch.errors import InputError
from refswitch.reference.attention import allowed_pairs
from refswitch.reference.block import StackStatics
from refswitch.reference.position import position_buckets
from refswitch.reference.switch import SwitchOutputs
from refswitch.reference.transformer import Batch, BlockParams, Losses, ModelOutputs, ModelParams, ModelStatics, StackOutputs, StackParams
from refswitch.tree import leaves


class BlockRecord(NamedTuple):
    """How a block's backward comes to its activations: saved, or by running forward again; and when its arrays were made."""

    x_BLD: np.ndarray
    saved: BlockSaved | None  # None: to be computed again
    since: int
    until: int


class StackSaved(NamedTuple):
    """What a stack's backward needs."""

    bucket_LL: np.ndarray
    surroundings: Surroundings
    blocks: tuple[BlockRecord, ...]
    norm: Saved


class Soft(NamedTuple):
    """A teacher's part in the loss. Paper: 4.2."""

    logits_BLV: np.ndarray  # constant data
    share: float  # lambda
    temperature: float


class ModelSaved(NamedTuple):
    """What the model's backward needs."""

    batch: Batch
    noise: tuple[StackNoise, StackNoise]
    encoder: StackSaved
    decoder: StackSaved
    decoder_out_BLD: np.ndarray
    cross_entropy: Saved  # or the distillation's
    is_soft: bool
    aux_share: float  # weight of each layer's balance loss in its stack's
    z_shares: tuple[float, float]  # the same for the z-loss of an encoder's and a decoder's layer


def without_activations(outputs: SwitchOutputs) -> SwitchOutputs:
    """Return a Switch layer's outputs without the three arrays that are as large as activations."""
    none = np.zeros((0, 0, 0), outputs.probs_GSE.dtype)
    return outputs._replace(out_GSD=none, hidden_GSF=none, expert_out_GSD=none)


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
    backend: Backend,
    recompute: bool = False,
) -> tuple[StackOutputs, StackSaved]:
    """Run every block and the last norm on embedded tokens. The encoder has no memory: it gets its own tokens and ignores them."""
    bucket_LL = position_buckets(position_L, position_L, params.position_UH.shape[0], statics.max_distance, not statics.causal)
    bias_HLL = backend.position_bias_forward(params.position_UH, bucket_LL)  # F1
    surroundings = Surroundings(
        memory_BMD,
        bias_HLL,
        allowed_pairs(segment_BL, segment_BL, valid_BL, statics.causal),
        allowed_pairs(segment_BL, memory_segment_BM, memory_valid_BM, causal=False),
        valid_BL,
    )
    x_BLD = backend.scaled(x_BLD, noise.embedded_BLD, statics.around.activations)  # F2  R11
    stream, records = [x_BLD], []
    switches: list[SwitchOutputs] = []
    for i, block in enumerate(params.blocks):
        since = backend.mark()
        y_BLD, outputs, saved = block_forward(x_BLD, surroundings, block, noise.blocks[i], statics, backend)  # F3
        if recompute:
            outputs = tuple(without_activations(each) for each in outputs)
            backend.release(since, backend.mark(), (y_BLD, outputs))
        records.append(BlockRecord(x_BLD, None if recompute else saved, since, backend.mark()))
        stream.append(y_BLD)
        switches.extend(outputs)
        x_BLD = y_BLD
    normed_BLD, norm_saved = backend.norm_forward(x_BLD, params.norm_D, statics.norm_epsilon, statics.around)  # F4
    out_BLD = backend.scaled(normed_BLD, noise.out_BLD, statics.around.activations)  # F5  R11
    return StackOutputs(out_BLD, tuple(stream), tuple(switches)), StackSaved(bucket_LL, surroundings, tuple(records), norm_saved)


def stack_backward(
    dout_BLD: np.ndarray,
    daux: float,
    dz: float,
    saved: StackSaved,
    params: StackParams,
    noise: StackNoise,
    statics: StackStatics,
    backend: Backend,
) -> tuple[np.ndarray, np.ndarray | None, StackParams]:
    """Return dx_BLD, dmemory_BMD (None in the encoder) and the parameters' gradients. A block's activations are given up behind it."""
    since = backend.mark()
    dnormed_BLD = backend.scaled(dout_BLD, noise.out_BLD, statics.around.gradients)  # B5  R14
    dx_BLD, dnorm_D = backend.norm_backward(dnormed_BLD, saved.norm, params.norm_D, statics.around)  # B4
    dmemory_BMD, dbias_HLL = None, None
    dblocks: list[BlockParams] = []
    for i in reversed(range(len(params.blocks))):
        block, record = params.blocks[i], saved.blocks[i]
        block_saved = record.saved
        if block_saved is None:
            _, _, block_saved = block_forward(record.x_BLD, saved.surroundings, block, noise.blocks[i], statics, backend)
        dx_BLD, dmemory_block_BMD, dbias_block_HLL, dblock = block_backward(dx_BLD, daux, dz, block_saved, block, statics, backend)  # B3
        if dmemory_block_BMD is not None:
            dmemory_BMD = dmemory_block_BMD if dmemory_BMD is None else backend.added(dmemory_BMD, dmemory_block_BMD, UNROUNDED)
        dbias_HLL = dbias_block_HLL if dbias_HLL is None else backend.added(dbias_HLL, dbias_block_HLL, UNROUNDED)
        dblocks.insert(0, dblock)
        backend.release(record.since, record.until, ())
        backend.release(since, backend.mark(), (dx_BLD, dmemory_BMD, dbias_HLL, dnorm_D, tuple(dblocks)))
    dx_BLD = backend.scaled(dx_BLD, noise.embedded_BLD, UNROUNDED)  # B2
    assert dbias_HLL is not None, "a stack has blocks"
    dposition_UH = backend.position_bias_backward(dbias_HLL, saved.bucket_LL, params.position_UH.shape[0])  # B1
    return dx_BLD, dmemory_BMD, StackParams(tuple(dblocks), dposition_UH, dnorm_D)


def pool_balance(outputs: StackOutputs, saved: StackSaved, valid_BL: np.ndarray, statics: StackStatics, backend: Backend) -> tuple[float, StackSaved]:
    """Return a stack's balance loss with f and P averaged over its layers first, and saved with each layer's part of its gradient. Spec: S-AUX-1.

    Raises
    ------
    InputError
        Where blocks are computed again, without what the pooling made of them.
    """
    blocks = list(saved.blocks)
    places: list[tuple[int, BlockSaved, SwitchLayerSaved]] = []
    for i, record in enumerate(blocks):
        if record.saved is None:
            raise InputError(f"dialect {statics.dialect.name}: aux.layers=average_then_product needs all layers at once, so recompute must be off")
        if isinstance(record.saved.feed_forward, SwitchLayerSaved):
            places.append((i, record.saved, record.saved.feed_forward))
    if not places:
        return 0.0, saved
    valid_GS = valid_BL.reshape(statics.groups, -1)
    value, pooled = backend.pool_balance(outputs.switches, [layer.switch for _, _, layer in places], valid_GS, statics)
    for (i, block, layer), switch in zip(places, pooled, strict=True):
        blocks[i] = blocks[i]._replace(saved=block._replace(feed_forward=layer._replace(switch=switch)))
    return value, saved._replace(blocks=tuple(blocks))


def loss_denominator(batch: Batch, statics: ModelStatics) -> float:
    """Return what the sum of a batch's cross-entropies is divided by."""
    return float(batch.weight_BL.size) if statics.loss_denominator == "targets" else max(float(batch.weight_BL.sum()), 1.0)


def hidden_forward(
    batch: Batch, params: ModelParams, noise: tuple[StackNoise, StackNoise], statics: ModelStatics, backend: Backend, recompute: bool = False
) -> tuple[StackOutputs, StackSaved, StackOutputs, StackSaved]:
    """Run encoder and decoder."""
    encoder_x_BMD = backend.embed_forward(batch.encoder_tokens_BM, params.embedding_VD)  # F1
    encoder_marks = batch.encoder_segment_BM, batch.encoder_valid_BM
    encoder, encoder_saved = stack_forward(
        encoder_x_BMD, encoder_x_BMD, params.encoder, *encoder_marks, *encoder_marks, batch.encoder_position_M, noise[0], statics.encoder, backend,
        recompute,
    )  # F2  # fmt: skip
    decoder_x_BLD = backend.embed_forward(batch.decoder_tokens_BL, params.embedding_VD)  # F3
    decoder_marks = batch.decoder_segment_BL, batch.decoder_valid_BL
    decoder, decoder_saved = stack_forward(
        decoder_x_BLD, encoder.out_BLD, params.decoder, *decoder_marks, *encoder_marks, batch.decoder_position_L, noise[1], statics.decoder, backend,
        recompute,
    )  # F4  # fmt: skip
    return encoder, encoder_saved, decoder, decoder_saved


def head_forward(out_BLD: np.ndarray, params: ModelParams, statics: ModelStatics, backend: Backend) -> np.ndarray:
    """Return logits_BLV."""
    if params.w_logits_DV is None:
        return backend.tied_logits_forward(out_BLD, params.embedding_VD, statics.decoder.around)
    return backend.logits_forward(out_BLD, params.w_logits_DV, statics.decoder.around)


def model_forward(
    batch: Batch,
    params: ModelParams,
    noise: tuple[StackNoise, StackNoise],
    statics: ModelStatics,
    backend: Backend,
    denominator: float | None = None,
    recompute: bool = False,
    soft: Soft | None = None,
) -> tuple[ModelOutputs, ModelSaved]:
    """Compute logits and the objective. `denominator` is that of the whole batch where this is a part of it; with a teacher the cross-entropy is
    the mixture of both.
    """
    encoder, encoder_saved, decoder, decoder_saved = hidden_forward(batch, params, noise, statics, backend, recompute)  # F1 to F4
    logits_BLV = head_forward(decoder.out_BLD, params, statics, backend)  # F5
    divided_by = loss_denominator(batch, statics) if denominator is None else denominator
    labels = batch.targets_BL, batch.weight_BL, divided_by, statics.label_smoothing, statics.logits_z_coef
    if soft is None:
        cross_entropy, cross_entropy_saved = backend.cross_entropy_forward(logits_BLV, *labels)  # F6
    else:
        cross_entropy, cross_entropy_saved = backend.distillation_forward(logits_BLV, soft.logits_BLV, *labels, soft.share, soft.temperature)  # F6
    counts = len(encoder.switches), len(decoder.switches)
    pooling = statics.encoder.dialect.aux.layers
    is_pooled = pooling == "average_then_product"
    aux_share = 1.0 / max(sum(counts), 1) if pooling == "mean" else 1.0
    z_shares = (1.0 / max(counts[0], 1), 1.0 / max(counts[1], 1)) if is_pooled else (aux_share, aux_share)
    aux_encoder, aux_decoder = (aux_share * sum(float(switch.aux_loss) for switch in stack.switches) for stack in (encoder, decoder))
    if is_pooled:
        aux_encoder, encoder_saved = pool_balance(encoder, encoder_saved, batch.encoder_valid_BM, statics.encoder, backend)
        aux_decoder, decoder_saved = pool_balance(decoder, decoder_saved, batch.decoder_valid_BL, statics.decoder, backend)
    z_encoder, z_decoder = (
        share * sum(float(switch.z_loss) for switch in stack.switches) for share, stack in zip(z_shares, (encoder, decoder), strict=True)
    )
    weighted_encoder = statics.encoder.aux_coef * aux_encoder + statics.encoder.z_coef * z_encoder
    weighted_decoder = statics.decoder.aux_coef * aux_decoder + statics.decoder.z_coef * z_decoder
    losses = Losses(cross_entropy, aux_encoder + aux_decoder, z_encoder + z_decoder, cross_entropy + weighted_encoder + weighted_decoder)  # F7
    saved = ModelSaved(batch, noise, encoder_saved, decoder_saved, decoder.out_BLD, cross_entropy_saved, soft is not None, aux_share, z_shares)
    return ModelOutputs(logits_BLV, losses, encoder, decoder), saved


def model_backward(dobjective: float, saved: ModelSaved, params: ModelParams, statics: ModelStatics, backend: Backend) -> ModelParams:
    """Return the gradient of the objective in every parameter."""
    batch, V, around = saved.batch, params.embedding_VD.shape[0], statics.decoder.around
    daux_encoder, daux_decoder = (dobjective * stack.aux_coef * saved.aux_share for stack in (statics.encoder, statics.decoder))  # B7
    dz_encoder, dz_decoder = (
        dobjective * stack.z_coef * share for stack, share in zip((statics.encoder, statics.decoder), saved.z_shares, strict=True)
    )  # B7
    loss_backward = backend.distillation_backward if saved.is_soft else backend.cross_entropy_backward
    dlogits_BLV = backend.rounded(loss_backward(dobjective, saved.cross_entropy), around.gradients)  # B6  R14
    dembedding_VD, dw_logits_DV = None, None
    if params.w_logits_DV is None:
        dout_BLD, dembedding_VD = backend.tied_logits_backward(dlogits_BLV, saved.decoder_out_BLD, params.embedding_VD, around)  # B5
    else:
        dout_BLD, dw_logits_DV = backend.logits_backward(dlogits_BLV, saved.decoder_out_BLD, params.w_logits_DV, around)  # B5
    ddecoder_x_BLD, dmemory_BMD, ddecoder = stack_backward(
        dout_BLD, daux_decoder, dz_decoder, saved.decoder, params.decoder, saved.noise[1], statics.decoder, backend
    )  # B4
    dembedding_decoder_VD = backend.embed_backward(ddecoder_x_BLD, batch.decoder_tokens_BL, V)  # B3
    dembedding_VD = dembedding_decoder_VD if dembedding_VD is None else backend.added(dembedding_VD, dembedding_decoder_VD, UNROUNDED)
    assert dmemory_BMD is not None, "a decoder's blocks read the memory"
    dencoder_x_BMD, _, dencoder = stack_backward(
        dmemory_BMD, daux_encoder, dz_encoder, saved.encoder, params.encoder, saved.noise[0], statics.encoder, backend
    )  # B2
    dembedding_encoder_VD = backend.embed_backward(dencoder_x_BMD, batch.encoder_tokens_BM, V)  # B1
    return ModelParams(backend.added(dembedding_VD, dembedding_encoder_VD, UNROUNDED), dencoder, ddecoder, dw_logits_DV)


def first_non_finite(outputs: ModelOutputs) -> str:
    """Return the name of the first place where a forward pass holds a NaN or an infinity, or an empty string: what a trainer says when it stops."""
    places: dict[str, np.ndarray] = {}
    for name, stack in (("encoder", outputs.encoder), ("decoder", outputs.decoder)):
        places |= {f"{name}.{'embedded' if i == 0 else f'blocks.{i - 1}'}": x_BLD for i, x_BLD in enumerate(stack.stream)}
        places[f"{name}.norm"] = stack.out_BLD
    places["logits"] = outputs.logits_BLV
    places |= {path: np.asarray(value) for path, value in leaves(outputs.losses).items()}
    return next((place for place, array in places.items() if not np.isfinite(array).all()), "")
