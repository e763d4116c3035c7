# May import: numpy, refswitch.numbers, refswitch.config, refswitch.verify.tubes.
"""The operations around the Switch layer in tubes, forward and backward: what a float32 implementation with these rounding points may return.

Each is the reference's text with every operation replaced by the tube's, so a radius is derived and never chosen. Backward starts from what the
implementation's own forward saved. `conformance.kernel_cases` puts kernels beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refswitch.config import ModelPoints
from refswitch.spec_data import load_profile
from refswitch.verify import tubes
from refswitch.verify.model_stages import HIDDEN, RSQRT_ULP
from refswitch.verify.tubes import Tube, add, contract, exact, multiply, scale, store, total

FLOAT32 = tubes.arithmetic_of(load_profile("float32"))


def negative(a: Tube) -> Tube:
    """Return -a."""
    return Tube(-a.value, a.radius)


def inverse_root(a: Tube) -> Tube:
    """Return 1 / sqrt(a), which falls with a."""
    low = np.maximum(a.value - a.radius, 0.0)
    with np.errstate(divide="ignore"):
        value, high = a.value**-0.5, low**-0.5
    return tubes.widen(Tube(value, high - value), (RSQRT_ULP * 2.0 * FLOAT32.element_unit + 8.0 * tubes.OWN_UNIT) * high)


def product(a: Tube, *others: Tube) -> Tube:
    """Return the product of several."""
    for other in others:
        a = multiply(a, other, FLOAT32)
    return a


def norm_forward(x_BLD: np.ndarray, scale_D: np.ndarray, epsilon: float, points: ModelPoints) -> tuple[Tube, Tube]:
    """Return out_BLD and inverse_BL1."""
    x, D = exact(x_BLD), x_BLD.shape[-1]
    mean = scale(total(multiply(x, x, FLOAT32), -1, FLOAT32, D), 1.0 / D, FLOAT32)
    inverse = store(inverse_root(add(mean, exact(epsilon), FLOAT32)), points.statistics)
    inverse = Tube(inverse.value[..., None], inverse.radius[..., None])
    return store(product(x, inverse, exact(scale_D)), points.activations), inverse


def norm_backward(dout_BLD: np.ndarray, x_BLD: np.ndarray, inverse_BL1: np.ndarray, scale_D: np.ndarray, points: ModelPoints) -> tuple[Tube, Tube]:
    """Return dx_BLD and dscale_D."""
    dout, x, inverse, D = exact(dout_BLD), exact(x_BLD), exact(inverse_BL1), x_BLD.shape[-1]
    dscale = total(product(dout, x, inverse), (0, 1), FLOAT32, x_BLD.shape[0] * x_BLD.shape[1])
    dnormed = multiply(dout, exact(scale_D), FLOAT32)
    dinverse = total(multiply(dnormed, x, FLOAT32), -1, FLOAT32, D)
    cube = scale(exact(inverse_BL1.astype(np.float64)[..., 0] ** 3), -1.0 / D, FLOAT32)
    dmean = multiply(dinverse, cube, FLOAT32)
    dmean = Tube(dmean.value[..., None], dmean.radius[..., None])
    return store(add(multiply(dnormed, inverse, FLOAT32), multiply(dmean, x, FLOAT32), FLOAT32), points.gradients), dscale


def projected(x: Tube, w: np.ndarray, subscripts: str, terms: int) -> Tube:
    """Return a product with a matrix."""
    return contract(subscripts, x, exact(w), FLOAT32, terms)


def attention_inputs(x_BLD: np.ndarray, memory_BMD: np.ndarray, params: Any, points: ModelPoints) -> tuple[Tube, Tube, Tube]:
    """Return query_BLHK, key_BMHK and value_BMHK."""
    D = x_BLD.shape[-1]
    return (
        store(projected(exact(x_BLD), params.w_query_DHK, "bld,dhk->blhk", D), points.activations),
        store(projected(exact(memory_BMD), params.w_key_DHK, "bmd,dhk->bmhk", D), points.activations),
        store(projected(exact(memory_BMD), params.w_value_DHK, "bmd,dhk->bmhk", D), points.activations),
    )


def probabilities(saved: Any, points: ModelPoints) -> Tube:
    """Return probs_BHLM from the implementation's own queries and keys."""
    K = saved.query_BLHK.shape[-1]
    plus = [exact(np.broadcast_to(saved.bias_HLM, saved.bias_HLM.shape))] if saved.bias_HLM.size > 1 else []
    scores = contract("blhk,bmhk->bhlm", exact(saved.query_BLHK), exact(saved.key_BMHK), FLOAT32, K, plus)
    scores = store(scores, points.statistics)
    allowed_B1LM = saved.allowed_BLM[:, None]
    hidden = exact(np.full(scores.value.shape, HIDDEN))
    probs = tubes.softmax(tubes.where(allowed_B1LM, scores, hidden), FLOAT32)
    nothing = exact(np.zeros(scores.value.shape))
    return store(tubes.where(allowed_B1LM & allowed_B1LM.any(axis=-1, keepdims=True), probs, nothing), points.activations)


