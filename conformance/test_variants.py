# May import: standard library, numpy, pytest, hypothesis, refswitch, conformance.house.
"""The routing variants against PyTorch's autograd over random structures, against loops and golden values, and with bugs planted in them.

Hypothesis draws structure (sizes, rules, capacity, padding, ties); data follow from a seed. The reference and an independent dense float64 layer
(`house.torch_variants`) run along one route, the reference's, and the discrete part is compared with plain loops. Each element of every output and
gradient must satisfy

    |reference - torch| <= 1e-12 * (sum of the absolute terms of that element)

where the sum of absolute terms comes from a second run of the torch layer in absolute terms. Of a contraction of n terms, float64's rounding moves
either side by at most (n + k) 2**-53 of it, k counting the operations before; a softmax passes the absolute error of its logits on, which is
(D + k) 2**-53 of *their* absolute terms. With D <= 7 and logits' terms up to about 200 that stays below 3000 units of 2**-53, and 1e-12 is 9007.
Measured: below 60 units, in one example in a thousand 1030. A wrong term is of the order of the sum itself.
"""

from __future__ import annotations

import inspect
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from conformance.house import torch_variants
from conformance.house.torch_variants import Problem, autograd_of
from refswitch.config import TRUTH
from refswitch.reference import expert_choice, noisy_top_k, switch_attention, top_k
from refswitch.reference.attention import allowed_pairs
from refswitch.reference.capacity import arrival_order, no_token_left_behind, order_by_gate, slots_forward
from refswitch.reference.claims import Claims, pack_choices, route_of, serve, unpack_choices, wanted_choices
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.losses import balance_forward, rows_of_mean, z_loss_forward
from refswitch.reference.pack import slots_in_use
from refswitch.reference.router import choices_in_order, choose, softmax_forward
from refswitch.reference.switch import Statics, SwitchInputs, SwitchParams, switch_backward, switch_forward
from refswitch.spec_data import load_dialect, with_knob

EXAMPLES = 300  # of each variant
LIMIT = 1e-12
UNDERFLOW = 2.0**-1000  # room for operations that underflow, which absolute terms do not show
MESH = load_dialect("mesh_tensorflow")
TOP_2 = with_knob(with_knob(with_knob(MESH, "aux.f.pads", "exclude"), "aux.P_pads", "exclude"), "aux.pad_scale", "none")  # of its top-2 gate
RULES: dict[str, tuple[Any, ...]] = {
    "gate": ("raw", "renormalised", "softmax_of_chosen"),
    "policy": ("all", "none", "threshold", "random", "gshard"),
    "order": ("after_kept", "after_all", "by_token", "until_placed"),
    "choose_on": ("probs", "logits"),
    "second_loss": (0.0, 0.5),
    "counts all choices": (False, True),
    "excludes_pads": (False, True),
    "rule": ("expert_selection", "expert_choice", "switch_max"),
    "noise_floor": (0.0, 1e-2),
    "epsilon": (0.0, 1e-10),
    "activation": ("relu", "gelu_erf", "gelu_tanh", "silu"),
    "gated": (False, True),
    "causal": (False, True),
}
LAYERS: dict[str, tuple[str, ...]] = {
    "top_k": ("gate", "policy", "order", "choose_on", "second_loss", "counts all choices", "excludes_pads", "activation", "gated"),
    "expert_choice": ("rule", "activation", "gated"),
    "noisy_top_k": ("order", "noise_floor", "epsilon", "activation", "gated"),
    "switch_attention": ("causal", "activation"),
}
MODULES: dict[str, Any] = {
    "top_k": top_k, "expert_choice": expert_choice, "noisy_top_k": noisy_top_k, "switch_attention": switch_attention,
}  # fmt: skip


class Plan(NamedTuple):
    """The structure of one example."""

    layer: str
    rules: dict[str, Any]
    sizes: dict[str, int]
    capacity: int
    tokens: str  # plain | ties | all_to_one
    pads: str  # none | scattered | all
    seed: int


@st.composite
def plans(draw: st.DrawFn, layer: str) -> Plan:
    """Draw a structure whose sizes are pairwise distinct, but that sometimes all experts are chosen."""
    rules = {name: draw(st.sampled_from(RULES[name]), label=name) for name in LAYERS[layer]}
    pools = {"G": range(1, 4), "K": range(1, 5), "E": range(1, 8), "S": range(14), "D": range(1, 8), "F": range(1, 9)}
    if layer == "switch_attention":
        pools |= {"H": range(1, 9), "B": range(2, 12)}
    sizes: dict[str, int] = {}
    for letter, pool in pools.items():
        least = sizes["K"] if letter == "E" and layer in ("top_k", "noisy_top_k") else 0
        sizes[letter] = draw(st.sampled_from([size for size in pool if size >= least and size not in sizes.values()]), label=letter)
    if layer in ("top_k", "noisy_top_k") and draw(st.integers(0, 7), label="all experts") == 0:
        sizes["E"] = sizes["K"]
    return Plan(
        layer=layer,
        rules=rules,
        sizes=sizes,
        capacity=draw(st.integers(1, 2) | st.integers(0, sizes["S"] + 2), label="capacity"),
        tokens=draw(st.sampled_from(("plain", "plain", "ties", "all_to_one")), label="tokens"),
        pads=draw(st.sampled_from(("none", "none", "scattered", "scattered", "scattered", "all")), label="pads"),
        seed=draw(st.integers(0, 2**32 - 1), label="seed"),
    )


class Data(NamedTuple):
    """What every variant reads."""

    random: np.random.Generator
    x_GSD: np.ndarray
    valid_GS: np.ndarray
    noise_factor_GSD: np.ndarray
    params: SwitchParams


