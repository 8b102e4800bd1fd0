"""Linears of codes: with bias, activation and the quantization of the result, one kernel each."""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import fx

from graphq.ir import edit
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Dequantize, Linear, Op, Param, ops_of
from graphq.lowering.torch.chains import Chain, activated, fuse, grid, is_static, quantization_of, shape_of
from graphq.runtime.fusions import ACTIVATIONS, Fusion
from graphq.runtime.layers import INT8


@final
@dataclass(frozen=True)
class FuseLinear(Pass):
    """A linear of codes on one static grid by an int8 weight is the call of a ``FusedLayer``, with the activation and
    the quantization to 8 bits behind it, where nothing else reads what lies between.

    One of signed codes that gives floats is left to ``Int8Linear``. The function stays, but for a step of the output's
    codes where a value is in the middle between two of them.
    """

    name: ClassVar[str] = "fuse-linear"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        changes = sum(fuse(gm, op, _chain, self.name) for op in ops_of(gm))
        if changes:
            edit.drop_unused(gm)
        return changes


def _chain(op: Op, weight: Dequantize) -> Chain | None:
    if not isinstance(op, Linear) or op.weight != weight:
        return None
    x, bias = op.input, op.bias
    is_vector = bias is None or (bias.val.dtype == torch.float32 and shape_of(bias) == shape_of(weight)[:1])
    if not isinstance(x, Dequantize) or not is_static(x) or not is_vector:
        return None
    last, name, numbers = activated(op, ACTIVATIONS)
    output = quantization_of(last)
    if output is None and x.format in INT8 and (bias is None or isinstance(bias, Param)):
        return None
    fusion = Fusion(shape_of(weight), weight.block[0] == 1, x.format)
    fusion = replace(fusion, output=None if output is None else output.format, activation=name, numbers=numbers)
    ends = (None, None) if output is None else grid(output)
    made = Chain(fusion, (x.codes, *grid(x), bias, None, None, None, *ends), output or last)
    return made if fusion.is_possible else None
