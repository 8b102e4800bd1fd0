"""Scales and codes of weights whose every operation is rounded to the dtype that the weights are stored in.

As msModelSlim computes them from a bfloat16 or float16 model: s = max(amax / largest, 2^-23) and round(w / s), where
both quotients are numbers of that dtype. In float32 2.6 % of the codes of a bfloat16 model are others, off by one.
Scales are given in float32, which holds them exactly. Of ssz the last scale is rounded, and its search is in float32.
"""

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from graphq.numerics.blocks import block_extremes, expand_scale
from graphq.numerics.ranges import ssz_scale
from graphq.numerics.scales import Scales, code_dtype, code_range, computed
from graphq.spec.formats import Int
from graphq.spec.quant import RangeMethod, Ssz

_SMALLEST: Final = 2.0**-23  # float32's epsilon, which every 16-bit dtype holds


def source_scales(
    w: Float[Tensor, "*shape"], dtype: torch.dtype, format: Int, block: Sequence[int], method: RangeMethod
) -> Scales:
    """The scales of the blocks of ``w``, by min-max or ssz, each a number of ``dtype`` and at least 2^-23."""
    stored = w.to(dtype)
    if isinstance(method, Ssz):
        scale = ssz_scale(stored, format, block, method.steps)
    else:
        low, high = (computed(extreme) for extreme in block_extremes(stored, block))
        scale = torch.maximum(-low, high) / float(code_range(format)[1])
    return Scales(computed(scale.to(dtype)).clamp(min=_SMALLEST))


def source_codes(
    w: Float[Tensor, "*shape"], dtype: torch.dtype, scales: Scales, format: Int, block: Sequence[int]
) -> Shaped[Tensor, "*shape"]:
    """clamp(round(w / scale)), halves to even, of ``w`` and quotients that are rounded to ``dtype`` first."""
    stored = computed(w.to(dtype))
    quotient = (stored / expand_scale(scales.scale, w, block).to(stored.dtype)).to(dtype)
    return computed(quotient).round_().clamp_(*code_range(format)).to(code_dtype(format))
