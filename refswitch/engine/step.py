# May import: standard library, numpy, refswitch.backends, refswitch.worlds, refswitch.engine (below), refswitch.model_setup and what lies below it.
"""A training step, an evaluation: microbatches, ranks, gradients, clipping, update.

A batch of k microbatches is k batches of consecutive rows whose gradients are added. What that leaves as it was:

- the cross-entropy with all its terms: each microbatch divides by the whole batch's denominator, so the parts add up to the whole;
- all draws: their addresses are positions in the whole batch;
- the balance loss and the z-loss are means over microbatches (`aux.microbatch_div`; else sums), each with f, P and valid tokens of its own. A
  routing group never spans two of them. So they, capacity, routes and drops are those of the whole batch exactly where the dialect's rule cuts both
  into the same groups (and, for the z-loss, where the microbatches have equally many valid tokens), and a loss of another grouping elsewhere.

Each rank holds equally many rows, in the order of the ranks; gradients and losses are added in that order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refswitch.backends.protocol import UNROUNDED, Backend
from refswitch.engine.metrics import LayerMetrics, layer_metrics, layer_sums
from refswitch.engine.model import ModelSaved, Soft, first_non_finite, head_forward, hidden_forward, model_backward, model_forward
from refswitch.engine.noise import Address, check_noise, draw_noise
from refswitch.engine.optimizer import NonFiniteError as NonFiniteError
from refswitch.engine.optimizer import Optimizer, OptimizerTree, initial_optimizer, stored, update
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.model_setup import dialect_of, model_statics
from refswitch.numbers.precision import Format
from refswitch.precision import Precision
from refswitch.reference.transformer import Batch, Losses, ModelOutputs, ModelParams, ModelStatics, StackOutputs
from refswitch.tree import leaves, with_leaves
from refswitch.worlds.one import ONE
from refswitch.worlds.world import World


class Setup(NamedTuple):
    """What stays from step to step."""

    config: ModelConfig
    setting: Precision
    optimizer: Optimizer
    seed: int
    loss_denominator: str = "weights"  # "targets": every position; "weights": the sum of weights
    label_smoothing: float = 0.0
    logits_z_coef: float = 0.0
    microbatches: int = 1
    recompute: bool = False  # a block's activations, instead of keeping all blocks'
    soft_share: float = 0.0  # of a teacher's distribution in the loss, where a step is given its logits
    temperature: float = 1.0


class TrainState(NamedTuple):
    """What a step reads and writes; with the setup and the data all that the following steps depend on."""

    step: int  # updates made
    params: ModelParams
    optimizer: OptimizerTree


class StepMetrics(NamedTuple):
    """What one step says of itself, before its update."""

    losses: Losses
    target_weight: float  # the sum of the targets' weights, all ranks together
    gradient_norm: float  # before clipping
    layers: tuple[LayerMetrics, ...]  # of the sparse layers, the encoder's first


class Evaluation(NamedTuple):
    """Sums over one batch, which the caller adds over batches."""

    cross_entropy: float  # nats, weighted, neither smoothed nor with a z-loss
    weight: float
    correct: float  # weighted number of targets whose logit is the highest
    layers: tuple[LayerMetrics, ...]


def check(setup: Setup, backend: Backend) -> None:
    """Refuse a setup that the engine or the backend does not compute.

    Raises
    ------
    InputError
        With the knob.
    """
    backend.supports(setup.config, setup.setting)
    check_noise(dialect_of(setup.config))


def initial_state(params: ModelParams, setup: Setup, backend: Backend) -> TrainState:
    """Return the state before the first step: copies of the parameters as they are stored."""
    copies = {path: stored(np.array(leaf, backend.dtype, order="C"), setup.setting.weights, backend) for path, leaf in leaves(params).items()}
    params = with_leaves(params, copies)
    return TrainState(0, params, initial_optimizer(params, setup.optimizer, dialect_of(setup.config), backend))


def state_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Return the state as arrays by name, which a file can hold."""
    named = {f"params.{path}": leaf for path, leaf in leaves(state.params).items()}
    named |= {f"optimizer.{path}": np.asarray(leaf) for path, leaf in leaves(state.optimizer).items()}
    return named | {"step": np.asarray(state.step)}


