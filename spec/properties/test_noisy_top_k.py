# May import: standard library, numpy, scipy, hypothesis, refswitch, its own folder.
"""Noisy top-k gating: V-NOISY-1 to V-NOISY-5. Values in tubes, by loops or in rational numbers; gradients as slopes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from scipy.special import ndtr

from properties.drawn import noise_of
from properties.harness import clause, draws, needs
from properties.operations import Operations
from properties.variant_tubes import A64, ACTIVATIONS, POINTS, assert_gradients, assert_within, expert_tubes, mask_of, random_experts, weighted
from refswitch.reference.noisy_top_k import NoisyParams, NoisyStatics
from refswitch.verify import tubes
from refswitch.verify.tubes import OWN_UNIT, Tube, add, contract, exact, multiply

DIMPORTANCE, DLOAD = 0.75, 0.5


class Plan(NamedTuple):
    """The structure of one example."""

    G: int
    S: int
    E: int
    K: int
    capacity: int
    order: str
    noise_floor: float
    epsilon: float
    activation: str
    is_gated: bool
    seed: int


def plans(**given: Any) -> st.SearchStrategy[Plan]:
    """Draw a plan; at most E choices."""
    drawn: dict[str, Any] = {
        "G": st.integers(1, 3), "S": st.sampled_from((7, 5, 9, 1)), "E": st.sampled_from((4, 5, 2, 1)), "K": st.integers(1, 4),
        "capacity": st.integers(1, 9), "order": st.sampled_from(("after_kept", "after_all", "by_token", "until_placed")),
        "noise_floor": st.sampled_from((0.0, 1e-2)), "epsilon": st.sampled_from((0.0, 1e-10)), "activation": st.sampled_from(ACTIVATIONS),
        "is_gated": st.booleans(), "seed": st.integers(0, 2**20),
    }  # fmt: skip
    return st.builds(Plan, **(drawn | given)).map(lambda plan: plan._replace(K=min(plan.K, plan.E)))


EXAMPLES = [
    Plan(2, 7, 5, 2, 3, "after_kept", 1e-2, 1e-10, "silu", False, 1),
    Plan(1, 9, 4, 3, 9, "by_token", 0.0, 0.0, "gelu_erf", True, 2),
    Plan(2, 5, 2, 2, 2, "after_all", 1e-2, 0.0, "gelu_tanh", True, 3),
    Plan(1, 5, 4, 1, 5, "after_kept", 0.0, 1e-10, "silu", False, 4),
]


class Gate(NamedTuple):
    """A gate's data."""

    x_GSD: np.ndarray
    noise_GSE: np.ndarray
    params: NoisyParams


def gate_of(plan: Plan, random: np.random.Generator) -> Gate:
    """Draw tokens, noise and parameters."""
    (G, S, E), D, F = plan[:3], 3, 6
    params = NoisyParams(random.normal(size=(D, E)), random.normal(size=(D, E)), random_experts(random, E, D, F, plan.is_gated))
    return Gate(random.normal(size=(G, S, D)), random.normal(size=(G, S, E)), params)


def random_of(plan: Plan) -> np.random.Generator:
    """Return the plan's generator."""
    return np.random.Generator(np.random.Philox(plan.seed))


def logits_tubes(gate: Gate, noise_floor: float) -> tuple[Tube, Tube, Tube]:
    """Return clean = x w_gate, scale = softplus(x w_noise) + floor, noisy = clean + noise scale."""
    clean, raw = (contract("gsd,de->gse", exact(gate.x_GSD), exact(w), A64, gate.x_GSD.shape[-1]) for w in gate.params[:2])
    pair = Tube(np.stack([np.zeros(raw.value.shape), raw.value], axis=-1), np.stack([np.zeros(raw.value.shape), raw.radius], axis=-1))
    scale = add(tubes.log_sum_exp(pair, A64), exact(np.full(raw.value.shape, noise_floor)), A64)
    return clean, scale, add(clean, multiply(exact(gate.noise_GSE), scale, A64), A64)


