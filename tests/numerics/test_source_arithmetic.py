"""Weights computed in the dtype of their source, as msModelSlim and compressed-tensors do: by hand, beside torch's own
16-bit ops, and beside compressed-tensors itself.
"""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

import graphq
from graphq import numerics
from graphq.frontends.llm_compressor.args import write_args
from graphq.numerics import Scales
from graphq.numerics.codes import code_values
from graphq.numerics.source_arithmetic import source_codes, source_scales
from graphq.spec.formats import Float, Int, Mx
from graphq.spec.quant import MinMax, Ssz, parse_quant

BLOCK = [1, -1]


def quantized(w: Tensor, dtype: torch.dtype, bits: int = 8) -> tuple[list[float], list[list[int]]]:
    scales = source_scales(w, dtype, Int(bits), BLOCK, MinMax())
    assert scales.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    return scales.scale.flatten().tolist(), source_codes(w, dtype, scales, Int(bits), BLOCK).tolist()


def in_float32(w: Tensor) -> list[list[int]]:
    return numerics.quantize(w, numerics.choose_scale(w, Int(8), BLOCK), Int(8), BLOCK).tolist()


def test_bfloat16_by_hand() -> None:
    # 1 / 127 = 0.00787402 is 129 * 2^-14 in bfloat16. 177 * 2^-12 / that = 5.48837, 5.5 in steps of 2^-5: 6, where
    # float32 has 5.48804: 5. 193 * 2^-14 / that = 1.49612, 1.5 in steps of 2^-7: 2, where float32 has 1.49603: 1.
    w = torch.tensor([[1.0, 177 * 2.0**-12, 193 * 2.0**-14, -177 * 2.0**-12, 0.5]])
    assert quantized(w, torch.bfloat16) == ([129 * 2.0**-14], [[127, 6, 2, -6, 64]])
    assert in_float32(w) == [[127, 5, 1, -5, 64]]


def test_float16_by_hand() -> None:
    # 1 / 127 is 1032 * 2^-17. 1225 * 2^-14 / that = 9.49612, 9.5 in steps of 2^-7: 10, where float32 has 9.49554: 9.
    w = torch.tensor([[1.0, 1225 * 2.0**-14, -1225 * 2.0**-14]])
    assert quantized(w, torch.float16) == ([1032 * 2.0**-17], [[127, 10, -10]])
    assert in_float32(w) == [[127, 9, -9]]


