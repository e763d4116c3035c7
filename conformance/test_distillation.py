# May import: standard library, numpy, pytest, torch, refswitch.
"""Distillation against torch's own forms and by hand; the student's first weights; sparse upcycling.

Bounds count roundings in float64: a sum of n terms of one sign has a relative error of at most n eps, and each further operation adds one eps.
A logarithm of a sum of exponentials is a difference of logits and so has an absolute error; every size below is the sum of its terms' sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from refswitch.config import TRUTH
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig, preset
from refswitch.model_init import initial_params, sparse_from_dense, student_from_teacher
from refswitch.reference import distillation
from refswitch.reference.cross_entropy import cross_entropy_backward, cross_entropy_forward
from refswitch.reference.distillation import distillation_backward, distillation_forward, soft_cross_entropy_forward
from refswitch.reference.switch import Statics, SwitchInputs, SwitchParams, switch_forward
from refswitch.reference.transformer import ModelParams
from refswitch.spec_data import load_dialect
from refswitch.tree import leaves, with_leaves

EPS = np.finfo(np.float64).eps
B, L, V = 3, 5, 11
SETTINGS = [  # soft, temperature, smoothing, z_coef
    (0.25, 1.0, 0.0, 0.0),
    (0.25, 2.0, 0.0, 0.25),
    (1.0, 3.0, 0.0, 0.0),
    (0.75, 0.5, 0.125, 0.0625),
    (0.0, 2.0, 0.125, 0.25),
]


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Return the student's and the teacher's logits, targets, weights with zeros among them, and a denominator."""
    rng = np.random.Generator(np.random.PCG64(42))
    weight_BL = rng.integers(0, 3, (B, L)) / 2.0
    return 3.0 * rng.standard_normal((B, L, V)), 3.0 * rng.standard_normal((B, L, V)), rng.integers(0, V, (B, L)), weight_BL, float(weight_BL.sum())


def run(soft: float, temperature: float, smoothing: float, z_coef: float) -> tuple[float, np.ndarray]:
    """Return our value and gradient; the inputs stay as they were."""
    arrays = data()
    before = [np.copy(part) for part in arrays]
    value, saved = distillation_forward(*arrays, smoothing, z_coef, soft, temperature)
    assert all(np.array_equal(was, part) for was, part in zip(before, arrays, strict=True))
    return value, distillation_backward(1.0, saved)


def torchs(soft: float, temperature: float, smoothing: float, z_coef: float) -> tuple[float, np.ndarray]:
    """Return the value and the gradient by torch's autograd: cross_entropy with label probabilities, and kl_div plus the teacher's entropy."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    logits_BLV, teacher_BLV, targets_BL, weight_BL, denominator = data()
    student, teacher = torch.tensor(logits_BLV, requires_grad=True), torch.tensor(teacher_BLV, requires_grad=True)
    weight = torch.tensor(weight_BL).reshape(-1)
    off = smoothing / (V - 1)
    labels = functional.one_hot(torch.tensor(targets_BL), V).double() * (1.0 - smoothing - off) + off
    hard = functional.cross_entropy(student.reshape(-1, V), labels.reshape(-1, V), reduction="none")
    hard = hard + z_coef * torch.logsumexp(student, -1).reshape(-1) ** 2
    log_teacher = functional.log_softmax(teacher.detach() / temperature, -1).reshape(-1, V)
    scaled = student.reshape(-1, V) / temperature
    divergence = functional.kl_div(functional.log_softmax(scaled, -1), log_teacher, reduction="none", log_target=True).sum(-1)
    entropy = -(log_teacher.exp() * log_teacher).sum(-1)
    soft_loss = divergence + entropy + z_coef * torch.logsumexp(scaled, -1) ** 2
    value = ((1.0 - soft) * (hard * weight).sum() + temperature**2 * soft * (soft_loss * weight).sum()) / denominator
    value.backward()
    assert teacher.grad is None
    return float(value.detach()), student.grad.numpy()


def sizes(soft: float, temperature: float, smoothing: float, z_coef: float) -> tuple[float, np.ndarray]:
    """Return the sizes of the value's and of the gradient's terms, each with the factor by which its own inputs' errors grow."""
    logits_BLV, teacher_BLV, _, weight_BL, denominator = data()
    value, dlogits_BLV = 0.0, np.zeros_like(logits_BLV)
    parts = ((1.0 - soft, 1.0, None), (temperature**2 * soft, temperature, teacher_BLV))
    for factor, T, source_BLV in parts:
        largest = np.abs(logits_BLV / T).max(axis=-1, keepdims=True) + math.log(V)  # of lse and of each logit
        amplified = 1.0 + 2.0 * largest  # an exponential of a difference of two such numbers
        if source_BLV is not None:
            amplified = amplified + 2.0 * np.abs(source_BLV / T).max(axis=-1, keepdims=True)
        scale = factor * weight_BL[..., None] / denominator
        entropy = 2.0 * amplified if source_BLV is not None else 0.0  # kl_div subtracts the entropy and it is added again: at most its logits
        value += float(np.sum(scale * (2.0 * largest * amplified + entropy * amplified + 2.0 * z_coef * largest**2)))
        p_BLV = np.exp(logits_BLV / T - np.logaddexp.reduce(logits_BLV / T, axis=-1, keepdims=True))
        if source_BLV is None:
            q_BLV = np.ones_like(p_BLV)
        else:
            q_BLV = np.exp(source_BLV / T - np.logaddexp.reduce(source_BLV / T, axis=-1, keepdims=True))
        dlogits_BLV = dlogits_BLV + scale / T * amplified * ((1.0 + 2.0 * z_coef * largest) * p_BLV + q_BLV)
    return value, dlogits_BLV


