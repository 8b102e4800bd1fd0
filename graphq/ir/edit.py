"""The ways to change a graph. Each keeps ``val`` true and notes in ``graphq.by`` which passes made or moved a node."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, count
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from graphq.capture.source import KEY, source_of
from graphq.deferred import Deferred
from graphq.errors import PassError
from graphq.ir.layers import BY, LAYER, PLAN
from graphq.ir.views import Op, view
from graphq.state import as_parameter, defer, deferred_of, held_tensor, put_input, put_tensor, remove_tensor


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The mode that the graph's ``val``s belong to."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            return val.fake_mode
    raise PassError("no node of this graph knows its val")


def has_data(gm: fx.GraphModule) -> bool:
    """Whether there are numbers for the parameters; not so where a model was captured without its weights."""
    held = gm.state_dict(keep_vars=True).values()
    return not any(isinstance(tensor, FakeTensor) and deferred_of(tensor) is None for tensor in held)


def deferred_tensor(gm: fx.GraphModule, deferred: Deferred, dtype: torch.dtype) -> Tensor:
    """A tensor to be held by ``gm`` whose numbers are made when they are read."""
    with fake_mode_of(gm):
        return defer(torch.empty(deferred.shape, dtype=dtype), deferred)


def has_tensor(gm: fx.GraphModule, fqn: str) -> bool:
    """Whether the name is taken: by a parameter, a buffer, or a module that holds some."""
    path, _, name = fqn.rpartition(".")
    try:
        return hasattr(gm.get_submodule(path), name)
    except AttributeError:
        return False


def following(op: Op) -> Op:
    """The node in front of which a new one stands right after ``op``; never among the graph's inputs."""
    node = op.node.next
    while node.op in ("placeholder", "get_attr"):
        node = node.next
    return view(node)


def insert(
    gm: fx.GraphModule,
    before: Op,
    target: Callable[..., Any],
    *args: Any,
    by: str,
    like: Op | None = None,
    options: Mapping[str, Any] | None = None,
    val: Any = None,
) -> Op:
    """A new node that calls ``target``, in front of ``before``; it belongs to the layer that ``like`` belongs to.

    ``options``: arguments by name, which are no nodes. ``val``: what it gives, where that is known; else the op is run
    on fake tensors, for which a few ops fix dynamic sizes.
    """
    unwrapped = cast(tuple[Any, ...], _unwrap(args))
    if val is None:
        val = _value(gm, target, unwrapped, options or {})
    with gm.graph.inserting_before(before.node):
        node = gm.graph.call_function(target, unwrapped, dict(options or {}))
    return _describe(node, val, like or before, by)


def items(gm: fx.GraphModule, op: Op, count: int, by: str) -> tuple[Op, ...]:
    """The first ``count`` outputs of an op that has several."""
    after = following(op)
    return tuple(insert(gm, after, operator.getitem, op, i, by=by, like=op) for i in range(count))


def _describe(node: fx.Node, val: Any, like: Op, by: str) -> Op:
    origin = like.node.meta
    node.meta = {"val": val} | {k: origin[k] for k in ("nn_module_stack", "stack_trace", LAYER, PLAN) if k in origin}
    node.meta[BY] = (by,)
    return view(node)


def _unwrap(value: Any) -> Any:
    if isinstance(value, Op):
        return value.node
    if isinstance(value, list | tuple):
        kind = cast(type[Any], type(value))
        return kind(_unwrap(item) for item in cast(Iterable[Any], value))
    return value


