"""Identities that export leaves behind: aliases, detachments, dropout in evaluation."""

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import fx

from graphq import edit
from graphq.pipeline import Batches, Pass
from graphq.views import ops_of, view

aten = torch.ops.aten
_IDENTITIES: Final = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


@final
@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Readers of an identity read what it was given."""

    name: ClassVar[str] = "remove-no-ops"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            is_identity = op.node.target in _IDENTITIES
            is_eval_dropout = op.node.target is aten.dropout.default and op.node.args[2] is False
            if is_identity or is_eval_dropout:
                (source,) = op.node.all_input_nodes
                edit.bypass(gm, op, view(source))
                count += 1
        return count
