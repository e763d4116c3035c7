# May import: numpy, the standard library, the subject's files and record.
"""Mutants that compute the right thing in a format that they did not declare."""

import numpy as np

from .. import dispatch, forward
from ..products import round_bf16, sequential, terms, zeros
from ..record import GELU, mutant
from ..subject import GRADIENTS

BF16 = ("bfloat16",)
SINGLE = ("float32", "bfloat16")

# the router, which is to be float32


@mutant("S-PREC-1", "precision", "logits_GSE", source="PRC02 tensorflow/mesh@85bb9b9", profiles=SINGLE)
def logits_stored_in_bfloat16(tape):
    """The router's product comes in bfloat16 and is cast up after it."""
    return round_bf16(forward.logits(tape))


@mutant("S-PREC-1", "precision", "router_x_GSD", "noise", profiles=BF16)
def noised_x_stored_in_bfloat16(tape):
    """The router's input is rounded after the noise, which leaves it a handful of values."""
    return round_bf16(forward.perturb(tape))


@mutant("S-PREC-1", "precision", "probs_GSE", source="PRC01 facebookresearch/fairscale#668", profiles=SINGLE)
def softmax_in_float16(tape):
    """The softmax runs in float16."""
    half_GSE = tape.logits_GSE.astype(np.float16)
    weight_GSE = np.exp(half_GSE - half_GSE.max(-1, keepdims=True))
    return (weight_GSE / weight_GSE.sum(-1, keepdims=True)).astype(tape.dtype)


@mutant("S-PREC-1", "precision", "probs_GSE", source="RTE17 (transformers: probabilities cast to the input's format)", profiles=SINGLE)
def probs_stored_in_bfloat16(tape):
    """The probabilities are stored in bfloat16."""
    return round_bf16(forward.probs(tape))


@mutant("S-PREC-1", "precision", "gate_GS", profiles=SINGLE)
def gate_stored_in_bfloat16(tape):
    """The gate is cast to bfloat16 before it weighs the output."""
    return round_bf16(forward.gate(tape))


@mutant("S-PREC-1", "precision", "aux_loss", source="facts on Mesh-TF: losses cast to the activations' format", profiles=SINGLE)
def aux_loss_stored_in_bfloat16(tape):
    """The aux loss is cast to bfloat16."""
    return round_bf16(forward.aux_loss(tape))


@mutant("S-PREC-1", "precision", "logits_GSE", profiles=("float64",))
def router_in_float32(tape):
    """The router runs in float32, whatever the rest does."""
    return tape.times(tape.router_x_GSD.astype(np.float32), tape.w_router_DE.astype(np.float32)).astype(tape.dtype)


# the products


@mutant("S-PREC-1", "precision", "order", profiles=("float32",))
def products_in_tf32(a, b):
    """Matrix products round their operands to the 10 bits of TF32."""
    return np.matmul(round_tf32(a), round_tf32(b))


def round_tf32(v):
    """Keep 10 bits of mantissa, nearest."""
    bits = np.asarray(v).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@mutant("S-PREC-1", "precision", "order", profiles=SINGLE, source="PRC09 unslothai/unsloth-zoo#837")
def accumulated_in_bfloat16(a, b):
    """The accumulator is rounded to bfloat16 after every term."""
    total = zeros(a, b)
    for term in terms(a, b):
        total = round_bf16(total + term)
    return total


