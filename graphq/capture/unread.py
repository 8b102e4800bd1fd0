"""A model directory as a graph whose weights stay in their files until a pass reads them, one at a time.

It is the graph that a configuration alone gives, with the buffers of a model made from it. A weight that is quantized
is then never held beside the others as floats. Files may name tensors otherwise than the model does, and hold experts
one by one of which the model makes a stack: transformers' own conversion says which is which.
"""

import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from graphq.capture import adapters
from graphq.capture.hugging_face import (
    capture_config,
    model_class,
    read_config,
    unused_note,
)
from graphq.capture.quiet import silent_transformers
from graphq.capture.source import KEY, source_of
from graphq.capture.weight_files import HeldTensor, check_weight_files, held_tensors
from graphq.deferred import Deferred, Joined, Stacked
from graphq.errors import GraphError
from graphq.state import as_parameter, defer, deferred_tensors, held_tensor, put_tensor, storage_of, tensor_of

_HALVES: Final = 2  # of an expert's rows: gate and up lie in one matrix
_UNUSED: Final = r"rotary_emb\.inv_freq|(^|\.)position_ids$"  # which older checkpoints hold and models compute


def capture_unread(
    path: Path,
    dtype: torch.dtype,
    cache: bool = True,
    shapes: Mapping[str, int] | None = None,
    quantized: Mapping[str, HeldTensor] | None = None,
) -> fx.GraphModule | None:
    """The graph of a directory whose files hold all parameters of the model. None for a directory that transformers
    itself must load: where tensors are missing, or are stored in a way that is not followed.

    Matrices are deferred, and read in ``dtype``; vectors and buffers are held. ``quantized``: the tensors of the model
    by name where its files hold some as codes; these nobody else loads, and ``GraphError`` names what is missing.
    """
    config = read_config(path, quantized=quantized is not None)
    if adapters.adapter_note(path):
        if quantized is not None:
            raise GraphError(f"{path}: adapters are merged into float weights, and these are quantized")
        return None
    cls = model_class(path, config)
    places = held_tensors(check_weight_files(path)) if quantized is None else quantized
    model = _made_of(config, cls, dtype)
    lacking: list[str] = []
    found = _deferred(model, places, dtype, lacking)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    if found is None or any(buffer.is_meta for buffer in buffers.values()):
        if quantized is not None:
            name = lacking[0] if lacking else next((n for n, buffer in buffers.items() if buffer.is_meta), "")
            raise GraphError(f"{path}: {name}: {cls.__name__} has this tensor, and the files have none of its shape")
        return None
    ignored = [*(cast(Any, model)._keys_to_ignore_on_load_unexpected or ()), _UNUSED]
    unused = sorted(
        name for name in places.keys() - found.used if not any(re.search(pattern, name) for pattern in ignored)
    )
    gm = capture_config(read_config(path, quantized=quantized is not None), cls, dtype, cache, shapes)
    if not _hold(gm, found.tensors, buffers):
        return None
    gm.meta[KEY] = replace(source_of(gm), notes=(*source_of(gm).notes, *unused_note(model, unused)))
    return gm


def _hold(gm: fx.GraphModule, tensors: Mapping[str, Deferred], buffers: Mapping[str, Tensor]) -> bool:
    """The fake tensors of ``gm`` are these; whether all are. What several names have is one tensor."""
    own: dict[Deferred, Tensor] = {}
    for name, held in list(gm.state_dict(keep_vars=True).items()):
        if not isinstance(held, FakeTensor):
            continue
        deferred = tensors.get(name)
        if deferred is None:
            if name not in buffers or isinstance(held, nn.Parameter):
                return False
            put_tensor(gm, name, buffers[name])
            continue
        if deferred not in own:
            made = deferred.read() if held.dim() < 2 else defer(held.detach(), deferred)
            own[deferred] = as_parameter(made) if isinstance(held, nn.Parameter) else made
        put_tensor(gm, name, own[deferred])
    return True


def read_all(gm: fx.GraphModule) -> None:
    """``gm`` holds its tensors; those that are tied are one tensor. Raises ``GraphError`` for a parameter with NaN."""
    read: dict[int, Tensor] = {}
    kept: list[Tensor] = []  # whose storages keep their places until all are read
    for name in deferred_tensors(gm):
        held = held_tensor(gm, name)
        place = storage_of(held)
        if place not in read:
            kept.append(held)
            read[place] = tensor_of(gm, name)
            check_numbers(name, read[place])
        put_tensor(gm, name, read[place])


def check_numbers(name: str, tensor: Tensor) -> None:
    """Raises ``GraphError`` where a parameter holds NaN or Inf."""
    numbers = tensor.float() if tensor.itemsize == 1 else tensor  # torch has no isfinite of float8
    if isinstance(tensor, nn.Parameter) and not torch.isfinite(numbers).all():
        raise GraphError(f"{name}: the tensor holds NaN or Inf")


