# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""How many slots, how many groups, in which order: S-CAP-2, S-CAP-3, S-PACK-1, each function by itself.

The slots are those of a second reading of the dialects' expressions: fractions, rounded to the dialect's float type after every operation, as NumPy
rounds them. Where no float type could tell, they are whole-number arithmetic.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import strategies as st

from properties.harness import clause, draws, needs
from properties.operations import Operations
from properties.refusals import refusal
from refswitch.config import TRUTH, Capacity, Group
from refswitch.numbers.precision import FORMATS
from refswitch.reference.capacity import Route
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.switch import Statics, SwitchInputs, SwitchParams
from refswitch.spec_data import load_dialect

MESH = load_dialect("mesh_tensorflow")
FACTORS = ("1.0", "1.25", "2.0", "0.7", "1.1", "3.3", "0.0")
EXPRESSIONS = (
    "floor_SxCF_divE", "rhe_CFxS_divE", "ceil_SdivE_xCF", "ceil_SxCF_divE", "floor_CFx_ceilSdivE", "floor_CFx_SdivE", "int_div", "const",
)  # fmt: skip
DIGITS = {"f32": 24, "f64": 53, "external": 53}


def stored(value: Fraction, digits: int) -> Fraction:
    """Return the nearest number of so many binary digits, ties to even: on fractions, far from where a format ends."""
    if not value:
        return value
    quantum = Fraction(2) ** (value.numerator.bit_length() - value.denominator.bit_length() - digits)
    while abs(value) / quantum >= 2**digits:
        quantum *= 2
    while abs(value) / quantum < 2 ** (digits - 1):
        quantum /= 2
    return round(value / quantum) * quantum  # Python rounds a half to even


def floor(value: Fraction) -> int:
    """Return the largest integer that is no larger."""
    return value.numerator // value.denominator