def attention_mixed(saved: Any, points: ModelPoints) -> Tube:
    """Return mixed_BLHK."""
    probs = multiply(probabilities(saved, points), exact(saved.factor_BHLM), FLOAT32)
    return store(contract("bhlm,bmhk->blhk", probs, exact(saved.value_BMHK), FLOAT32, saved.key_BMHK.shape[1]), points.activations)


def attention_out(saved: Any, params: Any, points: ModelPoints) -> Tube:
    """Return out_BLD from the implementation's own mixed values."""
    H, K, _ = params.w_out_HKD.shape
    return store(projected(exact(saved.mixed_BLHK), params.w_out_HKD, "blhk,hkd->bld", H * K), points.activations)


def attention_backward(dout_BLD: np.ndarray, saved: Any, params: Any, points: ModelPoints) -> dict[str, Tube]:
    """Return every gradient by name."""
    (B, L, H, K), M, D = saved.query_BLHK.shape, saved.key_BMHK.shape[1], dout_BLD.shape[-1]
    dout, probs, factor = exact(dout_BLD), probabilities(saved, points), exact(saved.factor_BHLM)
    query, key, value = exact(saved.query_BLHK), exact(saved.key_BMHK), exact(saved.value_BMHK)
    x, memory = exact(saved.x_BLD), exact(saved.memory_BMD)
    dmixed = store(projected(dout, params.w_out_HKD, "bld,hkd->blhk", D), points.gradients)
    dvalue = store(contract("bhlm,blhk->bmhk", multiply(probs, factor, FLOAT32), dmixed, FLOAT32, L), points.gradients)
    dprobs = multiply(contract("blhk,bmhk->bhlm", dmixed, value, FLOAT32, K), factor, FLOAT32)
    mean = total(multiply(probs, dprobs, FLOAT32), -1, FLOAT32, M)
    mean = Tube(mean.value[..., None], mean.radius[..., None])
    dscores = multiply(probs, add(dprobs, negative(mean), FLOAT32), FLOAT32)
    dquery = store(contract("bhlm,bmhk->blhk", dscores, key, FLOAT32, M), points.gradients)
    dkey = store(contract("bhlm,blhk->bmhk", dscores, query, FLOAT32, L), points.gradients)
    dmemory = add(projected(dkey, params.w_key_DHK, "bmhk,dhk->bmd", H * K), projected(dvalue, params.w_value_DHK, "bmhk,dhk->bmd", H * K), FLOAT32)
    return {
        "dx_BLD": store(projected(dquery, params.w_query_DHK, "blhk,dhk->bld", H * K), points.gradients),
        "dmemory_BMD": store(dmemory, points.gradients),
        "dbias_HLM": total(dscores, 0, FLOAT32, B),
        "dw_query_DHK": contract("bld,blhk->dhk", x, dquery, FLOAT32, B * L),
        "dw_key_DHK": contract("bmd,bmhk->dhk", memory, dkey, FLOAT32, B * M),
        "dw_value_DHK": contract("bmd,bmhk->dhk", memory, dvalue, FLOAT32, B * M),
        "dw_out_HKD": contract("blhk,bld->hkd", exact(saved.mixed_BLHK), dout, FLOAT32, B * L),
    }


