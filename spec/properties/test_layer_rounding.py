# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""Each rounding point of the layer by itself: what is stored there is the unrounded value, rounded once, and nothing else is: S-ROUTE-1 to S-PREC-1.

One point at a time is narrow and all others are float64, so that a point that is missing, or stands in another's place, shows to the bit. What no
dialect's own settings show is held to its slope: the experts' factor and the scale of their bias, in every slot.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.drawn import Plan, Scene, assert_equal, assert_slopes, noise_of, plans
from properties.harness import clause, draws, needs
from properties.operations import Operations
from refswitch.config import TRUTH, Dialect, RoundingPoints
from refswitch.numbers.precision import FORMATS, round_to
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.switch import Statics, SwitchInputs, SwitchOutputs, SwitchParams
from refswitch.spec_data import load_dialect
from refswitch.verify import tubes
from refswitch.verify.tubes import Arithmetic, Tube, exact

MESH = load_dialect("mesh_tensorflow")
GATED = load_dialect({"base": "mesh_tensorflow", "expert.glu": True, "expert.bias": "per_expert", "router.bias": True})
NARROW = FORMATS["bfloat16"]


class Call(NamedTuple):
    """A layer's arguments but for its rounding points."""

    inputs: SwitchInputs
    params: SwitchParams
    dialect: Dialect

    def outputs(self, operations: Operations, points: RoundingPoints = TRUTH) -> SwitchOutputs:
        """Return what the layer computes."""
        return operations.switch_forward(self.inputs, self.params, Statics(self.dialect, points, "relu", 4))[0]

    def gradients(self, operations: Operations, points: RoundingPoints = TRUTH) -> dict[str, np.ndarray]:
        """Return every gradient of the layer."""
        statics = Statics(self.dialect, points, "relu", 4)
        _, saved = operations.switch_forward(self.inputs, self.params, statics)
        dx_GSD, dparams = operations.switch_backward(np.cos(self.inputs.x_GSD), 0.5, 0.25, saved, self.params, statics)
        experts = {name: array for name, array in dparams.experts._asdict().items() if array is not None}
        return {
            "dx_GSD": dx_GSD,
            "dw_router_DE": dparams.w_router_DE,
            "db_router_E": dparams.b_router_E,
            "db_shared_D": dparams.b_shared_D,
            **experts,
        }


def call_of(operations: Operations, plan: Plan, dialect: Dialect) -> Call:
    """Return a layer whose experts overflow, with normal numbers everywhere."""
    scene = Scene(operations, plan)
    ones = {letters: scene.ones(letters) for letters in ("GSD", "GS", "GSF")}
    inputs = SwitchInputs(
        x_GSD=scene.normal("GSD"),
        valid_GS=ones["GS"] > 0,
        noise_factor_GSD=1.0 + scene.normal("GSD", 2.0**-6),
        noise_term_GSE=np.zeros(scene.shape("GSE")),
        select_noise_GSE=np.zeros(scene.shape("GSE")),
        priority_GS=np.broadcast_to(np.arange(plan.sizes["S"]), scene.shape("GS")),
        hidden_mask_GSF=ones["GSF"],
    )
    w_gate_EDF = scene.normal("EDF") if dialect.expert.glu else None
    b_EF, b_gate_EF, b_ED = scene.normal("EF"), scene.normal("EF"), scene.normal("ED")
    experts = ExpertsParams(scene.normal("EDF"), w_gate_EDF, scene.normal("EFD"), b_EF, b_gate_EF, b_ED)
    return Call(inputs, SwitchParams(scene.normal("DE"), scene.normal("E"), experts, scene.normal("D")), dialect)


def narrow_at(*names: str) -> RoundingPoints:
    """Return rounding points of which these are narrow."""
    return TRUTH._replace(**dict.fromkeys(names, NARROW))


LAYERS = {"plan": plans("GSDEF", points=0, S=st.sampled_from((9, 11))), "dialect": st.sampled_from((MESH, GATED))}
STORED = (
    ("logits", ("logits_GSE",)), ("probs", ("probs_GSE",)), ("gate", ("gate_GS",)), ("choice", ("gate_GS",)), ("hidden", ("hidden_GSF",)),
    ("expert_out", ("expert_out_GSD",)), ("out", ("out_GSD",)),
)  # fmt: skip


