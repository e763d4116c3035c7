# May import: standard library, numpy, refswitch.model_setup, refswitch.checkpoints, refswitch.reference, refswitch.records, and what lies below.
"""A model's first parameters: drawn by a named recipe, taken from a teacher, or grown from a dense model.

The paper does not say which tensors its smaller scale is for. `RECIPES` has both readings: Mesh TensorFlow's, where the scale governs the dense
layers and neither attention nor embedding (`mesh` with the scale 1.0 of table 3's baseline, `mesh_0.1` with the paper's), and that of the released
flaxformer models, where it governs everything but the embedding and the router (`flax_release`). `hf` is how transformers starts; `dialect` is
`mesh` with the router and the experts as the dialect's record of `init` says. Norm gains start at 1 and biases at 0 under all of them.
Paper: 2.4, 4.2, tables 3 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from refswitch.checkpoints.template import template_of
from refswitch.errors import InputError
from refswitch.model_config import ModelConfig
from refswitch.model_setup import dialect_of
from refswitch.records import nearest
from refswitch.reference.initialization import Fans, Rule, draw, draw_experts, rule_of
from refswitch.reference.switch import SwitchParams
from refswitch.reference.transformer import ModelParams
from refswitch.tree import leaves, with_leaves


@dataclass(frozen=True)
class InitRecipe:
    """One rule for each class of tensors; `dense_in` and `expert_in` are the gates' too."""

    name: str
    embedding: Rule
    query: Rule
    key_value: Rule
    attention_out: Rule
    position: Rule
    dense_in: Rule
    dense_out: Rule
    router: Rule
    expert_in: Rule
    expert_out: Rule
    logits: Rule
    experts_identical: bool


def _mesh(name: str, scale: float) -> InitRecipe:
    dense = Rule("truncated", scale, "in")
    return InitRecipe(
        name=name,
        embedding=Rule("normal", 1.0, "one"),
        query=Rule("normal", 1.0, "in_times_head_width"),  # attention's 1 / sqrt(K) is here
        key_value=Rule("normal", 1.0, "in"),
        attention_out=Rule("normal", 1.0, "in"),
        position=Rule("uniform", 1.0, "average"),  # Glorot
        dense_in=dense,
        dense_out=dense,
        router=dense,
        expert_in=dense,
        expert_out=dense,
        logits=dense,
        experts_identical=False,
    )


MESH = _mesh("mesh", 1.0)  # the baseline of table 3
MESH_SMALL = _mesh("mesh_0.1", 0.1)
FLAX_RELEASE = InitRecipe(
    name="flax_release",
    embedding=Rule("normal", 1.0, "one"),
    query=Rule("normal", 0.1, "in_times_head_width"),
    key_value=Rule("normal", 0.1, "in"),
    attention_out=Rule("normal", 0.1, "in"),
    position=Rule("uniform", 0.1, "average"),
    dense_in=Rule("truncated_corrected", 0.1, "in"),
    dense_out=Rule("truncated_corrected", 0.1, "in"),
    router=Rule("normal", 0.02**2, "one"),  # customized: the paper has sqrt(s / fan-in)
    expert_in=Rule("normal", 0.1, "in"),  # customized: not truncated
    expert_out=Rule("normal", 0.1, "in"),  # customized: not truncated
    logits=Rule("truncated_corrected", 0.1, "in"),
    experts_identical=False,
)
HUGGING_FACE = InitRecipe(  # customized: nothing is truncated, the router has sigma 1, an expert's second matrix the fan-in of its first
    name="hf",
    embedding=Rule("normal", 1.0, "one"),
    query=Rule("normal", 1.0, "in_times_head_width"),
    key_value=Rule("normal", 1.0, "in"),
    attention_out=Rule("normal", 1.0, "in"),
    position=Rule("normal", 1.0, "model_width"),
    dense_in=Rule("normal", 1.0, "in"),
    dense_out=Rule("normal", 1.0, "in"),
    router=Rule("normal", 1.0, "one"),
    expert_in=Rule("normal", 1.0, "model_width"),
    expert_out=Rule("normal", 1.0, "model_width"),
    logits=Rule("normal", 1.0, "one"),
    experts_identical=False,
)
RECIPES = {recipe.name: recipe for recipe in (MESH, MESH_SMALL, FLAX_RELEASE, HUGGING_FACE)}
FROM_DIALECT = "dialect"

