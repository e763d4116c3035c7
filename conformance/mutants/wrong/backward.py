# May import: numpy, the standard library, the subject's files and record.
"""Mutants whose forward pass is right: only gradients are wrong."""

import numpy as np

from .. import forward, gradients
from ..activations import ACTIVATIONS
from ..record import BIASED, GEGLU, GELU, ROUTER_BIAS, mutant
from ..tape import Tape, bias_gradient, by_expert, flat, one_hot, sum_by_expert

# the router's gradient through the gate


@mutant("S-BACK-2", "backward", "dgate_GS", "E > 1, dout", "GRD06 NVIDIA-NeMo/Automodel#2995")
def gate_detached(tape):
    """The gate is a constant: the router learns from its losses alone."""
    return np.zeros_like(tape.gate_GS)


@mutant("S-BACK-2", "backward", "dgate_GS", "a kept token after a dropped one, dout", "GRD05 microsoft/tutel#127")
def gate_gradient_stops_at_first_drop(tape):
    """The loop over tokens returns at the first dropped one instead of going on."""
    before_drop_GS = np.cumsum(~tape.kept_GS & tape.routed_GS, axis=1) == 0
    return np.where(before_drop_GS, gradients.dgate(tape), 0)


@mutant("S-BACK-2", "backward", "dgate_GS", "E > 1, dout")
def gate_gradient_from_weighed_output(tape):
    """dout is projected on the output with the gate in it."""
    return gradients.dgate(tape) * tape.gate_GS


@mutant("S-BACK-2", "backward", "dprobs_gate_GSE", "E > 1, dout", "stmoe: straight-through dispatch")
def dispatch_straight_through(tape):
    """The dispatch mask passes the gradient of the expert's input on to the gate."""
    extra_GS = (tape.dx_expert_GSD * tape.x_GSD).sum(-1)
    return gradients.dprobs_gate(tape) + extra_GS[..., None] * one_hot(tape, tape.expert_GS)


@mutant("S-BACK-2", "backward", "dprobs_gate_GSE", "exact ties of the largest probability, dout", "T12 (tf.reduce_max)")
def gate_gradient_split_at_ties(tape):
    """Tied experts share the gate's gradient."""
    tied_GSE = (tape.probs_GSE == tape.probs_GSE.max(-1, keepdims=True)).astype(tape.dtype)
    return tape.dgate_GS[..., None] * tied_GSE / tied_GSE.sum(-1, keepdims=True)


@mutant("S-BACK-2", "backward", "dlogits_GSE", "E > 1, dout")
def softmax_backward_without_mean(tape):
    """The softmax's Jacobian is taken for its diagonal p."""
    return tape.probs_GSE * (tape.dprobs_gate_GSE + tape.dprobs_aux_GSE) + tape.dlogits_z_GSE


@mutant("S-BACK-2", "backward", "dw_router_DE", "noise, dout")
def router_gradient_from_clean_x(tape):
    """dw_router is summed with x as it was before the noise."""
    return tape.times(flat(tape.x_GSD).T, flat(tape.dlogits_GSE))


@mutant("S-BACK-2", "backward", "db_router_E", "router bias, dout", dialect=ROUTER_BIAS)
def router_bias_not_trained(tape):
    """db_router is 0."""
    return None if tape.b_router_E is None else np.zeros_like(tape.b_router_E)


# x


@mutant("S-BACK-1", "backward", "dx_router_GSD", "dout")
def dx_without_router(tape):
    """The way of x through the router is left out."""
    return np.zeros_like(tape.x_GSD)


@mutant("S-BACK-1", "backward", "dx_expert_GSD", "dout")
def dx_without_expert(tape):
    """The way of x through the expert is left out."""
    return np.zeros_like(tape.x_GSD)


@mutant("S-BACK-1", "backward", "dx_router_GSD", "noise, dout")
def dx_without_noise(tape):
    """The noise factor is missing on the way back."""
    return gradients.dx_router(Tape(**vars(tape) | {"noise_GSD": None}))


@mutant("S-BACK-1", "backward", "dx_expert_GSD", "gated experts, dout", "GRD11 linkedin/Liger-Kernel#1413", dialect=GEGLU)
def dx_through_one_half(tape):
    """The two ways of x through a gated expert are not summed: one is lost."""
    return gradients.dx_expert(tape) if tape.dpre_gate_GSF is None else by_expert(tape, tape.dpre_gate_GSF, tape.w_gate_EDF.swapaxes(1, 2))


