"""Observers of tensors with several fixed scales: keys and values, of whose heads or channels each has its own."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from graphq.numerics import block_extremes, scale_shape
from graphq.observers.observer import Observer
from graphq.observers.ranges import RangeObserver
from graphq.spec.quant import Quant


@final
class BlockRangeObserver(RangeObserver):
    """The extremes of each block of an activation; with a ``constant``, their moving average over batches.

    ``shape``: that of the activation, 1 where a block takes a whole axis. What a mask leaves out is taken for 0, which
    every range holds.
    """

    first: Tensor
    rest: Tensor
    share: Tensor

    def __init__(
        self,
        quant: Quant,
        layers: tuple[str, ...],
        block: Sequence[int],
        shape: Sequence[int],
        constant: float | None = None,
    ) -> None:
        super().__init__(quant, layers)
        self.block = tuple(block)
        self.constant = constant
        sizes = scale_shape(shape, block)
        self.low = torch.full(sizes, torch.inf)
        self.high = torch.full(sizes, -torch.inf)
        # average = first * share + rest, where share = (1 - constant)^batches: parts that can be continued.
        self.register_buffer("first", torch.zeros(2, *sizes, dtype=torch.float64))
        self.register_buffer("rest", torch.zeros(2, *sizes, dtype=torch.float64))
        self.register_buffer("share", torch.ones((), dtype=torch.float64))

    @property
    def has_observed(self) -> bool:
        return bool((self.low <= self.high).all())

    @property
    def only(self) -> float | None:
        low = self.low.min()
        return float(low) if bool(low == self.high.max()) else None

    def settings(self) -> tuple[object, ...]:
        return (self.quant, self.block, tuple(self.low.shape), self.constant)

    def valid_part(self, x: Tensor, valid: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return (x.where(valid, 0), *rest)

    def update(self, x: Tensor, *rest: Tensor) -> None:
        low, high = (part.float() for part in block_extremes(x, self.block))
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise self.refuse()
        if self.constant is not None:
            ends = torch.stack([low, high]).double()
            if not self.has_observed:
                self.first.copy_(ends)
            self.rest.mul_(1 - self.constant).add_(self.constant * ends)
            self.share.mul_(1 - self.constant)
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def absorb(self, later: Observer) -> None:
        assert isinstance(later, BlockRangeObserver)
        if not later.has_observed:
            return
        if not self.has_observed:
            self.first.copy_(later.first)
        self.rest.mul_(later.share).add_(later.rest)
        self.share.mul_(later.share)
        self.low.copy_(torch.minimum(self.low, later.low))
        self.high.copy_(torch.maximum(self.high, later.high))

    def extremes(self) -> tuple[Tensor, Tensor]:
        if self.constant is None:
            return self.low, self.high
        low, high = (self.first * self.share + self.rest).float()
        return low, high