class _Unheld(TorchFunctionMode):
    """``torch.empty``, which parameters are made with, takes no memory; what is computed does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


@contextmanager
def _unheld() -> Generator[None]:
    from transformers.initialization import no_init_weights

    with silent_transformers(), no_init_weights(), _Unheld():
        yield


def _made_of(config: Any, cls: Any, dtype: torch.dtype) -> nn.Module:
    """A model of this configuration with buffers, whose parameters are on the meta device."""
    with _unheld():
        model = cls._from_config(config, dtype=dtype).eval()
        model.tie_weights()  # which is left out with the rest
        return model


@final
@dataclass(frozen=True)
class _Found:
    """What the parameters and stored buffers of a model are, by name, and the tensors of the files that are theirs."""

    tensors: Mapping[str, Deferred]
    used: frozenset[str]


def _deferred(
    model: nn.Module, places: Mapping[str, HeldTensor], dtype: torch.dtype, lacking: list[str]
) -> _Found | None:
    """Where the model's tensors are; None where a file lacks one, or holds it in another shape or an unknown dtype,
    which then is in ``lacking``.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(own.items()) if name in places}
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    keys = {name: name if name in places else first.get(id(tensor)) for name, tensor in state.items()}
    other = [name for name, key in keys.items() if key is None]
    used = {key for key in keys.values() if key is not None}
    found: dict[str, Deferred] = {}

    def in_file(key: str, shape: Sequence[int], wanted: torch.dtype) -> Deferred | None:
        place = places.get(key)
        read = None if place is None else place.deferred(tuple(shape), wanted)
        if read is not None:
            used.add(key)
        return read

    for name, key in keys.items():
        wanted = dtype if state[name].is_floating_point() else state[name].dtype
        if key is not None:
            read = in_file(key, state[name].shape, wanted)
            if read is None:
                lacking.append(name)
                return None
            found[name] = read
    if other:
        converted = _converted(model, {name: state[name] for name in other}, dtype, in_file, lacking)
        if converted is None:
            return None
        found |= converted
    return _Found(found, frozenset(used))


def _converted(
    model: nn.Module,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    in_file: Callable[[str, Sequence[int], torch.dtype], Deferred | None],
    lacking: list[str],
) -> dict[str, Deferred] | None:
    """Where these tensors are, whose names files do not have; None for one that is not found.

    transformers' own conversion is applied to tensors that say which part they are: of a stack two for each expert, the
    upper and the lower half of its rows, of others one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parts: list[tuple[str, int, int]] = []  # tensor, expert, half
    marked: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():  # all, as conversions may take several tensors
        shape = (tensor.shape[0], _HALVES, 1) if tensor.dim() == 3 else (1,) * tensor.dim()
        count = math.prod(shape)
        marked[name] = torch.arange(len(parts), len(parts) + count).view(shape)
        parts += [(name, i // _HALVES, i % _HALVES) for i in range(count)]
    try:
        stored = revert_weight_conversion(cast(Any, model), marked)
    except (RuntimeError, ValueError, IndexError, AttributeError, TypeError):
        return None
    where: dict[tuple[str, int], dict[tuple[int, ...], str]] = {}
    for key, mark in stored.items():
        found = [parts[int(index)] for index in mark.flatten()]
        name, expert, _ = found[0]
        if {(n, e) for n, e, _ in found} == {(name, expert)} and mark.dim() <= 2 and mark.shape[1:] in ((), (1,)):
            where.setdefault((name, expert), {})[tuple(half for _, _, half in found)] = key
    made: dict[str, Deferred] = {}
    for name, tensor in state.items():
        one = [_expert(where.get((name, i), {}), tensor, dtype, in_file) for i in range(_experts(tensor))]
        if None in one:
            lacking.append(name)
            return None
        held = tuple(deferred for deferred in one if deferred is not None)
        made[name] = Stacked(held) if tensor.dim() == 3 else held[0]
    return made


def _experts(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() == 3 else 1


def _expert(
    keys: Mapping[tuple[int, ...], str],
    tensor: Tensor,
    dtype: torch.dtype,
    in_file: Callable[[str, Sequence[int], torch.dtype], Deferred | None],
) -> Deferred | None:
    """One index of a stack, or a tensor that is none, which is in one file or in one for each half of its rows."""
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    if tensor.dim() != 3:
        return in_file(keys.get((0,), ""), tensor.shape, dtype)
    rows, columns = tensor.shape[1:]
    if (0, 1) in keys:
        return in_file(keys[0, 1], (rows, columns), dtype)
    halves = [in_file(keys.get((half,), ""), (rows // 2, columns), dtype) for half in range(_HALVES)]
    return None if None in halves else Joined(tuple(half for half in halves if half is not None))
