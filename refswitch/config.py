# May import: standard library, refswitch.numbers.
"""What is computed and how it is rounded: the dialect and the numerics profile as frozen records.

A `Dialect` is one reading of "a Switch layer": every knob of `spec/dialects`, with no default, because a default would be a
silent choice. A `Profile` is how an implementation rounds. Both are loaded and validated by `refswitch.spec_data`. The knob's dotted
name (`capacity.expr`) is its path here. `rounding_points` joins the two into the format of every rounding point (R1 ... R10).
Spec: decisions, numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from refswitch.numbers.precision import FORMATS, Format

External = Literal["external"]  # a setting of the run, not of the implementation


@dataclass(frozen=True)
class Router:
    """How the logits and probabilities are computed."""

    dtype: Literal["f32", "f64", "input"]
    softmax_dtype: Literal["f32", "logits"]
    prob_round: Literal["none", "input", "logits"]
    bias: bool
    logit_cap: float


@dataclass(frozen=True)
class Noise:
    """What perturbs the router, and what else sees the perturbation."""

    kind: Literal["none", "x_mul_uniform", "x_dropout", "z_add_uniform", "z_add_normal", "z_add_learned_normal", "z_add_gumbel"]
    eps: float | External
    eps_over_E: bool
    when: Literal["train", "always", "never"]
    sample_dtype: Literal["f32", "input"]
    gate_from: Literal["noisy", "clean"]
    leak_to_experts: Literal["never", "if_same_dtype"]


@dataclass(frozen=True)
class Select:
    """How the expert is chosen."""

    rule: Literal["argmax", "sample", "second_place", "ntlb", "top2_gumbel", "topn_random"]
    on: Literal["probs", "logits"]
    tie: Literal["lowest", "unspecified"]
    temperature: float
    probability: float
    choices: int


@dataclass(frozen=True)
class Gate:
    """The factor on the expert, and where it is applied."""

    value: Literal["p", "one", "norm_topk", "ratio_st", "sigmoid", "external"]
    site: Literal["output", "hidden", "input", "input_and_output"]


@dataclass(frozen=True)
class Group:
    """Which tokens compete for one capacity. A case forms its own groups, so this is recorded and not judged."""

    rule: Literal["mesh", "flax", "fixed", "n_groups", "sequence", "batch", "ep_world"]
    size: int | External
    multiple_of: int | External


@dataclass(frozen=True)
class Capacity:
    """Slots of one expert in one group: the literal expression, its float type, and what is done to its value."""

    expr: Literal[
        "floor_SxCF_divE", "rhe_CFxS_divE", "ceil_SdivE_xCF", "ceil_SxCF_divE", "floor_CFx_ceilSdivE",
        "floor_CFx_SdivE", "const", "int_div", "max_count", "inf",
    ]  # fmt: skip
    constant: int
    float: Literal["f64", "f32", "external"]
    cf_train: str
    cf_eval: str
    eval_rule: Literal["factor", "token_fraction"]
    eval_fraction: str
    min: int
    clamp_to_group: bool
    multiple_of: int | External
    slots_lost: Literal[0, 1]
    zero_means_inf: bool


@dataclass(frozen=True)
class Drop:
    """What the layer outputs for a token without a slot."""

    output: Literal["zero", "x_times_gate", "x"]


@dataclass(frozen=True)
class Pad:
    """What happens to padding rows."""

    zero_input: bool | External
    route: Literal["exclude", "include", "expert0_weight0"]
    detect: Literal["mask", "zero_row"]


@dataclass(frozen=True)
class AuxFraction:
    """What the hard fraction f of the balance loss counts."""

    drops: Literal["include", "exclude", "to_expert0"]
    pads: Literal["include", "exclude", "to_expert0"]
    count: Literal["choice", "logits"]


@dataclass(frozen=True)
class Aux:
    """The load-balancing loss."""

    available: bool
    form: Literal["product", "cv_squared"]
    f: AuxFraction
    P_pads: Literal["include", "exclude"]
    denom: Literal["S", "valid", "kept"]
    pad_scale: Literal["none", "nonpad_fraction"]
    scale_E: Literal["E", "none", "inverse_E", "local_E"]
    layers: Literal["sum", "mean", "average_then_product", "external"]
    coef: float | External
    microbatch_div: bool
    in_eval: bool
    dtype: Literal["f32", "compute"]


@dataclass(frozen=True)
class Z:
    """The router z-loss."""

    coef: float | External
    pads: Literal["exclude", "include", "zero_logits"]
    denom: Literal["valid", "S"]
    times_aux_coef: bool
    when: Literal["train", "always"]


@dataclass(frozen=True)
class Expert:
    """The expert feed-forward network."""

    act: Literal["relu", "gelu", "gelu_tanh", "silu"]
    glu: bool
    bias: Literal["none", "per_expert", "shared_out"]
    dropout: float
    dropout_shape: Literal["elementwise", "over_length"]


@dataclass(frozen=True)
class Dtype:
    """Formats of the expert computation and of the combine."""

    compute: Literal["input", "f32"]
    combine_weight: Literal["compute", "f32"]
    combine_out: Literal["compute", "f32"]


@dataclass(frozen=True)
class Recipe:
    """One initialisation: `kind` with its scale or standard deviation."""

    kind: Literal["trunc_fan_in", "normal_fan_in", "normal", "fan_dim", "uniform_fan_in", "torch_linear"]
    scale: float


@dataclass(frozen=True)
class Init:
    """How parameters start. Recorded; one layer's outputs cannot show it."""

    router: Recipe
    expert_in: Recipe
    expert_out: Recipe
    trunc_corrected: bool
    experts_identical: bool


