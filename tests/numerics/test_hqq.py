"""Half-quadratic scales: against a literal loop, never worse than min-max, and by hand."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphq
from graphq import numerics
from graphq.numerics import Scales, hqq
from graphq.numerics.blocks import block_sum
from graphq.numerics.hqq import hqq_scales, shrink
from graphq.numerics.ranges import weight_scales
from graphq.spec.formats import Float, Int
from graphq.spec.quant import Hqq, MinMax

ASYMMETRIC = [Int(4, symmetric=False), Int(2, symmetric=False), Int(8, symmetric=False, signed=False)]
SYMMETRIC = [Int(4), Int(3, divisor="half"), Float("float4_e2m1"), Float("float8_e4m3fn"), Float("hifloat8", "to15")]
BLOCKS = [[-1, -1], [1, -1], [1, 8], [4, 8]]


def weight(seed: int, *shape: int) -> Tensor:
    """Random numbers, some of them outliers, in float64: the order of sums decides nothing."""
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w.view(-1)[::17] *= 6
    return w


def losses(w: Tensor, scales: Scales, format: Int | Float, block: list[int], norm: float) -> Tensor:
    return block_sum((numerics.fake_quantize(w, scales, format, block) - w).abs().pow(norm), block)


def shrunk(x: float, norm: float, beta: float) -> float:
    if x == 0:
        return 0.0
    return max(abs(x) - abs(x) ** (norm - 1) / beta, 0) * (1 if x > 0 else -1)


def literal(row: list[float], bits: int, method: Hqq) -> tuple[float, int]:
    """Scale and zero point of one block in a signed asymmetric format, number by number."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def code(x: float, scale: float, zero: float) -> float:
        return min(max(round(x / scale + zero), lowest), highest)

    def loss(scale: float, zero: int) -> float:
        return sum(abs(x - scale * (code(x, scale, zero) - zero)) ** method.norm for x in row)

    scale = (max(*row, 0) - min(*row, 0)) / (highest - lowest)
    first = min(max(round(lowest - min(*row, 0) / scale), lowest), highest)
    tried = [(loss(scale, first), scale, first)]
    z, beta = float(first), method.beta
    for _ in range(method.steps):
        codes = [code(x, scale, z) for x in row]
        kept = [x - scale * shrunk(x / scale - (q - z), method.norm, beta) for x, q in zip(row, codes, strict=True)]
        scale, start = statistics.linear_regression(codes, kept)
        z, beta = -start / scale, beta * method.growth
    zero, beta = min(max(round(z), lowest), highest), method.beta
    for _ in range(method.steps):
        tried.append((loss(scale, zero), scale, zero))
        v = [code(x, scale, zero) - zero for x in row]
        kept = [x - scale * shrunk(x / scale - part, method.norm, beta) for x, part in zip(row, v, strict=True)]
        scale = sum(k * part for k, part in zip(kept, v, strict=True)) / sum(part * part for part in v)
        beta *= method.growth
    tried.append((loss(scale, zero), scale, zero))
    _, scale, zero = min(tried, key=lambda found: found[0])  # of equal ones the first
    return scale, zero


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", [Hqq(), Hqq(0.5, 2.0, 1.3, 7), Hqq(0.9, 1.0, 1.0, 3)], ids=str)
def test_against_a_loop(bits: int, method: Hqq) -> None:
    w = weight(bits, 6, 40).abs() - 0.6
    found = hqq_scales(w, Int(bits, symmetric=False), [1, -1], method)
    assert found.zero_point is not None
    for row, scale, zero in zip(w.tolist(), found.scale.flatten().tolist(), found.zero_point.flatten(), strict=True):
        wanted, code = literal(row, bits, method)
        assert scale == pytest.approx(wanted, rel=1e-10)  # sums in another order, forty times over
        assert int(zero) == code


def test_zero_points_move() -> None:
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 1
    minmax, found = (weight_scales(w, Int(2, symmetric=False), [1, -1], method) for method in (MinMax(), Hqq()))
    assert minmax.zero_point is not None
    assert found.zero_point is not None
    assert minmax.zero_point.flatten().tolist() == [-1, -1, -2, -1, -1, -1]
    assert found.zero_point.flatten().tolist() == [-2, -2, -2, -1, -1, -1]  # recorded
    assert found.zero_point.dtype == torch.int8


