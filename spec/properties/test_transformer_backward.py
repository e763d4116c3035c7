# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The way back through blocks, stacks and the whole encoder-decoder: T-STACK-1, T-STACK-3, T-MODEL-2, T-MODEL-4, T-MODEL-5."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from properties.drawn import assert_equal, assert_slopes
from properties.harness import clause, draws, needs
from properties.model_scenes import KINDS, PLANS, SEEDS, SETTINGS, B, D, F, H, Kind, L, M, Setup, U, V, in_every_setting, routes_of, setup_of
from properties.operations import Operations
from properties.test_transformer import POOLED, STACKS, stack_arguments, streams
from refswitch.numbers.precision import round_to
from refswitch.reference.block import SwitchLayerSaved
from refswitch.reference.transformer import BlockParams, ModelParams, StackParams
from refswitch.tree import leaves, with_leaves
from refswitch.verify.tubes import OWN_UNIT

STEP = 2.0**-18  # short, so that the routes of many tokens stay


def assert_trees_equal(found: Any, wanted: Any) -> None:
    """Assert the same paths and the same numbers."""
    ours, theirs = leaves(found), leaves(wanted)
    assert set(ours) == set(theirs)
    for path, array in theirs.items():
        assert_equal(ours[path], array, path)


@clause("T-STACK-1", "T-STACK-3", is_oracle=True)
@needs(wide=True)
@draws(examples=in_every_setting(KINDS, ("decoder", "encoder")), plan=PLANS, kind=st.sampled_from(KINDS), name=STACKS)
def test_stack_backward__is_its_parts(operations: Operations, plan: tuple[int, int], kind: Kind, name: str) -> None:
    """To the bit the way back: dropout, norm, the blocks from the last to the first, sub-layers in mirror order, sums of memory and bias."""
    around, profile = SETTINGS[plan[0]]
    setup = setup_of(kind, plan[1], around, profile)
    arguments = stack_arguments(setup, name, *streams(setup, plan[1])[name])
    params, noise, statics = arguments[2], arguments[-2], arguments[-1]
    outputs, saved = operations.stack_forward(*arguments)
    dout_BLD = round_to(np.random.default_rng(plan[1]).normal(size=outputs.out_BLD.shape), around.gradients)
    losses = (0.5, -0.25)
    found = operations.stack_backward(dout_BLD, *losses, saved, params, noise, statics)
    dx_BLD, dnorm_D = operations.norm_backward(round_to(dout_BLD * noise.out_BLD, around.gradients), saved.norm, params.norm_D, around)
    dmemory_BMD: Any = 0.0
    dbias_HLL, dblocks = 0.0, []
    for block, kept in zip(params.blocks[::-1], saved.blocks[::-1], strict=True):
        whole = operations.block_backward(dx_BLD, *losses, kept, block, statics)
        norm_D, layer = block.feed_forward
        if isinstance(kept.feed_forward, SwitchLayerSaved):
            dx_BLD, dlayer = operations.switch_layer_backward(dx_BLD, *losses, kept.feed_forward, norm_D, layer, statics)
        else:
            dx_BLD, dlayer = operations.dense_layer_backward(dx_BLD, kept.feed_forward, norm_D, layer, statics)
        dhere_BMD, dcross = 0.0, None
        if block.cross_attention is not None:
            dx_BLD, dhere_BMD, dcross = operations.cross_attention_layer_backward(dx_BLD, kept.cross_attention, block.cross_attention, statics)
        dx_BLD, dbias_block_HLL, dself = operations.self_attention_layer_backward(dx_BLD, kept.self_attention, block.self_attention, statics)
        dblocks.insert(0, BlockParams(dself, dcross, dlayer))
        assert_trees_equal(whole, (dx_BLD, dhere_BMD, dbias_block_HLL, dblocks[0]))
        dmemory_BMD, dbias_HLL = dmemory_BMD + dhere_BMD, dbias_HLL + dbias_block_HLL
    dposition_UH = operations.position_bias_backward(dbias_HLL, saved.bucket_LL, U)
    assert_trees_equal(found, (dx_BLD * noise.embedded_BLD, dmemory_BMD, StackParams(tuple(dblocks), dposition_UH, dnorm_D)))


def differences(seed: int, arguments: dict[str, np.ndarray], gradients: dict[str, np.ndarray], size: float, value: Any) -> int:
    """Return along how many arguments a difference was compared with the gradient: those along which no route changes."""
    noise = size * OWN_UNIT * V * F * M * D  # as if every step rounded a sum of the size of the whole
    return assert_slopes(value, arguments, gradients, noise, np.random.default_rng(seed), must=False, step=STEP)


