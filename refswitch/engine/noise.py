# May import: standard library, numpy, refswitch.backends, refswitch.reference, refswitch.numbers, refswitch.model_config, refswitch.errors.
"""A step's noise, drawn by address: dropout, router noise, random priorities.

Spec: randomness. A layer's number counts through the whole model, its embedding and last norm use the stack's first. The index of a draw is its
position in the whole batch, so a microbatch or a rank that holds some rows from `first_row` on draws the slice of the whole. What is 1 (0)
everywhere is one element, and costs nothing. Next: `switch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from refswitch.backends.protocol import Backend
from refswitch.config import Dialect
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.numbers.philox import Purpose, permutation, site_of
from refswitch.reference.block import RouterNoise, StackStatics
from refswitch.reference.capacity import arrival_order
from refswitch.reference.transformer import BlockNoise, ModelStatics

FACTORS = ("x_mul_uniform", "x_dropout")
DRAWN = ("none", *FACTORS, "z_add_uniform")


class Address(NamedTuple):
    """Where the draws of a call lie: the run's seed, the number of the step, and the first of its rows in the whole batch."""

    seed: int
    step: int
    first_row: int


def check_noise(dialect: Dialect) -> None:
    """Refuse a dialect whose noise or choice needs draws that are not made here.

    Raises
    ------
    InputError
        With the knob.
    """
    noise = dialect.noise
    if noise.when != "never" and noise.kind not in DRAWN:
        raise InputError(f"dialect {dialect.name}: noise.kind={noise.kind} is not drawn by the engine; it draws {', '.join(DRAWN)}")
    if noise.when != "never" and noise.kind != "none" and isinstance(noise.eps, str):
        raise InputError(f"dialect {dialect.name}: noise.eps is a setting of the run; say noise.eps=...")
    if dialect.select.rule not in ("argmax", "ntlb"):
        raise InputError(f"dialect {dialect.name}: select.rule={dialect.select.rule} is not computed by the engine; it computes argmax and ntlb")


def one(axes: int, backend: Backend) -> np.ndarray:
    """Return the factor that is 1 everywhere."""
    return np.ones((1,) * axes, backend.dtype)


@dataclass(frozen=True)
class Drawing:
    """One stack's draws: what they need to know, and where they come from."""

    config: ModelConfig
    statics: StackStatics
    address: Address
    shape: tuple[int, int, int]  # rows, length, length of the memory
    train: bool
    first_layer: int
    backend: Backend

    def dropout(self, layer: int, purpose: Purpose, shape: tuple[int, ...], rate: float) -> np.ndarray:
        """Return the factors of one place; the first axis of `shape` is the rows."""
        if not self.train or rate == 0.0:
            return one(len(shape), self.backend)
        offset = self.address.first_row * int(np.prod(shape[1:]))
        return self.backend.keep_factor(self.address.seed, self.address.step, site_of(layer, purpose), shape, 1.0 - rate, offset)

    def hidden(self, layer: int, is_sparse: bool) -> np.ndarray:
        """Return the factors inside a feed-forward layer, in a Switch layer those of expert dropout."""
        B, L, _ = self.shape
        rate = self.config.expert_dropout if is_sparse else self.config.dropout
        if not (is_sparse and self.statics.dialect.expert.dropout_shape == "over_length"):
            return self.dropout(layer, Purpose.HIDDEN_DROPOUT, (B, L, self.config.d_ff), rate)
        factor_B1F = self.dropout(layer, Purpose.HIDDEN_DROPOUT, (B, 1, self.config.d_ff), rate)
        return factor_B1F if factor_B1F.size == 1 else np.repeat(factor_B1F, L, axis=1)

    def router(self, layer: int) -> RouterNoise:
        """Return what perturbs the router of one layer, and its order of service."""
        B, L, _ = self.shape
        (seed, step, first_row), dialect, noise = self.address, self.statics.dialect, self.statics.dialect.noise
        S, E = B * L // self.statics.groups, self.config.experts
        factor, term = one(3, self.backend), np.zeros((1, 1, 1), self.backend.dtype)
        if noise.kind != "none" and (noise.when == "always" or (noise.when == "train" and self.train)):
            eps = float(noise.eps) / (E if noise.eps_over_E else 1)
            width = self.config.d_model if noise.kind in FACTORS else E
            offset, site = first_row * L * width, site_of(layer, Purpose.ROUTER_JITTER if noise.kind in FACTORS else Purpose.ROUTER_NOISE)
            if noise.kind == "x_dropout":
                drawn = self.backend.keep_factor(seed, step, site, (B, L, width), 1.0 - eps, offset)
            else:
                drawn = self.backend.jitter(seed, step, site, (B, L, width), eps, offset)
            drawn = self.backend.rounded(drawn, self.statics.points.x) if noise.sample_dtype == "input" else drawn
            factor, term = (drawn, term) if noise.kind in FACTORS else (factor, drawn)
        priority_GS = arrival_order(S, self.statics.groups)
        if dialect.priority == "random":
            site, first = site_of(layer, Purpose.PRIORITY), first_row * L
            priority_GS = np.stack([permutation(seed, step, site, S, first + g * S) for g in range(self.statics.groups)])
        return RouterNoise(factor, term, np.zeros((1, 1, 1), self.backend.dtype), priority_GS)

    def block(self, i: int, is_sparse: bool, is_decoder: bool) -> BlockNoise:
        """Return the factors of one block."""
        (B, L, M), layer, rate, (D, H) = self.shape, self.first_layer + i, self.config.dropout, (self.config.d_model, self.config.heads)
        none = one(3, self.backend)
        return BlockNoise(
            self_probs_BHLL=self.dropout(layer, Purpose.SELF_PROBS_DROPOUT, (B, H, L, L), rate),
            self_out_BLD=self.dropout(layer, Purpose.SELF_OUT_DROPOUT, (B, L, D), rate),
            cross_probs_BHLM=self.dropout(layer, Purpose.CROSS_PROBS_DROPOUT, (B, H, L, M), rate) if is_decoder else one(4, self.backend),
            cross_out_BLD=self.dropout(layer, Purpose.CROSS_OUT_DROPOUT, (B, L, D), rate) if is_decoder else none,
            router=self.router(layer) if is_sparse else RouterNoise(none, none, none, np.zeros((0, 0), int)),
            hidden_BLF=self.hidden(layer, is_sparse),
            out_BLD=self.dropout(layer, Purpose.OUT_DROPOUT, (B, L, D), rate),
        )


