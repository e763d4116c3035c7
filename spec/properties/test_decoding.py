# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Decoding one token at a time: the cache, greedy and sampled choices, whole rows: T-DEC-1 to T-DEC-4."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from properties.drawn import Plan, Scene, assert_equal, plans
from properties.harness import clause, draws, needs
from properties.model_scenes import PLANS, SEEDS, SETTINGS, B, D, F, H, K, Kind, L, M, Setup, V, in_every_setting, setup_of
from properties.operations import Operations
from refswitch.model_setup import no_noise
from refswitch.reference.block import StackStatics
from refswitch.reference.decoding import Cache
from refswitch.verify.tubes import OWN_UNIT

DECODED = (
    Kind(drops=False, quiet=True),
    Kind("flax_masked_switch_base", False, sparse=(True,), decoder=(True, False, True), drops=False, quiet=True),
    Kind("mesh_tensorflow,priority=random", sparse=(True,), drops=False, quiet=True),
)


def unpacked(setup: Setup) -> Setup:
    """Return the setup with one segment per row: decoding starts a sequence of its own; padding of the encoder stays."""
    batch, whole = setup.batch, np.ones((B, L), int)
    return setup._replace(
        batch=batch._replace(
            encoder_segment_BM=np.ones((B, M), int), decoder_segment_BL=whole, decoder_valid_BL=whole == 1, decoder_tokens_BL=batch.decoder_tokens_BL
        )
    )


def step_statics(setup: Setup, rows: int = B) -> StackStatics:
    """Return the decoder's statics for steps: each token is a group of its own."""
    return setup.statics.decoder._replace(groups=rows)


def memory_of(operations: Operations, setup: Setup) -> np.ndarray:
    """Return the encoder's output."""
    return operations.model_forward(*setup)[0].encoder.out_BLD


def stepped(operations: Operations, setup: Setup, memory_BMD: np.ndarray, tokens_BL: np.ndarray, groups: int = B) -> tuple[np.ndarray, Cache]:
    """Feed tokens one by one, a step's cut into groups; return the logits of each step and the last cache."""
    cache = operations.start_cache(memory_BMD, setup.batch.encoder_valid_BM, setup.params, setup.statics.decoder.around)
    steps = []
    for token_B in tokens_BL.T:
        logits_BV, cache = operations.decode_step(token_B, cache, setup.params, step_statics(setup, groups))
        steps.append(logits_BV)
    return np.stack(steps, axis=1), cache


@clause("T-DEC-1")
@needs("padding in the memory", "sparse", wide=True)
@draws(examples=[(i, kind, 1) for i, kind in enumerate(DECODED)], seed=SEEDS, kind=st.sampled_from(DECODED), groups=st.sampled_from((B, 1)))
def test_decode_step__is_the_whole_pass(operations: Operations, seed: int, kind: Kind, groups: int) -> None:
    """Teacher-forced steps have the logits of one pass over all tokens, to the roundings of float64, where no capacity binds."""
    setup = unpacked(setup_of(kind, seed))
    outputs, _ = operations.model_forward(*setup)
    logits_BLV, cache = stepped(operations, setup, outputs.encoder.out_BLD, setup.batch.decoder_tokens_BL, groups)
    operations.meets("padding in the memory", not setup.batch.encoder_valid_BM.all())
    operations.meets("sparse", len(outputs.decoder.switches) > 0)
    terms = D * F * H * K * len(setup.params.decoder.blocks)  # as if every step rounded the largest logit
    assert np.max(np.abs(logits_BLV - outputs.logits_BLV)) <= terms * 2.0 * OWN_UNIT * np.max(np.abs(outputs.logits_BLV))
    assert cache.position == L
    for own, cross in zip(cache.own, cache.cross, strict=True):
        assert [array.shape for array in (*own, *cross)] == [(B, L, H, K)] * 2 + [(B, M, H, K)] * 2


