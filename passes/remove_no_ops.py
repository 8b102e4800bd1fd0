"""Identities that export leaves behind: aliases, detachments, and the copies that dropout is in evaluation."""

from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq import edit
from graphq.pipeline import Batches, Pass
from graphq.views import Input, Op, Param, ops_of, view

aten = torch.ops.aten
_IDENTITIES: Final = (aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default)


@final
@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Readers of an identity read what it was given.

    Graphs are functional, so that a copy is an identity if it keeps the layout that a ``view`` behind it relies on. One
    stays: what the graph returns is never its own input or parameter, which the caller might write to.
    """

    name: ClassVar[str] = "remove-no-ops"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            if op.node.target not in _IDENTITIES:
                continue
            source = view(op.node.all_input_nodes[0])
            if not _keeps_layout(source.val, op.val) or (isinstance(source, Input | Param) and _is_returned(op)):
                continue
            edit.bypass(gm, op, source)
            count += 1
        return count


def _keeps_layout(x: Any, y: Any) -> bool:
    return all(statically_known_true(a == b) for a, b in zip(x.stride(), y.stride(), strict=True))


def _is_returned(op: Op) -> bool:
    return any(user.op == "output" for user in op.node.users)
