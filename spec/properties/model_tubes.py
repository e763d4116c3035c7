# May import: standard library, numpy, refswitch.verify, refswitch.numbers, refswitch.config.
"""Tubes of the operations around the layer, forward and backward, with their rounding points: what any evaluation in the declared format may return.

Each function follows the derivation in spec/transformer.md from the operation's own inputs. The radii are those of refswitch/verify/tubes.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import ModelPoints
from refswitch.verify import tubes
from refswitch.verify.model_stages import HIDDEN, inverse_root
from refswitch.verify.tubes import Arithmetic, Tube, add, contract, exact, multiply, scale, store, total


def negative(a: Tube) -> Tube:
    """Return -a."""
    return Tube(-a.value, a.radius)


class NormTubes(NamedTuple):
    """Of the norm and its backward."""

    out_BLD: Tube
    dx_BLD: Tube
    dscale_D: Tube


def norm_tubes(x_BLD: np.ndarray, scale_D: np.ndarray, epsilon: float, dout_BLD: np.ndarray, points: ModelPoints, a: Arithmetic) -> NormTubes:
    """Return y = x r s with r stored among the statistics; dx = n r - (n . x) r^3 x / D with n = dy s."""
    B, L, D = x_BLD.shape
    x, s, dout = exact(x_BLD), exact(scale_D), exact(dout_BLD)
    r = store(inverse_root(x, epsilon, a), points.statistics)
    out = store(multiply(multiply(x, r, a), s, a), points.activations)
    dscale = total(multiply(multiply(dout, x, a), r, a), (0, 1), a, B * L)
    n = multiply(dout, s, a)
    dr = total(multiply(n, x, a), -1, a, D).at((..., None))
    cube = multiply(multiply(r, r, a), r, a)
    through = scale(multiply(multiply(dr, cube, a), x, a), -1.0 / D, a)
    return NormTubes(out, store(add(multiply(n, r, a), through, a), points.gradients), dscale)


def masked_probs(scores_BHLM: Tube, allowed_BLM: np.ndarray, a: Arithmetic) -> Tube:
    """Return the softmax over what is allowed, exactly 0 where it is not; a query that sees nothing has zeros."""
    allowed_B1LM = np.broadcast_to(allowed_BLM[:, None], scores_BHLM.value.shape)
    hidden = exact(np.full(scores_BHLM.value.shape, HIDDEN))
    return tubes.where(allowed_B1LM, tubes.softmax(tubes.where(allowed_B1LM, scores_BHLM, hidden), a), exact(np.zeros(scores_BHLM.value.shape)))


class AttentionTubes(NamedTuple):
    """Of attention and its backward."""

    out_BLD: Tube
    dx_BLD: Tube
    dmemory_BMD: Tube
    dbias_HLM: Tube
    dw_query_DHK: Tube
    dw_key_DHK: Tube
    dw_value_DHK: Tube
    dw_out_HKD: Tube


def attention_tubes(
    x_BLD: np.ndarray,
    memory_BMD: np.ndarray,
    bias_HLM: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    allowed_BLM: np.ndarray,
    factor_BHLM: np.ndarray,
    dout_BLD: np.ndarray,
    points: ModelPoints,
    a: Arithmetic,
) -> AttentionTubes:
    """Return out = (softmax(q k + bias) * factor) v w_out, without a factor K^(-1/2), and its gradients."""
    x, memory, bias, factor, dout = (exact(array) for array in (x_BLD, memory_BMD, bias_HLM, factor_BHLM, dout_BLD))
    w_query, w_key, w_value, w_out = (exact(weight) for weight in weights)
    (B, L, D), M, (H, K, _) = x_BLD.shape, memory_BMD.shape[1], weights[3].shape

    def activation(tube: Tube) -> Tube:
        return store(tube, points.activations)

    def gradient(tube: Tube) -> Tube:
        return store(tube, points.gradients)

    q = activation(contract("bld,dhk->blhk", x, w_query, a, D))
    k = activation(contract("bmd,dhk->bmhk", memory, w_key, a, D))
    v = activation(contract("bmd,dhk->bmhk", memory, w_value, a, D))
    scores = store(contract("blhk,bmhk->bhlm", q, k, a, K, [bias]), points.statistics)
    p = activation(masked_probs(scores, allowed_BLM, a))
    mixed = activation(contract("bhlm,bmhk->blhk", multiply(p, factor, a), v, a, M))
    out = activation(contract("blhk,hkd->bld", mixed, w_out, a, H * K))

    dw_out = contract("blhk,bld->hkd", mixed, dout, a, B * L)
    dmixed = gradient(contract("bld,hkd->blhk", dout, w_out, a, D))
    dv = gradient(contract("bhlm,blhk->bmhk", multiply(p, factor, a), dmixed, a, L))
    dp = multiply(contract("blhk,bmhk->bhlm", dmixed, v, a, K), factor, a)
    mean = total(multiply(p, dp, a), -1, a, M).at((..., None))
    dscores = multiply(p, add(dp, negative(mean), a), a)
    dq = gradient(contract("bhlm,bmhk->blhk", dscores, k, a, M))
    dk = gradient(contract("bhlm,blhk->bmhk", dscores, q, a, L))
    from_key, from_value = (contract("bmhk,dhk->bmd", d, w, a, H * K) for d, w in ((dk, w_key), (dv, w_value)))
    return AttentionTubes(
        out,
        gradient(contract("blhk,dhk->bld", dq, w_query, a, H * K)),
        gradient(add(from_key, from_value, a)),
        total(dscores, 0, a, B),
        contract("bld,blhk->dhk", x, dq, a, B * L),
        contract("bmd,bmhk->dhk", memory, dk, a, B * M),
        contract("bmd,bmhk->dhk", memory, dv, a, B * M),
        dw_out,
    )


class FeedForwardTubes(NamedTuple):
    """Of the dense feed-forward network and its backward; `dw_gate_DF` where gated."""

    out_BLD: Tube
    dx_BLD: Tube
    dw_in_DF: Tube
    dw_gate_DF: Tube | None
    dw_out_FD: Tube


def feed_forward_tubes(
    x_BLD: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray | None, np.ndarray],
    factor_BLF: np.ndarray,
    activation: str,
    dout_BLD: np.ndarray,
    points: ModelPoints,
    a: Arithmetic,
) -> FeedForwardTubes:
    """Return h = act(z) l f and h w_out; dz = dh f l act'(z), dl = dh f act(z)."""
    (B, L, D), F = x_BLD.shape, weights[0].shape[1]
    x, w_in, w_out, factor, dout = (exact(array) for array in (x_BLD, weights[0], weights[2], factor_BLF, dout_BLD))

    def gradient(tube: Tube) -> Tube:
        return store(tube, points.gradients)

    z_in = store(contract("bld,df->blf", x, w_in, a, D), points.activations)
    w_gate = None if weights[1] is None else exact(weights[1])
    z = z_in if w_gate is None else store(contract("bld,df->blf", x, w_gate, a, D), points.activations)
    active = tubes.activate(z, activation, a)
    product = active if w_gate is None else multiply(active, z_in, a)
    hidden = store(multiply(product, factor, a), points.activations)
    out = store(contract("blf,fd->bld", hidden, w_out, a, F), points.activations)

    dw_out = contract("blf,bld->fd", hidden, dout, a, B * L)
    dproduct = multiply(gradient(contract("bld,fd->blf", dout, w_out, a, D)), factor, a)
    linear = dproduct if w_gate is None else multiply(dproduct, z_in, a)
    dz = gradient(multiply(linear, tubes.activation_slope(z, activation, a), a))
    dw_act = contract("bld,blf->df", x, dz, a, B * L)
    if w_gate is None:
        return FeedForwardTubes(out, gradient(contract("blf,df->bld", dz, w_in, a, F)), dw_act, None, dw_out)
    dz_in = gradient(multiply(dproduct, active, a))
    dx = add(contract("blf,df->bld", dz, w_gate, a, F), contract("blf,df->bld", dz_in, w_in, a, F), a)
    return FeedForwardTubes(out, gradient(dx), contract("bld,blf->df", x, dz_in, a, B * L), dw_act, dw_out)


