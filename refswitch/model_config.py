# May import: standard library, refswitch.errors.
"""What a whole model is: sizes, placement of the sparse layers, and the form of each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """One model, in Hugging Face's and the paper's terms. Paper: table 9."""

    name: str
    vocabulary: int
    d_model: int
    d_kv: int
    heads: int
    d_ff: int
    encoder_layers: int
    decoder_layers: int
    encoder_sparse: tuple[int, ...]  # which feed-forward layers of the stack are sparse
    decoder_sparse: tuple[int, ...]
    experts: int  # 0 where no layer is sparse
    activation: Literal["relu", "gelu_tanh", "gelu_erf", "silu"]
    gated: bool
    tied: bool
    position_buckets: int
    max_distance: int
    norm_epsilon: float
    dropout: float
    expert_dropout: float
    dialect: str  # the record of spec/dialects that the sparse layers follow
