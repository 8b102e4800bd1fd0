"""What is computed twice is computed once; what only looks so stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.text import dump
from graphq.lowering.torch.merge_equal import merge_equal
from tests.graphs import assert_vals, run, targets
from tests.models import capture

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def merged(function: Callable[..., Any]) -> tuple[fx.GraphModule, int]:
    """The graph, which gives what it gave, and the number of nodes gone; a second run finds nothing."""
    gm = capture(Function(function), X)
    before, nodes = run(gm, X), len(gm.graph.nodes)
    count = merge_equal(gm)
    gm.graph.lint()
    assert merge_equal(gm) == 0
    assert nodes - len(gm.graph.nodes) == count
    assert torch.equal(run(gm, X), before)
    assert_vals(gm, X)
    return gm, count


def test_golden() -> None:
    def function(m: Function, x: Tensor) -> Tensor:
        a, b = x.unsqueeze(1).cos() * 2, x.unsqueeze(1).cos() * 3
        return (a + b).reshape(a.shape[0], -1, 8) * 2

    gm, count = merged(function)
    assert count == 3
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 8] = input
%1: int = aten.sym_size.int(%x, 0)
%2: f32[batch, 1, 8] = aten.unsqueeze(%x, 1)
%3: f32[batch, 1, 8] = aten.cos(%2)
%4: f32[batch, 1, 8] = aten.mul.Tensor(%3, 2)
%5: f32[batch, 1, 8] = aten.mul.Tensor(%3, 3)
%6: f32[batch, 1, 8] = aten.add.Tensor(%4, %5)
%7: f32[batch, 1, 8] = aten.mul.Tensor(%6, 2)
return [%7]
""",
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * 1 + x * 2,
        lambda m, x: x.sum(0) + x.sum(0, keepdim=True),
        lambda m, x: x.long() * 1 + x.long() * 1.0,  # a product of integers, and one of floats
        lambda m, x: x.cos() + x.sin(),
        lambda m, x: (x * m.weight) + (x * m.weight).cos(),  # parameters may be cast in front of each use
        lambda m, x: F.dropout(x, 0.5, training=True) + F.dropout(x, 0.5, training=True).cos(),
        lambda m, x: (x.cos(), x.cos()),
        lambda m, x: x.reshape(x.shape[0] * 2, 4).sum() + x,
    ],
)
def test_near_misses(function: Callable[..., Any]) -> None:
    gm = capture(Function(function), X)
    before = targets(gm)
    casts = before.count("aten._to_copy")
    assert merge_equal(gm) == (1 if casts == 2 else 0)
    assert [t for t in targets(gm) if t != "aten._to_copy"] == [t for t in before if t != "aten._to_copy"]
