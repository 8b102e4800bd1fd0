"""Formats with a scale over the scales of blocks, against loops in float32: nvfp4, int4 over int8, float4 over float8."""

import numpy as np
import pytest
import torch

import graphq
from graphq import numerics
from graphq.numerics import Scales
from graphq.spec.formats import Nvfp4, TwoLevel
from tests.numerics.tables import FLOAT4_E2M1, FLOAT8_E4M3, minifloat_code

F4 = np.array(FLOAT4_E2M1 + [-v for v in FLOAT4_E2M1], dtype=np.float32)
F8 = np.array([*FLOAT8_E4M3, np.nan, *(-v for v in FLOAT8_E4M3), np.nan], dtype=np.float32)
ONE = np.float32(1)


def tensor(rows: int, columns: int, seed: int) -> np.ndarray:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).numpy()
    x[0, :16] = 0
    x[1] *= np.float32(1e-5)
    x[2, 7] = 40
    return x


# -- nvfp4


def nvfp4(x: np.ndarray, given: float | None = None) -> tuple[np.ndarray, np.ndarray, np.float32, np.ndarray]:
    """Codes, codes of scales, the divisor and the values, as compressed-tensors computes them."""
    amax = np.abs(x).max()
    # A number over a tensor is torch's reciprocal times the number, in compressed-tensors too.
    divisor = np.float32(given) if given is not None else ONE / amax * np.float32(448 * 6) if amax else ONE
    blocks = -(-x.shape[1] // 16)
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros((x.shape[0], blocks), np.uint8)
    values = np.zeros(x.shape, np.float32)
    for row in range(x.shape[0]):
        for block in range(blocks):
            own = slice(16 * block, 16 * block + 16)
            scale = minifloat_code((np.abs(x[row, own]).max() / np.float32(6) * divisor)[None], "float8_e4m3fn")[0]
            scales[row, block] = scale if scale else 0x20  # 0.125
            step = F8[scales[row, block]] / divisor
            codes[row, own] = minifloat_code(x[row, own] / step, "float4_e2m1")
            values[row, own] = F4[codes[row, own]] * step
    return codes, scales, divisor, values


@pytest.mark.parametrize(("shape", "factor", "given"), [((5, 48), 1, None), ((4, 37), 1e30, None), ((3, 32), 1e-20, None), ((4, 32), 1, 700.0)])  # fmt: skip
def test_nvfp4_against_a_loop(shape: tuple[int, int], factor: float, given: float | None) -> None:
    x = tensor(*shape, seed=1) * np.float32(factor)
    block = [1, 16]
    upper = None if given is None else torch.tensor([[given]])
    found = numerics.choose_scale(torch.from_numpy(x), Nvfp4(), block, upper)
    codes, scales, divisor, values = nvfp4(x, given)
    assert found.scale.dtype == torch.float8_e4m3fn
    assert (found.scale.view(torch.uint8).numpy() == scales).all()
    assert found.global_scale is not None
    assert found.global_scale.tolist() == [[divisor]]
    assert (numerics.quantize(torch.from_numpy(x), found, Nvfp4(), block).numpy() == codes).all()
    assert (numerics.dequantize(torch.from_numpy(codes), found, Nvfp4(), block).numpy() == values).all()
    assert (graphq.fake_quantize(torch.from_numpy(x), "nvfp4", global_scale=upper).numpy() == values).all()


def test_nvfp4_by_hand() -> None:
    # amax 6: divisor 448, so that the first block's scale is 448 in float8, in effect 1; the second's is 448/6 = 74.67,
    # in float8 72, in effect 9/56: 1 / (9/56) = 6.2 saturates.
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([6.0, -0.25, 0.75, -5.5])
    x[0, 16:18] = torch.tensor([1.0, -0.5])
    scales = numerics.choose_scale(x, Nvfp4(), [1, 16])
    assert scales.global_scale is not None
    assert scales.global_scale.tolist() == [[448]]
    assert scales.scale.float().tolist() == [[448, 72]]
    codes = numerics.quantize(x, scales, Nvfp4(), [1, 16])
    assert codes[0, :4].tolist() == [7, 8, 2, 15]
    assert codes[0, 16:18].tolist() == [7, 0xD]
    back = numerics.dequantize(codes, scales, Nvfp4(), [1, 16])
    assert back[0, 16].item() == np.float32(6) * (np.float32(72) / np.float32(448))


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 7e-36, 1e-35])
def test_nvfp4_of_almost_nothing_is_finite(largest: float) -> None:
    x = torch.zeros(2, 32)
    x[1, 3] = largest
    scales = numerics.choose_scale(x, Nvfp4(), [1, 16])
    assert scales.global_scale is not None
    assert scales.global_scale.isfinite().all()
    # 448 * 6 / amax is beyond float32 below 7.9e-36: compressed-tensors' divisor is 1 then, and its scales 0.125.
    assert (scales.global_scale == 1).all() == (largest < 7.9e-36)
    back = graphq.fake_quantize(x, "nvfp4")
    assert back.isfinite().all()
    assert back[0].eq(0).all()


def test_nvfp4_never_makes_numbers_of_nan_and_infinity() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 32)
        x[0, 5] = bad
        scales = numerics.choose_scale(x, Nvfp4(), [1, 16])
        back = numerics.dequantize(numerics.quantize(x, scales, Nvfp4(), [1, 16]), scales, Nvfp4(), [1, 16])
        assert back[0, :16].isnan().all()
        assert back[0, 16:].isfinite().all()
        assert numerics.fake_quantize(x, scales, Nvfp4(), [1, 16]).isnan().equal(back.isnan())


