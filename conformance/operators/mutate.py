# May import: standard library.
"""Which errors are planted: every mutant of a file differs from it in one place of one function.

    binary      + for -, * for /, & for |, each also the other way round; ** becomes *, // becomes *, % becomes //
    drop        a term or factor is left out: a + b, a * b, a & b, a | b become a, and b; a - b, a / b, a // b, a % b, a ** b become a
    swap        operands exchanged: b - a, b / b, b // a, b % a, b ** a
    compare     the other side of the boundary (< for <=, > for >=), == for !=, `is` for `is not`, `in` for `not in`, each also the other way round
    logic       `and` for `or` and the other way round; an operand of either left out
    unary       -x, ~x and `not x` become x
    condition   the test of an if, a while, an expression or a comprehension negated
    constant    a number one greater; a number other than -1, 0 and 1 also doubled; True for False and the other way round
    axis        another axis, or one axis fewer
    keepdims    left out
    name        max for min, argmax for argmin, any for all, zeros for ones, floor for ceil, sum for mean, each also the other way round
    word        the sort that is not stable, the other side of a search
    through     a rounding, an elementary function, a copy, a conversion of an array or a transposition left out
    arguments   two neighbouring arguments exchanged, where their names end in the same axes; the branches of `where` in any case
    returns     the same for two neighbouring elements of what is returned
    keyword     `where=` and `initial=` left out
    slice       a bound of a slice one greater
    einsum      two letters of an operand or of the result exchanged
    statement   a call for its effect, or a `break`, left out

Two that come to the same source are one. Messages of errors, annotations and docstrings are not touched. A mutant's id is
FILE:FUNCTION:OPERATOR:ORDINAL, which no edit of another function changes; `<module>` stands for the constants above the functions.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MODULE = "<module>"
UNTOUCHED = (ast.Raise, ast.Assert, ast.JoinedStr)

OTHER_BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip
COMMUTES = (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr)
OTHER_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
PAIRS = (
    ("maximum", "minimum"), ("max", "min"), ("argmax", "argmin"), ("any", "all"), ("zeros", "ones"), ("zeros_like", "ones_like"),
    ("floor", "ceil"), ("sum", "mean"), ("fmin", "fmax"),
)  # fmt: skip
OTHER_NAME = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
OTHER_WORD = {"stable": "quicksort", "right": "left", "left": "right"}
THROUGH = ("round_to", "exp", "sqrt", "square", "abs", "tanh", "log", "log1p", "expm1")
THROUGH_METHODS = ("copy", "astype")
OTHERWISE = ("axis", "keepdims", "strict")  # keywords that `_of_keywords` changes, and one that is an assertion
IN_ANY_ORDER = ("max", "min", "maximum", "minimum", "fmin", "fmax", "logaddexp")  # of arguments


class Mutant(NamedTuple):
    """One planted error."""

    id: str
    file: str  # the module's name
    function: str
    line: int
    before: str
    after: str
    source: str  # of the whole function

    @property
    def operator(self) -> str:
        """The kind of error."""
        return self.id.split(":")[2]


class Change(NamedTuple):
    """One way to change one node."""

    operator: str
    node: ast.AST | None  # None: the statement goes


def axes_of(node: ast.AST) -> str | None:
    """Return the axes that a name ends in: "" for a name without, None for what has no name."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    if name is None:
        return None
    last = name.rpartition("_")[2]
    return last if last.isupper() or last[:1].isupper() else ""


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _exchanged(items: list[Any], i: int) -> list[Any]:
    return [*items[:i], items[i + 1], items[i], *items[i + 2 :]]


def _name_of(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


def _of_binary(node: ast.BinOp) -> Iterator[Change]:
    kind = type(node.op)
    if kind not in OTHER_BINARY:
        return
    yield Change("binary", _with(node, op=OTHER_BINARY[kind]()))
    yield Change("drop", node.left)
    if kind in COMMUTES:
        yield Change("drop", node.right)
    else:
        yield Change("swap", _with(node, left=node.right, right=node.left))


def _of_compare(node: ast.Compare) -> Iterator[Change]:
    for i, op in enumerate(node.ops):
        yield Change("compare", _with(node, ops=[*node.ops[:i], OTHER_COMPARE[type(op)](), *node.ops[i + 1 :]]))


def _of_logic(node: ast.BoolOp) -> Iterator[Change]:
    yield Change("logic", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And()))
    for i in range(len(node.values)):
        rest = [*node.values[:i], *node.values[i + 1 :]]
        yield Change("logic", rest[0] if len(rest) == 1 else _with(node, values=rest))