def _value(gm: fx.GraphModule, target: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    values = map_arg(args, lambda node: node.meta["val"])
    with fake_mode_of(gm), torch.no_grad():
        return target(*values, **options)


def _note(node: fx.Node, by: str) -> None:
    """``by`` stands last among the passes that touched the node."""
    passes = cast(tuple[str, ...], node.meta.get(BY, ()))
    if passes[-1:] != (by,):
        node.meta[BY] = (*passes, by)


def _check_alike(old: Op, new: Op) -> None:
    """Readers of ``old`` may read ``new``: their own ``val`` stays true."""
    a, b = old.val, new.val
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return
    differ = a.dtype != b.dtype or a.dim() != b.dim()
    if differ or any(statically_known_true(i != j) for i, j in zip(a.shape, b.shape, strict=True)):
        was, now = (f"{op.node.name}: {op.val.dtype} {list(op.val.shape)}" for op in (old, new))
        raise PassError(f"{was} cannot be read as {now}")


def replace(gm: fx.GraphModule, op: Op, target: Callable[..., Any], *args: Any, by: str) -> Op:
    """A new node in the place of ``op``, which is gone; every reader of ``op`` reads the new node."""
    made = insert(gm, op, target, *args, by=by, like=op)
    made.node.meta[BY] = op.node.meta.get(BY, ())
    _note(made.node, by)
    bypass(gm, op, made)
    return made


def bypass(gm: fx.GraphModule, op: Op, by_op: Op) -> None:
    """Every reader of ``op`` reads ``by_op`` instead, and ``op`` is gone."""
    _check_alike(op, by_op)
    op.node.replace_all_uses_with(by_op.node)
    gm.graph.erase_node(op.node)


def redirect(reader: Op, old: Op, new: Op, by: str) -> None:
    """``reader`` reads ``new`` where it read ``old``."""
    _check_alike(old, new)
    reader.node.replace_input_with(old.node, new.node)
    _note(reader.node, by)


def add_tensor(
    gm: fx.GraphModule, before: Op, fqn: str, tensor: Tensor, by: str, like: Op | None = None, of: str | None = None
) -> Op:
    """A new buffer (a parameter if ``tensor`` is one) of this name, and a node in front of ``before`` that reads it.

    ``of``: the parameter that its numbers come from; it is stored in the dtype that this one is.
    """
    if has_tensor(gm, fqn):
        raise PassError(f"{by}: the graph has a tensor {fqn} already")
    put_tensor(gm, fqn, tensor)
    if of is not None and of in (source := source_of(gm)).wide:
        gm.meta[KEY] = dataclasses.replace(source, wide=source.wide | {fqn})
    with gm.graph.inserting_before(before.node):
        node = gm.graph.get_attr(fqn)
    val = tensor
    if not isinstance(tensor, FakeTensor):
        val = fake_mode_of(gm).from_tensor(tensor.detach(), static_shapes=True)
    return _describe(node, val, like or before, by)


def add_observer(
    gm: fx.GraphModule,
    x: Op,
    path: str,
    module: nn.Module,
    by: str,
    like: Op,
    rest: Sequence[Op] = (),
    before: Op | None = None,
) -> Op:
    """A new module, which gives what it is given, at ``path``, and a node right after ``x`` that calls it on ``x``.

    With ``rest`` as further arguments it stands right before ``before``: ``like``, unless it is given.
    """
    if has_tensor(gm, path):
        raise PassError(f"{by}: the graph has a module {path} already")
    gm.add_submodule(path, module)
    with gm.graph.inserting_before((before or (like if rest else following(x))).node):
        node = gm.graph.call_module(path, (x.node, *(op.node for op in rest)))
    return _describe(node, x.val, like, by)


def put_module(gm: fx.GraphModule, path: str, module: nn.Module) -> None:
    """``module`` takes the place of the plain module at ``path`` and of what else that holds."""
    plain = gm.get_submodule(path)
    for name, tensor in [*plain.named_parameters(recurse=False), *plain.named_buffers(recurse=False)]:
        if not hasattr(module, name):
            put_tensor(module, name, tensor)
    for name, child in plain.named_children():
        module.add_module(name, child)
    gm.add_submodule(path, module)


def call_module(gm: fx.GraphModule, op: Op, path: str, arguments: Sequence[Op | None]) -> Op:
    """A call of the module at ``path`` in the place of ``op``, which is gone."""
    with gm.graph.inserting_before(op.node):
        node = gm.graph.call_module(path, tuple(a.node if a is not None else None for a in arguments))
    node.meta = dict(op.node.meta)
    bypass(gm, op, view(node))
    return view(node)


def set_param(
    gm: fx.GraphModule, fqn: str, f: Callable[[Tensor], Tensor], by: str, reads: Iterable[fx.Node] | None = None
) -> None:
    """The parameter of this name becomes ``f`` of itself; ``f`` is pure, and shape and dtype stay.

    A deferred one becomes it when it is read. ``reads``: the nodes that are the parameter, from an index; without it
    the whole graph is searched for them.
    """
    old = held_tensor(gm, fqn)

    def changed(held: Tensor) -> Tensor:
        new = f(held)
        if new.shape != old.shape or new.dtype != old.dtype:
            was, now = (f"{one.dtype}{list(one.shape)}" for one in (old, new))
            raise PassError(f"{by}: {fqn} would change from {was} to {now}")
        return new

    deferred = deferred_of(old)
    new = changed(old.detach()) if deferred is None else deferred_tensor(gm, deferred.changed(changed), old.dtype)
    put_tensor(gm, fqn, as_parameter(new) if isinstance(old, nn.Parameter) else new)
    for node in gm.graph.find_nodes(op="get_attr", target=fqn) if reads is None else reads:
        _note(node, by)


def drop_unused(gm: fx.GraphModule) -> int:
    """Nodes that nothing reads are gone, and with them the tensors and modules that only they held; how many nodes and
    tensors there were.

    Calls of modules stay: observers are called for what they see.
    """
    nodes, gone = len(gm.graph.nodes), 0
    gm.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output", "call_module"))
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    whole = set[str]()  # modules that are called, and all that is in them
    for path, _ in gm.named_modules(remove_duplicate=False):
        if path in called or path.rpartition(".")[0] in whole:
            whole.add(path)
    for path, module in reversed(list(gm.named_modules(remove_duplicate=False))):  # what a module holds before itself
        if path in whole:
            continue
        prefix = f"{path}." if path else ""
        for name in [name for name, _ in _own_tensors(module) if prefix + name not in read]:
            remove_tensor(module, name)
            gone += 1
        if path and not _own_tensors(module) and next(module.children(), None) is None:
            parent, _, name = path.rpartition(".")
            delattr(gm.get_submodule(parent), name)
    return gone + nodes - len(gm.graph.nodes)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _is_module(gm: fx.GraphModule, path: str) -> bool:
    try:
        gm.get_submodule(path)
    except AttributeError:
        return False
    return True


def free_path(gm: fx.GraphModule, layer: str, names: Sequence[str]) -> str:
    """Where tensors of these names can be held that belong to the input of ``layer``: there, or under a name made of it
    where they are held already, and where the layer is itself a float tensor.
    """
    first = f"{layer}_input" if has_tensor(gm, layer) and not _is_module(gm, layer) else layer
    further = (f"{first}.input{number}" for number in count())
    return next(
        path for path in chain((first,), further) if not any(has_tensor(gm, f"{path}.{name}") for name in names)
    )


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph and a module tree of their own that share their tensors with ``gm``."""
    root = nn.Module()
    for name, tensor in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        put_tensor(root, name, tensor)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            copied[node] = put_input(graph, node.name)
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        copied[node].meta = dict(node.meta)
    made = fx.GraphModule(root, graph)
    made.meta = dict(gm.meta)
    return made
