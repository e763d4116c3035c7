# May import: standard library, numpy, pytest, refswitch.
"""The engine on the reference's functions is the reference: equal bits in forward, every gradient and every update, and a difference is noticed.

The two share operations and records, no composition. Dropout and router noise are drawn by the engine, by address; the reference gets them as arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refswitch.backends import reference
from refswitch.checkpoints.template import template_of
from refswitch.engine import model as engine_model
from refswitch.engine import step as engine_step
from refswitch.engine.decoding import Picking, generate
from refswitch.engine.model import model_backward, model_forward
from refswitch.engine.noise import Address, StackNoise, draw_noise
from refswitch.engine.optimizer import Optimizer, expert_axis, moves
from refswitch.engine.step import NonFiniteError, Setup, initial_state, loss_and_gradients, rows_of, state_arrays, state_from, train_step
from refswitch.errors import InputError
from refswitch.model_config import PRESETS, ModelConfig
from refswitch.model_setup import dialect_of, model_statics, no_noise
from refswitch.numbers.philox import Purpose, jitter, keep_factor, permutation, site_of, uniform
from refswitch.precision import PRECISIONS, rounded, stored_gradients, stored_weights, weights_as_read
from refswitch.reference import transformer as spec
from refswitch.reference.adafactor import AdafactorState, adafactor_init, adafactor_update
from refswitch.reference.adamw import AdamWState, adamw_init, adamw_update, clip_by_global_norm
from refswitch.reference.decoding import decode
from refswitch.reference.transformer import Batch, ModelParams, ModelStatics
from refswitch.tree import leaves, with_leaves

B, M, L, SEED, STEP = 4, 10, 6, 11, 3
TINY = replace(PRESETS["tiny_switch"], vocabulary=19, d_model=6, d_kv=3, d_ff=7, experts=3)
NOISY = replace(TINY, dropout=0.25, expert_dropout=0.4)
CONFIGS = {
    "plain": replace(TINY, dialect="mesh_tensorflow"),
    "dropout and jitter": replace(NOISY, dialect="mesh_tensorflow"),
    "every layer sparse": replace(NOISY, dialect="mesh_tensorflow", encoder_sparse=(0, 1), decoder_sparse=(0, 1)),
    "gated, untied, released models": replace(NOISY, dialect="flax_masked_switch_base", experts=4, activation="gelu_tanh", gated=True, tied=False),
    "losses pooled over layers": replace(NOISY, dialect="hf_4_57", encoder_sparse=(0, 1), decoder_sparse=(0, 1)),
    "no token left behind": replace(NOISY, dialect="mesh_ntlb"),
    "router noise on the logits": replace(NOISY, dialect="hf_le_4_51"),
    "averaged losses": replace(NOISY, dialect="keras_io"),
    "other losses": replace(NOISY, dialect="fairseq_moe"),
    "biases, random order of service": replace(NOISY, dialect="labml_switch"),
    "dense": replace(PRESETS["tiny_dense"], vocabulary=19, d_model=6, d_kv=3, d_ff=7, dropout=0.25, dialect="mesh_tensorflow"),
}


def start(config: ModelConfig) -> tuple[ModelParams, Batch]:
    """Draw weights and a batch of packed and padded rows."""
    rng = np.random.default_rng(len(config.dialect))
    shapes = {path: leaf.shape for path, leaf in leaves(template_of(config)).items()}
    params = with_leaves(template_of(config), {path: rng.normal(size=shape) * 0.4 + ("norm" in path) for path, shape in shapes.items()})
    encoder_BM, targets_BL = rng.integers(1, config.vocabulary, (B, M)), rng.integers(1, config.vocabulary, (B, L))
    encoder_segment_BM = np.array([[1] * 4 + [2] * 4 + [0] * 2, [1] * 10, [1] * 9 + [2], [1] * 2 + [2] * 3 + [3] * 4 + [0]])
    decoder_segment_BL = np.array([[1, 1, 2, 2, 2, 0], [1] * 6, [1] * 5 + [2], [1, 1, 2, 2, 3, 0]])
    encoder = encoder_BM, encoder_segment_BM, encoder_segment_BM != 0, np.arange(M)
    decoder = np.roll(targets_BL, 1, axis=1), decoder_segment_BL, decoder_segment_BL != 0, np.arange(L)
    return params, Batch(*encoder, *decoder, targets_BL, (decoder_segment_BL != 0) * 1.0)


def setup_of(name: str, setting: str = "float64", **changes: Any) -> Setup:
    return Setup(CONFIGS[name], PRECISIONS[setting], Optimizer("adafactor"), SEED, label_smoothing=0.1, logits_z_coef=0.05)._replace(**changes)


def statics_of(setup: Setup, rows: int = B) -> ModelStatics:
    statics = model_statics(setup.config, rows, M, L, train=True, setting=setup.setting)
    return statics._replace(label_smoothing=setup.label_smoothing, logits_z_coef=setup.logits_z_coef)


def spread(noise: tuple[StackNoise, ...], quiet: tuple[spec.StackNoise, ...]) -> Any:
    """Return drawn noise as the reference takes it: what is one element as a whole array, in float64."""
    filled = []
    for drawn, whole in zip(noise, quiet, strict=True):
        tree = spec.StackNoise(drawn.embedded_BLD, tuple(drawn.blocks), drawn.out_BLD)
        own, shapes = leaves(tree), leaves(whole)
        filled.append(with_leaves(whole, {path: np.broadcast_to(own[path], shapes[path].shape).astype(shapes[path].dtype) for path in shapes}))
    return tuple(filled)


def drawn_noise(setup: Setup, statics: ModelStatics, first_row: int = 0, rows: int = B) -> tuple[StackNoise, StackNoise]:
    return draw_noise(setup.config, statics, Address(SEED, STEP, first_row), (rows, M, L), True, reference)


def differing(found: Any, expected: Any) -> list[str]:
    """Return the paths whose arrays are not equal, element by element; NaN nowhere."""
    own, wanted = leaves(found), leaves(expected)
    assert own.keys() == wanted.keys()
    return [path for path, leaf in own.items() if not np.array_equal(leaf, wanted[path])]


def by_reference(setup: Setup) -> tuple[spec.ModelOutputs, ModelParams]:
    params, batch = start(setup.config)
    statics, read = statics_of(setup), weights_as_read(params, setup.setting)
    noise = spread(drawn_noise(setup, statics), no_noise(params, statics, B, M, L))
    outputs, saved = spec.model_forward(batch, read, noise, statics)
    return outputs, spec.model_backward(1.0, saved, read, statics)


def by_engine(setup: Setup, backend: Any = reference, recompute: bool = False, change: Callable = lambda noise: noise) -> tuple[Any, ModelParams]:
    params, batch = start(setup.config)
    statics, read = statics_of(setup), weights_as_read(params, setup.setting)
    noise = change(drawn_noise(setup, statics))
    outputs, saved = model_forward(batch, read, noise, statics, backend, recompute=recompute)
    return outputs, model_backward(1.0, saved, read, statics, backend)


@pytest.mark.parametrize("name", CONFIGS)
def test_engine__is_the_reference(name: str) -> None:
    """Logits, losses, every stage of the stream, every output of the sparse layers, every gradient."""
    outputs, gradients = by_engine(setup_of(name))
    expected, expected_gradients = by_reference(setup_of(name))
    assert differing(outputs, expected) == []
    assert differing(gradients, expected_gradients) == []


@pytest.mark.parametrize("setting", PRECISIONS)
def test_engine__is_the_reference_in_every_precision(setting: str) -> None:
    """Each rounding point stands where the reference has it."""
    setup = setup_of("every layer sparse", setting)
    outputs, gradients = by_engine(setup)
    expected, expected_gradients = by_reference(setup)
    assert differing(outputs, expected) == []
    assert differing(gradients, expected_gradients) == []


@pytest.mark.parametrize("name", ["dropout and jitter", "gated, untied, released models", "biases, random order of service", "dense"])
def test_engine__recomputation_changes_no_bit(name: str) -> None:
    """A block that runs forward again in its backward draws the same noise."""
    outputs, gradients = by_engine(setup_of(name), recompute=True)
    expected, expected_gradients = by_engine(setup_of(name))
    assert np.array_equal(outputs.logits_BLV, expected.logits_BLV)
    assert outputs.losses == expected.losses
    assert differing(gradients, expected_gradients) == []


def test_engine__recomputation_refused_under_pooling() -> None:
    """The pooled balance loss is all layers' at once."""
    with pytest.raises(InputError, match=r"aux\.layers=average_then_product.*recompute"):
        by_engine(setup_of("losses pooled over layers"), recompute=True)


