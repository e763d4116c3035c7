# May import: standard library, numpy, pytest, torch, refswitch.
"""The optimizers and schedules: Adafactor against loops over its formula, AdamW against torch, and the golden values of the schedule.

Bounds count roundings: a sum of n terms of one sign has a relative error of at most n * eps, and each further operation adds one eps.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from refswitch.reference import adafactor, adamw, schedule

EPS = np.finfo(np.float64).eps
STEPS = 4
OPERATIONS = 32  # more than the roundings of one element's update, sums apart, in either implementation together
RATE = 0.01
CASES = [  # shape, expert axis, rule, axes (d0, d1) written by hand
    ((7,), None, "mesh", None),
    ((300,), None, "mesh", None),
    ((5, 3), None, "mesh", None),
    ((127, 200), None, "mesh", None),
    ((128, 131), None, "mesh", (1, 0)),
    ((131, 128), None, "mesh", (0, 1)),
    ((129, 129), None, "mesh", (0, 1)),
    ((3, 5, 7), 0, "mesh", None),
    ((3, 5, 7), 0, "t5x", None),
    ((3, 128, 130), 0, "mesh", (2, 1)),
    ((3, 128, 130), 0, "t5x", (2, 1)),
    ((140, 2, 129), 0, "mesh", (0, 2)),
    ((140, 2, 129), 0, "t5x", None),
    ((129, 128, 2), 1, "mesh", (0, 1)),
    ((129, 128, 2), 1, "t5x", None),
]


def data(shape: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return w and a gradient for each step; experts differ in scale, and one step has gradients great enough to be clipped."""
    random = np.random.default_rng(sum(shape))
    spread = 1 + np.arange(shape[0]).reshape((-1,) + (1,) * (len(shape) - 1))
    w = random.standard_normal(shape) * spread / shape[0]
    return w, [random.standard_normal(shape) * spread * (10 if step == 2 else 1) for step in range(STEPS)]


def looped(w: np.ndarray, grads: list[np.ndarray], expert_axis: int | None, rule: str, axes: tuple[int, int] | None) -> tuple[dict, dict]:
    """Return w and the sum of the sizes of all terms of w, by index: the formulas element by element."""
    indices = list(itertools.product(*map(range, w.shape)))
    value = {i: float(w[i]) for i in indices}
    size = {i: abs(value[i]) for i in indices}
    group = {i: i[expert_axis] if rule == "t5x" and expert_axis is not None else 0 for i in indices}
    memory: dict = {}

    def means(of: dict, key: dict) -> dict:
        total: dict = {}
        count: dict = {}
        for i in of:
            total[key[i]] = total.get(key[i], 0.0) + of[i]
            count[key[i]] = count.get(key[i], 0) + 1
        return {k: total[k] / count[k] for k in total}

    def remember(name: str, now: dict, t: int) -> dict:
        new = math.exp(-math.log(t + 1) * 4 / 5)
        memory[name] = {k: (1 - new) * memory[name][k] + new * now[k] if name in memory else now[k] for k in now}
        return memory[name]

    for t, grad in enumerate(grads):
        square = {i: float(grad[i]) ** 2 + 1e-30 for i in indices}
        if axes is None:
            v = remember("v", square, t)
            update = {i: float(grad[i]) / math.sqrt(v[i]) for i in indices}
        else:
            d0, d1 = axes
            no0, no1 = ({i: tuple(n for a, n in enumerate(i) if a != d) for i in indices} for d in axes)
            both = {i: tuple(n for a, n in enumerate(i) if a not in (d0, d1)) for i in indices}
            row, column = remember("row", means(square, no0), t), remember("column", means(square, no1), t)
            middle = means({i: row[no0[i]] for i in indices}, both)
            update = {i: float(grad[i]) * math.sqrt(middle[both[i]] / (row[no0[i]] * column[no1[i]])) for i in indices}
        length = means({i: update[i] ** 2 for i in indices}, group)
        scale = means({i: value[i] ** 2 for i in indices}, group)
        for i in indices:
            change = RATE * max(math.sqrt(scale[group[i]]), 1e-3) * update[i] / max(1.0, math.sqrt(length[group[i]]))
            value[i] -= change
            size[i] += abs(change)
    return value, size


