# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Blocks, stacks and the whole encoder-decoder, forward: T-STACK-1, T-STACK-2, T-MODEL-1 to T-MODEL-4. Next: `test_transformer_backward`."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from properties.drawn import assert_equal
from properties.harness import clause, draws, needs
from properties.model_scenes import KINDS, PLANS, SEEDS, SETTINGS, B, D, E, Kind, L, M, Setup, U, in_every_setting, setup_of
from properties.operations import Operations
from refswitch.numbers.precision import round_to
from refswitch.reference.switch import SwitchParams
from refswitch.reference.transformer import ModelOutputs, StackOutputs
from refswitch.tree import leaves
from refswitch.verify.tubes import OWN_UNIT

STACKS = st.sampled_from(("encoder", "decoder"))
POOLED = st.sampled_from(
    (
        "hf_4_57",
        "hf_ge_5_18,select.rule=sample",
        "hf_4_57,select.rule=sample",
        "hf_4_57,aux.denom=valid,aux.P_pads=exclude,aux.f.pads=exclude",
        "hf_4_57,pad.route=exclude,aux.pad_scale=nonpad_fraction,aux.f.drops=exclude",
    )
)

LAYERS = (((True, True), (False, True)), ((False,), (True, False, True)), ((False, True), (True, True)))  # sparse ones of encoder and decoder
POOLED_ALWAYS = [(1, "hf_ge_5_18,select.rule=sample", LAYERS[0]), (2, "hf_4_57,select.rule=sample", LAYERS[2])]
SUMMED = [kind for kind in KINDS if not kind.dialect.startswith("hf")]
SUMMED.insert(0, Kind("flax_masked_switch_base", False, "weights", sparse=(False, False), decoder=(False, True)))  # one sparse layer in all


def stack_arguments(setup: Setup, name: str, x: np.ndarray, memory: np.ndarray) -> tuple[Any, ...]:
    """Return what stack_forward reads after the stream and the memory."""
    batch = setup.batch
    encoder = batch.encoder_segment_BM, batch.encoder_valid_BM
    if name == "encoder":
        return x, x, setup.params.encoder, *encoder, *encoder, batch.encoder_position_M, setup.noise[0], setup.statics.encoder
    decoder = batch.decoder_segment_BL, batch.decoder_valid_BL
    return x, memory, setup.params.decoder, *decoder, *encoder, batch.decoder_position_L, setup.noise[1], setup.statics.decoder


