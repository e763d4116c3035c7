# May import: standard library, numpy, refswitch.backends, refswitch.reference (records), refswitch.config.
"""The sparse sub-layer: x + dropout(switch(norm(x))), its tokens cut in order into the routing groups.

Paper: figure 2. Spec: the chapter on the Switch layer. Next: `block`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.backends.protocol import UNROUNDED, Backend, Saved
from refswitch.reference.block import FeedForwardLayerParams, RouterNoise, StackStatics
from refswitch.reference.switch import Statics, SwitchInputs, SwitchOutputs, SwitchParams


class SwitchLayerSaved(NamedTuple):
    """What the sparse sub-layer's backward needs."""

    norm: Saved
    switch: Saved
    dropout_BLD: np.ndarray


def _grouped(x_BLx: np.ndarray, G: int) -> np.ndarray:
    """Cut the rows of a batch into groups; what is the same everywhere has no rows."""
    return x_BLx if x_BLx.size == 1 else x_BLx.reshape(G, -1, x_BLx.shape[-1])


def _layer_statics(statics: StackStatics) -> Statics:
    return Statics(statics.dialect, statics.points, statics.activation, statics.capacity)


def switch_layer_forward(
    x_BLD: np.ndarray,
    params: FeedForwardLayerParams,
    valid_BL: np.ndarray,
    noise: RouterNoise,
    hidden_BLF: np.ndarray,
    dropout_BLD: np.ndarray,
    statics: StackStatics,
    backend: Backend,
) -> tuple[np.ndarray, SwitchOutputs, SwitchLayerSaved]:
    """Return the residual stream after the layer, the layer's outputs, and what backward needs."""
    (norm_D, switch), G = params, statics.groups
    assert isinstance(switch, SwitchParams)
    normed_BLD, norm_saved = backend.norm_forward(x_BLD, norm_D, statics.norm_epsilon, statics.around)  # F1
    inputs = SwitchInputs(
        x_GSD=_grouped(normed_BLD, G),
        valid_GS=valid_BL.reshape(G, -1),
        noise_factor_GSD=_grouped(noise.factor_BLD, G),
        noise_term_GSE=_grouped(noise.term_BLE, G),
        select_noise_GSE=_grouped(noise.select_BLE, G),
        priority_GS=noise.priority_GS,
        hidden_mask_GSF=_grouped(hidden_BLF, G),
    )
    outputs, switch_saved = backend.switch_forward(inputs, switch, _layer_statics(statics))  # F2
    y_BLD = backend.residual(x_BLD, outputs.out_GSD.reshape(x_BLD.shape), dropout_BLD, statics.around.activations)  # F3  R11
    return y_BLD, outputs, SwitchLayerSaved(norm_saved, switch_saved, dropout_BLD)


def switch_layer_backward(
    dy_BLD: np.ndarray,
    daux: float,
    dz: float,
    saved: SwitchLayerSaved,
    params: FeedForwardLayerParams,
    statics: StackStatics,
    backend: Backend,
) -> tuple[np.ndarray, FeedForwardLayerParams]:
    """Return dx_BLD and the parameters' gradients; `daux` and `dz` are the gradients of the layer's two losses."""
    norm_D, switch = params
    assert isinstance(switch, SwitchParams)
    dout_BLD = backend.scaled(dy_BLD, saved.dropout_BLD, UNROUNDED)  # B3
    dnormed_GSD, dswitch = backend.switch_backward(_grouped(dout_BLD, statics.groups), daux, dz, saved.switch, switch, _layer_statics(statics))  # B2
    dx_normed_BLD, dnorm_D = backend.norm_backward(dnormed_GSD.reshape(dy_BLD.shape), saved.norm, norm_D, statics.around)  # B1
    return backend.added(dy_BLD, dx_normed_BLD, statics.around.gradients), FeedForwardLayerParams(dnorm_D, dswitch)
