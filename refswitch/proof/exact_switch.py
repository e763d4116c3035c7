# May import: standard library, numpy (to hand out arrays), refswitch.numbers, refswitch.config, refswitch.proof (above).
"""The Switch layer token by token in exact rationals: the second oracle, for tiny shapes.

It shares no line and no idea with the reference. Nothing is packed into slots, no array is multiplied, no backward pass is written: loops over tokens
on scalars that remember what they were made from (`tape`), written from `spec/switch_layer.md`. A value without an exponential in it is exact, any
other one is enclosed to `bits` bits; whatever is discrete (choice, order, kept, the sign at a relu) is decided by exact comparison or not at all.
It computes in truth mode: there are no rounding points, so an in-place noise leaks wherever the dialect lets it.
Spec: S-CAP-1 to S-BACK-6. Before: `exact_rows`. This file from top to bottom is the rest of the layer.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cmp_to_key
from typing import NamedTuple

import numpy as np

from refswitch.config import Aux, Dialect
from refswitch.numbers import rational
from refswitch.numbers.rational import ONE, point
from refswitch.proof.exact_rows import (
    CaseLike,
    Layer,
    Row,
    claims,
    gate_of,
    given,
    grid,
    open_layer,
    ranking,
    refuse,
    row_of,
    sign_of,
    sits_out,
    softmax,
)
from refswitch.proof.tape import Value, constant, gradients, logistic, node, normal_cdf, relu, tanh, total

GELU_CUBE = Fraction("0.044715")


class Place(NamedTuple):
    """Where a token went."""

    expert: int
    slot: int
    kept: bool


class Served(NamedTuple):
    """What a token got there; hidden and expert_out are 0 where it was dropped."""

    gate: Value
    hidden_F: list[Value]
    expert_out_D: list[Value]
    out_D: list[Value]


# --------------------------------------------------------------------------------------------------- 7, 8: capacity, slots


def wishes(layer: Layer, row: Row) -> list[int]:
    """Return the experts that a row asks, in turn."""
    if row.is_pad and layer.dialect.pad.route == "expert0_weight0":
        return [0]
    return row.ranking_E[: layer.dialect.select.choices if layer.dialect.select.rule == "ntlb" else 1]


def against_gate(layer: Layer, a: Row, b: Row) -> int:
    """Return -1, 0 or 1 as a is served before, with or after b where the highest gate is served first."""
    if layer.dialect.gate.value == "sigmoid":
        return sign_of(b.raw_E[b.ranking_E[0]].interval, a.raw_E[a.ranking_E[0]].interval)
    if seen_by_gate(layer, a) == seen_by_gate(layer, b):
        return 0
    return sign_of(gate_of(layer, b, b.ranking_E[0]).interval, gate_of(layer, a, a.ranking_E[0]).interval)


def seen_by_gate(layer: Layer, row: Row) -> list[Fraction]:
    """Return numbers that fix the chosen probability: where they are the same, so is it.

    Without a cap they are the differences of the logits to the chosen one, in order of size. Then the converse holds too, so that every tie is seen:
    exponentials of different rationals are linearly independent over the rationals (Lindemann and Weierstrass).
    """
    raw_E = [raw.interval.low for raw in row.raw_E]
    chosen = raw_E[row.ranking_E[0]]
    return [chosen, *sorted(raw_E)] if layer.dialect.router.logit_cap else sorted(raw - chosen for raw in raw_E)


def served_order(layer: Layer, row_S: list[Row]) -> list[int]:
    """Return the tokens of a group, first served first. Spec: S-CAP-2. The case's `priority` holds each token's turn."""

    def turn(row: Row) -> int:
        return int(layer.case["priority"][row.g, row.s])

    def against(a: Row, b: Row) -> int:
        return against_gate(layer, a, b)

    if layer.dialect.priority == "random" and "priority" in layer.case:
        row_S = sorted(row_S, key=turn)
    if layer.dialect.priority == "gate_desc":
        row_S = sorted(row_S, key=cmp_to_key(against))
    return [row.s for row in row_S]


def places_of(layer: Layer, row_S: list[Row]) -> list[Place]:
    """Return where every token of a group goes: each round, those without a place ask their next expert. Spec: S-CAP-1, S-CAP-2, S-POS-1."""
    capacity = max(layer.case["capacity"] - layer.dialect.capacity.slots_lost, 0)
    order_S, places = served_order(layer, row_S), dict[int, Place]()
    claimed: list[int] = []  # the expert of every claim so far
    for turn in range(layer.E):
        for s in order_S:
            asked = wishes(layer, row_S[s])
            if turn >= len(asked) or (s in places and places[s].kept):
                continue
            slot = earlier_claims(claimed, asked[turn])
            place = Place(asked[turn], slot, claims(layer, row_S[s]) and slot < capacity)
            if claims(layer, row_S[s]):
                claimed.append(place.expert)
            if turn == 0 or place.kept:
                places[s] = place
    return [places[s]._replace(kept=places[s].kept and not sits_out(layer, row)) for s, row in enumerate(row_S)]


def earlier_claims(claimed: list[int], expert: int) -> int:
    """Return how many of the claims so far were on this expert: the count is exclusive. Spec: S-POS-1."""
    return sum(earlier == expert for earlier in claimed)


# --------------------------------------------------------------------------------------------- 10, 11: experts and combine


def activate(z: Value, activation: str) -> Value:
    """Return act(z). Spec: S-EXPERT-1."""
    if activation == "relu":
        return relu(z)
    if activation == "gelu_erf":
        return z * normal_cdf(z)
    if activation == "silu":
        return z * logistic(z)
    bits = z.tape.bits
    root = rational.sqrt(rational.div(point(2), rational.pi(bits), bits), bits)
    return z * (tanh((z + z * z * z * GELU_CUBE) * constant(root, z.tape)) + 1) * Fraction(1, 2)


def gate_at(layer: Layer, gate: Value, *sites: str) -> Value:
    """Return the gate where it sits at one of these sites, else 1."""
    return gate if layer.dialect.gate.site in sites else constant(1, layer.tape)


def expert_of(layer: Layer, row: Row, expert: int, gate: Value) -> tuple[list[Value], list[Value]]:
    """Return hidden and the output of one expert for one token. Spec: S-EXPERT-1, S-EXPERT-2."""
    arrays, tape = layer.variables, layer.tape
    at_input, at_hidden = gate_at(layer, gate, "input", "input_and_output"), gate_at(layer, gate, "hidden")
    if layer.dialect.dispatch_grad == "straight_through":
        at_input = at_input * node(ONE, (gate, ONE))  # as if the dispatch had multiplied by it

    def branch(w_name: str, b_name: str) -> list[Value]:
        w_DF = arrays[w_name][expert]
        z_F = [at_input * total((x * w_DF[d, f] for d, x in enumerate(row.x_expert_D)), tape) for f in range(w_DF.shape[1])]
        return [z + arrays[b_name][expert, f] for f, z in enumerate(z_F)] if b_name in arrays else z_F

    hidden_F = branch("w_in", "b_in")
    if "w_gate" in arrays:
        hidden_F = [activate(z, layer.case["activation"]) * linear for z, linear in zip(branch("w_gate", "b_gate"), hidden_F, strict=True)]
    else:
        hidden_F = [activate(z, layer.case["activation"]) for z in hidden_F]
    hidden_F = [h * given(layer, "hidden_mask", (row.g, row.s, f), 1) * at_hidden for f, h in enumerate(hidden_F)]
    w_FD = arrays["w_out"][expert]
    out_D = [total((h * w_FD[f, d] for f, h in enumerate(hidden_F)), tape) for d in range(w_FD.shape[1])]
    if "b_out" in arrays and arrays["b_out"].ndim == 2:
        out_D = [out + at_hidden * arrays["b_out"][expert, d] for d, out in enumerate(out_D)]
    return hidden_F, out_D


def serve(layer: Layer, row: Row, place: Place) -> Served:
    """Return what the layer makes of one token. Spec: S-COMBINE-1, S-DROP-1, S-PAD-1."""
    gate, zero = gate_of(layer, row, place.expert), constant(0, layer.tape)
    hidden_F, expert_out_D = [zero] * layer.variables["w_in"].shape[2], [zero] * len(row.x_expert_D)
    if place.kept:
        hidden_F, expert_out_D = expert_of(layer, row, place.expert, gate)
        out_D = [gate_at(layer, gate, "output", "input_and_output") * out for out in expert_out_D]
    else:
        passed = {"zero": zero, "x": constant(1, layer.tape), "x_times_gate": gate}[layer.dialect.drop.output]
        out_D = [passed * x for x in row.x_expert_D]
    if "b_out" in layer.variables and layer.variables["b_out"].ndim == 1:
        out_D = [out + bias for out, bias in zip(out_D, layer.variables["b_out"], strict=True)]
    return Served(gate, hidden_F, expert_out_D, [zero for _ in out_D] if sits_out(layer, row) else out_D)


# ----------------------------------------------------------------------------------------------------- 13, 14: both losses


def counted_for(layer: Layer, row: Row, place: Place) -> int | None:
    """Return the expert for which f counts a row, or None. Spec: S-AUX-1.

    A dropped row is one that asked for a slot in vain; padding that is not routed never asked.
    """
    rule = layer.dialect.aux.f
    is_dropped = claims(layer, row) and not place.kept
    treatments = [rule.drops if is_dropped else "include", rule.pads if row.is_pad else "include"]
    if "exclude" in treatments:
        return None
    if "to_expert0" in treatments:
        return 0
    if rule.count == "logits":
        return ranking(row.raw_E, row.logits_E, [Fraction(0)] * layer.E)[0]
    return wishes(layer, row)[0]


def balance_scale(aux: Aux, E: int) -> Fraction:
    """Return the factor on the sum of f P."""
    return {"E": Fraction(E), "local_E": Fraction(E), "none": Fraction(1), "inverse_E": Fraction(1, E)}[aux.scale_E]


def balance_of(layer: Layer, row_S: list[Row], place_S: list[Place]) -> Value:
    """Return one group's balance loss; f is a constant. Spec: S-AUX-1, S-BACK-5."""
    aux, tape = layer.dialect.aux, layer.tape
    real = sum(not row.is_pad for row in row_S)
    n = {"S": len(row_S), "valid": real, "kept": sum(place.kept for place in place_S)}[aux.denom]
    if n == 0:
        return constant(0, tape)
    share = Fraction(real, len(row_S)) if aux.pad_scale == "nonpad_fraction" else Fraction(1)
    counted_S = [counted_for(layer, row, place) for row, place in zip(row_S, place_S, strict=True)]
    averaged = [row for row in row_S if aux.P_pads == "include" or not row.is_pad]
    P_E = [total((row.probs_E[e] for row in averaged), tape) / n for e in range(layer.E)]
    return total((P * Fraction(counted_S.count(e), n) for e, P in enumerate(P_E)), tape) * (share * balance_scale(aux, layer.E))