def streams(setup: Setup, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Draw what the stacks embed, and a memory."""
    random, around = np.random.default_rng(seed), setup.statics.encoder.around
    x_BMD, x_BLD, memory_BMD = (round_to(random.normal(size=shape), around.activations) for shape in ((B, M, D), (B, L, D), (B, M, D)))
    return {"encoder": (x_BMD, x_BMD), "decoder": (x_BLD, memory_BMD)}


@clause("T-STACK-1", "T-STACK-2", is_oracle=True)
@needs("dense", "sparse", wide=True)
@draws(examples=in_every_setting(KINDS, ("decoder", "encoder")), plan=PLANS, kind=st.sampled_from(KINDS), name=STACKS)
def test_stack_forward__is_its_parts(operations: Operations, plan: tuple[int, int], kind: Kind, name: str) -> None:
    """To the bit: dropout, then block for block self, cross where it has one, dense or sparse, with one bias for all, then norm and dropout."""
    around, profile = SETTINGS[plan[0]]
    setup = setup_of(kind, plan[1], around, profile)
    arguments = stack_arguments(setup, name, *streams(setup, plan[1])[name])
    x_BLD, memory_BMD, params, segment_BL, valid_BL, memory_segment_BM, memory_valid_BM, position_L, noise, statics = arguments
    outputs, _ = operations.stack_forward(*arguments)
    bucket_LL = operations.position_buckets(position_L, position_L, U, statics.max_distance, name == "encoder")
    bias_HLL = operations.position_bias_forward(params.position_UH, bucket_LL)
    own_BLL = operations.allowed_pairs(segment_BL, segment_BL, valid_BL, name == "decoder")
    cross_BLM = operations.allowed_pairs(segment_BL, memory_segment_BM, memory_valid_BM, False)
    x_BLD = round_to(x_BLD * noise.embedded_BLD, around.activations)
    stream, switches = [x_BLD], []
    for block, here in zip(params.blocks, noise.blocks, strict=True):
        y_BLD, given, _ = operations.block_forward(x_BLD, memory_BMD, bias_HLL, block, own_BLL, cross_BLM, valid_BL, here, statics)
        attention = block.self_attention
        x_BLD, _ = operations.self_attention_layer_forward(x_BLD, bias_HLL, attention, own_BLL, here.self_probs_BHLL, here.self_out_BLD, statics)
        if block.cross_attention is not None:
            x_BLD, _ = operations.cross_attention_layer_forward(
                x_BLD, memory_BMD, block.cross_attention, cross_BLM, here.cross_probs_BHLM, here.cross_out_BLD, statics
            )
        norm_D, layer = block.feed_forward
        if isinstance(layer, SwitchParams):
            operations.meets("sparse")
            x_BLD, switch, _ = operations.switch_layer_forward(x_BLD, norm_D, layer, valid_BL, here.router, here.hidden_BLF, here.out_BLD, statics)
            switches.append(switch)
        else:
            operations.meets("dense")
            x_BLD, _ = operations.dense_layer_forward(x_BLD, norm_D, layer, here.hidden_BLF, here.out_BLD, statics)
        assert_equal(y_BLD, x_BLD, "y_BLD")
        assert len(given) == isinstance(layer, SwitchParams)
        stream.append(x_BLD)
    normed_BLD, _ = operations.norm_forward(x_BLD, params.norm_D, statics.norm_epsilon, around)
    wanted = StackOutputs(round_to(normed_BLD * noise.out_BLD, around.activations), tuple(stream), tuple(switches))
    found = leaves(outputs)
    assert set(found) == set(leaves(wanted))
    for path, array in leaves(wanted).items():
        assert_equal(found[path], array, path)


@clause("T-STACK-1", "T-STACK-2")
@needs(wide=True)
@draws(seed=SEEDS, name=STACKS)
def test_stack_forward__one_block_after_the_other(operations: Operations, seed: int, name: str) -> None:
    """A stack of two blocks is a stack of the first, whose stream the second's reads: to the bit, position table and marks being the stack's."""
    setup = setup_of(Kind(), seed)
    arguments = list(stack_arguments(setup, name, *streams(setup, seed)[name]))
    params, noise = arguments[2], arguments[-2]
    whole, _ = operations.stack_forward(*arguments)
    first = [*arguments[:2], params._replace(blocks=params.blocks[:1]), *arguments[3:-2], noise._replace(blocks=noise.blocks[:1]), arguments[-1]]
    half, _ = operations.stack_forward(*first)
    later = noise._replace(embedded_BLD=np.ones_like(noise.embedded_BLD), blocks=noise.blocks[1:])
    second = [half.stream[-1], arguments[1], params._replace(blocks=params.blocks[1:]), *arguments[3:-2], later, arguments[-1]]
    rest, _ = operations.stack_forward(*second)
    assert (len(whole.stream), len(whole.switches), len(half.switches)) == (3, 1, 0)
    assert_equal(half.stream[-1], whole.stream[1], "stream_BLD")
    assert_equal(rest.out_BLD, whole.out_BLD, "out_BLD")


@clause("T-STACK-2")
@needs(wide=True)
@draws(seed=SEEDS, name=STACKS)
def test_stack_forward__dropped_out(operations: Operations, seed: int, name: str) -> None:
    """Where the embedded tokens are dropped out they do not matter; where the output is, it is 0."""
    setup = setup_of(Kind(), seed)
    arguments = list(stack_arguments(setup, name, *streams(setup, seed)[name]))
    noise = arguments[-2]
    out_BLD, *_ = operations.stack_forward(*arguments[:-2], noise._replace(out_BLD=0.0 * noise.out_BLD), arguments[-1])[0]
    assert not out_BLD.any()
    arguments[-2] = noise._replace(embedded_BLD=0.0 * noise.embedded_BLD)
    one, _ = operations.stack_forward(*arguments)
    other, _ = operations.stack_forward(2.0 * arguments[0], *arguments[1:])
    assert_equal(other.out_BLD, one.out_BLD, "out_BLD")
    assert_equal(one.stream[0], 0.0 * arguments[0], "stream_BLD")


def assert_sum(value: float, terms: list[float], word: str) -> None:
    """Assert that a value is the sum of terms, in whatever order they were added."""
    assert abs(value - sum(terms)) <= 4.0 * len(terms) * OWN_UNIT * sum(abs(term) for term in terms), f"{word} is {value!r}, not {sum(terms)!r}"


def parts(setup: Setup, outputs: ModelOutputs) -> tuple[list[list[float]], list[list[float]]]:
    """Return each stack's balance losses and z-losses, layer by layer."""
    stacks = outputs.encoder, outputs.decoder
    return [[float(s.aux_loss) for s in stack.switches] for stack in stacks], [[float(s.z_loss) for s in stack.switches] for stack in stacks]


@clause("T-MODEL-1", "T-MODEL-3")
@needs("summed", "averaged", "tied", "untied", wide=True)
@draws(examples=in_every_setting(SUMMED), plan=PLANS, kind=st.sampled_from(SUMMED))
def test_model_forward__objective(operations: Operations, plan: tuple[int, int], kind: Kind) -> None:
    """Encoder, decoder, logits and loss follow from one another; the objective adds each stack's coefficients times its layers' losses."""
    setup = setup_of(kind, plan[1], *SETTINGS[plan[0]])
    batch, params, statics = setup.batch, setup.params, setup.statics
    outputs, _ = operations.model_forward(*setup)
    encoder_x_BMD, decoder_x_BLD = (
        operations.embed_forward(tokens, params.embedding_VD) for tokens in (batch.encoder_tokens_BM, batch.decoder_tokens_BL)
    )
    encoder, _ = operations.stack_forward(*stack_arguments(setup, "encoder", encoder_x_BMD, encoder_x_BMD))
    decoder, _ = operations.stack_forward(*stack_arguments(setup, "decoder", decoder_x_BLD, encoder.out_BLD))
    assert_equal(outputs.encoder.out_BLD, encoder.out_BLD, "encoder_out_BMD")
    assert_equal(outputs.decoder.out_BLD, decoder.out_BLD, "decoder_out_BLD")
    operations.meets("tied" if kind.tied else "untied")
    if kind.tied:
        logits_BLV = operations.tied_logits_forward(decoder.out_BLD, params.embedding_VD, statics.decoder.around)
    else:
        logits_BLV = operations.logits_forward(decoder.out_BLD, params.w_logits_DV, statics.decoder.around)
    assert_equal(outputs.logits_BLV, logits_BLV, "logits_BLV")
    denominator = B * L if kind.denominator == "targets" else batch.weight_BL.sum()
    loss, _ = operations.cross_entropy_forward(
        logits_BLV, batch.targets_BL, batch.weight_BL, denominator, statics.label_smoothing, statics.logits_z_coef
    )
    assert outputs.losses.cross_entropy == loss
    (aux, z), pooling = parts(setup, outputs), statics.encoder.dialect.aux.layers
    layers = len(aux[0] + aux[1])
    share = 1.0 / layers if pooling == "mean" else 1.0
    operations.meets("averaged" if pooling == "mean" else "summed")
    assert pooling in ("mean", "sum")
    assert_sum(outputs.losses.aux_loss, [share * term for term in aux[0] + aux[1]], "the balance loss")
    assert_sum(outputs.losses.z_loss, [share * term for term in z[0] + z[1]], "the z-loss")
    weighted = [
        share * (stack.aux_coef * one + stack.z_coef * other)
        for stack, ones, others in zip((statics.encoder, statics.decoder), aux, z, strict=True)
        for one, other in zip(ones, others, strict=True)
    ]
    assert_sum(outputs.losses.objective, [loss, *weighted], "the objective")


@clause("T-MODEL-2")
@needs("a dropped token", "a choice that is not the highest logit's", wide=True)
@draws(examples=POOLED_ALWAYS, seed=SEEDS, dialect=POOLED, sparse=st.sampled_from(LAYERS))
def test_model_forward__pooled_balance(operations: Operations, seed: int, dialect: str, sparse: tuple[tuple[bool, ...], tuple[bool, ...]]) -> None:
    """f and P are counted token by token over all layers of a stack before they are multiplied; the z-loss is a stack's mean."""
    setup = setup_of(Kind(dialect, True, "weights", *sparse), seed)
    outputs, _ = operations.model_forward(*setup)
    _, z = parts(setup, outputs)
    knobs, balances = setup.statics.encoder.dialect, []
    marks = setup.batch.encoder_valid_BM, setup.batch.decoder_valid_BL
    for stack, valid, statics in zip((outputs.encoder, outputs.decoder), marks, (setup.statics.encoder, setup.statics.decoder), strict=True):
        G, value = statics.groups, 0.0
        valid_GS = valid.reshape(G, -1)
        for g in range(G if stack.switches else 0):
            f_E, P_E, rows = np.zeros(E), np.zeros(E), 0
            for layer in stack.switches:
                for s, is_valid in enumerate(valid_GS[g]):
                    chosen = int(layer.route.expert_GS[g, s])
                    highest = int(np.argmax(layer.logits_GSE[g, s]))
                    booked = highest if knobs.aux.f.count == "logits" else chosen
                    dropped = not layer.route.kept_GS[g, s] and (is_valid or knobs.pad.route != "exclude")
                    operations.meets("a dropped token", dropped)
                    operations.meets("a choice that is not the highest logit's", chosen != highest)
                    booked = 0 if dropped and knobs.aux.f.drops == "to_expert0" else booked
                    counts = not (dropped and knobs.aux.f.drops == "exclude") and (is_valid or knobs.aux.f.pads != "exclude")
                    f_E[booked] += counts
                    P_E += layer.probs_GSE[g, s] * (is_valid or knobs.aux.P_pads != "exclude")
                    rows += is_valid or knobs.aux.denom != "valid"
            share = valid_GS[g].mean() if knobs.aux.pad_scale == "nonpad_fraction" else 1.0
            value += share * E * float(np.sum((f_E / max(rows, 1)) * (P_E / max(rows, 1)))) / G
        balances.append(value)
    means = [np.mean(terms) if terms else 0.0 for terms in z]
    assert [type(loss) for loss in outputs.losses] == [float] * 4
    near = 64.0 * OWN_UNIT * E * B * M
    assert abs(outputs.losses.aux_loss - sum(balances)) <= near * sum(balances)
    assert abs(outputs.losses.z_loss - sum(means)) <= near * sum(means)
    stacks = zip((setup.statics.encoder, setup.statics.decoder), balances, means, strict=True)
    objective = outputs.losses.cross_entropy + sum(statics.aux_coef * one + statics.z_coef * other for statics, one, other in stacks)
    assert abs(outputs.losses.objective - objective) <= near * objective


@clause("T-MODEL-3")
@needs(wide=True)
@draws(seed=SEEDS, denominator=st.sampled_from(("targets", "weights")))
def test_model_forward__denominator(operations: Operations, seed: int, denominator: str) -> None:
    """Twice the weights are twice the loss per position, and the same loss per weight; weights that sum to less than 1 are divided by 1."""
    setup = setup_of(Kind(denominator=denominator), seed)

    def loss(factor: float) -> float:
        batch = setup.batch._replace(weight_BL=factor * setup.batch.weight_BL)
        return float(operations.model_forward(batch, *setup[1:])[0].losses.cross_entropy)

    total = float(setup.batch.weight_BL.sum())
    assert loss(2.0) == (loss(1.0) if denominator == "weights" else 2.0 * loss(1.0))
    assert_sum(loss(2.0**-8), [2.0**-8 * total * loss(1.0) if denominator == "weights" else 2.0**-8 * loss(1.0)], "the loss")
    assert loss(0.0) == 0.0


def reached(setup: Setup, encoder_BM: np.ndarray, decoder_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which outputs of the encoder and which logits these tokens may change."""
    batch = setup.batch
    own_BM, own_BL, valid_BM, valid_BL = batch.encoder_segment_BM, batch.decoder_segment_BL, batch.encoder_valid_BM, batch.decoder_valid_BL
    memory_BM, logits_BL = encoder_BM.copy(), decoder_BL.copy()
    for b in range(B):
        for m in range(M):
            memory_BM[b, m] |= bool(np.any((own_BM[b] == own_BM[b, m]) & valid_BM[b] & encoder_BM[b]))
        direct_L = [decoder_BL[b, q] or bool(np.any((own_BM[b] == own_BL[b, q]) & valid_BM[b] & memory_BM[b])) for q in range(L)]
        for q in range(L):
            logits_BL[b, q] |= direct_L[q] or any(direct_L[n] for n in range(q) if own_BL[b, n] == own_BL[b, q] and valid_BL[b, n])
    return memory_BM, logits_BL


@clause("T-MODEL-4")
@needs("an unreached logit", "a reached logit", "a changed padding", wide=True)
@draws(seed=SEEDS, sparse=st.sampled_from(((False, False), (False, True))), quiet=st.booleans())
def test_model_forward__who_sees_whom(operations: Operations, seed: int, sparse: tuple[bool, ...], quiet: bool) -> None:
    """Tokens of the future, of padding, of other segments and rows change no bit of a logit, where no capacity binds; the others do."""
    setup = setup_of(Kind(sparse=sparse, drops=False, quiet=quiet), seed)
    random = np.random.default_rng(seed)
    encoder_BM, decoder_BL = (random.random(shape) < 1 / 8 for shape in ((B, M), (B, L)))
    batch = setup.batch._replace(
        encoder_tokens_BM=np.where(encoder_BM, setup.batch.encoder_tokens_BM % 10 + 1, setup.batch.encoder_tokens_BM),
        decoder_tokens_BL=np.where(decoder_BL, setup.batch.decoder_tokens_BL % 10 + 1, setup.batch.decoder_tokens_BL),
    )
    one, other = operations.model_forward(*setup)[0], operations.model_forward(batch, *setup[1:])[0]
    memory_BM, logits_BL = reached(setup, encoder_BM, decoder_BL)
    operations.meets("an unreached logit", not logits_BL.all())
    operations.meets("a reached logit", logits_BL.any())
    operations.meets("a changed padding", (encoder_BM & ~batch.encoder_valid_BM).any() or (decoder_BL & ~batch.decoder_valid_BL).any())
    assert_equal(other.encoder.out_BLD[~memory_BM], one.encoder.out_BLD[~memory_BM], "encoder_out")
    assert_equal(other.logits_BLV[~logits_BL], one.logits_BLV[~logits_BL], "logits")
    if quiet:  # dropout may hide the only way
        assert np.any(other.logits_BLV != one.logits_BLV, axis=-1)[logits_BL].all()