def _of_unary(node: ast.UnaryOp) -> Iterator[Change]:
    if not isinstance(node.operand, ast.Constant):
        yield Change("unary", node.operand)


def _number(node: ast.AST) -> Any:
    """Return the number that a node spells, with its sign, or None."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value
    return node.value if isinstance(node, ast.Constant) and type(node.value) in (int, float) else None


def _of_number(node: ast.AST, value: Any) -> Iterator[Change]:
    yield Change("constant", ast.Constant(value + 1))
    if value not in (-1, 0, 1):
        yield Change("constant", ast.Constant(value * 2))


def _of_constant(node: ast.Constant) -> Iterator[Change]:
    if isinstance(node.value, bool):
        yield Change("constant", ast.Constant(not node.value))


def _of_condition(node: ast.If | ast.While | ast.IfExp) -> Iterator[Change]:
    yield Change("condition", _with(node, test=ast.UnaryOp(ast.Not(), node.test)))


def _of_comprehension(node: ast.comprehension) -> Iterator[Change]:
    for i, test in enumerate(node.ifs):
        yield Change("condition", _with(node, ifs=[*node.ifs[:i], ast.UnaryOp(ast.Not(), test), *node.ifs[i + 1 :]]))


def other_axes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in the place of an axis: its neighbour, or each tuple of one axis fewer."""
    value = _number(node)
    if value is not None:
        yield ast.Constant(value - 1 if value else 1)
    elif isinstance(node, ast.Tuple):
        for i in range(len(node.elts)):
            yield ast.Tuple([*node.elts[:i], *node.elts[i + 1 :]], ast.Load())


def _of_keywords(node: ast.Call) -> Iterator[Change]:
    for i, keyword in enumerate(node.keywords):
        without = _with(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])
        if keyword.arg == "keepdims":
            yield Change("keepdims", without)
        if keyword.arg in ("where", "initial"):
            yield Change("keyword", without)
        for operator, values in (("axis", other_axes(keyword.value) if keyword.arg == "axis" else ()), ("word", _other_words(keyword.value))):
            for value in values:
                changed = _with(keyword, value=value)
                yield Change(operator, _with(node, keywords=[*node.keywords[:i], changed, *node.keywords[i + 1 :]]))


def _other_words(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Constant) and node.value in OTHER_WORD:
        yield ast.Constant(OTHER_WORD[node.value])


def _of_einsum(node: ast.Call) -> Iterator[Change]:
    subscripts = node.args[0].value
    parts = subscripts.replace("->", ",").split(",")
    for i, part in enumerate(parts):
        for j in range(len(part) - 1) if i == len(parts) - 1 else range(min(len(part) - 1, 1)):
            changed = [*parts[:i], part[:j] + part[j + 1] + part[j] + part[j + 2 :], *parts[i + 1 :]]
            text = ",".join(changed[:-1]) + "->" + changed[-1]
            yield Change("einsum", _with(node, args=[ast.Constant(text), *node.args[1:]]))


def _of_call(node: ast.Call) -> Iterator[Change]:
    name = _name_of(node)
    if name in OTHER_NAME:
        changed = _with(node.func, **{"attr" if isinstance(node.func, ast.Attribute) else "id": OTHER_NAME[name]})
        yield Change("name", _with(node, func=changed))
    if name in THROUGH and node.args:
        yield Change("through", node.args[0])
    if name in THROUGH_METHODS and isinstance(node.func, ast.Attribute):
        yield Change("through", node.func.value)
    if name == "einsum":
        yield from _of_einsum(node)
    elif name not in IN_ANY_ORDER:
        for i, (a, b) in enumerate(zip(node.args, node.args[1:], strict=False)):
            if (name == "where" and i == 1) or (axes_of(a) is not None and axes_of(a) == axes_of(b)):
                yield Change("arguments", _with(node, args=_exchanged(node.args, i)))
    yield from _of_keywords(node)