def run(w: np.ndarray, grads: list[np.ndarray], expert_axis: int | None, rule: adafactor.Rule, **options: float) -> np.ndarray:
    """Return w after all steps of ours."""
    state = adafactor.adafactor_init(w.shape, expert_axis, rule)
    for grad in grads:
        w, state = adafactor.adafactor_update(w, grad, state, RATE, expert_axis, rule, **options)
    assert state.step == len(grads)
    return w


def agrees(found: np.ndarray, looped_result: tuple[dict, dict]) -> bool:
    """Whether each element is within the bound: four sums over at most the whole tensor and the operations, at each step, on both sides."""
    value, size = (np.array([part[i] for i in np.ndindex(found.shape)]).reshape(found.shape) for part in looped_result)
    return bool((np.abs(found - value) <= 2 * STEPS * (4 * found.size + OPERATIONS) * EPS * size).all())


@pytest.mark.parametrize(("shape", "expert_axis", "rule", "axes"), CASES)
def test_adafactor_update__matches_loops(shape, expert_axis, rule, axes) -> None:
    """Every shape, both rules, several steps; the inputs stay as they were."""
    w, grads = data(shape)
    before = [part.copy() for part in (w, *grads)]
    found = run(w, grads, expert_axis, rule)
    assert found.dtype == np.float64
    assert found.shape == shape
    assert agrees(found, looped(w, grads, expert_axis, rule, axes))
    assert all(np.array_equal(was, part) for was, part in zip(before, (w, *grads), strict=True))


@pytest.mark.parametrize(("shape", "expert_axis", "rule", "axes"), CASES)
def test_factored_axes__two_largest(shape, expert_axis, rule, axes) -> None:
    """The axes are those written by hand, and the state has their shapes."""
    assert adafactor.factored_axes(shape, expert_axis, rule) == axes
    state = adafactor.adafactor_init(shape, expert_axis, rule)
    if axes is None:
        assert (state.v.shape, state.v_row.size, state.v_column.size) == (shape, 0, 0)
    else:
        assert state.v_row.shape == tuple(n for axis, n in enumerate(shape) if axis != axes[0])
        assert state.v_column.shape == tuple(n for axis, n in enumerate(shape) if axis != axes[1])
        assert state.v.size == 0


def test_factored_axes__switch_c() -> None:
    """The experts of Switch-C are factored over width and hidden width under both rules."""
    for rule in ("mesh", "t5x"):
        assert adafactor.factored_axes((2048, 2080, 6144), 0, rule) == (2, 1)


def test_adafactor_update__zero_gradient() -> None:
    """A gradient of zero changes nothing, and a parameter of zero moves at the least scale."""
    w = np.zeros((2, 3))
    state = adafactor.adafactor_init(w.shape)
    same, _ = adafactor.adafactor_update(w, w, state, RATE)
    assert np.array_equal(same, w)
    moved, _ = adafactor.adafactor_update(w, np.ones_like(w), state, RATE)
    assert (np.abs(moved + RATE / 1000) <= OPERATIONS * EPS * RATE / 1000).all()


def test_second_moment_decay__golden() -> None:
    """The values of the facts, to the digits printed there."""
    golden = {0: "0.00000", 1: "0.42565", 2: "0.58476", 10: "0.85315", 100: "0.97508", 10_000: "0.99937"}
    assert {step: f"{adafactor.second_moment_decay(step):.5f}" for step in golden} == golden