@clause("V-NOISY-1")
@needs("noise floor", "none", wide=True)
@draws(examples=EXAMPLES, plan=plans())
def test_noisy_logits__formula_and_slope(operations: Operations, plan: Plan) -> None:
    """Clean logits, scale and noisy logits lie in their tubes; the gradients of input and both matrices are slopes of all three."""
    random = random_of(plan)
    gate, douts = gate_of(plan, random), random.normal(size=(3, *plan[:3]))
    *found, saved = operations.noisy_logits_forward(gate.x_GSD, gate.noise_GSE, gate.params, plan.noise_floor)
    wanted = logits_tubes(gate, plan.noise_floor)
    for name, got, tube in zip(("clean", "scale", "noisy"), found, wanted, strict=True):
        assert_within(got, tube, name)
    operations.meets("noise floor", plan.noise_floor > 0.0)
    operations.meets("none", plan.noise_floor == 0.0)
    dx_GSD, dw_gate_DE, dw_noise_DE = operations.noisy_logits_backward(*douts, saved, gate.params)

    def value(there: dict[str, np.ndarray]) -> tuple[float, int]:
        moved = gate.params._replace(w_gate_DE=there["w_gate"], w_noise_DE=there["w_noise"])
        *parts, _ = operations.noisy_logits_forward(there["x"], gate.noise_GSE, moved, plan.noise_floor)
        return float(sum(np.sum(part * dout) for part, dout in zip(parts, douts, strict=True))), 0

    arguments = {"x": gate.x_GSD, "w_gate": gate.params.w_gate_DE, "w_noise": gate.params.w_noise_DE}
    gradients = {"x": dx_GSD, "w_gate": dw_gate_DE, "w_noise": dw_noise_DE}
    assert assert_gradients(value, arguments, gradients, noise_of(list(zip(wanted, douts, strict=True))), random) == 3


@clause("V-NOISY-1")
@draws()
def test_noisy_logits_forward__does_not_overflow(operations: Operations) -> None:
    """A softplus of +-3000 is 3000 and 0, with slopes 1 and 0: the scale never falls below its floor."""
    params = NoisyParams(np.zeros((1, 2)), np.array([[1.0, -1.0]]), random_experts(np.random.default_rng(0), 2, 1, 1, False))
    _, scale_GSE, _, saved = operations.noisy_logits_forward(np.array([[[3000.0]]]), np.ones((1, 1, 2)), params, 0.5)
    assert scale_GSE.tolist() == [[[3000.5, 0.5]]]
    _, _, dw_noise_DE = operations.noisy_logits_backward(np.zeros((1, 1, 2)), np.ones((1, 1, 2)), np.zeros((1, 1, 2)), saved, params)
    assert dw_noise_DE.tolist() == [[3000.0, 0.0]]


@clause("V-NOISY-2")
@needs("several choices", "one choice", wide=True)
@draws(examples=EXAMPLES, plan=plans())
def test_noisy_gates__formula_and_slope(operations: Operations, plan: Plan) -> None:
    """Gates are the softmax of the chosen noisy logits, with one choice the constant 1; the gradient is the slope, at the chosen entries alone."""
    random, (G, S, E, K) = random_of(plan), plan[:4]
    noisy_GSE, expert_GSK, dgate_GSK = (
        random.normal(size=(G, S, E)),
        np.argsort(random.random((G, S, E)), axis=-1)[..., :K],
        random.normal(size=(G, S, K)),
    )
    gate_GSK, saved = operations.noisy_gates_forward(noisy_GSE, expert_GSK)
    tube = tubes.softmax(exact(np.take_along_axis(noisy_GSE, expert_GSK, axis=-1)), A64)
    assert_within(gate_GSK, tube, "gate")
    large, _ = operations.noisy_gates_forward(4096.0 * noisy_GSE, expert_GSK)
    assert_within(large, tubes.softmax(exact(4096.0 * np.take_along_axis(noisy_GSE, expert_GSK, axis=-1)), A64), "gate of large logits")
    operations.meets("several choices", K > 1)
    operations.meets("one choice", K == 1)
    dnoisy_GSE = operations.noisy_gates_backward(dgate_GSK, saved)
    assert K > 1 or not dnoisy_GSE.any()

    def value(there: dict[str, np.ndarray]) -> tuple[float, int]:
        return float(np.sum(operations.noisy_gates_forward(there["noisy"], expert_GSK)[0] * dgate_GSK)), 0

    assert assert_gradients(value, {"noisy": noisy_GSE}, {"noisy": dnoisy_GSE}, noise_of([(tube, dgate_GSK)]), random) == 1


