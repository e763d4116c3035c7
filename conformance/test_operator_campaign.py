# May import: standard library, numpy, pytest, refswitch, operators and operator_campaign beside this file.
"""The operator campaign in the suite: a sample of mutants dies, planted ones live, hang and crash as they should, and no argument is stale.

The campaign itself is a command: `python conformance/operator_campaign.py`.
"""

from __future__ import annotations

import ast
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from operator_campaign import Campaign
from operators import forked, record
from operators.mutate import Mutant, mutants_of_tree
from operators.properties import REFERENCE, Property, clauses_of, collect, files, sources_of
from operators.record import Argument, Verdicts, all_mutants, change_of, kinds, load_argued, stale

from refswitch.spec_data import every_clause

SAMPLE = 40


@pytest.fixture(scope="module")
def properties() -> list[Property]:
    """Return all properties on the reference."""
    return collect()


def sampled() -> list[Mutant]:
    """Return some mutants, the same until the reference changes; none of them is argued to be no error."""
    free = [mutant for mutant in all_mutants().values() if mutant.id not in load_argued()]
    return sorted(free, key=lambda mutant: zlib.crc32(mutant.id.encode()))[:SAMPLE]


def judged(mutants: list[Mutant | None], properties: list[Property], known: Verdicts | None = None) -> dict[str, str]:
    """Return what becomes of mutants, by their ids."""
    found = forked.verdicts(mutants, (lambda mutant: known.tried_on(mutant)) if known else (lambda _: properties), 2)
    return {verdict.mutant.id if verdict.mutant else "": verdict.how for verdict in found}


def test_sample__dies(tmp_path: Path) -> None:
    """Properties of its own clauses notice every mutant of the sample, and notice nothing in the reference as it is."""
    campaign, seen = Campaign(tmp_path / "verdicts.jsonl", 2), list[forked.Verdict]()
    campaign.warm_up()
    campaign.run(sampled(), seen.append)
    assert len(seen) == SAMPLE
    assert [verdict.mutant.id for verdict in seen if not verdict.killer] == []
    assert campaign.order.untrue == set(), "a property fails on the reference as it is"


def planted(old: str, new: str) -> Mutant:
    """Return the norm with one passage changed."""
    source = sources_of("norm")["norm_forward"]
    assert source.count(old) == 1
    return Mutant(f"norm:norm_forward:planted:{new}", "norm", "norm_forward", 0, old, new, source.replace(old, new))


