"""Codes of element formats and their values: float8, float6, float4, hifloat8 and E8M0, each code in a byte of its own.

Sources: OCP 8-bit Floating Point Specification 1.0 (float8_e4m3fn, float8_e5m2), OCP Microscaling Formats 1.0
(float6, float4_e2m1, E8M0), AMCT's documentation of HiFloat8 and FLOAT4_E1M2. A code holds sign, exponent and mantissa
from its highest bit down.

Finite values and infinities beyond the largest finite value saturate, except that hifloat8 keeps infinities. Rounding
is to nearest: halves go to even, in hifloat8 away from zero. NaN stays NaN in formats that have one; elsewhere its
rounded value is NaN and its code is undefined. Zero keeps its sign, except in hifloat8, which has one zero.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from graphq.errors import PassError

Rounding = Literal["even", "away"]


@final
@dataclass(frozen=True)
class Minifloat:
    """A layout of ``1 + exponent + mantissa`` bits with subnormal numbers; ``largest`` is its largest finite value."""

    exponent: int
    mantissa: int
    bias: int
    largest: float

    @property
    def lowest_exponent(self) -> int:
        """The exponent of the smallest normal number."""
        return 1 - self.bias


MINIFLOATS: Final = {
    "float8_e4m3fn": Minifloat(4, 3, 7, 448.0),
    "float8_e5m2": Minifloat(5, 2, 15, 57344.0),
    "float6_e2m3": Minifloat(2, 3, 1, 7.5),
    "float6_e3m2": Minifloat(3, 2, 3, 28.0),
    "float4_e2m1": Minifloat(2, 1, 1, 6.0),
    "float4_e1m2": Minifloat(1, 2, 1, 1.75),
}
ELEMENTS: Final = (*MINIFLOATS, "hifloat8", "e8m0")
HIFLOAT8_LARGEST: Final = 32768.0


@final
@dataclass(frozen=True)
class _Bits:
    """The layout of the dtype that is computed in."""

    integer: torch.dtype
    mantissa: int
    bias: int


_BITS: Final = {torch.float32: _Bits(torch.int32, 23, 127), torch.float64: _Bits(torch.int64, 52, 1023)}


def has_nan(element: str) -> bool:
    """Whether one of the format's codes is NaN."""
    return element in ("float8_e4m3fn", "float8_e5m2", "hifloat8", "e8m0")


def bits_of(element: str) -> int:
    """Bits of one code."""
    found = MINIFLOATS.get(element)
    return 8 if found is None else 1 + found.exponent + found.mantissa


def largest(element: str) -> float:
    """The largest finite value of a floating-point format."""
    return HIFLOAT8_LARGEST if element == "hifloat8" else MINIFLOATS[element].largest


def round_to(x: Float[Tensor, "*shape"], element: str, rounding: Rounding = "even") -> Float[Tensor, "*shape"]:
    """The value of ``element`` nearest to each of ``x``, float32 or float64, in the same dtype; zeros may lose their
    sign. ``rounding`` is that of halves; hifloat8 has its own.
    """
    if element == "hifloat8":
        values = _hifloat8_tables(str(x.device))[1]
        return values.index_select(0, _hifloat8_index(x).flatten()).view(x.shape).to(x.dtype)
    layout, bits = MINIFLOATS[element], _BITS[x.dtype]
    # The power of two below each magnitude; below the smallest normal number the steps no longer shrink.
    y = x.clamp(-layout.largest, layout.largest)
    power = (y.view(bits.integer) & _exponent_mask(bits)).view(x.dtype).clamp_(min=2.0**layout.lowest_exponent)
    if rounding == "even":
        # Where the last bit of x + c is worth one step, adding and subtracting c rounds to steps, halves to even.
        power.mul_(1.5 * 2.0 ** (bits.mantissa - layout.mantissa))
        return y.add_(power).sub_(power)
    step = power.mul_(2.0**-layout.mantissa)
    return round_away(y / step).mul_(step).clamp_(-layout.largest, layout.largest)


def round_away(x: Tensor) -> Tensor:
    """``x`` rounded to integers, halves away from zero; floor(x + 0.5) would round the largest number below 0.5 up."""
    whole = x.trunc()
    return whole.add_((x - whole).abs_().ge_(0.5).copysign_(x))


def _exponent_mask(bits: _Bits) -> int:
    return 0x7F800000 if bits.integer == torch.int32 else 0x7FF0000000000000


def encode(x: Float[Tensor, "*shape"], element: str, rounding: Rounding = "even") -> UInt8[Tensor, "*shape"]:
    """``uint8`` codes of the values nearest to ``x``, float32 or float64."""
    if element == "hifloat8":
        return _hifloat8_tables(str(x.device))[0].index_select(0, _hifloat8_index(x).flatten()).view(x.shape)
    if element == "e8m0":
        return _encode_e8m0(x)
    layout, bits = MINIFLOATS[element], _BITS[x.dtype]
    magnitude = round_to(x, element, rounding).abs_()
    raw = magnitude.view(bits.integer) >> (bits.mantissa - layout.mantissa)
    normal = raw.sub_((bits.bias - layout.bias) << layout.mantissa)
    steps = magnitude.mul(2.0 ** (layout.mantissa - layout.lowest_exponent)).nan_to_num_(0.0).clamp_(max=255.0)
    code = torch.where(magnitude < 2.0**layout.lowest_exponent, steps.to(bits.integer), normal)
    width = layout.exponent + layout.mantissa
    code = torch.where(magnitude.isnan(), (1 << width) - 1, code)
    return (code | (torch.signbit(x).to(bits.integer) << width)).to(torch.uint8)


