# May import: standard library, numpy, pyyaml, pytest, refswitch.
"""The chapters and the README are held to what they say: their code runs, their quotations stand in the files, their names and tables are the data's.

A block ```python runs on its own. A block ```python file=PATH quotes PATH: its lines stand there, in this order. A clause's paragraph
`**S-ROUTE-1** (class B): text` says what clauses.yaml says. A table after `<!-- checked: KIND -->` agrees with the data. The last tests show
on made-up texts that each of these checks can fail.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest
import yaml

from refswitch.config import Dialect, Profile, rounding_points
from refswitch.dims import LETTERS
from refswitch.numbers.precision import FORMATS
from refswitch.records import choices_of
from refswitch.spec_data import data_root, every_clause, knobs_of, load_dialect, load_knobs, load_profile, names_of
from refswitch.verify.judge import STAGES

ROOT = data_root()
CHAPTERS = sorted((ROOT / "spec").glob("*.md"))
TEXTS = [*CHAPTERS, ROOT / "README.md"]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
CLAUSE = re.compile(r"\b[A-Z]-[A-Z]+-\d+\b")
PARAGRAPH = re.compile(r"^\*\*([A-Z]-[A-Z]+-\d+)\*\* \(class ([A-Z])\): (.*?)(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)
KNOB = re.compile(r"([a-z_]+(?:\.[A-Za-z_]+)*)(?:=(\S+))?")
FILE_ENDINGS = (".py", ".yaml", ".md", ".toml", ".json")
DIALECTS = {name: load_dialect(name) for name in names_of("dialects")}
BASE = knobs_of(DIALECTS["mesh_tensorflow"])
PLAIN = knobs_of(load_profile("float32"))
RECORDS: dict[str, type] = dict.fromkeys(BASE, Dialect) | dict.fromkeys(PLAIN, Profile)
GROUPS = {name for record in (Dialect, Profile) for name, hint in get_type_hints(record).items() if dataclasses.is_dataclass(hint)}


class Block(NamedTuple):
    """One fenced block of a text."""

    path: str
    line: int
    info: str
    body: str


def blocks_of(text: str, path: str) -> list[Block]:
    """Return every fenced block with the line of its fence."""
    return [Block(path, text.count("\n", 0, match.start()) + 1, match[1].strip(), match[2]) for match in FENCE.finditer(text)]


def every_block() -> Iterator[Block]:
    for path in TEXTS:
        yield from blocks_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))


def is_quotation(block: Block) -> bool:
    return "file=" in block.info


def run_block(block: Block) -> None:
    """Run a block by itself."""
    exec(compile(block.body, f"{block.path}:{block.line}", "exec"), {"__name__": "block"})


def strange_imports(source: str) -> set[str]:
    """Return what a block imports besides refswitch and numpy."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names - {"refswitch", "numpy"}


def misquoted(body: str, source: str) -> list[str]:
    """Return the lines of a quotation that do not follow one another, from top to bottom, in the source."""
    left, missing = iter(source.splitlines()), []
    for line in (line.rstrip() for line in body.splitlines() if line.strip()):
        if not any(line == found.rstrip() for found in left):
            missing.append(line)
            left = iter(source.splitlines())
    return missing


