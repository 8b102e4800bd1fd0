"""Scales and codes of weights whose every operation is rounded to the dtype that the weights are stored in.

As msModelSlim computes them from a bfloat16 or float16 model: of integers (of the divisor ``max``) s = max(amax /
largest, 2^-23) and round(w / s), of float8 s = amax / 448 and w / s, where the quotients are numbers of that dtype; of
mx formats floor(log2(amax)) - emax, where the logarithm is one: rounded up to a whole number, it gives the next
exponent. And as compressed-tensors 0.19 does (``calculate_qparams``, ``generate_gparam``, ``_quantize``): s = amax /
((2^bits - 1) / 2), and the dtype's epsilon where that is 0; float8 as above; asymmetric integers have the span over
2^bits - 1, and their zero point is added to the quotient in that dtype, too; of nvfp4 the global scale and amax / 6 are
rounded, and quotients are float32.

In float32 2.6 % of int8 codes of a bfloat16 model are others, off by one. Scales are given in float32, which holds them
exactly. Of ssz the last scale is rounded, and its search is in float32.
"""

from collections.abc import Sequence
from typing import Final, assert_never

import torch
from jaxtyping import Float as FloatTensor
from jaxtyping import Shaped
from torch import Tensor

from graphq.numerics import elements, mx
from graphq.numerics.blocks import block_extremes, expand_scale
from graphq.numerics.codes import quantize
from graphq.numerics.ranges import ssz_scale
from graphq.numerics.scales import Scales, code_dtype, code_range, computed, nvfp4_scale
from graphq.spec.formats import Float, Int, Mx, Nvfp4, SourceFormat
from graphq.spec.quant import RangeMethod, Ssz

_SMALLEST: Final = 2.0**-23  # float32's epsilon, which every 16-bit dtype holds


def source_global_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """nvfp4's divisor of all scales of a weight with this largest magnitude: 448 * 6 times its reciprocal, both
    numbers of ``dtype``; 1 where that is not finite.
    """
    divisor = (amax.to(dtype).clamp(min=torch.finfo(dtype).tiny).reciprocal() * (448.0 * 6.0)).to(torch.float32)
    return divisor.where(amax.isfinite() & divisor.isfinite(), 1.0)


def source_scales(
    w: FloatTensor[Tensor, "*shape"],
    dtype: torch.dtype,
    format: SourceFormat,
    block: Sequence[int],
    method: RangeMethod,
    global_scale: Tensor | None = None,
) -> Scales:
    """The scales of the blocks of ``w``, by min-max or ssz, each a number of ``dtype``, and zero points.

    ``global_scale``: nvfp4's; by default that of ``w`` alone.
    """
    stored = w.to(dtype)
    if isinstance(method, Ssz):
        assert isinstance(format, Int)
        return Scales(computed(ssz_scale(stored, format, block, method.steps).to(dtype)).clamp(min=_SMALLEST))
    low, high = (computed(extreme) for extreme in block_extremes(stored, block))
    extreme = torch.maximum(-low, high)
    match format:
        case Int(symmetric=False):
            return _asymmetric(low, high, dtype, format)
        case Int(bits, divisor="max"):
            return Scales(_rounded(extreme / float((1 << (bits - 1)) - 1), dtype).clamp(min=_SMALLEST))
        case Int(bits):
            return Scales(_positive(_rounded(extreme / (((1 << bits) - 1) / 2), dtype), dtype))
        case Float(layout):
            scale = _rounded(extreme / elements.largest(layout), dtype)
            return Scales(torch.where(scale > 0, scale, _SMALLEST))
        case Mx():
            return Scales(mx.source_scale(extreme, format, dtype))
        case Nvfp4():
            if global_scale is None:
                global_scale = source_global_scale(stored.abs().amax(), dtype).view([1] * w.dim())
            return Scales(nvfp4_scale(_rounded(extreme / 6.0, dtype), global_scale), None, global_scale)
        case _:
            assert_never(format)


def _asymmetric(low: Tensor, high: Tensor, dtype: torch.dtype, format: Int) -> Scales:
    """A span that includes 0 over the steps, and the code that stands for 0; of a block of zeros 0."""
    lowest, highest = code_range(format)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _rounded(_rounded(high - low, dtype) / float(highest - lowest), dtype)
    zero_point = _rounded(lowest - _rounded(low / scale, dtype), dtype).clamp(lowest, highest)
    zero_point = zero_point.round().nan_to_num(nan=0.0)
    return Scales(_positive(scale, dtype), zero_point.to(code_dtype(format)))


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of ``dtype`` nearest to ``x``, as they are computed with."""
    return computed(x.to(dtype))


def _positive(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


def source_codes(
    w: FloatTensor[Tensor, "*shape"], dtype: torch.dtype, scales: Scales, format: SourceFormat, block: Sequence[int]
) -> Shaped[Tensor, "*shape"]:
    """The codes of ``w`` by quotients that are rounded to ``dtype`` first, then halves to even."""
    stored = computed(w.to(dtype))
    if isinstance(format, Mx | Nvfp4):
        return quantize(stored, scales, format, block)
    quotient = _rounded(stored / expand_scale(scales.scale, w, block).to(stored.dtype), dtype)
    if isinstance(format, Float):
        return elements.encode(quotient, format.layout)
    if scales.zero_point is not None:
        zero_point = expand_scale(scales.zero_point, w, block).to(stored.dtype)
        quotient = _rounded(quotient + zero_point, dtype)
    return quotient.round_().clamp_(*code_range(format)).to(code_dtype(format))
