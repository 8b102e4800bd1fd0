"""Which inputs a region has steps for, and how operands are read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphq.runtime.region_steps import NoSteps, spread


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=5), st.integers(0, 2))
def test_an_operand_is_read_as_it_is_broadcast(axes: list[tuple[int, bool]], dropped: int) -> None:
    a = [size for size, _ in axes]
    b = [size if own else 1 for size, own in axes]
    while dropped and len(b) > 1 and b[0] == 1:
        b, dropped = b[1:], dropped - 1
    numbers = torch.arange(torch.Size(b).numel()).reshape(b)
    try:
        how = spread(a, b)
    except NoSteps:  # own, repeated, own, repeated
        runs = [own for size, own in axes if size > 1]
        changes = [x for x, y in zip(runs, [None, *runs], strict=False) if x != y]
        assert len(changes) + changes[0] > 4
        return
    found = [
        i % how.modulus * how.t0 + j * how.t1 + k * how.t2
        for i in range(how.n0)
        for j in range(how.n1)
        for k in range(how.n2)
    ]
    assert found == numbers.expand(a).flatten().tolist()


@pytest.mark.parametrize(("a", "b"), [([3, 4], [3]), ([3, 4], [2, 4]), ([4], [3, 4]), ([1, 4], [3, 4])])
def test_what_is_not_broadcast_to_the_first(a: list[int], b: list[int]) -> None:
    with pytest.raises(NoSteps):
        spread(a, b)
