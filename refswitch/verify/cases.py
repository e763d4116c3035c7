# May import: standard library, numpy, refswitch.numbers, refswitch.reference, refswitch.config, refswitch.verify.case.
"""The cases: inputs that reach every regime in which Switch layers are known to go wrong.

Every number is drawn by address, `philox(seed, case, array)`, so that a case is the same on any machine and needs no other case. Values are
sums of uniform draws: no function of libm is in them. Sizes are pairwise distinct unless a case is about equal sizes, so that a
swapped axis cannot pass. Sources: faults.md C2 is where each regime's bugs were found. Next: `tubes`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from refswitch.config import Dialect, Profile, router_format
from refswitch.errors import InputError
from refswitch.numbers.precision import FORMATS, round_to
from refswitch.reference.capacity import capacity_in_eval, capacity_of
from refswitch.verify.case import GRADIENTS, OUTPUTS, Case
from refswitch.verify.oracle import FACTOR_NOISE

ACTIVATIONS = {"relu": "relu", "gelu": "gelu_erf", "gelu_tanh": "gelu_tanh", "silu": "silu"}
ADDITIVE_NOISE = ("z_add_uniform", "z_add_normal", "z_add_gumbel")
PAD_GARBAGE = 3.0e3  # what stands in padding rows that the layer itself must zero
RULED_OUT = -1.0e9  # the term of `second_place` on an expert that may not be chosen


class Target(NamedTuple):
    """What is judged: the declared dialect, profile, features and limits."""

    dialect: Dialect
    profile: Profile
    features: frozenset[str]
    limits: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How one case is made; the fields after the sizes switch regimes on."""

    name: str
    G: int = 1
    S: int = 24
    D: int = 17
    E: int = 5
    F: int = 29
    scale: float = 1.0  # of the tokens
    router_scale: float = 1.0  # of the router's weights
    out_scale: float = 1.0  # of d(loss)/d(out)
    hot: int | None = None  # expert that most tokens prefer
    everyone: bool = False  # ... that all tokens choose
    avoid: int | None = None  # expert that no token chooses
    capacity: int | None = None  # None: above S, so that nothing is dropped
    factor: str = "1.25"  # for implementations that compute their own capacity
    pads: str = ""  # "right", "left", "scattered", "all"
    noise: bool = False
    ties: str = ""  # "exact": equal integer logits; "near": logits half a rounding apart
    integers: bool = False  # integer tokens and weights: sums are exact, and roundings of hidden and out fall on halves
    shift: float = 0.0  # added to every logit
    losses: tuple[float, float] = (0.37, 0.011)  # d(loss)/d(aux_loss), d(loss)/d(z_loss)
    mask: bool = False  # expert dropout
    train: bool = False
    needs: tuple[str, ...] = ()
    tier: str = "quick"

    @property
    def tags(self) -> frozenset[str]:
        """The regimes that this case is in."""
        return frozenset(
            word
            for word, present in (
                ("noise", self.noise),
                ("padding", bool(self.pads)),
                ("ties", bool(self.ties)),
                ("drops", self.capacity is not None),
            )
            if present
        )


class Prepared(NamedTuple):
    """A case with its recipe."""

    recipe: Recipe
    case: Case

    @property
    def name(self) -> str:
        """The case's id."""
        return self.recipe.name