@mutant("S-BACK-1", "backward", "dx_GSD", "overflow, dout", "CMB01 (its gradient)")
def dropped_pass_gradient(tape):
    """A dropped token's dout goes back to its x, as if the layer had passed it on."""
    passed_GS = tape.routed_GS & ~tape.kept_GS
    return gradients.dx(tape) + np.where(passed_GS[..., None], tape.gate_GS[..., None] * tape.dout_GSD, 0)


@mutant("S-BACK-1", "backward", "dx_GSD", "padding, daux, dout")
def padding_gets_gradient(tape):
    """dx of padding is what the aux loss makes of its uniform probabilities."""
    return tape.dx_expert_GSD + tape.dx_router_GSD


# the experts' first layer


@mutant("S-BACK-3", "backward", "dpre_in_GSF", "dout")
def relu_passes_everything(tape):
    """The gradient ignores the activation."""
    return tape.dactivated_GSF


@mutant("S-BACK-3", "backward", "dpre_in_GSF", "expert bias, dout", dialect=BIASED)
def relu_mask_before_bias(tape):
    """The mask of ReLU is taken before b_in is added."""
    unbiased_GSF = by_expert(tape, tape.expert_x_GSD, tape.w_in_EDF)
    return gradients.dpre_in(Tape(**vars(tape) | {"pre_in_GSF": unbiased_GSF}))


@mutant("S-BACK-3", "backward", "dpre_in_GSF", "dout", dialect=GELU)
def gelu_backward_by_tanh(tape):
    """The derivative is that of the tanh form."""
    return tape.dactivated_GSF * ACTIVATIONS["gelu_tanh"][1](tape.pre_in_GSF)


@mutant("S-BACK-3", "backward", "dpre_gate_GSF", "gated experts, dout", dialect=GEGLU)
def gated_backward_without_derivative(tape):
    """The activated half's gradient lacks the derivative."""
    return None if tape.pre_gate_GSF is None else tape.dactivated_GSF * tape.pre_in_GSF


@mutant("S-BACK-3", "backward", "dactivated_GSF", "expert dropout, dout")
def dropout_mask_lost_on_the_way_back(tape):
    """The expert dropout is not applied to the gradient."""
    return gradients.dactivated(Tape(**vars(tape) | {"hidden_mask_GSF": None}))


@mutant("S-BACK-3", "backward", "dw_in_EDF", "noise, dout")
def expert_gradient_from_noised_x(tape):
    """dw_in is summed with the router's copy of x."""
    return sum_by_expert(tape, tape.router_x_GSD, tape.dpre_in_GSF)


@mutant("S-BACK-3", "backward", "dpre_in_GSF", "S > 1, dout", "GRD10 ByteDance-Seed/Triton-distributed#180")
def hidden_gradient_stored_to_row_zero(tape):
    """Every row's hidden gradient is stored to row 0; the last one stays."""
    dpre_GSF = gradients.dpre_in(tape)
    stored_GSF = np.zeros_like(dpre_GSF)
    stored_GSF[:, :1] = dpre_GSF[:, -1:]
    return stored_GSF


@mutant("S-BACK-3", "backward", "dw_in_EDF", "G > 1, dout")
def expert_gradient_of_last_group(tape):
    """Each group overwrites dw_in instead of adding to it."""
    last_G11 = (np.arange(tape.G) == tape.G - 1)[:, None, None]
    return sum_by_expert(tape, tape.expert_x_GSD, np.where(last_G11, tape.dpre_in_GSF, 0))


@mutant("S-BACK-3", "backward", "dw_in_EDF", "an expert without tokens, dout", "EDG01 pytorch/pytorch#172439")
def empty_expert_repeats_gradient(tape):
    """The accumulator is not cleared for an expert without tokens: it holds the sum of the one before."""
    dw_EDF = gradients.dw_in(tape)
    served_E = np.bincount(tape.expert_GS[tape.kept_GS], minlength=tape.E) > 0
    return dw_EDF[np.maximum.accumulate(np.where(served_E, np.arange(tape.E), 0))]


@mutant("S-BACK-3", "backward", "layer", "dout", "SCL04 pytorch/pytorch#160285")
def expert_gradients_doubled(layer):
    """The experts' gradients are summed over two ranks that hold the same tokens."""
    doubled = ("dw_in", "dw_gate", "dw_out", "db_in", "db_gate", "db_out")
    return lambda case: {name: value * 2 if name in doubled else value for name, value in layer(case).items()}