def patched(**operations: Callable) -> Any:
    return SimpleNamespace(**{name: getattr(reference, name) for name in reference.__all__} | operations)


def swapped(noise: tuple[StackNoise, StackNoise]) -> tuple[StackNoise, StackNoise]:
    """Exchange the dropout behind self-attention and behind the feed-forward layer in the decoder."""
    blocks = tuple(block._replace(self_out_BLD=block.out_BLD, out_BLD=block.self_out_BLD) for block in noise[1].blocks)
    return noise[0], noise[1]._replace(blocks=blocks)


def doubled_aux(*args: Any) -> Any:
    outputs, saved = reference.switch_forward(*args)
    return outputs._replace(aux_loss=2.0 * outputs.aux_loss), saved


PLANTED: dict[str, dict[str, Any]] = {
    "a residual is forgotten": {"backend": patched(residual=lambda x, out, factor, format: reference.scaled(out, factor, format))},
    "two dropouts are exchanged": {"change": swapped},
    "the balance loss counts twice": {"backend": patched(switch_forward=doubled_aux)},
    "a gradient's residual is forgotten": {"backend": patched(added=lambda x, y, format: reference.rounded(y, format))},
    "the memory's bias is the stack's": {"backend": patched(position_bias_forward=lambda table, bucket: 0.0 * table[bucket].transpose(2, 0, 1))},
}


