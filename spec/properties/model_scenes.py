# May import: standard library, numpy, hypothesis, refswitch, properties.drawn.
"""Small encoder-decoders for the properties of blocks, stacks, the model, decoding and beam search.

Sizes are pairwise distinct, but for the groups: a swapped axis cannot pass. Packed segments of several lengths, padding that is a segment of its own,
dropout everywhere, noise in the routers, drops in the Switch layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.drawn import MOTLEY, SELECTIVE
from refswitch.config import MODEL_TRUTH, ModelPoints, rounding_points
from refswitch.numbers.precision import round_to
from refswitch.reference.attention import AttentionParams
from refswitch.reference.block import AttentionLayerParams, FeedForwardLayerParams, RouterNoise, StackStatics
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.reference.switch import SwitchParams
from refswitch.reference.transformer import Batch, BlockNoise, BlockParams, ModelOutputs, ModelParams, ModelStatics, StackNoise, StackParams
from refswitch.spec_data import load_dialect, load_profile, parse_record
from refswitch.tree import leaves, with_leaves

H, B, L, D, M, K, U, E, V, F = 2, 3, 4, 5, 6, 7, 8, 9, 11, 13
GROUPS = (2, 4)  # of 18 tokens of the encoder, of 12 of the decoder
CAPACITY = 2
SETTINGS = ((MODEL_TRUTH, "float64"), (SELECTIVE, "bfloat16"), (MOTLEY[0], "bfloat16"), (MOTLEY[1], "float32"))  # around the layers, in them
SEEDS = st.integers(0, 2**20)
PLANS = st.tuples(st.integers(0, len(SETTINGS) - 1), SEEDS)


def in_every_setting(*choices: Sequence[Any]) -> list[Any]:
    """Return examples to try always: a plan of each setting, with one of each of some choices, in turn."""
    return [((i, i), *(choice[i % len(choice)] for choice in choices)) for i in range(len(SETTINGS))]


class Kind(NamedTuple):
    """What a model is."""

    dialect: str = "mesh_tensorflow"
    tied: bool = True
    denominator: str = "targets"
    sparse: tuple[bool, ...] = (False, True)  # which blocks of the encoder
    decoder: tuple[bool, ...] = ()  # and of the decoder, where it is not as the encoder
    gated: bool = False
    activation: str = "relu"
    drops: bool = True  # else no capacity binds
    quiet: bool = False  # no dropout and no noise


# Summed, averaged and pooled balance losses, noise on the logits, drawn priorities, second choices; tied and untied, gated and not.
KINDS = (
    Kind("mesh_tensorflow"),
    Kind("flax_masked_switch_base", False, "weights"),
    Kind("hf_4_57", True, "weights", sparse=(True, True), decoder=(False, True)),
    Kind("keras_io", False, "targets", gated=True, activation="gelu_tanh"),
    Kind("labml_switch", True, "weights", sparse=(True, False, True), decoder=(True,), activation="silu"),
    Kind("mesh_ntlb", sparse=(False, False), decoder=(False, True)),
)


class Setup(NamedTuple):
    """One model with everything that its forward pass reads."""

    batch: Batch
    params: ModelParams
    noise: tuple[StackNoise, StackNoise]
    statics: ModelStatics


class _Draw:
    """Arrays of one seed, on the grid of what operations hand on."""

    def __init__(self, kind: Kind, seed: int, around: ModelPoints) -> None:
        self.kind, self.around, self.rng = kind, around, np.random.default_rng(seed)
        self.dialect = load_dialect(parse_record(kind.dialect))

    def array(self, *shape: int) -> np.ndarray:
        return 0.6 * self.rng.normal(size=shape)

    def factor(self, *shape: int) -> np.ndarray:
        return np.ones(shape) if self.kind.quiet else self.rng.integers(0, 5, shape).clip(max=1) / 0.8

    def attention(self) -> AttentionLayerParams:
        return AttentionLayerParams(
            1 + self.array(D), AttentionParams(self.array(D, H, K), self.array(D, H, K), self.array(D, H, K), self.array(H, K, D))
        )

    def feed_forward(self, is_sparse: bool) -> FeedForwardLayerParams:
        if not is_sparse:
            dense = FeedForwardParams(self.array(D, F), self.array(D, F) if self.kind.gated else None, self.array(F, D))
            return FeedForwardLayerParams(1 + self.array(D), dense)
        experts = ExpertsParams(self.array(E, D, F), None, self.array(E, F, D), np.zeros((E, F)), np.zeros((E, F)), np.zeros((E, D)))
        return FeedForwardLayerParams(1 + self.array(D), SwitchParams(self.array(D, E), np.zeros(E), experts, np.zeros(D)))

    def sparse(self, is_decoder: bool) -> tuple[bool, ...]:
        return self.kind.decoder if is_decoder and self.kind.decoder else self.kind.sparse

    def stack(self, is_decoder: bool) -> StackParams:
        attentions = [(self.attention(), self.attention() if is_decoder else None) for _ in self.sparse(is_decoder)]
        blocks = [BlockParams(*pair, self.feed_forward(layer)) for pair, layer in zip(attentions, self.sparse(is_decoder), strict=True)]
        return StackParams(tuple(blocks), self.array(U, H), 1 + self.array(D))

    def block_noise(self, N: int, groups: int) -> BlockNoise:
        S = B * N // groups
        order_GS = np.tile(np.arange(S), (groups, 1))
        if self.kind.quiet:
            router = RouterNoise(np.ones((B, N, D)), np.zeros((B, N, E)), np.zeros((B, N, E)), order_GS)
        else:
            router = RouterNoise(1 + self.array(B, N, D) / 99, self.array(B, N, E), self.array(B, N, E), self.rng.permuted(order_GS, axis=1))
        attentions = self.factor(B, H, N, N), self.factor(B, N, D), self.factor(B, H, N, M), self.factor(B, N, D)
        return BlockNoise(*attentions, router, self.factor(B, N, F), self.factor(B, N, D))

    def noise(self, is_decoder: bool) -> StackNoise:
        N, groups = L if is_decoder else M, GROUPS[is_decoder]
        return StackNoise(self.factor(B, N, D), tuple(self.block_noise(N, groups) for _ in self.sparse(is_decoder)), self.factor(B, N, D))

    def statics(self, is_decoder: bool, profile: str) -> StackStatics:
        groups = GROUPS[is_decoder]
        points = rounding_points(self.dialect, load_profile(profile))._replace(gradients=self.around.gradients)
        capacity = CAPACITY if self.kind.drops else B * (L if is_decoder else M)
        return StackStatics(
            self.dialect, points, self.around, self.kind.activation, 1e-6, 12, is_decoder, groups, capacity,
            0.3 + is_decoder / 8, 0.2 - is_decoder / 8,
        )  # fmt: skip


ENCODER_SEGMENT_BM = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1]])
DECODER_SEGMENT_BL = np.array([[1, 1, 2, 0], [1, 1, 1, 2], [1, 1, 1, 1]])


def setup_of(kind: Kind, seed: int = 0, around: ModelPoints = MODEL_TRUTH, profile: str = "float64") -> Setup:
    """Draw a model, its batch and its noise."""
    draw = _Draw(kind, seed, around)
    encoder = draw.rng.integers(1, V, (B, M)), ENCODER_SEGMENT_BM, ENCODER_SEGMENT_BM != 0, np.arange(M)
    decoder = draw.rng.integers(1, V, (B, L)), DECODER_SEGMENT_BL, DECODER_SEGMENT_BL != 0, np.arange(L)
    weight_BL = (DECODER_SEGMENT_BL != 0) * draw.rng.integers(1, 3, (B, L)) * 1.0
    batch = Batch(*encoder, *decoder, draw.rng.integers(1, V, (B, L)), weight_BL)
    params = ModelParams(draw.array(V, D), draw.stack(False), draw.stack(True), None if kind.tied else draw.array(D, V))
    noise = draw.noise(False), draw.noise(True)
    statics = ModelStatics(draw.statics(False, profile), draw.statics(True, profile), kind.denominator, 0.125, 0.0625)
    return Setup(batch, on_grid(params, around), on_grid(noise, around), statics)


def on_grid(tree: Any, around: ModelPoints) -> Any:
    """Return a tree with its floating arrays rounded to the format of what operations hand on."""
    arrays = {path: np.asarray(leaf) for path, leaf in leaves(tree).items()}
    return with_leaves(tree, {path: round_to(leaf, around.activations) if leaf.dtype.kind == "f" else leaf for path, leaf in arrays.items()})


def routes_of(outputs: ModelOutputs) -> list[np.ndarray]:
    """Return the discrete results of every Switch layer."""
    return [part for stack in (outputs.encoder, outputs.decoder) for switch in stack.switches for part in switch.route]
