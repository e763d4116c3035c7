# May import: standard library, numpy, scipy, pytest, torch, transformers, refswitch.
"""The first parameters: each class of tensors against its exact distribution, wrong recipes that must be noticed, shards, and the gates that follow.

Statistics have derived bounds, each exceeded with probability 2**-40 or less by draws that are right; seeds are fixed, so a test that passes stays
passed. With n draws and l = log(2 / 2**-40):

    cdf       sup |empirical - exact| <= sqrt(l / 2n)                                       Dvoretzky, Kiefer, Wolfowitz; Massart's constant
    variance  normal: |mean square / sigma**2 - 1| <= 2 sqrt(l / n) + 2 l / n                Laurent and Massart
              bounded by b: |mean square - variance| <= b**2 sqrt(l / 2n)                    Hoeffding
    maximum   P(max |x| < m) = P(|x| < m)**n and P(max |x| > m) <= n P(|x| > m); nothing lies outside a bounded support
    copies    of m aligned pairs of 32-bit words, k or more are equal with probability (m 2**-32)**k / k! at most
    mean      |mean - expectation| <= sqrt(2 V l / n) + 7 range l / 3(n - 1), with the sample's variance V    Maurer and Pontil
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import truncnorm

from refswitch import model_init
from refswitch.config import Recipe
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig, preset
from refswitch.model_init import FLAX_RELEASE, HUGGING_FACE, MESH, MESH_SMALL, RECIPES, InitRecipe, init_recipe, initial_params
from refswitch.reference import initialization
from refswitch.reference.initialization import Fans, Rule, draw, draw_experts, rule_of, standard_of
from refswitch.reference.transformer import ModelParams
from refswitch.spec_data import load_dialect, names_of
from refswitch.tree import leaves

FAILURE = 2.0**-40
LOG = math.log(2.0 / FAILURE)
TRUNCATED = truncnorm(-2.0, 2.0)
SEED = 20210111
V, D, K, H, F, U, E = 330, 60, 14, 5, 110, 48, 7
CONFIG = replace(
    preset("tiny_switch"), name="statistics", vocabulary=V, d_model=D, d_kv=K, heads=H, d_ff=F, encoder_layers=4, decoder_layers=4,
    encoder_sparse=(1, 3), decoder_sparse=(1, 3), experts=E, activation="gelu_tanh", gated=True, tied=False, position_buckets=U, max_distance=128,
)  # fmt: skip
WORDS = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)


class Law(NamedTuple):
    """An exact distribution: normal, truncated at 2 sigma (sigma is that before), uniform within sigma * sqrt(3)."""

    family: str
    sigma: float

    def cdf(self, x: np.ndarray) -> np.ndarray:
        z = x / self.sigma
        if self.family == "normal":
            return ndtr(z)
        return TRUNCATED.cdf(z) if self.family == "truncated" else np.clip(0.5 + z / math.sqrt(12.0), 0.0, 1.0)

    @property
    def support(self) -> float:
        return {"normal": math.inf, "truncated": 2.0 * self.sigma, "uniform": math.sqrt(3.0) * self.sigma}[self.family]

    @property
    def variance(self) -> float:
        return self.sigma**2 * (float(TRUNCATED.var()) if self.family == "truncated" else 1.0)


def complaints(sample: np.ndarray, law: Law) -> set[str]:
    """Return which statistics are outside their bounds."""
    x, n, found = np.sort(sample, axis=None), sample.size, set()
    exact, below = law.cdf(x), np.arange(n) / n
    if max(np.max(exact - below), np.max(below + 1.0 / n - exact)) > math.sqrt(LOG / (2 * n)):
        found.add("cdf")
    square = float(np.mean(x**2))
    if law.family == "normal":
        if abs(square / law.variance - 1.0) > 2.0 * math.sqrt(LOG / n) + 2.0 * LOG / n:
            found.add("variance")
    elif abs(square - law.variance) > law.support**2 * math.sqrt(LOG / (2 * n)):
        found.add("variance")
    largest = float(np.max(np.abs(x)))
    inside = 2.0 * float(law.cdf(np.array(largest))) - 1.0
    log_none_beyond = n * math.log(inside) if inside > 0.0 else -math.inf
    is_too_far = largest > -ndtri(FAILURE / (2 * n)) * law.sigma if law.family == "normal" else largest > law.support
    if log_none_beyond < math.log(FAILURE) or is_too_far:
        found.add("maximum")
    return found


def pooled(params: ModelParams) -> dict[str, np.ndarray]:
    """Return all values of each class of tensors, by the leaf's name, a row for each tensor or expert."""
    rows: dict[str, list[np.ndarray]] = {}
    for path, leaf in leaves(params).items():
        name = path.rpartition(".")[2]
        rows.setdefault(name, []).append(leaf.reshape(len(leaf) if ".experts." in path else 1, -1))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def has_copies(rows: np.ndarray) -> bool:
    """Whether a row has too many values of the row before it."""
    pairs = rows[1:].size
    k = next(k for k in range(1, 99) if (pairs * 2.0**-32) ** k / math.factorial(k) <= FAILURE)
    return int(np.sum(rows[1:] == rows[:-1])) >= k


