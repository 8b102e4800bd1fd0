"""Ranges narrower than the extremes: mse and ssz against literal loops, percentiles by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphq
from graphq import numerics
from graphq.errors import PassError
from graphq.numerics import Scales
from graphq.numerics.ranges import mse_extremes, percentile_extremes, ssz_scale, weight_scales
from graphq.spec.formats import Float, Format, Int
from graphq.spec.quant import Histogram, MinMax, MovingAverage, Mse, Ofmr, Percentile, Ssz

FORMATS = [Int(4), Int(4, divisor="half"), Int(4, symmetric=False), Int(2), Int(3, divisor="by_sign")]
FLOATS = [Float("float4_e2m1"), Float("hifloat8"), Float("float8_e4m3fn")]


def weight(seed: int, *shape: int) -> Tensor:
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    w[0, 0] = 8
    return w


def memoryless_mse(block: Tensor, format: Format, method: Mse) -> list[tuple[float, Tensor, Tensor]]:
    """llm-compressor's search on one block: every candidate's error and extremes, in order."""
    low, high = block.min(), block.max()
    tried = []
    for i in range(int(method.shrink * method.grid)):
        p = 1 - i / method.grid
        scale, zero_point = numerics.scale_from_extremes(low * p, high * p, format)
        scales = Scales(scale.view(1), None if zero_point is None else zero_point.view(1))
        back = numerics.dequantize(numerics.quantize(block, scales, format, [-1]), scales, format, [-1])
        tried.append(((back - block).abs().pow(method.norm).sum().item(), low * p, high * p))
    return tried


def split(w: Tensor, block: list[int]) -> list[list[Tensor]]:
    sizes = [n if b < 0 else b for n, b in zip(w.shape, block, strict=True)]
    return [
        [w[r : r + sizes[0], c : c + sizes[1]].flatten() for c in range(0, w.shape[1], sizes[1])]
        for r in range(0, w.shape[0], sizes[0])
    ]


@pytest.mark.parametrize("format", [*FORMATS, *FLOATS], ids=str)
@pytest.mark.parametrize("block", [[-1, -1], [1, -1], [1, 8], [4, 8]], ids=str)
@pytest.mark.parametrize("method", [Mse(), Mse(0.8, 40, 2, 3), Mse(0.5, 20, 3, 1)], ids=str)
def test_mse_against_a_loop(format: Format, block: list[int], method: Mse) -> None:
    w = weight(7, 5, 21).double()  # float64, so that the order of sums decides nothing
    low, high = mse_extremes(w, format, block, method)
    tried = [[memoryless_mse(part, format, method) for part in row] for row in split(w, block)]
    # A step that improves no block counts against patience; the search ends for all blocks at once.
    best = [[(math.inf, torch.tensor(0.0), torch.tensor(0.0))] * len(row) for row in tried]
    waited = 0
    for step in range(int(method.shrink * method.grid)):
        improved = False
        for r, row in enumerate(tried):
            for c, candidates in enumerate(row):
                if candidates[step][0] < best[r][c][0]:
                    best[r][c] = candidates[step]
                    improved = True
        waited = 0 if improved else waited + 1
        if waited >= method.patience:
            break
    assert low.tolist() == [[found[1].item() for found in row] for row in best]
    assert high.tolist() == [[found[2].item() for found in row] for row in best]


def test_mse_tries_twenty_ranges_down_to_81_percent() -> None:
    def found(bulk: float) -> float:
        w = torch.tensor([[1.0] + [bulk] * 200])
        # With this norm it is the number of inexact elements that counts: all but one are exact at the scale bulk / 7.
        return mse_extremes(w, Int(4), [1, -1], Mse(norm=0.01, patience=100))[1].item()

    assert found(0.81) == torch.tensor(1 - 19 / 100).item()
    assert found(0.9) == torch.tensor(1 - 10 / 100).item()
    assert found(0.8) != torch.tensor(1 - 20 / 100).item()


def test_mse_patience() -> None:
    # At 0.87 / (1 / 7) = 6.09 the bulk is nearly exact, and only at 0.88 of the range, where it is 6.92, is it better.
    w = torch.tensor([[1.0] + [0.87] * 300])
    errors = [error for error, _, _ in memoryless_mse(w[0], Int(4), Mse(norm=1.0))]
    first = next(step for step, error in enumerate(errors) if error < errors[0])
    found = [mse_extremes(w, Int(4), [1, -1], Mse(norm=1.0, patience=p))[1].item() for p in (1, 5, first - 1, first)]
    assert found[:3] == [1, 1, 1]
    assert found[3] < 0.89
    # Patience is for all blocks together: one that improves at each step keeps the others going.
    w = torch.stack([w[0], torch.tensor([1.0] + [0.22] * 300)])
    assert mse_extremes(w, Int(4), [1, -1], Mse(norm=1.0, patience=5))[1][0].item() < 0.89


@pytest.mark.parametrize("block", [[-1, -1], [1, -1], [1, 8], [4, 8]], ids=str)
@pytest.mark.parametrize("format", [Int(4), Int(8), Int(2), Int(4, divisor="half"), Int(3, divisor="by_sign")], ids=str)
def test_ssz_is_never_worse_than_minmax(format: Int, block: list[int]) -> None:
    for seed in range(8):
        w = weight(seed, 6, 20).double()

        def errors(scale: Tensor, w: Tensor = w) -> Tensor:
            back = numerics.fake_quantize(w, Scales(scale), format, block)
            return torch.tensor([[(part.square()).sum() for part in row] for row in split(back - w, block)])

        found = ssz_scale(w, format, block, 50)
        minmax = numerics.choose_scale(w, format, block).scale
        assert (errors(found) <= errors(minmax)).all()
        # More steps are never worse.
        assert (errors(found) <= errors(ssz_scale(w, format, block, 3))).all()
        assert torch.equal(ssz_scale(w, format, block, 1), minmax)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ssz_against_a_loop(bits: int) -> None:
    w = weight(bits, 1, 40).double()
    limit = 2 ** (bits - 1)
    scale = w.abs().max() / (limit - 1)
    tried = []
    for _ in range(50):
        q = (w / scale).round().clamp(-limit, limit - 1)
        tried.append((((q * scale - w) ** 2).sum().item(), scale.item()))
        scale = (w * q).sum() / (q * q).sum()
    # Sums in another order: 40 terms, 2^-53 each.
    assert ssz_scale(w, Int(bits), [1, -1], 50).item() == pytest.approx(min(tried)[1], rel=1e-13)


def test_ssz_recovers_what_was_quantized() -> None:
    # Codes from -6 to 7 and a scale of few bits: the sums are exact, and so is the scale.
    codes = torch.randint(-6, 8, (4, 32), generator=torch.Generator().manual_seed(1)).float()
    codes[:, 0] = 7
    steps = torch.tensor([[0.5], [0.375], [3.0], [2.0**-20]])
    for scale in (
        ssz_scale(codes * steps, Int(4), [1, -1], 50),
        weight_scales(codes * steps, Int(4), [1, -1], Ssz()).scale,
    ):
        assert torch.equal(scale, steps)
    assert torch.equal(graphq.fake_quantize(codes * steps, "int4/channel/ssz"), codes * steps)


def test_ssz_of_zeros() -> None:
    assert ssz_scale(torch.zeros(2, 8), Int(4), [1, -1], 50).tolist() == [[1], [1]]


# -- percentiles

TEN = torch.tensor([[-9.0, 1, 2, -3, 4, 5, -6, 7, 8, 100]])


@pytest.mark.parametrize(
    ("percent", "symmetric", "low", "high"),
    [
        (100, True, -100, 100),
        (90, True, -9, 9),  # one of ten left out: 100
        (95, True, -100, 100),  # half an element is none
        (70, True, -7, 7),
        (80, False, -6, 8),  # one at each end
        (90, False, -9, 100),  # half an element at each end
        (60, False, -3, 7),
        (100, False, -9, 100),
    ],
)
def test_percentiles_by_hand(percent: int, symmetric: bool, low: float, high: float) -> None:
    for block in ([-1, -1], [1, -1]):
        got = percentile_extremes(TEN, block, float(percent), symmetric)
        assert [part.tolist() for part in got] == [[[low]], [[high]]]


def test_percentiles_of_channels_and_shapes() -> None:
    w = torch.stack([torch.arange(100.0), torch.arange(0, -200.0, -2)]).reshape(2, 10, 10)
    low, high = percentile_extremes(w, [1, -1, -1], 98.0, False)
    assert low.tolist() == [[[1]], [[-196]]]
    assert high.tolist() == [[[98]], [[-2]]]
    low, high = percentile_extremes(w, [1, -1, -1], 99.0, True)
    assert high.flatten().tolist() == [98, 196]
    assert torch.equal(low, -high)
    low, high = percentile_extremes(w.reshape(2, 100), [-1, -1], 99.0, True)
    assert high.tolist() == [[196 - 2]]  # 198 and 196 left out of 200
    empty, _ = percentile_extremes(torch.zeros(0, 4), [-1, -1], 99.0, True)
    assert empty.tolist() == [[0]]


def test_percentile_scales() -> None:
    found = weight_scales(TEN, Int(8), [1, -1], Percentile(90.0))
    assert found.scale.tolist() == [[torch.tensor(9 / 127).item()]]
    back = graphq.fake_quantize(TEN, "int8/channel/percentile90")
    assert back[0, 9].item() == pytest.approx(9, abs=1e-6)  # float32's 9 / 127 x 127
    assert weight_scales(TEN, Int(8, symmetric=False), [1, -1], Percentile(80.0)).zero_point is not None


# -- what a method means for a weight


def test_methods_that_need_more_than_the_weight() -> None:
    w = torch.ones(2, 4)
    with pytest.raises(PassError, match=r"^ofmr measures the layer's output, which needs calibration$"):
        weight_scales(w, Int(8), [1, -1], Ofmr())
    for method in (MovingAverage(), Histogram()):
        with pytest.raises(PassError, match=f"^{method} is for activations, seen batch by batch$"):
            weight_scales(w, Int(8), [1, -1], method)
    with pytest.raises(PassError, match=r"^percentile: blocks of a few elements have no percentiles; one scale per"):
        percentile_extremes(w, [1, 2], 99.0, True)


@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([*FORMATS, *FLOATS]), st.integers(0, 1000))
def test_mse_is_never_worse_than_minmax(rows: int, columns: int, format: Format, seed: int) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()

    def errors(method) -> Tensor:
        scales = weight_scales(w, format, [1, -1], method)
        return (numerics.fake_quantize(w, scales, format, [1, -1]) - w).abs().pow(2.4).sum(1)

    assert (errors(Mse()) <= errors(MinMax())).all()
