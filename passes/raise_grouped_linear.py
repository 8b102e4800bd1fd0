"""Experts' products as ``graphq::grouped_linear``, whichever op the source's dtype and library chose for them.

transformers traces ``transformers.grouped_mm_fallback`` in float32 and ``aten._grouped_mm`` in bfloat16; both take the
weight as ``[E, K, N]``, a transposed view of the stored ``[E, N, K]``, or as it is stored (gpt-oss).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast, final

import torch
from torch import fx

from graphq.ir import edit
from graphq.ir.index import GraphIndex
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.products import readers_of
from graphq.ir.views import Op, Param, Transpose, ops_of, view
from graphq.passes.raise_linear import hold_turned
from graphq.runtime import ops

aten = torch.ops.aten
_PRODUCTS: Final = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")


@final
@dataclass(frozen=True)
class RaiseGroupedLinear(Pass):
    """Every product of rows, each by the matrix of its group, is a ``grouped_linear``, by the parameter if it can be.

    A parameter ``[E, K, N]`` that only such products read is held as ``[E, N, K]``, a view of the same numbers.
    ``aten._grouped_mm`` has other forms (batches of rows, a bias, a dtype of its own), which stay.
    """

    name: ClassVar[str] = "raise-grouped-linear"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        columns, turned = _only_columns(gm), dict[str, Op]()
        for op in ops_of(gm):
            operands = _operands(op)
            if operands is None:
                continue
            x, weight, offsets = operands
            stored = _transposed(weight)
            if isinstance(weight, Param) and weight.fqn in columns:
                if weight.fqn not in turned:
                    turned[weight.fqn] = hold_turned(gm, op, weight.fqn, self.name)
                stored = turned[weight.fqn]
            if not isinstance(stored, Param):
                stored = edit.insert(gm, op, Transpose.target, weight, 1, 2, by=self.name)
            edit.replace(gm, op, ops.grouped_linear, x, stored, offsets, by=self.name)
            count += 1
        if count:
            edit.drop_unused(gm)
        return count


def _only_columns(gm: fx.GraphModule) -> set[str]:
    """The parameters ``[E, K, N]`` that nothing reads but grouped products by them as such."""
    found: dict[str, set[fx.Node]] = {}
    for op in ops_of(gm):
        operands = _operands(op)
        if operands is not None and isinstance(weight := operands[1], Param):
            found.setdefault(weight.fqn, set()).add(op.node)
    index = GraphIndex(gm)
    return {fqn for fqn, nodes in found.items() if readers_of(index.reads(fqn)) == nodes}


def _operands(op: Op) -> tuple[Op, Op, Op] | None:
    """``x[T, K]``, ``weight[E, K, N]`` and ``offsets[E]`` of a grouped product; None for other ops and other forms."""
    if op.node.op != "call_function" or str(op.node.target) not in _PRODUCTS:
        return None
    names = [argument.name for argument in cast(Any, op.node.target)._schema.arguments]
    given = dict(zip(names, op.node.args, strict=False)) | op.node.kwargs
    offsets = given.pop("offs", None)
    x, weight, *others = given.values()
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node) and isinstance(offsets, fx.Node)):
        return None
    is_plain = all(other is None or other == x.meta["val"].dtype for other in others)
    has_form = x.meta["val"].dim() == 2 and weight.meta["val"].dim() == 3
    return (view(x), view(weight), view(offsets)) if is_plain and has_form else None


def _transposed(weight: Op) -> Op | None:
    """What ``weight[E, K, N]`` is a view of with the last two axes swapped; None if it is no such view."""
    match weight:
        case Transpose(x, int(dim0), int(dim1)):
            return x if {dim0 % 3, dim1 % 3} == {1, 2} else None
        case _:
            pass
    is_swap = weight.node.target is aten.mT.default
    if weight.node.target is aten.permute.default:
        is_swap = [dim % 3 for dim in cast(list[int], weight.node.args[1])] == [0, 2, 1]
    return view(weight.node.all_input_nodes[0]) if is_swap else None
