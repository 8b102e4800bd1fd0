"""Grouped attention takes its keys and values unrepeated, and gives the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.text import dump
from graphq.lowering.torch.fuse_attention import fuse_attention
from tests.graphs import assert_vals, targets
from tests.models import capture

GENERATOR = torch.Generator().manual_seed(0)
Q = torch.randn(2, 8, 3, 16, generator=GENERATOR)
K, V = (torch.randn(2, 4, 5, 16, generator=GENERATOR) for _ in range(2))
MASK = torch.ones(2, 1, 3, 5, dtype=torch.bool).tril(1)


def repeated(x: Tensor, times: int = 2, axis: int = 2) -> Tensor:
    """As transformers write it."""
    batch, heads, tokens, width = x.shape
    shape = [batch, heads, tokens, width]
    return x.unsqueeze(axis).expand(*shape[:axis], times, *shape[axis:]).reshape(batch, heads * times, tokens, width)


class Attention(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.function(q, k, v, mask)


def captured(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    return capture(Attention(function), *(inputs or (Q, K, V, MASK)))


def fused(function: Callable[..., Tensor]) -> tuple[fx.GraphModule, int]:
    gm = captured(function)
    with torch.no_grad():
        before = gm(Q, K, V, MASK)[0]
    count = fuse_attention(gm)
    gm.graph.lint()
    gm.recompile()
    assert fuse_attention(gm) == 0
    with torch.no_grad():
        assert torch.equal(gm(Q, K, V, MASK)[0], before)
    assert_vals(gm, Q, K, V, MASK)
    return gm, count


def test_golden() -> None:
    gm, count = fused(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(v), mask, scale=0.5)
    )
    assert count == 1
    assert_expected_inline(
        dump(gm),
        """\
%q: f32[batch, 8, 3, 16] = input
%k: f32[batch, 4, 5, 16] = input
%v: f32[batch, 4, 5, 16] = input
%mask: bool[batch, 1, 3, 5] = input
%4: f32[batch, 8, 3, 16] = aten.scaled_dot_product_attention(%q, %k, %v, %mask, 0.0, False, scale=0.5, enable_gqa=True)
return [%4]
""",
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(v)),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, (r := repeated(k)), repeated(v), mask) + r.sum(),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(k), mask),
    ],
)
def test_however_it_is_called(function: Callable[..., Tensor]) -> None:
    gm, count = fused(function)
    assert count == 1
    attention = next(n for n in gm.graph.nodes if "scaled_dot" in str(n.target))
    assert attention.kwargs["enable_gqa"] is True


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v, mask: F.scaled_dot_product_attention(q[:, :4], k, v, mask),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(v)[:, :8], mask) * q.sum(),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, repeated(k, axis=1), repeated(v, axis=1), mask),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, repeated(k), torch.cat([v, v], 1), mask),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(v[:, :2], 4), mask),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q[:, :1], repeated(k), repeated(v), mask),
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
    ],
)  # fmt: skip
def test_near_misses(function: Callable[..., Tensor]) -> None:
    gm = captured(function)
    before = targets(gm)
    expected: list[Any] = gm(Q, K, V, MASK)
    count = fuse_attention(gm)
    gm.recompile()
    assert torch.equal(gm(Q, K, V, MASK)[0], expected[0])
    assert count == 0
    assert targets(gm) == before
