# May import: standard library, numpy, refswitch.spec_data, refswitch.config, refswitch.verify (below).
"""A judgement from an adapter's file to a report.

`judge_file` starts a process for each of a file's adapters; `judge_adapter` runs one of them on the tier's cases and judges what comes back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refswitch.errors import InputError
from refswitch.records import nearest
from refswitch.spec_data import data_root, load_dialect, load_profile, parse_record
from refswitch.verify.case import Case
from refswitch.verify.cases import Prepared, Target, check_target, prepare
from refswitch.verify.decode import Outputs
from refswitch.verify.diagnose import diagnose, merge
from refswitch.verify.findings import Finding, ambiguous_share, collect, statuses, tightness
from refswitch.verify.judge import Check, Verdicts, judge_case
from refswitch.verify.process import AdapterFailure, AdapterMissing, AdapterProcess
from refswitch.verify.report import Options, Report

FEATURES = (
    "backward", "aux_loss", "z_loss", "noise", "padding", "groups", "bias", "gated", "top_k", "expert_dropout", "empty", "own_capacity", "ranks",
)  # fmt: skip
LIMIT_KEYS = ("G", "S", "D", "E", "F", "activation")
LIMIT_WORDS = ("min", "max", "multiple_of", "one_of")
BUILT_IN = ("reference", "cpu")
Progress = Callable[[int, int, str], None]  # done, total, what
Call = Callable[[Case, str], tuple[Outputs, list[str]]]  # case and its id to the outputs and the names of the inputs that were written to


def resolve_target(text: str) -> tuple[Path, str]:
    """Return the adapter's file and the name in it: "reference", "FILE.py" or "FILE.py::NAME".

    Raises
    ------
    InputError
        If there is no such file, or the kind of target is not of this version.
    """
    if text.startswith("pipe:"):
        raise InputError("pipe: targets are not of this version yet; write an adapter in Python that runs the program")
    file, _, name = text.partition("::")
    if file == "cuda":
        raise InputError(f"target {file}: refswitch has no {file} engine in this version; known: {', '.join(BUILT_IN)} or FILE.py[::NAME]")
    path = data_root() / "conformance" / "adapters" / f"{file}.py" if file in BUILT_IN else Path(file)
    if not path.suffix == ".py":
        raise InputError(f"target {text!r} is neither FILE.py[::NAME] nor a built-in{nearest(text, BUILT_IN)}")
    if not path.is_file():
        raise InputError(f"target {text!r}: there is no file {path}")
    return path.resolve(), name


def shipped_adapters() -> list[Path]:
    """Return the adapters that come with refswitch, the one without a foreign package first."""
    return sorted((data_root() / "conformance" / "adapters").glob("*.py"), key=lambda path: (path.stem not in BUILT_IN, path.stem))


def target_of(declared: Mapping[str, Any], options: Options) -> Target:
    """Return what is judged, from what the adapter declares and what the command line overrides.

    Raises
    ------
    InputError
        For an unknown dialect, profile, feature or limit.
    """
    features, limits = declared["features"], declared["limits"]
    for feature in features:
        if feature not in FEATURES:
            raise InputError(f"FEATURES has an unknown name {feature!r}{nearest(str(feature), FEATURES)}")
    for key, limit in limits.items():
        if key not in LIMIT_KEYS:
            raise InputError(f"LIMITS has an unknown key {key!r}{nearest(str(key), LIMIT_KEYS)}")
        if not isinstance(limit, dict) or not set(limit) <= set(LIMIT_WORDS):
            raise InputError(f"LIMITS[{key!r}] should be a dict with {', '.join(LIMIT_WORDS)}, not {limit!r}")
        if "one_of" in limit and not (isinstance(limit["one_of"], list) and limit["one_of"]):
            raise InputError(f"LIMITS[{key!r}]['one_of'] should be a list that is not empty")
        numbers = [limit[word] for word in ("min", "max", "multiple_of") if word in limit] + (limit.get("one_of", []) if key != "activation" else [])
        if any(not isinstance(number, int) or number < 0 for number in numbers) or limit.get("multiple_of", 1) < 1:
            raise InputError(f"LIMITS[{key!r}] should hold whole numbers, multiple_of at least 1, not {limit!r}")
        if limit.get("min", 0) > limit.get("max", limit.get("min", 0)):
            raise InputError(f"LIMITS[{key!r}] has min above max")
    dialect = load_dialect(parse_record(options.dialect) if options.dialect else declared["dialect"])
    profile = load_profile(parse_record(options.profile) if options.profile else declared["profile"])
    return Target(dialect, profile, frozenset(features), dict(limits))


def _state_check(name: str, clause: str, coordinates: dict[str, int], output: str, failing: int, elements: int) -> Check:
    return Check(clause, "state", output, name, elements, math.inf if failing else 0.0, failing, coordinates, 0.0, 0.0, 0.0)


def _same_bits(first: Outputs, second: Outputs) -> bool:
    def bits(outputs: Outputs) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in outputs.items()}

    return bits(first) == bits(second)


def _run_cases(call: Call, prepared: Sequence[Prepared], target: Target, progress: Progress) -> tuple[list[Verdicts], dict[str, Outputs]]:
    """Run and judge every case, then the first one again."""
    verdicts: list[Verdicts] = []
    outputs: dict[str, Outputs] = {}
    for number, item in enumerate(prepared):
        progress(number, len(prepared), item.name)
        outputs[item.name], mutated = call(item.case, item.name)
        verdict = judge_case(item, target, outputs[item.name])
        verdict.checks.append(_state_check(item.name, "S-STATE-1", {}, ", ".join(mutated) or "inputs", len(mutated), len(item.case.arrays)))
        verdicts.append(verdict)
    first = prepared[0]
    again, mutated = call(first.case, first.name)
    verdicts[0].checks.append(_state_check(first.name, "S-STATE-1", {}, ", ".join(mutated) or "inputs", len(mutated), len(first.case.arrays)))
    same = _same_bits(outputs[first.name], again)
    if not same and not target.profile.deterministic:
        same = set(again) == set(outputs[first.name]) and judge_case(first, target, again).failing <= verdicts[0].failing
    verdicts[0].checks.append(_state_check(first.name, "S-STATE-2", {}, "out", int(not same), 1))
    return verdicts, outputs


def _verdict(report: Report) -> str:
    found = {status.status for status in report.clauses.values()}
    if report.checks == 0:
        return "error"
    if "fail" in found or report.findings:
        return "deviates"
    return "inconclusive" if found & {"inconclusive", "suspect"} else "conforms"


def judge_adapter(
    call: Call, label: str, declared: Mapping[str, Any], options: Options, progress: Progress = lambda *_: None, explain: bool = True
) -> Report:
    """Judge the adapter behind `call`, in a process of its own or in this one; `explain` asks for diagnoses.

    Spec: contract 2.
    """
    start = time.perf_counter()
    report = Report(label, "error", options)
    try:
        target = target_of(declared, options)
        report.dialect, report.profile, report.features = target.dialect, target.profile, sorted(target.features)
        report.notes = check_target(target)
        prepared = list(prepare(target, options.tier, options.seed))
        if not prepared:
            raise InputError("LIMITS and FEATURES leave no case to run")
        verdicts, outputs = _run_cases(call, prepared, target, progress)
    except (InputError, AdapterFailure) as error:
        report.why = str(error)
        report.seconds = time.perf_counter() - start
        return report
    report.cases = len(prepared)
    undecided = sum(verdict.is_undecided for verdict in verdicts)
    if undecided:
        report.notes.append(f"{undecided} cases were judged only up to the choice, which neither the outputs nor exact arithmetic tell")
    report.checks = sum(len(verdict.checks) for verdict in verdicts)
    report.ambiguous = ambiguous_share(verdicts)
    report.tightness = tightness(verdicts)
    findings = collect(verdicts)
    for number, finding in enumerate(findings):
        progress(number, len(findings), f"what explains {finding.clause}")
        finding.diagnosis = diagnose(finding, verdicts, outputs, target) if explain and finding.stage != "state" else []
    report.findings = merge(findings)
    for finding in report.findings:
        _move_to_cause(finding, outputs)
    missing = set()
    for item in prepared:
        missing |= {name for name in item.case.wants if name.startswith("d") or name.endswith("_loss")} - set(outputs[item.name])
    report.clauses = statuses(verdicts, report.findings, target, report.ambiguous, sorted(missing))
    report.verdict = _verdict(report)
    report.seconds = time.perf_counter() - start
    return report


STAGE_OUTPUT = {"router": "logits", "softmax": "probs", "select": "expert", "capacity": "kept", "expert": "hidden", "gate": "gate"}
STAGE_CLAUSE = {
    "noise": "S-NOISE-2", "router": "S-ROUTE-1", "softmax": "S-ROUTE-2", "select": "S-ROUTE-3", "capacity": "S-CAP-1", "expert": "S-EXPERT-1",
    "gate": "S-GATE-1", "drop": "S-DROP-1",
}  # fmt: skip


def _move_to_cause(finding: Finding, outputs: Mapping[str, Outputs]) -> None:
    """Blame the stage of the best explanation, if it is full, where that stage is upstream of what was seen and not exported itself."""
    if not finding.diagnosis or not finding.diagnosis[0].is_full or finding.stage not in ("combine", "drop", "expert"):
        return
    stage = finding.diagnosis[0].stage
    exported = next(iter(outputs.values()))
    if stage in STAGE_CLAUSE and STAGE_OUTPUT.get(stage, "") not in exported:
        is_order = finding.diagnosis[0].name.startswith("priority")
        finding.stage, finding.clause = stage, "S-CAP-2" if is_order else STAGE_CLAUSE[stage]


def judge_file(path: Path, name: str, shown: str, options: Options, progress: Progress, done: Callable[[Report], None]) -> list[Report]:
    """Judge every adapter of a file, each in a process of its own; `done` is called with each report as it is there."""
    reports: list[Report] = []

    def finish(report: Report) -> None:
        reports.append(report)
        done(report)

    try:
        process = AdapterProcess(path, name, options.deadline_s)
    except AdapterMissing as missing:
        finish(Report(shown, "not run", options, why=str(missing)))
        return reports
    except AdapterFailure as failure:
        finish(Report(shown, "error", options, why=str(failure)))
        return reports
    for number, declared in enumerate(process.adapters):

        def advance(done_cases: int, total: int, what: str, declared: dict[str, Any] = declared) -> None:
            progress(done_cases, total, f"{declared['label']}: {what}")

        label = shown if "::" in shown or declared["label"] == "switch_layer" else f"{shown}::{declared['label']}"
        try:
            with process if number == 0 else AdapterProcess(path, declared["label"], options.deadline_s) as current:
                report = judge_adapter(current.run, label, declared, options, advance)
                report.import_seconds = current.import_seconds
                finish(report)
        except (AdapterFailure, AdapterMissing) as failure:
            finish(Report(label, "error", options, why=str(failure)))
    return reports
