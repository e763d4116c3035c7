# May import: standard library, numpy, refswitch.
"""Two oracles and the judge on one case: the reference in float64, the layer in exact rationals, and the judge's tubes.

    python conformance/two_oracles.py 5000             cases from seed 0 on, with a summary
    python conformance/two_oracles.py 200 --seed 7000

What must hold on every case. The integers of both oracles are equal. For every float that anybody looks at, the enclosure of the exact value lies
inside the tube that the judge draws under the `float64` profile, so does the reference, and the reference lies within the tube's radius of the exact
value. (Not the last of these for gradients where a relu's argument is 0 up to rounding: any slope in [0, 1] is right there, and the tube holds them
all.) The radius is derived in `spec/numbers.md`; nothing here is a tolerance. A case is left uncompared only where float64 may take another route
than exact arithmetic (two scores or gates whose tubes touch) and did so, or where no enclosure decides a comparison: those are counted.
Exit status: 0 if everything holds, 1 otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from refswitch.config import TRUTH, Dialect
from refswitch.numbers.rational import Interval
from refswitch.proof.exact_rows import COVERED, refuse
from refswitch.proof.exact_switch import exact_switch
from refswitch.proof.tape import Undecided
from refswitch.reference.capacity import Route
from refswitch.spec_data import load_dialect, load_profile, names_of
from refswitch.verify import layer as stages
from refswitch.verify.case import INPUTS, OUTPUTS, Case
from refswitch.verify.cases import ACTIVATIONS, RULED_OUT, Target
from refswitch.verify.gradients import Forward, gradient_tubes
from refswitch.verify.layer import Layer
from refswitch.verify.oracle import FACTOR_NOISE, reference_outputs
from refswitch.verify.route import admissible_choices, order_is_certain
from refswitch.verify.tubes import Tube, exact

FLOAT64 = load_profile("float64")
DISCRETE = ("expert", "slot", "kept")
NEVER_DROPS = ("inf", "max_count")  # their capacity is max(S, 1) by contract 1.4

# What a record leaves to the run, both ways.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "praxis_topk1": ({"pad.zero_input": False}, {"pad.zero_input": True}),
    "vllm_reference": ({"gate.value": "p"}, {"gate.value": "one"}),
}
KNOBS: dict[str, tuple[Any, ...]] = COVERED | {
    "router.bias": (False, True),
    "router.logit_cap": (0.0, 3.0),
    "select.choices": (1, 2, 4),
    "expert.glu": (False, True),
}
BITS = (160, 640, 2560)  # of the enclosures; the next one where a comparison was undecided
UNDERFLOW = 2.0**-900  # a radius below is that of underflow alone: smallest normal numbers (2**-1022) times the factors behind them
WIDE = 2.0**-20  # a radius above this share of an array's largest number is that of a relu at 0, whose slope is any in [0, 1]


class Drawn(NamedTuple):
    """A case and the dialect that it is computed under."""

    case: Case
    dialect: Dialect
    kind: str  # of numbers: what `_numbers` draws


# ---------------------------------------------------------------------------------------------------------------- dialects


def with_knobs(dialect: Dialect, knobs: dict[str, Any]) -> Dialect:
    """Return the dialect with these knobs, unchecked: `spec_data.with_knob` takes 10 ms for each."""

    def replaced(record: Any, path: list[str], value: Any) -> Any:
        inner = value if len(path) == 1 else replaced(getattr(record, path[0]), path[1:], value)
        return dataclasses.replace(record, **{path[0]: inner})

    for knob, value in knobs.items():
        dialect = replaced(dialect, knob.split("."), value)
    return dialect


def covered(dialect: Dialect) -> str | None:
    """Return why the exact oracle refuses a dialect, or None."""
    try:
        refuse({}, dialect)
    except ValueError as refused:
        return str(refused)
    return None


def subjects() -> list[tuple[str, Dialect]]:
    """Return every record that the exact oracle covers, with both answers where the record leaves a setting to the run."""
    found = []
    for name in names_of("dialects"):
        for setting in SETTINGS.get(name, ({},)):
            dialect = with_knobs(load_dialect(name), setting)
            if covered(dialect) is None:
                found.append((name, dialect))
    return found


SUBJECTS = subjects()


# Knobs that mean something only together: drawn one by one they would hardly ever meet.
TOGETHER: tuple[dict[str, tuple[Any, ...]], ...] = (
    {"select.rule": ("ntlb",), "select.choices": (1, 2, 4), "priority": ("position",)},
    {"select.rule": ("sample",), "aux.f.count": ("choice", "logits")},
    {"noise.kind": ("z_add_normal",), "noise.gate_from": ("clean",), "aux.f.count": ("choice", "logits"), "select.rule": ("argmax", "ntlb")},
    {"expert.glu": (True,), "expert.bias": ("per_expert",)},
    {"noise.kind": ("x_mul_uniform", "x_dropout"), "noise.gate_from": ("noisy",), "noise.leak_to_experts": ("never", "if_same_dtype")},
    {"gate.site": ("hidden", "input", "input_and_output"), "gate.value": ("p", "sigmoid"), "dispatch_grad": ("none", "straight_through")},
)


def _draw_dialect(random: np.random.Generator) -> Dialect:
    """Return a record, half of the time with one to six knobs turned, a quarter of the time with knobs that belong together."""
    while True:
        dialect = SUBJECTS[random.integers(len(SUBJECTS))][1]
        if random.random() < 0.5:
            names = random.choice(list(KNOBS), size=random.integers(1, 7), replace=False)
            dialect = with_knobs(dialect, {knob: KNOBS[knob][random.integers(len(KNOBS[knob]))] for knob in map(str, names)})
        if random.random() < 0.25:
            together = TOGETHER[random.integers(len(TOGETHER))]
            dialect = with_knobs(dialect, {knob: values[random.integers(len(values))] for knob, values in together.items()})
        if dialect.noise.gate_from == "clean" and dialect.noise.kind in FACTOR_NOISE:
            continue  # a factor leaves no clean logits: `load_dialect` refuses it
        if covered(dialect) is None:
            return dialect


# --------------------------------------------------------------------------------------------------------------------- data


def _numbers(random: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    """Return numbers of a kind: quarters (exact in every float, with ties and zeros), or normal ones, small, plain or large."""
    if kind == "quarters":
        return random.integers(-6, 7, shape) / 4.0
    return random.standard_normal(shape) * {"plain": 1.0, "small": 2.0**-9, "large": 8.0}[kind]


def _router(random: np.random.Generator, kind: str, x_GSD: np.ndarray, E: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and w_router; some routers tie by columns that repeat, some send every token to one expert."""
    D = x_GSD.shape[-1]
    w_DE = _numbers(random, kind, D, E)
    manner = random.choice(["free", "free", "repeat", "one"])
    if manner == "repeat":
        w_DE = w_DE[:, random.integers(0, E, E)]
    if manner == "one":
        w_DE[:, -1] = np.where(w_DE[:, -1] < 0.0, -1.0, 1.0) * np.abs(w_DE).max(axis=1, initial=0.25)
        x_GSD = np.abs(x_GSD) * np.sign(w_DE[:, -1])
    return x_GSD, w_DE


