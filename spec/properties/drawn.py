# May import: standard library, numpy, hypothesis, refswitch, properties.operations.
"""What the properties of operations draw, and how they compare: structure is drawn, arrays follow from it, radii from the declared format.

    @clause("T-NORM-1")
    @draws(plan=plans("BLD"), power=powers())
    def test_norm_forward__something(operations, plan, power):
        scene = Scene(operations, plan)
        x_BLD = scene.normal("BLD")

A plan is sizes by letter, pairwise distinct, a seed, and which of the formats that the namespace can play stand at its rounding points. A scene makes
arrays of it, on the grids of those formats, in the namespace's dtype. What is compared is equal, or lies in a tube of the judge's whose radius
follows from the format in which the namespace computes between rounding points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.operations import Operations
from refswitch.config import MODEL_TRUTH, ModelPoints
from refswitch.numbers.precision import FORMATS, round_to
from refswitch.proof.finite_difference import difference_ratio
from refswitch.proof.ulp import coordinate
from refswitch.spec_data import load_profile
from refswitch.verify import tubes
from refswitch.verify.tubes import Arithmetic, Tube, arithmetic_of

STEP = 2.0**-13  # of a difference: its square times a third derivative, and the rounding divided by it, are both far below a wrong gradient
SIZES = (3, 5, 2, 7, 4, 6, 1, 8, 9, 11)  # the plainest first: towards them hypothesis shrinks


def points_of(*names: str) -> ModelPoints:
    """Return rounding points by the names of their formats: activations, statistics, logits, gradients."""
    return ModelPoints(*(FORMATS[name] for name in names))


FLOAT32 = points_of("float32", "float32", "float32", "float32")
SELECTIVE = points_of("bfloat16", "float32", "float32", "bfloat16")
# No model has these together: a value that is rounded in the format of another point shows.
MOTLEY = (points_of("bfloat16", "float32", "tf32", "float64"), points_of("float32", "tf32", "bfloat16", "tf32"))
PLAYED = {"float64": (MODEL_TRUTH, SELECTIVE, *MOTLEY), "float32": (FLOAT32, SELECTIVE)}  # by the profile that a namespace declares


class Plan(NamedTuple):
    """What an example is drawn as."""

    sizes: dict[str, int]
    seed: int
    points: int  # which of the settings that the namespace can play; the first has no narrow format


@st.composite
def plans(draw: Any, letters: str, points: int | None = None, **given: Any) -> Plan:
    """Draw a plan: pairwise distinct sizes of these letters, but for those given as numbers or strategies; `points` 0 is the widest setting."""
    chosen = {letter: draw(size) if isinstance(size, st.SearchStrategy) else size for letter, size in given.items()}
    free = [letter for letter in letters if letter not in chosen]
    left = draw(st.permutations([size for size in SIZES if size not in chosen.values()]))
    return Plan({**dict(zip(free, left, strict=False)), **chosen}, draw(st.integers(0, 2**20)), draw(st.integers(0, 3)) if points is None else points)


def in_every_format(letters: str, *others: Any, **given: int) -> list[Any]:
    """Return plans to try always: one of each setting, with the same values of the other arguments."""
    free = [size for size in SIZES if size not in given.values()]
    sizes = {**dict(zip((letter for letter in letters if letter not in given), free, strict=False)), **given}
    made = [Plan(sizes, seed, seed) for seed in range(len(PLAYED["float64"]))]
    return [(plan, *others) for plan in made] if others else list(made)


def powers(reach: int = 6) -> st.SearchStrategy[float]:
    """Draw a power of two, by which a product is exact."""
    return st.integers(-reach, reach).map(lambda exponent: 2.0**exponent)


def is_wide(operations: Operations) -> bool:
    """Whether the namespace computes in float64, so that differences can be taken of it."""
    return operations.profile == "float64"


class Scene:
    """The arrays of an example."""

    def __init__(self, operations: Operations, plan: Plan) -> None:
        played = PLAYED[operations.profile]
        self.sizes, self.points, self.is_narrow = plan.sizes, played[plan.points % len(played)], plan.points % len(played) > 0
        self.dtype = np.float64 if is_wide(operations) else np.float32
        self.arithmetic: Arithmetic = arithmetic_of(load_profile(operations.profile))
        self.random = np.random.Generator(np.random.Philox(plan.seed))
        operations.meets("narrow points", self.is_narrow)

    def shape(self, letters: str) -> tuple[int, ...]:
        """Return the sizes of some axes; a digit stands for itself."""
        return tuple(int(letter) if letter.isdigit() else self.sizes[letter] for letter in letters)

    def array(self, x: np.ndarray, format: str = "activations") -> np.ndarray:
        """Return x on the grid of a rounding point, as the namespace takes it."""
        return round_to(np.asarray(x, np.float64), getattr(self.points, format)).astype(self.dtype)

    def normal(self, letters: str, scale: float = 1.0, format: str = "activations") -> np.ndarray:
        """Return normal numbers, as one operation hands them to the next."""
        return self.array(scale * self.random.normal(size=self.shape(letters)), format)

    def gradient(self, letters: str) -> np.ndarray:
        """Return a gradient that comes in."""
        return self.normal(letters, 1.0, "gradients")

    def whole(self, letters: str, largest: int = 3) -> np.ndarray:
        """Return small integers: sums of their products are exact in any order."""
        return self.random.integers(-largest, largest, self.shape(letters), endpoint=True).astype(self.dtype)

    def factor(self, letters: str) -> np.ndarray:
        """Return dropout as a factor: 0 or 2, whose products are exact."""
        return np.where(self.random.random(self.shape(letters)) < 0.5, 2.0, 0.0).astype(self.dtype)

    def ones(self, letters: str) -> np.ndarray:
        """Return a factor that changes nothing."""
        return np.ones(self.shape(letters), self.dtype)

    def below(self, letters: str, limit: int) -> np.ndarray:
        """Return integers from 0 to limit - 1."""
        return self.random.integers(0, limit, self.shape(letters))


def assert_within(got: Any, tube: Tube, name: str, scene: Scene) -> None:
    """Assert dtype, shape, and that every element lies in its tube; the message names the first that does not by its letters."""
    got = np.asarray(got)
    assert got.dtype == scene.dtype, f"{name} has dtype {got.dtype}, should be {np.dtype(scene.dtype)}"
    assert got.shape == tube.value.shape, f"{name} has shape {got.shape}, should be {tube.value.shape}"
    bad = np.argwhere(~(tubes.ratio(got, tube) <= 1.0))
    if len(bad):
        index = tuple(int(i) for i in bad[0])
        wanted = f"{float(tube.value[index])!r} within {float(tube.radius[index]):.3g}"
        raise AssertionError(f"{coordinate(name, index)} is {float(got[index])!r}, should be {wanted} ({len(bad)} of {got.size} elements)")


def assert_equal(got: Any, wanted: Any, name: str) -> None:
    """Assert shape and equal numbers, NaN being equal to NaN; the message names the first that differs by its letters."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape, f"{name} has shape {got.shape}, should be {wanted.shape}"
    bad = np.argwhere(~((got == wanted) | ((got != got) & (wanted != wanted))))
    if len(bad):
        index = tuple(int(i) for i in bad[0])
        raise AssertionError(f"{coordinate(name, index)} is {got[index]!r}, should be {wanted[index]!r} ({len(bad)} of {got.size} elements)")


