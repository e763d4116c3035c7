# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Who sees whom, the softmax over what is seen, attention and its backward: T-MASK-1, T-MASK-2, T-ATT-1, T-ATT-2."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.drawn import (
    Plan,
    Scene,
    assert_equal,
    assert_near,
    assert_on_grid,
    assert_slopes,
    assert_within,
    in_every_format,
    noise_of,
    plans,
    powers,
)
from properties.harness import clause, draws, needs
from properties.model_tubes import AttentionTubes, attention_tubes, masked_probs
from properties.operations import Operations
from refswitch.proof.adjoint import dot
from refswitch.reference.attention import AttentionParams
from refswitch.verify.tubes import exact

GRADIENTS = ("dx_BLD", "dmemory_BMD", "dbias_HLM", "dw_query_DHK", "dw_key_DHK", "dw_value_DHK", "dw_out_HKD")


class Case(NamedTuple):
    """What one call of attention reads."""

    x_BLD: np.ndarray
    memory_BMD: np.ndarray
    bias_HLM: np.ndarray
    params: AttentionParams
    allowed_BLM: np.ndarray
    factor_BHLM: np.ndarray


def case_of(scene: Scene, scale: float = 0.7) -> Case:
    """Draw a call in which queries see some of the memory: some queries nothing, some memory nobody."""
    allowed_BLM = scene.random.random(scene.shape("BLM")) < 0.7
    allowed_BLM[-1, 0] = False
    allowed_BLM[0, :, 0] = False
    params = AttentionParams(*(scene.normal(letters, scale) for letters in ("DHK", "DHK", "DHK", "HKD")))
    x_BLD, memory_BMD, bias_HLM = scene.normal("BLD"), scene.normal("BMD"), scene.normal("HLM")
    return Case(x_BLD, memory_BMD, bias_HLM, params, allowed_BLM, scene.factor("BHLM"))


def play(operations: Operations, case: Case, dout_BLD: np.ndarray, scene: Scene) -> tuple[np.ndarray, ...]:
    """Return the output and the gradients, in the order of the tubes."""
    out_BLD, saved = operations.attention_forward(*case, scene.points)
    dx_BLD, dmemory_BMD, dbias_HLM, dparams = operations.attention_backward(dout_BLD, saved, case.params, scene.points)
    return out_BLD, dx_BLD, dmemory_BMD, dbias_HLM, *dparams


def tubes_of(case: Case, dout_BLD: np.ndarray, scene: Scene) -> AttentionTubes:
    """Return the tubes of a call."""
    return attention_tubes(*case[:3], tuple(case.params), *case[4:], dout_BLD, scene.points, scene.arithmetic)


@clause("T-MASK-1")
@needs("a padding of its row's segment", "a query that sees nothing", "several segments", "more memory than queries", "causal")
@draws(plan=plans("BLM", points=0), causal=st.booleans(), segments=st.integers(1, 4))
def test_allowed_pairs__pair_by_pair(operations: Operations, plan: Plan, causal: bool, segments: int) -> None:
    """Seen is what is valid, of the same segment, and where causal not behind the query: each by itself hides."""
    scene = Scene(operations, plan)
    query_BL, memory_BM = scene.below("BL", segments), scene.below("BM", segments)
    valid_BM = scene.random.random(memory_BM.shape) < 0.75
    allowed_BLM = operations.allowed_pairs(query_BL, memory_BM, valid_BM, causal)
    operations.meets("a padding of its row's segment", ((memory_BM[:, None] == query_BL[..., None]) & ~valid_BM[:, None]).any())
    operations.meets("a query that sees nothing", not allowed_BLM.any(axis=-1).all())
    operations.meets("several segments", len(np.unique(query_BL)) > 1)
    operations.meets("more memory than queries", plan.sizes["M"] > plan.sizes["L"])
    operations.meets("causal", causal)
    assert allowed_BLM.dtype == np.bool_
    assert allowed_BLM.shape == scene.shape("BLM")
    for b, query, memory in np.ndindex(allowed_BLM.shape):
        sees = query_BL[b, query] == memory_BM[b, memory] and valid_BM[b, memory] and not (causal and memory > query)
        assert allowed_BLM[b, query, memory] == sees, (b, query, memory)


