"""Which activations a quantizer clips: those beyond its largest or least value by more than rounding explains."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphq.numerics.codes import code_values
from graphq.numerics.scales import code_range
from graphq.runtime import ops
from graphq.spec.formats import Int, Mx, code_bits, parse_format


def clipped(x: Tensor, codes: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """The elements of ``x`` that lie beyond the outermost values of their ``codes`` by more than half the step there.

    ``arguments``: what ``graphq::quantize`` took behind ``x``. What is rounded to an outermost value is not clipped.
    """
    scale, zero_point, global_scale, format, block = arguments
    values = [
        ops.dequantize(torch.full_like(codes, code), scale, zero_point, global_scale, format, block, x.dtype)
        for code in edges(format)
    ]
    low, inner_low, inner_high, high = values
    return (x > high + (high - inner_high) / 2) | (x < low - (inner_low - low) / 2) | ~x.isfinite()


@cache
def edges(format: str) -> tuple[int, int, int, int]:
    """The codes of the least and the second least value of a format, and of the second largest and the largest."""
    parsed = parse_format(format)
    if isinstance(parsed, Int):
        low, high = code_range(parsed)
        return low, low + 1, high - 1, high
    if isinstance(parsed, Mx) and parsed.element == "int8":
        return -127, -126, 126, 127  # -128 is no code that is given
    codes = torch.arange(1 << code_bits(parsed), dtype=torch.uint8)
    values = code_values(codes, parsed)
    finite = values.isfinite().nonzero().flatten()
    order = finite[values[finite].argsort(stable=True)].tolist()
    return order[0], order[1], order[-2], order[-1]
