# May import: numpy, the standard library, the subject's files and record.
"""Mutants of the way to the expert: padding, capacity, position, dispatch."""

import math

import numpy as np

from .. import dispatch, forward
from ..record import BIASED, OWN_CAPACITY, Changed, mutant
from ..tape import at_expert

# padding


@mutant("S-PAD-1", "padding", "layer", "padding that holds values", "MSK03 (HF Switch, L5: dead config)")
def padding_ignored(layer):
    """`valid` is never read: padding is a token like any other."""
    return lambda case: layer(Changed(case, valid=None))


@mutant("S-PAD-2", "padding", "routed_GS", "padding before tokens, and an expert 0 that overflows with it", "MSK02 NVIDIA/Megatron-LM#5542")
def padding_takes_slots(tape):
    """Padding is routed and uses up capacity."""
    return np.ones_like(tape.valid_GS)


@mutant("S-PAD-1", "padding", "layer", "padding that does not stand at the end of its group")
def padding_assumed_at_the_end(layer):
    """Only the number of real tokens is used: the first ones are taken for real."""

    def call(case):
        valid_GS = case.get("valid")
        if valid_GS is None:
            return layer(case)
        return layer(Changed(case, valid=np.arange(valid_GS.shape[1]) < valid_GS.sum(1, keepdims=True)))

    return call


@mutant("S-AUX-1", "padding", "x_GSD", "padding that holds values")
def padding_not_zeroed(tape):
    """Padding takes no slot, but its row enters the mean probabilities of the aux loss."""
    return tape.raw_x_GSD


@mutant("S-PAD-2", "padding", "routed_GS", "S = E, padding", "MSK04 NVIDIA/Megatron-LM#6114")
def padding_mask_on_expert_axis(tape):
    """The mask is broadcast along the wrong axis wherever the shapes allow it."""
    if tape.S != tape.E:
        return tape.valid_GS
    return np.take_along_axis(tape.valid_GS, tape.expert_GS, 1)


@mutant("S-PAD-1", "padding", "kept_GS", "padding, expert bias", dialect=BIASED)
def padding_gets_bias(tape):
    """Padding takes no slot but is computed: its row holds what the biases make of 0."""
    return tape.slot_GS < tape.capacity


# capacity


@mutant("S-CAP-1", "capacity", "kept_GS", "overflow", "CAP07 NVIDIA/Megatron-LM@7968fd6532 (a policy that no branch knows)")
def never_drops(tape):
    """Every claim is served."""
    return tape.routed_GS


@mutant(
    "S-CAP-1",
    "capacity",
    "kept_GS",
    "a full expert",
    "CAP13, arXiv 2101.03961 Fig. 15 (and the Keras example): inclusive cumsum compared with <",
)
def one_slot_lost(tape):
    """The count starts at 1 and is still compared with <."""
    return tape.routed_GS & (tape.slot_GS + 1 < tape.capacity)


@mutant("S-CAP-1", "capacity", "kept_GS", "overflow", "CAP13")
def one_slot_too_many(tape):
    """The count starts at 0 and is compared with <=."""
    return tape.routed_GS & (tape.slot_GS <= tape.capacity)


@mutant("S-CAP-1", "capacity", "kept_GS", "overflow, train off", "CAP04 deepspeedai/DeepSpeed#1658")
def drops_only_in_training(tape):
    """Without train nothing is dropped."""
    return forward.keep(tape) if tape.case.get("train") else tape.routed_GS


@mutant("S-CAP-1", "capacity", "kept_GS", "overflow in a group but the first", "CAP04 (drop implemented on one path only)")
def drops_only_in_first_group(tape):
    """Capacity is enforced in group 0 alone."""
    return tape.routed_GS & ((tape.slot_GS < tape.capacity) | (np.arange(tape.G)[:, None] > 0))


@mutant("S-CAP-1", "capacity", "capacity", "overflow, capacity < 4")
def minimum_capacity_again(tape):
    """The dialect's minimum of 4 slots is applied to a capacity that was resolved already."""
    return max(forward.given_capacity(tape), 4)


@mutant("S-CAP-1", "capacity", "capacity", "capacity 0")
def capacity_at_least_one(tape):
    """A capacity of 0 is taken for 1."""
    return max(forward.given_capacity(tape), 1)


@mutant("S-CAP-1", "capacity", "capacity", "overflow, odd capacity", "CAP10 deepspeedai/DeepSpeed#5156")
def capacity_split_over_two_ranks(tape):
    """The slots are split over two ranks, rounding down."""
    return forward.given_capacity(tape) // 2 * 2


def fair_share(tape):
    """Return the slots that are due before rounding, in the dialect's float64."""
    return tape.S * float(tape.case["capacity_factor"]) / tape.E


@mutant("S-CAP-1", "capacity", "capacity", "own capacity, S * factor / E fractional and > 4, overflow", "CAP13", features=OWN_CAPACITY)
def capacity_rounded_up(tape):
    """The capacity is rounded up."""
    return max(min(tape.S, math.ceil(fair_share(tape))), 4)