TENSORS = {  # a leaf's class, the axes of its fan-in and of its fan-out
    "embedding_VD": ("embedding", "V", "D"),
    "w_logits_DV": ("logits", "D", "V"),
    "position_UH": ("position", "U", "H"),
    "w_query_DHK": ("query", "D", "HK"),
    "w_key_DHK": ("key_value", "D", "HK"),
    "w_value_DHK": ("key_value", "D", "HK"),
    "w_out_HKD": ("attention_out", "HK", "D"),
    "w_in_DF": ("dense_in", "D", "F"),
    "w_gate_DF": ("dense_in", "D", "F"),
    "w_out_FD": ("dense_out", "F", "D"),
    "w_router_DE": ("router", "D", "E"),
    "w_in_EDF": ("expert_in", "D", "F"),
    "w_gate_EDF": ("expert_in", "D", "F"),
    "w_out_EFD": ("expert_out", "F", "D"),
}


def init_recipe(name: str, config: ModelConfig) -> InitRecipe:
    """Return the named recipe, of which `dialect` reads the record of the model's sparse layers.

    Raises
    ------
    InputError
        For an unknown name, with the nearest known one.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name != FROM_DIALECT:
        raise InputError(f"unknown recipe {name!r} of the first parameters{nearest(name, (*RECIPES, FROM_DIALECT))}")
    init = dialect_of(config).init
    router, expert_in, expert_out = (rule_of(recipe, init.trunc_corrected) for recipe in (init.router, init.expert_in, init.expert_out))
    return replace(
        MESH, name=f"{name} {config.dialect}", router=router, expert_in=expert_in, expert_out=expert_out, experts_identical=init.experts_identical
    )


def _fans(name: str, shape: tuple[int, ...], config: ModelConfig) -> Fans:
    """Return the fans of a leaf by its letters; `E` is in none of an expert's."""
    _, into, out = TENSORS[name]
    sizes = dict(zip(name.rpartition("_")[2], shape, strict=True))
    return Fans(math.prod(sizes[axis] for axis in into), math.prod(sizes[axis] for axis in out), config.d_kv, config.d_model)


def _first_values(path: str, number: int, shape: tuple[int, ...], config: ModelConfig, seed: int, recipe: InitRecipe, experts: range) -> np.ndarray:
    name = path.rpartition(".")[2]
    is_experts = ".experts." in path
    if name not in TENSORS:
        return np.full((len(experts), *shape[1:]) if is_experts else shape, 1.0 if name.startswith("norm_") else 0.0)
    rule, fans = getattr(recipe, TENSORS[name][0]), _fans(name, shape, config)
    if is_experts:
        return draw_experts(rule, fans, seed, number, experts, shape[1:], recipe.experts_identical)
    return draw(rule, fans, seed, number, range(math.prod(shape))).reshape(shape)


def initial_params(config: ModelConfig, seed: int, recipe: str | InitRecipe, experts: range | None = None) -> ModelParams:
    """Draw a model's first parameters, in float64.

    Paper: 2.4. A tensor's number, which with the seed is its address, is its place among all leaves of the tree.

    Parameters
    ----------
    config : ModelConfig
        The model.
    seed : int, [0, 2**64)
        The run's seed.
    recipe : str or InitRecipe
        A name of `RECIPES`, `dialect`, or a recipe itself.
    experts : range, optional
        The experts that this rank holds, in steps of 1; all of them unless given. Everything else, the router too, is whole on every rank.

    Returns
    -------
    ModelParams
        The parameters; a rank's experts are those rows of the whole.

    Raises
    ------
    InputError
        For an unknown recipe or dialect, a seed that is out of range, or experts that the model does not have.
    """
    held = range(config.experts) if experts is None else experts
    if held.step != 1 or not 0 <= held.start <= held.stop <= config.experts:
        raise InputError(f"initial_params: experts is {held}, and must be consecutive in 0 ... {config.experts - 1}")
    if not 0 <= seed < 2**64:
        raise InputError(f"initial_params: seed is {seed}, and must be in [0, 2**64)")
    chosen = init_recipe(recipe, config) if isinstance(recipe, str) else recipe
    template = template_of(config)
    shapes = {path: leaf.shape for path, leaf in leaves(template).items()}
    values = {path: _first_values(path, number, shape, config, seed, chosen, held) for number, (path, shape) in enumerate(shapes.items())}
    return with_leaves(template, values)


