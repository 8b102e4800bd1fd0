"""Text files as windows of tokens that a model of a directory reads: to calibrate on, and to measure perplexity on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphq.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from graphq.data.evaluate import Tokenizer


def calibration_batches(model: Path, place: Path, samples: int, length: int) -> "Sequence[Tensor]":
    """The windows of the text in a file or directory, a batch each."""
    from graphq.data.evaluate import load_tokenizer

    files = [place]
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise SpecError(f"{place}: holds no files to calibrate on")
    windows = file_windows(load_tokenizer(model), files, length, samples)
    check_fit(model, windows)
    return windows.split(1)


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
