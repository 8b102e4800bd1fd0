"""include and exclude of msModelSlim: shell globs where ``*`` crosses dots, with braces, as matches.

``{a,b}`` and ``{3..60}`` are written out, as wcmatch does it; a text without wildcards is one layer's full name.
"""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from typing import Final

from graphq.errors import SpecError
from graphq.frontends.document import Section, show
from graphq.spec.match import Exact, Linears

MAX_EXPANDED: Final = 1000  # wcmatch's own limit
MAX_LENGTH: Final = 128
_SEQUENCE: Final = re.compile(r"(-?\d{1,6})\.\.(-?\d{1,6})(?:\.\.(-?\d{1,6}))?")


def read_patterns(section: Section, key: str) -> tuple[str, ...]:
    """The globs of the list at ``key``, braces written out, each once."""
    found: dict[str, None] = {}
    value = section.values.get(key)
    hint = f"; write [{value!r}]" if isinstance(value, str) else " of patterns"
    for index, item in enumerate(section.items(key, hint) if value is not None else ()):
        if not isinstance(item, str):
            section.report(f"{show(item)} is not a pattern", key, index)
            continue
        expanded = section.made(lambda item=item: expand(item), key, index)
        found.update(dict.fromkeys(expanded or ()))
    if len(found) > MAX_EXPANDED:
        section.report(f"more than {MAX_EXPANDED:,} patterns, braces written out", key)
        return ()
    return tuple(found)


def expand(text: str) -> tuple[str, ...]:
    """The patterns that ``text`` stands for. Raises ``SpecError`` for what is no pattern of layers' names."""
    if "\\" in text or "[^" in text or "[[:" in text or "|" in text:
        raise SpecError(f"{show(text)}: of brackets, [abc], [a-z] and [!a] are read; \\, [^, [[: and | are not")
    if not text or " " in text or not text.isprintable():
        raise SpecError(f"{show(text)} is not a pattern of layers' names")
    if len(text) > MAX_LENGTH or text.count("{") > 8:
        raise SpecError(f"{show(text)}: the pattern is longer than {MAX_LENGTH} characters, or has more than 8 braces")
    found = list(dict.fromkeys(_expand(text)))
    for pattern in found:
        if is_name(pattern):
            Exact(pattern)  # raises
    return tuple(found)


def _expand(text: str) -> list[str]:
    start = text.find("{")
    if start < 0:
        return [text]
    depth, commas = 0, [start]
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "," and depth == 1:
            commas.append(at)
        if depth == 0:
            break
    else:
        raise SpecError(f"{show(text)}: a brace is not closed")
    inside = [text[a + 1 : b] for a, b in zip(commas, [*commas[1:], at], strict=True)]
    if len(inside) == 1:
        inside = _sequence(text, inside[0])
    tails = _expand(text[at + 1 :])
    heads = [text[:start] + one for part in inside for one in _expand(part)]
    if len(heads) * len(tails) > MAX_EXPANDED:
        raise SpecError(f"{show(text)}: the braces stand for more than {MAX_EXPANDED:,} patterns")
    return [head + tail for head in heads for tail in tails]


def _sequence(text: str, inside: str) -> list[str]:
    found = _SEQUENCE.fullmatch(inside)
    if found is None:
        raise SpecError(f"{show(text)}: {{{inside}}} is neither a list such as {{a,b}} nor a range such as {{3..60}}")
    first, last, step = int(found[1]), int(found[2]), abs(int(found[3] or 1)) or 1
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if len(numbers) > MAX_EXPANDED:
        raise SpecError(f"{show(text)}: the braces stand for more than {MAX_EXPANDED:,} patterns")
    padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-").startswith("0") for end in (found[1], found[2]))
    width = max(len(found[1]), len(found[2])) if padded else 0
    return [f"{number:0{width}d}" for number in numbers]


def is_name(pattern: str) -> bool:
    """Whether a pattern has no wildcards: it is one layer's full name."""
    return not set(pattern) & set("*?[")


def matches_of(include: Sequence[str], exclude: tuple[str, ...]) -> Iterator[Linears]:
    """A match for each pattern of ``include``, less ``exclude``; none for a pattern all of which ``exclude`` has."""
    for pattern in include:
        if not any(is_inside(pattern, other) for other in exclude):
            yield Linears(pattern, exclude)


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the patterns matches the name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_inside(pattern: str, other: str) -> bool:
    """Whether every name that ``pattern`` matches is known to match ``other``."""
    if pattern == other:
        return True
    return (is_name(pattern) or not set(other) & set("?[")) and fnmatch.fnmatchcase(pattern, other)


def may_meet(one: str, other: str) -> bool:
    """Whether a name may match both patterns; brackets count as any character."""
    if is_name(one) or is_name(other):
        return one == other or fnmatch.fnmatchcase(one, other) or fnmatch.fnmatchcase(other, one)
    a, b = (re.sub(r"\[!?\]?[^\]]*\]", "?", pattern) for pattern in (one, other))
    row = [True]  # row[j]: whether a[:i] and b[:j] have a text in common
    for mark in b:
        row.append(row[-1] and mark == "*")
    for mark in a:
        above, row = row, [row[0] and mark == "*"]
        for j, opposite in enumerate(b):
            if mark == "*" or opposite == "*":
                row.append(row[j] or above[j + 1] or above[j])
            else:
                row.append(above[j] and (mark == opposite or "?" in (mark, opposite)))
    return row[-1]
