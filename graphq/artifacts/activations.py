"""What the parts of a graph give for each batch: held in memory, written to files, or both."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from graphq.artifacts.shards import SUFFIX, write_shards
from graphq.data.masks import ALL, MaskedBatch, Validity
from graphq.deferred import InFile
from graphq.errors import TargetError
from graphq.state import nbytes

_MASK: Final = ".mask"  # behind a value's name, which has no dot: what of it is valid


@final
@dataclass(frozen=True)
class _Filed:
    """A value of a batch that is in a file: its tensor and mask, or a number. ``stops``: as ``Validity`` has them."""

    file: Path
    value: InFile | int | float | bool
    mask: InFile | None
    stops: tuple[str, ...]

    def read(self) -> tuple[Any, Validity]:
        value = self.value.read() if isinstance(self.value, InFile) else self.value
        if self.mask is None and not self.stops:
            return value, ALL
        return value, Validity(None if self.mask is None else self.mask.read(), self.stops)


@final
class Activations:
    """The values of nodes for each batch, by the nodes' names; those of the graph's own inputs stay where they are.

    ``folder``: where values are written, a file for each batch and each time that some are added. ``in_memory``: those
    that are written are held, too; without it they are read each time that they are asked for. What is given is
    contiguous, so that it is the same whether it was in a file or not.
    """

    def __init__(
        self, inputs: Sequence[Mapping[str, tuple[Any, Validity]]], folder: Path | None, in_memory: bool
    ) -> None:
        self._inputs = inputs
        self._folder = folder
        self._in_memory = in_memory or folder is None
        self._held: list[dict[str, tuple[Any, Validity]]] = [{} for _ in inputs]
        self._filed: list[dict[str, _Filed]] = [{} for _ in inputs]
        self._count = 0
        self._dead: set[Path] = set()

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._inputs)

    def of(self, batch: int, names: Iterable[str]) -> MaskedBatch:
        """The values of these nodes."""
        found = [self._value(batch, name) for name in names]
        return MaskedBatch([value for value, _ in found], [validity for _, validity in found])

    def _value(self, batch: int, name: str) -> tuple[Any, Validity]:
        if name in self._held[batch]:
            return self._held[batch][name]
        if name in self._filed[batch]:
            return self._filed[batch][name].read()
        return self._inputs[batch][name]

    def add(self, names: Sequence[str], given: Iterable[MaskedBatch]) -> None:
        """The nodes of these names have these values, for one batch after the other; each is kept before the next is
        asked for.
        """
        for batch, values in enumerate(given):
            made = {
                name: (value.contiguous() if isinstance(value, Tensor) else value, validity)
                for name, value, validity in zip(names, values, values.validity, strict=True)
            }
            if self._folder is not None:
                self._filed[batch] |= self._write(self._folder, f"{self._count:05}-{batch:05}", made)
            if self._in_memory:
                self._held[batch] |= made
        self._count += 1

    def _write(self, folder: Path, stem: str, made: Mapping[str, tuple[Any, Validity]]) -> dict[str, _Filed]:
        tensors = {name: value for name, (value, _) in made.items() if isinstance(value, Tensor)}
        tensors |= {name + _MASK: one.mask for name, (_, one) in made.items() if one.mask is not None}
        write_shards(folder, tensors.items(), max(1, sum(map(nbytes, tensors.values()))), stem)
        file = folder / (stem + SUFFIX)

        def filed(name: str) -> InFile:
            tensor = tensors[name]
            return InFile(file, name, tuple(tensor.shape), tensor.dtype, tensor.dtype)

        return {
            name: _Filed(
                file,
                filed(name) if name in tensors else value,
                filed(name + _MASK) if name + _MASK in tensors else None,
                one.stops,
            )
            for name, (value, one) in made.items()
        }

    def keep(self, names: Mapping[str, str], done: Iterable[str]) -> None:
        """Nodes have new names, by the old ones; the values of those that are ``done`` are gone, files apart."""
        gone = frozenset(done)
        for store in (*self._held, *self._filed):
            kept = {names.get(name, name): value for name, value in store.items() if name not in gone}
            if len(kept) != len(store):
                self._dead |= {value.file for value in store.values() if isinstance(value, _Filed)}
            store.clear()
            store |= kept

    def remove_files(self) -> None:
        """The files that hold no value any more are gone."""
        alive = {value.file for store in self._filed for value in store.values()}
        for file in self._dead - alive:
            file.unlink(missing_ok=True)
        self._dead &= alive

    # -- as a record

    def to_json(self) -> dict[str, Any]:
        """What is in which file, as plain data. All values are in files."""
        assert all(held.keys() <= filed.keys() for held, filed in zip(self._held, self._filed, strict=True))
        return {"count": self._count, "batches": [_entries(filed) for filed in self._filed]}

    def restore(self, data: Mapping[str, Any]) -> None:
        """The values are those that ``to_json`` told. Raises ``TargetError`` for files that are not there."""
        assert self._folder is not None
        self._count = data["count"]
        if len(data["batches"]) != len(self._filed):
            raise TargetError(f"{self._folder}: is of {len(data['batches'])} batches, not of {len(self._filed)}")
        for batch, entries in enumerate(data["batches"]):
            self._filed[batch] = {name: _filed_from(self._folder, entry) for name, entry in entries.items()}
            self._held[batch] = {}
            if self._in_memory:
                self._held[batch] = {name: one.read() for name, one in self._filed[batch].items()}
        alive = {value.file for store in self._filed for value in store.values()}
        self._dead = set(self._folder.iterdir()) - alive
        self.remove_files()


def _entries(filed: Mapping[str, _Filed]) -> dict[str, Any]:
    return {
        name: {
            "file": one.file.name,
            "value": _tensor_entry(one.value) if isinstance(one.value, InFile) else one.value,
            "mask": None if one.mask is None else _tensor_entry(one.mask),
            "stops": list(one.stops),
        }
        for name, one in filed.items()
    }


def _tensor_entry(tensor: InFile) -> dict[str, Any]:
    return {"key": tensor.key, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _filed_from(folder: Path, entry: Mapping[str, Any]) -> _Filed:
    file = folder / entry["file"]
    if not file.is_file():
        raise TargetError(f"{file}: no such file")

    def in_file(found: Mapping[str, Any]) -> InFile:
        dtype = getattr(torch, found["dtype"])
        return InFile(file, found["key"], tuple(found["shape"]), dtype, dtype)

    value = in_file(entry["value"]) if isinstance(entry["value"], dict) else entry["value"]
    return _Filed(file, value, None if entry["mask"] is None else in_file(entry["mask"]), tuple(entry["stops"]))
