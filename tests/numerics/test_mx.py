"""Microscaling formats: shared exponents of every rule against their authors' numbers and exact arithmetic."""

import math
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch

from graphq import numerics
from graphq.numerics import Scales, elements, mx
from graphq.spec.formats import ExponentRule, Mx, MxElement
from tests.numerics.tables import MINIFLOATS, beside, minifloat_code

RULES = get_args(ExponentRule)
ELEMENTS = get_args(MxElement)
ALL = [Mx(element, rule) for element in ELEMENTS for rule in RULES]
EMAX = {"float8_e4m3fn": 8, "float8_e5m2": 15, "float6_e2m3": 2, "float6_e3m2": 4, "float4_e2m1": 2, "int8": 0}
AWAY = {"amct_llm", "nearest", "ascend"}
BLOCK = [1, 32]


def largest(element: MxElement) -> float:
    return 127 / 64 if element == "int8" else MINIFLOATS[element][-1]


def exponents(amax: torch.Tensor, format: Mx) -> list[int]:
    return (mx.shared_scale(amax, format).view(torch.uint8).int() - 127).tolist()


def expected_exponent(amax: float, format: Mx) -> int:
    """The rule, exactly: with integers, fractions and float64 logarithms of numbers that are not near a power of two."""
    emax = EMAX[format.element]
    if amax == 0:
        return 0 if format.rule == "amct" else -127
    floor = math.frexp(amax)[1] - 1
    part = Fraction(amax) / Fraction(2) ** floor
    match format.rule:
        case "ocp":
            e = floor - emax
        case "even":
            e = floor + (part >= Fraction(7, 4)) - emax
        case "amct" | "amct_llm":
            e = floor + (part > Fraction(7, 4)) - emax
        case "nearest":
            e = max(round(math.log2(amax / largest(format.element))), -30)
        case "ceil":
            e = next(
                k for k in range(-150, 128) if Fraction(amax) <= Fraction(largest(format.element)) * Fraction(2) ** k
            )
        case "ascend":
            e = math.floor(math.log2(amax * 8 / 7 + 9.6e-7)) - 2 if format.element == "float4_e2m1" else floor - emax
    return max(-127, min(127, e))


# AMCT's own examples, amax and exponent. Its MXFP4 (amct), with the element that amax becomes:
AMCT_MXFP4 = [
    *[(0.1, -6, 6), (1, -2, 4), (1.5, -2, 6), (1.75, -2, 6), (1.76, -1, 4), (2, -1, 4), (3.5, -1, 6), (3.6, 0, 4)],
    *[(6, 0, 6), (7, 0, 6), (7.01, 1, 4), (448, 6, 6)],
]


@pytest.mark.parametrize(("amax", "exponent", "element"), AMCT_MXFP4)
def test_mxfp4_of_amct(amax: float, exponent: int, element: float) -> None:
    format = Mx("float4_e2m1", "amct")
    x = torch.zeros(1, 32)
    x[0, 5] = -amax
    scales = numerics.choose_scale(x, format, BLOCK)
    assert scales.scale.dtype == torch.float8_e8m0fnu
    assert scales.scale.view(torch.uint8).tolist() == [[exponent + 127]]
    codes = numerics.quantize(x, scales, format, BLOCK)
    assert elements.decode(codes, "float4_e2m1")[0, 5] == -element
    assert numerics.dequantize(codes, scales, format, BLOCK)[0, 5] == -element * 2.0**exponent


# Its LLM workflow takes MXFP8's exponents by the same rule; OCP's own, below, lets 449 saturate.
GOLDEN = [
    *[("amct_llm", amax, e) for amax, e in [(1, -8), (1.75, -8), (1.76, -7), (3.6, -6), (448, 0), (449, 1), (500, 1)]],
    *[("ocp", amax, e) for amax, e in [(1, -8), (1.75, -8), (1.76, -8), (448, 0), (449, 0), (512, 1)]],
    # From 1.75 on "even" adds one, "amct" only above it.
    *[("even", amax, e) for amax, e in [(1.75, -7), (1.7499999, -8), (448, 1), (447.9, 0)]],
]


