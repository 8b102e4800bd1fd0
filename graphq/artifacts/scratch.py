"""Tensors that were made and are not needed for now, in files of their own, where one reads them again one by one."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Final

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
    large = {name: t for name, t in found.items() if deferred_of(t) is None and nbytes(t) > _SMALL}
    first = first_names(large)
    own = {name: tensor for name, tensor in large.items() if name not in first}
    if not own:
        return
    place = Path(folder) / f"{sum(1 for _ in Path(folder).iterdir()):05}"
    place.mkdir()
    write_shards(place, own.items(), sum(map(nbytes, own.values())))
    made: dict[str, Tensor] = {}
    for name, tensor in large.items():
        key = first.get(name, name)
        if key not in made:
            shape = tuple(tensor.shape)
            made[key] = edit.deferred_tensor(
                gm, InFile(place / WEIGHTS, key, shape, tensor.dtype, tensor.dtype), tensor.dtype
            )
        put_tensor(gm, name, as_parameter(made[key]) if isinstance(tensor, nn.Parameter) else made[key])
    del found, large, own
    release_freed()
