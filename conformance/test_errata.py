# May import: standard library, numpy, pytest, refswitch, conformance.
"""The paper's errata, contradictions and traps, one test each: what is right, and that the tempting reading gives something else.

The numbers are those of the project's notes on the paper (errata 1 to 21). Each docstring names the tempting mistake; each test computes both. All
twenty-one can be computed; one that could not would stand in `TEXTUAL` with the reason, and the last test holds this file to the whole list.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from properties.model_scenes import Kind, setup_of

from refswitch.config import TRUTH, rounding_points
from refswitch.model_config import preset, sparse_layers
from refswitch.numbers.precision import FORMATS, round_to
from refswitch.planning.counts import flops_per_sequence, parameter_count
from refswitch.reference.capacity import Route, arrival_order, capacity_of, slots_forward
from refswitch.reference.claims import serve
from refswitch.reference.expert_choice import pick_tokens, scores_forward
from refswitch.reference.losses import balance_forward, counted_fraction, rows_of_mean
from refswitch.reference.pack import unpack
from refswitch.reference.router import choices_in_order, choose, logits_forward, softmax_forward
from refswitch.reference.transformer import model_forward
from refswitch.spec_data import load_dialect, load_profile

TEXTUAL: dict[int, str] = {}  # erratum: why nothing can be computed
MESH = load_dialect("mesh_tensorflow")
BF16 = FORMATS["bfloat16"]
LOGITS_GSE = np.array([[[2, 1, 0], [2, 0, 1], [1.5, 1, 0], [0, 2, 1], [3, 0, 0], [0, 0, 2], [1, 0.5, 0], [2, 1.9, 0]]], dtype=np.float64)
NEG_LOG_PERPLEXITY = {  # table 9 at 250k steps
    "t5_xxl": Decimal("-1.147"), "switch_xxl": Decimal("-1.086"), "switch_c": Decimal("-1.096"),
}  # fmt: skip


def balance_of(probs_GSE: np.ndarray) -> float:
    """Return the mean over groups of N sum f P, f from the argmax."""
    G, S, E = probs_GSE.shape
    all_GS = np.ones((G, S), bool)
    route = slots_forward(choose(probs_GSE), all_GS, arrival_order(S, G), E, S)
    count_GE = counted_fraction(route, route.expert_GS, all_GS, all_GS, E, MESH.aux)
    return float(balance_forward(probs_GSE, count_GE, *rows_of_mean(all_GS, route.kept_GS, MESH.aux), all_GS, MESH.aux)[0])


def test_erratum_01__exclusive_positions() -> None:
    """Tempting: figure 15's inclusive count compared with `< capacity`, which never fills slot 0 and serves one token less."""
    expert_GS, all_GS, capacity = np.zeros((1, 6), np.int64), np.ones((1, 6), bool), 4
    route = slots_forward(expert_GS, all_GS, arrival_order(6, 1), 2, capacity)
    inclusive_GS = np.cumsum(expert_GS == 0, axis=1)
    assert route.slot_GS[route.kept_GS].tolist() == [0, 1, 2, 3]
    assert inclusive_GS[inclusive_GS < capacity].tolist() == [1, 2, 3]


def test_erratum_02__jitter_multiplies_the_input() -> None:
    """Tempting: the pseudo-code's U(1 - eps, 1 + eps) added to the logits, whose mean 1 drops out of the softmax: here all of it does."""
    x_GSD, w_DE, no_noise_GSE = np.array([[[1.0, 2.0], [3.0, -1.0]]]), np.array([[1.0, 0.0], [-1.0, 2.0]]), np.zeros((1, 2, 2))
    draw = 1.25
    clean_GSE, jittered_GSE = (logits_forward(x_GSD * factor, no_noise_GSE, w_DE, np.zeros(2), 0.0, TRUTH)[0] for factor in (1.0, draw))
    added_GSE, _ = logits_forward(x_GSD, no_noise_GSE + draw, w_DE, np.zeros(2), 0.0, TRUTH)
    clean, jittered, added = (softmax_forward(logits_GSE, TRUTH)[0] for logits_GSE in (clean_GSE, jittered_GSE, added_GSE))
    assert MESH.noise.kind == "x_mul_uniform"
    assert np.array_equal(jittered_GSE, draw * clean_GSE)
    assert np.array_equal(added, clean)
    assert not np.array_equal(jittered, clean)


