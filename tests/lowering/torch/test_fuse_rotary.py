"""Rotary positions in fewer ops give the same bits; what only looks like them stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.text import dump
from graphq.lowering.torch.fuse_rotary import fuse_rotary
from tests.graphs import assert_vals, targets
from tests.models import capture

GENERATOR = torch.Generator().manual_seed(0)
Q, K = (torch.randn(2, heads, 3, 16, generator=GENERATOR) for heads in (4, 2))
ANGLES = torch.randn(2, 1, 3, 16, generator=GENERATOR)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


class Positions(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, q: Tensor, k: Tensor, angles: Tensor) -> Any:
        return self.function(self, q, k, angles.cos(), angles.sin())


def fused(function: Callable[..., Any]) -> tuple[fx.GraphModule, int]:
    gm = capture(Positions(function), Q, K, ANGLES)
    with torch.no_grad():
        before = gm(Q, K, ANGLES)
    count = fuse_rotary(gm)
    gm.graph.lint()
    gm.recompile()
    assert fuse_rotary(gm) == 0
    with torch.no_grad():
        for ours, its in zip(gm(Q, K, ANGLES), before, strict=True):
            assert torch.equal(ours, its)
    assert_vals(gm, Q, K, ANGLES)
    return gm, count


def test_golden() -> None:
    gm, count = fused(lambda m, q, k, c, s: (q * c + turned(q) * s, k * c + s * turned(k)))
    assert count == 2
    assert_expected_inline(
        dump(gm),
        """\
%q: f32[batch, 4, 3, 16] = input
%k: f32[batch, 2, 3, 16] = input
%angles: f32[batch, 1, 3, 16] = input
%3: f32[batch, 1, 3, 16] = aten.cos(%angles)
%4: f32[batch, 1, 3, 16] = aten.sin(%angles)
%5: f32[batch, 1, 3, 8] = aten.slice.Tensor(%4, -1, 0, 8)
%6: f32[batch, 1, 3, 8] = aten.neg(%5)
%7: f32[batch, 1, 3, 8] = aten.slice.Tensor(%4, -1, 8)
%8: f32[batch, 1, 3, 16] = aten.cat([%6, %7], -1)
%9: f32[batch, 4, 3, 16] = aten.mul.Tensor(%q, %3)
%10: f32[batch, 4, 3, 16] = aten.roll(%q, [8], [-1])
%11: f32[batch, 4, 3, 16] = aten.mul.Tensor(%10, %8)
%12: f32[batch, 4, 3, 16] = aten.add.Tensor(%9, %11)
%13: f32[batch, 2, 3, 16] = aten.mul.Tensor(%k, %3)
%14: f32[batch, 2, 3, 16] = aten.roll(%k, [8], [-1])
%15: f32[batch, 2, 3, 16] = aten.mul.Tensor(%14, %8)
%16: f32[batch, 2, 3, 16] = aten.add.Tensor(%13, %15)
return [%12, %16]
""",
    )


def test_a_part_of_the_head() -> None:
    """Only its first half has positions."""

    def function(m: Positions, q: Tensor, k: Tensor, c: Tensor, s: Tensor) -> Tensor:
        part, c, s = q[..., :8], c[..., :8], s[..., :8]
        return torch.cat([part * c + turned(part) * s, q[..., 8:]], -1)

    assert fused(function)[1] == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda m, q, k, c, s: torch.cat([q[..., 8:], q[..., :8]], -1) * s,  # nothing is negated
        lambda m, q, k, c, s: torch.cat([q[..., 8:], -q[..., :8]], -1) * s,
        lambda m, q, k, c, s: torch.cat([-q[..., :8], q[..., 8:]], -1) * s,
        lambda m, q, k, c, s: torch.cat([-q[..., 8:], q[..., :8]], -2) * s.sum(),
        lambda m, q, k, c, s: torch.cat([-q[..., 4:], q[..., :4]], -1) * s,  # no halves
        lambda m, q, k, c, s: torch.cat([-q[..., 1::2], q[..., ::2]], -1) * s,  # of each pair
        lambda m, q, k, c, s: torch.cat([-k[..., 8:], q[:, :2, :, :8]], -1) * s,  # of two tensors
        lambda m, q, k, c, s: turned(q) + s,
        lambda m, q, k, c, s: turned(q) * s[..., :1],  # one sine for a head
        lambda m, q, k, c, s: turned(q) * 2.0,
        lambda m, q, k, c, s: turned(q) * m.weight,
        lambda m, q, k, c, s: (t := turned(q)) * s + t,  # is needed anyhow
    ],
)
def test_near_misses(function: Callable[..., Any]) -> None:
    gm = capture(Positions(function), Q, K, ANGLES)
    before = targets(gm)
    assert fuse_rotary(gm) == 0
    assert targets(gm) == before