def slots_before_bounds(S: int, E: int, factor: str, rule: Capacity) -> int:
    """Return the dialect's expression, rounded after each of its operations."""
    digits = DIGITS[rule.float]
    tokens, experts, cf = (stored(Fraction(value), digits) for value in (S, E, Fraction(float(factor))))
    share, product = stored(tokens / experts, digits), stored(tokens * cf, digits)
    return {
        "floor_SxCF_divE": floor(stored(product / experts, digits)),
        "rhe_CFxS_divE": round(stored(product / experts, digits)),
        "ceil_SdivE_xCF": -floor(-stored(share * cf, digits)),
        "ceil_SxCF_divE": -floor(-stored(product / experts, digits)),
        "floor_CFx_ceilSdivE": floor(stored(cf * (-(-S // E)), digits)),
        "floor_CFx_SdivE": floor(stored(share * cf, digits)),
        "int_div": S // E,
        "const": rule.constant,
    }[rule.expr]


def slots(S: int, E: int, factor: str, rule: Capacity) -> int:
    """Return what the dialect makes of its expression."""
    found = slots_before_bounds(S, E, factor, rule)
    found = min(found, S) if rule.clamp_to_group else found
    while isinstance(rule.multiple_of, int) and found % rule.multiple_of:
        found += 1
    return max(S, 1) if rule.zero_means_inf and not found else max(found, rule.min)


def rules() -> st.SearchStrategy[Capacity]:
    """Draw what a dialect may say of its capacity."""
    return st.builds(
        lambda **knobs: dataclasses.replace(MESH.capacity, **knobs),
        expr=st.sampled_from(EXPRESSIONS),
        constant=st.sampled_from((5, 1, 0)),
        float=st.sampled_from(("f32", "f64", "external")),
        min=st.sampled_from((0, 1, 4)),
        clamp_to_group=st.booleans(),
        multiple_of=st.sampled_from((1, 4, 3, "external")),
        zero_means_inf=st.booleans(),
    )


@clause("S-CAP-3", is_oracle=True)
@draws()
def test_capacity_of__is_the_expression_rounded_at_each_step(operations: Operations) -> None:
    """Every expression, float type, bound and multiple, for sizes at which the expressions differ by a slot, is the fraction rounded at each step."""
    bounds: tuple[dict[str, Any], ...] = (
        {}, {"clamp_to_group": True}, {"multiple_of": 4}, {"multiple_of": 3, "clamp_to_group": True}, {"min": 4}, {"min": 1, "zero_means_inf": True},
        {"multiple_of": "external"},
    )  # fmt: skip
    for expr in EXPRESSIONS:
        for float_type in ("f32", "f64"):
            for knobs in bounds:
                rule = dataclasses.replace(MESH.capacity, **{"min": 0, "constant": 5, **knobs, "expr": expr, "float": float_type})
                for S, E in ((0, 3), (1, 4), (2, 4), (7, 3), (10, 4), (12, 8), (49, 7), (90, 3), (100, 7), (200, 30)):
                    for factor in FACTORS:
                        assert operations.capacity_of(S, E, factor, rule) == slots(S, E, factor, rule), (S, E, factor, rule)


@clause("S-CAP-3")
@draws(S=st.integers(0, 300), E=st.integers(1, 9), factor=st.sampled_from(FACTORS), rule=rules())
def test_capacity_of__any_sizes(operations: Operations, S: int, E: int, factor: str, rule: Capacity) -> None:
    """The same for drawn sizes; never negative, no less than the least, all the tokens where nothing is ever dropped."""
    found = operations.capacity_of(S, E, factor, rule)
    assert found == slots(S, E, factor, rule)
    assert found >= rule.min
    for expr in ("inf", "max_count"):
        assert operations.capacity_of(S, E, factor, dataclasses.replace(rule, expr=expr)) == max(S, 1)


@clause("S-CAP-3")
@draws()
def test_capacity_in_eval__reads_the_evaluation_s_knobs(operations: Operations) -> None:
    """In evaluation the factor is the evaluation's; or a fraction of the group's tokens, an exact decimal, rounded up, and no less than the least."""
    rule = dataclasses.replace(MESH.capacity, cf_train="1.0", cf_eval="2.0", min=2)
    fraction = dataclasses.replace(rule, eval_rule="token_fraction", eval_fraction="0.1")
    for S in (0, 1, 10, 11, 20, 21, 70):
        assert operations.capacity_in_eval(S, 4, rule) == operations.capacity_of(S, 4, "2.0", rule)
        assert operations.capacity_in_eval(S, 4, fraction) == max(-(-S // 10), 2)


def cuts(tokens: int, multiple_of: int) -> list[int]:
    """Return into how many groups the tokens can be cut, by the definition."""
    return [groups for groups in range(1, tokens + 1) if tokens % groups == 0 and groups % multiple_of == 0]


@clause("S-CAP-3")
@draws()
def test_groups_of__cuts_evenly(operations: Operations) -> None:
    """Groups are equal: one for each sequence, one, so many, or of such a size; where searched for, the first even cut from tokens // size on."""
    for sequences, length in ((3, 8), (5, 7), (2, 12), (1, 16), (3, 1), (4, 9)):
        tokens = sequences * length
        assert operations.groups_of(sequences, length, 2, Group("sequence", 4, 1)) == sequences
        assert operations.groups_of(sequences, length, 2, Group("batch", 4, 1)) == 1
        assert operations.groups_of(sequences, length, 2, Group("ep_world", 4, 1)) == 1
        for size in (1, 2, 5, 7, 12, 60, tokens):
            for multiple_of in (1, 2, "external"):
                replicas = 1 if multiple_of == "external" else multiple_of
                for rule, multiple in (("mesh", replicas), ("flax", 2 * replicas)):
                    least = max(tokens // size, multiple if rule == "flax" else 1)
                    held = [groups for groups in cuts(tokens, multiple) if groups >= least]
                    check_groups(operations, (sequences, length, 2, Group(rule, size, multiple_of)), held[0] if held else None, tokens % multiple)
            check_groups(operations, (sequences, length, 2, Group("n_groups", size, 1)), size if tokens % size == 0 else None, 0)
            check_groups(operations, (sequences, length, 2, Group("fixed", size, 1)), tokens // size if tokens % size == 0 else None, 0)
            assert_refused(operations, sequences, length, Group("fixed", size, tokens + 1))


def check_groups(operations: Operations, arguments: tuple[Any, ...], groups: int | None, remainder: int) -> None:
    """Assert how a rule cuts, or that it refuses to where there is no even cut."""
    if remainder or (groups is None and arguments[3].rule in ("fixed", "n_groups")):
        assert_refused(operations, arguments[0], arguments[1], arguments[3])
    elif groups is not None:
        assert operations.groups_of(*arguments) == groups, arguments


def assert_refused(operations: Operations, sequences: int, length: int, rule: Group) -> None:
    """Assert that a cut is refused, in words."""
    assert "cannot be cut" in refusal(lambda: operations.groups_of(sequences, length, 2, rule))


@clause("S-CAP-3")
@draws()
def test_groups_of__wants_a_size(operations: Operations) -> None:
    """A size that is left to the run is asked for, where the rule has one."""
    for rule in ("mesh", "flax", "fixed", "n_groups"):
        assert "needs group.size" in refusal(lambda rule=rule: operations.groups_of(2, 8, 2, Group(rule, "external", 1)))
    assert operations.groups_of(2, 8, 2, Group("sequence", "external", "external")) == 2


@clause("S-CAP-2")
@draws(seed=st.integers(0, 2**20))
def test_order_by_gate__surest_first(operations: Operations, seed: int) -> None:
    """Priorities are a permutation of each group: nobody comes before a larger gate, and equal gates come in order of arrival."""
    random = np.random.Generator(np.random.Philox(seed))
    gate_GS = random.integers(1, 5, (3, 40)) / 4.0
    priority_GS = operations.order_by_gate(gate_GS)
    for gate_S, priority_S in zip(gate_GS, priority_GS, strict=True):
        by_hand = sorted(range(len(gate_S)), key=lambda s: (-gate_S[s], s))
        assert [int(s) for s in np.argsort(priority_S)] == by_hand
        assert sorted(priority_S) == list(range(len(gate_S)))


@clause("S-PACK-1")
@draws(seed=st.integers(0, 2**20))
def test_slots_in_use__is_the_least_that_holds_them(operations: Operations, seed: int) -> None:
    """One more than the highest slot that is held, an integer of Python's; a slot of a dropped claim does not count, and no slot is 0."""
    random = np.random.Generator(np.random.Philox(seed))
    slot_GS, kept_GS = random.integers(0, 9, (2, 5)), random.random((2, 5)) < 0.5
    found = operations.slots_in_use(Route(np.zeros_like(slot_GS), slot_GS, kept_GS))
    assert type(found) is int
    assert found == max((int(slot) + 1 for slot, kept in zip(slot_GS.flat, kept_GS.flat, strict=True) if kept), default=0)
    assert operations.slots_in_use(Route(slot_GS, slot_GS, np.zeros_like(kept_GS))) == 0


@clause("S-CAP-1", "S-POS-1")
@draws()
def test_slots_forward__counts_in_the_declared_format(operations: Operations) -> None:
    """Counts are stored in the format that is declared for them, then made exclusive: in bfloat16 the 257th claim has the slot of the 256th."""
    expert_GS, everyone_GS, first_come_GS = np.zeros((1, 258), np.int64), np.ones((1, 258), bool), np.arange(258)[None]
    exact = operations.slots_forward(expert_GS, everyone_GS, first_come_GS, 2, 257, FORMATS["float64"])
    assert exact.slot_GS[0].tolist() == list(range(258))
    assert exact.kept_GS[0].tolist() == [True] * 257 + [False]
    narrow = operations.slots_forward(expert_GS, everyone_GS, first_come_GS, 2, 256, FORMATS["bfloat16"])
    assert narrow.slot_GS[0].tolist() == [*range(256), 255, 257]
    assert narrow.kept_GS[0].tolist() == [True] * 257 + [False]
    assert (operations.slots_forward(expert_GS, everyone_GS, first_come_GS, 2, 257).slot_GS == exact.slot_GS).all()


@clause("S-CAP-2")
@draws(seed=st.integers(0, 2**20), E=st.sampled_from((3, 2, 5)), K=st.sampled_from((3, 2, 1)), capacity=st.integers(0, 4))
def test_no_token_left_behind__round_by_round(operations: Operations, seed: int, E: int, K: int, capacity: int) -> None:
    """First choices come first, then the second ones of those who found no room; who finds none has its first choice, slot 0, and is dropped."""
    random = np.random.Generator(np.random.Philox(seed))
    choices_GSK = np.argsort(random.random((2, 11, E)), axis=-1)[..., :K]
    claims_GS = random.random((2, 11)) < 0.8
    route = operations.no_token_left_behind(choices_GSK, claims_GS, E, capacity)
    for g in range(2):
        used, expert, slot, kept = [0] * E, [int(choice) for choice in choices_GSK[g, :, 0]], [0] * 11, [False] * 11
        for k in range(K):
            for s in range(11):
                e = int(choices_GSK[g, s, k])
                if claims_GS[g, s] and not kept[s] and used[e] < capacity:
                    expert[s], slot[s], kept[s], used[e] = e, used[e], True, used[e] + 1
        assert (route.expert_GS[g].tolist(), route.slot_GS[g].tolist(), route.kept_GS[g].tolist()) == (expert, slot, kept)


@clause("S-ROUTE-3", "S-CAP-2")
@needs(wide=True)
@draws()
def test_switch_forward__asks_as_many_experts_as_the_dialect_says(operations: Operations) -> None:
    """Of 40 experts every second is better, all alike: a token's choices are the first of those, and with one slot each as many tokens are served."""
    S, D, E, F = 5, 2, 40, 3
    better_E = np.arange(E) % 2
    for choices in (1, 2, 3):
        dialect = load_dialect({"base": "mesh_tensorflow", "select.rule": "ntlb", "select.choices": choices})
        ones_GSD, none_GSE = np.ones((1, S, D)), np.zeros((1, S, E))
        inputs = SwitchInputs(ones_GSD, ones_GSD[..., 0] > 0, ones_GSD, none_GSE, none_GSE, np.arange(S)[None], np.ones((1, S, F)))
        experts = ExpertsParams(np.ones((E, D, F)), None, np.ones((E, F, D)), np.zeros((E, F)), np.zeros((E, F)), np.zeros((E, D)))
        params = SwitchParams(np.broadcast_to(better_E.astype(np.float64), (D, E)), np.zeros(E), experts, np.zeros(D))
        outputs, _ = operations.switch_forward(inputs, params, Statics(dialect, TRUTH, "relu", 1))
        assert outputs.route.expert_GS[0].tolist() == [*(2 * k + 1 for k in range(choices)), *[1] * (S - choices)]
        assert outputs.route.kept_GS[0].tolist() == [s < choices for s in range(S)]