def all_complaints(params: ModelParams, laws: dict[str, Law]) -> dict[str, set[str]]:
    """Return the complaints of each class of tensors that has any."""
    found = {}
    for name, rows in pooled(params).items():
        if name in laws:
            said = complaints(rows, laws[name]) | ({"copies"} if has_copies(rows) else set())
        else:
            said = set() if np.all(rows == (1.0 if name.startswith("norm_") else 0.0)) else {"constant"}
        if said:
            found[name] = said
    return found


CUT = float(TRUNCATED.std())
BODY = {
    "embedding_VD": Law("normal", 1.0),
    "w_query_DHK": Law("normal", (D * K) ** -0.5),
    "w_key_DHK": Law("normal", D**-0.5),
    "w_value_DHK": Law("normal", D**-0.5),
    "w_out_HKD": Law("normal", (H * K) ** -0.5),
}


def same(law: Callable[[int], Law], *names: str) -> dict[str, Law]:
    """Return the law of matrices whose fan-in is d_model, and of those whose is d_ff."""
    return {name: law(F if name.endswith("FD") else D) for name in names}


DENSE = ("w_in_DF", "w_gate_DF", "w_out_FD")
EXPERTS = ("w_in_EDF", "w_gate_EDF", "w_out_EFD")


def mesh(s: float) -> dict[str, Law]:
    """Return the laws of Mesh TensorFlow at scale s."""
    dense = same(lambda fan: Law("truncated", math.sqrt(s / fan)), *DENSE, *EXPERTS, "w_router_DE", "w_logits_DV")
    return BODY | {"position_UH": Law("uniform", math.sqrt(2.0 / (U + H)))} | dense


LAWS = {
    "mesh": mesh(1.0),
    "mesh_0.1": mesh(0.1),
    "flax_release": {
        **{name: Law("normal", law.sigma * (1.0 if name == "embedding_VD" else math.sqrt(0.1))) for name, law in BODY.items()},
        "position_UH": Law("uniform", math.sqrt(0.1 * 2.0 / (U + H))),
        **same(lambda fan: Law("truncated", math.sqrt(0.1 / fan) / CUT), *DENSE, "w_logits_DV"),
        **same(lambda fan: Law("normal", math.sqrt(0.1 / fan)), *EXPERTS),
        "w_router_DE": Law("normal", 0.02),
    },
    "hf": {
        **BODY,
        **same(lambda fan: Law("normal", fan**-0.5), *DENSE),
        **{name: Law("normal", D**-0.5) for name in (*EXPERTS, "position_UH")},
        **{name: Law("normal", 1.0) for name in ("w_router_DE", "w_logits_DV")},
    },
}
LAWS["dialect"] = LAWS["mesh"] | {name: LAWS["flax_release"][name] for name in (*EXPERTS, "w_router_DE")}  # the tiny preset's dialect is flax's


@pytest.mark.parametrize("name", LAWS)
def test_initial_params__has_the_recipes_distribution(name: str) -> None:
    """Every class of tensors by its table: distribution, variance, maximum, no two tensors alike; gains 1, biases 0; shapes as the template's."""
    params = initial_params(CONFIG, SEED, name)
    found = leaves(params)
    assert {path: leaf.shape for path, leaf in found.items()} == {path: leaf.shape for path, leaf in leaves(model_init.template_of(CONFIG)).items()}
    assert {leaf.dtype for leaf in found.values()} == {np.dtype(np.float64)}
    assert set(LAWS[name]) == {path.rpartition(".")[2] for path in found if path.rpartition(".")[2][:2] not in ("b_", "no")}
    assert all_complaints(params, LAWS[name]) == {}