def test_adafactor_update__planted(monkeypatch) -> None:
    """The comparison notices a decay that lacks its + 1, a missing clip, a missing scale, and each rule in place of the other."""
    w, grads = data((5, 3))
    right = looped(w, grads, None, "mesh", None)
    assert agrees(run(w, grads, None, "mesh"), right)
    with monkeypatch.context() as patch:
        patch.setattr(adafactor, "second_moment_decay", lambda step: 1.0 - max(step, 1) ** -0.8)
        assert not agrees(run(w, grads, None, "mesh"), right)
    assert not agrees(run(w, grads, None, "mesh", clip=math.inf), right)
    with monkeypatch.context() as patch:
        patch.setattr(adafactor, "_root_mean_square", lambda x, batch: np.ones(()))
        assert not agrees(run(w, grads, None, "mesh"), right)
    for shape, axes in (((3, 5, 7), (None, None)), ((3, 128, 130), ((2, 1), (2, 1))), ((140, 2, 129), ((0, 2), None))):
        w, grads = data(shape)
        assert not agrees(run(w, grads, 0, "t5x"), looped(w, grads, 0, "mesh", axes[0]))
        assert not agrees(run(w, grads, 0, "mesh"), looped(w, grads, 0, "t5x", axes[1]))


def test_adafactor_update__rejects_wrong_inputs() -> None:
    """Shapes, types, values, state, rule."""
    w = np.ones((2, 3))
    state = adafactor.adafactor_init((2, 3))
    for grad in (np.ones((3, 2)), np.ones((2, 3), np.float32), np.full((2, 3), np.nan)):
        with pytest.raises(ValueError, match="adafactor_update"):
            adafactor.adafactor_update(w, grad, state, RATE)
    with pytest.raises(ValueError, match=r"state\.v has shape"):
        adafactor.adafactor_update(w, w, adafactor.adafactor_init((3, 2)), RATE)
    with pytest.raises(ValueError, match="rule is"):
        adafactor.factored_axes((2, 3), 0, "other")
    with pytest.raises(ValueError, match="expert_axis is 2"):
        adafactor.factored_axes((2, 3), 2, "t5x")


def test_inverse_square_root__golden() -> None:
    """The values of the facts, to the digits printed there."""
    golden = {0: "0.01", 10_000: "0.01", 40_000: "0.005", 100_000: "0.0031623", 250_000: "0.002", 550_000: "0.0013484", 1_000_000: "0.001"}
    assert {step: f"{schedule.inverse_square_root(step):.5g}" for step in golden} == golden
    assert schedule.inverse_square_root(9_999) == schedule.inverse_square_root(0)
    assert schedule.inverse_square_root(16, plateau=4, multiplier=2.0) == 0.5