def feed_forward_forward(
    x_BLD: np.ndarray, params: Any, factor_BLF: np.ndarray, activation: str, points: ModelPoints
) -> tuple[Tube, Tube, Tube | None, Tube]:
    """Return out_BLD, the pre-activation, the other branch and hidden_BLF."""
    D, F = params.w_in_DF.shape
    z_in = store(projected(exact(x_BLD), params.w_in_DF, "bld,df->blf", D), points.activations)
    z_act, z_linear = z_in, None
    if params.w_gate_DF is not None:
        z_act, z_linear = store(projected(exact(x_BLD), params.w_gate_DF, "bld,df->blf", D), points.activations), z_in
    hidden = tubes.activate(z_act, activation, FLOAT32)
    hidden = hidden if z_linear is None else multiply(hidden, z_linear, FLOAT32)
    hidden = store(multiply(hidden, exact(factor_BLF), FLOAT32), points.activations)
    return store(projected(hidden, params.w_out_FD, "blf,fd->bld", F), points.activations), z_act, z_linear, hidden


def feed_forward_backward(
    dout_BLD: np.ndarray, x_BLD: np.ndarray, params: Any, factor_BLF: np.ndarray, activation: str, points: ModelPoints
) -> dict[str, Tube]:
    """Return every gradient by name."""
    (B, L, D), F = x_BLD.shape, params.w_out_FD.shape[0]
    _, z_act, z_linear, hidden = feed_forward_forward(x_BLD, params, factor_BLF, activation, points)
    dout, x = exact(dout_BLD), exact(x_BLD)
    dhidden = store(projected(dout, params.w_out_FD, "bld,fd->blf", D), points.gradients)
    dproduct = multiply(dhidden, exact(factor_BLF), FLOAT32)
    slope = tubes.activation_slope(z_act, activation, FLOAT32)
    dz_act = store(multiply(dproduct if z_linear is None else multiply(dproduct, z_linear, FLOAT32), slope, FLOAT32), points.gradients)
    w_act_DF = params.w_in_DF if params.w_gate_DF is None else params.w_gate_DF
    dx, dw_act = projected(dz_act, w_act_DF, "blf,df->bld", F), contract("bld,blf->df", x, dz_act, FLOAT32, B * L)
    dw_out = contract("blf,bld->fd", hidden, dout, FLOAT32, B * L)
    if z_linear is None:
        return {"dx_BLD": store(dx, points.gradients), "dw_in_DF": dw_act, "dw_out_FD": dw_out}
    dz_in = store(multiply(dproduct, tubes.activate(z_act, activation, FLOAT32), FLOAT32), points.gradients)
    dx = store(add(dx, projected(dz_in, params.w_in_DF, "blf,df->bld", F), FLOAT32), points.gradients)
    return {"dx_BLD": dx, "dw_in_DF": contract("bld,blf->df", x, dz_in, FLOAT32, B * L), "dw_gate_DF": dw_act, "dw_out_FD": dw_out}


def cross_entropy(
    logits_BLV: np.ndarray, targets_BL: np.ndarray, weight_BL: np.ndarray, denominator: float, smoothing: float, z_coef: float, dvalue: float
) -> tuple[Tube, Tube]:
    """Return the loss and dlogits_BLV."""
    logits, V = exact(logits_BLV), logits_BLV.shape[-1]
    q_BLV = np.where(targets_BL[..., None] == np.arange(V), 1.0 - smoothing, smoothing / (V - 1))
    lse = tubes.log_sum_exp(logits, FLOAT32)
    lse_BL1 = Tube(lse.value[..., None], lse.radius[..., None])
    each = total(multiply(exact(q_BLV), add(lse_BL1, negative(logits), FLOAT32), FLOAT32), -1, FLOAT32, V)
    # as q sums to 1, the sum may also be evaluated as lse - sum(q logit)
    apart = np.sum(q_BLV * np.abs(logits.value), axis=-1) + np.abs(lse.value)
    each = tubes.widen(each, tubes.gamma(V + 1.0, FLOAT32.unit) * apart)
    each = add(each, scale(multiply(lse, lse, FLOAT32), z_coef, FLOAT32), FLOAT32)
    scale_BL = weight_BL.astype(np.float64) / denominator
    value = total(multiply(each, exact(scale_BL), FLOAT32), (0, 1), FLOAT32, weight_BL.size)
    probs = multiply(tubes.softmax(logits, FLOAT32), add(exact(1.0), scale(lse_BL1, 2.0 * z_coef, FLOAT32), FLOAT32), FLOAT32)
    dlogits = multiply(exact(dvalue * scale_BL[..., None]), add(probs, exact(-q_BLV), FLOAT32), FLOAT32)
    return value, dlogits


