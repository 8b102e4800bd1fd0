"""Ranges evened out between layers, and nothing else changed."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.equalize import Equalize, equalizing
from graphq.state import tensor_of
from tests.graphs import annotated
from tests.lifted import assert_same_function, copied, lifted
from tests.models import MLP, ConvBnRelu
from tests.models import capture as capture_small

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGE = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
FOUR = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def graph(model: nn.Module, x: Tensor, **rules: Any) -> fx.GraphModule:
    return annotated(lifted(capture_small(model, x.float())), **(rules or {"blocks": "int8/tensor"}))


def equalized(gm: fx.GraphModule, **options: Any) -> tuple[fx.GraphModule, int, list[str]]:
    notes: list[str] = []
    made = copied(gm)
    counts = Pipeline([Equalize(**options, note=notes.append)], strict=True).run(made)
    return made, counts["equalize"], notes


class Bottleneck(nn.Module):
    """A wide, a depthwise and a narrow convolution beside the residual, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.narrow = nn.Conv2d(12, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.depthwise(F.relu(self.wide(x)))))


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.max_pool2d(F.relu(self.first(x)), 2))


def test_golden() -> None:
    gm = graph(MLP(), X)
    made, count, notes = equalized(gm)
    assert count == 3  # up's rows and bias, down's columns
    assert notes == [
        "up: its input's channels keep their scale: nothing that makes it has weights a factor could move to"
    ]
    assert_expected_inline(
        dump(made),
        """\
%x: f64[batch, 8] = input
%1: f64[batch, 12] = aten.linear(%x, @up.weight, @up.bias)  # up: weight int8/tensor
%2: f64[batch, 12] = aten.relu(%1)
%3: f64[batch, 8] = aten.linear(%2, @down.weight, @down.bias)  # down: weight int8/tensor
return [%3]
""",
    )
    assert_same_function(gm, made, (X,), 1e-12)
    r1, r2 = (tensor_of(gm, f"{n}.weight").detach().abs().amax(a) for n, a in (("up", 1), ("down", 0)))
    s = (r1 / r2).sqrt()
    for name, wanted in (
        ("up.weight", tensor_of(gm, "up.weight") / s[:, None]),
        ("up.bias", tensor_of(gm, "up.bias") / s),
        ("down.weight", tensor_of(gm, "down.weight") * s),
        ("down.bias", tensor_of(gm, "down.bias")),
    ):
        torch.testing.assert_close(tensor_of(made, name).detach(), wanted.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("model", "x", "count", "chain"),
    [
        (MLP, X, 3, ("up", "down")),
        (Convs, IMAGE, 3, ("first", "second")),
        (Bottleneck, IMAGE, 5, ("wide", "depthwise", "narrow")),
    ],
)
def test_rows_and_columns_are_even(model: type[nn.Module], x: Tensor, count: int, chain: tuple[str, ...]) -> None:
    gm = graph(model(), x)
    made, changed, _ = equalized(gm, rounds=200)
    assert changed == count
    assert_same_function(gm, made, (x,), 1e-12)
    for first, second in itertools.pairwise(chain):
        before, after = (_ranges(one, first, second) for one in (gm, made))
        torch.testing.assert_close(after[0], after[1], rtol=5e-3, atol=0)
        assert not torch.allclose(before[0], before[1], rtol=0.1)


def _ranges(gm: fx.GraphModule, first: str, second: str) -> tuple[Tensor, Tensor]:
    a, b = (tensor_of(gm, f"{name}.weight").detach() for name in (first, second))
    rows = a.flatten(1).abs().amax(1)
    if b.shape[1] == len(rows):  # no groups
        return rows, b.abs().amax([axis for axis in range(b.dim()) if axis != 1])
    groups = len(rows) // b.shape[1]
    return rows, b.unflatten(0, (groups, -1)).flatten(3).abs().amax((1, 3)).flatten()


def test_a_second_run_finds_nothing() -> None:
    made, _, _ = equalized(graph(Bottleneck(), IMAGE), rounds=200)
    assert equalized(made)[1] == 0


def test_rounds() -> None:
    gm = graph(Bottleneck(), IMAGE)
    once, often = (equalized(gm, rounds=rounds)[0] for rounds in (1, 200))
    assert not torch.allclose(tensor_of(once, "wide.weight"), tensor_of(often, "wide.weight"), rtol=1e-2)
    assert_same_function(gm, once, (IMAGE,), 1e-12)


def test_only() -> None:
    gm = graph(Bottleneck(), IMAGE)
    made, count, _ = equalized(gm, only=frozenset({"narrow"}))
    assert count == 3
    assert torch.equal(tensor_of(made, "wide.weight"), tensor_of(gm, "wide.weight"))


def test_channels_without_magnitude_keep_their_scale() -> None:
    rows, columns = torch.tensor([4.0, 0.0, 1.0, 9.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert equalizing(rows, columns).tolist() == [2.0, 1.0, 1.0, 3.0]
    gm = graph(MLP(), X)
    tensor_of(gm, "up.weight").data[3] = 0
    tensor_of(gm, "down.weight").data[:, 4] = 0
    made, _, _ = equalized(gm)
    assert all(bool(w.isfinite().all()) for w in made.state_dict().values())
    assert_same_function(gm, made, (X,), 1e-12)
    assert torch.equal(tensor_of(made, "down.weight")[:, 3], tensor_of(gm, "down.weight")[:, 3])


# -- near misses


class Gelu(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Tapped(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        return self.down(h) + h.sum(-1, keepdim=True)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(x + self.up(x)))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(x))


class SharedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


@pytest.mark.parametrize("model", [Gelu, Tapped, Residual, Normed, SharedWeight])
def test_near_misses(model: type[nn.Module]) -> None:
    gm = graph(model(), X)
    made, count, _ = equalized(gm)
    assert count == 0
    assert all(torch.equal(w, made.state_dict()[name]) for name, w in gm.state_dict().items())


def test_a_batch_norm_in_between_is_no_pair() -> None:
    gm = graph(ConvBnRelu(), FOUR)
    assert equalized(gm)[1] == 0


def test_float_layers_are_no_pair_but_take_factors_up() -> None:
    class Two(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.up(x))
            return self.down(h) + self.side(h)

    gm = graph(Two(), X, down="int8/tensor")
    made, count, _ = equalized(gm)
    assert count == 4
    assert_same_function(gm, made, (X,), 1e-12)
    assert equalized(graph(MLP(), X, up="int8/tensor"))[1] == 0  # the reader has no plan


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_rows_that_are_all_smaller_or_all_larger(scale: float) -> None:
    gm = graph(MLP(), X)
    tensor_of(gm, "up.weight").data *= scale
    made, count, _ = equalized(gm)
    assert count == 3
    torch.testing.assert_close(*_ranges(made, "up", "down"), rtol=5e-3, atol=0)
    assert_same_function(gm, made, (X,), 1e-12)


def test_readers_that_are_not_chosen_have_no_say() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.up(x))
            return self.a(h) + self.b(h)

    gm = graph(Two(), X)
    tensor_of(gm, "b.weight").data *= 100
    made, count, _ = equalized(gm, only=frozenset({"a"}))
    assert count == 4
    torch.testing.assert_close(*_ranges(made, "up", "a"), rtol=5e-3, atol=0)
    assert_same_function(gm, made, (X,), 1e-12)
