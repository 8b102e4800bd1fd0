"""Tensors of a module by their state-dict key, and the inputs of the graph that reads them."""

import ctypes
from collections.abc import Container, Mapping
from typing import Any, Final

from torch import Tensor, fx, nn

from graphq.deferred import Deferred

_DEFERRED: Final = "graphq_deferred"  # of a fake tensor: what its numbers are


def put_input(graph: fx.Graph, name: str) -> fx.Node:
    """A further input of ``graph``, whose argument has the node's own name: ``name``, or one like it.

    torch.fx writes ``x = self.x`` for a node that reads a tensor, under a name that no other *node* has. An argument
    whose name is not its node's may be that one, and would be lost.
    """
    node = graph.placeholder(name)
    node.target = node.name
    return node


def tensor_of(module: nn.Module, fqn: str) -> Tensor:
    """The parameter or buffer of this name, read if it is deferred. Raises ``AttributeError`` if there is none."""
    return read_tensor(held_tensor(module, fqn))


def read_tensor(tensor: Tensor) -> Tensor:
    """The tensor, read anew if it is deferred; a parameter is one, without gradient."""
    deferred = deferred_of(tensor)
    if deferred is None:
        return tensor
    read = deferred.read()
    return nn.Parameter(read, requires_grad=False) if isinstance(tensor, nn.Parameter) else read


def held_tensor(module: nn.Module, fqn: str) -> Tensor:
    """``tensor_of``, but for one that is deferred the fake tensor that stands for it."""
    path, _, name = fqn.rpartition(".")
    found = getattr(module.get_submodule(path), name)
    if not isinstance(found, Tensor):
        raise AttributeError(f"{fqn} is a {type(found).__name__}, not a tensor")
    return found


def deferred_of(tensor: Tensor) -> Deferred | None:
    """What the numbers of a fake tensor are; None for a tensor that has its own, and for a fake one without any."""
    return getattr(tensor, _DEFERRED, None)


def defer(fake: Tensor, deferred: Deferred) -> Tensor:
    """``fake``, whose numbers are from now on those of ``deferred``."""
    assert fake.shape == deferred.shape, (fake.shape, deferred.shape)
    setattr(fake, _DEFERRED, deferred)
    return fake


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor as a parameter without gradient, deferred if it is."""
    made = nn.Parameter(tensor.detach(), requires_grad=False)
    deferred = deferred_of(tensor)
    if deferred is not None:
        defer(made, deferred)
    return made


def deferred_tensors(module: nn.Module) -> dict[str, Deferred]:
    """What the numbers of the tensors are that ``module`` has not read yet, by name."""
    held = module.state_dict(keep_vars=True).items()
    return {name: deferred for name, tensor in held if (deferred := deferred_of(tensor)) is not None}


def put_tensor(module: nn.Module, fqn: str, tensor: Tensor) -> None:
    """``module`` holds ``tensor`` as ``fqn``: as a parameter without gradient if it is one, as a buffer if not. One
    that is deferred stays so.
    """
    path, _, name = fqn.rpartition(".")
    for segment in path.split(".") if path else ():
        if not hasattr(module, segment):
            module.add_module(segment, nn.Module())
        module = module.get_submodule(segment)
    is_parameter = isinstance(tensor, nn.Parameter)
    if hasattr(module, name) and isinstance(getattr(module, name), nn.Parameter) != is_parameter:
        delattr(module, name)
    if is_parameter:
        module.register_parameter(name, as_parameter(tensor))
    else:
        module.register_buffer(name, _detached(tensor))


def _detached(tensor: Tensor) -> Tensor:
    made, deferred = tensor.detach(), deferred_of(tensor)
    return made if deferred is None else defer(made, deferred)


def remove_tensor(module: nn.Module, fqn: str) -> None:
    """``module`` holds no tensor of this name any more. Raises ``AttributeError`` if there was none."""
    held_tensor(module, fqn)
    path, _, name = fqn.rpartition(".")
    delattr(module.get_submodule(path), name)


def same_tensors(module: nn.Module) -> dict[str, str]:
    """For each tensor that ``module`` holds under several names, the same numbers in the same order: the first name."""
    return first_names(module.state_dict(keep_vars=True))


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For the name of each tensor that lies where an earlier one does, in its shape: that one's name."""
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (*location(tensor), tensor.dtype.itemsize, tensor.shape, tensor.stride())
        kept = first.setdefault(place, name)
        if kept != name and tensor.numel():
            found[name] = kept
    return found


def ties(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """The other names under which ``module`` holds each tensor that it holds under several.

    Tensors are tied that begin at one place of one storage; other parts of one storage are not, nor are empty tensors.
    """
    names: dict[tuple[int, int], list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.numel():
            names.setdefault(location(tensor), []).append(name)
    tied = [found for found in names.values() if len(found) > 1]
    return {name: tuple(other for other in found if other != name) for found in tied for name in found}


def release_freed() -> None:
    """What was freed is the system's again, where the C library is glibc's.

    It keeps freed memory for itself as long as anything that was allocated later is held: of a model whose weights are
    rounded one after the other, as floats all of them.
    """
    if _TRIM is not None:
        _TRIM(0)


def _trim() -> Any:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


_TRIM: Final = _trim()


def location(tensor: Tensor) -> tuple[int, int]:
    """The storage that a tensor lies in, and where it begins there."""
    # Storages' own addresses: those of their data are all 0 on fake tensors.
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())  # pyright: ignore[reportPrivateUsage]


def nbytes(tensor: Tensor) -> int:
    """The size of a tensor's elements in bytes."""
    return tensor.numel() * tensor.dtype.itemsize


def storage_of(tensor: Tensor) -> int:
    """What is equal for tensors that lie in one storage."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def copy_tensors(gm: nn.Module, shared: Container[int]) -> None:
    """The tensors of ``gm`` in the storages ``shared`` are copies; tied ones stay one."""
    copies: dict[tuple[object, ...], Tensor] = {}  # parts of one storage stay apart
    for name, tensor in gm.state_dict(keep_vars=True).items():
        if storage_of(tensor) in shared:
            place = (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
            if place not in copies:
                copies[place] = tensor.detach().clone()
            own = copies[place]
            put_tensor(gm, name, nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own)
