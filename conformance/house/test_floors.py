# May import: standard library, pytest.
"""What the floors may import from outside: import-linter knows no allow-list of externals, so this reads the source.

`reference`, `numbers` (and later `proof`) know the standard library, NumPy and the floors below; the adapter's process besides these safetensors.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "refswitch"
ALLOWED = {
    "numbers": {"numpy", "refswitch.numbers"},
    "reference": {"numpy", "refswitch.numbers", "refswitch.config", "refswitch.reference"},
    "proof": {"numpy", "refswitch.numbers", "refswitch.config", "refswitch.dims", "refswitch.proof"},
    "data": {
        "numpy",
        "tokenizers",
        "sentencepiece",
        "zstandard",
        "refswitch.data",
        "refswitch.numbers",
        "refswitch.errors",
        "refswitch.reference.transformer",
    },
    "config.py": {"refswitch.numbers"},
    "engine": {"numpy", "refswitch"},
    "backends/protocol.py": {"numpy", "refswitch"},
    "worlds/one.py": {"numpy", "refswitch.worlds"},
    "errors.py": set(),
    "dims.py": set(),
    "verify/case.py": {"numpy", "safetensors"},
    "verify/child.py": {"numpy", "safetensors", "refswitch.verify.case"},
}


def imported_names(source: str) -> set[str]:
    """Return every module that a source text imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return names


def strangers(source: str, allowed: set[str]) -> set[str]:
    """Return the imports that are neither of the standard library nor allowed."""
    return {
        name
        for name in imported_names(source)
        if name.split(".")[0] not in sys.stdlib_module_names and not any(name == known or name.startswith(known + ".") for known in allowed)
    }


@pytest.mark.parametrize("place", ALLOWED)
def test_floor__imports_only_what_it_may(place: str) -> None:
    """No stranger on any floor that has a list."""
    path = PACKAGE / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    found = {file.name: strangers(file.read_text(encoding="utf-8"), ALLOWED[place]) for file in files}
    assert {name: names for name, names in found.items() if names} == {}


def test_floor__notices_a_stranger() -> None:
    """The check can fail: a lazy import of a kernel in the reference."""
    planted = "import math\ndef f():\n    from refswitch.kernels.cpu import router\n    import torch.nn\n"
    assert strangers(planted, ALLOWED["reference"]) == {"refswitch.kernels.cpu", "torch.nn"}


def questions_of_rank(source: str) -> list[str]:
    """Return the conditions that ask for a rank or for the number of ranks."""
    tests = [node.test for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.If, ast.IfExp, ast.While))]
    return [ast.unparse(test) for test in tests if any(isinstance(node, ast.Attribute) and node.attr in ("rank", "size") for node in ast.walk(test))]


def test_engine__asks_for_no_rank() -> None:
    """Style 41: size 1 runs the same collectives. The size of an array is another thing: those conditions compare it with a number of elements."""
    found = {file.name: questions_of_rank(file.read_text(encoding="utf-8")) for file in (PACKAGE / "engine").glob("*.py")}
    asked = [text for texts in found.values() for text in texts if "world" in text or ".rank" in text]
    assert asked == []
    assert questions_of_rank("y = 1 if world.rank == 0 else 2\nif world.size > 1:\n    pass") == ["world.size > 1", "world.rank == 0"]


def test_files__first_line_says_what_it_may_import() -> None:
    """Style 46."""
    silent = [str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if not file.read_text(encoding="utf-8").startswith("# May import: ")]
    assert silent == []
