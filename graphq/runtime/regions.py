"""Regions of a packed graph that the library of kernels can compute in one call: linears, and what lies between them.

A region begins at a linear with packed weights, or at what quantizes its input, and takes in what reads it: norms, sums
with the residual stream, gates, rotary positions, further linears. Of a decoder it is all between two attentions. What
it is for: an op of torch costs microseconds beside its work, which for one token is most of what there is.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import fx
from torch._ops import OpOverload

from graphq.runtime import ops
from graphq.runtime.modules import Int8Linear
from graphq.runtime.packed_product import PackedProduct
from graphq.state import tensor_of

aten: Any = torch.ops.aten
FLOATS: Final = (torch.float32, torch.bfloat16)
VIEWS: Final = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@final
@dataclass(frozen=True)
class Region:
    """Calls that become one. ``inputs``: what they read from outside, ``modules``: the paths of what they call;
    ``outputs``: those that others read.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    modules: tuple[str, ...]
    outputs: tuple[fx.Node, ...]


def regions(graph: fx.GraphModule) -> list[Region]:
    """The regions of a graph, in its order; no two have a node in common.

    Each can be computed where its last node stands: what reads it and is not of it comes later then (``ordered``).
    """
    found: list[Region] = []
    members: list[fx.Node] = []
    behind: set[fx.Node] = set()  # what depends on members and is none

    def close() -> None:
        if len([n for n in members if _is_anchor(graph, n)]) > 0 and len(members) > 1:
            found.append(_region(graph, members))
        members.clear()
        behind.clear()

    for node in graph.graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        reads, known = node.all_input_nodes, set(members)
        is_anchor = _is_anchor(graph, node)
        joins = is_anchor or (_is_computed(graph, node) and any(n in known for n in reads))
        if _is_mutable(node):
            close()
        elif joins and not any(n in behind for n in reads):
            members += [*_weights_cast_for(node), node]
        elif is_anchor:
            close()
            members += [*_weights_cast_for(node), node]
        elif any(n in known or n in behind for n in reads):
            behind.add(node)
    close()
    return found


def ordered(graph: fx.GraphModule, found: list[Region]) -> list[fx.Node | Region]:
    """The nodes of the graph in an order in which each region stands as one."""
    region_of = {node: region for region in found for node in region.nodes}
    order: list[fx.Node | Region] = []
    waiting: list[fx.Node] = []  # for the region that is to come
    pending: set[fx.Node] = set()
    for node in graph.graph.nodes:
        region = region_of.get(node)
        if region is None and not any(n in pending for n in node.all_input_nodes):
            order.append(node)
            continue
        pending.add(node)
        if region is None:
            waiting.append(node)
        elif node is region.nodes[-1]:
            order += [region, *waiting]
            waiting.clear()
            pending.clear()
    return order


def _region(graph: fx.GraphModule, members: list[fx.Node]) -> Region:
    place = {node: i for i, node in enumerate(graph.graph.nodes)}
    nodes = sorted(members, key=place.__getitem__)
    own = set(nodes)
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own)
    modules = dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module")
    outputs = [node for node in nodes if any(user not in own for user in node.users)]
    return Region(tuple(nodes), tuple(inputs), tuple(modules), tuple(outputs))


def _is_anchor(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a region may begin at it."""
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), PackedProduct | Int8Linear) and not node.kwargs
    return node.target is ops.quantize_dynamic and not node.kwargs


def _is_computed(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether there are steps for an op with these arguments, as far as they show without a call."""
    check = _OPS.get(node.target)
    if check is None or not check(node.args, node.kwargs):
        return False
    if node.target is not aten.linear.default:
        return True
    weight = cast(fx.Node, node.args[1])
    held = weight if weight.op == "get_attr" else cast(fx.Node, weight.args[0])
    return tensor_of(graph, str(held.target)).dtype in FLOATS


def _weights_cast_for(node: fx.Node) -> list[fx.Node]:
    """The cast of a parameter that is the weight of this linear alone: the linear reads it as it is stored."""
    if node.target is not aten.linear.default:
        return []
    cast_ = node.args[1]
    assert isinstance(cast_, fx.Node), "a linear has a weight"
    return [cast_] if _is_cast_parameter(cast_) and len(cast_.users) == 1 else []


def _is_cast_parameter(node: fx.Node) -> bool:
    if node.target is not aten._to_copy.default or not _is_cast(node.args, node.kwargs):
        return False
    return isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and cast(Any, node.target)._schema.is_mutable


def _is_one_of_two(args: Any, kwargs: Any) -> bool:
    is_known = len(args) == 2 and isinstance(args[0], fx.Node) and not kwargs
    return is_known and (isinstance(args[1], fx.Node | float) or type(args[1]) is int)


def _is_plain(args: Any, kwargs: Any) -> bool:
    return len(args) == 1 and not kwargs


def _is_cast(args: Any, kwargs: Any) -> bool:
    device = kwargs.get("device")
    is_known = set(kwargs) <= {"dtype", "device"} and kwargs.get("dtype") in FLOATS
    return is_known and (device is None or torch.device(device).type == "cpu")


def _is_linear(args: Any, kwargs: Any) -> bool:
    parts = [*args[1:], *[None] * (3 - len(args))]
    is_weight = isinstance(parts[0], fx.Node) and (parts[0].op == "get_attr" or _is_cast_parameter(parts[0]))
    return not kwargs and is_weight and (parts[1] is None or parts[1].op == "get_attr")


def _is_mean(args: Any, kwargs: Any) -> bool:
    return list(args[1:]) == [[-1], True] and not kwargs


def _is_item(args: Any, kwargs: Any) -> bool:
    return isinstance(args[0], fx.Node) and args[0].target is ops.quantize_dynamic


def _is_norm(args: Any, kwargs: Any) -> bool:
    return not kwargs and isinstance(args[1], list | tuple) and len(args[1]) == 1


_OPS: Final[Mapping[object, Callable[[Any, Any], bool]]] = {
    aten.add.Tensor: _is_one_of_two,
    aten.sub.Tensor: _is_one_of_two,
    aten.mul.Tensor: _is_one_of_two,
    aten.pow.Tensor_Scalar: lambda args, kwargs: args[1] == 2 and not kwargs,
    aten.rsqrt.default: _is_plain,
    aten.neg.default: _is_plain,
    aten.relu.default: _is_plain,
    aten.sigmoid.default: _is_plain,
    aten.silu.default: _is_plain,
    aten.gelu.default: lambda args, kwargs: dict(kwargs) == {"approximate": "tanh"},
    aten.mean.dim: _is_mean,
    aten.rms_norm.default: _is_norm,
    aten.layer_norm.default: _is_norm,
    aten._to_copy.default: _is_cast,
    aten.roll.default: lambda args, kwargs: list(args[2:]) == [[-1]] and len(args[1]) == 1 and not kwargs,
    aten.transpose.int: lambda args, kwargs: list(args[1:]) == [1, 2] and not kwargs,
    aten.linear.default: _is_linear,
    operator.getitem: _is_item,
    **dict.fromkeys(VIEWS, lambda args, kwargs: len(args) == 2 and not kwargs),
}
