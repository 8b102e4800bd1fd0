"""Observers of ranges: they keep what an activation's scale, or a weight's, will follow from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never, final

import torch
from torch import Tensor

from graphq.errors import PassError, SpecError
from graphq.numerics import (
    Scales,
    activation_block,
    block_extremes,
    fake_quantize,
    histogram,
    nvfp4_global_scale,
    ofmr,
)
from graphq.numerics import scale_from_extremes as from_extremes
from graphq.numerics.ranges import weight_scales
from graphq.observers.observer import Observer
from graphq.spec.formats import Int, Nvfp4
from graphq.spec.quant import (
    Entropy,
    Histogram,
    Hqq,
    MinMax,
    MovingAverage,
    Mse,
    Ofmr,
    Percentile,
    PerChannel,
    Quant,
    Ssz,
)


class RangeObserver(Observer):
    """The extremes of an activation, which its fixed scale follows from. An element that is NaN or infinite raises
    ``SpecError``.
    """

    low: Tensor
    high: Tensor
    axis = None

    def __init__(self, quant: Quant, layers: tuple[str, ...]) -> None:
        super().__init__(layers)
        self.quant = quant
        self.register_buffer("low", torch.tensor(torch.inf, dtype=torch.float32))
        self.register_buffer("high", torch.tensor(-torch.inf, dtype=torch.float32))

    @property
    def has_observed(self) -> bool:
        return bool(self.low <= self.high)

    @property
    def only(self) -> float | None:
        """The one number that every element seen was, from which no range follows; None where there were more."""
        return float(self.low) if bool(self.low == self.high) else None

    def settings(self) -> tuple[object, ...]:
        return (self.quant,)

    def update(self, x: Tensor, *rest: Tensor) -> None:
        low, high = x.amin().float(), x.amax().float()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise self.refuse()
        self.see_within(x, low, high)
        # In place: tensors made in inference mode could not be loaded into later.
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def see_within(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in a batch with these extremes, before they are taken in."""

    def absorb(self, later: Observer) -> None:
        assert isinstance(later, RangeObserver)
        self.take_within(later)
        self.low.copy_(torch.minimum(self.low, later.low))
        self.high.copy_(torch.maximum(self.high, later.high))

    def take_within(self, later: "RangeObserver") -> None:
        """What ``take`` does besides the extremes, before these."""

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The range that the scale has to hold."""
        return self.low, self.high

    def scales(self) -> Scales:
        """The fixed scale and zero point of this activation; nvfp4 has only its global scale fixed, as ``scale``."""
        low, high = self.extremes()
        if isinstance(self.quant.format, Nvfp4):
            return Scales(nvfp4_global_scale(torch.maximum(low.abs(), high.abs())))
        return Scales(*from_extremes(low, high, self.quant.format))


@final
class MinMaxObserver(RangeObserver):
    """The smallest and the largest element seen."""


@final
class MovingAverageObserver(RangeObserver):
    """The moving average of the batches' extremes: the first batch's, then old * (1 - constant) + new * constant."""

    first: Tensor
    rest: Tensor
    share: Tensor

    def __init__(self, quant: Quant, layers: tuple[str, ...], constant: float) -> None:
        super().__init__(quant, layers)
        self.constant = constant
        # average = first * share + rest, where share = (1 - constant)^batches: parts that can be continued.
        self.register_buffer("first", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("rest", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("share", torch.ones((), dtype=torch.float64))

    def see_within(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        ends = torch.stack([low, high]).double()
        if not self.has_observed:
            self.first.copy_(ends)
        self.rest.mul_(1 - self.constant).add_(self.constant * ends)
        self.share.mul_(1 - self.constant)

    def take_within(self, later: "RangeObserver") -> None:
        assert isinstance(later, MovingAverageObserver)
        if not self.has_observed:
            self.first.copy_(later.first)
        self.rest.mul_(later.share).add_(later.rest)
        self.share.mul_(later.share)

    def extremes(self) -> tuple[Tensor, Tensor]:
        low, high = (self.first * self.share + self.rest).float()
        return low, high


@final
class HistogramObserver(RangeObserver):
    """A histogram of all elements, from which the format's range is found by the quant's method."""

    counts: Tensor
    exponent: Tensor

    def __init__(self, quant: Quant, layers: tuple[str, ...]) -> None:
        super().__init__(quant, layers)
        self.register_buffer("counts", torch.zeros(2 * histogram.SIDE, dtype=torch.int64))
        self.register_buffer("exponent", torch.tensor(histogram.width_exponent(0.0)))

    def _widen(self, exponent: int) -> None:
        self.counts.copy_(histogram.widen(self.counts, exponent - int(self.exponent)))
        self.exponent.fill_(exponent)

    def see_within(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        exponent = max(int(self.exponent), histogram.width_exponent(max(abs(float(low)), abs(float(high)))))
        self._widen(exponent)
        self.counts += histogram.count(x, exponent)

    def take_within(self, later: "RangeObserver") -> None:
        assert isinstance(later, HistogramObserver)
        exponent = max(int(self.exponent), int(later.exponent))
        self._widen(exponent)
        self.counts += histogram.widen(later.counts, exponent - int(later.exponent))

    def extremes(self) -> tuple[Tensor, Tensor]:
        seen = histogram.distribution(self.counts, int(self.exponent), float(self.low), float(self.high))
        format = self.quant.format
        match self.quant.method:
            case Percentile(percent):
                symmetric = not isinstance(format, Int) or format.symmetric
                ends = histogram.percentile_range(seen, percent, symmetric)
            case Histogram():
                ends = histogram.best_range(seen, format, histogram.power_error(2.0))
            case Mse(norm=norm):
                ends = histogram.best_range(seen, format, histogram.power_error(norm))
            case Entropy():
                ends = histogram.best_range(seen, format, histogram.divergence)
            case other:
                raise PassError(f"{other} does not use a histogram")
        return torch.tensor(ends[0], dtype=torch.float32), torch.tensor(ends[1], dtype=torch.float32)


@final
@dataclass(frozen=True)
class OutputMap:
    """What a layer makes of an input without its bias, ``apply(x, weight)``, and the layer's float weight.

    ``channel_axis``: that of the output channels in its output. ``block``: that of the weight's scales.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    channel_axis: int
    block: tuple[int, ...]