def assert_on_grid(got: np.ndarray, format: str, name: str, scene: Scene) -> None:
    """Assert that every element is a value of the format of a rounding point."""
    assert_equal(got, round_to(got, getattr(scene.points, format)), name)


def noise_of(pairs: list[tuple[Tube, np.ndarray]]) -> float:
    """Return a bound of the rounding in sums of out * dout near a point where the outputs lie in these tubes."""
    inside = sum(float(np.sum(tube.radius * np.abs(dout))) for tube, dout in pairs)
    terms = sum(dout.size for _, dout in pairs)
    return 2.0 * (inside + terms * tubes.OWN_UNIT * sum(float(np.sum(np.abs(tube.value * dout))) for tube, dout in pairs))


def assert_slopes(
    value: Callable[..., tuple[float, Any]],
    arguments: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    noise: float,
    random: np.random.Generator,
    must: bool = True,
    step: float = STEP,
) -> int:
    """Assert that the derivative along a drawn direction of each argument is that of a central difference; return how many were compared.

    `value` returns with the value what tells the pieces of a piecewise smooth function apart: a direction that crosses a border is refused, and
    fails where it `must` not.
    """
    assert set(gradients) == set(arguments)
    compared = 0
    for name, x in arguments.items():
        direction = random.normal(size=x.shape)

        def along(t: float, name: str = name, x: np.ndarray = x, direction: np.ndarray = direction) -> tuple[float, Any]:
            return value(**{**arguments, name: x + t * direction})

        found = difference_ratio(along, float(np.sum(gradients[name] * direction)), step, noise, np.array_equal)
        assert found.ok or (found.refused and not must), f"the slope along {name} is off by {found.ratio:.3g} radii"
        compared += found.ok
    return compared


def assert_near(got: Any, other: Any, tube: Tube, name: str) -> None:
    """Assert that two evaluations of one value, as after a permutation, are within its tube's width of each other."""
    got, other = np.asarray(got), np.asarray(other)
    assert got.shape == other.shape, f"{name} has shape {got.shape}, should be {other.shape}"
    bad = np.argwhere(~(np.abs(got.astype(np.float64) - other) <= 2.0 * tube.radius))
    assert not len(bad), f"{coordinate(name, tuple(int(i) for i in bad[0]))} differs between two evaluations ({len(bad)} of {got.size} elements)"