def shown(value: Any) -> str:
    """Return a value as the chapters write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_value(knob: str, text: str) -> bool:
    """Whether the text is a value of the knob or key."""
    choices = {shown(choice) for choice in choices_of(RECORDS[knob], knob)}
    known = BASE[knob] if knob in BASE else PLAIN[knob]
    if text in choices or shown(known) in choices:
        return text in choices
    return isinstance(known, str) or isinstance(yaml.safe_load(text), int | float)


def unknown_names(text: str) -> list[str]:
    """Return the clauses and the knob-like words in backticks that the data does not know, quoted code left out."""
    prose = FENCE.sub("", text)
    unknown = [clause for clause in CLAUSE.findall(prose) if clause not in every_clause()]
    for span in re.findall(r"`([^`\n]+)`", prose):
        match = KNOB.fullmatch(span)
        if not match or span.endswith(FILE_ENDINGS):
            continue
        name, value = match.groups()
        head, _, rest = name.partition(".")
        looks_like_a_knob = head in GROUPS if rest else value is not None and name in BASE
        is_group = any(knob.startswith(f"{name}.") for knob in RECORDS)
        if looks_like_a_knob and not (name in RECORDS and (value is None or is_value(name, value))) and not (is_group and value is None):
            unknown.append(span)
    return unknown


def stated_clauses(text: str) -> list[tuple[str, str, str]]:
    """Return (id, class, text) of every clause paragraph."""
    return [(name, kind, " ".join(says.split())) for name, kind, says in PARAGRAPH.findall(text)]


def wrongly_stated(text: str) -> list[str]:
    """Return the clauses whose paragraph does not say what clauses.yaml says, and those stated twice."""
    stated = stated_clauses(text)
    known = every_clause()
    wrong = [name for name, kind, says in stated if name in known and (kind, says) != (known[name]["class"], " ".join(known[name]["text"].split()))]
    names = [name for name, _, _ in stated]
    return wrong + sorted({name for name in names if names.count(name) > 1})


class Table(NamedTuple):
    """A checked table: its kind, and its rows with the header first."""

    kind: str
    rows: list[list[str]]


def tables_of(text: str) -> list[Table]:
    """Return the tables that follow `<!-- checked: KIND -->`."""
    found = []
    for match in re.finditer(r"^<!-- checked: (.+?) -->\n((?:\|.*\n?)+)", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in match[2].splitlines()]
        found.append(Table(match[1], [rows[0], *rows[2:]]))
    return found


def _bare(cell: str) -> str:
    return cell.strip("`")


def _wrong_profiles(table: Table) -> list[str]:
    header, *rows = table.rows
    keys = {name: knobs_of(load_profile(_bare(name))) for name in header[1:]}
    cells = [(row[0], name, cell) for row in rows for name, cell in zip(header[1:], row[1:], strict=True)]
    return [f"{key} {name}" for key, name, cell in cells if shown(keys[name][_bare(key)]) != cell]


def _wrong_points(table: Table) -> list[str]:
    header, *rows = table.rows
    points = {name: rounding_points(DIALECTS["mesh_tensorflow"], load_profile(_bare(name))) for name in header[2:]}
    cells = [(row[1], name, cell) for row in rows for name, cell in zip(header[2:], row[2:], strict=True)]
    return [f"{point} {name}" for point, name, cell in cells if getattr(points[name], _bare(point)).name != cell]


def _wrong_formats(table: Table) -> list[str]:
    wrong = []
    for name, *numbers in table.rows[1:]:
        format = FORMATS[_bare(name)]
        if numbers != [str(format.precision), str(format.e_min), str(format.e_max), f"2^-{format.precision}"]:
            wrong.append(name)
    return wrong


def _wrong_letters(table: Table) -> list[str]:
    """The legend of the axes is that of refswitch.dims, in its order."""
    stated = {_bare(letter): says for letter, says in table.rows[1:]}
    if list(stated) != list(LETTERS):
        return [f"letters are {''.join(stated)}, should be {''.join(LETTERS)}"]
    return [letter for letter, says in stated.items() if says != LETTERS[letter]]


def _wrong_ours(table: Table) -> list[str]:
    """Our readings are the base's values."""
    spans = [span for row in table.rows[1:] for span in re.findall(r"`([^`]+)`", row[2])]
    return [span for span in spans if shown(BASE[span.partition("=")[0]]) != span.partition("=")[2]]


def _wrong_records(table: Table, knob: str) -> list[str]:
    """Each record stands in the row of its value, or its value is that of the row for all others."""
    rows = {_bare(row[0]): row[2] for row in table.rows[1:]}
    named = {record: value for value, cell in rows.items() for record in re.findall(r"`([^`]+)`", cell)}
    others = [value for value, cell in rows.items() if cell == "all others"]
    wrong = [record for record in named if record not in DIALECTS] + [value for value in rows if not is_value(knob, value)]
    for name, dialect in DIALECTS.items():
        value = shown(knobs_of(dialect)[knob])
        if value != named.get(name, others[0] if len(others) == 1 else None):
            wrong.append(f"{name} has {value}")
    return wrong


