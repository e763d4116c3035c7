# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Embedding: a token's row of the table, and the table's other use as the logits' matrix.

Paper: the T5 body; v1.0 ties the logits to the table and scales them by D**-0.5, v1.1 has a matrix of its own. Next: `norm`.
"""

from __future__ import annotations

import numpy as np

from refswitch.config import ModelPoints
from refswitch.numbers.precision import round_to


def embed_forward(tokens_BL: np.ndarray, embedding_VD: np.ndarray) -> np.ndarray:
    """Return x_BLD, the row of each token."""
    return embedding_VD[tokens_BL]  # F1


def embed_backward(dx_BLD: np.ndarray, tokens_BL: np.ndarray, V: int) -> np.ndarray:
    """Return dembedding_VD: a token that occurs twice adds twice."""
    dembedding_VD = np.zeros((V, dx_BLD.shape[-1]))
    np.add.at(dembedding_VD, tokens_BL, dx_BLD)  # B1
    return dembedding_VD


def tied_logits_forward(x_BLD: np.ndarray, embedding_VD: np.ndarray, points: ModelPoints) -> np.ndarray:
    """Return logits_BLV, each token's product with every row of the table, times D**-0.5 (T5 v1.0).

    Rounding: R11, R13.
    """
    scaled_BLD = round_to(x_BLD * x_BLD.shape[-1] ** -0.5, points.activations)  # F1  R11
    return round_to(scaled_BLD @ embedding_VD.T, points.logits)  # F2  R13


def tied_logits_backward(dlogits_BLV: np.ndarray, x_BLD: np.ndarray, embedding_VD: np.ndarray, points: ModelPoints) -> tuple[np.ndarray, np.ndarray]:
    """Return dx_BLD and dembedding_VD.

    Rounding: R11, R14.
    """
    scale = x_BLD.shape[-1] ** -0.5
    dscaled_BLD = round_to(dlogits_BLV @ embedding_VD, points.gradients)  # B2  R14
    scaled_BLD = round_to(x_BLD * scale, points.activations)  # R11, as the forward pass read it
    dembedding_VD = np.einsum("blv,bld->vd", dlogits_BLV, scaled_BLD)  # B2
    return round_to(dscaled_BLD * scale, points.gradients), dembedding_VD  # B1  R14


def logits_forward(x_BLD: np.ndarray, w_logits_DV: np.ndarray, points: ModelPoints) -> np.ndarray:
    """Return logits_BLV by a matrix of its own, unscaled (T5 v1.1).

    Rounding: R13.
    """
    return round_to(x_BLD @ w_logits_DV, points.logits)  # F1  R13


def logits_backward(dlogits_BLV: np.ndarray, x_BLD: np.ndarray, w_logits_DV: np.ndarray, points: ModelPoints) -> tuple[np.ndarray, np.ndarray]:
    """Return dx_BLD and dw_logits_DV.

    Rounding: R14.
    """
    return round_to(dlogits_BLV @ w_logits_DV.T, points.gradients), np.einsum("bld,blv->dv", x_BLD, dlogits_BLV)  # B1
