# May import: standard library, numpy, pytest, refswitch.
"""The precision settings of a whole model: what is stored lies on its grid, the router stays wide, small updates live in a master copy.

Paper: 2.4, table 2; errata 18 (bfloat16 cannot count past 256).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refswitch.checkpoints.template import template_of
from refswitch.errors import InputError
from refswitch.model_config import PRESETS
from refswitch.model_setup import model_statics, no_noise
from refswitch.numbers.precision import FORMATS, is_stored
from refswitch.precision import PRECISIONS, Precision, layer_points, precision, rounded, stored_gradients, stored_weights, weights_as_read
from refswitch.reference.adafactor import AdafactorState, adafactor_init, adafactor_update
from refswitch.reference.capacity import Route
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.pack import pack, unpack
from refswitch.reference.switch import Statics, SwitchInputs, SwitchOutputs, SwitchParams, switch_forward
from refswitch.reference.transformer import Batch, ModelOutputs, ModelParams, ModelSaved, model_backward, model_forward
from refswitch.spec_data import data_root, load_dialect
from refswitch.tree import leaves, with_leaves

HANDED_ON = ("query_BLHK", "key_BMHK", "value_BMHK", "probs_BHLM", "mixed_BLHK", "z_act_BLF", "hidden_BLF", "decoder_out_BLD")
B, M, L = 2, 7, 5
CONFIG = replace(PRESETS["tiny_switch"], dialect="mesh_tensorflow", encoder_layers=2, decoder_layers=2)


def start() -> tuple[ModelParams, Batch]:
    """Draw weights and a batch."""
    rng = np.random.default_rng(0)
    params = with_leaves(
        template_of(CONFIG),
        {path: rng.normal(size=leaf.shape) * 0.4 + ("norm" in path) for path, leaf in leaves(template_of(CONFIG)).items()},
    )  # fmt: skip
    encoder_BM, targets_BL = rng.integers(1, CONFIG.vocabulary, (B, M)), rng.integers(1, CONFIG.vocabulary, (B, L))
    ones_BM, ones_BL = np.ones_like(encoder_BM), np.ones_like(targets_BL)
    encoder = encoder_BM, ones_BM, ones_BM == 1, np.arange(M)
    return params, Batch(*encoder, np.roll(targets_BL, 1), ones_BL, ones_BL == 1, np.arange(L), targets_BL, 1.0 * ones_BL)


def run(params: ModelParams, batch: Batch, setting: Precision) -> tuple[ModelOutputs, ModelSaved, ModelParams]:
    """Run forward and backward under a setting; return also the weights' gradients as stored."""
    statics = model_statics(CONFIG, B, M, L, train=True, setting=setting)
    read = weights_as_read(params, setting)
    outputs, saved = model_forward(batch, read, no_noise(read, statics, B, M, L), statics)
    return outputs, saved, stored_gradients(model_backward(1.0, saved, read, statics), setting)


def off_grid(tree: tuple, format: str, names: tuple[str, ...] = ()) -> list[str]:
    """Return the paths of arrays with a value that the format does not hold."""
    return [
        path
        for path, leaf in leaves(tree).items()
        if (not names or path.endswith(names)) and not np.all(is_stored(np.asarray(leaf), FORMATS[format]))
    ]


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision__stored_values_lie_on_their_grid(name: str) -> None:
    """What operations hand on, the residual stream, logits, gradients; and float64 alone leaves everything as it is."""
    setting = PRECISIONS[name]
    outputs, saved, gradients = run(*start(), setting)
    assert off_grid(saved, setting.around.activations.name, HANDED_ON) == []
    assert off_grid((*outputs.encoder.stream, *outputs.decoder.stream, outputs.decoder.out_BLD), setting.around.activations.name) == []
    assert off_grid((outputs.logits_BLV,), setting.around.logits.name) == []
    assert off_grid(gradients, setting.weight_gradients.name) == []
    narrower = {"float64": "float32", "float32": "bfloat16"}.get(setting.around.activations.name)
    if narrower:  # the check can fail: the same values are not on the next narrower grid
        assert len(off_grid(saved, narrower, HANDED_ON)) > 5
        assert off_grid(gradients, narrower) != []


def test_precision__router_and_loss_stay_wide_in_selective() -> None:
    """Selective precision keeps router logits, probabilities and the loss's logits in float32; naive bfloat16 keeps nothing (paper 2.4)."""
    wide, _, _ = run(*start(), PRECISIONS["selective"])
    naive, _, _ = run(*start(), PRECISIONS["bfloat16"])
    for switch in wide.encoder.switches + wide.decoder.switches:
        assert off_grid((switch.logits_GSE, switch.probs_GSE), "bfloat16") == ["0", "1"]
        assert off_grid((switch.logits_GSE, switch.probs_GSE), "float32") == []
    for switch in naive.encoder.switches + naive.decoder.switches:
        assert off_grid((switch.logits_GSE, switch.probs_GSE), "bfloat16") == []
    assert off_grid((wide.logits_BLV,), "bfloat16") == ["0"]
    assert off_grid((naive.logits_BLV,), "bfloat16") == []


def test_precision__distance_falls_with_the_unit() -> None:
    """The objective's distance from float64 is of the order of each setting's unit: float32 is thousands of times nearer than bfloat16."""
    truth = run(*start(), PRECISIONS["float64"])[0].losses.objective
    distance = {name: abs(run(*start(), PRECISIONS[name])[0].losses.objective - truth) / truth for name in PRECISIONS}
    assert distance["float64"] == 0.0
    assert 0.0 < distance["float32"] < 64 * FORMATS["float32"].unit
    for name in ("selective", "selective_master", "bfloat16"):
        assert distance["float32"] < distance[name] < 64 * FORMATS["bfloat16"].unit