@pytest.mark.parametrize(("rule", "amax", "exponent"), GOLDEN)
def test_mxfp8_exponents(rule: ExponentRule, amax: float, exponent: int) -> None:
    assert exponents(torch.tensor([amax], dtype=torch.float32), Mx("float8_e4m3fn", rule)) == [exponent]


def test_even_is_a_sum_on_the_bits() -> None:
    """AMCT's MiniMax quantizer: 2^21 is added to amax's bits, and emax taken from its exponent field."""
    amax = np.exp2(np.linspace(-120, 120, 10001)).astype(np.float32)
    amax = np.concatenate([amax, beside(1.75 * 2.0 ** np.arange(-100, 100), np.float32)])
    fields = ((amax.view(np.uint32) + (1 << 21)) >> 23).astype(int)
    assert exponents(torch.from_numpy(amax), Mx("float4_e2m1", "even")) == (fields - 127 - 2).tolist()


@pytest.mark.parametrize("format", ALL, ids=str)
def test_exponents_are_the_rules(format: Mx) -> None:
    generator = torch.Generator().manual_seed(5)
    marks = np.array([m * 2.0**e for m in (1, 1.5, 1.75, 1.875, 1.984375) for e in (-60, -30, -7, -1, 0, 1, 6, 9, 60)])
    random = (torch.rand(300, generator=generator) + 1) * 2.0 ** torch.randint(-126, 127, (300,), generator=generator)
    amax = np.concatenate([beside(marks, np.float32), random.numpy(), np.array([0, 3e38, 1e-38, 1e-45], np.float32)])
    if format == Mx("float4_e2m1", "ascend"):
        # 8 x amax is beyond float32 from 4.3e37 on; 9.6e-7 + 8/7 amax is rounded beside powers of two.
        amax = np.concatenate([random.numpy(), np.array([0, 1e-38, 1e-45, 0.1, 1.75, 7, 448], np.float32)])
        amax = amax[amax < 4e37]
    got = exponents(torch.from_numpy(amax), format)
    assert got == [expected_exponent(v, format) for v in amax.tolist()]
    # float64 blocks are not rounded to float32 first.
    wide = beside(marks, np.float64) if format.rule != "ascend" else amax.astype(np.float64)
    assert exponents(torch.from_numpy(wide), format) == [expected_exponent(v, format) for v in wide.tolist()]


def test_exponents_of_msmodelslim() -> None:
    format = Mx("float4_e2m1", "ascend")
    # floor(log2(8/7 amax + 9.6e-7)) - 2: from 1.75 on, one more; far below 9.6e-7, -20 - 2.
    amax = torch.tensor([1.0, 1.74, 1.75, 3.4, 3.5, 6.0, 7.0, 1e-9])
    assert exponents(amax, format) == [-2, -2, -1, -1, 0, 0, 1, -22]
    assert exponents(amax, Mx("float8_e4m3fn", "ascend")) == exponents(amax, Mx("float8_e4m3fn"))


def test_exponents_of_amcts_ascend_c_reference() -> None:
    amax = torch.tensor([6.0, 8.0, 8.4, 8.5, 12.0, 4.3, 4.2, 1e-12])  # 6 sqrt(2) = 8.485..., 6 / sqrt(2) = 4.242...
    assert exponents(amax, Mx("float4_e2m1", "nearest")) == [0, 0, 0, 1, 1, 0, -1, -30]


@pytest.mark.parametrize("format", ALL, ids=str)
def test_nan_and_infinity_make_a_nan_exponent(format: Mx) -> None:
    bits = mx.shared_scale(torch.tensor([torch.nan, torch.inf, 0.0]), format).view(torch.uint8).tolist()
    assert bits == [255, 255, 127 if format.rule == "amct" else 0]