def _sparse_positions(params: ModelParams) -> tuple[str, ...]:
    """Return the path of every Switch layer, with the dot behind it."""
    return tuple(
        f"{stack}.blocks.{i}.feed_forward.feed_forward."
        for stack in ("encoder", "decoder")
        for i, block in enumerate(getattr(params, stack).blocks)
        if isinstance(block.feed_forward.feed_forward, SwitchParams)
    )


def _overlaid(caller: str, fresh: ModelParams, given: Mapping[str, np.ndarray], stays: set[str]) -> ModelParams:
    """Return `fresh` with the given leaves in place of its own; what is not given must be in `stays`."""
    own = leaves(fresh)
    for path in given:
        if path not in own:
            raise InputError(f"{caller}: the new model has no {path}")
        if given[path].shape != own[path].shape:
            raise InputError(f"{caller}: {path} has shape {given[path].shape}, but should be {own[path].shape}, the new model's")
    for path in own:
        if path not in given and path not in stays:
            raise InputError(f"{caller}: nothing is given for {path}")
    return with_leaves(fresh, {**own, **given})


def student_from_teacher(teacher: ModelParams, fresh: ModelParams) -> ModelParams:
    """Return the student that starts with its teacher's weights outside the experts; where the teacher is sparse, its layers are `fresh`'s.

    Paper: 4.2, table 6. Embedding, attention, position tables, dense layers and all norms, those before a sparse layer too, are the teacher's.

    Raises
    ------
    InputError
        Where the two models differ outside the sparse layers, naming the path.
    """
    sparse = _sparse_positions(teacher)
    given = {path: leaf for path, leaf in leaves(teacher).items() if not path.startswith(sparse)}
    stays = {path for path in leaves(fresh) if path.startswith(sparse)}
    return _overlaid("student_from_teacher", fresh, given, stays)


def sparse_from_dense(dense: ModelParams, fresh: ModelParams) -> ModelParams:
    """Return the sparse model whose experts are copies of the dense layers, and everything else the dense model's; its routers are `fresh`'s.

    Source: Komatsuzaki et al., sparse upcycling (2023); not in the paper. The experts' biases, which the dense layer has not, are zero.

    Raises
    ------
    InputError
        Where the dense model has a sparse layer, or the two differ elsewhere, naming the path.
    """
    if too_early := _sparse_positions(dense):
        raise InputError(f"sparse_from_dense: {too_early[0].removesuffix('.')} of the dense model is sparse")
    sparse = _sparse_positions(fresh)
    own = leaves(fresh)
    of_expert = {"w_in_DF": "experts.w_in_EDF", "w_gate_DF": "experts.w_gate_EDF", "w_out_FD": "experts.w_out_EFD"}
    given: dict[str, np.ndarray] = {}
    for path, leaf in leaves(dense).items():
        layer, _, name = path.rpartition(".")
        if not path.startswith(sparse):
            given[path] = leaf
        else:
            E = own[f"{layer}.w_router_DE"].shape[1]
            given[f"{layer}.{of_expert[name]}"] = np.repeat(leaf[None], E, axis=0)
    routers = {path for path in own if path.endswith((".w_router_DE", ".b_router_E"))}
    for path in own:
        if path.startswith(sparse) and path.rpartition(".")[2].startswith("b_") and path not in routers:
            given[path] = np.zeros_like(own[path])
    return _overlaid("sparse_from_dense", fresh, given, routers)
