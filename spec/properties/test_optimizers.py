# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Learning rates and optimizers: O-RATE-1 to O-CLIP-1.

Bounds count roundings: a sum of n terms of one sign has a relative error of at most n units, and each further operation adds one. The unit is that of
the optimizer's own state, so the same properties hold a float32 implementation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import strategies as st

from properties.harness import clause, draws, needs
from properties.operations import Operations
from properties.refusals import refusal
from refswitch.reference.adafactor import AdafactorState
from refswitch.reference.adamw import AdamWState

OPERATIONS = 32  # more than the roundings of one element's update, sums apart, in either evaluation together
UNIT = 2.0**-53
RATE = 2.0**-6
GOLDEN_RATES = {0: "0.01", 10_000: "0.01", 40_000: "0.005", 100_000: "0.0031623", 250_000: "0.002", 550_000: "0.0013484", 1_000_000: "0.001"}
GOLDEN_DECAYS = {0: "0.00000", 1: "0.42565", 2: "0.58476", 10: "0.85315", 100: "0.97508", 10_000: "0.99937"}
SHAPES = st.sampled_from(((7,), (5, 3), (3, 4, 5), (4, 3, 4), (2, 5, 3, 4), (1,), (3, 3), (5, 1)))


# ------------------------------------------------------------------------------------------------------------------ learning rates


@clause("O-RATE-1")
@needs("plateau", "after it")
@draws(step=st.integers(0, 10**7), plateau=st.integers(1, 10**6), power=st.integers(-3, 3))
def test_inverse_square_root__squared(operations: Operations, step: int, plateau: int, power: int) -> None:
    """rate^2 max(step, plateau) = multiplier^2, in rational numbers, within the roundings of a root and a quotient; constant on the plateau."""
    multiplier = 2.0**power
    operations.meets("plateau", step < plateau)
    operations.meets("after it", step > plateau)
    rate = operations.inverse_square_root(step, plateau, multiplier)
    squared = Fraction(rate) ** 2 * max(step, plateau) / Fraction(multiplier) ** 2
    assert abs(squared - 1) <= (1 + Fraction(UNIT)) ** 4 - 1
    if step <= plateau:
        assert rate == operations.inverse_square_root(0, plateau, multiplier)


@clause("O-RATE-1")
@draws()
def test_inverse_square_root__golden(operations: Operations) -> None:
    """The paper's: 0.01 for 10,000 steps; what is no step or no plateau is refused."""
    assert {step: f"{operations.inverse_square_root(step):.5g}" for step in GOLDEN_RATES} == GOLDEN_RATES
    assert "should be at least 0" in refusal(lambda: operations.inverse_square_root(-1))
    assert "plateau is 0" in refusal(lambda: operations.inverse_square_root(0, plateau=0))
    assert operations.inverse_square_root(0, plateau=1) == 1.0