@pytest.mark.parametrize("element", ELEMENTS)
def test_ceil_lets_nothing_saturate(element: MxElement) -> None:
    amax = torch.from_numpy(np.exp2(np.linspace(-100, 120, 20011)).astype(np.float32))
    scale = mx.shared_scale(amax, Mx(element, "ceil")).float()
    assert (amax / scale <= largest(element)).all()
    assert (amax / scale > largest(element) / 2).all()


@pytest.mark.parametrize("format", ALL, ids=str)
def test_blocks_against_a_loop(format: Mx) -> None:
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(9)).numpy()  # a short last block of six
    x[0, :32] *= 1e-40 / 3  # subnormal numbers
    x[0, 32:64] *= 2.0**125 / 8
    x[1, 32:64] = 0
    x[1, 64] = 1e30
    x[2, :32] = np.float32(1.75) * np.array([1, -1, 0.5, -0.5] * 8)  # halves and thresholds
    x[2, 32:40] = [8, 0.25, -0.75, 1.25, 2.5, -3.5, 5, 7]
    given = torch.from_numpy(x)
    if format == Mx("float4_e2m1", "ascend"):
        given[0, 32:64] *= 2.0**-40
    scales = numerics.choose_scale(given, format, BLOCK)
    codes = numerics.quantize(given, scales, format, BLOCK)
    values = numerics.dequantize(codes, scales, format, BLOCK)
    assert codes.dtype == (torch.int8 if format.element == "int8" else torch.uint8)
    assert scales.scale.shape == (3, 3)
    for row in range(3):
        for block in range(3):
            part = x[row, 32 * block : 32 * block + 32]
            amax = float(np.abs(part).max())
            e = scales.scale.view(torch.uint8)[row, block].item() - 127
            if format.rule != "ascend":
                assert e == expected_exponent(amax, format)
            y = part.astype(np.float64) / 2.0**e  # exact
            got = codes[row, 32 * block : 32 * block + 32].numpy()
            back = values[row, 32 * block : 32 * block + 32].numpy()
            if format.element == "int8":
                steps = np.sign(y) * np.floor(np.abs(y) * 64 + 0.5) if format.rule in AWAY else np.rint(y * 64)
                steps = np.clip(steps, -127, 127)
                assert (got == steps).all()
                expected = steps * 2.0 ** (e - 6)
            else:
                assert (got == minifloat_code(y, format.element, away=format.rule in AWAY)).all()
                table = np.array(MINIFLOATS[format.element])
                half = 1 << (elements.bits_of(format.element) - 1)
                expected = np.where(got >= half, -1, 1) * table[got % half] * 2.0**e
            assert (back == expected.astype(np.float32)).all()


@pytest.mark.parametrize("element", ["float4_e2m1", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("rule", ["ocp", "amct_llm"])
def test_halves_and_their_neighbours_under_a_scale(element: MxElement, rule: ExponentRule) -> None:
    format = Mx(element, rule)
    table = np.arange(128) / 64 if element == "int8" else np.array(MINIFLOATS[element])
    halfway = (table[1:] + table[:-1]) / 2
    y = beside(np.concatenate([halfway, -halfway]), np.float32)
    scale = Scales(torch.tensor([[2.0**-3]]).to(torch.float8_e8m0fnu))
    got = numerics.quantize(torch.from_numpy(y / 8)[None], scale, format, [-1, -1])[0].numpy()
    if element == "int8":
        exact = y.astype(np.float64) * 64
        away = np.sign(exact) * np.floor(np.abs(exact) + 0.5)
        assert (got == (away if rule == "amct_llm" else np.rint(exact))).all()
    else:
        assert (got == minifloat_code(y, element, away=rule == "amct_llm")).all()


def test_mxint8_saturates_at_127() -> None:
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([1.999, -1.999, 1.0])
    format = Mx("int8")
    scales = numerics.choose_scale(x, format, BLOCK)
    assert scales.scale.float().item() == 1
    assert numerics.quantize(x, scales, format, BLOCK)[0, :3].tolist() == [127, -127, 64]
    assert numerics.dequantize(torch.full((1, 32), -128, dtype=torch.int8), scales, format, BLOCK)[0, 0] == -2
