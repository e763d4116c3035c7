# May import: numpy, the standard library, activations, tape.
"""The backward stages, in mirror order of the forward ones.

Choice, kept and counts are constants; the gate's gradient enters the chosen probability alone; values are used as they were stored.
"""

import numpy as np

from .activations import activation
from .tape import bias_gradient, by_expert, flat, one_hot, ratio, sum_by_expert


def dexpert_out(tape):
    """Weigh the kept rows of dout with their gate."""
    return np.where(tape.kept_GS[..., None], tape.gate_GS[..., None] * tape.dout_GSD, 0)


def dgate(tape):
    """Project the kept rows of dout on the expert's output."""
    along_GS = tape.times(tape.dout_GSD[..., None, :], tape.expert_out_GSD[..., None])[..., 0, 0]
    return np.where(tape.kept_GS, along_GS, 0)


def dw_out(tape):
    """Sum hidden x dexpert_out."""
    return sum_by_expert(tape, tape.hidden_GSF, tape.dexpert_out_GSD)


def db_out(tape):
    """Sum dexpert_out."""
    return None if tape.b_out_ED is None else bias_gradient(tape, tape.dexpert_out_GSD)


def dactivated(tape):
    """Return through w_out and the expert dropout."""
    dhidden_GSF = by_expert(tape, tape.dexpert_out_GSD, tape.w_out_EFD.swapaxes(1, 2))
    return dhidden_GSF if tape.hidden_mask_GSF is None else dhidden_GSF * tape.hidden_mask_GSF


def dpre_in(tape):
    """Return through the activation, or to the half that is not activated."""
    if tape.pre_gate_GSF is None:
        return tape.dactivated_GSF * activation(tape, derivative=True)(tape.pre_in_GSF)
    return tape.dactivated_GSF * activation(tape)(tape.pre_gate_GSF)


def dpre_gate(tape):
    """Return to the activated half of a gated expert."""
    if tape.pre_gate_GSF is None:
        return None
    return tape.dactivated_GSF * tape.pre_in_GSF * activation(tape, derivative=True)(tape.pre_gate_GSF)


def dw_in(tape):
    """Sum x x dpre_in."""
    return sum_by_expert(tape, tape.expert_x_GSD, tape.dpre_in_GSF)


def db_in(tape):
    """Sum dpre_in."""
    return None if tape.b_in_EF is None else bias_gradient(tape, tape.dpre_in_GSF)


def dw_gate(tape):
    """Sum x x dpre_gate."""
    return None if tape.dpre_gate_GSF is None else sum_by_expert(tape, tape.expert_x_GSD, tape.dpre_gate_GSF)


def db_gate(tape):
    """Sum dpre_gate."""
    return None if tape.b_gate_EF is None else bias_gradient(tape, tape.dpre_gate_GSF)


def dx_expert(tape):
    """Return through w_in, and w_gate where gated."""
    through_in_GSD = by_expert(tape, tape.dpre_in_GSF, tape.w_in_EDF.swapaxes(1, 2))
    if tape.dpre_gate_GSF is None:
        return through_in_GSD
    return through_in_GSD + by_expert(tape, tape.dpre_gate_GSF, tape.w_gate_EDF.swapaxes(1, 2))


def dprobs_gate(tape):
    """Give the gate's gradient to the chosen probability."""
    return tape.dgate_GS[..., None] * one_hot(tape, tape.expert_GS)


def dprobs_aux(tape):
    """Differentiate the balance by the probabilities; the counts are constant."""
    slope_GE = tape.daux * tape.E / tape.dtype(tape.G) * tape.valid_fraction_G[:, None] * tape.fraction_GE
    return np.broadcast_to(ratio(slope_GE, tape.S)[:, None], tape.probs_GSE.shape)


def dlogits_z(tape):
    """Differentiate the squared log partition of the real tokens."""
    slope_GS = ratio(np.where(tape.valid_GS, 2 * tape.dz * tape.lse_GS, 0), tape.valid_GS.sum())
    return slope_GS[..., None] * tape.probs_GSE


def dlogits(tape):
    """Return through the softmax, and add the z-loss."""
    dprobs_GSE = tape.dprobs_gate_GSE + tape.dprobs_aux_GSE
    mean_GS1 = (tape.probs_GSE * dprobs_GSE).sum(-1, keepdims=True)
    return tape.probs_GSE * (dprobs_GSE - mean_GS1) + tape.dlogits_z_GSE


def dw_router(tape):
    """Sum the router's x x dlogits over all tokens."""
    return tape.times(flat(tape.router_x_GSD).T, flat(tape.dlogits_GSE))


def db_router(tape):
    """Sum dlogits."""
    return None if tape.b_router_E is None else tape.dlogits_GSE.sum((0, 1))


def dx_router(tape):
    """Return through the router and the noise."""
    dx_GSD = tape.times(tape.dlogits_GSE, tape.w_router_DE.T)
    return dx_GSD if tape.noise_GSD is None else dx_GSD * tape.noise_GSD


def dx(tape):
    """Add both ways of x; padding was constant."""
    return np.where(tape.valid_GS[..., None], tape.dx_expert_GSD + tape.dx_router_GSD, 0)
