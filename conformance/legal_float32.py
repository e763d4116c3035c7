# May import: standard library, numpy, refswitch.backends, refswitch.verify, refswitch.numbers, kernel_tubes and properties (on the path).
"""The reference as any float32 program might compute it: every result moved inside the radius that its own inputs give it.

Two uses. With draws it is Monte Carlo arithmetic: a run is one evaluation that the profile allows, several show how far such evaluations lie apart.
Without, it keeps the radius of every result of the forward pass beside the loss's gradient by it, which the backward pass brings. Between two moves
everything is exact (float64). Spec: training, section 8; the radii: numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from kernel_tubes import adafactor_update as updated_tube
from kernel_tubes import embed_backward as embedding_tube
from kernel_tubes import position_bias_backward as position_tube
from kernel_tubes import second_moment
from properties.model_tubes import (
    attention_tubes,
    cross_entropy_tubes,
    feed_forward_tubes,
    masked_probs,
    negative,
    norm_tubes,
    tied_logits_tubes,
)

from refswitch.backends import reference
from refswitch.numbers.philox import uniform
from refswitch.numbers.precision import Format
from refswitch.precision import PRECISIONS, layer_points
from refswitch.reference.adafactor import AdafactorState
from refswitch.reference.attention import AttentionParams, AttentionSaved
from refswitch.reference.capacity import Route
from refswitch.reference.feed_forward import FeedForwardParams
from refswitch.reference.switch import SwitchInputs, SwitchOutputs, SwitchParams, claimants
from refswitch.spec_data import load_profile
from refswitch.verify import layer as stages
from refswitch.verify import tubes
from refswitch.verify.case import Case
from refswitch.verify.cases import Target
from refswitch.verify.gradients import Forward, gradient_tubes
from refswitch.verify.layer import Layer
from refswitch.verify.tubes import Tube, add, contract, exact, log_sum_exp, multiply, scale, store

SETTING = PRECISIONS["float32"]
PROFILE = load_profile(SETTING.profile)
POINTS, FLOAT32 = SETTING.around, tubes.arithmetic_of(PROFILE)

# what rounds nothing: draws and moves of data; and the gradients' norm, which nothing here reads
UNMOVED = {
    "dtype", "embed_forward", "jitter", "keep_factor", "mark", "name", "position_bias_forward", "release", "rounded", "running", "squared_norm",
}  # fmt: skip

Move = Callable[[int, int, np.ndarray], np.ndarray]  # step, number of the result in it, radius -> what is added


class Made(NamedTuple):
    """One result of a forward pass."""

    operation: str
    number: int  # among all results of the step
    radius: np.ndarray


class Place(NamedTuple):
    """The same with the loss's gradient by it."""

    made: Made
    gradient: np.ndarray


def unmoved(step: int, number: int, radius: np.ndarray) -> np.ndarray:
    """Move nothing."""
    return np.zeros_like(radius)


def drawn(run: int) -> Move:
    """Return moves that are uniform in each radius, by address: the run is the seed, the result's number the site."""

    def move(step: int, number: int, radius: np.ndarray) -> np.ndarray:
        return radius * (2.0 * uniform(run, step, number, radius.shape).astype(np.float64) - 1.0)

    return move


