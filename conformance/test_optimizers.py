# May import: standard library, numpy, pytest, torch, transformers, refswitch.
"""The optimizers against other people's: Adafactor against transformers' on a matrix, AdamW against torch's. Their properties are in spec/properties.

Bounds count roundings: a sum of n terms of one sign has a relative error of at most n * eps, and each further operation adds one eps.
"""

from __future__ import annotations

import numpy as np
import pytest

from refswitch.reference import adafactor, adamw

EPS = np.finfo(np.float64).eps
STEPS = 4
OPERATIONS = 32  # more than the roundings of one element's update, sums apart, in either implementation together
RATE = 0.01


def data(shape: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return w and a gradient for each step; experts differ in scale, and one step has gradients great enough to be clipped."""
    random = np.random.default_rng(sum(shape))
    spread = 1 + np.arange(shape[0]).reshape((-1,) + (1,) * (len(shape) - 1))
    w = random.standard_normal(shape) * spread / shape[0]
    return w, [random.standard_normal(shape) * spread * (10 if step == 2 else 1) for step in range(STEPS)]


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


def adafactor_pair(shape: tuple[int, ...], smallest: int, **theirs_has: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return w of ours, w of transformers, and the bound on their difference: each step's sums over the whole tensor, and its operations."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    start, grads = data(shape)
    theirs = torch.nn.Parameter(torch.tensor(start))
    settings = {"scale_parameter": True, "relative_step": False, "warmup_init": False, "clip_threshold": 1.0, "lr": RATE} | theirs_has
    optimizer = transformers.Adafactor([theirs], **settings)
    w, state, size = start, adafactor.adafactor_init(shape, smallest=smallest), np.abs(start)
    for grad in grads:
        theirs.grad = torch.tensor(grad)
        optimizer.step()
        before = w
        w, state = adafactor.adafactor_update(w, grad, state, RATE, smallest=smallest)
        size = size + np.abs(w - before)
    return w, theirs.detach().numpy(), 2 * STEPS * (4 * w.size + OPERATIONS) * EPS * size


@pytest.mark.parametrize(("shape", "smallest"), [((7,), 2), ((5, 3), 2), ((3, 5), 2), ((4, 4), 2)])
def test_adafactor_update__matches_transformers(shape, smallest) -> None:
    """A vector, and matrices, whose two axes transformers factors whatever their sizes."""
    ours, theirs, bound = adafactor_pair(shape, smallest)
    assert ours.dtype == theirs.dtype == np.float64
    assert (np.abs(ours - theirs) <= bound).all()


@pytest.mark.parametrize("planted", [{"scale_parameter": False}, {"clip_threshold": 2.0}, {"decay_rate": -0.7}, {"eps": (1e-30, 1.0)}])
def test_adafactor_update__comparison_notices(planted) -> None:
    """Another scale, limit or decay on their side is seen."""
    ours, theirs, bound = adafactor_pair((5, 3), 2, **planted)
    assert (np.abs(ours - theirs) > bound).any()
