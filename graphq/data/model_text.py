"""Text files as windows of tokens that a model of a directory reads: to calibrate on, and to measure perplexity on."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graphq.data.records import JSON_LINES, RECORDS, RecordText, record_files, texts_of
from graphq.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from graphq.data.evaluate import Tokenizer


def calibration_batches(
    model: Path,
    place: Path,
    samples: int,
    length: int,
    field: str | None = None,
    windows: Literal["packed", "padded"] = "packed",
    shuffle: int | None = None,
) -> "Sequence[Tensor] | Sequence[Mapping[str, Tensor]]":
    """Windows of the text in a file or directory, or of records in them, a batch each.

    ``field``: that of a record in which its text stands. ``windows``: ``packed`` ones are full, of texts one after the
    other; of ``padded`` ones each is the begin of one record, with a mask of its tokens. ``shuffle``: the seed of the
    order of records. Raises ``SpecError`` for what cannot be read, and for options of records where there are none.
    """
    from graphq.data.evaluate import load_tokenizer

    if records := record_files(place):
        if text := sorted(place.glob("*.txt")):
            raise SpecError(f"{place}: holds records ({records[0].name}) and text ({text[0].name}); give one of them")
        texts = texts_of(records, field, model, shuffle)
        return _of_records(model, records, texts, samples, length, windows)
    given = (("--calibration-field", field), ("--windows", windows if windows != "packed" else None))
    for option, value in (*given, ("--shuffle", shuffle)):
        if value is not None:
            raise SpecError(f"{place}: {option} {value}: is for records ({', '.join(RECORDS)}), and this is text")
    if place.suffix.lower() == ".json":
        raise SpecError(f"{place}: JSON; records are JSON lines ({', '.join(JSON_LINES)}), text is .txt")
    files = [place]
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise SpecError(f"{place}: holds no files to calibrate on")
    read = file_windows(load_tokenizer(model), files, length, samples)
    check_fit(model, read)
    return read.split(1)


def _of_records(
    model: Path,
    files: Sequence[Path],
    texts: Iterator[RecordText],
    samples: int,
    length: int,
    windows: Literal["packed", "padded"],
) -> "Sequence[Tensor] | Sequence[Mapping[str, Tensor]]":
    import torch

    from graphq.data.evaluate import load_tokenizer

    tokenizer = load_tokenizer(model)
    read = (tokenizer.encode_as_it_is(one.text) if one.from_template else tokenizer.encode(one.text) for one in texts)
    if windows == "padded":
        rows = [ids[:length] for ids in itertools.islice(read, samples)]
        if not any(rows):
            raise SpecError(f"{', '.join(map(str, files))}: hold no tokens to calibrate on")
        found: list[Mapping[str, Tensor]] = []
        for row in filter(None, rows):
            padded = torch.tensor([row + [0] * (length - len(row))])
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row))])
            check_fit(model, padded)
            found.append({"input_ids": padded, "attention_mask": mask})
        return found
    ids: list[int] = []
    for tokens in read:
        ids += tokens
        if len(ids) >= samples * length:
            break
    count = min(samples, len(ids) // length)
    if not count:
        raise SpecError(f"{', '.join(map(str, files))}: {len(ids)} tokens do not fill a window of {length}")
    packed = torch.tensor(ids[: count * length]).view(count, length)
    check_fit(model, packed)
    return packed.split(1)


def file_windows(tokenizer: "Tokenizer", files: Sequence[Path], length: int, most: int | None) -> "Tensor":
    """The windows of the files' text, ``most`` of them if it holds as many. Raises ``SpecError`` if it fills none."""
    from graphq.data.evaluate import text_windows

    texts: list[str] = []
    held = 0
    for file in files:
        texts.append(_read_text(file))
        held += len(tokenizer.encode(texts[-1]))
        if most is not None and held >= most * length:
            break
    if held < length:
        raise SpecError(f"{', '.join(map(str, files))}: {held} tokens do not fill a window of {length}")
    return text_windows(tokenizer, texts, length)[:most]


def check_fit(model: Path, windows: "Tensor") -> None:
    """Raises ``SpecError`` for windows that are longer, or hold other tokens, than the model's configuration says."""
    try:
        config: Any = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever reads the model says so
    longest, words = (config.get(key) for key in ("max_position_embeddings", "vocab_size"))
    if isinstance(longest, int) and windows.shape[1] > longest:
        raise SpecError(f"{model}: a window of {windows.shape[1]} tokens is longer than the {longest} that it reads")
    if isinstance(words, int) and int(windows.max()) >= words:
        raise SpecError(f"{model}: the tokenizer gives token {int(windows.max())}, the model knows {words}")


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise SpecError(f"{file}: {error.strerror}") from error
    if not text.strip():
        raise SpecError(f"{file}: empty")
    return text