RECIPES = (
    Recipe("plain"),
    Recipe("plain-train", train=True),
    Recipe("small-tokens", scale=1e-3, S=19, E=3),
    Recipe("large-tokens", scale=30.0, S=21, E=7),
    Recipe("huge-logits", router_scale=90.0, S=22, E=6),
    Recipe("enormous-logits", router_scale=900.0, S=20, E=6),
    Recipe("negative-logits", shift=-1000.0, S=18, E=6),
    Recipe("losses-only", out_scale=0.0),
    Recipe("aux-only", out_scale=0.0, losses=(1.0, 0.0), hot=1),
    Recipe("z-only", out_scale=0.0, losses=(0.0, 1.0)),
    Recipe("out-only", losses=(0.0, 0.0)),
    Recipe("overflow-0", hot=0, capacity=4),
    Recipe("overflow-1", hot=1, capacity=3, S=26),
    Recipe("overflow-last", hot=4, capacity=5, train=True),
    Recipe("overflow-losses", hot=2, capacity=2, out_scale=0.0),
    Recipe("overflow-all", capacity=2, S=31, E=3),
    Recipe("capacity-0", capacity=0, S=9),
    Recipe("capacity-1", capacity=1, S=14),
    Recipe("all-to-one", hot=3, everyone=True, capacity=6),
    Recipe("all-to-one-fits", hot=2, everyone=True),
    Recipe("empty-expert", avoid=2),
    Recipe("empty-first", avoid=0, capacity=4),
    Recipe("one-expert", E=1, S=11),
    Recipe("one-token", S=1),
    Recipe("few-tokens", S=3, E=7),
    Recipe("eleven-experts", E=11, S=46),
    Recipe("thirteen-experts-overflow", E=13, S=53, hot=10, capacity=3),
    Recipe("square", D=16, F=16, S=23),
    Recipe("square-router", D=7, E=7, S=25),
    Recipe("many-experts", E=131, S=149, D=6, F=5),
    Recipe("many-weights", E=13, S=25, D=56, F=61),
    Recipe("integers", integers=True, E=1, S=27),
    Recipe("integers-experts", integers=True, E=3, S=28),
    Recipe("tails", S=37, D=33, F=35),
    Recipe("wide", S=10, D=130, F=67, E=4),
    Recipe("crowd", S=331, D=6, F=9, E=2, hot=1),
    Recipe("crowd-overflow", S=307, D=6, F=9, E=2, hot=0, everyone=True, capacity=270),
    Recipe("ties", ties="exact", S=32, E=6),
    Recipe("ties-overflow", ties="exact", S=32, E=4, capacity=5),
    Recipe("near-ties", ties="near", S=34, E=4),
    Recipe("near-ties-small", ties="near", scale=0.03, S=35, E=4),
    Recipe("near-ties-overflow", ties="near", S=8, E=4, capacity=2),
    Recipe("groups", G=3, S=16, needs=("groups",)),
    Recipe("groups-overflow", G=4, S=15, hot=1, capacity=3, needs=("groups",)),
    Recipe("pads-right", pads="right", needs=("padding",)),
    Recipe("pads-left-overflow", pads="left", hot=1, capacity=4, S=27, needs=("padding",)),
    Recipe("pads-scattered-overflow", pads="scattered", hot=0, capacity=3, needs=("padding",)),
    Recipe("pads-groups", pads="scattered", G=3, S=14, capacity=3, needs=("padding", "groups")),
    Recipe("pads-square", pads="scattered", S=7, E=7, needs=("padding",)),
    Recipe("pads-all", pads="all", S=8, needs=("padding",)),
    Recipe("noise", noise=True, train=True, needs=("noise",)),
    Recipe("noise-overflow", noise=True, train=True, hot=1, capacity=4, S=25, needs=("noise",)),
    Recipe("noise-eval", noise=True, S=20, needs=("noise",)),
    Recipe("noise-groups", noise=True, train=True, G=3, S=13, needs=("noise", "groups")),
    Recipe("noise-pads", noise=True, train=True, pads="scattered", needs=("noise", "padding")),
    Recipe("dropout", mask=True, train=True, needs=("expert_dropout",)),
    Recipe("dropout-overflow", mask=True, train=True, hot=2, capacity=4, needs=("expert_dropout",)),
    Recipe("no-tokens", S=0, needs=("empty",)),
    Recipe("capacity-above", capacity=1000, S=12),
)


def recipes_for(tier: str) -> Iterator[Recipe]:
    """Yield the recipes of a tier: each once in `quick`; each at three more draws in `full`, at nine in `exhaustive`."""
    yield from RECIPES
    for copy in range({"quick": 0, "full": 3, "exhaustive": 9}[tier]):
        for recipe in RECIPES:
            yield replace(recipe, name=f"{recipe.name}-{copy + 2}")


def _bits(seed: int, case: str, array: str, n: int) -> np.ndarray:
    """Return n 32-bit words of the Philox stream of (seed, case, array)."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{case}/{array}".encode()).digest()[:16], "little")
    return (np.random.Philox(key=key).random_raw((n + 1) // 2).view(np.uint32))[:n]


def uniform(seed: int, case: str, array: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw from [0, 1) on a grid of 2**-24."""
    return ((_bits(seed, case, array, int(np.prod(shape))) >> 8) * 2.0**-24).reshape(shape)


