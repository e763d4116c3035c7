# May import: standard library, numpy, pytest, refswitch.
"""Golden values: the routing vector of the paper's notes, the capacity table of seventeen implementations, and the micro-tests.

Each value was computed apart from this project (by running the implementations, or by hand). Decimal constants carry as many digits as
their source prints, so they are compared after rounding to those digits.
"""

from __future__ import annotations

import numpy as np
import pytest

from refswitch.config import TRUTH, Capacity
from refswitch.reference.capacity import arrival_order, capacity_in_eval, capacity_of, groups_of, no_token_left_behind, slots_forward
from refswitch.reference.losses import balance_backward, balance_forward, counted_fraction, rows_of_mean, z_loss_forward
from refswitch.reference.router import choices_in_order, choose, gate_forward, softmax_backward, softmax_forward
from refswitch.spec_data import load_dialect, parse_record, with_knob

LOGITS_GSE = np.array([[[2, 1, 0], [2, 0, 1], [1.5, 1, 0], [0, 2, 1], [3, 0, 0], [0, 0, 2], [1, 0.5, 0], [2, 1.9, 0]]], dtype=np.float64)
EXPERT = [0, 0, 0, 1, 0, 2, 0, 0]
GATES = [0.665241, 0.665241, 0.546549, 0.665241, 0.909443, 0.786986, 0.506480, 0.490155]
ALL_GS = np.ones((1, 8), bool)
MESH = load_dialect("mesh_tensorflow")


def test_router__matches_golden() -> None:
    """Choice and gate of paper.md 8.1."""
    probs_GSE, _ = softmax_forward(LOGITS_GSE, TRUTH)
    expert_GS = choose(probs_GSE)
    gate_GS, _ = gate_forward(probs_GSE, LOGITS_GSE, expert_GS, "p", TRUTH)
    assert expert_GS[0].tolist() == EXPERT
    assert np.round(gate_GS[0], 6).tolist() == GATES


def test_losses__match_golden() -> None:
    """f, P, N sum f P, the z-loss and the balance loss's gradient of paper.md 8.1."""
    probs_GSE, softmax_saved = softmax_forward(LOGITS_GSE, TRUTH)
    route = slots_forward(choose(probs_GSE), ALL_GS, arrival_order(8, 1), 3, 8)
    count_GE = counted_fraction(route, route.expert_GS, ALL_GS, ALL_GS, 3, MESH.aux)
    assert (count_GE[0] / 8).tolist() == [0.75, 0.125, 0.125]
    assert np.round(probs_GSE.mean(axis=(0, 1)), 6).tolist() == [0.497456, 0.279249, 0.223295]
    denominator_G, scale_G = rows_of_mean(ALL_GS, route.kept_GS, MESH.aux)
    value, saved = balance_forward(probs_GSE, count_GE, denominator_G, scale_G, ALL_GS, MESH.aux)
    assert round(float(value), 6) == 1.307730
    z_value, _ = z_loss_forward(LOGITS_GSE, ALL_GS, MESH.z)
    assert round(float(z_value), 6) == 5.824380
    dlogits_GSE = softmax_backward(balance_backward(0.01, saved), softmax_saved)
    assert np.round(dlogits_GSE[0, 0], 6).tolist() == [0.000522, -0.000382, -0.000140]


@pytest.mark.parametrize(("capacity", "kept"), [(2, [0, 1, 3, 5]), (4, [0, 1, 2, 3, 4, 5])])
def test_slots__match_golden(capacity: int, kept: list[int]) -> None:
    """Exclusive positions and the survivors of paper.md 8.1."""
    route = slots_forward(np.array([EXPERT]), ALL_GS, arrival_order(8, 1), 3, capacity)
    assert route.slot_GS[0].tolist() == [0, 1, 2, 0, 3, 0, 4, 5]
    assert np.flatnonzero(route.kept_GS[0]).tolist() == kept


@pytest.mark.parametrize(
    ("capacity", "choices", "expert", "slot"),
    [
        (2, 2, [0, 0, 1, 1, None, 2, None, None], [0, 1, 1, 0, None, 0, None, None]),
        (3, 2, [0, 0, 0, 1, 1, 2, 1, None], [0, 1, 2, 0, 1, 0, 2, None]),
        (3, 3, [0, 0, 0, 1, 1, 2, 1, 2], [0, 1, 2, 0, 1, 0, 2, 1]),
    ],
)
def test_no_token_left_behind__matches_golden(capacity: int, choices: int, expert: list[int | None], slot: list[int | None]) -> None:
    """The stages of paper.md 8.1; the rerouted token's gate is its own lower probability."""
    probs_GSE, _ = softmax_forward(LOGITS_GSE, TRUTH)
    route = no_token_left_behind(choices_in_order(probs_GSE, choices), ALL_GS, 3, capacity)
    kept = route.kept_GS[0].tolist()
    assert [e if k else None for e, k in zip(route.expert_GS[0].tolist(), kept, strict=True)] == expert
    assert [s if k else None for s, k in zip(route.slot_GS[0].tolist(), kept, strict=True)] == slot
    gate_GS, _ = gate_forward(probs_GSE, LOGITS_GSE, route.expert_GS, "p", TRUTH)
    if (capacity, choices) == (2, 2):
        assert round(float(gate_GS[0, 2]), 6) == 0.331499
    if (capacity, choices) == (3, 3):
        assert round(float(gate_GS[0, 7]), 6) == 0.066335