def state_from(arrays: dict[str, np.ndarray], like: TrainState) -> TrainState:
    """Return the state that `state_arrays` wrote down; `like` is any state of the same setup.

    Raises
    ------
    InputError
        Where a tensor is missing or has another shape.
    """
    for name, expected in state_arrays(like).items():
        found = arrays.get(name)
        if found is None:
            raise InputError(f"the training state has no {name}")
        if found.shape != expected.shape:
            raise InputError(f"the training state's {name} has shape {found.shape}, and the model needs {expected.shape}")

    def part(prefix: str, tree: Any) -> Any:
        own = {path: arrays[f"{prefix}.{path}"] for path in leaves(tree)}
        kept = {path: int(own[path]) if isinstance(leaf, int) else np.array(own[path], leaf.dtype, order="C") for path, leaf in leaves(tree).items()}
        return with_leaves(tree, kept)

    return TrainState(int(arrays["step"]), part("params", like.params), part("optimizer", like.optimizer))


def rounded_tree(tree: Any, format: Format, backend: Backend) -> Any:
    """Return a tree with every array on the grid of a format."""
    return with_leaves(tree, {path: backend.rounded(leaf, format) for path, leaf in leaves(tree).items()})


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Return some rows of a batch; positions belong to all of them."""
    return Batch(*[array if name.endswith(("_position_M", "_position_L")) else array[rows] for name, array in zip(Batch._fields, batch, strict=True)])


def part_statics(setup: Setup, batch: Batch, share: float) -> ModelStatics:
    """Return the statics of a microbatch whose balance and z-losses count with `share`."""
    (B, M), (_, L) = batch.encoder_tokens_BM.shape, batch.targets_BL.shape
    statics = model_statics(setup.config, B, M, L, train=True, loss_denominator=setup.loss_denominator, setting=setup.setting)
    encoder, decoder = (stack._replace(aux_coef=stack.aux_coef * share, z_coef=stack.z_coef * share) for stack in (statics.encoder, statics.decoder))
    return ModelStatics(encoder, decoder, setup.loss_denominator, setup.label_smoothing, setup.logits_z_coef)


def part_forward(
    params: ModelParams,
    batch: Batch,
    setup: Setup,
    step: int,
    part: int,
    denominator: float,
    backend: Backend,
    world: World,
    teacher_BLV: np.ndarray | None,
) -> tuple[ModelOutputs, ModelSaved, ModelStatics]:
    """Run one microbatch forward: rows, noise and shares of the whole batch."""
    k = setup.microbatches
    rows = batch.targets_BL.shape[0] // k
    share = 1.0 / (world.size * (k if dialect_of(setup.config).aux.microbatch_div else 1))
    here = rows_of(batch, slice(part * rows, (part + 1) * rows)) if k > 1 else batch
    statics = part_statics(setup, here, share)
    address = Address(setup.seed, step, (world.rank * k + part) * rows)
    (_, M), (_, L) = here.encoder_tokens_BM.shape, here.targets_BL.shape
    noise = draw_noise(setup.config, statics, address, (rows, M, L), True, backend)
    soft = None if teacher_BLV is None else Soft(teacher_BLV[part * rows : (part + 1) * rows], setup.soft_share, setup.temperature)
    outputs, saved = model_forward(here, params, noise, statics, backend, denominator, setup.recompute, soft)
    return outputs, saved, statics


def whole_denominator(batch: Batch, setup: Setup, world: World) -> tuple[float, float]:
    """Return what all ranks' cross-entropies are divided by, and the sum of all weights."""
    weight, size = world.all_reduce(np.array([batch.weight_BL.sum(dtype=np.float64), batch.weight_BL.size]))
    return float(size) if setup.loss_denominator == "targets" else max(float(weight), 1.0), float(weight)


def loss_and_gradients(
    params: ModelParams, batch: Batch, setup: Setup, step: int, backend: Backend, world: World = ONE, teacher_BLV: np.ndarray | None = None
) -> tuple[Losses, ModelParams, np.ndarray]:
    """Return the losses, the gradients of the objective, and the sums of the sparse layers on this rank.

    Parameters
    ----------
    params : ModelParams
        As products read them.
    step : int
        Which draws.

    Raises
    ------
    InputError
        Where the batch cannot be cut into microbatches, or its tokens into groups.
    NonFiniteError
        Where the objective is no number.
    """
    B, k = batch.targets_BL.shape[0], setup.microbatches
    if B % k:
        raise InputError(f"a batch of {B} rows cannot be cut into {k} microbatches")
    denominator, _ = whole_denominator(batch, setup, world)
    since, total, losses, sums = backend.mark(), None, np.zeros(len(Losses._fields)), np.zeros(())
    for part in range(k):
        outputs, saved, statics = part_forward(params, batch, setup, step, part, denominator, backend, world, teacher_BLV)
        if not np.isfinite(outputs.losses.objective):
            raise NonFiniteError(f"step {step}: the objective is {outputs.losses.objective}; first at {first_non_finite(outputs)}")
        share = 1.0 / (k * world.size)
        losses = losses + np.array(outputs.losses) * [1.0, share, share, 1.0]
        sums = sums + layer_sums(outputs, saved.batch)
        gradients = model_backward(1.0, saved, params, statics, backend)
        if total is not None:
            before, own = leaves(total), leaves(gradients)
            gradients = with_leaves(gradients, {path: backend.added(before[path], own[path], UNROUNDED) for path in own})
        total = gradients
        backend.release(since, backend.mark(), total)
    assert total is not None, "at least one microbatch"
    reduced = {path: world.all_reduce(leaf) for path, leaf in leaves(total).items()}  # out@r = sum_s gradient@s
    return Losses(*[float(value) for value in world.all_reduce(losses)]), with_leaves(total, reduced), sums


