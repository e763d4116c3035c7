# May import: numpy, the standard library, the subject's files and record.
"""Mutants of the decision: noise, router, softmax, choice."""

import numpy as np

from .. import forward
from ..products import round_bf16
from ..record import ROUTER_BIAS, mutant
from ..tape import Tape

# noise


@mutant("S-NOISE-1", "noise", "router_x_GSD", "noise", "RNG04 tensorflow/mesh@7ba6fa0")
def noise_ignored(tape):
    """The router sees the clean input."""
    return tape.x_GSD


@mutant("S-NOISE-1", "noise", "router_x_GSD", "noise")
def noise_as_one_plus(tape):
    """The factor is taken for a deviation: x * (1 + noise)."""
    return tape.x_GSD if tape.noise_GSD is None else tape.x_GSD * (1 + tape.noise_GSD)


@mutant("S-NOISE-1", "noise", "router_x_GSD", "noise")
def noise_added_to_x(tape):
    """The factor is added."""
    return tape.x_GSD if tape.noise_GSD is None else tape.x_GSD + tape.noise_GSD


@mutant("S-NOISE-1", "noise", "logits_GSE", "noise", "RNG03 NVIDIA/Megatron-LM@e9204a5f36")
def noise_on_logits(tape):
    """The noise multiplies the logits instead of the input."""
    clean_GSE = clean_router(tape).logits_GSE
    return clean_GSE if tape.noise_GSD is None else clean_GSE * np.resize(tape.noise_GSD, clean_GSE.shape)


@mutant("S-NOISE-1", "noise", "router_x_GSD", "noise, train off")
def noise_only_in_training(tape):
    """The noise that the case holds is applied only where train is set."""
    return forward.perturb(tape) if tape.case.get("train") else tape.x_GSD


@mutant("S-NOISE-1", "noise", "router_x_GSD", "noise, G > 1", "RNG07 PaddlePaddle/PaddleFleetX#1005")
def noise_of_first_group(tape):
    """Every group gets the draw of the first."""
    return tape.x_GSD if tape.noise_GSD is None else tape.x_GSD * tape.noise_GSD[:1]


@mutant("S-NOISE-2", "noise", "expert_x_GSD", "noise", "RNG02 huggingface/transformers#33969")
def experts_see_noised_x(tape):
    """The noise reaches the experts."""
    return tape.router_x_GSD


def clean_router(tape):
    """Route once more without noise."""
    clean = Tape(**vars(tape) | {"router_x_GSD": tape.x_GSD})
    clean.logits_GSE = forward.logits(clean)
    clean.probs_GSE = forward.probs(clean)
    clean.lse_GS = forward.log_partition(clean)
    return clean


# router


@mutant("S-ROUTE-1", "router", "logits_GSE", "D not a multiple of 8", "DIS17 AI-Hypercomputer/maxtext#1183")
def router_input_tail_not_summed(tape):
    """The columns of x after the last whole tile of 8 are left out of the logits."""
    whole = tape.x_GSD.shape[-1] // 8 * 8
    tail_GSE = tape.times(tape.router_x_GSD[..., whole:], tape.w_router_DE[whole:])
    return forward.logits(tape) - tail_GSE


@mutant("S-ROUTE-1", "router", "logits_GSE", "D = E", "CKP03 huggingface/transformers#47031")
def router_transposed_when_square(tape):
    """The layout of w_router is guessed from its shape, wrongly where it is square."""
    D, E = tape.w_router_DE.shape
    return forward.logits(Tape(**vars(tape) | {"w_router_DE": tape.w_router_DE.T})) if D == E else forward.logits(tape)


@mutant("S-ROUTE-1", "router", "logits_GSE", "router bias", "RTE10 pytorch/torchtitan#2319", dialect=ROUTER_BIAS)
def router_bias_ignored(tape):
    """The router's bias is left out."""
    return tape.times(tape.router_x_GSD, tape.w_router_DE)


@mutant("S-ROUTE-1", "router", "logits_GSE", "|logit| > 30")
def logits_clamped(tape):
    """The logits are clamped to [-30, 30]."""
    return np.clip(forward.logits(tape), -30, 30)


# softmax


def normalise(weight_GSE):
    """Divide by the sum over experts."""
    return weight_GSE / weight_GSE.sum(-1, keepdims=True)


def shifted(tape):
    """Subtract the largest logit."""
    return tape.logits_GSE - tape.logits_GSE.max(-1, keepdims=True)


@mutant("S-ROUTE-2", "softmax", "probs_GSE")
def softmax_temperature(tape):
    """The logits are divided by a temperature of 1.001."""
    return normalise(np.exp(shifted(tape) / 1.001))