def test_erratum_03__the_router_input_is_cast() -> None:
    """Tempting: the pseudo-code's cast of the logits after a bfloat16 matmul, which has rounded 1 + 2**-9 to 1: a tie, and another expert."""
    points = rounding_points(MESH, load_profile("bfloat16"))
    assert (points.router.name, points.logits.name) == ("float32", "float32")
    x_GSD, w_DE = np.array([[[1.0, 2.0**-9]]]), np.array([[1.0, 1.0], [0.0, 1.0]])
    assert np.array_equal(round_to(x_GSD, BF16), x_GSD)
    logits_GSE, _ = logits_forward(x_GSD, np.zeros((1, 1, 2)), w_DE, np.zeros(2), 0.0, points)
    assert choose(softmax_forward(logits_GSE, points)[0]).tolist() == [[1]]
    assert choose(softmax_forward(round_to(logits_GSE, BF16), points)[0]).tolist() == [[0]]


def test_erratum_04__the_power_of_the_number_of_experts() -> None:
    """Tempting: `num_experts ^ 2` as Python reads it, exclusive or: 3 ^ 2 is 1, and 128 ^ 2 is 130."""
    probs_GSE, _ = softmax_forward(LOGITS_GSE, TRUTH)
    N = probs_GSE.shape[-1]
    f_E, P_E = np.bincount(choose(probs_GSE)[0], minlength=N) / 8, probs_GSE.mean(axis=(0, 1))
    assert balance_of(probs_GSE) == pytest.approx(np.mean(f_E * P_E) * N**2, rel=2**-50)
    assert balance_of(probs_GSE) != pytest.approx(np.mean(f_E * P_E) * (N ^ 2), rel=2**-2)
    assert 128 ^ 2 == 130 != 128**2


def test_erratum_05__switch_layer_pseudo_code() -> None:
    """Tempting: to hand the capacity to a parameter that is the factor, and to reduce the combine over tokens; masking the gate twice is harmless."""
    rule = replace(MESH.capacity, min=0, clamp_to_group=False)
    capacity = capacity_of(64, 8, "1.25", rule)
    assert capacity == 10
    assert capacity_of(64, 8, str(capacity), rule) == 80  # the capacity taken for a factor

    G, E, C, D = 1, 2, 4, 5
    route = Route(np.array([[0, 1, 0]]), np.array([[0, 0, 1]]), np.array([[True, True, False]]))
    gate_GS, out_GECD = np.array([[0.5, 0.25, 0.75]]), np.arange(1.0, G * E * C * D + 1).reshape(G, E, C, D)
    mask_GSE = (route.expert_GS[..., None] == np.arange(E)) & route.kept_GS[..., None]
    combine_GSEC = gate_GS[..., None, None] * mask_GSE[..., None] * (route.slot_GS[..., None, None] == np.arange(C))
    right_GSD = np.einsum("gsec,gecd->gsd", combine_GSEC, out_GECD)
    assert np.array_equal(right_GSD, gate_GS[..., None] * unpack(out_GECD, route))
    assert np.einsum("gsec,gecd->gecd", combine_GSEC, out_GECD).shape != right_GSD.shape  # reduced over tokens
    kept_GS = mask_GSE.any(axis=-1)
    assert np.array_equal(gate_GS * kept_GS * kept_GS, gate_GS * kept_GS)


def test_erratum_06__switch_base_plus() -> None:
    """Tempting: table 1's caption as printed, heads from 14 to 16; Switch-Base has 12, and d_model 896 is 14 heads of 64."""
    base, plus = preset("switch_base_128"), preset("switch_base_plus")
    assert (base.heads, base.d_model) == (12, 768) == (base.heads, base.heads * base.d_kv)
    assert (plus.heads, plus.d_model) == (14, 896) == (plus.heads, plus.heads * plus.d_kv)
    as_printed = replace(plus, heads=16)
    assert as_printed.heads * as_printed.d_kv != plus.d_model
    assert parameter_count(as_printed).total != parameter_count(plus).total


