# May import: standard library, pytest, refswitch.model_config, refswitch.planning, refswitch.errors.
"""Parameters and operations of the paper's models against the numbers of Table 9 and against counts made apart from this project."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refswitch.errors import InputError
from refswitch.model_config import PRESETS, preset, sparse_layers
from refswitch.planning.counts import flops_per_sequence, full_flops_per_sequence, parameter_count, router_flops_per_sequence

EXACT = {
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_1_1_xxl": 11_135_332_352,
    "table9_t5_xxl": 11_135_332_352,
    "switch_base_128": 7_415_217_408,
    "switch_large_128": 26_309_291_008,
    "switch_xxl_128": 394_675_073_024,
    "switch_c": 1_571_327_875_360,
    "switch_c_32_heads": 1_571_375_798_688,
    "table9_switch_c": 1_571_375_798_688,
}
ROUNDED = [  # preset, printed digits, unit
    ("table9_t5_large", "783.2", 1e6),
    ("switch_base_2", "279.5", 1e6),
    ("switch_base_4", "392.8", 1e6),
    ("switch_base_8", "619.3", 1e6),
    ("switch_base_16", "1.0724", 1e9),
    ("switch_base_32", "1.9785", 1e9),
    ("switch_base_64", "3.7907", 1e9),
    ("switch_base_256", "14.664", 1e9),
    ("table9_switch_large", "27.15", 1e9),
    ("switch_xxl_64", "201.4", 1e9),
    ("table9_switch_xxl", "201.4", 1e9),
    ("mt5_base", "582.4", 1e6),
    ("mswitch_base_128", "7.77", 1e9),
]
PAPER_PARAMETERS = [  # preset, printed by the paper, relative difference that its rounding and its definition leave
    ("t5_base", 223e6, 0.0035),
    ("t5_large", 739e6, 0.0035),
    ("t5_1_1_xxl", 11.1e9, 0.0035),
    ("switch_base_64", 3.8e9, 0.0035),
    ("switch_base_128", 7.41e9, 0.0035),
    ("switch_base_256", 14.7e9, 0.0035),
    ("switch_large_128", 26.3e9, 0.0035),
    ("switch_xxl_128", 395e9, 0.0035),
    ("switch_c", 1571e9, 0.0035),
    ("switch_base_16", 1.1e9, 0.026),
    ("switch_base_32", 2.0e9, 0.012),
]
FLOPS = [  # preset, counted apart from this project, unit
    ("t5_base", "124.57", 1e9),
    ("table9_t5_base", "124.57", 1e9),
    ("switch_base_128", "124.57", 1e9),
    ("t5_large", "424.94", 1e9),
    ("switch_large_128", "424.94", 1e9),
    ("table9_t5_large", "432.8", 1e9),
    ("t5_1_1_xxl", "6260", 1e9),
    ("switch_xxl_128", "6260", 1e9),
    ("switch_c_32_heads", "894.0", 1e9),
    ("switch_c", "869.1", 1e9),
]
PAPER_FLOPS = [("t5_base", 124e9), ("t5_large", 425e9), ("t5_1_1_xxl", 6.3e12), ("switch_c_32_heads", 890e9)]


def printed(value: int, digits: str, unit: float) -> str:
    """Print a count with as many decimals as the golden value has."""
    return f"{value / unit:.{len(digits.partition('.')[2])}f}"


@pytest.mark.parametrize("name", EXACT)
def test_parameters_exact(name: str) -> None:
    """The total is the known integer, and the sum of its parts."""
    counts = parameter_count(preset(name))
    assert counts.total == EXACT[name] == sum(counts[:-1])


@pytest.mark.parametrize(("name", "digits", "unit"), ROUNDED)
def test_parameters_to_printed_digits(name: str, digits: str, unit: float) -> None:
    """The total rounds to the printed digits."""
    assert printed(parameter_count(preset(name)).total, digits, unit) == digits


@pytest.mark.parametrize(("name", "paper", "relative"), PAPER_PARAMETERS)
def test_parameters_of_paper(name: str, paper: float, relative: float) -> None:
    """The released configuration has the paper's size."""
    assert parameter_count(preset(name)).total == pytest.approx(paper, rel=relative)