@dataclass(frozen=True)
class DrawnBlocks(Sequence):
    """The noise of a stack's blocks, each drawn when it is asked for: a recomputed block draws again, to the same bits."""

    drawing: Drawing
    sparse: tuple[int, ...]
    layers: int
    is_decoder: bool

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self.layers

    def __getitem__(self, i: int) -> BlockNoise:  # type: ignore[override]
        """Draw the noise of one block."""
        if not 0 <= i < self.layers:
            raise IndexError(i)
        return self.drawing.block(i, i in self.sparse, self.is_decoder)

    def __iter__(self) -> Iterator[BlockNoise]:
        """Draw one after the other."""
        return (self[i] for i in range(self.layers))


class StackNoise(NamedTuple):
    """Dropout of one stack, as the reference's `StackNoise`; its blocks may be drawn as they come."""

    embedded_BLD: np.ndarray
    blocks: Sequence[BlockNoise]
    out_BLD: np.ndarray


def draw_noise(
    config: ModelConfig, statics: ModelStatics, address: Address, shape: tuple[int, int, int], train: bool, backend: Backend
) -> tuple[StackNoise, StackNoise]:
    """Return the noise of encoder and decoder for a batch of (rows, encoder length, decoder length).

    Raises
    ------
    InputError
        Where the dialect's noise is not drawn here.
    """
    check_noise(statics.encoder.dialect)
    B, M, L = shape
    stacks = (
        (statics.encoder, M, 0, config.encoder_sparse, config.encoder_layers, False),
        (statics.decoder, L, config.encoder_layers, config.decoder_sparse, config.decoder_layers, True),
    )
    encoder, decoder = (
        _stack_noise(Drawing(config, stack, address, (B, length, M), train, first, backend), sparse, layers, is_decoder)
        for stack, length, first, sparse, layers, is_decoder in stacks
    )
    return encoder, decoder


def _stack_noise(drawing: Drawing, sparse: tuple[int, ...], layers: int, is_decoder: bool) -> StackNoise:
    B, L, _ = drawing.shape
    shape, rate, layer = (B, L, drawing.config.d_model), drawing.config.dropout, drawing.first_layer
    return StackNoise(
        drawing.dropout(layer, Purpose.EMBEDDING_DROPOUT, shape, rate),
        DrawnBlocks(drawing, sparse, layers, is_decoder),
        drawing.dropout(layer, Purpose.STACK_DROPOUT, shape, rate),
    )