@clause("T-DEC-1")
@needs("narrow points", wide=True)
@draws(examples=in_every_setting(DECODED), plan=PLANS, kind=st.sampled_from(DECODED))
def test_decode_step__first_token_in_every_format(operations: Operations, plan: tuple[int, int], kind: Kind) -> None:
    """The first step has the bits of a pass over one token, rounded at the same points."""
    setup = unpacked(setup_of(kind, plan[1], *SETTINGS[plan[0]]))
    wide = setup.params.embedding_VD * (1.0 + 2.0**-20)  # a table that keeps more digits than what is handed on
    setup = setup._replace(params=setup.params._replace(embedding_VD=wide))
    operations.meets("narrow points", plan[0] > 0)
    memory_BMD, batch = memory_of(operations, setup), setup.batch
    x_BLD = operations.embed_forward(batch.decoder_tokens_BL[:, :1], setup.params.embedding_VD)
    one = setup.statics._replace(decoder=step_statics(setup))
    _, short = no_noise(setup.params, one, B, M, 1)
    marks = batch.decoder_segment_BL[:, :1], batch.decoder_valid_BL[:, :1], batch.encoder_segment_BM, batch.encoder_valid_BM, np.arange(1)
    whole, _ = operations.stack_forward(x_BLD, memory_BMD, setup.params.decoder, *marks, short, step_statics(setup))
    around = setup.statics.decoder.around
    if kind.tied:
        logits_BLV = operations.tied_logits_forward(whole.out_BLD, setup.params.embedding_VD, around)
    else:
        logits_BLV = operations.logits_forward(whole.out_BLD, setup.params.w_logits_DV, around)
    assert_equal(stepped(operations, setup, memory_BMD, batch.decoder_tokens_BL[:, :1])[0], logits_BLV, "logits_BLV")


@clause("T-DEC-1")
@needs("narrow points", wide=True)
@draws(plan=plans("BLMDHK"))
def test_attend__is_attention(operations: Operations, plan: Plan) -> None:
    """Attention to projected keys and values has the bits of attention without dropout, rounded at the same points."""
    scene = Scene(operations, plan)
    params = setup_of(Kind()).params.decoder.blocks[0].self_attention.attention
    params = type(params)(*(scene.normal(letters) for letters in ("DHK", "DHK", "DHK", "HKD")))
    x_BLD, memory_BMD, bias_HLM = scene.normal("BLD"), scene.normal("BMD"), scene.normal("HLM")
    allowed_BLM = scene.random.random(scene.shape("BLM")) < 0.7
    memory = operations.project(memory_BMD, params, scene.points)
    out_BLD, _ = operations.attention_forward(x_BLD, memory_BMD, bias_HLM, params, allowed_BLM, scene.ones("BHLM"), scene.points)
    assert_equal(operations.attend(x_BLD, memory, bias_HLM, allowed_BLM, params, scene.points), out_BLD, "out_BLD")


@clause("T-DEC-2")
@needs("a tie of the highest")
@draws(plan=plans("BV", points=0), levels=st.integers(1, 4))
def test_pick_greedy__lowest_of_the_highest(operations: Operations, plan: Plan, levels: int) -> None:
    """The first index that holds the row's largest logit."""
    scene = Scene(operations, plan)
    logits_BV = scene.array(scene.below("BV", levels) - 2.0)
    token_B = operations.pick_greedy(logits_BV)
    operations.meets("a tie of the highest", any(list(row).count(max(row)) > 1 for row in logits_BV))
    assert token_B.tolist() == [list(row).index(max(row)) for row in logits_BV]


def shares(operations: Operations, share_V: np.ndarray, top_p: float, temperature: float, grid: int) -> list[int]:
    """Return how often each token is drawn by the middles of `grid` equal parts of [0, 1); `share_V` are whole parts of their sum."""
    logits_BV = np.tile(temperature * np.log(share_V), (grid, 1))
    token_B = operations.pick_sampled(logits_BV, (np.arange(grid) + 0.5) / grid, temperature, top_p)
    return np.bincount(token_B, minlength=len(share_V)).tolist()


@clause("T-DEC-3")
@needs("a token outside of the nucleus", "equal tokens at its border", "another temperature", wide=True)
@draws(examples=[(1, 1.0, 40), (2, 4.0, 5)], seed=SEEDS, temperature=st.sampled_from((1.0, 0.5, 4.0)), words=st.sampled_from((2, 3, 5, 40)))
def test_pick_sampled__exact_shares(operations: Operations, seed: int, temperature: float, words: int) -> None:
    """Probabilities that are whole parts of a sum: every token of the nucleus is drawn in exactly its share of an even grid, no other at all."""
    random = np.random.default_rng(seed)
    share_V = random.integers(1, 5, words)
    total = int(share_V.sum())
    order = sorted(range(words), key=lambda v: (-share_V[v], v))
    count = int(random.integers(1, words + 1))
    inside = order[:count]
    reach = sum(int(share_V[v]) for v in inside)
    # the cut lies in the middle of the last one's share, far from where a rounding decides
    top_p = 1.0 if count == words else (reach - 0.5) / total
    operations.meets("a token outside of the nucleus", count < words)
    operations.meets("equal tokens at its border", count < words and share_V[order[count - 1]] == share_V[order[count]])
    operations.meets("another temperature", temperature != 1.0)
    wanted = [7 * int(share_V[v]) if v in inside else 0 for v in range(words)]
    assert shares(operations, share_V, top_p, temperature, 7 * reach) == wanted