# the experts' second layer


@mutant("S-BACK-4", "backward", "dw_out_EFD", "E > 1, dout")
def dw_out_from_unweighed_dout(tape):
    """dw_out is summed without the gate."""
    return sum_by_expert(tape, tape.hidden_GSF, tape.dout_GSD)


@mutant("S-BACK-4", "backward", "db_out_ED", "expert bias, E > 1, dout", dialect=BIASED)
def db_out_from_unweighed_dout(tape):
    """db_out is summed without the gate."""
    return None if tape.b_out_ED is None else bias_gradient(tape, tape.dout_GSD)


@mutant("S-BACK-4", "backward", "dw_out_EFD", "expert dropout, dout")
def dw_out_from_hidden_before_dropout(tape):
    """dw_out is summed with the hidden layer as it was before the dropout."""
    return sum_by_expert(tape, forward.hidden(Tape(**vars(tape) | {"hidden_mask_GSF": None})), tape.dexpert_out_GSD)


@mutant("S-BACK-4", "backward", "dw_out_EFD", "dout, an activation that is not the identity")
def dw_out_from_pre_activation(tape):
    """dw_out is summed with what the activation was given."""
    return sum_by_expert(tape, tape.pre_in_GSF, tape.dexpert_out_GSD)


# the losses' gradients


@mutant("S-BACK-5", "backward", "dprobs_aux_GSE", "daux, unequal counts", "AUX17 NVIDIA-NeMo/Automodel#1408, AUX23 laekov/fastmoe#50")
def aux_detached(tape):
    """The aux loss has its value and no gradient."""
    return np.zeros_like(tape.probs_GSE)


@mutant("S-BACK-5", "backward", "dprobs_aux_GSE", "daux, unequal counts", "AUX13 NVIDIA/Megatron-LM@cac8d1a3f0")
def aux_gradient_doubled(tape):
    """The aux loss's gradient is scaled by the number of ranks, here 2."""
    return gradients.dprobs_aux(tape) * 2


@mutant("S-BACK-5", "backward", "dprobs_aux_GSE", "daux, G > 1, unequal counts")
def aux_gradient_not_averaged_over_groups(tape):
    """The aux loss's gradient lacks the mean over groups."""
    return gradients.dprobs_aux(tape) * tape.G


@mutant("S-BACK-5", "backward", "dprobs_aux_GSE", "daux, padding, unequal counts")
def aux_gradient_without_valid_fraction(tape):
    """The aux loss's gradient lacks the group's real part."""
    return gradients.dprobs_aux(Tape(**vars(tape) | {"valid_fraction_G": np.ones(tape.G, tape.dtype)}))


@mutant("S-BACK-5", "backward", "dprobs_aux_GSE", "daux, overflow")
def aux_gradient_from_kept_counts(tape):
    """The aux loss's gradient counts the tokens after dropping."""
    kept_GE = (one_hot(tape, tape.expert_GS) * tape.kept_GS[..., None]).sum(1) / max(tape.S, 1)
    return gradients.dprobs_aux(Tape(**vars(tape) | {"fraction_GE": kept_GE}))


@mutant("S-BACK-6", "backward", "dlogits_z_GSE", "dz")
def z_detached(tape):
    """The z-loss has its value and no gradient."""
    return np.zeros_like(tape.probs_GSE)


@mutant("S-BACK-6", "backward", "dlogits_z_GSE", "dz")
def z_gradient_halved(tape):
    """The 2 of the square's derivative is missing."""
    return gradients.dlogits_z(tape) / 2


@mutant("S-BACK-6", "backward", "dlogits_z_GSE", "dz, overflow")
def z_gradient_of_kept_tokens(tape):
    """Dropped tokens get no gradient of the z-loss."""
    return np.where(tape.kept_GS[..., None], gradients.dlogits_z(tape), 0)


@mutant("S-BACK-6", "backward", "dlogits_z_GSE", "dz, padding")
def z_gradient_divided_by_all_rows(tape):
    """The z-loss's gradient is divided by all rows instead of the real ones."""
    return gradients.dlogits_z(tape) * tape.dtype(tape.valid_GS.sum() / max(tape.valid_GS.size, 1))
