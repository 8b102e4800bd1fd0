"""What holds for every format and every way to cut a tensor into blocks."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphq
from graphq import numerics
from graphq.numerics import Scales, elements
from graphq.numerics.codes import code_values
from graphq.spec.formats import Float, FloatLayout, Format, Int, Mx, Nvfp4, TwoLevel, element_name
from tests.numerics.tables import MINIFLOATS

FORMATS: list[Format] = [
    *(Int(bits, symmetric) for bits in (2, 3, 4, 5, 6, 7, 8, 16) for symmetric in (True, False)),
    *(Int(bits, divisor=divisor) for bits in (4, 8) for divisor in ("half", "by_sign")),
    *(
        Int(bits, symmetric=False, signed=False, joint=joint, power_of_two=power_of_two)
        for bits in (8, 16)
        for joint in (False, True)
        for power_of_two in (False, True)
    ),
    *(Int(bits, symmetric, power_of_two=True) for bits in (4, 8) for symmetric in (True, False)),
    *(Int(bits, symmetric=False, joint=True) for bits in (4, 8)),
    *(Float(layout, scale) for layout in get_args(FloatLayout) for scale in ("max", "pow2")),
    Float("hifloat8", "to15"),
    Float("hifloat8", "unit"),
    *(
        Mx(element, rule)
        for element in ("float8_e4m3fn", "float8_e5m2", "float6_e2m3", "float6_e3m2", "float4_e2m1", "int8")
        for rule in ("ocp", "even", "amct", "amct_llm", "nearest", "ceil", "ascend")
    ),
    Nvfp4(),
    TwoLevel("int4"),
    TwoLevel("float4_e2m1"),
]
UNIT = Float("hifloat8", "unit")  # every scale is 1
ONE_LEVEL = [format for format in FORMATS if not isinstance(format, TwoLevel)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN where the other is NaN; zeros may differ in sign, which rounding without codes does not keep."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def through_codes(x: Tensor, scales: Scales, format: Format, block: list[int]) -> Tensor:
    codes = numerics.quantize(x, scales, format, block)
    assert codes.dtype == numerics.code_dtype(format)
    assert codes.shape == x.shape
    return numerics.dequantize(codes, scales, format, block).to(x.dtype)


NUMBERS = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, 1e-3, 3e38, -3e38, 1e-38, 1e-42, 1e-45, 65504.0])


@st.composite
def tensors_and_blocks(draw, numbers=NUMBERS) -> tuple[Tensor, list[int]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    block = [draw(st.sampled_from([-1, 1, 2, 3, 8])) for _ in shape]
    values = draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    x = torch.tensor(values).reshape(shape)
    if draw(st.booleans()):
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x, block


def with_channels(block: list[int]) -> list[int]:
    """A block that formats of two levels have: groups of single channels."""
    return [1] * (len(block) - 1) + [abs(block[-1]) + 1]


@settings(max_examples=2 * settings().max_examples)
@given(st.sampled_from(FORMATS), tensors_and_blocks())
def test_fake_quantize_is_quantize_and_dequantize(format: Format, drawn: tuple[Tensor, list[int]]) -> None:
    x, block = drawn
    block = with_channels(block) if isinstance(format, TwoLevel) else block
    dtypes = [torch.float32, torch.bfloat16]
    if isinstance(format, Int | Float):
        dtypes.append(torch.float64)  # the others' scales are not float64, and so dequantize gives float32
    for dtype in dtypes:
        given = x.to(dtype)
        scales = numerics.choose_scale(given, format, block)
        got = numerics.fake_quantize(given, scales, format, block)
        assert not got.isnan().any()  # 3e38 may go up to 2^128, which is infinity
        assert same_bits(got, through_codes(given, scales, format, block))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_fake_quantize_of_parts(format: Format) -> None:
    """More than 2^18 elements, which are worked on some rows at a time."""
    generator = torch.Generator().manual_seed(2)
    cases = [((700, 513), [1, 32]), ((3, 100000), [1, 32])]
    if not isinstance(format, TwoLevel):
        cases += [((700, 513), [-1, -1]), ((700, 513), [1, -1]), ((700, 513), [128, 128]), ((300001,), [16])]
        cases += [((300001,), [-1]), ((65, 65, 65), [2, 1, 3]), ((513, 700), [48, 1])]
    for shape, block in cases:
        x = torch.randn(shape, generator=generator)
        scales = numerics.choose_scale(x, format, block)
        assert same_bits(numerics.fake_quantize(x, scales, format, block), through_codes(x, scales, format, block))


@settings(max_examples=2 * settings().max_examples)
@given(st.sampled_from(ONE_LEVEL), tensors_and_blocks(st.floats(-100, 100, width=16)))
def test_quantized_values_stay(format: Format, drawn: tuple[Tensor, list[int]]) -> None:
    # Not of two levels: 8 bits in between do not hold every product of 4-bit code and scale.
    x, block = drawn
    scales = numerics.choose_scale(x, format, block)
    once = numerics.fake_quantize(x, scales, format, block)
    assert torch.equal(numerics.fake_quantize(once, scales, format, block), once)


@settings(max_examples=2 * settings().max_examples)
@given(st.sampled_from(FORMATS), st.lists(NUMBERS, min_size=2, max_size=40))
def test_order_is_kept(format: Format, numbers: list[float]) -> None:
    x = torch.tensor([sorted(numbers)])
    block = [1, 64]
    values = numerics.fake_quantize(x, numerics.choose_scale(x, format, block), format, block)[0]
    assert (values[1:] >= values[:-1]).all()


@settings(max_examples=2 * settings().max_examples)
@given(
    st.sampled_from([f for f in ONE_LEVEL if not isinstance(f, Nvfp4)]),
    tensors_and_blocks(st.floats(-100, 100, width=32)),
    st.integers(-20, 20),
)
def test_powers_of_two_pass_through(format: Format, drawn: tuple[Tensor, list[int]], k: int) -> None:
    x, block = drawn
    if format == UNIT or (isinstance(format, Mx) and format.rule in ("nearest", "ascend")):
        k = 0  # their exponents have a floor
    x = torch.where(x.abs() < 1e-3, 0.0, x)
    scales, larger = numerics.choose_scale(x, format, block), numerics.choose_scale(x * 2.0**k, format, block)
    assert torch.equal(
        numerics.fake_quantize(x * 2.0**k, larger, format, block),
        numerics.fake_quantize(x, scales, format, block) * 2.0**k,
    )


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_code_comes_back(format: Format) -> None:
    if isinstance(format, Int):
        lowest, highest = numerics.code_range(format)
        codes = torch.arange(lowest, highest + 1).to(numerics.code_dtype(format))
    elif format == TwoLevel("int4"):
        codes = torch.arange(-8, 8, dtype=torch.int8)
    elif element_name(format) == "int8":
        codes = torch.arange(-127, 128, dtype=torch.int8)  # -128 is read, and never written
    else:
        element = element_name(format)
        codes = torch.arange(1 << elements.bits_of(element), dtype=torch.uint8)
        values = elements.decode(codes, element)
        codes = codes[~values.isnan() & (values.isfinite() | torch.tensor(element == "hifloat8"))]
    if format == TwoLevel("float4_e2m1"):
        codes = codes[codes != 8]  # the float8 level has one zero
    values = code_values(codes, format)
    scales = torch.ones(1, 1)
    if isinstance(format, Mx):
        scales = scales.to(torch.float8_e8m0fnu)
    upper = torch.ones(1, 1) if isinstance(format, Nvfp4 | TwoLevel) else None
    zero_point = torch.zeros(1, 1, dtype=numerics.code_dtype(format)) if isinstance(format, Int) and not format.symmetric else None  # fmt: skip
    given = Scales(scales, zero_point, upper)
    assert torch.equal(numerics.quantize(values[None], given, format, [1, -1])[0], codes)
    assert torch.equal(numerics.dequantize(codes[None], given, format, [1, -1])[0], values)


# -- blocks


def block_loop(x: Tensor, format: Format, block: list[int]) -> Tensor:
    """Every block of a matrix on its own."""
    out = torch.empty_like(x)
    rows, columns = (n if b < 0 else b for n, b in zip(x.shape, block, strict=True))
    for r in range(0, x.shape[0], rows):
        for c in range(0, x.shape[1], columns):
            part = x[r : r + rows, c : c + columns]
            scales = numerics.choose_scale(part, format, [-1, -1])
            out[r : r + rows, c : c + columns] = numerics.fake_quantize(part, scales, format, [-1, -1])
    return out


@pytest.mark.parametrize(
    "block", [[128, 128], [1, 32], [1, 50], [1, -1], [-1, -1], [64, 1], [-1, 7], [1000, 3]], ids=str
)
@pytest.mark.parametrize("format", [Int(4), Int(8, symmetric=False), Float("float8_e4m3fn"), Float("hifloat8", "pow2"), Mx("float4_e2m1", "even"), Mx("int8")], ids=str)  # fmt: skip
def test_a_block_is_quantized_as_if_alone(format: Format, block: list[int]) -> None:
    x = torch.randn(131, 161, generator=torch.Generator().manual_seed(4))  # edges of 3 rows and 33 columns
    x[:, 160] *= 100
    x[130] *= 1e-30
    scales = numerics.choose_scale(x, format, block)
    assert list(scales.scale.shape) == [1 if b < 0 else -(-n // b) for n, b in zip(x.shape, block, strict=True)]
    assert torch.equal(numerics.fake_quantize(x, scales, format, block), block_loop(x, format, block))
    assert torch.equal(through_codes(x, scales, format, block), block_loop(x, format, block))


@pytest.mark.parametrize(
    ("quant", "block"),
    [
        ("float8_e4m3fn/128x128", [128, 128]),
        ("float8_e4m3fn/tensor", [-1, -1]),
        ("hifloat8/channel", [1, -1]),
        ("float8_e5m2/token/dynamic", [1, -1]),
        ("float6_e2m3/g48", [1, 48]),
        ("mxfp8_e4m3/even", [1, 32]),
    ],
)
def test_granularities_of_the_public_function(quant: str, block: list[int]) -> None:
    x = torch.randn(131, 161, generator=torch.Generator().manual_seed(4))
    format = numerics.parse_format("mxfp8_e4m3/even" if quant.startswith("mx") else quant.split("/", maxsplit=1)[0])
    assert torch.equal(graphq.fake_quantize(x, quant), block_loop(x, format, block))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_zeros_tiny_and_huge_numbers(format: Format) -> None:
    x = torch.zeros(4, 32)
    x[1] = torch.linspace(-1, 1, 32) * 1.5e38
    x[2] = torch.linspace(-1, 1, 32) * 1e-38
    x[3, 3] = 1e-45
    block = [1, 32]
    scales = numerics.choose_scale(x, format, block)
    assert scales.scale.float().isfinite().all()
    assert (scales.scale.float() > 0).all()
    got = numerics.fake_quantize(x, scales, format, block)
    assert got.isfinite().all()
    assert (got[0] == 0).all()
    # Nothing grows beyond the next value: no step is longer than the largest magnitude.
    assert (got.double().abs() <= 2 * x.double().abs().amax(1, keepdim=True) + 2.0**-126).all()
    if not isinstance(format, Nvfp4) and format != UNIT:
        assert got[1].abs().max() > 7e37


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", [f for f in ONE_LEVEL if not isinstance(f, Nvfp4)], ids=str)
def test_nan_and_infinity_never_become_numbers(format: Format, bad: float) -> None:
    x = torch.linspace(-2, 2, 64).repeat(2, 1)
    x[0, 40] = bad
    scales = numerics.choose_scale(x, format, [1, 32])
    for back in (numerics.fake_quantize(x, scales, format, [1, 32]), through_codes(x, scales, format, [1, 32])):
        assert not back[0, 32:].isfinite().any()
        assert back[0, :32].isfinite().all()
        assert back[1].isfinite().all()


# -- powers of two as scales


@pytest.mark.parametrize("layout", get_args(FloatLayout))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pow2_is_the_smallest_that_holds_all(layout, dtype: torch.dtype) -> None:
    full = 16.0 if layout == "hifloat8" else MINIFLOATS[layout][-1]
    exact = full * 2.0 ** torch.arange(-60, 60, dtype=dtype)
    below, above = (torch.nextafter(exact, torch.full_like(exact, to)) for to in (-math.inf, math.inf))
    amax = torch.cat([exact, below, above])
    scale, _ = numerics.scale_from_extremes(-amax, torch.zeros_like(amax), Float(layout, "pow2"))
    assert scale.dtype == dtype
    assert torch.equal(scale.double(), 2.0 ** torch.tensor([math.frexp(v)[1] - 1.0 for v in scale.tolist()]).double())
    assert (amax.double() <= scale.double() * full).all()
    assert (amax.double() > scale.double() * full / 2).all()


def test_pow2_of_tiny_and_huge_extremes() -> None:
    for layout in get_args(FloatLayout):
        amax = torch.tensor([0.0, 1e-45, 3.4e38])
        scale, _ = numerics.scale_from_extremes(-amax, amax, Float(layout, "pow2"))
        assert scale[0] == 1
        assert scale[1] == 2.0**-126
        assert scale[2].isfinite()
        if layout != "float4_e1m2":  # 3.4e38 / 1.75 would take 2^128, which float32 has not
            full = 16.0 if layout == "hifloat8" else MINIFLOATS[layout][-1]
            assert scale[2].item() == 2.0 ** math.ceil(math.log2(3.4e38 / full))
