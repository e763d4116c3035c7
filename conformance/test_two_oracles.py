# May import: standard library, numpy, pytest, refswitch, conformance.two_oracles.
"""The exact oracle: its enclosures against decimal arithmetic, itself against the reference and the judge's tubes, and planted bugs.

A command for thousands of cases is `two_oracles`, which says what is compared. Every comparison here is of integers, of exact rationals, or with a
radius that the judge derives; a planted bug must be noticed by it. Clauses: S-NOISE-1 to S-BACK-6.
"""

from __future__ import annotations

import decimal
import functools
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from conformance.two_oracles import (
    KNOBS,
    SETTINGS,
    SUBJECTS,
    Drawn,
    Witness,
    covered,
    disagreements,
    draw,
    exactly,
    new_summary,
    table,
    with_knobs,
    witness,
)
from refswitch.config import Dialect
from refswitch.numbers import rational
from refswitch.numbers.rational import ONE, Interval, is_point, point
from refswitch.proof import exact_rows, exact_switch, tape
from refswitch.spec_data import load_dialect, names_of
from refswitch.verify.case import Case

CASES = 800
PATIENCE = 4000  # cases that a planted bug has in order to be noticed

# --------------------------------------------------------------------------------------------------------------- enclosures

ROOM = 30  # digits that the decimal arithmetic has beyond the enclosure


def _sum(term: Decimal, following: Callable[[Decimal, int], Decimal]) -> Decimal:
    """Add terms until they no longer change the sum."""
    total, n = Decimal(0), 0
    while total + term != total:
        total, n = total + term, n + 1
        term = following(term, n)
    return total


def _decimal_pi() -> Decimal:
    """pi = 2 * sum of n! / (2n+1)!!: not Machin's formula."""
    return 2 * _sum(Decimal(1), lambda term, n: term * n / (2 * n + 1))


def _decimal_erf(x: Decimal) -> Decimal:
    """2 / sqrt(pi) * sum of (-1)**n x**(2n+1) / (n! (2n+1)): the alternating series, with digits for its cancellation."""
    decimal.getcontext().prec += int(x * x) + 5
    total, power, n = Decimal(0), x, 0
    while total + power / (2 * n + 1) != total:
        total, n = total + power / (2 * n + 1), n + 1
        power = -power * x * x / n
    return total * 2 / _decimal_pi().sqrt()


def _decimal_tanh(x: Decimal) -> Decimal:
    decimal.getcontext().prec += 2 * max(0, -x.adjusted())
    return ((2 * x).exp() - 1) / ((2 * x).exp() + 1)


KNOWN: dict[str, tuple[Callable[[Interval, int], Interval], Callable[[Decimal], Decimal], tuple[str, ...]]] = {
    "exp": (rational.exp, lambda x: x.exp(), ("0.5", "-0.5", "1", "-1", "1e-30", "-1e-9", "30.25", "-87.125", "700", "-2000")),
    "log": (rational.log, lambda x: x.ln(), ("2", "0.5", "1.34", "0.66", "1.000000001", "0.99999", "3", "1e-40", "1e40", "123456.789")),
    "tanh": (rational.tanh, _decimal_tanh, ("0.5", "-0.5", "1e-30", "-1e-9", "3.75", "-20", "60", "0.001")),
    "logistic": (rational.logistic, lambda x: 1 / (1 + (-x).exp()), ("0", "0.5", "-0.5", "1e-30", "30.25", "-87.125", "-700")),
    "erf": (rational.erf, _decimal_erf, ("0.5", "-0.5", "1e-30", "-1e-9", "1", "2.5", "-4.75", "7", "0.001")),
    "normal_cdf": (
        rational.normal_cdf, lambda x: (1 + _decimal_erf(x / Decimal(2).sqrt())) / 2, ("0", "0.5", "-0.5", "1e-30", "1", "-2.5", "4.75", "0.001")
    ),
    "normal_density": (
        rational.normal_density, lambda x: (-x * x / 2).exp() / (2 * _decimal_pi()).sqrt(), ("0", "0.5", "-0.5", "1e-30", "-2.5", "30")
    ),
    "sqrt": (rational.sqrt, lambda x: x.sqrt(), ("2", "0.5", "1e-40", "1e40", "3.25", "4")),
    "pi": (lambda _, bits: rational.pi(bits), lambda _: _decimal_pi(), ("0",)),
    "log_2": (lambda _, bits: rational.log_2(bits), lambda _: Decimal(2).ln(), ("0",)),
}  # fmt: skip


