# May import: standard library, numpy, scipy, pytest, refswitch, legal_float32 (on the path).
"""Loss curves of one configuration on both backends: within a derived radius at first, among legal runs for some steps, the same on average after.

Level 1: the first loss lies within the sum of |d(loss)/d(result)| times radius over all results of the pass. Level 2: the first steps lie where runs
lie whose every result is moved at random inside its radius. Level 3: the mean of a longer run's last third, over several seeds, differs by no more
than the last rounding of the loss, or of the parameters, may make. Planted faults say what each level notices, and what none does.
Spec: training, section 8.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "spec"))
from legal_float32 import Legal, Move, Place, drawn, unmoved

from refswitch.backends import reference
from refswitch.backends.cpu import Cpu
from refswitch.engine.optimizer import Optimizer
from refswitch.engine.step import Setup, evaluate, initial_state, loss_and_gradients, part_forward, train_step, whole_denominator
from refswitch.model_config import PRESETS
from refswitch.model_init import initial_params
from refswitch.numbers.bfloat16 import round_bf16
from refswitch.numbers.precision import FORMATS
from refswitch.precision import PRECISIONS, rounded
from refswitch.reference.adafactor import AdafactorState
from refswitch.reference.schedule import inverse_square_root
from refswitch.reference.switch import SwitchInputs, SwitchParams
from refswitch.reference.transformer import Batch, ModelParams
from refswitch.tree import leaves
from refswitch.worlds.one import ONE

CONFIG = replace(
    PRESETS["tiny_switch"], vocabulary=24, d_ff=12, decoder_layers=1, decoder_sparse=(0,), encoder_sparse=(1,), dropout=0.1, expert_dropout=0.2,
    dialect="mesh_tensorflow,z.coef=0.1",
)  # fmt: skip
B, M, L = 8, 10, 6
FIRST, RUNS = 8, 12  # steps and legal runs of level 2
LONG, SEEDS = 90, 6  # steps and pairs of runs of level 3
HELD_OUT = 5  # of so many steps one is followed by an evaluation
FALSE_ALARM = 2.0**-10  # of each level as a whole


def batch_of(seed: int, step: int) -> Batch:
    """Draw padded rows; the targets are the beginning of the inputs, backwards."""
    rng = np.random.default_rng([seed, step])
    tokens_BM, valid_BM, valid_BL = 1 + rng.zipf(1.5, (B, M)) % (CONFIG.vocabulary - 1), np.ones((B, M), bool), np.ones((B, L), bool)
    valid_BM[0, 7:] = valid_BL[0, 4:] = False
    targets_BL = tokens_BM[:, L - 1 :: -1].copy()
    decoder_BL = np.pad(targets_BL[:, :-1], ((0, 0), (1, 0)))
    encoder, decoder = (valid_BM.astype(int), valid_BM, np.arange(M)), (valid_BL.astype(int), valid_BL, np.arange(L))
    return Batch(tokens_BM, *encoder, decoder_BL, *decoder, targets_BL, valid_BL.astype(np.float32))


def setup_of(setting: str, seed: int = 0) -> Setup:
    return Setup(CONFIG, PRECISIONS[setting], Optimizer("adafactor"), seed, logits_z_coef=1e-4)


@cache
def params_of(seed: int) -> ModelParams:
    return rounded(initial_params(CONFIG, seed, "mesh"), PRECISIONS["float32"].weights)


def curve(backend: Any, steps: int, setting: str = "float32", seed: int = 0) -> np.ndarray:
    """Return the loss that each step tells."""
    setup = setup_of(setting, seed)
    state, told = initial_state(params_of(seed), setup, backend), []
    for step in range(steps):
        state, metrics = train_step(state, batch_of(seed, step), setup, inverse_square_root(step), backend)
        told.append(metrics.losses.objective)
    return np.array(told)


# Level 1.


def first_pass(backend: Any) -> float:
    """Return the first loss that a backend computes, exact but for its moves."""
    setup = setup_of("float64")
    state = initial_state(params_of(0), setup, backend)
    backend.begin()
    return loss_and_gradients(state.params, batch_of(0, 0), setup, 0, backend)[0].objective


class FirstLoss(NamedTuple):
    """The exact first loss, and how far from it a float32 program may be."""

    exact: float
    places: list[Place]
    radius: float  # to first order
    remainder: float  # what the two worst evaluations add to that


def reach(places: list[Place]) -> float:
    """Return the sum of |d(loss)/d(result)| times radius."""
    return sum(float(np.sum(np.abs(place.gradient) * place.made.radius)) for place in places)


def own_radius(places: list[Place]) -> float:
    """Return the part of the radius that is made after the logits."""
    return reach([place for place in places if place.made.operation in ("cross_entropy", "switch aux_loss", "switch z_loss")])


def worst(places: list[Place], sign: float) -> Move:
    """Return the moves that raise (1) or lower (-1) the loss most, to first order."""
    moves = {place.made.number: sign * np.sign(place.gradient) * place.made.radius for place in places}
    return lambda step, number, radius: moves.get(number, np.zeros_like(radius))


def remainder_of(exact: float, places: list[Place]) -> float:
    """Return by how much the two worst evaluations differ from what the gradients promise."""
    high, low = (first_pass(Legal(worst(places, sign), staged=False)) for sign in (1.0, -1.0))
    return max(abs(high - exact - reach(places)), abs(low - exact + reach(places)))


@cache
def first_loss() -> FirstLoss:
    backend = Legal(unmoved, staged=False)
    exact, places = first_pass(backend), backend.places
    return FirstLoss(exact, places, reach(places), remainder_of(exact, places))


def first_ratio(loss: float) -> float:
    """Return how much of its radius the first loss uses."""
    first = first_loss()
    return abs(loss - first.exact) / (first.radius + first.remainder)


# Level 2.


class Spread(NamedTuple):
    """Where legal runs lie at each step."""

    runs: np.ndarray  # loss by run and step
    centre: np.ndarray
    radius: np.ndarray


def spread_of(runs: np.ndarray) -> Spread:
    """Return the interval of one more run at every step, by Student, at the false alarm of all steps together."""
    K, steps = runs.shape
    quantile = stats.t.isf(FALSE_ALARM / steps / 2.0, K - 1)
    return Spread(runs, runs.mean(axis=0), quantile * runs.std(axis=0, ddof=1) * np.sqrt(1.0 + 1.0 / K))


@cache
def spread() -> Spread:
    return spread_of(np.array([curve(Legal(drawn(run)), FIRST, "float64") for run in range(RUNS)]))


def ratios(losses: np.ndarray, among: Spread) -> np.ndarray:
    return np.abs(losses - among.centre) / among.radius


# Level 3.


class Interval(NamedTuple):
    """Where the expected difference of two backends lies."""

    middle: float
    half_width: float

    def misses(self, margin: float) -> bool:
        """Whether every difference in it is larger than the margin."""
        return abs(self.middle) - self.half_width > margin


class LongRun(NamedTuple):
    """Of a long run, its last third on average, and its end."""

    told: float  # the loss that the steps tell
    worth: float  # the loss of the parameters on held-out rows, in exact arithmetic
    params: ModelParams


def long_run(backend: Any, seed: int) -> LongRun:
    setup, exact = setup_of("float32", seed), setup_of("float64", seed)
    state, told, worth = initial_state(params_of(seed), setup, backend), [], []
    for step in range(LONG):
        state, metrics = train_step(state, batch_of(seed, step), setup, inverse_square_root(step), backend)
        told.append(metrics.losses.objective)
        if step >= LONG - LONG // 3 and step % HELD_OUT == 0:
            params = initial_state(state.params, exact, reference).params
            found = evaluate(params, batch_of(seed, LONG + step), exact, step, reference)
            worth.append(found.cross_entropy / found.weight)
    return LongRun(float(np.mean(told[-LONG // 3 :])), float(np.mean(worth)), state.params)


@cache
def expected() -> list[LongRun]:
    return [long_run(reference, seed) for seed in range(SEEDS)]


@cache
def margins() -> np.ndarray:
    """Return by how much legal programs may differ for good in what they tell, of the same logits, and in worth, by storing the same parameters."""
    found = []
    for seed in range(SEEDS):
        backend, setup = Legal(unmoved, staged=False), setup_of("float64", seed)
        params = initial_state(expected()[seed].params, setup, reference).params
        backend.begin()
        _, gradients, _ = loss_and_gradients(params, batch_of(seed, LONG), setup, LONG, backend)
        weights = leaves(params)
        stored = sum(float(np.sum(np.abs(leaf * weights[path]))) for path, leaf in leaves(gradients).items())
        found.append((own_radius(backend.places), FORMATS["float32"].unit * stored))
    return np.mean(found, axis=0)


def differences(backend: Any) -> tuple[Interval, Interval]:
    """Return the intervals, by Student, of the mean paired difference to the reference: of what is told and of what the parameters are worth."""
    paired = np.array([np.subtract(long_run(backend, seed)[:2], expected()[seed][:2]) for seed in range(SEEDS)])
    half_widths = stats.t.isf(FALSE_ALARM / 2.0, SEEDS - 1) * paired.std(axis=0, ddof=1) / np.sqrt(SEEDS)
    told, worth = (Interval(float(middle), float(half)) for middle, half in zip(paired.mean(axis=0), half_widths, strict=True))
    return told, worth


def noticed_by_long_runs(backend: Any) -> bool:
    """Whether one of the two intervals holds no difference as small as its margin."""
    return any(interval.misses(margin) for interval, margin in zip(differences(backend), margins(), strict=True))


# What holds.


def routes(backend: Any, setting: str) -> list[np.ndarray]:
    """Return where the tokens of the first step go, layer by layer."""
    setup, batch = setup_of(setting), batch_of(0, 0)
    state = initial_state(params_of(0), setup, backend)
    with backend.running():
        backend.begin()
        denominator, _ = whole_denominator(batch, setup, ONE)
        outputs, *_ = part_forward(state.params, batch, setup, 0, 0, denominator, backend, ONE, None)
        return [np.array(part) for stack in (outputs.encoder, outputs.decoder) for switch in stack.switches for part in switch.route]


BACKENDS = {"cpu": lambda: Cpu(1), "reference": lambda: reference}


@pytest.mark.parametrize("name", BACKENDS)
def test_first_loss__within_its_radius(name: str) -> None:
    """At the routes of exact arithmetic."""
    assert all(np.array_equal(*pair) for pair in zip(routes(BACKENDS[name](), "float32"), routes(reference, "float64"), strict=True))
    assert first_ratio(curve(BACKENDS[name](), 1)[0]) <= 1.0


def test_first_loss__radius_counts_every_result() -> None:
    """No result of the forward pass is without its gradient."""
    backend = Legal(unmoved, staged=False)
    first_pass(backend)
    assert sorted(place.made.number for place in backend.places) == list(range(1, backend.forward_results + 1))


def shares(places: list[Place]) -> dict[str, float]:
    """Return each kind of result's part of the radius."""
    return {kind: reach([place for place in places if place.made.operation == kind]) for kind in {place.made.operation for place in places}}