@final
class OfmrObserver(RangeObserver):
    """The output errors of the layers that read an activation, for each of eleven scales of it (``Ofmr``).

    The first sweep finds the range around which the scales lie, the second measures. Layers that share an activation
    share its scale: their losses are added.
    """

    losses: Tensor
    sweeps = 2

    def __init__(self, quant: Quant, layers: tuple[str, ...], maps: Sequence[OutputMap]) -> None:
        super().__init__(quant, layers)
        self.maps = tuple(maps)
        self.axis = -1  # whole rows, which the layers multiply
        self.reads_windows = any(output.channel_axis != -1 for output in maps)
        self.register_buffer("losses", torch.zeros(2 * ofmr.AROUND + 1, dtype=torch.float32))

    def _exponents(self) -> Tensor:
        assert isinstance(self.quant.method, Ofmr)
        return ofmr.candidates(self.low, self.high, self.quant.format, self.quant.method.relative)

    def _scale(self, exponent: Tensor) -> Scales:
        return Scales(torch.ldexp(torch.ones((), device=exponent.device), exponent))

    def refine(self, x: Tensor, *rest: Tensor) -> None:
        if not x.numel():
            return
        block = activation_block(self.quant.granularity, x.dim())
        wanted = [output.apply(x, output.weight) for output in self.maps]
        for number, exponent in enumerate(self._exponents()):
            back = fake_quantize(x, self._scale(exponent), self.quant.format, block)
            for output, y in zip(self.maps, wanted, strict=True):
                self.losses[number] += ofmr.loss(output.apply(back, output.weight) - y, None)

    def take_within(self, later: "RangeObserver") -> None:
        assert isinstance(later, OfmrObserver)
        self.losses += later.losses

    def scales(self) -> Scales:
        if not self.losses.isfinite().any():
            raise SpecError(f"{self.layers[0]}: {self.quant}: no scale gives a finite error of the layer's output")
        return self._scale(self._exponents()[int(ofmr.best(self.losses))])


@final
class OfmrWeightObserver(RangeObserver):
    """The output errors of a layer for each of eleven scales of its weight, by output channel where these have scales
    of their own.
    """

    losses: Tensor

    def __init__(self, quant: Quant, layers: tuple[str, ...], output: OutputMap) -> None:
        super().__init__(quant, layers)
        self.output = output
        self.axis = -1
        self.reads_windows = output.channel_axis != -1
        found = weight_scales(output.weight, quant.format, output.block, MinMax()).scale
        self.like = torch.ones_like(found)
        self.by_channel = isinstance(quant.granularity, PerChannel)
        self.register_buffer("losses", torch.zeros(2 * ofmr.AROUND + 1, found.numel(), dtype=torch.float32))

    def _candidates(self) -> list[Scales]:
        assert isinstance(self.quant.method, Ofmr)
        low, high = block_extremes(self.output.weight, self.output.block)
        exponents = ofmr.candidates(low.float(), high.float(), self.quant.format, self.quant.method.relative)
        return [Scales(torch.ldexp(self.like, exponent)) for exponent in exponents]

    def see_within(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        w, axis = self.output.weight, self.output.channel_axis if self.by_channel else None
        wanted = self.output.apply(x, w)
        for number, scales in enumerate(self._candidates()):
            back = fake_quantize(w, scales, self.quant.format, self.output.block)
            self.losses[number] += ofmr.loss(self.output.apply(x, back) - wanted, axis)

    def take_within(self, later: "RangeObserver") -> None:
        assert isinstance(later, OfmrWeightObserver)
        self.losses += later.losses

    def scales(self) -> Scales:
        least = ofmr.best(self.losses)
        if not self.losses.gather(0, least[None]).isfinite().all():
            raise SpecError(f"{self.layers[0]}: {self.quant}: no scale gives a finite error of the layer's output")
        found = torch.stack([scales.scale for scales in self._candidates()]).flatten(1)
        return Scales(found.gather(0, least[None]).view_as(self.like))


def observer_for(quant: Quant, layers: tuple[str, ...], maps: Callable[[], Sequence[OutputMap]]) -> RangeObserver:
    """A new observer of an activation; ``maps``: the outputs of the layers that read it."""
    match quant.method:
        case MinMax():
            return MinMaxObserver(quant, layers)
        case MovingAverage(constant):
            return MovingAverageObserver(quant, layers, constant)
        case Percentile() | Histogram() | Entropy() | Mse():
            return HistogramObserver(quant, layers)
        case Ofmr():
            return OfmrObserver(quant, layers, maps())
        case Ssz() | Hqq():
            raise PassError(f"{quant}: {quant.method} is for weights")
        case _:
            assert_never(quant.method)
