# May import: standard library, numpy, refswitch.precision, refswitch.reference, refswitch.model_config, refswitch.config.
"""The Backend protocol: the reference's operations by the reference's names and signatures, and the glue between them.

Spec: the chapters on the Switch layer and the transformer say what each computes. What a `..._forward` returns last is its `Saved`, whose type is the
backend's own: only its `..._backward` reads it. Arrays are of the backend's `dtype`; tokens, segments and routes are integers. A factor that is 1
everywhere has one element, and a term that is 0 everywhere too. Inputs are never written, but for parameters and optimizer state in an update, which
the caller gives away.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from refswitch.config import ModelPoints
from refswitch.model_config import ModelConfig
from refswitch.numbers.precision import FORMATS, Format
from refswitch.precision import Precision
from refswitch.reference.adafactor import AdafactorState, Rule
from refswitch.reference.adamw import AdamWState
from refswitch.reference.attention import AttentionParams
from refswitch.reference.block import StackStatics
from refswitch.reference.decoding import KeyValue
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.reference.switch import Statics, SwitchInputs, SwitchOutputs, SwitchParams

Saved = Any
UNROUNDED = FORMATS["float64"]  # as a format to round to: whatever the backend computes in


class Backend(Protocol):
    """A namespace of operations: a module, or an object that also keeps its buffers."""

    name: str
    dtype: type[np.floating]

    def supports(self, config: ModelConfig, setting: Precision) -> None:
        """Return if it computes such a model under such a setting; else raise an `InputError` that names the knob."""

    def running(self) -> AbstractContextManager:
        """Hold the threads that the operations run on; every operation is called inside."""

    # What a step does with memory. Where a backend keeps no buffers these do nothing.

    def begin(self) -> None:
        """Begin a step: whatever an operation returned before may be overwritten from now on."""

    def mark(self) -> int:
        """Return a number for this moment, greater than every one before."""

    def release(self, since: int, until: int, keep: Any) -> None:
        """Give up what was returned between two moments, but for the arrays of the tree `keep`."""

    # Randomness by address (refswitch.numbers.philox).

    def keep_factor(self, seed: int, step: int, site: int, shape: tuple[int, ...], keep_prob: float, offset: int = 0) -> np.ndarray:
        """Draw dropout as a factor: 1 / keep_prob, or 0."""

    def jitter(self, seed: int, step: int, site: int, shape: tuple[int, ...], eps: float, offset: int = 0) -> np.ndarray:
        """Draw a factor from 1 - eps to 1 + eps."""

    # Elementwise glue, each in one pass.

    def rounded(self, x: np.ndarray, format: Format) -> np.ndarray:
        """Return x on the grid of a format; x itself where that is no narrower than the backend's own."""

    def added(self, x: np.ndarray, y: np.ndarray, format: Format) -> np.ndarray:
        """Return round(x + y)."""

    def scaled(self, x: np.ndarray, factor: np.ndarray, format: Format) -> np.ndarray:
        """Return round(x * factor)."""

    def residual(self, x: np.ndarray, out: np.ndarray, factor: np.ndarray, format: Format) -> np.ndarray:
        """Return round(x + out * factor)."""

    # The model around the Switch layers.

    def position_bias_forward(self, table_UH: np.ndarray, bucket_LM: np.ndarray) -> np.ndarray:
        """Return bias_HLM."""

    def position_bias_backward(self, dbias_HLM: np.ndarray, bucket_LM: np.ndarray, U: int) -> np.ndarray:
        """Return dtable_UH."""

    def embed_forward(self, tokens_BL: np.ndarray, embedding_VD: np.ndarray) -> np.ndarray:
        """Return x_BLD."""

    def embed_backward(self, dx_BLD: np.ndarray, tokens_BL: np.ndarray, V: int) -> np.ndarray:
        """Return dembedding_VD."""

    def tied_logits_forward(self, x_BLD: np.ndarray, embedding_VD: np.ndarray, points: ModelPoints) -> np.ndarray:
        """Return logits_BLV by the embedding, scaled."""

    def tied_logits_backward(
        self, dlogits_BLV: np.ndarray, x_BLD: np.ndarray, embedding_VD: np.ndarray, points: ModelPoints
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return dx_BLD and dembedding_VD."""

    def logits_forward(self, x_BLD: np.ndarray, w_logits_DV: np.ndarray, points: ModelPoints) -> np.ndarray:
        """Return logits_BLV by a matrix of its own."""

    def logits_backward(
        self, dlogits_BLV: np.ndarray, x_BLD: np.ndarray, w_logits_DV: np.ndarray, points: ModelPoints
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return dx_BLD and dw_logits_DV."""

    def norm_forward(self, x_BLD: np.ndarray, scale_D: np.ndarray, epsilon: float, points: ModelPoints) -> tuple[np.ndarray, Saved]:
        """Return the normed token."""

    def norm_backward(self, dout_BLD: np.ndarray, saved: Saved, scale_D: np.ndarray, points: ModelPoints) -> tuple[np.ndarray, np.ndarray]:
        """Return dx_BLD and dscale_D."""

    def attention_forward(
        self,
        x_BLD: np.ndarray,
        memory_BMD: np.ndarray,
        bias_HLM: np.ndarray,
        params: AttentionParams,
        allowed_BLM: np.ndarray,
        factor_BHLM: np.ndarray,
        points: ModelPoints,
    ) -> tuple[np.ndarray, Saved]:
        """Return the memory's values, mixed."""

    def attention_backward(
        self, dout_BLD: np.ndarray, saved: Saved, params: AttentionParams, points: ModelPoints
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, AttentionParams]:
        """Return dx_BLD, dmemory_BMD, dbias_HLM and the parameters' gradients."""

    def project(self, x_BMD: np.ndarray, params: AttentionParams, points: ModelPoints) -> KeyValue:
        """Return the keys and values of some tokens, in arrays that outlive the step."""

    def attend(
        self, x_BLD: np.ndarray, memory: KeyValue, bias_HLM: np.ndarray, allowed_BLM: np.ndarray, params: AttentionParams, points: ModelPoints
    ) -> np.ndarray:
        """Return what queries find in a memory whose keys and values are known."""

    def feed_forward_forward(
        self, x_BLD: np.ndarray, params: FeedForwardParams, factor_BLF: np.ndarray, activation: str, points: ModelPoints
    ) -> tuple[np.ndarray, Saved]:
        """Return the dense layer's output."""

    def feed_forward_backward(
        self, dout_BLD: np.ndarray, saved: Saved, params: FeedForwardParams, activation: str, points: ModelPoints
    ) -> tuple[np.ndarray, FeedForwardParams]:
        """Return dx_BLD and the parameters' gradients."""

    def cross_entropy_forward(
        self, logits_BLV: np.ndarray, targets_BL: np.ndarray, weight_BL: np.ndarray, denominator: float, smoothing: float, z_coef: float
    ) -> tuple[float, Saved]:
        """Return the loss in nats."""

    def cross_entropy_backward(self, dvalue: float, saved: Saved) -> np.ndarray:
        """Return dlogits_BLV."""

    def distillation_forward(
        self,
        logits_BLV: np.ndarray,
        teacher_BLV: np.ndarray,
        targets_BL: np.ndarray,
        weight_BL: np.ndarray,
        denominator: float,
        smoothing: float,
        z_coef: float,
        soft: float,
        temperature: float,
    ) -> tuple[float, Saved]:
        """Return the mixture of the labels' loss and a teacher's."""

    def distillation_backward(self, dvalue: float, saved: Saved) -> np.ndarray:
        """Return dlogits_BLV."""

    # The Switch layer.

    def switch_forward(self, inputs: SwitchInputs, params: SwitchParams, statics: Statics) -> tuple[SwitchOutputs, Saved]:
        """Return the layer's outputs."""

    def switch_backward(
        self, dout_GSD: np.ndarray, daux: float, dz: float, saved: Saved, params: SwitchParams, statics: Statics
    ) -> tuple[np.ndarray, SwitchParams]:
        """Return dx_GSD and the parameters' gradients."""

    def pool_balance(
        self, switches: Sequence[SwitchOutputs], saved: Sequence[Saved], valid_GS: np.ndarray, statics: StackStatics
    ) -> tuple[float, tuple[Saved, ...]]:
        """Return the balance loss of several layers' averaged f and P, and each layer's saved with its part of that."""

    # The update.

    def squared_norm(self, grad: np.ndarray) -> float:
        """Return the sum of squares."""

    def scaled_by(self, grad: np.ndarray, factor: float) -> np.ndarray:
        """Return grad * factor; grad may be overwritten."""

    def adafactor_update(
        self,
        w: np.ndarray,
        grad: np.ndarray,
        state: AdafactorState,
        learning_rate: float,
        expert_axis: int | None = None,
        rule: Rule = "mesh",
    ) -> tuple[np.ndarray, AdafactorState]:
        """Return the tensor and its state after one update, which outlive the step; what was passed may be overwritten."""

    def adamw_update(
        self,
        w: np.ndarray,
        grad: np.ndarray,
        state: AdamWState,
        learning_rate: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> tuple[np.ndarray, AdamWState]:
        """Return the tensor and its state after one update, which outlive the step; what was passed may be overwritten."""
