"""The scales of blocks, by each format's rule. Arithmetic is float32 (float64 for float64 tensors).

Asymmetric ranges include 0, so that 0 is exact and the zero point is a code (Jacob et al., arXiv 1712.05877, equations
1 and 12). The scale of a block with NaN or Inf is NaN or Inf, and so is what comes back from its codes. A block of
zeros has scale 1, in weights another (``scales_of_zeros``); a float32 scale is never below the smallest normal number,
so that it can be divided by.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple, assert_never

import torch
from torch import Tensor

from graphq.numerics import elements, mx
from graphq.numerics.blocks import block_extremes, channel_block, expand_scale, scale_shape
from graphq.spec.formats import Float, Format, Int, Mx, Nvfp4, TwoLevel

_AT_A_TIME: Final = 1 << 18  # elements that are rounded at once: temporary copies stay small
BY_SIGN_SMALLEST: Final = 2.0**-23  # AMCT makes a smaller scale 1
_HALF_ZEROS: Final = 2.0**-23  # compressed-tensors' scale of a block of zeros: float32's epsilon
_LARGEST_BIAS: Final = 2.0**30  # of int32, with room for a bias that is corrected later
_STEPS_OF_BIAS: Final = 2.0**16
_ALL_ZEROS: Final = 2.0**-16  # where a whole weight is zeros: see ``scales_of_zeros``
_NVFP4_SMALLEST: Final = 0.125  # compressed-tensors' scale of a block that is too small for one


class Scales(NamedTuple):
    """The scales of a tensor's blocks.

    ``scale``: float32 (float64 for float64 tensors), for mx formats ``float8_e8m0fnu``, for nvfp4 ``float8_e4m3fn``.
    ``zero_point``: in the dtype of codes, for asymmetric formats. ``global_scale``, for formats of two levels: nvfp4's
    single divisor of all scales, or the factors of channels on those of groups.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


def code_range(format: Int) -> tuple[int, int]:
    """The smallest and the largest code, both inclusive."""
    if not format.signed:
        return 0, (1 << format.bits) - 1
    return -(1 << (format.bits - 1)), (1 << (format.bits - 1)) - 1


def code_dtype(format: Format) -> torch.dtype:
    """The dtype that holds unpacked codes and zero points: bytes of bits for floating-point elements."""
    match format:
        case Int(bits, signed=signed):
            if bits <= 8:
                return torch.int8 if signed else torch.uint8
            if bits == 32:
                return torch.int32
            return torch.int16 if signed else torch.uint16
        case TwoLevel("int4") | Mx("int8"):
            return torch.int8
        case Float() | Mx() | Nvfp4() | TwoLevel():
            return torch.uint8
        case _:
            assert_never(format)


