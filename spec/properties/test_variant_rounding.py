# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The layer's relatives at their rounding points and borders: ranks as the layer itself, choices at the edge of a policy, experts that choose.

What a single rank stores is what the Switch layer stores, in any formats, to the bit; what a policy compares is compared strictly.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import strategies as st

from properties.harness import clause, draws, needs
from properties.operations import Operations
from properties.variant_tubes import MESH, TOP_2, random_layer
from refswitch.config import TRUTH, RoundingPoints
from refswitch.numbers.precision import FORMATS
from refswitch.reference.expert_choice import ExpertChoiceInputs, ExpertChoiceStatics
from refswitch.reference.expert_parallel import ParallelInputs, ParallelStatics
from refswitch.reference.switch import Statics, SwitchInputs
from refswitch.spec_data import with_knob

EPSILON = 1e-9
POINTS = ("router", "logits", "probs", "choice", "gate", "z", "hidden", "expert_out", "out", "gradients")


def narrow_at(*names: str) -> RoundingPoints:
    """Return rounding points of which these are narrow."""
    return TRUTH._replace(**dict.fromkeys(names, FORMATS["bfloat16"]))


@clause("E-SAME-1", "E-CAP-1", "E-SUM-1")
@needs("a choice that rounding changes", wide=True)
@draws(seed=st.integers(0, 2**20))
def test_expert_parallel__rounds_as_the_layer(operations: Operations, seed: int) -> None:
    """On one rank, with one rounding point narrow at a time, everything that is returned has the bits of the Switch layer."""
    random = np.random.Generator(np.random.Philox(seed))
    G, S, D, E, F = 2, 9, 3, 5, 4
    params = random_layer(random, E, D, F, is_gated=seed % 2 == 0)
    params = params._replace(w_router_DE=2.0**-8 * params.w_router_DE, b_router_E=2.0**-8 * params.b_router_E)  # probabilities that tie when rounded
    x_GSD, noise_GSD, dout_GSD = random.normal(size=(G, S, D)), 1.0 + random.normal(size=(G, S, D)) / 8.0, random.normal(size=(G, S, D))
    valid_GS, ones_GSF, none_GSE = random.random((G, S)) < 0.9, np.ones((G, S, F)), np.zeros((G, S, E))
    dialect = with_knob(MESH, "pad.zero_input", False)
    by_rank = ParallelInputs(*(part[None, None] for part in (x_GSD, valid_GS, noise_GSD, ones_GSF)))
    inputs = SwitchInputs(x_GSD, valid_GS, noise_GSD, none_GSE, none_GSE, np.broadcast_to(np.arange(S), (G, S)), ones_GSF)
    wide, _ = operations.switch_forward(inputs, params, Statics(dialect, TRUTH, "silu", 3))
    for point in POINTS:
        statics, ranks = Statics(dialect, narrow_at(point), "silu", 3), ParallelStatics(1, 3, dialect.aux, dialect.z, "silu", narrow_at(point))
        theirs, saved = operations.switch_forward(inputs, params, statics)
        ours, our_saved = operations.expert_parallel_forward(by_rank, params, ranks)
        operations.meets("a choice that rounding changes", (theirs.route.expert_GS != wide.route.expert_GS).any())
        assert np.array_equal(ours.out_ARgSD[0, 0], theirs.out_GSD), point
        assert all(np.array_equal(mine, wanted) for mine, wanted in zip(ours.decisions[0].route, theirs.route, strict=True)), point
        assert np.array_equal(ours.decisions[0].gate_gS, theirs.gate_GS), point
        dx_GSD, dparams = operations.switch_backward(dout_GSD, 0.5, 0.25, saved, params, statics)
        our_dx, our_dparams = operations.expert_parallel_backward(dout_GSD[None, None], 0.5, 0.25, our_saved, params, ranks)
        assert np.array_equal(our_dx[0, 0], dx_GSD), point
        pairs = zip((*our_dparams[:2], our_dparams[3], *our_dparams.experts), (*dparams[:2], dparams[3], *dparams.experts), strict=True)
        assert all((mine is None and wanted is None) or np.array_equal(mine, wanted) for mine, wanted in pairs), point