@mutant("S-CAP-1", "capacity", "capacity", "own capacity, S * factor / E < 4, overflow", features=OWN_CAPACITY)
def capacity_without_minimum(tape):
    """The dialect's minimum of 4 slots is left out."""
    return min(tape.S, int(fair_share(tape)))


@mutant("S-CAP-1", "capacity", "capacity", "own capacity, overflow", "CAP09 laekov/fastmoe#199", features=OWN_CAPACITY)
def capacity_not_divided_by_experts(tape):
    """The share is not divided by the number of experts."""
    return max(min(tape.S, int(fair_share(tape) * tape.E)), 4)


@mutant("S-CAP-1", "capacity", "capacity", "own capacity, G > 1, overflow", "CAP11 tensorflow/mesh@582d443", features=OWN_CAPACITY)
def capacity_of_whole_batch(tape):
    """The share is taken of all groups' tokens."""
    return max(min(tape.S, int(fair_share(tape) * tape.G)), 4)


@mutant("S-CAP-2", "capacity", "kept_GS", "overflow", "CAP13 (last-token priority)")
def keeps_last(tape):
    """The last claims are served instead of the first."""
    return tape.routed_GS & (claims_of_own_expert(tape) - 1 - tape.slot_GS < tape.capacity)


def claims_of_own_expert(tape):
    """Count for each token all claims of its group on its expert."""
    claim_GSE = (tape.expert_GS[..., None] == np.arange(tape.E)) & tape.routed_GS[..., None]
    return np.take_along_axis(claim_GSE.sum(1), tape.expert_GS, 1)


@mutant("S-CAP-2", "capacity", "kept_GS", "overflow, a later token with a larger gate", "CAP13 (highest-probability priority)")
def keeps_most_probable(tape):
    """The likeliest claims are served instead of the first."""
    score_GS = np.where(tape.routed_GS, at_expert(tape.probs_GSE, tape.expert_GS), -1)
    rival_GSS = (tape.expert_GS[:, :, None] == tape.expert_GS[:, None]) & (score_GS[:, :, None] < score_GS[:, None])
    return tape.routed_GS & (rival_GSS.sum(-1) < tape.capacity)


# position


@mutant("S-POS-1", "position", "slot_GS", "overflow", "CAP01 huggingface/transformers#48293")
def positions_all_zero(tape):
    """The running count is taken along an axis of length 1: every token is the first of its expert, and none is dropped."""
    return np.zeros_like(tape.expert_GS)


@mutant("S-POS-1", "position", "slot_GS", "G > 1, overflow in a later group", "CAP02 huggingface/transformers#48421")
def positions_over_all_groups(tape):
    """The groups are flattened before the claims are counted."""
    expert_1T, routed_1T = tape.expert_GS.reshape(1, -1), tape.routed_GS.reshape(1, -1)
    before_1TE = forward.claims_before(expert_1T, routed_1T, tape.E)
    return at_expert(before_1TE, expert_1T).reshape(tape.G, tape.S)


@mutant("S-POS-1", "position", "slot_GS", "a token of another expert before a token at S >= capacity")
def position_is_token_index(tape):
    """The position in the group is taken for the position at the expert."""
    return np.cumsum(tape.routed_GS, axis=1) - tape.routed_GS


@mutant(
    "S-POS-1",
    "position",
    "slot_GS",
    "more than 256 tokens on one expert (black box: kept)",
    "PRC11 (position counter in bfloat16)",
    dispatch="einsum",
)
def positions_counted_in_bfloat16(tape):
    """The count stops at 256, where bfloat16 has no next integer: later tokens share a slot."""
    return np.minimum(forward.slots(tape), 256)


@mutant("S-POS-1", "position", "slot_GS", "more than 128 tokens on one expert, overflow", "EDG06 vllm-project/vllm#34279 (int32, scaled down)")
def positions_counted_in_int8(tape):
    """The count wraps at 128."""
    return forward.slots(tape).astype(np.int8).astype(np.int64)


