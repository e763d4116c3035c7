# May import: numpy, the standard library, the subject's files and record.
"""Mutants of the computation: expert, gate, combine, drop."""

import numpy as np

from .. import forward
from ..activations import ACTIVATIONS, activation, sigmoid
from ..record import BIASED, GEGLU, GELU, GELU_TANH, SILU, mutant
from ..tape import Tape, at_expert
from .routing import clean_router

# expert: the activation


@mutant("S-EXPERT-1", "expert", "hidden_GSF", dialect=GELU)
def gelu_by_tanh(tape):
    """The tanh form stands in for the erf form."""
    return forward.hidden_by(tape, ACTIVATIONS["gelu_tanh"][0])


@mutant("S-EXPERT-1", "expert", "hidden_GSF", dialect=GELU_TANH)
def gelu_by_erf(tape):
    """The erf form stands in for the tanh form."""
    return forward.hidden_by(tape, ACTIVATIONS["gelu_erf"][0])


@mutant("S-EXPERT-1", "expert", "hidden_GSF", dialect=GELU)
def gelu_by_sigmoid(tape):
    """GELU is approximated by v * sigmoid(1.702 v)."""
    return forward.hidden_by(tape, lambda v: v * sigmoid(v.dtype.type(1.702) * v))


@mutant("S-EXPERT-1", "expert", "hidden_GSF", dialect=SILU)
def silu_with_gelu_slope(tape):
    """The 1.702 of the GELU approximation is left in SiLU."""
    return forward.hidden_by(tape, lambda v: v * sigmoid(v.dtype.type(1.702) * v))


@mutant("S-EXPERT-1", "expert", "hidden_GSF")
def relu_leaks(tape):
    """The negative side keeps a slope of 0.01."""
    return forward.hidden_by(tape, lambda v: np.where(v > 0, v, v / 100))


@mutant("S-EXPERT-1", "expert", "hidden_GSF", "gated experts", "CKP04 charlie12345/ROCmFPX#49", dialect=GEGLU)
def gated_halves_swapped(tape):
    """The activation is applied to x w_in instead of x w_gate."""
    return forward.hidden_by(Tape(**vars(tape) | {"pre_in_GSF": tape.pre_gate_GSF, "pre_gate_GSF": tape.pre_in_GSF}), activation(tape))


# expert: the products


@mutant("S-EXPERT-1", "expert", "pre_in_GSF", "D = F", "CKP03 huggingface/transformers#47031")
def expert_transposed_when_square(tape):
    """The layout of w_in is guessed from its shape, wrongly where it is square."""
    _, D, F = tape.w_in_EDF.shape
    return with_w_in(tape, tape.w_in_EDF.swapaxes(1, 2)) if D == F else forward.pre_in(tape)


def with_w_in(tape, w_in_EDF):
    """Compute x w_in + b_in with other weights."""
    return forward.affine(tape, tape.expert_x_GSD, w_in_EDF, tape.b_in_EF)


@mutant(
    "S-EXPERT-1",
    "expert",
    "pre_in_GSF",
    "E * D * F > 32768, a token on a late expert",
    "EDG06 vllm-project/vllm#34507 (int32, scaled down)",
)
def weight_offset_in_int16(tape):
    """The offset of an expert's matrix, expert * D * F, wraps at 32768."""
    E, D, F = tape.w_in_EDF.shape
    offset_E = (np.arange(E) * D * F).astype(np.int16).astype(np.int64)
    return with_w_in(tape, np.take(tape.w_in_EDF, offset_E[:, None] + np.arange(D * F), mode="wrap").reshape(E, D, F))


@mutant("S-EXPERT-1", "expert", "pre_in_GSF", "D not a multiple of 8", "DIS17 AI-Hypercomputer/maxtext#1183")
def input_tail_not_summed(tape):
    """The columns of x after the last whole tile of 8 are left out of the hidden layer."""
    tail = np.arange(tape.w_in_EDF.shape[1]) >= tape.w_in_EDF.shape[1] // 8 * 8
    return with_w_in(tape, np.where(tail[:, None], 0, tape.w_in_EDF))