class Planted(NamedTuple):
    """One wrong way to draw: a recipe, or a change to the code, and the classes of tensors in which it must be noticed."""

    base: InitRecipe
    recipe: InitRecipe
    patch: Callable[[pytest.MonkeyPatch], None]
    noticed: set[str]


def patched_fans(change: Callable[[str, Fans], Fans]) -> Callable[[pytest.MonkeyPatch], None]:
    right = model_init._fans

    def wrong(name: str, shape: tuple[int, ...], config: ModelConfig) -> Fans:
        return change(name, right(name, shape, config))

    return lambda monkeypatch: monkeypatch.setattr(model_init, "_fans", wrong)


def with_rule(base: InitRecipe, *noticed: str, **rules: Rule) -> Planted:
    return Planted(base, replace(base, **rules), lambda _: None, set(noticed))


def with_fans(noticed: tuple[str, ...], change: Callable[[str, Fans], Fans]) -> Planted:
    return Planted(MESH_SMALL, MESH_SMALL, patched_fans(change), set(noticed))


def no_square_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialization, "sigma_of", lambda rule, fans: rule.scale / math.sqrt(fans.into))


def one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_init, "draw", lambda rule, fans, seed, number, index: draw(rule, fans, seed, 0, index))


def expert_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rule: Rule, fans: Fans, seed: int, number: int, experts: range, shape: tuple[int, ...], is_identical: bool) -> np.ndarray:
        return np.concatenate([draw_experts(rule, fans, seed, number, range(1), shape, is_identical) for _ in experts])

    monkeypatch.setattr(model_init, "draw_experts", wrong)


