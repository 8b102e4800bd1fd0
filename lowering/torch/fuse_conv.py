"""Convolutions of codes: with bias, residual sum, activation and the quantization of the result, one kernel each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, final

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir import edit
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Conv2d, Conv2dPadding, Dequantize, Op, ops_of, view
from graphq.lowering.torch.chains import Chain, activated, fuse, grid, is_static, only_reader, quantization_of, shape_of
from graphq.runtime.fusions import ACTIVATIONS, Fusion

aten = torch.ops.aten
_AS_THEY_LIE: Final = (aten.view.default, aten._unsafe_view.default)
_ACTIVATIONS: Final = [name for name, one in ACTIVATIONS.items() if one.of_convolutions]


@final
@dataclass(frozen=True)
class FuseConv(Pass):
    """A two-dimensional convolution of codes on one static grid by an int8 weight is the call of a ``FusedLayer``.

    In it is what follows it where nothing else reads what lies between: the sum with other codes, if that is quantized
    again; an activation; the quantization to 8 bits. The function stays, but for a step of the output's codes where a
    value is in the middle between two of them. What it gives lies channels last: views behind it become reshapes, and
    what the graph returns is laid out as before.
    """

    name: ClassVar[str] = "fuse-conv"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        changes = sum(fuse(gm, op, _chain, self.name) for op in ops_of(gm))
        if changes:
            edit.drop_unused(gm)
            _relax_layout(gm, self.name)
        return changes


def _chain(op: Op, weight: Dequantize) -> Chain | None:
    if not isinstance(op, Conv2d | Conv2dPadding) or op.weight_op != weight or op.val.dim() != 4:
        return None
    x, bias, padding = op.input_op, op.bias, _padding(op)
    is_vector = bias is None or (bias.val.dtype == torch.float32 and shape_of(bias) == shape_of(weight)[:1])
    if not isinstance(x, Dequantize) or not is_static(x) or padding is None or not is_vector:
        return None
    stride, dilation = (_pair(op.argument(name)) for name in ("stride", "dilation"))
    fusion = Fusion(
        shape_of(weight),
        weight.block[0] == 1,
        x.format,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=op.groups,
    )
    if not fusion.is_possible:
        return None
    reads = (x.codes, *grid(x), bias)
    add = only_reader(op)
    other = None if add is None else _other(add, op)
    if add is not None and other is not None:
        last, name, numbers = activated(add, ("relu",))
        output = quantization_of(last)
        if output is not None:  # else the kernel would take what it adds as float32
            fusion = replace(fusion, output=output.format, other=other.format, activation=name, numbers=numbers)
            return Chain(fusion, (*reads, other.codes, *grid(other), *grid(output)), output)
    last, name, numbers = activated(op, _ACTIVATIONS)
    output = quantization_of(last)
    fusion = replace(fusion, output=None if output is None else output.format, activation=name, numbers=numbers)
    ends = (None, None) if output is None else grid(output)
    return Chain(fusion, (*reads, None, None, None, *ends), output or last)


def _pair(sizes: Sequence[int]) -> list[int]:
    return [*sizes] * 2 if len(sizes) == 1 else [*sizes]


def _padding(op: Conv2d | Conv2dPadding) -> list[int] | None:
    """How much is padded on both sides of each axis; None where the sides differ."""
    given = op.argument("padding")
    if given == "valid":
        return [0, 0]
    if given != "same":
        return _pair(given)
    whole = [d * (k - 1) for d, k in zip(_pair(op.argument("dilation")), shape_of(op.weight_op)[2:], strict=True)]
    return [size // 2 for size in whole] if all(size % 2 == 0 for size in whole) else None


def _other(add: Op, x: Op) -> Dequantize | None:
    """What is added to ``x``, if these are codes of its shape on one static grid."""
    if add.node.target != aten.add.Tensor or add.argument("alpha") != 1:
        return None
    operands = [add.argument("self"), add.argument("other")]
    if operands.count(x.node) != 1 or not all(isinstance(one, fx.Node) for one in operands):
        return None
    other = view(operands[0] if operands[1] is x.node else operands[1])
    if not isinstance(other, Dequantize) or not is_static(other):
        return None
    sizes = zip(shape_of(other), shape_of(x), strict=False)
    is_alike = other.val.dim() == x.val.dim() and all(statically_known_true(a == b) for a, b in sizes)
    return other if is_alike else None


def _relax_layout(gm: fx.GraphModule, by: str) -> None:
    """Views become reshapes, and what the graph returns is contiguous where it was."""
    for op in ops_of(gm):
        if op.node.target in _AS_THEY_LIE:
            edit.replace(gm, op, aten.reshape.default, view(op.argument("self")), op.argument("size"), by=by)
    end = next(node for node in gm.graph.nodes if node.op == "output")
    for node in end.all_input_nodes:
        val = node.meta.get("val")
        if node.op.startswith("call") and isinstance(val, Tensor) and val.dim() == 4 and val.is_contiguous():
            made = edit.insert(gm, view(end), aten.contiguous.default, view(node), by=by, like=view(node))
            edit.redirect(view(end), view(node), made, by=by)
