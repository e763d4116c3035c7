# May import: standard library, numpy, pytest, refswitch.
"""The model's backward against directional differences, with what Hugging Face lacks: dropout, packed segments, z-loss, smoothing, poolings.

A central difference with step h is off by c h**2 and by rounding. Since that with 2h is off by 4 c h**2, their difference is three times the
error, and it is the radius: nothing is chosen. Both sides of a difference must take the same routes, else the direction is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from refswitch.config import MODEL_TRUTH, TRUTH
from refswitch.reference.attention import AttentionParams, allowed_pairs, masked_softmax
from refswitch.reference.block import AttentionLayerParams, FeedForwardLayerParams, RouterNoise, StackStatics
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.reference.position import bucket_starts, position_buckets
from refswitch.reference.switch import SwitchParams
from refswitch.reference.transformer import (
    Batch,
    BlockNoise,
    BlockParams,
    ModelOutputs,
    ModelParams,
    ModelStatics,
    StackNoise,
    StackParams,
    model_backward,
    model_forward,
)
from refswitch.spec_data import load_dialect

D, H, K, F, V, E, U, B, L, M = 5, 2, 3, 7, 11, 4, 8, 2, 6, 9
STEP = 2.0**-18


class Setup(NamedTuple):
    """One model with everything that its forward pass reads."""

    batch: Batch
    params: ModelParams
    noise: tuple[StackNoise, StackNoise]
    statics: ModelStatics


def leaves(tree: Any, path: str = "") -> dict[str, np.ndarray]:
    """Return a tree's arrays by path."""
    if isinstance(tree, np.ndarray):
        return {path: tree}
    if tree is None:
        return {}
    names = tree._fields if hasattr(tree, "_fields") else range(len(tree))
    return {key: leaf for name, value in zip(names, tree, strict=True) for key, leaf in leaves(value, f"{path}/{name}").items()}


def with_leaf(tree: Any, path: list[str], value: np.ndarray) -> Any:
    """Return the tree with one array replaced."""
    if not path:
        return value
    if hasattr(tree, "_fields"):
        return tree._replace(**{path[0]: with_leaf(getattr(tree, path[0]), path[1:], value)})
    i = int(path[0])
    return (*tree[:i], with_leaf(tree[i], path[1:], value), *tree[i + 1 :])


def setup_of(name: str, tied: bool, denominator: str) -> Setup:
    """Draw a model of one dense and one sparse block per stack under a dialect."""
    rng = np.random.default_rng(len(name))

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) * 0.6

    def factor(*shape: int) -> np.ndarray:
        return rng.integers(0, 5, shape).clip(max=1) / 0.8

    def attention() -> AttentionLayerParams:
        return AttentionLayerParams(1 + draw(D), AttentionParams(draw(D, H, K), draw(D, H, K), draw(D, H, K), draw(H, K, D)))

    dialect = load_dialect(name)

    def stack(is_decoder: bool) -> StackParams:
        experts = ExpertsParams(draw(E, D, F), None, draw(E, F, D), np.zeros((E, F)), np.zeros((E, F)), np.zeros((E, D)))
        sparse = SwitchParams(draw(D, E), np.zeros(E), experts, np.zeros(D))
        dense = FeedForwardParams(draw(D, F), None, draw(F, D))
        layers = [FeedForwardLayerParams(1 + draw(D), layer) for layer in (dense, sparse)]
        blocks = tuple(BlockParams(attention(), attention() if is_decoder else None, layer) for layer in layers)
        return StackParams(blocks, draw(U, H), 1 + draw(D))

    def noise(N: int) -> StackNoise:
        def block() -> BlockNoise:
            G = 3 if N == M else 2
            router = RouterNoise(1 + draw(B, N, D) / 99, draw(B, N, E), draw(B, N, E), rng.permuted(np.tile(np.arange(B * N // G), (G, 1)), axis=1))
            return BlockNoise(
                factor(B, H, N, N), factor(B, N, D), factor(B, H, N, M), factor(B, N, D), router, factor(B, N, F), factor(B, N, D)
            )  # fmt: skip

        blocks = [block(), block()]
        return StackNoise(factor(B, N, D), tuple(blocks), factor(B, N, D))

    encoder_segment_BM = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 2]])
    decoder_segment_BL = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2]])
    encoder = rng.integers(1, V, (B, M)), encoder_segment_BM, encoder_segment_BM != 0, np.arange(M)
    decoder = rng.integers(1, V, (B, L)), decoder_segment_BL, decoder_segment_BL != 0, np.arange(L)
    batch = Batch(*encoder, *decoder, rng.integers(1, V, (B, L)), (decoder_segment_BL != 0) * 1.0)
    stacks = [
        StackStatics(dialect, TRUTH, MODEL_TRUTH, "relu", 1e-6, 12, causal, groups, 3, 0.3 + causal / 8, 0.2 - causal / 8)
        for causal, groups in ((False, 3), (True, 2))
    ]
    params = ModelParams(draw(V, D), stack(False), stack(True), None if tied else draw(D, V))
    return Setup(batch, params, (noise(M), noise(L)), ModelStatics(stacks[0], stacks[1], denominator, 0.1, 0.05))