WIDE = Rule("normal", 1.0, "one")
PLANTED = {
    "the experts count in the fan-in": with_fans(EXPERTS, lambda name, fans: fans._replace(into=fans.into * (E if "_E" in name else 1))),
    "fan-out": with_fans((*DENSE, *EXPERTS), lambda _, fans: fans._replace(into=fans.out, out=fans.into)),
    "s for sqrt(s)": Planted(MESH_SMALL, MESH_SMALL, no_square_root, {*DENSE, *EXPERTS, "w_router_DE", "w_logits_DV"}),
    "sigma, not s, reduced by 10": with_rule(MESH_SMALL, *DENSE, dense_in=Rule("truncated", 0.01, "in"), dense_out=Rule("truncated", 0.01, "in")),
    "s not reduced in the router": with_rule(MESH_SMALL, "w_router_DE", router=Rule("truncated", 1.0, "in")),
    "corrected where it is not": with_rule(MESH_SMALL, "w_in_EDF", "w_gate_EDF", expert_in=Rule("truncated_corrected", 0.1, "in")),
    "not corrected where it is": with_rule(FLAX_RELEASE, "w_in_DF", "w_gate_DF", dense_in=Rule("truncated", 0.1, "in")),
    "normal for truncated": with_rule(MESH_SMALL, *DENSE[:2], dense_in=Rule("normal", 0.1 * CUT**2, "in")),
    "truncated for normal": with_rule(FLAX_RELEASE, "w_out_EFD", expert_out=Rule("truncated_corrected", 0.1, "in")),
    "uniform of the same variance": with_rule(MESH_SMALL, *DENSE[:2], dense_in=Rule("uniform", 0.1 * CUT**2, "in")),
    "no head width in the query": with_rule(MESH_SMALL, "w_query_DHK", query=Rule("normal", 1.0, "in")),
    "head width in the key": with_rule(MESH_SMALL, "w_key_DHK", "w_value_DHK", key_value=Rule("normal", 1.0, "in_times_head_width")),
    "the scale governs attention too": with_rule(MESH_SMALL, "w_out_HKD", attention_out=Rule("normal", 0.1, "in")),
    "position table from its fan-in": with_rule(FLAX_RELEASE, "position_UH", position=Rule("uniform", 1.0, "average")),
    "the second matrix of an expert by d_ff": with_rule(HUGGING_FACE, "w_out_EFD", expert_out=Rule("normal", 1.0, "in")),
    "experts without fan-in": with_rule(MESH_SMALL, "w_in_EDF", "w_gate_EDF", expert_in=WIDE),
    "untied logits like an embedding": with_rule(MESH_SMALL, "w_logits_DV", logits=WIDE),
    "identical experts": Planted(MESH_SMALL, replace(MESH_SMALL, experts_identical=True), lambda _: None, set(EXPERTS)),
    "every rank the same experts": Planted(MESH_SMALL, MESH_SMALL, expert_by_expert, set(EXPERTS)),
    "every tensor the same number": Planted(MESH_SMALL, MESH_SMALL, one_number, {"w_query_DHK", "w_in_DF", "w_router_DE", "position_UH"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_statistics__notice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: each wrong recipe is noticed in the tensors that it is wrong in, and in no others."""
    planted = PLANTED[name]
    planted.patch(monkeypatch)
    found = all_complaints(initial_params(CONFIG, SEED, planted.recipe), LAWS[planted.base.name])
    assert planted.noticed <= set(found)
    touched = {
        leaf for leaf, (field, _, _) in model_init.TENSORS.items() if getattr(planted.recipe, field) != getattr(planted.base, field)
    }  # fmt: skip
    assert not touched or set(found) <= touched


def test_initial_params__matches_hugging_face() -> None:
    """What transformers draws has the distributions of `hf`; its experts' second matrix too is by d_model."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(SEED)
    peer = transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            vocab_size=V, d_model=D, d_kv=K, d_ff=F, num_heads=H, num_layers=4, num_decoder_layers=4, num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=2, num_experts=E, relative_attention_num_buckets=U,
        )
    )  # fmt: skip
    classes = {
        ".q.": "w_query_DHK", ".k.": "w_key_DHK", ".v.": "w_value_DHK", ".o.": "w_out_HKD", ".mlp.wi.": "w_in_DF", ".mlp.wo.": "w_out_FD",
        ".router.": "w_router_DE", "relative_attention_bias": "position_UH", "shared": "embedding_VD",
    }  # fmt: skip
    classes |= {f".expert_{e}.{matrix}.": leaf for e in range(E) for matrix, leaf in (("wi", "w_in_EDF"), ("wo", "w_out_EFD"))}
    samples: dict[str, list[np.ndarray]] = {}
    for name, value in peer.named_parameters():
        for part, leaf in classes.items():
            if part in name:
                samples.setdefault(leaf, []).append(value.detach().numpy().astype(np.float64).reshape(-1))
    assert set(samples) == set(classes.values())
    assert {leaf: said for leaf, parts in samples.items() if (said := complaints(np.concatenate(parts), LAWS["hf"][leaf]))} == {}


@pytest.mark.parametrize(
    ("recipe", "law"),
    [
        (Recipe("trunc_fan_in", 0.1), Law("truncated", math.sqrt(0.1 / D))),
        (Recipe("normal_fan_in", 0.1), Law("normal", math.sqrt(0.1 / D))),
        (Recipe("normal", 0.02), Law("normal", 0.02)),
        (Recipe("fan_dim", 1.0), Law("normal", F**-0.5)),
        (Recipe("uniform_fan_in", 1.0), Law("uniform", D**-0.5)),
        (Recipe("torch_linear", 1.0), Law("uniform", (3 * D) ** -0.5)),
    ],
    ids=lambda value: value.kind if isinstance(value, Recipe) else "",
)
@pytest.mark.parametrize("corrected", [False, True])
def test_rule_of__every_kind(recipe: Recipe, law: Law, corrected: bool) -> None:
    """The distribution of each kind of the dialects; the correction is the truncated normal's alone. Here d_model is F."""
    size = 1 << 18
    sample = draw(rule_of(recipe, corrected), Fans(D, V, K, F), SEED, 5, range(size))
    if corrected and recipe.kind == "trunc_fan_in":
        law = law._replace(sigma=law.sigma / CUT)
    assert complaints(sample, law) == set()
    for factor in (CUT, 1.0 / CUT):
        assert "cdf" in complaints(sample, law._replace(sigma=law.sigma * factor))


def test_rule_of__torch_linear_is_torchs() -> None:
    """The default of torch.nn.Linear has this distribution."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(SEED)
    weight = torch.nn.Linear(D, 1 << 12, bias=False).weight.detach().numpy().astype(np.float64)
    up = 1.0 + 2.0**-23  # the bound as float32
    assert complaints(weight, Law("uniform", up * (3 * D) ** -0.5)) == set()


def test_recipes__agree_with_the_dialects() -> None:
    """The sparse layers of each recipe are those of the dialect on record; every record has a recipe."""
    for recipe, dialect in ((MESH, "mesh_tensorflow"), (FLAX_RELEASE, "flax_masked_switch_base"), (HUGGING_FACE, "hf_ge_5_18")):
        found = init_recipe("dialect", replace(CONFIG, dialect=dialect))
        for field in ("router", "expert_in", "expert_out", "experts_identical"):
            assert getattr(found, field) == getattr(recipe, field), (dialect, field)
    for dialect in names_of("dialects"):
        assert init_recipe("dialect", replace(CONFIG, dialect=dialect)).experts_identical == load_dialect(dialect).init.experts_identical


# Addresses


@pytest.mark.parametrize("identical", [False, True])
def test_initial_params__shard_invariant(identical: bool) -> None:
    """Whoever holds experts 2 to 4 has these rows of the whole, and everything else whole."""
    recipe = replace(MESH, experts_identical=identical)
    whole, shard = (leaves(initial_params(CONFIG, SEED, recipe, experts)) for experts in (None, range(2, 5)))
    assert list(whole) == list(shard)
    for path, leaf in whole.items():
        assert np.array_equal(shard[path], leaf[2:5] if ".experts." in path else leaf), path
    assert all(leaves(initial_params(CONFIG, SEED, recipe, range(0)))[path].shape[0] == 0 for path in whole if ".experts." in path)


def test_draw__is_its_slice() -> None:
    """Any range, any order and any shape of positions draws what the whole has there; every part of the address matters."""
    rule, fans = Rule("truncated", 1.0, "in"), Fans(D, F, K, D)
    whole = draw(rule, fans, SEED, 3, range(1000))
    index = np.array([[999, 0], [7, 500]])
    assert np.array_equal(draw(rule, fans, SEED, 3, range(301, 777)), whole[301:777])
    assert np.array_equal(draw(rule, fans, SEED, 3, index), whole[index])
    for seed, number in ((SEED + 1, 3), (SEED, 4)):
        assert not has_copies(np.stack([whole, draw(rule, fans, seed, number, range(1000))]))


def test_standard_of__ends() -> None:
    """The normal is odd to the bit and ends at 32 bits' quantile; truncated and uniform stay inside their supports; all of them increase."""
    normal, truncated, corrected, uniform = (standard_of(WORDS, family) for family in ("normal", "truncated", "truncated_corrected", "uniform"))
    assert np.array_equal(normal, -normal[::-1])
    assert np.array_equal(uniform, -uniform[::-1])
    assert all(np.all(np.diff(values) > 0.0) for values in (normal, truncated, uniform))
    assert abs(truncated).max() < 2.0
    assert abs(uniform).max() < math.sqrt(3.0)
    assert np.array_equal(corrected, truncated / initialization.TRUNCATED_STD)
    assert abs(ndtr(normal[0]) * 2.0**33 - 1.0) < 64 * 40 * np.finfo(np.float64).eps  # a z of 40 roundings moves the tail by z**2 < 64 of them
    assert abs(initialization.TRUNCATED_STD - CUT) < 64 * np.finfo(np.float64).eps  # three exponentials and quotients on either side


# What follows for the gates: logits of an input with root mean square 1 have variance s


N = 32  # experts
GROUPS = 1 << 14
WIDTH = 4


def logits_of(rule: Rule, width: int, experts: int) -> np.ndarray:
    """Return the logits of one token with root mean square 1 under so many independent columns of a router."""
    x_D = np.random.Generator(np.random.PCG64(7)).standard_normal(width)
    w_router_DE = draw(rule, Fans(width, experts, K, width), SEED, 0, range(width * experts)).reshape(width, experts)
    return x_D / math.sqrt(np.mean(x_D**2)) @ w_router_DE


def mean_radius(values: np.ndarray, width: float) -> float:
    """Return how far the mean of independent values of that range may be from its expectation."""
    log = LOG + math.log(2.0)  # two sides
    return math.sqrt(2.0 * values.var(ddof=1) * log / values.size) + 7.0 * width * log / (3.0 * (values.size - 1))


def first_gates(rule: Rule) -> np.ndarray:
    """Return the largest probability of independent routers over 32 experts."""
    logits_GE = logits_of(rule, WIDTH, GROUPS * N).reshape(GROUPS, N)
    exp_GE = np.exp(logits_GE - logits_GE.max(axis=-1, keepdims=True))
    return 1.0 / exp_GE.sum(axis=-1)


def expected_gate(s: float, nodes: int) -> float:
    """Return the expectation of the largest of N probabilities whose logits are independent normals of variance s, by quadrature.

    It is N E[1 / a] where the first logit z is the largest and a = 1 + sum exp(other - z); and 1 / a is the integral of exp(-t a) over t > 0,
    under which the others separate. Beyond 12 standard deviations and t = 40 nothing is left.
    """
    node, share = np.polynomial.legendre.leggauss(nodes)
    t, t_share = 20.0 * (node + 1.0), 20.0 * share * np.exp(-20.0 * (node + 1.0))
    total = 0.0
    for z, z_share in zip(12.0 * node, 12.0 * share, strict=True):
        half = (z + 12.0) / 2.0
        other = half * node + (z - 12.0) / 2.0
        density = half * share * np.exp(-(other**2) / 2.0) / math.sqrt(2.0 * math.pi)
        one_other = density @ np.exp(-np.exp(math.sqrt(s) * (other - z))[:, None] * t)
        total += z_share * math.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi) * float(t_share @ one_other ** (N - 1))
    return N * total


