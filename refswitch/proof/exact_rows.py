# May import: standard library, numpy (to take arrays), refswitch.numbers, refswitch.config, refswitch.proof.tape.
"""What the exact oracle covers, and one token up to its gate: noise, logits, softmax, ranking, gate, and whether it is padding.

Scalars in loops, written from sections 2 to 6 and 12 of `spec/switch_layer.md`. `probs_E` is a list of E values. The logits before the cap are
exact rationals, so the choice is decided exactly: softmax and cap are strictly increasing. Spec: S-NOISE-1 to S-GATE-1, S-PAD-1, S-PAD-2.
Next: `exact_switch`.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cmp_to_key, reduce
from typing import Any, NamedTuple, Protocol

import numpy as np

from refswitch.config import Dialect
from refswitch.numbers import rational
from refswitch.numbers.rational import ONE, ZERO, Interval, point
from refswitch.proof.tape import Tape, Undecided, Value, constant, exp, log, logistic, node, tanh, total, variable

PARAMETERS = ("w_router", "b_router", "w_in", "w_gate", "w_out", "b_in", "b_gate", "b_out")
FACTOR_KINDS = ("x_mul_uniform", "x_dropout")
TERM_KINDS = ("z_add_uniform", "z_add_normal", "z_add_gumbel")

# Every knob that is read here, with the values that are covered. Missing are rules with several experts per token, what has parameters that a case
# does not hold (the learned noise, and the balance loss whose load is defined through it), and settings of the run.
COVERED: dict[str, tuple[Any, ...]] = {
    "noise.kind": ("none", *FACTOR_KINDS, *TERM_KINDS),
    "noise.gate_from": ("noisy", "clean"),
    "noise.leak_to_experts": ("never", "if_same_dtype"),
    "select.rule": ("argmax", "sample", "second_place", "ntlb"),
    "gate.value": ("p", "one", "norm_topk", "ratio_st", "sigmoid"),
    "gate.site": ("output", "hidden", "input", "input_and_output"),
    "capacity.slots_lost": (0, 1),
    "priority": ("position", "gate_desc", "random", "unspecified"),
    "drop.output": ("zero", "x_times_gate", "x"),
    "pad.zero_input": (False, True),
    "pad.route": ("exclude", "include", "expert0_weight0"),
    "pad.detect": ("mask", "zero_row"),
    "aux.form": ("product",),
    "aux.f.drops": ("include", "exclude", "to_expert0"),
    "aux.f.pads": ("include", "exclude", "to_expert0"),
    "aux.f.count": ("choice", "logits"),
    "aux.P_pads": ("include", "exclude"),
    "aux.denom": ("S", "valid", "kept"),
    "aux.pad_scale": ("none", "nonpad_fraction"),
    "aux.scale_E": ("E", "none", "inverse_E", "local_E"),
    "z.pads": ("exclude", "include", "zero_logits"),
    "z.denom": ("valid", "S"),
    "expert.act": ("relu", "gelu", "gelu_tanh", "silu"),
    "expert.bias": ("none", "per_expert", "shared_out"),
    "dispatch_grad": ("none", "straight_through"),
}
UNDEFINED = (
    (("select.rule", "ntlb"), ("priority", ("random", "gate_desc"))),  # the order in which a round asks
    (("select.rule", "ntlb"), ("pad.route", ("expert0_weight0",))),  # which slot padding takes in which round
    (("pad.route", "expert0_weight0"), ("priority", ("gate_desc",))),  # the gate by which padding is served
)


class CaseLike(Protocol):
    """What is read of a case: arrays and scalars by name (contract 1.2)."""

    def __getitem__(self, name: str) -> Any: ...

    def __contains__(self, name: object) -> bool: ...


class Layer(NamedTuple):
    """One call: what is given, on which tape, with a variable for every number that gets a gradient."""

    case: CaseLike
    dialect: Dialect
    tape: Tape
    variables: dict[str, np.ndarray]  # of Value; x is 0 where the layer zeroes it
    E: int
    is_zeroed_GS: np.ndarray


class Row(NamedTuple):
    """One token as the router sees it."""

    g: int
    s: int
    is_pad: bool
    x_expert_D: list[Value]
    raw_E: list[Value]  # logits before the cap: exact
    logits_E: list[Value]
    probs_E: list[Value]
    log_sum: Value  # log(sum(exp(logits)))
    ranking_E: list[int]  # experts, best first


def refuse(case: CaseLike, dialect: Dialect) -> None:
    """Raise where the dialect has a rule that is not covered here.

    Raises
    ------
    ValueError
        Naming the rule.
    """
    for knob, values in COVERED.items():
        value = knob_of(dialect, knob)
        if value not in values:
            raise ValueError(f"exact_switch does not cover {knob}={value}")
    for (first, has), (second, one_of) in UNDEFINED:
        value = knob_of(dialect, second)
        if knob_of(dialect, first) == has and value in one_of:
            raise ValueError(f"exact_switch does not cover {first}={has} with {second}={value}: the spec does not say what they mean together")
    if "top_k" in case and case["top_k"] != 1:
        raise ValueError(f"exact_switch covers one expert per token, not top_k={case['top_k']}")


def knob_of(dialect: Dialect, knob: str) -> Any:
    """Return the value of a knob by its dotted name."""
    return reduce(getattr, knob.split("."), dialect)


def grid(shape: tuple[int, ...], make: Callable[..., Any]) -> np.ndarray:
    """Return an array of objects, each made from its index."""
    array = np.empty(shape, dtype=object)
    for index in np.ndindex(*shape):
        array[index] = make(*index)
    return array


# ------------------------------------------------------------------------------------------------- 2, 3: noise and logits


def open_layer(case: CaseLike, dialect: Dialect, bits: int) -> Layer:
    """Put x and every parameter on a tape."""
    x_GSD, tape = np.asarray(case["x"]), Tape(bits)
    is_real_GS = case["valid"] if "valid" in case else np.ones(x_GSD.shape[:2], bool)
    is_zeroed_GS = ~is_real_GS & (dialect.pad.zero_input is True)
    arrays = {"x": np.where(is_zeroed_GS[..., None], 0.0, x_GSD)} | {name: np.asarray(case[name]) for name in PARAMETERS if name in case}

    def variables(array: np.ndarray) -> np.ndarray:
        return grid(array.shape, lambda *index: variable(float(array[index]), tape))

    return Layer(case, dialect, tape, {name: variables(array) for name, array in arrays.items()}, case["w_router"].shape[1], is_zeroed_GS)


def given(layer: Layer, name: str, index: tuple[int, ...], absent: int) -> Fraction:
    """Return a number of the case's data exactly, or what its absence means."""
    return Fraction(float(layer.case[name][index])) if name in layer.case else Fraction(absent)


