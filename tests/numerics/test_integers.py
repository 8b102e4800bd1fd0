"""Scales, zero points and codes: worked by hand, as AMCT gives them, and their laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphq import numerics
from graphq.numerics import Scales
from graphq.spec.formats import Int
from graphq.spec.quant import PerChannel, PerGroup, PerTensor, PerToken

TINY = torch.finfo(torch.float32).tiny
FORMATS = [
    *(Int(bits, symmetric) for bits in (2, 3, 4, 5, 6, 7, 8, 16) for symmetric in (True, False)),
    *(Int(bits, divisor=divisor) for bits in (2, 4, 8) for divisor in ("half", "by_sign")),
]


def test_code_range_and_dtype() -> None:
    assert [numerics.code_range(Int(bits)) for bits in (2, 3, 4, 8, 16)] == [
        (-2, 1),
        (-4, 3),
        (-8, 7),
        (-128, 127),
        (-32768, 32767),
    ]
    assert {numerics.code_dtype(Int(bits)) for bits in range(2, 9)} == {torch.int8}
    assert numerics.code_dtype(Int(16)) == torch.int16


def test_weight_block() -> None:
    def linear(granularity):
        return numerics.weight_block(granularity, 2, out_axis=0, in_axis=1)

    assert linear(PerTensor()) == [-1, -1]
    assert linear(PerChannel()) == [1, -1]
    assert linear(PerToken()) == [1, -1]
    assert linear(PerGroup(32)) == [1, 32]
    assert numerics.weight_block(PerGroup(32), 2, out_axis=1, in_axis=0) == [32, 1]  # GPT-2's Conv1D
    assert numerics.weight_block(PerChannel(), 4, out_axis=0, in_axis=1) == [1, -1, -1, -1]
    assert numerics.weight_block(PerGroup(8), 4, out_axis=0, in_axis=1) == [1, 8, -1, -1]
    assert numerics.weight_block(PerTensor(), 3, out_axis=1, in_axis=2, own_axes=(0,)) == [1, -1, -1]
    assert numerics.weight_block(PerGroup(8), 3, out_axis=1, in_axis=2, own_axes=(0,)) == [1, 1, 8]


def test_activation_block() -> None:
    assert numerics.activation_block(PerToken(), 3) == [1, 1, -1]
    assert numerics.activation_block(PerTensor(), 3) == [-1, -1, -1]


def test_block_extremes_of_a_short_last_group() -> None:
    x = torch.tensor([[1.0, -2, 3, 4, 5, 6, -7, 8, 9, -10]])
    low, high = numerics.block_extremes(x, [1, 4])
    assert low.tolist() == [[-2, -7, -10]]
    assert high.tolist() == [[4, 8, 9]]


def test_block_extremes_along_every_axis() -> None:
    x = torch.arange(24.0).reshape(4, 6)
    cases = {
        (-1, -1): ([[0]], [[23]]),
        (1, -1): ([[0], [6], [12], [18]], [[5], [11], [17], [23]]),
        (-1, 1): ([[0, 1, 2, 3, 4, 5]], [[18, 19, 20, 21, 22, 23]]),
        (3, 4): ([[0, 4], [18, 22]], [[15, 17], [21, 23]]),
        (4, 6): ([[0]], [[23]]),
        (9, 9): ([[0]], [[23]]),
    }
    for block, (low, high) in cases.items():
        got_low, got_high = numerics.block_extremes(x, block)
        assert (got_low.tolist(), got_high.tolist()) == (low, high), block


def test_a_block_without_elements_has_scale_1() -> None:
    scale, zero_point, _ = numerics.choose_scale(torch.empty(0, 3), Int(8, symmetric=False), [-1, -1])
    assert scale.tolist() == [[1]]
    assert zero_point is not None
    assert zero_point.tolist() == [[-128]]
    scale, _, _ = numerics.choose_scale(torch.empty(0, 3), Int(8), [1, -1])
    assert scale.shape == (0, 1)
    assert numerics.quantize(torch.empty(0, 3), Scales(scale), Int(8), [1, -1]).shape == (0, 3)


# A range (largest, smallest), its scale and its zero point: AMCT's own numbers, in the seven digits it prints.
AMCT_RANGES = [
    (Int(8, divisor="by_sign"), (1, -0.5), 0.0078740157, None),
    (Int(8, divisor="by_sign"), (0.5, -1), 0.0078125, None),
    (Int(4, divisor="by_sign"), (1, -0.5), 1 / 7, None),
    (Int(4, divisor="by_sign"), (0.5, -1), 0.125, None),
    (Int(8, symmetric=False), (1, -0.5), 0.00588235306, -43),
    (Int(8, symmetric=False), (1, 0.2), 0.00392156886, -128),
    (Int(8, symmetric=False), (-0.1, -0.5), 0.00196078443, 127),
    (Int(8, symmetric=False), (0, 0), 1.0, -128),
    (Int(4, symmetric=False), (1, -0.5), 0.1, -3),
]


@pytest.mark.parametrize(("format", "extremes", "scale", "zero_point"), AMCT_RANGES)
def test_scales_are_amcts(format: Int, extremes: tuple[float, float], scale: float, zero_point: int | None) -> None:
    high, low = map(torch.tensor, map(float, extremes))
    got, got_zero_point = numerics.scale_from_extremes(low, high, format)
    assert got.dtype == torch.float32
    assert got.item() == np.float32(scale)
    assert (None if got_zero_point is None else got_zero_point.item()) == zero_point


WEIGHT = torch.tensor([[0.1, -0.7, 0.35, 1.0], [-2.0, 0.5, 0.25, 1.5]])
AMCT_WEIGHTS = [
    (
        Int(8, divisor="by_sign"),
        [1, -1],
        [[0.0078740157], [0.015625]],
        None,
        [[13, -89, 44, 127], [-128, 32, 16, 96]],
    ),
    (Int(8, symmetric=False), [-1, -1], [[0.0137254903]], [[18]], [[25, -33, 44, 91], [-128, 54, 36, 127]]),
    (Int(4, divisor="by_sign"), [1, -1], [[1 / 7], [0.25]], None, [[1, -5, 2, 7], [-8, 2, 1, 6]]),
    (
        Int(4, symmetric=False),
        [1, -1],
        [[0.113333337], [0.233333334]],
        [[-2], [1]],
        [[-1, -8, 1, 7], [-8, 3, 2, 7]],
    ),
]


@pytest.mark.parametrize(("format", "block", "scale", "zero_point", "codes"), AMCT_WEIGHTS)
def test_weights_are_amcts(format: Int, block: list[int], scale, zero_point, codes) -> None:
    got, got_zero_point, _ = numerics.choose_scale(WEIGHT, format, block)
    assert torch.equal(got, torch.tensor(scale))
    assert (None if got_zero_point is None else got_zero_point.tolist()) == zero_point
    assert numerics.quantize(WEIGHT, Scales(got, got_zero_point), format, block).tolist() == codes


def test_symmetric_divisors() -> None:
    def scale(low: float, high: float, format: Int) -> float:
        return numerics.scale_from_extremes(torch.tensor(low), torch.tensor(high), format)[0].item()

    # 105 / 7 = 15, 105 / 7.5 = 14, 105 / 8 = 13.125, exactly
    assert scale(-3, 105, Int(4)) == 15
    assert scale(-105, 3, Int(4)) == 15
    assert scale(-3, 105, Int(4, divisor="half")) == 14
    assert scale(-105, 3, Int(4, divisor="half")) == 14
    assert scale(-3, 105, Int(4, divisor="by_sign")) == 15
    assert scale(-105, 3, Int(4, divisor="by_sign")) == 13.125
    assert scale(-105, 105, Int(4, divisor="by_sign")) == 15  # a tie is positive
    assert scale(-1, 1, Int(2)) == 1
    assert scale(-3, 3, Int(2, divisor="half")) == 2


def test_halves_round_to_even_and_codes_saturate() -> None:
    x = torch.tensor([-100.0, -8.5, -2.5, -1.5, -0.5, -0.0, 0.5, 1.5, 2.5, 7.5, 100.0, torch.inf, -torch.inf])
    codes = numerics.quantize(x, Scales(torch.ones(1)), Int(4), [-1])
    assert codes.tolist() == [-8, -8, -2, -2, 0, 0, 0, 2, 2, 7, 7, 7, -8]
    # The zero point is added to the rounded quotient: an odd one does not change which way a half goes.
    codes = numerics.quantize(
        x, Scales(torch.ones(1), torch.tensor([3], dtype=torch.int8)), Int(4, symmetric=False), [-1]
    )
    assert codes.tolist() == [-8, -5, 1, 1, 3, 3, 3, 5, 5, 7, 7, 7, -8]


def test_groups_with_a_short_last_one() -> None:
    x = torch.tensor([[7.0, -3, 2, 1, 14, -6, 4, 2, 70, -35], [0, 0, 0, 0, 7, 7, 7, 7, -7, 0]])
    scale, zero_point, _ = numerics.choose_scale(x, Int(4), [1, 4])
    assert zero_point is None
    assert scale.tolist() == [[1, 2, 10], [1, 1, 1]]  # a group of zeros has scale 1
    codes = numerics.quantize(x, Scales(scale), Int(4), [1, 4])
    assert codes.tolist() == [[7, -3, 2, 1, 7, -3, 2, 1, 7, -4], [0, 0, 0, 0, 7, 7, 7, 7, -7, 0]]
    back = numerics.dequantize(codes, Scales(scale), Int(4), [1, 4])
    assert back.tolist() == [[7, -3, 2, 1, 14, -6, 4, 2, 70, -40], [0, 0, 0, 0, 7, 7, 7, 7, -7, 0]]


def test_asymmetric_groups_with_a_short_last_one() -> None:
    x = torch.tensor([[0.0, 15, 3, 6, -15, 0, -6, -3, 10, 20]])
    scale, zero_point, _ = numerics.choose_scale(x, Int(4, symmetric=False), [1, 4])
    assert zero_point is not None
    assert torch.equal(scale, torch.tensor([[1, 1, 20 / 15]]))
    assert zero_point.tolist() == [[-8, 7, -8]]
    codes = numerics.quantize(x, Scales(scale, zero_point), Int(4, symmetric=False), [1, 4])
    assert codes.tolist() == [[-8, 7, -5, -2, -8, 7, 1, 4, 0, 7]]  # 10 is 7.5 scales: 8, to even
    assert numerics.dequantize(codes, Scales(scale, zero_point), Int(4, symmetric=False), [1, 4]).tolist()[0][:8] == [
        0,
        15,
        3,
        6,
        -15,
        0,
        -6,
        -3,
    ]


def test_one_scale_per_token_and_per_channel() -> None:
    x = torch.tensor([[[127.0, 0], [254, 2]], [[0, -127], [1270, 10]]])
    scale, _, _ = numerics.choose_scale(x, Int(8), numerics.activation_block(PerToken(), 3))
    assert scale.tolist() == [[[1], [2]], [[1], [10]]]
    assert numerics.quantize(x, Scales(scale), Int(8), [1, 1, -1]).tolist() == [
        [[127, 0], [127, 1]],
        [[0, -127], [127, 1]],
    ]
    scale, _, _ = numerics.choose_scale(x[0].t(), Int(8), [-1, 1])  # channels along the second axis
    assert scale.tolist() == [[1, 2]]


def test_groups_of_experts_and_of_transposed_weights() -> None:
    w = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(0))
    scale, zero_point, _ = numerics.choose_scale(w, Int(4, symmetric=False), [1, 1, 4])
    codes = numerics.quantize(w, Scales(scale, zero_point), Int(4, symmetric=False), [1, 1, 4])
    assert scale.shape == (3, 5, 3)
    for expert in range(3):
        own, own_zero_point, _ = numerics.choose_scale(w[expert], Int(4, symmetric=False), [1, 4])
        assert torch.equal(own, scale[expert])
        transposed, _, _ = numerics.choose_scale(w[expert].t(), Int(4, symmetric=False), [4, 1])
        assert torch.equal(transposed, own.t())
        assert torch.equal(
            numerics.quantize(w[expert], Scales(own, own_zero_point), Int(4, symmetric=False), [1, 4]), codes[expert]
        )


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_blocks_of_zeros(format: Int) -> None:
    scale, zero_point, _ = numerics.choose_scale(torch.zeros(2, 3), format, [1, -1])
    assert scale.tolist() == [[1], [1]]
    assert zero_point is None or zero_point.tolist() == [[numerics.code_range(format)[0]]] * 2
    codes = numerics.quantize(torch.zeros(2, 3), Scales(scale, zero_point), format, [1, -1])
    assert torch.equal(numerics.dequantize(codes, Scales(scale, zero_point), format, [1, -1]), torch.zeros(2, 3))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_by_sign_takes_no_scale_below_2_to_the_minus_23(bits: int) -> None:
    """AMCT's rule: a smaller scale is 1, whose codes of so small a block are 0."""
    format, steps = Int(bits, divisor="by_sign"), 2 ** (bits - 1) - 1
    for magnitude in (1e-45, 1e-38, 1e-8, 2.0**-24 * steps):
        x = torch.tensor([[0.0, magnitude]])
        scales = numerics.choose_scale(x, format, [1, -1])
        assert scales.scale.item() == 1
        assert numerics.quantize(x, scales, format, [1, -1]).tolist() == [[0, 0]]
    assert numerics.choose_scale(torch.tensor([2.0**-23 * steps]), format, [-1]).scale.item() == 2.0**-23


