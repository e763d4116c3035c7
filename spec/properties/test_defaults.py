# May import: standard library, numpy, refswitch, its own folder.
"""What holds unless something else is said, and what is remembered: the defaults of the optimizers, what they refuse, the loss of logits far apart.

Each default is the documented number to the bit, on data on which any other number would show.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from properties.harness import clause, draws, needs
from properties.operations import Operations
from properties.refusals import refusal

TINY = 2.0**-50  # its square is near Adafactor's epsilon


def assert_default(call: Any, name: str, documented: float, other: float) -> None:
    """Assert that leaving an argument out is giving it the documented value, and that it matters."""
    left_out, given, changed = (np.asarray(call(**arguments)[0]) for arguments in ({}, {name: documented}, {name: other}))
    assert (left_out == given).all(), name
    assert (left_out != changed).any(), name


@clause("O-ADAF-3")
@needs(wide=True)
@draws()
def test_adafactor_update__defaults(operations: Operations) -> None:
    """epsilon_square is 1e-30, epsilon_scale 1e-3, clip 1, and a tensor is factored where its two largest axes have 128 elements."""
    w, start = np.ones(3), operations.adafactor_init((3,))

    def on(w: np.ndarray, grad: np.ndarray, state: Any) -> Any:
        return lambda **knobs: operations.adafactor_update(w, grad, state, 0.5, **knobs)

    assert_default(on(w, np.full(3, TINY), start), "epsilon_square", 1e-30, 2e-30)
    assert_default(on(np.zeros(3), np.ones(3), start), "epsilon_scale", 1e-3, 2e-3)
    assert_default(on(w, np.ones(3), start._replace(step=1)), "clip", 1.0, 2.0)
    square, state = np.ones((128, 128)), operations.adafactor_init((128, 128))
    _, after = operations.adafactor_update(square, square, state, 0.5)
    assert [part.shape for part in after[1:]] == [(128,), (128,), (0,)]


@clause("O-ADAF-3")
@needs(wide=True)
@draws()
def test_adafactor_update__remembers_means_of_squares(operations: Operations) -> None:
    """After the first update the state is the mean of grad^2 + epsilon over the axis that it lacks, or the square itself."""
    grad = np.array([[1.0, 3.0, 1.0, 3.0], [2.0, 2.0, 4.0, 4.0]])
    w = np.ones_like(grad)
    _, after = operations.adafactor_update(w, grad, operations.adafactor_init((2, 4), smallest=2), 0.5, smallest=2, epsilon_square=1.0)
    assert (after.step, after.v_row.tolist(), after.v_column.tolist(), after.v.size) == (1, [6.0, 11.0], [3.5, 7.5, 9.5, 13.5], 0)
    _, after = operations.adafactor_update(w, grad, operations.adafactor_init((2, 4)), 0.5, epsilon_square=1.0)
    assert (after.step, after.v.tolist(), after.v_row.size, after.v_column.size) == (1, (grad**2 + 1.0).tolist(), 0, 0)
    for smallest in (2, 3):  # factored, and not
        state = operations.adafactor_init((2, 2), smallest=smallest)
        w, _ = operations.adafactor_update(np.ones((2, 2)), np.full((2, 2), TINY), state, 0.25, smallest=smallest, epsilon_square=3.0 * TINY**2)
        assert (w == 0.875).all()


@clause("O-ADAF-3")
@needs(wide=True)
@draws()
def test_adafactor_update__refuses_any_number_that_is_none(operations: Operations) -> None:
    """One NaN or infinity in a tensor is enough; the message says which array is which."""
    good, state = np.ones(3), operations.adafactor_init((3,))
    for bad in (np.array([1.0, np.nan, 1.0]), np.array([1.0, 1.0, np.inf])):
        assert "should be finite" in refusal(lambda bad=bad: operations.adafactor_update(bad, good, state, 0.5))
        assert "should be finite" in refusal(lambda bad=bad: operations.adafactor_update(good, bad, state, 0.5))
    assert "w has shape (3,) and grad (2,)" in refusal(lambda: operations.adafactor_update(good, np.ones(2), state, 0.5))
    says = refusal(lambda: operations.adafactor_update(good.astype(np.float32), good, state, 0.5))
    assert "w is float32 and grad float64" in says


@clause("O-ADAMW-1")
@needs(wide=True)
@draws()
def test_adamw_update__defaults(operations: Operations) -> None:
    """beta1 is 0.9, beta2 0.999, epsilon 1e-8, weight decay 0.01."""
    start = operations.adamw_init((2,))
    state = start._replace(step=3, mean=np.array([0.25, -0.5]), mean_square=np.array([1.0, 4.0]))

    def on(state: Any, grad: np.ndarray) -> Any:
        return lambda **knobs: operations.adamw_update(np.array([1.0, 2.0]), grad, state, 0.5, **knobs)

    assert_default(on(state, np.ones(2)), "beta1", 0.9, 0.8)
    assert_default(on(state, np.ones(2)), "beta2", 0.999, 0.99)
    assert_default(on(start, np.full(2, 1e-8)), "epsilon", 1e-8, 2e-8)
    assert_default(on(state, np.ones(2)), "weight_decay", 0.01, 0.02)


@clause("O-ADAMW-1")
@needs(wide=True)
@draws()
def test_adamw_update__refuses_any_number_that_is_none(operations: Operations) -> None:
    """One NaN or infinity in a tensor is enough."""
    good, state = np.ones(3), operations.adamw_init((3,))
    for bad in (np.array([1.0, np.nan, 1.0]), np.array([1.0, 1.0, np.inf])):
        assert "should be finite" in refusal(lambda bad=bad: operations.adamw_update(bad, good, state, 0.5))
        assert "should be finite" in refusal(lambda bad=bad: operations.adamw_update(good, bad, state, 0.5))


@clause("O-RATE-2")
@draws()
def test_schedules__say_which_number_is_wrong(operations: Operations) -> None:
    """What is no step and what is no warm-up are told apart."""
    for call in (lambda **given: operations.constant(rate=1.0, **given), lambda **given: operations.linear(rate=1.0, total=9, **given)):
        assert "step is -1 and warm_up 3" in refusal(lambda call=call: call(step=-1, warm_up=3))
        assert "step is 3 and warm_up -1" in refusal(lambda call=call: call(step=3, warm_up=-1))


@clause("T-LOSS-1", "T-LOSS-2")
@needs(wide=True)
@draws()
def test_cross_entropy_forward__of_logits_far_apart(operations: Operations) -> None:
    """The largest logit is subtracted before the exponential: 2000 between two logits is a loss of 2000, and probabilities of 0 and 1."""
    for shift in (-1000.0, 0.0, 1000.0):
        logits_BLV = np.array([[[0.0, 2000.0, -3000.0]]]) + shift
        value, saved = operations.cross_entropy_forward(logits_BLV, np.array([[0]]), np.ones((1, 1)), 1.0, 0.0, 0.0)
        assert math.isfinite(value)
        assert value == 2000.0
        assert operations.cross_entropy_backward(1.0, saved).tolist() == [[[-1.0, 1.0, 0.0]]]
