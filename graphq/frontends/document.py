"""A spec as plain data that knows where each key stands, and its typed reading, which keeps every problem."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Final, TypeAlias, TypeVar, cast, final

from graphq.errors import SpecError

MAX_DEPTH: Final = 32
MAX_VALUES: Final = 10_000
MAX_INTEGER_BITS: Final = 64  # Python refuses to print integers of many digits

T = TypeVar("T")
Plain: TypeAlias = "str | int | float | bool | list[Plain] | dict[str, Plain] | None"
KeyPath: TypeAlias = tuple[str | int, ...]


@final
@dataclass(frozen=True)
class Document:
    """A mapping, the file and lines it was read from (Python data has neither), what is wrong and what is unused."""

    path: str = ""
    root: dict[str, Plain] = field(default_factory=dict[str, Plain])
    lines: dict[KeyPath, int] = field(default_factory=dict[KeyPath, int])
    problems: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    def prefix(self, at: KeyPath, line: int | None = None) -> str:
        """``path:line:key: ``, as far as they are known. A missing key has the line of the section that lacks it."""
        known = next((self.lines[at[:end]] for end in range(len(at), 0, -1) if at[:end] in self.lines), None)
        place = ":".join(filter(None, (self.path, str(line or known or ""), spell(at))))
        return f"{place}: " if place else ""

    def report(self, at: KeyPath, message: str, line: int | None = None) -> None:
        """Adds a line to the problems."""
        self.problems.append(self.prefix(at, line) + message)

    def origin(self, at: KeyPath, name: str) -> str:
        """``name`` with the line of ``at``, for ``Rule.source``."""
        return f"{name} (line {self.lines[at]})" if at in self.lines else name

    def check_bounds(self, at: KeyPath, values: int, depth: int | None = None, line: int | None = None) -> None:
        """Raises ``SpecError`` for data too deep or too much for a spec, as recursive and exploding aliases make it."""
        if (len(at) + 1 if depth is None else depth) > MAX_DEPTH:
            raise SpecError(f"{self.prefix(at[:1], line)}nested more than {MAX_DEPTH} deep")
        if values > MAX_VALUES:
            raise SpecError(f"{self.prefix(at[:1], line)}more than {MAX_VALUES:,} values, aliases expanded")

    def finish(self) -> None:
        """Raises ``SpecError`` with all problems, if there are any."""
        if self.problems:
            raise SpecError(self.problems)


@final
@dataclass(frozen=True)
class Section:
    """A mapping that is read key by key. What is missing or wrong reads as None; what is wrong is reported."""

    document: Document
    values: Mapping[str, Plain]
    at: KeyPath = ()

    def report(self, message: str, *keys: str | int) -> None:
        self.document.report((*self.at, *keys), message)

    def unused(self, key: str, why: str) -> None:
        """Notes that ``key`` is read and has no effect."""
        self.note(f"ignored: {why}", key)

    def note(self, message: str, *keys: str | int) -> None:
        """Adds a line to the notes, for the report."""
        self.document.notes.append(self.document.prefix((*self.at, *keys)) + message)

    def only(self, known: Collection[str]) -> None:
        """Reports every key that is not known."""
        for key in self.values:
            if key not in known:
                self.report(f"unknown key{nearest(key, known)}", key)

    def text(self, key: str, *, required: bool = False) -> str | None:
        return self._typed(key, str, "a string", required)

    def integer(self, key: str, *, required: bool = False) -> int | None:
        return self._typed(key, int, "an integer", required)

    def boolean(self, key: str, *, required: bool = False) -> bool | None:
        return self._typed(key, bool, "true or false", required)

    def section(self, key: str, *, required: bool = False) -> "Section | None":
        values = self._typed(key, dict, "a mapping", required)
        return None if values is None else Section(self.document, cast("dict[str, Plain]", values), (*self.at, key))

    def items(self, key: str, hint: str = "", *, required: bool = False) -> Sequence[Plain]:
        """The list at ``key``; empty where it is missing or wrong."""
        return self._typed(key, list, f"a list{hint}", required) or ()

    def made(self, make: Callable[[], T], *keys: str | int) -> T | None:
        """What ``make`` returns; a ``SpecError`` it raises is reported at ``keys``, which it need not name again."""
        try:
            return make()
        except SpecError as error:
            for problem in error.problems:
                self.report(problem.removeprefix(f"{keys[-1]}: ") if keys else problem, *keys)
            return None

    def _typed(self, key: str, kind: type[T], wanted: str, required: bool) -> T | None:
        if key not in self.values:
            if required:
                self.report("is missing", key)
            return None
        value = self.values[key]
        if type(value) is not kind:  # True is an int to isinstance
            self.report(f"{show(value)} is not {wanted}", key)
            return None
        return value


def spell(at: KeyPath) -> str:
    """``rules[2].match`` of a key path. Keys that would not read well stand in quotes."""
    parts: list[str] = []
    for key in at:
        if isinstance(key, int):
            parts.append(f"[{key}]")
        else:
            parts.append("." * bool(parts) + (key if re.fullmatch(r"[\w-]{1,60}", key) else show(key)))
    return "".join(parts)


def show(value: object) -> str:
    """A value in a message: one short line."""
    match value:
        case None:
            return "an empty value"
        case str() if len(value) > 60:
            return f"{value[:60]!r}..."
        case str() | bool() | float():
            return repr(value)
        case int() if value.bit_length() <= MAX_INTEGER_BITS:
            return repr(value)
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case _:
            return f"a value of type {type(value).__name__}"


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean <the known word most like it>?``, or nothing where none comes close. Case does not count."""
    spelled = {choice.lower(): choice for choice in known}
    found = difflib.get_close_matches(word[:60].lower(), spelled, n=1)
    return f"; did you mean {spelled[found[0]]}?" if found else ""


def read_mapping(source: Mapping[object, object]) -> Document:
    """A document with a copy of ``source``. Raises ``SpecError`` for what YAML could not have said."""
    document = Document()
    count = 0

    def copy(value: object, at: KeyPath) -> Plain:
        nonlocal count
        count += 1
        document.check_bounds(at, count)
        match value:
            case Mapping():
                values = document.root if not at else {}
                for key, item in cast("Mapping[object, object]", value).items():
                    if isinstance(key, str):
                        values[str(key)] = copy(item, (*at, str(key)))
                    else:
                        document.report(at, f"the key {show(key)} is not a string")
                return values
            case list() | tuple():
                return [copy(item, (*at, index)) for index, item in enumerate(cast("Sequence[object]", value))]
            case set() | frozenset():
                items = cast("Set[object]", value)
                if not all(isinstance(item, str) for item in items):
                    document.report(at, f"{show(value)} holds more than strings")
                    return None
                return [copy(item, (*at, index)) for index, item in enumerate(sorted(cast("Set[str]", items)))]
            case None | bool():
                return value
            case int():
                if value.bit_length() > MAX_INTEGER_BITS:
                    document.report(at, f"the number has more than {MAX_INTEGER_BITS} bits")
                    return None
                return int(value)
            case float():
                return float(value)
            case str():
                return str(value)
            case _:
                document.report(at, f"{show(value)} is not a string, a number, a list or a mapping")
                return None

    copy(source, ())
    document.finish()
    return document
