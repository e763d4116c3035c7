# May import: standard library, refswitch.spec_data, refswitch.model_config, refswitch.errors.
"""Hugging Face's `config.json` of a Switch or T5 model, read as a `ModelConfig`; what it leaves out is its class's default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refswitch.errors import InputError
from refswitch.model_config import Activation, ModelConfig
from refswitch.spec_data import load_dialect, parse_record

# what each class computes where its file is silent
COMMON: dict[str, Any] = {
    "vocab_size": 32128, "d_kv": 64, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "switch_transformers": COMMON | {
        "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "num_experts": 8, "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 3, "dense_act_fn": "relu", "tie_word_embeddings": True, "expert_capacity": 64,
        "router_aux_loss_coef": 0.001, "router_z_loss_coef": 0.001, "router_jitter_noise": 0.01,
    },
    "t5": COMMON | {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu", "tie_word_embeddings": True},
    "mt5": COMMON | {"vocab_size": 250112, "d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
}  # fmt: skip
ACTIVATIONS: dict[str, tuple[Activation, bool]] = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu_tanh", True),  # its "gelu" is the tanh form where gated
    "gated-silu": ("silu", True),
    "gelu": ("gelu_erf", False),
    "gelu_new": ("gelu_tanh", False),
    "silu": ("silu", False),
}


DENSE_DIALECT = "hf_ge_5_18"  # of a model without sparse layers: never looked at


def dialect_text(capacity: int, aux_coef: float, z_coef: float, jitter: float) -> str:
    """Return the dialect that a Switch config describes: what the class computes, with the numbers that the file sets."""
    return f"hf_ge_5_18,capacity.constant={capacity},aux.coef={aux_coef!r},z.coef={z_coef!r},noise.eps={jitter!r}"


def sparse_of(layers: int, sparse: int) -> tuple[int, ...]:
    """Return which layers Hugging Face makes sparse: every step-th from the second on, where step = layers // sparse.

    With `sparse` = 0 its step is the number of layers, which is meant to give none and gives the second layer.
    """
    step = layers // sparse if sparse > 0 else layers
    return tuple(i for i in range(layers) if step > 0 and (i % step == 1 or step == 1))


def config_from(content: dict[str, Any], name: str) -> ModelConfig:
    """Return the model that a config describes.

    Raises
    ------
    InputError
        Where it is of another kind, or a field has a value that refswitch does not know.
    """
    kind = content.get("model_type")
    if kind not in DEFAULTS:
        raise InputError(f"config {name}: model_type is {kind!r}, and should be one of {', '.join(DEFAULTS)}")
    read = DEFAULTS[kind] | {key: value for key, value in content.items() if value is not None}
    for key in (
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
    ):
        if isinstance(read[key], bool) or not isinstance(read[key], int):
            raise InputError(f"config {name}: {key} is {read[key]!r}, and should be an integer")
    act = read["dense_act_fn" if kind == "switch_transformers" else "feed_forward_proj"]
    if act not in ACTIVATIONS:
        raise InputError(f"config {name}: the activation is {act!r}, and should be one of {', '.join(ACTIVATIONS)}")
    if read.get("router_bias"):
        raise InputError(f"config {name}: router_bias is set, and a router's bias cannot be read yet")
    activation, is_gated = ACTIVATIONS[act]
    encoder_layers, decoder_layers = read["num_layers"], read.get("num_decoder_layers", read["num_layers"])
    is_switch = kind == "switch_transformers"
    encoder_sparse = sparse_of(encoder_layers, read["num_sparse_encoder_layers"]) if is_switch else ()
    decoder_sparse = sparse_of(decoder_layers, read["num_sparse_decoder_layers"]) if is_switch else ()
    numbers = [read[key] for key in ("expert_capacity", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise")] if is_switch else []
    if any(isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0 for number in numbers):
        raise InputError(f"config {name}: expert_capacity and the router's coefficients and jitter should be numbers that are not negative")
    dialect = dialect_text(int(numbers[0]), *map(float, numbers[1:])) if is_switch else DENSE_DIALECT
    # transformers 5 writes tie_word_embeddings=true for every T5 and says with scale_decoder_outputs what the model computes; mT5 never ties
    tied = bool(read.get("scale_decoder_outputs", read.get("tie_word_embeddings"))) and kind != "mt5"
    return ModelConfig(
        name=name, vocabulary=read["vocab_size"], d_model=read["d_model"], d_kv=read["d_kv"], heads=read["num_heads"], d_ff=read["d_ff"],
        encoder_layers=encoder_layers, decoder_layers=decoder_layers, encoder_sparse=encoder_sparse, decoder_sparse=decoder_sparse,
        experts=read["num_experts"] if is_switch and (encoder_sparse or decoder_sparse) else 0,
        activation=activation, gated=is_gated, tied=tied, position_buckets=read["relative_attention_num_buckets"],
        max_distance=read["relative_attention_max_distance"], norm_epsilon=read["layer_norm_epsilon"], dropout=read["dropout_rate"],
        expert_dropout=read["dropout_rate"] if is_switch else 0.0, dialect=dialect,
    )  # fmt: skip


def content_of(config: ModelConfig) -> dict[str, Any]:
    """Return the content of `config.json` for a model: a Switch where it has sparse layers, else a T5.

    A Switch whose dialect is not Hugging Face's is written with the numbers that its class takes by default: there no rule of capacity can be said.

    Raises
    ------
    InputError
        Where no such class computes this model.
    """
    forms = {value: key for key, value in ACTIVATIONS.items()}
    form = forms.get((config.activation, config.gated))
    if form is None or (config.experts and config.gated):
        kind = "gated " * config.gated + config.activation
        raise InputError(f"model {config.name}: Hugging Face has no {'Switch' if config.experts else 'T5'} with experts or layers of {kind}")
    content: dict[str, Any] = {
        "vocab_size": config.vocabulary, "d_model": config.d_model, "d_kv": config.d_kv, "d_ff": config.d_ff, "num_heads": config.heads,
        "num_layers": config.encoder_layers, "num_decoder_layers": config.decoder_layers, "dropout_rate": config.dropout,
        "relative_attention_num_buckets": config.position_buckets, "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_epsilon, "tie_word_embeddings": config.tied, "is_encoder_decoder": True, "decoder_start_token_id": 0,
        "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if not config.experts:
        return {
            "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "feed_forward_proj": form, "scale_decoder_outputs": config.tied,
        } | content  # fmt: skip
    counts = []
    for stack, layers, sparse in (
        ("encoder", config.encoder_layers, config.encoder_sparse),
        ("decoder", config.decoder_layers, config.decoder_sparse),
    ):
        count = next((number for number in (*range(1, layers + 1), 0) if sparse_of(layers, number) == sparse), None)
        if count is None:
            raise InputError(f"model {config.name}: Hugging Face cannot place sparse layers {sparse} in the {stack}, of {layers} layers")
        counts.append(count)
    dialect = load_dialect(parse_record(config.dialect))
    content |= {"num_experts": config.experts, "num_sparse_encoder_layers": counts[0], "num_sparse_decoder_layers": counts[1]}
    if dialect.capacity.expr == "const":
        content |= {"expert_capacity": dialect.capacity.constant, "router_jitter_noise": dialect.noise.eps}
        content |= {"router_aux_loss_coef": dialect.aux.coef, "router_z_loss_coef": dialect.z.coef}
    return {"architectures": ["SwitchTransformersForConditionalGeneration"], "model_type": "switch_transformers", "dense_act_fn": form} | content


def read_content(folder: Path) -> dict[str, Any]:
    """Return the content of `config.json` of a folder.

    Raises
    ------
    InputError
        Where there is no such file or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"config {path}: is not JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"config {path}: should be a JSON object")
    return content


def read_config(folder: Path) -> ModelConfig:
    """Return the model that `config.json` of a folder describes.

    Raises
    ------
    InputError
        As `config_from` and `read_content`.
    """
    return config_from(read_content(folder), folder.name)


def shares_table(content: dict[str, Any]) -> bool:
    """Whether a file may leave out the logits' matrix of an untied model: transformers 5 then takes the embedding for it, unscaled."""
    return bool(content.get("tie_word_embeddings")) and content.get("model_type") in ("t5", "mt5")