def decode(codes: UInt8[Tensor, "*shape"], element: str, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """The values of ``uint8`` codes in ``dtype``, which float32 holds exactly; bits above the code's are ignored."""
    if codes.dtype != torch.uint8:
        raise PassError(f"{element}: codes are uint8, not {codes.dtype}")
    table = _table(element, dtype, str(codes.device))
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


@cache
def _table(element: str, dtype: torch.dtype, device: str) -> Tensor:
    with torch.inference_mode(False):
        return _values(element).to(dtype).to(device)


def _values(element: str) -> Tensor:
    """The values of all 256 bytes, in float64."""
    codes = torch.arange(256, dtype=torch.int64)
    if element == "hifloat8":
        return _hifloat8_values(codes)
    if element == "e8m0":
        return torch.where(codes == 255, torch.nan, torch.ldexp(torch.ones(256, dtype=torch.float64), codes - 127))
    layout = MINIFLOATS[element]
    width = layout.exponent + layout.mantissa
    field = (codes >> layout.mantissa) & ((1 << layout.exponent) - 1)
    mantissa = codes & ((1 << layout.mantissa) - 1)
    whole = torch.where(field == 0, mantissa, mantissa + (1 << layout.mantissa)).double()
    value = torch.ldexp(whole, field.clamp(min=1) - layout.bias - layout.mantissa)
    if element == "float8_e4m3fn":
        value = torch.where((codes & 0x7F) == 0x7F, torch.nan, value)
    elif element == "float8_e5m2":
        value = torch.where(field == 31, torch.where(mantissa == 0, torch.inf, torch.nan), value)
    return torch.where((codes >> width) & 1 == 1, -value, value)


def _hifloat8_values(codes: Tensor) -> Tensor:
    """The dot of 2 to 4 bits after the sign says how many bits the exponent takes; the mantissa has the rest."""
    body = codes & 0x7F
    value = torch.ldexp(torch.ones(256, dtype=torch.float64), body - 23)  # 0000: powers of two from 2^-22 to 2^-16
    for first, exponent_bits, mantissa_bits in ((8, 0, 3), (16, 1, 3), (32, 2, 3), (64, 3, 2), (96, 4, 1)):
        field = (body >> mantissa_bits) & ((1 << exponent_bits) - 1)
        if exponent_bits:  # its highest bit is the exponent's sign, and the magnitude's highest bit is implied
            half = 1 << (exponent_bits - 1)
            size = half + (field & (half - 1))
            exponent = torch.where(field >= half, -size, size)
        else:
            exponent = torch.zeros_like(body)
        mantissa = (body & ((1 << mantissa_bits) - 1)) + (1 << mantissa_bits)
        value = torch.where(body >= first, torch.ldexp(mantissa.double(), exponent - mantissa_bits), value)
    value = torch.where(body == 0, 0.0, value)
    value = torch.where(body == 0x6F, torch.inf, value)
    value = torch.where(codes >= 128, -value, value)
    return torch.where(codes == 0x80, torch.nan, value)


def _hifloat8_index(x: Tensor) -> Tensor:
    """Sign, exponent and four bits of mantissa of ``x`` as float32: all that the rounding depends on, since halves go
    away from zero and no point half way between two values has more.
    """
    if x.dtype == torch.float64:
        x = _truncated(x)
    return ((x + 0.0).view(torch.int32) >> 19) & 0x1FFF  # the sum makes a NaN's highest bit of mantissa 1


def _truncated(x: Tensor) -> Tensor:
    """float64 to float32, towards zero: rounding here could reach a half that ``x`` lies below."""
    near = x.to(torch.float32)
    too_far = (near.abs().double() > x.abs()) & x.isfinite()
    return torch.where(too_far, torch.nextafter(near, torch.zeros_like(near)), near)


@cache
def _hifloat8_tables(device: str) -> tuple[Tensor, Tensor]:
    """Code and value for each of the 2^13 sign-exponent-mantissa patterns."""
    with torch.inference_mode(False):
        table = _values("hifloat8").to(torch.float32)
        x = (torch.arange(1 << 13, dtype=torch.int32) << 19).view(torch.float32)
        finite = torch.arange(128)[table[:128].isfinite()]
        ordered, place = table[finite].sort()
        halfway = (ordered[1:] + ordered[:-1]) / 2  # exact: values have few bits
        code = finite[place[torch.bucketize(x.abs(), halfway, right=True)]]
        code = torch.where(x.isinf(), 0x6F, code)
        code = torch.where(torch.signbit(x) & (code != 0), code | 0x80, code)
        code = torch.where(x.isnan(), 0x80, code).to(torch.uint8)
        return code.to(device), table[code.long()].to(device)


def _encode_e8m0(x: Tensor) -> Tensor:
    """The largest power of two up to ``x``; from 2^-127 to 2^127, NaN for NaN and for negative numbers."""
    exponent = torch.frexp(x.clamp(2.0**-127, 2.0**127))[1] - 1
    return torch.where(x.isnan() | (x < 0), 255, exponent + 127).to(torch.uint8)


def e8m0(exponent: Tensor) -> Tensor:
    """2^exponent as ``float8_e8m0fnu``, exponents held between -127 and 127; NaN stays NaN. ``exponent``: float."""
    bits = torch.where(exponent.isnan(), 255.0, exponent.clamp(-127, 127) + 127).to(torch.uint8)
    return bits.view(torch.float8_e8m0fnu)
