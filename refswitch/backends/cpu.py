# May import: standard library, numpy, refswitch.kernels.cpu, refswitch.precision, refswitch.reference, refswitch.spec_data and what lies below.
"""The CPU backend: the host functions of `refswitch.kernels.cpu` around one workspace. Float32; bfloat16 is float32 on bfloat16's grid.

What it does not compute it refuses in one line that names the knob; `reference` computes everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from refswitch.config import ModelPoints
from refswitch.errors import InputError
from refswitch.kernels.cpu import (
    adafactor,
    adamw,
    attention,
    capacity,
    cross_entropy,
    elementwise,
    embedding,
    feed_forward,
    losses,
    norm,
    philox,
    position,
    switch,
    switch_inputs,
)
from refswitch.kernels.cpu.jit import on_threads
from refswitch.kernels.cpu.workspace import Workspace
from refswitch.model_config import ModelConfig
from refswitch.precision import Precision, layer_points
from refswitch.reference import distillation
from refswitch.reference.attention import AttentionParams, masked_softmax
from refswitch.reference.block import StackStatics
from refswitch.reference.capacity import Route
from refswitch.reference.decoding import KeyValue
from refswitch.reference.switch import Statics, SwitchInputs, SwitchOutputs, SwitchParams
from refswitch.spec_data import load_dialect, parse_record
from refswitch.tree import leaves

SETTINGS = ("float32", "selective", "selective_master")
EMPTY = np.empty((0, 0, 0), np.float32)


class Cpu:
    """One instance for one run: its buffers are reused from step to step."""

    name = "cpu"
    dtype: type[np.floating] = np.float32

    def __init__(self, threads: int | None = None) -> None:
        """Bind the kernels' host functions to buffers of this instance."""
        self.workspace, self.threads = Workspace(), threads
        self.rounded = self._bound(elementwise.rounded)
        self.added = self._bound(elementwise.added)
        self.scaled = self._bound(elementwise.scaled)
        self.residual = self._bound(elementwise.residual)
        self.position_bias_forward = self._bound(position.position_bias_forward)
        self.position_bias_backward = position.position_bias_backward
        self.embed_forward = self._bound(embedding.embed_forward)
        self.embed_backward = self._bound(embedding.embed_backward)
        self.tied_logits_forward = self._bound(embedding.tied_logits_forward)
        self.tied_logits_backward = self._bound(embedding.tied_logits_backward)
        self.logits_forward = self._bound(embedding.logits_forward)
        self.logits_backward = self._bound(embedding.logits_backward)
        self.norm_forward = self._bound(norm.norm_forward)
        self.norm_backward = self._bound(norm.norm_backward)
        self.attention_forward = self._bound(attention.attention_forward)
        self.attention_backward = self._bound(attention.attention_backward)
        self.feed_forward_forward = self._bound(feed_forward.feed_forward_forward)
        self.feed_forward_backward = self._bound(feed_forward.feed_forward_backward)
        self.cross_entropy_forward = self._bound(cross_entropy.cross_entropy_forward)
        self.cross_entropy_backward = self._bound(cross_entropy.cross_entropy_backward)
        self.switch_backward = self._bound(switch.switch_backward)
        self.squared_norm = elementwise.squared_norm
        self.scaled_by = elementwise.scaled_by
        self.adafactor_update = self._bound(adafactor.adafactor_update)
        self.adamw_update = self._bound(adamw.adamw_update)

    def _bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(function, workspace=self.workspace)

    def supports(self, config: ModelConfig, setting: Precision) -> None:
        """Return if the kernels compute such a model under such a setting.

        Raises
        ------
        InputError
            With the knob that they do not have.
        """
        if setting.name not in SETTINGS:
            raise InputError(f"precision {setting.name}: the backend cpu computes {', '.join(SETTINGS)}; the backend reference every precision")
        if config.experts:
            dialect = load_dialect(parse_record(config.dialect))
            switch_inputs.refuse(dialect, layer_points(dialect, setting))

    def running(self) -> AbstractContextManager:
        """Run kernels on this instance's threads, all that there are where it says none."""
        return on_threads(self.threads)

    def begin(self) -> None:
        """Begin a step: every buffer is free."""
        self.workspace.reset()

    def mark(self) -> int:
        """Return a number for this moment."""
        return self.workspace.mark()

    def release(self, since: int, until: int, keep: Any) -> None:
        """Give up what was returned between two moments, but for the arrays of the tree `keep`."""
        self.workspace.give_between(since, until, (leaf for leaf in leaves(keep).values() if isinstance(leaf, np.ndarray)))

    def keep_factor(self, seed: int, step: int, site: int, shape: tuple[int, ...], keep_prob: float, offset: int = 0) -> np.ndarray:
        """Draw dropout as a factor."""
        return philox.keep_factor(seed, step, site, shape, keep_prob, offset, self.workspace)

    def jitter(self, seed: int, step: int, site: int, shape: tuple[int, ...], eps: float, offset: int = 0) -> np.ndarray:
        """Draw a factor from 1 - eps to 1 + eps."""
        return philox.jitter(seed, step, site, shape, eps, offset, self.workspace)

    def project(self, x_BMD: np.ndarray, params: AttentionParams, points: ModelPoints) -> KeyValue:
        """Return the keys and values of some tokens, in new arrays: decoding keeps them from step to step."""
        weights = (params.w_key_DHK, params.w_value_DHK)
        return KeyValue(*[np.array(self.rounded(np.einsum("bmd,dhk->bmhk", x_BMD, w, optimize=True), points.activations)) for w in weights])

    def attend(
        self, x_BLD: np.ndarray, memory: KeyValue, bias_HLM: np.ndarray, allowed_BLM: np.ndarray, params: AttentionParams, points: ModelPoints
    ) -> np.ndarray:
        """Return what the queries of a few tokens find; NumPy, because one token is too little for a kernel."""
        query_BLHK = self.rounded(np.einsum("bld,dhk->blhk", x_BLD, params.w_query_DHK, optimize=True), points.activations)
        scores_BHLM = self.rounded(np.einsum("blhk,bmhk->bhlm", query_BLHK, memory.key_BMHK, optimize=True) + bias_HLM, points.statistics)
        probs_BHLM = self.rounded(masked_softmax(scores_BHLM, allowed_BLM), points.activations)
        mixed_BLHK = self.rounded(np.einsum("bhlm,bmhk->blhk", probs_BHLM, memory.value_BMHK, optimize=True), points.activations)
        return self.rounded(np.einsum("blhk,hkd->bld", mixed_BLHK, params.w_out_HKD, optimize=True), points.activations)

    def switch_forward(self, inputs: SwitchInputs, params: SwitchParams, statics: Statics) -> tuple[SwitchOutputs, Any]:
        """Return the layer's outputs but for what lies with the experts' rows: hidden and expert_out are empty."""
        outputs, saved = switch.switch_forward(inputs, params, statics, self.workspace)
        fields = outputs._asdict() | {"route": Route(*outputs.route), "hidden_GSF": EMPTY, "expert_out_GSD": EMPTY}
        return SwitchOutputs(**fields), saved

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
    ) -> tuple[float, Any]:
        """Return the mixture of the labels' loss and a teacher's; NumPy in float64, because it reads the logits alone."""
        wide = logits_BLV.astype(np.float64), teacher_BLV.astype(np.float64)
        return distillation.distillation_forward(*wide, targets_BL, weight_BL, denominator, smoothing, z_coef, soft, temperature)

    def distillation_backward(self, dvalue: float, saved: Any) -> np.ndarray:
        """Return dlogits_BLV."""
        return distillation.distillation_backward(dvalue, saved).astype(np.float32)

    def pool_balance(
        self, switches: Sequence[SwitchOutputs], saved: Sequence[Any], valid_GS: np.ndarray, statics: StackStatics
    ) -> tuple[float, tuple[Any, ...]]:
        """Return the balance loss with f and P averaged over the layers first. All layers have the same gradient, as their tokens add up alike.

        Spec: S-AUX-1.
        """
        aux, E = statics.dialect.aux, switches[0].probs_GSE.shape[-1]
        claims_GS = valid_GS if statics.dialect.pad.route == "exclude" else np.ones_like(valid_GS)
        counts_GS = valid_GS if aux.P_pads == "exclude" else np.ones_like(valid_GS)
        sums_GE, count_GE = np.zeros((len(valid_GS), E)), np.zeros((len(valid_GS), E), np.int64)
        rows_G, scale_G = np.zeros(len(valid_GS)), np.ones(len(valid_GS))
        for each in switches:
            route, sum_GE = capacity.Route(*each.route), np.empty_like(sums_GE)
            losses.sum_of_probs(sum_GE, each.probs_GSE, counts_GS)
            own_G, scale_G = losses.rows_of_mean(valid_GS, route.kept_GS, aux)
            sums_GE, rows_G = sums_GE + sum_GE, rows_G + own_G
            count_GE = count_GE + losses.counted_fraction(route, claims_GS, valid_GS, E, aux)
        value, balance = losses.balance_forward(sums_GE, count_GE, rows_G, scale_G, counts_GS, aux)
        return value, tuple(each._replace(balance=balance) for each in saved)
