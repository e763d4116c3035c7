# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Sub-layers, x + dropout(F(norm(x))), and their backward: T-BLOCK-1 to T-BLOCK-4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties import model_scenes
from properties.drawn import assert_equal, assert_slopes
from properties.harness import clause, draws, needs
from properties.model_scenes import PLANS, SEEDS, SETTINGS, B, D, E, F, H, Kind, L, M, Setup, in_every_setting, setup_of
from properties.operations import Operations
from refswitch.numbers.precision import round_to
from refswitch.reference.attention import allowed_pairs
from refswitch.reference.block import AttentionLayerParams, FeedForwardLayerParams, StackStatics
from refswitch.reference.switch import Statics, SwitchInputs
from refswitch.tree import leaves, with_leaves
from refswitch.verify.tubes import OWN_UNIT


class Scene(NamedTuple):
    """What the sub-layers of a decoder's block read."""

    setup: Setup
    statics: StackStatics
    x_BLD: np.ndarray
    memory_BMD: np.ndarray
    bias_HLL: np.ndarray
    allowed_BLL: np.ndarray
    allowed_BLM: np.ndarray
    dy_BLD: np.ndarray

    def stored(self, x: np.ndarray) -> np.ndarray:
        """Round to the format of what operations hand on."""
        return round_to(x, self.statics.around.activations)

    def gradient(self, dx: np.ndarray) -> np.ndarray:
        """Round to the format of gradients."""
        return round_to(dx, self.statics.around.gradients)


def scene_of(setting: int, seed: int, kind: Kind) -> Scene:
    """Draw a call of each sub-layer."""
    around, profile = SETTINGS[setting]
    setup, random = setup_of(kind, seed, around, profile), np.random.default_rng(seed)
    batch = setup.batch
    segment_BL, valid_BL = batch.decoder_segment_BL, batch.decoder_valid_BL
    arrays = [round_to(random.normal(size=shape), around.activations) for shape in ((B, L, D), (B, M, D), (H, L, L))]
    allowed = (
        allowed_pairs(segment_BL, segment_BL, valid_BL, True),
        allowed_pairs(segment_BL, batch.encoder_segment_BM, batch.encoder_valid_BM, False),
    )
    return Scene(setup, setup.statics.decoder, *arrays, *allowed, round_to(random.normal(size=(B, L, D)), around.gradients))


class Layer(NamedTuple):
    """One kind of sub-layer, played: its parameters, forward as a function of stream, memory, bias and parameters, and what backward returned."""

    params: Any
    forward: Callable[[np.ndarray, np.ndarray, np.ndarray, Any], Any]
    y_BLD: np.ndarray
    gradients: dict[str, np.ndarray]  # of x, memory, bias where it has them, and of each parameter by its path


