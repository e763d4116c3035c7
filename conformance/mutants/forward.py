# May import: numpy, the standard library, activations, tape.
"""The forward stages, in order of execution. Paper: equations 1 to 6, sections 2.2 and 2.4.

The dialect is mesh_tensorflow: padding is zeroed and takes no slot, noise is a factor on the router's copy of x, the choice is the lowest
argmax of the probabilities, the first `capacity` tokens of an expert are served in order, the gate is the raw probability, a dropped
token's row is 0.
"""

import numpy as np

from .activations import activation
from .tape import at_expert, by_expert, one_hot, ratio

# decide: who goes where


def zero_padding(tape):
    """Zero the rows of padding, whatever they hold."""
    return np.where(tape.valid_GS[..., None], tape.raw_x_GSD, 0)


def perturb(tape):
    """Multiply the router's own copy of x by the noise."""
    return tape.x_GSD if tape.noise_GSD is None else tape.x_GSD * tape.noise_GSD


def logits(tape):
    """Score the experts."""
    scores_GSE = tape.times(tape.router_x_GSD, tape.w_router_DE)
    return scores_GSE if tape.b_router_E is None else scores_GSE + tape.b_router_E


def probs(tape):
    """Take the softmax, largest logit subtracted."""
    weight_GSE = np.exp(tape.logits_GSE - tape.logits_GSE.max(-1, keepdims=True))
    return weight_GSE / weight_GSE.sum(-1, keepdims=True)


def choose(tape):
    """Choose the likeliest expert, the lowest at a tie."""
    return tape.probs_GSE.argmax(-1)


def claims(tape):
    """Tell which tokens ask for a slot: all but padding."""
    return tape.valid_GS


def claims_before(expert_GS, routed_GS, E):
    """Count for each token the earlier claims of its group on every expert."""
    claim_GSE = (expert_GS[..., None] == np.arange(E)) & routed_GS[..., None]
    return np.cumsum(claim_GSE, axis=1, dtype=np.int64) - claim_GSE


def slots(tape):
    """Count the earlier claims of the group on the same expert."""
    return at_expert(claims_before(tape.expert_GS, tape.routed_GS, tape.E), tape.expert_GS)


def given_capacity(tape):
    """Take the number of slots as the case gives it."""
    return int(tape.case["capacity"])


def keep(tape):
    """Keep the claims that find a slot."""
    return tape.routed_GS & (tape.slot_GS < tape.capacity)


def gate(tape):
    """Take the probability of the chosen expert, as it is."""
    return at_expert(tape.probs_GSE, tape.expert_GS)


# compute: move, expert, weigh


def expert_input(tape):
    """Give the experts the clean rows."""
    return tape.x_GSD


def plan(tape):
    """Index the route in the form's way."""
    return tape.form.plan(tape)


def affine(tape, x_GSD, w_EDF, b_EF):
    """Multiply by the expert's matrix and add its bias."""
    product_GSF = by_expert(tape, x_GSD, w_EDF)
    return product_GSF if b_EF is None else product_GSF + b_EF[tape.expert_GS]


def pre_in(tape):
    """Compute x w_in + b_in."""
    return affine(tape, tape.expert_x_GSD, tape.w_in_EDF, tape.b_in_EF)


def pre_gate(tape):
    """Compute x w_gate + b_gate where the expert is gated."""
    return None if tape.w_gate_EDF is None else affine(tape, tape.expert_x_GSD, tape.w_gate_EDF, tape.b_gate_EF)


def hidden(tape):
    """Activate as the case says."""
    return hidden_by(tape, activation(tape))


def hidden_by(tape, act):
    """Activate, multiply by the other half where gated, drop out, store."""
    value_GSF = act(tape.pre_in_GSF) if tape.pre_gate_GSF is None else act(tape.pre_gate_GSF) * tape.pre_in_GSF
    if tape.hidden_mask_GSF is not None:
        value_GSF = value_GSF * tape.hidden_mask_GSF
    return tape.numerics.store_hidden(value_GSF)


def expert_out(tape):
    """Compute hidden w_out + b_out."""
    return affine(tape, tape.hidden_GSF, tape.w_out_EFD, tape.b_out_ED)


def combine(tape):
    """Weigh the kept rows with their gate."""
    return tape.gate_GS[..., None] * tape.expert_out_GSD


def output(tape):
    """Leave 0 for who was not kept, and store."""
    return tape.numerics.store_out(np.where(tape.kept_GS[..., None], tape.combined_GSD, 0))


# losses


def fractions(tape):
    """Count the tokens that chose each expert, over all rows, before dropping."""
    return ratio(one_hot(tape, tape.expert_GS).sum(1), tape.S)


def mean_probs(tape):
    """Average the probabilities over all rows."""
    return ratio(tape.probs_GSE.sum(1), tape.S)


def valid_fractions(tape):
    """Tell how much of each group is real."""
    return ratio(tape.valid_GS.sum(1).astype(tape.dtype), tape.S)


def aux_loss(tape):
    """Average over groups the balance, scaled by the group's real part."""
    return (tape.valid_fraction_G * tape.E * (tape.fraction_GE * tape.mean_prob_GE).sum(1)).mean(dtype=tape.dtype)


def log_partition(tape):
    """Return log sum exp of the logits."""
    top_GS = tape.logits_GSE.max(-1)
    return top_GS + np.log(np.exp(tape.logits_GSE - top_GS[..., None]).sum(-1))


def z_loss(tape):
    """Average the squared log partition over the real tokens."""
    return ratio((tape.lse_GS**2).sum(where=tape.valid_GS, dtype=tape.dtype), tape.valid_GS.sum())
