# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Beam search: scores, order, and the search against one written as plain loops over prefixes: T-BEAM-1, T-BEAM-2, T-BEAM-3."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise, product
from math import inf
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.drawn import Plan, Scene, assert_equal, assert_within, plans
from properties.harness import clause, draws, needs
from properties.model_scenes import SEEDS, B, D, F, H, K, Kind, M, Setup, V, setup_of
from properties.operations import Operations
from properties.test_decoding import memory_of, step_statics, unpacked
from refswitch.reference.beam_search import Beams
from refswitch.reference.decoding import Cache, KeyValue
from refswitch.verify import tubes
from refswitch.verify.tubes import OWN_UNIT, exact

RULES, ALPHAS = st.sampled_from(("power", "wu")), st.sampled_from((0.0, 0.6, 1.0, 2.0))
START, PAD = 3, 0
CLOSE = [(3, 1, 4, 0.6, "power", 1), (3, 2, 5, 1.0, "power", 0)]  # the margin is that between going on and closing
TIED = [(1, 3, 2.0, "power", 0), (4, 3, 1.0, "power", 2)]  # beams, length, alpha, rule, end
SMALL = Kind(sparse=(False,), tied=False, drops=False, quiet=True)


@clause("T-BEAM-1")
@draws()
def test_length_penalty__by_hand(operations: Operations) -> None:
    """Wu et al., equation 14, at 1 and 7 tokens; a power of the length; no penalty with an alpha of 0."""
    assert operations.length_penalty(1, 0.6, "wu") == 1.0
    assert operations.length_penalty(7, 1.0, "wu") == 2.0
    assert operations.length_penalty(13, 2.0, "wu") == 9.0
    assert operations.length_penalty(9, 0.5, "power") == 3.0
    assert operations.length_penalty(5, 2.0, "power") == 25.0
    assert operations.length_penalty(5, 0.0, "power") == operations.length_penalty(5, 0.0, "wu") == 1.0


@clause("T-BEAM-1")
@needs("large logits")
@draws(plan=plans("NV", points=0), size=st.sampled_from((1.0, 400.0)), shift=st.sampled_from((-512.0, 4096.0)))
def test_log_softmax__is_the_logarithm_of_the_softmax(operations: Operations, plan: Plan, size: float, shift: float) -> None:
    """Each logit minus the log-sum-exp of its row, where exp of a logit would overflow too; a shift of a row changes nothing."""
    scene = Scene(operations, plan)
    logits_NV = np.round(4.0 * size * scene.random.normal(size=scene.shape("NV"))).astype(scene.dtype) / 4.0
    operations.meets("large logits", logits_NV.max() > 710.0)
    found_NV = operations.log_softmax(logits_NV)
    lse = tubes.log_sum_exp(exact(logits_NV), scene.arithmetic).at((..., None))
    wanted = tubes.add(exact(logits_NV), tubes.Tube(-lse.value, lse.radius), scene.arithmetic)
    # logit - maximum is rounded before the logarithm of the sum is subtracted
    spread = 2.0 * scene.arithmetic.element_unit * (logits_NV.max(axis=-1, keepdims=True) - logits_NV + np.log(plan.sizes["V"]) + 1.0)
    assert_within(found_NV, tubes.widen(wanted, spread), "log_probs_NV", scene)
    assert_equal(operations.log_softmax((logits_NV + shift).astype(scene.dtype)), found_NV, "log_probs_NV")


