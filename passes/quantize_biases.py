"""Biases as int32 codes at the scale of the products, s_x s_w, which integer kernels add without a conversion.

Jacob et al., arXiv 1712.05877, equation 11.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, cast, final

import torch
from torch import Tensor, fx

from graphq import numerics
from graphq.ir import edit
from graphq.ir.biases import Biased, bias_of
from graphq.ir.effect_table import effect
from graphq.ir.effects import Normalizes
from graphq.ir.layers import LAYER
from graphq.ir.op_kinds import kind_of
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.units import module_of, units_of
from graphq.ir.views import ConvTranspose, Dequantize, Op, Param, Quantize, Weighted, view
from graphq.numerics import Scales
from graphq.spec.formats import Int
from graphq.spec.profile import Profile
from graphq.state import put_tensor, remove_tensor, tensor_of

BIAS: Final = Int(32)


@final
@dataclass(frozen=True)
class QuantizeBiases(Pass):
    """Every bias that ``profile`` wants as int32, of a layer or norm whose input and weight (its gain) are codes with
    known scales, is so.

    Where a weight's channel has scales so small that its bias does not fit, the channel's scale is as large as it has
    to be, and its codes are rounded again; where others read the weight, too, the bias stays float. So are those of a
    layer of codes that the consumer would multiply by less than its least multiplier. ``note`` is told.
    A bias that several layers add has codes for each.
    """

    profile: Profile
    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "quantize-biases"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        changes = 0
        for unit in units_of(gm, ()):
            op, rule = unit.first, self.profile.ops.get(unit.kind)
            if rule is None or rule.bias != "int32":
                continue
            bias, x, weight = _operands(op)
            if isinstance(bias, Param) and _is_on_grid(x) and _is_by_channel(weight, op):
                changes += self._quantize(gm, op, bias, cast(Dequantize, x), cast(Dequantize, weight))
        if changes:
            edit.drop_unused(gm)
        return changes

    def _quantize(self, gm: fx.GraphModule, op: Op, bias: Param, x: Dequantize, weight: Dequantize) -> int:
        b = tensor_of(gm, bias.fqn).detach()
        s_x = tensor_of(gm, cast(Param, x.scale).fqn).double().reshape(())
        fqn = cast(Param, weight.scale).fqn
        s_w = tensor_of(gm, fqn)
        shape = _beside(s_w, b)
        for_bias = numerics.least_for_bias(b.double(), s_x) / s_w.double().view(shape)
        for_output = torch.zeros_like(for_bias)
        if isinstance(op, Weighted) and (s_y := _output_step(gm, op)) is not None:
            for_output = self.profile.least_multiplier * s_y / s_x / s_w.double().view(shape).expand_as(for_bias)
        if s_w.numel() == 1:  # one scale for all channels
            for_bias, for_output = (part.amax().view(shape) for part in (for_bias, for_output))
        factor = for_bias.maximum(for_output).clamp(min=1.0)
        if bool((factor > 1).any()):
            if len(weight.users) > 1 or len(cast(Param, weight.scale).users) > 1 or weight.zero_point is not None:
                why = "that others read, too" if weight.zero_point is None else "with a zero point"
                self._add_note(f"{_name(op)}: its bias stays float: it needs larger scales of a weight {why}")
                return 0
            format = numerics.parse_format(weight.format)
            if isinstance(format, Int) and format.power_of_two:
                factor = numerics.power_of_two_above(factor)
            self._enlarge(gm, weight, factor)
            for many, why in (
                (int((for_bias > 1).sum()), "as their biases need in int32"),
                (int((for_output > 1).sum()), f"as {self.profile.name} has multipliers for, of its output"),
            ):
                if many:
                    self._add_note(f"{_name(op)}: {many} of its {for_bias.numel()} channels have scales as large {why}")
            s_w = tensor_of(gm, fqn)
        scale = (s_x * s_w.double().view(shape)).float().clamp(min=torch.finfo(torch.float32).tiny)
        codes = torch.round(b.double() / scale.double()).to(torch.int32)  # which the factor makes room for
        is_only = len(bias.users) == 1 and len(gm.graph.find_nodes(op="get_attr", target=bias.fqn)) == 1
        if is_only:
            remove_tensor(gm, bias.fqn)  # whose name is free now
        path = edit.free_path(gm, bias.fqn.removesuffix(".bias"), ("bias", "bias_scale"))
        held = edit.add_tensor(gm, op, f"{path}.bias", codes, by=self.name, like=op)
        scales = edit.add_tensor(gm, op, f"{path}.bias_scale", scale, by=self.name, like=op)
        block = [1 if size > 1 else -1 for size in shape]
        arguments = (held, scales, None, None, str(BIAS), block, b.dtype)
        made = edit.insert(gm, op, Dequantize.target, *arguments, by=self.name, like=op)
        if is_only:
            edit.bypass(gm, bias, made)
        else:
            edit.redirect(op, bias, made, by=self.name)
        return 1

    def _enlarge(self, gm: fx.GraphModule, weight: Dequantize, factor: Tensor) -> None:
        """The weight's scales times ``factor``, by output channel, and its codes rounded again."""
        format, block = numerics.parse_format(weight.format), list(weight.block)
        codes, scale = (tensor_of(gm, cast(Param, part).fqn) for part in (weight.codes, weight.scale))
        w = numerics.dequantize(codes, Scales(scale), format, block)
        wider = Scales((scale.double() * factor.view(scale.shape)).to(scale.dtype))
        put_tensor(gm, cast(Param, weight.scale).fqn, wider.scale)
        put_tensor(gm, cast(Param, weight.codes).fqn, numerics.quantize(w, wider, format, block))

    def _add_note(self, text: str) -> None:
        if self.note is not None:
            self.note(text)


