"""compressed-tensors as a judge of scales and codes, with its own functions on float32 tensors.

Where the two differ on purpose, and the tests leave out or say so:

- A scale of 0 is theirs 1.2e-7 (0.125 for nvfp4), graphq's 1, and theirs in weights of the format ``half``; no scale of
  graphq is below the smallest normal number.
- They round x / scale + zero point, as graphq's joint formats do; asym formats round x / scale.
- Extremes of 3e38: high - low overflows for them; so does an MX block's rounded power of two from 1.75 x 2^127 on.
- The zero point of a block of zeros is theirs 0 / 0, made an integer, and graphq's the smallest code.
- They lose the sign of -0.0, though not of small numbers that become it; graphq keeps it.
- In 16-bit tensors they compute in 16 bits, graphq in float32.
"""

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import forward
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

import graphq
from graphq import numerics
from graphq.numerics import Scales, elements
from graphq.spec.formats import Float, Format, Int, Mx, Nvfp4
from tests.numerics.tables import MINIFLOATS, beside, halves

THEIRS: Any = forward  # which takes None where its signature says Tensor


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    random = torch.randn(256, 256, generator=generator)
    outlier = random.clone() / 50
    outlier[17, 130] = -300
    zeros = random.clone()
    zeros[:, :64] = 0
    zeros[5] = -0.0
    points = torch.from_numpy(beside(halves(MINIFLOATS["float4_e2m1"]), np.float32))
    ties = points.repeat(2000)[: 128 * 256].reshape(128, 256).clone()
    ties[:, ::16] = 6  # a scale of exactly 1 where 6 is full scale
    whole = torch.randint(-15, 16, (64, 256), generator=generator) / 2
    whole[:, ::16] = 7.5
    spread = random * torch.exp2(torch.randint(-30, 30, (256, 256), generator=generator))
    return {
        "random": random,
        "outlier": outlier,
        "zeros": zeros,
        "ties": ties,
        "whole": whole,
        "spread": spread,
        "uniform": torch.rand(129, 384, generator=generator),
        "negative": -random.abs() - 1,
        "tiny": random * 1e-34,
        "huge": random * 1e37,
        "nothing": torch.zeros(8, 256),
    }


TENSORS = tensors()


def arguments(**options) -> QuantizationArgs:
    return QuantizationArgs(observer=None, **options)