@clause("V-WANT-1")
@draws()
def test_wanted_choices__at_the_border(operations: Operations) -> None:
    """A share that is the threshold does not exceed it, a draw that is the probability is not below it; shares are of the sum plus 1e-9."""
    chosen = np.array([[[0.5, 0.25, 0.125]]])
    share = chosen / (chosen.sum(axis=-1, keepdims=True) + EPSILON)
    for k in (1, 2):
        at = float(share[0, 0, k])
        for threshold, wanted in ((at, False), (np.nextafter(at, 0.0), True)):
            assert bool(operations.wanted_choices(chosen, np.zeros_like(chosen), "threshold", threshold)[0, 0, k]) == wanted
        for policy, probability in (("random", at / 0.75), ("gshard", 2.0 * at)):
            for draw, wanted in ((probability, False), (np.nextafter(probability, 0.0), True)):
                assert bool(operations.wanted_choices(chosen, np.full_like(chosen, draw), policy, 0.75)[0, 0, k]) == wanted
    tiny = np.full((1, 1, 2), EPSILON)  # a third each, of 3e-9
    assert operations.wanted_choices(tiny, tiny, "threshold", 0.3)[0, 0].tolist() == [True, True]
    assert operations.wanted_choices(tiny, tiny, "threshold", 0.34)[0, 0].tolist() == [True, False]
    assert operations.wanted_choices(chosen, np.full_like(chosen, 0.9), "random", 0.0)[0, 0].tolist() == [True, True, True]


@clause("V-EC-1", "V-EC-2")
@needs("a kept token", "a token left over", wide=True)
@draws(seed=st.integers(0, 2**20))
def test_expert_choice__losses_of_each_rule(operations: Operations, seed: int) -> None:
    """Where experts choose freely there is no balance loss and no gradient of one; by the first choice it is f P over the dialect's rows."""
    random = np.random.Generator(np.random.Philox(seed))
    G, S, D, E, F = 2, 8, 3, 4, 5
    params, x_GSD, ones_GSD = random_layer(random, E, D, F, is_gated=False), random.normal(size=(G, S, D)), np.ones((G, S, D))
    valid_GS = random.random((G, S)) < 0.75
    inputs = ExpertChoiceInputs(x_GSD, valid_GS, ones_GSD, np.ones((G, E, 1, F)))
    free = ExpertChoiceStatics("expert_choice", 1, TOP_2.aux, TOP_2.z, "silu", TRUTH)
    outputs, saved = operations.expert_choice_forward(inputs, params, free)
    assert float(outputs.aux_loss) == 0.0
    with_loss, without = (operations.expert_choice_backward(x_GSD, daux, 0.0, saved, params, free) for daux in (8.0, 0.0))
    assert np.array_equal(with_loss[0], without[0])
    assert np.array_equal(with_loss[1].w_router_DE, without[1].w_router_DE)
    for denom in ("kept", "valid", "S"):
        first = free._replace(rule="switch_max", aux=dataclasses.replace(TOP_2.aux, denom=denom))
        outputs, _ = operations.expert_choice_forward(inputs, params, first)
        is_held_GS = np.zeros((G, S), bool)
        for g, e, c in np.argwhere(outputs.picks.kept_GEC):
            is_held_GS[g, outputs.picks.token_GEC[g, e, c]] = True
        operations.meets("a kept token", is_held_GS.any())
        operations.meets("a token left over", (valid_GS & ~is_held_GS).any())
        rows_G = {"kept": is_held_GS.sum(axis=1), "valid": valid_GS.sum(axis=1), "S": np.full(G, S)}[denom]
        f_GE = ((np.argmax(outputs.probs_GSE, axis=-1)[..., None] == np.arange(E)) & valid_GS[..., None]).sum(axis=1) / np.maximum(rows_G, 1)[:, None]
        P_GE = (outputs.probs_GSE * valid_GS[..., None]).sum(axis=1) / np.maximum(rows_G, 1)[:, None]
        wanted = float(np.sum(E * f_GE * P_GE * (rows_G > 0)[:, None]) / G)
        terms = 4 * S * E * G  # roundings of the sums, each of at most a unit of the whole: all terms are positive
        assert abs(float(outputs.aux_loss) - wanted) <= 2.0 * terms * 2.0**-53 * wanted, denom


@clause("V-NOISY-4")
@draws(power=st.integers(-40, 40))
def test_cv_squared_forward__has_no_scale(operations: Operations, power: int) -> None:
    """Amounts times a power of two vary as much, to the bit, however small they are: (0, 1) has variance 1/4 over squared mean 1/4."""
    for amounts, wanted in (([[0.0, 1.0]], 1.0), ([[1.0, 1.0]], 0.0), ([[0.0, 1.0], [2.0, 2.0]], 0.5), ([[0.0, 0.0], [0.0, 4.0]], 0.5)):
        value, _ = operations.cv_squared_forward(np.array(amounts) * 2.0**power, 0.0)
        assert float(value) == wanted, (amounts, power)


@clause("V-SCORE-1")
@draws()
def test_scores_forward__of_no_tokens(operations: Operations) -> None:
    """A group without tokens has probabilities of its shape, and so have their gradients."""
    for rule in ("expert_selection", "expert_choice"):
        none_GSE = np.zeros((2, 0, 3))
        probs_GSE, saved = operations.scores_forward(none_GSE, np.zeros((2, 0), bool), rule, TRUTH)
        assert probs_GSE.shape == operations.scores_backward(none_GSE, saved, rule).shape == (2, 0, 3)