ROUNDINGS = 2 * (2 * V + B * L + 16)  # both sides: two sums over V and one over tokens, fewer than 16 operations besides


def misses(found: tuple[float, np.ndarray], settings: tuple[float, float, float, float]) -> set[str]:
    """Return what is outside its radius of torch's."""
    value, dlogits_BLV = torchs(*settings)
    value_size, dlogits_size_BLV = sizes(*settings)
    missed = set()
    if abs(found[0] - value) > ROUNDINGS * EPS * value_size:
        missed.add("value")
    if np.any(np.abs(found[1] - dlogits_BLV) > ROUNDINGS * EPS * dlogits_size_BLV):
        missed.add("gradient")
    return missed


@pytest.mark.parametrize("settings", SETTINGS)
def test_distillation__matches_torch(settings) -> None:
    """Value and gradient, at every mixture, temperature, smoothing and z-loss."""
    value, dlogits_BLV = run(*settings)
    assert (type(value), dlogits_BLV.dtype, dlogits_BLV.shape) == (float, np.float64, (B, L, V))
    assert misses((value, dlogits_BLV), settings) == set()


def test_distillation__comparison_notices() -> None:
    """Planted: every wrong reading leaves the radius, in the value or in the gradient."""
    soft, temperature, smoothing, z_coef = settings = (0.25, 2.0, 0.125, 0.25)
    logits_BLV, teacher_BLV, targets_BL, weight_BL, denominator = data()

    def ours(*changed: float, student: np.ndarray = logits_BLV, teacher: np.ndarray = teacher_BLV, total: float = denominator) -> set[str]:
        value, saved = distillation_forward(student, teacher, targets_BL, weight_BL, total, *changed)
        return misses((value, distillation_backward(1.0, saved)), settings)

    def mixed(hard_z: float, soft_z: float, factor: float, hard_smoothing: float = smoothing) -> set[str]:
        value, hard_saved = cross_entropy_forward(logits_BLV, targets_BL, weight_BL, denominator, hard_smoothing, hard_z)
        soft_value, soft_saved = soft_cross_entropy_forward(logits_BLV, teacher_BLV, weight_BL, denominator, temperature, soft_z)
        saved = distillation.DistillationSaved(hard_saved, soft_saved, 1.0 - soft, factor)
        return misses(((1.0 - soft) * value + factor * soft_value, distillation_backward(1.0, saved)), settings)

    factor = temperature**2 * soft
    both = {"value", "gradient"}
    assert ours(smoothing, z_coef, soft, temperature) == set()
    assert mixed(z_coef, z_coef, factor) == set()
    assert ours(smoothing, z_coef, 1.0 - soft, temperature) == both  # the fractions swapped
    assert ours(smoothing, z_coef, soft, 1.0 / temperature) == both
    assert ours(smoothing, z_coef, soft, temperature, teacher=teacher_BLV * temperature) == both  # the teacher without a temperature
    assert ours(smoothing, z_coef, soft, temperature, student=teacher_BLV, teacher=logits_BLV) == both  # the divergence the other way round
    assert ours(smoothing, z_coef, soft, temperature, total=float(B * L)) == both
    assert mixed(z_coef, z_coef, soft) == both  # no T**2
    assert mixed(z_coef, z_coef, soft * temperature) == both
    assert mixed(z_coef, 0.0, factor) == both
    assert mixed(0.0, z_coef, factor) == both
    assert mixed(z_coef, z_coef, factor, hard_smoothing=0.0) == both


