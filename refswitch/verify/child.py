# May import: standard library, numpy, safetensors, refswitch.verify.case.
"""The adapter's process: imports somebody else's file, runs one case at a time, answers one JSON line for each.

Run as `python -m refswitch.verify.child FILE NAME`. Requests come as JSON lines on standard input; answers go to the standard output
that the process was started with, which the adapter cannot reach: its own prints are sent to standard error. Next: `process`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from refswitch.verify.case import MUTATED, Case, problem_with, read_case

Reply = dict[str, Any]


def _one_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frame[-1].filename).name}:{frame[-1].lineno})" if frame else ""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}{place}"[:600]


def _is_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _constants(path: Path) -> tuple[list[str], str | None]:
    """Return REQUIRES as written in the file, before anything of it runs, and why the file is not Python."""
    import ast

    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        return [], f"not a Python file: {_one_line(error)}"
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == "REQUIRES" for target in targets):
            try:
                requires = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            except (ValueError, TypeError):
                requires = None
            is_list = isinstance(requires, (list, tuple)) and all(isinstance(name, str) for name in requires)
            return (list(requires), None) if is_list else ([], "REQUIRES should be a list of names")
    return [], None


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("refswitch_adapter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def _labels(module: Any) -> dict[str, Any]:
    adapters = getattr(module, "ADAPTERS", None)
    if adapters is not None:
        return {str(label): layer for label, layer in dict(adapters).items()}
    layer = getattr(module, "switch_layer", None)
    return {} if layer is None else {"switch_layer": layer}


def _describe(module: Any, label: str, layer: Any) -> Reply:
    def declared(constant: str, default: Any) -> Any:
        return getattr(layer, constant.lower(), getattr(module, constant, default))

    return {
        "label": label,
        "dialect": declared("DIALECT", "mesh_tensorflow"),
        "profile": declared("PROFILE", "float32"),
        "features": list(declared("FEATURES", [])),
        "limits": dict(declared("LIMITS", {})),
    }


def _load(path: Path, name: str) -> tuple[Any, list[Reply], Reply]:
    """Import the file; return the callable called `name` (the first if empty), all descriptions, and the reply."""
    requires, problem = _constants(path)
    if problem:
        return None, [], {"error": problem}
    missing = [package for package in requires if not _is_package(package)]
    if missing:
        return None, [], {"not_run": f"not installed: {', '.join(missing)}"}
    start = time.perf_counter()
    try:
        module = _import(path)
        labels = _labels(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - an adapter may raise anything, SystemExit too
        absent = getattr(error, "name", "") or ""
        if isinstance(error, ImportError) and absent.split(".")[0] in requires:
            return None, [], {"not_run": f"{absent} cannot be imported"}
        return None, [], {"error": f"cannot be imported: {_one_line(error)}"}
    if name:
        found = labels.get(name, getattr(module, name, None))
        if not callable(found):
            return None, [], {"error": f"has no adapter {name!r}; it has: {', '.join(labels) or 'none'}"}
        labels = {name: found}
    if not labels:
        return None, [], {"error": "defines neither `switch_layer` nor `ADAPTERS`"}
    uncallable = [label for label, layer in labels.items() if not callable(layer)]
    if uncallable:
        return None, [], {"error": f"ADAPTERS[{uncallable[0]!r}] is not callable"}
    try:
        described = [_describe(module, label, layer) for label, layer in labels.items()]
        json.dumps(described)
    except (TypeError, ValueError) as error:
        return None, [], {"error": f"declares what cannot be read: {_one_line(error)}"}
    return next(iter(labels.values())), described, {"seconds": time.perf_counter() - start}


def _as_arrays(returned: Any) -> dict[str, np.ndarray]:
    if not isinstance(returned, dict):
        raise TypeError(f"returned {type(returned).__name__}, but should return a dict of arrays")
    return {str(name): np.asarray(value, order="C") for name, value in returned.items() if name != MUTATED}


def run_case(layer: Any, case: Case) -> tuple[dict[str, np.ndarray], Reply]:
    """Run one case on copies of its arrays; return the outputs and the reply, with the inputs that were written to."""
    handed = case.writable_copy()
    try:
        outputs = _as_arrays(layer(handed))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - an adapter may raise anything, SystemExit too
        return {}, {"error": f"raised {_one_line(error)}"}
    problem = problem_with(outputs, case)
    if problem:
        return {}, {"error": problem.text}
    mutated = [name for name, array in case.arrays.items() if array.tobytes() != handed.arrays[name].tobytes()]
    return outputs, {"ok": True, MUTATED: mutated}


def main() -> None:
    """Serve requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the adapter prints, from Python or from C, is captured with its errors
    path, name = Path(sys.argv[1]), sys.argv[2]
    layer, described, reply = _load(path, name)
    replies.write(json.dumps({**reply, "adapters": described}) + "\n")
    replies.flush()
    for line in sys.stdin:
        folder = Path(json.loads(line)["folder"])
        outputs, reply = run_case(layer, read_case(folder))
        save_file(outputs, folder / "outputs.safetensors")
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
