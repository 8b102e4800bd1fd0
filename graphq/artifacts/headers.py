"""What the headers of a directory's safetensors files say: dtypes, shapes and sizes, without any weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from safetensors import SafetensorError, safe_open

from graphq.artifacts.shards import check_header, shard_files
from graphq.errors import TargetError

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
    found: dict[str, StoredTensor] = {}
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
                if twice := held & found.keys():
                    raise TargetError(f"{path}: {min(twice)}: is in another file, too")
                found |= {name: _stored(file, opened.get_slice(name)) for name in sorted(held)}
        except (OSError, ValueError, SafetensorError) as error:
            raise TargetError(f"{path}: damaged or incomplete: {error}") from error
    return found


def _stored(file: str, part: Any) -> StoredTensor:
    dtype, shape = str(part.get_dtype()), tuple(part.get_shape())
    bits = _BITS.get(dtype) or int("".join(filter(str.isdigit, dtype.partition("_")[0])))
    return StoredTensor(file, dtype, shape, math.prod(shape) * bits // 8)