def embed_backward(dx_BLD: np.ndarray, tokens_BL: np.ndarray, V: int) -> Tube:
    """Return dembedding_VD."""
    is_token_VT = tokens_BL.reshape(-1) == np.arange(V)[:, None]
    return contract("vt,td->vd", exact(is_token_VT), exact(dx_BLD.reshape(-1, dx_BLD.shape[-1])), FLOAT32, is_token_VT.sum(axis=1)[:, None])


def tied_logits(x_BLD: np.ndarray, embedding_VD: np.ndarray, points: ModelPoints) -> Tube:
    """Return logits_BLV."""
    D = x_BLD.shape[-1]
    scaled = store(scale(exact(x_BLD), D**-0.5, FLOAT32), points.activations)
    return store(projected(scaled, embedding_VD, "bld,vd->blv", D), points.logits)


def tied_logits_backward(dlogits_BLV: np.ndarray, x_BLD: np.ndarray, embedding_VD: np.ndarray, points: ModelPoints) -> tuple[Tube, Tube]:
    """Return dx_BLD and dembedding_VD."""
    (B, L, D), V = x_BLD.shape, embedding_VD.shape[0]
    dscaled = store(projected(exact(dlogits_BLV), embedding_VD, "blv,vd->bld", V), points.gradients)
    scaled = store(scale(exact(x_BLD), D**-0.5, FLOAT32), points.activations)
    dembedding = contract("blv,bld->vd", exact(dlogits_BLV), scaled, FLOAT32, B * L)
    return store(scale(dscaled, D**-0.5, FLOAT32), points.gradients), dembedding


def position_bias_backward(dbias_HLM: np.ndarray, bucket_LM: np.ndarray, U: int) -> Tube:
    """Return dtable_UH."""
    is_bucket_ULM = bucket_LM == np.arange(U)[:, None, None]
    return contract("ulm,hlm->uh", exact(is_bucket_ULM), exact(dbias_HLM), FLOAT32, is_bucket_ULM.sum(axis=(1, 2))[:, None])


def adafactor_update(w: np.ndarray, exact_w: np.ndarray) -> Tube:
    """Return the tensor after one update, from what exact arithmetic makes of the same float32 state.

    The update is grad * row * column * rate: two stored factors, whose own error is below one unit, three products and the rate, which carries a
    root of a mean of squares of steps (four roundings each, halved by the root), then one difference.
    """
    update = np.abs(exact_w - w.astype(np.float64))
    radius = tubes.gamma(16.0, FLOAT32.unit) * update + FLOAT32.unit * np.abs(exact_w) + FLOAT32.tiny
    return Tube(exact_w, radius * tubes.RADIUS_SLACK)


def second_moment(exact_v: np.ndarray) -> Tube:
    """Return a running mean of squares: five roundings of terms that are not negative, storing it included."""
    return Tube(exact_v, (tubes.gamma(5.0, FLOAT32.unit) * exact_v + FLOAT32.tiny) * tubes.RADIUS_SLACK)


def adamw_update(
    w: np.ndarray, grad: np.ndarray, state: Any, learning_rate: float, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> tuple[Tube, Tube, Tube]:
    """Return the tensor and both moments after one update; every setting is rounded once."""
    step, g = state.step + 1, exact(grad)
    mean = add(scale(exact(state.mean), beta1, FLOAT32), scale(g, 1.0 - beta1, FLOAT32), FLOAT32)
    square = add(scale(exact(state.mean_square), beta2, FLOAT32), scale(multiply(g, g, FLOAT32), 1.0 - beta2, FLOAT32), FLOAT32)
    low = np.sqrt(np.maximum(square.value - square.radius, 0.0))
    root = tubes.widen(Tube(np.sqrt(square.value), np.sqrt(square.value) - low), FLOAT32.element_unit * np.sqrt(square.value + square.radius))
    below = add(scale(root, (1.0 - beta2**step) ** -0.5, FLOAT32), exact(np.float64(np.float32(epsilon))), FLOAT32)
    inverse = tubes.widen(
        Tube(1.0 / below.value, 1.0 / (below.value - below.radius) - 1.0 / below.value), FLOAT32.element_unit / (below.value - below.radius)
    )
    moved = multiply(scale(mean, learning_rate / (1.0 - beta1**step), FLOAT32), inverse, FLOAT32)
    kept = scale(exact(w), 1.0 - learning_rate * weight_decay, FLOAT32)
    return add(kept, negative(moved), FLOAT32), mean, square
