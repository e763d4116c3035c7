# May import: standard library, numpy, pytest, refswitch.
"""The judge and the reference agree: two independent evaluations of every dialect, under every profile, exporting and black box.

The judge evaluates the layer in tubes and never calls the reference's arithmetic for their centres, so a slip in either shows here.
"""

from __future__ import annotations

import numpy as np
import pytest

from refswitch.config import rounding_points
from refswitch.errors import InputError
from refswitch.numbers.precision import FORMATS, is_stored, round_to, spacing
from refswitch.spec_data import load_dialect, load_profile, names_of
from refswitch.verify import tubes
from refswitch.verify.cases import Target, check_target, prepare
from refswitch.verify.findings import statuses
from refswitch.verify.judge import Verdicts, compare, judge_case
from refswitch.verify.oracle import reference_outputs
from refswitch.verify.run import FEATURES

PLAYED = tuple(feature for feature in FEATURES if feature not in ("top_k", "own_capacity", "ranks"))
NOT_JUDGED = ("fairscale_top2", "st_moe_pytorch", "t2t_noisy_top1", "vllm_reference")
BLACK_BOX = ("out", "aux_loss", "z_loss")
PAIRS = [(dialect, profile) for dialect in names_of("dialects") if dialect not in NOT_JUDGED for profile in names_of("profiles")]


def _target(dialect: str, profile: str) -> Target:
    return Target(load_dialect(dialect), load_profile(profile), frozenset(PLAYED), {})


@pytest.mark.parametrize(("dialect", "profile"), PAIRS[::2] + [pair for pair in PAIRS[1::2] if pair[1] in ("float32", "float64")])
def test_reference__is_never_accused(dialect: str, profile: str) -> None:
    """Playing any record, under its own profile, nothing fails, exporting everything or the output alone."""
    target = _target(dialect, profile)
    check_target(target)
    points = rounding_points(target.dialect, target.profile)
    decided = number = 0
    for number, prepared in enumerate(prepare(target, "quick", seed=11)):
        outputs = reference_outputs(prepared.case, target.dialect, points)
        if number % 3 == 0:
            outputs = {name: value for name, value in outputs.items() if name in BLACK_BOX or name.startswith("d")}
        verdicts = judge_case(prepared, target, outputs)
        assert verdicts.failing == set(), (prepared.name, next(check for check in verdicts.checks if not check.ok))
        decided += any(check.output == "out" and check.elements for check in verdicts.checks)
    assert decided > number // 2, "most cases say something about the output"


@pytest.mark.parametrize("dialect", NOT_JUDGED)
def test_target__says_what_it_cannot_judge(dialect: str) -> None:
    """A record that is beyond this version is refused in one line, not judged halfway."""
    with pytest.raises(InputError, match=dialect):
        check_target(_target(dialect, "float32"))


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_round_to__equals_numpy(name: str) -> None:
    """Class E: every rounding of float64 bit patterns equals NumPy's own, overflow, subnormals and signs of zero included."""
    bits = np.random.Philox(key=7).random_raw(200_000).view(np.float64)
    halves = np.array([65520.0, 65519.99, 3.4028235677973366e38, -0.0, 0.0, 2.0**-150, 3 * 2.0**-150, 2.0**-25, np.inf, -np.inf, np.nan])
    with np.errstate(all="ignore"):
        x = np.concatenate([bits, bits * 2.0**-900, halves])
        expected = x.astype(name).astype(np.float64)
        found = round_to(x, FORMATS[name])
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


def test_round_to__bfloat16_by_hand() -> None:
    """Ties go to even, carries cross binades, and no value is rounded twice on the way."""
    x = np.array([257.0, 259.0, 255.5, 1.0 + 2.0**-8, 1.0 + 2.0**-8 + 2.0**-40, 3.4e38, 3.3961e38])
    assert round_to(x, FORMATS["bfloat16"]).tolist() == [256.0, 260.0, 256.0, 1.0, 1.0 + 2.0**-7, np.inf, 255 * 2.0**120 * 1.0]
    assert is_stored(np.array([257.0, 256.0]), FORMATS["bfloat16"]).tolist() == [False, True]
    assert spacing(np.array([256.0, 0.0]), FORMATS["bfloat16"]).tolist() == [2.0, 2.0**-133]


def test_tubes__cover_every_order_of_a_sum() -> None:
    """Sequential, reversed, pairwise and NumPy's own order in float32, with and without a rounded product, lie inside; a wrong term does not."""
    arithmetic = tubes.arithmetic_of(load_profile("float32"))
    draws = np.random.Generator(np.random.Philox(key=3)).standard_normal((2, 40, 96)).astype(np.float32)
    a, b = draws
    tube = tubes.contract("nk,nk->n", tubes.exact(a), tubes.exact(b), arithmetic, 96)
    products = a * b
    sequential, backwards = np.zeros(40, np.float32), np.zeros(40, np.float32)
    for k in range(96):
        sequential, backwards = sequential + products[:, k], backwards + products[:, 95 - k]
    tree = products
    while tree.shape[1] > 1:
        tree = np.concatenate([tree[:, 0:-1:2] + tree[:, 1::2], tree[:, -1:] if tree.shape[1] % 2 else tree[:, :0]], axis=1)
    for found in (sequential, backwards, tree[:, 0], products.sum(axis=1)):
        assert (tubes.ratio(found, tube) <= 1.0).all()
    assert (tubes.ratio(sequential - products[:, 7], tube) > 1.0).all()


