"""Zeros in front of convolutions are padding of theirs, and what is no such padding stays."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.fold_pads import FoldPads
from tests.graphs import assert_vals, run, targets
from tests.models import capture

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fold(gm: fx.GraphModule) -> int:
    counts = Pipeline([FoldPads()], strict=True).run(gm)
    assert Pipeline([FoldPads()], strict=True).run(gm) == {"fold-pads": 0}
    return counts["fold-pads"]


class Padded(nn.Module):
    """A convolution with these options, of what ``pad`` makes of its input; ``then``: of both, what is given."""

    def __init__(self, pad: Any, kind: Any = nn.Conv2d, then: Any = None, **options: Any) -> None:
        super().__init__()
        self.conv = kind(4, 4, **{"kernel_size": 3, **options}).double()
        self.pad, self.then = pad, then

    def forward(self, x: Tensor) -> Tensor:
        padded = self.pad(x)
        y = self.conv(padded)
        return y if self.then is None else self.then(self, padded, y)


def constant(*sizes: int, value: float = 0.0) -> Any:
    return lambda x: F.pad(x, sizes, value=value)


FOLDED: dict[str, tuple[Padded, Tensor, list[int]]] = {
    "both axes": (Padded(constant(2, 2, 1, 1)), X, [1, 2]),
    "one axis": (Padded(constant(2, 2)), X, [0, 2]),
    "beside its own": (Padded(constant(2, 2, 1, 1), padding=(3, 4)), X, [4, 6]),
    "one number of its own": (Padded(constant(2, 2, 1, 1), padding=1), X, [2, 3]),
    "stride, dilation, groups": (Padded(constant(1, 1, 3, 3), stride=2, dilation=2, groups=2, bias=False), X, [3, 1]),
    "valid": (Padded(constant(2, 2, 1, 1), padding="valid"), X, [1, 2]),
    "other axes by nothing": (Padded(constant(1, 1, 1, 1, 0, 0)), X, [1, 1]),
    "one-dimensional": (Padded(constant(2, 2), nn.Conv1d), X[..., 0], [2]),
    "three-dimensional": (Padded(constant(1, 1, 0, 0, 2, 2), nn.Conv3d), X[..., None].expand(-1, -1, -1, -1, 5), [2, 0, 1]),
    "without batches": (Padded(lambda x: F.pad(x[0], (1, 1, 2, 2))), X, [2, 1]),
    "a pad of a pad": (Padded(lambda x: F.pad(F.pad(x, (1, 1)), (0, 0, 2, 2))), X, [2, 1]),
    "read twice": (Padded(constant(1, 1), then=lambda m, padded, y: y + m.conv(padded)), X, [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_the_same_function(name: str) -> None:
    model, x, padding = FOLDED[name]
    gm = capture(model, x)
    wanted = run(gm, x)
    assert fold(gm) == (2 if name == "a pad of a pad" else 1)
    assert not [target for target in targets(gm) if "pad" in target]
    convs = [node for node in gm.graph.nodes if "conv" in str(node.target) and node.op == "call_function"]
    assert {tuple(node.args[4]) for node in convs} == {tuple(padding)}
    assert (run(gm, x) - wanted).abs().max() <= 1e-12
    assert_vals(gm, x)


NEAR: dict[str, tuple[Padded, Tensor]] = {
    "another number": (Padded(constant(1, 1, 1, 1, value=1.0)), X),
    "one end alone": (Padded(constant(0, 1, 0, 1)), X),
    "unlike ends": (Padded(constant(1, 1, 1, 2)), X),
    "cut off": (Padded(constant(-1, -1, 1, 1)), X),
    "channels": (Padded(lambda x: F.pad(x[:, :2], (1, 1, 1, 1, 1, 1))), X),
    "edges again": (Padded(lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate")), X),
    "the same size again": (Padded(constant(1, 1, 1, 1), padding="same"), X),
    "another reader": (Padded(constant(1, 1), then=lambda _, padded, y: y.sum() + padded), X),
    "returned": (Padded(constant(1, 1), then=lambda _, padded, y: (y, padded)), X),
    "transposed": (Padded(constant(1, 1), nn.ConvTranspose2d), X),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    model, x = NEAR[name]
    gm = capture(model, x)
    before = dump(gm)
    assert fold(gm) == 0
    assert dump(gm) == before


class Unread(nn.Module):
    def __init__(self, pad: Any) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return self.pad(x) * 2


def test_a_pad_by_nothing_is_gone() -> None:
    gm = capture(Unread(constant(0, 0, 0, 0, value=3.0)), X)
    assert fold(gm) == 1
    assert targets(gm) == ["aten.mul.Tensor"]
    assert torch.equal(run(gm, X), X * 2)


def test_a_pad_by_nothing_that_is_returned_or_laid_out_anew_stays() -> None:
    class Returned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x, (0, 0))

    assert fold(capture(Returned(), X)) == 0
    assert fold(capture(Unread(lambda x: F.pad(x[:, :1].expand(-1, 4, -1, -1), (0, 0))), X)) == 0


def test_golden() -> None:
    gm = capture(FOLDED["stride, dilation, groups"][0], X)
    assert fold(gm) == 1
    assert_expected_inline(
        dump(gm),
        """\
%x: f64[batch, 4, 7, 6] = input
%1: f64[batch, 4, 5, 2] = aten.conv2d(%x, @conv.weight, None, [2, 2], [3, 1], [2, 2], 2)
return [%1]
""",
    )
