# May import: standard library, numpy.
"""Parameter trees: named tuples and tuples whose leaves are arrays, as a flat dictionary and back. Style: a tree mirrors the call tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def leaves(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Return every array by its path, for example `encoder.blocks.0.self_attention.norm_D`; None has no leaf."""
    if tree is None:
        return {}
    if not isinstance(tree, tuple):
        return {prefix: tree}
    names = getattr(tree, "_fields", range(len(tree)))
    return {
        path: leaf for name, value in zip(names, tree, strict=True) for path, leaf in leaves(value, f"{prefix}{'.' * bool(prefix)}{name}").items()
    }


def with_leaves(tree: T, arrays: Mapping[str, np.ndarray], prefix: str = "") -> T:
    """Return a tree of the same shape with the arrays of the same paths.

    Raises
    ------
    KeyError
        With the first path that is missing.
    """
    if tree is None:
        return tree
    if not isinstance(tree, tuple):
        return arrays[prefix]  # type: ignore[return-value]
    names = getattr(tree, "_fields", range(len(tree)))
    values = [with_leaves(value, arrays, f"{prefix}{'.' * bool(prefix)}{name}") for name, value in zip(names, tree, strict=True)]
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
