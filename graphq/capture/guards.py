"""Which of an export's guards the declared dimensions do not imply.

A guard compares sizes, ``L['tensors'][i].size()[axis]``. Sizes are replaced by the declared dimensions, both sides
become polynomials in them, and bounds of the difference decide; where they leave it open, the ranges are cut in half,
down to single sizes. A guard counts as implied only if that proves it everywhere.

``a // m`` is (a - r) / m and ``a % m`` is r, with one remainder r from 0 to m - 1 for both (Python's floor division).
"""

import ast
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final, cast, final

import sympy

from graphq.capture.source import TOTAL

_SIZE: Final = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_MAX_BOXES: Final = 512  # cuts of the ranges, some milliseconds each, after which a guard counts as not implied
_MAX_POINTS: Final = 32
_MAX_POWER: Final = 8
_MAX_CORNERS: Final = 256

_Box = dict[str, tuple[int, int]]  # a range, both ends inclusive, for each name


def unproved(
    guards: Sequence[str], shapes: Sequence[tuple[int | str, ...]], ranges: Mapping[str, tuple[int, int]]
) -> list[str]:
    """The guards, in terms of the declared dimensions, that are not proved everywhere in the declared ``ranges``.

    ``shapes[i]`` is the declared shape of input i; ``ranges`` gives each dimension's smallest and largest size.
    """
    texts = dict.fromkeys(_name_sizes(guard, shapes) for guard in guards)
    return [text.replace(f"({TOTAL})", "total_sequence") for text in texts if not _holds(text, ranges)]


def _name_sizes(guard: str, shapes: Sequence[tuple[int | str, ...]]) -> str:
    def size(found: re.Match[str]) -> str:
        tensor, axis = int(found[1]), int(found[2])
        if tensor >= len(shapes) or axis >= len(shapes[tensor]):
            return found[0]
        dimension = shapes[tensor][axis]
        return f"({dimension})" if dimension == TOTAL else str(dimension)

    return _SIZE.sub(size, guard)


def _holds(text: str, ranges: Mapping[str, tuple[int, int]]) -> bool:
    """Whether the guard is proved for all sizes in ``ranges``."""
    try:
        guard = ast.parse(text.strip(), mode="eval").body
        names = {node.id for node in ast.walk(guard) if isinstance(node, ast.Name)} - {"min", "max"}
        whole: _Box = {name: ranges[name] for name in sorted(names)}
        smallest = [sorted({low, min(low + 1, high), min(low + 2, high)}) for low, high in whole.values()]
        points = itertools.islice(itertools.product(*smallest), _MAX_POINTS)
        # The points come first: most guards that do not hold everywhere fail at one of them.
        undecided = [whole, *(dict(zip(whole, ((size, size) for size in point), strict=True)) for point in points)]
        for _ in range(_MAX_BOXES):
            if not undecided:
                return True
            box = undecided.pop()
            verdict = _decide(guard, box)
            if verdict is False:
                return False
            if verdict is None:
                undecided += _halves(box)
    except (SyntaxError, ValueError, KeyError, _FormError):
        pass
    return False


@final
class _FormError(Exception):
    """The guard, or an expression in it, is of a form that comparisons of sizes do not have."""


@final
class _OpenError(Exception):
    """Nothing can be said for this box as a whole."""


def _halves(box: _Box) -> tuple[_Box, _Box]:
    name = max(box, key=lambda name: box[name][1] - box[name][0])
    low, high = box[name]
    assert low < high, "a single point is always decided"
    middle = (low + high) // 2
    return {**box, name: (low, middle)}, {**box, name: (middle + 1, high)}


def _decide(guard: ast.expr, box: _Box) -> bool | None:
    """True: the guard holds everywhere in ``box``; False: nowhere; None: that remains open."""
    match guard:
        case ast.Constant(bool() as value):
            return value
        case ast.UnaryOp(ast.Not(), part):
            verdict = _decide(part, box)
            return None if verdict is None else not verdict
        case ast.BoolOp(op, parts):
            return _all_or_any([_decide(part, box) for part in parts], isinstance(op, ast.Or))
        case ast.Compare(left, ops, rights):
            pairs = zip([left, *rights[:-1]], ops, rights, strict=True)
            return _all_or_any([_compare(a, op, b, box) for a, op, b in pairs], False)
        case _:
            raise _FormError


def _all_or_any(verdicts: list[bool | None], is_any: bool) -> bool | None:
    if is_any in verdicts:
        return is_any
    return None if None in verdicts else not is_any


def _compare(left: ast.expr, op: ast.cmpop, right: ast.expr, box: _Box) -> bool | None:
    box = dict(box)  # the remainders of this comparison are added
    try:
        low, high = _bounds(_value(left, box) - _value(right, box), box)
    except _OpenError:
        return None
    match op:
        case ast.Lt():
            return True if high < 0 else False if low >= 0 else None
        case ast.LtE():
            return True if high <= 0 else False if low > 0 else None
        case ast.Gt():
            return True if low > 0 else False if high <= 0 else None
        case ast.GtE():
            return True if low >= 0 else False if high < 0 else None
        case ast.Eq():
            return True if low == high == 0 else False if low > 0 or high < 0 else None
        case ast.NotEq():
            return False if low == high == 0 else True if low > 0 or high < 0 else None
        case _:
            raise _FormError


