"""What export leaves behind: aliases, copies, casts to the dtype at hand, dropout in evaluation, sums with nothing but
zeros (of which DETR makes the first queries of its decoder), unused tensors.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir import edit
from graphq.ir.effect_table import effect
from graphq.ir.effects import Copies, ReadsShape
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Input, Op, Param, ops_of, view

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Readers of an identity read what it was given. Nodes that nothing reads are gone, and the tensors of these alone.

    Graphs are functional, so that a copy is an identity if it keeps the dtype, and the layout that a ``view`` behind it
    relies on. One stays: what the graph returns is never its own input or parameter, which the caller might write to.
    """

    name: ClassVar[str] = "remove-no-ops"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            source = _source(op)
            if (
                source is not None
                and _is_alike(source, op)
                and not (isinstance(source, Input | Param) and _is_returned(op))
            ):
                edit.bypass(gm, op, source)
                count += 1
        return count + edit.drop_unused(gm)


def _source(op: Op) -> Op | None:
    """What ``op`` gives back, but for dtype, sizes and layout; None where it computes."""
    if isinstance(effect(op), Copies):  # a dropout in evaluation, too
        return view(op.node.all_input_nodes[0])
    if op.node.target is aten.add.Tensor:
        x, y = op.argument("self"), op.argument("other")
        if isinstance(y, fx.Node) and effect(view(y)) == ReadsShape(0.0):
            return view(x)
        if isinstance(y, fx.Node) and effect(view(x)) == ReadsShape(0.0) and op.argument("alpha") == 1:
            return view(y)
    return None


def _is_alike(x: Op, y: Op) -> bool:
    if (x.val.dtype, x.val.device) != (y.val.dtype, y.val.device) or x.val.dim() != y.val.dim():
        return False
    if not all(statically_known_true(a == b) for a, b in zip(x.val.shape, y.val.shape, strict=True)):
        return False
    return all(statically_known_true(a == b) for a, b in zip(x.val.stride(), y.val.stride(), strict=True))


def _is_returned(op: Op) -> bool:
    return any(user.op == "output" for user in op.node.users)