def test_table9_as_printed_is_not_what_was_counted() -> None:
    """The printed rows of Large and XXL miss the printed sizes by far more than rounding: GEGLU 2816, and 64 experts."""
    assert parameter_count(preset("table9_t5_large")).total / 739e6 == pytest.approx(1.06, abs=0.001)
    assert parameter_count(preset("table9_switch_large")).total / 26.3e9 > 1.03
    assert parameter_count(preset("table9_switch_xxl")).total / 395e9 == pytest.approx(0.51, abs=0.001)


def test_gated_base_is_neutral() -> None:
    """GEGLU at two thirds of the width has the parameters and operations of ReLU, so that Base cannot tell the two apart."""
    gated = replace(preset("table9_t5_base"), tied=True)
    assert parameter_count(gated) == parameter_count(preset("t5_base"))
    assert flops_per_sequence(gated) == flops_per_sequence(preset("t5_base"))


@pytest.mark.parametrize(("name", "digits", "unit"), FLOPS)
def test_flops_to_printed_digits(name: str, digits: str, unit: float) -> None:
    """The count of operations rounds to the printed digits; experts leave it as it is."""
    assert printed(flops_per_sequence(preset(name)), digits, unit) == digits


@pytest.mark.parametrize(("name", "paper"), PAPER_FLOPS)
def test_flops_of_paper(name: str, paper: float) -> None:
    """The formula reproduces Table 9 to 0.7 percent."""
    assert flops_per_sequence(preset(name)) == pytest.approx(paper, rel=0.007)


@pytest.mark.parametrize(("name", "digits", "unit"), [("t5_base", "142", 1e9), ("t5_large", "481", 1e9), ("t5_1_1_xxl", "6.97", 1e12)])
def test_full_flops(name: str, digits: str, unit: float) -> None:
    """The usual full count is the known one, 10 percent and more above the paper's formula."""
    assert printed(full_flops_per_sequence(preset(name)), digits, unit) == digits
    assert full_flops_per_sequence(preset(name)) > 1.1 * flops_per_sequence(preset(name))


def test_router_flops() -> None:
    """The router adds 0.6 percent to Switch-Base and is 80 billion, 8.2 percent of the whole, in Switch-C."""
    base, c = preset("switch_base_128"), preset("switch_c_32_heads")
    assert f"{router_flops_per_sequence(base) / flops_per_sequence(base):.1%}" == "0.6%"
    assert f"{router_flops_per_sequence(c) / (flops_per_sequence(c) + router_flops_per_sequence(c)):.1%}" == "8.2%"
    assert printed(router_flops_per_sequence(c), "80", 1e9) == "80"
    assert router_flops_per_sequence(preset("t5_base")) == 0


@pytest.mark.parametrize("name", ["switch_xxl_128", "switch_c"])
def test_nothing_is_allocated(name: str) -> None:
    """Hundreds of billions of parameters are counted in less than 100 kB."""
    tracemalloc.start()
    try:
        parameter_count(preset(name))
        flops_per_sequence(preset(name))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def by_hand(norms_per_decoder_layer: int) -> int:
    """Count tiny_switch tensor by tensor: every shape written out."""
    shapes = [(32, 8)]  # embedding, tied
    for attentions, norms in ((1, 2), (2, norms_per_decoder_layer)):
        shapes += [(8, 8)] * 4 * attentions * 2 + [(8, 1)] * norms * 2 + [(8, 1), (8, 2)]  # two layers; last norm, position table
        shapes += [(8, 16), (16, 8)] * (1 + 4) + [(8, 4)]  # one dense layer, four experts, router
    return sum(rows * columns for rows, columns in shapes)


