# May import: standard library, numpy, safetensors, refswitch.errors.
"""A case, and what an adapter may return for it: the contract's two tables as data.

Spec: the adapter (contract 1.2, 1.3). This file is all of refswitch that runs in the adapter's process, besides `child`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

INPUTS = {
    "x": "GSD", "w_router": "DE", "b_router": "E", "w_in": "EDF", "w_gate": "EDF", "w_out": "EFD", "b_in": "EF", "b_gate": "EF",
    "b_out": "ED", "noise": "GS*", "select_noise": "GSE", "priority": "GS", "hidden_mask": "GSF", "valid": "GS", "dout": "GSD",
    "daux": "", "dz": "",
}  # fmt: skip
OUTPUTS = {
    "out": "GSD", "logits": "GSE", "probs": "GSE", "expert": "GS", "slot": "GS", "kept": "GS", "gate": "GS", "hidden": "GSF",
    "expert_out": "GSD", "aux_loss": "", "z_loss": "",
}  # fmt: skip
GRADIENTS = ("x", "w_router", "w_in", "w_gate", "w_out", "b_router", "b_in", "b_gate", "b_out")
INTEGER_OUTPUTS = ("expert", "slot")
MUTATED = "mutated"


class Case:
    """One call's inputs, by attribute and by item; `get` gives None for an array that the case does not use."""

    def __init__(self, scalars: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self._values: dict[str, Any] = {**scalars, **arrays}
        self.scalars, self.arrays = scalars, arrays

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"this case has no {name}") from None

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value, or the default where the case does not use it."""
        return self._values.get(name, default)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter G, S, D, E, F."""
        G, S, D = self.arrays["x"].shape
        E, _, F = self.arrays["w_in"].shape
        return {"G": G, "S": S, "D": D, "E": E, "F": F}

    def writable_copy(self) -> Case:
        """Return a case with arrays of its own."""
        return Case(self.scalars, {name: np.array(array, order="C") for name, array in self.arrays.items()})


class Problem(NamedTuple):
    """Why a returned dict breaks the contract."""

    name: str
    text: str


def expected_shape(name: str, case: Case) -> tuple[int, ...]:
    """Return the shape of an output."""
    if name.startswith("d") and name[1:] in GRADIENTS:
        return case.arrays[name[1:]].shape
    return tuple(case.sizes[letter] for letter in OUTPUTS[name])


def known_outputs(case: Case) -> list[str]:
    """Return the names that may be returned for this case, in the contract's order."""
    return [*OUTPUTS, *(f"d{name}" for name in GRADIENTS if name in case.arrays)]


def problem_with(outputs: dict[str, np.ndarray], case: Case) -> Problem | None:
    """Return the first breach of the contract: a missing, unknown, misshapen or wrongly typed output.

    Spec: contract 1.3. Values are not looked at.
    """
    known = known_outputs(case)
    legal = [*OUTPUTS, *(f"d{name}" for name in GRADIENTS)]
    for name in outputs:
        if name not in legal:
            return Problem(name, f"returned an unknown output {name!r}; known: {', '.join(legal)}")
        if name not in known:
            return Problem(name, f"returned {name}, but the case has no {name[1:]}")
    if "out" not in outputs:
        return Problem("out", "returned no `out`, which is required")
    for name, array in outputs.items():
        shape = expected_shape(name, case)
        if array.shape != shape:
            letters = OUTPUTS.get(name) or INPUTS.get(name[1:], "")
            return Problem(name, f"returned {name} with shape {array.shape}, but should be {shape} ({', '.join(letters) or 'a scalar'})")
        if name == "kept":
            if array.dtype != np.bool_:
                return Problem(name, f"returned {name} as {array.dtype}, but should be bool")
        elif name in INTEGER_OUTPUTS:
            if not np.issubdtype(array.dtype, np.integer):
                return Problem(name, f"returned {name} as {array.dtype}, but should be an integer type")
        elif array.dtype not in (np.float32, np.float64):
            return Problem(name, f"returned {name} as {array.dtype}, but should be float32 or float64")
    return None


def write_case(case: Case, folder: Path) -> None:
    """Write `case.json` (scalars, names, shapes) and `inputs.safetensors` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(array, order="C") for name, array in case.arrays.items()}
    text = json.dumps({"scalars": case.scalars, "arrays": {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()}})
    (folder / "case.json").write_text(text, encoding="utf-8")
    save_file(arrays, folder / "inputs.safetensors")


def read_case(folder: Path) -> Case:
    """Read what `write_case` wrote."""
    described = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    scalars = described["scalars"]
    scalars["wants"] = tuple(scalars["wants"])
    arrays = {name: np.array(array) for name, array in load_file(folder / "inputs.safetensors").items()}
    return Case(scalars, arrays)