def _of_return(node: ast.Return) -> Iterator[Change]:
    if isinstance(node.value, ast.Tuple):
        for i, (a, b) in enumerate(zip(node.value.elts, node.value.elts[1:], strict=False)):
            if axes_of(a) and axes_of(a) == axes_of(b):
                yield Change("returns", _with(node, value=_with(node.value, elts=_exchanged(node.value.elts, i))))


def _of_slice(node: ast.Slice) -> Iterator[Change]:
    for field in ("lower", "upper"):
        bound = getattr(node, field)
        if bound is not None and _number(bound) is None:
            yield Change("slice", _with(node, **{field: ast.BinOp(bound, ast.Add(), ast.Constant(1))}))


def _of_attribute(node: ast.Attribute) -> Iterator[Change]:
    if node.attr == "T":
        yield Change("through", node.value)


def _of_expression(node: ast.Expr) -> Iterator[Change]:
    if isinstance(node.value, ast.Call):
        yield Change("statement", None)


def _of_break(node: ast.Break) -> Iterator[Change]:
    yield Change("statement", None)


CHANGES = {
    ast.BinOp: _of_binary, ast.Compare: _of_compare, ast.BoolOp: _of_logic, ast.UnaryOp: _of_unary, ast.Constant: _of_constant, ast.If: _of_condition,
    ast.While: _of_condition, ast.IfExp: _of_condition, ast.comprehension: _of_comprehension, ast.Call: _of_call, ast.Return: _of_return,
    ast.Slice: _of_slice, ast.Attribute: _of_attribute, ast.Expr: _of_expression, ast.Break: _of_break,
}  # fmt: skip


def changes_of(node: ast.AST) -> Iterator[Change]:
    """Yield every change of one node; its children are not looked into."""
    value = _number(node)
    if value is not None:
        yield from _of_number(node, value)
    elif type(node) in CHANGES:
        yield from CHANGES[type(node)](node)  # type: ignore[operator]


class Place(NamedTuple):
    """Where a node stands in its parent."""

    node: ast.AST
    parent: ast.AST
    field: str
    index: int | None

    def put(self, node: ast.AST | None) -> None:
        """Put another node there; None is `pass`."""
        node = ast.Pass() if node is None else node
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def places(node: ast.AST) -> Iterator[Place]:
    """Yield the nodes below one in order of the source, without messages, annotations and the keywords of OTHERWISE."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or (isinstance(node, ast.keyword) and node.arg in OTHERWISE):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if isinstance(child, ast.AST) and not isinstance(child, UNTOUCHED):
                yield Place(child, node, field, index)
                if _number(child) is None:
                    yield from places(child)


def mutants_of_tree(file: str, function: str, tree: ast.AST) -> Iterator[Mutant]:
    """Yield the mutants of one function, or of the constants of a module."""
    ordinals: dict[str, int] = {}
    seen = {ast.unparse(tree)}
    for place in list(places(tree)):
        for change in changes_of(place.node):
            place.put(change.node)
            source = ast.unparse(ast.fix_missing_locations(tree))
            place.put(place.node)
            ordinal = ordinals.get(change.operator, 0)
            ordinals[change.operator] = ordinal + 1
            if source in seen:
                continue
            seen.add(source)
            before, after = (ast.unparse(node) if node is not None else "pass" for node in (place.node, change.node))
            line = getattr(place.node, "lineno", getattr(place.parent, "lineno", 0))
            yield Mutant(f"{file}:{function}:{change.operator}:{ordinal}", file, function, line, before, after, source)


def parts_of(source: str) -> dict[str, ast.AST]:
    """Return a module's functions by name, and its constants as a module of their own."""
    tree = ast.parse(source)
    parts: dict[str, ast.AST] = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    constants = [node for node in tree.body if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Subscript)]
    return parts | ({MODULE: ast.Module(constants, [])} if constants else {})


def mutants_of_file(path: Path) -> list[Mutant]:
    """Return all mutants of a file, in order of the source."""
    found = [mutant for name, tree in parts_of(path.read_text(encoding="utf-8")).items() for mutant in mutants_of_tree(path.stem, name, tree)]
    return sorted(found, key=lambda mutant: mutant.line)
