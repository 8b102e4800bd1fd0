"""Tensors that are made when they are read, from files or from each other, so that a model need not be in memory.

A module holds such a tensor as a fake one, which has a shape and a dtype; a ``Deferred`` on it says what its numbers
are. Experts of a stack and rows of a matrix are read without the rest where that is how they are stored.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, cast, final

import torch
from torch import Tensor

from graphq.errors import GraphError

PIECE: Final = 1 << 22  # elements that are read at once where rows are enough


class Deferred(ABC):
    """What gives a tensor of this ``shape`` when it is asked for it, a new one each time."""

    shape: tuple[int, ...]

    @abstractmethod
    def read(self) -> Tensor:
        """The whole tensor."""

    def member(self, index: int) -> "Deferred":
        """One index of the first axis, which is gone."""

        def read() -> Tensor:
            return self.read()[index].clone()

        return Made(self.shape[1:], read)

    def narrowed(self, axis: int, start: int, length: int) -> "Deferred":
        """Those of an axis from ``start`` on."""
        shape = (*self.shape[:axis], length, *self.shape[axis + 1 :])
        return Made(shape, lambda: self.read().narrow(axis, start, length).clone())

    def changed(self, f: Callable[[Tensor], Tensor]) -> "Deferred":
        """``f`` of the tensor, in its shape; ``f`` is pure."""
        return Made(self.shape, lambda: f(self.read()))

    def turned(self) -> "Deferred":
        """The tensor with its last two axes swapped."""
        *stack, first, last = self.shape
        return Turned((*stack, last, first), self)

    def pieces(self, multiple: int = 1) -> Iterator[Tensor]:
        """The tensor along its first axis, in order, in parts of about ``PIECE`` elements where it can be read so;
        each but the last has ``multiple`` rows, or several times as many.
        """
        yield self.read()

    def plain(self) -> "Deferred | None":
        """The same numbers in the dtype that files hold them in; None where they are computed."""
        return None

    def dtypes(self) -> frozenset[torch.dtype]:
        """The dtypes of ``plain``."""
        return frozenset()


@final
@dataclass(frozen=True)
class InFile(Deferred):
    """Rows ``start`` to ``stop`` of a tensor of a safetensors file, as ``dtype``.

    The file is open no longer than it takes: the pages that were read are the system's again. Reading raises
    ``GraphError`` where the file is no longer what it was.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype
    start: int = 0

    def read(self) -> Tensor:
        return read_together({"": self})[""]

    def read_from(self, opened: Any) -> Tensor:
        """``read``, of the file as safetensors has opened it."""
        held: Any = opened.get_slice(self.key) if self.shape else None
        part = opened.get_tensor(self.key) if held is None else held[self.start : self.start + self.shape[0]]
        if tuple(part.shape) != self.shape or part.dtype != self.stored:
            raise GraphError(f"{self.file}: {self.key}: was changed while it was compiled")
        return cast(Tensor, part).to(self.dtype, copy=True)

    def member(self, index: int) -> Deferred:
        one = self.narrowed(0, index, 1)
        return Made(self.shape[1:], lambda: one.read()[0])

    def narrowed(self, axis: int, start: int, length: int) -> Deferred:
        if axis:
            return super().narrowed(axis, start, length)
        return replace(self, start=self.start + start, shape=(length, *self.shape[1:]))

    def pieces(self, multiple: int = 1) -> Iterator[Tensor]:
        size = math.prod(self.shape)
        if not self.shape or size <= PIECE:
            yield self.read()
            return
        rows = -(-max(1, PIECE * self.shape[0] // size) // multiple) * multiple
        for start in range(0, self.shape[0], rows):
            yield self.narrowed(0, start, min(rows, self.shape[0] - start)).read()

    def plain(self) -> Deferred:
        return replace(self, dtype=self.stored)

    def dtypes(self) -> frozenset[torch.dtype]:
        return frozenset({self.stored})


def read_together(parts: Mapping[str, InFile]) -> dict[str, Tensor]:
    """The numbers of each of ``parts``, by its name; each file is opened once. Raises what ``read`` raises."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(part.file for part in parts.values()):
        own = {name: part for name, part in parts.items() if part.file == file}
        key = ""
        try:
            with safe_open(file, framework="pt") as opened:
                for name, part in own.items():
                    key = part.key
                    found[name] = part.read_from(opened)
        except (OSError, SafetensorError) as error:
            where = f"{file}: {key or next(iter(own.values())).key}"
            raise GraphError(f"{where}: cannot be read any more: {error}") from error
    return {name: found[name] for name in parts}


@final
@dataclass(frozen=True)
class Turned(Deferred):
    """``of`` with its last two axes swapped."""

    shape: tuple[int, ...]
    of: Deferred

    def read(self) -> Tensor:
        return self.of.read().transpose(-2, -1)

    def member(self, index: int) -> Deferred:
        return self.of.member(index).turned() if len(self.shape) > 2 else super().member(index)

    def turned(self) -> Deferred:
        return self.of

    def plain(self) -> Deferred | None:
        plain = self.of.plain()
        return None if plain is None else plain.turned()

    def dtypes(self) -> frozenset[torch.dtype]:
        return self.of.dtypes()


@final
@dataclass(frozen=True)
class Stacked(Deferred):
    """Tensors of one shape along a new first axis."""

    parts: tuple[Deferred, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (len(self.parts), *self.parts[0].shape)

    def read(self) -> Tensor:
        return torch.stack([part.read() for part in self.parts])

    def member(self, index: int) -> Deferred:
        return self.parts[index]

    def turned(self) -> Deferred:
        return Stacked(tuple(part.turned() for part in self.parts))

    def members(self, indices: Sequence[int]) -> "Stacked":
        """These indices of the first axis."""
        return Stacked(tuple(self.parts[index] for index in indices))

    def narrowed(self, axis: int, start: int, length: int) -> Deferred:
        if axis == 0:
            return Stacked(self.parts[start : start + length])
        return Stacked(tuple(part.narrowed(axis - 1, start, length) for part in self.parts))

    def plain(self) -> Deferred | None:
        return _joined(Stacked, self.parts)

    def dtypes(self) -> frozenset[torch.dtype]:
        return frozenset[torch.dtype]().union(*(part.dtypes() for part in self.parts))


@final
@dataclass(frozen=True)
class Joined(Deferred):
    """Tensors one after the other along the first axis."""

    parts: tuple[Deferred, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def read(self) -> Tensor:
        return torch.cat([part.read() for part in self.parts])

    def narrowed(self, axis: int, start: int, length: int) -> Deferred:
        place = 0
        for part in self.parts if axis == 0 else ():
            if (place, part.shape[0]) == (start, length):
                return part
            place += part.shape[0]
        return super().narrowed(axis, start, length)

    def plain(self) -> Deferred | None:
        return _joined(Joined, self.parts)

    def dtypes(self) -> frozenset[torch.dtype]:
        return frozenset[torch.dtype]().union(*(part.dtypes() for part in self.parts))


@final
@dataclass(frozen=True)
class Made(Deferred):
    """What ``make``, which is pure, gives."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def read(self) -> Tensor:
        return self.make()

    def member(self, index: int) -> Deferred:
        return Made(self.shape[1:], partial(_member, self, index))


_latest: list[tuple[Made, Tensor]] = []  # the stack that was made last, whose experts are read one after the other


def _member(whole: Made, index: int) -> Tensor:
    if not _latest or _latest[0][0] is not whole:
        _latest.clear()
        _latest.append((whole, whole.read()))
    member = _latest[0][1][index].clone()
    if index == whole.shape[0] - 1:
        _latest.clear()
    return member


def _joined(kind: Callable[[tuple[Deferred, ...]], Deferred], parts: Sequence[Deferred]) -> Deferred | None:
    found = [part.plain() for part in parts]
    return None if None in found else kind(tuple(part for part in found if part is not None))
