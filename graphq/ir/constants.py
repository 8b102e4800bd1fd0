"""What a graph computes from its own tensors alone, whatever its inputs are."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_arg


def constants_of(gm: fx.GraphModule) -> set[fx.Node]:
    """The parameters, buffers and constants of a graph, and the nodes computed from these alone, none at random."""
    found = set[fx.Node]()
    for node in gm.graph.nodes:
        if node.op == "get_attr" or (_is_pure(node) and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    return not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags


def computation_of(root: fx.Node) -> list[fx.Node]:
    """The nodes that ``root`` is computed by, itself the last, in graph order."""
    seen, pending = {root}, [root]
    while pending:
        new = [read for read in pending.pop().all_input_nodes if read not in seen]
        seen.update(new)
        pending += new
    return sorted(seen)


def evaluate(root: fx.Node, read: Callable[[str], Tensor]) -> Tensor:
    """What a constant is. ``read`` gives the tensor of a name; the computation goes on in its dtype."""
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in computation_of(root):
            if node.op == "get_attr":
                values[node] = read(str(node.target))
            else:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = cast(Any, node.target)(*args, **kwargs)
    return cast(Tensor, values[root])
