"""AMCT's own numbers: scales of extremes, and a small layer quantized by several of its algorithms."""

import numpy as np
import pytest
import torch
from torch import Tensor

import graphq
from graphq import numerics
from graphq.numerics import Scales, elements, ofmr
from graphq.spec.formats import Float, Format, Int

TINY = torch.finfo(torch.float32).tiny
BY_SIGN = {bits: Int(bits, divisor="by_sign") for bits in (4, 8)}
ASYMMETRIC = {bits: Int(bits, symmetric=False) for bits in (4, 8)}

# Largest and smallest element, scale, offset.
RANGES = [
    (BY_SIGN[8], (1, -0.5), 0.0078740157, None),
    (BY_SIGN[8], (0.5, -1), 0.0078125, None),
    (BY_SIGN[4], (1, -0.5), 1 / 7, None),
    (BY_SIGN[4], (0.5, -1), 0.125, None),
    (Float("float8_e4m3fn"), (2, -2), 0.0044642859, None),
    (Float("float8_e4m3fn"), (1, -2), 0.0044642859, None),
    (Float("hifloat8"), (3, -3), 0.1875, None),
    (Float("hifloat8"), (0, -3), 0.1875, None),
    (Float("float4_e2m1"), (3, -1), 0.5, None),
    (ASYMMETRIC[8], (1, -0.5), 0.00588235306, -43),
    (ASYMMETRIC[8], (1, 0.2), 0.00392156886, -128),
    (ASYMMETRIC[8], (-0.1, -0.5), 0.00196078443, 127),
    (ASYMMETRIC[8], (0, 0), 1.0, -128),
    (ASYMMETRIC[4], (1, -0.5), 0.1, -3),
]


@pytest.mark.parametrize(("format", "extremes", "scale", "offset"), RANGES, ids=str)
def test_scales_of_extremes(format: Format, extremes: tuple[float, float], scale: float, offset: int | None) -> None:
    high, low = (torch.tensor(v, dtype=torch.float32) for v in extremes)
    got, zero_point = numerics.scale_from_extremes(low, high, format)
    assert got.item() == np.float32(scale)
    assert (None if zero_point is None else zero_point.item()) == offset


def test_scales_of_almost_nothing() -> None:
    # AMCT: 1 for every scale below 1.19e-7, which loses small blocks. by_sign is its rule, whole; the other formats are
    # not AMCT's alone, and keep what can be divided by.
    assert numerics.scale_from_extremes(torch.tensor(0.0), torch.tensor(1e-8), BY_SIGN[8])[0].item() == 1
    for format in (ASYMMETRIC[8], Float("hifloat8"), Float("float8_e4m3fn")):
        small, _ = numerics.scale_from_extremes(torch.tensor(0.0), torch.tensor(1e-8), format)
        assert 0 < small.item() < 1e-9
        least, _ = numerics.scale_from_extremes(torch.tensor(0.0), torch.tensor(1e-44), format)
        assert least.item() == TINY


def test_conversion_to_integers() -> None:
    x = torch.tensor([2.2, 1.2, 129.1, -129.3])
    assert graphq.encode(x, "int4").tolist() == [2, 1, 7, -8]
    assert graphq.encode(x, "int8").tolist() == [2, 1, 127, -128]


WEIGHT = torch.tensor([[0.1, -0.7, 0.35, 1.0], [-2.0, 0.5, 0.25, 1.5]])
WEIGHTS = [
    (BY_SIGN[8], [1, -1], [[0.0078740157], [0.015625]], None, [[13, -89, 44, 127], [-128, 32, 16, 96]]),
    (ASYMMETRIC[8], [-1, -1], [[0.0137254903]], [[18]], [[25, -33, 44, 91], [-128, 54, 36, 127]]),
    (BY_SIGN[4], [1, -1], [[1 / 7], [0.25]], None, [[1, -5, 2, 7], [-8, 2, 1, 6]]),
    (ASYMMETRIC[4], [1, -1], [[0.113333337], [0.233333334]], [[-2], [1]], [[-1, -8, 1, 7], [-8, 3, 2, 7]]),
]


