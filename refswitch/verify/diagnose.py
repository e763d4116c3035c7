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
from refswitch.spec_data import knobs_of, load_knobs, with_knob
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


def _flattened(array: np.ndarray, letters: str) -> np.ndarray:
    return array.reshape(1, -1, *array.shape[2:]) if letters.startswith("GS") else array


def _replayed(knob: str, value: object, target: Target, prepared: Prepared, outputs: Outputs) -> tuple[Prepared, Target, Outputs]:
    """Return the case, target and outputs as they stand under another knob value."""
    case, dialect = prepared.case, with_knob(target.dialect, knob, value)
    scalars, arrays = dict(case.scalars), dict(case.arrays)
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


def _failing(verdicts: Verdicts) -> set[tuple[str, str]]:
    return {(check.clause, check.output) for check in verdicts.checks if not check.ok}


def _explains(knob: str, value: object, target: Target, verdict: Verdicts, outputs: Outputs, clauses: set[str]) -> bool:
    again = judge_case(*_replayed(knob, value, target, verdict.case, outputs))
    left, before = _failing(again), _failing(verdict)
    mended = not any(clause in clauses for clause, _ in left)
    return mended and left <= before


def diagnose(finding: Finding, verdicts: Sequence[Verdicts], outputs: dict[str, Outputs], target: Target) -> list[Diagnosis]:
    """Return the knob values that explain a finding, the best first.

    Agreement is the share of replayed failing cases in which the value makes the finding's checks right and breaks nothing.
    """
    by_case = {verdict.case.name: verdict for verdict in verdicts}
    clauses = {check.clause for check in finding.checks}
    names = sorted({check.case for check in finding.checks if check.case in by_case}, key=lambda name: (by_case[name].case.case.x.size, name))
    failing = [by_case[name] for name in names[:CASES_REPLAYED]]
    right = sorted((verdict for verdict in verdicts if not _failing(verdict)), key=lambda verdict: (verdict.case.case.x.size, verdict.case.name))
    tagged = [verdict for verdict in right if verdict.case.recipe.tags]
    controls = [*tagged[: CONTROLS_REPLAYED - 1], *right[:1]]
    found = []
    for knob, value, says, stage in alternatives(target.dialect):
        agreeing = sum(_explains(knob, value, target, verdict, outputs[verdict.case.name], clauses) for verdict in failing)
        # Where nothing is ever dropped a case has a slot for everyone, so a case with fewer slots cannot speak against that value.
        fair = [control for control in controls if value != "inf" or control.case.case.capacity >= control.case.case.sizes["S"]]
        if agreeing and all(_explains(knob, value, target, control, outputs[control.case.name], set()) for control in fair):
            shown = str(value).lower() if isinstance(value, bool) else value
            found.append(Diagnosis(f"{knob}={shown}", agreeing / len(failing), says, stage))
    return sorted(found, key=lambda diagnosis: -diagnosis.agreement)[:KEPT_DIAGNOSES]


def merge(findings: Sequence[Finding]) -> list[Finding]:
    """Join findings that one and the same knob value explains fully: they are one fault, seen at several stages."""
    result: list[Finding] = []
    for finding in findings:
        best = finding.diagnosis[0] if finding.diagnosis else None
        twin = next(
            (
                other
                for other in result
                if best and best.agreement == 1.0 and any(d.name == best.name and d.agreement == 1.0 for d in other.diagnosis)
            ),
            None,
        )
        if twin is None:
            result.append(finding)
        else:
            twin.checks += finding.checks
    return result
