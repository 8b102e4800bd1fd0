"""Tensors to codes and back, in every format. Pure functions; the truth that every target equals.

``block`` and the scales' shapes are those of ``graphq.numerics.blocks``. Integers round half to even (IEEE 754
roundTiesToEven). Arithmetic is float32 (float64 for float64 tensors).
"""

from collections.abc import Sequence
from typing import Final, assert_never

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from graphq.numerics import elements, mx
from graphq.numerics.blocks import beside_scales
from graphq.numerics.scales import (
    Scales,
    code_dtype,
    code_range,
    computed,
    effective_scale,
    over_channels,
)
from graphq.spec import formats
from graphq.spec.formats import Format, Int, Mx, Nvfp4, TwoLevel


def quantize(
    x: Float[Tensor, "*shape"], scales: Scales, format: Format, block: Sequence[int]
) -> Shaped[Tensor, "*shape"]:
    """Codes of ``x``, in ``code_dtype(format)``: of integers clamp(round(x / scale) + zero_point); ``Int.joint``."""
    x = computed(x)
    y, zero_point = _scaled(x, scales, format, block)
    return _codes(y, zero_point, format).view(x.shape)


def dequantize(
    codes: Shaped[Tensor, "*shape"], scales: Scales, format: Format, block: Sequence[int]
) -> Float[Tensor, "*shape"]:
    """(value of codes - zero_point) * scale, in float32 (float64 where the scale is)."""
    dtype = torch.float64 if scales.scale.dtype == torch.float64 else torch.float32
    values = code_values(codes, format, dtype)
    parts = (effective_scale(scales, format, dtype), _as(scales.zero_point, dtype))
    x, (scale, zero_point) = beside_scales(values, parts, block)
    assert scale is not None
    return (x * scale if zero_point is None else (x - zero_point) * scale).view(codes.shape)


def fake_quantize(
    x: Float[Tensor, "*shape"], scales: Scales, format: Format, block: Sequence[int]
) -> Float[Tensor, "*shape"]:
    """``dequantize(quantize(x))`` in the dtype of ``x``, without its codes, a part of the rows at a time."""
    out = torch.empty_like(x)
    step = _rows_at_a_time(x, block)
    for first in range(0, max(x.shape[0], 1) if x.dim() else 1, step):
        part, own = _rows(x, scales, block, first, step)
        out_part = out if part is x else out[first : first + step]
        y, zero_point = _scaled(computed(part), own, format, block)
        values = round_scaled(y, zero_point, format)
        _, (scale,) = beside_scales(part, (effective_scale(own, format, values.dtype),), block)
        assert scale is not None
        values = values.mul_(scale) if zero_point is None else values.sub_(zero_point).mul_(scale)
        out_part.copy_(values.view(part.shape))
    return out


_AT_A_TIME: Final = 1 << 18  # elements: what a processor's cache holds of a few float32 tensors


def _rows_at_a_time(x: Tensor, block: Sequence[int]) -> int:
    """As many rows as hold ``_AT_A_TIME`` elements, and whole blocks."""
    if x.dim() == 0 or x.numel() <= _AT_A_TIME:
        return max(x.shape[0] if x.dim() else 1, 1)
    rows = max(1, _AT_A_TIME * x.shape[0] // x.numel())
    return -(-rows // block[0]) * block[0] if block[0] > 1 else rows


def _rows(x: Tensor, scales: Scales, block: Sequence[int], first: int, count: int) -> tuple[Tensor, Scales]:
    """Some rows of ``x`` and their scales."""
    if x.dim() == 0 or (first == 0 and count >= x.shape[0]):
        return x, scales
    size = max(block[0], 1)

    def own(part: Tensor | None) -> Tensor | None:
        if part is None or part.dim() == 0 or part.shape[0] == 1:
            return part
        return part[first // size : -(-(first + count) // size)]

    scale, zero_point, upper = scales
    found = own(scale)
    assert found is not None
    return x[first : first + count], Scales(found, own(zero_point), own(upper))


def _as(part: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if part is None else part.to(dtype)


def _scaled(x: Tensor, scales: Scales, format: Format, block: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """``x`` in units of its scales, a new tensor whose blocks may have axes of their own, and the zero points beside
    it; of two levels, what the upper level's codes say it is.
    """
    if isinstance(format, TwoLevel):
        assert scales.global_scale is not None
        x = over_channels(x, scales.global_scale, format, block)
        scale = scales.scale.to(x.dtype)
    elif isinstance(format, Int):
        scale = scales.scale.to(x.dtype)
    else:
        scale = effective_scale(scales, format, x.dtype)
    y, (divisor, zero_point) = beside_scales(x, (scale, _as(scales.zero_point, x.dtype)), block)
    assert divisor is not None
    return y / divisor, zero_point


def _integers(y: Tensor, zero_point: Tensor | None, format: Format) -> Tensor:
    """clamp(round(y) + zero_point), or clamp(round(y + zero_point)) for joint formats, in place."""
    lowest, highest = code_range(format) if isinstance(format, Int) else (-8, 7)
    if zero_point is None:
        y = y.round_()
    elif isinstance(format, Int) and format.joint:
        y = y.add_(zero_point).round_()
    else:
        y = y.round_().add_(zero_point)
    return y.clamp_(lowest, highest)


def _codes(y: Tensor, zero_point: Tensor | None, format: Format) -> Tensor:
    match format:
        case Int():
            return _integers(y, zero_point, format).to(code_dtype(format))
        case TwoLevel("int4"):
            return _integers(y, None, format).to(torch.int8)
        case Mx("int8"):
            return _int8_steps(y, format).nan_to_num_(0.0).to(torch.int8)
        case formats.Float():
            return elements.encode(y, format.layout)
        case Mx():
            return elements.encode(y, format.element, mx.rounding_of(format))
        case Nvfp4() | TwoLevel():
            return elements.encode(y, "float4_e2m1")
        case _:
            assert_never(format)


def round_scaled(y: Tensor, zero_point: Tensor | None, format: Format) -> Tensor:
    """What the codes of ``y``, in units of its scales, stand for before scales and zero points. ``y`` is used up."""
    match format:
        case Int():
            return _integers(y, zero_point, format)
        case TwoLevel("int4"):
            return _integers(y, None, format)
        case Mx("int8"):
            return _int8_steps(y, format).mul_(mx.INT8_UNIT)
        case formats.Float():
            return elements.round_to(y, format.layout)
        case Mx():
            return elements.round_to(y, format.element, mx.rounding_of(format))
        case Nvfp4() | TwoLevel():
            return elements.round_to(y, "float4_e2m1")
        case _:
            assert_never(format)


def _int8_steps(y: Tensor, format: Mx) -> Tensor:
    steps = y.mul(1 / mx.INT8_UNIT)
    rounded = elements.round_away(steps) if mx.rounding_of(format) == "away" else steps.round_()
    return rounded.clamp_(-127, 127)


def code_values(codes: Tensor, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes stand for before scales and zero points."""
    match format:
        case Int() | TwoLevel("int4"):
            return codes.to(dtype)
        case Mx("int8"):
            return codes.to(dtype) * mx.INT8_UNIT
        case formats.Float():
            return elements.decode(codes, format.layout, dtype)
        case Mx():
            return elements.decode(codes, format.element, dtype)
        case Nvfp4() | TwoLevel():
            return elements.decode(codes, "float4_e2m1", dtype)
        case _:
            assert_never(format)