def encloses(interval: Interval, value: Decimal, digits: int) -> bool:
    """Whether the interval contains a decimal that is known to this many digits."""
    error = abs(Fraction(value)) / 10**digits
    return interval.low <= Fraction(value) + error and Fraction(value) - error <= interval.high


def _decimal(function: Callable[[Decimal], Decimal], argument: str, digits: int) -> Decimal:
    with decimal.localcontext() as context:
        context.prec = digits + ROOM
        return function(Decimal(argument))


@pytest.mark.parametrize("bits", [40, 160, 400])
@pytest.mark.parametrize("name", KNOWN)
def test_enclosure__contains_the_value_and_is_narrow(name: str, bits: int) -> None:
    enclosed, known, arguments = KNOWN[name]
    digits = bits // 3 + ROOM  # a digit is 3.3 bits
    for argument in arguments:
        found, value = enclosed(point(argument), bits), _decimal(known, argument, digits)
        assert encloses(found, value, digits), (argument, float(found.low), value)
        size = 1 if name == "normal_cdf" else abs(Fraction(value))
        assert (found.high - found.low) * 2 ** (bits - 20) <= size, (argument, float(found.high - found.low))
        if not is_point(found):
            width = found.high - found.low
            for moved in (Interval(found.low + 2 * width, found.high + 2 * width), Interval(found.low - 2 * width, found.high - 2 * width)):
                assert not encloses(moved, value, digits), argument


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in ("pi", "log_2")])
def test_enclosure__of_an_interval_contains_that_of_its_points(name: str) -> None:
    enclosed, _, arguments = KNOWN[name]
    low, high = sorted(Fraction(argument) for argument in arguments)[1:3]
    image = enclosed(Interval(low, high), 100)
    for at in (low, (low + high) / 2, high):
        inner = enclosed(point(at), 200)
        assert image.low <= inner.low
        assert inner.high <= image.high


def test_interval__arithmetic_contains_every_corner() -> None:
    random = np.random.Generator(np.random.Philox(5))
    for _ in range(300):
        ends = [Fraction(int(end), 7) for end in random.integers(-9, 10, 4)]
        a, b = Interval(*sorted(ends[:2])), Interval(*sorted(ends[2:]))
        for name, exact in (("add", Fraction.__add__), ("sub", Fraction.__sub__), ("mul", Fraction.__mul__)):
            image = getattr(rational, name)(a, b, 6)
            corners = [exact(x, y) for x in a for y in b]
            assert image.low <= min(corners)
            assert max(corners) <= image.high
            assert is_point(image) == (min(corners) == max(corners))
        if b.low > 0 or b.high < 0:
            quotient = rational.div(a, b, 6)
            assert all(quotient.low <= x / y <= quotient.high for x in a for y in b)


def test_interval__rejects_what_it_cannot_enclose() -> None:
    around_0 = Interval(Fraction(-1), Fraction(1))
    with pytest.raises(ZeroDivisionError):
        rational.div(ONE, around_0, 60)
    with pytest.raises(ValueError, match="not positive"):
        rational.log(around_0, 60)
    with pytest.raises(OverflowError):
        rational.exp(point(10**6), 60)
    assert rational.exp(point(-(10**9)), 60) == Interval(Fraction(0), Fraction(1, 2**rational.FINEST))


# ----------------------------------------------------------------------------------------------------- the oracle on its own


def case_of(x_GSD: Any, w_router_DE: Any, capacity: int, activation: str = "relu", **arrays: Any) -> Case:
    """Return a case with experts of width 1 that pass the first component on."""
    x_GSD, w_router_DE = np.asarray(x_GSD, np.float64), np.asarray(w_router_DE, np.float64)
    D, E = w_router_DE.shape
    own = {"x": x_GSD, "w_router": w_router_DE, "w_in": np.ones((E, D, 1)), "w_out": np.ones((E, 1, D)), "dout": np.ones(x_GSD.shape)}
    return Case({"capacity": capacity, "top_k": 1, "activation": activation}, own | arrays)


LOGITS = [[2, 1, 0], [2, 0, 1], [1.5, 1, 0], [0, 2, 1], [3, 0, 0], [0, 0, 2], [1, 0.5, 0], [2, 1.9, 0]]