@clause("T-MASK-1", "T-MASK-2")
@draws()
def test_allowed_pairs__by_hand(operations: Operations) -> None:
    """Packed segments: a query sees its own and not beyond itself; padding of its own segment sees nothing and is seen by nobody."""
    segment_BL = np.array([[1, 1, 2, 0]])
    allowed_BLL = operations.allowed_pairs(segment_BL, segment_BL, segment_BL != 0, causal=True)
    assert allowed_BLL[0].astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    scene = Scene(operations, Plan({"B": 1, "H": 1, "L": 4, "M": 4}, 0, 0))
    probs_BHLL = operations.masked_softmax(900.0 * scene.ones("BHLM"), allowed_BLL)
    assert probs_BHLL[0, 0].tolist() == [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 0]]


@clause("T-MASK-2")
@needs("a query that sees nothing", "a hidden score above all others")
@draws(plan=plans("BHLM", points=0), size=st.sampled_from((1.0, 60.0, 4096.0)), shift=st.sampled_from((-1024.0, 0.5, 65536.0)))
def test_masked_softmax__of_what_is_seen(operations: Operations, plan: Plan, size: float, shift: float) -> None:
    """The probabilities lie in the softmax's tube, are exactly 0 where hidden whatever stands there, and do not change with a shift of a row."""
    scene = Scene(operations, plan)
    scores_BHLM = np.round(4.0 * size * scene.random.normal(size=scene.shape("BHLM"))).astype(scene.dtype) / 4.0  # shifts of them are exact
    allowed_BLM = scene.random.random(scene.shape("BLM")) < 0.6
    allowed_BLM[0, 0] = False
    probs_BHLM = operations.masked_softmax(scores_BHLM, allowed_BLM)
    hidden_BHLM = np.broadcast_to(~allowed_BLM[:, None], probs_BHLM.shape)
    assert_within(probs_BHLM, masked_probs(exact(scores_BHLM), allowed_BLM, scene.arithmetic), "probs_BHLM", scene)
    assert not probs_BHLM[hidden_BHLM].any()
    for anything in (2.0**90, -(2.0**90)):
        there_BHLM = np.where(hidden_BHLM, anything, scores_BHLM).astype(scene.dtype)
        assert_equal(operations.masked_softmax(there_BHLM, allowed_BLM), probs_BHLM, "probs_BHLM")
    operations.meets("a query that sees nothing", hidden_BHLM.all(axis=-1).any())
    operations.meets("a hidden score above all others", hidden_BHLM.any())
    assert_equal(operations.masked_softmax((scores_BHLM + shift).astype(scene.dtype), allowed_BLM), probs_BHLM, "probs_BHLM")


@clause("T-ATT-1", "T-ATT-2", is_oracle=True)
@needs("narrow points")
@draws(examples=in_every_format("BLMDHK"), plan=plans("BLMDHK"))
def test_attention__matches_its_derivation(operations: Operations, plan: Plan) -> None:
    """Output and all seven gradients lie in the tubes of the derivation, rounded where the points say."""
    scene = Scene(operations, plan)
    case, dout_BLD = case_of(scene), scene.gradient("BLD")
    tube = tubes_of(case, dout_BLD, scene)
    found = play(operations, case, dout_BLD, scene)
    for got, wanted, name in zip(found, tube, ("out_BLD", *GRADIENTS), strict=True):
        assert_within(got, wanted, name, scene)
    for name, format, array in (("out_BLD", "activations", found[0]), ("dx_BLD", "gradients", found[1]), ("dmemory_BMD", "gradients", found[2])):
        assert_on_grid(array, format, name, scene)


@clause("T-ATT-1", "T-ATT-2")
@draws(plan=plans("BLMDHK", points=0))
def test_attention__memory_permutation(operations: Operations, plan: Plan) -> None:
    """Memory may lie in any order, with its biases, marks and dropout; its gradients come in that order. So may the heads."""
    scene = Scene(operations, plan)
    case, dout_BLD = case_of(scene), scene.gradient("BLD")
    order, heads = scene.random.permutation(plan.sizes["M"]), scene.random.permutation(plan.sizes["H"])
    params = AttentionParams(*(weight[:, heads] for weight in case.params[:3]), case.params.w_out_HKD[heads])
    moved = Case(
        case.x_BLD, case.memory_BMD[:, order], case.bias_HLM[heads][..., order], params, case.allowed_BLM[..., order],
        case.factor_BHLM[:, heads][..., order],
    )  # fmt: skip
    tube, found, other = tubes_of(case, dout_BLD, scene), play(operations, case, dout_BLD, scene), play(operations, moved, dout_BLD, scene)
    back: dict[str, Any] = {"M": order, "H": heads}
    for name, one, two, wanted in zip(("out_BLD", *GRADIENTS), found, other, tube, strict=True):
        letters = name.rpartition("_")[2]
        index = np.ix_(*(back.get(letter, np.arange(size)) for letter, size in zip(letters, one.shape, strict=True)))
        assert_near(two, one[index], type(wanted)(wanted.value[index], wanted.radius[index]), name)


