"""What export leaves behind: aliases, copies, casts to the dtype at hand, dropout in evaluation, unused tensors."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir import edit
from graphq.ir.effect_table import effect
from graphq.ir.effects import Copies
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Input, Op, Param, ops_of, view


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
            if not isinstance(effect(op), Copies):  # a dropout in evaluation, too
                continue
            source = view(op.node.all_input_nodes[0])
            if _is_alike(source, op) and not (isinstance(source, Input | Param) and _is_returned(op)):
                edit.bypass(gm, op, source)
                count += 1
        return count + edit.drop_unused(gm)


def _is_alike(x: Op, y: Op) -> bool:
    if (x.val.dtype, x.val.device) != (y.val.dtype, y.val.device):
        return False
    return all(statically_known_true(a == b) for a, b in zip(x.val.stride(), y.val.stride(), strict=True))


def _is_returned(op: Op) -> bool:
    return any(user.op == "output" for user in op.node.users)
