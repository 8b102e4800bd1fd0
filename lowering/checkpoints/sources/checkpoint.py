"""A quantized checkpoint as it lies in its files, whoever wrote it: weights that are read one at a time, other tensors.

What each format's reader makes, from the headers of the files alone; inspection, compilation and conversion stand on
it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, final

import torch

from graphq.artifacts.headers import StoredTensor
from graphq.capture.weight_files import FileTensor, HeldTensor
from graphq.deferred import Deferred, InFile, Stacked
from graphq.errors import TargetError
from graphq.ir.stored_codes import Dequantized, StoredWeight

FLOATS: Final = ("BF16", "F16", "F32")
_COMPUTED: Final = (torch.bfloat16, torch.float16, torch.float32)
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}

Parts = Mapping[str, StoredTensor]  # of a layer, by the ends of their names


@final
@dataclass(frozen=True)
class QuantizedCheckpoint:
    """format: in words. dtype: that which its loaders compute weights in.

    weights: the quantized ones, by the names of their layers. tensors: all tensors of the model, by name, weights of
    quantized layers as numbers among them. headers: of all tensors in the files; ``parts``: the names of those that
    quantized layers are made of. unkept: what is quantized beside weights and inputs of layers, a line each.
    """

    directory: Path
    format: str
    config: Mapping[str, Any]
    dtype: torch.dtype
    weights: Mapping[str, StoredWeight]
    tensors: Mapping[str, HeldTensor]
    headers: Mapping[str, StoredTensor]
    parts: frozenset[str]
    unkept: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Of all tensors of the model, quantized ones as numbers."""
        return sum(math.prod(one.shape) for one in self.tensors.values())

    @property
    def note(self) -> str:
        """What to say of a model that is compiled from it."""
        count = f"{len(self.weights)} weight{'s' * (len(self.weights) != 1)}"
        return (
            f"the source is quantized ({self.format}): its {count} are dequantized as they are read, and keep their"
            " codes where the spec has the same grid"
        )


@final
@dataclass(frozen=True)
class CodedMatrix:
    """The weight ``[N, K]`` of a quantized layer. ``bits``: of codes that lie in words of 32 bits, of which the header
    tells no more than that; 0 for others.
    """

    weight: StoredWeight
    shape: tuple[int, int]
    bits: int = 0

    @property
    def weights(self) -> tuple[StoredWeight, ...]:
        return (self.weight,)

    def deferred(self, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred | None:
        if len(shape) != 2 or shape[0] != self.shape[0]:
            return None
        fits = shape[1] == self.shape[1]
        if self.bits:
            fits = -(-shape[1] * self.bits // 32) == -(-self.shape[1] * self.bits // 32)
        return Dequantized(self.weight, shape, dtype) if fits else None


@final
@dataclass(frozen=True)
class CodedStack:
    """The weights ``[N, K]`` of experts as one tensor ``[E, K, N]``."""

    weights: tuple[StoredWeight, ...]
    shape: tuple[int, int, int]

    def deferred(self, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred | None:
        if shape != self.shape:
            return None
        _, columns, rows = self.shape
        return Stacked(tuple(Dequantized(weight, (rows, columns), dtype).turned() for weight in self.weights))


def by_layer(held: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Tensors by the part of their names that is their layer's, and by the rest."""
    named: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in held.items():
        layer, _, suffix = name.rpartition(".")
        named.setdefault(layer, {})[suffix] = tensor
    return named


def in_files(directory: Path, layer: str, parts: Parts) -> dict[str, InFile]:
    """What reads each of ``parts``, in the dtype that it has. Raises ``TargetError`` for one that is not known."""
    return {suffix: in_file(directory, f"{layer}.{suffix}", part) for suffix, part in parts.items()}


def in_file(directory: Path, name: str, header: StoredTensor) -> InFile:
    """What reads the tensor of this name, in its own dtype. Raises ``TargetError`` for one that is not known."""
    if header.dtype not in _DTYPES:
        raise TargetError(f"{directory / header.file}: {name}: {header.dtype}: is no dtype that is read")
    dtype = _DTYPES[header.dtype]
    return InFile(directory / header.file, name, header.shape, dtype, dtype)


def expect(
    directory: Path, layer: str, parts: Parts, suffix: str, dtypes: Sequence[str], shapes: Iterable[Sequence[int]]
) -> None:
    """Raises ``TargetError`` that names file and tensor for a part, if it is there, of another dtype or shape."""
    part, shapes = parts.get(suffix), [tuple(shape) for shape in shapes]
    if part is None or (part.dtype in dtypes and part.shape in shapes):
        return
    wanted = f"{' or '.join(dtypes)}{' or '.join(str(list(shape)) for shape in shapes)}"
    where = f"{directory / part.file}: {layer}.{suffix}"
    raise TargetError(f"{where}: {part.dtype}{list(part.shape)}, where {wanted} belongs")


def floats_of(directory: Path, held: Mapping[str, StoredTensor], parts: Iterable[str]) -> dict[str, HeldTensor]:
    """The tensors that are no ``parts`` of quantized layers.

    Raises ``TargetError`` for one of float8: these are numbers beside scales alone, which it has none of.
    """
    others = {name: held[name] for name in held.keys() - set(parts)}
    for name, one in sorted(others.items()):
        if one.dtype.startswith("F8"):
            raise TargetError(f"{directory / one.file}: {name}: {one.dtype}, and there are no scales of it")
    return {name: FileTensor(directory / one.file, name, one.dtype, one.shape) for name, one in others.items()}


def dtype_of(config: Mapping[str, Any], held: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype that a configuration records, or else that of the first of its float tensors; float32 without any."""
    inner = config.get("text_config")
    for settings in (config, cast(Mapping[str, Any], inner) if isinstance(inner, Mapping) else {}):
        word = str(settings.get("dtype") or settings.get("torch_dtype"))
        found = next((dtype for dtype in _COMPUTED if str(dtype) == f"torch.{word}"), None)
        if found is not None:
            return found
    first = next((one.dtype for one in held.values() if one.dtype in FLOATS), "F32")
    return _DTYPES[first]