def test_schedules__corners() -> None:
    """The ends of every straight line, in numbers that binary fractions hold exactly."""
    assert [schedule.constant(step, 0.5, 4) for step in (0, 1, 2, 4, 100)] == [0.0, 0.125, 0.25, 0.5, 0.5]
    assert schedule.constant(0, 0.5) == 0.5
    assert [schedule.linear(step, 0.5, 8) for step in (0, 4, 8, 9)] == [0.5, 0.25, 0.0, 0.0]
    assert [schedule.linear(step, 0.5, 12, 4) for step in (0, 2, 4, 8, 12)] == [0.0, 0.25, 0.5, 0.25, 0.0]
    assert [schedule.ramp_down(step, 100) for step in (0, 90, 95, 100, 101)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert schedule.ramp_down(6, 8, Fraction(1, 2)) == 0.5


def test_schedules__rejects_wrong_inputs() -> None:
    """Negative steps and spans that are empty."""
    for call in (
        lambda: schedule.inverse_square_root(-1),
        lambda: schedule.inverse_square_root(0, plateau=0),
        lambda: schedule.constant(0, RATE, -1),
        lambda: schedule.linear(0, RATE, 4, 4),
        lambda: schedule.ramp_down(0, 10, Fraction(0)),
    ):
        with pytest.raises(ValueError, match="should be"):
            call()


def adamw_pair(shape: tuple[int, ...], decay: float, peer: str = "AdamW") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return w of ours, w of torch, and the bound on their difference.

    The bound's scale is the sum of the sizes of w's terms: the mean with |grad| for grad cannot cancel, and all else is of one sign.
    """
    torch = pytest.importorskip("torch")
    start, grads = data(shape)
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = getattr(torch.optim, peer)([theirs], lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    w, state, size, mean = start, adamw.adamw_init(shape), np.abs(start), np.zeros(shape)
    for step, grad in enumerate(grads, start=1):
        theirs.grad = torch.tensor(grad)
        optimizer.step()
        w, state = adamw.adamw_update(w, grad, state, RATE, weight_decay=decay)
        mean = 0.9 * mean + (1 - 0.9) * np.abs(grad)
        root = np.sqrt(state.mean_square / (1 - 0.999**step))
        size = size * (1 + RATE * decay) + RATE * mean / (1 - 0.9**step) / (root + 1e-8)
    return w, theirs.detach().numpy(), 2 * STEPS * OPERATIONS * EPS * size


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 5, 7)])
@pytest.mark.parametrize("decay", [0.0, 0.01, 0.5])
def test_adamw_update__matches_torch(shape, decay) -> None:
    """torch.optim.AdamW in float64."""
    ours, theirs, bound = adamw_pair(shape, decay)
    assert ours.dtype == theirs.dtype == np.float64
    assert (np.abs(ours - theirs) <= bound).all()


def test_adamw_update__planted(monkeypatch) -> None:
    """The comparison notices decay that passes through the moments, and means left uncorrected."""
    ours, coupled, bound = adamw_pair((5, 3), 0.5, "Adam")
    assert (np.abs(ours - coupled) > bound).any()
    monkeypatch.setattr(adamw, "bias_correction", lambda beta, step: 1.0)
    ours, theirs, bound = adamw_pair((5, 3), 0.5)
    assert (np.abs(ours - theirs) > bound).any()


def test_adamw_update__inputs_not_written() -> None:
    """Neither w, nor the gradient, nor the state's arrays."""
    w, (grad, *_) = data((5, 3))
    state = adamw.AdamWState(1, np.ones((5, 3)), np.ones((5, 3)))
    for part in (w, grad, state.mean, state.mean_square):
        part.flags.writeable = False
    adamw.adamw_update(w, grad, state, RATE)
    with pytest.raises(ValueError, match="adamw_update"):
        adamw.adamw_update(w, grad[:2], state, RATE)


def test_clip_by_global_norm__hand() -> None:
    """Gradients of norm 5: below the limit they stay, above it they shrink together."""
    grads = [np.array([3.0]), np.array([[0.0, 4.0]])]
    same, norm = adamw.clip_by_global_norm(grads, 8.0)
    assert norm == 5.0
    assert all(np.array_equal(one, other) for one, other in zip(same, grads, strict=True))
    half, norm = adamw.clip_by_global_norm(grads, 2.5)
    assert norm == 5.0
    assert [part.tolist() for part in half] == [[1.5], [[0.0, 2.0]]]
    assert [part.tolist() for part in grads] == [[3.0], [[0.0, 4.0]]]
    each = [adamw.clip_by_global_norm([grad], 2.5)[0][0].tolist() for grad in grads]
    assert each != [part.tolist() for part in half]  # the planted bug: one norm per tensor


def test_clip_by_global_norm__rejects_wrong_inputs() -> None:
    """A limit of 0, and gradients that are not finite; zeros and an empty list are fine."""
    with pytest.raises(ValueError, match="limit is"):
        adamw.clip_by_global_norm([np.ones(2)], 0.0)
    with pytest.raises(ValueError, match="should be finite"):
        adamw.clip_by_global_norm([np.array([np.nan])], 1.0)
    assert adamw.clip_by_global_norm([np.zeros(2)], 1.0)[1] == 0.0
    assert adamw.clip_by_global_norm([], 1.0) == ([], 0.0)