# -- 4 bits over 8


def float4_over_float8(x: np.ndarray, group: int):
    """AMCT's progressive weights: max / 448 by channel, the float8 values by groups to max / 6."""
    upper = np.abs(x).max(1, keepdims=True) / np.float32(448)
    upper[upper == 0] = 1
    q8 = F8[minifloat_code(x / upper, "float8_e4m3fn")]
    return (*_groups(q8, group, np.float32(6), lambda y: minifloat_code(y, "float4_e2m1"), lambda c: F4[c]), upper)


def int4_over_int8(x: np.ndarray, group: int):
    """MsModelSlim's two levels: int8 by channel, the int8 grid by groups to int4."""
    upper = np.abs(x).max(1, keepdims=True) / np.float32(127)
    upper[upper == 0] = 1
    q8 = np.clip(np.rint(x / upper), -128, 127).astype(np.float32)
    quantized = _groups(
        q8, group, np.float32(7), lambda y: np.clip(np.rint(y), -8, 7).astype(np.int8), lambda c: c.astype(np.float32)
    )
    return (*quantized, upper)


def _groups(q8: np.ndarray, group: int, divisor: np.float32, code, value):
    columns = [slice(i, i + group) for i in range(0, q8.shape[1], group)]
    scales = np.stack([np.abs(q8[:, own]).max(1) / divisor for own in columns], 1)
    scales[scales == 0] = 1
    codes = np.concatenate([code(q8[:, own] / scales[:, [i]]) for i, own in enumerate(columns)], 1)
    units = np.concatenate([value(codes[:, own]) for own in columns], 1)
    return codes, units, scales


@pytest.mark.parametrize("group", [8, 32, 128])
@pytest.mark.parametrize("columns", [64, 70])
@pytest.mark.parametrize("element", ["int4", "float4_e2m1"])
def test_four_bits_over_eight_against_a_loop(element, columns: int, group: int) -> None:
    x = tensor(4, columns, seed=columns)
    x[3] = 0
    format, block = TwoLevel(element), [1, group]
    codes, units, scales, upper = (int4_over_int8 if element == "int4" else float4_over_float8)(x, group)
    found = numerics.choose_scale(torch.from_numpy(x), format, block)
    assert found.global_scale is not None
    assert (found.global_scale.numpy() == upper).all()
    assert (found.scale.numpy() == scales).all()
    got = numerics.quantize(torch.from_numpy(x), found, format, block)
    assert (got.numpy() == codes).all()
    step = (scales * upper).repeat(group, 1)[:, :columns]
    assert (numerics.dequantize(got, found, format, block).numpy() == units * step).all()
    assert (graphq.fake_quantize(torch.from_numpy(x), f"{format}/g{group}").numpy() == units * step).all()


def test_int4_over_int8_by_hand() -> None:
    # Channel: 254 / 127 = 2. Codes 127, -36, 3, 0 | 14, -7, 4, 1 (8.9 / 2 = 4.45, 2.9 / 2 = 1.45); groups 127/7, 14/7.
    x = torch.tensor([[254, -72.4, 6, 0.9, 28, -14, 8.9, 2.9]])
    scales = numerics.choose_scale(x, TwoLevel("int4"), [1, 4])
    assert scales.global_scale is not None
    assert scales.global_scale.tolist() == [[2]]
    assert scales.scale.tolist() == [[np.float32(127) / np.float32(7), 2]]
    codes = numerics.quantize(x, scales, TwoLevel("int4"), [1, 4])
    assert codes.tolist() == [[7, -2, 0, 0, 7, -4, 2, 0]]  # -7 / 2 = -3.5 and 1 / 2 go to even
    assert numerics.dequantize(codes, scales, TwoLevel("int4"), [1, 4])[0, 4:].tolist() == [28, -16, 8, 0]


def test_float4_over_float8_by_hand() -> None:
    # Channel: 448 / 448 = 1. 23 is 24 in float8 (a half, to even), 25 too; the second group's scale is 24 / 6 = 4.
    x = torch.tensor([[448, -200, 37.3, 0, 23, -9, 25, 5.1]])
    scales = numerics.choose_scale(x, TwoLevel("float4_e2m1"), [1, 4])
    assert scales.scale.tolist() == [[np.float32(448) / np.float32(6), 4]]
    codes = numerics.quantize(x, scales, TwoLevel("float4_e2m1"), [1, 4])
    # 5.1 is 5 in float8, 5 / 4 = 1.25 goes to 1; without float8 in between, 5.1 / 4 = 1.275 would go to 1.5.
    assert codes.tolist() == [[7, 0xD, 1, 0, 7, 0xC, 7, 2]]


def test_given_scales_of_two_levels_are_used() -> None:
    x = torch.tensor([[8.0, -4.0, 3.0, 1.0]])
    given = Scales(torch.tensor([[2.0, 1.0]]), None, torch.tensor([[1.0]]))
    assert numerics.quantize(x, given, TwoLevel("int4"), [1, 2]).tolist() == [[4, -2, 3, 1]]


@pytest.mark.parametrize("element", ["int4", "float4_e2m1"])
def test_nan_and_infinity_never_become_numbers(element) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 16)
        x[0, 5] = bad
        format, block = TwoLevel(element), [1, 8]
        scales = numerics.choose_scale(x, format, block)
        back = numerics.fake_quantize(x, scales, format, block)
        assert not back[0, :8].isfinite().any()
        assert not back[0, 8:].isfinite().any()  # the channel's scale is theirs too
        torch.testing.assert_close(back[1], torch.ones(16), rtol=2**-22, atol=0)  # three roundings in float32
