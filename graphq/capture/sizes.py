"""Sizes of named dimensions: those that a caller fixes, and the bounds that a model's own code sets."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import SymInt, fx, nn

from graphq.capture.source import PAST, SEQUENCE, TOTAL, source_of

MAX_SIZE: Final = 1 << 20  # the declared upper end of every dynamic dimension
Ranges = Sequence[tuple[str, int, int]]

aten = torch.ops.aten
_SAME_ELEMENTS: Final = frozenset(  # they leave each element an element of what they are given
    [
        aten.unsqueeze.default, aten.expand.default, aten.view.default, aten.reshape.default, aten.repeat.default,
        aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.alias.default,
    ]
)  # fmt: skip


_SUM: Final = r"\(?(?:sequence \+ past_sequence|past_sequence \+ sequence|total_sequence)\)?"
_SUM_AT_MOST: Final = re.compile(rf"(?:(?P<more>\d+) \+ )?{_SUM} <= (?P<limit>\d+)")
_SUM_UNEQUAL: Final = re.compile(rf"{_SUM} != (?P<limit>\d+)")


def fixed_sizes(shapes: object, ranges: Ranges) -> tuple[dict[str, int], list[str]]:
    """The sizes that ``shapes`` fixes, by dimension, and a line on each thing that is wrong with it.

    ``shapes`` gives sizes by name; that of a sum of dimensions (``past_sequence + sequence``) fixes the part that is
    not given itself. Lines name the dimension and say what there is.
    """
    if not isinstance(shapes, Mapping):
        return {}, [f"shapes: {shapes!r} is no table of sizes by dimension, such as {{'batch': 1}}"]
    known = {name: (low, high) for name, low, high in ranges}
    names = [*known, *([TOTAL] if {PAST, SEQUENCE} <= known.keys() else [])]
    given: dict[str, int] = {}
    problems: list[str] = []
    for name, size in cast(Mapping[Any, Any], shapes).items():
        if name not in names:
            there_are = f"there are {', '.join(names)}" if names else "all have one size already"
            problems.append(f"shapes: no dimension {name}; {there_are}")
        elif type(size) is not int:
            problems.append(f"shapes: {name}: {size!r} is not a whole number")
        else:
            given[name] = size
    total = given.pop(TOTAL, None)
    if total is not None and not {PAST, SEQUENCE} & given.keys():
        problems.append(f"shapes: {TOTAL}: {total} fixes neither; give {PAST} or {SEQUENCE}, too")
    elif total is not None:
        missing, part = (SEQUENCE, PAST) if PAST in given else (PAST, SEQUENCE)
        given.setdefault(missing, total - given[part])
        if total != given[PAST] + given[SEQUENCE]:
            problems.append(f"shapes: {TOTAL}: {total} is not {given[PAST]} + {given[SEQUENCE]}")
    for name, size in given.items():
        if problem := range_problem(name, size, *known[name]):
            problems.append(f"shapes: {problem}")
    return given, problems


def range_problem(name: str, size: int, low: int, high: int) -> str | None:
    """What is wrong with a size of this dimension, in words."""
    if low <= size <= high:
        return None
    if low == high:
        return f"{name}: {size}: it is fixed at {low}"
    return f"{name}: {size}: it is {low} to {high:,}"


def bounds_of(guard: str) -> tuple[int, int] | None:
    """The smallest and largest size for which a guard on one size holds, ``2 <= s and s <= 20``; None for another.

    Export takes no size for smaller than 2, so that a smallest of 2 says nothing: it is given as 0.
    """
    low, high = 0, MAX_SIZE
    sizes = set[str]()
    for part in guard.split(" and "):
        if found := re.fullmatch(r"(\d+) (<=?) (.+)", part.strip()):
            low, size = max(low, int(found[1]) + (found[2] == "<")), found[3]
        elif found := re.fullmatch(r"(.+) (<=?|>=?) (\d+)", part.strip()):
            size, number = found[1], int(found[3])
            if "<" in found[2]:
                high = min(high, number - (found[2] == "<"))
            else:
                low = max(low, number + (found[2] == ">"))
        else:
            return None
        sizes.add(size)
    return (low if low > 2 else 0, high) if len(sizes) == 1 and re.fullmatch(r"[\w.\[\]()']+", sizes.pop()) else None


def total_limit(guards: Sequence[str]) -> tuple[int | None, list[str]]:
    """The largest sum of past and new tokens that ``guards`` allow, where some bound it, and those that do not."""
    limits: list[int] = []
    others: list[str] = []
    unequal: list[int] = []
    for guard in guards:
        if found := _SUM_AT_MOST.fullmatch(guard):
            limits.append(int(found["limit"]) - int(found["more"] or 0))
        elif found := _SUM_UNEQUAL.fullmatch(guard):
            unequal.append(int(found["limit"]))
        else:
            others.append(guard)
    limit = min(limits, default=None)
    for size in unequal:  # the last size alone, at which a slice would be the whole table
        if limit is not None and size >= limit:
            limit = min(limit, size - 1)
        else:
            others.append(f"total_sequence != {size}")
    return limit, others


def table_limits(gm: fx.GraphModule, ranges: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The largest size of each dimension whose positions, counted from 0, are looked up in a table of fewer rows.

    Such a lookup has no guard: only the run of a larger size would fail.
    """
    names = _symbols(gm)
    found: dict[str, int] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, positions = cast(tuple[fx.Node, fx.Node], node.args[:2])
        count = _counted(positions)
        name = "" if count is None else names.get(str(count.node.expr), "")
        rows = table.meta["val"].shape[0]
        if name in ranges and isinstance(rows, int) and rows < ranges[name][1]:
            found[name] = min(rows, found.get(name, rows))
    return found


def position_limit(model: nn.Module) -> int | None:
    """The most tokens that a transformers model has positions for, if its configuration says so.

    A position table with a row of padding counts from the row behind it (fairseq's convention: RoBERTa, MPNet).
    """
    longest: Any = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    padded = [m for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    return min([longest, *(m.num_embeddings - cast(int, m.padding_idx) - 1 for m in padded)])


def _symbols(gm: fx.GraphModule) -> dict[str, str]:
    """The declared name of each symbol that is a size of an input."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {
        str(size.node.expr): name
        for node, declared in zip(placeholders, source_of(gm).inputs, strict=True)
        for size, name in zip(node.meta["val"].shape, declared.shape, strict=True)
        if isinstance(size, SymInt) and isinstance(name, str)
    }


def _counted(node: fx.Node) -> SymInt | None:
    """How many positions a node has, 0, 1 and so on, where these are its elements."""
    while node.target in _SAME_ELEMENTS:
        node = node.all_input_nodes[0]
    starts_at_0 = node.target is aten.arange.default or (node.target is aten.arange.start and node.args[0] == 0)
    if not starts_at_0:
        return None
    count = node.meta["val"].shape[0]
    return count if isinstance(count, SymInt) else None