@clause("T-BEAM-2")
@needs("a tie", "none left out", "a beam that is none")
@draws(plan=plans("BJL", points=0), count=st.integers(1, 6), levels=st.integers(2, 9))
def test_best_of__falling_and_stable(operations: Operations, plan: Plan, count: int, levels: int) -> None:
    """The best first, equal ones by index, with their tokens; the margin is the smallest distance of neighbours down to the first left out."""
    scene = Scene(operations, plan)
    score_BJ = np.where(scene.random.random(scene.shape("BJ")) < 0.2, -np.inf, -1.0 * scene.below("BJ", levels) ** 2)
    tokens_BJL = scene.below("BJL", 99)
    best, index_BW = operations.best_of(Beams(tokens_BJL, score_BJ), count)
    gap_B = operations.closest(score_BJ, count)
    for b, row in enumerate(score_BJ.tolist()):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        assert index_BW[b].tolist() == order[:count]
        assert best.score_BW[b].tolist() == [row[j] for j in order[:count]]
        assert best.tokens_BWL[b].tolist() == [tokens_BJL[b, j].tolist() for j in order[:count]]
        falling = [row[j] for j in order]
        gaps = [one - other for one, other in pairwise(falling[: count + 1]) if other > -inf]
        assert gap_B[b] == min(gaps, default=inf)
        operations.meets("a tie", any(gap == 0.0 for gap in gaps))
        operations.meets("none left out", count >= len(row))
        operations.meets("a beam that is none", -inf in falling[:count])


@clause("T-BEAM-2")
@draws(plan=plans("NPMHK", points=0))
def test_reorder__moves_rows_of_the_own_cache(operations: Operations, plan: Plan) -> None:
    """Every block's own keys and values follow their beam, a row may come twice; position, memory and its marks stay."""
    scene = Scene(operations, plan)
    own = tuple(KeyValue(scene.normal("NPHK"), scene.normal("NPHK")) for _ in range(2))
    cross = tuple(KeyValue(scene.normal("NMHK"), scene.normal("NMHK")) for _ in range(2))
    cache = Cache(plan.sizes["P"], own, cross, scene.below("NM", 2) == 1)
    index_N = scene.below("N", plan.sizes["N"])
    moved = operations.reorder(cache, index_N)
    for one, other in zip(own, moved.own, strict=True):
        for array, there in zip(one, other, strict=True):
            for n, source in enumerate(index_N):
                assert_equal(there[n], array[source], "PHK")
    assert (moved.position, moved.cross, moved.memory_valid_BM) == (cache.position, cache.cross, cache.memory_valid_BM)


class Found(NamedTuple):
    """What a search over the prefixes of one row found."""

    beams: list[tuple[float, tuple[int, ...]]]  # score over penalty, tokens up to the end
    margin: float
    closed_early: bool
    late_end: bool  # an end beyond the first W candidates, which does not count


def gap_of(falling: list[float], count: int) -> float:
    """Return the smallest distance between neighbours down to the first left out."""
    return min((one - other for one, other in pairwise(falling[: count + 1])), default=inf)


def searched(log_probs: Callable[[tuple[int, ...]], np.ndarray], W: int, length: int, end: int, penalty: Callable[[int], float]) -> Found:
    """Search one row with lists: no cache, no arrays of beams."""
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []
    margin, late_end = inf, False
    for place in range(1, length + 1):
        every = [(score + float(more), (*prefix, v)) for score, prefix in running for v, more in enumerate(log_probs(prefix))]
        every.sort(key=lambda pair: -pair[0])
        margin = min(margin, gap_of([score for score, _ in every], 2 * W))
        best = every[: 2 * W]
        ends = [tokens[-1] == end or place == length for _, tokens in best]
        late_end |= any(ends[W:]) and place < length
        finished += [(score / penalty(place), tokens) for (score, tokens), is_end in zip(best[:W], ends, strict=False) if is_end]
        finished.sort(key=lambda pair: -pair[0])
        margin = min(margin, gap_of([score for score, _ in finished], W))
        finished = finished[:W]
        running = [pair for pair, is_end in zip(best, ends, strict=True) if not is_end][:W]
        highest, worst = running[0][0] / penalty(place) if running else -inf, finished[-1][0] if len(finished) == W else -inf
        margin = min(margin, abs(highest - worst)) if running or finished else margin
        if not highest > worst:
            return Found(finished, margin, place < length, late_end)
    return Found(finished, margin, False, late_end)