def played(operations: Operations, scene: Scene, name: str, dropout_BLD: np.ndarray, losses: tuple[float, float] = (0.0, 0.0)) -> Layer:
    """Run one sub-layer forward and backward."""
    block, noise, statics = scene.setup.params.decoder.blocks[name == "switch"], scene.setup.noise[1].blocks[name == "switch"], scene.statics
    if name == "self":
        attention = block.self_attention

        def forward(x: np.ndarray, memory: np.ndarray, bias: np.ndarray, params: Any) -> Any:
            return operations.self_attention_layer_forward(x, bias, params, scene.allowed_BLL, noise.self_probs_BHLL, dropout_BLD, statics)

        y_BLD, saved = forward(scene.x_BLD, scene.memory_BMD, scene.bias_HLL, attention)
        dx_BLD, dbias_HLL, dparams = operations.self_attention_layer_backward(scene.dy_BLD, saved, attention, statics)
        return Layer(attention, forward, y_BLD, {"x": dx_BLD, "bias": dbias_HLL, **leaves(dparams)})
    if name == "cross":
        attention = block.cross_attention

        def forward(x: np.ndarray, memory: np.ndarray, bias: np.ndarray, params: Any) -> Any:
            return operations.cross_attention_layer_forward(x, memory, params, scene.allowed_BLM, noise.cross_probs_BHLM, dropout_BLD, statics)

        y_BLD, saved = forward(scene.x_BLD, scene.memory_BMD, scene.bias_HLL, attention)
        dx_BLD, dmemory_BMD, dparams = operations.cross_attention_layer_backward(scene.dy_BLD, saved, attention, statics)
        return Layer(attention, forward, y_BLD, {"x": dx_BLD, "memory": dmemory_BMD, **leaves(dparams)})
    layer = block.feed_forward
    if name == "dense":

        def forward(x: np.ndarray, memory: np.ndarray, bias: np.ndarray, params: Any) -> Any:
            return operations.dense_layer_forward(x, params.norm_D, params.feed_forward, noise.hidden_BLF, dropout_BLD, statics)

        y_BLD, saved = forward(scene.x_BLD, scene.memory_BMD, scene.bias_HLL, layer)
        dx_BLD, dparams = operations.dense_layer_backward(scene.dy_BLD, saved, layer.norm_D, layer.feed_forward, statics)
        return Layer(layer, forward, y_BLD, {"x": dx_BLD, **leaves(dparams)})

    def forward(x: np.ndarray, memory: np.ndarray, bias: np.ndarray, params: Any) -> Any:
        valid_BL = scene.setup.batch.decoder_valid_BL
        return operations.switch_layer_forward(
            x, params.norm_D, params.feed_forward, valid_BL, noise.router, noise.hidden_BLF, dropout_BLD, statics
        )  # fmt: skip

    y_BLD, _, saved = forward(scene.x_BLD, scene.memory_BMD, scene.bias_HLL, layer)
    dx_BLD, dparams = operations.switch_layer_backward(scene.dy_BLD, *losses, saved, layer.norm_D, layer.feed_forward, statics)
    return Layer(layer, forward, y_BLD, {"x": dx_BLD, **leaves(dparams)})


def dropout_of(scene: Scene) -> np.ndarray:
    """Return a sub-layer's dropout."""
    return scene.setup.noise[1].blocks[0].out_BLD


