"""What the headers of a directory's safetensors files say: dtypes, shapes and sizes, without any weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from graphq.artifacts.shards import each_tensor

_BITS: Final = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # others say theirs, as F8_E4M3 does


@final
@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its dtype as safetensors calls it (``BF16``), its shape and its bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_headers(directory: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """The tensors of ``directory`` by name, of files that are called ``stem``.

    Raises ``TargetError`` naming a file that is missing or damaged, or that the index says otherwise of.
    """
    found = each_tensor(directory, stem, lambda opened, name: _declared(opened.get_slice(name)))
    return {name: _stored(file, *declared) for file, name, declared in found}


def _declared(part: Any) -> tuple[str, tuple[int, ...]]:
    return str(part.get_dtype()), tuple(part.get_shape())


def _stored(file: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    bits = _BITS.get(dtype) or int("".join(filter(str.isdigit, dtype.partition("_")[0])))
    return StoredTensor(file, dtype, shape, math.prod(shape) * bits // 8)