def log_probs_of(operations: Operations, setup: Setup, memory_BMD: np.ndarray, b: int) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Return the log-probabilities of the next token after a prefix of one row, each prefix fed from the start."""
    rows = slice(b, b + 1)

    @cache
    def state(prefix: tuple[int, ...]) -> tuple[np.ndarray, Cache]:
        if prefix:
            before = state(prefix[:-1])[1]
        else:
            before = operations.start_cache(memory_BMD[rows], setup.batch.encoder_valid_BM[rows], setup.params, setup.statics.decoder.around)
        token_B = np.array([prefix[-1] if prefix else START])
        return operations.decode_step(token_B, before, setup.params, step_statics(setup, 1))

    def log_probs(prefix: tuple[int, ...]) -> np.ndarray:
        logits_V = state(prefix)[0][0]
        return logits_V - logits_V.max() - np.log(np.sum(np.exp(logits_V - logits_V.max())))

    return log_probs


NEAR = 64.0 * D * F * H * K * V * OWN_UNIT  # of a sum of log-probabilities, relative: as if every step rounded the largest logit


@clause("T-BEAM-3")
@needs("a row closed early", "an end beyond the first beams", "a length penalty", wide=True)
@draws(examples=CLOSE, seed=SEEDS, W=st.integers(1, 4), length=st.integers(1, 5), alpha=ALPHAS, rule=RULES, common=st.integers(0, 3))
def test_beam_search__plain_loops(operations: Operations, seed: int, W: int, length: int, alpha: float, rule: str, common: int) -> None:
    """Beams, scores and margins are those of a search with lists that feeds every prefix from the start, row by row."""
    setup = unpacked(setup_of(SMALL, seed))
    memory_BMD = memory_of(operations, setup)
    rows = [log_probs_of(operations, setup, memory_BMD, b) for b in range(B)]
    end = int(np.argsort(-rows[0](()))[common])  # one that comes soon, or later
    statics = step_statics(setup, B * W)
    beams, margin_B = operations.beam_search(memory_BMD, setup.batch.encoder_valid_BM, setup.params, statics, W, length, START, end, PAD, alpha, rule)
    assert beams.tokens_BWL.shape == (B, W, length)
    for b, log_probs in enumerate(rows):
        wanted = searched(log_probs, W, length, end, lambda size: operations.length_penalty(size, alpha, rule))
        operations.meets("a row closed early", wanted.closed_early)
        operations.meets("an end beyond the first beams", wanted.late_end)
        operations.meets("a length penalty", alpha > 0.0 and length > 1)
        near = NEAR * 10.0 * length
        assert margin_B[b] == wanted.margin or abs(margin_B[b] - wanted.margin) <= near
        if wanted.margin <= near:
            continue  # another legal rounding may order otherwise
        for w, (score, tokens) in enumerate(wanted.beams):
            assert beams.tokens_BWL[b, w].tolist() == [*tokens, *[PAD] * (length - len(tokens))], (b, w)
            assert abs(beams.score_BW[b, w] - score) <= near, (b, w)
        assert len(wanted.beams) == W


@clause("T-BEAM-3")
@needs("a row closed by a tie", wide=True)
@draws(
    examples=TIED,
    W=st.integers(1, 4),
    length=st.integers(1, 4),
    alpha=ALPHAS,
    rule=RULES,
    end=st.integers(0, 8),
)
def test_beam_search__ties_by_index(operations: Operations, W: int, length: int, alpha: float, rule: str, end: int) -> None:
    """Where all logits are equal every score is a tie: beams come by index, finished ones before new ones, and a tie closes a row."""
    setup = unpacked(setup_of(SMALL))
    setup = setup._replace(params=setup.params._replace(w_logits_DV=np.zeros((D, V))))
    memory_BMD = memory_of(operations, setup)
    call = memory_BMD, setup.batch.encoder_valid_BM, setup.params, step_statics(setup, B * W), W, length, START, end, PAD
    beams, margin_B = operations.beam_search(*call, alpha, rule)
    wanted = searched(lambda _: np.full(V, -np.log(V)), W, length, end, lambda size: operations.length_penalty(size, alpha, rule))
    operations.meets("a row closed by a tie", wanted.closed_early)
    assert beams.tokens_BWL.tolist() == [[[*tokens, *[PAD] * (length - len(tokens))] for _, tokens in wanted.beams]] * B
    assert beams.score_BW.tolist() == [[score for score, _ in wanted.beams]] * B
    assert margin_B.tolist() == [wanted.margin] * B
    if (alpha, rule) == (1.0, "power"):
        default, _ = operations.beam_search(*call)
        assert_equal(default.score_BW, beams.score_BW, "score_BW")


@clause("T-BEAM-3")
@needs(wide=True)
@draws(seed=SEEDS, W=st.sampled_from((4, 3)))
def test_beam_search__two_levels(operations: Operations, seed: int, W: int) -> None:
    """Where words have one of two logits most candidates of a beam are ties, and the lowest index among them goes on."""
    setup = unpacked(setup_of(SMALL, seed))
    two_DV = np.zeros((D, V))
    two_DV[0] = np.random.default_rng(seed).integers(0, 2, V)  # one feature alone: equal columns have equal bits however a product is summed
    setup = setup._replace(params=setup.params._replace(w_logits_DV=two_DV))
    memory_BMD = memory_of(operations, setup)
    statics = step_statics(setup, B * W)
    beams, _ = operations.beam_search(memory_BMD, setup.batch.encoder_valid_BM, setup.params, statics, W, 2, START, V, PAD)
    for b in range(B):
        wanted = searched(log_probs_of(operations, setup, memory_BMD, b), W, 2, V, float)
        assert beams.tokens_BWL[b].tolist() == [list(tokens) for _, tokens in wanted.beams]


@clause("T-BEAM-3")
@needs("an end", wide=True)
@draws(seed=SEEDS)
def test_beam_search__one_beam_is_greedy(operations: Operations, seed: int) -> None:
    """One beam without a length penalty is greedy decoding."""
    setup, length = unpacked(setup_of(SMALL, seed)), 4
    memory_BMD = memory_of(operations, setup)
    call = memory_BMD, setup.batch.encoder_valid_BM, setup.params, step_statics(setup)
    end = int(operations.decode(*call, np.zeros((B, length)), START, V, PAD)[0][0, 1])
    tokens_BL, _ = operations.decode(*call, np.zeros((B, length)), START, end, PAD)
    beams, _ = operations.beam_search(*call, 1, length, START, end, PAD, alpha=0.0)
    operations.meets("an end", (tokens_BL == end).any())
    assert_equal(beams.tokens_BWL[:, 0], tokens_BL, "tokens_BL")


@clause("T-BEAM-3")
@needs(wide=True)
@draws(seed=SEEDS, alpha=ALPHAS, rule=RULES, fewer=3)
def test_beam_search__exhaustive_where_nothing_is_pruned(operations: Operations, seed: int, alpha: float, rule: str) -> None:
    """With as many beams as words and two steps the best beam is the best of all sequences."""
    setup = unpacked(setup_of(SMALL, seed))
    memory_BMD = memory_of(operations, setup)
    statics = step_statics(setup, B * V)
    beams, _ = operations.beam_search(memory_BMD, setup.batch.encoder_valid_BM, setup.params, statics, V, 2, START, 5, PAD, alpha, rule)
    assert memory_BMD.shape == (B, M, D)
    for b in range(B):
        log_probs = log_probs_of(operations, setup, memory_BMD, b)
        scores = [log_probs(())[5] / operations.length_penalty(1, alpha, rule)]
        for first, second in product(range(V), repeat=2):
            if first != 5:
                scores.append((log_probs(())[first] + log_probs((first,))[second]) / operations.length_penalty(2, alpha, rule))
        assert abs(beams.score_BW[b, 0] - max(scores)) <= 20.0 * NEAR