def _noises(random: np.random.Generator, kind: str, dialect: Dialect, shape: tuple[int, ...], first_GSE: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the dialect's noise, choice and priority read."""
    G, S, D, E = shape
    found: dict[str, np.ndarray] = {}
    if dialect.noise.kind != "none" and random.random() < 0.75:
        if dialect.noise.kind == "x_dropout":
            found["noise"] = (random.random((G, S, D)) >= 0.25) / (0.75 if kind != "quarters" else 0.5)
        elif dialect.noise.kind in FACTOR_NOISE:
            found["noise"] = 1.0 + _numbers(random, kind, G, S, D) / 4.0
        else:
            found["noise"] = _numbers(random, kind, G, S, E)
    if dialect.select.rule == "sample":
        found["select_noise"] = _numbers(random, kind, G, S, E)
    if dialect.select.rule == "second_place":
        found["select_noise"] = RULED_OUT * (first_GSE & (random.random((G, S, 1)) < 0.5) & (E > 1))
    if dialect.priority == "random":
        found["priority"] = np.argsort(random.random((G, S)), axis=-1, kind="stable")
    return found


def _biases(random: np.random.Generator, kind: str, dialect: Dialect, E: int, D: int, F: int) -> dict[str, np.ndarray]:
    """Return the biases that the dialect has."""
    found = {"b_router": _numbers(random, kind, E)} if dialect.router.bias else {}
    if dialect.expert.bias == "shared_out":
        found["b_out"] = _numbers(random, kind, D)
    if dialect.expert.bias == "per_expert":
        found |= {"b_in": _numbers(random, kind, E, F), "b_out": _numbers(random, kind, E, D)}
        if dialect.expert.glu:
            found["b_gate"] = _numbers(random, kind, E, F)
    return found


def _padding(random: np.random.Generator, dialect: Dialect, x_GSD: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return x with its padding rows, and which rows those are."""
    G, S, _ = x_GSD.shape
    manner = random.choice(["none", "right", "scattered", "all"], p=[0.4, 0.2, 0.3, 0.1])
    if manner == "none":
        return x_GSD, {}
    chance = {"right": np.arange(S) >= random.integers(S + 1), "scattered": random.random((G, S)) < 0.4, "all": True}[manner]
    valid_GS = ~np.broadcast_to(chance, (G, S))
    large = random.choice([0.0, 1.0, 1000.0 if dialect.pad.zero_input is True else 1.0])
    return np.where(valid_GS[..., None], x_GSD, large * x_GSD), {"valid": valid_GS.copy()}


def draw(seed: int) -> Drawn:
    """Draw a dialect, a structure and its numbers."""
    random = np.random.Generator(np.random.Philox(seed))
    dialect = _draw_dialect(random)
    G, S, D, E, F = (int(random.integers(low, high)) for low, high in ((1, 3), (0, 6), (1, 4), (1, 5), (1, 4)))
    kind = str(random.choice(["plain", "plain", "quarters", "quarters", "small", "large"]))
    x_GSD, w_router_DE = _router(random, kind, _numbers(random, kind, G, S, D), E)
    first_GSE = np.argmax(x_GSD @ w_router_DE, axis=-1)[..., None] == np.arange(E)
    arrays = {"w_router": w_router_DE, "w_in": _numbers(random, kind, E, D, F), "w_out": _numbers(random, kind, E, F, D)}
    arrays |= _noises(random, kind, dialect, (G, S, D, E), first_GSE) | _biases(random, kind, dialect, E, D, F)
    if dialect.expert.glu:
        arrays["w_gate"] = _numbers(random, kind, E, D, F)
    if S and random.random() < 0.25:
        x_GSD[:, random.integers(S)] = 0.0
    arrays["x"], valid = _padding(random, dialect, x_GSD)
    if random.random() < 0.3:
        arrays["hidden_mask"] = (random.random((G, S, F)) >= 0.25) / 0.75
    daux, dz = random.choice([0.0, 1.0, -0.5, 0.375], size=2)
    arrays |= valid | {"dout": _numbers(random, "plain", G, S, D), "daux": np.asarray(daux), "dz": np.asarray(dz)}
    capacity = int(random.integers(S + 2)) if random.random() < 0.5 else min(int(random.integers(3)), S + 1)
    if dialect.capacity.expr in NEVER_DROPS:
        capacity = max(S, 1)
    scalars = {
        "capacity": capacity, "capacity_factor": "1.25", "top_k": 1, "train": True, "activation": ACTIVATIONS[dialect.expert.act], "wants": (),
    }  # fmt: skip
    return Drawn(Case(scalars, arrays), dialect, kind)


# ---------------------------------------------------------------------------------------------------------------- the judge


class Witness(NamedTuple):
    """What the reference and the judge say of a case."""

    reference: dict[str, np.ndarray]
    tubes: dict[str, Tube]  # of every float, along the reference's route, nothing being exported
    is_ambiguous: bool  # whether roundings of float64 may change the route
    is_any_slope: bool  # whether a relu's argument is 0 up to rounding
    looked_at: dict[str, np.ndarray]  # rows of which an output is looked at; not named: all


def witness(drawn: Drawn, forward: Callable[..., Any] | None = None, backward: Callable[..., Any] | None = None) -> Witness:
    """Run the reference, or another layer of its signature, and the judge."""
    case, dialect, _ = drawn
    outputs = reference_outputs(case, dialect, TRUTH, forward, backward)
    kept_GS = outputs["kept"]
    layer = stages.prepare_layer(case, Target(dialect, FLOAT64, frozenset(), {}))
    rows_GS = ~layer.sits_out_GS
    # As the judge: under ntlb a token that nobody took has asked several experts, so that its slot is not looked at.
    looked_at = {"hidden": kept_GS, "expert_out": kept_GS, "expert": rows_GS, "gate": rows_GS}
    looked_at |= {"slot": kept_GS if dialect.select.rule == "ntlb" else rows_GS}
    if not case.sizes["S"]:
        return Witness(outputs, {name: exact(np.zeros(np.shape(array))) for name, array in outputs.items()}, False, False, looked_at)
    return Witness(outputs, *_judged(layer, Route(outputs["expert"], outputs["slot"], kept_GS)), looked_at)


def _judged(layer: Layer, route: Route) -> tuple[dict[str, Tube], bool, bool]:
    x_router, x_expert = stages.noise_stage(layer)
    logits, raw = stages.logits_stage(layer, x_router)
    probs = stages.probs_stage(layer, logits)
    scores = stages.scores_stage(layer, probs, logits)
    gate = stages.gate_stage(layer, probs, logits, route.expert_GS)
    expertise = stages.hidden_stage(layer, x_expert, gate, route)
    expert_out = stages.expert_out_stage(layer, expertise, route)
    counts = stages.counts_of(layer, route, logits, scores)
    z_loss, lse_GS, weight_GS = stages.z_stage(layer, logits)
    found = {
        "out": stages.out_stage(layer, expert_out, gate, x_expert, route),
        "logits": logits,
        "probs": probs,
        "gate": gate,
        "hidden": stages.unpack_tube(expertise.hidden_GECF, route),
        "expert_out": expert_out,
        "aux_loss": stages.aux_stage(layer, probs, counts, route),
        "z_loss": z_loss,
    }
    forward = Forward(x_router, x_expert, raw, logits, probs, gate, route, expertise, expert_out, counts, lse_GS, weight_GS)
    found |= {f"d{name}": tube for name, tube in gradient_tubes(layer, forward).items()}
    z_act = stages.unpack_tube(expertise.z_act_GECF, route)
    at_0_GSF = (np.abs(z_act.value) <= z_act.radius) & (z_act.radius > 0.0) & (layer.case.activation == "relu")
    return found, _may_go_elsewhere(layer, scores, logits, gate), bool(at_0_GSF.any())


def _may_go_elsewhere(layer: Layer, scores: Tube, logits: Tube, gate_GS: Tube) -> bool:
    """Whether roundings of float64 may change the choice of a token, the order of its choices or the order by gate."""
    several_GS = admissible_choices(layer, scores, logits).admissible_GSE.sum(axis=-1) > 1
    if (several_GS & ~layer.sits_out_GS).any():
        return True
    if layer.target.dialect.select.rule == "ntlb" and not order_is_certain(layer, scores):
        return True
    if layer.target.dialect.priority != "gate_desc":
        return False
    distance_GSS = np.abs(gate_GS.value[:, :, None] - gate_GS.value[:, None])
    touch_GSS = (distance_GSS <= gate_GS.radius[:, :, None] + gate_GS.radius[:, None]) & (gate_GS.radius[:, :, None] > 0.0)
    return bool((touch_GSS & ~np.eye(touch_GSS.shape[-1], dtype=bool)).any())


# --------------------------------------------------------------------------------------------------------------- comparison


class Summary(NamedTuple):
    """What was seen over many cases; the shares are of a tube's radius, by output."""

    counts: Counter[str]
    tube_share: dict[str, list[float]]  # |tube value - exact| / radius
    reference_share: dict[str, list[float]]  # |reference - exact| / radius
    relative: dict[str, list[float]]  # radius / largest |exact| of the array


def new_summary() -> Summary:
    """Return a summary of nothing."""
    return Summary(Counter(), {}, {}, {})


def farthest(interval: Interval, value: float) -> Fraction:
    """Return the largest distance that a number of the interval can have from a float."""
    middle = Fraction(value)
    return max(abs(middle - interval.low), abs(interval.high - middle))


def share(interval: Interval, value: float, radius: float) -> float:
    """Return the largest distance / radius, above 1 exactly where a number of the interval is farther from the value than the radius."""
    if not np.isfinite(value):
        return float("inf")
    distance = farthest(interval, value)
    if distance == 0 or np.isinf(radius):
        return 0.0
    if distance > Fraction(radius):
        return max(float(distance / Fraction(radius)), float(np.nextafter(1.0, 2.0))) if radius else float("inf")
    return min(float(distance / Fraction(radius)), 1.0)


def _where(name: str, index: tuple[int, ...]) -> str:
    letters = (OUTPUTS[name] if name in OUTPUTS else INPUTS[name[1:]])[-len(index) :] if index else ""
    return f"{name}[{', '.join(f'{letter.lower()}={i}' for letter, i in zip(letters, index, strict=True))}]"


def _elements(name: str, of: Witness, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the places of an output that are looked at."""
    mask = of.looked_at.get(name, np.ones((), bool))
    mask = np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)
    return [index for index in np.ndindex(*shape) if mask[index]]


def different_integers(mine: dict[str, np.ndarray], of: Witness) -> list[str]:
    """Return where the routes differ."""
    found = []
    for name in DISCRETE:
        bad = [index for index in _elements(name, of, mine[name].shape) if mine[name][index] != of.reference[name][index]]
        found += [f"{_where(name, at)}: exact {mine[name][at]}, reference {of.reference[name][at]}" for at in bad[:1]]
    return found


def different_floats(name: str, mine: np.ndarray, of: Witness, summary: Summary) -> list[str]:
    """Return where an exact value lies outside of the tube, or the reference farther from it than the radius."""
    other, tube, found = np.asarray(of.reference[name]), of.tubes[name], list[str]()
    if not mine.shape == other.shape == tube.value.shape:
        return [f"{name}: shapes exact {mine.shape}, reference {other.shape}, tube {tube.value.shape}"]
    largest = max((abs(end) for interval in mine.flat for end in interval), default=Fraction(0))
    for index in _elements(name, of, mine.shape):
        interval, value, radius, got = mine[index], float(tube.value[index]), float(tube.radius[index]), float(other[index])
        of_tube, of_reference = share(interval, value, radius), share(interval, got, radius)
        is_inside = share(Interval(Fraction(got), Fraction(got)), value, radius) <= 1.0 if np.isfinite(got) else False
        is_near = of_reference <= 1.0 or (of.is_any_slope and name not in OUTPUTS)
        _note(summary, name, of_tube, of_reference, radius, largest)
        if of_tube > 1.0 or not is_inside or not is_near:
            width = float(interval.high - interval.low)
            numbers = f"exact {float(interval.low)!r} (width {width:.1e}), reference {got!r}, tube {value!r} with radius {radius!r}"
            found.append(f"{_where(name, index)}: {numbers}; shares: tube {of_tube:.3g}, reference {of_reference:.3g}")
    return found[:3]


def _note(summary: Summary, name: str, of_tube: float, of_reference: float, radius: float, largest: Fraction) -> None:
    summary.counts["numbers"] += 1
    if np.isinf(radius):
        summary.counts["vacuous radii"] += 1
    elif radius == 0.0:
        summary.counts["known exactly"] += 1
    elif radius < UNDERFLOW:
        summary.counts["known but for underflow"] += 1
    elif Fraction(radius) > largest * Fraction(WIDE):
        summary.counts["relu at 0"] += 1
    else:
        for shares, value in ((summary.tube_share, of_tube), (summary.reference_share, of_reference), (summary.relative, radius / float(largest))):
            shares.setdefault(name, []).append(value)


def exactly(case: Case, dialect: Dialect) -> dict[str, np.ndarray]:
    """Return the exact oracle's outputs, with as many bits as its comparisons need."""
    for bits in BITS[:-1]:
        try:
            return exact_switch(case, dialect, bits)
        except Undecided:
            continue
    return exact_switch(case, dialect, BITS[-1])


def disagreements(mine: dict[str, np.ndarray], of: Witness, summary: Summary) -> list[str]:
    """Return every way in which the exact outputs, the reference and the judge disagree on one case."""
    if set(mine) != set(of.reference):
        return [f"names: exact {sorted(mine)}, reference {sorted(of.reference)}"]
    integers = different_integers(mine, of)
    if integers and of.is_ambiguous:
        summary.counts["ambiguous and different"] += 1
        return []
    return integers or [line for name in mine if name not in DISCRETE for line in different_floats(name, mine[name], of, summary)]


def run(seeds: range, summary: Summary, every: float = 0.0) -> list[str]:
    """Compare the cases of these seeds; return what disagrees, a line each."""
    failures, started = [], time.monotonic()
    for seed in seeds:
        drawn = draw(seed)
        summary.counts["cases"] += 1
        try:
            found = disagreements(exactly(drawn.case, drawn.dialect), witness(drawn), summary)
        except Undecided as undecided:
            summary.counts[f"undecided (seed {seed}: {undecided})"] += 1
            continue
        summary.counts["cases without tokens"] += not drawn.case.sizes["S"]
        failures += [f"seed {seed} ({drawn.dialect.name}, {drawn.kind}, {drawn.case.sizes}): {line}" for line in found]
        if every and time.monotonic() - started > every:
            print(f"{summary.counts['cases']} of {len(seeds)}, {len(failures)} disagree", flush=True)
            started = time.monotonic()
    return failures


def table(summary: Summary) -> str:
    """Return the summary as text: median and largest share of the radius, and the median radius against the array's largest number."""
    lines = [", ".join(f"{name} {count}" for name, count in summary.counts.items())]
    lines.append(f"{'':<12}{'':>9}{'|tube - exact| / radius':>26}{'|reference - exact| / radius':>32}{'radius / largest':>20}")
    lines.append(f"{'output':<12}{'numbers':>9}{'median':>17}{'largest':>9}{'median':>23}{'largest':>9}{'median':>20}")
    for name, shares in summary.tube_share.items():
        tube, reference, relative = np.array(shares), np.array(summary.reference_share[name]), np.array(summary.relative[name])
        lines.append(
            f"{name:<12}{len(tube):>9}{np.median(tube):>17.2g}{tube.max():>9.2g}{np.median(reference):>23.2g}{reference.max():>9.2g}"
            f"{np.median(relative):>20.1e}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=int, help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args()
    for name in names_of("dialects"):
        reasons = [covered(with_knobs(load_dialect(name), setting)) for setting in SETTINGS.get(name, ({},))]
        print(f"{name}: {'covered' if reasons[0] is None else reasons[0]}{', given the setting of the run' if name in SETTINGS else ''}")
    summary = new_summary()
    failures = run(range(options.seed, options.seed + options.cases), summary, every=10.0)
    print(table(summary))
    print("\n".join(failures[:40]) if failures else "no disagreement")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
