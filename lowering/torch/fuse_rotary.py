"""Rotary positions (Su et al., arXiv 2104.09864) in one op less for each part of the halves that models turn.

Models turn ``[a, b]`` into ``[-b, a]`` by two slices, a negation and a concatenation, and multiply that by the sines.
The negation commutes with the product, bit for bit: ``[-b, a] * s`` is ``[b, a] * [-s1, s2]``, of which the first is
one op, and the second the same for all layers.
"""

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir import edit
from graphq.ir.views import Op, ops_of, view

aten: Any = torch.ops.aten
_BY = "fuse-rotary"


def fuse_rotary(gm: fx.GraphModule) -> int:
    """Products with turned halves are products of rolled ones. Returns their number."""
    signed: dict[fx.Node, Op] = {}
    count = 0
    for op in ops_of(gm):
        if op.node.target != aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in op.node.args):
            continue
        factors = [view(n) for n in op.node.args if isinstance(n, fx.Node)]
        for turned, sines in (factors, factors[::-1]):
            x = _turned(turned)
            if x is None or len(turned.node.users) != 1 or not _is_as_wide(sines, x):
                continue
            half = int(x.val.shape[-1]) // 2
            if sines.node not in signed:
                signed[sines.node] = _signed(gm, sines, half)
            rolled = edit.insert(gm, op, aten.roll.default, x, [half], [-1], by=_BY, like=op)
            edit.replace(gm, op, aten.mul.Tensor, rolled, signed[sines.node], by=_BY)
            count += 1
            break
    edit.drop_unused(gm)
    return count


def _signed(gm: fx.GraphModule, sines: Op, half: int) -> Op:
    """``[-s1, s2]`` behind ``s``."""
    after = edit.following(sines)

    def insert(target: Any, *args: Any) -> Op:
        return edit.insert(gm, after, target, *args, by=_BY, like=sines)

    first = insert(aten.neg.default, insert(aten.slice.Tensor, sines, -1, 0, half))
    return insert(aten.cat.default, [first, insert(aten.slice.Tensor, sines, -1, half)], -1)


def _turned(op: Op) -> Op | None:
    """``x``, if ``op`` is ``[-x2, x1]`` of its two halves along the last axis."""
    if op.node.target != aten.cat.default or not isinstance(op.val, torch.Tensor):
        return None
    parts, axis = op.argument("tensors"), op.argument("dim")
    rank = op.val.dim()
    if len(parts) != 2 or axis not in (-1, rank - 1) or parts[0].target != aten.neg.default:
        return None
    ends = (_half(view(parts[1]), 0), _half(view(parts[0].args[0]), 1))
    return ends[0] if ends[0] is not None and ends[0] == ends[1] else None


def _half(op: Op, place: int) -> Op | None:
    """What ``op`` is the first (0) or the second (1) half of, along the last axis."""
    if op.node.target != aten.slice.Tensor:
        return None
    x = view(op.argument("self"))
    width = x.val.shape[-1]
    if not isinstance(width, int) or width % 2 or op.argument("dim") not in (-1, x.val.dim() - 1):
        return None
    start, end, step = (op.argument(name) for name in ("start", "end", "step"))
    start = 0 if start is None else start
    end = width if end is None or (isinstance(end, int) and end > width) else end
    return x if (start, end, step) == (place * width // 2, (1 + place) * width // 2, 1) else None


def _is_as_wide(sines: Op, x: Op) -> bool:
    """Whether the sines have a factor for each element of the last axis, and can be cut in halves."""
    if not isinstance(sines.val, torch.Tensor) or not sines.val.dim() or sines.node.op == "get_attr":
        return False
    return statically_known_true(sines.val.shape[-1] == x.val.shape[-1])
