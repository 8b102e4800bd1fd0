"""The only ways to change a graph. Each keeps ``val`` true and notes in ``graphq.by`` which passes made or moved a node."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graphq.errors import PassError
from graphq.layers import BY, LAYER, PLAN
from graphq.state import put_tensor, remove_tensor, tensor_of
from graphq.views import Op, view


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The mode that the graph's ``val``s belong to."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            return val.fake_mode
    raise PassError("no node of this graph knows its val")


def has_data(gm: fx.GraphModule) -> bool:
    """Whether the parameters hold numbers; they do not where a model was captured without its weights."""
    return not any(isinstance(t, FakeTensor) for t in gm.state_dict(keep_vars=True).values())


def insert(gm: fx.GraphModule, before: Op, target: Callable[..., Any], *args: Any, by: str, like: Op | None = None) -> Op:
    """A new node that calls ``target``, in front of ``before``; it belongs to the layer that ``like`` belongs to."""
    unwrapped = cast(tuple[Any, ...], _unwrap(args))
    with gm.graph.inserting_before(before.node):
        node = gm.graph.call_function(target, unwrapped)
    node.meta["val"] = _value(gm, target, unwrapped)
    origin = (like or before).node.meta
    node.meta |= {k: origin[k] for k in ("nn_module_stack", "stack_trace", LAYER, PLAN) if k in origin}
    node.meta[BY] = (by,)
    return view(node)


def items(gm: fx.GraphModule, op: Op, count: int, by: str) -> tuple[Op, ...]:
    """The first ``count`` outputs of an op that has several."""
    after = view(op.node.next)
    return tuple(insert(gm, after, operator.getitem, op, i, by=by, like=op) for i in range(count))


def _unwrap(value: Any) -> Any:
    if isinstance(value, Op):
        return value.node
    if isinstance(value, list | tuple):
        kind = cast(type[Any], type(value))
        return kind(_unwrap(item) for item in cast(Iterable[Any], value))
    return value


def _value(gm: fx.GraphModule, target: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    values = fx.node.map_arg(args, lambda node: node.meta["val"])
    with fake_mode_of(gm), torch.no_grad():
        return target(*cast(tuple[Any, ...], values))


def replace(gm: fx.GraphModule, op: Op, target: Callable[..., Any], *args: Any, by: str) -> Op:
    """A new node in the place of ``op``, which is gone; every reader of ``op`` reads the new node."""
    made = insert(gm, op, target, *args, by=by, like=op)
    made.node.meta[BY] = (*op.node.meta.get(BY, ()), by)
    op.node.replace_all_uses_with(made.node)
    gm.graph.erase_node(op.node)
    return made


def bypass(gm: fx.GraphModule, op: Op, by_op: Op) -> None:
    """Every reader of ``op`` reads ``by_op`` instead, and ``op`` is gone."""
    op.node.replace_all_uses_with(by_op.node)
    gm.graph.erase_node(op.node)


def redirect(reader: Op, old: Op, new: Op, by: str) -> None:
    """``reader`` reads ``new`` where it read ``old``."""
    reader.node.replace_input_with(old.node, new.node)
    reader.node.meta[BY] = (*reader.node.meta.get(BY, ()), by)


def add_tensor(gm: fx.GraphModule, before: Op, fqn: str, tensor: Tensor, by: str, like: Op | None = None) -> Op:
    """A new buffer (a parameter if ``tensor`` is one) of this name, and a node in front of ``before`` that reads it."""
    path, _, name = fqn.rpartition(".")
    try:
        taken = hasattr(gm.get_submodule(path), name)
    except AttributeError:
        taken = False
    if taken:
        raise PassError(f"{by}: the graph has a tensor {fqn} already")
    put_tensor(gm, fqn, tensor)
    with gm.graph.inserting_before(before.node):
        node = gm.graph.get_attr(fqn)
    mode = fake_mode_of(gm)
    node.meta["val"] = tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor.detach(), static_shapes=True)
    node.meta |= {k: v for k, v in (like or before).node.meta.items() if k in (LAYER, PLAN)}
    node.meta[BY] = (by,)
    return view(node)


def set_param(gm: fx.GraphModule, fqn: str, f: Callable[[Tensor], Tensor], by: str) -> None:
    """The parameter of this name becomes ``f`` of itself; ``f`` is pure, and shape and dtype stay."""
    old = tensor_of(gm, fqn)
    new = f(old.detach())
    if new.shape != old.shape or new.dtype != old.dtype:
        raise PassError(f"{by}: {fqn} would change from {old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}")
    put_tensor(gm, fqn, torch.nn.Parameter(new, requires_grad=False) if isinstance(old, torch.nn.Parameter) else new)
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target == fqn:
            node.meta[BY] = (*node.meta.get(BY, ()), by)


def drop_unused(gm: fx.GraphModule) -> None:
    """Nodes that nothing reads are gone, and with them the tensors and modules that only they held.

    Calls of modules stay: observers are called for what they see.
    """
    gm.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output", "call_module"))
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    for fqn in [name for name, _ in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]]:
        if fqn not in used and not any(fqn.startswith(f"{module}.") for module in used):
            remove_tensor(gm, fqn)
    _drop_empty(gm, "", used)


def _drop_empty(module: torch.nn.Module, path: str, used: set[str]) -> bool:
    for name, child in list(module.named_children()):
        full = f"{path}.{name}" if path else name
        if full not in used and _drop_empty(child, full, used):
            delattr(module, name)
    empty: Sequence[object] = [*module._parameters, *module._buffers, *module._modules]
    return not empty