def scale_dtype(format: Format, x: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype of the scales of blocks of a tensor of dtype ``x``."""
    match format:
        case Mx():
            return torch.float8_e8m0fnu
        case Nvfp4():
            return torch.float8_e4m3fn
        case Int() | Float() | TwoLevel():
            return torch.float64 if x == torch.float64 else torch.float32
        case _:
            assert_never(format)


def computed(x: Tensor) -> Tensor:
    """``x`` in the dtype that arithmetic is done in."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _divisible(scale: Tensor, span: Tensor) -> Tensor:
    return torch.where(span == 0, 1.0, scale.clamp(min=torch.finfo(scale.dtype).tiny))


def full_scale(format: Float) -> float:
    """The value that the largest magnitude of a block is taken to."""
    if format.layout == "hifloat8":
        return 15.0 if format.scale == "to15" else 16.0
    return elements.largest(format.layout)


def scale_from_extremes(
    low: Tensor, high: Tensor, format: Format, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None where the format is symmetric) for blocks that span ``low`` to ``high``.

    ``global_scale``: nvfp4's. Formats of two levels over channels have no scale that follows from extremes alone.
    """
    low, high = computed(low), computed(high)
    if isinstance(format, Int) and not format.symmetric:
        return _asymmetric(low, high, format)
    extreme = torch.maximum(low.abs(), high.abs())
    match format:
        case Int(divisor="by_sign"):
            scale = extreme / _divisor(low, high, format)
            return torch.where(scale < BY_SIGN_SMALLEST, 1.0, scale), None
        case Int():
            scale = _divisible(extreme / _divisor(low, high, format), extreme)
            return (power_of_two_above(scale) if format.power_of_two else scale), None
        case Float():
            return _divisible(_float_scale(extreme, format), extreme), None
        case Mx():
            return mx.shared_scale(extreme, format), None
        case Nvfp4():
            assert global_scale is not None, "chosen first"
            return nvfp4_scale(extreme / 6.0, global_scale), None
        case TwoLevel():
            return _divisible(extreme / (7.0 if format.element == "int4" else 6.0), extreme), None
        case _:
            assert_never(format)


def _divisor(low: Tensor, high: Tensor, format: Int) -> Tensor | float:
    lowest, highest = code_range(format)
    match format.divisor:
        case "max":
            return float(highest)
        case "half":
            return (highest - lowest) / 2
        case "by_sign":
            return torch.where(high.abs() < low.abs(), -float(lowest), float(highest))
        case _:
            assert_never(format.divisor)


def _asymmetric(low: Tensor, high: Tensor, format: Int) -> tuple[Tensor, Tensor]:
    lowest, highest = code_range(format)
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = highest - lowest
    span = high - low
    scale = _divisible(torch.where(span.isinf(), high / steps - low / steps, span / steps), span)
    if format.power_of_two:
        scale = power_of_two_above(scale)
    zero_point = torch.round(lowest - low / scale).clamp(lowest, highest)
    return scale, zero_point.to(code_dtype(format))


def _float_scale(extreme: Tensor, format: Float) -> Tensor:
    if format.scale == "unit":
        return torch.where(extreme.isfinite(), 1.0, extreme)
    scale = extreme / full_scale(format)
    if format.scale != "pow2":
        return scale
    return power_of_two_above(scale.clamp(min=torch.finfo(scale.dtype).tiny))  # where it is 0 it has no exponent


def power_of_two_above(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below each ``scale``, which is positive, with the gradient of ``scale``
    itself; the largest that there is where none is so large. NaN and infinity stay.
    """
    fraction, exponent = torch.frexp(scale.detach())  # fraction from 0.5 to 1: a power of two is 0.5 x 2^exponent
    largest = math.frexp(torch.finfo(scale.dtype).max)[1] - 1
    exact = torch.ldexp(torch.ones_like(fraction), (exponent - (fraction == 0.5).int()).clamp(max=largest))
    return torch.where(scale.isfinite(), exact + (scale - scale.detach()), scale)


def nvfp4_global_scale(amax: Tensor) -> Tensor:
    """448 * 6 / amax, the divisor that takes a tensor's largest scale to float8's; 1 where that is not finite."""
    divisor = 448.0 * 6.0 / amax.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    return divisor.where(amax.isfinite() & divisor.isfinite(), 1.0)


def nvfp4_scale(step: Tensor, global_scale: Tensor) -> Tensor:
    """The scales of blocks whose extremes are six times ``step``, under their global scale, none of them 0."""
    scale = step.to(torch.float32) * global_scale.to(torch.float32)
    codes = elements.encode(scale, "float8_e4m3fn")
    smallest = int(elements.encode(torch.tensor(_NVFP4_SMALLEST), "float8_e4m3fn"))
    codes = torch.where(codes == 0, smallest, codes)
    return torch.where(step.isfinite(), codes, 0x7F).to(torch.uint8).view(torch.float8_e4m3fn)


def choose_scale(x: Tensor, format: Format, block: Sequence[int], global_scale: Tensor | None = None) -> Scales:
    """Min-max scales of each block of ``x``. ``global_scale``: that of nvfp4 where it is known already."""
    if isinstance(format, TwoLevel):
        upper = choose_scale(x, upper_format(format), channel_block(block)).scale
        x = over_channels(x, upper, format, block)
        return Scales(scale_from_extremes(*block_extremes(x, block), format)[0], None, upper)
    low, high = block_extremes(x, block)
    if isinstance(format, Nvfp4) and global_scale is None:
        amax = torch.maximum(low.abs(), high.abs()).amax() if low.numel() else low.new_zeros(())
        global_scale = nvfp4_global_scale(amax).view([1] * x.dim())
    scale, zero_point = scale_from_extremes(low, high, format, global_scale)
    return Scales(scale, zero_point, global_scale)


def upper_format(format: TwoLevel) -> Format:
    """The format of whole channels that a format of two levels quantizes to first."""
    return Int(8) if format.element == "int4" else Float("float8_e4m3fn")


def over_channels(x: Tensor, upper: Tensor, format: TwoLevel, block: Sequence[int]) -> Tensor:
    """The values of the 8-bit codes of ``x`` by channel, without their scale."""
    x = computed(x)
    y = x / expand_scale(upper, x, channel_block(block)).to(x.dtype)
    if format.element == "int4":
        return y.round_().clamp_(-128, 127)
    for part in y.split(max(1, _AT_A_TIME // max(y[0].numel(), 1))) if y.numel() else ():
        part.copy_(elements.round_to(part, "float8_e4m3fn"))
    return y


def scales_of_zeros(
    codes: Tensor,
    scales: Scales,
    format: Format,
    block: Sequence[int],
    own_axes: Sequence[int] = (),
    least: Tensor | None = None,
) -> Scales:
    """``scales`` of a weight, those of blocks whose codes all stand for 0 chosen so that nothing downstream breaks.

    Such a scale may be any number; the smallest of the weight's other blocks is taken (of those with the same indices
    along ``own_axes``, as experts have them), 2^-16 where there is none. Runtimes that add biases as int32 round them
    to multiples of input scale times weight scale: so the bias of a channel of zeros is rounded no more coarsely than
    the finest of the other channels is. A scale of 1 would lose it, and one near the smallest number would not fit
    into 32 bits. ``least``: that of ``least_for_bias``, where it is known; the bias then has 2^16 steps at least.

    A dialect's own convention wins: 1 for ``by_sign`` (AMCT), 2^-23 for ``half`` (compressed-tensors). Formats whose
    scales are no plain numbers, or always 1, keep them.
    """
    match format:
        case Float("hifloat8", "unit") | Int(divisor="by_sign") | Mx() | Nvfp4() | TwoLevel():
            return scales
        case Int():
            zero = codes.new_zeros(()) if scales.zero_point is None else scales.zero_point
            is_zero = codes == expand_scale(zero, codes, block)
        case Float():
            is_zero = elements.decode(codes, format.layout) == 0
        case _:
            assert_never(format)
    dead = block_extremes(is_zero.to(torch.uint8), block)[0] == 1
    if codes.numel() == 0 or not bool(dead.any()):
        return scales
    others = torch.where(dead, torch.inf, scales.scale)
    axes = [axis for axis in range(others.dim()) if axis not in own_axes]
    smallest = others.amin(axes, keepdim=True)
    chosen = torch.where(smallest.isfinite(), smallest, _ALL_ZEROS)
    if isinstance(format, Int) and format.divisor == "half":
        chosen = torch.full_like(chosen, _HALF_ZEROS)
    if least is not None:
        finest = (least * (_LARGEST_BIAS / _STEPS_OF_BIAS)).to(chosen.dtype)
        if isinstance(format, Int) and format.power_of_two:
            above = power_of_two_above(finest.clamp(min=torch.finfo(finest.dtype).tiny))
            finest = torch.where(finest > 0, torch.where(above > finest, above / 2, above), finest)
        chosen = torch.where(finest > 0, torch.minimum(chosen, finest), chosen)
    return scales._replace(scale=torch.where(dead, chosen, scales.scale))


def least_for_bias(bias: Tensor, input_scale: Tensor) -> Tensor:
    """The smallest weight scales with which each ``bias`` is at most 2^30 in steps of input scale times weight scale.

    Runtimes hold a bias as int32 in these steps: where a channel's weights are tiny beside its bias it would saturate.
    A larger scale takes from such weights what is lost beside the bias anyway: of each int8 input, 2^-24 of it.
    """
    return bias.abs().to(input_scale.dtype) / (input_scale * _LARGEST_BIAS)


def at_least(scales: Scales, least: Tensor, format: Int) -> Scales:
    """``scales`` none of which is below ``least``, zero points moved so that 0 and the ranges stay."""
    scale = torch.maximum(scales.scale, least.to(scales.scale.dtype))
    if format.power_of_two:
        scale = power_of_two_above(scale)
    zero_point = scales.zero_point
    if zero_point is not None:
        lowest, highest = code_range(format)
        moved = torch.round((zero_point.to(scale.dtype) - lowest) * scales.scale / scale) + lowest
        zero_point = moved.clamp(lowest, highest).to(zero_point.dtype)
    return scales._replace(scale=scale, zero_point=zero_point)


def rounded_scales(scales: Scales, format: Format, dtype: torch.dtype) -> Scales:
    """``scales`` that are numbers of ``dtype``, rounded to nearest and never to 0; held in the dtype that they have.

    What a file stores in ``dtype`` is then what codes were computed with. Scales of mx formats and of nvfp4 are stored
    as they are, and so are those of two levels.
    """
    if not isinstance(format, Int | Float) or dtype not in (torch.bfloat16, torch.float16):
        return scales
    least = torch.finfo(dtype).smallest_normal * (torch.finfo(dtype).eps if dtype == torch.float16 else 1.0)
    return scales._replace(scale=scales.scale.clamp(min=least).to(dtype).to(scales.scale.dtype))


def effective_scale(scales: Scales, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes are multiplied by, in the shape of a scale: scale and global scale as one number, in ``dtype``."""
    scale = scales.scale.to(dtype)
    if scales.global_scale is None:
        return scale
    upper = scales.global_scale.to(dtype)
    return scale / upper if isinstance(format, Nvfp4) else scale * upper


def empty_scales(
    shape: Sequence[int],
    block: Sequence[int],
    format: Format,
    own_axes: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Scales:
    """Scales of the right shapes and dtypes for a tensor of this shape and ``dtype``, with undefined values.

    ``own_axes``: those whose indices have a global scale each (experts).
    """
    sizes = scale_shape(shape, block)
    zero_point = None
    if isinstance(format, Int) and not format.symmetric:
        zero_point = torch.empty(sizes, dtype=code_dtype(format))
    upper = None
    if isinstance(format, Nvfp4):
        upper = torch.empty([size if axis in own_axes else 1 for axis, size in enumerate(shape)])
    elif isinstance(format, TwoLevel):
        upper = torch.empty(scale_shape(shape, channel_block(block)), dtype=scale_dtype(format, dtype))
    return Scales(torch.empty(sizes, dtype=scale_dtype(format, dtype)), zero_point, upper)