def train_step(
    state: TrainState,
    batch: Batch,
    setup: Setup,
    learning_rate: float,
    backend: Backend,
    world: World = ONE,
    teacher_BLV: np.ndarray | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Return the state after one update, and what the step says of itself. With a teacher's logits the loss is the mixture that the setup says.

    The state that is passed is given away: its arrays may be overwritten. Everything follows from it, the batch and the setup, to the same bits.

    Raises
    ------
    InputError
        As `loss_and_gradients`.
    NonFiniteError
        Where the objective or a gradient is no number; the state has not been touched.
    """
    with backend.running():
        backend.begin()
        read = rounded_tree(state.params, setup.setting.read, backend)
        losses, gradients, sums = loss_and_gradients(read, batch, setup, state.step, backend, world, teacher_BLV)
        gradients = rounded_tree(gradients, setup.setting.weight_gradients, backend)
        params, tree, norm = update(
            state.params, gradients, state.optimizer, setup.optimizer, learning_rate, setup.setting, dialect_of(setup.config), backend
        )
    _, weight = whole_denominator(batch, setup, world)
    return TrainState(state.step + 1, params, tree), StepMetrics(losses, weight, norm, layer_metrics(sums, world))


def _evaluated(
    params: ModelParams, batch: Batch, setup: Setup, step: int, backend: Backend, world: World
) -> tuple[np.ndarray, StackOutputs, StackOutputs]:
    """Return logits_BLV and both stacks' outputs without dropout, with the capacity of evaluation."""
    (B, M), (_, L) = batch.encoder_tokens_BM.shape, batch.targets_BL.shape
    statics = model_statics(setup.config, B, M, L, train=False, setting=setup.setting)
    backend.begin()
    read = rounded_tree(params, setup.setting.read, backend)
    noise = draw_noise(setup.config, statics, Address(setup.seed, step, world.rank * B), (B, M, L), False, backend)
    encoder, _, decoder, _ = hidden_forward(batch, read, noise, statics, backend, recompute=True)
    return head_forward(decoder.out_BLD, read, statics, backend), encoder, decoder


def logits_of(params: ModelParams, batch: Batch, setup: Setup, step: int, backend: Backend, world: World = ONE) -> np.ndarray:
    """Return logits_BLV as an evaluation computes them, in memory of their own: what a teacher says."""
    with backend.running():
        return np.array(_evaluated(params, batch, setup, step, backend, world)[0])


def evaluate(params: ModelParams, batch: Batch, setup: Setup, step: int, backend: Backend, world: World = ONE) -> Evaluation:
    """Return one batch's sums without dropout, with the capacity of evaluation. `step` is for dialects whose noise never stops."""
    with backend.running():
        logits_BLV, encoder, decoder = _evaluated(params, batch, setup, step, backend, world)
        cross_entropy, _ = backend.cross_entropy_forward(logits_BLV, batch.targets_BL, batch.weight_BL, 1.0, 0.0, 0.0)
        hit_BL = np.argmax(logits_BLV, axis=-1) == batch.targets_BL
        outputs = ModelOutputs(logits_BLV, Losses(cross_entropy, 0.0, 0.0, cross_entropy), encoder, decoder)
        sums = layer_sums(outputs, batch)
    own = np.array([cross_entropy, batch.weight_BL.sum(dtype=np.float64), np.sum(hit_BL * batch.weight_BL, dtype=np.float64)])
    loss, weight, correct = (float(value) for value in world.all_reduce(own))
    return Evaluation(loss, weight, correct, layer_metrics(sums, world))