@mutant("S-EXPERT-1", "expert", "hidden_GSF", "F > 32", "DIS12 databricks/megablocks@e74bc20")
def hidden_columns_past_32_lost(tape):
    """Only the first 32 columns of the hidden layer are written."""
    return np.where(np.arange(tape.w_in_EDF.shape[-1]) < 32, forward.hidden(tape), 0)


@mutant("S-EXPERT-2", "expert", "expert_out_GSD", "F not a multiple of 8", "DIS17 AI-Hypercomputer/maxtext#1183")
def hidden_tail_not_summed(tape):
    """The hidden columns after the last whole tile of 8 are left out of the output."""
    F = tape.w_in_EDF.shape[-1]
    return forward.expert_out(Tape(**vars(tape) | {"hidden_GSF": np.where(np.arange(F) < F // 8 * 8, tape.hidden_GSF, 0)}))


@mutant("S-EXPERT-1", "expert", "pre_in_GSF", "expert bias", dialect=BIASED)
def input_bias_ignored(tape):
    """b_in is left out."""
    return forward.affine(tape, tape.expert_x_GSD, tape.w_in_EDF, None)


@mutant("S-EXPERT-1", "expert", "pre_in_GSF", "expert bias", dialect=BIASED)
def input_bias_of_first_expert(tape):
    """b_in of expert 0 serves all experts."""
    product_GSF = forward.affine(tape, tape.expert_x_GSD, tape.w_in_EDF, None)
    return product_GSF if tape.b_in_EF is None else product_GSF + tape.b_in_EF[0]


@mutant("S-EXPERT-2", "expert", "expert_out_GSD", "expert bias", "CMB04 pytorch/torchtitan#4245", dialect=BIASED)
def output_bias_added_twice(tape):
    """b_out is added on each of two shards before they are summed."""
    once_GSD = forward.expert_out(tape)
    return once_GSD if tape.b_out_ED is None else once_GSD + tape.b_out_ED[tape.expert_GS]


@mutant("S-EXPERT-1", "expert", "hidden_GSF", "expert dropout", "RNG04 tensorflow/mesh@7ba6fa0")
def expert_dropout_ignored(tape):
    """The mask of the expert dropout is not applied."""
    return forward.hidden(Tape(**vars(tape) | {"hidden_mask_GSF": None}))


@mutant("S-EXPERT-1", "expert", "hidden_GSF", "expert dropout with a factor other than 0 and 1")
def expert_dropout_not_scaled(tape):
    """The mask is read as true or false, without its scale."""
    mask_GSF = tape.hidden_mask_GSF
    boolean_GSF = None if mask_GSF is None else (mask_GSF != 0).astype(tape.dtype)
    return forward.hidden(Tape(**vars(tape) | {"hidden_mask_GSF": boolean_GSF}))


# gate


@mutant("S-GATE-1", "gate", "gate_GS", "E > 1", "GRD01 NVIDIA/Megatron-LM#894, GRD03 jingyaogong/minimind#858")
def gate_is_one(tape):
    """The softmax runs over the selected logit alone."""
    return np.ones_like(tape.probs_GSE[..., 0])


@mutant("S-GATE-1", "gate", "gate_GS", source="RTE01 laekov/fastmoe@a6ca7f6")
def gate_is_logit(tape):
    """The raw logit weighs the expert."""
    return at_expert(tape.logits_GSE, tape.expert_GS)


@mutant("S-GATE-1", "gate", "gate_GS", "S > 1", "RTE04 databricks/megablocks#87")
def gate_normalised_over_tokens(tape):
    """Normalising over the choices, of which there is one, normalises over the tokens."""
    return forward.gate(tape) / forward.gate(tape).sum(1, keepdims=True)


@mutant("S-GATE-1", "gate", "gate_GS", "S > 1", "CMB07 vllm-project/vllm-xpu-kernels#66")
def gate_of_next_token(tape):
    """The gate is read one token late."""
    return np.roll(forward.gate(tape), -1, axis=1)


@mutant("S-GATE-1", "gate", "gate_GS", "noise")
def gate_from_clean_router(tape):
    """The choice is made with noise, the gate is taken without."""
    return at_expert(clean_router(tape).probs_GSE, tape.expert_GS)


@mutant("S-GATE-1", "gate", "gate_GS")
def gate_two_permille_high(tape):
    """The gate is 0.2 % too large."""
    return forward.gate(tape) * tape.dtype(1.002)


# combine


@mutant("S-COMBINE-1", "combine", "combined_GSD", "E > 1", "T10 (the Keras example: once on the input, once on the output)")
def gate_applied_twice(tape):
    """The output is weighed by the gate's square."""
    return tape.gate_GS[..., None] * forward.combine(tape)


@mutant("S-COMBINE-1", "combine", "combined_GSD", "E > 1", "RTE08 flashinfer-ai/flashinfer#2889")
def gate_not_applied(tape):
    """The expert's output is passed on as it is."""
    return tape.expert_out_GSD


@mutant("S-EXPERT-1", "expert", "expert_x_GSD", "E > 1, an activation that is not homogeneous, or bias", "T10 (the Keras example)", dialect=GELU)
def gate_on_input_too(tape):
    """The gate multiplies the expert's input as well as its output."""
    return tape.gate_GS[..., None] * tape.x_GSD


@mutant("S-COMBINE-1", "combine", "combined_GSD", "expert bias, E > 1", "CMB05 NVIDIA/Megatron-LM@e4ea85970b", dialect=BIASED)
def gate_before_output_bias(tape):
    """The gate was moved before w_out, so that b_out is added unweighed."""
    weighed_GSF = tape.gate_GS[..., None] * tape.hidden_GSF
    return forward.affine(tape, weighed_GSF, tape.w_out_EFD, tape.b_out_ED)


@mutant(
    "S-COMBINE-1",
    "combine",
    "combined_GSD",
    "tokens that are not sorted by expert",
    "CMB07 vllm-project/vllm-xpu-kernels#66",
    dispatch="sorted",
)
def gates_in_token_order_rows_in_expert_order(tape):
    """The rows are weighed in the experts' order by gates in the tokens' order."""
    gate_T = tape.gate_GS.ravel().copy()
    gate_T[tape.plan.tokens] = gate_T[np.sort(tape.plan.tokens)]
    return gate_T.reshape(tape.G, tape.S, 1) * tape.expert_out_GSD


@mutant("S-COMBINE-1", "combine", "combined_GSD")
def residual_inside(tape):
    """The layer adds its input, which the caller adds again."""
    return tape.x_GSD + forward.combine(tape)


# drop


def where_dropped(tape, row_GSD):
    """Put a row where the dropped tokens' 0 should be."""
    fate_GSD = np.where(tape.kept_GS[..., None], tape.combined_GSD, row_GSD)
    return tape.numerics.store_out(np.where(tape.valid_GS[..., None], fate_GSD, 0))


@mutant("S-DROP-1", "drop", "out_GSD", "overflow", "CMB01 huggingface/transformers#37017")
def dropped_gets_gated_x(tape):
    """A dropped token gets gate * x."""
    return where_dropped(tape, tape.gate_GS[..., None] * tape.x_GSD)


@mutant("S-DROP-1", "drop", "out_GSD", "overflow")
def dropped_gets_x(tape):
    """A dropped token gets x, which the residual outside adds again."""
    return where_dropped(tape, tape.x_GSD)


@mutant("S-DROP-1", "drop", "out_GSD", "overflow, expert bias", dialect=BIASED)
def dropped_gets_bias(tape):
    """A dropped token gets gate * b_out: its row of the buffer was 0 before the bias was added."""
    if tape.b_out_ED is None:
        return forward.output(tape)
    return where_dropped(tape, tape.gate_GS[..., None] * tape.b_out_ED[tape.expert_GS])


@mutant("S-DROP-1", "drop", "out_GSD", "overflow")
def dropped_repeats_row_before(tape):
    """A dropped token's row is not written: it holds the row before it."""
    last_kept_GS = np.maximum.accumulate(np.where(tape.kept_GS, np.arange(tape.S), 0), axis=1)
    return where_dropped(tape, np.take_along_axis(forward.output(tape), last_kept_GS[..., None], 1))