@clause("T-ATT-1", "T-ATT-2")
@draws(plan=plans("BLMDHK"))
def test_attention__hidden_memory_is_nobody_s(operations: Operations, plan: Plan) -> None:
    """Memory that nobody may see changes no bit and has a gradient of 0; a query that sees nothing has an output and gradients of 0."""
    scene = Scene(operations, plan)
    case, dout_BLD = case_of(scene), scene.gradient("BLD")
    hidden_BM = ~case.allowed_BLM.any(axis=1)
    poisoned = case._replace(memory_BMD=np.where(hidden_BM[..., None], 2.0**40, case.memory_BMD).astype(scene.dtype))
    found, other = play(operations, case, dout_BLD, scene), play(operations, poisoned, dout_BLD, scene)
    for name, one, two in zip(("out_BLD", *GRADIENTS), found, other, strict=True):
        assert_equal(two, one, name)
    blind_BL = ~case.allowed_BLM.any(axis=-1)
    assert blind_BL.any()
    assert hidden_BM.any()
    assert not found[0][blind_BL].any()
    assert not found[1][blind_BL].any()
    assert not found[2][hidden_BM].any()


@clause("T-ATT-1", "T-ATT-2")
@draws(plan=plans("LMDHK", points=0, B=4))
def test_attention__batch_split(operations: Operations, plan: Plan) -> None:
    """Rows of a batch do not read each other: half a batch has its half of the output, and the parameters' gradients of the halves add up."""
    scene = Scene(operations, plan)
    case, dout_BLD = case_of(scene), scene.gradient("BLD")
    tube, whole = tubes_of(case, dout_BLD, scene), play(operations, case, dout_BLD, scene)

    def part(rows: slice) -> tuple[np.ndarray, ...]:
        cut = Case(case.x_BLD[rows], case.memory_BMD[rows], case.bias_HLM, case.params, case.allowed_BLM[rows], case.factor_BHLM[rows])
        return play(operations, cut, dout_BLD[rows], scene)

    halves = part(slice(0, 1)), part(slice(1, 4))
    for name, one, left, right, wanted in zip(("out_BLD", *GRADIENTS), whole, *halves, tube, strict=True):
        together = np.concatenate([left, right]) if "_B" in name else left + right
        assert_near(together, one, wanted, name)


@clause("T-ATT-1")
@needs("narrow points")
@draws(plan=plans("BLMDHK"), power=powers(3))
def test_attention_forward__homogeneity(operations: Operations, plan: Plan, power: float) -> None:
    """Queries times 2^k with keys times 2^-k change no bit; values times 2^k, or w_out times 2^k, are an output times 2^k."""
    scene = Scene(operations, plan)
    case = case_of(scene)
    out_BLD, _ = operations.attention_forward(*case, scene.points)

    def other(**powers_: float) -> np.ndarray:
        changed = {name: (getattr(case.params, name) * factor).astype(scene.dtype) for name, factor in powers_.items()}
        return operations.attention_forward(*case._replace(params=case.params._replace(**changed)), scene.points)[0]

    assert_equal(other(w_query_DHK=power, w_key_DHK=1.0 / power), out_BLD, "out_BLD")
    assert_equal(other(w_value_DHK=power), power * out_BLD, "out_BLD")
    assert_equal(other(w_out_HKD=power), power * out_BLD, "out_BLD")


