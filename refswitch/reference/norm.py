# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""RMSNorm: T5's layer norm, which scales and neither shifts nor subtracts the mean.

Paper: the T5 body. Next: `position`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refswitch.config import ModelPoints
from refswitch.numbers.precision import round_to


class NormSaved(NamedTuple):
    """What the norm's backward needs."""

    x_BLD: np.ndarray
    inverse_BL1: np.ndarray  # 1 / root mean square


def norm_forward(x_BLD: np.ndarray, scale_D: np.ndarray, epsilon: float, points: ModelPoints) -> tuple[np.ndarray, NormSaved]:
    """Return x / sqrt(mean(x**2) + epsilon) * scale.

    Rounding: R11, R12.
    """
    mean_BL1 = np.mean(np.square(x_BLD), axis=-1, keepdims=True)  # F1
    inverse_BL1 = round_to(1.0 / np.sqrt(mean_BL1 + epsilon), points.statistics)  # F2  R12
    normed_BLD = x_BLD * inverse_BL1  # F3
    return round_to(normed_BLD * scale_D, points.activations), NormSaved(x_BLD, inverse_BL1)  # F4  R11


def norm_backward(dout_BLD: np.ndarray, saved: NormSaved, scale_D: np.ndarray, points: ModelPoints) -> tuple[np.ndarray, np.ndarray]:
    """Return dx_BLD and dscale_D.

    Rounding: R14.
    """
    x_BLD, inverse_BL1 = saved
    dscale_D = np.sum(dout_BLD * x_BLD * inverse_BL1, axis=(0, 1))  # B4
    dnormed_BLD = dout_BLD * scale_D  # B4
    dinverse_BL1 = np.sum(dnormed_BLD * x_BLD, axis=-1, keepdims=True)  # B3
    dx_direct_BLD = dnormed_BLD * inverse_BL1  # B3
    dmean_BL1 = dinverse_BL1 * -0.5 * inverse_BL1**3  # B2
    dx_mean_BLD = dmean_BL1 * 2.0 * x_BLD / x_BLD.shape[-1]  # B1
    return round_to(dx_direct_BLD + dx_mean_BLD, points.gradients), dscale_D  # R14