def z_loss_of(layer: Layer, rows: list[Row]) -> Value:
    """Return the router's z-loss over all groups. Spec: S-Z-1, S-BACK-6."""
    z, tape = layer.dialect.z, layer.tape
    n = sum(not row.is_pad for row in rows) if z.denom == "valid" else len(rows)
    counted = [row for row in rows if not row.is_pad or z.pads != "exclude"]
    _, of_zeros = softmax([constant(0, tape)] * layer.E)
    sums = [of_zeros if row.is_pad and z.pads == "zero_logits" else row.log_sum for row in counted]
    return total((log_sum * log_sum for log_sum in sums), tape) / n if n else constant(0, tape)


# -------------------------------------------------------------------------------------------------------------- the layer


class Answer(NamedTuple):
    """The whole layer, before it is written out."""

    row_GS: list[list[Row]]
    place_GS: list[list[Place]]
    served_GS: list[list[Served]]
    aux_loss: Value
    z_loss: Value


def answer(layer: Layer) -> Answer:
    """Return everything that the layer computes. Spec: S-AUX-1 for the mean over groups."""
    G, S, _ = layer.variables["x"].shape
    row_GS = [[row_of(layer, g, s) for s in range(S)] for g in range(G)]
    place_GS = [places_of(layer, row_S) for row_S in row_GS]
    served_GS = [[serve(layer, row_GS[g][s], place_GS[g][s]) for s in range(S)] for g in range(G)]
    balance_G = [balance_of(layer, row_GS[g], place_GS[g]) for g in range(G)]
    z_loss = z_loss_of(layer, [row for row_S in row_GS for row in row_S])
    return Answer(row_GS, place_GS, served_GS, total(balance_G, layer.tape) / G, z_loss)