@clause("T-STACK-1", "T-STACK-3")
@needs("compared", wide=True)
@draws(seed=SEEDS, kind=st.sampled_from(KINDS), name=STACKS)
def test_stack_backward__finite_difference(operations: Operations, seed: int, kind: Kind, name: str) -> None:
    """The slopes along the stream, the memory and the position table, which every block reads, are the gradients; the encoder has no memory."""
    setup = setup_of(kind, seed)
    x_BLD, memory_BMD, params, *rest = stack_arguments(setup, name, *streams(setup, seed)[name])
    outputs, saved = operations.stack_forward(x_BLD, memory_BMD, params, *rest)
    dout_BLD = np.random.default_rng(seed).normal(size=outputs.out_BLD.shape)
    dx_BLD, dmemory_BMD, dparams = operations.stack_backward(dout_BLD, 0.5, -0.25, saved, params, rest[-2], rest[-1])
    arguments, gradients = {"x": x_BLD, "position": params.position_UH}, {"x": dx_BLD, "position": dparams.position_UH}
    if name == "decoder":
        arguments["memory"], gradients["memory"] = memory_BMD, dmemory_BMD
    else:
        assert not np.any(dmemory_BMD)

    def played(x: np.ndarray, position: np.ndarray, memory: np.ndarray = memory_BMD) -> Any:
        return operations.stack_forward(x, memory, params._replace(position_UH=position), *rest)[0]

    def value(**arrays: np.ndarray) -> tuple[float, np.ndarray]:
        there = played(**arrays)
        losses = sum(0.5 * float(layer.aux_loss) - 0.25 * float(layer.z_loss) for layer in there.switches)
        routes = [np.ravel(part) for layer in there.switches for part in layer.route]
        return float(np.sum(dout_BLD * there.out_BLD)) + losses, np.concatenate([np.zeros(1), *routes])

    compared = differences(seed, arguments, gradients, float(np.sum(np.abs(dout_BLD * outputs.out_BLD))) + 1.0, value)
    operations.meets("compared", compared == len(arguments))


def along_leaves(operations: Operations, setup: Setup, seed: int, paths: list[str] | None) -> tuple[int, int]:
    """Compare the objective's slope along one direction of all parameters, or of each of some; return how many were compared, and of how many."""
    outputs, saved = operations.model_forward(*setup)
    gradients = leaves(operations.model_backward(1.0, saved, setup.params, setup.statics))
    values = leaves(setup.params)
    assert set(gradients) == set(values)
    joint = {path: np.random.default_rng(seed).normal(size=value.shape) for path, value in values.items()}
    arguments = {path: values[path] for path in paths} if paths is not None else {"t": np.zeros(1)}
    slope = sum(float(np.sum(joint[path] * gradients[path])) for path in values)
    wanted = {path: gradients[path] for path in paths} if paths is not None else {"t": np.array([slope])}

    def value(**arrays: np.ndarray) -> tuple[float, np.ndarray]:
        if paths is None:
            params = with_leaves(setup.params, {path: value + arrays["t"] * joint[path] for path, value in values.items()})
        else:
            params = with_leaves(setup.params, {**values, **arrays})
        there, _ = operations.model_forward(setup.batch, params, setup.noise, setup.statics)
        return float(there.losses.objective), np.concatenate([np.zeros(1), *(np.ravel(part) for part in routes_of(there))])

    return differences(seed, arguments, wanted, abs(outputs.losses.objective), value), len(arguments)


KINDS_AND_POOLED = st.one_of(st.sampled_from(KINDS), POOLED.map(lambda dialect: Kind(dialect, False, "weights", (True, True), (False, True))))


@clause("T-MODEL-2", "T-MODEL-5")
@needs("compared", wide=True)
@draws(seed=SEEDS, kind=KINDS_AND_POOLED)
def test_model_backward__finite_difference(operations: Operations, seed: int, kind: Kind) -> None:
    """The objective's slope along a direction of all parameters at once, with dropout, packing, noise, drops, under every pooling."""
    compared, _ = along_leaves(operations, setup_of(kind, seed), seed, None)
    operations.meets("compared", compared)


@clause("T-MODEL-5")
@needs("compared", wide=True)
@draws(seed=SEEDS, kind=KINDS_AND_POOLED, fewer=7)
def test_model_backward__parameter_by_parameter(operations: Operations, seed: int, kind: Kind) -> None:
    """The objective's slope along each parameter by itself is its gradient, at equal routes."""
    setup = setup_of(kind, seed)
    compared, of = along_leaves(operations, setup, seed, list(leaves(setup.params)))
    operations.meets("compared", 2 * compared > of)


