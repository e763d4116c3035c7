# May import: standard library, rich, refswitch, the operators beside this file.
"""Plant every small error in the reference and see which of its clauses' properties notices it.

    python conformance/operator_campaign.py                            every mutant that no verdict on disk speaks of yet
    python conformance/operator_campaign.py --only router capacity     those of two files
    python conformance/operator_campaign.py --function serve --survivors
    python conformance/operator_campaign.py --list --only norm

Stop it with Ctrl-C and start it again: verdicts are on disk as soon as they are known, and hold until the function or the properties change. The
operators are listed in operators/mutate.py, the surviving mutants that are argued to be equivalent in operator_equivalents.yaml. Exit status: 0 where
every mutant is killed or argued, 1 where one lives or an argument is refuted, 130 where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # the arrays are tiny, and the processes as many as the cores
sys.path.insert(0, str(Path(__file__).resolve().parent))

from operators.forked import Verdict, outcome_of, verdicts
from operators.mutate import Mutant
from operators.properties import Property, collect, files
from operators.record import RESULTS, Verdicts, all_mutants, change_of, load_argued, stale
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from refswitch.spec_data import nearest


class Order:
    """In which order a mutant's properties are tried: first those that killed its neighbours, then the strong and the quick ones."""

    def __init__(self, known: Verdicts) -> None:
        self.known = known
        self.kills: Counter[tuple[str, str]] = Counter()
        self.untrue: set[str] = set()  # properties that fail on the reference as it is
        for mutant in all_mutants().values():
            entry = known.known(mutant)
            if entry and entry["killer"]:
                self._count(mutant, entry["killer"])

    def _count(self, mutant: Mutant, killer: str) -> None:
        self.kills.update([(mutant.function, killer), (mutant.file, killer), ("", killer)])

    def learn(self, verdict: Verdict) -> None:
        """Take note of a kill."""
        if verdict.killer and verdict.mutant is not None:
            self._count(verdict.mutant, verdict.killer)

    def __call__(self, mutant: Mutant | None) -> list[Property]:
        """Return the properties of a mutant's clauses in the order in which they are tried."""
        assert mutant is not None
        held = [held for held in self.known.tried_on(mutant) if held.name not in self.untrue]
        scopes = (mutant.function, mutant.file, "")

        def place(one: Property) -> tuple[object, ...]:
            entry = one.entry
            return (*(-self.kills[scope, one.name] for scope in scopes), not entry.is_oracle, entry.subject == "implementation", entry.fewer)

        return sorted(held, key=place)


class Campaign:
    """Mutants, the properties that they must fall to, and what is known of them."""

    def __init__(self, results: Path, processes: int) -> None:
        self.properties = collect()
        self.known = Verdicts(results, self.properties)
        self.order, self.processes = Order(self.known), processes
        self.sound: dict[str, bool] = {}

    def warm_up(self) -> None:
        """Let oracles that draw nothing compute what they compare with here, once, rather than in each child."""
        for held in self.properties:
            if held.entry.is_oracle and not held.entry.strategies and held.entry.subject == "operations":
                self.sound[held.name] = not outcome_of(held.run)

    def is_sound(self, killer: str) -> bool:
        """Whether a property holds on the reference as it is; one that does not cannot kill."""
        if killer not in self.sound:
            one = self.known.properties[killer]
            (verdict,) = verdicts([None], lambda _: [one], 1)
            self.sound[killer] = not verdict.how
        return self.sound[killer]

    def run(self, mutants: list[Mutant], seen: Callable[[Verdict], None]) -> None:
        """Try the mutants, and write down and show each verdict as it comes."""
        while mutants:
            again = []
            for verdict in verdicts(mutants, self.order, self.processes):
                assert verdict.mutant is not None
                if verdict.killer and not self.is_sound(verdict.killer):
                    self.order.untrue.add(verdict.killer)
                    again.append(verdict.mutant)
                    continue
                self.order.learn(verdict)
                self.known.enter(verdict)
                seen(verdict)
            mutants = again


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that the arguments ask for, in order of files and lines."""
    names = [path.stem for path in files()]
    for name in arguments.only or ():
        if name not in names:
            raise SystemExit(f"the reference has no file {name}{nearest(name, names)}")
    found = [mutant for mutant in all_mutants().values() if not arguments.only or mutant.file in arguments.only]
    if arguments.function:
        functions = {mutant.function for mutant in found}
        if arguments.function not in functions:
            raise SystemExit(f"there are no mutants of a function {arguments.function}{nearest(arguments.function, functions)}")
        found = [mutant for mutant in found if mutant.function == arguments.function]
    for name in arguments.mutant or ():
        if name not in all_mutants():
            raise SystemExit(f"there is no mutant {name}{nearest(name, all_mutants())}")
    return [all_mutants()[name] for name in arguments.mutant] if arguments.mutant else found


def state_of(mutant: Mutant, known: Verdicts) -> str:
    """Return "killed", "argued", "lives", "refuted" (killed, but argued to be equivalent) or "untried"."""
    entry = known.known(mutant)
    if entry is None:
        return "untried"
    if entry["killer"]:
        return "refuted" if mutant.id in load_argued() else "killed"
    return "argued" if mutant.id in load_argued() else "lives"


def show(mutants: list[Mutant], known: Verdicts, console: Console) -> Counter[str]:
    """Print a row for each file; return the states' totals."""
    columns = ("killed", "argued", "lives", "refuted", "untried")
    table = Table("file", "mutants", *columns, "killed", "process s")
    for column in table.columns[1:]:
        column.justify = "right"
    totals: Counter[str] = Counter()
    seconds = 0.0

    def row(name: str, counts: Counter[str], spent: float) -> None:
        tried = sum(counts.values()) - counts["untried"]
        share = f"{100.0 * counts['killed'] / tried:.1f} %" if tried else "-"
        table.add_row(name, str(sum(counts.values())), *(str(counts[column]) for column in columns), share, f"{spent:.0f}")

    for file in dict.fromkeys(mutant.file for mutant in mutants):
        of_file = [mutant for mutant in mutants if mutant.file == file]
        counts = Counter(state_of(mutant, known) for mutant in of_file)
        spent = sum(entry["seconds"] for mutant in of_file if (entry := known.known(mutant)))
        totals, seconds = totals + counts, seconds + spent
        row(file, counts, spent)
    table.add_section()
    row("all", totals, seconds)
    console.print(table)
    return totals