@clause("T-ATT-2")
@draws(plan=plans("BLMDHK", points=0))
def test_attention_backward__adjoint(operations: Operations, plan: Plan) -> None:
    """Each query sees one place: probabilities are 1, and output to values is a linear map whose gradients are its transpose, exactly on integers."""
    scene = Scene(operations, plan)
    drawn = case_of(scene)
    seen_BL = scene.below("BL", plan.sizes["M"])
    allowed_BLM = np.arange(plan.sizes["M"]) == seen_BL[..., None]
    params = AttentionParams(*(scene.whole(letters) for letters in ("DHK", "DHK", "DHK", "HKD")))
    case = Case(scene.whole("BLD"), scene.whole("BMD"), drawn.bias_HLM, params, allowed_BLM, drawn.factor_BHLM)
    dout_BLD = scene.whole("BLD")
    out_BLD, dx_BLD, dmemory_BMD, dbias_HLM, dw_query_DHK, dw_key_DHK, dw_value_DHK, dw_out_HKD = play(operations, case, dout_BLD, scene)
    wanted = dot(out_BLD, dout_BLD)
    assert dot(case.memory_BMD, dmemory_BMD) == wanted
    assert dot(params.w_value_DHK, dw_value_DHK) == wanted
    assert dot(params.w_out_HKD, dw_out_HKD) == wanted
    for name, array in (("dx", dx_BLD), ("dbias", dbias_HLM), ("dw_query", dw_query_DHK), ("dw_key", dw_key_DHK)):
        assert not array.any(), f"{name}: who sees one place has no choice"


@clause("T-ATT-2")
@needs(wide=True)
@draws(plan=plans("BLMDHK", points=0))
def test_attention_backward__finite_difference(operations: Operations, plan: Plan) -> None:
    """The slopes along the input, the memory, the bias and each matrix are the gradients."""
    scene = Scene(operations, plan)
    case, dout_BLD = case_of(scene, 0.4), scene.gradient("BLD")
    _, *gradients = play(operations, case, dout_BLD, scene)
    noise = noise_of([(tubes_of(case, dout_BLD, scene).out_BLD, dout_BLD)])
    names = ("x_BLD", "memory_BMD", "bias_HLM", *AttentionParams._fields)

    def value(**arrays: np.ndarray) -> tuple[float, int]:
        params = AttentionParams(*(arrays[name] for name in AttentionParams._fields))
        there = Case(*(arrays[name] for name in names[:3]), params, case.allowed_BLM, case.factor_BHLM)
        return float(np.sum(dout_BLD * operations.attention_forward(*there, scene.points)[0])), 0

    assert_slopes(value, dict(zip(names, (*case[:3], *case.params), strict=True)), dict(zip(names, gradients, strict=True)), noise, scene.random)


@clause("T-ATT-1", "T-ATT-2")
@draws()
def test_attention__by_hand(operations: Operations) -> None:
    """One query, two places, one head of width 1, scores made equal by the bias: halves are mixed, one of them dropped."""
    scene = Scene(operations, Plan({}, 0, 0))

    def array(*values: Any) -> np.ndarray:
        return np.array(values, scene.dtype)

    # q = 2, k = (1, 2), scores = (2 + 3, 4 + 1) are equal, v = (4, 12), mixed = 1/2 4 * 2 + 0, out = 4 * 3
    params = AttentionParams(array([[2.0]]), array([[1.0]]), array([[4.0]]), array([[3.0]]))
    memory_BMD, bias_HLM = array([[1.0], [2.0]]), array([[3.0, 1.0]])
    case = Case(array([[1.0]]), memory_BMD, bias_HLM, params, np.ones((1, 1, 2), bool), array([[[2.0, 0.0]]]))
    out_BLD, dx_BLD, dmemory_BMD, dbias_HLM, dw_query, dw_key, dw_value, dw_out = play(operations, case, array([[1.0]]), scene)
    # dmixed = 3, dv = (1 * 3, 0), dp = (3 * 4 * 2, 0), mean = 12, dscores = (1/2 (24 - 12), 1/2 (0 - 12)) = (6, -6)
    assert (out_BLD.tolist(), dbias_HLM.tolist()) == ([[[12.0]]], [[[6.0, -6.0]]])
    assert dx_BLD.tolist() == [[[2.0 * (6.0 * 1.0 - 6.0 * 2.0)]]]  # w_query dq
    assert dmemory_BMD.tolist() == [[[1.0 * 6.0 * 2.0 + 4.0 * 3.0], [1.0 * -6.0 * 2.0]]]  # w_key dk + w_value dv
    assert [dw.ravel().tolist() for dw in (dw_query, dw_key, dw_value, dw_out)] == [[-6.0], [12.0 - 24.0], [3.0], [4.0]]
