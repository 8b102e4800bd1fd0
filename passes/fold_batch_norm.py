"""Batch norms of inference in the weights and biases of the linears and convolutions before them.

A batch norm takes y to (y - mean) f + beta with f = gamma / sqrt(var + eps) for each channel (Ioffe and Szegedy, arXiv
1502.03167, algorithm 2). Of y = W x + b that makes (f W) x + (b - mean) f + beta, as Jacob et al. have it (arXiv
1712.05877, section 3.2).
"""

import operator
from dataclasses import dataclass
from typing import ClassVar, cast, final

from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.biases import Biased, bias_name, bias_of, set_bias, weight_of, why_no_bias
from graphq.ir.index import GraphIndex
from graphq.ir.matrices import output_channels
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import BatchNorm, InferenceBatchNorm, Op, Param, ops_of
from graphq.state import tensor_of


@final
@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """A linear or convolution whose output a batch norm of inference alone reads does what both did.

    Numbers are computed in float64 and kept in the weight's dtype. A layer without a bias gets one, ``<layer>.bias``.
    Layers whose weight or bias is computed, or read elsewhere, too, keep their batch norms.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        index = GraphIndex(gm)
        for op in ops_of(gm):
            match op:
                case BatchNorm(x, gamma, beta, Param() as mean, Param() as var, False, eps):
                    results: list[Op] = [op]
                case InferenceBatchNorm(x, gamma, beta, Param() as mean, Param() as var, eps):
                    results = op.users
                    if any(r.node.target is not operator.getitem or r.node.args[1] != 0 for r in results):
                        continue  # the statistics, which only training gives
                case _:
                    continue
            parts = (gamma, beta, mean, var)
            if not isinstance(x, Biased) or x.users != [op] or not _is_foldable(index, x, parts):
                continue
            tensors = (tensor_of(gm, p.fqn).detach() if isinstance(p, Param) else None for p in parts)
            made = self._fold(index, x, *_affine(*tensors, eps=eps))
            for result in results:
                edit.bypass(gm, result, made)
            count += 1
        if count:
            edit.drop_unused(gm)
        return count

    def _fold(self, index: GraphIndex, op: Biased, factor: Tensor, shift: Tensor) -> Op:
        """``op`` gives ``factor`` times its output plus ``shift``, by channel."""
        gm, weight, bias = index.gm, cast(Param, weight_of(op)), bias_of(op)
        w = tensor_of(gm, weight.fqn).detach()
        if bias is not None:
            shift = shift + tensor_of(gm, cast(Param, bias).fqn).detach() * factor
        scaled = (w.double() * factor[output_channels(op)]).to(w.dtype)
        (made,) = set_bias(index, [op], bias_name(weight.fqn), shift.to(w.dtype), by=self.name)
        edit.set_param(gm, weight.fqn, lambda _: scaled, self.name, index.reads(weight.fqn))
        return made


def _is_foldable(index: GraphIndex, x: Biased, affine: tuple[Op | None, ...]) -> bool:
    """Whether axis 1, which a batch norm scales, is that of the channels of ``x``, and all its numbers are its own."""
    weight = weight_of(x)
    if not isinstance(weight, Param) or x.val.dim() != weight.val.dim():
        return False
    is_own = [user for node in index.reads(weight.fqn) for user in node.users] == [x.node]
    known = all(part is None or isinstance(part, Param) for part in affine)
    return is_own and known and weight.fqn not in index.tied and why_no_bias(index, [x]) is None


def _affine(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """A batch norm as ``y * factor + shift`` for each channel, in float64."""
    assert mean is not None
    assert var is not None
    factor = (var.double() + eps).rsqrt()
    if gamma is not None:
        factor = factor * gamma.double()
    shift = -mean.double() * factor
    return factor, shift if beta is None else shift + beta.double()