def draw_data(plan: Plan) -> Data:
    """Draw tokens, padding and parameters."""
    random = np.random.Generator(np.random.Philox(plan.seed))
    G, S, D, E, F = (plan.sizes[letter] for letter in "GSDEF")
    x_GSD, w_router_DE = random.standard_normal((G, S, D)), random.standard_normal((D, E))
    b_router_E, factor_GSD = random.standard_normal(E) / 4.0, 0.75 + 0.5 * random.random((G, S, D))
    if plan.tokens == "ties":  # small integers: logits are exact, and columns that repeat tie
        x_GSD, w_router_DE = random.integers(-1, 3, (G, S, D)) * 1.0, random.integers(-1, 2, (D, E)) * 1.0
        w_router_DE[:, E // 2 :] = w_router_DE[:, : E - E // 2]
        b_router_E, factor_GSD = np.zeros(E), np.ones((G, S, D))
    if plan.tokens == "all_to_one":
        x_GSD = (1.0 + np.abs(x_GSD)) * np.where(w_router_DE[:, -1] < 0.0, -1.0, 1.0)
    pad_GS = {"none": np.zeros((G, S)), "scattered": random.random((G, S)) < 0.375, "all": np.ones((G, S))}[plan.pads]
    shapes = {"w_in": (E, D, F), "w_gate": (E, D, F), "w_out": (E, F, D), "b_in": (E, F), "b_gate": (E, F), "b_out": (E, D)}
    drawn = {f"{name}_{letters}": random.standard_normal(shapes[name]) / 2.0 for name, letters in zip(shapes, EXPERT_LETTERS, strict=True)}
    gated = plan.rules.get("gated", False)
    experts = ExpertsParams(**(drawn if gated else drawn | {"w_gate_EDF": None, "b_gate_EF": np.zeros((E, F))}))
    return Data(random, x_GSD, pad_GS == 0, factor_GSD, SwitchParams(w_router_DE, b_router_E, experts, random.standard_normal(D)))


EXPERT_LETTERS = ("EDF", "EDF", "EFD", "EF", "EF", "ED")


def dropout(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Return a factor with holes in it."""
    return (random.random(shape) >= 0.25) / 0.75


def leaves_of(experts: ExpertsParams, prefix: str = "") -> dict[str, np.ndarray]:
    """Return the experts' arrays by the names of the torch layer; a gate's bias without a gate is not there."""
    named = {f"{prefix}{name.rsplit('_', 1)[0]}": value for name, value in experts._asdict().items() if value is not None}
    return named if experts.w_gate_EDF is not None else {name: value for name, value in named.items() if not name.endswith("b_gate")}


class Run(NamedTuple):
    """What the reference computed, the same problem for torch, and what is wrong with the discrete part."""

    values: dict[str, np.ndarray]
    problem: Problem
    wrong: list[str]
    seen: set[str]  # regimes


# ----------------------------------------------------------------------------------------------------------- by hand, with loops


def chosen_by_hand(scores: list[float], K: int) -> list[int]:
    """Return the K best of one token, one after the other."""
    left, found = list(range(len(scores))), []
    for _ in range(K):
        best = max(left, key=lambda e: (scores[e], -e))
        found.append(best)
        left.remove(best)
    return found


def is_wanted(k: int, chosen: list[float], uniform: float, policy: str, threshold: float) -> bool:
    """Tell whether a token makes use of its choice k."""
    gate = chosen[k] / (sum(chosen) + 1e-9)
    if k == 0 or policy == "all":
        return True
    if policy == "none":
        return False
    if policy == "threshold":
        return gate > threshold
    return uniform < min(1.0, gate / threshold) if policy == "random" else 2.0 * gate > uniform


def held_by_hand(expert_SK: list[list[int]], wanted_SK: list[list[bool]], tokens: list[int], capacity: int, order: str) -> dict[Any, int]:
    """Return the slot of every claim (s, k) that one group keeps: slots are filled one by one."""
    K, full, held = len(expert_SK[0]) if expert_SK else 0, Counter[int](), {}
    pairs = [(s, k) for s in tokens for k in range(K)] if order == "by_token" else [(s, k) for k in range(K) for s in tokens]
    for s, k in pairs:
        is_placed = order == "until_placed" and any((s, j) in held for j in range(k))
        if wanted_SK[s][k] and not is_placed and full[expert_SK[s][k]] < capacity:
            held[s, k] = full[expert_SK[s][k]]
            full[expert_SK[s][k]] += 1
    return held


def claims_wrong(claims: Any, wanted_GSK: np.ndarray, priority_GS: np.ndarray, capacity: int, order: str) -> list[str]:
    """Return what differs between claims and the loops."""
    wrong = []
    for g in range(len(claims.kept_GSK)):
        kept_SK, slot_SK = claims.kept_GSK[g], claims.slot_GSK[g]
        held = held_by_hand(claims.expert_GSK[g].tolist(), wanted_GSK[g].tolist(), np.argsort(priority_GS[g]).tolist(), capacity, order)
        mine = {(s, k): int(slot_SK[s, k]) for s, k in zip(*(index.tolist() for index in np.nonzero(kept_SK)), strict=True)}
        if mine != held:
            wrong.append(f"group {g}: holds {mine}, should hold {held}")
    return wrong


# -------------------------------------------------------------------------------------------------------------------- the layers


def run_top_k(plan: Plan, module: Any = top_k) -> Run:
    """Run `top_k` on a plan."""
    (random, x_GSD, valid_GS, factor_GSD, params), rules = draw_data(plan), plan.rules
    G, S, E, F, K = (plan.sizes[letter] for letter in "GSEFK")
    exact = plan.tokens == "ties"
    term_GSE = np.zeros((G, S, E)) if exact else random.standard_normal((G, S, E)) / 4.0
    gumbel_GSE = -np.log(-np.log(random.random((G, S, E))))
    priority_GS = np.argsort(random.random((G, S)), axis=-1)
    mask_GSKF, uniform_GSK, dout_GSD = dropout(random, G, S, K, F), random.random((G, S, K)), random.standard_normal(x_GSD.shape)
    counted, second_loss = (K if rules["counts all choices"] else 1), (rules["second_loss"] if K > 1 else 0.0)
    inputs = module.TopKInputs(x_GSD, valid_GS, factor_GSD, term_GSE, gumbel_GSE, uniform_GSK, priority_GS, mask_GSKF)
    aux = (TOP_2 if rules["excludes_pads"] else MESH).aux
    statics = module.TopKStatics(
        K, rules["choose_on"], rules["gate"], rules["policy"], 0.2, rules["order"], plan.capacity, aux, counted, second_loss, MESH.z,
        rules["activation"], TRUTH,
    )  # fmt: skip
    outputs, saved = module.top_k_forward(inputs, params, statics)
    dx_GSD, dparams = module.top_k_backward(dout_GSD, 0.375, 0.0625, saved, params, statics)
    claims = outputs.claims
    values = {"out": outputs.out_GSD, "aux_loss": outputs.aux_loss, "z_loss": outputs.z_loss, "dx": dx_GSD, "dw_router": dparams.w_router_DE}
    values |= {"db_router": dparams.b_router_E, "db_shared": dparams.b_shared_D}
    values |= {f"d{name}": value for name, value in leaves_of(dparams.experts._replace(w_gate_EDF=dparams.experts.w_gate_EDF)).items()}

    scores_GSE = outputs.probs_GSE if rules["choose_on"] == "probs" else outputs.logits_GSE + gumbel_GSE
    wrong, second_GS = [], np.zeros((G, S), np.int64)
    wanted_GSK = np.zeros((G, S, K), bool)
    for g, s in np.ndindex(G, S):
        expert_K = chosen_by_hand(scores_GSE[g, s].tolist(), K)
        second_GS[g, s] = chosen_by_hand(scores_GSE[g, s].tolist(), min(2, E))[-1]
        if claims.expert_GSK[g, s].tolist() != expert_K:
            wrong.append(f"token {g}, {s}: chooses {claims.expert_GSK[g, s]}, should choose {expert_K}")
        chosen_K = outputs.probs_GSE[g, s][expert_K].tolist()
        wanted_GSK[g, s] = [is_wanted(k, chosen_K, uniform_GSK[g, s, k], rules["policy"], 0.2) & bool(valid_GS[g, s]) for k in range(K)]
    if not np.array_equal(wanted_GSK, outputs.wanted_GSK):
        wrong.append("another choice is wanted")
    wrong += claims_wrong(claims, wanted_GSK, priority_GS, plan.capacity, rules["order"])
    leaves = {"x": x_GSD, "w_router": params.w_router_DE, "b_router": params.b_router_E, "b_shared": params.b_shared_D} | leaves_of(params.experts)
    problem = Problem(
        leaves,
        {"noise_factor": factor_GSD, "noise_term": term_GSE, "hidden_mask": mask_GSKF},
        {"expert": claims.expert_GSK, "slot": claims.slot_GSK, "kept": claims.kept_GSK, "second": second_GS, "valid": valid_GS},
        {name: rules[name] for name in ("gate", "activation", "excludes_pads")} | {"counted_choices": counted, "second_loss": second_loss},
        {"out": dout_GSD, "aux_loss": np.asarray(0.375), "z_loss": np.asarray(0.0625)},
    )
    later_GSK = claims.kept_GSK & (np.arange(K) > 0)
    seen = {
        "drop": bool((wanted_GSK & ~claims.kept_GSK).any()),
        "later choice kept": bool(later_GSK.any()),
        "token with two experts": bool((claims.kept_GSK.sum(axis=-1) > 1).any()),
        "placed later": rules["order"] == "until_placed" and bool(later_GSK.any()),
        "given up": bool((valid_GS[..., None] & ~wanted_GSK).any()),
        "pad": not valid_GS.all(),
        "second loss": second_loss > 0.0,
        "all choices counted": counted > 1,
        "tie": bool((np.sort(outputs.logits_GSE)[..., 1:] == np.sort(outputs.logits_GSE)[..., :-1]).any()),
    } | {f"{name}={rules[name]}": K > 1 and bool(claims.kept_GSK.any()) for name in ("gate", "policy", "order", "choose_on")}
    return Run(values, problem, wrong, {name for name, met in seen.items() if met})


def run_expert_choice(plan: Plan, module: Any = expert_choice) -> Run:
    """Run `expert_choice` on a plan."""
    (random, x_GSD, valid_GS, factor_GSD, params), rules = draw_data(plan), plan.rules
    G, S, E, F = (plan.sizes[letter] for letter in "GSEF")
    mask_GECF, dout_GSD = dropout(random, G, E, min(plan.capacity, S), F), random.standard_normal(x_GSD.shape)
    inputs = module.ExpertChoiceInputs(x_GSD, valid_GS, factor_GSD, mask_GECF)
    statics = module.ExpertChoiceStatics(rules["rule"], plan.capacity, MESH.aux, MESH.z, rules["activation"], TRUTH)
    outputs, saved = module.expert_choice_forward(inputs, params, statics)
    dx_GSD, dparams = module.expert_choice_backward(dout_GSD, 0.375, 0.0625, saved, params, statics)
    values = {"out": outputs.out_GSD, "aux_loss": outputs.aux_loss, "z_loss": outputs.z_loss, "dx": dx_GSD, "dw_router": dparams.w_router_DE}
    values |= {"db_router": dparams.b_router_E, "db_shared": dparams.b_shared_D}
    values |= {f"d{name}": value for name, value in leaves_of(dparams.experts).items()}

    picks, probs_GSE, wrong = outputs.picks, outputs.probs_GSE, []
    first_GS = np.argmax(probs_GSE, axis=-1)
    for g, e in np.ndindex(G, E):
        may = [s for s in range(S) if valid_GS[g, s] and (rules["rule"] != "switch_max" or first_GS[g, s] == e)]
        best = sorted(may, key=lambda s, g=g, e=e: (-probs_GSE[g, s, e], s))[: plan.capacity]
        mine = picks.token_GEC[g, e][picks.kept_GEC[g, e]].tolist()
        if mine != best:
            wrong.append(f"group {g}, expert {e}: takes {mine}, should take {best}")
    leaves = {"x": x_GSD, "w_router": params.w_router_DE, "b_router": params.b_router_E, "b_shared": params.b_shared_D} | leaves_of(params.experts)
    problem = Problem(
        leaves,
        {"noise_factor": factor_GSD, "hidden_mask": mask_GECF},
        {"token": picks.token_GEC, "kept": picks.kept_GEC, "first": first_GS, "valid": valid_GS},
        {name: rules[name] for name in ("rule", "activation")},
        {"out": dout_GSD, "aux_loss": np.asarray(0.375), "z_loss": np.asarray(0.0625)},
    )
    experts_GS = expert_choice.scatter(np.ones((*picks.token_GEC.shape, 1)), picks, S)[..., 0]
    seen = {
        f"rule={rules['rule']}": bool(picks.kept_GEC.any()),
        "token of several experts": bool((experts_GS > 1).any()),
        "token of none": bool((valid_GS & (experts_GS == 0)).any()),
        "slot of none": bool((~picks.kept_GEC).any()),
        "pad": not valid_GS.all(),
        "nothing": S == 0 or plan.capacity == 0,
    }
    return Run(values, problem, wrong, {name for name, met in seen.items() if met})


def run_noisy_top_k(plan: Plan, module: Any = noisy_top_k) -> Run:
    """Run `noisy_top_k` on a plan."""
    (random, x_GSD, _, _, router), rules = draw_data(plan), plan.rules
    G, S, D, E, F, K = (plan.sizes[letter] for letter in "GSDEFK")
    noise_GSE = np.zeros((G, S, E)) if plan.tokens == "ties" else random.standard_normal((G, S, E))
    mask_GSKF, dout_GSD = dropout(random, G, S, K, F), random.standard_normal(x_GSD.shape)
    epsilon = rules["epsilon"] if S else 1e-10  # nothing over nothing is 0 in the reference, see below
    params = module.NoisyParams(router.w_router_DE, random.standard_normal((D, E)), router.experts)
    statics = module.NoisyStatics(K, rules["noise_floor"], epsilon, rules["order"], plan.capacity, rules["activation"], TRUTH)
    outputs, saved = module.noisy_top_k_forward(x_GSD, noise_GSE, mask_GSKF, params, statics)
    dx_GSD, dparams = module.noisy_top_k_backward(dout_GSD, 0.375, 0.0625, saved, params, statics)
    values = {"out": outputs.out_GSD, "importance_loss": outputs.importance_loss, "load_loss": outputs.load_loss, "dx": dx_GSD}
    values |= {"dw_gate_router": dparams.w_gate_DE, "dw_noise": dparams.w_noise_DE}
    values |= {f"d{name}": value for name, value in leaves_of(dparams.experts).items()}
    claims, wrong = outputs.claims, []
    for g, s in np.ndindex(G, S):
        if claims.expert_GSK[g, s].tolist() != chosen_by_hand(outputs.noisy_GSE[g, s].tolist(), K):
            wrong.append(f"token {g}, {s} chooses {claims.expert_GSK[g, s]}")
    wrong += claims_wrong(claims, np.ones((G, S, K), bool), arrival_order(S, G), plan.capacity, rules["order"])
    problem = Problem(
        {"x": x_GSD, "w_gate_router": params.w_gate_DE, "w_noise": params.w_noise_DE} | leaves_of(params.experts),
        {"noise": noise_GSE, "hidden_mask": mask_GSKF},
        {"expert": claims.expert_GSK, "slot": claims.slot_GSK, "kept": claims.kept_GSK, "noisy": outputs.noisy_GSE},
        {"noise_floor": rules["noise_floor"], "epsilon": epsilon, "activation": rules["activation"]},
        {"out": dout_GSD, "importance_loss": np.asarray(0.375), "load_loss": np.asarray(0.0625)},
    )
    sorted_GSE = np.sort(outputs.noisy_GSE)
    seen = {
        "every expert chosen": K == E,
        "one choice": K == 1 < E,
        "several choices": 1 < K < E,
        "drop": not claims.kept_GSK.all(),
        "tie": bool((sorted_GSE[..., 1:] == sorted_GSE[..., :-1]).any()),
        "noise": bool(noise_GSE.any()),
        "several groups": G > 1 and S > 0,
        "nothing": S == 0,
    } | {f"{name}={rules[name]}": 1 < K < E and S > 0 for name in ("order", "noise_floor", "epsilon")}
    return Run(values, problem, wrong, {name for name, met in seen.items() if met})


def run_switch_attention(plan: Plan, module: Any = switch_attention) -> Run:
    """Run `switch_attention` on a plan: S tokens in each of G groups are B rows of L."""
    (random, x_GSD, valid_GS, factor_GSD, router), rules = draw_data(plan), plan.rules
    G, S, D, E, F, H, K, B = (plan.sizes[letter] for letter in "GSDEFHKB")
    B = next(rows for rows in (B, 3, 2, 1) if G * S % rows == 0)
    L = G * S // B
    x_BLD, valid_BL = x_GSD.reshape(B, L, D), valid_GS.reshape(B, L)
    segment_BL = np.sort(random.integers(0, 2, (B, L)), axis=-1)
    allowed_BLL = allowed_pairs(segment_BL, segment_BL, valid_BL, rules["causal"])
    shapes = ((E, D, F), (E, F, H, K), (E, F, H, K), (H, K, D))
    params = module.SwitchAttentionParams(router.w_router_DE, *(random.standard_normal(shape) / 2.0 for shape in shapes))
    mask_GSF, bias_HLL, factor_BHLL = dropout(random, G, S, F), random.standard_normal((H, L, L)), dropout(random, B, H, L, L)
    dout_BLD = random.standard_normal((B, L, D))
    inputs = module.SwitchAttentionInputs(x_BLD, valid_GS, factor_GSD, mask_GSF, bias_HLL, allowed_BLL, factor_BHLL)
    statics = module.SwitchAttentionStatics(plan.capacity, MESH.aux, MESH.z, rules["activation"], TRUTH)
    outputs, saved = module.switch_attention_forward(inputs, params, statics)
    dx_BLD, dbias_HLL, dparams = module.switch_attention_backward(dout_BLD, 0.375, 0.0625, saved, params, statics)
    names = ("w_router", "w_in", "w_query", "w_key", "w_attention_out")
    values = {"out": outputs.out_BLD, "aux_loss": outputs.aux_loss, "z_loss": outputs.z_loss, "dx": dx_BLD, "dbias": dbias_HLL}
    values |= {f"d{name}": value for name, value in zip(names, dparams, strict=True)}
    route = outputs.route
    claims = Claims(*(part_GS[..., None] for part_GS in route))
    wrong = claims_wrong(claims, valid_GS[..., None], arrival_order(S, G), plan.capacity, "by_token")
    for heads_BLHK in (outputs.query_BLHK, outputs.key_BLHK):
        if heads_BLHK[~route.kept_GS.reshape(B, L)].any():
            wrong.append("a dropped token has heads")
    problem = Problem(
        {"x": x_BLD, "bias": bias_HLL} | dict(zip(names, params, strict=True)),
        {"noise_factor": factor_GSD, "hidden_mask": mask_GSF, "factor": factor_BHLL},
        {"expert": route.expert_GS, "slot": route.slot_GS, "kept": route.kept_GS, "valid": valid_GS, "allowed": allowed_BLL},
        {"activation": rules["activation"]},
        {"out": dout_BLD, "aux_loss": np.asarray(0.375), "z_loss": np.asarray(0.0625)},
    )
    seen = {
        "drop": bool((valid_GS & ~route.kept_GS).any()),
        "kept": bool(route.kept_GS.any()),
        "pad": not valid_GS.all(),
        "sees nothing": bool((~allowed_BLL.any(axis=-1)).any()),
        "several rows": B > 1,
        "several groups": G > 1 and S > 0,
        "several heads": H > 1,
        "causal": rules["causal"],
        "nothing": S == 0,
    }
    return Run(values, problem, wrong, {name for name, met in seen.items() if met})


RUNS: dict[str, Callable[..., Run]] = {
    "top_k": run_top_k, "expert_choice": run_expert_choice, "noisy_top_k": run_noisy_top_k, "switch_attention": run_switch_attention,
}  # fmt: skip
REQUIRED = {
    "top_k": {"drop", "later choice kept", "token with two experts", "placed later", "given up", "pad", "second loss", "all choices counted", "tie"}
    | {f"{name}={value}" for name in ("gate", "policy", "order", "choose_on") for value in RULES[name]},
    "expert_choice": {"token of several experts", "token of none", "slot of none", "pad", "nothing"} | {f"rule={rule}" for rule in RULES["rule"]},
    "noisy_top_k": {"every expert chosen", "one choice", "several choices", "drop", "tie", "noise", "several groups", "nothing"}
    | {f"{name}={value}" for name in ("order", "noise_floor", "epsilon") for value in RULES[name]},
    "switch_attention": {"drop", "kept", "pad", "sees nothing", "several rows", "several groups", "several heads", "causal", "nothing"},
}


# ---------------------------------------------------------------------------------------------------------------- the comparison

FARTHEST: dict[str, float] = {}  # largest |reference - torch| over the sum of absolute terms
MET: dict[str, Counter[str]] = {layer: Counter() for layer in LAYERS}


def disagreements(plan: Plan, module: Any = None) -> list[str]:
    """Return every way in which the reference, or a planted copy of it, disagrees with loops and autograd; none where all is well."""
    run = RUNS[plan.layer](plan, module or MODULES[plan.layer])
    values, terms = autograd_of(getattr(torch_variants, plan.layer), run.problem)
    found = list(run.wrong)
    if values.keys() != run.values.keys():
        found.append(f"one side alone has {values.keys() ^ run.values.keys()}")
    for name in values.keys() & run.values.keys():
        mine, other = np.asarray(run.values[name]), values[name]
        if mine.dtype != np.float64 or mine.shape != other.shape:
            found.append(f"{name}: {mine.dtype} {mine.shape}, should be float64 {other.shape}")
            continue
        error = np.abs(mine - other)
        bad = ~(error <= LIMIT * terms[name] + UNDERFLOW)
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            found.append(f"{name}{list(index)}: {mine[index]!r}, torch {other[index]!r}, terms {terms[name][index]!r} ({bad.sum()} of {bad.size})")
        if module is None and error.size:
            ratio = np.divide(error, terms[name], out=np.zeros_like(error), where=terms[name] > UNDERFLOW)
            FARTHEST[plan.layer] = max(FARTHEST.get(plan.layer, 0.0), float(ratio.max()))
    if module is None:
        MET[plan.layer].update(run.seen)
    return found


def _sweep(layer: str) -> Callable[[], None]:
    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None)
    @given(plan=plans(layer))
    def sweep(plan: Plan) -> None:
        found = disagreements(plan)
        assert not found, "\n".join(found)

    return sweep


@pytest.mark.parametrize("layer", LAYERS)
def test_variant__equals_autograd_and_loops(layer: str) -> None:
    """Outputs, losses, every gradient and the discrete part, over the sweep, which meets every regime."""
    _sweep(layer)()
    missing = REQUIRED[layer] - set(MET[layer])
    assert not missing, f"the sweep never met: {missing}"


# ------------------------------------------------------------------------------------------------------------- bugs that it notices


class Bug(NamedTuple):
    """A fault in one line of the reference, and what reports it."""

    layer: str
    right: str
    wrong: str
    spoils: str  # stands in the report


BUGS = {
    "the renormalisation's gradient dropped": Bug("top_k", "(dgate_GSK - mean_GS1) / saved.total_GS1", "dgate_GSK / saved.total_GS1", "dw_router"),
    "the chosen softmax's mean forgotten": Bug(
        "top_k", "saved.gate_GSK * (dgate_GSK - mean_GS1), saved.expert_GSK", "saved.gate_GSK * dgate_GSK, saved.expert_GSK", "dw_router"
    ),
    "a gradient a billionth too large": Bug("top_k", "dx_GSKD.sum(axis=2)", "dx_GSKD.sum(axis=2) * (1.0 + 2.0**-30)", "dx"),
    "dx of the first choice alone": Bug("top_k", "dx_GSKD.sum(axis=2)", "dx_GSKD[:, :, 0]", "dx"),
    "the second-place loss pulls at the first choice": Bug(
        "top_k", "np.where(saved.without_first_GSE, dleft_GSE, 0.0)", "dleft_GSE", "dw_router"
    ),
    "the second-place loss without its weight": Bug("top_k", "balance_loss + statics.second_loss * second", "balance_loss + second", "aux_loss"),
    "expert choice detached from its probabilities": Bug(
        "expert_choice", "= np.where(picks.kept_GEC, dgate_GEC, 0.0)", "= 0.0 * dgate_GEC", "dw_router"
    ),
    "the number of experts forgotten in backward": Bug("expert_choice", "dweight_GEC * saved.share_GEC", "dweight_GEC", "dw_router"),
    "a token's experts overwrite each other": Bug(
        "expert_choice", "np.add.at(x_GSD, (g, picks.token_GEC), np.where(picks.kept_GEC[..., None], gathered_GECD, 0.0))",
        "x_GSD[g, picks.token_GEC] = np.where(picks.kept_GEC[..., None], gathered_GECD, 0.0)", "out",
    ),
    "first come, first served": Bug("expert_choice", "pick_tokens(read_GSE,", "pick_tokens(0.0 * read_GSE,", "should take"),
    "softmax over experts where experts select": Bug(
        "expert_choice", 'if rule != "expert_selection":\n        return softmax_forward', "if True:\n        return softmax_forward", "out"
    ),
    "the threshold includes the K-th chosen": Bug(
        "noisy_top_k", "np.where(is_chosen_GSE, order_GSE[..., K, None], order_GSE[..., K - 1, None])",
        "np.where(is_chosen_GSE, order_GSE[..., K - 1, None], order_GSE[..., K - 1, None])", "load_loss",
    ),
    "the threshold detached": Bug("noisy_top_k", "saved.threshold_GSE), -dmargin_GSE)", "saved.threshold_GSE), 0.0 * dmargin_GSE)", "dw_gate_router"),
    "the noise's scale has no gradient from the gate": Bug("noisy_top_k", " + dnoisy_GSE * saved.noise_GSE", "", "dw_noise"),
    "the mean's share of CV^2 forgotten": Bug("noisy_top_k", "return ddeviation_GE + dmean_G1 / E", "return ddeviation_GE", "dw_gate_router"),
    "the mean's share of CV^2 with the wrong sign": Bug("noisy_top_k", "dsquare_G1 = -dvalue", "dsquare_G1 = dvalue", "dw_gate_router"),
    "values that are not the keys": Bug(
        "switch_attention", '"bhlm,bmhk->blhk", probs_BHLM * factor_BHLM, key_BMHK', '"bhlm,bmhk->blhk", probs_BHLM * factor_BHLM, query_BLHK', "out"
    ),
    "the values' gradient does not reach the keys": Bug("switch_attention", "dkey_score_BMHK + dkey_value_BMHK", "dkey_score_BMHK", "dw_key"),
    "queries not scaled": Bug("switch_attention", "gate_GS11 * query_GSHK * query_GSHK.shape[-1] ** -0.5", "gate_GS11 * query_GSHK", "out"),
    "keys without their gate": Bug("switch_attention", "gated_key_GSHK = gate_GS11 * key_GSHK", "gated_key_GSHK = key_GSHK", "out"),
}  # fmt: skip


def planted(bug: Bug) -> Any:
    """Return the layer's module with one line changed."""
    source = inspect.getsource(MODULES[bug.layer])
    assert source.count(bug.right) == 1, f"{bug.right} is not one place of {bug.layer}"
    module = types.ModuleType(f"planted_{bug.layer}")
    exec(compile(source.replace(bug.right, bug.wrong), f"planted {bug.layer}", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("label", BUGS)
def test_variant__comparison_notices(label: str) -> None:
    """Each bug is reported, under the name of what it spoils."""
    bug = BUGS[label]
    module = planted(bug)
    quick = settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    find(plans(bug.layer), lambda plan: any(bug.spoils in line for line in disagreements(plan, module)), settings=quick)


# ------------------------------------------------------------------------------------------------------------------ golden values

LOGITS_GSE = np.array([[[2, 1, 0], [2, 0, 1], [1.5, 1, 0], [0, 2, 1], [3, 0, 0], [0, 0, 2], [1, 0.5, 0], [2, 1.9, 0]]], dtype=np.float64)
ALL_GS = np.ones((1, 8), bool)


def golden_layer(K: int, gate: str, order: str, capacity: int, policy: str = "all") -> top_k.TopKOutputs:
    """Run the layer on the logits of the notes' vector: the router is the identity, the experts return their input's positive part."""
    experts = ExpertsParams(np.stack([np.eye(3)] * 3), None, np.stack([np.eye(3)] * 3), np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((3, 3)))
    params = SwitchParams(np.eye(3), np.zeros(3), experts, np.zeros(3))
    inputs = top_k.TopKInputs(
        LOGITS_GSE, ALL_GS, np.ones((1, 8, 3)), np.zeros((1, 8, 3)), np.zeros((1, 8, 3)), np.zeros((1, 8, K)), arrival_order(8, 1),
        np.ones((1, 8, K, 3)),
    )  # fmt: skip
    statics = top_k.TopKStatics(K, "probs", gate, policy, 0.2, order, capacity, TOP_2.aux, 1, 0.0, MESH.z, "relu", TRUTH)
    return top_k.top_k_forward(inputs, params, statics)[0]


def test_top_2__matches_golden() -> None:
    """Renormalised gates, second experts, slots and survivors at four slots, and both losses, of paper.md 8.1."""
    outputs = golden_layer(2, "renormalised", "after_kept", 4)
    claims = outputs.claims
    assert np.round(outputs.gate_GSK[0, :, 0], 6).tolist() == [0.731059, 0.731059, 0.622459, 0.731059, 0.952574, 0.880797, 0.622459, 0.524979]
    assert claims.expert_GSK[0, :, 0].tolist() == [0, 0, 0, 1, 0, 2, 0, 0]
    assert claims.expert_GSK[0, :, 1].tolist() == [1, 2, 1, 2, 1, 0, 1, 1]
    assert claims.slot_GSK[0, :, 0].tolist() == [0, 1, 2, 0, 3, 0, 4, 5]
    assert claims.slot_GSK[0, :, 1].tolist() == [1, 1, 2, 2, 3, 4, 4, 5]
    assert claims.kept_GSK[0].T.astype(int).tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert round(float(outputs.aux_loss), 6) == 1.307730
    assert round(float(outputs.z_loss), 6) == 5.824380
    assert np.round(outputs.probs_GSE.mean(axis=(0, 1)), 6).tolist() == [0.497456, 0.279249, 0.223295]
    count_GE = top_k.choice_counts(claims, outputs.wanted_GSK, ALL_GS, 3, 1, TOP_2.aux)
    assert (count_GE[0] / 8).tolist() == [0.75, 0.125, 0.125]


def test_top_2__service_orders() -> None:
    """GShard counts all first choices where Mesh counts the kept ones: the slots of dropped claims differ, the kept set does not.

    Token by token, the second choices of tokens 0 to 3 take all slots of experts 1 and 2, and tokens 3 and 5 lose their first choices.
    """
    mesh, gshard = (golden_layer(2, "renormalised", order, 4).claims for order in ("after_kept", "after_all"))
    assert gshard.slot_GSK[0, :, 1].tolist() == [1, 1, 2, 2, 3, 6, 4, 5]
    assert (gshard.kept_GSK == mesh.kept_GSK).all()
    mesh, by_token = (golden_layer(2, "renormalised", order, 2).claims for order in ("after_kept", "by_token"))
    assert mesh.kept_GSK[0].T.astype(int).tolist() == [[1, 1, 0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert by_token.kept_GSK[0].T.astype(int).tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]


def test_top_2__second_policies() -> None:
    """Which second experts are made use of; the gates of the second are 1 minus those of the first."""
    wanted = {policy: golden_layer(2, "renormalised", "after_kept", 8, policy).wanted_GSK[0, :, 1].astype(int).tolist() for policy in RULES["policy"]}
    assert wanted["none"] == [0] * 8
    assert wanted["all"] == wanted["random"] == wanted["gshard"] == [1] * 8  # the draw is 0
    assert wanted["threshold"] == [1, 1, 1, 1, 0, 0, 1, 1]  # .047426 and .119203 are not above 0.2
    chosen_GSK = np.array([[[0.5, 0.5], [0.5, 0.25], [0.5, 0.03125]]])
    for policy, uniform, kept in (("random", 0.25, [1, 1, 1]), ("random", 0.5, [1, 1, 0]), ("gshard", 0.5, [1, 1, 0]), ("gshard", 0.75, [1, 0, 0])):
        found_GSK = wanted_choices(chosen_GSK, np.full((1, 3, 2), uniform), policy, 0.2)
        assert found_GSK[0].astype(int).tolist() == [[1, k] for k in kept], (policy, uniform)


@pytest.mark.parametrize(
    ("capacity", "K", "expert", "slot", "token", "gate"),
    [
        (2, 2, [0, 0, 1, 1, None, 2, None, None], [0, 1, 1, 0, None, 0, None, None], 2, 0.331499),
        (3, 2, [0, 0, 0, 1, 1, 2, 1, None], [0, 1, 2, 0, 1, 0, 2, None], 0, 0.665241),
        (3, 3, [0, 0, 0, 1, 1, 2, 1, 2], [0, 1, 2, 0, 1, 0, 2, 1], 7, 0.066335),
    ],
)
def test_no_token_left_behind__matches_golden(
    capacity: int, K: int, expert: list[int | None], slot: list[int | None], token: int, gate: float
) -> None:
    """The stages of paper.md 8.1 as claims: one stage at most is kept, with that stage's own probability as gate."""
    outputs = golden_layer(K, "raw", "until_placed", capacity)
    claims = outputs.claims
    assert (claims.kept_GSK.sum(axis=-1) <= 1).all()
    for part_GSK, expected in ((claims.expert_GSK, expert), (claims.slot_GSK, slot)):
        assert [next((int(part_GSK[0, s, k]) for k in range(K) if claims.kept_GSK[0, s, k]), None) for s in range(8)] == expected
    assert round(float(outputs.gate_GSK[0, token][claims.kept_GSK[0, token]][0]), 6) == gate


def test_no_token_left_behind__loss_over_all_stages() -> None:
    """Mesh takes f as the mean over the stages of who was the k-th choice; with all experts as stages f is uniform, and the loss 1."""
    probs_GSE, _ = softmax_forward(LOGITS_GSE, TRUTH)
    claims = serve(choices_in_order(probs_GSE, 3), np.ones((1, 8, 3), bool), arrival_order(8, 1), 3, 2, "until_placed")
    for counted, value in ((1, 1.307730), (3, 1.0)):
        count_GE = top_k.choice_counts(claims, np.ones((1, 8, 3), bool), ALL_GS, 3, counted, MESH.aux)
        found, _ = balance_forward(probs_GSE, count_GE, *rows_of_mean(ALL_GS, ALL_GS, MESH.aux), ALL_GS, MESH.aux)
        assert round(float(found), 6) == value


def test_switch_max__matches_golden() -> None:
    """Two slots of expert 0 go to the probabilities .909443 and the first .665241, not to the first two tokens."""
    probs_GSE, _ = softmax_forward(LOGITS_GSE, TRUTH)
    first_GS = choose(probs_GSE)
    picks = expert_choice.pick_tokens(probs_GSE, first_GS[..., None] == np.arange(3), 2)
    assert [row[kept].tolist() for row, kept in zip(picks.token_GEC[0], picks.kept_GEC[0], strict=True)] == [[4, 0], [3], [5]]


def test_expert_selection__loss_at_uniform_is_one() -> None:
    """Mesh scales the loss so that equal shares give 1, padding or not."""
    valid_GS = np.array([[True] * 5 + [False] * 3])
    probs_GSE, _ = expert_choice.scores_forward(np.zeros((1, 8, 4)), valid_GS, "expert_selection", TRUTH)
    value, _ = expert_choice.spread_loss(probs_GSE, valid_GS)
    assert value == pytest.approx(1.0, rel=2**-50)


def test_cv_squared__by_hand() -> None:
    """Amounts 1, 2, 3: mean 2, variance 2/3 over all three (not 1, over two), CV^2 = 1/6; nothing at all has 0."""
    value, _ = noisy_top_k.cv_squared_forward(np.array([[1.0, 2.0, 3.0]]), 0.0)
    assert value == pytest.approx(1 / 6, rel=2**-50)
    assert noisy_top_k.cv_squared_forward(np.zeros((2, 3)), 0.0)[0] == 0.0


# ----------------------------------------------------------------------------------------------------------------- known relatives


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(plan=plans("top_k"))
def test_top_k__one_raw_choice_is_the_switch_layer(plan: Plan) -> None:
    """Every output and gradient of K = 1 has the bits of `switch_forward` and `switch_backward`, whatever order, policy and choice."""
    plan = plan._replace(
        sizes=plan.sizes | {"K": 1}, rules=plan.rules | {"gate": "raw", "excludes_pads": False, "counts all choices": False, "choose_on": "probs"}
    )
    run = run_top_k(plan)
    _, data, facts, rules, douts = run.problem
    dialect = with_knob(with_knob(MESH, "pad.zero_input", False), "priority", "random")
    (random, x_GSD, valid_GS, factor_GSD, params), (G, S, E) = draw_data(plan), (plan.sizes[letter] for letter in "GSE")
    term_GSE = data["noise_term"]
    if plan.tokens != "ties":
        random.standard_normal((G, S, E))
    random.random((G, S, E))
    priority_GS = np.argsort(random.random((G, S)), axis=-1)
    inputs = SwitchInputs(x_GSD, valid_GS, factor_GSD, term_GSE, np.zeros((G, S, E)), priority_GS, data["hidden_mask"][:, :, 0])
    statics = Statics(dialect, TRUTH, rules["activation"], plan.capacity)
    outputs, saved = switch_forward(inputs, params, statics)
    dx_GSD, dparams = switch_backward(douts["out"], 0.375, 0.0625, saved, params, statics)
    theirs = {"out": outputs.out_GSD, "aux_loss": outputs.aux_loss, "z_loss": outputs.z_loss, "dx": dx_GSD, "dw_router": dparams.w_router_DE}
    theirs |= {"db_router": dparams.b_router_E, "db_shared": dparams.b_shared_D}
    theirs |= {f"d{name}": value for name, value in leaves_of(dparams.experts).items()}
    for part, mine_GSK in zip(outputs.route, (facts["expert"], facts["slot"], facts["kept"]), strict=True):
        assert np.array_equal(part, mine_GSK[..., 0])
    assert theirs.keys() == run.values.keys()
    assert [name for name, value in theirs.items() if not np.array_equal(value, run.values[name])] == []


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(plan=plans("top_k"))
def test_serve__relatives(plan: Plan) -> None:
    """No token left behind is `capacity`'s; counting kept or all choices keeps the same claims in the same slots; no two claims share a slot."""
    data, (G, S, E, K) = draw_data(plan), (plan.sizes[letter] for letter in "GSEK")
    probs_GSE, _ = softmax_forward(data.x_GSD @ data.params.w_router_DE, TRUTH)
    expert_GSK, wanted_GSK = choices_in_order(probs_GSE, K), np.broadcast_to(data.valid_GS[..., None], (G, S, K))
    orders = {order: serve(expert_GSK, wanted_GSK, arrival_order(S, G), E, plan.capacity, order) for order in RULES["order"]}
    route, staged = no_token_left_behind(expert_GSK, data.valid_GS, E, plan.capacity), orders["until_placed"]
    assert np.array_equal(route.kept_GS, staged.kept_GSK.any(axis=-1))
    stage_GS1 = np.argmax(staged.kept_GSK, axis=-1)[..., None]
    for part_GS, part_GSK in ((route.expert_GS, staged.expert_GSK), (route.slot_GS, staged.slot_GSK)):
        assert np.array_equal(part_GS[route.kept_GS], np.take_along_axis(part_GSK, stage_GS1, axis=-1)[..., 0][route.kept_GS])
    kept, every = orders["after_kept"], orders["after_all"]
    assert np.array_equal(kept.kept_GSK, every.kept_GSK)
    assert np.array_equal(kept.slot_GSK[kept.kept_GSK], every.slot_GSK[kept.kept_GSK])
    for claims in orders.values():
        g = np.broadcast_to(np.arange(G)[:, None, None], (G, S, K))
        held = list(zip(*(part[claims.kept_GSK].tolist() for part in (g, claims.expert_GSK, claims.slot_GSK)), strict=True))
        assert len(set(held)) == len(held)
        assert all(slot < plan.capacity for _, _, slot in held)


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(plan=plans("expert_choice"))
def test_switch_max__is_batch_prioritised_routing(plan: Plan) -> None:
    """Each expert's highest claims first, ties to the earlier token, is `slots_forward` by falling gate: the same survivors in the same slots."""
    data, E = draw_data(plan), plan.sizes["E"]
    probs_GSE, _ = softmax_forward(data.x_GSD @ data.params.w_router_DE, TRUTH)
    first_GS = choose(probs_GSE)
    eligible_GSE = (first_GS[..., None] == np.arange(E)) & data.valid_GS[..., None]
    mine = expert_choice.route_of_picks(expert_choice.pick_tokens(probs_GSE, eligible_GSE, plan.capacity), first_GS)
    theirs = slots_forward(first_GS, data.valid_GS, order_by_gate(probs_GSE.max(axis=-1)), E, plan.capacity)
    assert np.array_equal(mine.kept_GS, theirs.kept_GS)
    assert np.array_equal(mine.slot_GS[mine.kept_GS], theirs.slot_GS[mine.kept_GS])


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(plan=plans("top_k"))
def test_moves__adjoint(plan: Plan) -> None:
    """<pack x, y> = <x, unpack y> and <gather x, y> = <x, scatter y>, exactly: with integers up to 9 no sum rounds."""
    data, (G, S, D, E, K) = draw_data(plan), (plan.sizes[letter] for letter in "GSDEK")
    random, (probs_GSE, _) = data.random, softmax_forward(data.x_GSD @ data.params.w_router_DE, TRUTH)
    claims = serve(choices_in_order(probs_GSE, K), random.random((G, S, K)) < 0.75, arrival_order(S, G), E, plan.capacity, plan.rules["order"])
    picks = expert_choice.pick_tokens(probs_GSE, np.broadcast_to(data.valid_GS[..., None], (G, S, E)), plan.capacity)
    C = slots_in_use(route_of(claims)) + 1

    def integers(*shape: int) -> np.ndarray:
        return random.integers(-9, 10, shape).astype(np.float64)

    x_GSKD, y_GECD = integers(G, S, K, D), integers(G, E, C, D)
    assert np.sum(pack_choices(x_GSKD, claims, E, C) * y_GECD) == np.sum(x_GSKD * unpack_choices(y_GECD, claims))
    x_GSD, y_GECD = integers(G, S, D), integers(*picks.token_GEC.shape, D)
    assert np.sum(expert_choice.gather(x_GSD, picks) * y_GECD) == np.sum(x_GSD * expert_choice.scatter(y_GECD, picks, S))


# ------------------------------------------------------------------------------------------------------------ directional differences

STEP = 2.0**-18


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["importance", "load"])
@pytest.mark.parametrize("name", ["x", "w_gate", "w_noise"])
def test_cv_losses__finite_difference(name: str, weights: tuple[float, float]) -> None:
    """A central difference is off by c h^2 and rounding; that with 2h by 4 c h^2, so their difference is three times the error: the radius."""
    G, S, D, E, F, K = 2, 11, 5, 6, 1, 3
    random = np.random.Generator(np.random.Philox(5))
    x_GSD, noise_GSE = random.standard_normal((G, S, D)), random.standard_normal((G, S, E))
    zeros = ExpertsParams(np.zeros((E, D, F)), None, np.zeros((E, F, D)), np.zeros((E, F)), np.zeros((E, F)), np.zeros((E, D)))
    params = noisy_top_k.NoisyParams(random.standard_normal((D, E)), random.standard_normal((D, E)), zeros)
    statics = noisy_top_k.NoisyStatics(K, 1e-2, 1e-10, "after_kept", S, "relu", TRUTH)
    mask_GSKF = np.ones((G, S, K, F))
    field = {"w_gate": "w_gate_DE", "w_noise": "w_noise_DE"}.get(name, "")
    here, saved = noisy_top_k.noisy_top_k_forward(x_GSD, noise_GSE, mask_GSKF, params, statics)
    dx_GSD, dparams = noisy_top_k.noisy_top_k_backward(np.zeros_like(x_GSD), *weights, saved, params, statics)
    direction = random.standard_normal(x_GSD.shape if name == "x" else (D, E))

    def at(h: float) -> float:
        moved = params._replace(**{field: getattr(params, field) + h * direction}) if field else params
        there, kept = noisy_top_k.noisy_top_k_forward(x_GSD if field else x_GSD + h * direction, noise_GSE, mask_GSKF, moved, statics)
        assert np.array_equal(there.claims.expert_GSK, here.claims.expert_GSK)
        assert np.array_equal(kept.load.threshold_GSE, saved.load.threshold_GSE)
        return float(weights[0] * there.importance_loss + weights[1] * there.load_loss)

    far, near = (at(2 * STEP) - at(-2 * STEP)) / (4 * STEP), (at(STEP) - at(-STEP)) / (2 * STEP)
    slope = float(np.sum((getattr(dparams, field) if field else dx_GSD) * direction))
    rounding = np.finfo(np.float64).eps * abs(at(0.0)) * S * E / STEP
    radius = abs(far - near) + rounding
    assert abs(near - slope) <= radius
    assert radius < 1e-3 * abs(slope), "the difference sees nothing"


def test_z_loss__of_the_variants_is_the_switch_layers() -> None:
    """One definition: the z-loss of the golden logits through `losses` and through `top_k`."""
    value, _ = z_loss_forward(LOGITS_GSE, ALL_GS, MESH.z)
    assert golden_layer(3, "raw", "by_token", 2).z_loss == value
