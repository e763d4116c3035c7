# May import: standard library, numpy, refswitch.spec_data, refswitch.config, refswitch.verify (below).
"""From checks to clauses and findings: one finding per fault, the first divergent stage first.

A failing check is a proof only where what it was judged on is right: a gradient in a case whose forward pass already failed says nothing
new, and a stage that fails only in cases with noise is the noise's fault. Spec: contract 2. Next: `diagnose`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refswitch.config import rounding_points
from refswitch.numbers.precision import FORMATS
from refswitch.spec_data import knobs_of, load_clauses
from refswitch.verify.cases import Target
from refswitch.verify.judge import STAGES, Check, Verdicts

AMBIGUITY_BUDGET = 0.01  # share of tokens with several admissible choices above which the choice is not judged
BEFORE_EXPERTS = ("router", "softmax", "select")
FROM_EXPERTS = ("dispatch", "expert", "gate", "combine", "drop")


@dataclass
class Diagnosis:
    """A knob value or mutant under which what failed is right."""

    name: str
    agreement: float
    says: str
    stage: str
    mended: float  # share of the replayed failing cases in which nothing at all fails any more

    @property
    def is_full(self) -> bool:
        """Whether it explains everything that was replayed."""
        return self.agreement == self.mended == 1.0


@dataclass
class Finding:
    """One fault: the clause it breaks, an element that shows it, and what it may be."""

    clause: str
    stage: str
    checks: list[Check]
    text: str = ""
    diagnosis: list[Diagnosis] = field(default_factory=list)

    @property
    def first(self) -> Check:
        """The check that is shown: of the case that is easiest to read, the fewest elements first."""
        return min(self.checks, key=lambda check: ("ties" in check.case, check.elements, check.case))


@dataclass
class ClauseStatus:
    """What is known of a clause."""

    status: str  # pass, fail, inconclusive, unsupported
    checks: int
    worst: float
    why: str = ""


def _stage_order(finding: Finding) -> int:
    return STAGES.index(finding.stage)


def _attributed(clause: str, failing: list[Check], every: list[Check], tags: dict[str, frozenset[str]]) -> tuple[str, str]:
    """Return the clause and stage to blame, given the regimes in which the clause fails and those in which it holds."""
    stage = failing[0].stage
    passing_without = {tag: any(check.ok and tag not in tags[check.case] for check in every) for tag in ("noise", "padding")}

    def only_with(tag: str) -> bool:
        return all(tag in tags[check.case] for check in failing) and passing_without[tag]

    if only_with("noise") and stage in BEFORE_EXPERTS:
        return "S-NOISE-1", "noise"
    if only_with("noise") and stage in FROM_EXPERTS:
        return "S-NOISE-2", "noise"
    if only_with("padding") and stage in ("capacity", "position"):
        return "S-PAD-2", "padding"
    return clause, stage


def collect(verdicts: Sequence[Verdicts]) -> list[Finding]:
    """Return the findings of all cases, before diagnosis.

    Gradients are left out where the same case's forward pass failed: there they were judged on what is already known to be wrong.
    """
    tags = {verdict.case.name: verdict.case.recipe.tags for verdict in verdicts}
    forward_failed = {verdict.case.name for verdict in verdicts if verdict.forward_fails}
    by_clause: dict[str, list[Check]] = defaultdict(list)
    for verdict in verdicts:
        for check in verdict.checks:
            if check.stage != "backward" or check.case not in forward_failed:
                by_clause[check.clause].append(check)
    merged: dict[tuple[str, str], list[Check]] = defaultdict(list)
    for clause, checks in by_clause.items():
        failing = [check for check in checks if not check.ok]
        if failing:
            merged[_attributed(clause, failing, checks, tags)] += failing
    texts = load_clauses()
    findings = [Finding(clause, stage, checks, text=texts[clause]["text"]) for (clause, stage), checks in merged.items()]
    return sorted(findings, key=lambda finding: (_stage_order(finding), finding.clause))


def applies(clause: dict[str, Any], target: Target) -> bool:
    """Whether the dialect's knobs and the profile are those under which the clause holds."""
    knobs = knobs_of(target.dialect)
    if any(knobs[knob] not in values for knob, values in clause.get("holds", {}).items()):
        return False
    if clause.get("feature") == "noise" and target.dialect.noise.kind == "none":
        return False
    points = rounding_points(target.dialect, target.profile)
    stored = (points.out, points.hidden, points.expert_out, points.gate)
    narrow = any(format.precision < FORMATS["float32"].precision for format in stored)
    return narrow or clause.get("profile") != "narrow"


