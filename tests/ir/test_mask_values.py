"""What tensors made of masks may hold: the numbers of each op, and what is no such tensor."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphq.capture.source import KEY, source_of
from graphq.ir.mask_values import MaskValues, Reach
from graphq.ir.views import Op, view
from tests.models import capture

INF = torch.inf
X = torch.randn(2, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
Made = Callable[[Tensor, Tensor, Any], Tensor]


class Masked(nn.Module):
    """What ``made`` gives of a float input and a mask of integers."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self.made = made
        self.three = nn.Buffer(torch.tensor([3.0]))
        self.several = nn.Buffer(torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0]))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.made(x, mask, self), x + mask.sum()


def last(made: Made, declared: bool = False) -> tuple[fx.GraphModule, Op]:
    """The graph, and the op that gives what ``made`` does."""
    gm = capture(Masked(made), X, MASK)
    if declared:
        gm.meta[KEY] = replace(source_of(gm), mask="mask")
    return gm, view(next(node for node in gm.graph.nodes if node.op == "output").args[0][0])


KNOWN: dict[str, tuple[Made, list[float]]] = {
    "a boolean": (lambda x, m, of: m.bool(), [0, 1]),
    "of floats": (lambda x, m, of: x > 0, [0, 1]),
    "as floats": (lambda x, m, of: m.bool().float(), [0, 1]),
    "hidden": (lambda x, m, of: (m == 0).float() * -50.0, [-50, 0]),
    "moved": (lambda x, m, of: (m == 0)[:, None].float().expand(-1, 3, -1).transpose(1, 2) * -50.0, [-50, 0]),
    "from the other end": (lambda x, m, of: (1.0 - m.bool().float()) * -1e4, [-10000, 0]),
    "one of two": (lambda x, m, of: torch.where(m.bool(), torch.zeros(()), torch.full((), -INF)), [-INF, 0]),
    "filled": (lambda x, m, of: torch.zeros_like(x).masked_fill(m == 0, -100.0), [-100, 0]),
    "of two masks": (lambda x, m, of: (m == 0).float() - (x > 0).float() * 2, [-2, -1, 0, 1]),
    "of a number that is held": (lambda x, m, of: m.bool() * of.three, [0, 3]),
    "no number times infinity": (lambda x, m, of: (m == 0).float() * -INF, [-INF]),
    "ones of a shape": (lambda x, m, of: torch.ones_like(x) * 2, [2]),
    "a number of a type": (lambda x, m, of: torch.full_like(m, 2.5, dtype=torch.int32), [2]),
    "narrower": (lambda x, m, of: ((m == 0).float() * 2.5).to(torch.int32), [0, 2]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_numbers(name: str) -> None:
    made, wanted = KNOWN[name]
    gm, op = last(made)
    found = MaskValues(gm).numbers(op)
    assert found is not None
    assert found.dtype == op.val.dtype
    assert found.double().tolist() == wanted
    assert MaskValues(gm).reach(op) == Reach(tuple(wanted))


NEAR: dict[str, Made] = {
    "integers": lambda x, m, of: m.float() * -50.0,  # which may be lengths, or places
    "floats": lambda x, m, of: x * m.bool(),
    "several numbers": lambda x, m, of: m.bool() * of.several,
    "by place": lambda x, m, of: torch.ones(5, 5).tril(),
    "places": lambda x, m, of: torch.arange(5).float(),
    "sums along an axis": lambda x, m, of: m.bool().float().mean(-1),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    gm, op = last(NEAR[name])
    assert MaskValues(gm).numbers(op) is None
    assert MaskValues(gm).reach(op) is None


def test_more_numbers_than_a_few_are_not_known() -> None:
    for count, known in ((4, True), (5, False)):
        gm, op = last(lambda x, m, of, n=count: sum((m == i).float() * 2.0**i for i in range(n)))  # type: ignore[arg-type, return-value, misc]
        assert (MaskValues(gm).numbers(op) is not None) is known


def test_a_declared_mask_is_of_zeros_and_ones() -> None:
    made = lambda x, m, of: (1.0 - m.float()) * -1e4  # noqa: E731
    gm, op = last(made, declared=True)
    assert MaskValues(gm).reach(op) == Reach((-1e4, 0.0))
    gm, op = last(made)
    assert MaskValues(gm).reach(op) is None


SUMS: dict[str, tuple[Made, tuple[float, ...] | None, bool]] = {
    "added to": (lambda x, m, of: x + (m == 0).float() * -50.0, (-50, 0), True),
    "added": (lambda x, m, of: (m == 0).float() * -50.0 + x, (-50, 0), True),
    "in place of": (lambda x, m, of: x.masked_fill(m == 0, -INF), (-INF,), False),
    "in place of, as a tensor": (lambda x, m, of: x.masked_fill(m == 0, torch.tensor(-9.0)), (-9,), False),
    "chosen": (lambda x, m, of: torch.where(m == 0, -9.0, x), (-9,), False),
    "chosen first": (lambda x, m, of: torch.where(m == 1, x, -9.0), (-9,), False),
    "one number": (lambda x, m, of: x + torch.full_like(x, 2.0), None, False),
    "twice": (lambda x, m, of: torch.add(x, (m == 0).float(), alpha=2), None, False),
    "two computed": (lambda x, m, of: x + x.exp(), None, False),
    "by floats": (lambda x, m, of: x.masked_fill(x > 1, -INF), None, False),
    "chosen by floats": (lambda x, m, of: torch.where(x > 1, -9.0, x), None, False),
    "chosen of two computed": (lambda x, m, of: torch.where(m == 1, x, x.exp()), None, False),
}


@pytest.mark.parametrize("name", SUMS)
def test_reach(name: str) -> None:
    made, numbers, is_sum = SUMS[name]
    gm, op = last(made)
    found = MaskValues(gm).reach(op)
    if numbers is None:
        assert found is None
        return
    assert found is not None
    assert found.numbers == numbers
    assert (None if found.base is None else found.base.node.name) == ("x" if is_sum else None)


def test_what_is_made_of_masks() -> None:
    gm, op = last(lambda x, m, of: (m == 0).float())
    assert MaskValues(gm).is_of_masks(op)
    gm, op = last(lambda x, m, of: (m == 0) * x)
    assert not MaskValues(gm).is_of_masks(op)
    gm, op = last(lambda x, m, of: torch.arange(3))
    assert not MaskValues(gm).is_of_masks(op)
