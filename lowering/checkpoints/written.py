"""What becomes of tensors on their way into a checkpoint's files: float ones as they are stored, and records of all."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

from torch import Tensor, fx, nn

from graphq.artifacts import manifest
from graphq.artifacts.manifest import Record
from graphq.artifacts.shards import InParts
from graphq.capture.source import source_of, stored_dtype
from graphq.capture.unread import check_numbers
from graphq.lowering.checkpoints.layers import QuantizedLinear
from graphq.lowering.stored import narrowed
from graphq.state import deferred_of, held_tensor, read_tensor


@final
@dataclass(frozen=True)
class FloatTensor:
    """The parameter or buffer ``name`` of a graph, which stays float; ``turned``: with its last two axes swapped."""

    gm: fx.GraphModule = field(repr=False)
    name: str
    turned: bool = False

    def read(self) -> Tensor:
        """As an artifact holds it. Raises ``GraphError`` for a parameter that was not checked before and holds NaN."""
        held = held_tensor(self.gm, self.name)
        tensor = read_tensor(held)
        if tensor is not held:
            check_numbers(self.name, tensor)
        found = narrowed(tensor, stored_dtype(source_of(self.gm), self.name, held)).detach()
        return found.transpose(-2, -1).contiguous() if self.turned else found

    def in_parts(self) -> InParts:
        """``read``; what is still in its file goes through memory in parts."""
        held = held_tensor(self.gm, self.name)
        dtype = stored_dtype(source_of(self.gm), self.name, held)
        deferred = deferred_of(held)
        if (
            self.turned
            or deferred is None
            or deferred.dtypes() != frozenset({dtype})
            or (plain := deferred.plain()) is None
        ):
            whole = self.read()
            return InParts(whole.dtype, tuple(whole.shape), (whole,))
        return InParts(dtype, plain.shape, self._checked(plain.pieces()))

    def _checked(self, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        is_parameter = isinstance(held_tensor(self.gm, self.name), nn.Parameter)
        for part in parts:
            if is_parameter:
                check_numbers(self.name, nn.Parameter(part, requires_grad=False))
            yield part


@final
@dataclass(frozen=True)
class Written:
    """Records of the tensors that were written so far: of quantized layers, as the QDQ form has them, and of others."""

    layers: dict[str, dict[str, Record]] = field(default_factory=dict[str, dict[str, Record]])
    floats: dict[str, Record] = field(default_factory=dict[str, Record])

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """A layer is written, which holds these."""
        self.layers[name] = {key: manifest.record(tensor) for key, tensor in tensors.items()}

    def float_tensor(self, name: str, tensor: FloatTensor | Tensor) -> InParts:
        """The tensor as it is to be written, which is recorded when its last part was taken."""
        if isinstance(tensor, FloatTensor):
            given = tensor.in_parts()
        else:
            given = InParts(tensor.dtype, tuple(tensor.shape), (tensor,))
        return InParts(given.dtype, given.shape, self._recorded(name, given))

    def _recorded(self, name: str, given: InParts) -> Iterator[Tensor]:
        digest = manifest.Digest(given.dtype, given.shape)
        for part in given.parts:
            digest.add(part)
            yield part
        self.floats[name] = manifest.record_of(given.dtype, given.shape, digest.text())

    def quantized(self, layers: Mapping[str, QuantizedLinear]) -> dict[str, Record]:
        """The records of all tensors of these layers, by name."""
        return {key: one for name in layers for key, one in self.layers[name].items()}

    def all(self, floats: Mapping[str, object], layers: Mapping[str, QuantizedLinear]) -> dict[str, Record]:
        """The records of all tensors, by name: of ``floats``, and of layers."""
        return {name: self.floats[name] for name in floats} | self.quantized(layers)
