"""YAML text as a document: YAML 1.1 as PyYAML's safe loader takes it, less tags, merge keys and dates.

Nothing is constructed but strings, numbers, booleans, nulls, lists and mappings; aliases are expanded within a budget.
"""

import os
import stat
from pathlib import Path
from typing import Final, cast, final

import yaml
from yaml.constructor import SafeConstructor
from yaml.reader import ReaderError

from graphq.errors import SpecError
from graphq.frontends.document import MAX_INTEGER_BITS, Document, KeyPath, Plain, show

MAX_BYTES: Final = 1_000_000


def read_file(source: str | os.PathLike[str]) -> Document:
    """A document with what the YAML file says. Raises ``SpecError`` for what is no YAML mapping of modest size."""
    path = os.fsdecode(source)
    return read_text(read_utf8(path, MAX_BYTES), path)


def read_utf8(path: str, limit: int) -> str:
    """The text of a file. Raises ``SpecError`` for one of more bytes than ``limit``, and for what is no such file."""
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISDIR(mode):
            raise SpecError(f"{path}: is a folder; name the YAML file in it")
        if not stat.S_ISREG(mode):
            raise SpecError(f"{path}: is not a regular file")
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except OSError as error:
        raise SpecError(f"{show(path)}: {error.strerror}") from None
    except ValueError:  # a NUL, or a surrogate that the file system cannot spell
        raise SpecError(f"{show(path)} is not a path") from None
    if len(data) > limit:
        raise SpecError(f"{path}: the file is larger than {limit:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise SpecError(f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8 text") from None


def read_text(text: str, path: str = "") -> Document:
    """A document with what the YAML ``text`` says; messages name ``path``."""
    document = Document(path)
    try:
        node = _Loader(text, document).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        message = " ".join(" ".join(filter(None, (error.context, error.problem))).split())
        raise SpecError(document.prefix((), line) + message) from None
    except ReaderError as error:
        line = 1 + text.count("\n", 0, error.position)
        raise SpecError(f"{document.prefix((), line)}text does not hold the character {error.character:#x}") from None
    except (ValueError, OverflowError) as error:  # PyYAML lets these out for escapes and directives beyond all bounds
        raise SpecError(f"{document.prefix(())}not YAML: {error}") from None
    if node is None or node.value == "":
        raise SpecError(f"{document.prefix(())}the file is empty")
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(f"{document.prefix(())}the file is not a mapping of keys to values")
    _Builder(document).build(node, ())
    return document


@final
class _Loader(yaml.SafeLoader):
    """Composes nodes within bounds of depth and number, and reports tags. Constructs nothing."""

    def __init__(self, text: str, document: Document) -> None:
        super().__init__(text)
        self.document = document
        self.depth = 0
        self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = cast("yaml.Event", self.peek_event())
        line = event.start_mark.line + 1
        self.depth += 1
        self.nodes += 1
        self.document.check_bounds((), self.nodes, self.depth, line)
        tag = cast("str | None", getattr(event, "tag", None))  # an alias has none
        if tag is not None:
            self.document.report((), f"tags are not read: {show(tag)}", line)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_TAG: Final = "tag:yaml.org,2002:"
_CONSTRUCTED: Final = {_TAG + name for name in ("null", "bool", "int", "float")}


@final
class _Builder:
    """Fills the document's root and lines from nodes."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = 0
        self.constructor = SafeConstructor()

    def build(self, node: yaml.Node, at: KeyPath) -> Plain:
        self.values += 1
        self.document.check_bounds(at, self.values)
        match node:
            case yaml.MappingNode():
                return self._mapping(node, at)
            case yaml.SequenceNode():
                items: list[Plain] = []
                for index, item in enumerate(cast("list[yaml.Node]", node.value)):
                    self.document.lines[*at, index] = item.start_mark.line + 1
                    items.append(self.build(item, (*at, index)))
                return items
            case _:
                return self._scalar(node, at)

    def _mapping(self, node: yaml.MappingNode, at: KeyPath) -> dict[str, Plain]:
        values = self.document.root if not at else {}
        for key_node, value_node in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            line = key_node.start_mark.line + 1
            key = cast("Plain", key_node.value)
            if key_node.tag == _TAG + "merge":
                self.document.report(at, "merge keys (<<) are not read; write the keys out", line)
            elif not isinstance(key, str) or key_node.tag != _TAG + "str":
                self.document.report(at, f"the key {show(key)} does not read as a string; quote it", line)
            elif key in values:
                first = self.document.lines[*at, key]
                self.document.report((*at, key), f"the key stands twice, first in line {first}", line)
            else:
                self.document.lines[*at, key] = line
                values[key] = self.build(value_node, (*at, key))
        return values

    def _scalar(self, node: yaml.Node, at: KeyPath) -> Plain:
        text = cast("str", node.value)
        if node.tag == _TAG + "timestamp":
            self.document.report(at, f"{text} reads as a date; quote it")
        if node.tag not in _CONSTRUCTED:
            return text
        try:
            value = cast("int | float | bool | None", self.constructor.construct_object(node))
        except (ValueError, LookupError):
            self.document.report(at, f"{show(text)} is not a number")
            return text
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            self.document.report(at, f"{show(text)} has more than {MAX_INTEGER_BITS} bits")
            return text
        return value
