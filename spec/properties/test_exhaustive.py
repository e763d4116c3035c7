# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Small worlds without an exception: every order of logits, every routing, every padding, every bfloat16 through every activation.

What is discrete is small: six tokens at four experts route in 4096 ways, six logits stand in 4683 orders. Nothing is drawn here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from properties.conditions import ARGMAX, MASKED, NOISY_GATE, UNCAPPED, WHOLE_PADS
from properties.harness import clause, draws, needs
from properties.implementation import Implementation
from properties.lattice import AXIS
from properties.scenes import Scene, assert_within, replay
from properties.strategies import case_of, changed, plain, stored
from refswitch.verify import tubes
from refswitch.verify.tubes import Tube, exact

ONCE = 10**6  # one drawn example beside the explicit ones, which are all there is
TOKENS_OF_A_CALL = 256
GROUPS_OF_A_CALL = 1024
IN_ORDER = ARGMAX | UNCAPPED | MASKED | WHOLE_PADS | {"priority": ("position",)}
ROWS, COLUMNS = 16, 4096  # of a table of all 65,536 bit patterns; a number and its negative are half the table apart
SMALL = 2.0**40  # the sums of the second layer stay finite


def weak_orderings(E: int) -> np.ndarray:
    """Return every order with ties of E things: ranks from 0 without a gap. There are 1, 3, 13, 75, 541, 4683."""
    return np.array([ranks for ranks in product(range(E), repeat=E) if set(ranks) == set(range(max(ranks) + 1))])


def play_tokens(implementation: Implementation, name: str, x_GSD: np.ndarray, capacity: int, valid_GS: np.ndarray | None = None) -> Scene:
    """Play tokens whose coordinates are their logits over AXIS; the example is dropped where the implementation does not take these sizes."""
    G, S, E = x_GSD.shape
    case = case_of(replace(plain(), name=name, G=G, S=S, D=E, E=E, F=3, capacity=capacity), implementation.target)
    assume(case is not None and case.x.shape == x_GSD.shape)
    assert case is not None
    arrays = {"x": x_GSD, "w_router": AXIS * np.eye(E)} | ({"b_router": np.zeros(E)} if "b_router" in case else {})
    return replay(implementation, changed(case, implementation.target, noise=None, valid=valid_GS, **arrays))


@clause("S-ROUTE-3")
@needs("tie", "logits_below_0", "one_expert", exports=("expert",), only=ARGMAX | UNCAPPED | NOISY_GATE | MASKED)
@draws(examples=[1, 2, 3, 4, 5, 6], fewer=ONCE, E=st.just(2))
def test_choose__every_weak_ordering(implementation: Implementation, E: int) -> None:
    """In whatever order logits stand, with whatever ties, above 0 or below: the first of the highest is chosen, or one of them."""
    ranks_TE = weak_orderings(E)
    for level in (1.0, -2.0 * E):
        for start in range(0, len(ranks_TE), TOKENS_OF_A_CALL):
            ranks_SE = ranks_TE[start : start + TOKENS_OF_A_CALL]
            expert_S = play_tokens(implementation, f"orderings-{E}", ranks_SE[None] + level, len(ranks_SE)).outputs["expert"][0]
            is_highest_SE = ranks_SE == ranks_SE.max(axis=1, keepdims=True)
            is_right_S = np.take_along_axis(is_highest_SE, expert_S[:, None], axis=1)[:, 0]
            if implementation.dialect.select.tie == "lowest":
                is_right_S &= expert_S == np.argmax(is_highest_SE, axis=1)
            assert is_right_S.all(), f"of logits in the order {ranks_SE[~is_right_S][0]} expert {expert_S[~is_right_S][0]} is chosen"


def counted(choices_GS: np.ndarray, routed_GS: np.ndarray, E: int) -> np.ndarray:
    """Return slot_GS: how many routed tokens chose the same expert before."""
    slot_GS, count_GE = np.zeros_like(choices_GS), np.zeros((len(choices_GS), E), int)
    every_G = np.arange(len(choices_GS))
    for s in range(choices_GS.shape[1]):
        slot_GS[:, s] = count_GE[every_G, choices_GS[:, s]]
        count_GE[every_G, choices_GS[:, s]] += routed_GS[:, s]
    return slot_GS


