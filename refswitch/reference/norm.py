# May import: standard library, numpy.
"""RMSNorm: T5's layer norm, which scales and neither shifts nor subtracts the mean.

Paper: the T5 body. Next: `position`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class NormSaved(NamedTuple):
    """What the norm's backward needs."""

    x_BLD: np.ndarray
    inverse_BL1: np.ndarray  # 1 / root mean square


def norm_forward(x_BLD: np.ndarray, scale_D: np.ndarray, epsilon: float) -> tuple[np.ndarray, NormSaved]:
    """Return x / sqrt(mean(x**2) + epsilon) * scale."""
    mean_BL1 = np.mean(np.square(x_BLD), axis=-1, keepdims=True)  # F1
    inverse_BL1 = 1.0 / np.sqrt(mean_BL1 + epsilon)  # F2
    normed_BLD = x_BLD * inverse_BL1  # F3
    return normed_BLD * scale_D, NormSaved(x_BLD, inverse_BL1)  # F4


def norm_backward(dout_BLD: np.ndarray, saved: NormSaved, scale_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return dx_BLD and dscale_D."""
    x_BLD, inverse_BL1 = saved
    dscale_D = np.sum(dout_BLD * x_BLD * inverse_BL1, axis=(0, 1))  # B4
    dnormed_BLD = dout_BLD * scale_D  # B4
    dinverse_BL1 = np.sum(dnormed_BLD * x_BLD, axis=-1, keepdims=True)  # B3
    dx_direct_BLD = dnormed_BLD * inverse_BL1  # B3
    dmean_BL1 = dinverse_BL1 * -0.5 * inverse_BL1**3  # B2
    dx_mean_BLD = dmean_BL1 * 2.0 * x_BLD / x_BLD.shape[-1]  # B1
    return dx_direct_BLD + dx_mean_BLD, dscale_D