def _name(op: Op) -> str:
    return str(op.node.meta.get(LAYER) or module_of(op))


def _output_step(gm: fx.GraphModule, op: Op) -> Tensor | None:
    """The scale of the grid that the output of a layer goes to, behind what is fused; None where it stays float."""
    while len(op.users) == 1 and kind_of(op.users[0]) in ("Relu", "Clip"):
        (op,) = op.users
    (reader, *more) = op.users or [op]
    if more or not isinstance(reader, Quantize) or not isinstance(reader.scale, Param):
        return None
    return tensor_of(gm, reader.scale.fqn).double().reshape(())


def _beside(scale: Tensor, bias: Tensor) -> list[int]:
    """The shape of a weight's scales as they stand beside the bias: by output channel, or one for all."""
    return [1] * bias.dim() if scale.numel() == 1 else list(bias.shape)


def _operands(op: Op) -> tuple[Op | None, Op | None, Op | None]:
    """Bias, input and weight of a layer, or of a norm, whose gain is its weight."""
    if isinstance(op, Weighted) and isinstance(op, Biased):
        return bias_of(op), op.input_op, op.weight_op
    match effect(op):
        case Normalizes(parameters=("weight", "bias")):
            found = [op.argument(name) for name in ("bias", "input", "weight")]
            bias, x, gain = (None if node is None else view(node) for node in found)
            return bias, x, gain
        case _:
            return None, None, None


def _is_on_grid(x: Op | None) -> bool:
    """Whether an activation is read from codes with one known scale."""
    is_read = isinstance(x, Dequantize) and isinstance(x.codes, Quantize) and isinstance(x.scale, Param)
    return is_read and all(b == -1 for b in cast(Dequantize, x).block)


def _is_by_channel(weight: Op | None, op: Op) -> bool:
    """Whether a weight is held as integers with one scale for each output channel, or one."""
    if not (isinstance(weight, Dequantize) and isinstance(weight.codes, Param) and isinstance(weight.scale, Param)):
        return False
    if not isinstance(numerics.parse_format(weight.format), Int):
        return False
    if not isinstance(op, Weighted):  # a gain has the shape of its bias
        return all(b == -1 for b in weight.block) or (len(weight.block) == 1 and weight.block[0] == 1)
    if isinstance(op, ConvTranspose) and weight.block[0] > 0:  # by groups: scales stand as its channels do
        is_whole = weight.block[0] * op.groups == weight.val.shape[0]
        return is_whole and weight.block[1] == 1 and all(b == -1 for b in weight.block[2:])
    return all(b == -1 or (b == 1 and axis == op.out_axis) for axis, b in enumerate(weight.block))