def test_float32_is_as_ever() -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    scales = source_scales(w, torch.float32, Int(8), BLOCK, MinMax())
    assert torch.equal(scales.scale, numerics.choose_scale(w, Int(8), BLOCK).scale)
    assert source_codes(w, torch.float32, scales, Int(8), BLOCK).tolist() == in_float32(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_scale_is_below_2_to_the_minus_23(dtype: torch.dtype) -> None:
    w = torch.tensor([[0.0, 0], [2.0**-18, 2.0**-20], [127, 1]])
    scales, codes = quantized(w, dtype)
    assert scales == [2.0**-23, 2.0**-23, 1]
    assert codes == [[0, 0], [32, 8], [127, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_as_torch_computes_in_16_bits(dtype: torch.dtype, bits: int) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    largest = 2 ** (bits - 1) - 1
    theirs = torch.maximum(-w.amin(1, keepdim=True), w.amax(1, keepdim=True)) / float(largest)
    codes = (w / theirs).round().clamp(-largest - 1, largest)
    scales = source_scales(w.float(), dtype, Int(bits), BLOCK, MinMax())
    assert torch.equal(scales.scale, theirs.float())
    assert torch.equal(source_codes(w.float(), dtype, scales, Int(bits), BLOCK), codes.to(torch.int8))
    ours = numerics.quantize(w, numerics.choose_scale(w, Int(bits), BLOCK), Int(bits), BLOCK)
    assert (ours != codes).any()  # or this would test nothing


def test_the_weight_is_rounded_first() -> None:
    w = torch.tensor([[1.0, 0.5 + 2.0**-12]])  # 0.5 in bfloat16: 63.5 of 127, 63.50 in its steps of 2^-2
    assert quantized(w, torch.bfloat16)[1] == [[127, 64]]
    scale = torch.tensor([[2.0**-7]])
    codes = source_codes(
        torch.tensor([[0.5 * 2.0**-7 + 2.0**-18]]), torch.bfloat16, numerics.Scales(scale), Int(8), BLOCK
    )
    assert codes.tolist() == [[0]]  # 0.50049 would be 1


def test_scales_of_ssz_are_rounded() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    scale = source_scales(w.float(), torch.bfloat16, Int(4), BLOCK, Ssz()).scale
    assert torch.equal(scale, scale.to(torch.bfloat16).float())
    plain = numerics.choose_scale(w, Int(4), BLOCK).scale
    assert (scale < plain).any()
    found = source_scales(w.float(), torch.float32, Int(4), BLOCK, Ssz()).scale
    assert torch.equal(scale, found.to(torch.bfloat16).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "text",
    [
        *("int8/half/channel", "int4/half/g32", "int3/half/tensor", "int4/asym/joint/g32", "int8/asym/joint/channel"),
        *("float8_e4m3fn/channel", "float8_e4m3fn/tensor", "float8_e4m3fn/16x32", "float4_e2m1/g32", "nvfp4"),
    ],
)
def test_as_compressed_tensors_computes(text: str, dtype: torch.dtype) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    quant = parse_quant(f"{text}/source")
    format: Any = quant.format
    said: Any = write_args(quant, "weights")
    args, no_zero_point = QuantizationArgs(**said), cast(Any, None)
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(4)).to(dtype)
    w[3] = 0
    w[4] = w[4].abs() + 0.5
    w[5, :32] = 0
    block = numerics.weight_block(quant.granularity, 2, 0, 1)
    low, high = numerics.block_extremes(w, block)
    whole = generate_gparam(w.amin().view(1), w.amax().view(1)) if text == "nvfp4" else None
    scale, zero_point = calculate_qparams(low, high, args, global_scale=whole)
    scales = source_scales(w.float(), dtype, format, block, MinMax())
    alive = (high > 0) | (low < 0)
    same = alive if isinstance(format, Float) else torch.ones_like(alive)  # of floats zeros have msModelSlim's 2^-23
    assert torch.equal(scales.scale.float()[same], scale.float()[same])
    if whole is not None:
        assert scales.global_scale is not None
        assert torch.equal(scales.global_scale.view(1), whole)
    if scales.zero_point is None:
        assert not zero_point.any()
        theirs = quantize(w, scale, no_zero_point, args, global_scale=whole)
    else:
        # a zero point of zeros is the integer of a NaN there, which is anything
        assert torch.equal(scales.zero_point[alive], zero_point[alive].to(torch.int8))
        assert not scales.zero_point[~alive].any()
        theirs = quantize(w, scale, scales.zero_point, args)
    ours = source_codes(w.float(), dtype, scales, format, block)
    assert torch.equal(code_values(ours, format), theirs.float())
    if dtype == torch.bfloat16 and text != "float4_e2m1/g32":  # or this would test nothing
        exact = numerics.choose_scale(w, format, block)
        assert not torch.equal(numerics.quantize(w, exact, format, block), ours)


def test_values_without_a_model() -> None:
    # x is its own source.
    x = torch.tensor([[1.0, 177 * 2.0**-12]], dtype=torch.bfloat16)
    found = graphq.fake_quantize(x, "int8/channel/source")
    assert found.dtype == torch.bfloat16
    step = torch.tensor(129 * 2.0**-14)
    assert torch.equal(found, (torch.tensor([[127.0, 6.0]]) * step).to(torch.bfloat16))
    assert torch.equal(graphq.fake_quantize(x, "int8/channel"), (torch.tensor([[127.0, 5.0]]) / 127).to(torch.bfloat16))


def test_float8_by_hand() -> None:
    # 1 / 448 = 0.00223214 is 146 * 2^-16 in bfloat16. 0.26953125 / that = 120.986, 121 in steps of 2^-1: half way between
    # 120 (even) and 122 is 121, where e4m3 has steps of 8: 120. A quotient of 124 rounds to 128.
    w = torch.tensor([[1.0, 0.26953125, -0.5, 0.0]])
    scales = source_scales(w, torch.bfloat16, Float("float8_e4m3fn"), BLOCK, MinMax())
    assert scales.scale.tolist() == [[146 * 2.0**-16]]
    codes = source_codes(w, torch.bfloat16, scales, Float("float8_e4m3fn"), BLOCK)
    assert codes.view(torch.float8_e4m3fn).float().tolist() == [[448.0, 120.0, -224.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float8_as_torch_computes_in_16_bits(dtype: torch.dtype) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(5)).to(dtype)
    theirs = w.abs().amax(1, keepdim=True) / 448
    codes = (w / theirs).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    format = Float("float8_e4m3fn")
    scales = source_scales(w.float(), dtype, format, BLOCK, MinMax())
    assert torch.equal(scales.scale, theirs.float())
    assert torch.equal(source_codes(w.float(), dtype, scales, format, BLOCK), codes)
    assert (numerics.quantize(w, numerics.choose_scale(w, format, BLOCK), format, BLOCK) != codes).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float8_of_zeros(dtype: torch.dtype) -> None:
    scales = source_scales(torch.zeros(2, 4), dtype, Float("float8_e4m3fn"), BLOCK, MinMax())
    assert scales.scale.tolist() == [[2.0**-23], [2.0**-23]]
    assert not source_codes(torch.zeros(2, 4), dtype, scales, Float("float8_e4m3fn"), BLOCK).any()


def test_logarithms_of_mx_exponents_are_rounded() -> None:
    """log2(255) = 7.994 is 8 in bfloat16, whose steps are 2^-5 there; in float32 its whole part is 7."""
    w = torch.zeros(3, 32)
    w[:, 0] = torch.tensor([255.0, 248.0, 0.0])  # log2(248) = 7.954 is 7.9375 or 7.96875
    format, block = Mx("float8_e4m3fn", "ascend"), [1, 32]
    bits = source_scales(w, torch.bfloat16, format, block, MinMax()).scale.view(torch.uint8)
    assert bits.flatten().tolist() == [127 + 0, 127 - 1, 0]
    assert numerics.choose_scale(w, format, block).scale.view(torch.uint8).flatten().tolist() == [126, 126, 0]
    codes = source_codes(w, torch.bfloat16, Scales(bits.view(torch.float8_e8m0fnu)), format, block)
    assert codes.view(torch.float8_e4m3fn)[:, 0].float().tolist() == [256.0, 448.0, 0.0]  # 255 to even, 496 held


def test_mxfp4_exponents_as_torch_computes_in_16_bits() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(6))
    w = (w * torch.linspace(0.01, 0.04, 64).unsqueeze(1)).to(torch.bfloat16)
    amax = w.reshape(64, 8, 32).abs().amax(-1)
    exponent = torch.floor(torch.log2(amax / (1 - 0.5**3) + 9.6e-7)) - 2
    format, block = Mx("float4_e2m1", "ascend"), [1, 32]
    scales = source_scales(w.float(), torch.bfloat16, format, block, MinMax())
    assert torch.equal(scales.scale.view(torch.uint8), (exponent.float() + 127).to(torch.uint8))
    plain = numerics.choose_scale(w.float(), format, block)
    assert (plain.scale.view(torch.uint8) != scales.scale.view(torch.uint8)).any()
    own = numerics.quantize(w.float(), scales, format, block)
    assert torch.equal(source_codes(w.float(), torch.bfloat16, scales, format, block), own)