@clause("T-DEC-3")
@draws()
def test_pick_sampled__by_hand(operations: Operations) -> None:
    """Probabilities 0.5, 0.3, 0.2: a nucleus of 0.6 holds two tokens, renormalised; one of nothing the first; a uniform picks in falling order."""
    logits_BV = np.log(np.array([[0.2, 0.5, 0.3]] * 4))
    uniform_B = np.array([0.0, 0.6, 0.63, 0.999])
    assert operations.pick_sampled(logits_BV, uniform_B, 1.0, 0.6).tolist() == [1, 1, 2, 2]
    assert operations.pick_sampled(logits_BV, uniform_B, 1.0, 1.0).tolist() == [1, 2, 2, 0]
    assert operations.pick_sampled(logits_BV, uniform_B, 1.0, 0.0).tolist() == [1, 1, 1, 1]
    assert operations.pick_sampled(np.array([[0.0, 0.0], [-900.0, 900.0]]), np.array([0.25, 0.75]), 0.5, 1.0).tolist() == [0, 1]
    evens_BV = np.zeros((1, 2))  # at the borders: half is reached by one token, and half is not below the uniform that picks the second
    assert operations.pick_sampled(evens_BV, np.array([0.75]), 1.0, 0.5).tolist() == [0]
    assert operations.pick_sampled(evens_BV, np.array([0.5]), 1.0, 1.0).tolist() == [1]


@clause("T-DEC-4")
@needs("an end before the last token", "a row that never ends", "sampled", wide=True)
@draws(examples=[(1, DECODED[0], 0.75)], seed=SEEDS, kind=st.sampled_from(DECODED), temperature=st.sampled_from((0.0, 1.5, 0.75)))
def test_decode__token_by_token(operations: Operations, seed: int, kind: Kind, temperature: float) -> None:
    """Each token is the choice from the step's logits after its own prefix, padding after the end; margins are those of the steps."""
    setup, length, start, pad = unpacked(setup_of(kind, seed)), 5, 3, 0
    memory_BMD = memory_of(operations, setup)
    uniform_BL = np.random.default_rng(seed).random((B, length)) if temperature else np.full((B, length), np.nan)

    def decoded(end: int) -> tuple[np.ndarray, np.ndarray]:
        statics, rest = step_statics(setup), (uniform_BL, start, end, pad, temperature, 0.75)
        return operations.decode(memory_BMD, setup.batch.encoder_valid_BM, setup.params, statics, *rest)

    end = int(decoded(V)[0][0, 2])  # a token that comes
    tokens_BL, margin_BL = decoded(end)
    fed_BL = np.concatenate([np.full((B, 1), start), tokens_BL[:, :-1]], axis=1)
    logits_BLV, _ = stepped(operations, setup, memory_BMD, fed_BL)
    assert tokens_BL.shape == margin_BL.shape == (B, length)
    for b in range(B):
        ended = False
        for place in range(length):
            logits_BV, highest = logits_BLV[b : b + 1, place], sorted(logits_BLV[b, place])
            if temperature:
                picked = operations.pick_sampled(logits_BV, uniform_BL[b : b + 1, place], temperature, 0.75)[0]
            else:
                picked = operations.pick_greedy(logits_BV)[0]
            assert tokens_BL[b, place] == (pad if ended else picked), (b, place)
            assert margin_BL[b, place] == highest[-1] - highest[-2], (b, place)
            operations.meets("an end before the last token", ended)
            ended |= bool(tokens_BL[b, place] == end)
        operations.meets("a row that never ends", not ended)
    operations.meets("sampled", temperature > 0.0)


@clause("T-DEC-4")
@needs(wide=True)
@draws(seed=SEEDS)
def test_decode__rows_by_themselves(operations: Operations, seed: int) -> None:
    """A row alone is decoded as among others, and tokens that come later do not change those before; temperature 0 and top_p 0 choose alike."""
    setup = unpacked(setup_of(DECODED[0], seed))
    memory_BMD, valid_BM = memory_of(operations, setup), setup.batch.encoder_valid_BM

    def decoded(rows: slice, length: int, *rest: Any) -> np.ndarray:
        count = len(range(B)[rows])
        statics, uniform_BL = step_statics(setup, count), np.full((count, length), 0.5)
        return operations.decode(memory_BMD[rows], valid_BM[rows], setup.params, statics, uniform_BL, 3, 1, 0, *rest)[0]

    tokens_BL = decoded(slice(None), 4)
    assert_equal(decoded(slice(1, 2), 4), tokens_BL[1:2], "tokens_BL")
    assert_equal(decoded(slice(None), 2), tokens_BL[:, :2], "tokens_BL")
    assert_equal(decoded(slice(None), 4, 1.0, 0.0), tokens_BL, "tokens_BL")