@mutant("S-PREC-1", "precision", "order", "K of 4 or more in a product", profiles=SINGLE)
def partial_sums_in_bfloat16(a, b):
    """A split-K kernel stores its four partial sums in bfloat16."""
    cuts = [a.shape[-1] * i // 4 for i in range(5)]
    parts = [round_bf16(sequential(a[..., lo:hi], b[..., lo:hi, :])) for lo, hi in zip(cuts, cuts[1:], strict=False)]
    return (parts[0] + parts[1]) + (parts[2] + parts[3])


@mutant("S-PREC-1", "precision", "outer", "dout, an expert with several tokens", "PRC08 databricks/megablocks@7b1b596", profiles=SINGLE)
def weight_gradients_reduced_in_bfloat16(tape, a_TD, b_TF):
    """Two ranks sum a weight's gradient over their tokens, and reduce the sums in bfloat16."""
    shares = [round_bf16(dispatch.gather_outer(tape, rows_TD, b_TF)) for rows_TD in halves(a_TD)]
    return round_bf16(shares[0] + shares[1])


def halves(a_TD):
    """Share the rows among two ranks, the other's being 0."""
    mine_T1 = np.arange(len(a_TD))[:, None] % 2 == 0
    return np.where(mine_T1, a_TD, 0), np.where(mine_T1, 0, a_TD)


# what is stored


@mutant("S-PREC-1", "precision", "store_hidden", profiles=BF16)
def hidden_stored_in_float16(v):
    """The hidden layer is stored in float16."""
    return v.astype(np.float16).astype(np.float32)


@mutant("S-PREC-1", "precision", "store_hidden", source="BFR01 stillwater-sc/universal#1133", profiles=BF16)
def hidden_truncated(v):
    """The hidden layer loses its low bits instead of being rounded."""
    return truncate_bf16(v)


@mutant("S-PREC-1", "precision", "store_out", source="BFR01 tenstorrent/tt-metal#19882", profiles=BF16)
def out_truncated(v):
    """The output loses its low bits instead of being rounded."""
    return truncate_bf16(v)


def truncate_bf16(v):
    """Cut the low 16 bits."""
    return (np.asarray(v).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@mutant(
    "S-PREC-1",
    "precision",
    "store_hidden",
    "hidden values halfway between two bfloat16 numbers, the even one below",
    "BFR03",
    profiles=BF16,
)
def hidden_rounded_half_away(v):
    """Halfway values of the hidden layer are rounded away from zero."""
    return half_away(v)


@mutant("S-PREC-1", "precision", "store_out", "outputs halfway between two bfloat16 numbers, the even one below", "BFR03", profiles=BF16)
def out_rounded_half_away(v):
    """Halfway values of the output are rounded away from zero."""
    return half_away(v)


def half_away(v):
    """Add half a unit and cut."""
    bits = np.asarray(v).view(np.uint32)
    return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


@mutant("S-PREC-1", "precision", "store_hidden", "a hidden value that rounds up to a power of two", "BFR03 (carry lost)", profiles=BF16)
def rounding_carry_lost(v):
    """Rounding up to a power of two clears the mantissa and leaves the exponent."""
    near, cut = round_bf16(v), truncate_bf16(v)
    exponents = [np.frexp(part)[1] for part in (near, cut)]
    return np.where(exponents[0] > exponents[1], near / 2, near)


@mutant("S-PREC-1", "precision", "store_out", source="PRC05 NVIDIA/Megatron-LM@20b395424d", profiles=BF16)
def out_not_rounded(v):
    """The output is promoted to float32."""
    return v


@mutant("S-PREC-1", "precision", "pre_in_GSF", "an activation that does not commute with rounding, as ReLU does", profiles=BF16, dialect=GELU)
def pre_activation_rounded(tape):
    """The pre-activation is stored in bfloat16, which is not declared."""
    return round_bf16(forward.pre_in(tape))


@mutant("S-PREC-1", "precision", "expert_out_GSD", profiles=BF16)
def expert_out_rounded(tape):
    """The expert's output is stored in bfloat16 before it is weighed, which is not declared."""
    return round_bf16(forward.expert_out(tape))


@mutant("S-PREC-1", "precision", "layer", "dout", profiles=BF16)
def gradients_rounded(layer):
    """The gradients are returned in bfloat16, which is not declared."""
    return lambda case: {name: round_bf16(value) if name in GRADIENTS else value for name, value in layer(case).items()}