def disagreements(table: Table) -> list[str]:
    """Return where a checked table does not agree with the data."""
    kind, _, argument = table.kind.partition(" ")
    if kind == "records":
        return _wrong_records(table, argument)
    checks = {"profiles": _wrong_profiles, "points": _wrong_points, "formats": _wrong_formats, "ours": _wrong_ours, "letters": _wrong_letters}
    return checks[kind](table)


RUN = [block for block in every_block() if block.info == "python"]
QUOTED = [block for block in every_block() if is_quotation(block)]


def _id(value: object) -> str:
    return f"{value.path}:{value.line}" if isinstance(value, Block) else Path(str(value)).name


@pytest.mark.parametrize("block", RUN, ids=_id)
def test_block__runs(block: Block) -> None:
    """Every example runs by itself and asserts what it shows."""
    assert not strange_imports(block.body)
    run_block(block)


@pytest.mark.parametrize("block", QUOTED, ids=_id)
def test_quotation__stands_in_its_file(block: Block) -> None:
    """What the chapters quote is what the reference says."""
    source = ROOT / block.info.partition("file=")[2]
    assert source.is_file(), f"{block.path}:{block.line}: no file {source}"
    assert not misquoted(block.body, source.read_text(encoding="utf-8"))


def test_blocks__have_a_language() -> None:
    """No block escapes by a misspelt info string."""
    known = {"python", "text", "sh", "yaml"}
    assert not [_id(block) for block in every_block() if block.info not in known and not is_quotation(block)]
    assert RUN
    assert QUOTED


@pytest.mark.parametrize("path", CHAPTERS, ids=_id)
def test_chapter__names_what_exists(path: Path) -> None:
    """No chapter names an unknown clause, knob or value, or states a clause otherwise than clauses.yaml."""
    text = path.read_text(encoding="utf-8")
    assert not unknown_names(text)
    assert not wrongly_stated(text)


def test_clauses__each_is_stated_in_one_chapter() -> None:
    """Every clause has its paragraph, once."""
    stated = [name for path in CHAPTERS for name, _, _ in stated_clauses(path.read_text(encoding="utf-8"))]
    assert sorted(stated) == sorted(every_clause())


def test_knobs__name_what_exists() -> None:
    """knobs.yaml names known stages, knobs and values of the right type."""
    for knob, entry in load_knobs().items():
        assert knob in BASE
        assert entry["stage"] in STAGES
        for value in entry["says"]:
            assert type(value) is type(BASE[knob]) or choices_of(Dialect, knob), (knob, value)
            assert is_value(knob, shown(value)), (knob, value)


@pytest.mark.parametrize("kind", ["dialects", "profiles"])
def test_records__load(kind: str) -> None:
    """Every file of the spec's data loads."""
    load = {"dialects": load_dialect, "profiles": load_profile}[kind]
    assert [load(name).name for name in names_of(kind)] == names_of(kind)


@pytest.mark.parametrize("path", CHAPTERS, ids=_id)
def test_tables__agree_with_the_data(path: Path) -> None:
    """Every checked table says what the records say."""
    for table in tables_of(path.read_text(encoding="utf-8")):
        assert not disagreements(table), table.kind


def test_tables__are_found() -> None:
    """The markers are not misspelt: every marker has its table."""
    for path in CHAPTERS:
        text = path.read_text(encoding="utf-8")
        assert len(tables_of(text)) == text.count("<!-- checked:"), path


# What follows shows that the checks above can fail.


def test_run_block__fails_where_the_example_is_wrong() -> None:
    """A false assertion, an unknown name and a foreign import are seen; a right block is not accused."""
    text = "```python\nassert 1 + 1 == 2\n```\n\n```python\nassert 1 + 1 == 3\n```\n```python\nnowhere\n```\n"
    right, wrong, unknown = blocks_of(text, "made_up.md")
    assert [block.line for block in (right, wrong, unknown)] == [1, 5, 8]
    run_block(right)
    with pytest.raises(AssertionError):
        run_block(wrong)
    with pytest.raises(NameError):
        run_block(unknown)
    assert strange_imports("import numpy as np\nfrom refswitch.config import TRUTH\nimport torch.nn") == {"torch"}


