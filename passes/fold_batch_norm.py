"""Batch norms of inference in the weights and biases of the linears and convolutions before them.

A batch norm takes y to (y - mean) f + beta with f = gamma / sqrt(var + eps) for each channel (Ioffe and Szegedy, arXiv
1502.03167, algorithm 2). Of y = W x + b that makes (f W) x + (b - mean) f + beta, as Jacob et al. have it (arXiv
1712.05877, section 3.2). A norm whose statistics are frozen is often written out as a product with, and a sum of,
tensors that are computed from its parameters.
"""

import operator
from dataclasses import dataclass
from typing import ClassVar, cast, final

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.biases import Biased, bias_name, bias_of, set_bias, weight_of, why_no_bias
from graphq.ir.constants import constants_of, evaluate
from graphq.ir.effect_table import channel_axis
from graphq.ir.index import GraphIndex
from graphq.ir.matrices import output_channels
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import BatchNorm, InferenceBatchNorm, Op, Param, ops_of, view
from graphq.state import tensor_of

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """A linear or convolution whose output a batch norm of inference alone reads does what both did; also one that is
    multiplied by, or added to, a constant of one element for each channel.

    Numbers are computed in float64 and kept in the weight's dtype. A layer without a bias gets one, ``<layer>.bias``.
    Layers whose weight or bias is computed, or read elsewhere, too, keep their batch norms.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        index = GraphIndex(gm)
        constants = constants_of(gm)
        for op in ops_of(gm):
            match op:
                case BatchNorm(x, gamma, beta, Param() as mean, Param() as var, False, eps):
                    results: list[Op] = [op]
                case InferenceBatchNorm(x, gamma, beta, Param() as mean, Param() as var, eps):
                    results = op.users
                    if any(r.node.target is not operator.getitem or r.node.args[1] != 0 for r in results):
                        continue  # the statistics, which only training gives
                case _:
                    count += self._fold_written(index, op, constants)
                    continue
            parts = (gamma, beta, mean, var)
            known = all(part is None or isinstance(part, Param) for part in parts)
            if not isinstance(x, Biased) or x.users != [op] or not known or not _has_axis_1(x) or not _is_own(index, x):
                continue
            tensors = (tensor_of(gm, p.fqn).detach() if isinstance(p, Param) else None for p in parts)
            made = self._fold(index, x, *_affine(*tensors, eps=eps))
            for result in results:
                edit.bypass(gm, result, made)
            count += 1
        if count:
            edit.drop_unused(gm)
        return count

    def _fold_written(self, index: GraphIndex, op: Op, constants: set[fx.Node]) -> int:
        """A product with, or a sum of, a constant is gone; the number of such."""
        gm, is_product = index.gm, op.node.target is aten.mul.Tensor
        if not is_product and (op.node.target is not aten.add.Tensor or op.argument("alpha") != 1):
            return 0
        operands = [op.argument("self"), op.argument("other")]
        held = [node for node in operands if node in constants]
        others = [view(node) for node in operands if isinstance(node, fx.Node) and node not in constants]
        if len(held) != 1 or len(others) != 1:
            return 0
        x = others[0]
        if not isinstance(x, Biased) or x.users != [op] or not _is_own(index, x):
            return 0
        constant = view(held[0]).val
        if not _is_of_channels(constant, x) or op.val.shape != x.val.shape or op.val.dtype != x.val.dtype:
            return 0
        number = evaluate(held[0], lambda fqn: _wide(tensor_of(gm, fqn).detach())).double().reshape(-1)
        if is_product:
            made = self._fold(index, x, number, torch.zeros_like(number), bias_of(x) is not None)
        else:
            made = self._fold(index, x, torch.ones_like(number), number)
        edit.bypass(gm, op, made)
        return 1

    def _fold(self, index: GraphIndex, op: Biased, factor: Tensor, shift: Tensor, shifts: bool = True) -> Op:
        """``op`` gives ``factor`` times its output plus ``shift``, by channel, which is 0 unless it ``shifts``."""
        gm, weight, bias = index.gm, cast(Param, weight_of(op)), bias_of(op)
        w = tensor_of(gm, weight.fqn).detach()
        if bias is not None:
            shift = shift + tensor_of(gm, cast(Param, bias).fqn).detach() * factor
        scaled = (w.double() * factor[output_channels(op)]).to(w.dtype)
        made: Op = op
        if shifts:
            (made,) = set_bias(index, [op], bias_name(weight.fqn), shift.to(w.dtype), by=self.name)
        edit.set_param(gm, weight.fqn, lambda _: scaled, self.name, index.reads(weight.fqn))
        return made


def _has_axis_1(x: Biased) -> bool:
    """Whether axis 1, which a batch norm scales, is that of the channels of ``x``."""
    return x.val.dim() == weight_of(x).val.dim()


def _is_of_channels(constant: Tensor, x: Biased) -> bool:
    """Whether a constant has one element for each channel of ``x``, along that axis."""
    axis = channel_axis(x) - x.val.dim() if channel_axis(x) >= 0 else channel_axis(x)
    sizes = list(constant.shape)
    return len(sizes) >= -axis and sizes[axis] == constant.numel() == x.val.shape[axis]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _is_own(index: GraphIndex, x: Biased) -> bool:
    """Whether all numbers of a layer are its own."""
    weight = weight_of(x)
    if not isinstance(weight, Param):
        return False
    is_own = [user for node in index.reads(weight.fqn) for user in node.users] == [x.node]
    return is_own and weight.fqn not in index.tied and why_no_bias(index, [x]) is None


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