def in_calls(implementation: Implementation, *arrays_GS: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yield parts of some groups, as many as one call takes."""
    size = GROUPS_OF_A_CALL if "groups" in implementation.features else 1
    for start in range(0, len(arrays_GS[0]), size):
        yield [array_GS[start : start + size] for array_GS in arrays_GS]


@clause("S-CAP-1", "S-CAP-2", "S-POS-1")
@needs("drop", "drop_not_on_expert_0", "capacity_0", "empty_expert", exports=("kept", "slot"), only=IN_ORDER, without=("own_capacity",))
@draws(examples=range(7), fewer=ONCE, capacity=st.just(1))
def test_slots__every_routing(implementation: Implementation, capacity: int) -> None:
    """All 4096 ways of six tokens to four experts, with every capacity: slots count claims, and are kept below the capacity."""
    S, E = (6, 4) if "groups" in implementation.features else (4, 2)
    every_GS = np.array(list(product(range(E), repeat=S)))
    for (choices_GS,) in in_calls(implementation, every_GS):
        scene = play_tokens(implementation, "routings", AXIS * np.eye(E)[choices_GS], capacity)
        slot_GS = counted(choices_GS, np.ones_like(choices_GS), E)
        _assert_slots(scene, slot_GS, slot_GS < scene.capacity, choices_GS)


@clause("S-PAD-2", "S-CAP-1", "S-POS-1")
@needs("pad_and_drop", features=("groups",), exports=("kept", "slot"), only=IN_ORDER, without=("own_capacity",))
@draws(examples=range(5), fewer=ONCE, capacity=st.just(1))
def test_slots__every_padding(implementation: Implementation, capacity: int) -> None:
    """All 81 ways of four tokens to three experts under all 16 masks: padding takes a slot where the dialect routes it, and nowhere else."""
    S, E, dialect = 4, 3, implementation.dialect
    pairs = list(product(product(range(E), repeat=S), product((True, False), repeat=S)))
    every_GS, mask_GS = (np.array(column) for column in zip(*pairs, strict=True))
    for choices_GS, valid_GS in in_calls(implementation, every_GS, mask_GS):
        scene = play_tokens(implementation, "paddings", AXIS * np.eye(E)[choices_GS], capacity, valid_GS)
        choices_GS = np.where(~valid_GS & (dialect.pad.zero_input is True), 0, choices_GS)
        routed_GS = valid_GS | (dialect.pad.route == "include")
        slot_GS = counted(choices_GS, routed_GS, E)
        _assert_slots(scene, slot_GS, (slot_GS < scene.capacity) & routed_GS, np.where(valid_GS, choices_GS, -1), routed_GS)


def _assert_slots(scene: Scene, slot_GS: np.ndarray, kept_GS: np.ndarray, shown_GS: np.ndarray, routed_GS: np.ndarray | None = None) -> None:
    routed_GS = np.ones_like(kept_GS) if routed_GS is None else routed_GS
    is_wrong_G = (((scene.outputs["slot"] != slot_GS) & routed_GS) | (scene.outputs["kept"] != kept_GS)).any(axis=1)
    g = int(np.argmax(is_wrong_G))
    got = f"slots {scene.outputs['slot'][g].tolist()}, kept {scene.outputs['kept'][g].tolist()}"
    assert not is_wrong_G.any(), f"experts {shown_GS[g].tolist()} (-1 is padding), capacity {scene.capacity}: {got}, should be {slot_GS[g].tolist()}"


def play_table(implementation: Implementation, name: str, largest: float) -> tuple[Scene, np.ndarray]:
    """Play 16 tokens that read one row each of a table of all numbers of bfloat16 up to the largest, the others being 0; return the table too."""
    target = implementation.target
    case = case_of(replace(plain(), name=name, S=ROWS, D=ROWS, E=1, F=COLUMNS, losses=(0.0, 0.0)), target)
    assume(case is not None and case.w_in.shape == (1, ROWS, COLUMNS))
    assert case is not None
    with np.errstate(all="ignore"):
        every = (np.arange(ROWS * COLUMNS, dtype=np.uint32) << 16).view(np.float32).astype(np.float64).reshape(ROWS, COLUMNS)
        has_all = np.isfinite(every) & (np.abs(every) <= largest) & (stored(every, target, "w") == every)
    table_DF = np.where(has_all & has_all[(np.arange(ROWS) + ROWS // 2) % ROWS], every, 0.0)
    weights = {"w_gate": table_DF[None], "w_in": np.ones_like(table_DF)[None]} if "w_gate" in case else {"w_in": table_DF[None]}
    first_D = np.arange(ROWS) == 0
    weights["w_out"] = np.broadcast_to((largest <= SMALL) & first_D, case.w_out.shape)
    biases = {name: np.zeros_like(case[name]) for name in ("b_in", "b_gate", "b_out", "b_router") if name in case}
    above = {"dout": np.broadcast_to(first_D, case.x.shape)} if "dout" in case else {}
    arrays = {"x": np.eye(ROWS)[None], "w_router": np.zeros((ROWS, 1)), "noise": None}
    return replay(implementation, changed(case, target, **arrays, **weights, **biases, **above)), table_DF


@clause("S-EXPERT-1")
@needs(exports=("hidden",), only={"gate.site": ("output",), "gate.value": ("p",), "pad.detect": ("mask",)})
@draws(examples=[np.inf], fewer=ONCE, largest=st.just(SMALL))
def test_experts__activation_of_every_bfloat16(implementation: Implementation, largest: float) -> None:
    """The activation of each of the 65,280 finite numbers of bfloat16 is that of the declared function, and act(z) - act(-z) = z."""
    scene, table_DF = play_table(implementation, "activations", largest)
    layer, points = scene.layer, scene.layer.points
    acted = tubes.activate(tubes.store(exact(table_DF), points.z), scene.case.activation, layer.experts)
    if "w_gate" in scene.case:
        acted = tubes.multiply(tubes.may_store(acted, points.z), exact(np.ones_like(table_DF)), layer.experts)
    acted = tubes.store(acted, points.hidden)
    hidden_SF = np.asarray(scene.outputs["hidden"][0], np.float64)
    assert_within("hidden", hidden_SF, acted, letters="SF")
    negative = acted.at((np.arange(ROWS) + ROWS // 2) % ROWS)
    own = tubes.OWN_UNIT * np.abs(table_DF)
    odd_SF = hidden_SF - hidden_SF[(np.arange(ROWS) + ROWS // 2) % ROWS]
    assert_within("act(z) - act(-z)", odd_SF, Tube(table_DF, 2.0 * (acted.radius + negative.radius) + own), letters="SF")


@clause("S-BACK-3")
@needs(features=("backward",), only={"gate.site": ("output",), "gate.value": ("p",), "pad.detect": ("mask",), "dispatch_grad": ("none",)})
@draws(examples=[SMALL], fewer=ONCE, largest=st.just(SMALL))
def test_experts_backward__slope_of_every_bfloat16(implementation: Implementation, largest: float) -> None:
    """The slopes of the activation at z and at -z add up to 1, for every number of bfloat16; ReLU's at 0 may be any in [0, 1]."""
    scene, table_DF = play_table(implementation, "slopes", largest)
    name = "dw_gate" if "w_gate" in scene.case else "dw_in"
    assume(scene.has(name))
    slope = scene.real(name).at(0)
    opposite = slope.at((np.arange(ROWS) + ROWS // 2) % ROWS)
    looked_at = (table_DF != 0.0) | (scene.case.activation != "relu")
    total = Tube(np.ones_like(table_DF), slope.radius + opposite.radius + tubes.OWN_UNIT * 2.0)
    assert_within("act'(z) + act'(-z)", slope.value + opposite.value, total, looked_at, "SF")