def test_tiny_by_hand() -> None:
    """The tiny model, counted from written-out shapes."""
    assert parameter_count(preset("tiny_switch")).total == by_hand(3)


def test_checks_can_fail() -> None:
    """One norm or one expert, bucket or head too many is noticed by the comparisons above."""
    tiny, base, c = preset("tiny_switch"), preset("switch_base_128"), preset("switch_c_32_heads")
    assert parameter_count(tiny).total != by_hand(2)
    counts = parameter_count(base)
    assert counts.norms == (12 * 2 + 1 + 12 * 3 + 1) * base.d_model
    assert counts.total - base.d_model != EXACT["switch_base_128"]
    for wrong in (replace(base, experts=127), replace(base, position_buckets=36), replace(base, heads=13), replace(base, tied=False)):
        assert parameter_count(wrong).total != EXACT["switch_base_128"]
    assert printed(parameter_count(replace(preset("switch_base_256"), experts=255)).total, "14.664", 1e9) != "14.664"
    assert printed(flops_per_sequence(c, decoder_tokens=113), "894.0", 1e9) != "894.0"
    assert flops_per_sequence(preset("switch_c")) != pytest.approx(890e9, rel=0.007)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"d_model": 0}, "d_model"),
        ({"heads": -1}, "heads"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"decoder_layers": 0}, "decoder_layers"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
        ({"encoder_sparse": (1, 2)}, "encoder_sparse"),
        ({"decoder_sparse": (-1,)}, "decoder_sparse"),
        ({"decoder_sparse": (1, 1)}, "decoder_sparse"),
        ({"experts": 0}, "experts"),
        ({"experts": -1}, "experts"),
        ({"encoder_sparse": (), "decoder_sparse": ()}, "experts"),
        ({"activation": "tanh"}, "activation"),
        ({"dropout": 1.0}, "dropout"),
        ({"expert_dropout": -0.1}, "expert_dropout"),
        ({"position_buckets": 6}, "position_buckets"),
        ({"max_distance": 4}, "max_distance"),
    ],
)
def test_validation(change: dict[str, Any], named: str) -> None:
    """A configuration that describes no model is refused in one line that names the model and the field."""
    with pytest.raises(InputError, match=f"^model tiny_switch: {named} is ") as caught:
        replace(preset("tiny_switch"), **change)
    assert "\n" not in str(caught.value)


def test_unknown_preset() -> None:
    """An unknown name is answered with the close ones, or with all."""
    with pytest.raises(InputError, match=r"^unknown model switch_base_12; did you mean .*switch_base_128"):
        preset("switch_base_12")
    with pytest.raises(InputError, match=r"^unknown model 0; known: .*byte_tiny$"):
        preset("0")


def test_negative_tokens() -> None:
    """A negative length is refused."""
    with pytest.raises(InputError, match="must not be negative"):
        flops_per_sequence(preset("t5_base"), decoder_tokens=-1)


def test_sparse_layers() -> None:
    """Every second layer, the second of each pair; every layer; and a rule that selects none is refused."""
    assert sparse_layers(6, 2, 1) == (1, 3, 5)
    assert sparse_layers(6, 2, 0) == (0, 2, 4)
    assert sparse_layers(3, 1, 0) == (0, 1, 2)
    for step, offset in ((0, 0), (2, 2), (2, -1)):
        with pytest.raises(InputError, match="select none"):
            sparse_layers(6, step, offset)


def test_presets_are_consistent() -> None:
    """Every preset goes by its own name and follows a dialect that exists."""
    dialects = {path.stem for path in (Path(__file__).resolve().parent.parent / "spec" / "dialects").glob("*.yaml")}
    assert all(name == config.name and config.dialect in dialects for name, config in PRESETS.items())
    assert len([name for name in PRESETS if name.startswith("table9_")]) == 7