def test_distillation__without_soft_is_cross_entropy() -> None:
    """At soft = 0 value and gradient are the cross-entropy's to the bit, at any temperature."""
    logits_BLV, _, targets_BL, weight_BL, denominator = data()
    value, saved = cross_entropy_forward(logits_BLV, targets_BL, weight_BL, denominator, 0.125, 0.25)
    found, dlogits_BLV = run(0.0, 3.0, 0.125, 0.25)
    assert found == value
    assert np.array_equal(dlogits_BLV, cross_entropy_backward(1.0, saved))


def test_distillation__student_equal_to_its_teacher_rests() -> None:
    """Where the student has the teacher's logits, the soft part pulls nowhere, and its value is the teacher's entropy."""
    logits_BLV, _, targets_BL, weight_BL, denominator = data()
    _, saved = distillation_forward(logits_BLV, logits_BLV, targets_BL, weight_BL, denominator, 0.0, 0.0, 1.0, 2.0)
    assert np.array_equal(distillation_backward(1.0, saved), np.zeros((B, L, V)))


def test_distillation__golden_by_hand() -> None:
    """Two tokens, two words, T = 2, soft = 1/4.

    Token 1: student (0, 2 ln 3), at T = 2 (1/4, 3/4) and at T = 1 (1/10, 9/10); teacher (1/2, 1/2); target 1. Soft loss ln(16/3) / 2, hard ln(10/9).
    Token 2: student (0, 0), so (1/2, 1/2); teacher (2 ln 3, 0), at T = 2 (3/4, 1/4); target 0. Both losses ln 2.
    T**2 soft = 1 and each token has weight 1/2: the gradients are 3/4 * 1/2 * (p - onehot) + 1/2 * 1/2 * (p_T - q).
    """
    logits_BLV = np.array([[[0.0, 2.0 * math.log(3.0)], [0.0, 0.0]]])
    teacher_BLV = np.array([[[0.0, 0.0], [2.0 * math.log(3.0), 0.0]]])
    value, saved = distillation_forward(logits_BLV, teacher_BLV, np.array([[1, 0]]), np.ones((1, 2)), 2.0, 0.0, 0.0, 0.25, 2.0)
    expected = 3 / 8 * (math.log(10 / 9) + math.log(2)) + 1 / 2 * (math.log(16 / 3) / 2 + math.log(2))
    expected_BLV = np.array([[[3 / 80 - 1 / 16, 1 / 16 - 3 / 80], [-3 / 16 - 1 / 16, 3 / 16 + 1 / 16]]])
    roundings = 64 * EPS  # fewer operations than these on either side, logits of 2.2 counted twice in their exponentials, all sizes below 1
    assert abs(value - expected) <= roundings
    assert np.all(np.abs(distillation_backward(1.0, saved) - expected_BLV) <= roundings)
    assert np.array_equal(distillation_backward(2.0, saved), 2.0 * distillation_backward(1.0, saved))


@pytest.mark.parametrize("wrong", [{"soft": -0.1}, {"soft": 1.1}, {"soft": math.nan}, {"temperature": 0.0}, {"temperature": math.nan}])
def test_distillation__rejects(wrong) -> None:
    """No fraction, no temperature."""
    with pytest.raises(ValueError, match="should be in"):
        distillation_forward(*data(), 0.0, 0.0, **({"soft": 0.25, "temperature": 1.0} | wrong))
    logits_BLV, teacher_BLV, *rest = data()
    with pytest.raises(ValueError, match="teacher_BLV has shape"):
        distillation_forward(logits_BLV, teacher_BLV[..., :-1], *rest, 0.0, 0.0, 0.25, 1.0)