@pytest.mark.parametrize(("format", "block", "scale", "offset", "codes"), WEIGHTS, ids=str)
def test_weights(format: Int, block: list[int], scale, offset, codes) -> None:
    scales = numerics.choose_scale(WEIGHT, format, block)
    assert torch.equal(scales.scale, torch.tensor(scale))
    assert (None if scales.zero_point is None else scales.zero_point.tolist()) == offset
    assert numerics.quantize(WEIGHT, scales, format, block).tolist() == codes


# -- a layer of eight inputs and outputs, twelve tokens

W = torch.tensor(
    [
        [0.10, -0.70, 0.35, 1.00, 0.22, -0.41, 0.05, 0.63],
        [-2.00, 0.50, 0.25, 1.50, -0.33, 0.77, -1.10, 0.08],
        [0.31, 0.29, -0.58, 0.44, 0.91, -0.12, 0.67, -0.85],
        [-0.15, 0.93, 0.72, -0.26, 0.38, 0.54, -0.49, 1.20],
        [0.02, 0.11, -0.07, 0.19, -0.23, 0.31, 0.27, -0.05],
        [1.25, -1.5, 0.75, 0.5, -0.25, 0.125, -0.625, 0.875],
        [0.4, 0.3, 0.2, 0.1, -0.1, -0.2, -0.3, -0.4],
        [0.9, -0.8, 0.7, -0.6, 0.5, -0.4, 0.3, -0.2],
    ]
)
X = torch.tensor([[((7 * i + 5 * j) % 11 - 5) / 4 * (4 if j == 2 else 1) for j in range(8)] for i in range(12)])
MINMAX = [
    [1, -5, 2, 7, 2, -3, 0, 4],
    [-8, 2, 1, 6, -1, 3, -4, 0],
    [2, 2, -4, 3, 7, -1, 5, -7],
    [-1, 5, 4, -2, 2, 3, -3, 7],
    [0, 2, -2, 4, -5, 7, 6, -1],
    [7, -8, 4, 3, -1, 1, -3, 5],
    [7, 5, 4, 2, -2, -4, -5, -7],
    [7, -6, 5, -5, 4, -3, 2, -2],  # -0.6 / 0.12857 = -4.67
]


def output_error(w: Tensor, x: Tensor = X) -> float:
    return (x.double() @ w.double().T - X.double() @ W.double().T).square().mean().item()


def test_minmax() -> None:
    scales = numerics.choose_scale(W, BY_SIGN[4], [1, -1])
    expected = [1 / 7, 0.25, 0.13, 0.17142858, 0.044285715, 0.1875, 0.05714286, 0.12857142]
    torch.testing.assert_close(
        scales.scale.flatten(), torch.tensor(expected), rtol=2e-7, atol=0
    )  # printed in seven digits
    assert numerics.quantize(W, scales, BY_SIGN[4], [1, -1]).tolist() == MINMAX
    back = graphq.fake_quantize(W, "int4/by_sign/channel")
    assert output_error(back) == pytest.approx(0.0232386, abs=5e-8)  # AMCT printed seven digits


