"""Scales that nothing but a bias depends on: of blocks of zeros, and of weights that are tiny beside their bias."""

import pytest
import torch

from graphq import numerics
from graphq.numerics import Scales
from graphq.spec.formats import Float, Format, Int, Mx, Nvfp4, TwoLevel

W = torch.tensor([[0.0, 0, 0, 0], [127, 1, -64, 0], [0, 0, 0, -0.0], [-254, 2, 3, 4]])


def chosen(w: torch.Tensor, format: Format, block: list[int], own_axes: tuple[int, ...] = ()) -> Scales:
    scales = numerics.choose_scale(w, format, block)
    return numerics.scales_of_zeros(numerics.quantize(w, scales, format, block), scales, format, block, own_axes)


def test_channels_of_zeros_have_the_smallest_scale_of_the_others() -> None:
    assert chosen(W, Int(8), [1, -1]).scale.tolist() == [[1], [1], [1], [2]]
    assert chosen(W / 4, Int(8), [1, -1]).scale.tolist() == [[0.25], [0.25], [0.25], [0.5]]


def test_groups_of_zeros() -> None:
    w = torch.tensor([[0.0, 0, 14, 7], [21, -7, 0, 0]])
    assert chosen(w, Int(4), [1, 2]).scale.tolist() == [[2, 2], [3, 2]]
    assert chosen(w.t(), Int(4), [2, 1]).scale.tolist() == [[2, 3], [2, 2]]  # 0 0 | 21 -7 and so on


def test_asymmetric_channels_keep_their_zero_points() -> None:
    w = torch.tensor([[0.0, 0], [-1, 2]])
    scales = chosen(w, Int(8, symmetric=False), [1, -1])
    assert scales.scale.flatten().tolist() == pytest.approx([3 / 255, 3 / 255], rel=1e-6)
    assert scales.zero_point is not None
    assert scales.zero_point.flatten().tolist() == [-128, -43]
    codes = numerics.quantize(w, scales, Int(8, symmetric=False), [1, -1])
    assert numerics.dequantize(codes, scales, Int(8, symmetric=False), [1, -1])[0].tolist() == [0, 0]


@pytest.mark.parametrize("format", [Int(2), Int(8), Int(8, symmetric=False), Float("float8_e4m3fn")], ids=str)
def test_a_weight_of_zeros_has_scale_2_to_the_minus_16(format: Format) -> None:
    assert chosen(torch.zeros(3, 4), format, [1, -1]).scale.tolist() == [[2.0**-16]] * 3
    assert chosen(torch.zeros(3, 4), format, [-1, -1]).scale.tolist() == [[2.0**-16]]
    assert chosen(torch.zeros(0, 4), format, [1, -1]).scale.shape == (0, 1)


def test_blocks_whose_numbers_are_too_small_for_a_code_count_as_zeros() -> None:
    w = torch.tensor([[1e-45, 0], [127, 0]])
    assert chosen(w, Int(8), [1, -1]).scale.tolist() == [[1], [1]]


def test_each_expert_is_a_weight_of_its_own() -> None:
    w = torch.stack([W / 4, W, torch.zeros_like(W)])
    scale = chosen(w, Int(8), [1, 1, -1], (0,)).scale
    for expert, own in enumerate(w):
        assert torch.equal(scale[expert], chosen(own, Int(8), [1, -1]).scale)
    assert scale[:, 0].flatten().tolist() == [0.25, 1, 2.0**-16]
    assert chosen(w, Int(8), [1, 1, -1]).scale[2].flatten().tolist() == [0.25] * 4


def test_float_channels() -> None:
    for zero in (0.0, -0.0):
        w = torch.tensor([[zero, zero], [448.0, 1], [896, 2]])
        assert chosen(w, Float("float8_e4m3fn"), [1, -1]).scale.tolist() == [[1], [1], [2]]
        assert chosen(w, Float("float8_e4m3fn", "pow2"), [1, -1]).scale.tolist() == [[1], [1], [2]]


def test_what_a_tool_has_its_own_scale_for() -> None:
    w = W * 2
    assert chosen(w, Int(8, divisor="by_sign"), [1, -1]).scale[0].item() == 1  # AMCT
    assert chosen(w, Int(8, divisor="half"), [1, -1]).scale[0].item() == 2.0**-23  # compressed-tensors
    assert chosen(w, Float("hifloat8", "unit"), [1, -1]).scale.flatten().tolist() == [1] * 4
    w = w.repeat(1, 8)
    for format, block in ((Mx("int8"), [1, 32]), (Nvfp4(), [1, 16]), (TwoLevel("int4"), [1, 8])):
        before = numerics.choose_scale(w, format, block)
        after = chosen(w, format, block)
        assert torch.equal(before.scale.view(torch.uint8), after.scale.view(torch.uint8))


def test_scales_that_leave_a_bias_room() -> None:
    # 0.5 is 2^30 steps of 2^-29 x 2^-2.
    least = numerics.least_for_bias(torch.tensor([0.5, -8.0, 0.0]), torch.tensor([0.25]))
    assert least.tolist() == [2.0**-29, 2.0**-25, 0]
    scales = Scales(torch.tensor([[2.0**-40], [2.0**-20], [2.0**-40]]))
    assert numerics.at_least(scales, least.view(-1, 1), Int(8)).scale.flatten().tolist() == [
        2.0**-29,
        2.0**-20,
        2.0**-40,
    ]


def test_larger_scales_keep_asymmetric_ranges() -> None:
    format = Int(8, symmetric=False)
    w = torch.tensor([[-1.0, 3.0], [-1.0, 3.0]])
    scales = numerics.choose_scale(w, format, [1, -1])
    larger = numerics.at_least(scales, torch.tensor([[0.0], [0.5]]), format)
    assert torch.equal(larger.scale[0], scales.scale[0])
    assert larger.scale[1].item() == 0.5
    assert larger.zero_point is not None
    assert scales.zero_point is not None
    assert larger.zero_point.flatten().tolist() == [scales.zero_point[0].item(), -126]  # two steps for -1
    codes = numerics.quantize(w, larger, format, [1, -1])
    assert numerics.dequantize(codes, larger, format, [1, -1])[1].tolist() == [-1, 3]