@clause("T-MODEL-5", is_oracle=True)
@needs("tied", "untied", wide=True)
@draws(examples=in_every_setting(KINDS), plan=PLANS, kind=st.sampled_from(KINDS))
def test_model_backward__is_its_parts(operations: Operations, plan: tuple[int, int], kind: Kind) -> None:
    """To the bit: the loss's gradient, rounded, through the logits, decoder and encoder; the table's three gradients are added."""
    setup = setup_of(kind, plan[1], *SETTINGS[plan[0]])
    batch, params, noise, statics = setup
    outputs, saved = operations.model_forward(*setup)
    found = operations.model_backward(2.0, saved, params, statics)
    around, out_BLD = statics.decoder.around, outputs.decoder.out_BLD
    operations.meets("tied" if kind.tied else "untied")
    dlogits_BLV = round_to(operations.cross_entropy_backward(2.0, saved.cross_entropy), around.gradients)
    if kind.tied:
        dout_BLD, dtable_VD = operations.tied_logits_backward(dlogits_BLV, out_BLD, params.embedding_VD, around)
        dw_logits_DV = None
    else:
        dout_BLD, dw_logits_DV = operations.logits_backward(dlogits_BLV, out_BLD, params.w_logits_DV, around)
        dtable_VD = np.zeros((V, D))
    layers = [len(outputs.encoder.switches), len(outputs.decoder.switches)]
    pooling = statics.encoder.dialect.aux.layers
    aux, z = {
        "sum": ((1.0, 1.0), (1.0, 1.0)),
        "mean": ((1.0 / max(sum(layers), 1),) * 2,) * 2,
        "average_then_product": ((1.0, 1.0), tuple(1.0 / max(count, 1) for count in layers)),
    }[pooling]
    ddecoder_x_BLD, dmemory_BMD, ddecoder = operations.stack_backward(
        dout_BLD, 2.0 * statics.decoder.aux_coef * aux[1], 2.0 * statics.decoder.z_coef * z[1], saved.decoder, params.decoder, noise[1],
        statics.decoder,
    )  # fmt: skip
    dencoder_x_BMD, _, dencoder = operations.stack_backward(
        dmemory_BMD, 2.0 * statics.encoder.aux_coef * aux[0], 2.0 * statics.encoder.z_coef * z[0], saved.encoder, params.encoder, noise[0],
        statics.encoder,
    )  # fmt: skip
    dtable_VD = dtable_VD + operations.embed_backward(ddecoder_x_BLD, batch.decoder_tokens_BL, V)
    dtable_VD = dtable_VD + operations.embed_backward(dencoder_x_BMD, batch.encoder_tokens_BM, V)
    assert_trees_equal(found, ModelParams(dtable_VD, dencoder, ddecoder, dw_logits_DV))


@clause("T-MODEL-5")
@needs(wide=True)
@draws(seed=SEEDS, kind=st.sampled_from(KINDS), factor=st.sampled_from((0.0, -2.0, 0.25)))
def test_model_backward__homogeneity(operations: Operations, seed: int, kind: Kind, factor: float) -> None:
    """The gradient of a multiple of the objective is that multiple of the gradient, to the bit for powers of two."""
    setup = setup_of(kind, seed)
    _, saved = operations.model_forward(*setup)
    one = leaves(operations.model_backward(1.0, saved, setup.params, setup.statics))
    other = leaves(operations.model_backward(factor, saved, setup.params, setup.statics))
    for path, array in one.items():
        assert_equal(other[path], factor * array, path)


@clause("T-MODEL-4")
@needs(wide=True)
@draws(seed=SEEDS, sparse=st.sampled_from(((False, False), (False, True))))
def test_model_backward__unseen_tokens_have_no_gradient(operations: Operations, seed: int, sparse: tuple[bool, ...]) -> None:
    """The loss of a row's first segment up to a place gives no gradient to what comes later, to padding, to other segments and rows."""
    setup = setup_of(Kind(sparse=sparse, tied=False, drops=False), seed)
    batch, statics = setup.batch, setup.statics
    b, until = 1, 1 + seed % 3
    weight_BL = np.zeros((B, L))
    weight_BL[b, until - 1] = 1.0
    seen_BM = (np.arange(B)[:, None] == b) & (batch.encoder_segment_BM == 1)
    seen_BL = (np.arange(B)[:, None] == b) & (np.arange(L) < until)
    apart = batch._replace(
        encoder_tokens_BM=np.where(seen_BM, batch.encoder_tokens_BM % (V - 1), V - 1),
        decoder_tokens_BL=np.where(seen_BL, batch.decoder_tokens_BL % (V - 1), V - 1),
        weight_BL=weight_BL,
    )
    quiet = statics._replace(encoder=statics.encoder._replace(aux_coef=0.0, z_coef=0.0), decoder=statics.decoder._replace(aux_coef=0.0, z_coef=0.0))
    _, saved = operations.model_forward(apart, setup.params, setup.noise, quiet)
    gradients = operations.model_backward(1.0, saved, setup.params, quiet)
    assert not gradients.embedding_VD[V - 1].any()
    assert gradients.embedding_VD[: V - 1].any()
    assert gradients.encoder.position_UH.shape == (U, H)