def bell(seed: int, case: str, array: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw from a bell of mean 0 and variance 1: the centred sum of four uniform draws."""
    return (uniform(seed, case, array, (4, *shape)).sum(axis=0) - 2.0) * np.sqrt(3.0)


def fit(size: int, limit: dict[str, Any], is_edge: bool) -> int | None:
    """Return the admissible size nearest to the wanted one, or None where a case that is about its size cannot be had."""
    if "one_of" in limit:
        nearest = min((int(value) for value in limit["one_of"]), key=lambda value: abs(value - size))
    else:
        multiple = int(limit.get("multiple_of", 1))
        nearest = -(-size // multiple) * multiple
        lowest = -(-int(limit.get("min", 0)) // multiple) * multiple
        highest = int(limit["max"]) // multiple * multiple if "max" in limit else max(nearest, lowest)
        nearest = min(max(nearest, lowest), highest)
    return None if is_edge and nearest != size else nearest


def fitted(recipe: Recipe, target: Target) -> Recipe | None:
    """Return the recipe within the target's features and limits, or None where it cannot be had."""
    if not set(recipe.needs) <= target.features:
        return None
    if "noise" in recipe.needs and (target.dialect.noise.kind == "none" or target.dialect.noise.when == "never"):
        return None
    sizes: dict[str, Any] = {}
    for letter in "GSDEF":
        size = getattr(recipe, letter)
        is_edge = size <= 1 and letter in "SE"
        found = fit(size, target.limits.get(letter, {}), is_edge)
        if found is None:
            return None
        sizes[letter] = found
    recipe = replace(recipe, **sizes)
    hot, avoid = recipe.hot, recipe.avoid
    E = recipe.E
    return replace(recipe, hot=None if hot is None else min(hot, E - 1), avoid=None if avoid is None or E == 1 else min(avoid, E - 1))


def resolved_capacity(recipe: Recipe, target: Target) -> int:
    """Return the case's capacity: the dialect's own where it never drops or the implementation computes it, else the recipe's."""
    rule = target.dialect.capacity
    if "own_capacity" in target.features:
        return capacity_of(recipe.S, recipe.E, recipe.factor, rule) if recipe.train else capacity_in_eval(recipe.S, recipe.E, rule)
    if rule.expr in ("inf", "max_count"):
        return max(recipe.S, 1)
    return recipe.S + 3 if recipe.capacity is None else recipe.capacity


def _pad_mask(recipe: Recipe, seed: int) -> np.ndarray:
    G, S = recipe.G, recipe.S
    valid_GS = np.ones((G, S), bool)
    cut = max(1, S // 3)
    if recipe.pads == "right":
        valid_GS[:, S - cut :] = False
    elif recipe.pads == "left":
        valid_GS[:, :cut] = False
    elif recipe.pads == "all":
        valid_GS[:] = False
    else:
        valid_GS = uniform(seed, recipe.name, "valid", (G, S)) >= 0.3
    return valid_GS


def integers(seed: int, case: str, array: str, shape: tuple[int, ...], largest: int) -> np.ndarray:
    """Draw integers from -largest to largest."""
    return np.floor(uniform(seed, case, array, shape) * (2 * largest + 1)) - largest


def _router_and_tokens(recipe: Recipe, target: Target, seed: int) -> tuple[np.ndarray, np.ndarray]:
    G, S, D, E = recipe.G, recipe.S, recipe.D, recipe.E
    if recipe.integers:
        return integers(seed, recipe.name, "x", (G, S, D), 12), integers(seed, recipe.name, "w_router", (D, E), 2) / 64.0
    if recipe.ties == "exact":
        # Small integers: every logit is exact in every order and format, and columns that repeat tie exactly.
        w_DE = integers(seed, recipe.name, "w_router", (D, E), 2)
        w_DE[:, E // 2 :] = w_DE[:, : E - E // 2]
        return integers(seed, recipe.name, "x", (G, S, D), 2), w_DE
    w_DE = recipe.router_scale * bell(seed, recipe.name, "w_router", (D, E)) / np.sqrt(D)
    x_GSD = bell(seed, recipe.name, "x", (G, S, D))
    unit_DE = w_DE / np.maximum(np.sqrt(np.sum(w_DE**2, axis=0)), 1e-30)
    if recipe.hot is not None:
        prefers_GS = (uniform(seed, recipe.name, "hot", (G, S)) < 0.7) | recipe.everyone
        x_GSD = x_GSD + prefers_GS[..., None] * (12.0 if recipe.everyone else 3.5) * unit_DE[:, recipe.hot]
    if recipe.avoid is not None:
        x_GSD = x_GSD - 8.0 * unit_DE[:, recipe.avoid]
    x_GSD = recipe.scale * x_GSD
    if recipe.ties == "near":
        # The later half repeats the first; the last coordinate alone tells them apart, by half a rounding of a logit of 1.
        bits = router_format(target.dialect, target.profile).precision
        w_DE[:, E // 2 :] = w_DE[:, : E - E // 2]
        w_DE[-1], x_GSD[..., -1] = np.arange(E) >= E // 2, 2.0**-bits
    if recipe.shift:
        w_DE[-1], x_GSD[..., -1] = 8.0, recipe.shift / 8.0
    return x_GSD, w_DE


def make_case(recipe: Recipe, target: Target, seed: int) -> Case:
    """Draw the arrays of a case and round them to the profile's storage.

    Spec: contract 1.2.
    """
    dialect, storage = target.dialect, target.profile.storage
    G, S, D, E, F, name = recipe.G, recipe.S, recipe.D, recipe.E, recipe.F, recipe.name
    wide = np.float64 if storage.x == "float64" else np.float32

    def stored(array: np.ndarray, format_name: str) -> np.ndarray:
        return round_to(array, FORMATS[format_name]).astype(wide)

    def weight(array: str, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        if recipe.integers:
            return stored(integers(seed, name, array, shape, {"w_in": 12, "w_gate": 1, "w_out": 1}[array]), storage.w)
        return stored(bell(seed, name, array, shape) / np.sqrt(fan_in), storage.w)

    x_GSD, w_router_DE = _router_and_tokens(recipe, target, seed)
    arrays: dict[str, np.ndarray] = {
        "w_router": stored(w_router_DE, storage.w),
        "w_in": weight("w_in", (E, D, F), D),
        "w_out": weight("w_out", (E, F, D), F),
    }
    if dialect.expert.glu:
        arrays["w_gate"] = weight("w_gate", (E, D, F), D)
    if dialect.router.bias:
        bias_E = 0.0 if recipe.ties == "exact" else 0.3
        arrays["b_router"] = stored(bias_E * bell(seed, name, "b_router", (E,)), storage.w)
    if dialect.expert.bias == "per_expert":
        arrays["b_in"] = stored(0.4 * bell(seed, name, "b_in", (E, F)), storage.w)
        arrays["b_out"] = stored(0.4 * bell(seed, name, "b_out", (E, D)), storage.w)
        if dialect.expert.glu:
            arrays["b_gate"] = stored(0.4 * bell(seed, name, "b_gate", (E, F)), storage.w)
    if dialect.expert.bias == "shared_out":
        arrays["b_out"] = stored(0.4 * bell(seed, name, "b_out", (D,)), storage.w)
    if recipe.pads:
        valid_GS = _pad_mask(recipe, seed)
        arrays["valid"] = valid_GS
        fill = PAD_GARBAGE * bell(seed, name, "garbage", (G, S, D)) if dialect.pad.zero_input is True else x_GSD
        x_GSD = np.where(valid_GS[..., None], x_GSD, 0.0 if dialect.pad.detect == "zero_row" and dialect.pad.zero_input is not True else fill)
    arrays["x"] = stored(x_GSD, storage.x)
    if recipe.noise or (dialect.noise.when == "always" and "noise" in target.features and dialect.noise.kind != "none"):
        arrays["noise"] = stored(_noise(recipe, target, seed), storage.x)
    if dialect.select.rule in ("sample", "second_place"):
        arrays["select_noise"] = stored(_select_noise(recipe, arrays, target, seed), storage.x)
    if dialect.priority == "random":
        arrays["priority"] = np.argsort(uniform(seed, name, "priority", (G, S)), axis=-1, kind="stable").astype(np.int64)
    if recipe.mask:
        arrays["hidden_mask"] = stored((uniform(seed, name, "hidden_mask", (G, S, F)) >= 0.25) * (4.0 / 3.0), storage.x)
    if "backward" in target.features:
        arrays["dout"] = stored(recipe.out_scale * bell(seed, name, "dout", (G, S, D)), storage.x)
        if _wants_aux(target, recipe.train):
            arrays["daux"] = np.asarray(recipe.losses[0], wide)
        if "z_loss" in target.features:
            arrays["dz"] = np.asarray(recipe.losses[1], wide)
    scalars = {
        "capacity": resolved_capacity(recipe, target),
        "capacity_factor": recipe.factor if recipe.train else dialect.capacity.cf_eval,
        "top_k": 1,
        "train": recipe.train,
        "activation": ACTIVATIONS[dialect.expert.act],
        "wants": (),
    }
    scalars["wants"] = tuple(wanted(Case(scalars, arrays), target))
    return Case(scalars, arrays)


def _noise(recipe: Recipe, target: Target, seed: int) -> np.ndarray:
    """Draw the router's noise in the form that the dialect names."""
    G, S, D, E, noise = recipe.G, recipe.S, recipe.D, recipe.E, target.dialect.noise
    eps = noise.eps if isinstance(noise.eps, float) else 0.1
    eps = eps / E if noise.eps_over_E else eps
    if noise.kind == "x_dropout":
        return (uniform(seed, recipe.name, "noise", (G, S, D)) >= eps) / (1.0 - eps)
    if noise.kind in FACTOR_NOISE:
        # Wider than eps, so that a leak stands far above any rounding: the layer is linear in its noise, whatever its size.
        return 1.0 + max(eps, 0.2) * (2.0 * uniform(seed, recipe.name, "noise", (G, S, D)) - 1.0)
    if noise.kind == "z_add_uniform":
        return 1.0 + max(eps, 0.2) * (2.0 * uniform(seed, recipe.name, "noise", (G, S, E)) - 1.0)
    return bell(seed, recipe.name, "noise", (G, S, E))


def _select_noise(recipe: Recipe, arrays: dict[str, np.ndarray], target: Target, seed: int) -> np.ndarray:
    """Draw what `select.rule` names: a draw for `sample`; for `second_place` the term that rules the first choice out."""
    G, S, E, select = recipe.G, recipe.S, recipe.E, target.dialect.select
    if select.rule == "sample":
        return bell(seed, recipe.name, "select_noise", (G, S, E))
    logits_GSE = arrays["x"].astype(np.float64) @ arrays["w_router"].astype(np.float64)
    first_GSE = np.argmax(logits_GSE, axis=-1)[..., None] == np.arange(E)
    redirected_GS = uniform(seed, recipe.name, "select_noise", (G, S)) < max(select.probability, 0.3)
    return RULED_OUT * (first_GSE & redirected_GS[..., None] & (E > 1))


def _wants_aux(target: Target, train: bool) -> bool:
    """Whether the balance loss exists in this mode."""
    return "aux_loss" in target.features and target.dialect.aux.available and (train or target.dialect.aux.in_eval)


def wanted(case: Case, target: Target) -> list[str]:
    """Return the names of the outputs that will be looked at."""
    names = [name for name in OUTPUTS if name not in ("aux_loss", "z_loss")]
    if _wants_aux(target, case.train):
        names.append("aux_loss")
    if "z_loss" in target.features:
        names.append("z_loss")
    if "dout" in case.arrays:
        names += [f"d{name}" for name in GRADIENTS if name in case.arrays]
    return names


def check_target(target: Target) -> list[str]:
    """Return notes on features that the dialect has no use for.

    Raises
    ------
    InputError
        Where this version cannot judge the dialect, or the dialect needs what the adapter does not accept.
    """
    dialect = target.dialect
    if dialect.select.rule in ("top2_gumbel", "topn_random"):
        raise InputError(
            f"dialect {dialect.name}: select.rule={dialect.select.rule} chooses several experts; this version judges one choice per token"
        )
    if dialect.noise.kind == "z_add_learned_normal":
        raise InputError(f"dialect {dialect.name}: noise.kind={dialect.noise.kind} has parameters of its own, which a case cannot hold")
    if dialect.gate.value == "external":
        raise InputError(f"dialect {dialect.name}: gate.value is a setting of the run; declare it, for example with --dialect and an override")
    activation = ACTIVATIONS[dialect.expert.act]
    allowed = target.limits.get("activation", {}).get("one_of")
    if allowed is not None and activation not in allowed:
        raise InputError(f"dialect {dialect.name} has the activation {activation}, which LIMITS does not allow ({', '.join(allowed)})")
    if "own_capacity" in target.features and "external" in (dialect.capacity.float, dialect.capacity.multiple_of):
        raise InputError(
            f"dialect {dialect.name}: capacity.float or capacity.multiple_of is a setting of the run; declare it to be judged on own_capacity"
        )
    useless = {
        "aux_loss": not dialect.aux.available or dialect.aux.form != "product",
        "noise": dialect.noise.kind == "none" or dialect.noise.when == "never",
        "bias": dialect.expert.bias == "none" and not dialect.router.bias,
        "gated": not dialect.expert.glu,
        "top_k": True,
    }
    for feature, needed in (("bias", not useless["bias"]), ("gated", not useless["gated"])):
        if needed and feature not in target.features:
            raise InputError(f"dialect {dialect.name} needs the feature {feature!r}, which the adapter does not declare")
    notes = [f"feature {name} has no use in dialect {dialect.name}" for name in sorted(target.features) if useless.get(name)]
    unseen = {"ranks": "ranks" in target.features, "batch_invariant": target.profile.batch_invariant}
    return notes + [f"{name} is declared, and this version does not judge it" for name, declared in unseen.items() if declared]


def prepare(target: Target, tier: str, seed: int) -> Iterator[Prepared]:
    """Yield the tier's cases that the target can take."""
    for recipe in recipes_for(tier):
        within = fitted(recipe, target)
        if within is not None:
            yield Prepared(within, make_case(within, target, seed))