@clause("S-ROUTE-1", "S-ROUTE-2", "S-GATE-1", "S-EXPERT-1", "S-EXPERT-2", "S-COMBINE-1", "S-PREC-1")
@needs(wide=True)
@draws(**LAYERS)
def test_switch_forward__rounds_at_each_point_once(operations: Operations, plan: Plan, dialect: Dialect) -> None:
    """With one point narrow, what is stored there is the wide value rounded, to the bit; what comes before it is unchanged."""
    call = call_of(operations, plan, dialect)
    wide = call.outputs(operations)
    order = ("logits_GSE", "probs_GSE", "gate_GS", "hidden_GSF", "expert_out_GSD", "out_GSD")
    for point, stored in STORED:
        found = call.outputs(operations, narrow_at(point))
        if (found.route.expert_GS == wide.route.expert_GS).all():
            for name in stored:
                assert_equal(getattr(found, name), round_to(getattr(wide, name), NARROW), f"{name} with narrow {point}")
        for name in order[: order.index(stored[0])]:
            if point not in ("hidden", "expert_out", "out") or name in order[:3] or (found.route.kept_GS == wide.route.kept_GS).all():
                assert_equal(getattr(found, name), getattr(wide, name), f"{name} before {point}")


@clause("S-NOISE-1", "S-ROUTE-1", "S-PREC-1")
@needs(wide=True)
@draws(**LAYERS)
def test_switch_forward__router_reads_a_rounded_copy(operations: Operations, plan: Plan, dialect: Dialect) -> None:
    """R1: the router reads the product with the noise, rounded once; the experts read the token as it is."""
    call = call_of(operations, plan, dialect)
    found = call.outputs(operations, narrow_at("router"))
    copy_GSD = round_to(call.inputs.x_GSD * call.inputs.noise_factor_GSD, NARROW)
    quiet = call._replace(inputs=call.inputs._replace(x_GSD=copy_GSD, noise_factor_GSD=np.ones_like(copy_GSD)))
    assert_equal(found.logits_GSE, quiet.outputs(operations).logits_GSE, "logits_GSE")
    wide = call.outputs(operations)
    same_GS = (found.route.expert_GS == wide.route.expert_GS) & found.route.kept_GS & wide.route.kept_GS
    assert_equal(found.expert_out_GSD[same_GS], wide.expert_out_GSD[same_GS], "expert_out_GSD")


@clause("S-NOISE-2")
@needs(wide=True)
@draws(plan=plans("GSDEF", points=0, S=st.sampled_from((9, 11))))
def test_switch_forward__leaks_where_no_copy_is_made(operations: Operations, plan: Plan) -> None:
    """In a dialect that leaks, the experts read the noise where the router's format is that of the tokens, and nowhere else."""
    leaky = dataclasses.replace(MESH, noise=dataclasses.replace(MESH.noise, leak_to_experts="if_same_dtype"))
    call = call_of(operations, plan, leaky)
    copy_GSD = call.inputs.x_GSD * call.inputs.noise_factor_GSD
    noised = call._replace(inputs=call.inputs._replace(x_GSD=copy_GSD, noise_factor_GSD=np.ones_like(copy_GSD)))
    clean = call._replace(dialect=MESH)
    for points, other in ((TRUTH, noised), (narrow_at("x"), clean), (narrow_at("router"), clean)):
        assert_equal(call.outputs(operations, points).expert_out_GSD, other.outputs(operations, points).expert_out_GSD, "expert_out_GSD")


@clause("S-ROUTE-3", "S-GATE-1", "S-PREC-1")
@needs("a choice that rounding changes", wide=True)
@draws(**LAYERS)
def test_switch_forward__chooses_on_rounded_probabilities(operations: Operations, plan: Plan, dialect: Dialect) -> None:
    """R4: where probabilities are rounded for the choice, equal rounded ones go to the lowest index, and the gate is the rounded one."""
    call = call_of(operations, plan, dialect)
    call = call._replace(params=call.params._replace(w_router_DE=2.0**-9 * call.params.w_router_DE, b_router_E=2.0**-9 * call.params.b_router_E))
    wide, found = call.outputs(operations), call.outputs(operations, narrow_at("choice"))
    read_GSE = round_to(wide.probs_GSE, NARROW)
    operations.meets("a choice that rounding changes", (np.argmax(read_GSE, axis=-1) != np.argmax(wide.probs_GSE, axis=-1)).any())
    assert_equal(found.route.expert_GS, np.argmax(read_GSE, axis=-1), "expert_GS")
    assert_equal(found.gate_GS, read_GSE.max(axis=-1), "gate_GS")
    on_logits = call._replace(dialect=dataclasses.replace(dialect, select=dataclasses.replace(dialect.select, on="logits")))
    found = on_logits.outputs(operations, narrow_at("choice"))
    assert_equal(found.route.expert_GS, np.argmax(found.logits_GSE, axis=-1), "expert_GS, chosen on logits")


