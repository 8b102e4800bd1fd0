"""The front has the best solution of every size, as trying all of them finds it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.mixed_precision import knapsack
from graphq.mixed_precision.knapsack import pareto_front

# Losses are multiples of 1/16, so that sums are exact in any order.
CHOICES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40).map(lambda n: n / 16)), min_size=1, max_size=4)


@given(st.lists(CHOICES, min_size=1, max_size=6), st.integers(0, 60))
def test_equals_brute_force_at_any_size(groups, most):
    sizes = [[size for size, _ in own] for own in groups]
    losses = [[loss for _, loss in own] for own in groups]
    mixes = list(itertools.product(*(range(len(own)) for own in groups)))
    total = {mix: sum(own[c] for own, c in zip(sizes, mix, strict=True)) for mix in mixes}
    loss = {mix: sum(own[c] for own, c in zip(losses, mix, strict=True)) for mix in mixes}
    front = pareto_front(sizes, losses)
    place = front.within(most)
    fitting = [mix for mix in mixes if total[mix] <= most]
    if place is None:
        assert not fitting
        return
    found = front.choices(place)
    assert loss[found] == min(loss[mix] for mix in fitting) == front.losses[place]
    assert total[found] == front.sizes[place] == min(total[m] for m in fitting if loss[m] == loss[found])
    cut = pareto_front(sizes, losses, most)
    assert cut.sizes.tolist() == front.sizes[: place + 1].tolist()
    assert cut.losses.tolist() == front.losses[: place + 1].tolist()


@given(st.lists(CHOICES, min_size=1, max_size=6))
def test_no_solution_beats_another(groups):
    front = pareto_front([[s for s, _ in own] for own in groups], [[x for _, x in own] for own in groups])
    assert (np.diff(front.sizes) > 0).all()
    assert (np.diff(front.losses) < 0).all()


def test_many_layers_of_few_shapes_are_solved_whole():
    """Four hundred groups of four choices have 4^400 combinations, and a front of at most 11 sizes for each group."""
    generator = np.random.default_rng(0)
    losses = [sorted(generator.random(4), reverse=True) for _ in range(400)]
    front = pareto_front([[2, 3, 4, 8]] * 400, losses)
    assert front.sizes[0] == 800
    assert front.sizes[-1] == 3200
    assert front.choices(0) == (0,) * 400
    assert front.choices(len(front) - 1) == (3,) * 400


def test_a_front_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(knapsack, "MAX_STATES", 7)
    with pytest.raises(SpecError, match=r"^search: 8 sizes are possible; give fewer options, or of one group size$"):
        pareto_front([[0, 1], [0, 2], [0, 4]], [[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])


def test_nothing_fits():
    assert len(pareto_front([[2, 3]], [[1.0, 0.5]], 1)) == 0
    assert pareto_front([[2, 3]], [[1.0, 0.5]]).within(1.9) is None
