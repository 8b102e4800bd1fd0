"""Number formats for use without a model: ``graphq.encode``, ``graphq.decode``, ``graphq.fake_quantize``."""

import torch
from torch import Tensor

from graphq.errors import SpecError
from graphq.numerics import (
    Scales,
    activation_block,
    choose_scale,
    code_dtype,
    code_range,
    dequantize,
    elements,
    scale_shape,
    weight_block,
)
from graphq.numerics import fake_quantize as _fake_quantize
from graphq.numerics.blocks import channel_block
from graphq.numerics.ranges import weight_scales
from graphq.numerics.source_arithmetic import source_codes, source_scales
from graphq.spec.formats import (
    BIAS_BITS,
    Int,
    SourceFormat,
    TwoLevel,
    element_name,
    find_format,
    has_global_scale,
    is_asymmetric,
)
from graphq.spec.quant import (
    Entropy,
    Histogram,
    MinMax,
    MovingAverage,
    Ofmr,
    PerBlock,
    Percentile,
    PerGroup,
    PerTensor,
    PerToken,
    Quant,
    parse_quant,
)


def _element(format: str) -> str | Int:
    if format in elements.ELEMENTS:
        return format
    found = find_format(format)
    if isinstance(found, Int) and element_name(found) == format:
        if found.bits == BIAS_BITS:
            raise SpecError(f"bits: {found.bits} is not one of 2 to 8 or 16")
        return found
    raise SpecError(
        f"{format!r} is not an element format; write int2 to int8, int16, uint8, uint16 or one of"
        f" {', '.join(elements.ELEMENTS)}"
    )


def _floating(x: Tensor, what: str) -> None:
    if not x.is_floating_point() or x.dtype.itemsize == 1:
        raise SpecError(f"{what}: x is {x.dtype}; give float16, bfloat16, float32 or float64")


def encode(x: Tensor, format: str) -> Tensor:
    """The codes of the values nearest to ``x``, in its shape, without any scale.

    ``x``: float16, bfloat16, float32 or float64. ``format``: ``float8_e4m3fn``, ``float8_e5m2`` (OCP 8-bit Floating
    Point 1.0), ``float6_e2m3``, ``float6_e3m2``, ``float4_e2m1``, ``e8m0`` (OCP Microscaling 1.0), ``hifloat8``,
    ``float4_e1m2`` (AMCT), or an integer, ``int2`` to ``int8``, ``int16``, ``uint8``, ``uint16``. Codes are ``uint8``
    bit patterns in the low bits of a byte; integers are int8, uint8, int16 or uint16.

    Halves go to even, of hifloat8 away from zero; e8m0 takes the largest power of two up to ``x``. What lies beyond the
    largest finite value saturates, infinities too, except that hifloat8 keeps infinities. Raises ``SpecError`` for
    another format, and for NaN where the format has none and for numbers below 0 in e8m0.
    """
    element = _element(format)
    _floating(x, format)
    x = x if x.dtype.itemsize == 8 else x.float()
    if (isinstance(element, Int) or not elements.has_nan(element)) and bool(x.isnan().any()):
        raise SpecError(f"{format} has no NaN; x holds one")
    if isinstance(element, Int):
        return x.round().clamp(*code_range(element)).to(code_dtype(element))
    if element == "e8m0" and bool((x < 0).any()):
        raise SpecError("e8m0 has no negative numbers; x holds one")
    return elements.encode(x, element)


def decode(codes: Tensor, format: str) -> Tensor:
    """The values of ``codes``, in their shape, as float32, which holds each exactly.

    ``codes`` as ``encode`` gives them. Raises ``SpecError`` for another format or dtype, and for codes with bits above
    the format's.
    """
    element = _element(format)
    wanted = code_dtype(element) if isinstance(element, Int) else torch.uint8
    if codes.dtype != wanted:
        raise SpecError(f"{format}: codes are {wanted}, not {codes.dtype}")
    if isinstance(element, Int):
        lowest, highest = code_range(element)
        wide = codes.int()
        if bool(((wide < lowest) | (wide > highest)).any()):
            raise SpecError(f"{format}: codes from {lowest} to {highest}; one is outside")
        return codes.float()
    if elements.bits_of(element) < 8 and bool((codes >> elements.bits_of(element)).any()):
        raise SpecError(f"{format}: codes of {elements.bits_of(element)} bits; one has more")
    return elements.decode(codes, element)