def test_misquoted__sees_changed_and_moved_lines() -> None:
    """A line that the file does not have, has elsewhere or indents otherwise is seen."""
    source = "def f(x):\n    y = x + 1\n    return y\n"
    assert not misquoted("    y = x + 1\n\n    return y\n", source)
    assert misquoted("    y = x - 1\n    return y\n", source) == ["    y = x - 1"]
    assert misquoted("    return y\n    y = x + 1\n", source) == ["    y = x + 1"]
    assert misquoted("y = x + 1\n", source) == ["y = x + 1"]


def test_unknown_names__sees_clauses_knobs_and_values() -> None:
    """Unknown clauses, knobs and values are seen, known ones, groups, files and quoted code are not."""
    assert not unknown_names("S-ROUTE-1, `capacity.expr=inf`, `aux.f`, `storage.z`, `router.py`, `pad.zero_input=true`, `capacity.multiple_of=4`")
    assert not unknown_names("```python file=x\ncapacity.nothing  # S-NONE-1\n```\n`x.shape`, `priority=random`, `refswitch.dims`")
    assert unknown_names("S-ROUTE-9 and `capacity.exp` and `capacity.expr=infinite`") == ["S-ROUTE-9", "capacity.exp", "capacity.expr=infinite"]
    assert unknown_names("`aux.f.drop`, `priority=rand`, `storage.y`, `capacity.min=four`") == [
        "aux.f.drop", "priority=rand", "storage.y", "capacity.min=four",
    ]  # fmt: skip


def test_wrongly_stated__sees_another_text_or_class() -> None:
    """A clause's paragraph with another class or wording, or stated twice, is seen; line breaks do not matter."""
    clause = every_clause()["S-PACK-1"]
    first, rest = clause["text"].split(" ", 1)
    right = f"**S-PACK-1** (class {clause['class']}): {first}\n{rest}\n\nMore.\n"
    assert not wrongly_stated(right)
    assert stated_clauses(right) == [("S-PACK-1", clause["class"], clause["text"])]
    assert wrongly_stated(right.replace(first, "Some", 1)) == ["S-PACK-1"]
    assert wrongly_stated(right.replace(f"class {clause['class']}", "class R")) == ["S-PACK-1"]
    assert wrongly_stated(right + right) == ["S-PACK-1"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- checked: profiles -->\n| key | `bfloat16` |\n|---|---|\n| `storage.z` | bfloat16 |\n", ["`storage.z` `bfloat16`"]),
        ("<!-- checked: points -->\n| point | field | `bfloat16` |\n|---|---|---|\n| R7 | `hidden` | float32 |\n", ["`hidden` `bfloat16`"]),
        ("<!-- checked: formats -->\n| a | b | c | d | e |\n|---|---|---|---|---|\n| `tf32` | 10 | -126 | 127 | 2^-10 |\n", ["`tf32`"]),
        ("<!-- checked: letters -->\n| letter | axis |\n|---|---|\n| `B` | batches |\n", [f"letters are B, should be {''.join(LETTERS)}"]),
        (
            "<!-- checked: letters -->\n| letter | axis |\n|---|---|\n"
            + "".join(f"| `{letter}` | {says.replace('ranks', 'rows')} |\n" for letter, says in LETTERS.items()),
            ["R"],
        ),
        ("<!-- checked: ours -->\n| a | b | ours | c |\n|---|---|---|---|\n| x | y | `capacity.min=5` | z |\n", ["capacity.min=5"]),
        (
            "<!-- checked: records slot_order -->\n| a | b | c |\n|---|---|---|\n| `positional` | x | all others |\n| `prior` | y | `nobody` |\n",
            ["nobody", "prior"],
        ),
        (
            "<!-- checked: records noise.when -->\n| a | b | c |\n|---|---|---|\n| `train` | x | all others |\n| `always` | y | `keras_io` |\n",
            ["keras_io has train", "megatron_top1 has always"],
        ),
    ],
)
def test_disagreements__are_seen(text: str, says: list[str]) -> None:
    """A table that contradicts the data is seen."""
    (table,) = tables_of(text)
    assert disagreements(table) == says
