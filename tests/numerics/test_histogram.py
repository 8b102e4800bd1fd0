"""The histogram's scores against literal loops, and the ranges that follow from them."""

import math

import pytest
import torch
from torch import Tensor

from graphq.errors import PassError
from graphq.numerics import histogram
from graphq.numerics.histogram import Distribution
from graphq.spec.formats import Float, Format, Int


def of(x: Tensor) -> Distribution:
    exponent = histogram.width_exponent(float(x.abs().max()))
    return histogram.distribution(histogram.count(x, exponent), exponent, float(x.min()), float(x.max()))


def sample(count: int = 3000) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(3))
    x[:3] = torch.tensor([9.0, -4.0, 14.0])
    return x


def code(x: float, low: float, high: float, bits: int, symmetric: bool) -> int:
    """The integer code of a number, by the definition of scale and zero point."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        return min(max(round(x / (max(-low, high) / highest)), lowest), highest)
    scale = (max(high, 0) - min(low, 0)) / (highest - lowest)
    zero = round(lowest - min(low, 0) / scale)
    return min(max(round(x / scale) + zero, lowest), highest)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.21])
def test_divergence_is_that_of_the_distributions(share: float, symmetric: bool) -> None:
    seen, bits = of(sample()), 4
    low, high = seen.low * share, seen.high * share
    format = Int(bits, symmetric)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scale, zero = max(-low, high) / highest, 0
    else:
        scale = (high - low) / (highest - lowest)
        zero = round(lowest - low / scale)
    first, last = (lowest - zero - 0.5) * scale, (highest - zero + 0.5) * scale
    bins = list(zip(seen.centres.tolist(), seen.counts.tolist(), strict=True))
    inside = [(x, n) for x, n in bins if first <= x <= last]
    p = [n for _, n in inside]
    p[0] += sum(n for x, n in bins if x < inside[0][0])
    p[-1] += sum(n for x, n in bins if x > inside[-1][0])
    codes = [code(x, low, high, bits, symmetric) for x, _ in inside]
    mass = {c: sum(n for (_, n), d in zip(inside, codes, strict=True) if d == c) for c in set(codes)}
    q = [mass[c] / codes.count(c) for c in codes]
    expected = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    ends = torch.tensor([[low]]).double(), torch.tensor([[high]]).double()
    # float64 sums of a few thousand terms, codes of float32 quotients: no bin lies on a half here
    assert histogram.divergence(seen, *ends, format).item() == pytest.approx(expected, rel=1e-9)


def test_a_range_without_elements_is_never_the_best() -> None:
    seen = of(torch.tensor([5.0, 5.0, 5.0]))
    ends = torch.tensor([[-1e-3]]).double(), torch.tensor([[1e-3]]).double()
    assert histogram.divergence(seen, *ends, Int(8)).item() == math.inf


@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
def test_power_error_is_the_sum_over_the_elements(norm: float) -> None:
    seen = of(sample())
    low, high, scale = -3.0, 5.0, 5.0 / 7
    expected = sum(
        n * abs(x - code(x, low, high, 4, True) * scale) ** norm
        for x, n in zip(seen.centres.tolist(), seen.counts.tolist(), strict=True)
    )
    ends = torch.tensor([[low]]).double(), torch.tensor([[high]]).double()
    found = histogram.power_error(norm)(seen, *ends, Int(4)).item()
    assert found == pytest.approx(expected, rel=1e-5)  # the differences are float32's


def test_each_end_of_an_asymmetric_range_moves_alone() -> None:
    x = torch.cat([torch.rand(20_000, generator=torch.Generator().manual_seed(1)) - 1, torch.tensor([12.0])])
    seen, format, score = of(x), Int(4, symmetric=False), histogram.power_error(2.0)
    low, high = histogram.best_range(seen, format, score)
    shares = torch.arange(1, 101, dtype=torch.float64).view(-1, 1) / 100
    together = score(seen, seen.low * shares, seen.high * shares, format).min()
    alone = score(seen, torch.tensor([[low]]).double(), torch.tensor([[high]]).double(), format)
    assert alone.item() < 0.5 * together.item()
    assert high / seen.high < 0.5 * low / seen.low


@pytest.mark.parametrize("format", [Int(8), Float("float8_e4m3fn")], ids=str)
def test_the_widest_of_equally_good_ranges(format: Format) -> None:
    assert histogram.best_range(of(torch.zeros(4)), format, histogram.power_error(2.0)) == (0, 0)


def test_widths() -> None:
    assert histogram.width_exponent(2047.0) == 0
    assert histogram.width_exponent(2048.0) == 1  # the last bin ends before 2048
    assert histogram.width_exponent(1.0) == -10
    assert histogram.width_exponent(0.0) < -149 - 11
    with pytest.raises(PassError, match="a histogram without elements has no range"):
        histogram.distribution(torch.zeros(2 * histogram.SIDE, dtype=torch.int64), 0, 0.0, 0.0)


def test_wide_bins_hold_what_finer_ones_held() -> None:
    x = sample()
    for by in (0, 1, 5, 11, 40, 400):
        exponent = histogram.width_exponent(14.0)
        assert torch.equal(histogram.widen(histogram.count(x, exponent), by), histogram.count(x, exponent + by))