class LogitsTubes(NamedTuple):
    """Of the logits and their backward; the matrix's gradient has the matrix's axes."""

    logits_BLV: Tube
    dx_BLD: Tube
    dw: Tube


def tied_logits_tubes(x_BLD: np.ndarray, table_VD: np.ndarray, dlogits_BLV: np.ndarray, points: ModelPoints, a: Arithmetic) -> LogitsTubes:
    """Return (x D^(-1/2)) table^T."""
    (B, L, D), V = x_BLD.shape, len(table_VD)
    scaled = store(scale(exact(x_BLD), D**-0.5, a), points.activations)
    logits = store(contract("bld,vd->blv", scaled, exact(table_VD), a, D), points.logits)
    dscaled = store(contract("blv,vd->bld", exact(dlogits_BLV), exact(table_VD), a, V), points.gradients)
    dtable = contract("blv,bld->vd", exact(dlogits_BLV), scaled, a, B * L)
    return LogitsTubes(logits, store(scale(dscaled, D**-0.5, a), points.gradients), dtable)


def logits_tubes(x_BLD: np.ndarray, w_logits_DV: np.ndarray, dlogits_BLV: np.ndarray, points: ModelPoints, a: Arithmetic) -> LogitsTubes:
    """Return x w."""
    (B, L, D), V = x_BLD.shape, w_logits_DV.shape[1]
    x, w, dlogits = exact(x_BLD), exact(w_logits_DV), exact(dlogits_BLV)
    logits = store(contract("bld,dv->blv", x, w, a, D), points.logits)
    dx = store(contract("blv,dv->bld", dlogits, w, a, V), points.gradients)
    return LogitsTubes(logits, dx, contract("bld,blv->dv", x, dlogits, a, B * L))