@dataclass(frozen=True)
class ExpertParallel:
    """What changes on several ranks."""

    expert_grad_scale: Literal["true_global_mean", "inverse_ep", "times_partitions", "div_num_experts", "sum", "none"]
    a2a_dtype: Literal["compute", "f32"]


@dataclass(frozen=True)
class Layers:
    """Which feed-forward layers of a stack are sparse, and whether a stack of sparse layers alone still adds its routers' losses."""

    rule: Literal["mod", "all"]
    step: int | External
    offset: int | External
    losses_if_all: bool


@dataclass(frozen=True)
class Dialect:
    """One implementation's answers to everything that the paper leaves open."""

    name: str
    source: str
    mode: Literal["train_and_eval", "inference"]
    hazards: tuple[str, ...]
    router: Router
    noise: Noise
    select: Select
    gate: Gate
    group: Group
    capacity: Capacity
    priority: Literal["position", "gate_desc", "random", "unspecified"]
    slot_order: Literal["positional", "priority"]
    drop: Drop
    pad: Pad
    aux: Aux
    z: Z
    expert: Expert
    dtype: Dtype
    dispatch_grad: Literal["none", "straight_through"]
    init: Init
    ep: ExpertParallel
    layers: Layers


FormatName = Literal["float64", "float32", "tf32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Storage:
    """The format in which each tensor is stored; `gradients` holds for those that are returned and those in between."""

    x: FormatName
    w: FormatName
    z: FormatName
    hidden: FormatName
    expert_out: FormatName
    gate: FormatName
    logits: FormatName
    probs: FormatName
    out: FormatName
    gradients: FormatName


@dataclass(frozen=True)
class Accumulate:
    """How the terms of a product are summed. `exact` means that only the stored result is rounded."""

    format: Literal["exact", "float64", "float32", "float16", "bfloat16"]
    rounding: Literal["nearest", "truncate"]
    order: Literal["any", "blocked", "sequential"]
    block: int


@dataclass(frozen=True)
class Products:
    """The format to which the operands of a product are rounded first; `stored` means that they are used as they are."""

    input: Literal["stored", "tf32", "bfloat16"]
    rounding: Literal["nearest", "truncate"]


@dataclass(frozen=True)
class Functions:
    """Largest error of each elementary function, in units in the last place of the format it is computed in."""

    exp_ulp: float
    log_ulp: float
    erf_ulp: float
    tanh_ulp: float


@dataclass(frozen=True)
class Profile:
    """How an implementation rounds, from which every tolerance is derived."""

    name: str
    storage: Storage
    accumulate: Accumulate
    products: Products
    functions: Functions
    deterministic: bool
    batch_invariant: bool


class RoundingPoints(NamedTuple):
    """The format of each rounding point of one layer under one dialect and profile. Spec: numbers."""

    x: Format  # tokens as they come
    router: Format  # R1: the router's copy of x, after the noise
    logits: Format  # R2
    probs: Format  # R3
    choice: Format  # R4: probabilities as the choice and the gate read them
    gate: Format  # R5
    z: Format  # R6: pre-activation
    hidden: Format  # R7
    expert_out: Format  # R8
    out: Format  # R9
    gradients: Format  # R10
    positions: Format  # in which slots are counted: wide enough in every profile, and too narrow in the naive bfloat16 of 2.4


def narrower(*names: str) -> Format:
    """Return the format with the fewest significant bits."""
    return min((FORMATS[name] for name in names), key=lambda format: format.precision)


def router_format(dialect: Dialect, profile: Profile) -> Format:
    """Return the format of the router's arithmetic: float32 at least, float64 where the profile is, the input's where the dialect says so."""
    if dialect.router.dtype == "input":
        return FORMATS[profile.storage.x]
    if dialect.router.dtype == "f64" or profile.storage.x == "float64":
        return FORMATS["float64"]
    return FORMATS["float32"]


def rounding_points(dialect: Dialect, profile: Profile) -> RoundingPoints:
    """Resolve the dialect's relative formats (`input`, `compute`, `logits`) against the profile's storage. Spec: numbers."""
    storage = profile.storage
    router = router_format(dialect, profile)
    logits = narrower(storage.logits, router.name)
    probs = narrower(storage.probs, logits.name) if dialect.router.softmax_dtype == "logits" else FORMATS[storage.probs]
    choice_rounding = {"none": probs.name, "input": storage.x, "logits": logits.name}[dialect.router.prob_round]
    choice = narrower(probs.name, choice_rounding)
    compute = storage.x if dialect.dtype.compute == "input" else "float32"
    gate = narrower(storage.gate, choice.name, compute) if dialect.dtype.combine_weight == "compute" else narrower(storage.gate, choice.name)
    wide_out = "float64" if storage.out == "float64" else "float32"
    out = FORMATS[wide_out] if dialect.dtype.combine_out == "f32" else FORMATS[storage.out]
    return RoundingPoints(
        x=FORMATS[storage.x],
        router=router,
        logits=logits,
        probs=probs,
        choice=choice,
        gate=gate,
        z=FORMATS[storage.z],
        hidden=FORMATS[storage.hidden],
        expert_out=FORMATS[storage.expert_out],
        out=out,
        gradients=FORMATS[storage.gradients],
        positions=FORMATS["float64"],
    )


class ModelPoints(NamedTuple):
    """The format of each rounding point of the model around its Switch layers. Spec: numbers."""

    activations: Format  # R11: what one operation hands to the next
    statistics: Format  # R12: root mean squares, scores of attention, their softmax before it is handed on
    logits: Format  # R13: what the cross-entropy reads
    gradients: Format  # R14: the gradient of what one operation hands to the next


MODEL_TRUTH = ModelPoints(*[FORMATS["float64"]] * len(ModelPoints._fields))
TRUTH = RoundingPoints(*[FORMATS["float64"]] * len(RoundingPoints._fields))  # no rounding beyond float64 anywhere