def test_first_loss__radius_is_reached() -> None:
    """The two worst evaluations go as far as the radius says, but for less than its least part: gradients are right, first order governs."""
    first = first_loss()
    assert 0.0 < first.remainder < min(shares(first.places).values())


@pytest.mark.parametrize("kind", ["attention", "feed_forward", "logits", "norm", "residual", "scaled", "switch out_GSD"])
def test_first_loss__radius_reached_notices(kind: str) -> None:
    """A gradient of one kind of result that is twice what it is promises more than the worst evaluation reaches."""
    places = [place._replace(gradient=2.0 * place.gradient) if place.made.operation == kind else place for place in first_loss().places]
    assert remainder_of(first_loss().exact, places) > min(shares(places).values())


@pytest.mark.parametrize("name", BACKENDS)
def test_first_steps__lie_where_legal_runs_lie(name: str) -> None:
    """At every one of the first steps."""
    assert np.all(ratios(curve(BACKENDS[name](), FIRST), spread()) <= 1.0)


def test_first_steps__each_legal_run_lies_among_the_others() -> None:
    """What Student assumes of their law is no worse than the runs themselves: each is inside the interval of the rest."""
    runs = spread().runs
    assert all(np.all(ratios(runs[run], spread_of(np.delete(runs, run, axis=0))) <= 1.0) for run in range(RUNS))


