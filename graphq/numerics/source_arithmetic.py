"""Scales and codes of weights whose every operation is rounded to the dtype that the weights are stored in.

As msModelSlim computes them from a bfloat16 or float16 model: of integers s = max(amax / largest, 2^-23) and
round(w / s), of float8 s = amax / 448 and w / s, where the quotients are numbers of that dtype; of mx formats
floor(log2(amax)) - emax, where the logarithm is one: rounded up to a whole number, it gives the next exponent. In
float32 2.6 % of the int8 codes of a bfloat16 model are others, off by one. Scales are given in float32, which holds
them exactly. Of ssz the last scale is rounded, and its search is in float32.
"""

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from graphq.numerics import codes, elements, mx
from graphq.numerics.blocks import block_extremes, expand_scale
from graphq.numerics.ranges import ssz_scale
from graphq.numerics.scales import Scales, code_dtype, code_range, computed
from graphq.spec import formats
from graphq.spec.formats import Format, Int, Mx
from graphq.spec.quant import RangeMethod, Ssz

_SMALLEST: Final = 2.0**-23  # float32's epsilon, which every 16-bit dtype holds
_LARGEST_FLOAT8: Final = 448.0


def source_scales(
    w: Float[Tensor, "*shape"], dtype: torch.dtype, format: Format, block: Sequence[int], method: RangeMethod
) -> Scales:
    """The scales of the blocks of ``w``, by min-max or ssz: numbers of ``dtype``, of integers at least 2^-23."""
    stored = w.to(dtype)
    if isinstance(method, Ssz):
        assert isinstance(format, Int)
        scale = ssz_scale(stored, format, block, method.steps)
        return Scales(computed(scale.to(dtype)).clamp(min=_SMALLEST))
    low, high = (computed(extreme) for extreme in block_extremes(stored, block))
    amax = torch.maximum(-low, high)
    match format:
        case Int():
            return Scales(computed((amax / float(code_range(format)[1])).to(dtype)).clamp(min=_SMALLEST))
        case Mx():
            return Scales(mx.source_scale(amax, format, dtype))
        case _:
            scale = computed((amax / _LARGEST_FLOAT8).to(dtype))
            return Scales(torch.where(scale > 0, scale, _SMALLEST))


def source_codes(
    w: Float[Tensor, "*shape"], dtype: torch.dtype, scales: Scales, format: Format, block: Sequence[int]
) -> Shaped[Tensor, "*shape"]:
    """The codes of ``w`` that is rounded to ``dtype`` first, and so are its quotients by scales that are no powers of
    two; halves to even.
    """
    stored = computed(w.to(dtype))
    if isinstance(format, Mx):
        return codes.quantize(stored, scales, format, block)
    quotient = computed((stored / expand_scale(scales.scale, w, block).to(stored.dtype)).to(dtype))
    if isinstance(format, formats.Float):
        return elements.encode(quotient, format.layout)
    assert isinstance(format, Int)
    return quotient.round_().clamp_(*code_range(format)).to(code_dtype(format))
