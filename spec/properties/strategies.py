# May import: standard library, numpy, hypothesis, refswitch.
"""What hypothesis draws: the structure of a case, never its elements.

A recipe of the judge says sizes, scales, who is crowded, who is padding, where the ties are; the numbers follow from its name by address, so
that a failing example is read at a glance, and shrinks by growing plainer. Sizes come from disjoint pools: no two axes of a drawn case are
equal, unless it is about equal axes. A recipe is folded into what the implementation accepts rather than thrown away.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refswitch.numbers.precision import FORMATS, round_to
from refswitch.verify.case import INPUTS, OUTPUTS, Case
from refswitch.verify.cases import Recipe, Target, fitted, make_case, wanted
from refswitch.verify.oracle import FACTOR_NOISE

SIZES = {"S": (8, 1, 5, 12, 17), "D": (3, 7, 13), "E": (4, 2, 6, 11, 1), "F": (9, 14, 18)}  # the plainest first: towards it hypothesis shrinks
DRAWN: dict[str, st.SearchStrategy[Any]] = {
    "name": st.integers(0, 10**6).map(str),
    "G": st.sampled_from((1, 1, 2, 3)),
    "S": st.sampled_from(SIZES["S"]),
    "D": st.sampled_from(SIZES["D"]),
    "E": st.sampled_from(SIZES["E"]),
    "F": st.sampled_from(SIZES["F"]),
    "scale": st.sampled_from((1.0, 1.0, 2.0**-7, 16.0)),
    "router_scale": st.sampled_from((1.0, 1.0, 4.0, 90.0)),
    "hot": st.none() | st.integers(0, 10),
    "everyone": st.booleans(),
    "avoid": st.none() | st.integers(0, 10),
    "capacity": st.none() | st.integers(0, 5) | st.sampled_from((12, 13, 17, 18)),
    "pads": st.sampled_from(("", "", "right", "left", "scattered", "all")),
    "noise": st.booleans(),
    "ties": st.sampled_from(("", "", "", "exact")),
    "mask": st.sampled_from((False, False, True)),
    "train": st.booleans(),
}


@st.composite
def recipes(draw: Any, **fixed: Any) -> Recipe:
    """Draw a recipe; a field that is given is that value, or drawn from that strategy."""
    chosen = {field: draw(value) if isinstance(value, st.SearchStrategy) else value for field, value in (DRAWN | fixed).items()}
    return Recipe(**chosen)


# Regimes that a draw among small sizes does not reach; each was where a shipped fault showed.
CROWD = Recipe("crowd", S=273, D=3, E=2, F=4, hot=1, everyone=True, capacity=265)
MANY_EXPERTS = Recipe("many-experts", S=149, D=6, E=131, F=5)
LATE_EXPERTS = Recipe("late-experts", S=19, D=56, E=13, F=61)
SQUARE = Recipe("square", S=10, D=8, E=3, F=8)
SQUARE_ROUTER = Recipe("square-router", S=10, D=5, E=5, F=7)
TOKENS_AS_EXPERTS = Recipe("tokens-as-experts", S=7, D=5, E=7, F=9, pads="scattered", capacity=1)
TAILS = Recipe("tails", S=37, D=11, E=3, F=35, hot=1, capacity=9)
OVERFLOW_IN_GROUPS = Recipe("overflow-in-groups", G=3, S=12, D=7, E=3, F=5, hot=1, capacity=2)
ONE_EXPERT = Recipe("one-expert", S=6, D=5, E=1, F=7)
ONE_TOKEN = Recipe("one-token", S=1, D=5, E=4, F=7)
ENORMOUS = Recipe("enormous", S=9, D=5, E=6, F=4, router_scale=900.0)
TIES = Recipe("ties", S=16, D=5, E=6, F=7, ties="exact")


def plain() -> Recipe:
    """Return a small case in no particular regime."""
    return Recipe("plain", S=6, D=5, E=3, F=7)


def folded(recipe: Recipe, target: Target) -> Recipe:
    """Return the recipe without the regimes that the target does not know; indices of experts wrap around."""
    features, dialect = target.features, target.dialect
    noisy = "noise" in features and dialect.noise.kind != "none" and dialect.noise.when != "never"
    return replace(
        recipe,
        G=recipe.G if "groups" in features else 1,
        pads=recipe.pads if "padding" in features else "",
        noise=recipe.noise and noisy,
        mask=recipe.mask and "expert_dropout" in features,
        hot=None if recipe.hot is None else recipe.hot % recipe.E,
        everyone=recipe.everyone and recipe.hot is not None,
        avoid=None if recipe.avoid is None or recipe.avoid == recipe.hot or recipe.E == 1 else recipe.avoid % recipe.E,
    )


def case_of(recipe: Recipe, target: Target) -> Case | None:
    """Return the recipe's case, or None where the target's limits leave none."""
    within = fitted(folded(recipe, target), target)
    return None if within is None else make_case(within, target, 0)


def changed(case: Case, target: Target, **changes: Any) -> Case:
    """Return the case with other arrays or scalars, arrays in the dtype they had; None takes one away."""
    scalars = {**case.scalars, **{name: value for name, value in changes.items() if name in case.scalars}}
    arrays = dict(case.arrays)
    for name, value in changes.items():
        if name in scalars:
            continue
        if value is None:
            arrays.pop(name, None)
        else:
            dtype = arrays[name].dtype if name in arrays else {"valid": np.dtype(bool), "priority": np.dtype(np.int64)}.get(name, case.x.dtype)
            arrays[name] = np.array(value, dtype=dtype, order="C")
    scalars["wants"] = tuple(wanted(Case(scalars, arrays), target))
    return Case(scalars, arrays)


def stored(array: np.ndarray, target: Target, field: str = "x") -> np.ndarray:
    """Round to the format in which a case's array is stored."""
    return round_to(np.asarray(array, np.float64), FORMATS[getattr(target.profile.storage, field)])


def letters_of(name: str, array: np.ndarray, target: Target) -> str:
    """Return the axes of an input or an output by letter."""
    if name == "noise":
        return "GSD" if target.dialect.noise.kind in FACTOR_NOISE else "GSE"
    if name == "b_out" or name == "db_out":
        return "ED" if array.ndim == 2 else "D"
    return OUTPUTS[name] if name in OUTPUTS else INPUTS[name] if name in INPUTS else INPUTS[name[1:]]


def reordered(array: np.ndarray, letters: str, letter: str, order: np.ndarray) -> np.ndarray:
    """Take an axis in another order, or a part of it."""
    return np.take(array, order, axis=letters.index(letter)) if letter in letters else array


def with_axis(case: Case, target: Target, letter: str, order: np.ndarray, keep: tuple[str, ...] = ()) -> Case:
    """Return the case with an axis in another order in every array but those of `keep`."""
    arrays = {
        name: array if name in keep else np.array(reordered(array, letters_of(name, array, target), letter, order), order="C")
        for name, array in case.arrays.items()
    }
    return Case(case.scalars, arrays)


def joined(cases: list[Case], target: Target, letter: str) -> Case:
    """Return the cases side by side along an axis; arrays without it are those of the first."""
    first = cases[0]
    arrays = {
        name: np.concatenate([case.arrays[name] for case in cases], axis=letters.index(letter)) if letter in letters else array
        for name, array in first.arrays.items()
        for letters in (letters_of(name, array, target),)
    }
    return Case(first.scalars, arrays)


def permutations(n: int, seed: str) -> np.ndarray:
    """Return a permutation of n things that follows from a name."""
    return np.random.Generator(np.random.PCG64([len(seed), *seed.encode()])).permutation(n)