def statuses(
    verdicts: Sequence[Verdicts], findings: Sequence[Finding], target: Target, ambiguous: float, missing: Sequence[str]
) -> dict[str, ClauseStatus]:
    """Return what is known of every clause that applies; `missing` are outputs that a declared feature promises and that never came.

    Spec: contract 2.
    """
    checks = [check for verdict in verdicts for check in verdict.checks]
    evidence = set().union(*(verdict.evidence for verdict in verdicts)) if verdicts else set()
    forward_failed = {verdict.case.name for verdict in verdicts if verdict.forward_fails}
    tags = {verdict.case.name: verdict.case.recipe.tags for verdict in verdicts}
    blamed = {finding.clause: finding for finding in findings}
    result: dict[str, ClauseStatus] = {}
    for name, clause in load_clauses().items():
        if not applies(clause, target):
            continue
        own = [check for check in checks if check.clause == name]
        if not own and "through" in clause:
            outputs = {*clause["exports"], clause["through"]}
            own = [check for check in checks if check.output in outputs and (clause.get("feature") != "noise" or "noise" in tags[check.case])]
            own = [check for check in own if name not in ("S-PAD-2",) or "padding" in tags[check.case]]
        sound = [check for check in own if check.ok or name in blamed]
        sound = [check for check in sound if check.stage != "backward" or check.case not in forward_failed]
        worst = max((check.worst for check in sound), default=0.0)
        count = len(sound)
        if name in blamed:
            own_failing = blamed[name].checks
            result[name] = ClauseStatus("fail", max(count, len(own_failing)), max(worst, max(check.worst for check in own_failing)))
        elif clause.get("feature") and clause["feature"] not in target.features:
            result[name] = ClauseStatus("unsupported", 0, 0.0, f"the feature {clause['feature']} is not declared")
        elif set(clause.get("exports", [])) & set(missing):
            promised = ", ".join(output for output in clause["exports"] if output in missing)
            result[name] = ClauseStatus("inconclusive", count, worst, f"{clause['feature']} is declared, but {promised} not returned")
        elif not own and clause.get("exports") == ["out"]:
            result[name] = ClauseStatus("inconclusive", 0, 0.0, "no case could be decided")
        elif not own:
            result[name] = ClauseStatus("unsupported", 0, 0.0, f"{' and '.join(clause.get('exports', ['nothing']))} not returned")
        elif not sound:
            result[name] = ClauseStatus("inconclusive", 0, 0.0, "every case that could tell fails for a reason that stands above")
        elif not any(check.decisive for check in sound):
            result[name] = ClauseStatus("inconclusive", count, worst, "the declared profile allows any value here")
        elif "needs" in clause and clause["needs"] not in evidence:
            result[name] = ClauseStatus("inconclusive", count, worst, f"no case met: {clause['needs'].replace('_', ' ')}")
        elif name == "S-ROUTE-3" and ambiguous > AMBIGUITY_BUDGET:
            result[name] = ClauseStatus("inconclusive", count, worst, f"{ambiguous:.1%} of the tokens have several admissible choices")
        else:
            result[name] = ClauseStatus("pass", count, worst)
    return result


def ambiguous_share(verdicts: Sequence[Verdicts]) -> float:
    """Return the share of tokens with several admissible choices, in the cases that are not about ties."""
    counted = [verdict for verdict in verdicts if "ties" not in verdict.case.recipe.tags]
    tokens = sum(verdict.tokens for verdict in counted)
    return sum(verdict.ambiguous for verdict in counted) / tokens if tokens else 0.0


def tightness(verdicts: Sequence[Verdicts]) -> dict[str, float]:
    """Return the median radius of each output in units in the last place of its stored format: the error that would have been seen."""
    ulps: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        for output, values in verdict.ulps.items():
            ulps[output] += values
    return {output: float(np.median(values)) for output, values in ulps.items()}
