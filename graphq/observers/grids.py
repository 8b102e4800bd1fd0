"""The observer of a grid, which quantizer placement puts between a tensor and its readers."""

from collections.abc import Sequence
from typing import Final, final

import torch
from torch import Tensor

from graphq.numerics import Scales, code_dtype
from graphq.numerics import scale_from_extremes as from_extremes
from graphq.observers.observer import Observer
from graphq.observers.ranges import observer_for
from graphq.spec.formats import Int
from graphq.spec.profile import Grid

HIDDEN: Final = -1e8  # what is as low hides a score from a softmax; activations are not, and float16 holds none
HIDES: Final = -1e9  # what graphq adds to a score that a mask hides
BELOW: Final = 50.0  # how far below all that is visible hidden scores have to be: e^-50 of a weight is none


@final
class GridObserver(Observer):
    """The range of a tensor that is to be on a grid, which several tensors may share.

    Of elements that hide others (``HIDDEN``, such as -inf) it holds so much that they stay ``BELOW`` all the rest, or
    ``depth``, where they are added to scores that differ by more.
    ``moved``: everything that it holds was on the grid before, so that nothing is to be seen of it. ``numbers``: what
    the tensor may hold besides what is seen of it, or, where it is a sum and observed beside one term, what may be
    added to that.
    """

    axis = None
    hides: Tensor
    reach: Tensor
    bases: Tensor

    def __init__(
        self,
        grid: Grid,
        layer: str,
        role: str,
        moved: bool = False,
        numbers: Sequence[float] = (),
        is_sum: bool = False,
    ) -> None:
        super().__init__((layer,))
        self.grid = grid
        self.role = role
        self.moved = moved or grid.fixed is not None
        self.ranges = observer_for(grid.quant, (layer,), lambda: ())
        self.ranges.role = role
        self.register_buffer("hides", torch.tensor(any(number <= HIDDEN for number in numbers)))
        self.register_buffer("reach", torch.tensor([torch.inf, -torch.inf]))
        self.register_buffer("bases", torch.tensor([torch.inf, -torch.inf]))  # extremes of what numbers are added to
        self.depth = BELOW
        self._added = [number for number in numbers if number > HIDDEN]
        if not is_sum:
            self._widen(self._added)

    def _widen(self, ends: Sequence[float]) -> None:
        """The range reaches as far as these."""
        if ends:
            _widen(self.reach, min(ends), max(ends))

    @property
    def has_observed(self) -> bool:
        return self.moved or self.ranges.has_observed or bool(self.hides)

    @property
    def only(self) -> float | None:
        """The one number that every element is, as far as is known; None where there may be more."""
        return None if self.hides or bool(self.reach[0] <= self.reach[1]) else self.ranges.only

    @property
    def spread(self) -> float:
        """How far apart two scores are at most that a mask is added to; 0 where none was seen."""
        low, high = self.bases
        if self.ranges.has_observed and bool(low > high):
            low, high = self.ranges.extremes()
        return max(float(high - low), 0.0)

    def valid_part(self, x: Tensor, valid: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return (x[valid], *(term[valid] if term.shape == x.shape else term for term in rest))

    def update(self, x: Tensor, *rest: Tensor) -> None:
        if self.moved:
            return
        for term in rest:
            seen = term[term > HIDDEN]
            if seen.numel():
                low, high = float(seen.amin()), float(seen.amax())
                _widen(self.bases, low, high)
                if self._added:
                    self._widen([low + min(self._added), high + max(self._added)])
        if bool((x <= HIDDEN).any()):
            self.hides.fill_(True)
            x = x[x > HIDDEN]
        if x.numel():
            self.ranges.update(x)

    def settings(self) -> tuple[object, ...]:
        return (self.grid,)

    def absorb(self, later: Observer) -> None:
        assert isinstance(later, GridObserver)
        if later.moved:
            return
        self.hides |= later.hides
        self._widen([float(end) for end in later.reach if end.isfinite()])
        if self.moved or not self.ranges.has_observed:
            self.ranges, self.moved = later.ranges, False
        elif later.ranges.has_observed:
            self.ranges.absorb(later.ranges)

    def scales(self) -> Scales:
        """The scale and zero point of the grid. Of zeros alone it is that of [0, 1]: with a scale of 1 beside others of
        1e-3 a consumer's multipliers for sums and products are out of range.
        """
        fixed, format = self.grid.fixed, self.grid.quant.format
        assert isinstance(format, Int)
        if fixed is not None:
            zero_point = None if format.symmetric else torch.tensor(fixed.zero_point, dtype=code_dtype(format))
            return Scales(torch.tensor(fixed.scale), zero_point)
        low, high = self.ranges.extremes() if self.ranges.has_observed else (torch.zeros(()), torch.zeros(()))
        low, high = torch.minimum(low, self.reach[0]), torch.maximum(high, self.reach[1])
        if not self.hides and bool((low == 0) & (high == 0)):
            high = torch.ones_like(high)
        return Scales(*from_extremes(low.clamp(max=0) - self.depth if self.hides else low, high, format))


def _widen(extremes: Tensor, low: float, high: float) -> None:
    extremes[0], extremes[1] = extremes[0].clamp(max=low), extremes[1].clamp(min=high)
