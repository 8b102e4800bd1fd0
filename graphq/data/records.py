"""Calibration texts in records: JSON lines, parquet, and the directories that Hugging Face datasets are saved in.

A record's text stands in one of its fields, or is a conversation (``messages``: a list of ``role`` and ``content``),
which the model's own chat template makes a text of.
"""

import importlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, final

from graphq.errors import SpecError

JSON_LINES: Final = (".jsonl", ".ndjson")
TABLES: Final = (".parquet", ".arrow")
RECORDS: Final = (*JSON_LINES, *TABLES)
_FIELDS: Final = ("messages", "conversations", "text", "content")  # that are looked for where none is named


@final
@dataclass(frozen=True)
class RecordText:
    """A record's text. from_template: a chat template wrote it, with the special tokens that the model is to see."""

    text: str
    from_template: bool = False


def record_files(place: Path) -> list[Path]:
    """The files of records at ``place``, itself or in it, in order; none where there is text."""
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [file for file in files if file.suffix.lower() in RECORDS and not file.name.startswith((".", "cache-"))]


def texts_of(files: Sequence[Path], field: str | None, model: Path, seed: int | None = None) -> Iterator[RecordText]:
    """The text of each record, in the files' order, or in one that ``seed`` draws.

    Raises ``SpecError`` for a file that is damaged, for a record without the field, and for one that is no text.
    """
    template = _Template(model)
    records = _in_order(files, seed)
    for where, record in records:
        yield _text(where, record, field, template)


def _in_order(files: Sequence[Path], seed: int | None) -> Iterable[tuple[str, Mapping[str, Any]]]:
    read = ((where, record) for file in files for where, record in _records(file))
    if seed is None:
        return read
    found = list(read)
    random.Random(seed).shuffle(found)
    return found


def _records(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of a file, each with its place in words."""
    if file.suffix.lower() in TABLES:
        yield from _rows(file)
        return
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{file}: line {number}"
                try:
                    record: Any = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SpecError(f"{where}: not JSON: {error}") from error
                if not isinstance(record, dict):
                    raise SpecError(f"{where}: a {type(record).__name__} and no object with fields")
                yield where, cast("dict[str, Any]", record)
    except UnicodeDecodeError as error:
        raise SpecError(f"{file}: not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise SpecError(f"{file}: {error.strerror}") from error


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise SpecError(f"{file}: is read with pyarrow; pip install pyarrow, or give JSON lines") from error
    number = 0
    try:
        is_parquet = file.suffix.lower() == ".parquet"  # the others are as datasets' save_to_disk writes them
        batches = (
            parquet.ParquetFile(file).iter_batches() if is_parquet else arrow.ipc.open_stream(arrow.OSFile(str(file)))
        )
        for batch in batches:
            for record in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", record
    except (arrow.ArrowInvalid, OSError) as error:
        raise SpecError(f"{file}: cannot be read: {error}") from error


def _text(where: str, record: Mapping[str, Any], field: str | None, template: "_Template") -> RecordText:
    name = field if field is not None else next((one for one in _FIELDS if one in record), None)
    if name is None or name not in record:
        wanted = f"field {field}" if field is not None else f"field {' or '.join(_FIELDS)}"
        raise SpecError(f"{where}: no {wanted}; it has {', '.join(record) or 'none'} (--calibration-field)")
    value = record[name]
    if not isinstance(value, str | list):
        raise SpecError(f"{where}: {name}: a {type(value).__name__}; a text, or a list of messages is wanted")
    is_text = isinstance(value, str)
    text = value if is_text else template.text(f"{where}: {name}", cast("list[Any]", value))
    check_text(f"{where}: {name}", text)
    return RecordText(text, from_template=not is_text)


def check_text(where: str, text: str) -> None:
    """Raises ``SpecError`` for what tokenizers do not take: half of a pair of surrogates, as JSON can escape."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SpecError(f"{where}: not UTF-8 text: {error.reason}") from error


class _Template:
    """The chat template of a model's tokenizer, which is loaded when a conversation is met."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._tokenizer: Any = None

    def text(self, where: str, messages: list[Any]) -> str:
        """A conversation as the model is given it. Raises ``SpecError`` where there is no template, or it fails."""
        if not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages):
            raise SpecError(f"{where}: a list of messages with role and content is wanted")
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = cast(Any, AutoTokenizer).from_pretrained(self._model)
            except Exception as error:  # whatever the library raises
                first = (str(error).strip().splitlines() or [""])[0]
                raise SpecError(f"{self._model}: its tokenizer cannot be loaded: {first}") from error
        if not self._tokenizer.chat_template:
            raise SpecError(f"{where}: a conversation, and the tokenizer of {self._model} has no chat template")
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # whatever the template raises
            first = (str(error).strip().splitlines() or [""])[0]
            raise SpecError(f"{where}: the chat template fails: {first}") from error