def test_smooth_quant_scales() -> None:
    """Alpha 0.5: x / s per tensor and w * s per channel, in int8."""
    s = torch.tensor([0.7905694, 0.9128709, 2.581989, 0.9128709, 1.172018, 1.274118, 1.0660037, 1.0206207])
    scale_w = [0.00718796, 0.01235265, 0.01169964, 0.01463805, 0.00311005, 0.01524797, 0.00406612, 0.01423144]
    x, w = X / s, W * s
    got = numerics.choose_scale(w, BY_SIGN[8], [1, -1]).scale.flatten()
    # s in seven digits, scale_w in six: 1e-7 and 5e-9 / 0.003.
    torch.testing.assert_close(got, torch.tensor(scale_w), rtol=2e-6, atol=0)
    scale_d, _ = numerics.scale_from_extremes(x.min(), x.max(), BY_SIGN[8])
    assert scale_d.item() == pytest.approx(0.015247965, rel=2e-7)  # s in seven digits
    mse = output_error(
        graphq.fake_quantize(w, "int8/by_sign/channel"), graphq.fake_quantize(x, "int8/by_sign/tensor/dynamic")
    )
    assert mse == pytest.approx(1.2114e-4, abs=5e-9)  # printed in five digits


def test_smooth_quant_scales_of_an_asymmetric_input() -> None:
    """Alpha 0.8: x / s in asymmetric int8, w * s per tensor."""
    s = torch.tensor([1.0406915, 1.1023252, 3.8385196, 1.1023252, 1.2182032, 1.259592, 1.1728688, 1.152635])
    scale_d, offset = numerics.scale_from_extremes((X / s).min(), (X / s).max(), ASYMMETRIC[8])
    assert scale_d.item() == pytest.approx(0.010216357, rel=2e-7)  # s in eight digits, float32
    assert offset is not None
    assert offset.item() == -1
    assert numerics.choose_scale(W * s, BY_SIGN[8], [-1, -1]).scale.item() == pytest.approx(0.022668421, rel=2e-7)
    w = graphq.fake_quantize(W * s, "int8/by_sign/tensor")
    x = graphq.fake_quantize(X / s, "int8/asym/tensor/dynamic")
    amct = graphq.fake_quantize(X / s, "int8/asym/joint/tensor/dynamic")
    assert torch.equal(amct, ((X / s / scale_d + offset).round().clamp(-128, 127) - offset) * scale_d)
    assert output_error(w, amct) == pytest.approx(2.7886e-4, abs=5e-9)  # printed in five digits
    moved = x != amct  # AMCT rounds x / s + offset, ONNX x / s: with an odd offset halves go the other way
    assert moved.any()
    assert ((X / s / scale_d)[moved] % 1 == 0.5).all()


def ofmr_losses(layout, axis: int | None) -> Tensor:
    found = []
    for k in range(-5, 6):
        back = numerics.fake_quantize(W, Scales(torch.tensor([[2.0**k]])), Float(layout), [-1, -1])
        error = (X @ back.T - X @ W.T).double().square()
        found.append((error.sum() if axis is None else error.sum(0)) / error.numel())
    return torch.stack(found)


def test_ofmr_of_hifloat8() -> None:
    losses = ofmr_losses("hifloat8", None)
    expected = [0.0101515, 0.0032567, 0.0024622348, 0.0024622348, 0.0024670, 0.0026548, 0.0029633, 0.0040307, 0.0112447]
    expected += [0.0121932, 0.0131528]
    # AMCT printed seven decimals, and sums in float32, in another order.
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-8)
    assert losses[2] == losses[3]  # 2^-3 and 2^-2
    assert ofmr.best(losses.float()).item() - 5 == -3
    channels = ofmr.best(ofmr_losses("hifloat8", 1).float()) - 5
    assert (2.0**channels).tolist() == [0.0625, 4, 4, 0.0625, 0.5, 0.03125, 0.03125, 0.0625]
    assert torch.equal(elements.round_to(X * 32, "hifloat8"), X * 32)  # no activation loses anything


def test_ofmr_of_float8() -> None:
    assert ofmr.best(ofmr_losses("float8_e4m3fn", None).float()).item() - 5 == -5
    channels = ofmr.best(ofmr_losses("float8_e4m3fn", 1).float()) - 5
    assert (2.0**channels).tolist() == [0.03125, 0.03125, 32, 0.03125, 4, 0.03125, 0.03125, 0.03125]