def test_erratum_07__the_feed_forward_columns_of_table_9() -> None:
    """Tempting: GEGLU with d_ff 2816 for Large; ReLU with 4096, tied, gives the printed 739M and 26.3B, the printed row 6 percent more."""
    assert parameter_count(preset("t5_large")).total == pytest.approx(739e6, rel=0.0035)
    assert parameter_count(preset("switch_large_128")).total == pytest.approx(26.3e9, rel=0.0035)
    assert parameter_count(preset("table9_t5_large")).total > 1.05 * 739e6
    assert flops_per_sequence(preset("t5_large")) == pytest.approx(425e9, rel=0.007)
    assert flops_per_sequence(preset("table9_t5_large")) > 1.01 * 425e9
    gated = replace(preset("table9_t5_base"), tied=True)  # for Base the two readings cannot be told apart
    assert parameter_count(gated).total == parameter_count(preset("t5_base")).total


def test_erratum_08__the_experts_of_switch_xxl() -> None:
    """Tempting: table 9's 64 experts in every second layer, 201B; 64 in every layer is 391.7B and not the printed 395B either; 128 in half are."""
    right, printed = preset("switch_xxl_128"), preset("table9_switch_xxl")
    everywhere = replace(printed, encoder_sparse=tuple(range(24)), decoder_sparse=tuple(range(24)))
    assert round(parameter_count(right).total / 1e9) == 395
    assert round(parameter_count(printed).total / 1e9) == 201
    assert parameter_count(everywhere).total == 391_655_174_144


def test_erratum_09__the_heads_of_switch_c() -> None:
    """Tempting: 32 heads, or d_model / 64; the released model has 30, whose size prints the same and whose operations do not."""
    released, printed = preset("switch_c"), preset("switch_c_32_heads")
    assert (released.heads, printed.heads) == (30, 32)
    assert released.d_model not in (released.heads * released.d_kv, printed.heads * printed.d_kv)
    assert [round(parameter_count(model).total / 1e9) for model in (released, printed)] == [1571, 1571]
    assert [round(flops_per_sequence(model) / 1e9) for model in (released, printed)] == [869, 894]


def test_erratum_10__table_11_is_higher_is_better() -> None:
    """Tempting: the caption's "lower is better"; a negative log-perplexity is minus the loss, so the lowest perplexity has the highest one."""
    found = {"argmax": -1.471, "sample softmax": -1.570, "input dropout": -1.480, "input jitter": -1.468}
    best = min(found, key=lambda policy: math.exp(-found[policy]))  # by perplexity
    assert best == max(found, key=found.__getitem__) == "input jitter"  # which the paper uses everywhere
    assert min(found, key=found.__getitem__) == "sample softmax"  # by the caption


def test_erratum_11__ratios_in_the_text() -> None:
    """Tempting: both models 0.061 better, 10 times the operations, 100 times the parameters; they are 0.061 and 0.051, 7 times, 17 times."""
    dense = NEG_LOG_PERPLEXITY["t5_xxl"]
    assert NEG_LOG_PERPLEXITY["switch_xxl"] - dense == Decimal("0.061")
    assert NEG_LOG_PERPLEXITY["switch_c"] - dense == Decimal("0.051") < Decimal("0.061")
    assert round(6.3e12 / 890e9, 1) == 7.1
    assert 6.5 < flops_per_sequence(preset("switch_xxl_128")) / flops_per_sequence(preset("switch_c_32_heads")) < 7.5
    assert round(parameter_count(preset("switch_base_64")).total / parameter_count(preset("t5_base")).total) == 17


def test_erratum_12__compression_of_table_7() -> None:
    """Tempting: the student's 223M; the printed percentages are those of 0.2B."""
    teachers, half = [Decimal(size) for size in ("1.1", "2.0", "3.8", "7.4", "14.7")], Decimal("0.05")
    printed = [100 * (1 - Decimal("0.2") / teacher) for teacher in teachers]
    exact = [100 * (1 - Decimal("0.223") / teacher) for teacher in teachers]
    assert [round(value) for value in printed] == [82, 90, 95, 97, 99]
    assert all(abs(value - Decimal(size)) <= half for value, size in zip(exact, ("79.7", "88.8", "94.1", "97.0", "98.5"), strict=True))
    assert [round(value) for value in exact] != [82, 90, 95, 97, 99]