@mutant("S-POS-1", "position", "slot_GS", "overflow, S > 16", "GRD14 microsoft/tutel#26 (a carry that is lost)")
def positions_restart_each_tile(tape):
    """The count restarts with every tile of 16 tokens."""
    before_GSE = forward.claims_before(tape.expert_GS, tape.routed_GS, tape.E)
    return at_expert(before_GSE - before_GSE[:, np.arange(tape.S) // 16 * 16], tape.expert_GS)


@mutant("S-POS-1", "position", "layer", visibility="export")
def slots_exported_from_one(layer):
    """The exported slots count from 1; the layer itself is right."""

    def call(case):
        results = layer(case)
        return results | {"slot": results["slot"] + 1} if "slot" in results else results

    return call


# dispatch


@mutant("S-PACK-1", "dispatch", "layer", "E > 10", "CKP01 pytorch/torchtitan#1918")
def experts_sorted_as_strings(layer):
    """The experts' weights are loaded in the order 0, 1, 10, 11, 2."""

    def call(case):
        names = sorted(range(len(case["w_in"])), key=str)
        stacked = ("w_in", "w_gate", "w_out", "b_in", "b_gate", "b_out")
        return layer(Changed(case, **{name: case[name][names] for name in stacked if case.get(name) is not None}))

    return call


@mutant("S-PACK-1", "dispatch", "expert_x_GSD", "S > 1")
def row_of_next_token(tape):
    """Each expert reads the row after the one it was sent."""
    return np.roll(tape.x_GSD, -1, axis=1)


@mutant("S-PACK-1", "dispatch", "plan", "overflow of an expert that has a slot", dispatch="einsum")
def overflow_clamped_to_last_slot(tape):
    """Who finds no slot is added to the last one."""
    if tape.capacity == 0:
        return dispatch.einsum_plan(tape)
    return dispatch.slots_of(tape, tape.expert_GS, np.minimum(tape.slot_GS, tape.capacity - 1), tape.routed_GS)


@mutant("S-PACK-1", "dispatch", "plan", "G > 1, E > 1", "DIS05 facebookresearch/fairscale#184")
def buffer_axes_swapped(tape):
    """The buffer is laid out by (group, expert) and read by (expert, group)."""
    return dispatch.tokens_of(tape, (np.arange(tape.G)[:, None] * tape.E + tape.expert_GS) // tape.G)


@mutant("S-PACK-1", "dispatch", "plan", "E > 128, a token on expert 128 or later", "EDG06 deepspeedai/DeepSpeed#8261 (int32, scaled down)")
def expert_index_in_int8(tape):
    """The expert's index wraps at 128 on the way."""
    return dispatch.tokens_of(tape, tape.expert_GS.astype(np.int8).astype(np.int64) % tape.E)


@mutant("S-PACK-1", "dispatch", "plan", "overflow or padding", "DIS08 NVIDIA/TransformerEngine#2907", dispatch="sorted")
def sentinels_sorted_first(tape):
    """Who has no slot is marked -1 and sorts before all experts, where the code expects the first segment."""
    return dispatch.segments(tape, np.bincount(tape.expert_GS[tape.kept_GS], minlength=tape.E), sentinel=-1)


@mutant(
    "S-PACK-1",
    "dispatch",
    "plan",
    "overflow, and a later expert with kept tokens",
    "DIS16 NVIDIA/Megatron-LM@54d4b3ddbb",
    dispatch="sorted",
)
def segments_cut_before_dropping(tape):
    """The segments are cut by the counts that held before tokens were dropped."""
    return dispatch.segments(tape, np.bincount(tape.expert_GS[tape.routed_GS], minlength=tape.E), sentinel=tape.E)


@mutant(
    "S-PACK-1",
    "dispatch",
    "plan",
    "an expert without tokens before one that has some",
    "EDG03 NVIDIA/TransformerEngine#2134",
    dispatch="sorted",
)
def empty_expert_shifts_weights(tape):
    """An expert without tokens has no segment: those after it take the weights of the one before."""
    counts_E = np.bincount(tape.expert_GS[tape.kept_GS], minlength=tape.E)
    present_first = np.argsort(counts_E == 0, kind="stable")
    return dispatch.segments(tape, counts_E[present_first], sentinel=tape.E)


@mutant("S-PACK-1", "dispatch", "plan", "T > 16", "DIS09 sgl-project/sglang#20302")
def choices_of_first_chunk(tape):
    """Every chunk of 16 tokens is sent by the choices of the first chunk."""
    T = tape.expert_GS.size
    return dispatch.tokens_of(tape, tape.expert_GS.ravel()[np.arange(T) % 16].reshape(tape.expert_GS.shape))


@mutant("S-PACK-1", "dispatch", "combined_GSD", "tokens that are not sorted by expert", dispatch="sorted")
def rows_left_in_expert_order(tape):
    """The permutation into the experts' order is not undone."""
    out_TD = forward.combine(tape).reshape(-1, tape.x_GSD.shape[-1])
    tokens = tape.plan.tokens
    out_TD[np.sort(tokens)] = out_TD[tokens]
    return out_TD.reshape(tape.x_GSD.shape)


@mutant(
    "S-PACK-1",
    "dispatch",
    "combined_GSD",
    "T not a multiple of 8, the last tokens kept",
    "DIS11 linkedin/Liger-Kernel#1361 (32, scaled down)",
)
def last_rows_not_written(tape):
    """Tiles of 8 tokens are counted with floor: the rows after the last whole one stay 0."""
    T = tape.expert_GS.size
    return np.where(np.arange(T).reshape(tape.G, tape.S, 1) < T // 8 * 8, forward.combine(tape), 0)


@mutant("S-BACK-3", "dispatch", "outer", "an expert with fewer tokens than another, dout", "EDG02 pytorch/pytorch#193633", dispatch="einsum")
def unused_slots_hold_nan(tape, a_TD, b_TF):
    """Slots without a token are not initialised, and 0 * NaN is NaN."""
    packed_END, packed_ENF = tape.plan @ a_TD, tape.plan @ b_TF
    packed_END[tape.plan.sum(-1) == 0] = np.nan
    return tape.times(packed_END.swapaxes(1, 2), packed_ENF)