def test_curves__agree_on_average() -> None:
    """Both intervals reach into their margins."""
    assert not noticed_by_long_runs(Cpu(1))


# What is noticed.


class Fault(NamedTuple):
    """One operation of the cpu backend, changed."""

    operation: str
    change: Callable[[Callable[..., Any]], Callable[..., Any]]
    level: int  # the first that notices; 0: none does


def router_narrowed(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda inputs, params, statics: f(inputs, params._replace(w_router_DE=round_bf16(params.w_router_DE)), statics)


def experts_narrowed(f: Callable[..., Any]) -> Callable[..., Any]:
    def changed(inputs: SwitchInputs, params: SwitchParams, statics: Any) -> Any:
        return f(inputs, params._replace(experts=params.experts._replace(w_in_EDF=round_bf16(params.experts.w_in_EDF))), statics)

    return changed


def rate_raised(start: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a rate 1 % too high from a step on."""
    return lambda f: lambda w, grad, state, rate, *rest: f(w, grad, state, rate * (1.01 if state.step >= start else 1.0), *rest)


def memory_at(step: Callable[[int], int]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a memory of squares that decays as at another step."""

    def change(f: Callable[..., Any]) -> Callable[..., Any]:
        def changed(w: np.ndarray, grad: np.ndarray, state: AdafactorState, *rest: Any) -> tuple[np.ndarray, AdafactorState]:
            new_w, new = f(w, grad, state._replace(step=step(state.step)), *rest)
            return new_w, new._replace(step=state.step + 1)

        return changed

    return change


def normed_by(factor: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a norm whose scale is read too large."""
    return lambda f: lambda x, scale_D, *rest: f(x, scale_D * np.float32(factor), *rest)


FAULTS = {
    "dropout on the stream without its scale": Fault("residual", lambda f: lambda x, out, factor, *rest: f(x, out, np.minimum(factor, 1), *rest), 1),
    "the norm 2^-11 too large": Fault("norm_forward", normed_by(1.0 + 2.0**-11), 1),
    "the norm 2^-14 too large": Fault("norm_forward", normed_by(1.0 + 2.0**-14), 2),
    "the router's weights in bfloat16": Fault("switch_forward", router_narrowed, 2),
    "the experts' weights in bfloat16": Fault("switch_forward", experts_narrowed, 2),
    "the balance loss's gradient twice": Fault("switch_backward", lambda f: lambda dout, daux, *rest: f(dout, 2.0 * daux, *rest), 2),
    "the rate 1 % too high": Fault("adafactor_update", rate_raised(0), 2),
    "the memory of squares a step ahead": Fault("adafactor_update", memory_at(lambda step: step + 1), 2),
    "the rate 1 % too high after the first steps": Fault("adafactor_update", rate_raised(FIRST), 3),
    "a memory of squares that grows no longer": Fault("adafactor_update", memory_at(lambda step: min(step, 2 * FIRST)), 3),
    "the norm 2^-20 too large": Fault("norm_forward", normed_by(1.0 + 2.0**-20), 0),
    "the norm's epsilon doubled": Fault("norm_forward", lambda f: lambda x, scale_D, epsilon, points: f(x, scale_D, 2.0 * epsilon, points), 0),
}


def planted(fault: Fault) -> Cpu:
    """Return the cpu backend with one fault."""
    backend = Cpu(1)
    setattr(backend, fault.operation, fault.change(getattr(backend, fault.operation)))
    return backend


def level_of(backend: Cpu) -> int:
    """Return the first level that notices something."""
    first = curve(backend, FIRST)
    if first_ratio(first[0]) > 1.0:
        return 1
    if np.any(ratios(first, spread()) > 1.0):
        return 2
    return 3 if noticed_by_long_runs(backend) else 0


@pytest.mark.parametrize("name", FAULTS)
def test_planted__noticed_at_its_level(name: str) -> None:
    """Each fault is noticed at the first level that can, or at none: those are for the judge of stages."""
    assert level_of(planted(FAULTS[name])) == FAULTS[name].level