def test_erratum_13__token_budgets() -> None:
    """Tempting: one budget for all tables; section 4.1 has 2**20 tokens a batch, table 4 T5's 2**35 in all, table 1 about 2**19 a batch."""
    main = 2**20 * 550_000
    assert f"{main / 1e9:.1f}" == "576.7"
    assert 2**16 * 2**19 == 2**35
    assert f"{2**35 / 1e9:.0f}" == "34"
    assert main != 2**35
    batch_of_table_1 = 50e9 / 100_000  # about 50B tokens in 100k steps
    assert min((2**16, 2**19, 2**20), key=lambda batch: abs(math.log2(batch / batch_of_table_1))) == 2**19


def test_erratum_14__the_balance_loss_can_lie_below_one() -> None:
    """Tempting: to test N sum f P >= 1; f is a hard count and P is not, and three tokens at (1/2, 1/2) with one at (0, 1) give 7/8."""
    probs_GSE = np.array([[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]])
    assert balance_of(probs_GSE) == 0.875
    uniform_GSE = np.array([[[0.75, 0.25], [0.25, 0.75]]])
    assert balance_of(uniform_GSE) == 1.0  # f = P = 1 / N


def test_erratum_15__the_balance_loss_is_summed_over_layers() -> None:
    """Tempting: the mean over sparse layers, which T5X takes: an effective alpha smaller by their number."""
    summed, averaged = setup_of(Kind("mesh_tensorflow")), setup_of(Kind("flax_masked_switch_base"))
    for setup, is_mean in ((summed, False), (averaged, True)):
        outputs, _ = model_forward(setup.batch, setup.params, setup.noise, setup.statics)
        layers = [float(switch.aux_loss) for stack in (outputs.encoder, outputs.decoder) for switch in stack.switches]
        assert len(layers) == 2
        right, other = (sum(layers) / 2, sum(layers)) if is_mean else (sum(layers), sum(layers) / 2)
        assert outputs.losses.aux_loss == pytest.approx(right, rel=2**-50)
        assert outputs.losses.aux_loss != pytest.approx(other, rel=2**-2)
    assert len(preset("switch_base_128").encoder_sparse + preset("switch_base_128").decoder_sparse) == 12


def test_erratum_16__the_balance_loss_is_per_group() -> None:
    """Tempting: f and P over the whole batch, as the text has it; the mean over groups of products is not the product of means."""
    probs_GSE, _ = softmax_forward(LOGITS_GSE, TRUTH)
    whole, halves = balance_of(probs_GSE), balance_of(probs_GSE.reshape(2, 4, 3))
    by_hand = 0.0
    for half_SE in np.split(probs_GSE[0], 2):
        f_E, P_E = np.bincount(choose(half_SE[None])[0], minlength=3) / 4, half_SE.mean(axis=0)
        by_hand += 3 * np.sum(f_E * P_E) / 2
    assert halves == pytest.approx(by_hand, rel=2**-50)
    assert round(whole, 6) == 1.307730
    assert abs(halves - whole) > 2**-10


def test_erratum_17__initialisation() -> None:
    """Tempting: s smaller by 10 as sigma smaller by 10 (it is 3.16), and the truncated normal's sigma as its standard deviation (0.88 of it)."""
    fan_in, density, inside = 768, math.exp(-2.0) / math.sqrt(2.0 * math.pi), math.erf(math.sqrt(2.0))
    truncated = math.sqrt(1.0 - 2.0 * 2.0 * density / inside)  # of a standard normal between -2 and 2
    assert f"{truncated:.8f}" == "0.87962566"
    sigma, tenth = (math.sqrt(scale / fan_in) for scale in (1.0, 0.1))
    assert sigma / tenth == pytest.approx(math.sqrt(10.0), rel=2**-50) != 10.0
    assert truncated * sigma != pytest.approx(sigma, rel=0.1)
    assert not MESH.init.trunc_corrected  # Mesh leaves it so
    assert load_dialect("flax_masked_switch_base").init.trunc_corrected  # JAX divides by it