@clause("S-NOISE-1")
@draws(plan=plans("GSDEF", points=0))
def test_noise_terms__by_rule(operations: Operations, plan: Plan) -> None:
    """The noise is read by the gate, or by the choice alone; what rules an expert out is read by both, what draws one by the choice, times a half."""
    inputs = call_of(operations, plan, MESH).inputs
    noise, draw = np.cos(np.arange(inputs.noise_term_GSE.size)).reshape(inputs.noise_term_GSE.shape), inputs.noise_term_GSE + 3.0
    inputs, none = inputs._replace(noise_term_GSE=noise, select_noise_GSE=draw), np.zeros_like(noise)
    for rule, added_to_gate, added_to_choice in (("argmax", none, none), ("second_place", draw, none), ("sample", none, 0.5 * draw)):
        for gate_from, read, chosen in (("noisy", noise, none), ("clean", none, noise)):
            select = dataclasses.replace(MESH.select, rule=rule, temperature=0.5)
            dialect = dataclasses.replace(MESH, select=select, noise=dataclasses.replace(MESH.noise, gate_from=gate_from))
            of_gate_GSE, of_choice_GSE = operations.noise_terms(inputs, dialect)
            assert_equal(of_gate_GSE, read + added_to_gate, f"{rule}, {gate_from}: for the gate")
            assert_equal(of_choice_GSE, chosen + added_to_choice, f"{rule}, {gate_from}: for the choice")


@clause("S-ROUTE-3")
@draws(plan=plans("GSE", points=0))
def test_scores_of__by_rule(operations: Operations, plan: Plan) -> None:
    """A choice that is drawn, or whose noise the gate does not read, is made on logits plus its term; any other on what the dialect names."""
    scene = Scene(operations, plan)
    probs_GSE, logits_GSE, term_GSE = scene.normal("GSE"), scene.normal("GSE"), scene.normal("GSE")
    for rule in ("argmax", "second_place", "sample"):
        for gate_from in ("noisy", "clean"):
            for on, named in (("probs", round_to(probs_GSE, NARROW)), ("logits", logits_GSE)):
                select = dataclasses.replace(MESH.select, rule=rule, on=on)
                dialect = dataclasses.replace(MESH, select=select, noise=dataclasses.replace(MESH.noise, gate_from=gate_from))
                found = operations.scores_of(probs_GSE, logits_GSE, term_GSE, Statics(dialect, narrow_at("choice"), "relu", 1))
                assert_equal(found, logits_GSE + term_GSE if rule == "sample" or gate_from == "clean" else named, f"{rule}, {gate_from}, {on}")


@clause("S-EXPERT-1", "S-PREC-1")
@needs(wide=True)
@draws(**LAYERS)
def test_switch_forward__rounds_each_pre_activation(operations: Operations, plan: Plan, dialect: Dialect) -> None:
    """R6: the hidden activation is that of rounded pre-activations, both of them where it is gated; ReLU of z and of -z tell each of them."""
    call = call_of(operations, plan, dialect)
    ungated = dataclasses.replace(dialect, expert=dataclasses.replace(dialect.expert, glu=False))
    experts = call.params.experts

    def pre_activation(w_EDF: np.ndarray, b_EF: np.ndarray) -> np.ndarray:
        parts = [
            call._replace(
                dialect=ungated, params=call.params._replace(experts=experts._replace(w_in_EDF=sign * w_EDF, b_in_EF=sign * b_EF, w_gate_EDF=None))
            )
            for sign in (1.0, -1.0)
        ]
        up_GSF, down_GSF = (part.outputs(operations).hidden_GSF for part in parts)
        return round_to(up_GSF - down_GSF, NARROW)

    hidden_GSF = np.maximum(pre_activation(experts.w_in_EDF, experts.b_in_EF), 0.0)
    if experts.w_gate_EDF is not None:
        linear_GSF = pre_activation(experts.w_in_EDF, experts.b_in_EF)
        hidden_GSF = np.maximum(pre_activation(experts.w_gate_EDF, experts.b_gate_EF), 0.0) * linear_GSF
    assert_equal(call.outputs(operations, narrow_at("z")).hidden_GSF, hidden_GSF, "hidden_GSF")