def whole(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return what may be one element as an array of its own shape."""
    return np.broadcast_to(x, shape)


def layer_of(inputs: SwitchInputs, params: SwitchParams, statics: Any, **douts: Any) -> Layer:
    """Return one Switch layer of a pass as the judge sees a case."""
    (G, S, _), F = inputs.x_GSD.shape, params.experts.w_in_EDF.shape[2]
    inputs = inputs._replace(
        noise_factor_GSD=whole(inputs.noise_factor_GSD, inputs.x_GSD.shape), hidden_mask_GSF=whole(inputs.hidden_mask_GSF, (G, S, F))
    )
    zeroed_GS = ~inputs.valid_GS & (statics.dialect.pad.zero_input is True)
    x_GSD = np.where(zeroed_GS[..., None], 0.0, inputs.x_GSD)
    is_pad_GS, claims_GS = claimants(x_GSD, inputs.valid_GS, statics.dialect)
    return Layer(
        case=Case({"activation": statics.activation}, douts),
        target=Target(statics.dialect, PROFILE, frozenset(), {}),
        points=layer_points(statics.dialect, SETTING),
        router=FLOAT32,
        experts=FLOAT32,
        inputs=inputs,
        params=params,
        x_GSD=x_GSD,
        is_pad_GS=is_pad_GS,
        claims_GS=claims_GS,
        sits_out_GS=is_pad_GS & (statics.dialect.pad.route != "include"),
    )


def through(layer: Layer, logits: Tube | None, route: Route) -> tuple[Forward, tuple[Tube, Tube, Tube]]:
    """Return the layer's stages at a route, from logits that are known or from its own, and its three results."""
    x_router, x_expert = stages.noise_stage(layer)
    own, raw = stages.logits_stage(layer, x_router)
    logits = own if logits is None else logits
    probs = stages.probs_stage(layer, logits)
    gate = stages.gate_stage(layer, probs, logits, route.expert_GS)
    expertise = stages.hidden_stage(layer, x_expert, gate, route)
    expert_out = stages.expert_out_stage(layer, expertise, route)
    counts = stages.counts_of(layer, route, logits, stages.scores_stage(layer, probs, logits))
    z_loss, lse_GS, weight_GS = stages.z_stage(layer, logits)
    results = stages.out_stage(layer, expert_out, gate, x_expert, route), stages.aux_stage(layer, probs, counts, route), z_loss
    return Forward(x_router, x_expert, raw, logits, probs, gate, route, expertise, expert_out, counts, lse_GS, weight_GS), results


class Legal:
    """A backend: the reference under the setting float64, whose every result is moved as a float32 program's might be."""

    def __init__(self, move: Move, staged: bool = True) -> None:
        """Take what moves. Where `staged`, what attention, the loss and the router hold on the way is moved too, their results only for the rest."""
        self.move, self.staged = move, staged
        self.step, self.number = -1, 0
        self.kept: list[tuple[Any, tuple[Any, ...]]] = []  # what a forward operation took, by the identity of what it saved
        self.glue: list[Made] = []  # sums and factors on the stream, which backward meets in mirror order
        self.places: list[Place] = []
        self.is_backward, self.forward_results = False, 0

    def __getattr__(self, name: str) -> Any:
        if name not in UNMOVED:
            raise AttributeError(f"no radius is known of {name}")
        return getattr(reference, name)

    def begin(self) -> None:
        """Begin a step."""
        self.step, self.number, self.is_backward = self.step + 1, 0, False
        self.kept, self.glue, self.places = [], [], []

    def moved(self, value: Any, tube: Tube) -> Any:
        """Return a result that float64 computed, moved; that it lies inside its own tube is asked of it first.

        A legal run lies anywhere in the tube. The farthest that one lies from what float64 computed is the radius and the distance to the middle.
        """
        assert np.all(tubes.ratio(np.asarray(value), tube) <= 1.0), "a tube that does not hold the reference"
        self.number += 1
        middle, self.radius = (tube.value, tube.radius) if self.staged else (value, tube.radius + np.abs(tube.value - value))
        return middle + self.move(self.step, self.number, self.radius)

    def stage(self, tube: Tube) -> Tube:
        """Return a value on the way, stored and moved: what follows knows it."""
        stored = store(tube, SETTING.weights)
        return exact(self.moved(stored.value, stored))

    def made(self, operation: str, value: Any, tube: Tube) -> tuple[Any, Made]:
        """Return a result of the forward pass, moved, and what is to be remembered of it."""
        value = self.moved(value, tube)
        return value, Made(operation, self.number, self.radius)

    def keep(self, saved: Any, *taken: Any) -> None:
        """Remember what backward will need."""
        self.kept.append((saved, taken))

    def taken(self, saved: Any) -> tuple[Any, ...]:
        """Return what the forward operation kept that saved this."""
        return next(taken for kept, taken in self.kept if kept is saved)

    # The stream.

    def _glued(self, operation: str, value: np.ndarray, tube: Tube) -> np.ndarray:
        value, made = self.made(operation, value, tube)
        self.glue.append(made)
        return value

    def scaled(self, x: np.ndarray, factor: np.ndarray, format: Format) -> np.ndarray:
        """Return x * factor. On the way back its x is the gradient by what the forward pass made at this place."""
        if self.is_backward:
            self.places.append(Place(self.glue.pop(), x))
        tube = multiply(exact(x), exact(whole(factor, x.shape)), FLOAT32)
        return self.moved(x * factor, tube) if self.is_backward else self._glued("scaled", x * factor, tube)

    def residual(self, x: np.ndarray, out: np.ndarray, factor: np.ndarray, format: Format) -> np.ndarray:
        """Return x + out * factor."""
        return self._glued("residual", x + out * factor, add(exact(x), multiply(exact(out), exact(whole(factor, x.shape)), FLOAT32), FLOAT32))

    def added(self, x: np.ndarray, y: np.ndarray, format: Format) -> np.ndarray:
        """Return x + y."""
        return self.moved(x + y, add(exact(x), exact(y), FLOAT32))

    # The model around the Switch layers.

    def embed_backward(self, dx_BLD: np.ndarray, tokens_BL: np.ndarray, V: int) -> np.ndarray:
        """Return dembedding_VD."""
        return self.moved(reference.embed_backward(dx_BLD, tokens_BL, V), embedding_tube(dx_BLD, tokens_BL, V))

    def position_bias_backward(self, dbias_HLM: np.ndarray, bucket_LM: np.ndarray, U: int) -> np.ndarray:
        """Return dtable_UH."""
        return self.moved(reference.position_bias_backward(dbias_HLM, bucket_LM, U), position_tube(dbias_HLM, bucket_LM, U))

    def norm_forward(self, x_BLD: np.ndarray, scale_D: np.ndarray, epsilon: float, points: Any) -> tuple[np.ndarray, Any]:
        """Return the normed token."""
        out_BLD, saved = reference.norm_forward(x_BLD, scale_D, epsilon, points)
        tube = norm_tubes(x_BLD, scale_D, epsilon, np.zeros_like(x_BLD), POINTS, FLOAT32)
        out_BLD, made = self.made("norm", out_BLD, tube.out_BLD)
        self.keep(saved, x_BLD, scale_D, epsilon, made)
        return out_BLD, saved

    def norm_backward(self, dout_BLD: np.ndarray, saved: Any, scale_D: np.ndarray, points: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return dx_BLD and dscale_D."""
        *taken, made = self.taken(saved)
        self.places.append(Place(made, dout_BLD))
        tube = norm_tubes(*taken, dout_BLD, POINTS, FLOAT32)
        dx_BLD, dscale_D = reference.norm_backward(dout_BLD, saved, scale_D, points)
        return self.moved(dx_BLD, tube.dx_BLD), self.moved(dscale_D, tube.dscale_D)

    def attention_forward(
        self, x_BLD: np.ndarray, memory_BMD: np.ndarray, bias_HLM: np.ndarray, params: AttentionParams, allowed_BLM: np.ndarray,
        factor_BHLM: np.ndarray, points: Any,
    ) -> tuple[np.ndarray, Any]:  # fmt: skip
        """Return the memory's values, mixed."""
        (B, L, _), M, H = x_BLD.shape, memory_BMD.shape[1], params.w_query_DHK.shape[1]
        if self.staged:
            out_BLD, saved = self.staged_attention(x_BLD, memory_BMD, bias_HLM, params, allowed_BLM, factor_BHLM)
            self.keep(saved, x_BLD, memory_BMD, whole(bias_HLM, (H, L, M)), tuple(params), allowed_BLM, whole(factor_BHLM, (B, H, L, M)), None)
            return out_BLD, saved
        taken = x_BLD, memory_BMD, whole(bias_HLM, (H, L, M)), tuple(params), allowed_BLM, whole(factor_BHLM, (B, H, L, M))
        out_BLD, saved = reference.attention_forward(x_BLD, memory_BMD, bias_HLM, params, allowed_BLM, factor_BHLM, points)
        tube = attention_tubes(*taken, np.zeros_like(x_BLD), POINTS, FLOAT32)
        out_BLD, made = self.made("attention", out_BLD, tube.out_BLD)
        self.keep(saved, *taken, made)
        return out_BLD, saved

    def staged_attention(
        self, x_BLD: np.ndarray, memory_BMD: np.ndarray, bias_HLM: np.ndarray, params: AttentionParams, allowed_BLM: np.ndarray,
        factor_BHLM: np.ndarray,
    ) -> tuple[np.ndarray, AttentionSaved]:  # fmt: skip
        """Return the memory's values, mixed, each stage moved inside the radius that the stage before it leaves."""
        H, K, D = params.w_out_HKD.shape
        x, memory, (w_query, w_key, w_value, w_out) = exact(x_BLD), exact(memory_BMD), (exact(w) for w in params)
        query = self.stage(contract("bld,dhk->blhk", x, w_query, FLOAT32, D))
        key, value = (self.stage(contract("bmd,dhk->bmhk", memory, w, FLOAT32, D)) for w in (w_key, w_value))
        plus = [exact(bias_HLM)] if bias_HLM.size > 1 else []
        scores = self.stage(contract("blhk,bmhk->bhlm", query, key, FLOAT32, K, plus))
        probs = self.stage(masked_probs(scores, allowed_BLM, FLOAT32))
        factor = exact(whole(factor_BHLM, probs.value.shape))
        mixed = self.stage(contract("bhlm,bmhk->blhk", multiply(probs, factor, FLOAT32), value, FLOAT32, memory_BMD.shape[1]))
        out_BLD = self.stage(contract("blhk,hkd->bld", mixed, w_out, FLOAT32, H * K)).value
        return out_BLD, AttentionSaved(x_BLD, memory_BMD, query.value, key.value, value.value, probs.value, factor.value, mixed.value)

    def attention_backward(self, dout_BLD: np.ndarray, saved: Any, params: AttentionParams, points: Any) -> tuple[Any, ...]:
        """Return dx_BLD, dmemory_BMD, dbias_HLM and the parameters' gradients."""
        *taken, made = self.taken(saved)
        self.places.append(Place(made, dout_BLD))
        tube = attention_tubes(*taken, dout_BLD, POINTS, FLOAT32)
        *dinputs, dparams = reference.attention_backward(dout_BLD, saved, params, points)
        dx_BLD, dmemory_BMD, dbias_HLM = (self.moved(value, each) for value, each in zip(dinputs, tube[1:4], strict=True))
        return dx_BLD, dmemory_BMD, dbias_HLM, AttentionParams(*[self.moved(*pair) for pair in zip(dparams, tube[4:], strict=True)])

    def feed_forward_forward(
        self, x_BLD: np.ndarray, params: FeedForwardParams, factor_BLF: np.ndarray, activation: str, points: Any
    ) -> tuple[np.ndarray, Any]:
        """Return the dense layer's output."""
        factor_BLF = whole(factor_BLF, (*x_BLD.shape[:2], params.w_in_DF.shape[1]))
        taken = x_BLD, (params.w_in_DF, params.w_gate_DF, params.w_out_FD), factor_BLF, activation
        out_BLD, saved = reference.feed_forward_forward(x_BLD, params, factor_BLF, activation, points)
        tube = feed_forward_tubes(*taken, np.zeros_like(x_BLD), POINTS, FLOAT32)
        out_BLD, made = self.made("feed_forward", out_BLD, tube.out_BLD)
        self.keep(saved, *taken, made)
        return out_BLD, saved

    def feed_forward_backward(
        self, dout_BLD: np.ndarray, saved: Any, params: FeedForwardParams, activation: str, points: Any
    ) -> tuple[np.ndarray, FeedForwardParams]:
        """Return dx_BLD and the parameters' gradients."""
        *taken, made = self.taken(saved)
        self.places.append(Place(made, dout_BLD))
        tube = feed_forward_tubes(*taken, dout_BLD, POINTS, FLOAT32)._asdict()
        dx_BLD, dparams = reference.feed_forward_backward(dout_BLD, saved, params, activation, points)
        moved = {name: self.moved(value, tube[f"d{name}"]) for name, value in dparams._asdict().items() if value is not None}
        return self.moved(dx_BLD, tube["dx_BLD"]), dparams._replace(**moved)

    def tied_logits_forward(self, x_BLD: np.ndarray, embedding_VD: np.ndarray, points: Any) -> np.ndarray:
        """Return logits_BLV."""
        logits_BLV = reference.tied_logits_forward(x_BLD, embedding_VD, points)
        tube = tied_logits_tubes(x_BLD, embedding_VD, np.zeros_like(logits_BLV), POINTS, FLOAT32).logits_BLV
        logits_BLV, self.logits_made = self.made("logits", logits_BLV, tube)
        return logits_BLV

    def tied_logits_backward(self, dlogits_BLV: np.ndarray, x_BLD: np.ndarray, embedding_VD: np.ndarray, points: Any) -> tuple[np.ndarray, ...]:
        """Return dx_BLD and dembedding_VD."""
        self.places.append(Place(self.logits_made, dlogits_BLV))
        tube = tied_logits_tubes(x_BLD, embedding_VD, dlogits_BLV, POINTS, FLOAT32)[1:]
        return tuple(self.moved(*pair) for pair in zip(reference.tied_logits_backward(dlogits_BLV, x_BLD, embedding_VD, points), tube, strict=True))

    def cross_entropy_forward(self, logits_BLV: np.ndarray, *rest: Any) -> tuple[float, Any]:
        """Return the loss in nats."""
        value, saved = reference.cross_entropy_forward(logits_BLV, *rest)
        if self.staged:
            value = self.staged_cross_entropy(exact(logits_BLV), *rest)
        tube = cross_entropy_tubes(logits_BLV, *rest, FLOAT32)
        value, made = (value, None) if self.staged else self.made("cross_entropy", value, tube.value)
        self.keep(saved, tube.dlogits_BLV, made)
        return float(value), saved

    def staged_cross_entropy(
        self, logits: Tube, targets_BL: np.ndarray, weight_BL: np.ndarray, denominator: float, smoothing: float, z_coef: float
    ) -> float:
        """Return the loss, moved at each position and at each partial sum: in a row, the order whose partial sums are the largest."""
        assert smoothing == 0.0, "the loss of a position is lse - logit"
        size_BL = np.max(np.abs(logits.value), axis=-1)
        lse = self.stage(log_sum_exp(logits, FLOAT32))
        chosen = logits.at((*np.indices(targets_BL.shape), targets_BL))
        # lse - logit may be stored as -((logit - maximum) - log(sum)): one rounding more, of the size of the logits
        apart = tubes.widen(add(lse, negative(chosen), FLOAT32), 2.0 * FLOAT32.element_unit * size_BL)
        square = scale(multiply(lse, lse, FLOAT32), z_coef, FLOAT32)
        each = self.stage(scale(multiply(add(apart, square, FLOAT32), exact(weight_BL), FLOAT32), 1.0 / denominator, FLOAT32))
        sum_so_far = exact(np.float64(0.0))
        for position in np.ndindex(weight_BL.shape):
            sum_so_far = self.stage(add(sum_so_far, each.at(position), FLOAT32))
        return float(sum_so_far.value)

    def cross_entropy_backward(self, dvalue: float, saved: Any) -> np.ndarray:
        """Return dlogits_BLV; what follows is the way back."""
        tube, made = self.taken(saved)
        self.is_backward, self.forward_results = True, self.number
        self.places.append(Place(made, np.asarray(dvalue)))
        return self.moved(reference.cross_entropy_backward(dvalue, saved), tube)

    # The Switch layer.

    def switch_forward(self, inputs: SwitchInputs, params: SwitchParams, statics: Any) -> tuple[SwitchOutputs, Any]:
        """Return the layer's outputs."""
        layer, taken = layer_of(inputs, params, statics), inputs
        if self.staged:
            logits, _ = stages.logits_stage(layer, stages.noise_stage(layer)[0])
            nothing = np.zeros_like(logits.value)
            taken = inputs._replace(noise_term_GSE=self.moved(nothing, Tube(nothing, logits.radius)))
        outputs, saved = reference.switch_forward(taken, params, statics)
        known = exact(outputs.logits_GSE) if self.staged else None
        _, results = through(layer, known, outputs.route)
        names = "out_GSD", "aux_loss", "z_loss"
        made = {name: self.made(f"switch {name}", getattr(outputs, name), tube) for name, tube in zip(names, results, strict=True)}
        self.keep(saved, inputs, known, outputs.route, [each for _, each in made.values()])
        return outputs._replace(**{name: value for name, (value, _) in made.items()}), saved

    def switch_backward(
        self, dout_GSD: np.ndarray, daux: float, dz: float, saved: Any, params: SwitchParams, statics: Any
    ) -> tuple[np.ndarray, SwitchParams]:
        """Return dx_GSD and the parameters' gradients."""
        inputs, logits, route, made = self.taken(saved)
        self.places += [Place(*pair) for pair in zip(made, (dout_GSD, np.asarray(daux), np.asarray(dz)), strict=True)]
        layer = layer_of(inputs, params, statics, dout=dout_GSD, daux=daux, dz=dz)
        forward, _ = through(layer, logits, route)
        found = gradient_tubes(layer, forward)
        dx_GSD, dparams = reference.switch_backward(dout_GSD, daux, dz, saved, params, statics)
        dexperts = dparams.experts._replace(
            w_in_EDF=self.moved(dparams.experts.w_in_EDF, found["w_in"]), w_out_EFD=self.moved(dparams.experts.w_out_EFD, found["w_out"])
        )
        dparams = dparams._replace(w_router_DE=self.moved(dparams.w_router_DE, found["w_router"]), experts=dexperts)
        return self.moved(dx_GSD, found["x"]), dparams

    # The update.

    def adafactor_update(self, w: np.ndarray, grad: np.ndarray, state: AdafactorState, *rest: Any) -> tuple[np.ndarray, AdafactorState]:
        """Return the tensor and its state."""
        new_w, new = reference.adafactor_update(w, grad, state, *rest)
        moved = [self.moved(part, second_moment(part)) if part.size else part for part in new[1:]]
        return self.moved(new_w, updated_tube(w, new_w)), AdafactorState(new.step, *moved)
