# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Position buckets and the bias that they choose: T-POS-1, T-POS-2, T-POS-3."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from properties.drawn import Plan, Scene, assert_equal, plans
from properties.harness import clause, draws, needs
from properties.operations import Operations
from refswitch.proof.adjoint import dot

PAIRS = ((16, 128), (32, 128), (4, 16), (8, 20), (6, 7), (2, 9), (7, 30))  # buckets of one direction, and the largest distance
BUCKETS = st.sampled_from(PAIRS)


@clause("T-POS-1")
@draws(examples=[(pair,) for pair in PAIRS], plan=BUCKETS)
def test_bucket_starts__by_rational_powers(operations: Operations, plan: tuple[int, int]) -> None:
    """A distance n from exact on lies in the bucket of the largest j with (n / exact)^wide >= (max / exact)^j, decided in rationals."""
    buckets, largest = plan
    exact, wide = buckets // 2, buckets - buckets // 2
    starts = operations.bucket_starts(buckets, largest)
    assert starts.dtype.kind == "i"
    assert starts.shape == (buckets,)
    for n in range(2 * largest):
        j = sum(Fraction(n, exact) ** wide >= Fraction(largest, exact) ** k for k in range(1, wide)) if n >= exact else 0
        assert np.sum(starts <= n) - 1 == (n if n < exact else exact + j), f"distance {n}"


@clause("T-POS-1", "T-POS-2")
@draws()
def test_position_buckets__by_hand(operations: Operations) -> None:
    """The first distance of each bucket as T5 has them, where no logarithm is off by one at 16, 32 and 64."""
    assert operations.bucket_starts(16, 128).tolist() == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    assert operations.bucket_starts(32, 128).tolist() == [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    here = np.arange(200)
    both_LM = operations.position_buckets(here, here, 32, 128, bidirectional=True)
    back_LM = operations.position_buckets(here, here, 32, 128, bidirectional=False)
    assert (both_LM[0, :3].tolist(), both_LM[:3, 0].tolist(), both_LM[0, 199], both_LM[199, 0]) == ([0, 17, 18], [0, 1, 2], 31, 15)
    assert (back_LM[0].max(), back_LM[113, 0], back_LM[112, 0]) == (0, 31, 30)


@clause("T-POS-2")
@needs("ahead", "beyond the largest distance", "packed positions")
@draws(plan=plans("LM", points=0), buckets=BUCKETS, bidirectional=st.booleans(), shift=st.integers(-9, 300))
def test_position_buckets__of_the_difference_alone(
    operations: Operations, plan: Plan, buckets: tuple[int, int], bidirectional: bool, shift: int
) -> None:
    """A bucket is the number of starts up to the distance looked back, or in the upper half to the distance ahead; equal shifts change nothing."""
    scene, (one_way, largest) = Scene(operations, plan), buckets
    query_L, memory_M = (scene.random.integers(-2 * largest, 2 * largest, scene.shape(letter)) for letter in "LM")
    operations.meets("ahead", (memory_M > query_L[:, None]).any())
    operations.meets("beyond the largest distance", (query_L[:, None] - memory_M > largest).any())
    operations.meets("packed positions", (np.diff(memory_M) < 0).any())  # not those of the row
    U = 2 * one_way if bidirectional else one_way
    bucket_LM = operations.position_buckets(query_L, memory_M, U, largest, bidirectional)
    starts = operations.bucket_starts(one_way, largest).tolist()
    for index, bucket in np.ndenumerate(bucket_LM):
        back = int(query_L[index[0]] - memory_M[index[1]])
        distance = abs(back) if bidirectional else max(back, 0)
        wanted = max(i for i, start in enumerate(starts) if start <= distance)
        assert bucket == wanted + (one_way if bidirectional and back < 0 else 0), f"{-back} ahead"
    assert bucket_LM.shape == scene.shape("LM")
    assert_equal(operations.position_buckets(query_L + shift, memory_M + shift, U, largest, bidirectional), bucket_LM, "bucket_LM")


@clause("T-POS-3")
@needs("a bucket of several pairs", "an empty bucket")
@draws(plan=plans("LMHU", points=0))
def test_position_bias__adjoint(operations: Operations, plan: Plan) -> None:
    """<bias(table), d> = <table, dtable(d)> exactly on integers: the gather's transpose adds, and an empty bucket's row has no gradient."""
    scene = Scene(operations, plan)
    bucket_LM, U = scene.below("LM", plan.sizes["U"]), plan.sizes["U"]
    table_UH, dbias_HLM = scene.whole("UH"), scene.whole("HLM")
    count_U = np.bincount(bucket_LM.ravel(), minlength=U)
    operations.meets("a bucket of several pairs", (count_U > 1).any())
    operations.meets("an empty bucket", (count_U == 0).any())
    bias_HLM = operations.position_bias_forward(table_UH, bucket_LM)
    dtable_UH = operations.position_bias_backward(dbias_HLM, bucket_LM, U)
    assert (bias_HLM.dtype, dtable_UH.dtype) == (scene.dtype, scene.dtype)
    assert dot(bias_HLM, dbias_HLM) == dot(table_UH, dtable_UH)
    for (query, memory), bucket in np.ndenumerate(bucket_LM):
        assert_equal(bias_HLM[:, query, memory], table_UH[bucket], "bias_H")
    assert_equal(dtable_UH[count_U == 0], np.zeros((int(np.sum(count_U == 0)), plan.sizes["H"])), "dtable_UH")


@clause("T-POS-3")
@draws()
def test_position_bias__by_hand(operations: Operations) -> None:
    """Two heads, three buckets, one of them met twice."""
    scene = Scene(operations, Plan({}, 0, 0))
    table_UH, bucket_LM = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], scene.dtype), np.array([[2, 0], [2, 1]])
    assert operations.position_bias_forward(table_UH, bucket_LM).tolist() == [[[5.0, 1.0], [5.0, 3.0]], [[6.0, 2.0], [6.0, 4.0]]]
    dbias_HLM = np.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], scene.dtype)
    assert operations.position_bias_backward(dbias_HLM, bucket_LM, 3).tolist() == [[2.0, 6.0], [4.0, 8.0], [4.0, 12.0]]