def load_by_hand(clean_GSE: np.ndarray, scale_GSE: np.ndarray, noisy_GSE: np.ndarray, K: int) -> tuple[Tube, np.ndarray]:
    """Return the load and whose logit each expert has to pass: the K-th highest of the others.

    Phi's slope is below 0.4, and a quotient of two roundings moves z by 2 units of it; |z| phi(z) < 0.25. Phi itself is right to 8 units.
    """
    (G, S, E), passed = clean_GSE.shape, np.zeros(clean_GSE.shape, int)
    value, radius = np.zeros((G, S, E)), np.zeros((G, S, E))
    for g, s, e in np.ndindex(G, S, E):
        others = sorted((i for i in range(E) if i != e), key=lambda i, g=g, s=s: (-noisy_GSE[g, s, i], i))
        passed[g, s, e] = others[K - 1] if len(others) >= K else e
        z = (clean_GSE[g, s, e] - noisy_GSE[g, s, passed[g, s, e]]) / scale_GSE[g, s, e]
        value[g, s, e] = ndtr(z) if len(others) >= K else 1.0
        radius[g, s, e] = (4.0 * 0.25 + 16.0 * value[g, s, e] + 8.0 * abs(clean_GSE[g, s, e]) / scale_GSE[g, s, e]) * OWN_UNIT if K < E else 0.0
    return tubes.total(Tube(value, radius), 1, A64, S), passed