@clause("O-RATE-2")
@draws()
def test_schedules__corners(operations: Operations) -> None:
    """The ends of every straight line, in numbers that binary fractions hold exactly; what is no step, or leaves no way down, is refused."""
    assert [operations.constant(step, 0.5, 4) for step in (0, 1, 2, 4, 100)] == [0.0, 0.125, 0.25, 0.5, 0.5]
    assert operations.constant(0, 0.5) == 0.5
    assert [operations.linear(step, 0.5, 8) for step in (0, 4, 8, 9)] == [0.5, 0.25, 0.0, 0.0]
    assert [operations.linear(step, 0.5, 12, 4) for step in (0, 2, 4, 8, 12)] == [0.0, 0.25, 0.5, 0.25, 0.0]
    assert [operations.ramp_down(step, 100) for step in (0, 90, 95, 100, 101)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert operations.ramp_down(6, 8, Fraction(1, 2)) == 0.5
    assert (operations.ramp_down(0, 1), operations.ramp_down(3, 8, Fraction(1))) == (1.0, 0.625)
    for call in (
        lambda: operations.constant(-1, RATE),
        lambda: operations.constant(0, RATE, -1),
        lambda: operations.linear(-1, RATE, 4),
        lambda: operations.linear(0, RATE, 4, -1),
        lambda: operations.linear(0, RATE, 4, 4),
        lambda: operations.ramp_down(-1, 10),
        lambda: operations.ramp_down(0, 0),
        lambda: operations.ramp_down(0, 10, Fraction(0)),
        lambda: operations.ramp_down(0, 10, Fraction(11, 10)),
    ):
        assert "should be" in refusal(call)
    assert operations.linear(4, 0.5, 5, 4) == 0.5


@clause("O-RATE-2")
@needs("rising", "falling", "over")
@draws(step=st.integers(0, 300), total=st.integers(2, 200), warm_up=st.integers(0, 60), tenths=st.integers(1, 10))
def test_schedules__straight_lines(operations: Operations, step: int, total: int, warm_up: int, tenths: int) -> None:
    """Each is a straight line in rational numbers, within two roundings; the ramp's factor is the nearest float64 of its rational value."""
    warm_up = min(warm_up, total - 1)
    operations.meets("rising", step < warm_up)
    operations.meets("falling", warm_up < step < total)
    operations.meets("over", step > total)
    rising = Fraction(step, warm_up) if step < warm_up else Fraction(1)
    falling = rising if step < warm_up else Fraction(max(total - step, 0), total - warm_up)
    for got, exact in ((operations.constant(step, 0.75, warm_up), rising), (operations.linear(step, 0.75, total, warm_up), falling)):
        assert abs(Fraction(got) - exact * Fraction(3, 4)) <= 3 * Fraction(UNIT) * exact
    assert operations.ramp_down(step, total, Fraction(tenths, 10)) == float(min(Fraction(1), max(total - step, 0) / (total * Fraction(tenths, 10))))


# ------------------------------------------------------------------------------------------------------------------------ Adafactor


@clause("O-ADAF-1")
@needs("a tie", "a batch axis among the largest", "too small")
@draws(
    examples=[
        ((129, 129), 0, "mesh"),
        ((140, 2, 129), 0, "t5x"),
        ((2048, 2080, 6144), 0, "t5x"),  # the experts of Switch-C
        ((127, 200), None, "mesh"),
        ((128, 131, 130), -1, "t5x"),
    ],
    shape=st.lists(st.sampled_from((1, 3, 127, 128, 129, 200)), min_size=1, max_size=4).map(tuple),
    axis=st.sampled_from((None, 0, -1)),
    rule=st.sampled_from(("mesh", "t5x")),
)
def test_factored_axes__two_largest(operations: Operations, shape: tuple[int, ...], axis: int | None, rule: str) -> None:
    """The two largest axes, of equal ones the first, if both have 128; a batch axis is none of them. The state has the shapes that are left."""
    batch = axis % len(shape) if axis is not None and rule == "t5x" else None
    wanted = two_largest(shape, batch, 128)
    operations.meets("a tie", wanted is not None and shape[wanted[0]] == shape[wanted[1]])
    operations.meets("a batch axis among the largest", batch is not None and shape[batch] >= 128)
    operations.meets("too small", wanted is None and len(shape) > 1)
    assert operations.factored_axes(shape, axis, rule) == wanted
    if math.prod(shape) < 2**22:
        state = operations.adafactor_init(shape, axis, rule)
        lacks = [tuple(size for i, size in enumerate(shape) if i != d) for d in wanted or ()]
        assert state.step == 0
        assert [part.shape for part in state[1:]] == ([*lacks, (0,)] if wanted else [(0,), (0,), shape])
        assert not any(part.any() for part in state[1:])


@clause("O-ADAF-1")
@draws()
def test_factored_axes__refuses(operations: Operations) -> None:
    """An unknown rule, and an axis that the tensor does not have; the least size is the caller's."""
    assert "rule is 'other'" in refusal(lambda: operations.factored_axes((2, 3), 0, "other"))
    for axis in (2, -3):
        assert f"expert_axis is {axis}" in refusal(lambda axis=axis: operations.factored_axes((2, 3), axis, "t5x"))
    assert operations.factored_axes((2, 3), -2, "t5x", 2) is None
    assert operations.factored_axes((2, 3), None, "mesh", 2) == (1, 0)
    assert operations.factored_axes((2, 3), None, "mesh", 3) is None


@clause("O-ADAF-2")
@draws(step=st.integers(0, 10**6))
def test_second_moment_decay__to_the_fifth(operations: Operations, step: int) -> None:
    """(1 - beta)^5 (step + 1)^4 = 1 in rational numbers, within the roundings of a power and a difference; the first update remembers nothing."""
    beta = operations.second_moment_decay(step)
    new, unit = 1 - Fraction(beta), Fraction(UNIT)
    relative = 3 * unit + unit / new
    assert abs(new**5 * (step + 1) ** 4 - 1) <= (1 + relative) ** 5 - 1
    assert operations.second_moment_decay(0) == 0.0
    assert {step: f"{operations.second_moment_decay(step):.5f}" for step in GOLDEN_DECAYS} == GOLDEN_DECAYS


def dtype_of(operations: Operations) -> Any:
    """Return the format of the optimizer's arrays."""
    return np.float64 if operations.profile == "float64" else np.float32


def unit_of(operations: Operations) -> float:
    """Return its unit in the last place."""
    return float(np.finfo(dtype_of(operations)).eps)


def two_largest(shape: tuple[int, ...], batch: int | None, smallest: int) -> tuple[int, int] | None:
    """Return the axes that are factored over."""
    ordered = [axis for _, axis in sorted((-size, axis) for axis, size in enumerate(shape) if axis != batch)]
    return (ordered[0], ordered[1]) if len(ordered) > 1 and shape[ordered[1]] >= smallest else None


def fresh_state(operations: Operations, shape: tuple[int, ...], batch: int | None = None, smallest: int = 3) -> AdafactorState:
    """Return what Adafactor remembers before its first update."""
    axes, dtype = two_largest(shape, batch, smallest), dtype_of(operations)
    if axes is None:
        return AdafactorState(0, np.zeros(0, dtype), np.zeros(0, dtype), np.zeros(shape, dtype))
    rows, columns = (tuple(size for i, size in enumerate(shape) if i != axis) for axis in axes)
    return AdafactorState(0, np.zeros(rows, dtype), np.zeros(columns, dtype), np.zeros(0, dtype))


def updated(operations: Operations, w: np.ndarray, grad: np.ndarray, state: Any, *rest: Any, **more: Any) -> tuple[np.ndarray, Any]:
    """Return one update of copies: a backend may write over what it is given."""
    kept = type(state)(*(part.copy() if isinstance(part, np.ndarray) else part for part in state))
    update = operations.adafactor_update if isinstance(state, AdafactorState) else operations.adamw_update
    return update(w.copy(), grad.copy(), kept, *rest, **more)


def tensors(operations: Operations, shape: tuple[int, ...], seed: int, steps: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return w and a gradient for each step; rows differ in scale, and one step has gradients great enough to be clipped."""
    dtype, random = dtype_of(operations), np.random.Generator(np.random.Philox(seed))
    spread = (1 + np.arange(shape[0])).reshape((-1,) + (1,) * (len(shape) - 1))
    w = random.normal(size=shape) * spread / shape[0]
    return w.astype(dtype), [(random.normal(size=shape) * spread * (16 if step == 1 else 1)).astype(dtype) for step in range(steps)]


def means(of: dict[Any, float], key: dict[Any, Any]) -> dict[Any, float]:
    """Return the mean of each class of indices."""
    found: dict[Any, list[float]] = {}
    for index, value in of.items():
        found.setdefault(key[index], []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def by_loops(
    w: np.ndarray, grads: list[np.ndarray], batch: int | None, axes: tuple[int, int] | None, clip: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield w and the sum of the sizes of its terms after each step: Adafactor's formulas element by element."""
    indices = list(itertools.product(*map(range, w.shape)))
    value, size = {i: float(w[i]) for i in indices}, {i: abs(float(w[i])) for i in indices}
    group = {i: i[batch] if batch is not None else 0 for i in indices}
    memory: dict[str, dict[Any, float]] = {}

    def remember(name: str, now: dict[Any, float], t: int) -> dict[Any, float]:
        new = math.exp(-math.log(t + 1) * 4 / 5)
        memory[name] = {k: (1 - new) * memory[name][k] + new * now[k] if name in memory else now[k] for k in now}
        return memory[name]

    for t, grad in enumerate(grads):
        square = {i: float(grad[i]) ** 2 + 1e-30 for i in indices}
        if axes is None:
            update = {i: float(grad[i]) / math.sqrt(v) for i, v in remember("v", square, t).items()}
        else:
            no_0, no_1 = ({i: tuple(n for a, n in enumerate(i) if a != d) for i in indices} for d in axes)
            both = {i: tuple(n for a, n in enumerate(i) if a not in axes) for i in indices}
            row, column = remember("row", means(square, no_0), t), remember("column", means(square, no_1), t)
            middle = means({i: row[no_0[i]] for i in indices}, both)
            update = {i: float(grad[i]) * math.sqrt(middle[both[i]] / (row[no_0[i]] * column[no_1[i]])) for i in indices}
        length, scale = means({i: update[i] ** 2 for i in indices}, group), means({i: value[i] ** 2 for i in indices}, group)
        for i in indices:
            change = RATE * max(math.sqrt(scale[group[i]]), 1e-3) * update[i] / max(1.0, math.sqrt(length[group[i]]) / clip)
            value[i], size[i] = value[i] - change, size[i] + abs(change)
        yield tuple(np.array([of[i] for i in np.ndindex(w.shape)]).reshape(w.shape) for of in (value, size))  # type: ignore[misc]


@clause("O-ADAF-3")
@needs("factored", "not factored", "each expert by itself", "clipped", "not clipped")
@draws(
    examples=[
        ((3, 4, 5), 0, "t5x", 3, 1),
        ((4, 3, 4), 0, "mesh", 3, 2),
        ((4, 5, 3), 1, "t5x", 3, 7),
        ((5, 3), None, "mesh", 9, 3),
        ((1,), 0, "t5x", 2, 4),
    ],
    shape=SHAPES,
    axis=st.sampled_from((None, 0, -1)),
    rule=st.sampled_from(("mesh", "t5x")),
    smallest=st.sampled_from((2, 3, 128)),
    seed=st.integers(0, 2**20),
)
def test_adafactor_update__by_loops(operations: Operations, shape: tuple[int, ...], axis: int | None, rule: str, smallest: int, seed: int) -> None:
    """Three updates are those of the formulas, element by element, and the step counts."""
    w, grads = tensors(operations, shape, seed, 3)
    batch = axis % len(shape) if axis is not None and rule == "t5x" else None
    axes, clip = two_largest(shape, batch, smallest), 1.0 if seed % 2 else 0.5
    operations.meets("factored", axes is not None)
    operations.meets("not factored", axes is None)
    operations.meets("each expert by itself", batch is not None and shape[batch] > 1)
    state, found = fresh_state(operations, shape, batch, smallest), w
    for t, (grad, (wanted, size)) in enumerate(zip(grads, by_loops(w, grads, batch, axes, clip), strict=True)):
        found, state = updated(operations, found, grad, state, RATE, axis, rule, smallest, clip=clip)
        assert (found.dtype, found.shape, state.step) == (w.dtype, shape, t + 1)
        bound = 2 * (t + 1) * (4 * w.size + OPERATIONS) * unit_of(operations) * size
        assert np.all(np.abs(found - wanted) <= bound), f"step {t}: off by {np.max(np.abs(found - wanted) / bound):.3g} radii"
    first, unclipped = (
        updated(operations, w, grads[0], fresh_state(operations, shape, batch, smallest), RATE, axis, rule, smallest, clip=limit)[0]
        for limit in (clip, 1e9)
    )
    operations.meets("clipped", not np.array_equal(first, unclipped))
    operations.meets("not clipped", np.array_equal(first, unclipped))


@clause("O-ADAF-3", "O-ADAMW-1")
@needs(wide=True)
@draws(shape=SHAPES, seed=st.integers(0, 2**20))
def test_updates__write_nothing(operations: Operations, shape: tuple[int, ...], seed: int) -> None:
    """Weights, gradient and state stay as they were; a backend in another format may write over them."""
    w, grads = tensors(operations, shape, seed, 2)
    for update, state in ((operations.adafactor_update, fresh_state(operations, shape)), (operations.adamw_update, fresh_moments(operations, shape))):
        more = {"smallest": 3} if isinstance(state, AdafactorState) else {}
        _, held = update(w, grads[0], state, RATE, **more)
        before = [part.copy() for part in (w, *grads, *held[1:])]
        update(w, grads[1], held, RATE, **more)
        assert all(np.array_equal(was, part) for was, part in zip(before, (w, *grads, *held[1:]), strict=True))


@clause("O-ADAF-3")
@draws(shape=SHAPES, power=st.integers(-8, 8), seed=st.integers(0, 2**20), rule=st.sampled_from(("mesh", "t5x")))
def test_adafactor_update__size_of_the_gradient(operations: Operations, shape: tuple[int, ...], power: int, seed: int, rule: str) -> None:
    """Gradients times 2^k make the same update, to the bit, where nothing is added to their squares."""
    w, (grad, *_) = tensors(operations, shape, seed, 1)
    grad = np.where(grad == 0.0, 1.0, grad).astype(w.dtype)
    state = fresh_state(operations, shape, 0 if rule == "t5x" else None)
    news = [updated(operations, w, (grad * factor).astype(w.dtype), state, RATE, 0, rule, 3, epsilon_square=0.0)[0] for factor in (1.0, 2.0**power)]
    assert np.array_equal(*news)


@clause("O-ADAF-3")
@draws(shape=SHAPES, seed=st.integers(0, 2**20))
def test_adafactor_update__an_expert_without_tokens(operations: Operations, shape: tuple[int, ...], seed: int) -> None:
    """A gradient of zero moves nothing, but its memory fades all the same: no update is left out because nobody chose the expert."""
    w, (grad, *_) = tensors(operations, shape, seed, 1)
    zeros = np.zeros_like(w)
    _, state = updated(operations, w, grad, fresh_state(operations, shape), RATE, None, "mesh", 3)
    same, faded = updated(operations, w, zeros, state, RATE, None, "mesh", 3)
    assert np.array_equal(same, w)
    assert faded.step == 2
    kept = 1.0 - 2.0**-0.8
    for now, was in zip(faded[1:], state[1:], strict=True):
        assert np.all(np.abs(now - kept * was) <= 8 * unit_of(operations) * was + 1e-30)
    moved, _ = updated(operations, zeros, np.ones_like(w), fresh_state(operations, shape), RATE, None, "mesh", 3)
    least = RATE / 1000
    assert np.all(np.abs(moved + least) <= (4 * w.size + OPERATIONS) * unit_of(operations) * least)


@clause("O-ADAF-3", "O-ADAF-1")
@needs(wide=True)
@draws()
def test_adafactor_update__refuses(operations: Operations) -> None:
    """Shapes that differ, a tensor of nothing, another type, what is not finite, another tensor's state."""
    dtype = operations.adafactor_init((1,)).v.dtype
    w, other = np.ones((2, 3), dtype), np.float32 if dtype == np.float64 else np.float64
    state = operations.adafactor_init((2, 3))
    for grad in (np.ones((3, 2), dtype), np.ones((2, 3), other), np.full((2, 3), np.nan, dtype), np.full((2, 3), np.inf, dtype)):
        assert "adafactor_update" in refusal(lambda grad=grad: operations.adafactor_update(w, grad, state, RATE))
    assert "adafactor_update" in refusal(lambda: operations.adafactor_update(w.astype(other), w, state, RATE))
    assert "finite" in refusal(lambda: operations.adafactor_update(np.full((2, 3), np.inf, dtype), w, state, RATE))
    nothing = np.ones((0, 3), dtype)
    assert "not empty" in refusal(lambda: operations.adafactor_update(nothing, nothing, operations.adafactor_init((0, 3)), RATE))
    assert "state.v has shape" in refusal(lambda: operations.adafactor_update(w, w, operations.adafactor_init((3, 2)), RATE))
    tensor = np.ones((2, 3, 4), dtype)
    for made, name in (((2, 5, 4), "v_row"), ((2, 5, 3), "v_column")):
        wrong = operations.adafactor_init(made, None, "mesh", 3)
        said = refusal(lambda wrong=wrong: operations.adafactor_update(tensor, tensor, wrong, RATE, None, "mesh", 3))
        assert f"state.{name} has shape" in said


# ---------------------------------------------------------------------------------------------------------------------------- AdamW


def fresh_moments(operations: Operations, shape: tuple[int, ...]) -> AdamWState:
    """Return what AdamW remembers before its first update."""
    return AdamWState(0, np.zeros(shape, dtype_of(operations)), np.zeros(shape, dtype_of(operations)))


@clause("O-ADAMW-2")
@draws(beta=st.sampled_from((0.0, 0.5, 0.75)), step=st.integers(0, 12))
def test_bias_correction__is_the_weight_of_the_updates(operations: Operations, beta: float, step: int) -> None:
    """1 - beta^step, exact where it is a float64; moments begin at zero, in the tensor's shape."""
    assert Fraction(operations.bias_correction(beta, step)) == 1 - Fraction(beta) ** step
    state = operations.adamw_init((2, step))
    assert (state.step, state.mean.shape, state.mean_square.shape) == (0, (2, step), (2, step))
    assert not state.mean.any()
    assert not state.mean_square.any()


@clause("O-ADAMW-1")
@needs("decay", "no decay")
@draws(
    examples=[((5, 3), 1, 0.5, 0.9, 0.999, 2.0**-20), ((7,), 2, 0.0, 0.5, 0.75, 2.0**-4)],
    shape=SHAPES, seed=st.integers(0, 2**20), weight_decay=st.sampled_from((0.0, 0.01, 0.5)), beta1=st.sampled_from((0.9, 0.5, 0.0)),
    beta2=st.sampled_from((0.999, 0.75)), epsilon=st.sampled_from((1e-8, 2.0**-4)),
)  # fmt: skip
def test_adamw_update__by_loops(
    operations: Operations, shape: tuple[int, ...], seed: int, weight_decay: float, beta1: float, beta2: float, epsilon: float
) -> None:
    """Three updates are those of the formulas: the decay passes through neither moment, both are corrected, epsilon stands outside the root."""
    w, grads = tensors(operations, shape, seed, 3)
    operations.meets("decay", weight_decay > 0.0)
    operations.meets("no decay", weight_decay == 0.0)
    state, found = fresh_moments(operations, shape), w
    value, mean, square, reach = w.astype(float), np.zeros(shape), np.zeros(shape), np.zeros(shape)
    size = np.abs(value)
    for t, grad in enumerate(grads, start=1):
        found, state = updated(operations, found, grad, state, RATE, beta1, beta2, epsilon, weight_decay)
        for i in np.ndindex(shape):
            mean[i] = beta1 * mean[i] + (1 - beta1) * grad[i]
            reach[i] = beta1 * reach[i] + (1 - beta1) * abs(float(grad[i]))
            square[i] = beta2 * square[i] + (1 - beta2) * float(grad[i]) ** 2
            corrected, root = mean[i] / (1 - beta1**t), math.sqrt(square[i] / (1 - beta2**t))
            value[i] -= RATE * (corrected / (root + epsilon) + weight_decay * value[i])
            size[i] = size[i] * (1 + RATE * weight_decay) + RATE * reach[i] / (1 - beta1**t) / (root + epsilon)
        assert (found.dtype, found.shape, state.step) == (w.dtype, shape, t)
        assert np.all(np.abs(found - value) <= 2 * t * OPERATIONS * unit_of(operations) * size)


@clause("O-ADAMW-1")
@draws(seed=st.integers(0, 2**20), shape=SHAPES, power=st.integers(-4, 4))
def test_adamw_update__first_step_is_a_sign(operations: Operations, seed: int, shape: tuple[int, ...], power: int) -> None:
    """The first update is the rate times the gradient's sign, however large it is, where epsilon is 0 and nothing decays."""
    w, (grad, *_) = tensors(operations, shape, seed, 1)
    zeros = np.zeros_like(w)
    moved, state = updated(
        operations, zeros, (grad * 2.0**power).astype(w.dtype), fresh_moments(operations, shape), RATE, epsilon=0.0, weight_decay=0.0
    )
    assert np.all(np.abs(moved + RATE * np.sign(grad)) <= 8 * unit_of(operations) * RATE)
    assert state.step == 1


@clause("O-ADAMW-1", "O-ADAMW-2")
@needs(wide=True)
@draws()
def test_adamw_update__refuses(operations: Operations) -> None:
    """Shapes that differ, another type, what is not finite."""
    dtype = operations.adamw_init((1,)).mean.dtype
    w, state, other = np.ones((2, 3), dtype), operations.adamw_init((2, 3)), np.float32 if dtype == np.float64 else np.float64
    for grad in (np.ones((3, 2), dtype), np.ones((2, 3), other), np.full((2, 3), np.nan, dtype)):
        assert "adamw_update" in refusal(lambda grad=grad: operations.adamw_update(w, grad, state, RATE))
    assert "adamw_update" in refusal(lambda: operations.adamw_update(w.astype(other), w, state, RATE))
    assert "finite" in refusal(lambda: operations.adamw_update(np.full((2, 3), np.inf, dtype), w, state, RATE))
    for wrong in (state._replace(mean=np.zeros((3, 2), dtype)), state._replace(mean_square=np.zeros((3, 2), dtype))):
        assert "adamw_update" in refusal(lambda wrong=wrong: operations.adamw_update(w, w, wrong, RATE))


@clause("O-CLIP-1")
@needs("clipped", "left")
@draws(examples=[(3, 6, 2), (3, 0, 3)], seed=st.integers(0, 2**20), power=st.integers(-3, 6), parts=st.integers(1, 4))
def test_clip_by_global_norm__one_norm_for_all(operations: Operations, seed: int, power: int, parts: int) -> None:
    """The norm is that of all tensors together: above the limit they shrink to it, else they keep their bits; cut into rows they are the same."""
    random, limit = np.random.Generator(np.random.Philox(seed)), 2.0**power
    grads = [random.integers(-4, 5, (i + 1, 3)).astype(float) for i in range(parts)]
    total = sum(int(value) ** 2 for grad in grads for value in grad.reshape(-1))
    clipped, norm = operations.clip_by_global_norm(grads, limit)
    operations.meets("clipped", norm > limit)
    operations.meets("left", norm <= limit)
    assert norm == math.sqrt(total)
    for was, now in zip(grads, clipped, strict=True):
        wanted = was * (limit / norm) if norm > limit else was
        assert np.all(np.abs(now - wanted) <= (4 * UNIT * np.abs(wanted) if norm > limit else 0.0))
    cut, again = operations.clip_by_global_norm([row for grad in grads for row in grad], limit)
    assert again == norm
    assert np.array_equal(np.concatenate(cut), np.concatenate([part.reshape(-1) for part in clipped]))


@clause("O-CLIP-1")
@draws()
def test_clip_by_global_norm__by_hand(operations: Operations) -> None:
    """A norm of 5; zeros and nothing are fine; a limit of 0 and what is not finite are refused."""
    grads = [np.array([3.0]), np.array([[0.0, 4.0]])]
    for limit, wanted in ((8.0, [[3.0], [[0.0, 4.0]]]), (5.0, [[3.0], [[0.0, 4.0]]]), (2.5, [[1.5], [[0.0, 2.0]]])):
        found, norm = operations.clip_by_global_norm(grads, limit)
        assert (norm, [part.tolist() for part in found]) == (5.0, wanted)
    assert "limit is" in refusal(lambda: operations.clip_by_global_norm(grads, 0.0))
    assert "should be finite" in refusal(lambda: operations.clip_by_global_norm([np.array([np.nan])], 1.0))
    assert operations.clip_by_global_norm([np.zeros(2)], 1.0)[1] == 0.0
    assert operations.clip_by_global_norm([], 1.0) == ([], 0.0)
