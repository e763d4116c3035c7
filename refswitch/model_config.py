# May import: standard library, refswitch.errors.
"""The sizes of a whole encoder-decoder as a frozen record, and the paper's models by name.

`PRESETS` holds every row of the paper's Table 9 as printed (`table9_...`), the configurations that reproduce the printed sizes (those of the
released checkpoints, which the rows of Table 9 contradict for Large, XXL and C), and two tiny models. Presets whose sizes the paper does not
state say `customized`. Paper: Table 9, Table 1, 5.6.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal, get_args

from refswitch.errors import InputError

Activation = Literal["relu", "gelu_tanh", "gelu_erf", "silu"]
SIZES = ("vocabulary", "d_model", "d_kv", "heads", "d_ff", "encoder_layers", "decoder_layers", "position_buckets", "max_distance", "norm_epsilon")


@dataclass(frozen=True)
class ModelConfig:
    """One encoder-decoder: its sizes, which of its feed-forward layers are sparse, and the dialect of those."""

    name: str
    vocabulary: int
    d_model: int
    d_kv: int
    heads: int
    d_ff: int
    encoder_layers: int
    decoder_layers: int
    encoder_sparse: tuple[int, ...]  # indices of the sparse feed-forward layers
    decoder_sparse: tuple[int, ...]
    experts: int  # 0 where no layer is sparse
    activation: Activation
    gated: bool
    tied: bool  # the logits use the embedding
    position_buckets: int
    max_distance: int
    norm_epsilon: float
    dropout: float
    expert_dropout: float
    dialect: str  # record of spec/dialects that its sparse layers follow

    def __post_init__(self) -> None:
        """Refuse sizes that describe no model."""
        for size in SIZES:
            if not getattr(self, size) > 0:
                raise InputError(f"model {self.name}: {size} is {getattr(self, size)}, and must be positive")
        if self.position_buckets % 4:
            raise InputError(f"model {self.name}: position_buckets is {self.position_buckets}, and must be a multiple of 4")
        if self.max_distance <= self.position_buckets // 2:
            raise InputError(f"model {self.name}: max_distance is {self.max_distance}, and must exceed half of position_buckets")
        if self.activation not in get_args(Activation):
            raise InputError(f"model {self.name}: activation is {self.activation}, and must be one of {', '.join(get_args(Activation))}")
        for rate in ("dropout", "expert_dropout"):
            if not 0.0 <= getattr(self, rate) < 1.0:
                raise InputError(f"model {self.name}: {rate} is {getattr(self, rate)}, and must be in [0, 1)")
        for stack, sparse, layers in (("encoder", self.encoder_sparse, self.encoder_layers), ("decoder", self.decoder_sparse, self.decoder_layers)):
            if any(not 0 <= layer < layers for layer in sparse):
                raise InputError(f"model {self.name}: {stack}_sparse is {sparse}, and must lie in 0 ... {layers - 1}")
            if list(sparse) != sorted(set(sparse)):
                raise InputError(f"model {self.name}: {stack}_sparse is {sparse}, and must increase")
        any_sparse = bool(self.encoder_sparse or self.decoder_sparse)
        if self.experts < 0 or any_sparse != (self.experts > 0):
            raise InputError(f"model {self.name}: experts is {self.experts}, and must be {'positive' if any_sparse else '0, as no layer is sparse'}")


def sparse_layers(layers: int, step: int, offset: int) -> tuple[int, ...]:
    """Return the layers i with `i % step == offset`: the released models have the second of each pair, step 2 and offset 1. Paper: 2.2."""
    if step < 1 or not 0 <= offset < step:
        raise InputError(f"sparse layers: step {step} and offset {offset} select none; step must be positive and offset in 0 ... step - 1")
    return tuple(i for i in range(layers) if i % step == offset)


def _with_experts(name: str, dense: ModelConfig, experts: int, step: int = 2) -> ModelConfig:
    """Return the model with every `step`-th feed-forward layer of both stacks sparse, the last of each `step`, without dropout."""
    encoder, decoder = (sparse_layers(layers, step, step - 1) for layers in (dense.encoder_layers, dense.decoder_layers))
    return replace(dense, name=name, encoder_sparse=encoder, decoder_sparse=decoder, experts=experts, dropout=0.0)


_T5_BASE = ModelConfig(
    name="t5_base",
    vocabulary=32128,  # 32,000 pieces and 100 sentinels, padded to a multiple of 128
    d_model=768,
    d_kv=64,
    heads=12,
    d_ff=3072,
    encoder_layers=12,
    decoder_layers=12,
    encoder_sparse=(),
    decoder_sparse=(),
    experts=0,
    activation="relu",
    gated=False,
    tied=True,
    position_buckets=32,
    max_distance=128,
    norm_epsilon=1e-6,
    dropout=0.1,  # T5 1.0; T5 1.1 and the released Switch models pre-train without
    expert_dropout=0.0,
    dialect="flax_masked_switch_base",
)
_T5_LARGE = replace(_T5_BASE, name="t5_large", d_model=1024, heads=16, d_ff=4096, encoder_layers=24, decoder_layers=24)
_T5_1_1_XXL = replace(
    _T5_LARGE, name="t5_1_1_xxl", d_model=4096, heads=64, d_ff=10240, activation="gelu_tanh", gated=True, tied=False, dropout=0.0
)  # fmt: skip
_DENSE_C = replace(_T5_BASE, d_model=2080, heads=30, d_ff=6144, encoder_layers=15, decoder_layers=15, tied=False)
_SWITCH_C = _with_experts("switch_c", _DENSE_C, 2048, step=1)

# Table 9 is silent on tying and dropout; its GEGLU rows are read as T5 1.1: untied, pre-trained without dropout.
_TABLE9_BASE = replace(_T5_BASE, name="table9_t5_base", d_ff=2048, activation="gelu_tanh", gated=True, tied=False, dropout=0.0)
_TABLE9_LARGE = replace(_T5_LARGE, name="table9_t5_large", d_ff=2816, activation="gelu_tanh", gated=True, tied=False, dropout=0.0)
_MT5_BASE = replace(_TABLE9_BASE, name="mt5_base", vocabulary=250112)

# customized: the caption of Table 1 names only d_model 896 and more heads; 14 = 896 / 64, d_ff stays
_SWITCH_BASE_PLUS = _with_experts("switch_base_plus", replace(_T5_BASE, d_model=896, heads=14), 128)

# customized: small enough for finite differences
_TINY = replace(
    _T5_BASE, name="tiny_dense", vocabulary=32, d_model=8, d_kv=4, heads=2, d_ff=16, encoder_layers=2, decoder_layers=2,
    position_buckets=8, max_distance=16, dropout=0.0,
)  # fmt: skip

# customized: bytes as tokens (256 and three special ones, padded to a multiple of 128), small enough to look at
_BYTE_TINY = replace(
    _TINY, name="byte_tiny", vocabulary=384, d_model=32, d_kv=8, heads=4, d_ff=64, position_buckets=32, max_distance=128, dialect="mesh_tensorflow"
)

PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        _TABLE9_BASE,
        _TABLE9_LARGE,
        replace(_T5_1_1_XXL, name="table9_t5_xxl"),
        _with_experts("table9_switch_base", _TABLE9_BASE, 128),
        _with_experts("table9_switch_large", _TABLE9_LARGE, 128),
        _with_experts("table9_switch_xxl", _T5_1_1_XXL, 64),  # 201B; the printed 395B needs 128 experts
        replace(_SWITCH_C, name="table9_switch_c", heads=32),
        _T5_BASE,
        _T5_LARGE,
        _T5_1_1_XXL,
        *(_with_experts(f"switch_base_{experts}", _T5_BASE, experts) for experts in (2, 4, 8, 16, 32, 64, 128, 256)),
        _SWITCH_BASE_PLUS,
        _with_experts("switch_large_128", _T5_LARGE, 128),
        _with_experts("switch_xxl_64", _T5_1_1_XXL, 64),
        _with_experts("switch_xxl_128", _T5_1_1_XXL, 128),
        _SWITCH_C,
        replace(_SWITCH_C, name="switch_c_32_heads", heads=32),
        _MT5_BASE,
        _with_experts("mswitch_base_128", _MT5_BASE, 128),  # customized: the paper does not state the number of experts
        _TINY,
        _with_experts("tiny_switch", _TINY, 4),
        _with_experts("byte_tiny", _BYTE_TINY, 8, step=1),
    )
}


def preset(name: str) -> ModelConfig:
    """Return the named preset; an unknown name is an `InputError` that names the close ones."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
    raise InputError(f"unknown model {name}" + (f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(PRESETS)}"))
