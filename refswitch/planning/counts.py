# May import: standard library, refswitch.model_config, refswitch.errors.
"""Parameters and floating-point operations of a model, from its sizes alone, in Python's integers.

Paper: Table 9. The paper states its counts and no formula; `flops_per_sequence` is the formula that reproduces its numbers (to 0.7 percent), and
`full_flops_per_sequence` the usual one, which is 13 to 15 percent higher.
"""

from __future__ import annotations

from typing import NamedTuple

from refswitch.errors import InputError
from refswitch.model_config import ModelConfig


class Counts(NamedTuple):
    """Parameters by kind; `total` is the sum of the others."""

    embedding: int
    attention: int
    feed_forward: int  # of the dense layers
    experts: int
    router: int
    norms: int
    position_bias: int
    logits: int  # 0 where the logits use the embedding
    total: int


def attention_size(config: ModelConfig) -> int:
    """Return the weights of one attention: queries, keys, values and output. Paper: 2.1 and the T5 body."""
    return 4 * config.d_model * config.heads * config.d_kv


def feed_forward_size(config: ModelConfig) -> int:
    """Return the weights of one feed-forward network, or of one expert: two matrices, three where it is gated. Paper: 2.1."""
    return (3 if config.gated else 2) * config.d_model * config.d_ff


def parameter_count(config: ModelConfig) -> Counts:
    """Count the parameters by shape. Paper: Table 9.

    No biases. Each encoder layer has one attention and two norms, each decoder layer two and three, and each stack one more norm after its
    last layer and one position table. A sparse layer has every expert and a router in place of its feed-forward network.
    """
    layers = config.encoder_layers + config.decoder_layers
    sparse = len(config.encoder_sparse) + len(config.decoder_sparse)
    embedding = config.vocabulary * config.d_model
    attention = (config.encoder_layers + 2 * config.decoder_layers) * attention_size(config)
    feed_forward = (layers - sparse) * feed_forward_size(config)
    experts = sparse * config.experts * feed_forward_size(config)
    router = sparse * config.d_model * config.experts
    norms = (2 * config.encoder_layers + 1 + 3 * config.decoder_layers + 1) * config.d_model
    position_bias = 2 * config.position_buckets * config.heads
    logits = 0 if config.tied else embedding
    total = embedding + attention + feed_forward + experts + router + norms + position_bias + logits
    return Counts(embedding, attention, feed_forward, experts, router, norms, position_bias, logits, total)


def _attended_pairs(config: ModelConfig, encoder_tokens: int, decoder_tokens: int) -> int:
    """Return the pairs of query and key over all layers; the causal mask saves nothing."""
    if encoder_tokens < 0 or decoder_tokens < 0:
        raise InputError(f"tokens of a sequence: {encoder_tokens} and {decoder_tokens}, and must not be negative")
    n, m = encoder_tokens, decoder_tokens
    return config.encoder_layers * n * n + config.decoder_layers * (m * m + n * m)


def flops_per_sequence(config: ModelConfig, encoder_tokens: int = 512, decoder_tokens: int = 114) -> int:
    """Count the operations of one forward pass as the paper's numbers have it. Paper: Table 9.

    A multiplication with its addition is 2. Charged: the weights of attention and of one feed-forward network per layer and token (one expert in
    a sparse layer, at capacity factor 1), the logits of the decoder's tokens, and one product per attended pair. The keys and values of the
    cross-attention are charged at the decoder's length. Left out: the second product of attention, the router, norms, softmax, embedding.
    """
    n, m = encoder_tokens, decoder_tokens
    pairs = _attended_pairs(config, n, m)
    attention, feed_forward = attention_size(config), feed_forward_size(config)
    encoder = 2 * n * config.encoder_layers * (attention + feed_forward)
    decoder = 2 * m * config.decoder_layers * (2 * attention + feed_forward)
    logits = 2 * m * config.d_model * config.vocabulary
    return encoder + decoder + logits + 2 * config.heads * config.d_kv * pairs


def router_flops_per_sequence(config: ModelConfig, encoder_tokens: int = 512, decoder_tokens: int = 114) -> int:
    """Count the routers' products, which `flops_per_sequence` leaves out as the paper does: 80 of Switch-C's 974 billion. Paper: 2.1."""
    routed = encoder_tokens * len(config.encoder_sparse) + decoder_tokens * len(config.decoder_sparse)
    return 2 * routed * config.d_model * config.experts


def full_flops_per_sequence(config: ModelConfig, encoder_tokens: int = 512, decoder_tokens: int = 114) -> int:
    """Count the operations of one forward pass in full; the paper's numbers are not these. Paper: 2.1 and the T5 body.

    As `flops_per_sequence`, and besides: both products of attention (scores, and weights times values), the keys and values of the
    cross-attention at the encoder's length, and the routers.
    """
    second_product = 2 * config.heads * config.d_kv * _attended_pairs(config, encoder_tokens, decoder_tokens)
    cross_keys_values = (encoder_tokens - decoder_tokens) * config.decoder_layers * attention_size(config)  # half the weights, 2 each
    paper = flops_per_sequence(config, encoder_tokens, decoder_tokens)
    return paper + second_product + cross_keys_values + router_flops_per_sequence(config, encoder_tokens, decoder_tokens)
