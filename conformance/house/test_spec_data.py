# May import: standard library, numpy, pytest, refswitch.
"""The spec's data: every record loads, every mistake is answered with the nearest right name."""

from __future__ import annotations

from importlib import import_module

import pytest

from refswitch.config import Dialect, Profile, rounding_points
from refswitch.errors import InputError
from refswitch.records import choices_of
from refswitch.spec_data import (
    data_root,
    knobs_of,
    load_clauses,
    load_dialect,
    load_knobs,
    load_operations,
    load_profile,
    names_of,
    parse_record,
    with_knob,
)
from refswitch.verify.judge import GRADIENT_CLAUSE, STAGES

RECORDS = (
    "mesh_tensorflow", "paper_fig15", "paper_eqs", "mesh_ntlb", "flax_masked_switch_base", "flax_masked_ignore_pads", "flax_scatter_ignore_pads",
    "hf_le_4_51", "hf_4_57", "hf_5_0_to_5_17", "hf_ge_5_18", "deepspeed_top1", "fairseq_moe", "fairscale_top2", "tutel_top1", "megatron_top1",
    "megablocks_moe", "megablocks_dmoe", "fastmoe_switch", "labml_switch", "vmoe_top1", "praxis_topk1", "keras_io", "st_moe_pytorch",
    "torchtitan_top1", "vllm_reference", "t2t_noisy_top1",
)  # fmt: skip
PROFILES = ("float64", "float32", "tf32", "float16", "bfloat16", "bfloat16_naive", "correctly_rounded")


def test_records__are_those_of_the_survey() -> None:
    """One record per implementation, and the contract's profile names."""
    assert names_of("dialects") == sorted(RECORDS)
    assert names_of("profiles") == sorted(PROFILES)


@pytest.mark.parametrize("name", RECORDS)
def test_dialect__loads(name: str) -> None:
    """A record resolves to a full dialect, and its rounding points exist under every profile."""
    dialect = load_dialect(name)
    assert isinstance(dialect, Dialect)
    assert dialect.name == name
    for profile in PROFILES:
        assert isinstance(load_profile(profile), Profile)
        rounding_points(dialect, load_profile(profile))


def test_dialect__inherits_and_overrides() -> None:
    """A record takes from its base what it does not set."""
    hf, base = load_dialect("hf_ge_5_18"), load_dialect("mesh_tensorflow")
    assert hf.drop == base.drop
    assert (hf.aux.f.drops, load_dialect("hf_4_57").aux.f.drops) == ("include", "to_expert0")
    changed = load_dialect({"base": "mesh_tensorflow", "capacity.min": 0, "expert": {"act": "gelu"}})
    assert (changed.capacity.min, changed.expert.act, changed.expert.glu) == (0, "gelu", False)
    assert with_knob(hf, "capacity.expr", "inf").capacity.expr == "inf"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("mesh_tensorflo", "did you mean mesh_tensorflow?"),
        ({"base": "hf_4_57", "capacity.mim": 0}, "unknown knob capacity.mim; did you mean capacity.min?"),
        ({"base": "hf_4_57", "capacity.expr": "ceil_SxCF_divF"}, "did you mean ceil_SxCF_divE?"),
        ({"base": "hf_4_57", "pad.zero_input": "maybe"}, "known: False, True, external"),
        ({"base": "hf_4_57", "capacity.min": "x"}, "capacity.min has no value 'x'"),
        ({"base": "hf_4_57", "capacity": 3}, "capacity is a group of knobs"),
        ({"base": "hf_4_57", "priority": {"a": 1}}, "priority takes one value"),
        ({"base": "hf_4_57", "noise.gate_from": "clean"}, "noise.gate_from=clean needs noise on the logits"),
        ({"capacity.min": 0}, "a dialect is a name or a mapping with `base`"),
        (7, "a dialect is a name or a mapping with `base`"),
    ],
)
def test_dialect__rejects_what_is_unknown(record: object, says: str) -> None:
    """The error names the knob and the nearest right value."""
    with pytest.raises(InputError, match=r"^[^\n]*$") as caught:
        load_dialect(record)  # type: ignore[arg-type]
    assert says in str(caught.value)


def test_profile__rejects_what_is_unknown() -> None:
    """Profiles are answered alike."""
    with pytest.raises(InputError, match="did you mean bfloat16"):
        load_profile({"base": "float32", "storage.z": "bfloat1"})
    with pytest.raises(InputError, match="unknown profile 'fp32'"):
        load_profile("fp32")


def test_parse_record() -> None:
    """The command line's NAME,knob=value form carries YAML values."""
    assert parse_record("hf_4_57") == "hf_4_57"
    assert parse_record("hf_4_57,capacity.min=3,pad.zero_input=true") == {"base": "hf_4_57", "capacity.min": 3, "pad.zero_input": True}


def test_clauses__name_known_stages_and_knobs() -> None:
    """Every clause stands at a stage of the judge and holds under values that its knobs have."""
    knobs = knobs_of(load_dialect("mesh_tensorflow"))
    for name, clause in load_clauses().items():
        assert clause["stage"] in STAGES, name
        assert clause["class"] in "ERB", name
        for knob, values in clause.get("holds", {}).items():
            assert knob in knobs, (name, knob)
            assert set(values) <= set(choices_of(Dialect, knob)), (name, knob)
    assert set(GRADIENT_CLAUSE.values()) <= set(load_clauses())


def test_operations__name_functions_of_the_reference() -> None:
    """Every clause around the layer has the fields that are read, and is about functions that exist."""
    for name, clause in load_operations().items():
        assert set(clause) == {"class", "paper", "text", "functions"}, name
        assert clause["class"] in "ERB", name
        assert clause["functions"], name
        for place in clause["functions"]:
            module, _, function = place.partition(".")
            package = "numbers" if (data_root() / "refswitch" / "numbers" / f"{module}.py").is_file() else "reference"
            assert callable(getattr(import_module(f"refswitch.{package}.{module}"), function)), (name, place)
    assert set(load_clauses()).isdisjoint(load_operations())


def test_knobs__have_known_values() -> None:
    """Every value that has a phrase is a value of its knob."""
    knobs = knobs_of(load_dialect("mesh_tensorflow"))
    for knob, entry in load_knobs().items():
        assert knob in knobs
        assert entry["stage"] in STAGES
        choices = choices_of(Dialect, knob)
        assert not choices or set(entry["says"]) <= set(choices), knob


@pytest.mark.parametrize(
    "knobs",
    [
        {"base": "mesh_ntlb", "priority": "gate_desc"},
        {"base": "mesh_ntlb", "pad.route": "expert0_weight0"},
        {"base": "megatron_top1", "pad.route": "expert0_weight0"},
    ],
)
def test_load_dialect__rejects_what_is_not_defined(knobs: dict[str, str]) -> None:
    """Combinations that no implementation has and no clause describes."""
    with pytest.raises(InputError, match="is not defined"):
        load_dialect(knobs)
