"""Experts' products as ``graphq::grouped_linear``, whichever op the source's dtype and library chose for them.

transformers traces ``transformers.grouped_mm_fallback`` in float32 and ``aten._grouped_mm`` in bfloat16; both take the
weight as ``[E, K, N]``, a transposed view of the stored ``[E, N, K]``.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, final

from torch import fx

from graphq import edit
from graphq.pipeline import Batches, Pass
from graphq.runtime import ops
from graphq.views import Op, Param, Transpose, ops_of, view

_PRODUCTS: Final = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")


@final
@dataclass(frozen=True)
class RaiseGroupedLinear(Pass):
    """Every grouped product by a transposed parameter is a ``grouped_linear`` by the parameter itself."""

    name: ClassVar[str] = "raise-grouped-linear"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            if op.node.op != "call_function" or str(op.node.target) not in _PRODUCTS:
                continue
            x, weight, offsets = (view(node) for node in op.node.all_input_nodes)
            match weight:
                case Transpose(Param() as stored, dim0, dim1) if _swaps_last_two(dim0, dim1):
                    edit.replace(gm, op, ops.grouped_linear, x, stored, offsets, by=self.name)
                case _:
                    before = view(op.node)
                    back = edit.insert(gm, before, Transpose.target, weight, 1, 2, by=self.name)
                    edit.replace(gm, op, ops.grouped_linear, x, back, offsets, by=self.name)
            count += 1
        edit.drop_unused(gm)
        return count


def _swaps_last_two(dim0: int | Op, dim1: int | Op) -> bool:
    return {dim0, dim1} in ({-2, -1}, {1, 2})
