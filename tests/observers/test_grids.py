"""Observers of grids: what hides others, what a mask may bring, what is fixed or was on the grid before."""

from typing import Any

import pytest
import torch

from graphq.errors import SpecError
from graphq.observers.grids import GridObserver
from graphq.spec.profile import FixedGrid, Grid
from graphq.spec.quant import parse_quant


def on_grid(
    text: str = "uint8/tensor", fixed: FixedGrid | None = None, moved: bool = False, **options: Any
) -> GridObserver:
    return GridObserver(Grid(0, parse_quant(text), fixed), "layer", "output", moved, **options)


def numbers_of(observer: GridObserver) -> tuple[float, int | None]:
    scale, zero_point, _ = observer.scales()
    return float(scale), None if zero_point is None else int(zero_point)


@pytest.mark.parametrize("low", [-torch.inf, -1e8, -3e38])
def test_what_hides_others_lies_below_them_on_a_grid(low: float) -> None:
    observer = on_grid()
    observer(torch.tensor([low, -10.0, 195.0]))
    assert numbers_of(observer) == (1.0, 60)
    nothing_else = on_grid()
    nothing_else(torch.tensor([low]))
    assert nothing_else.has_observed
    assert numbers_of(nothing_else) == (pytest.approx(50 / 255), 255)
    seen = on_grid()
    seen(torch.tensor([-9e7, 1.0]))
    assert numbers_of(seen)[0] == pytest.approx((9e7 + 1) / 255)


def test_grids_that_hide_are_merged() -> None:
    for first, second in (
        ([-torch.inf], [-10.0, 195.0]),
        ([-10.0, 195.0], [-torch.inf]),
        ([-10.0], [-torch.inf, 195.0]),
    ):
        one, other = on_grid(), on_grid()
        one(torch.tensor(first))
        other(torch.tensor(second))
        one.merge(other)
        assert numbers_of(one) == (1.0, 60)


def test_a_grid_is_fixed_or_moved_without_being_seen() -> None:
    fixed = on_grid(fixed=FixedGrid(1 / 256, 3))
    fixed(torch.tensor([torch.nan]))
    assert fixed.has_observed
    assert numbers_of(fixed) == (1 / 256, 3)
    assert numbers_of(on_grid("int8/tensor", FixedGrid(1 / 128, 0))) == (1 / 128, None)
    moved, giver = on_grid(moved=True), on_grid()
    moved(torch.tensor([1e6]))
    giver(torch.tensor([0.0, 255.0]))
    moved.merge(giver)
    assert numbers_of(moved) == (1.0, 0)
    again, giver = on_grid(moved=True), on_grid()
    giver(torch.tensor([0.0, 255.0]))
    giver.merge(again)
    assert numbers_of(giver) == (1.0, 0)


def test_what_is_no_number_is_refused_on_a_grid() -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(SpecError):
            on_grid()(torch.tensor([value]))


def test_numbers_that_are_known_are_held_whatever_is_seen() -> None:
    for text in ("uint8/tensor", "uint8/tensor/percentile"):
        observer = on_grid(text, numbers=(-50.0, 0.0))
        assert observer.only is None
        observer(torch.zeros(100_000))
        assert numbers_of(observer) == (pytest.approx(50 / 255), 255)
        observer(torch.tensor([-100.0, 155.0]))
        assert numbers_of(observer)[0] >= 50 / 255
    assert numbers_of(observer)[0] < 1  # percentiles leave out what is seen once, and not what is known
    hiding = on_grid(numbers=(-torch.inf, 0.0))
    assert hiding.has_observed
    hiding(torch.tensor([-10.0, 195.0]))
    assert numbers_of(hiding) == (1.0, 60)


def test_a_sum_is_held_with_any_number_that_may_be_added() -> None:
    observer = on_grid(numbers=(-50.0, 5.0), is_sum=True)
    assert numbers_of(observer) == (pytest.approx(1 / 255), 0)  # nothing is seen
    term = torch.tensor([-10.0, 190.0])
    observer(term, term)
    assert numbers_of(observer) == (1.0, 60)
    hiding = on_grid(numbers=(-torch.inf, 0.0), is_sum=True)
    hiding(term, term)
    assert numbers_of(hiding) == (pytest.approx(250 / 255), 61)
    already = on_grid(numbers=(-50.0, 0.0), is_sum=True)
    already(torch.tensor([-205.0, 50.0]), torch.tensor([-torch.inf, 50.0]))
    assert numbers_of(already) == (1.0, 205)


def test_what_is_no_valid_term_widens_nothing() -> None:
    observer = on_grid(numbers=(-50.0, 0.0), is_sum=True)
    term, valid = torch.tensor([[-10.0, 205.0], [-1000.0, 1000.0]]), torch.tensor([[True, True], [False, False]])
    observer(term, term, valid=valid)
    assert numbers_of(observer) == (pytest.approx(265 / 255), 58)
    broadcast = on_grid(numbers=(-50.0, 0.0), is_sum=True)
    broadcast(term, term[:1], valid=valid)
    assert numbers_of(broadcast) == numbers_of(observer)


def test_known_numbers_are_merged_and_follow_a_device() -> None:
    one, other = on_grid(), on_grid(numbers=(-60.0, 0.0))
    one(torch.tensor([195.0]))
    other(torch.zeros(1))
    one.merge(other)
    assert numbers_of(one) == (1.0, 60)
    first, second = (on_grid(numbers=(-50.0, 0.0), is_sum=True) for _ in range(2))
    first(torch.tensor([205.0]), torch.tensor([205.0]))
    second(torch.zeros(1), torch.zeros(1))
    first.merge(second)
    assert numbers_of(first) == (1.0, 50)
    assert one.half().reach.dtype == torch.float32
