"""Shared exponents of microscaling (MX) blocks, and the rounding that goes with each rule.

``ocp``: floor(log2 amax) - emax (OCP Microscaling Formats 1.0, 6.3). The others are those of tools whose files differ:

- ``even``: amax is first rounded to a power of two, from 1.75 x 2^k on upwards (compressed-tensors, AMCT's MiniMax
  quantizer);
- ``amct``: one more than ``ocp`` where amax is above 1.75 x 2^k (AMCT's MXFP4);
- ``amct_llm``: as ``amct``, elements rounded half away from zero (AMCT's LLM workflow);
- ``nearest``: round(log2(amax / largest element)), at least -30, elements rounded half away from zero (AMCT's Ascend C
  reference);
- ``ceil``: ceil(log2(amax / largest element)), so that nothing saturates (FBGEMM's MX4);
- ``ascend``: msModelSlim's: floor(log2(amax * 8/7 + 9.6e-7)) - 2 for mxfp4, ``ocp`` for the others, elements rounded
  half away from zero.

amax is the largest magnitude of a block and emax the exponent of the element format's largest number.
"""

from typing import Final, assert_never

import torch
from torch import Tensor

from graphq.numerics import elements
from graphq.numerics.elements import Rounding
from graphq.spec.formats import Mx

_EMAX: Final = {
    "float8_e4m3fn": 8,
    "float8_e5m2": 15,
    "float6_e2m3": 2,
    "float6_e3m2": 4,
    "float4_e2m1": 2,
    "int8": 0,
}
INT8_UNIT: Final = 2.0**-6  # MXINT8's codes count sixty-fourths
_INT8_LARGEST: Final = 127 * INT8_UNIT


def rounding_of(format: Mx) -> Rounding:
    """Where the rule rounds halves."""
    return "away" if format.rule in ("amct_llm", "nearest", "ascend") else "even"


def source_scale(amax: Tensor, format: Mx, dtype: torch.dtype) -> Tensor:
    """``shared_scale`` by the rule ``ascend``, every operation rounded to ``dtype``, in which ``amax`` is a number."""
    x = amax.to(dtype)
    x = x / 0.875 + 9.6e-7 if format.element == "float4_e2m1" else x
    shared = torch.log2(x).floor()
    shared = torch.where(amax == 0, -127.0, shared.to(torch.float32) - _EMAX[format.element])
    return elements.e8m0(torch.where(amax.isfinite(), shared.clamp(min=-127.0), torch.nan))


def shared_scale(amax: Tensor, format: Mx) -> Tensor:
    """2^exponent for blocks whose largest magnitude is ``amax``, as ``float8_e8m0fnu``; NaN for NaN and infinity.

    Blocks of zeros have exponent -127 (0 by the rule ``amct``).
    """
    emax = _EMAX[format.element]
    largest = _INT8_LARGEST if format.element == "int8" else elements.largest(format.element)
    amax = amax if amax.dtype == torch.float64 else amax.to(torch.float32)  # float32 could round up to a power of two
    mantissa, exponent = torch.frexp(amax)  # mantissa from 0.5 to 1
    floor = (exponent - 1).to(torch.float32)
    match format.rule:
        case "ocp":
            shared = floor - emax
        case "even":
            shared = floor + (mantissa >= 0.875) - emax
        case "amct" | "amct_llm":
            shared = floor + (mantissa > 0.875) - emax
        case "nearest":
            shared = torch.round(torch.log2(amax / largest)).clamp(min=-30)
        case "ceil":
            fraction, above = torch.frexp(amax.clamp(min=2.0**-127) / largest)  # 0 / largest has no exponent
            shared = (above - (fraction == 0.5).int()).to(torch.float32)
        case "ascend" if format.element == "float4_e2m1":
            shared = torch.floor(torch.log2(amax * 8 / 7 + 9.6e-7)) - 2
        case "ascend":
            shared = floor - emax
        case _:
            assert_never(format.rule)
    shared = torch.where(amax == 0, 0.0 if format.rule == "amct" else -127.0, shared)
    return elements.e8m0(torch.where(amax.isfinite(), shared, torch.nan))
