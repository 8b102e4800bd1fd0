"""An observer of an activation whose fixed scale is known before any data comes by."""

from typing import final

from torch import Tensor

from graphq.numerics import Scales
from graphq.observers.observer import Observer
from graphq.observers.ranges import RangeObserver
from graphq.spec.quant import Quant


@final
class KnownScales(RangeObserver):
    """Gives the scales that it was made with, whatever it sees."""

    def __init__(self, quant: Quant, layers: tuple[str, ...], scales: Scales) -> None:
        super().__init__(quant, layers)
        self._scales = scales

    @property
    def has_observed(self) -> bool:
        return True

    @property
    def only(self) -> float | None:
        return None

    def update(self, x: Tensor, *rest: Tensor) -> None:
        """Nothing is taken in."""

    def absorb(self, later: Observer) -> None:
        """Nothing is taken in."""

    def scales(self) -> Scales:
        return self._scales
