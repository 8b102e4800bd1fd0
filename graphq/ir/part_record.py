"""What passes made of a part of a graph, as plain data that another process makes the same graph of.

Capture and the passes in front give the same part again, so that a record refers to its nodes by their names and says
what became of them. No code is in it: an op is a node's own, or one of ``torch.ops.aten`` and ``torch.ops.graphq``.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from graphq.errors import PassError, TargetError
from graphq.ir.edit import fake_mode_of
from graphq.ir.layers import BY
from graphq.runtime.graph_json import argument_from_json, argument_to_json
from graphq.state import held_tensor, put_input, remove_tensor

_NAMESPACES: Final = ("aten", "graphq")


@final
class PartBefore:
    """A part before passes changed it: each node's op, and what is known of it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.targets = {node.name: (node.op, node.target) for node in gm.graph.nodes}
        self.arguments = {node.name: _by_name(node) for node in gm.graph.nodes}
        self.metas = {node.name: dict(node.meta) for node in gm.graph.nodes}

    def record(self, gm: fx.GraphModule) -> list[dict[str, Any]]:
        """The nodes of the same part after the passes, in order. Raises ``PassError`` for what no record can hold."""
        return [self._entry(node) for node in gm.graph.nodes]

    def _entry(self, node: fx.Node) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        before = self.targets.get(node.name)
        if node.op in ("placeholder", "get_attr"):
            entry["target"] = str(node.target)
        elif node.op == "call_function":
            entry["target"] = None if before == (node.op, node.target) else _name_of(node)
        elif node.op != "output":
            raise PassError(f"{node.name}: a {node.op} is left in a finished block")
        if _by_name(node) != self.arguments.get(node.name):
            try:
                entry["args"] = [argument_to_json(a) for a in node.args]
                entry["kwargs"] = {k: argument_to_json(v) for k, v in node.kwargs.items()}
            except TargetError as error:
                raise PassError(f"{node.name}: cannot be recorded: {error}") from error
        own = self.metas.get(node.name, {})
        entry["meta"] = {key: self._holder(node, key) for key in node.meta if key not in (BY, "val")}
        entry["by"] = list(node.meta[BY]) if BY in node.meta else None
        entry["val"] = None if node.op == "output" or node.meta["val"] is own.get("val") else text_of(node.meta["val"])
        return entry

    def _holder(self, node: fx.Node, key: str) -> str:
        """The node of the part before, itself if possible, that ``node`` has what it knows under ``key`` from."""
        value, own = node.meta[key], self.metas.get(node.name, {})
        if key in own and (own[key] is value or own[key] == value):
            return node.name
        for name, meta in self.metas.items():
            if key in meta and (meta[key] is value or meta[key] == value):
                return name
        raise PassError(f"{node.name}: {key}: {value!r} is of no node that the block had")


def _by_name(node: fx.Node) -> Any:
    """The arguments of a node, names in the places of nodes."""
    return map_arg((node.args, dict(node.kwargs)), lambda n: n.name)


def _name_of(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    name = str(node.target)
    if isinstance(node.target, OpOverload) and name.partition(".")[0] in _NAMESPACES and _named(name) is node.target:
        return name
    raise PassError(f"{node.name}: {name} is no op that a record can hold")


def _named(name: str) -> Callable[..., Any]:
    if name == "getitem":
        return operator.getitem
    space, op, overload = name.split(".")
    if space not in _NAMESPACES:
        raise ValueError(f"{name} is no op of {' or '.join(_NAMESPACES)}")
    return getattr(getattr(getattr(torch.ops, space), op), overload)


def text_of(val: Any) -> str:
    """What a value is, but for its numbers."""
    if isinstance(val, Tensor):
        return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"
    if isinstance(val, list | tuple):
        return f"({', '.join(map(text_of, val))})"
    return str(val)


def rebuild(
    gm: fx.GraphModule, record: Sequence[Mapping[str, Any]], put_tensors: Callable[[fx.GraphModule], None]
) -> None:
    """``gm``, a part as it was before passes changed it, has the graph of ``record``. ``put_tensors`` gives it the
    tensors that were made, when it holds no others than this reads. Raises ``TargetError`` for another part's record.
    """
    read = {entry["target"] for entry in record if entry["op"] == "get_attr"}
    for name in gm.state_dict(keep_vars=True):
        if name not in read:
            remove_tensor(gm, name)
    put_tensors(gm)
    before = {node.name: node for node in gm.graph.nodes}
    mode = fake_mode_of(gm)
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    try:
        for entry in record:
            node = _node(graph, entry, before, made)
            node.meta = {key: before[name].meta[key] for key, name in entry["meta"].items()}
            if entry["by"] is not None:
                node.meta[BY] = tuple(entry["by"])
            if entry["op"] == "output":
                continue
            made[entry["name"]] = node
            if entry["val"] is None:
                node.meta["val"] = before[entry["name"]].meta["val"]
                continue
            node.meta["val"] = _val(gm, node, mode)
            if (found := text_of(node.meta["val"])) != entry["val"]:
                raise TargetError(f"{node.name}: is {found}, and was {entry['val']}")
        graph.lint()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise TargetError(f"damaged, or of another graph: {type(error).__name__}: {error}") from error
    gm.graph = graph


def _node(
    graph: fx.Graph, entry: Mapping[str, Any], before: Mapping[str, fx.Node], made: Mapping[str, fx.Node]
) -> fx.Node:
    name = entry["name"]
    if "args" in entry:
        args: Any = tuple(argument_from_json(a, made) for a in entry["args"])
        kwargs: Any = {k: argument_from_json(v, made) for k, v in entry["kwargs"].items()}
    else:
        args, kwargs = map_arg((before[name].args, before[name].kwargs), lambda n: made[n.name])
    match entry["op"]:
        case "placeholder":
            return put_input(graph, name)
        case "get_attr":
            return graph.create_node("get_attr", entry["target"], name=name)
        case "call_function":
            target: Any = before[name].target if entry["target"] is None else _named(entry["target"])
            return graph.create_node("call_function", target, args, kwargs, name=name)
        case "output":
            return graph.output(args[0])
        case op:
            raise ValueError(f"no node can be a {op}")


def _val(gm: fx.GraphModule, node: fx.Node, mode: Any) -> Any:
    if node.op == "get_attr":
        held = held_tensor(gm, str(node.target))
        return held if isinstance(held, FakeTensor) else mode.from_tensor(held.detach(), static_shapes=True)
    values = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    op: Any = node.target
    with mode, torch.no_grad():
        return op(*values[0], **values[1])