def test_ratio__compares_what_is_not_a_number() -> None:
    """NaN and infinity are compared, never skipped."""
    tube = tubes.Tube(np.array([1.0, np.nan, np.inf, 1.0]), np.array([0.5, 0.5, 0.5, 0.0]))
    assert tubes.ratio(np.array([np.nan, np.nan, np.inf, 1.0]), tube).tolist() == [np.inf, 0.0, 0.0, 0.0]
    assert tubes.ratio(np.array([np.inf, 1.0, -np.inf, 1.5]), tube).tolist() == [np.inf] * 4


def test_tubes__a_bias_may_start_the_accumulator() -> None:
    """Products of integers are exact, but a sum that starts from a fraction rounds at every step."""
    arithmetic = tubes.arithmetic_of(load_profile("float32"))
    x, w = np.full((1, 50), 3.0, np.float32), np.full((50, 40), 5.0, np.float32)
    bias = np.linspace(0.01, 0.99, 40).astype(np.float32)[None]
    started = bias
    for k in range(50):
        started = started + x[:, k : k + 1] * w[k]
    tube = tubes.contract("nk,km->nm", tubes.exact(x), tubes.exact(w), arithmetic, 50, [tubes.exact(bias.astype(np.float64))])
    assert (started != x @ w + bias).any()
    assert (tubes.ratio(started, tube) <= 1.0).all()
    assert (tubes.contract("nk,km->nm", tubes.exact(x), tubes.exact(w), arithmetic, 50).radius == 0.0).all()


def test_tubes__a_vacuous_bound_is_infinite() -> None:
    """Where n u reaches 1 nothing is certain: an infinite radius, which accuses nobody, and exact zeros stay exact."""
    arithmetic = tubes.arithmetic_of(load_profile({"base": "float32", "accumulate.format": "bfloat16"}))
    a = np.stack([np.ones(300), np.zeros(300)])
    tube = tubes.contract("nk,k->n", tubes.exact(a), tubes.exact(np.linspace(0.1, 1.3, 300)), arithmetic, 300)
    assert np.isinf(tube.radius[0])
    assert tubes.ratio(np.array([7.0, 0.0]), tube).tolist() == [0.0, 0.0]


def test_statuses__a_bound_that_allows_anything_proves_nothing() -> None:
    """Where no radius is below the values a constant would pass: that is inconclusive, not a pass."""
    target = _target("paper_eqs", "float32")
    prepared = next(prepare(target, "quick", seed=0))
    verdicts = Verdicts(prepared)
    compare(verdicts, "S-COMBINE-1", "combine", "out", np.full((1, 2, 3), 7.0), tubes.Tube(np.ones((1, 2, 3)), np.full((1, 2, 3), np.inf)))
    assert verdicts.failing == set()
    assert statuses([verdicts], [], target, 0.0, [])["S-COMBINE-1"].status == "inconclusive"
    compare(verdicts, "S-COMBINE-1", "combine", "out", np.ones((1, 2, 3)), tubes.exact(np.ones((1, 2, 3))))
    assert statuses([verdicts], [], target, 0.0, [])["S-COMBINE-1"].status == "pass"


def test_tubes__a_vacuous_logit_accuses_nobody() -> None:
    """An infinite radius stays one through softmax and log-sum-exp."""
    arithmetic = tubes.arithmetic_of(load_profile("float32"))
    logits = tubes.Tube(np.array([[1.0, 2.0, 3.0]]), np.array([[0.0, np.inf, 0.0]]))
    with np.errstate(all="ignore"):
        assert (tubes.ratio(np.array([[0.2, 0.3, 0.5]]), tubes.softmax(logits, arithmetic)) <= 1.0).all()
        assert (tubes.ratio(np.array([7.0]), tubes.log_sum_exp(logits, arithmetic)) <= 1.0).all()


def test_tubes__silu_may_underflow() -> None:
    """z / (1 + exp(-z)) is 0 in float32 from where exp overflows, though the exact value is not that small."""
    z = np.array([-91.0, -89.0])
    with np.errstate(over="ignore"):
        found = z.astype(np.float32) / (1 + np.exp(-z.astype(np.float32)))
    tube = tubes.activate(tubes.exact(z), "silu", tubes.arithmetic_of(load_profile("float32")))
    assert (tubes.ratio(found, tube) <= 1.0).all()
    assert (tubes.ratio(np.array([1e-6, 1e-6]), tube) > 1.0).all()


def test_reference__clean_gate_and_noisy_choice() -> None:
    """Equal logits whose noise differs are no tie: DeepSpeed's RSample chooses by the noisy ones and weighs by the clean ones."""
    record = {"base": "deepspeed_top1", "noise.kind": "z_add_gumbel", "noise.gate_from": "clean", "noise.when": "always"}
    target = Target(load_dialect(record), load_profile("float32"), frozenset(PLAYED), {})
    points = rounding_points(target.dialect, target.profile)
    for prepared in prepare(target, "quick", seed=5):
        outputs = reference_outputs(prepared.case, target.dialect, points)
        assert [check for check in judge_case(prepared, target, outputs).checks if not check.ok] == [], prepared.name