@clause("S-AUX-1", "S-PREC-1")
@needs(wide=True)
@draws(**LAYERS)
def test_switch_forward__rounds_the_loss_that_is_computed_narrowly(operations: Operations, plan: Plan, dialect: Dialect) -> None:
    """The balance loss is rounded to the tokens' format where the dialect computes it there, and nowhere else."""
    for dtype in ("f32", "compute"):
        call = call_of(operations, plan, dataclasses.replace(dialect, aux=dataclasses.replace(dialect.aux, dtype=dtype)))
        wide, found = call.outputs(operations), call.outputs(operations, narrow_at("x"))
        assert_equal(found.aux_loss, round_to(wide.aux_loss, NARROW) if dtype == "compute" else wide.aux_loss, "aux_loss")
        assert_equal(found.z_loss, wide.z_loss, "z_loss")


@clause("S-BACK-1", "S-BACK-2", "S-BACK-3", "S-BACK-4", "S-PREC-1")
@needs(wide=True)
@draws(**LAYERS)
def test_switch_backward__rounds_every_gradient(operations: Operations, plan: Plan, dialect: Dialect) -> None:
    """R10: every gradient that is returned is the wide one rounded; that of what an expert does not have is 0."""
    call = call_of(operations, plan, dialect)
    wide, found = call.gradients(operations), call.gradients(operations, narrow_at("gradients"))
    for name, array in wide.items():
        assert_equal(found[name], round_to(array, NARROW), name)
    if not dialect.expert.glu:
        assert_equal(wide["b_gate_EF"], np.zeros_like(wide["b_gate_EF"]), "db_gate_EF")


def out_tube(slots: dict[str, np.ndarray], params: ExpertsParams, activation: str, arithmetic: Arithmetic) -> Tube:
    """Return the experts' output with what float64 may have rounded."""

    def branch(w_EDF: np.ndarray, b_EF: np.ndarray) -> Tube:
        return tubes.contract("gecd,edf->gecf", exact(slots["packed"]), exact(w_EDF), arithmetic, w_EDF.shape[1], [exact(b_EF[:, None])])

    z_in = branch(params.w_in_EDF, params.b_in_EF)
    if params.w_gate_EDF is None:
        hidden = tubes.activate(z_in, activation, arithmetic)
    else:
        hidden = tubes.multiply(tubes.activate(branch(params.w_gate_EDF, params.b_gate_EF), activation, arithmetic), z_in, arithmetic)
    hidden = tubes.multiply(hidden, exact(slots["factor"]), arithmetic)
    bias = tubes.multiply(exact(slots["bias_scale"][..., None]), exact(params.b_out_ED[:, None]), arithmetic)
    return tubes.contract("gecf,efd->gecd", hidden, exact(params.w_out_EFD), arithmetic, params.w_out_EFD.shape[1], [bias])


@clause("S-EXPERT-1", "S-EXPERT-2", "S-BACK-3", "S-BACK-4")
@needs(wide=True)
@draws(plan=plans("GECDF", points=0, G=2), activation=st.sampled_from(("silu", "gelu_erf", "gelu_tanh")), is_gated=st.booleans())
def test_experts_backward__every_argument(operations: Operations, plan: Plan, activation: str, is_gated: bool) -> None:
    """The slopes along the rows, the factor, the scale of the bias and every weight are the gradients, with factors and scales that are not 1."""
    scene = Scene(operations, plan)
    slots = {"packed": scene.normal("GECD"), "factor": scene.normal("GECF"), "bias_scale": scene.normal("GEC")}
    weights = {"w_in_EDF": scene.normal("EDF", 0.5), "w_out_EFD": scene.normal("EFD", 0.5)}
    weights |= {"b_in_EF": scene.normal("EF"), "b_out_ED": scene.normal("ED")}
    if is_gated:
        weights |= {"w_gate_EDF": scene.normal("EDF", 0.5), "b_gate_EF": scene.normal("EF")}
    dout_GECD = scene.normal("GECD")

    def forward(packed: np.ndarray, factor: np.ndarray, bias_scale: np.ndarray, **changed: np.ndarray) -> Any:
        params = ExpertsParams(**{"w_gate_EDF": None, "b_gate_EF": np.zeros(scene.shape("EF")), **changed})
        return params, operations.experts_forward(packed, factor, bias_scale, params, activation, TRUTH)

    def value(**arguments: np.ndarray) -> tuple[float, int]:
        return float(np.sum(dout_GECD * forward(**arguments)[1][0])), 0

    params, (_, _, saved) = forward(**slots, **weights)
    dpacked, dfactor, dbias_scale, dparams = operations.experts_backward(dout_GECD, saved, params, activation)
    gradients = {"packed": dpacked, "factor": dfactor, "bias_scale": dbias_scale, **{name: getattr(dparams, name) for name in weights}}
    noise = noise_of([(out_tube(slots, params, activation, scene.arithmetic), dout_GECD)])
    assert_slopes(value, {**slots, **weights}, gradients, noise, scene.random)