def tokens_of(layer: Layer, g: int, s: int) -> tuple[list[Value], list[Value]]:
    """Return what the router and what the experts read. Spec: S-NOISE-1, S-NOISE-2."""
    x_D = list(layer.variables["x"][g, s])
    if layer.is_zeroed_GS[g, s]:
        x_D = [constant(0, layer.tape) for _ in x_D]  # a constant: the row has no gradient
    if layer.dialect.noise.kind not in FACTOR_KINDS:
        return x_D, x_D
    noised_D = [x * given(layer, "noise", (g, s, d), 1) for d, x in enumerate(x_D)]
    return noised_D, noised_D if layer.dialect.noise.leak_to_experts == "if_same_dtype" else x_D


def terms_of(layer: Layer, index: tuple[int, int, int]) -> tuple[Fraction, Fraction]:
    """Return what is added to one logit, and what the choice alone adds to it. Spec: S-NOISE-1, S-ROUTE-3."""
    dialect = layer.dialect
    noise = given(layer, "noise", index, 0) if dialect.noise.kind in TERM_KINDS else Fraction(0)
    draw = given(layer, "select_noise", index, 0)
    in_logit, in_choice = (Fraction(0), noise) if dialect.noise.gate_from == "clean" else (noise, Fraction(0))
    if dialect.select.rule == "second_place":
        in_logit += draw
    if dialect.select.rule == "sample":
        in_choice += Fraction(dialect.select.temperature) * draw
    return in_logit, in_choice


