"""Learned rounding: the values are those of codes, the gradients are those of the method."""

import itertools

import pytest
import torch
from torch import Tensor

from graphq import numerics
from graphq.numerics import Scales, rounding
from graphq.numerics.blocks import block_extremes
from graphq.numerics.scales import choose_scale, computed, scale_from_extremes
from graphq.spec.formats import Int

FORMATS = [
    *(Int(bits, symmetric=symmetric) for bits, symmetric in itertools.product((2, 3, 4, 8), (True, False))),
    Int(4, divisor="half"),
    Int(3, divisor="by_sign"),
    Int(4, symmetric=False, joint=True),
    Int(8, symmetric=False, signed=False),
]
BLOCKS = [[1, -1], [1, 4], [1, 5], [2, 3], [-1, -1]]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_weight_is_that_of_its_codes_to_the_bit(format: Int, block: list[int], dtype: torch.dtype) -> None:
    w = numbers(6, 12).to(dtype)
    v = computed(numbers(6, 12, seed=1).clamp(-0.5, 0.5).to(dtype))
    low, high = block_extremes(w.to(v.dtype), block)
    low, high = low * 0.8, high * 0.7
    scale, zero_point = rounding.ranged(low, high, format)
    scales = Scales(*scale_from_extremes(low, high, format))
    made = numerics.quantize(rounding.offset(w, v, scales.scale, block), scales, format, block)
    learned = rounding.rounded(w, v, scale, zero_point, format, block)
    assert torch.equal(learned, numerics.dequantize(made, scales, format, block))
    assert torch.equal(scale, scales.scale)
    assert (zero_point is None) == (scales.zero_point is None)
    assert zero_point is None or torch.equal(zero_point, scales.zero_point.to(scale.dtype))  # type: ignore[union-attr]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_without_offsets_it_is_rounding_to_nearest(format: Int) -> None:
    w, block = numbers(4, 8), [1, 4]
    scale, zero_point = rounding.ranged(*block_extremes(w, block), format)
    expected = numerics.fake_quantize(w, choose_scale(w, format, block), format, block)
    assert torch.equal(rounding.rounded(w, torch.zeros_like(w), scale, zero_point, format, block), expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_extremes_belong_to_their_scales(format: Int) -> None:
    block = [1, 4]
    scales = choose_scale(numbers(4, 8), format, block)
    scale, zero_point = scale_from_extremes(*rounding.extremes_of(scales, format), format)
    torch.testing.assert_close(scale, scales.scale, rtol=1e-6, atol=0)
    assert zero_point is None or torch.equal(zero_point, scales.zero_point)  # type: ignore[arg-type]


def test_gradients_worked_out_by_hand() -> None:
    """Int2, codes -2 to 1, scale 2: 0.3 rounds to 0, -7 is clamped to -2; the derivative by v is the scale, inside."""
    w = torch.tensor([[0.3, -7.0]])
    v = torch.zeros(1, 2, requires_grad=True)
    scale = torch.tensor([[2.0]], requires_grad=True)
    rounding.rounded(w, v, scale, None, Int(2), [1, -1]).sum().backward()
    assert v.grad is not None
    assert v.grad.tolist() == [[2.0, 0.0]]
    # (q s)' = q + s (w / s + v)', inside, is 0 + 2 (-0.3 / 4); q, which is -2, where it is clamped
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, torch.tensor([[-0.15 - 2.0]]), rtol=1e-6, atol=0)


def test_a_zero_point_is_learned_through_what_is_clamped() -> None:
    """For int2/asym, from 0 to 3 at shares of 1: codes -2 to 1. Inside the range a zero point cancels out."""
    low, high = torch.tensor([[0.0]], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    scale, zero_point = rounding.ranged(low, high, Int(2, symmetric=False))
    assert zero_point is not None
    assert (scale.tolist(), zero_point.tolist()) == ([[1.0]], [[-2.0]])
    (by_zero,) = torch.autograd.grad(
        rounding.rounded(
            torch.tensor([[1.2, 7.0]]), torch.zeros(1, 2), scale, zero_point, Int(2, symmetric=False), [1, -1]
        ).sum(),
        zero_point,
        retain_graph=True,
    )
    assert by_zero.tolist() == [[-1.0]]  # of the clamped element alone: (1 - z) s


def test_descent_takes_signs_and_stays_within_bounds() -> None:
    x, gradient = torch.tensor([0.0, 0.0, 0.45, -0.5]), torch.tensor([1e-9, 0.0, -3.0, 2.0])
    found = rounding.descended(x, gradient, 0.1, rounding.OFFSETS)
    torch.testing.assert_close(found, torch.tensor([-0.1, 0.0, 0.5, -0.5]), rtol=0, atol=1e-7)


def test_rates_fall_in_a_line() -> None:
    assert [rounding.rate_at(step, 4, 0.5) for step in range(4)] == [0.5, 0.375, 0.25, 0.125]