@pytest.mark.parametrize("format", [f for f in FORMATS if f.divisor != "by_sign"], ids=str)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 2e38], ids=str)
def test_denormal_and_huge_values(format: Int, magnitude: float) -> None:
    x = torch.tensor([[-magnitude, magnitude / 2, 0.0, magnitude]])
    scale, zero_point, _ = numerics.choose_scale(x, format, [1, -1])
    assert TINY <= scale.item() < math.inf
    assert (scale.item() == TINY) == (magnitude < TINY)
    codes = numerics.quantize(x, Scales(scale, zero_point), format, [1, -1])
    back = numerics.dequantize(codes, Scales(scale, zero_point), format, [1, -1])
    # Half a scale for rounding the value, and half for rounding the zero point; 2^-20 of the magnitude for float32.
    assert ((x.double() - back.double()).abs() <= scale.double() + magnitude * 2**-20).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_do_not_become_numbers(wrong: float, symmetric: bool) -> None:
    x = torch.tensor([[1.0, wrong, 2.0], [3.0, 4.0, 5.0]])
    scale, zero_point, _ = numerics.choose_scale(x, Int(8, symmetric), [1, -1])
    codes = numerics.quantize(x, Scales(scale, zero_point), Int(8, symmetric), [1, -1])
    back = numerics.dequantize(codes, Scales(scale, zero_point), Int(8, symmetric), [1, -1])
    assert not back[0].isfinite().any()
    assert back[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, symmetric: bool) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    format = Int(8, symmetric)
    scale, zero_point, _ = numerics.choose_scale(x, format, [1, 16])
    assert scale.dtype == torch.float32
    codes = numerics.quantize(x, Scales(scale, zero_point), format, [1, 16])
    expected, expected_zero_point, _ = numerics.choose_scale(x.float(), format, [1, 16])
    assert torch.equal(scale, expected)
    assert torch.equal(codes, numerics.quantize(x.float(), Scales(expected, expected_zero_point), format, [1, 16]))


