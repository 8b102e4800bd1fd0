"""Tensors of a module by their state-dict key, and the inputs of the graph that reads them."""

from torch import Tensor, fx, nn


def put_input(graph: fx.Graph, name: str) -> fx.Node:
    """A further input of ``graph``, whose argument has the node's own name: ``name``, or one like it.

    torch.fx writes ``x = self.x`` for a node that reads a tensor, under a name that no other *node* has. An argument
    whose name is not its node's may be that one, and would be lost.
    """
    node = graph.placeholder(name)
    node.target = node.name
    return node


def tensor_of(module: nn.Module, fqn: str) -> Tensor:
    """The parameter or buffer of this name. Raises ``AttributeError`` if there is none."""
    path, _, name = fqn.rpartition(".")
    found = getattr(module.get_submodule(path), name)
    if not isinstance(found, Tensor):
        raise AttributeError(f"{fqn} is a {type(found).__name__}, not a tensor")
    return found


def put_tensor(module: nn.Module, fqn: str, tensor: Tensor) -> None:
    """``module`` holds ``tensor`` as ``fqn``: as a parameter without gradient if it is one, as a buffer if not."""
    path, _, name = fqn.rpartition(".")
    for segment in path.split(".") if path else ():
        if not hasattr(module, segment):
            module.add_module(segment, nn.Module())
        module = module.get_submodule(segment)
    is_parameter = isinstance(tensor, nn.Parameter)
    if hasattr(module, name) and isinstance(getattr(module, name), nn.Parameter) != is_parameter:
        delattr(module, name)
    if is_parameter:
        module.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
    else:
        module.register_buffer(name, tensor.detach())


def remove_tensor(module: nn.Module, fqn: str) -> None:
    """``module`` holds no tensor of this name any more. Raises ``AttributeError`` if there was none."""
    tensor_of(module, fqn)
    path, _, name = fqn.rpartition(".")
    delattr(module.get_submodule(path), name)


def is_tied(module: nn.Module, fqn: str) -> bool:
    """Whether ``module`` holds the tensor of this name under another one, too; parts of one storage are not tied."""
    tensors = module.state_dict(keep_vars=True)
    return any(name != fqn and _place(tensor) == _place(tensors[fqn]) for name, tensor in tensors.items())


def _place(tensor: Tensor) -> tuple[int, int]:
    # Storages' own addresses: those of their data are all 0 on fake tensors.
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())  # pyright: ignore[reportPrivateUsage]


def nbytes(tensor: Tensor) -> int:
    """The size of a tensor's elements in bytes."""
    return tensor.numel() * tensor.dtype.itemsize