@clause("V-NOISY-3")
@needs("a chosen expert's threshold", "all chosen", wide=True)
@draws(examples=EXAMPLES, plan=plans())
def test_load__formula_and_slope(operations: Operations, plan: Plan) -> None:
    """An expert's load is the sum of its chances to pass the K-th highest of the others, 1 each where all are chosen; its gradient is the slope."""
    random, (G, S, E, K) = random_of(plan), plan[:4]
    clean_GSE, noisy_GSE, dload_GE = random.normal(size=(G, S, E)), random.normal(size=(G, S, E)), random.normal(size=(G, E))
    scale_GSE = 0.25 + random.random((G, S, E))
    load_GE, saved = operations.load_forward(clean_GSE, scale_GSE, noisy_GSE, K)
    tube, passed_GSE = load_by_hand(clean_GSE, scale_GSE, noisy_GSE, K)
    assert_within(load_GE, tube, "load")
    operations.meets("a chosen expert's threshold", K < E)
    operations.meets("all chosen", K == E)
    if K < E:
        assert np.array_equal(saved.threshold_GSE, passed_GSE)
    dclean_GSE, dscale_GSE, dnoisy_GSE = operations.load_backward(dload_GE, saved)

    def value(there: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
        found, kept = operations.load_forward(there["clean"], there["scale"], there["noisy"], K)
        return float(np.sum(found * dload_GE)), kept.threshold_GSE

    arguments = {"clean": clean_GSE, "scale": scale_GSE, "noisy": noisy_GSE}
    gradients = {"clean": dclean_GSE, "scale": dscale_GSE, "noisy": dnoisy_GSE}
    operations.meets("slope", assert_gradients(value, arguments, gradients, noise_of([(tube, dload_GE)]), random))


@clause("V-NOISY-3")
@draws()
def test_normal_cdf__by_its_derivative_and_tail(operations: Operations) -> None:
    """Phi(0) = 1/2, Phi(-z) keeps its digits far in the tail, and the density is its slope."""
    z = np.linspace(-30.0, 8.0, 96)
    # erfc of a z that is rounded once: z^2 units; the library's own error below 64
    assert np.all(np.abs(operations.normal_cdf(z) - ndtr(z)) <= (64.0 + 4.0 * z**2) * OWN_UNIT * ndtr(z))
    assert operations.normal_cdf(np.zeros(1))[0] == 0.5
    step = 2.0**-10
    slope = (ndtr(z + step) - ndtr(z - step)) / (2.0 * step)
    # the third derivative is (z^2 - 1) phi; beyond |z| of 1 / step it would need more terms
    density = operations.normal_density(z)
    near = np.abs(z) < 8.0
    assert np.all(np.abs(density - slope)[near] <= (step**2 * (1.0 + z**2) * (density + slope) + OWN_UNIT / step)[near])


@clause("V-NOISY-4")
@needs("nothing", "epsilon")
@draws(
    examples=[([[1, 2, 3]], 0.0), ([[0, 0, 0], [3, 3, 3]], 1e-10), ([[0, 0]], 0.0)],
    amounts=st.integers(1, 5).flatmap(lambda E: st.lists(st.lists(st.integers(0, 9), min_size=E, max_size=E), min_size=1, max_size=3)),
    epsilon=st.sampled_from((0.0, 1e-10, 0.25)),
)  # fmt: skip
def test_cv_squared_forward__in_rational_numbers(operations: Operations, amounts: list[list[int]], epsilon: float) -> None:
    """The mean over groups of variance over squared mean plus epsilon, the variance of all amounts; a group without anything has 0."""
    E = len(amounts[0])
    scaled = np.array(amounts, float) * E  # the mean is exact
    value, _ = operations.cv_squared_forward(scaled, epsilon)
    terms = []
    for row in scaled.astype(int).tolist():
        mean = Fraction(sum(row), E)
        square = mean**2 + Fraction(epsilon)
        terms.append(sum((a - mean) ** 2 for a in row) / E / square if square else Fraction(0))
    wanted = sum(terms) / len(terms)
    operations.meets("nothing", any(not any(row) for row in amounts))
    operations.meets("epsilon", epsilon > 0.0)
    assert abs(Fraction(float(value)) - wanted) <= (8 + len(terms)) * Fraction(OWN_UNIT) * wanted


def cv_noise(amount_GE: np.ndarray, relative: float, epsilon: float) -> float:
    """Return how far CV^2 may be off where amounts are off by a relative error: 2 (max |a - m| / m + CV^2) times it, and 8 + E roundings."""
    mean = amount_GE.mean(axis=1)
    spread = np.abs(amount_GE - mean[:, None]).max(axis=1) / np.maximum(mean, 1e-9)
    return float(np.mean(2.0 * (spread + spread**2) * (relative + (8.0 + amount_GE.shape[1]) * OWN_UNIT))) + relative**2


@clause("V-NOISY-4")
@needs(wide=True)
@draws(examples=EXAMPLES, plan=plans(E=st.sampled_from((4, 5, 2))))
def test_cv_squared_backward__finite_difference(operations: Operations, plan: Plan) -> None:
    """The slope along the amounts; a group without anything has none, nor have equal amounts."""
    random, (G, E) = random_of(plan), (plan.G, plan.E)
    amount_GE = 0.5 + random.random((G, E))
    _, saved = operations.cv_squared_forward(amount_GE, plan.epsilon)
    damount_GE = operations.cv_squared_backward(2.0, saved)

    def value(there: dict[str, np.ndarray]) -> tuple[float, int]:
        return 2.0 * float(operations.cv_squared_forward(there["amount"], plan.epsilon)[0]), 0

    noise = 4.0 * cv_noise(amount_GE, 4.0 * OWN_UNIT, plan.epsilon)
    assert assert_gradients(value, {"amount": amount_GE}, {"amount": damount_GE}, noise, random) == 1
    for equal_GE in (np.zeros((G, E)), np.full((G, E), 0.5)):
        assert not operations.cv_squared_backward(1.0, operations.cv_squared_forward(equal_GE, 0.0)[1]).any()


@clause("V-NOISY-5")
@needs("drop", "several choices", "one choice", "slope", wide=True)
@draws(examples=EXAMPLES, plan=plans(), fewer=2)
def test_noisy_top_k__values_and_slopes(operations: Operations, plan: Plan) -> None:
    """The parts are put together: chosen by noisy logits, served by arrival, weighed; importance before anything drops; all gradients are slopes."""
    random, (G, S, E, K), F = random_of(plan), plan[:4], 6
    gate, mask_GSKF = gate_of(plan, random), mask_of(random, G, S, K, F)
    dout_GSD = random.normal(size=gate.x_GSD.shape)
    statics = NoisyStatics(K, plan.noise_floor, plan.epsilon, plan.order, plan.capacity, plan.activation, POINTS)
    outputs, saved = operations.noisy_top_k_forward(gate.x_GSD, gate.noise_GSE, mask_GSKF, gate.params, statics)
    clean_GSE, scale_GSE, noisy_GSE, _ = operations.noisy_logits_forward(gate.x_GSD, gate.noise_GSE, gate.params, plan.noise_floor)
    assert np.array_equal(outputs.noisy_GSE, noisy_GSE)
    expert_GSK = np.array([[sorted(range(E), key=lambda e, g=g, s=s: (-noisy_GSE[g, s, e], e))[:K] for s in range(S)] for g in range(G)])
    claims = operations.serve(expert_GSK, np.ones((G, S, K), bool), np.broadcast_to(np.arange(S), (G, S)), E, plan.capacity, plan.order)
    assert all(np.array_equal(mine, wanted) for mine, wanted in zip(outputs.claims, claims, strict=True))
    assert np.array_equal(outputs.gate_GSK, operations.noisy_gates_forward(noisy_GSE, expert_GSK)[0])
    importance_GE = np.array([[np.sum(outputs.gate_GSK[g], where=expert_GSK[g] == e) for e in range(E)] for g in range(G)])
    assert np.all(np.abs(outputs.importance_GE - importance_GE) <= 2.0 * S * K * OWN_UNIT * importance_GE)
    assert np.array_equal(outputs.load_GE, operations.load_forward(clean_GSE, scale_GSE, noisy_GSE, K)[0])
    for loss, amount_GE in ((outputs.importance_loss, outputs.importance_GE), (outputs.load_loss, outputs.load_GE)):
        assert loss == operations.cv_squared_forward(amount_GE, plan.epsilon)[0]
    mask_GSEF, weight = np.zeros((G, S, E, F)), Tube(np.zeros((G, S, E)), np.zeros((G, S, E)))
    tube = tubes.softmax(exact(np.take_along_axis(noisy_GSE, expert_GSK, axis=-1)), A64)
    for g, s, k in np.argwhere(claims.kept_GSK):
        mask_GSEF[g, s, expert_GSK[g, s, k]] = mask_GSKF[g, s, k]
        weight.value[g, s, expert_GSK[g, s, k]], weight.radius[g, s, expert_GSK[g, s, k]] = tube.value[g, s, k], tube.radius[g, s, k]
    out = weighted(weight, expert_tubes(gate.x_GSD, mask_GSEF, gate.params.experts, plan.activation), np.zeros(gate.x_GSD.shape[-1]))
    assert_within(outputs.out_GSD, out, "out")
    operations.meets("drop", not claims.kept_GSK.all() and plan.order != "until_placed")
    operations.meets("several choices", K > 1)
    operations.meets("one choice", K == 1)

    def value(there: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
        experts = gate.params.experts._replace(**{name: array for name, array in there.items() if name in gate.params.experts._fields})
        moved = NoisyParams(there["w_gate"], there["w_noise"], experts)
        found, kept = operations.noisy_top_k_forward(there["x"], gate.noise_GSE, mask_GSKF, moved, statics)
        total = np.sum(found.out_GSD * dout_GSD) + DIMPORTANCE * found.importance_loss + DLOAD * found.load_loss
        return float(total), np.concatenate([np.ravel(part) for part in (*found.claims, kept.load.threshold_GSE)])

    experts = {name: array for name, array in gate.params.experts._asdict().items() if array is not None and (plan.is_gated or name != "b_gate_EF")}
    arguments = {"x": gate.x_GSD, "w_gate": gate.params.w_gate_DE, "w_noise": gate.params.w_noise_DE, **experts}
    dx_GSD, dparams = operations.noisy_top_k_backward(dout_GSD, DIMPORTANCE, DLOAD, saved, gate.params, statics)
    dexperts = dparams.experts._asdict()
    gradients = {"x": dx_GSD, "w_gate": dparams.w_gate_DE, "w_noise": dparams.w_noise_DE, **{name: dexperts[name] for name in experts}}
    steep = float(
        np.max((np.abs(clean_GSE) + np.abs(noisy_GSE)) / scale_GSE) + np.max(np.abs(noisy_GSE)) + 1.0
    )  # what a logit's rounding does to gate and load
    relative = 64.0 * (S * K + E + 8.0) * steep * OWN_UNIT
    noise = noise_of([(out, dout_GSD)]) + sum(cv_noise(amount_GE, relative, plan.epsilon) for amount_GE in (outputs.importance_GE, outputs.load_GE))
    operations.meets("slope", assert_gradients(value, arguments, gradients, noise, random))
