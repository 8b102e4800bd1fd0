"""The formats as their specifications give them, and rounding written a second time, in exact float64 and integers.

Nothing here is taken from graphq. Tables hold the non-negative values by code.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

INF, NAN = math.inf, math.nan

# OCP Microscaling Formats 1.0, tables 1 to 5; float4_e1m2: AMCT's uniform grid of quarters.
FLOAT4_E2M1 = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]
FLOAT4_E1M2 = [0.0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]
FLOAT6_E2M3 = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in (0, 1, 2) for m in range(8)]
FLOAT6_E3M2 = [m / 16 for m in range(4)] + [(1 + m / 4) * 2**e for e in range(-2, 5) for m in range(4)]
# OCP 8-bit Floating Point Specification 1.0: e4m3 gives its last code to NaN, e5m2 its last binade to Inf and NaN.
FLOAT8_E4M3 = [m * 2**-9 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(-6, 9) for m in range(8)][:-1]
FLOAT8_E5M2 = [m * 2**-16 for m in range(4)] + [(1 + m / 4) * 2**e for e in range(-14, 16) for m in range(4)]

MINIFLOATS: Final[dict[str, list[float]]] = {
    "float4_e2m1": FLOAT4_E2M1,
    "float4_e1m2": FLOAT4_E1M2,
    "float6_e2m3": FLOAT6_E2M3,
    "float6_e3m2": FLOAT6_E3M2,
    "float8_e4m3fn": FLOAT8_E4M3,
    "float8_e5m2": FLOAT8_E5M2,
}
BITS: Final[dict[str, int]] = {
    "float4_e2m1": 4,
    "float4_e1m2": 4,
    "float6_e2m3": 6,
    "float6_e3m2": 6,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
}

# AMCT's decode table of HiFloat8, codes 0x00 to 0x7F.
HIFLOAT8: list[float] = [
    *(0, 2.384185791015625e-07, 4.76837158203125e-07, 9.5367431640625e-07),
    *(1.9073486328125e-06, 3.814697265625e-06, 7.62939453125e-06, 1.52587890625e-05),
    *(1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875),
    *(2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375),
    *(4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 9, 10, 11, 12, 13, 14, 15),
    *(0.25, 0.28125, 0.3125, 0.34375, 0.375, 0.40625, 0.4375, 0.46875),
    *(0.125, 0.140625, 0.15625, 0.171875, 0.1875, 0.203125, 0.21875, 0.234375),
    *(16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224),
    *(0.0625, 0.078125, 0.09375, 0.109375, 0.03125, 0.0390625, 0.046875, 0.0546875),
    *(0.015625, 0.01953125, 0.0234375, 0.02734375, 0.0078125, 0.009765625, 0.01171875, 0.013671875),
    *(256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, INF),
    *(0.00390625, 0.005859375, 0.001953125, 0.0029296875, 0.0009765625, 0.00146484375, 0.00048828125, 0.000732421875),
    *(0.000244140625, 0.0003662109375, 0.0001220703125, 0.00018310546875),
    *(6.103515625e-05, 9.1552734375e-05, 3.0517578125e-05, 4.57763671875e-05),
]


def minifloat_code(x: np.ndarray, element: str, away: bool = False) -> np.ndarray:
    """The code of the value nearest to each finite or infinite ``x``: halves to the even code, or away from zero."""
    values = np.array(MINIFLOATS[element], dtype=np.float64)
    halfway = (values[1:] + values[:-1]) / 2  # exact
    a = np.abs(x.astype(np.float64))
    up, down = np.searchsorted(halfway, a, side="right"), np.searchsorted(halfway, a, side="left")
    # ``up`` and ``down`` differ only where ``a`` is a half, by one: one of them is even.
    code = up if away else np.where(up % 2 == 0, up, down)
    return (code + np.signbit(x) * len(_all_codes(element))).astype(np.uint8)


def _all_codes(element: str) -> range:
    return range(1 << (BITS[element] - 1))


def hifloat8_code(x: float) -> int:
    """The five rules of AMCT's encoder, in exact integer arithmetic: x = n / d, and 2^e <= n / d < 2^(e+1)."""
    if math.isnan(x):
        return 0x80
    sign = 0x80 if math.copysign(1, x) < 0 else 0
    if math.isinf(x):
        return sign | 0x6F
    n, d = abs(x).as_integer_ratio()
    if n << 23 < d:  # a < 2^-23
        return 0
    if n << 22 < d:
        return sign | 1
    e = math.frexp(abs(x))[1] - 1
    if e < -15:  # denormal: a power of two, the next one from 1.5 x 2^e on
        up = n << (1 - e) >= 3 * d
        exponent = e + up
        return sign | (exponent + 23 if exponent < -15 else 0x7E)
    if e > 15:
        return sign | 0x6E
    m = _mantissa_bits(e)
    scaled = (n << (m - e), d) if m >= e else (n, d << (e - m))  # a / 2^e x 2^m
    q = (2 * scaled[0] + scaled[1]) // (2 * scaled[1])  # floor(... + 0.5)
    if q == 2 << m:
        e, m = e + 1, _mantissa_bits(e + 1)
        q = 1 << m
    if e > 15 or (e == 15 and q > 2):
        return sign | 0x6E
    return sign | _hifloat8_bits(e, q - (1 << m), m)


def _mantissa_bits(e: int) -> int:
    return 3 if abs(e) <= 3 else 2 if abs(e) <= 7 else 1


def _hifloat8_bits(e: int, mantissa: int, m: int) -> int:
    """Dot prefix, sign of the exponent, the exponent without its highest bit, mantissa."""
    if e == 0:
        return 0b0001 << 3 | mantissa
    prefix, width = {1: (0b001, 1), 2: (0b01, 2), 3: (0b10, 3), 4: (0b11, 4)}[abs(e).bit_length()]
    field = (e < 0) << (width - 1) | (abs(e) - (1 << (width - 1)))
    return prefix << (width + m) | field << m | mantissa


def halves(values: Sequence[float]) -> np.ndarray:
    """The finite values themselves and all points half way between neighbours, with both signs, in float64; a step of
    half a value lies above the largest.
    """
    ordered = np.unique(np.array([v for v in values if math.isfinite(v)], dtype=np.float64))
    points = np.concatenate([ordered, (ordered[1:] + ordered[:-1]) / 2, [ordered[-1] * 1.0625, ordered[-1] * 1.5]])
    return np.concatenate([points, -points])


def beside(points: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    """The points, and their neighbours in ``dtype`` on both sides."""
    exact = points.astype(dtype)
    assert (exact == points).all()
    return np.concatenate([exact, np.nextafter(exact, dtype(np.inf)), np.nextafter(exact, dtype(-np.inf))])


def every(dtype: str) -> np.ndarray:
    """All 65,536 values of a 16-bit dtype, as float32."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)
