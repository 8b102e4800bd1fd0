"""Integer quantization of tensors: ranges, scales, codes and back. Pure functions; the truth that every target equals.

``block`` gives the elements per scale along each axis, -1 for the whole axis; a last block may be short. A scale has
the rank of its tensor and ceil(size / block) elements along each axis; one with a single element serves the whole
tensor. Rounding is half to even (IEEE 754 roundTiesToEven), arithmetic is float32 (float64 for float64 tensors).
Asymmetric ranges include 0, so that 0 is exact and the zero point is a code (Jacob et al., arXiv 1712.05877, equations
1 and 12). The scale of a block with NaN or Inf is NaN or Inf, and so is what comes back from its codes.
"""

from collections.abc import Sequence
from typing import assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphq.formats import Format, Granularity, PerChannel, PerGroup, PerTensor, PerToken, parse_quant


def code_range(format: Format) -> tuple[int, int]:
    """The smallest and the largest code, both inclusive."""
    return -(1 << (format.bits - 1)), (1 << (format.bits - 1)) - 1


def code_dtype(format: Format) -> torch.dtype:
    """The dtype that holds unpacked codes and zero points."""
    return torch.int8 if format.bits <= 8 else torch.int16


def weight_block(
    granularity: Granularity, rank: int, out_axis: int, in_axis: int, own_axes: Sequence[int] = ()
) -> list[int]:
    """Elements per scale along each axis of a weight; ``own_axes`` always have a scale for each index (experts)."""
    block = [-1] * rank
    for axis in own_axes:
        block[axis] = 1
    match granularity:
        case PerTensor():
            pass
        case PerChannel():
            block[out_axis] = 1
        case PerGroup(size):
            block[out_axis], block[in_axis] = 1, size
        case PerToken():
            block[out_axis] = 1
        case _:
            assert_never(granularity)
    return block


def activation_block(granularity: Granularity, rank: int) -> list[int]:
    """Elements per scale along each axis of an activation: one scale for all of it, or one for each token vector."""
    return [1] * (rank - 1) + [-1] if isinstance(granularity, PerToken) else [-1] * rank


def _sizes(x: Tensor, block: Sequence[int]) -> list[int]:
    return [size if b < 0 else b for size, b in zip(x.shape, block, strict=True)]


def block_extremes(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest element of each block of ``x``, in the shape of a scale; 0 if it has none."""
    low, high = x, x
    for axis, b in enumerate(block):
        if b == 1:
            continue
        if b < 0 or b >= x.shape[axis]:
            if x.shape[axis] == 0:
                low = high = low.new_zeros([1 if a == axis else size for a, size in enumerate(low.shape)])
            else:
                low, high = low.amin(axis, keepdim=True), high.amax(axis, keepdim=True)
            continue
        short = -x.shape[axis] % b
        if short:  # repeating the last element leaves the extremes of the last block alone
            last = [low.shape[a] if a != axis else short for a in range(x.dim())]
            low = torch.cat([low, low.narrow(axis, low.shape[axis] - 1, 1).expand(last)], axis)
            high = torch.cat([high, high.narrow(axis, high.shape[axis] - 1, 1).expand(last)], axis)
        low, high = low.unflatten(axis, (-1, b)).amin(axis + 1), high.unflatten(axis, (-1, b)).amax(axis + 1)
    return low, high


def scale_from_extremes(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None where the format is symmetric) for blocks that span ``low`` to ``high``.

    A block of zeros has scale 1; a scale is never below the smallest normal number, so that it can be divided by.
    """
    low, high = _computed(low), _computed(high)
    lowest, highest = code_range(format)
    if format.symmetric:
        extreme = torch.maximum(low.abs(), high.abs())
        match format.divisor:
            case "max":
                scale = extreme / highest
            case "half":
                scale = extreme / ((highest - lowest) / 2)
            case "by_sign":
                scale = extreme / torch.where(high.abs() < low.abs(), -float(lowest), float(highest))
            case _:
                assert_never(format.divisor)
        return _divisible(scale, extreme), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = highest - lowest
    span = high - low
    scale = _divisible(torch.where(span.isinf(), high / steps - low / steps, span / steps), span)
    zero_point = torch.round(lowest - low / scale).clamp(lowest, highest)
    return scale, zero_point.to(code_dtype(format))


def _divisible(scale: Tensor, span: Tensor) -> Tensor:
    return torch.where(span == 0, 1.0, scale.clamp(min=torch.finfo(scale.dtype).tiny))


def _computed(x: Tensor) -> Tensor:
    """``x`` in the dtype that arithmetic is done in."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def choose_scale(x: Tensor, format: Format, block: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Min-max scale and zero point of each block of ``x``."""
    return scale_from_extremes(*block_extremes(x, block), format)


def expand_scale(scale: Tensor, x: Tensor, block: Sequence[int]) -> Tensor:
    """``scale`` with each element repeated over its block, broadcastable to ``x``."""
    if scale.numel() == 1:
        return scale
    for axis, (size, b) in enumerate(zip(x.shape, _sizes(x, block), strict=True)):
        if 1 < b < size:
            scale = scale.repeat_interleave(b, axis).narrow(axis, 0, size)
    return scale


def quantize(
    x: Float[Tensor, "*shape"], scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int]
) -> Int[Tensor, "*shape"]:
    """Codes of ``x``: clamp(round(x / scale) + zero_point), in ``code_dtype(format)``."""
    lowest, highest = code_range(format)
    x = _computed(x)
    codes = torch.round(x / expand_scale(scale, x, block).to(x.dtype))
    if zero_point is not None:
        codes = codes + expand_scale(zero_point, x, block)
    return codes.clamp(lowest, highest).to(code_dtype(format))


def dequantize(
    codes: Int[Tensor, "*shape"], scale: Tensor, zero_point: Tensor | None, block: Sequence[int]
) -> Float[Tensor, "*shape"]:
    """(codes - zero_point) * scale, in float32 (float64 where the scale is)."""
    scale = _computed(scale)
    x = codes.to(scale.dtype)
    if zero_point is not None:
        x = x - expand_scale(zero_point, x, block).to(scale.dtype)
    return x * expand_scale(scale, x, block)


def parse_format(text: str) -> Format:
    """The format that ``str(format)`` wrote, as the custom ops carry it."""
    return parse_quant(f"{text}/tensor").format


def sqnr_db(x: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in decibels: 10 log10(sum x^2 / sum (x - approximation)^2); inf if equal."""
    noise = (x.double() - approximation.double()).square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(x.double().square().sum() / noise))