def test_exact_switch__eight_tokens_worked_by_hand() -> None:
    """The numbers of spec/switch_layer.md, sections 6, 8, 13 and 14."""
    found = exact_switch.exact_switch(case_of([LOGITS], np.eye(3), 2), load_dialect("mesh_tensorflow"))
    assert found["expert"].tolist() == [[0, 0, 0, 1, 0, 2, 0, 0]]
    assert found["slot"].tolist() == [[0, 1, 2, 0, 3, 0, 4, 5]]
    assert np.flatnonzero(found["kept"]).tolist() == [0, 1, 3, 5]
    gates = [round(float(gate.low), 6) for gate in found["gate"][0]]
    assert gates == [0.665241, 0.665241, 0.546549, 0.665241, 0.909443, 0.786986, 0.506480, 0.490155]
    assert round(float(found["aux_loss"][()].low), 6) == 1.307730
    assert round(float(found["z_loss"][()].low), 6) == 5.824380


def test_exact_switch__is_exact_where_nothing_is_transcendental() -> None:
    """Under a gate of 1 the whole layer is rational: 0.1 is the float nearest to a tenth, and its cube is no float."""
    dialect = load_dialect({"base": "mesh_tensorflow", "gate.value": "one"})
    case = case_of([[[0.1, 0.1]]], np.full((2, 2), 0.1), 1, w_in=np.full((2, 2, 1), 0.1), w_out=np.full((2, 1, 2), 0.1))
    found = exact_switch.exact_switch(case, dialect)
    assert found["out"][0, 0, 0] == point(2 * Fraction(0.1) ** 3)
    assert all(is_point(number) for name in ("out", "dx", "dw_in", "dw_out", "dw_router") for number in found[name].flat)
    assert found["probs"][0, 0, 0] == point(Fraction(1, 2))  # a tie: e**0 / (e**0 + e**0)


def test_exact_switch__more_bits_are_narrower_and_inside() -> None:
    for seed in range(12):
        case, dialect, _ = draw(seed)
        wide, narrow = (exact_switch.exact_switch(case, dialect, bits) for bits in (100, 200))
        for name, array in wide.items():
            for outer, inner in zip(array.flat, narrow[name].flat, strict=True):
                if isinstance(outer, Interval):
                    assert outer.low <= inner.high
                    assert inner.low <= outer.high
                    assert inner.high - inner.low <= outer.high - outer.low


def _loss(found: dict[str, np.ndarray], case: Case) -> Fraction:
    out = sum((number.low * Fraction(float(weight)) for number, weight in zip(found["out"].flat, case.dout.flat, strict=True)), Fraction(0))
    return out + Fraction(float(case.daux)) * found["aux_loss"][()].low + Fraction(float(case.dz)) * found["z_loss"][()].low


def slope_errors(case: Case, dialect: Dialect, name: str, random: np.random.Generator) -> list[Fraction]:
    """Return |central difference - gradient| along a random direction for two steps, the second half the first."""
    found = exact_switch.exact_switch(case, dialect)
    step = random.integers(-3, 4, case.arrays[name].shape) / 4.0
    slope = sum((g.low * Fraction(float(h)) for g, h in zip(found[f"d{name}"].flat, step.flat, strict=True)), Fraction(0))
    errors = []
    for h in (2.0**-20, 2.0**-21):
        moved = [Case(case.scalars, case.arrays | {name: case.arrays[name] + sign * h * step}) for sign in (1, -1)]
        ahead, behind = (exact_switch.exact_switch(other, dialect) for other in moved)
        assert (ahead["expert"] == behind["expert"]).all()
        errors.append(abs((_loss(ahead, case) - _loss(behind, case)) / (2 * Fraction(h)) - slope))
    return errors


def smooth_case() -> tuple[Case, Dialect]:
    """Return a case without ties or relu that drops tokens; its numbers are quarters, so that steps of 2**-23 are exact."""
    random = np.random.Generator(np.random.Philox(11))

    def quarters(*shape: int) -> np.ndarray:
        return random.integers(-6, 7, shape) / 4.0

    arrays = {"w_in": quarters(3, 2, 2), "w_gate": quarters(3, 2, 2), "w_out": quarters(3, 2, 2), "b_out": quarters(3, 2), "dout": quarters(2, 4, 2)}
    dialect = load_dialect({"base": "hf_le_4_51", "noise.kind": "none", "expert.glu": True, "expert.act": "gelu_tanh", "expert.bias": "per_expert"})
    return case_of(quarters(2, 4, 2), quarters(2, 3) + 0.125, 1, "gelu_tanh", daux=np.asarray(0.375), dz=np.asarray(0.5), **arrays), dialect


NAMES = ("x", "w_router", "w_in", "w_gate", "w_out", "b_out")


@pytest.mark.parametrize("name", NAMES)
def test_exact_switch__finite_difference(name: str) -> None:
    """The error of a central difference falls by four when the step is halved, and here nothing is rounded that could hide it."""
    errors = slope_errors(*smooth_case(), name, np.random.Generator(np.random.Philox(3)))
    assert errors[1] * 3 < errors[0] or errors[0] < Fraction(1, 2**120), [float(error) for error in errors]


