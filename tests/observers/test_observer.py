"""What every observer does: hand on, count batches, refuse, keep its precision."""

import pytest
import torch
from torch import Tensor

from graphq.errors import PassError
from graphq.observers.observer import Observer


class Sum(Observer):
    """The sum of what comes by, and how often it looked again."""

    total: Tensor

    def __init__(self, axis: int = 0) -> None:
        super().__init__(("a", "b"))
        self.axis = axis
        self.again = 0
        self.register_buffer("total", torch.zeros(1))

    @property
    def has_observed(self) -> bool:
        return bool(self.batches)

    def settings(self) -> tuple[object, ...]:
        return (self.axis,)

    def update(self, x: Tensor, *rest: Tensor) -> None:
        self.total += x.sum() + sum(part.sum() for part in rest)

    def refine(self, x: Tensor, *rest: Tensor) -> None:
        self.again += 1

    def absorb(self, later: Observer) -> None:
        assert isinstance(later, Sum)
        self.total += later.total


def test_it_hands_on_what_it_sees() -> None:
    seen, x = Sum(), torch.ones(2, 3)
    assert seen(x, torch.ones(4)) is x
    assert (seen.total.item(), int(seen.batches)) == (10, 1)
    assert seen(x[:0]).shape == (0, 3)
    assert (seen.total.item(), int(seen.batches)) == (10, 2)
    seen.sweep = 1
    assert seen(x) is x
    assert (seen.total.item(), int(seen.batches), seen.again) == (10, 2, 1)
    assert str(seen.refuse()) == "calibration: batch 2: the input of a holds NaN or Inf"


def test_it_merges_with_its_like_alone() -> None:
    first, later = Sum(), Sum()
    first(torch.ones(2))
    later(torch.ones(3))
    first.merge(later)
    assert (first.total.item(), int(first.batches)) == (5, 2)
    later.sweep = 1
    for other in (Sum(1), later):
        with pytest.raises(PassError, match="the observers of a and a differ, they cannot be merged"):
            first.merge(other)


def test_statistics_keep_their_precision() -> None:
    seen = Sum().to(torch.bfloat16)
    assert (seen.total.dtype, seen.batches.dtype) == (torch.float32, torch.int64)
    assert seen.to("meta").total.device.type == "meta"
