"""What a packed graph computes several times from the same values is computed once (common subexpressions).

Capture unrolls a model's blocks, each of which prepares what they share anew: the cosines of rotary positions, say.
"""

from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir import edit
from graphq.ir.views import Op, ops_of, view

aten: Any = torch.ops.aten
_SHAPED = (aten.reshape.default, aten.view.default)


def merge_equal(gm: fx.GraphModule) -> int:
    """Calls of one op with the same arguments are one node, and a reshape to the shape at hand is none.

    Left as they are: what reads parameters, which a cast in front of each use holds for no longer than that; what draws
    random numbers; and what the graph returns, each of which is a tensor of its own. Returns the number of nodes gone.
    """
    first: dict[object, fx.Node] = {}
    count = 0
    for op in ops_of(gm):
        node = op.node
        if node.op != "call_function" or any(user.op == "output" for user in node.users):
            continue
        if node.target in _SHAPED and _is_of_shape(op, x := view(node.all_input_nodes[0])):
            edit.bypass(gm, op, x)
            count += 1
            continue
        if not node.all_input_nodes or any(n.op == "get_attr" for n in node.all_input_nodes) or _is_random(node):
            continue
        kept = first.setdefault((node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items())))), node)
        if kept is not node:
            edit.bypass(gm, op, view(kept))
            count += 1
    return count


def _key(value: Any) -> object:
    """Equal for equal arguments alone: 1, 1.0 and True are three."""
    if isinstance(value, list | tuple):
        return tuple(map(_key, cast(tuple[Any, ...], value)))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _is_of_shape(op: Op, x: Op) -> bool:
    a, b = op.val.shape, x.val.shape
    return (
        x.node.op == "call_function"
        and len(a) == len(b)
        and all(statically_known_true(i == j) for i, j in zip(a, b, strict=True))
    )
