"""A histogram that streams and merges exactly, and the ranges that follow from one.

Its bins are as wide as a power of two and aligned at 0. A wider range doubles the width, which joins pairs of bins: the
counts are those that one look at all elements would have given, in whatever order and parts they came.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from graphq.errors import PassError
from graphq.numerics.codes import dequantize, quantize
from graphq.numerics.scales import Scales, code_range, scale_from_extremes
from graphq.spec.formats import Format, Int

SIDE: Final = 2048  # bins on each side of 0: the largest magnitude fills at least half of one
_FINEST: Final = -170  # below float32's smallest number by more than SIDE
_CANDIDATES: Final = 100


def width_exponent(amax: float) -> int:
    """The smallest exponent for which bins of that power of two reach above ``amax``."""
    if amax == 0:
        return _FINEST
    exponent = int(torch.frexp(torch.tensor(amax / SIDE, dtype=torch.float64))[1])
    return max(exponent, _FINEST)


def count(x: Tensor, exponent: int) -> Tensor:
    """How many elements of ``x`` lie in each of the 2 * SIDE bins, ``int64``. ``x`` is finite."""
    total = torch.zeros(2 * SIDE, dtype=torch.int64, device=x.device)
    for part in x.reshape(-1).split(1 << 20):
        index = torch.ldexp(part.double(), torch.tensor(-exponent)).floor_().to(torch.int64) + SIDE
        total += torch.bincount(index, minlength=2 * SIDE)
    return total


def widen(counts: Tensor, by: int) -> Tensor:
    """The counts of bins 2^by times as wide."""
    if by == 0:
        return counts
    index = torch.arange(-SIDE, SIDE, device=counts.device) >> min(by, 62)  # rounds down, as the floor in ``count``
    return torch.zeros_like(counts).index_add_(0, index + SIDE, counts)


@final
@dataclass(frozen=True)
class Distribution:
    """Centres and counts (both float64) of the bins that hold elements, in order, and the extremes of the elements."""

    centres: Tensor
    counts: Tensor
    width: float
    low: float
    high: float

    @property
    def amax(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))


def distribution(counts: Tensor, exponent: int, low: float, high: float) -> Distribution:
    """The distribution that the bins hold. Centres stay within the extremes, which an outer bin may reach beyond."""
    held = counts.nonzero().flatten()
    if not held.numel():
        raise PassError("a histogram without elements has no range")
    width = 2.0**exponent
    centres = ((held - SIDE).double() + 0.5) * width
    return Distribution(centres.clamp(low, high), counts[held].double(), width, low, high)


def percentile_range(seen: Distribution, percent: float, symmetric: bool) -> tuple[float, float]:
    """The range that leaves out (100 - percent) % of the elements, as the bins' edges tell it."""
    outside = (100.0 - percent) / 100.0 * float(seen.counts.sum())
    if symmetric:
        magnitudes, order = seen.centres.abs().sort()
        edge = _edge(magnitudes, seen.counts[order], outside, seen.width)
        return -min(edge, seen.amax), min(edge, seen.amax)
    high = min(_edge(seen.centres, seen.counts, outside / 2, seen.width), seen.high)
    low = max(-_edge(-seen.centres.flip(0), seen.counts.flip(0), outside / 2, seen.width), seen.low)
    return low, high


def _edge(centres: Tensor, counts: Tensor, outside: float, width: float) -> float:
    """The upper edge of the first of these ascending bins above which no more than ``outside`` elements lie."""
    above = counts.sum() - counts.cumsum(0)
    return float(centres[int((above <= outside).nonzero()[0])]) + width / 2


Score = Callable[[Distribution, Tensor, Tensor, Format], Tensor]  # of candidate ranges [C, 1]; the least is the best


def best_range(seen: Distribution, format: Format, score: Score) -> tuple[float, float]:
    """The range, among the extremes shrunk to hundredths, that ``score`` is least for: of equal ones the widest.

    Both ends shrink together; where the format is asymmetric, each end is then moved alone, twice in turn.
    """
    shares = torch.arange(_CANDIDATES, 0, -1, dtype=torch.float64).view(-1, 1) / _CANDIDATES
    low, high = torch.tensor([[seen.low]]).double(), torch.tensor([[seen.high]]).double()
    best = shares[int(score(seen, low * shares, high * shares, format).argmin())]
    if not isinstance(format, Int) or format.symmetric:
        return float(low * best), float(high * best)
    ends = [low * best, high * best]
    for end in (0, 1, 0, 1):
        moved = (low, high)[end] * shares
        tried = [moved if e == end else value.expand_as(moved) for e, value in enumerate(ends)]
        ends[end] = moved[int(score(seen, tried[0], tried[1], format).argmin())].view(1, 1)
    return float(ends[0]), float(ends[1])


def _scales(low: Tensor, high: Tensor, format: Format) -> Scales:
    return Scales(*scale_from_extremes(low.float(), high.float(), format))


def power_error(norm: float) -> Score:
    """Sum |x - x_q|^norm over the elements, each at the centre of its bin."""

    def score(seen: Distribution, low: Tensor, high: Tensor, format: Format) -> Tensor:
        x = seen.centres.float().expand(low.shape[0], -1)
        scales = _scales(low, high, format)
        back = dequantize(quantize(x, scales, format, [1, -1]), scales, format, [1, -1])
        return ((x - back).abs().double().pow(norm) * seen.counts).sum(1)

    return score


def divergence(seen: Distribution, low: Tensor, high: Tensor, format: Format) -> Tensor:
    """Kullback-Leibler divergence of the quantized distribution from the clipped one (Migacz, "8-bit inference with
    TensorRT", 2017): bins outside the range count as its outermost ones, and the elements that share a code are spread
    evenly over the bins that have it.
    """
    x = seen.centres.float()
    found: list[Tensor] = []
    for first, last in zip(low.flatten(), high.flatten(), strict=True):
        scales = _scales(first.view(1), last.view(1), format)
        reach = _reach(scales, format)
        inside = (x >= reach[0]) & (x <= reach[1])
        if not inside.any():
            found.append(torch.tensor(torch.inf, dtype=torch.float64))
            continue
        kept, counts = x[inside], seen.counts[inside]
        p = counts.clone()
        p[0] += seen.counts[x < kept[0]].sum()
        p[-1] += seen.counts[x > kept[-1]].sum()
        _, code = quantize(kept, scales, format, [-1]).to(torch.int64).unique(return_inverse=True)
        mass = torch.zeros(int(code.max()) + 1, dtype=torch.float64)
        bins = torch.zeros_like(mass).index_add_(0, code, torch.ones_like(counts))
        q = (mass.index_add_(0, code, counts) / bins)[code]
        p, q = p / p.sum(), q / q.sum()
        found.append((p * (p / q).log()).sum())
    return torch.stack(found)


def _reach(scales: Scales, format: Format) -> tuple[float, float]:
    """The values that the outermost codes stand for, and half a step more of integers."""
    if isinstance(format, Int):
        lowest, highest = code_range(format)
        zero = 0.0 if scales.zero_point is None else float(scales.zero_point)
        scale = float(scales.scale)
        return (lowest - zero - 0.5) * scale, (highest - zero + 0.5) * scale
    ends = torch.tensor([-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max])
    low, high = dequantize(quantize(ends, scales, format, [-1]), scales, format, [-1]).tolist()
    return low, high