class CrossEntropyTubes(NamedTuple):
    """Of the loss and its gradient."""

    value: Tube
    dlogits_BLV: Tube


def cross_entropy_tubes(
    logits_BLV: np.ndarray, targets_BL: np.ndarray, weight_BL: np.ndarray, denominator: float, smoothing: float, z_coef: float, a: Arithmetic
) -> CrossEntropyTubes:
    """Return sum of weight / denominator * (sum_v q_v (lse - l_v) + z lse^2), and its gradient weight / denominator * ((1 + 2 z lse) p - q)."""
    B, L, V = logits_BLV.shape
    logits = exact(logits_BLV)
    q_BLV = np.where(np.arange(V) == targets_BL[..., None], 1.0 - smoothing, smoothing / (V - 1))
    q = tubes.widen(exact(q_BLV), 2.0 * (a.element_unit + tubes.OWN_UNIT) * q_BLV)
    lse = tubes.log_sum_exp(logits, a).at((..., None))
    # lse - logit may be stored as -((logit - maximum) - log(sum)): one rounding more, of the size of the logits
    apart = tubes.widen(add(lse, negative(logits), a), 2.0 * a.element_unit * np.max(np.abs(logits_BLV), axis=-1, keepdims=True))
    each = total(multiply(q, apart, a), -1, a, V)
    square = scale(multiply(lse, lse, a), z_coef, a).at((..., 0))
    weighted = scale(multiply(add(each, square, a), exact(weight_BL), a), 1.0 / denominator, a)
    more = add(exact(np.float64(1.0)), scale(lse, 2.0 * z_coef, a), a)
    slope = add(multiply(more, tubes.softmax(logits, a), a), negative(q), a)
    dlogits = multiply(scale(exact(weight_BL[..., None]), 1.0 / denominator, a), slope, a)
    return CrossEntropyTubes(total(weighted, (0, 1), a, B * L), dlogits)
