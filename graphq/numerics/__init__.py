"""The mathematics of quantization: element formats, scales, codes, ranges. Pure functions on tensors."""

from graphq.numerics.blocks import (
    activation_block,
    block_extremes,
    expand_scale,
    scale_shape,
    state_block,
    weight_block,
)
from graphq.numerics.codes import dequantize, fake_quantize, quantize
from graphq.numerics.error import Noise, decibels, sqnr_db
from graphq.numerics.scales import (
    Scales,
    at_least,
    choose_scale,
    code_dtype,
    code_range,
    empty_scales,
    full_scale,
    least_for_bias,
    nvfp4_global_scale,
    power_of_two_above,
    rounded_scales,
    scale_dtype,
    scale_from_extremes,
    scales_of_zeros,
)
from graphq.spec.formats import Format, parse_format

__all__ = [
    "Format",
    "Noise",
    "Scales",
    "activation_block",
    "at_least",
    "block_extremes",
    "choose_scale",
    "code_dtype",
    "code_range",
    "decibels",
    "dequantize",
    "empty_scales",
    "expand_scale",
    "fake_quantize",
    "full_scale",
    "least_for_bias",
    "nvfp4_global_scale",
    "parse_format",
    "power_of_two_above",
    "quantize",
    "rounded_scales",
    "scale_dtype",
    "scale_from_extremes",
    "scale_shape",
    "scales_of_zeros",
    "sqnr_db",
    "state_block",
    "weight_block",
]
