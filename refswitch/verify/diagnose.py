# May import: standard library, numpy, refswitch.spec_data, refswitch.config, refswitch.verify (below).
"""What it computes instead: each knob is turned to each other value, and what failed is judged again.

A value explains a finding in a case if the finding's check passes under it and nothing else begins to fail. It must also leave the cases
alone that were right. Spec: decisions. Next: `run`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from refswitch.config import Dialect
from refswitch.reference.capacity import capacity_in_eval, capacity_of
from refswitch.spec_data import knobs_of, load_knobs, load_mistakes, with_knob
from refswitch.verify.case import GRADIENTS, INPUTS, OUTPUTS, Case
from refswitch.verify.cases import ACTIVATIONS, Prepared, Target
from refswitch.verify.decode import Outputs
from refswitch.verify.findings import Diagnosis, Finding
from refswitch.verify.judge import Verdicts, judge_case

CASES_REPLAYED = 5  # failing cases per finding, the smallest first
CONTROLS_REPLAYED = 4  # cases that were right
KEPT_DIAGNOSES = 3


def alternatives(dialect: Dialect) -> Iterator[tuple[str, object, str, str]]:
    """Yield (knob, value, what it says, stage) for every value that the dialect does not have."""
    current = knobs_of(dialect)
    for knob, entry in load_knobs().items():
        for value, says in entry["says"].items():
            if current[knob] != value:
                yield knob, value, says, entry["stage"]
    for mistake, entry in load_mistakes().items():
        knob, value = mistake.split("=")
        yield knob, value, entry["says"], entry["stage"]


def _flattened(array: np.ndarray, letters: str) -> np.ndarray:
    return array.reshape(1, -1, *array.shape[2:]) if letters.startswith("GS") else array


def _replayed(knob: str, value: object, target: Target, prepared: Prepared, outputs: Outputs) -> tuple[Prepared, Target, Outputs]:
    """Return the case, target and outputs as they stand under another knob value."""
    case = prepared.case
    scalars, arrays = dict(case.scalars), dict(case.arrays)
    if (knob, value) == ("priority", "reversed"):
        G, S = case.sizes["G"], case.sizes["S"]
        arrays["priority"] = np.broadcast_to(np.arange(S)[::-1], (G, S))
        knob, value = "priority", "random"
    if knob == "capacity":
        scalars["capacity"] = max(scalars["capacity"] + {"C+1": 1, "C-1": -1}[str(value)], 0)
        return Prepared(prepared.recipe, Case(scalars, arrays)), target, outputs
    dialect = with_knob(target.dialect, knob, value)
    if knob == "capacity.expr":
        S, E = case.sizes["S"], case.sizes["E"]
        rule = dialect.capacity
        if value == "inf":
            scalars["capacity"] = max(S, 1)
        elif "own_capacity" in target.features:
            scalars["capacity"] = capacity_of(S, E, case.capacity_factor, rule) if case.train else capacity_in_eval(S, E, rule)
    if knob == "expert.act":
        scalars["activation"] = ACTIVATIONS[str(value)]
    if knob == "noise.kind":
        arrays.pop("noise", None)
    if knob == "group.rule":
        arrays = {name: _flattened(array, INPUTS[name]) for name, array in arrays.items()}
        letters = OUTPUTS | {f"d{name}": INPUTS[name] for name in GRADIENTS}
        # Slots and survivors are counted over the whole call; the flattened arrays are the same tokens in the same order.
        outputs = {name: _flattened(array, letters[name]) for name, array in outputs.items()}
    return Prepared(prepared.recipe, Case(scalars, arrays)), target._replace(dialect=dialect), outputs


def _left(knob: str, value: object, target: Target, verdict: Verdicts, outputs: Outputs) -> set[tuple[str, str]]:
    """Return what still fails, or fails anew, under another value."""
    return judge_case(*_replayed(knob, value, target, verdict.case, outputs)).failing


def diagnose(finding: Finding, verdicts: Sequence[Verdicts], outputs: dict[str, Outputs], target: Target) -> list[Diagnosis]:
    """Return the knob values that explain a finding, the best first.

    Agreement is the share of replayed failing cases in which the value makes the finding's checks right and breaks nothing.
    """
    by_case = {verdict.case.name: verdict for verdict in verdicts}
    clauses = {check.clause for check in finding.checks}
    names = sorted({check.case for check in finding.checks if check.case in by_case}, key=lambda name: (by_case[name].case.case.x.size, name))
    failing = [by_case[name] for name in names[:CASES_REPLAYED]]
    right = sorted((verdict for verdict in verdicts if not verdict.failing), key=lambda verdict: (verdict.case.case.x.size, verdict.case.name))
    tagged = [verdict for verdict in right if verdict.case.recipe.tags]
    controls = [*tagged[: CONTROLS_REPLAYED - 1], *right[:1]]
    found = []
    for knob, value, says, stage in alternatives(target.dialect):
        left = [_left(knob, value, target, verdict, outputs[verdict.case.name]) for verdict in failing]
        explained = [
            not any(clause in clauses for clause, _ in remaining) and remaining <= verdict.failing
            for remaining, verdict in zip(left, failing, strict=True)
        ]
        # Where nothing is ever dropped a case has a slot for everyone, so a case with fewer slots cannot speak against that value.
        fair = [control for control in controls if value != "inf" or control.case.case.capacity >= control.case.case.sizes["S"]]
        if any(explained) and not any(_left(knob, value, target, control, outputs[control.case.name]) for control in fair):
            shown = str(value).lower() if isinstance(value, bool) else value
            mended = sum(not remaining for remaining in left)
            found.append(Diagnosis(f"{knob}={shown}", sum(explained) / len(failing), says, stage, mended / len(failing)))
    # What explains everything comes first; "unspecified" allows so much that it is no explanation where another one is as good.
    return sorted(found, key=lambda item: (-item.agreement, -item.mended, item.name.endswith("=unspecified")))[:KEPT_DIAGNOSES]


def merge(findings: Sequence[Finding]) -> list[Finding]:
    """Join findings whose best explanation is one and the same knob value: they are one fault, seen at several stages."""
    by_cause: dict[str, Finding] = {}
    for number, finding in enumerate(findings):
        explained = finding.diagnosis and finding.diagnosis[0].agreement == 1.0
        twin = by_cause.setdefault(finding.diagnosis[0].name if explained else f"unexplained {number}", finding)
        if twin is not finding:
            twin.checks += finding.checks
    return list(by_cause.values())
