# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""Experts whose hidden width is cut into parts, one rank each: model parallelism.

Paper: 5.2, 5.5, figure 9. Spec: E-CUT-1. Read `experts` first. Next: `expert_parallel`, which runs these experts between its crossings.

All ranks of one row hold the same tokens and different columns of w_in, rows of w_out. What each computes is a part of the output, and of the input's
gradient: both are sums over the ranks, the one all-reduce forward and the one backward. The activation is elementwise, so it needs neither.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from refswitch.config import RoundingPoints
from refswitch.numbers.precision import round_to
from refswitch.reference.experts import ExpertsParams, ExpertsSaved, experts_backward, experts_forward

HIDDEN_AXIS = ExpertsParams(2, 2, 1, 1, 1, None)  # type: ignore[arg-type]  # of each parameter; the output's bias has none


def slices_of(size: int, parts: int) -> list[slice]:
    """Return which part of an axis each rank holds; where the parts cannot be equal the later ones are larger."""
    return [slice(start, stop) for start, stop in pairwise(size * i // parts for i in range(parts + 1))]


def part_of(params: ExpertsParams, experts: slice, hidden: slice) -> ExpertsParams:
    """Return what one rank holds: its share of the experts, its part of their hidden width."""
    index = [(experts, *(slice(None),) * (axis - 1), hidden) if axis else (experts,) for axis in HIDDEN_AXIS]
    held: list[Any] = [None if value is None else value[key] for value, key in zip(params, index, strict=True)]
    return ExpertsParams(*held)


def cut_experts_forward(
    packed_GeCD: np.ndarray,
    factor_GeCF: np.ndarray,
    experts: slice,
    params: ExpertsParams,
    cuts: int,
    activation: str,
    points: RoundingPoints,
) -> tuple[np.ndarray, list[ExpertsSaved]]:
    """Run one share of the experts on the ranks that hold the parts of its hidden width, and sum the parts: an all-reduce.

    Spec: E-CUT-1. Paper: 5.2, 5.5. The output's bias belongs to the first part alone. Rounding: R6, R7, R8 of each part, R8 of the sum.
    """
    outs: list[np.ndarray] = []
    saved: list[ExpertsSaved] = []
    for hidden in slices_of(factor_GeCF.shape[-1], cuts):
        bias_scale_GeC = np.full(packed_GeCD.shape[:3], float(hidden.start == 0))
        part = part_of(params, experts, hidden)
        out_GeCD, _, kept = experts_forward(packed_GeCD, factor_GeCF[..., hidden], bias_scale_GeC, part, activation, points)  # F1
        outs, saved = [*outs, out_GeCD], [*saved, kept]
    return round_to(np.sum(outs, axis=0), points.expert_out), saved  # F2: all-reduce over the parts


def cut_experts_backward(
    dout_GeCD: np.ndarray, saved: list[ExpertsSaved], experts: slice, params: ExpertsParams, cuts: int, activation: str
) -> tuple[np.ndarray, ExpertsParams]:
    """Return dpacked_GeCD and the share's gradients. Spec: E-CUT-1. Every part reads the whole of dout; dpacked is a sum as the output was."""
    held = [part_of(params, experts, hidden) for hidden in slices_of(params.w_in_EDF.shape[-1], cuts)]
    back = [experts_backward(dout_GeCD, kept, part, activation) for kept, part in zip(saved, held, strict=True)]  # B2
    dpacked_GeCD = np.sum([dpacked_GeCD for dpacked_GeCD, _, _, _ in back], axis=0)  # B1: all-reduce over the parts
    fields = zip(*(dparams for _, _, _, dparams in back), strict=True)
    dshare: list[Any] = [
        None if values[0] is None else np.concatenate(values, axis=axis) if axis else np.sum(values, axis=0)
        for values, axis in zip(fields, HIDDEN_AXIS, strict=True)
    ]
    return dpacked_GeCD, ExpertsParams(*dshare)