@pytest.mark.parametrize("s", [0.1, 1.0])
def test_gates__at_the_start(s: float) -> None:
    """Logits have variance s, and the mean gate over 32 experts is 0.0578 at s = 0.1 and 0.1645 at 1.0: the smaller scale starts near 1 / N.

    So with weights of variance s / fan-in: a normal, or a truncated normal that is corrected. Planted: without the correction the logits, with
    the other scale the gates differ.
    """
    rule = Rule("normal", s, "in")
    law = Law("normal", math.sqrt(s))
    assert complaints(logits_of(rule, WIDTH, GROUPS * N), law) == set()
    assert complaints(logits_of(Rule("truncated", s, "in"), WIDTH, GROUPS * N), law) != set()
    right, other = expected_gate(s, 100), expected_gate(1.1 - s, 100)
    assert f"{right:.4f}" == {0.1: "0.0578", 1.0: "0.1645"}[s]
    gates = first_gates(rule)
    radius = mean_radius(gates, 1.0 - 1.0 / N) + abs(right - expected_gate(s, 60))
    assert abs(gates.mean() - right) <= radius
    assert abs(gates.mean() - other) > radius


@pytest.mark.parametrize(("recipe", "factor"), [("mesh", CUT**2), ("mesh_0.1", 0.1 * CUT**2)])
def test_logits__variance_without_correction(recipe: str, factor: float) -> None:
    """Mesh TensorFlow's truncated normal gives logits of 0.774 s, thus standard deviations of 0.88 and 0.28: exactly that of one weight by fan-in."""
    width = 16
    squares = logits_of(RECIPES[recipe].router, width, 1 << 16) ** 2
    largest = (2.0 * RECIPES[recipe].router.scale ** 0.5 * math.sqrt(width)) ** 2  # |x|_1 <= width, each weight within 2 sigmas
    assert abs(squares.mean() - factor) <= mean_radius(squares, largest)
    assert abs(squares.mean() - factor / CUT**2) > mean_radius(squares, largest)