def listed(mutant: Mutant, state: str) -> str:
    """Return a mutant's line in a list."""
    return f"{state:8} {mutant.id}  refswitch/reference/{mutant.file}.py:{mutant.line}  {change_of(mutant)}"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FILE", help="files of the reference, such as router")
    parser.add_argument("--function", metavar="NAME", help="one function")
    parser.add_argument("--mutant", nargs="+", metavar="ID", help="single mutants")
    parser.add_argument("--list", action="store_true", help="list the mutants and what is known of them, and try none")
    parser.add_argument("--survivors", action="store_true", help="list those that live and are not argued, and try none")
    parser.add_argument("--fresh", action="store_true", help="try those again whose verdict is known")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH", help="the file of verdicts (default: .operators/verdicts.jsonl)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="mutants at a time (default: 2)")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error("--processes should be at least 1")
    return arguments


def main() -> int:
    """Run what the arguments ask for."""
    arguments, console, start = parse(), Console(), time.perf_counter()
    console.width = max(console.width, 110)  # of the table, also in a file
    mutants = chosen(arguments)
    campaign = Campaign(arguments.results, arguments.processes)
    known = campaign.known
    if arguments.list or arguments.survivors:
        for mutant in mutants:
            state = state_of(mutant, known)
            if arguments.list or state == "lives":
                print(listed(mutant, state))
        return 0
    todo = [mutant for mutant in mutants if arguments.fresh or known.known(mutant) is None]
    console.print(f"{len(mutants)} mutants, {len(todo)} to try, {len(campaign.properties)} properties, verdicts in {arguments.results}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        if todo:
            campaign.warm_up()
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("mutants", total=len(todo))

            def seen(verdict: Verdict) -> None:
                assert verdict.mutant is not None
                progress.update(task, advance=1, description=verdict.mutant.file)
                if not verdict.killer and verdict.mutant.id not in load_argued():
                    progress.console.print(listed(verdict.mutant, "lives"), soft_wrap=True, highlight=False, markup=False)

            campaign.run(todo, seen)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    totals = show(mutants, known, console)
    for name in sorted(campaign.order.untrue):
        console.print(f"fails on the reference as it is, and was not counted: {name}")
    for line in stale(load_argued().values()):
        console.print(f"operator_equivalents.yaml: {line}")
    for mutant in mutants:
        if state_of(mutant, known) == "refuted":
            console.print(f"operator_equivalents.yaml: {mutant.id} is killed by {known.lines[mutant.id]['killer']}")
    console.print(f"{time.perf_counter() - start:.0f} s on {arguments.processes} processes")
    return int(totals["lives"] + totals["refuted"] > 0)


if __name__ == "__main__":
    sys.exit(main())
