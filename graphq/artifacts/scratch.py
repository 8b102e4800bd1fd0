"""Tensors that were made and are not needed for now, in files of their own, where one reads them again one by one."""

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from graphq.artifacts.shards import WEIGHTS, write_shards
from graphq.deferred import InFile
from graphq.ir import edit
from graphq.state import as_parameter, deferred_of, first_names, held_tensor, nbytes, put_tensor, release_freed

SCRATCH: Final = "graphq.scratch"  # of a graph: the folder for such files
_SMALL: Final = 1 << 12  # bytes of what stays in memory


def give_scratch(gm: fx.GraphModule, place: str | os.PathLike[str] | None) -> None:
    """``gm`` has a folder for such files, in ``place`` or where the system has temporary ones; it goes with ``gm``."""
    folder = tempfile.mkdtemp(prefix=".graphq-", dir=None if place is None else str(place))
    weakref.finalize(gm, shutil.rmtree, folder, ignore_errors=True)
    gm.meta[SCRATCH] = folder


def set_aside(gm: fx.GraphModule, names: Iterable[str]) -> None:
    """The tensors of these names are in a file and deferred, but for small ones; nothing is done where ``gm`` has no
    folder for that. Those that are one tensor stay one.
    """
    folder = gm.meta.get(SCRATCH)
    if folder is None:
        return
    found = {name: held_tensor(gm, name) for name in names}
    large = {name: t for name, t in found.items() if nbytes(t) > _SMALL}
    if all(deferred_of(t) is not None for t in large.values()):
        return
    put_aside(gm, large, Path(folder) / f"{sum(1 for _ in Path(folder).iterdir()):05}")
    del found, large
    release_freed()


def put_aside(gm: fx.GraphModule, names: Iterable[str], place: Path) -> dict[str, dict[str, Any]]:
    """The tensors of these names, but for those that are deferred already, are in a file in the new folder ``place``,
    and deferred if they are large. Gives what ``take_back`` wants to know of them.
    """
    found = {name: held_tensor(gm, name) for name in names}
    found = {name: tensor for name, tensor in found.items() if deferred_of(tensor) is None}
    first = first_names(found)
    own = {name: tensor for name, tensor in found.items() if name not in first}
    place.mkdir()
    write_shards(place, own.items(), sum(map(nbytes, own.values())))
    told = {
        name: {
            "key": first.get(name, name),
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "parameter": isinstance(tensor, nn.Parameter),
        }
        for name, tensor in found.items()
    }
    take_back(gm, place, {name: told[name] for name, tensor in found.items() if nbytes(tensor) > _SMALL})
    return told


def take_back(gm: fx.GraphModule, place: Path, told: Mapping[str, Mapping[str, Any]]) -> None:
    """``gm`` holds the tensors that ``put_aside`` wrote to ``place``, large ones deferred."""
    made: dict[str, Tensor] = {}
    for name, entry in told.items():
        key, shape, dtype = entry["key"], tuple(entry["shape"]), getattr(torch, entry["dtype"])
        if key not in made:
            in_file = InFile(place / WEIGHTS, key, shape, dtype, dtype)
            is_large = dtype.itemsize * math.prod(shape) > _SMALL
            made[key] = edit.deferred_tensor(gm, in_file, dtype) if is_large else in_file.read()
        put_tensor(gm, name, as_parameter(made[key]) if entry["parameter"] else made[key])
