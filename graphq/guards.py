"""Which of an export's guards the declared dimensions do not imply.

A guard is a comparison over ``L['name'].size()[axis]``. Sizes are replaced by the declared dimensions and the guard is
decided by sympy; what sympy leaves open is checked at all corners and many inner points of the declared ranges.
"""

import ast
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import sympy

from graphq.source import TOTAL

_BINARY: Final[dict[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: Final[dict[type[ast.cmpop], Callable[[Any, Any], Any]]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def unproved(
    guards: Sequence[str], shapes: Sequence[tuple[int | str, ...]], ranges: Mapping[str, tuple[int, int]]
) -> list[str]:
    """The guards, in terms of the declared dimensions, that do not hold everywhere in the declared ``ranges``.

    ``shapes[i]`` is the declared shape of input i; ``ranges`` gives each dimension's smallest and largest size.
    """
    failed: dict[str, None] = {}
    seen: set[str] = set()
    for guard in guards:
        text = _name_sizes(guard, shapes)
        if text in seen:
            continue
        seen.add(text)
        if not _holds(text, ranges):
            failed[text.replace(f"({TOTAL})", "total_sequence")] = None
    return list(failed)


def _name_sizes(guard: str, shapes: Sequence[tuple[int | str, ...]]) -> str:
    def size(found: re.Match[str]) -> str:
        dimension = shapes[int(found[1])][int(found[2])]
        return f"({dimension})" if dimension == TOTAL else str(dimension)

    return re.sub(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]", size, guard)


def _holds(text: str, ranges: Mapping[str, tuple[int, int]]) -> bool:
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return False  # a guard about something other than sizes
    names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id not in ("min", "max")})
    symbols = {n: sympy.Symbol(n, integer=True, positive=ranges[n][0] > 0 or None, nonnegative=True) for n in names}
    try:
        proved = _evaluate(tree, symbols, sympy.Min, sympy.Max, symbolic=True)
    except (KeyError, ValueError):
        return False  # a form that sizes do not take
    if proved is True or proved is sympy.true:
        return True
    if proved is False or proved is sympy.false:
        return False
    inner = (2, 3, 4, 5, 7, 8, 16, 31, 127, 128, 1000, 4096, 4097)
    points = [sorted({p for p in (low, *inner, high - 1, high) if low <= p <= high}) for low, high in map(ranges.__getitem__, names)]
    return all(_evaluate(tree, dict(zip(names, p, strict=True)), min, max) for p in itertools.product(*points))


def _evaluate(
    tree: ast.AST, values: Mapping[str, Any], least: Callable[..., Any], most: Callable[..., Any], symbolic: bool = False
) -> Any:
    def walk(node: ast.AST) -> Any:
        match node:
            case ast.Constant(int() as value):
                return sympy.Integer(value) if symbolic and not isinstance(value, bool) else value
            case ast.Name(name):
                return values[name]
            case ast.UnaryOp(ast.USub(), operand):
                return -walk(operand)
            case ast.BinOp(left, op, right):
                return _BINARY[type(op)](walk(left), walk(right))
            case ast.Call(ast.Name("min"), arguments):
                return least(*map(walk, arguments))
            case ast.Call(ast.Name("max"), arguments):
                return most(*map(walk, arguments))
            case ast.BoolOp(op, parts):
                decided = [walk(part) for part in parts]
                if not symbolic:
                    return any(decided) if isinstance(op, ast.Or) else all(decided)
                return (sympy.Or if isinstance(op, ast.Or) else sympy.And)(*decided)
            case ast.Compare(left, [op], [right]) if symbolic and isinstance(op, ast.Eq):
                difference = sympy.simplify(walk(left) - walk(right))
                return True if difference == 0 else sympy.Eq(difference, 0)
            case ast.Compare(left, [op], [right]):
                return _COMPARE[type(op)](walk(left), walk(right))
            case _:
                raise ValueError(ast.dump(node))

    return walk(tree)
