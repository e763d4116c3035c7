# May import: standard library.
"""The numbers of forward and backward lines: a forward runs `# F1` ... `# Fn`, its backward `# Bn` ... `# B1`, where `Bk` undoes `Fk`.

Only the head of a comment is read, `# F4  R11: why`, and tags are compared along each path through a function's branches: on no path does a forward
repeat a number or go back, nor a backward go up; all paths together have every number. A branch may leave a number out, two exclusive branches may
share one, and a backward may have several lines of one number and lines of two (`# B5 B4`). Style: rules 12 and 14. Before: `shape_tracer`.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEAD = re.compile(r"#\s*((?:[FBR]\d+(?:[\s,]+|:|$))+)")
WAYS = {"_forward": "F", "_backward": "B"}


class Tag(NamedTuple):
    """One number at the head of one comment."""

    line: int
    way: str  # F or B
    number: int

    def __str__(self) -> str:
        return f"{self.way}{self.number}"


class Flow(NamedTuple):
    """The tags along each way through some statements: those that reach their end, and those that have left the function before."""

    going: frozenset[tuple[Tag, ...]]
    gone: frozenset[tuple[Tag, ...]]


def tags_of(source: str) -> list[Tag]:
    """Return every tag F or B at the head of a comment, in order."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        head = HEAD.match(token.string) if token.type == tokenize.COMMENT else None
        if head:
            found += [Tag(token.start[0], mark[0], int(mark[1:])) for mark in re.findall(r"[FB]\d+", head[1])]
    return found


def _blocks(statement: ast.stmt) -> tuple[int, list[list[ast.stmt]], list[list[ast.stmt]]]:
    """Return the last line of a statement's own text, blocks of which exactly one is run, and blocks that are run one after the other after it."""
    match statement:
        case ast.If(test=test, body=body, orelse=orelse):
            return test.end_lineno or 0, [body, orelse], []
        case ast.For(iter=header, body=body, orelse=orelse) | ast.While(test=header, body=body, orelse=orelse):
            return header.end_lineno or 0, [], [body, orelse]
        case ast.With(items=items, body=body):
            return items[-1].context_expr.end_lineno or 0, [], [body]
        case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=finalbody):
            return statement.lineno, [body, *(handler.body for handler in handlers)], [orelse, finalbody]
        case ast.Match(subject=subject, cases=cases):
            return subject.end_lineno or 0, [case.body for case in cases], []
    return statement.end_lineno or 0, [], []


def flow_of(statements: list[ast.stmt], tags: list[Tag], begin: int) -> Flow:
    """Follow the tags through some statements; a comment between two statements belongs to the second, the first one's begins at line `begin`."""
    going: frozenset[tuple[Tag, ...]] = frozenset({()})
    gone: frozenset[tuple[Tag, ...]] = frozenset()
    for statement in statements:
        end, branches, series = _blocks(statement)
        own = tuple(tag for tag in tags if begin <= tag.line <= end)
        going = frozenset((*path, *own) for path in going)
        stages = ([branches] if branches else []) + [[block] for block in series]
        begin = end + 1
        for stage in stages:
            flows = []
            for block in stage:
                flows.append(flow_of(block, tags, begin))
                begin = (block[-1].end_lineno or 0) + 1 if block else begin
            gone |= {(*path, *rest) for path in going for flow in flows for rest in flow.gone}
            going = frozenset((*path, *rest) for path in going for flow in flows for rest in flow.going)
        if isinstance(statement, ast.Return | ast.Raise):
            going, gone = frozenset(), gone | going
    return Flow(going, gone)


def _order_problems(paths: frozenset[tuple[Tag, ...]], way: str) -> Iterator[tuple[int, str]]:
    for path in paths:
        for before, after in itertools.pairwise(path):
            if after.number <= before.number if way == "F" else after.number > before.number:
                yield after.line, f"{after} comes after {before}"


def _function_problems(node: ast.FunctionDef, tags: list[Tag], way: str, numbers: set[int]) -> Iterator[tuple[int, str]]:
    """Yield what is wrong with one function whose tags should have this way and these numbers, all of them."""
    flow = flow_of(node.body, tags, node.lineno)
    paths = flow.going | flow.gone
    for tag in tags:
        if tag.way != way:
            yield tag.line, f"{tag} stands in {node.name}"
        elif tag.number not in numbers:
            yield tag.line, f"{tag} undoes no line of the forward" if way == "B" else f"{tag} is no number"
    yield from _order_problems(paths, way)
    for number in numbers - {tag.number for path in paths for tag in path if tag.way == way}:
        yield node.lineno, f"{node.name} has no {way}{number}"


def tag_problems(source: str, file: str) -> list[str]:
    """Return what is wrong with the tags of one file's functions, as `file:line: text`."""
    tags = tags_of(source)
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    tags_in = {name: [tag for tag in tags if node.lineno <= tag.line <= (node.end_lineno or 0)] for name, node in functions.items()}
    problems = {(tag.line, f"{tag} stands outside of every function") for tag in {*tags}.difference(*tags_in.values())}
    for name, node in functions.items():
        suffix = next((suffix for suffix in WAYS if name.endswith(suffix)), "")
        mate = f"{name.removesuffix(suffix)}{({*WAYS} - {suffix}).pop()}" if suffix else ""
        if mate in functions:
            forward = tags_in[name if suffix == "_forward" else mate]
            numbers = {*range(1, max((tag.number for tag in forward if tag.way == "F"), default=0) + 1)}
            problems |= {*_function_problems(node, tags_in[name], WAYS[suffix], numbers)}
        elif tags_in[name]:
            problems.add((node.lineno, f"{name} carries tags, but there is no {mate}" if suffix else f"{name} carries tags, but is half of no pair"))
    return [f"{file}:{line}: {text}" for line, text in sorted(problems)]


def tag_problems_in(folder: Path) -> list[str]:
    """Return what is wrong in all files of a folder."""
    return [problem for path in sorted(folder.glob("*.py")) for problem in tag_problems(path.read_text(encoding="utf-8"), path.name)]