def extremes(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of each block; the edges of the tensor cut the last ones short."""
    low = torch.empty(-(-x.shape[0] // rows), -(-x.shape[1] // columns))
    high = torch.empty_like(low)
    for r in range(low.shape[0]):
        for c in range(low.shape[1]):
            part = x[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
            low[r, c], high[r, c] = part.min(), part.max()
    return low, high


def compare(x: Tensor, args: QuantizationArgs, format: Format, block: list[int]) -> None:
    """Scales, zero points, codes and values are equal."""
    rows, columns = (n if b < 0 else b for n, b in zip(x.shape, block, strict=True))
    theirs, zero_point = calculate_qparams(*extremes(x, rows, columns), args)
    ours = numerics.choose_scale(x, format, block)
    scale = ours.scale.float()
    empty = numerics.block_extremes(x.abs(), block)[1] == 0
    assert torch.equal(scale[~empty], theirs[~empty])
    if isinstance(format, Mx):
        assert (scale[empty] == 2.0**-127).all()
        assert (theirs[empty] == 2.0**-127).all()
    else:
        assert (scale[empty] == 1).all()
        assert (theirs[empty] == torch.finfo(torch.float32).eps).all()
    if ours.zero_point is not None:
        assert torch.equal(ours.zero_point[~empty], zero_point[~empty])
    codes = numerics.quantize(x, ours, format, block)
    values = numerics.dequantize(codes, ours, format, block)
    used = None if args.symmetric else zero_point
    got = THEIRS.quantize(x, theirs, used, args)
    back = THEIRS.fake_quantize(x, theirs, used, args)
    element = "float4_e2m1" if args.num_bits == 4 else "float8_e4m3fn"
    units = codes.float() if isinstance(format, Int) else elements.decode(codes, element)
    if args.symmetric:
        assert torch.equal(units, got)
        assert torch.equal(values, back)
        assert torch.equal(THEIRS.dequantize(got, theirs, None, args), values)
        return
    seen = ~numerics.expand_scale(empty, x, block).expand(x.shape)
    assert torch.equal(units[seen], got[seen])
    assert torch.equal(values[seen], back[seen])


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers(name: str, strategy: str, bits: int, symmetric: bool) -> None:
    x = TENSORS[name]
    group = {"group_size": 64} if strategy == "group" else {}
    args = arguments(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, **group)
    block = {"tensor": [-1, -1], "channel": [1, -1], "group": [1, 64]}[strategy]
    format = Int(bits, divisor="half") if symmetric else Int(bits, symmetric=False, joint=True)
    compare(x, args, format, block)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_float8(name: str, strategy: str) -> None:
    x = TENSORS[name]  # uniform: 129 rows, so that a block of one row is left
    options = {"block_structure": [128, 128]} if strategy == "block" else {}
    args = arguments(num_bits=8, type="float", symmetric=True, strategy=strategy, **options)
    block = {"tensor": [-1, -1], "channel": [1, -1], "block": [128, 128]}[strategy]
    compare(x, args, Float("float8_e4m3fn"), block)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(("bits", "element"), [(4, "float4_e2m1"), (8, "float8_e4m3fn")])
def test_mx(name: str, bits: int, element) -> None:
    args = arguments(
        num_bits=bits, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    compare(TENSORS[name], args, Mx(element, "even"), [1, 32])


def test_mx_exponents_of_subnormal_and_large_numbers() -> None:
    args = arguments(num_bits=4, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8)
    amax = torch.tensor([1e-45, 1e-40, 2.0**-127, 2.0**-126, 1.75 * 2.0**-125, 1.74 * 2.0**127, 2.0**126 * 1.75])
    theirs, _ = calculate_qparams(-amax, amax, args)
    ours, _ = numerics.scale_from_extremes(-amax, amax, Mx("float4_e2m1", "even"))
    assert torch.equal(ours.float(), theirs)


@pytest.mark.parametrize("name", TENSORS)
def test_nvfp4(name: str) -> None:
    x = TENSORS[name]
    args = arguments(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )
    global_scale = generate_gparam(x.min(), x.max())
    theirs, _ = calculate_qparams(*extremes(x, 1, 16), args, global_scale=global_scale)
    ours = numerics.choose_scale(x, Nvfp4(), [1, 16])
    assert ours.global_scale is not None
    assert torch.equal(ours.global_scale.flatten(), global_scale)
    assert torch.equal(ours.scale.view(torch.uint8), theirs.to(torch.float8_e4m3fn).view(torch.uint8))
    codes = numerics.quantize(x, ours, Nvfp4(), [1, 16])
    got = THEIRS.quantize(x, theirs, None, args, global_scale=global_scale)
    packed = pack_fp4_to_uint8(got)
    codes[(x == 0) & x.signbit()] = 0
    assert torch.equal(codes[:, ::2] | codes[:, 1::2] << 4, packed)
    back = THEIRS.fake_quantize(x, theirs, None, args, global_scale=global_scale)
    assert torch.equal(numerics.dequantize(codes, ours, Nvfp4(), [1, 16]), back)
    assert torch.equal(graphq.fake_quantize(x, "nvfp4"), back)
    # A divisor that is known, of a group of layers: the same scales.
    shared = global_scale / 3
    theirs, _ = calculate_qparams(*extremes(x, 1, 16), args, global_scale=shared)
    back = THEIRS.fake_quantize(x, theirs, None, args, global_scale=shared)
    assert torch.equal(graphq.fake_quantize(x, "nvfp4", global_scale=shared), back)


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 7.9e-36, 8e-36, 1e-30, 1.0, 3e38])
def test_nvfp4_divisors(largest: float) -> None:
    amax = torch.tensor(largest)
    assert torch.equal(numerics.nvfp4_global_scale(amax).view(1), generate_gparam(-amax, amax))


def test_float6() -> None:
    from compressed_tensors.quantization.quant_args import FP6_E2M3_DATA

    x = torch.from_numpy(beside(halves(MINIFLOATS["float6_e2m3"]), np.float32)).clamp(-7.5, 7.5)
    assert torch.equal(FP6_E2M3_DATA.cast_to_fp6(x), graphq.decode(graphq.encode(x, "float6_e2m3"), "float6_e2m3"))


def test_what_differs_at_halves_with_a_zero_point() -> None:
    # 0.5 + 1 goes to 2, which stands for 1; graphq's 0 + 1 stands for 0.
    args = arguments(num_bits=8, type="int", symmetric=False, strategy="tensor")
    x = torch.tensor([[0.5, 1.5]])
    scale, zero_point = torch.ones(1), torch.ones(1, dtype=torch.int8)
    assert THEIRS.quantize(x, scale, zero_point, args).tolist() == [[2, 2]]
    given = Scales(scale.view(1, 1), zero_point.view(1, 1))
    assert numerics.quantize(x, given, Int(8, symmetric=False), [-1, -1]).tolist() == [[1, 3]]
    assert numerics.quantize(x, given, Int(8, symmetric=False, joint=True), [-1, -1]).tolist() == [[2, 2]]
