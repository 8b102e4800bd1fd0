"""A JSON file as a document. Checkpoints describe each of their tensors in one, far beyond the size of a written spec.

RFC 8259, less repeated keys and numbers that are not finite. Every key and item has its line.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Final, cast

from graphq.errors import SpecError
from graphq.frontends.document import MAX_DEPTH, MAX_INTEGER_BITS, Document, KeyPath, Plain
from graphq.frontends.yaml_text import read_utf8

MAX_BYTES: Final = 64_000_000
MAX_VALUES: Final = 1_000_000
_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')
_SPACE: Final = re.compile(r"[ \t\r\n]*")


def read_json_file(source: str | os.PathLike[str], max_values: int = MAX_VALUES) -> Document:
    """A document with what the JSON file says. Raises ``SpecError`` for what is no JSON object of this size."""
    path = os.fsdecode(source)
    return read_json(read_utf8(path, MAX_BYTES), path, max_values)


def read_json(text: str, path: str = "", max_values: int = MAX_VALUES) -> Document:
    """A document with what the JSON ``text`` says; messages name ``path``."""
    document = Document(path)
    decoder = json.JSONDecoder(object_pairs_hook=_mapping, parse_constant=_constant)
    at = _skip(text, 0)
    line, counted, values = 1, 0, 1
    try:
        if text[at : at + 1] != "{":
            raise SpecError(f"{document.prefix(())}the file is not an object of keys to values")
        at = _skip(text, at + 1)
        while text[at : at + 1] != "}":
            line, counted = line + text.count("\n", counted, at), at
            key, at = cast("tuple[Plain, int]", decoder.raw_decode(text, at))
            if not isinstance(key, str):
                raise SpecError(f"{document.prefix((), line)}a key is not a string")
            at = _after(text, _skip(text, at), ":")
            start = _skip(text, at)
            value, at = cast("tuple[Plain, int]", decoder.raw_decode(text, start))
            values += 1 if isinstance(value, str) else _count(document, value, key, line)
            if values > max_values:
                raise SpecError(f"{document.prefix((key,), line)}more than {max_values:,} values")
            if key in document.root:
                document.report((key,), f"the key stands twice, first in line {document.lines[(key,)]}", line)
            else:
                document.root[key] = value
                document.lines[(key,)] = line
                if isinstance(value, dict | list):
                    first = line + text.count("\n", counted, start)
                    _find_lines(_tokens(text, start, at, first), document.lines, (key,))
            at = _skip(text, at)
            if text[at : at + 1] != "}":
                at = _skip(text, _after(text, at, ","))
                if text[at : at + 1] == "}":
                    raise json.JSONDecodeError("Illegal trailing comma before end of object", text, at)
        if (end := _skip(text, at + 1)) != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise SpecError(f"{document.prefix((), error.lineno)}not JSON: {error.msg}") from None
    except RecursionError:
        raise SpecError(f"{document.prefix((), line)}nested more than {MAX_DEPTH} deep") from None
    except _WrongError as wrong:
        raise SpecError(f"{document.prefix((), line)}{wrong}") from None
    except ValueError:  # an integer of more digits than Python reads
        raise SpecError(f"{document.prefix((), line)}a number has more than {MAX_INTEGER_BITS} bits") from None
    if "\\u" in text:
        try:
            json.dumps(document.root, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise SpecError(f"{document.prefix(())}a string holds half of a surrogate pair") from None
    document.finish()
    return document


def _tokens(text: str, start: int, end: int, line: int) -> Iterator[tuple[str, int]]:
    """The tokens of valid JSON from ``start`` to ``end``, with their lines."""
    counted = start
    for found in _TOKEN.finditer(text, start, end):
        line, counted = line + text.count("\n", counted, found.start()), found.start()
        yield found[0], line


def _find_lines(tokens: Iterator[tuple[str, int]], lines: dict[KeyPath, int], at: KeyPath) -> None:
    """Adds the line of every key and item of the value that ``tokens`` begin with, which stands at ``at``."""
    opened, line = next(tokens)
    lines.setdefault(at, line)
    if opened not in ("{", "["):
        return
    for index in itertools.count():
        token, line = next(tokens)
        if token in ("}", "]"):
            return
        if token == ",":
            token, line = next(tokens)
        inner = (*at, json.loads(token) if opened == "{" else index)
        lines[inner] = line
        if opened == "{":
            next(tokens)  # the colon
            _find_lines(tokens, lines, inner)
        else:
            _find_lines(itertools.chain([(token, line)], tokens), lines, inner)


class _WrongError(Exception):
    """What JSON would take and a document does not hold. (A ``ValueError`` means something else to the decoder.)"""


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _after(text: str, at: int, mark: str) -> int:
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"Expecting '{mark}' delimiter", text, at)
    return at + 1


def _mapping(pairs: list[tuple[str, Plain]]) -> dict[str, Plain]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _WrongError(f"the key {twice[:60]!r} stands twice in one object")
    return found


def _constant(word: str) -> Plain:
    raise _WrongError(f"{word} is not a finite number")


def _count(document: Document, value: Plain, key: str, line: int) -> int:
    """How many values there are in one of the top level. Raises ``SpecError`` for what a document does not hold."""
    count = 0
    pending: list[tuple[Plain, int]] = [(value, 2)]
    while pending:
        item, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise SpecError(f"{document.prefix((key,), line)}nested more than {MAX_DEPTH} deep")
        if isinstance(item, int) and item.bit_length() > MAX_INTEGER_BITS:
            raise SpecError(f"{document.prefix((key,), line)}a number has more than {MAX_INTEGER_BITS} bits")
        if isinstance(item, float) and not math.isfinite(item):
            raise SpecError(f"{document.prefix((key,), line)}a number is not finite")
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        pending += [(one, depth + 1) for one in inner]
    return count