def test_erratum_18__positions_in_bfloat16() -> None:
    """Tempting: the cumulative sum in the layer's format; bfloat16 holds integers to 256 alone, so slots collide and a running sum stops."""
    S = 1024
    route = slots_forward(np.zeros((1, S), np.int64), np.ones((1, S), bool), arrival_order(S, 1), 1, S)
    assert len(set(route.slot_GS[0].tolist())) == S
    rounded = round_to(np.cumsum(np.ones(S)), BF16)
    assert len(np.unique(rounded)) == 512
    assert int(np.argmax(rounded[1:] == rounded[:-1])) + 1 == 256  # the 257th is the first to collide, with the 256th
    running = 0.0
    for _ in range(S):
        running = float(round_to(np.asarray(running + 1.0), BF16))
    assert running == 256.0


def test_erratum_19__three_further_gates() -> None:
    """Tempting: to take the file's gates for one; on one batch with two slots they keep different tokens."""
    probs_GSE, _ = softmax_forward(LOGITS_GSE, TRUTH)
    all_GS, first_GS = np.ones((1, 8), bool), choose(probs_GSE)
    switch = slots_forward(first_GS, all_GS, arrival_order(8, 1), 3, 2)
    ntlb = serve(choices_in_order(probs_GSE, 3), np.ones((1, 8, 3), bool), arrival_order(8, 1), 3, 2, "until_placed")
    is_first_GSE = first_GS[..., None] == np.arange(3)
    largest = pick_tokens(probs_GSE, is_first_GSE, 2)
    over_tokens_GSE, _ = scores_forward(LOGITS_GSE, all_GS, "expert_selection", TRUTH)
    selection = pick_tokens(over_tokens_GSE, np.ones_like(is_first_GSE), 2)
    kept = {
        "switch": np.flatnonzero(switch.kept_GS[0]).tolist(),
        "ntlb": np.flatnonzero(ntlb.kept_GSK[0].any(axis=-1)).tolist(),
        "switch_max": sorted(largest.token_GEC[largest.kept_GEC].tolist()),
        "expert_selection": sorted(selection.token_GEC[selection.kept_GEC].tolist()),
    }
    assert kept == {"switch": [0, 1, 3, 5], "ntlb": [0, 1, 2, 3, 4, 5], "switch_max": [0, 3, 4, 5], "expert_selection": [0, 1, 3, 4, 5, 7]}


def test_erratum_20__the_sparse_layer_is_the_second_of_each_pair() -> None:
    """Tempting: the first of each pair, as in the original code's example configuration; the released models have layers 1, 3, 5, ..."""
    released = preset("switch_base_128")
    assert released.encoder_sparse == released.decoder_sparse == (1, 3, 5, 7, 9, 11) == sparse_layers(12, 2, 1)
    assert released.encoder_sparse != sparse_layers(12, 2, 0)
    step = 12 // len(released.encoder_sparse)
    assert all(layer % step == step - 1 for layer in released.encoder_sparse)


def test_erratum_21__a_twentieth_and_a_hundredth() -> None:
    """Tempting: "1/20th of the parameters" and "up to 99 percent" of one teacher; they are the 3.8B and the 14.7B one."""
    student, teachers = Decimal("0.2"), {"64 experts": Decimal("3.8"), "256 experts": Decimal("14.7")}
    compression = {name: round(100 * (1 - student / teacher)) for name, teacher in teachers.items()}
    assert compression == {"64 experts": 95, "256 experts": 99}
    assert round(100 * (1 - Decimal(1) / 20)) == compression["64 experts"] != compression["256 experts"]


def test_errata__are_all_here() -> None:
    """Every number from 1 to 21 has a test or a reason, and none has two of both."""
    tested = [int(match[1]) for name in globals() if (match := re.match(r"test_erratum_(\d\d)__", name))]
    assert sorted([*tested, *TEXTUAL]) == list(range(1, 22))
    assert all(len(reason) > 20 for reason in TEXTUAL.values())
