"""Tensors to codes and back, in every format. Pure functions; the truth that every target equals.

``block`` and the scales' shapes are those of ``graphq.numerics.blocks``. Integers round half to even (IEEE 754
roundTiesToEven). Arithmetic is float32 (float64 for float64 tensors).
"""

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from graphq.formats import Float, Format, Int, Mx, Nvfp4, TwoLevel
from graphq.numerics import elements, mx
from graphq.numerics.blocks import expand_scale
from graphq.numerics.scales import (
    Scales,
    code_dtype,
    code_range,
    computed,
    effective_scale,
    over_channels,
)


def quantize(x: Tensor, scales: Scales, format: Format, block: Sequence[int]) -> Tensor:
    """Codes of ``x``, in ``code_dtype(format)``: of integers clamp(round(x / scale) + zero_point)."""
    x = computed(x)
    if isinstance(format, Int):
        lowest, highest = code_range(format)
        codes = torch.round(x / expand_scale(scales.scale, x, block).to(x.dtype))
        if scales.zero_point is not None:
            codes = codes + expand_scale(scales.zero_point.to(x.dtype), x, block)
        return codes.clamp(lowest, highest).to(code_dtype(format))
    y = _scaled(x, scales, format, block)
    match format:
        case Float():
            return elements.encode(y, format.layout)
        case Mx("int8"):
            return _int8_steps(y, format).to(torch.int8)
        case Mx():
            return elements.encode(y, format.element, mx.rounding_of(format))
        case Nvfp4():
            return elements.encode(y, "float4_e2m1")
        case TwoLevel("int4"):
            return y.round_().clamp_(-8, 7).to(torch.int8)
        case TwoLevel():
            return elements.encode(y, "float4_e2m1")
        case _:
            assert_never(format)


def _scaled(x: Tensor, scales: Scales, format: Format, block: Sequence[int]) -> Tensor:
    """``x`` in units of its scales; of two levels, what the upper level's codes say it is."""
    if isinstance(format, TwoLevel):
        assert scales.global_scale is not None
        x = over_channels(x, scales.global_scale, format, block)
        scale = scales.scale.to(x.dtype)
    else:
        scale = effective_scale(scales, format, x.dtype)
    return x / expand_scale(scale, x, block)


def _int8_steps(y: Tensor, format: Mx) -> Tensor:
    steps = y.mul(1 / mx.INT8_UNIT)
    away = mx.rounding_of(format) == "away"
    rounded = steps.abs().add_(0.5).floor_().copysign_(steps) if away else steps.round_()
    return rounded.nan_to_num_(0.0).clamp_(-127, 127)


def code_values(codes: Tensor, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes stand for before scales and zero points."""
    match format:
        case Int() | TwoLevel("int4"):
            return codes.to(dtype)
        case Mx("int8"):
            return codes.to(dtype) * mx.INT8_UNIT
        case Float():
            return elements.decode(codes, format.layout, dtype)
        case Mx():
            return elements.decode(codes, format.element, dtype)
        case Nvfp4() | TwoLevel():
            return elements.decode(codes, "float4_e2m1", dtype)
        case _:
            assert_never(format)


def dequantize(codes: Tensor, scales: Scales, format: Format, block: Sequence[int]) -> Tensor:
    """(value of codes - zero_point) * scale, in float32 (float64 where the scale is)."""
    dtype = torch.float64 if scales.scale.dtype == torch.float64 else torch.float32
    x = code_values(codes, format, dtype)
    if scales.zero_point is not None:
        x = x - expand_scale(scales.zero_point.to(dtype), x, block)
    return x * expand_scale(effective_scale(scales, format, dtype), x, block)