# The student's first weights, and sparse upcycling


SPARSE = replace(preset("tiny_switch"), name="sparse", vocabulary=13, d_model=6, d_kv=5, heads=2, d_ff=7, experts=3)
DENSE = replace(SPARSE, name="dense", encoder_sparse=(), decoder_sparse=(), experts=0)


def with_form(config: ModelConfig, gated: bool, tied: bool) -> ModelConfig:
    return replace(config, gated=gated, tied=tied, activation="gelu_tanh" if gated else "relu")


def nowhere_constant(params: ModelParams) -> ModelParams:
    """Return the parameters with gains and biases too away from 1 and 0, so that a copy shows."""
    return with_leaves(params, {path: leaf + (i + 1) / 64 for i, (path, leaf) in enumerate(leaves(params).items())})


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_student_from_teacher__copies_what_is_no_expert(gated: bool, tied: bool) -> None:
    """Embedding, attention, all norms, position tables, dense layers and logits are the teacher's; the layers at its sparse positions are drawn."""
    teacher = nowhere_constant(initial_params(with_form(SPARSE, gated, tied), 1, "mesh_0.1"))
    fresh = initial_params(with_form(DENSE, gated, tied), 2, "mesh_0.1")
    student = leaves(student_from_teacher(teacher, fresh))
    assert list(student) == list(leaves(fresh))
    drawn = {path for path, leaf in student.items() if np.array_equal(leaf, leaves(fresh)[path])}
    copied = {path for path, leaf in student.items() if path in leaves(teacher) and np.array_equal(leaf, leaves(teacher)[path])}
    matrices = ("w_in_DF", "w_gate_DF", "w_out_FD") if gated else ("w_in_DF", "w_out_FD")
    assert drawn == {f"{stack}.blocks.1.feed_forward.feed_forward.{name}" for stack in ("encoder", "decoder") for name in matrices}
    assert copied == set(student) - drawn
    assert "encoder.blocks.1.feed_forward.norm_D" in copied


def test_student_from_teacher__sparse_student() -> None:
    """A student may have experts of its own number where the teacher is sparse: they are drawn."""
    teacher, fresh = initial_params(SPARSE, 1, "mesh"), initial_params(replace(SPARSE, experts=2), 2, "mesh")
    student = leaves(student_from_teacher(teacher, fresh))
    for path, leaf in student.items():
        source = fresh if ".blocks.1.feed_forward.feed_forward." in path else teacher
        assert np.array_equal(leaf, leaves(source)[path]), path


@pytest.mark.parametrize("gated", [False, True])
def test_sparse_from_dense__every_expert_is_the_dense_layer(gated: bool) -> None:
    """Experts are copies, routers drawn, biases zero, the rest the dense model's."""
    dense = nowhere_constant(initial_params(with_form(DENSE, gated, False), 1, "mesh"))
    fresh = nowhere_constant(initial_params(with_form(SPARSE, gated, False), 2, "mesh"))
    sparse = leaves(sparse_from_dense(dense, fresh))
    assert list(sparse) == list(leaves(fresh))
    source = leaves(dense)
    for path, leaf in sparse.items():
        layer, _, name = path.rpartition(".")
        if name in ("w_router_DE", "b_router_E"):
            assert np.array_equal(leaf, leaves(fresh)[path]), path
        elif name.startswith("b_"):
            assert not leaf.any(), path
        elif layer.endswith(".experts"):
            one = source[f"{layer.removesuffix('experts')}{name.replace('E', '')}"]
            assert leaf.shape == (3, *one.shape), path
            assert all(np.array_equal(expert, one) for expert in leaf), path
        else:
            assert np.array_equal(leaf, source[path]), path