def test_exact_switch__finite_difference_notices_a_wrong_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_switch, "gate_of", gate_gradient_to_all)
    errors = slope_errors(*smooth_case(), "w_router", np.random.Generator(np.random.Philox(3)))
    assert errors[1] * 3 >= errors[0]


# ----------------------------------------------------------------------------------------------------------------- coverage

UNCOVERED = {
    "fairscale_top2": "select.rule=top2_gumbel",
    "st_moe_pytorch": "select.rule=topn_random",
    "t2t_noisy_top1": "noise.kind=z_add_learned_normal",
    "praxis_topk1": "pad.zero_input=external",
    "vllm_reference": "gate.value=external",
}


@pytest.mark.parametrize("name", names_of("dialects"))
def test_exact_switch__covers_the_records(name: str) -> None:
    """Every record with one choice per token and no parameters of its own; those that leave a setting to the run, under each setting."""
    reason = covered(load_dialect(name))
    assert reason is None if name not in UNCOVERED else UNCOVERED[name] in (reason or ""), reason
    assert (name in {subject for subject, _ in SUBJECTS}) == (name not in UNCOVERED or name in SETTINGS)


def test_exact_switch__rejects_what_it_does_not_cover() -> None:
    case, dialect, _ = draw(0)
    with pytest.raises(ValueError, match="top_k=2"):
        exact_switch.exact_switch(Case({**case.scalars, "top_k": 2}, case.arrays), dialect)
    with pytest.raises(ValueError, match=r"select\.rule=ntlb with priority=random"):
        exact_switch.exact_switch(case, with_knobs(dialect, {"select.rule": "ntlb", "priority": "random"}))
    with pytest.raises(ValueError, match=r"aux\.form=cv_squared"):
        exact_switch.exact_switch(case, with_knobs(dialect, {"aux.form": "cv_squared"}))


# --------------------------------------------------------------------------------------------------------------- comparison


@functools.cache
def prepared(seed: int) -> tuple[Drawn, Witness]:
    """Return a case with what the reference and the judge say of it."""
    drawn = draw(seed)
    return drawn, witness(drawn)


def test_two_oracles__agree() -> None:
    summary, met = new_summary(), set()
    for seed in range(CASES):
        drawn, of = prepared(seed)
        try:
            found = disagreements(exactly(drawn.case, drawn.dialect), of, summary)
        except tape.Undecided:
            summary.counts["undecided"] += 1
            continue
        assert not found, f"seed {seed}: {drawn}\n" + "\n".join(found)
        met |= {drawn.dialect.name} if drawn.case.sizes["S"] else set()
    print(table(summary))
    assert met == {name for name, _ in SUBJECTS}
    assert summary.counts["vacuous radii"] == 0
    assert (summary.counts["ambiguous and different"] + summary.counts["undecided"]) * 100 < CASES
    assert set(summary.tube_share) == {
        "out", "logits", "probs", "gate", "hidden", "expert_out", "aux_loss", "z_loss", "dx", "dw_router", "db_router", "dw_in", "dw_gate",
        "dw_out", "db_in", "db_gate", "db_out",
    }  # fmt: skip


def is_noticed(drawn: Drawn, of: Witness, under: Dialect) -> bool:
    """Whether the exact oracle, planted or under another dialect, is told from the reference."""
    try:
        mine = exact_switch.exact_switch(drawn.case, under)
    except (tape.Undecided, ZeroDivisionError):
        return False
    return bool(disagreements(mine, of, new_summary()))


def inclusive_slots(claimed: list[int], expert: int) -> int:
    """Count the token itself, too."""
    return claimed.count(expert) + 1


def gate_not_applied(layer: Any, gate: Any, *sites: str) -> Any:
    """Forget the gate, wherever it sits."""
    return tape.constant(1, layer.tape)


def balance_scale_twice(aux: Any, E: int) -> Fraction:
    """Multiply by E once more."""
    return _BALANCE_SCALE(aux, E) * E


def z_loss_over_all_rows(layer: Any, rows: list[Any]) -> Any:
    """Divide by padding, too."""
    return _Z_LOSS_OF(layer._replace(dialect=with_knobs(layer.dialect, {"z.denom": "S"})), rows)


def gate_gradient_to_all(layer: Any, row: Any, expert: int) -> Any:
    """Send the gate's gradient to every probability."""
    gate = _GATE_OF(layer, row, expert)
    return tape.node(gate.interval, (gate, ONE), *((p, ONE) for e, p in enumerate(row.probs_E) if e != expert))


