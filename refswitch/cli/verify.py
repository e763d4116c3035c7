# May import: standard library, rich, refswitch.verify, refswitch.spec_data, refswitch.errors.
"""`refswitch verify`: calls the judge, shows progress, prints the reports."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from refswitch import SPEC_VERSION, __version__
from refswitch.cli.files import check_writable, write_json
from refswitch.spec_data import load_clauses, load_dialect, load_profile, parse_record
from refswitch.verify.findings import Finding
from refswitch.verify.report import Options, Report, as_json, exit_status, summary_of
from refswitch.verify.run import judge_file, resolve_target, shipped_adapters

COLOURS = {"conforms": "green", "deviates": "red", "inconclusive": "yellow", "error": "red", "not run": "dim"}


class Door(NamedTuple):
    """The command line as parsed."""

    target: str | None
    dialect: str | None
    profile: str | None
    tier: str
    seed: int
    deadline: float
    json_file: Path | None
    quiet: bool
    verbose: bool


def _number(value: float) -> str:
    return f"{value:.8g}"


def _print_finding(console: Console, finding: Finding) -> None:
    check = finding.first
    cases = len({each.case for each in finding.checks})
    console.print(f"  [red]FAIL[/] [bold]{finding.clause}[/] at [bold]{finding.stage}[/] (proof): {escape(summary_of(finding))}")
    if finding.stage != "state":
        place = ", ".join(f"{letter}={index}" for letter, index in check.coordinates.items())
        where = f"{check.output}\\[{place}]" if place else check.output
        console.print(
            f"       {where} is {_number(check.got)}, should be {_number(check.expected)} ± {check.radius:.2g}"
            f"  (|error|/radius up to {check.worst:.3g}; {check.failing} of {check.elements} elements of case {check.case})"
        )
    console.print(
        f"       in {cases} case{'s' * (cases != 1)}: {', '.join(sorted({each.case for each in finding.checks})[:6])}{', ...' * (cases > 6)}"
    )
    for diagnosis in finding.diagnosis:
        console.print(
            f"       it equals [cyan]{escape(diagnosis.name)}[/] in {diagnosis.agreement:.0%} of the cases replayed: {escape(diagnosis.says)}"
        )


def _print_report(console: Console, report: Report, door: Door) -> None:
    colour = COLOURS[report.verdict]
    line = f"[{colour} bold]{report.verdict.upper()}[/]  {escape(report.target)}"
    if report.dialect is not None:
        line += f"  as {escape(report.dialect.name)} in {escape(report.profile.name)}"
    if report.why:
        line += f": {escape(report.why)}"
    elif report.checks:
        line += f"  ({report.checks} checks, {report.cases} cases, {report.seconds:.1f} s + {report.import_seconds:.1f} s of its own imports)"
    console.print(line)
    if door.quiet:
        return
    for finding in report.findings:
        _print_finding(console, finding)
    open_clauses: dict[str, list[str]] = {}
    for name, status in report.clauses.items():
        if status.status == "inconclusive":
            open_clauses.setdefault(status.why, []).append(name)
    for why, names in open_clauses.items():
        console.print(f"  [yellow]INCONCLUSIVE[/] {', '.join(names)}: {escape(why)}")
    unsupported = [name for name, status in report.clauses.items() if status.status == "unsupported"]
    if unsupported and not door.verbose:
        console.print(f"  [dim]not declared or not returned, so not judged: {', '.join(unsupported)}[/]")
    for note in report.notes:
        console.print(f"  [dim]note: {escape(note)}[/]")
    if report.tightness:
        shown = ", ".join(f"{output} {ulp:.2g}" for output, ulp in report.tightness.items())
        console.print(f"  [dim]would have seen an error of (median, ulp): {shown}[/]")
    if door.verbose and report.clauses:
        _print_clauses(console, report)


def _print_clauses(console: Console, report: Report) -> None:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("clause", "status", "checks", "worst |error|/radius", "what it says"):
        table.add_column(column)
    texts = load_clauses()
    for name, status in report.clauses.items():
        colour = {"pass": "green", "fail": "red", "inconclusive": "yellow"}.get(status.status, "dim")
        said = status.why or texts[name]["text"]
        table.add_row(name, f"[{colour}]{status.status}[/]", str(status.checks), f"{status.worst:.3g}", escape(said))
    console.print(table)


def _print_table(console: Console, reports: Sequence[Report]) -> None:
    table = Table(title="Switch layers, as each declares itself", title_justify="left", header_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("adapter", "dialect", "profile", "verdict", "checks", "clauses that fail, or why"):
        table.add_column(column, overflow="fold")
    for report in reports:
        failed = ", ".join(dict.fromkeys(f"{finding.clause} ({finding.stage})" for finding in report.findings)) or report.why
        dialect = report.dialect.name if report.dialect else "-"
        profile = report.profile.name.split(" with ")[0] + "*" * (" with " in report.profile.name) if report.profile else "-"
        verdict = f"[{COLOURS[report.verdict]}]{report.verdict}[/]"
        table.add_row(escape(report.target), escape(dialect), escape(profile), verdict, str(report.checks), escape(failed))
    console.print(table)
    if any(report.profile and " with " in report.profile.name for report in reports):
        console.print("[dim]* with overrides of its own, named above[/]")


def run_verify(door: Door) -> int:
    """Judge what the command line names; return the exit status."""
    console, errors = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160), Console(stderr=True)
    options = Options(door.dialect, door.profile, door.tier, door.seed, door.deadline)
    if door.dialect:
        load_dialect(parse_record(door.dialect))
    if door.profile:
        load_profile(parse_record(door.profile))
    if door.json_file is not None:
        check_writable(door.json_file)
    targets = [(*resolve_target(door.target), door.target)] if door.target else [(path, "", path.stem) for path in shipped_adapters()]
    if not door.quiet:
        console.print(f"refswitch {__version__}, spec {SPEC_VERSION}: {options.shown}")
    reports: list[Report] = []
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal or door.quiet) as progress:
        task = progress.add_task("starting", total=None)

        def advance(number: int, total: int, what: str) -> None:
            progress.update(task, completed=number, total=total, description=what)

        def done(report: Report) -> None:
            reports.append(report)
            _print_report(console, report, door)

        for path, name, shown in targets:
            progress.update(task, description=f"{shown}: importing")
            judge_file(path, name, shown, options, advance, done)
    if len(reports) > 1 and not door.quiet:
        _print_table(console, reports)
        console.print(f"{time.perf_counter() - start:.1f} s in all")
    if door.json_file is not None:
        content = [as_json(report) for report in reports]
        write_json(content[0] if len(content) == 1 else content, door.json_file)
    return exit_status(reports)
