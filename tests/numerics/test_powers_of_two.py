"""Scales that are powers of two: what they hold, and which of them methods choose."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphq import numerics
from graphq.errors import SpecError
from graphq.numerics import Scales, power_of_two_above
from graphq.numerics.histogram import best_range, count, distribution, power_error, width_exponent
from graphq.numerics.ranges import weight_scales
from graphq.numerics.rounding import ranged
from graphq.spec.formats import Int, codes_of, parse_format, same_codes, with_codes
from graphq.spec.quant import Mse, has_powers_of_two, parse_quant, powers_of_two

S8 = Int(8, power_of_two=True)
U8 = Int(8, symmetric=False, signed=False, power_of_two=True)


def scale(low: float, high: float, format: Int = S8) -> tuple[float, int | None]:
    found, zero_point = numerics.scale_from_extremes(torch.tensor(low), torch.tensor(high), format)
    return float(found), None if zero_point is None else int(zero_point)


@pytest.mark.parametrize(
    ("low", "high", "format", "found"),
    [
        (-3.0, 127.0, S8, (1.0, None)),
        (-3.0, 127.001, S8, (2.0, None)),
        (-127.0, 3.0, S8, (1.0, None)),
        (-128.0, 3.0, S8, (2.0, None)),  # which the code -128 would hold, and +128 it would not
        (0.0, 63.5, S8, (0.5, None)),
        (0.0, 1e-3, S8, (2.0**-16, None)),
        (0.0, 0.0, S8, (1.0, None)),
        (0.0, 1e-45, S8, (2.0**-126, None)),
        (0.0, 3e38, Int(2, power_of_two=True), (2.0**127, None)),  # the largest that there is
        (0.0, 255.0, U8, (1.0, 0)),
        (-1.0, 254.0, U8, (1.0, 1)),
        (-1.0, 254.5, U8, (2.0, 0)),
        (-2.0, 254.5, U8, (2.0, 1)),
        (3.0, 255.0, U8, (1.0, 0)),
        (-7.0, 8.0, Int(4, symmetric=False, power_of_two=True), (1.0, -1)),
    ],
)
def test_scales_of_ranges(low: float, high: float, format: Int, found: tuple[float, int | None]) -> None:
    assert scale(low, high, format) == found


def test_what_is_not_finite_stays() -> None:
    found = power_of_two_above(torch.tensor([torch.nan, torch.inf, 3.0, 4.0, 2.0**-149]))
    assert found.isnan().tolist() == [True, False, False, False, False]
    assert found[1:].tolist() == [math.inf, 4.0, 4.0, 2.0**-149]


@given(st.floats(-(2.0**99), 2.0**99, width=32), st.floats(-(2.0**99), 2.0**99, width=32), st.sampled_from([S8, U8]))
def test_nothing_in_the_range_is_clipped(one: float, other: float, format: Int) -> None:
    """Every end comes back within half a step, where a zero point is rounded within a whole one."""
    x = torch.tensor([one, other])
    found = Scales(*numerics.scale_from_extremes(x.amin(), x.amax(), format))
    back = numerics.dequantize(numerics.quantize(x, found, format, [-1]), found, format, [-1])
    step = float(found.scale)
    assert math.frexp(step)[0] == 0.5
    assert float((back.double() - x.double()).abs().max()) <= step * (0.5 if format.symmetric else 1.0) * (1 + 1e-6)


def test_gradients_are_those_of_the_scale_itself() -> None:
    high = torch.tensor([3.0], requires_grad=True)
    found, _ = ranged(torch.tensor([-1.0]), high, S8)
    assert float(found) == 2.0**-5
    found.sum().backward()
    assert high.grad is not None
    assert torch.allclose(high.grad, torch.tensor([1 / 127]))


@pytest.mark.parametrize("outlier", [1.0, 9.0, 30.0])
@pytest.mark.parametrize("block", [[-1, -1], [1, -1]])
def test_mse_takes_the_halving_of_least_error(outlier: float, block: list[int]) -> None:
    w = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    w[0, 0] = outlier
    method, format = Mse(0.2, 100, 2.0, 5), Int(4, power_of_two=True)
    found = weight_scales(w, format, block, method).scale
    least = numerics.choose_scale(w, format, block).scale
    tried = torch.stack([least / 2**k for k in range(5)])
    errors = torch.stack(
        [numerics.fake_quantize(w, Scales(s), format, block).sub(w).square().sum(1, keepdim=True) for s in tried]
    )
    errors = errors.sum(1, keepdim=True) if block == [-1, -1] else errors
    assert torch.equal(found, tried.gather(0, errors.argmin(0, keepdim=True))[0])
    if outlier == 30.0:
        assert float(found[0]) < float(least[0])


def test_a_histogram_takes_the_power_of_two_of_least_error() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    x[0] = 60.0
    exponent = width_exponent(60.0)
    seen = distribution(count(x, exponent), exponent, float(x.min()), 60.0)
    ends = best_range(seen, S8, power_error(2.0))
    found, _ = scale(*ends)
    errors = {
        s: float((numerics.fake_quantize(x, Scales(torch.tensor(s)), S8, [-1]) - x).square().sum())
        for s in (2.0**k for k in range(-8, 2))
    }
    assert found == min(errors, key=lambda s: errors[s])


def test_scales_of_zeros_and_scales_for_biases_are_powers_of_two() -> None:
    codes = torch.tensor([[0, 0], [3, 1]], dtype=torch.int8)
    scales = Scales(torch.tensor([[1.0], [0.25]]))
    least = torch.tensor([[3e-7], [0.0]])  # 2^14 times that is 0.0049
    found = numerics.scales_of_zeros(codes, scales, S8, [1, -1], least=least)
    assert found.scale.flatten().tolist() == [2.0**-8, 0.25]
    exact = numerics.scales_of_zeros(codes, scales, S8, [1, -1], least=torch.tensor([[2.0**-20], [0.0]]))
    assert exact.scale.flatten().tolist() == [2.0**-6, 0.25]
    other = numerics.scales_of_zeros(codes, scales, Int(8), [1, -1], least=least)
    assert float(other.scale[0]) == pytest.approx(3e-7 * 2**14, rel=1e-6)
    wider = numerics.at_least(scales, torch.tensor([[0.3], [0.3]]), S8)
    assert wider.scale.flatten().tolist() == [1.0, 0.5]
    assert numerics.at_least(scales, torch.tensor([[0.3], [0.3]]), Int(8)).scale.flatten().tolist() == [
        1.0,
        pytest.approx(0.3),
    ]


# -- as specs write them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["int8/pow2", "int4/asym/pow2", "int8/asym/joint/pow2", "uint8/pow2", "uint16/joint/pow2", "int16/pow2"]
)
def test_the_text_of_a_format(text: str) -> None:
    format = parse_format(text)
    assert isinstance(format, Int)
    assert format.power_of_two
    assert str(format) == text
    assert has_powers_of_two(format)
    assert not has_powers_of_two(codes_of(format))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("int8/half/pow2/tensor", "pow2: scales are powers of two; half is a rule for others"),
        ("int8/by_sign/pow2/tensor", "pow2: scales are powers of two; by_sign is a rule for others"),
        (
            "int8/pow2/channel/ssz",
            "int8/pow2/channel/ssz: ssz fits scales that may be any number; those of int8/pow2 are powers of two",
        ),
        (
            "int8/pow2/channel/hqq",
            "int8/pow2/channel/hqq: hqq fits scales that may be any number; those of int8/pow2 are powers of two",
        ),
        (
            "int8/pow2/channel/source",
            (
                "int8/pow2/channel/source: source is the arithmetic of int8, int8/half, int8/asym/joint, float8_e4m3fn,"
                " nvfp4 and mx formats by the rule ascend; leave it out"
            ),
        ),
    ],
)
def test_refused(text: str, problem: str) -> None:
    with pytest.raises(SpecError) as raised:
        parse_quant(text)
    assert str(raised.value) == problem


def test_biases_have_the_scale_of_products() -> None:
    with pytest.raises(SpecError, match="pow2: scales are powers of two; those of a bias are a rule for others"):
        Int(32, power_of_two=True)
    with pytest.raises(SpecError, match="power_of_two: 1 is not true or false"):
        Int(8, power_of_two=1)  # type: ignore[arg-type]


def test_the_same_with_powers_of_two() -> None:
    texts = {
        "int8/tensor": "int8/pow2/tensor",
        "int8/half/channel": "int8/pow2/channel",
        "int8/asym/joint/tensor/mse": "int8/asym/joint/pow2/tensor/mse",
        "int8/channel/source": "int8/pow2/channel",
        "int8/token/dynamic": "int8/pow2/token/dynamic",
        "uint8/pow2/tensor": "uint8/pow2/tensor",
        "mxfp4": "mxfp4",
        "float8_e4m3fn/tensor": "float8_e4m3fn/tensor",
    }
    assert {text: str(powers_of_two(parse_quant(text))) for text in texts} == texts
    with pytest.raises(SpecError, match="ssz fits scales that may be any number"):
        powers_of_two(parse_quant("int8/channel/ssz"))


def test_formats_of_the_same_codes() -> None:
    s8, u8, half = (parse_format(text) for text in ("int8", "uint8", "int8/half"))
    assert same_codes(S8, s8)
    assert same_codes(half, S8)
    assert not same_codes(s8, u8)
    assert not same_codes(s8, parse_format("int8/asym"))
    assert not same_codes(s8, parse_format("int16"))
    assert with_codes(half, S8) is half
    assert str(with_codes(S8, u8)) == "uint8/pow2"
    assert str(with_codes(half, u8)) == "uint8"
    assert with_codes(parse_format("mxfp4"), s8) == s8
