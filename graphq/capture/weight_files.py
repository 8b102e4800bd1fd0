"""The safetensors files of a model directory, and the tensors in them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, final

import torch

from graphq.capture import adapters
from graphq.deferred import Deferred, InFile
from graphq.errors import GraphError

_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class HeldTensor(Protocol):
    """A tensor of a model as files hold it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def deferred(self, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred | None:
        """What reads it as a tensor of this shape and dtype; None where it is no such tensor."""
        ...


@final
@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file, by its name there; ``dtype`` as safetensors calls it."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    def deferred(self, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred | None:
        if self.dtype not in _DTYPES or self.shape != shape:
            return None
        return InFile(self.file, self.key, self.shape, _DTYPES[self.dtype], dtype)


def held_tensors(files: Sequence[Path]) -> Mapping[str, HeldTensor]:
    """Each tensor of the files by its name there."""
    from safetensors import safe_open

    found: dict[str, HeldTensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part: Any = opened.get_slice(name)
                found[name] = FileTensor(file, name, part.get_dtype(), tuple(part.get_shape()))
    return found


def first_names(names: list[str]) -> str:
    """The first three, and dots for more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check_weight_files(path: Path) -> list[Path]:
    """The directory's safetensors. Raises ``GraphError`` if there are none, or one is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise GraphError(f"{index}: not an index of weight files: {error}") from error
        files = [path / name for name in names]
        outside = [f for f in files if f.resolve().parent != path.resolve() and f.parent != path]
        if outside:
            raise GraphError(f"{index}: {outside[0].name} lies outside of the model directory")
    else:
        files = sorted(file for file in path.glob("*.safetensors") if file.name != adapters.WEIGHTS)
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if not files and pickled:
        raise GraphError(
            f"{path}: {first_names(pickled)}: pickled weights can run code and are not read; save safetensors"
        )
    if not files:
        adapters.refuse_adapter_alone(path)
        raise GraphError(f"{path}: no weights: expected model.safetensors or model.safetensors.index.json")
    for file in files:
        if not file.is_file():
            raise GraphError(f"{file}: missing, but {index.name} names it")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise GraphError(f"{file}: damaged or incomplete: {error}") from error
    return files
