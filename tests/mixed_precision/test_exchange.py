"""Neighbours are measured, best prediction first; what is measured better is kept, and nothing grows too large."""

from hypothesis import given
from hypothesis import strategies as st

from graphq.mixed_precision.exchange import Measured, improved
from graphq.mixed_precision.mixes import filled

SIZES = [[2, 4], [2, 4], [2, 4]]


def test_finds_what_predictions_do_not_see():
    """Predicted best is the first layer; the second is what matters."""
    measured = Measured(lambda mix: [0.0, -5.0, -1.0][mix.index(1)] if 1 in mix else 1.0)
    costs = [[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]]
    assert improved((1, 0, 0), SIZES, costs, 8, measured, 4) == (0, 1, 0)
    # Its own loss; then 0->1, the smaller predicted rise; then from there, what is new.
    assert list(measured.losses)[:2] == [(1, 0, 0), (0, 1, 0)]


def test_measures_no_more_than_it_may():
    measured = Measured(lambda mix: -sum(mix))
    improved((0, 0, 0), SIZES, [[1.0, 0.0]] * 3, 12, measured, 2)
    assert len(measured.losses) == 3
    stuck = Measured(lambda mix: sum(mix))
    assert improved((0, 0, 0), SIZES, [[1.0, 0.0]] * 3, 12, stuck, 100) == (0, 0, 0)
    assert len(stuck.losses) == 1 + 3 + 3  # itself, one change, two changes


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(0, 30),
    st.integers(0, 12),
)
def test_nothing_grows_beyond_the_budget(sizes, room, steps):
    start = tuple(own.index(min(own)) for own in sizes)
    most = sum(map(min, sizes)) + room
    seen: list[int] = []

    def measure(mix) -> float:
        seen.append(sum(own[c] for own, c in zip(sizes, mix, strict=True)))
        return -float(seen[-1])

    improved(start, sizes, [[1.0 / s for s in own] for own in sizes], most, Measured(measure), steps)
    assert max(seen, default=0) <= most


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=5), st.integers(0, 30))
def test_filled_in_order(sizes, room):
    most = sum(map(min, sizes)) + room
    mix = filled(sizes, list(range(len(sizes))), most)
    taken = [own[c] for own, c in zip(sizes, mix, strict=True)]
    assert sum(taken) <= most
    for at in range(len(sizes)):  # no larger choice would have fitted when its turn came
        rest = sum(taken[:at]) + sum(min(own) for own in sizes[at + 1 :])
        assert not [s for s in sizes[at] if s > taken[at] and rest + s <= most]
