# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""What the properties of routing variants and of ranks share: random layers, and tubes of a router and of experts evaluated densely, token by token.

A tube says what any evaluation in float64 may return (refswitch/verify/tubes.py). Gradients are compared with differences, whose noise is the tube's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refswitch.config import TRUTH, Aux
from refswitch.proof.finite_difference import difference_ratio
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.switch import SwitchParams
from refswitch.spec_data import load_dialect, load_profile, with_knob
from refswitch.verify import tubes
from refswitch.verify.tubes import Tube, add, arithmetic_of, contract, exact, multiply

A64 = arithmetic_of(load_profile("float64"))
MESH = load_dialect("mesh_tensorflow")
TOP_2 = with_knob(with_knob(with_knob(MESH, "aux.f.pads", "exclude"), "aux.P_pads", "exclude"), "aux.pad_scale", "none")
TOP_2 = with_knob(TOP_2, "pad.zero_input", False)  # Mesh TensorFlow's top-2 gate: padding counts in no loss
POINTS = TRUTH
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")  # smooth: differences can be taken
STEP = 2.0**-13


def random_experts(random: np.random.Generator, E: int, D: int, F: int, is_gated: bool) -> ExpertsParams:
    """Draw experts with every bias, so that a forgotten one shows."""
    w_in_EDF, w_gate_EDF, w_out_EFD = random.normal(size=(E, D, F)), random.normal(size=(E, D, F)), random.normal(size=(E, F, D))
    b_in_EF, b_gate_EF, b_out_ED = random.normal(size=(E, F)), random.normal(size=(E, F)), random.normal(size=(E, D))
    return ExpertsParams(w_in_EDF, w_gate_EDF if is_gated else None, w_out_EFD, b_in_EF, b_gate_EF * is_gated, b_out_ED)


def random_layer(random: np.random.Generator, E: int, D: int, F: int, is_gated: bool) -> SwitchParams:
    """Draw a layer's parameters."""
    return SwitchParams(random.normal(size=(D, E)), random.normal(size=E) / 4.0, random_experts(random, E, D, F, is_gated), random.normal(size=D))


