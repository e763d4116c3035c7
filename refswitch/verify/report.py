# May import: standard library, refswitch.verify (below), refswitch.
"""What is known of an adapter, and its JSON form. Spec: contracts 2 and 4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from refswitch import SPEC_VERSION, __version__
from refswitch.verify.findings import ClauseStatus, Finding

DEADLINE_S = 60.0


@dataclass(frozen=True)
class Options:
    """What the caller asks for."""

    dialect: str | None = None
    profile: str | None = None
    tier: str = "quick"
    seed: int = 0
    deadline_s: float = DEADLINE_S

    @property
    def shown(self) -> str:
        """The resolved options in one line."""
        return (
            f"tier {self.tier}, seed {self.seed}, dialect {self.dialect or 'as declared'}, profile {self.profile or 'as declared'}, "
            f"deadline {self.deadline_s:g} s"
        )


@dataclass
class Report:
    """What is known of one adapter."""

    target: str
    verdict: str  # conforms, deviates, inconclusive, error, not run
    options: Options
    dialect: Any = None
    profile: Any = None
    features: list[str] = field(default_factory=list)
    clauses: dict[str, ClauseStatus] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    checks: int = 0
    cases: int = 0
    ambiguous: float = 0.0
    tightness: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    why: str = ""
    seconds: float = 0.0
    import_seconds: float = 0.0


def exit_status(reports: Sequence[Report]) -> int:
    """Return the exit status of `verify`. Spec: contract 2."""
    verdicts = [report.verdict for report in reports]
    if "deviates" in verdicts:
        return 1
    judged = [verdict for verdict in verdicts if verdict != "not run"]
    return 0 if judged and all(verdict == "conforms" for verdict in judged) else 2


def _number(value: float) -> float | str:
    if math.isnan(value):
        return "nan"
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return _number(value) if isinstance(value, float) else value


def as_json(report: Report) -> dict[str, Any]:
    """Return the report in the contract's form. Spec: contract 4."""
    findings = []
    for finding in report.findings:
        check = finding.first
        findings.append(
            {
                "clause": finding.clause,
                "stage": finding.stage,
                "summary": summary_of(finding),
                "case": check.case,
                "output": check.output,
                "cases": len({each.case for each in finding.checks}),
                "coordinates": check.coordinates,
                "got": _number(check.got),
                "expected": _number(check.expected),
                "radius": _number(check.radius),
                "ratio": _number(check.worst),
                "diagnosis": [{"name": item.name, "agreement": item.agreement, "says": item.says} for item in finding.diagnosis],
                "counterexample": None,
            }
        )
    return {
        "refswitch": __version__,
        "spec": SPEC_VERSION,
        "target": report.target,
        "dialect": _finite(asdict(report.dialect)) if report.dialect else {},
        "profile": _finite(asdict(report.profile)) if report.profile else {},
        "tier": report.options.tier,
        "seed": report.options.seed,
        "seconds": round(report.seconds, 3),
        "verdict": report.verdict,
        "why": report.why,
        "features": report.features,
        "notes": report.notes,
        "cases": report.cases,
        "checks": report.checks,
        "ambiguous_tokens": report.ambiguous,
        "clauses": {
            name: {"status": status.status, "checks": status.checks, "worst": _number(status.worst)} | ({"why": status.why} if status.why else {})
            for name, status in report.clauses.items()
        },
        "findings": findings,
        "tightness": {output: {"median_ulp": _number(ulp)} for output, ulp in report.tightness.items()},
    }


def summary_of(finding: Finding) -> str:
    """Return the finding in one sentence."""
    full = [item for item in finding.diagnosis if item.agreement == 1.0]
    if finding.clause == "S-STATE-1":
        return f"the call writes to its input {finding.first.output}"
    if finding.clause == "S-STATE-2":
        return "the same call gives another answer the second time"
    if full:
        return full[0].says
    return f"this does not hold: {finding.text[0].lower()}{finding.text[1:].rstrip('.')}"