@pytest.mark.parametrize("fault", PLANTED)
def test_engine__identity_notices(fault: str) -> None:
    """What a composition can get wrong shows in outputs or gradients."""
    setup = setup_of("dropout and jitter")
    outputs, gradients = by_engine(setup, **PLANTED[fault])
    expected, expected_gradients = by_reference(setup)
    assert differing((outputs.losses, outputs.logits_BLV, gradients), (expected.losses, expected.logits_BLV, expected_gradients)) != []


@pytest.mark.parametrize("forgotten", ["cross", "rounding"])
def test_engine__identity_notices_a_changed_composition(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block without its cross-attention; a stack whose last rounding point is missing."""
    true_forward = engine_model.block_forward

    def without_cross(x: Any, around: Any, params: Any, *rest: Any) -> Any:
        return true_forward(x, around, params._replace(cross_attention=None), *rest)

    setup = setup_of("every layer sparse", "selective")
    if forgotten == "cross":
        monkeypatch.setattr(engine_model, "block_forward", without_cross)
        backend: Any = reference
    else:
        backend = patched(scaled=lambda x, factor, format: x * factor)
    params, batch = start(setup.config)
    statics, read = statics_of(setup), weights_as_read(params, setup.setting)
    outputs, _ = model_forward(batch, read, drawn_noise(setup, statics), statics, backend)
    expected, _ = by_reference(setup)
    assert not np.array_equal(outputs.logits_BLV, expected.logits_BLV)


def reference_steps(setup: Setup, steps: int, rate: float) -> tuple[ModelParams, dict[str, Any]]:
    """Train with the reference's functions and nothing of the engine but its draws."""
    params, batch = start(setup.config)
    params, dialect, optimizer = stored_weights(params, setup.setting), dialect_of(setup.config), setup.optimizer
    paths = [path for path in leaves(params) if moves(path, dialect)]
    fresh: Any = {
        path: adafactor_init(leaf.shape, expert_axis(path), optimizer.rule) if optimizer.name == "adafactor" else adamw_init(leaf.shape)
        for path, leaf in leaves(params).items()
    }
    states = {path: fresh[path] for path in paths}
    for step in range(steps):
        statics, read = statics_of(setup), weights_as_read(params, setup.setting)
        noise = draw_noise(setup.config, statics, Address(SEED, step, 0), (B, M, L), True, reference)
        _, saved = spec.model_forward(batch, read, spread(noise, no_noise(params, statics, B, M, L)), statics)
        gradients, weights = leaves(stored_gradients(spec.model_backward(1.0, saved, read, statics), setup.setting)), leaves(params)
        moving = [gradients[path] for path in paths]
        if optimizer.clip_norm:
            moving, _ = clip_by_global_norm(moving, optimizer.clip_norm)
        for path, gradient in zip(paths, moving, strict=True):
            if optimizer.name == "adafactor":
                weights[path], state = adafactor_update(weights[path], gradient, states[path], rate, expert_axis(path), optimizer.rule)
                states[path] = AdafactorState(state.step, *rounded(tuple(state[1:]), setup.setting.optimizer))
            else:
                weights[path], moments = adamw_update(weights[path], gradient, states[path], rate, weight_decay=optimizer.weight_decay)
                states[path] = AdamWState(moments.step, *rounded(tuple(moments[1:]), setup.setting.optimizer))
        params = stored_weights(with_leaves(params, weights), setup.setting)
    return params, states


def engine_steps(setup: Setup, steps: int, rate: float) -> engine_step.TrainState:
    params, batch = start(setup.config)
    state = initial_state(params, setup, reference)
    for _ in range(steps):
        state, _ = train_step(state, batch, setup, rate, reference)
    return state


UPDATES = [
    ("float64", Optimizer("adafactor")), ("float32", Optimizer("adafactor", rule="t5x", clip_norm=0.5)), ("selective", Optimizer("adafactor")),
    ("selective_master", Optimizer("adamw", weight_decay=0.1)), ("bfloat16", Optimizer("adamw", clip_norm=0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "optimizer"), UPDATES)
def test_train_step__is_the_reference(setting: str, optimizer: Optimizer) -> None:
    """Parameters and optimizer state after three steps, with clipping, under each rule."""
    setup = setup_of("dropout and jitter", setting, optimizer=optimizer)
    state = engine_steps(setup, 3, 0.05)
    params, states = reference_steps(setup, 3, 0.05)
    assert differing(state.params, params) == []
    found = {path: leaf for path, leaf in leaves(state.optimizer).items() if not path.endswith(".step")}
    wanted = {f"{path}.{name}": part for path, own in states.items() for name, part in zip(own._fields[1:], own[1:], strict=True)}
    assert found.keys() == wanted.keys()
    assert [path for path, leaf in found.items() if not np.array_equal(leaf, wanted[path])] == []


def test_train_step__absent_biases_stay_zero() -> None:
    """A bias that the dialect does not have is an array of zeros with a gradient, which moves nothing; one that it has moves."""
    for name, has in (("dropout and jitter", False), ("biases, random order of service", True)):
        setup = setup_of(name)
        params, batch = start(setup.config)
        params = with_leaves(params, {path: leaf * ("b_" not in path) for path, leaf in leaves(params).items()})
        state, _ = train_step(initial_state(params, setup, reference), batch, setup, 0.05, reference)
        moved = [path for path, leaf in leaves(state.params).items() if path.endswith(("b_in_EF", "b_out_ED")) and np.any(leaf)]
        assert bool(moved) == has, name


def test_train_step__resumes_to_the_same_bits() -> None:
    """Two steps, the state as arrays and back, one step: as three steps."""
    setup = setup_of("dropout and jitter", "selective_master")
    _, batch = start(setup.config)
    whole = engine_steps(setup, 3, 0.05)
    half = engine_steps(setup, 2, 0.05)
    stored = {name: array.copy() for name, array in state_arrays(half).items()}
    resumed, _ = train_step(state_from(stored, engine_steps(setup, 1, 0.05)), batch, setup, 0.05, reference)
    assert resumed.step == whole.step == 3
    own, wanted = state_arrays(resumed), state_arrays(whole)
    assert own.keys() == wanted.keys()
    assert [name for name, array in own.items() if not np.array_equal(array, wanted[name])] == []


def test_state_from__rejects_what_is_missing_or_misshapen() -> None:
    """One line with the tensor's name."""
    state = engine_steps(setup_of("plain"), 0, 0.05)
    arrays = state_arrays(state)
    with pytest.raises(InputError, match=r"no params\.embedding_VD"):
        state_from({name: array for name, array in arrays.items() if name != "params.embedding_VD"}, state)
    with pytest.raises(InputError, match=r"embedding_VD has shape \(2,\)"):
        state_from(arrays | {"params.embedding_VD": np.zeros(2)}, state)


def test_microbatches__add_up_to_their_parts() -> None:
    """Four microbatches of 2, 2, 4 and 8 real targets: each is the reference's with the whole batch's denominator and a quarter of the losses.

    The denominators are powers of two, so that scaling the reference's own mean is exact.
    """
    setup = setup_of("dropout and jitter", microbatches=4)
    params, batch = start(setup.config)
    weight_BL = np.array([[1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [2, 1, 1, 1, 2, 1]]) * 1.0
    batch = batch._replace(weight_BL=weight_BL)
    losses, gradients, _ = loss_and_gradients(params, batch, setup, STEP, reference)
    total: dict[str, np.ndarray] = {}
    cross_entropy = 0.0
    for row in range(B):
        part = rows_of(batch, slice(row, row + 1))
        ratio = part.weight_BL.sum() / weight_BL.sum()
        statics = statics_of(setup, 1)
        encoder, decoder = (stack._replace(aux_coef=stack.aux_coef * 0.25 / ratio) for stack in (statics.encoder, statics.decoder))
        statics = statics._replace(encoder=encoder, decoder=decoder)
        noise = spread(drawn_noise(setup, statics, row, 1), no_noise(params, statics, 1, M, L))
        outputs, saved = spec.model_forward(part, params, noise, statics)
        cross_entropy += outputs.losses.cross_entropy * ratio
        for path, leaf in leaves(spec.model_backward(ratio, saved, params, statics)).items():
            total[path] = total[path] + leaf if path in total else leaf
    assert losses.cross_entropy == cross_entropy
    assert [path for path, leaf in leaves(gradients).items() if not np.array_equal(leaf, total[path])] == []


def test_microbatches__refuse_what_cannot_be_cut() -> None:
    """One line."""
    params, batch = start(CONFIGS["plain"])
    with pytest.raises(InputError, match="4 rows cannot be cut into 3 microbatches"):
        loss_and_gradients(params, batch, setup_of("plain", microbatches=3), STEP, reference)


def test_noise__lies_at_its_address() -> None:
    """Site and index of each draw, as spec/randomness.md has them; a microbatch draws its slice of the whole batch."""
    setup = setup_of("biases, random order of service")
    statics = statics_of(setup)
    D, H, F, rate, keep = 6, 2, 7, 0.75, 0.6
    encoder, decoder = drawn_noise(setup, statics)
    assert np.array_equal(encoder.embedded_BLD, keep_factor(SEED, STEP, site_of(0, Purpose.EMBEDDING_DROPOUT), (B, M, D), rate))
    assert np.array_equal(decoder.out_BLD, keep_factor(SEED, STEP, site_of(2, Purpose.STACK_DROPOUT), (B, L, D), rate))
    block = decoder.blocks[1]
    assert np.array_equal(block.cross_probs_BHLM, keep_factor(SEED, STEP, site_of(3, Purpose.CROSS_PROBS_DROPOUT), (B, H, L, M), rate))
    assert np.array_equal(block.hidden_BLF, keep_factor(SEED, STEP, site_of(3, Purpose.HIDDEN_DROPOUT), (B, L, F), keep))
    S = B * L // statics.decoder.groups
    orders = [permutation(SEED, STEP, site_of(3, Purpose.PRIORITY), S, g * S) for g in range(statics.decoder.groups)]
    assert np.array_equal(block.router.priority_GS, orders)
    jittered = setup_of("dropout and jitter")
    whole = drawn_noise(jittered, statics_of(jittered))[0].blocks[1].router.factor_BLD
    assert np.array_equal(whole, jitter(SEED, STEP, site_of(1, Purpose.ROUTER_JITTER), (B, M, D), 0.01))
    second = drawn_noise(jittered, statics_of(jittered, 2), first_row=2, rows=2)[0].blocks[1]
    assert np.array_equal(second.router.factor_BLD, whole[2:])
    assert np.array_equal(second.self_probs_BHLL, drawn_noise(jittered, statics_of(jittered))[0].blocks[1].self_probs_BHLL[2:])


def answers(setup: Setup, params: ModelParams, tokens_BM: np.ndarray, valid_BM: np.ndarray, length: int, picking: Picking) -> np.ndarray:
    return np.stack(list(generate(tokens_BM, valid_BM, params, setup, reference, length, 0, 1, 0, picking)), axis=1)


@pytest.mark.parametrize("name", ["dropout and jitter", "gated, untied, released models", "dense"])
@pytest.mark.parametrize("picking", [Picking(), Picking(0.9, 0.8)])
def test_generate__is_the_reference(name: str, picking: Picking) -> None:
    """The same tokens, greedy and sampled, as the reference decodes; no more once every row has ended."""
    setup = setup_of(name)
    params, batch = start(setup.config)
    valid_BM = np.arange(M) < np.array([[M], [7], [3], [M]])
    tokens_BL = answers(setup, params, batch.encoder_tokens_BM, valid_BM, 8, picking)
    encoder = batch.encoder_tokens_BM, np.ones((B, M), int), valid_BM, np.arange(M)
    statics = model_statics(setup.config, B, M, 1, train=False)
    first = {field: getattr(batch, field)[:, :1] for field in Batch._fields if field.endswith("_BL")}
    one_token = batch._replace(**dict(zip(Batch._fields[:4], encoder, strict=True)), **first, decoder_position_L=np.arange(1))
    outputs, _ = spec.model_forward(one_token, params, no_noise(params, statics, B, M, 1), statics)
    draws_BL = np.stack([uniform(SEED, step, site_of(0, Purpose.SAMPLING), (B,)) for step in range(8)], axis=1)
    expected_BL, _ = decode(outputs.encoder.out_BLD, valid_BM, params, statics.decoder, draws_BL, 0, 1, 0, *picking)
    length = tokens_BL.shape[1]
    assert np.array_equal(tokens_BL, expected_BL[:, :length])
    assert length == 8 or (expected_BL[:, length:] == 0).all()


def test_train_step__names_the_first_place_that_is_no_number() -> None:
    """An infinite weight of one block: the objective is refused with the block's name, the state stays."""
    setup = setup_of("plain")
    params, batch = start(setup.config)
    state = initial_state(params, setup, reference)
    state.params.decoder.blocks[1].self_attention.norm_D[0] = np.nan
    with pytest.raises(NonFiniteError, match=r"step 0: the objective is nan; first at decoder\.blocks\.1"):
        train_step(state, batch, setup, 0.05, reference)


def test_train_step__refuses_a_gradient_that_is_no_number() -> None:
    """The objective is one and a gradient is not: nothing is updated."""
    setup = setup_of("plain")
    params, batch = start(setup.config)
    state = initial_state(params, setup, reference)
    before = {path: leaf.copy() for path, leaf in leaves(state.params).items()}
    broken = patched(embed_backward=lambda dx, tokens, V: np.full((V, dx.shape[-1]), np.inf))
    with pytest.raises(NonFiniteError, match="the gradient of embedding_VD is no number"):
        train_step(state, batch, setup, 0.05, broken)
    assert [path for path, leaf in leaves(state.params).items() if not np.array_equal(leaf, before[path])] == []
