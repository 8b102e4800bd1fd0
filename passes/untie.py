"""Embeddings whose weight is another layer's, too, as two tensors: one can then change without the other."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from graphq.ir import edit
from graphq.ir.index import GraphIndex
from graphq.ir.layers import weight_param
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Embedding, ops_of


@final
@dataclass(frozen=True)
class Untie(Pass):
    """An embedding's weight has its own numbers, equal to those that it shared with other names before.

    A head that was tied to an embedding can then take up the gain of the norm it reads, and be rotated.
    """

    name: ClassVar[str] = "untie"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count, index = 0, GraphIndex(gm)
        tied: dict[str, set[str]] = {name: set(others) for name, others in index.tied.items()}
        for op in ops_of(gm):
            param = weight_param(op) if isinstance(op, Embedding) else None
            if param is not None and tied.get(param.fqn):
                for other in tied.pop(param.fqn):
                    tied[other].discard(param.fqn)
                edit.set_param(gm, param.fqn, lambda t: t.clone(), self.name, index.reads(param.fqn))
                count += 1
        return count