@mutant("S-ROUTE-2", "softmax", "probs_GSE", "|logit| > 89 (float64: 710)")
def softmax_without_max(tape):
    """The largest logit is not subtracted."""
    return normalise(np.exp(tape.logits_GSE))


@mutant(
    "S-ROUTE-2",
    "softmax",
    "probs_GSE",
    "a token with all logits < -104 (float64: -746)",
    "RTE07 NVIDIA/TransformerEngine#2009",
)
def softmax_maximum_from_zero(tape):
    """The running maximum starts at 0 instead of minus infinity."""
    return normalise(np.exp(tape.logits_GSE - np.maximum(tape.logits_GSE.max(-1, keepdims=True), 0)))


@mutant("S-ROUTE-2", "softmax", "probs_GSE")
def softmax_with_epsilon(tape):
    """1e-5 is added to the denominator."""
    weight_GSE = np.exp(shifted(tape))
    return weight_GSE / (weight_GSE.sum(-1, keepdims=True) + 1e-5)


@mutant("S-ROUTE-2", "softmax", "probs_GSE", "S > 1", "CMB09 deepspeedai/DeepSpeed#2110")
def softmax_over_tokens(tape):
    """The softmax runs over the tokens instead of the experts."""
    weight_GSE = np.exp(tape.logits_GSE - tape.logits_GSE.max(1, keepdims=True, initial=-np.inf))
    return weight_GSE / weight_GSE.sum(1, keepdims=True)


@mutant("S-ROUTE-2", "softmax", "probs_GSE", "logits that differ by 1 or more")
def softmax_short_log2e(tape):
    """exp is computed as 2 to the 1.4427 times its argument."""
    return normalise(np.exp2(shifted(tape) * 1.4427))


@mutant(
    "S-ROUTE-2",
    "softmax",
    "probs_GSE",
    "E not a power of two",
    "EDG07 NVIDIA/Megatron-LM@bc705358bc",
)
def softmax_over_padded_experts(tape):
    """The experts are padded to a power of two, and the padding's logits of 0 enter the sum."""
    extra = (1 << (tape.E - 1).bit_length()) - tape.E
    padded_GSP = np.pad(tape.logits_GSE, [(0, 0), (0, 0), (0, extra)])
    weight_GSP = np.exp(padded_GSP - padded_GSP.max(-1, keepdims=True))
    return normalise(weight_GSP)[..., : tape.E]


@mutant("S-ROUTE-2", "softmax", "probs_GSE", source="RTE12 MetaX-MACA/vLLM-metax#270")
def sigmoid_for_softmax(tape):
    """Each expert is scored by its own sigmoid."""
    return 1 / (1 + np.exp(-tape.logits_GSE))


# choice


@mutant("S-ROUTE-3", "select", "expert_GS", "exact ties", "RTE14 vllm-project/vllm#52679")
def ties_to_last(tape):
    """At a tie the highest index wins."""
    return tape.E - 1 - tape.probs_GSE[..., ::-1].argmax(-1)


@mutant(
    "S-ROUTE-3",
    "select",
    "expert_GS",
    "probabilities that differ by less than 2^-9, the lower index being the smaller",
    "RTE17 (transformers 5: probabilities cast back before argmax)",
)
def choice_on_bfloat16_probs(tape):
    """The choice is made on probabilities rounded to bfloat16, where near-ties become ties."""
    return round_bf16(tape.probs_GSE.astype(np.float32)).argmax(-1)


@mutant(
    "S-ROUTE-3",
    "select",
    "expert_GS",
    "logits an ulp apart whose probabilities are equal, the lower index being the smaller",
    visibility="export",
)
def choice_on_logits(tape):
    """The choice is made on the logits, not on the probabilities as stored."""
    return tape.logits_GSE.argmax(-1)


@mutant("S-ROUTE-3", "select", "expert_GS", "a token with all logits < 0", "RTE07 NVIDIA/TransformerEngine#2009")
def scan_starts_at_zero(tape):
    """The scan for the largest logit starts at 0, so that expert 0 wins where all are negative."""
    return np.where(tape.logits_GSE.max(-1) > 0, forward.choose(tape), 0)


@mutant(
    "S-ROUTE-3",
    "select",
    "expert_GS",
    "E not a power of two",
    "EDG12 NVIDIA/TransformerEngine#2821",
)
def experts_past_power_of_two_unreachable(tape):
    """The scan covers the largest power of two of experts."""
    return tape.probs_GSE[..., : 1 << (tape.E.bit_length() - 1)].argmax(-1)