def _rule(dialect: str, **changes: object) -> Capacity:
    record = load_dialect(dialect)
    for knob, value in changes.items():
        record = with_knob(record, f"capacity.{knob}", value)
    return record.capacity


# S, E, cf -> the table of implementations.md 4.4. Each implementation's minimum is its default; a number in brackets there is `min: 0` here.
TABLE = {
    (16, 4, "1.0"): {"mesh_tensorflow": 4, "flax_masked_switch_base": 4, "deepspeed_top1": 4, "fairseq_moe": 4, "megatron_top1": 4,
                     "megablocks_moe": 4, "fastmoe_switch": 4, "labml_switch": 4, "vmoe_top1": 4, "praxis_topk1": 4, "keras_io": 4},
    (10, 4, "1.25"): {"mesh_tensorflow": 4, "flax_masked_switch_base": 4, "deepspeed_top1": 4, "fairseq_moe": 3, "megatron_top1": 4,
                      "megablocks_moe": 3, "fastmoe_switch": 4, "labml_switch": 3, "vmoe_top1": 4, "praxis_topk1": 4, "keras_io": 2},
    (20, 8, "1.0"): {"mesh_tensorflow": 4, "flax_masked_switch_base": 4, "deepspeed_top1": 4, "fairseq_moe": 3, "megatron_top1": 3,
                     "megablocks_moe": 2, "fastmoe_switch": 3, "labml_switch": 2, "vmoe_top1": 4, "praxis_topk1": 4, "keras_io": 2},
    (100, 5, "1.15"): {"mesh_tensorflow": 22, "flax_masked_switch_base": 23, "deepspeed_top1": 23, "fairseq_moe": 23, "megatron_top1": 23,
                       "megablocks_moe": 23, "fastmoe_switch": 23, "labml_switch": 22, "vmoe_top1": 24, "praxis_topk1": 24, "keras_io": 20},
    (50, 2, "1.2"): {"mesh_tensorflow": 30, "flax_masked_switch_base": 30, "deepspeed_top1": 31, "fairseq_moe": 30, "megatron_top1": 30,
                     "megablocks_moe": 30, "fastmoe_switch": 30, "labml_switch": 30, "vmoe_top1": 32, "praxis_topk1": 32, "keras_io": 25},
    (100, 2, "1.1"): {"mesh_tensorflow": 55, "flax_masked_switch_base": 55, "deepspeed_top1": 55, "fairseq_moe": 55, "megatron_top1": 56,
                      "megablocks_moe": 55, "fastmoe_switch": 56, "labml_switch": 55, "vmoe_top1": 56, "praxis_topk1": 56, "keras_io": 50},
    (8, 64, "1.25"): {"mesh_tensorflow": 4, "flax_masked_switch_base": 4, "deepspeed_top1": 4, "fairseq_moe": 1, "megatron_top1": 1,
                      "fastmoe_switch": 1, "labml_switch": 0, "vmoe_top1": 4, "praxis_topk1": 1, "keras_io": 0},
}  # fmt: skip


@pytest.mark.parametrize("shape", TABLE, ids=str)
def test_capacity_of__matches_table(shape: tuple[int, int, str]) -> None:
    """Every implementation's capacity in the table of implementations.md 4.4."""
    S, E, factor = shape
    assert {name: capacity_of(S, E, factor, _rule(name)) for name in TABLE[shape]} == TABLE[shape]


def test_capacity_of__without_the_minimum() -> None:
    """The bracketed entries: floor, half-even and ceil part company."""
    names = ("mesh_tensorflow", "flax_masked_switch_base", "deepspeed_top1")
    found = {shape: [capacity_of(*shape, _rule(name, min=0)) for name in names] for shape in ((10, 4, "1.25"), (20, 8, "1.0"), (8, 64, "1.25"))}
    assert found == {(10, 4, "1.25"): [3, 3, 4], (20, 8, "1.0"): [2, 2, 3], (8, 64, "1.25"): [0, 0, 1]}


