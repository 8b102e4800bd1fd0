"""The one writer of weights: named tensors, one after the other, into safetensors files of a bounded size.

Nothing is held longer than until it is written, so that what is written may be larger than memory. The layout is that
of ``save_pretrained``: ``model.safetensors``, or ``model-00001-of-00002.safetensors`` ... with an index
(https://huggingface.co/docs/safetensors, https://huggingface.co/docs/transformers/big_models).
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TypeVar, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graphq.errors import TargetError
from graphq.state import nbytes

SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
WEIGHTS: Final = "model" + SUFFIX
INDEX: Final = "model" + INDEX_SUFFIX
SHARD_BYTES: Final = 5_000_000_000
_METADATA: Final = {"format": "pt"}
_LARGEST_HEADER: Final = 100_000_000
T = TypeVar("T")


_SPOOLED: Final = 1 << 24  # bytes of a file that are kept in memory until it is full
_COPIED: Final = 1 << 23  # bytes that are copied at once
# In the order in which safetensors lays tensors out, the widest first, and within a dtype by their names.
_DTYPES: Final = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_WIDEST: Final = {dtype: place for place, dtype in enumerate(_DTYPES)}


@final
@dataclass(frozen=True)
class InParts:
    """A tensor by its parts along the first axis, which are taken one after the other, once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor | InParts]],
    shard_bytes: int = SHARD_BYTES,
    stem: str = "model",
    *,
    numbered: bool = False,
    metadata: Mapping[str, str] | None = _METADATA,
    finished: Sequence[Sequence[str]] = (),
    after: Callable[[Sequence[str], Path], None] | None = None,
) -> None:
    """The tensors are in files of at most ``shard_bytes`` (or of one tensor) in ``directory``, on the disk.

    Names are distinct. One tensor, or part of one, is held at a time. While a file is made its tensors are on the disk
    twice. Raises ``TargetError`` where the disk is full or fails.

    stem: what the files' names begin with. numbered: one file has a number and an index, too. metadata: of each file's
    header; transformers wants its own. finished: the names in each of the files that ``directory`` holds already, the
    first ones, as ``00001.partial`` and so on; what is of them is not taken again. after: told the names in each
    further file, and where it is for now.
    """
    shards: list[list[str]] = [list(names) for names in finished]
    there = frozenset(name for names in finished for name in names)
    total, left = 0, 0
    seen: set[str] = set()

    def finish(file: _File) -> None:
        shards.append(file.names)
        path = directory / f"{len(shards):05}.partial"
        file.finish(path)
        if after is not None:
            after(shards[-1], path)

    with _File(directory, metadata) as file:
        for name, tensor in tensors:
            assert name not in seen, name
            seen.add(name)
            size = tensor.nbytes if isinstance(tensor, InParts) else nbytes(tensor)
            if name in there:
                total += size
                continue
            if file and size > left:
                finish(file)
            left = (left if file else shard_bytes) - size
            file.add(name, tensor)
            total += size
        if file or not shards:
            finish(file)
    count = len(shards)
    has_index = numbered or count > 1
    files = [f"{stem}-{i:05}-of-{count:05}{SUFFIX}" for i in range(1, count + 1)] if has_index else [stem + SUFFIX]
    for number, name in enumerate(files, 1):
        (directory / f"{number:05}.partial").rename(directory / name)
    if has_index:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (directory / (stem + INDEX_SUFFIX)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@final
@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _File:
    """Tensors that will be a safetensors file, whose order and header are known when it is full."""

    def __init__(self, directory: Path, metadata: Mapping[str, str] | None) -> None:
        self._directory = directory
        self._metadata = metadata
        self._entries: dict[str, _Entry] = {}
        self._spool = self._empty()

    def _empty(self) -> "tempfile.SpooledTemporaryFile[bytes]":
        return tempfile.SpooledTemporaryFile(_SPOOLED, dir=str(self._directory))

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which was said
            self._spool.close()

    @property
    def names(self) -> list[str]:
        """Those of the tensors, in the order in which they were added."""
        return list(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, tensor: Tensor | InParts) -> None:
        """The tensor is written out, but for what little is still in memory."""
        given = tensor if isinstance(tensor, InParts) else InParts(tensor.dtype, tuple(tensor.shape), (tensor,))
        start = self._spool.tell()
        for part in given.parts:
            assert part.dtype == given.dtype, (name, part.dtype, given.dtype)
            if part.numel():
                self._write(self._spool, in_bytes(part))
        assert self._spool.tell() - start == given.nbytes, name
        self._entries[name] = _Entry(given.dtype, given.shape, start, given.nbytes)

    def finish(self, path: Path) -> None:
        """The file is at ``path``, on the disk, as ``safetensors.torch.save_file`` writes it; a new one is begun."""
        order = sorted(self._entries, key=lambda name: (_WIDEST[self._entries[name].dtype], name.encode()))
        header: dict[str, Any] = {} if self._metadata is None else {"__metadata__": dict(self._metadata)}
        place = 0
        for name in order:
            one = self._entries[name]
            offsets = [place, place + one.nbytes]
            header[name] = {"dtype": _DTYPES[one.dtype], "shape": list(one.shape), "data_offsets": offsets}
            place += one.nbytes
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        try:
            with path.open("wb") as file:
                self._write(file, len(text).to_bytes(8, "little") + text)
                for name in order:
                    self._copy(self._entries[name], file)
                self._write(file)
        except OSError as error:  # of closing a file that could not be written
            raise self._unwritten(error) from error
        self._spool.close()
        self._entries, self._spool = {}, self._empty()

    def _write(self, file: IO[bytes], data: "bytes | memoryview | None" = None) -> None:
        """``data`` is written; without it, all that was is on the disk."""
        try:
            if data is not None:
                file.write(data)
                return
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> TargetError:
        return TargetError(f"{self._directory.parent}: cannot be written to: {error.strerror}")

    def _copy(self, entry: _Entry, file: IO[bytes]) -> None:
        self._spool.seek(entry.start)
        left = entry.nbytes
        while left:
            data = self._spool.read(min(left, _COPIED))
            assert data
            self._write(file, data)
            left -= len(data)


def headers_of(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and the shape of each tensor of a file that was written here."""
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    with safe_open(path, framework="pt") as opened:
        parts: dict[str, Any] = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        return {name: (dtypes[part.get_dtype()], tuple(part.get_shape())) for name, part in parts.items()}


def in_bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order."""
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)


def read_shards(directory: Path, stem: str = "model") -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``directory`` by name, one file after the other, of those that ``write_shards`` calls ``stem``.

    Raises ``TargetError`` naming a file that is missing, damaged, no file of ``directory`` itself, or that the index
    says otherwise of.
    """
    for _, name, tensor in each_tensor(directory, stem, lambda opened, name: sound(opened.get_tensor(name))):
        yield name, tensor


def each_tensor(directory: Path, stem: str, read: Callable[[Any, str], T]) -> Iterator[tuple[str, str, T]]:
    """What ``read`` makes of each tensor of files that are called ``stem``, from the open file and the tensor's name;
    with the names of both. Raises what ``read_shards`` raises, also for an error of the file in ``read``.
    """
    seen: set[str] = set()
    for file, names in shard_files(directory, stem).items():
        path = directory / file
        if not path.is_file():  # safetensors waits for one who writes into a pipe
            raise TargetError(f"{path}: no such file")
        try:
            check_header(path)
            with safe_open(path, framework="pt") as opened:
                held = set(opened.keys())
                wrong = held ^ names if names is not None else set[str]()
                if wrong:
                    raise TargetError(f"{path}: the index says otherwise of {', '.join(sorted(wrong)[:3])}")
                for name in sorted(held):
                    if name in seen:
                        raise TargetError(f"{path}: {name}: is in another file, too")
                    seen.add(name)
                    yield file, name, read(opened, name)
        except (OSError, ValueError, SafetensorError) as error:
            raise TargetError(f"{path}: damaged or incomplete: {error}") from error


def shard_files(directory: Path, stem: str = "model") -> dict[str, set[str] | None]:
    """The names of the tensors in each file of weights; None where there is one file, without an index."""
    index = directory / (stem + INDEX_SUFFIX)
    if not index.is_file():
        return {stem + SUFFIX: None}
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str] | None] = {}
        for name, file in where.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise TargetError(f"{index}: {name}: {file!r} is not the name of a file in the directory")
            names = files.setdefault(file, set())
            assert names is not None
            names.add(str(name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TargetError(f"{index}: damaged: {error}") from error
    return dict(sorted(files.items()))


def sound(x: Tensor) -> Tensor:
    """The tensor, whose bools are 0 or 1: a file can hold other bytes, which torch's kernels count on not to meet."""
    return x if x.dtype != torch.bool else x.view(torch.uint8) != 0


def check_header(path: Path) -> None:
    """Raises ``ValueError`` where the header of a safetensors file breaks a rule of the format that safetensors lets
    pass: it begins with a brace, and no name stands twice. What else is wrong is left to safetensors.
    """
    with path.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if not 0 < size <= min(_LARGEST_HEADER, path.stat().st_size - 8):
            return
        text = opened.read(size)
    if not text.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    try:
        json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("its header is nested too deep") from error


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands twice in its header")
        found[name] = value
    return found