def fake_quantize(
    x: Tensor,
    quant: Quant | str,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """``x`` quantized and dequantized, in its shape and dtype; computed in float32 (float64 for float64), scales and
    codes of a quant with the arithmetic ``source`` in the dtype of ``x``, unless they are given.

    ``quant``: a ``Quant`` or its text, such as ``"int4/g128"``, ``"int4/asym/g128"``, ``"mxfp4"``, ``"nvfp4"``,
    ``"hifloat8/channel"``. ``x`` is read as a weight, ``[out, in]`` or ``[out, in, ...]``: channels along the first
    axis, groups along the second (a vector: along its own); per token, and where the quant is dynamic, as an activation
    ``[..., features]``.

    ``scale``: float, one number or one for each block, in the rank of ``x``: ``[out, in / group]`` for groups. Without
    it, and without zero point, they are chosen by the quant's method. ``zero_point``: in the dtype of codes, for
    asymmetric formats, beside ``scale``. ``global_scale``: beside ``scale``, for nvfp4 (float32, the divisor of all
    scales) and formats of two levels (``[out, 1]``); alone, for nvfp4, the scales of blocks follow. Raises
    ``SpecError`` for what does not fit together, and for NaN or infinity in ``x``.
    """
    quant = parse_quant(quant) if isinstance(quant, str) else quant
    _floating(x, str(quant))
    if not bool(x.isfinite().all()):
        raise SpecError(f"{quant}: x holds NaN or Inf")
    if x.dim() == 0:
        raise SpecError(f"{quant}: x has no axes; give at least one")
    block = _block(x, quant)
    if quant.arithmetic == "source" and scale is None and zero_point is None and global_scale is None:
        assert isinstance(quant.format, SourceFormat)
        scales = source_scales(x, x.dtype, quant.format, block, quant.method)
        codes = source_codes(x, x.dtype, scales, quant.format, block)
        return dequantize(codes, scales, quant.format, block).to(x.dtype)
    scales = _given(x, quant, block, scale, zero_point, global_scale)
    return _fake_quantize(x, scales, quant.format, block)


def _block(x: Tensor, quant: Quant) -> list[int]:
    if isinstance(quant.granularity, PerToken) or quant.dynamic:
        return activation_block(quant.granularity, x.dim())
    if x.dim() == 1:
        if isinstance(quant.granularity, PerTensor | PerGroup):
            return activation_block(quant.granularity, 1)
        raise SpecError(f"{quant}: x has one axis; give a weight [out, in]")
    return weight_block(quant.granularity, x.dim(), 0, 1)


def _given(
    x: Tensor,
    quant: Quant,
    block: list[int],
    scale: Tensor | None,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
) -> Scales:
    format = quant.format
    if global_scale is not None and not has_global_scale(format):
        raise SpecError(f"{quant}: global_scale: this format has one level of scales")
    if zero_point is not None and not is_asymmetric(format):
        raise SpecError(f"{quant}: zero_point: the format is symmetric")
    if scale is None:
        if zero_point is not None:
            raise SpecError(f"{quant}: zero_point: give its scale too")
        if global_scale is not None and isinstance(format, TwoLevel):
            raise SpecError(f"{quant}: global_scale: give the scales of groups too")
        if isinstance(quant.method, MovingAverage | Histogram | Entropy | Ofmr):
            raise SpecError(f"{quant}: {quant.method} takes its range from batches; give the scale, or leave it out")
        if isinstance(quant.method, Percentile) and isinstance(quant.granularity, PerGroup | PerBlock):
            raise SpecError(f"{quant}: blocks of a few elements have no percentiles; write /tensor or /channel")
        if global_scale is not None or quant.method == MinMax():
            return choose_scale(x, format, block, global_scale)
        return weight_scales(x, format, block, quant.method)
    if is_asymmetric(format) and zero_point is None:
        raise SpecError(f"{quant}: scale: give its zero_point too")
    if has_global_scale(format) and global_scale is None:
        raise SpecError(f"{quant}: scale: give its global_scale too")
    if zero_point is not None and zero_point.dtype != code_dtype(format):
        raise SpecError(f"{quant}: zero_point: give {code_dtype(format)}, not {zero_point.dtype}")
    own = scale_shape(x.shape, block)
    upper = scale_shape(x.shape, channel_block(block)) if isinstance(format, TwoLevel) else [1]
    parts = (("scale", scale, own), ("zero_point", zero_point, own), ("global_scale", global_scale, upper))
    for name, part, wanted in parts:
        if part is not None and part.numel() != 1 and list(part.shape) != wanted:
            raise SpecError(f"{quant}: {name} of shape {tuple(part.shape)}; expected one number or {tuple(wanted)}")
    return Scales(scale, zero_point, global_scale)