def test_planted__are_told_apart(properties: list[Property], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function in other words lives; a wrong one dies; one that raises, hangs or ends its process is noticed as what it does."""
    monkeypatch.setattr(forked, "SECONDS", 2.0)
    known = Verdicts(tmp_path / "verdicts.jsonl", properties)
    line = "mean_BL1 = np.mean(np.square(x_BLD), axis=-1, keepdims=True)"
    same, wrong = planted("np.square(x_BLD)", "(x_BLD * x_BLD)"), planted("np.square(x_BLD)", "np.abs(x_BLD)")
    raises, hangs = planted(line, "raise KeyError"), planted(line, f"{line}\n    while True:\n        pass")
    ends = planted(line, f"{line}\n    import os\n    os._exit(3)")
    found = judged([same, wrong, raises, hangs, ends], [], known)
    assert found[same.id] == ""
    assert found[wrong.id] == "failed"
    assert found[raises.id] == "KeyError"
    assert found[hangs.id] == "hangs"
    assert found[ends.id] == "exit status 3"
    assert judged([None], known.tried_on(same)) == {"": ""}, "a child's reference reached this process"


def test_verdicts__hold_until_something_changes(properties: list[Property], tmp_path: Path) -> None:
    """A verdict is read back; it is gone when the function changes, or the property that killed, or for a survivor any property."""
    known = Verdicts(tmp_path / "verdicts.jsonl", properties)
    mutant = next(mutant for mutant in all_mutants().values() if mutant.function == "norm_forward")
    first, second = known.tried_on(mutant)[:2]
    known.enter(forked.Verdict(mutant, first.name, "failed", 0.1, 1))
    with known.path.open("a", encoding="utf-8") as file:
        file.write('{"id": "cut off')

    def again(changed: Property | None, of: Mutant = mutant) -> Any:
        held = [one._replace(digest="other") if changed is one else one for one in properties]
        return Verdicts(known.path, held).known(of)

    assert again(None)["killer"] == first.name
    assert again(second) is not None
    assert again(first) is None
    assert again(None, mutant._replace(source=mutant.source + "\n")) is None
    known.path.unlink()
    known.enter(forked.Verdict(mutant, "", "", 0.1, 2))
    assert again(None)["killer"] == ""
    assert again(second) is None


def test_functions__stand_under_clauses() -> None:
    """Every function that a clause names is there; a helper stands under the clauses of those who call it, a constant of those who read it."""
    for clause, entry in every_clause().items():
        for place in entry["functions"]:
            file, _, function = place.partition(".")
            if (REFERENCE / f"{file}.py").is_file():
                assert clause in clauses_of(file)[function], place
    assert clauses_of("router")["_place"] == clauses_of("router")["gate_backward"]
    assert clauses_of("experts")["<module>"] == clauses_of("experts")["activate"] | clauses_of("experts")["activation_slope"]


@pytest.mark.parametrize("file", [path.stem for path in files()])
def test_functions__all_have_properties(file: str, properties: list[Property]) -> None:
    """No function of the reference is without a property that could notice its mutants."""
    tested = {clause for held in properties for clause in held.clauses}
    assert [function for function, clauses in clauses_of(file).items() if not clauses & tested] == []


def test_mutate__makes_what_it_says() -> None:
    """The mutants of a line, one by one; messages, annotations and docstrings are left alone."""
    text = """
def f(x_TD: np.ndarray, y_TD, k: int = 2):
    'Add 1 + 1.'
    if k <= 3 or y_TD.ndim > 1:
        raise ValueError(f'{k + 1}')
    z_TD = np.einsum('td,td->td', x_TD[:k], y_TD).sum(axis=(0, 1), keepdims=True)
    return np.where(z_TD > 0.0, round_to(z_TD, format), -z_TD), y_TD
"""
    found = [(mutant.operator, change_of(mutant)) for mutant in mutants_of_tree("file", "f", ast.parse(text).body[0])]
    assert ("constant", "2 -> 3") in found
    assert ("compare", "k <= 3 -> k < 3") in found
    assert ("logic", "k <= 3 or y_TD.ndim > 1 -> k <= 3 and y_TD.ndim > 1") in found
    assert ("slice", ":k -> :k + 1") in found
    assert ("einsum", "np.einsum('td,td->td', x_TD[:k], y_TD) -> np.einsum('td,td->dt', x_TD[:k], y_TD)") in found
    assert ("keepdims", "X.sum(axis=(0, 1), keepdims=True) -> X.sum(axis=(0, 1))") in [
        (operator, change.replace("np.einsum('td,td->td', x_TD[:k], y_TD)", "X")) for operator, change in found
    ]
    assert ("arguments", "np.where(z_TD > 0.0, round_to(z_TD, format), -z_TD) -> np.where(z_TD > 0.0, -z_TD, round_to(z_TD, format))") in found
    assert ("through", "round_to(z_TD, format) -> z_TD") in found
    assert ("unary", "-z_TD -> z_TD") in found
    assert not [change for operator, change in found if operator != "condition" and ("{k" in change or "Add" in change or "ndarray" in change)]
    assert len({mutant.id for mutant in all_mutants().values()}) == len(all_mutants())


def test_apply__reaches_every_importer() -> None:
    """A function keeps its identity, so that modules that imported it by name call the mutant; a constant is rebound where it was imported."""
    from refswitch.reference import experts, feed_forward

    wrong = next(mutant for mutant in all_mutants().values() if mutant.id.startswith("experts:activate:name"))
    cube = next(mutant for mutant in all_mutants().values() if mutant.id.startswith("experts:<module>:constant") and "0.044715" in mutant.before)

    def check() -> None:
        forked.apply(wrong)
        forked.apply(cube)
        assert feed_forward.activate is experts.activate
        assert feed_forward.activate(experts.np.array([-1.0, 2.0]), "relu").tolist() == [-1.0, 0.0]
        assert experts.GELU_CUBE == 1.044715

    held = Property("check", frozenset(), "", SimpleNamespace(run=lambda *_: check(), subject="operations"), SimpleNamespace(fresh=lambda: None))
    assert judged([None], [held]) == {"": ""}


def test_arguments__speak_of_mutants() -> None:
    """Every mutant that is argued to be no error is there, is the one that the argument was made for, and has a reason of its own."""
    assert stale(load_argued().values()) == []
    assert all(argument.reason.strip() for argument in load_argued().values())
    assert {argument.kind for argument in load_argued().values()} == set(kinds())


def test_arguments__stale_ones_are_seen() -> None:
    """An unknown mutant, another change, an unknown kind."""
    mutant = next(iter(all_mutants().values()))
    kind = next(iter(kinds()))
    right = Argument(mutant.id, change_of(mutant), kind, "why")
    assert stale([right]) == []
    for wrong in (right._replace(id="norm:norm_forward:binary:99"), right._replace(change="a -> b"), right._replace(kind="none")):
        assert len(stale([wrong])) == 1


def test_arguments__are_not_refuted(properties: list[Property], tmp_path: Path) -> None:
    """Properties cannot tell the argued mutants of the smallest files from the reference; the campaign tries all of them."""
    known = Verdicts(tmp_path / "verdicts.jsonl", properties)
    cheapest = sorted((all_mutants()[name] for name in load_argued()), key=lambda mutant: (len(known.tried_on(mutant)), mutant.id))[:3]
    assert set(judged(cheapest, [], known).values()) == {""}
    assert record.EQUIVALENTS.is_file()