def mask_of(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw dropout as a factor: 0 or 2, whose products are exact."""
    return np.where(random.random(shape) < 0.75, 2.0, 0.0)


def logits_tube(x_GSD: np.ndarray, factor_GSD: np.ndarray, w_DE: np.ndarray, plus: list[np.ndarray]) -> Tube:
    """Return (x * factor) w plus further terms."""
    read = multiply(exact(x_GSD), exact(factor_GSD), A64)
    return contract(
        "gsd,de->gse", read, exact(w_DE), A64, w_DE.shape[0], [exact(np.broadcast_to(term, (*x_GSD.shape[:2], w_DE.shape[1]))) for term in plus]
    )


def expert_tube(x_GSD: np.ndarray, mask_GSF: np.ndarray, experts: ExpertsParams, e: int, activation: str) -> Tube:
    """Return what one expert makes of every token."""

    def hidden(w_EDF: np.ndarray, b_EF: np.ndarray) -> Tube:
        bias = exact(np.broadcast_to(b_EF[e], mask_GSF.shape))
        return contract("gsd,df->gsf", exact(x_GSD), exact(w_EDF[e]), A64, x_GSD.shape[-1], [bias])

    linear = hidden(experts.w_in_EDF, experts.b_in_EF)
    if experts.w_gate_EDF is None:
        acted = tubes.activate(linear, activation, A64)
    else:
        acted = multiply(tubes.activate(hidden(experts.w_gate_EDF, experts.b_gate_EF), activation, A64), linear, A64)
    kept = multiply(acted, exact(mask_GSF), A64)
    bias = exact(np.broadcast_to(experts.b_out_ED[e], x_GSD.shape))
    return contract("gsf,fd->gsd", kept, exact(experts.w_out_EFD[e]), A64, mask_GSF.shape[-1], [bias])


def expert_tubes(x_GSD: np.ndarray, mask_GSEF: np.ndarray, experts: ExpertsParams, activation: str) -> Tube:
    """Return what every expert makes of every token, shape (G, S, E, D)."""
    found = [expert_tube(x_GSD, mask_GSEF[:, :, e], experts, e, activation) for e in range(mask_GSEF.shape[2])]
    return Tube(np.stack([tube.value for tube in found], axis=2), np.stack([tube.radius for tube in found], axis=2))


def weighted(weight_GSE: Tube, expert_out_GSED: Tube, bias_D: np.ndarray) -> Tube:
    """Return the sum over experts of weight * output, plus a bias; a weight of exactly 0 is an expert that is not asked."""
    asked = (np.abs(weight_GSE.value) + weight_GSE.radius > 0.0)[..., None]
    terms = multiply(weight_GSE.at((..., None)), tubes.where(asked, expert_out_GSED, exact(np.zeros_like(expert_out_GSED.value))), A64)
    summed = tubes.total(terms, 2, A64, expert_out_GSED.value.shape[2])
    return add(summed, exact(np.broadcast_to(bias_D, summed.value.shape)), A64)


def assert_within(got: Any, tube: Tube, name: str) -> None:
    """Assert shape and that every element lies in its tube."""
    assert np.shape(got) == np.shape(tube.value), f"{name} has shape {np.shape(got)}, should be {np.shape(tube.value)}"
    worst = np.max(tubes.ratio(got, tube), initial=0.0)
    assert worst <= 1.0, f"{name} is off by {worst:.3g} radii"


def valid_mask(random: np.random.Generator, pads: str, G: int, S: int) -> np.ndarray:
    """Draw which tokens are real."""
    return {"none": np.ones((G, S), bool), "scattered": random.random((G, S)) < 0.75, "all": np.zeros((G, S), bool)}[pads]


def arguments_of(x_GSD: np.ndarray, params: SwitchParams) -> dict[str, np.ndarray]:
    """Return a layer's differentiable arguments, or their gradients, by name."""
    experts = {name: value for name, value in params.experts._asdict().items() if value is not None}
    if params.experts.w_gate_EDF is None:
        del experts["b_gate_EF"]
    return {"x_GSD": x_GSD, "w_router_DE": params.w_router_DE, "b_router_E": params.b_router_E, "b_shared_D": params.b_shared_D} | experts


def layer_of(arguments: dict[str, np.ndarray], params: SwitchParams) -> tuple[np.ndarray, SwitchParams]:
    """Return the tokens and the parameters of named arguments; what is not named is that of `params`."""
    experts = params.experts._replace(**{name: value for name, value in arguments.items() if name in params.experts._fields})
    rest = {name: value for name, value in arguments.items() if name in params._fields}
    return arguments["x_GSD"], params._replace(experts=experts, **rest)


def assert_gradients(
    value: Callable[[dict[str, np.ndarray]], tuple[float, Any]],
    arguments: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    noise: float,
    random: np.random.Generator,
) -> int:
    """Assert that along a direction of each argument the gradient is the slope of a central difference, where no point lies on another piece.

    `value` returns with its number what tells the pieces apart. Returns how many directions were compared.
    """
    assert set(gradients) == set(arguments)
    compared = 0
    for name, here in arguments.items():
        assert np.shape(gradients[name]) == here.shape, name
        direction = random.normal(size=here.shape)

        def along(t: float, name: str = name, here: np.ndarray = here, direction: np.ndarray = direction) -> tuple[float, Any]:
            return value({**arguments, name: here + t * direction})

        found = difference_ratio(along, float(np.sum(gradients[name] * direction)), STEP, noise, np.array_equal)
        assert found.ok or found.refused, f"the slope along {name} is off by {found.ratio:.3g} radii"
        compared += found.ok
    return compared


def aux_of(seed: int, treatments: int = 3) -> Aux:
    """Return one of some treatments of padding and denominators.

    Padding in no sum; in both sums, times each group's share of real tokens (Mesh TensorFlow's); in no sum, and over the tokens that were kept.
    """
    return (TOP_2, MESH, with_knob(TOP_2, "aux.denom", "kept"))[seed % treatments].aux


def balance_tubes(probs_GSE: Tube, chosen_GSE: np.ndarray, valid_GS: np.ndarray, kept_GS: np.ndarray, aux: Aux) -> Tube:
    """Return the mean over groups of E sum_e f_e P_e, with one of the treatments of padding and denominators."""
    G, S, E = probs_GSE.value.shape
    read_GS = valid_GS if aux.P_pads == "exclude" else np.ones_like(valid_GS)
    count_GE, scale_G1 = (chosen_GSE * read_GS[..., None]).sum(axis=1), np.ones((G, 1))
    if aux.pad_scale == "nonpad_fraction":
        scale_G1 = valid_GS.sum(axis=1, keepdims=True) / max(S, 1)
    rows_G1 = kept_GS.sum(axis=1, keepdims=True) if aux.denom == "kept" else np.full((G, 1), S)
    factor_G1 = np.where(rows_G1 > 0, scale_G1 * E / (np.maximum(rows_G1, 1) ** 2 * G), 0.0)
    shown = tubes.where(np.broadcast_to(read_GS[..., None], probs_GSE.value.shape), probs_GSE, exact(np.zeros(probs_GSE.value.shape)))
    P_GE = tubes.total(shown, 1, A64, S)
    return tubes.total(tubes.scale(multiply(P_GE, exact(count_GE), A64), factor_G1, A64), (0, 1), A64, G * E)


def z_tube(logits_GSE: Tube, valid_GS: np.ndarray) -> Tube:
    """Return the mean over valid tokens of the squared log-sum-exp."""
    lse_GS = tubes.log_sum_exp(logits_GSE, A64)
    squares_GS = tubes.where(valid_GS, multiply(lse_GS, lse_GS, A64), exact(np.zeros(valid_GS.shape)))
    return tubes.scale(tubes.total(squares_GS, (0, 1), A64, valid_GS.size), 1.0 / max(valid_GS.sum(), 1), A64)
