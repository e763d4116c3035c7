# May import: standard library, numpy, refswitch.reference, refswitch.spec_data, refswitch.model_config, refswitch.config, refswitch.errors.
"""From a model's config and a batch's shape to what the reference is called with: groups, capacity, coefficients; noise that is none."""

from __future__ import annotations

import functools

import numpy as np

from refswitch.config import Dialect
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.precision import PRECISIONS, Precision, layer_points
from refswitch.reference.block import RouterNoise, StackStatics
from refswitch.reference.capacity import capacity_in_eval, capacity_of, groups_of
from refswitch.reference.switch import SwitchParams
from refswitch.reference.transformer import BlockNoise, ModelParams, ModelStatics, StackNoise, StackParams
from refswitch.spec_data import load_dialect, parse_record


def dialect_of(config: ModelConfig) -> Dialect:
    """Return the dialect of the model's sparse layers."""
    return _dialect(config.dialect)


@functools.cache
def _dialect(text: str) -> Dialect:
    """Return a dialect from its text, read once: a trainer asks for it at every step."""
    return load_dialect(parse_record(text))


def _known(value: float | str, name: str, dialect: Dialect) -> float:
    if isinstance(value, str):
        raise InputError(f"dialect {dialect.name}: {name} is a setting of the run; say {name}=...")
    return float(value)


def stack_statics(
    config: ModelConfig, sequences: int, length: int, is_decoder: bool, train: bool, setting: Precision = PRECISIONS["float64"]
) -> StackStatics:
    """Return one stack's statics for a batch of `sequences` rows of `length` tokens; decoding calls it with length 1.

    Raises
    ------
    InputError
        Where the dialect cannot cut so many tokens into groups, or leaves a number to the run.
    """
    dialect = dialect_of(config)
    sparse, layers = (config.decoder_sparse, config.decoder_layers) if is_decoder else (config.encoder_sparse, config.encoder_layers)
    groups, capacity, aux_coef, z_coef = 1, 1, 0.0, 0.0
    if sparse:
        try:
            groups = groups_of(sequences, length, config.experts, dialect.group)
        except ValueError as error:
            raise InputError(f"model {config.name}: {error}") from None
        S, rule = sequences * length // groups, dialect.capacity
        capacity = capacity_of(S, config.experts, rule.cf_train, rule) if train else capacity_in_eval(S, config.experts, rule)
        counted = (train or dialect.aux.in_eval) and (len(sparse) < layers or dialect.layers.losses_if_all)
        if counted and dialect.aux.available:
            aux_coef = _known(dialect.aux.coef, "aux.coef", dialect)
        if counted and (train or dialect.z.when == "always"):
            z_coef = _known(dialect.z.coef, "z.coef", dialect) * (aux_coef if dialect.z.times_aux_coef else 1.0)
    return StackStatics(
        dialect=dialect,
        points=layer_points(dialect, setting),
        around=setting.around,
        activation=config.activation,
        norm_epsilon=config.norm_epsilon,
        max_distance=config.max_distance,
        causal=is_decoder,
        groups=groups,
        capacity=capacity,
        aux_coef=aux_coef,
        z_coef=z_coef,
    )


def model_statics(
    config: ModelConfig,
    sequences: int,
    encoder_length: int,
    decoder_length: int,
    train: bool,
    loss_denominator: str = "weights",
    setting: Precision = PRECISIONS["float64"],
) -> ModelStatics:
    """Return the model's statics, with plain cross-entropy: no label smoothing, no z-loss on the logits.

    Raises
    ------
    InputError
        As `stack_statics`.
    """
    encoder = stack_statics(config, sequences, encoder_length, is_decoder=False, train=train, setting=setting)
    decoder = stack_statics(config, sequences, decoder_length, is_decoder=True, train=train, setting=setting)
    return ModelStatics(encoder, decoder, loss_denominator, label_smoothing=0.0, logits_z_coef=0.0)


def _quiet_stack(stack: StackParams, statics: StackStatics, B: int, L: int, M: int) -> StackNoise:
    D, H = stack.norm_D.shape[0], stack.position_UH.shape[1]
    S = B * L // statics.groups
    arrival_GS = np.broadcast_to(np.arange(S), (statics.groups, S))
    blocks = []
    for block in stack.blocks:
        layer = block.feed_forward.feed_forward
        is_sparse = isinstance(layer, SwitchParams)
        E, F = (layer.experts.w_in_EDF.shape[0], layer.experts.w_in_EDF.shape[2]) if isinstance(layer, SwitchParams) else (0, layer.w_in_DF.shape[1])
        zeros_BLE = np.zeros((B, L, E))
        ones_BLD = np.ones((B, L, D))
        router = RouterNoise(ones_BLD, zeros_BLE, zeros_BLE, arrival_GS if is_sparse else np.zeros((0, 0), int))
        blocks.append(BlockNoise(np.ones((B, H, L, L)), ones_BLD, np.ones((B, H, L, M)), ones_BLD, router, np.ones((B, L, F)), ones_BLD))
    return StackNoise(np.ones((B, L, D)), tuple(blocks), np.ones((B, L, D)))


def no_noise(params: ModelParams, statics: ModelStatics, sequences: int, encoder_length: int, decoder_length: int) -> tuple[StackNoise, StackNoise]:
    """Return the noise of a pass without any, for encoder and decoder."""
    encoder = _quiet_stack(params.encoder, statics.encoder, sequences, encoder_length, encoder_length)
    return encoder, _quiet_stack(params.decoder, statics.decoder, sequences, decoder_length, encoder_length)
