# May import: numpy, the standard library, the subject's files and record.
"""Mutants of the losses: the balance of the experts and the router's z-loss."""

import numpy as np

from .. import forward
from ..record import mutant
from ..tape import one_hot, ratio
from .routing import clean_router

# aux loss


@mutant("S-AUX-1", "aux_loss", "fraction_GE", "overflow", "facts on fastmoe: counts taken after dropping")
def aux_counts_after_drop(tape):
    """The tokens are counted after dropping."""
    return ratio((one_hot(tape, tape.expert_GS) * tape.kept_GS[..., None]).sum(1), tape.S)


@mutant("S-AUX-1", "aux_loss", "fraction_GE", "overflow of an expert but expert 0", "AUX06 (HF Switch 4.x)")
def aux_books_dropped_to_expert_zero(tape):
    """A dropped token counts for expert 0."""
    return ratio(one_hot(tape, np.where(tape.kept_GS, tape.expert_GS, 0)).sum(1), tape.S)


@mutant("S-AUX-1", "aux_loss", "fraction_GE", "probabilities that are not one-hot")
def aux_soft_counts(tape):
    """The mean probability stands in for the count."""
    return forward.mean_probs(tape)


@mutant("S-AUX-1", "aux_loss", "mean_prob_GE", "E > 1", "AUX20 paiml/aprender#2162")
def aux_of_selected_probs(tape):
    """Only the chosen expert's probability enters the mean."""
    return ratio((one_hot(tape, tape.expert_GS) * tape.probs_GSE).sum(1), tape.S)


@mutant("S-AUX-1", "aux_loss", "mean_prob_GE", "E > 1", "AUX01 huggingface/transformers#28255")
def aux_of_renormalised_gate(tape):
    """The probabilities are renormalised over the selected one: they are the counts."""
    return tape.fraction_GE


@mutant("S-AUX-1", "aux_loss", "mean_prob_GE", "noise")
def aux_from_clean_router(tape):
    """The choice is made with noise, the mean probability is taken without."""
    return ratio(clean_router(tape).probs_GSE.sum(1), tape.S)


@mutant("S-AUX-1", "aux_loss", "aux_loss", "E > 1")
def aux_without_number_of_experts(tape):
    """The factor E is missing."""
    return forward.aux_loss(tape) / tape.dtype(tape.E)


@mutant("S-AUX-1", "aux_loss", "aux_loss", "an expert that nobody chose")
def aux_scaled_by_used_experts(tape):
    """The factor is the number of experts that were chosen."""
    return forward.aux_loss(tape) * tape.dtype((tape.fraction_GE > 0).any(0).sum()) / tape.dtype(tape.E)


@mutant("S-AUX-1", "aux_loss", "valid_fraction_G", "padding")
def aux_without_valid_fraction(tape):
    """The group's term is not scaled by its real part."""
    return np.ones(tape.G, tape.dtype)


@mutant("S-AUX-1", "aux_loss", "aux_loss", "padding", "AUX02 inverted huggingface/transformers#28505")
def aux_averages_real_tokens(tape):
    """Both means run over the real tokens alone."""
    weight_GS1 = tape.valid_GS[..., None] / np.maximum(tape.valid_GS.sum(1), 1)[:, None, None].astype(tape.dtype)
    fraction_GE = (one_hot(tape, tape.expert_GS) * weight_GS1).sum(1)
    return tape.E * (fraction_GE * (tape.probs_GSE * weight_GS1).sum(1)).sum(1).mean(dtype=tape.dtype)


@mutant("S-AUX-1", "aux_loss", "aux_loss", "padding", "AUX03 huggingface/transformers#29363")
def aux_doubled_under_mask(tape):
    """The mask is expanded for two choices: with padding the loss is doubled."""
    return forward.aux_loss(tape) * (1 if tape.case.get("valid") is None else 2)


@mutant("S-AUX-1", "aux_loss", "aux_loss", "G > 1", "AUX04 huggingface/transformers#31464")
def aux_of_pooled_groups(tape):
    """Counts and probabilities are averaged over the groups before they are multiplied."""
    return tape.valid_fraction_G.mean() * tape.E * (tape.fraction_GE.mean(0) * tape.mean_prob_GE.mean(0)).sum()


@mutant("S-AUX-1", "aux_loss", "aux_loss", "G > 1", "AUX11 tensorflow/mesh@f408e28")
def aux_summed_over_groups(tape):
    """The groups' terms are summed, not averaged."""
    return forward.aux_loss(tape) * tape.G


@mutant("S-AUX-1", "aux_loss", "aux_loss", "G > 1", "AUX14 NVIDIA/Megatron-LM@e3fe5508c9")
def aux_divided_by_groups_twice(tape):
    """The mean over groups is divided by their number once more."""
    return forward.aux_loss(tape) / tape.dtype(tape.G)


# z-loss


@mutant("S-Z-1", "z_loss", "lse_GS", "|logit| > 89 (float64: 710)", "ZLS06")
def z_without_max(tape):
    """log(sum(exp)) is taken as it stands."""
    return np.log(np.exp(tape.logits_GSE).sum(-1))


@mutant("S-Z-1", "z_loss", "lse_GS", source="ZLS04 NVIDIA/Megatron-LM@c656553315")
def z_of_probs(tape):
    """The probabilities are taken for logits."""
    return np.log(np.exp(tape.probs_GSE).sum(-1))


@mutant("S-Z-1", "z_loss", "lse_GS", source="ZLS01 huggingface/transformers#48293")
def z_of_chosen_prob(tape):
    """The winning probability is all that is left to take the logsumexp of."""
    return forward.gate(tape)


@mutant("S-Z-1", "z_loss", "lse_GS", "E > 1")
def z_of_largest_logit(tape):
    """The largest logit stands in for the logsumexp."""
    return tape.logits_GSE.max(-1)


@mutant("S-Z-1", "z_loss", "lse_GS", "noise")
def z_from_clean_router(tape):
    """The logits before the noise are used."""
    return clean_router(tape).lse_GS


@mutant("S-Z-1", "z_loss", "z_loss")
def z_not_squared(tape):
    """The logsumexp is averaged without its square."""
    return ratio(np.abs(tape.lse_GS).sum(where=tape.valid_GS), tape.valid_GS.sum())


@mutant("S-Z-1", "z_loss", "z_loss", "padding")
def z_divided_by_all_rows(tape):
    """The sum over real tokens is divided by all rows."""
    return ratio((tape.lse_GS**2).sum(where=tape.valid_GS), tape.valid_GS.size)


@mutant("S-Z-1", "z_loss", "z_loss", "padding", "MSK01 NVIDIA/Megatron-LM#1984")
def z_includes_padding(tape):
    """Every row of padding adds (log E)^2."""
    return ratio((tape.lse_GS**2).sum(), tape.valid_GS.size)


@mutant("S-Z-1", "z_loss", "z_loss", "G > 1, groups with unequal padding", "SCL05 pytorch/torchtune#1875")
def z_averages_group_means(tape):
    """The mean of the groups' means is taken."""
    count_G = np.maximum(tape.valid_GS.sum(1), 1).astype(tape.dtype)
    return ((tape.lse_GS**2).sum(1, where=tape.valid_GS) / count_G).mean()