def test_a_half_precision_scale_is_multiplied_in_float32() -> None:
    scale = torch.tensor([[0.1]], dtype=torch.bfloat16)
    codes = torch.tensor([[30001, -32768]], dtype=torch.int16)  # bfloat16 holds integers up to 256
    zero_point = torch.tensor([[-2]], dtype=torch.int16)
    back = numerics.dequantize(codes, Scales(scale, zero_point), Int(16, symmetric=False), [1, -1])
    assert back.dtype == torch.float32
    assert back.tolist() == [[np.float32(30003) * scale.float().item(), np.float32(-32766) * scale.float().item()]]


def test_float64_stays_float64() -> None:
    x = torch.tensor([[1 / 3, -1.0, 2 / 7]], dtype=torch.float64)
    scale, zero_point, _ = numerics.choose_scale(x, Int(16, symmetric=False), [1, -1])
    assert scale.dtype == torch.float64
    assert scale.item() == (1 / 3 + 1) / 65535
    codes = numerics.quantize(x, Scales(scale, zero_point), Int(16, symmetric=False), [1, -1])
    assert (
        numerics.dequantize(codes, Scales(scale, zero_point), Int(16, symmetric=False), [1, -1]).dtype == torch.float64
    )
    # A float32 scale does not lower the precision of a float64 tensor.
    fine = torch.tensor([[0.5 + 2**-40]], dtype=torch.float64)
    assert numerics.quantize(fine, Scales(torch.ones(1, 1)), Int(8), [-1, -1]).item() == 1
    assert numerics.quantize(fine.float(), Scales(torch.ones(1, 1)), Int(8), [-1, -1]).item() == 0