def test_capacity_of__zero_means_no_limit_in_megablocks() -> None:
    """MegaBlocks reads a capacity of 0 as "no limit"."""
    assert capacity_of(8, 64, "1.25", _rule("megablocks_moe")) == 8


def test_capacity_of__minimum_comes_after_the_clamp() -> None:
    """T17: a minimum of 64 in a group of 16 gives 64, more than the group has."""
    assert capacity_of(16, 4, "1.0", _rule("mesh_tensorflow", min=64)) == 64


def test_capacity_in_eval__released_groups() -> None:
    """Capacities of the released configurations, paper.md 8.3."""
    flax = _rule("flax_masked_switch_base")
    assert [capacity_of(8192, 128, "1.25", flax), capacity_in_eval(8192, 128, flax)] == [80, 128]
    assert [capacity_of(4096, 128, "1.25", flax), capacity_of(4096, 128, "4.0", flax)] == [40, 128]
    assert capacity_of(2048, 2048, "1.0", _rule("flax_masked_switch_base", min=2)) == 2
    assert capacity_in_eval(100, 8, _rule("fairseq_moe")) == 25


def _all_to_one(dialect: str) -> list[int]:
    slots_lost = load_dialect(dialect).capacity.slots_lost
    route = slots_forward(np.zeros((1, 16), np.int64), np.ones((1, 16), bool), arrival_order(16, 1), 4, 4 - slots_lost)
    return np.flatnonzero(route.kept_GS[0]).tolist()


def test_slots__all_to_one() -> None:
    """T1: sixteen tokens on one expert with four slots; figure 15's count uses three of them."""
    assert _all_to_one("mesh_tensorflow") == [0, 1, 2, 3]
    assert _all_to_one("keras_io") == [0, 1, 2]


def test_choose__zero_row_goes_to_expert_0() -> None:
    """T2: an all-zero row is a tie of all experts, and the lowest index wins."""
    probs_GSE, _ = softmax_forward(np.zeros((1, 2, 8)), TRUTH)
    assert choose(probs_GSE)[0].tolist() == [0, 0]


def test_slots__count_past_256_in_integers() -> None:
    """T11: 300 tokens on one expert have 300 different slots (a bfloat16 count has 257 = 256)."""
    route = slots_forward(np.zeros((1, 300), np.int64), np.ones((1, 300), bool), arrival_order(300, 1), 2, 300)
    assert route.slot_GS[0].tolist() == list(range(300))
    assert route.kept_GS.all()


def test_balance_loss__may_dip_below_one() -> None:
    """Erratum 14: f is a hard count and P is soft, so E sum f P can be below its value at uniform routing."""
    probs_GSE = np.array([[[0.5, 0.5]] * 3 + [[0.0, 1.0]]])
    route = slots_forward(choose(probs_GSE), np.ones((1, 4), bool), arrival_order(4, 1), 2, 4)
    everyone_GS = np.ones((1, 4), bool)
    count_GE = counted_fraction(route, route.expert_GS, everyone_GS, everyone_GS, 2, MESH.aux)
    value, _ = balance_forward(probs_GSE, count_GE, *rows_of_mean(everyone_GS, route.kept_GS, MESH.aux), everyone_GS, MESH.aux)
    assert value == 0.875


@pytest.mark.parametrize(
    ("name", "sequences", "length", "groups"),
    [
        ("mesh_tensorflow", 3, 500, 1),  # 1500 tokens stay together: the size is where the search starts, no bound
        ("mesh_tensorflow", 1, 2047, 1),
        ("mesh_tensorflow", 3, 1000, 2),
        ("mesh_tensorflow,group.multiple_of=8", 8, 512, 8),
        ("flax_masked_switch_base", 16, 8, 8),  # at least one group per expert
        ("flax_masked_switch_base,group.size=8", 16, 8, 16),
        ("hf_ge_5_18", 5, 7, 5),
        ("hf_5_0_to_5_17", 5, 7, 1),
        ("vmoe_top1,group.size=7", 5, 7, 5),
        ("praxis_topk1,group.size=7", 5, 7, 7),
    ],
)
def test_groups_of__golden(name: str, sequences: int, length: int, groups: int) -> None:
    """How each rule cuts a batch, for 8 experts."""
    assert groups_of(sequences, length, 8, load_dialect(parse_record(name)).group) == groups


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flax_masked_switch_base", "35 tokens cannot be cut into a multiple of 8 groups"),
        ("vmoe_top1,group.size=6", "cannot be cut evenly"),
        ("vmoe_top1", "needs group.size"),
    ],
)
def test_groups_of__rejects(name: str, says: str) -> None:
    """What cannot be cut evenly is said, not rounded."""
    with pytest.raises(ValueError, match=says):
        groups_of(5, 7, 8, load_dialect(parse_record(name)).group)