def f_differentiated(layer: Any, row_S: list[Any], place_S: list[Any]) -> Any:
    """Let the balance loss's gradient flow into f as if it were the mean probability."""
    balance = _BALANCE_OF(layer, row_S, place_S)
    return tape.node(balance.interval, (balance, ONE), *((p, point(Fraction(1, len(row_S)))) for row in row_S for p in row.probs_E[:1]))


def softmax_without_its_denominators_gradient(logits_E: list[Any]) -> Any:
    """Divide by a constant: d p_j / d l_e = 0 for j other than e."""
    probs_E, log_sum = _SOFTMAX(logits_E)
    return [tape.node(p.interval, (logit, p.interval)) for p, logit in zip(probs_E, logits_E, strict=True)], log_sum


def relu_leaks(z: Any, activation: str) -> Any:
    """Pass the gradient of a negative pre-activation on."""
    return tape.node(tape.relu(z).interval, (z, ONE)) if activation == "relu" else _ACTIVATE(z, activation)


def one_gelu(z: Any, activation: str) -> Any:
    """Take the GELU by tanh for that by erf: they differ by less than 5e-4."""
    return _ACTIVATE(z, "gelu_tanh" if activation == "gelu_erf" else activation)


def last_come_first_served(layer: Any, row_S: list[Any]) -> list[int]:
    """Serve from the end."""
    return _SERVED_ORDER(layer, row_S)[::-1]


def gradient_past_the_noise(layer: Any, g: int, s: int) -> Any:
    """Forget the noise's factor on the way back to x."""
    x_D = layer.variables["x"][g, s]
    router_D, expert_D = _TOKENS_OF(layer, g, s)
    return [tape.node(noised.interval, (x, ONE)) for noised, x in zip(router_D, x_D, strict=True)], expert_D


def best_logit_less(logits_E: list[Any]) -> Any:
    """Leave the largest logit out of the log-sum-exp again: a shift that the probabilities do not see."""
    probs_E, log_sum = _SOFTMAX(logits_E)
    return probs_E, log_sum - max(logit.interval.high for logit in logits_E)


_BALANCE_SCALE, _Z_LOSS_OF, _GATE_OF, _BALANCE_OF = exact_switch.balance_scale, exact_switch.z_loss_of, exact_switch.gate_of, exact_switch.balance_of
_SOFTMAX, _ACTIVATE, _SERVED_ORDER, _TOKENS_OF = exact_rows.softmax, exact_switch.activate, exact_switch.served_order, exact_rows.tokens_of
PLANTED: dict[str, tuple[Any, Callable[..., Any]]] = {
    "earlier_claims": (exact_switch, inclusive_slots),
    "gate_at": (exact_switch, gate_not_applied),
    "balance_scale": (exact_switch, balance_scale_twice),
    "z_loss_of": (exact_switch, z_loss_over_all_rows),
    "gate_of": (exact_switch, gate_gradient_to_all),
    "balance_of": (exact_switch, f_differentiated),
    "softmax": (exact_rows, softmax_without_its_denominators_gradient),
    "activate": (exact_switch, relu_leaks),
    "activate ": (exact_switch, one_gelu),
    "served_order": (exact_switch, last_come_first_served),
    "tokens_of": (exact_rows, gradient_past_the_noise),
    "softmax ": (exact_rows, best_logit_less),
}


@pytest.mark.parametrize("name", PLANTED, ids=lambda name: PLANTED[name][1].__name__)
def test_two_oracles__notice_a_planted_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, wrong = PLANTED[name]
    monkeypatch.setattr(module, name.strip(), wrong)
    assert any(is_noticed(*prepared(seed), prepared(seed)[0].dialect) for seed in range(PATIENCE))


# Knobs whose value decides what a case holds cannot be turned after the case was drawn.
SHAPES = ("router.bias", "noise.kind", "select.rule", "priority", "expert.act", "expert.glu", "expert.bias")


def test_two_oracles__notice_every_knob() -> None:
    """The exact oracle under a dialect that differs in one knob is told from the reference, for every value of every knob."""
    left = {(knob, value) for knob, values in KNOBS.items() if knob not in SHAPES and len(values) > 1 for value in values}
    for seed in range(PATIENCE):
        drawn, of = prepared(seed)
        if not left:
            break
        for knob, value in sorted(left, key=str):
            under = with_knobs(drawn.dialect, {knob: value})
            if under != drawn.dialect and covered(under) is None and is_noticed(drawn, of, under):
                left.discard((knob, value))
    assert left == set()