def assert_gradients(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Assert equal bits of every gradient."""
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert_equal(found[name], array, f"d{name}")


@clause("T-BLOCK-1", "T-BLOCK-4", is_oracle=True)
@needs(wide=True)
@draws(examples=in_every_setting(), plan=PLANS)
def test_self_attention_layer__is_its_parts(operations: Operations, plan: tuple[int, int]) -> None:
    """To the bit norm, attention to the normed tokens, dropout and the stream; backward the same way home, each sum rounded as a gradient."""
    scene = scene_of(*plan, Kind())
    layer, dropout_BLD, around = played(operations, scene, "self", dropout_of(scene)), dropout_of(scene), scene.statics.around
    params, noise = layer.params, scene.setup.noise[1].blocks[0]
    normed_BLD, norm = operations.norm_forward(scene.x_BLD, params.norm_D, scene.statics.norm_epsilon, around)
    out_BLD, attention = operations.attention_forward(
        normed_BLD, normed_BLD, scene.bias_HLL, params.attention, scene.allowed_BLL, noise.self_probs_BHLL, around
    )
    assert_equal(layer.y_BLD, scene.stored(scene.x_BLD + out_BLD * dropout_BLD), "y_BLD")
    dquery_BLD, dmemory_BLD, dbias_HLL, dattention = operations.attention_backward(scene.dy_BLD * dropout_BLD, attention, params.attention, around)
    dnormed_BLD, dnorm_D = operations.norm_backward(scene.gradient(dquery_BLD + dmemory_BLD), norm, params.norm_D, around)
    wanted = leaves(AttentionLayerParams(dnorm_D, dattention))
    assert_gradients(layer.gradients, {"x": scene.gradient(scene.dy_BLD + dnormed_BLD), "bias": dbias_HLL, **wanted})


@clause("T-BLOCK-2", "T-BLOCK-4", is_oracle=True)
@needs(wide=True)
@draws(examples=in_every_setting(), plan=PLANS)
def test_cross_attention_layer__is_its_parts(operations: Operations, plan: tuple[int, int]) -> None:
    """To the bit the norm of the stream alone, attention to the memory without a bias, dropout and the stream; and backward."""
    scene = scene_of(*plan, Kind())
    layer, dropout_BLD, around = played(operations, scene, "cross", dropout_of(scene)), dropout_of(scene), scene.statics.around
    params, noise = layer.params, scene.setup.noise[1].blocks[0]
    normed_BLD, norm = operations.norm_forward(scene.x_BLD, params.norm_D, scene.statics.norm_epsilon, around)
    out_BLD, attention = operations.attention_forward(
        normed_BLD, scene.memory_BMD, np.zeros((H, L, M)), params.attention, scene.allowed_BLM, noise.cross_probs_BHLM, around
    )
    assert_equal(layer.y_BLD, scene.stored(scene.x_BLD + out_BLD * dropout_BLD), "y_BLD")
    dquery_BLD, dmemory_BMD, _, dattention = operations.attention_backward(scene.dy_BLD * dropout_BLD, attention, params.attention, around)
    dnormed_BLD, dnorm_D = operations.norm_backward(dquery_BLD, norm, params.norm_D, around)
    wanted = leaves(AttentionLayerParams(dnorm_D, dattention))
    assert_gradients(layer.gradients, {"x": scene.gradient(scene.dy_BLD + dnormed_BLD), "memory": dmemory_BMD, **wanted})


@clause("T-BLOCK-1", "T-BLOCK-4", is_oracle=True)
@needs(wide=True)
@draws(examples=in_every_setting((True, False)), plan=PLANS, gated=st.booleans())
def test_dense_layer__is_its_parts(operations: Operations, plan: tuple[int, int], gated: bool) -> None:
    """To the bit norm, the dense network with its own dropout, dropout and the stream; and backward."""
    scene = scene_of(*plan, Kind(gated=gated, activation="gelu_tanh"))
    layer, dropout_BLD, around = played(operations, scene, "dense", dropout_of(scene)), dropout_of(scene), scene.statics.around
    norm_D, dense = layer.params
    hidden_BLF = scene.setup.noise[1].blocks[0].hidden_BLF
    normed_BLD, norm = operations.norm_forward(scene.x_BLD, norm_D, scene.statics.norm_epsilon, around)
    out_BLD, saved = operations.feed_forward_forward(normed_BLD, dense, hidden_BLF, "gelu_tanh", around)
    assert_equal(layer.y_BLD, scene.stored(scene.x_BLD + out_BLD * dropout_BLD), "y_BLD")
    dhere_BLD, ddense = operations.feed_forward_backward(scene.dy_BLD * dropout_BLD, saved, dense, "gelu_tanh", around)
    dnormed_BLD, dnorm_D = operations.norm_backward(dhere_BLD, norm, norm_D, around)
    wanted = leaves(FeedForwardLayerParams(dnorm_D, ddense))
    assert_gradients(layer.gradients, {"x": scene.gradient(scene.dy_BLD + dnormed_BLD), **wanted})


@clause("T-BLOCK-3", "T-BLOCK-4", is_oracle=True)
@needs("a dropped token", "padding", wide=True)
@draws(
    examples=in_every_setting(model_scenes.KINDS),
    plan=PLANS,
    kind=st.sampled_from(model_scenes.KINDS),
)
def test_switch_layer__is_its_parts(operations: Operations, plan: tuple[int, int], kind: Kind) -> None:
    """To the bit norm, the Switch layer on the batch's tokens cut in order into groups, dropout and the stream; and backward with both losses."""
    scene = scene_of(*plan, kind._replace(sparse=(False, True), decoder=()))
    statics, dropout_BLD, losses = scene.statics, dropout_of(scene), (0.5, -0.25)
    layer = played(operations, scene, "switch", dropout_BLD, losses)
    norm_D, switch = layer.params
    noise, G = scene.setup.noise[1].blocks[1], statics.groups
    normed_BLD, norm = operations.norm_forward(scene.x_BLD, norm_D, statics.norm_epsilon, statics.around)
    valid_BL, router = scene.setup.batch.decoder_valid_BL, noise.router
    groups = (normed_BLD, valid_BL, router.factor_BLD, router.term_BLE, router.select_BLE)
    cut = [array.reshape(G, B * L // G, *array.shape[2:]) for array in groups]
    inputs = SwitchInputs(*cut, router.priority_GS, noise.hidden_BLF.reshape(G, B * L // G, F))
    layer_statics = Statics(statics.dialect, statics.points, statics.activation, statics.capacity)
    outputs, saved = operations.switch_forward(inputs, switch, layer_statics)
    operations.meets("a dropped token", not outputs.route.kept_GS.all())
    operations.meets("padding", not valid_BL.all())
    out_BLD = outputs.out_GSD.reshape(B, L, D)
    _, given, _ = layer.forward(scene.x_BLD, scene.memory_BMD, scene.bias_HLL, layer.params)
    assert_equal(layer.y_BLD, scene.stored(scene.x_BLD + out_BLD * dropout_BLD), "y_BLD")
    assert_gradients(leaves(given), leaves(outputs))
    dout_GSD = (scene.dy_BLD * dropout_BLD).reshape(G, -1, D)
    dhere_GSD, dswitch = operations.switch_backward(dout_GSD, *losses, saved, switch, layer_statics)
    dnormed_BLD, dnorm_D = operations.norm_backward(dhere_GSD.reshape(B, L, D), norm, norm_D, statics.around)
    wanted = leaves(FeedForwardLayerParams(dnorm_D, dswitch))
    assert_gradients(layer.gradients, {"x": scene.gradient(scene.dy_BLD + dnormed_BLD), **wanted})


@clause("T-BLOCK-1", "T-BLOCK-2", "T-BLOCK-3", "T-BLOCK-4")
@needs(wide=True)
@draws(plan=PLANS, name=st.sampled_from(("self", "cross", "dense", "switch")))
def test_layers__dropped_out_is_the_stream(operations: Operations, plan: tuple[int, int], name: str) -> None:
    """Where the whole sub-layer is dropped out the stream and its gradient pass as they are, and no parameter has a gradient."""
    scene = scene_of(*plan, Kind())
    layer = played(operations, scene, name, np.zeros((B, L, D)))
    assert_equal(layer.y_BLD, scene.x_BLD, "y_BLD")
    assert_equal(layer.gradients.pop("x"), scene.dy_BLD, "dx_BLD")
    assert not any(gradient.any() for gradient in layer.gradients.values())


@clause("T-BLOCK-2")
@needs(wide=True)
@draws(plan=PLANS, power=st.sampled_from((0.25, 8.0)))
def test_cross_attention_layer__memory_as_it_comes(operations: Operations, plan: tuple[int, int], power: float) -> None:
    """Memory times 2^k with keys and values times 2^-k changes no bit: nothing norms the memory again. Its order does not matter: no bias."""
    scene = scene_of(*plan, Kind(quiet=True))
    layer = played(operations, scene, "cross", dropout_of(scene))
    attention = layer.params.attention
    scaled = attention._replace(w_key_DHK=attention.w_key_DHK / power, w_value_DHK=attention.w_value_DHK / power)
    y_BLD, _ = layer.forward(scene.x_BLD, power * scene.memory_BMD, scene.bias_HLL, layer.params._replace(attention=scaled))
    assert_equal(y_BLD, layer.y_BLD, "y_BLD")
    alone = scene._replace(allowed_BLM=np.tile(np.arange(M) == 1, (B, L, 1)))
    first = played(operations, alone, "cross", dropout_of(scene))
    swapped = scene._replace(allowed_BLM=np.tile(np.arange(M) == 4, (B, L, 1)), memory_BMD=scene.memory_BMD[:, [0, 4, 2, 3, 1, 5]])
    assert_equal(played(operations, swapped, "cross", dropout_of(scene)).y_BLD, first.y_BLD, "y_BLD")


@clause("T-BLOCK-3")
@needs("a dropped token", wide=True)
@draws(seed=SEEDS)
def test_switch_layer_forward__group_by_group(operations: Operations, seed: int) -> None:
    """A group's tokens alone have the stream, the route and the capacity that they have in the batch: groups share nothing."""
    scene = scene_of(0, seed, Kind())
    statics, noise, (norm_D, switch) = scene.statics, scene.setup.noise[1].blocks[1], scene.setup.params.decoder.blocks[1].feed_forward
    G, S = statics.groups, B * L // statics.groups
    layer = played(operations, scene, "switch", dropout_of(scene))
    for g in range(G):

        def rows(array: np.ndarray, g: int = g) -> np.ndarray:
            return array.reshape(G, 1, S, *array.shape[2:])[g]

        router = noise.router
        alone = router._replace(
            factor_BLD=rows(router.factor_BLD), term_BLE=rows(router.term_BLE), select_BLE=rows(router.select_BLE),
            priority_GS=router.priority_GS[g : g + 1],
        )  # fmt: skip
        arguments = rows(scene.setup.batch.decoder_valid_BL), alone, rows(noise.hidden_BLF), rows(dropout_of(scene))
        y_1SD, outputs, _ = operations.switch_layer_forward(rows(scene.x_BLD), norm_D, switch, *arguments, statics._replace(groups=1))
        operations.meets("a dropped token", not outputs.route.kept_GS.all())
        assert outputs.probs_GSE.shape == (1, S, E)
        assert_equal(y_1SD, rows(layer.y_BLD), "y_1SD")


@clause("T-BLOCK-4")
@needs("compared", wide=True)
@draws(seed=SEEDS, name=st.sampled_from(("self", "cross", "dense", "switch")))
def test_layers_backward__finite_difference(operations: Operations, seed: int, name: str) -> None:
    """The slopes along the stream, the memory, the bias and each parameter are the gradients, at equal routes, with both losses of a sparse layer."""
    scene, losses = scene_of(0, seed, Kind(activation="gelu_erf")), (0.5, -0.25)
    layer = played(operations, scene, name, dropout_of(scene), losses)
    arguments = {"x": scene.x_BLD, "memory": scene.memory_BMD, "bias": scene.bias_HLL, **leaves(layer.params)}
    arguments = {key: value for key, value in arguments.items() if key in layer.gradients}
    drawn = {"memory": scene.memory_BMD, "bias": scene.bias_HLL}

    def outputs(**arrays: np.ndarray) -> Any:
        params = with_leaves(layer.params, {path: arrays[path] for path in leaves(layer.params)})
        return layer.forward(arrays["x"], arrays.get("memory", drawn["memory"]), arrays.get("bias", drawn["bias"]), params)

    def value(**arrays: np.ndarray) -> tuple[float, np.ndarray]:
        y_BLD, *rest = outputs(**arrays)
        alone = float(np.sum(scene.dy_BLD * y_BLD))
        if name != "switch":
            return alone, np.zeros(1)
        route = np.concatenate([np.ravel(part) for part in rest[0].route])
        return alone + losses[0] * float(rest[0].aux_loss) + losses[1] * float(rest[0].z_loss), route

    noise = B * L * M * D * F * E * OWN_UNIT * float(np.sum(np.abs(scene.dy_BLD * layer.y_BLD)))  # as if each step rounded the whole sum
    compared = assert_slopes(value, arguments, layer.gradients, noise, np.random.default_rng(seed), must=False)
    operations.meets("compared", compared == len(arguments))
