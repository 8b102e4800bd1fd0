"""What decides the bytes of what a compile gives, each thing in words or by a digest."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from graphq.artifacts.manifest import Digest
from graphq.frontends.native import print_spec
from graphq.spec.rules import Spec

_VERSIONS: Final = ("graphq", "torch", "transformers", "safetensors")
_LARGEST_HEADER: Final = 100_000_000


def inputs_of(
    directory: Path, spec: Spec, batches: Sequence[tuple[Tensor, ...]] | None, options: Mapping[str, object]
) -> dict[str, str]:
    """A line or a digest of each thing that decides what a compile of a model directory gives.

    A file of weights is told by its size, the time of its last change and its header, other files by their contents.
    Floating-point sums depend on the processor and the number of threads, which are told, too.
    """
    found = {"model": str(directory.resolve())}
    for file in sorted(directory.iterdir()):
        if file.suffix == ".safetensors":
            found[file.name] = _of_weights(file)
        elif file.suffix in (".json", ".py") and file.is_file():
            found[file.name] = f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    found["spec"] = print_spec(spec)
    found["calibration"] = "none" if batches is None else _of_batches(batches)
    found |= {name: _in_words(value) for name, value in options.items()}
    found |= {name: _version(name) for name in _VERSIONS}
    found["processor"] = torch.backends.cpu.get_cpu_capability()
    found["threads"] = str(torch.get_num_threads())
    return found


def _of_weights(file: Path) -> str:
    stat = file.stat()
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(size, _LARGEST_HEADER))
    return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns} ns, header {hashlib.sha256(header).hexdigest()}"


def _of_batches(batches: Iterable[tuple[Tensor, ...]]) -> str:
    found, count = hashlib.sha256(), 0
    for batch in batches:
        count += 1
        for tensor in batch:
            digest = Digest(tensor.dtype, tensor.shape)
            digest.add(tensor)
            found.update(digest.text().encode())
    return f"{count} batches, sha256 {found.hexdigest()}"


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        digest = Digest(value.dtype, value.shape)
        digest.add(value)
        return f"sha256 {digest.text()}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_in_words(one)}" for key, one in sorted(value.items(), key=str))
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
