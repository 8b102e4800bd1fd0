"""Tensors of a module by their state-dict key."""

from typing import cast

import torch
from torch import Tensor, nn


def tensor_of(module: nn.Module, fqn: str) -> Tensor:
    """The parameter or buffer of this name. Raises ``AttributeError`` if there is none."""
    path, _, name = fqn.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(path), name))


def put_tensor(module: nn.Module, fqn: str, tensor: Tensor) -> None:
    """``module`` holds ``tensor`` under ``fqn``, as a parameter without gradient if it is one and as a buffer if not."""
    path, _, name = fqn.rpartition(".")
    for segment in path.split(".") if path else ():
        if not hasattr(module, segment):
            module.add_module(segment, nn.Module())
        module = cast(nn.Module, getattr(module, segment))
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
    else:
        module.register_buffer(name, tensor.detach())


def remove_tensor(module: nn.Module, fqn: str) -> None:
    """``module`` holds no tensor of this name any more."""
    path, _, name = fqn.rpartition(".")
    delattr(module.get_submodule(path), name)


def nbytes(tensor: Tensor) -> int:
    """The size of a tensor's elements in bytes."""
    return tensor.numel() * torch.empty((), dtype=tensor.dtype).element_size()