def _value(node: ast.expr, box: _Box) -> sympy.Expr:
    """The polynomial that an expression is everywhere in ``box``, to which the ranges of remainders are added."""
    match node:
        case ast.Constant(int() as value) if not isinstance(value, bool):
            return sympy.Integer(value)
        case ast.Name(name):
            low, high = box[name]
            return sympy.Symbol(name) if low < high else sympy.Integer(low)
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, box)
        case ast.BinOp(left, ast.Add(), right):
            return _value(left, box) + _value(right, box)
        case ast.BinOp(left, ast.Sub(), right):
            return _value(left, box) - _value(right, box)
        case ast.BinOp(left, ast.Mult(), right):
            return _value(left, box) * _value(right, box)
        case ast.BinOp(base, ast.Pow(), ast.Constant(int() as power)) if 0 <= power <= _MAX_POWER:
            return _value(base, box) ** power
        case ast.BinOp(left, ast.FloorDiv(), right):
            return _divide(_value(left, box), _value(right, box), box)[0]
        case ast.BinOp(left, ast.Mod(), right):
            return _divide(_value(left, box), _value(right, box), box)[1]
        case ast.Call(ast.Name("min"), [first, *others], []):
            return _extreme([_value(argument, box) for argument in (first, *others)], box, min, sign=1)
        case ast.Call(ast.Name("max"), [first, *others], []):
            return _extreme([_value(argument, box) for argument in (first, *others)], box, max, sign=-1)
        case _:
            raise _FormError


def _divide(a: sympy.Expr, b: sympy.Expr, box: _Box) -> tuple[sympy.Expr, sympy.Expr]:
    """Quotient and remainder of Python's floor division."""
    low, high = _bounds(b, box)
    if high <= 0:
        raise _FormError  # a division by zero, or by what is no size
    if low <= 0:
        raise _OpenError
    dividend, divisor = _polynomial(a), _polynomial(b)
    if _has_integers(dividend):
        quotient, rest = dividend.div(divisor)  # a == quotient * b + rest
        if rest.is_zero and _has_integers(quotient):
            return quotient.as_expr(), sympy.Integer(0)
    if not divisor.is_ground:
        raise _OpenError
    size = int(divisor.as_expr())
    known, rest = sympy.Integer(0), dividend  # a == known * size + rest
    if _has_integers(dividend):
        rest = sympy.Poly.from_dict({powers: c % size for powers, c in dividend.terms()}, *dividend.gens)
        known = (dividend - rest).as_expr() / size
    low, high = _bounds(rest.as_expr(), box)
    if low // size == high // size:  # the rest crosses no multiple of the divisor
        quotient = sympy.Integer(low // size)
        return known + quotient, rest.as_expr() - quotient * size
    remainder = sympy.Symbol(f"({rest.as_expr()}) % {size}")  # equal dividends share it
    box[remainder.name] = (0, size - 1)
    return known + (rest.as_expr() - remainder) / size, remainder


def _extreme(values: Sequence[sympy.Expr], box: _Box, choose: Callable[..., Any], sign: int) -> sympy.Expr:
    """The smallest (the largest, where ``sign`` is -1) of ``values``, or a new name that has its bounds."""
    for one in values:
        if all(_bounds(sign * (one - other), box)[1] <= 0 for other in values):
            return one
    lows, highs = zip(*(_bounds(value, box) for value in values), strict=True)
    name = f"{choose.__name__}{tuple(map(str, values))}"
    box[name] = (math.floor(choose(lows)), math.ceil(choose(highs)))
    return sympy.Symbol(name)


def _polynomial(value: sympy.Expr) -> sympy.Poly:
    return sympy.Poly(value, *(_symbols(value) or [sympy.Dummy()]))


def _symbols(value: sympy.Expr) -> list[sympy.Symbol]:
    return sorted(cast(set[sympy.Symbol], value.free_symbols), key=str)


def _has_integers(polynomial: sympy.Poly) -> bool:
    return all(c.is_integer for c in polynomial.coeffs())


def _bounds(value: sympy.Expr, box: _Box) -> tuple[Fraction, Fraction]:
    """What a polynomial is nowhere in ``box`` below and above; its extremes where no name has a power above 1."""
    ranges = {symbol: box[symbol.name] for symbol in _symbols(value)}
    widths = [high - low for low, high in ranges.values()] or [0]
    from_zero = _polynomial(value.subs({symbol: symbol + low for symbol, (low, _) in ranges.items()}))
    terms = [(powers, Fraction(int(c.p), int(c.q))) for powers, c in from_zero.terms()]
    if all(power <= 1 for powers, _ in terms for power in powers) and 2 ** len(widths) <= _MAX_CORNERS:
        corners = [_at(corner, terms) for corner in itertools.product(*((0, width) for width in widths))]
        return min(corners), max(corners)
    # Each monomial is 0 at the ranges' lower ends and largest at their upper ends; the constant is the same at both.
    down = [(powers, c) for powers, c in terms if c < 0 or not any(powers)]
    up = [(powers, c) for powers, c in terms if c > 0 or not any(powers)]
    return _at(widths, down), _at(widths, up)


def _at(point: Sequence[int], terms: Sequence[tuple[tuple[int, ...], Fraction]]) -> Fraction:
    return sum((c * math.prod(map(pow, point, powers)) for powers, c in terms), Fraction(0))
