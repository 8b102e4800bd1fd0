"""The one writer of weights: named tensors, one after the other, into safetensors files of a bounded size.

Nothing is held longer than until its file is full, so that what is written may be larger than memory. The layout is
that of ``save_pretrained``: ``model.safetensors``, or ``model-00001-of-00002.safetensors`` ... with an index
(https://huggingface.co/docs/safetensors, https://huggingface.co/docs/transformers/big_models).
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graphq.errors import TargetError
from graphq.state import nbytes

SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
WEIGHTS: Final = "model" + SUFFIX
INDEX: Final = "model" + INDEX_SUFFIX
SHARD_BYTES: Final = 5_000_000_000
_METADATA: Final = {"format": "pt"}


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
    stem: str = "model",
    *,
    numbered: bool = False,
    metadata: Mapping[str, str] | None = _METADATA,
) -> None:
    """The tensors are in files of at most ``shard_bytes`` (or of one tensor) in ``directory``, on the disk.

    Names are distinct. Tensors may share memory, and are copied where they are not dense.

    stem: what the files' names begin with. numbered: one file has a number and an index, too. metadata: of each file's
    header; transformers wants its own.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0
    seen: set[str] = set()

    def flush() -> None:
        shards.append(list(held))
        _save(directory / f"{len(shards):05}.partial", held, metadata)
        held.clear()

    for name, tensor in tensors:
        assert name not in seen, name
        seen.add(name)
        if held and sum(map(nbytes, held.values())) + nbytes(tensor) > shard_bytes:
            flush()
        held[name] = tensor
        total += nbytes(tensor)
    if held or not shards:
        flush()
    count = len(shards)
    has_index = numbered or count > 1
    files = [f"{stem}-{i:05}-of-{count:05}{SUFFIX}" for i in range(1, count + 1)] if has_index else [stem + SUFFIX]
    for number, file in enumerate(files, 1):
        (directory / f"{number:05}.partial").rename(directory / file)
    if has_index:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (directory / (stem + INDEX_SUFFIX)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(file: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storages: set[int] = set()
    for name, tensor in dense.items():  # safetensors refuses tensors that share memory
        place = tensor.untyped_storage().data_ptr()
        if place in storages or tensor.untyped_storage().nbytes() != nbytes(tensor):
            dense[name] = tensor.clone()
        storages.add(place)
    save_file(dense, file, metadata=None if metadata is None else dict(metadata))
    with file.open("rb") as written:
        os.fsync(written.fileno())


def read_shards(directory: Path, stem: str = "model") -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``directory`` by name, one file after the other, of those that ``write_shards`` calls ``stem``.

    Raises ``TargetError`` naming a file that is missing, damaged, no file of ``directory`` itself, or that the index
    says otherwise of.
    """
    files = shard_files(directory, stem)
    seen: set[str] = set()
    for file, names in files.items():
        path = directory / file
        if not path.is_file():  # safetensors waits for one who writes into a pipe
            raise TargetError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as opened:
                held = set(opened.keys())
                wrong = held ^ names if names is not None else set[str]()
                if wrong:
                    raise TargetError(f"{path}: the index says otherwise of {', '.join(sorted(wrong)[:3])}")
                for name in sorted(held):
                    if name in seen:
                        raise TargetError(f"{path}: {name}: is in another file, too")
                    seen.add(name)
                    yield name, sound(opened.get_tensor(name))
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
