# May import: standard library, numpy, rich, refswitch, the mutants beside this file.
"""The judge's own measure: correct variants judged for false alarms, mutants for the kill rate.

    python conformance/campaign.py                 variants at one seed, every mutant in every profile, exporting and black box
    python conformance/campaign.py --seeds 5 --no-mutants

Everything runs in this process. Exit status: 0 if no variant is accused and no mutant lives, 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutants.catalogue import MUTANTS
from mutants.subject import FEATURES
from mutants.variants import VARIANTS

from refswitch.verify.case import Case
from refswitch.verify.cases import Target, prepare
from refswitch.verify.child import run_case
from refswitch.verify.decode import Outputs
from refswitch.verify.judge import judge_case
from refswitch.verify.process import AdapterFailure
from refswitch.verify.report import Options, Report
from refswitch.verify.run import judge_adapter, target_of

Layer = Callable[[Case], dict[str, np.ndarray]]


def declared_by(layer: Any) -> dict[str, Any]:
    """Return what an adapter's process would say of a layer of the mutants' package."""
    features = list(getattr(layer, "features", FEATURES))
    return {"label": "layer", "dialect": layer.dialect, "profile": layer.profile, "features": features, "limits": getattr(layer, "limits", {})}


def call_of(layer: Layer) -> Callable[[Case, str], tuple[Outputs, list[str]]]:
    """Return the layer as the judge calls it, in this process; NumPy's warnings are the layer's own business."""

    def call(case: Case, name: str) -> tuple[Outputs, list[str]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs, reply = run_case(layer, case)
        if "error" in reply:
            raise AdapterFailure(f"{reply['error']} [case {name}]")
        return outputs, reply["mutated"]

    return call


def judge_layer(layer: Any, seed: int = 0, explain: bool = False) -> Report:
    """Judge a layer of the mutants' package on the whole quick tier."""
    return judge_adapter(call_of(layer), "layer", declared_by(layer), Options(seed=seed), explain=explain)


def is_caught(layer: Any, seed: int = 0) -> bool:
    """Whether the judge notices the layer: as `judge_layer`, but it stops at the first check that fails."""
    call = call_of(layer)
    target: Target = target_of(declared_by(layer), Options())
    for prepared in prepare(target, "quick", seed):
        outputs, mutated = call(prepared.case, prepared.name)
        if mutated or any(not check.ok for check in judge_case(prepared, target, outputs).checks):
            return True
    return judge_layer(layer, seed).verdict == "deviates"


def mutant_runs() -> Iterator[tuple[Any, str, str]]:
    """Yield (mutant, exports, profile) for every way in which a mutant can be seen."""
    for mutant in MUTANTS:
        for exports in ("all", "black_box"):
            if exports == "all" or mutant.visibility == "black_box":
                for profile in mutant.profiles:
                    yield mutant, exports, profile


def measure_variants(seeds: int) -> int:
    """Judge every correct variant at every seed; print and return the number of false alarms."""
    start, evaluations, accused = time.perf_counter(), 0, 0
    for seed in range(seeds):
        for variant in VARIANTS:
            report = judge_layer(variant.make(), seed)
            evaluations += report.cases
            if report.verdict != "conforms":
                accused += 1
                print(f"false alarm: {variant.name}, seed {seed}: {report.verdict} {report.why} {[f.clause for f in report.findings]}")
    print(f"{accused} false alarms in {evaluations} layer evaluations of {len(VARIANTS)} correct variants ({time.perf_counter() - start:.0f} s)")
    return accused


def measure_mutants() -> int:
    """Judge every mutant in every way; print the kill rate and return the number that live."""
    start = time.perf_counter()
    counts = {"all": [0, 0], "black_box": [0, 0]}
    for mutant, exports, profile in mutant_runs():
        caught = is_caught(mutant.make(exports, profile))
        counts[exports][0] += caught
        counts[exports][1] += 1
        if not caught:
            print(f"lives: {mutant.name} ({mutant.clause}), {exports}, {profile}; its trigger: {mutant.trigger}")
    for exports, (caught, total) in counts.items():
        print(f"{caught} of {total} mutant runs caught, {exports.replace('_', ' ')} ({len(MUTANTS)} mutants)")
    print(f"{time.perf_counter() - start:.0f} s")
    return sum(total - caught for caught, total in counts.values())


def main() -> int:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="draws of every case for the correct variants")
    parser.add_argument("--no-mutants", action="store_true", help="measure false alarms only")
    parser.add_argument("--no-variants", action="store_true", help="measure the kill rate only")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds should be at least 1")
    wrong = 0 if arguments.no_variants else measure_variants(arguments.seeds)
    wrong += 0 if arguments.no_mutants else measure_mutants()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
