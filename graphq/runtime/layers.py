"""A linear or a convolution that quantizes for itself: its input, by factors that it holds, and its packed weight."""

from dataclasses import dataclass
from typing import Final, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq import numerics
from graphq.numerics import Scales
from graphq.runtime import ops
from graphq.runtime.modules import Int8Linear, PackedWeight, hold_linear, hold_weight
from graphq.runtime.quantized_module import FixedDtypes
from graphq.spec.formats import Nvfp4, has_global_scale, is_asymmetric
from graphq.spec.plan import Plan
from graphq.spec.quant import PerChannel, PerTensor, PerToken, Quant

INT8: Final = (
    *("int8", "int8/asym", "int8/asym/joint", "int8/half", "int8/by_sign"),
    *("int8/pow2", "int8/asym/pow2", "int8/asym/joint/pow2"),
)


@final
@dataclass(frozen=True)
class Convolution:
    """The arguments of a two-dimensional convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int


@final
@dataclass(frozen=True)
class Form:
    """What a layer is beside its tensors. ``shape``, ``dtype``: the float weight's. ``convolution``: None: a linear."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    weight: Quant
    input: Quant | None
    convolution: Convolution | None = None

    @property
    def block(self) -> list[int]:
        """That of the weight's scales."""
        return numerics.weight_block(self.weight.granularity, len(self.shape), 0, 1)

    @property
    def is_integer(self) -> bool:
        """Whether its product can be one of int8 codes."""
        w, x = self.weight, self.input
        return (
            self.convolution is None
            and self.dtype != torch.float64  # whose products float32 does not hold
            and str(w.format) in INT8
            and isinstance(w.granularity, PerTensor | PerChannel)
            and x is not None
            and str(x.format) in INT8
            and isinstance(x.granularity, PerTensor | PerToken)
        )


class Factors(NamedTuple):
    """What calibration finds: the weight's codes in its shape and their scales, the input's scales, where they are
    fixed, and what each channel of the input is multiplied by.
    """

    codes: Tensor
    weight: Scales
    input: Scales | None
    scale_factor: Tensor | None


def flat(form: Form, x: Tensor) -> Tensor:
    """The input as ``[rows, K]`` of a linear, ``[N, C, H, W]`` of a convolution, in the weight's dtype."""
    shaped = x.reshape(-1, x.shape[-1]) if form.convolution is None else x.unsqueeze(0) if x.dim() == 3 else x
    return shaped.to(form.dtype)


def unflat(form: Form, x: Tensor, y: Tensor) -> Tensor:
    """The output for ``x`` from that for ``flat`` of it."""
    if form.convolution is None:
        return y.reshape(*x.shape[:-1], y.shape[-1])
    return y.squeeze(0) if x.dim() == 3 else y


def apply_weight(form: Form, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer makes of a flat input with this weight."""
    conv = form.convolution
    if conv is None:
        return F.linear(x, w, bias)
    return F.conv2d(x, w, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def input_scales(x: Tensor, quant: Quant, held: Scales | None) -> tuple[Scales, list[int]]:
    """The scales of a flat input, held or chosen from it, and their block."""
    block = numerics.activation_block(quant.granularity, x.dim())
    upper: Tensor | None = None
    if held is not None and isinstance(quant.format, Nvfp4):
        upper = held.scale  # of which that of all blocks alone is fixed
    elif held is not None:
        return held, block
    elif has_global_scale(quant.format):
        upper = ops.choose_global_scale(x)
    scale, zero_point = ops.choose_scale(x, str(quant.format), block, upper)
    return Scales(scale, zero_point if is_asymmetric(quant.format) else None, upper), block


def fake_quantized(form: Form, factors: Factors, x: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer gives for a flat input when all that is quantized has gone through its codes."""
    w = ops.dequantize(factors.codes, *factors.weight, str(form.weight.format), form.block, form.dtype)
    if factors.scale_factor is not None:
        x = x * factors.scale_factor
    if form.input is not None:
        (scale, zero_point, upper), block = input_scales(x, form.input, factors.input)
        level = (scale, zero_point, upper, str(form.input.format), block)
        x = ops.dequantize(ops.quantize(x, *level), *level, form.dtype)
    return apply_weight(form, x, w, bias)


@final
class QuantizedLayer(FixedDtypes):
    """A linear or a convolution on packed codes. It gives what ``fake_quantized`` gives; where inputs and weights are
    int8, by an integer product, whose sums are exact.

    ``product`` holds the weight (and the bias, where it is an integer product), ``scale_d`` and ``offset_d`` the
    input's fixed scale and zero point, ``scale_factor`` what its channels are multiplied by.
    """

    scale_d: Tensor | None
    offset_d: Tensor | None
    scale_factor: Tensor | None
    bias: Tensor | None

    def __init__(self, form: Form, factors: Factors, bias: Tensor | None) -> None:
        super().__init__()
        self.graphq_form = form
        self.product = _product(form, factors, bias)
        scale, zero_point, _ = factors.input or (None, None, None)
        self.register_buffer("scale_d", scale)
        self.register_buffer("offset_d", zero_point)
        self.register_buffer("scale_factor", factors.scale_factor)
        self.register_buffer("bias", None if form.is_integer or bias is None else bias.detach())
        names = ("out_features", "in_features") if form.convolution is None else ("out_channels", "in_channels")
        groups = 1 if form.convolution is None else form.convolution.groups
        for name, size in zip(names, (form.shape[0], form.shape[1] * groups), strict=True):
            setattr(self, name, size)

    def forward(self, input: Tensor) -> Tensor:
        form, product, quant = self.graphq_form, self.product, self.graphq_form.input
        x = flat(form, input)
        if self.scale_factor is not None:
            x = x * self.scale_factor
        if quant is None:
            return unflat(form, input, apply_weight(form, x, product(), self.bias))
        fixed = None if self.scale_d is None else Scales(self.scale_d, self.offset_d)
        (scale, zero_point, upper), block = input_scales(x, quant, fixed)
        level = (scale, zero_point, upper, str(quant.format), block)
        q = ops.quantize(x, *level)
        if isinstance(product, Int8Linear):
            return unflat(form, input, product(q, scale, zero_point))
        y = apply_weight(form, ops.dequantize(q, *level, form.dtype), product(), self.bias)
        return unflat(form, input, y)

    def extra_repr(self) -> str:
        form = self.graphq_form
        return f"{list(form.shape)}, {Plan(form.weight, form.input)}"


def _product(form: Form, factors: Factors, bias: Tensor | None) -> Int8Linear | PackedWeight:
    codes, scales, quant = factors.codes, factors.weight, form.weight
    if form.is_integer:
        per_channel = isinstance(quant.granularity, PerChannel)
        module = Int8Linear(form.shape, per_channel, scales.zero_point is None, bias is not None, form.dtype)
        held = None if bias is None else bias.detach()
        return hold_linear(module, codes, scales.scale, scales.zero_point, held)
    packed = PackedWeight(str(quant.format), form.block, form.shape, (0,), form.dtype)
    return hold_weight(packed, codes, scales)