def hot_layer(setting: Precision, S: int) -> tuple[SwitchOutputs, np.ndarray]:
    """Run a Switch layer whose S tokens all choose one expert that has room for them."""
    dialect, rng = load_dialect("mesh_tensorflow"), np.random.default_rng(1)
    E, D, F = 2, 4, 8
    experts = ExpertsParams(rng.normal(size=(E, D, F)), None, rng.normal(size=(E, F, D)), np.zeros((E, F)), np.zeros((E, F)), np.zeros((E, D)))
    params = rounded(SwitchParams(np.array([[1.0, -1.0]] * D), np.zeros(E), experts, np.zeros(D)), setting.read)
    x_GSD = rounded((1.0 + rng.random((1, S, D)),), setting.around.activations)[0]
    no_GSE = np.zeros((1, S, E))
    inputs = SwitchInputs(x_GSD, np.ones((1, S), bool), np.ones_like(x_GSD), no_GSE, no_GSE, np.arange(S)[None], np.ones((1, S, F)))
    outputs, _ = switch_forward(inputs, params, Statics(dialect, layer_points(dialect, setting), "relu", S))
    assert (outputs.route.expert_GS == 0).all()
    return outputs, x_GSD


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision__naive_bfloat16_collides_slots_past_256(name: str) -> None:
    """Up to 256 claims every setting counts right; beyond, naive bfloat16 gives two tokens one slot, and the expert reads their sum."""
    few, _ = hot_layer(PRECISIONS[name], 256)
    assert few.route.slot_GS[0].tolist() == list(range(256))
    many, _ = hot_layer(PRECISIONS[name], 300)
    slots = many.route.slot_GS[0].tolist()
    if name == "bfloat16":
        assert len(set(slots)) == 256 + (300 - 256) // 2
        assert slots[255:259] == [255, 255, 257, 259]
    else:
        assert slots == list(range(300))


def test_pack__colliding_slots_hold_the_sum() -> None:
    """As a one-hot product dispatches; unpack is still its transpose, exactly."""
    rng = np.random.default_rng(2)
    route = Route(np.zeros((1, 4), int), np.array([[0, 1, 1, 2]]), np.ones((1, 4), bool))
    x_GSD, y_GECD = rng.integers(-9, 9, (1, 4, 3)) * 1.0, rng.integers(-9, 9, (1, 2, 3, 3)) * 1.0
    packed_GECD = pack(x_GSD, route, 2, 3)
    assert np.array_equal(packed_GECD[0, 0, 1], x_GSD[0, 1] + x_GSD[0, 2])
    assert np.sum(packed_GECD * y_GECD) == np.sum(x_GSD * unpack(y_GECD, route))


def train(setting: Precision, steps: int, rate: float) -> tuple[list[float], ModelParams, dict[str, AdafactorState]]:
    """Return the objective before each step, the weights and the optimizer's state after the last."""
    params, batch = start()
    params = stored_weights(params, setting)
    states = {path: adafactor_init(leaf.shape) for path, leaf in leaves(params).items()}
    objectives = []
    for _ in range(steps):
        outputs, _, gradients = run(params, batch, setting)
        objectives.append(outputs.losses.objective)
        gradient, weights = leaves(gradients), leaves(params)
        for path, leaf in weights.items():
            weights[path], state = adafactor_update(leaf, gradient[path], states[path], rate)
            states[path] = AdafactorState(state.step, *rounded(tuple(state[1:]), setting.optimizer))
        params = stored_weights(with_leaves(params, weights), setting)
    return objectives, params, states


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision__update(name: str) -> None:
    """Ten steps lower the objective in every setting; weights and state lie on their grids after each."""
    setting = PRECISIONS[name]
    objectives, params, states = train(setting, 10, 0.02)
    assert objectives[-1] < objectives[0]
    assert off_grid(params, setting.weights.name) == []
    assert off_grid(tuple(state[1:] for state in states.values()), setting.optimizer.name) == []


def test_precision__master_copy_keeps_small_updates() -> None:
    """At a rate below half a unit in the last place bfloat16 weights stand still, and a float32 copy moves."""
    before, _ = start()
    for name, moves in (("selective", False), ("selective_master", True), ("float32", True)):
        setting = PRECISIONS[name]
        _, after, _ = train(setting, 3, 2.0**-14)
        stored = leaves(stored_weights(before, setting))
        moved = [path for path, leaf in leaves(after).items() if leaf.size and not np.array_equal(leaf, stored[path])]
        large = [path for path in moved if np.min(np.abs(stored[path])) > 0.5]  # where every weight is large against its update
        assert bool(moved) if moves else large == [], name
        still = np.mean([np.mean(leaf == stored[path]) for path, leaf in leaves(after).items() if "w_" in path])
        assert (still < 0.5) == moves, (name, still)


def test_precision__rejects_unknown() -> None:
    """One line with the close names."""
    with pytest.raises(InputError, match=r"unknown precision 'selectiv'.*selective"):
        precision("selectiv")


def test_precision__settings_stand_in_the_spec() -> None:
    """The table of numbers.md, section 2, cell by cell."""
    text = (data_root() / "spec" / "numbers.md").read_text(encoding="utf-8").split("<!-- precision settings")[1].split("\n\n")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    told = []
    for it in PRECISIONS.values():
        formats = [it.positions, *it.around, it.weights, it.read, it.weight_gradients, it.optimizer]
        told.append([it.name, it.profile, *(format.name for format in formats)])
    assert rows == told