# Doors


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: initial_params(CONFIG, SEED, "mesh_0.01"), "unknown recipe 'mesh_0.01' of the first parameters; did you mean mesh_0.1?"),
        (lambda: initial_params(CONFIG, SEED, "zeros"), "known: mesh, mesh_0.1, flax_release, hf, dialect"),
        (lambda: initial_params(CONFIG, -1, "mesh"), "seed is -1, and must be in"),
        (lambda: initial_params(CONFIG, 2**64, "mesh"), "seed is 18446744073709551616"),
        (lambda: initial_params(CONFIG, SEED, "mesh", range(3, 8)), "experts is range(3, 8), and must be consecutive in 0 ... 6"),
        (lambda: initial_params(CONFIG, SEED, "mesh", range(0, 4, 2)), "experts is range(0, 4, 2)"),
    ],
)  # fmt: skip
def test_initial_params__rejects(call: Callable[[], ModelParams], says: str) -> None:
    """One line that names what is wrong and what would be right."""
    with pytest.raises(InputError) as error:
        call()
    assert says in str(error.value)


def test_initial_params__dense_model() -> None:
    """A model without sparse layers needs no experts."""
    params = leaves(initial_params(preset("tiny_dense"), SEED, "mesh_0.1"))
    assert not any("router" in path for path in params)
