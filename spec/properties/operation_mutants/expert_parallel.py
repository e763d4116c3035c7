# May import: standard library, numpy, properties.operation_mutants.record.
"""Wrong crossings, wrong sums over ranks. Where a mutant is a bug that was shipped, its comment has the link."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from properties.operation_mutants.record import edited, operation_mutant

FORWARD, BACKWARD = "expert_parallel.expert_parallel_forward", "expert_parallel.expert_parallel_backward"

# https://github.com/facebookresearch/fairscale/pull/184
BUFFER_CHUNKED_BY_EXPERT = edited(
    "buffer_chunked_by_expert",
    "E-CROSS-1",
    "expert_parallel.cross_out",
    "arrived_ARRgeCD.reshape(A, R, R * g, E // R, C, D)",
    "arrived_ARRgeCD.reshape(A, R, E // R, R * g, C, D).swapaxes(2, 3)",
    "What arrived as (rank, group, expert, slot) is cut as (expert, rank, group, slot).",
)
SENT_IN_ORDER_OF_MEMORY = edited(
    "sent_in_order_of_memory",
    "E-CROSS-1",
    "expert_parallel.cross_out",
    "np.moveaxis(packed_ARgECD.reshape(A, R, g, R, E // R, C, D), 3, 2)",
    "packed_ARgECD.reshape(A, R, R, g, E // R, C, D)",
    "The buffer is cut into equal pieces of memory, whatever lies in them.",
)
EXPERTS_DEALT_OUT = edited(
    "experts_dealt_out",
    "E-CROSS-1",
    "expert_parallel.cross_out",
    "np.moveaxis(packed_ARgECD.reshape(A, R, g, R, E // R, C, D), 3, 2)",
    "np.moveaxis(packed_ARgECD.reshape(A, R, g, E // R, R, C, D), 4, 2)",
    "Expert e lives on rank e % R.",
)
CROSSES_ONE_WAY = edited(
    "crosses_one_way", "E-CROSS-1", "expert_parallel.cross_home", "np.swapaxes(", "np.array(", "Nothing is swapped on the way home."
)


# https://github.com/vllm-project/vllm-ascend/pull/10942
@operation_mutant("E-CROSS-1", replaces="cross_out")
def another_ranks_experts(cross_out: Callable[..., Any], packed_ARgECD: np.ndarray) -> np.ndarray:
    """Every rank gets what is meant for the next."""
    return np.roll(cross_out(packed_ARgECD), 1, axis=1)


# https://github.com/meta-pytorch/torchcomms/pull/2632
@operation_mutant("E-CROSS-2", replaces="cross_out")
def every_displacement_is_zero(cross_out: Callable[..., Any], packed_ARgECD: np.ndarray) -> np.ndarray:
    """Every chunk is written to the front: the last one wins."""
    arrived = cross_out(packed_ARgECD)
    g = packed_ARgECD.shape[2]
    return np.tile(arrived[:, :, -g:], (1, 1, arrived.shape[2] // g, 1, 1, 1))


# https://github.com/open-mpi/ompi/pull/12288
@operation_mutant("E-CROSS-2", replaces="cross_out")
def nothing_of_its_own(cross_out: Callable[..., Any], packed_ARgECD: np.ndarray) -> np.ndarray:
    """What a rank sends to itself is skipped."""
    arrived = cross_out(packed_ARgECD).copy()
    g = packed_ARgECD.shape[2]
    for r in range(packed_ARgECD.shape[1]):
        arrived[:, r, r * g : (r + 1) * g] = 0.0
    return arrived


# https://github.com/pytorch/pytorch/issues/101380
UNEVEN_SHARES_ARE_CUT = edited(
    "uneven_shares_are_cut",
    "E-CROSS-2",
    "expert_parallel.cross_out",
    '    if E % R:\n        raise ValueError(f"cross_out: {E} experts cannot be shared evenly by {R} ranks")\n',
    "    packed_ARgECD, E = packed_ARgECD[:, :, :, : E // R * R], E // R * R\n",
    "The experts that are left over are forgotten.",
)
CAPACITY_OF_A_RANK = edited(
    "capacity_of_a_rank",
    "E-CAP-1",
    "expert_parallel.decide_forward",
    "statics.capacity, points.positions",
    "statics.capacity * g, points.positions",
    "Capacity counts per rank.",
)
PADDING_ASKS_FOR_A_SLOT = edited(
    "padding_asks_for_a_slot",
    "E-CAP-1",
    "expert_parallel.decide_forward",
    "slots_forward(expert_gS, valid_gS,",
    "slots_forward(expert_gS, np.ones_like(valid_gS),",
    "Padding is routed.",
)
CHOOSES_THE_LEAST = edited(
    "chooses_the_least", "E-CAP-1", "expert_parallel.decide_forward", "choose(round_to(", "choose(-round_to(", "The lowest score is chosen."
)

# https://github.com/pytorch/torchtitan/pull/4245
BIAS_OF_EVERY_PART = edited(
    "bias_of_every_part",
    "E-CUT-1",
    "model_parallel.cut_experts_forward",
    "float(hidden.start == 0)",
    "1.0",
    "Every part adds the output's bias before the sum.",
)
PART_OF_THE_SUM = edited(
    "part_of_the_sum", "E-CUT-1", "model_parallel.cut_experts_forward", "np.sum(outs, axis=0)", "outs[0]", "The parts are not summed."
)
MEAN_OF_THE_PARTS = edited(
    "mean_of_the_parts", "E-CUT-1", "model_parallel.cut_experts_forward", "np.sum(outs, axis=0)", "np.mean(outs, axis=0)", "The parts are averaged."
)
# https://github.com/pytorch/torchtitan/pull/1878, https://github.com/pytorch/torchtitan/pull/4054
INPUT_GRADIENT_OF_ONE_PART = edited(
    "input_gradient_of_one_part",
    "E-CUT-1",
    "model_parallel.cut_experts_backward",
    "np.sum([dpacked_GeCD for dpacked_GeCD, _, _, _ in back], axis=0)",
    "back[0][0]",
    "The input's gradient is one part's: the forward pass is untouched.",
)
# https://github.com/deepspeedai/DeepSpeed/pull/5156
LEFT_OVER_COLUMNS = edited(
    "left_over_columns",
    "E-CUT-1",
    "model_parallel.slices_of",
    "size * i // parts",
    "size // parts * i",
    "Parts of equal size: what is left over is in none.",
)

# https://github.com/deepspeedai/DeepSpeed/issues/5618, https://github.com/databricks/megablocks/pull/20, https://github.com/pytorch/pytorch/issues/160285
EXPERTS_AVERAGED_OVER_COPIES = edited(
    "experts_averaged_over_copies",
    "E-SUM-1",
    BACKWARD,
    "stack_ranks(list(values), A, R).sum(axis=0)",
    "stack_ranks(list(values), A, R).mean(axis=0)",
    "The gradients of replicated experts are averaged.",
)
EXPERTS_OF_ONE_COPY = edited(
    "experts_of_one_copy",
    "E-SUM-1",
    BACKWARD,
    "stack_ranks(list(values), A, R).sum(axis=0)",
    "stack_ranks(list(values), A, R)[0]",
    "The gradients of replicated experts are one copy's.",
)
EXPERTS_TIMES_RANKS = edited(
    "experts_times_ranks",
    "E-SUM-1",
    BACKWARD,
    "stack_ranks(list(values), A, R).sum(axis=0)",
    "R * stack_ranks(list(values), A, R).sum(axis=0)",
    "Experts are reduced over ranks that do not hold them: R times too large.",
)
# https://github.com/pytorch/torchtitan/pull/2416
ROUTER_OF_ONE_RANK = edited(
    "router_of_one_rank",
    "E-SUM-1",
    BACKWARD,
    "np.sum([dw_DE for _, dw_DE, _ in decided], axis=0)",
    "decided[0][1]",
    "Each rank keeps its own router's gradient.",
)
ROUTER_AVERAGED = edited(
    "router_averaged",
    "E-SUM-1",
    BACKWARD,
    "np.sum([dw_DE for _, dw_DE, _ in decided], axis=0)",
    "np.mean([dw_DE for _, dw_DE, _ in decided], axis=0)",
    "The router's gradient is averaged over the ranks.",
)
# https://github.com/NVIDIA-NeMo/Automodel/pull/2995
GATE_IS_A_CONSTANT = edited(
    "gate_is_a_constant",
    "E-SUM-1",
    "expert_parallel.decide_backward",
    "softmax_backward(dprobs_gate_gSE + dprobs_aux_gSE,",
    "softmax_backward(dprobs_aux_gSE,",
    "The router has no gradient from the output: probabilities crossed without one.",
)

SHARES_ROTATED = edited("shares_rotated", "E-SAME-1", FORWARD, "shares[rank[1]]", "shares[(rank[1] + 1) % R]", "A rank holds another one's experts.")
MASK_STAYS_AT_HOME = edited(
    "mask_stays_at_home",
    "E-SAME-1",
    FORWARD,
    "cross_out(mask_ARgECF)",
    "mask_ARgECF.reshape(cross_out(mask_ARgECF).shape)",
    "The dropout factor is the sender's.",
)
GRADIENT_TAKES_THE_WRONG_DOOR = edited(
    "gradient_takes_the_wrong_door",
    "E-SAME-1",
    BACKWARD,
    "cross_out(dreturned_ARgECD)",
    "cross_home(dreturned_ARgECD.reshape(cross_out(dreturned_ARgECD).shape)).reshape(cross_out(dreturned_ARgECD).shape)",
    "The gradient crosses the way the value came.",
)
ONE_SLOT_TOO_FEW = edited(
    "one_slot_too_few", "E-SAME-1", FORWARD, "min(statics.capacity, S)", "min(statics.capacity, S) - 1", "The buffer lacks the last slot."
)

# https://github.com/huggingface/transformers/pull/34191, https://github.com/pytorch/torchtune/pull/1875
MEAN_OF_MEANS = edited(
    "mean_of_means",
    "E-LOSS-1",
    FORWARD,
    "share_of_z = rows / max(rows.sum(), 1)",
    "share_of_z = np.full(len(rows), 1.0 / len(rows))",
    "The z-loss is the mean of the ranks' means, although they have unequal numbers of tokens.",
)
# https://github.com/NVIDIA/Megatron-LM/pull/3199
LOSSES_OF_ONE_RANK = edited(
    "losses_of_one_rank",
    "E-LOSS-1",
    FORWARD,
    "np.mean([decision.aux_loss for decision in decisions])",
    "decisions[0].aux_loss",
    "The balance loss is one rank's.",
)
LOSSES_SUMMED = edited(
    "losses_summed",
    "E-LOSS-1",
    FORWARD,
    "np.mean([decision.aux_loss for decision in decisions])",
    "np.sum([decision.aux_loss for decision in decisions])",
    "The balance loss grows with the number of ranks.",
)
# https://github.com/NVIDIA/Megatron-LM/commit/cac8d1a3f0
AUX_GRADIENT_TIMES_RANKS = edited(
    "aux_gradient_times_ranks",
    "E-LOSS-1",
    BACKWARD,
    "daux / len(ranks)",
    "daux",
    "The balance loss is right, its gradient is larger by the number of ranks.",
)