def routes_of(outputs: ModelOutputs) -> list[np.ndarray]:
    return [part for stack in (outputs.encoder, outputs.decoder) for switch in stack.switches for part in switch.route]


def unexplained(setup: Setup, gradients: ModelParams) -> dict[str, float]:
    """Return |difference quotient - derivative| / radius along a random direction of each parameter, where it exceeds 1."""
    rng = np.random.default_rng(7)
    outputs, _ = model_forward(setup.batch, setup.params, setup.noise, setup.statics)
    slopes, found, same = leaves(gradients), {}, 0
    for path, value in leaves(setup.params).items():
        direction = rng.normal(size=value.shape)

        def at(h: float, path: str = path, value: np.ndarray = value, direction: np.ndarray = direction) -> tuple[float, bool]:
            moved = with_leaf(setup.params, path.split("/")[1:], value + h * direction)
            there, _ = model_forward(setup.batch, moved, setup.noise, setup.statics)
            is_same = all(np.array_equal(a, b) for a, b in zip(routes_of(outputs), routes_of(there), strict=True))
            return there.losses.objective, is_same

        values = [at(h) for h in (-2 * STEP, -STEP, STEP, 2 * STEP)]
        if not all(is_same for _, is_same in values):
            continue
        same += 1
        far, near = (values[3][0] - values[0][0]) / (4 * STEP), (values[2][0] - values[1][0]) / (2 * STEP)
        rounding = np.finfo(np.float64).eps * abs(outputs.losses.objective) * V * F * M / STEP
        ratio = abs(near - float(np.sum(slopes[path] * direction))) / (abs(far - near) + rounding)
        if not ratio <= 1.0:
            found[path] = ratio
    assert same > len(slopes) // 2
    return found


CASES = [
    ("mesh_tensorflow", True, "targets"), ("flax_masked_switch_base", False, "weights"), ("hf_4_57", True, "weights"),
    ("keras_io", False, "targets"), ("labml_switch", True, "weights"), ("mesh_ntlb", True, "targets"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tied", "denominator"), CASES)
def test_model_backward__finite_difference(name: str, tied: bool, denominator: str) -> None:
    """Every parameter, under summed, averaged and pooled balance losses, noise on the logits, drawn priorities and second choices."""
    setup = setup_of(name, tied, denominator)
    _, saved = model_forward(setup.batch, setup.params, setup.noise, setup.statics)
    assert unexplained(setup, model_backward(1.0, saved, setup.params, setup.statics)) == {}


@pytest.mark.parametrize("path", ["/embedding_VD", "/encoder/position_UH", "/decoder/blocks/1/feed_forward/feed_forward/w_router_DE"])
def test_model_backward__comparison_notices(path: str) -> None:
    """One element of one gradient that is off by a thousandth of its array's largest is noticed."""
    setup = setup_of(*CASES[0])
    _, saved = model_forward(setup.batch, setup.params, setup.noise, setup.statics)
    gradients = model_backward(1.0, saved, setup.params, setup.statics)
    wrong = leaves(gradients)[path].copy()
    wrong.flat[np.argmax(np.abs(wrong))] *= 1.001
    assert path in unexplained(setup, with_leaf(gradients, path.split("/")[1:], wrong))


def test_position_buckets__golden() -> None:
    """The first distance of each bucket of 32, both ways and causal, up to 128."""
    assert bucket_starts(16, 128).tolist() == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    assert bucket_starts(32, 128).tolist() == [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    here = np.arange(200)
    both_LM = position_buckets(here, here, 32, 128, bidirectional=True)
    back_LM = position_buckets(here, here, 32, 128, bidirectional=False)
    assert (both_LM[0, :3].tolist(), both_LM[:3, 0].tolist(), both_LM[0, 199], both_LM[199, 0]) == ([0, 17, 18], [0, 1, 2], 31, 15)
    assert (back_LM[0].max(), back_LM[113, 0], back_LM[112, 0]) == (0, 31, 30)


def test_allowed_pairs__packed_segments() -> None:
    """A query sees its own segment and not beyond itself; padding sees nothing and is seen by nobody."""
    segment_BL = np.array([[1, 1, 2, 0]])
    allowed_BLL = allowed_pairs(segment_BL, segment_BL, segment_BL != 0, causal=True)
    assert allowed_BLL[0].astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    probs_BHLL = masked_softmax(np.full((1, 1, 4, 4), 900.0), allowed_BLL)
    assert probs_BHLL[0, 0].tolist() == [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 0]]
