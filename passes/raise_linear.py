"""Products of an activation and a stored matrix as ``aten.linear``, however the source writes them.

Falcon's own ``Linear`` computes ``x @ weight.T + bias``; others write ``matmul``, ``einsum`` or ``addmm`` with factors,
or hold the matrix as ``[K, N]``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import fx

from graphq.ir import edit
from graphq.ir.index import GraphIndex
from graphq.ir.layers import TURNED
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.products import Product, products, readers_of
from graphq.ir.views import Cast, Linear, Op, Param
from graphq.state import as_parameter, deferred_of, held_tensor, remove_tensor

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class RaiseLinear(Pass):
    """A product of an activation's last axis and a parameter of two axes is a linear by this parameter.

    A parameter ``[K, N]`` that only such products read is held as ``[N, K]``, a view of the same numbers. A bias that
    is added to the product is the linear's. ``beta * b + alpha * (x @ w)`` is a linear without bias, its
    multiplications and an addition. Activations of one axis, batches of matrices and a matrix on the left stay.
    """

    name: ClassVar[str] = "raise-linear"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        found = products(gm)
        columns = _only_columns(gm, found)
        turned: dict[str, Op] = {}
        raised: dict[Op, Op] = {}  # a product may read another
        count = 0
        for product in found:
            x, bias = raised.get(product.x, product.x), product.bias and raised.get(product.bias, product.bias)
            product = replace(product, x=x, bias=bias)
            fqn = product.matrix.param.fqn
            if product.is_rows:
                raised |= self._raise(gm, product, product.matrix.param)
            elif fqn in columns:
                if fqn not in turned:
                    turned[fqn] = self._turn(gm, product)
                raised |= self._raise(gm, product, turned[fqn])
            else:
                continue
            count += 1
        if count:
            edit.drop_unused(gm)
        return count

    def _turn(self, gm: fx.GraphModule, first: Product) -> Op:
        """The product's parameter held as ``[N, K]``; all that read it as ``[K, N]`` are about to go."""
        fqn = first.matrix.param.fqn
        return hold_turned(gm, first.op, fqn, self.name)

    def _raise(self, gm: fx.GraphModule, product: Product, weight: Op) -> dict[Op, Op]:
        """The product's op, or the addition after it, is gone; what stands in its place, by it."""
        op, by = product.op, self.name
        for cast in product.matrix.casts:
            weight = edit.insert(gm, op, Cast.target, weight, by=by, options=cast.node.kwargs)
        if not _adds_bias(product):
            made = self._scaled(gm, product, edit.insert(gm, op, Linear.target, product.x, weight, by=by))
            edit.bypass(gm, op, made)
            return {op: made}
        bias, last = product.bias, op
        if bias is None and (added := _added_bias(op)) is not None:
            last, bias = added
        arguments = (product.x, weight) if bias is None else (product.x, weight, bias)
        made = edit.insert(gm, last, Linear.target, *arguments, by=by, like=op)
        edit.bypass(gm, last, made)
        return {last: made}

    def _scaled(self, gm: fx.GraphModule, product: Product, made: Op) -> Op:
        """``alpha * made + beta * bias``; as ``addmm`` has it, a bias times 0 is left out whatever it holds."""
        if product.alpha != 1:
            made = edit.insert(gm, product.op, aten.mul.Tensor, made, product.alpha, by=self.name)
        if product.beta == 0 or product.bias is None:
            return made
        bias = product.bias
        if product.beta != 1:
            bias = edit.insert(gm, product.op, aten.mul.Tensor, bias, product.beta, by=self.name)
        return edit.insert(gm, product.op, aten.add.Tensor, made, bias, by=self.name)


def hold_turned(gm: fx.GraphModule, before: Op, fqn: str, by: str) -> Op:
    """The parameter ``fqn`` held with its last two axes swapped, a view of the same numbers, and recorded so.

    All that read it as it was are about to go.
    """
    held = held_tensor(gm, fqn)
    if (deferred := deferred_of(held)) is None:
        rows = held.detach().transpose(-2, -1)
    else:
        rows = edit.deferred_tensor(gm, deferred.turned(), held.dtype)
    remove_tensor(gm, fqn)
    gm.meta[TURNED] = gm.meta.get(TURNED, frozenset[str]()) | {fqn}
    return edit.add_tensor(gm, before, fqn, as_parameter(rows), by=by, like=before)


def _only_columns(gm: fx.GraphModule, found: Iterable[Product]) -> set[str]:
    """The parameters ``[K, N]`` that nothing reads but products by them as such."""
    columns: dict[str, set[fx.Node]] = {}
    for product in found:
        if not product.is_rows:
            columns.setdefault(product.matrix.param.fqn, set()).add(product.op.node)
    index = GraphIndex(gm)
    return {fqn for fqn, nodes in columns.items() if readers_of(index.reads(fqn)) == nodes}


def _adds_bias(product: Product) -> bool:
    """Whether what the product adds, if anything, can be the bias of a linear."""
    bias, width = product.bias, product.op.val.shape[-1:]
    return (product.beta, product.alpha) == (1, 1) and (bias is None or bias.val.shape == width)


def _added_bias(op: Op) -> tuple[Op, Param] | None:
    """The one reader of a product if that adds a parameter ``[N]`` to it, and the parameter."""
    reader = op.users[0] if len(op.users) == 1 else None
    if reader is None or reader.node.target is not aten.add.Tensor or reader.argument("alpha") != 1:
        return None
    terms: list[Any] = [reader.argument("self"), reader.argument("other")]
    if terms.count(op.node) != 1:
        return None
    terms.remove(op.node)
    bias = Param.of(terms[0])
    is_bias = bias is not None and bias.val.shape == op.val.shape[-1:] and bias.val.dtype == op.val.dtype
    return (reader, bias) if bias is not None and is_bias else None