def row_of(layer: Layer, g: int, s: int) -> Row:
    """Return one token with its logits, probabilities and ranking. Spec: S-ROUTE-1 to S-ROUTE-3."""
    x_router_D, x_expert_D = tokens_of(layer, g, s)
    w_router_DE, tape = layer.variables["w_router"], layer.tape
    terms_E = [terms_of(layer, (g, s, e)) for e in range(layer.E)]
    raw_E = [total((x * w_router_DE[d, e] for d, x in enumerate(x_router_D)), tape) + terms_E[e][0] for e in range(layer.E)]
    if "b_router" in layer.variables:
        raw_E = [raw + bias for raw, bias in zip(raw_E, layer.variables["b_router"], strict=True)]
    cap = Fraction(layer.dialect.router.logit_cap)
    logits_E = [tanh(raw / cap) * cap for raw in raw_E] if cap else raw_E
    probs_E, log_sum = softmax(logits_E)
    ranking_E = ranking(raw_E, logits_E, [in_choice for _, in_choice in terms_E])
    return Row(g, s, is_padding(layer, g, s), x_expert_D, raw_E, logits_E, probs_E, log_sum, ranking_E)


def is_padding(layer: Layer, g: int, s: int) -> bool:
    """Whether a row counts as padding. Spec: S-PAD-1."""
    if layer.dialect.pad.detect == "zero_row":
        return all(x.interval == ZERO for x in layer.variables["x"][g, s])
    return "valid" in layer.case and not layer.case["valid"][g, s]


# ------------------------------------------------------------------------------------------ 4, 5, 6: softmax, choice, gate


def softmax(logits_E: list[Value]) -> tuple[list[Value], Value]:
    """Return the probabilities and the logarithm of the sum of exponentials.

    Any constant may be taken off all logits; the largest one makes its own exponential exactly 1. The softmax of one logit is the constant 1.
    """
    tape = logits_E[0].tape
    if len(logits_E) == 1:
        return [constant(1, tape)], logits_E[0]
    largest = max(logit.interval.high for logit in logits_E)
    powers_E = [exp(logit - largest) for logit in logits_E]
    summed = total(powers_E, tape)
    return [power / summed for power in powers_E], log(summed) + largest


def sign_of(a: Interval, b: Interval) -> int:
    """Return -1, 0 or 1 for a below, at or above b.

    Raises
    ------
    Undecided
        If the enclosures overlap.
    """
    if a.low > b.high or a.high < b.low:
        return 1 if a.low > b.high else -1
    if rational.is_point(a) and rational.is_point(b):
        return 0
    raise Undecided("two numbers that their enclosures cannot tell apart")


def ranking(raw_E: list[Value], logits_E: list[Value], in_choice_E: list[Fraction]) -> list[int]:
    """Return the experts by falling score, the lower index first among equals.

    The softmax and the cap are strictly increasing, so where the choice adds the same to two experts it is the exact logits that decide.
    """
    bits = raw_E[0].tape.bits
    scores_E = [rational.add(logit.interval, point(added), bits) for logit, added in zip(logits_E, in_choice_E, strict=True)]

    def against(a: int, b: int) -> int:
        if in_choice_E[a] == in_choice_E[b]:
            return sign_of(raw_E[b].interval, raw_E[a].interval)
        return sign_of(scores_E[b], scores_E[a])

    return sorted(range(len(raw_E)), key=cmp_to_key(against))


def gate_of(layer: Layer, row: Row, expert: int) -> Value:
    """Return the factor on the expert. Spec: S-GATE-1; its gradient enters the chosen probability alone: S-BACK-2."""
    value, p = layer.dialect.gate.value, row.probs_E[expert]
    if value in ("one", "norm_topk") or (value == "ratio_st" and sits_out(layer, row)):
        return constant(1, layer.tape)
    if value == "ratio_st":
        return node(ONE, (p, rational.div(ONE, p.interval, layer.tape.bits)))
    return logistic(row.logits_E[expert]) if value == "sigmoid" else p


def sits_out(layer: Layer, row: Row) -> bool:
    """Whether the row's output is 0 whatever it holds. Spec: S-PAD-1."""
    return row.is_pad and layer.dialect.pad.route != "include"


def claims(layer: Layer, row: Row) -> bool:
    """Whether the row asks for a slot. Spec: S-PAD-2."""
    return not row.is_pad or layer.dialect.pad.route != "exclude"