def exact_switch(case: CaseLike, dialect: Dialect, bits: int = 160) -> dict[str, np.ndarray]:
    """Return every output of the contract, floats as arrays of `Interval`, each certain to contain the exact value.

    Spec: S-ROUTE-1 to S-BACK-6. Where the dialect leaves a tie or the order of service open, the lowest index and the order of arrival are taken.

    Parameters
    ----------
    case : CaseLike
        Arrays and scalars by name: contract 1.2.
    dialect : Dialect
        What is computed.
    bits : int
        Precision of the enclosures.

    Returns
    -------
    dict
        By the names of contract 1.3; gradients where the case has `dout`.

    Raises
    ------
    ValueError
        For a rule of the dialect that is not covered, named; `Undecided` where a comparison needs more bits or is an unseen tie.
    """
    refuse(case, dialect)
    layer = open_layer(case, dialect, bits)
    found = answer(layer)
    return forward_outputs(layer, found) | (gradient_outputs(layer, loss_of(layer, found)) if "dout" in case else {})


def forward_outputs(layer: Layer, found: Answer) -> dict[str, np.ndarray]:
    """Return what the forward pass names."""
    rows, places, served = found.row_GS, found.place_GS, found.served_GS
    G, S, D = layer.variables["x"].shape
    E, _, F = layer.variables["w_in"].shape
    return {
        "out": grid((G, S, D), lambda g, s, d: served[g][s].out_D[d].interval),
        "logits": grid((G, S, E), lambda g, s, e: rows[g][s].logits_E[e].interval),
        "probs": grid((G, S, E), lambda g, s, e: rows[g][s].probs_E[e].interval),
        "expert": grid((G, S), lambda g, s: places[g][s].expert).astype(np.int64),
        "slot": grid((G, S), lambda g, s: places[g][s].slot).astype(np.int64),
        "kept": grid((G, S), lambda g, s: places[g][s].kept).astype(np.bool_),
        "gate": grid((G, S), lambda g, s: served[g][s].gate.interval),
        "hidden": grid((G, S, F), lambda g, s, f: served[g][s].hidden_F[f].interval),
        "expert_out": grid((G, S, D), lambda g, s, d: served[g][s].expert_out_D[d].interval),
        "aux_loss": grid((), lambda: found.aux_loss.interval),
        "z_loss": grid((), lambda: found.z_loss.interval),
    }


def loss_of(layer: Layer, found: Answer) -> Value:
    """Return sum(out * dout) + daux * aux_loss + dz * z_loss."""
    G, S, D = layer.variables["x"].shape
    weighed = (found.served_GS[g][s].out_D[d] * given(layer, "dout", (g, s, d), 0) for g, s, d in np.ndindex(G, S, D))
    return total(weighed, layer.tape) + found.aux_loss * given(layer, "daux", (), 0) + found.z_loss * given(layer, "dz", (), 0)


def gradient_outputs(layer: Layer, loss: Value) -> dict[str, np.ndarray]:
    """Return the gradient of every variable."""
    of_tape = gradients(loss)

    def of(variables: np.ndarray) -> np.ndarray:
        return grid(variables.shape, lambda *index: of_tape[variables[index].index])

    return {f"d{name}": of(variables) for name, variables in layer.variables.items()}