def test_a_scale_without_axes_serves_the_whole_tensor() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    zero_point = torch.tensor(1, dtype=torch.int8)
    codes = numerics.quantize(x, Scales(torch.tensor(0.5), zero_point), Int(8, symmetric=False), [-1, -1])
    assert codes.tolist() == [[3, 5], [7, 9]]
    assert torch.equal(
        numerics.dequantize(codes, Scales(torch.tensor(0.5), zero_point), Int(8, symmetric=False), [-1, -1]), x
    )
    scale = torch.full((1, 1), 0.5)
    x = torch.arange(16.0).reshape(2, 8)
    assert numerics.quantize(x, Scales(scale), Int(8), [1, 4]).tolist() == (2 * x).tolist()


@st.composite
def tensors_and_blocks(draw) -> tuple[Tensor, list[int]]:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    block = [draw(st.sampled_from([-1, 1, 2, 3, 8])) for _ in shape]
    numbers = st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1e-3, -1e-3])
    values = draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values).reshape(shape), block


@given(tensors_and_blocks(), st.sampled_from(FORMATS))
def test_laws_of_min_max_quantization(drawn: tuple[Tensor, list[int]], format: Int) -> None:
    x, block = drawn
    scale, zero_point, _ = numerics.choose_scale(x, format, block)
    codes = numerics.quantize(x, Scales(scale, zero_point), format, block)
    lowest, highest = numerics.code_range(format)
    assert codes.dtype == numerics.code_dtype(format)
    assert codes.shape == x.shape
    assert codes.min() >= lowest
    assert codes.max() <= highest
    assert scale.shape == tuple(1 if b < 0 else -(-n // b) for n, b in zip(x.shape, block, strict=True))
    back = numerics.dequantize(codes, Scales(scale, zero_point), format, block)
    steps = numerics.expand_scale(scale, x, block)
    # Half a scale, for rounding; by_sign's range ends at 127/128 of its smaller side, which costs up to a whole one.
    # 2^-16: 16-bit codes times float32's rounding of x / scale, 2^-24, with room for the zero point's.
    share = 1 if format.divisor == "by_sign" else 0.5
    assert ((x - back).abs() <= steps * (share + 2**-7 * (format.bits == 16) + 2**-14) + TINY).all()
    if format.symmetric:
        assert (codes[x == 0] == 0).all()
    assert (back[x == 0] == 0).all()
    assert torch.equal(numerics.quantize(back, Scales(scale, zero_point), format, block), codes)
    if zero_point is not None:
        assert zero_point.min() >= lowest
        assert zero_point.max() <= highest


def test_parse_format_reads_what_str_wrote() -> None:
    for format in FORMATS:
        assert numerics.parse_format(str(format)) == format


def test_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert numerics.sqnr_db(x, torch.tensor([3.0, 3.5])) == pytest.approx(20, abs=1e-12)  # 25 / 0.25, in float64
    assert numerics.sqnr_db(x, x) == math.inf
    assert numerics.sqnr_db(torch.zeros(2), x) == -math.inf
    assert math.isnan(numerics.sqnr_db(x, torch.tensor([3.0, torch.nan])))