@pytest.mark.parametrize("format", [*ASYMMETRIC, *SYMMETRIC], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_it_is_never_worse_than_minmax_and_often_better(format: Int | Float, block: list[int]) -> None:
    better = total = 0
    for seed in range(6):
        w = weight(seed, 9, 21)
        least = losses(w, weight_scales(w, format, block, MinMax()), format, block, 0.7)
        found = losses(w, weight_scales(w, format, block, Hqq()), format, block, 0.7)
        assert (found <= least).all()
        better, total = better + int((found < 0.999 * least).sum()), total + least.numel()
    assert better >= (total / 2 if format in ASYMMETRIC[:2] else 1)


@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([*ASYMMETRIC, *SYMMETRIC]), st.integers(0, 1000))
def test_it_is_never_worse_for_any_norm(rows: int, columns: int, format: Int | Float, seed: int) -> None:
    w = weight(seed, rows, columns)
    for norm in (0.3, 1.0):
        found = hqq_scales(w, format, [1, 8], Hqq(norm, steps=5))
        least = losses(w, numerics.choose_scale(w, format, [1, 8]), format, [1, 8], norm)
        assert (losses(w, found, format, [1, 8], norm) <= least).all()


def test_a_zero_point_that_is_worse_is_not_taken_without_its_scale() -> None:
    # The steps' own zero point of row 1 is -1; every scale that goes with it is worse than min-max's pair.
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(45), dtype=torch.float64) + 1
    found, minmax = (weight_scales(w, Int(2, symmetric=False), [1, -1], method) for method in (Hqq(), MinMax()))
    assert found.zero_point is not None
    assert found.zero_point[1].item() == -2
    assert found.scale[1] == minmax.scale[1]


@pytest.mark.parametrize("format", [Int(4, symmetric=False), Int(4), Float("float4_e2m1")], ids=str)
def test_its_scales_follow_the_weights(format: Int | Float) -> None:
    w = weight(1, 8, 64)
    small, large = (hqq_scales(w * factor, format, [1, 16], Hqq()) for factor in (2.0**-9, 1.0))
    assert torch.equal(small.scale * 2**9, large.scale)
    if small.zero_point is not None and large.zero_point is not None:
        assert torch.equal(small.zero_point, large.zero_point)


@pytest.mark.parametrize("format", [Int(4, symmetric=False), Int(4)], ids=str)
@pytest.mark.parametrize("block", [[-1, -1], [-1, 8], [1, -1], [1, 8], [4, 8]], ids=str)
def test_parts_of_a_weight_make_the_whole(format: Int, block: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(2, 11, 24)
    whole = hqq_scales(w, format, block, Hqq())
    monkeypatch.setattr(hqq, "_AT_A_TIME", 50)
    parts = hqq_scales(w, format, block, Hqq())
    assert torch.equal(parts.scale, whole.scale)
    assert (parts.zero_point is None) == (whole.zero_point is None)
    if parts.zero_point is not None and whole.zero_point is not None:
        assert torch.equal(parts.zero_point, whole.zero_point)


def test_shrink_by_hand() -> None:
    x = torch.tensor([0.0, 0.25, -0.25, 4.0, 0.01, -1.0], dtype=torch.float64)
    # 0.25 - 0.25^-0.5 / 10 = 0.25 - 2 / 10; 4 - 0.5 / 10; 0.01 - 10 / 10 < 0; 1 - 1 / 10
    wanted = torch.tensor([0.0, 0.05, -0.05, 3.95, 0.0, -0.9], dtype=torch.float64)
    assert torch.allclose(shrink(x, 0.5, 10.0), wanted, rtol=0, atol=1e-15)


def test_an_outlier_is_left_to_itself() -> None:
    """Fifteen exact multiples of 1 and an element beyond them: min-max spoils them all for it, hqq only itself."""
    w = torch.tensor([[*range(-7, 8), 7.7]], dtype=torch.float64)
    found = hqq_scales(w, Int(4), [1, -1], Hqq())
    assert found.scale.item() == pytest.approx(1.0023308, abs=1e-7)  # recorded
    assert numerics.choose_scale(w, Int(4), [1, -1]).scale.item() == pytest.approx(1.1, abs=1e-15)
    assert numerics.quantize(w, found, Int(4), [1, -1]).tolist() == [[*range(-7, 8), 7]]
    errors = [(graphq.fake_quantize(w, f"int4/channel{method}") - w)[0, :15].abs().max() for method in ("/hqq", "")]
    assert errors[0] <= 0.02
    assert errors[1] >= 0.4


def test_zeros_empty_blocks_and_reduced_precision() -> None:
    assert hqq_scales(torch.zeros(2, 8), Int(4), [1, -1], Hqq()).scale.tolist() == [[1], [1]]
    assert hqq_scales(torch.zeros(2, 8), Int(4, symmetric=False), [1, 4], Hqq()).scale.tolist() == [[1, 1], [1, 1]]
    w = weight(3, 4, 16).bfloat16()
    found = weight_scales(w, Int(4), [1, -1], Hqq())
    assert found.scale.dtype == torch.float32
    assert torch.equal(found.scale, weight_scales(w.float(), Int(4), [1, -1], Hqq()).scale)