def whole(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return small integers: their sums and products are exact, in any order."""
    return np.random.Generator(np.random.PCG64(seed)).integers(-4, 5, shape).astype(np.float64)


@pytest.mark.parametrize("E", [1, 3])
def test_sparse_from_dense__output_is_gate_times_dense(E: int) -> None:
    """Whatever is chosen, a token's output is p times the dense layer's, and with one expert, whose p is 1, exactly the dense layer's.

    The weights are small integers, so the dense output is exact and the product with the gate is rounded once.
    """
    dense, fresh = initial_params(DENSE, 1, "mesh"), initial_params(replace(SPARSE, experts=E), 2, "mesh")
    path = "encoder.blocks.1.feed_forward.feed_forward."
    dense = with_leaves(dense, {key: whole(leaf.shape, i) if key.startswith(path) else leaf for i, (key, leaf) in enumerate(leaves(dense).items())})
    upcycled = sparse_from_dense(dense, fresh)
    layer = upcycled.encoder.blocks[1].feed_forward.feed_forward
    assert isinstance(layer, SwitchParams)
    S, D, F = 19, DENSE.d_model, DENSE.d_ff
    x_GSD = whole((1, S, D), 5)
    no_term_GSE = np.zeros((1, S, E))
    inputs = SwitchInputs(
        x_GSD, np.ones((1, S), bool), np.ones((1, S, D)), no_term_GSE, no_term_GSE, np.arange(S)[None], np.ones((1, S, F))
    )  # fmt: skip
    outputs, _ = switch_forward(inputs, layer, Statics(load_dialect("paper_eqs"), TRUTH, "relu", S))
    given = leaves(dense)
    dense_GSD = np.maximum(x_GSD @ given[f"{path}w_in_DF"], 0.0) @ given[f"{path}w_out_FD"]
    assert np.abs(dense_GSD).max() > 0.0
    assert outputs.route.kept_GS.all()
    assert len(set(outputs.route.expert_GS.reshape(-1))) == E
    assert np.array_equal(outputs.gate_GS, outputs.probs_GSE.max(axis=-1))
    assert np.array_equal(outputs.out_GSD, outputs.gate_GS[..., None] * dense_GSD)
    assert (E == 1) == np.array_equal(outputs.out_GSD, dense_GSD)


def params_of(config: ModelConfig) -> ModelParams:
    return initial_params(config, 1, "mesh")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: student_from_teacher(params_of(SPARSE), params_of(replace(DENSE, d_model=8))),
            "student_from_teacher: embedding_VD has shape (13, 6), but should be (13, 8), the new model's",
        ),
        (
            lambda: student_from_teacher(params_of(SPARSE), params_of(replace(DENSE, d_ff=8))),
            "encoder.blocks.0.feed_forward.feed_forward.w_in_DF has shape (6, 7), but should be (6, 8)",
        ),
        (
            lambda: student_from_teacher(params_of(SPARSE), params_of(replace(DENSE, encoder_layers=1))),
            "the new model has no encoder.blocks.1.self_attention.norm_D",
        ),
        (
            lambda: student_from_teacher(params_of(SPARSE), params_of(replace(DENSE, decoder_layers=3))),
            "nothing is given for decoder.blocks.2.self_attention.norm_D",
        ),
        (lambda: student_from_teacher(params_of(SPARSE), params_of(replace(DENSE, tied=False))), "nothing is given for w_logits_DV"),
        (lambda: student_from_teacher(params_of(replace(SPARSE, tied=False)), params_of(DENSE)), "the new model has no w_logits_DV"),
        (
            lambda: sparse_from_dense(params_of(SPARSE), params_of(SPARSE)),
            "sparse_from_dense: encoder.blocks.1.feed_forward.feed_forward of the dense model is sparse",
        ),
        (
            lambda: sparse_from_dense(params_of(replace(DENSE, d_ff=8)), params_of(SPARSE)),
            "encoder.blocks.0.feed_forward.feed_forward.w_in_DF has shape (6, 8), but should be (6, 7)",
        ),
        (
            lambda: sparse_from_dense(params_of(with_form(DENSE, True, True)), params_of(SPARSE)),
            "the new model has no encoder.blocks.0.feed_forward.feed_forward.w_gate_DF",
        ),
        (
            lambda: sparse_from_dense(params_of(DENSE), params_of(with_form(SPARSE, True, True))),
            "nothing is given for encoder.blocks.0.feed_forward.feed_forward.w_gate_DF",
        ),
    ],
)
def test_first_weights__rejects(call: Callable[[], ModelParams], says: str) -> None:
    """Models that do not fit, by the path."""
    with pytest.raises(InputError) as error:
        call()
    assert says in str(error.value)
