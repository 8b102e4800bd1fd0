"""Biases: which tensor a layer adds, when it can be another one, and a new one where there was none."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.capture.source import SHARED
from graphq.errors import GraphError
from graphq.ir.biases import Biased, bias_of, channels_of, set_bias, weight_of, why_no_bias
from graphq.ir.effect_table import channel_axis
from graphq.ir.index import GraphIndex
from graphq.ir.views import Param, ops_of
from graphq.state import tensor_of
from tests.graphs import assert_vals, run
from tests.models import MLP, Twice, capture


def biased(gm: fx.GraphModule) -> list[Biased]:
    return [op for op in ops_of(gm) if isinstance(op, Biased)]


class Call(nn.Module):
    """A function of a linear layer's tensors ``w`` and ``b``, and of an input."""

    def __init__(self, call: Any, shape: tuple[int, ...], size: tuple[int, ...] = (6,)) -> None:
        super().__init__()
        self.call = call
        self.w, self.b = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w, self.b)


@pytest.mark.parametrize(
    ("call", "shape", "x", "axis"),
    [
        (F.linear, (6, 4), (2, 3, 4), -1),
        (lambda x, w, b: torch.addmm(b, x, w), (4, 6), (2, 4), -1),
        (lambda x, w, b: F.conv1d(x, w, b), (6, 4, 3), (2, 4, 5), -2),
        (lambda x, w, b: F.conv1d(x, w, b, padding="same"), (6, 4, 3), (2, 4, 5), -2),
        (lambda x, w, b: F.conv2d(x, w, b), (6, 4, 3, 3), (2, 4, 5, 5), -3),
        (lambda x, w, b: F.conv2d(x[0], w, b, padding="same"), (6, 4, 3, 3), (2, 4, 5, 5), -3),
        (lambda x, w, b: F.conv_transpose1d(x, w, b), (4, 6, 3), (2, 4, 5), -2),
        (lambda x, w, b: F.conv_transpose2d(x, w, b), (4, 6, 3, 3), (2, 4, 5, 5), -3),
    ],
)
def test_tensors_and_channels(call: Any, shape: tuple[int, ...], x: tuple[int, ...], axis: int) -> None:
    gm = capture(Call(call, shape), torch.ones(x))
    (op,) = biased(gm)
    weight, bias = weight_of(op), bias_of(op)
    assert isinstance(weight, Param)
    assert isinstance(bias, Param)
    assert (weight.fqn, bias.fqn) == ("w", "b")
    assert (channel_axis(op), channels_of(op)) == (axis, 6)
    assert why_no_bias(GraphIndex(gm), [op]) is None
    inputs = torch.randn(x)
    before = run(gm, inputs)
    assert set_bias(GraphIndex(gm), [op], "unused", tensor_of(gm, "b") + 1, by="test") == [op]
    assert torch.allclose(run(gm, inputs), before + 1, rtol=0, atol=1e-5)  # float32 sums of magnitude 10
    assert [name for name, _ in gm.named_parameters()] == ["w", "b"]


@pytest.mark.parametrize(
    ("call", "size", "reason"),
    [
        (lambda x, w, b: F.linear(x, w, b * 2), (6,), "its bias is computed by aten.mul.Tensor"),
        (lambda x, w, b: F.linear(x, w, b) + b.sum(), (6,), "b is read elsewhere, too"),
        (lambda x, w, b: torch.addmm(b, x, w.t()), (1, 6), "its bias has the shape [1, 6]"),
        (lambda x, w, b: torch.addmm(b, x, w.t()), (1,), "its bias has the shape [1]"),
        (lambda x, w, b: torch.addmm(b, x, w.t()), (6,), None),
        (lambda x, w, b: F.linear(x, w) + b, (6,), None),
    ],
)
def test_why_a_layer_can_be_given_no_bias(call: Any, size: tuple[int, ...], reason: str | None) -> None:
    gm = capture(Call(call, (6, 4), size), torch.ones(2, 4))
    assert why_no_bias(GraphIndex(gm), biased(gm)) == reason


def test_uses_of_one_layer() -> None:
    gm = capture(Call(lambda x, w, b: F.linear(x, w, b) + F.linear(x, w), (6, 4)), torch.ones(2, 4))
    assert why_no_bias(GraphIndex(gm), biased(gm)) == "its uses have different biases"
    gm = capture(Call(lambda x, w, b: F.linear(x, w, b) + F.linear(x + 1, w, b), (6, 4)), torch.ones(2, 4))
    assert why_no_bias(GraphIndex(gm), biased(gm)) is None
    assert why_no_bias(GraphIndex(gm), biased(gm)[:1]) == "b is read elsewhere, too"


def test_a_tied_bias() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    gm = capture(Tied(), torch.ones(2, 4))
    x, b = torch.randn(5, 4), torch.randn(4)
    first, second = (tensor_of(gm, f"{name}.weight").detach() for name in "ab")
    old = tensor_of(gm, "b.bias").detach().clone()
    assert [why_no_bias(GraphIndex(gm), [op]) for op in biased(gm)] == [None, None]
    set_bias(GraphIndex(gm), biased(gm)[:1], "a.bias", b, by="test")
    assert torch.equal(run(gm, x), F.linear(x, first, b) + F.linear(x, second, old))


def test_a_bias_that_other_parts_of_a_graph_read() -> None:
    gm = capture(nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4))
    assert why_no_bias(GraphIndex(gm), biased(gm)) is None
    gm.meta[SHARED] = frozenset({"0.bias"})
    assert why_no_bias(GraphIndex(gm), biased(gm)) == "0.bias is read elsewhere, too"


def test_a_new_bias_is_added_by_every_use() -> None:
    gm = capture(Twice(), torch.ones(2, 8))
    x, b = torch.randn(5, 8), torch.randn(8)
    w = tensor_of(gm, "shared.weight").detach()
    made = set_bias(GraphIndex(gm), biased(gm)[::-1], "shared.bias", b, by="test")
    assert made == biased(gm)[::-1]
    assert isinstance(tensor_of(gm, "shared.bias"), nn.Parameter)
    assert torch.equal(run(gm, x), F.linear(F.relu(F.linear(x, w, b)), w, b))
    assert_vals(gm, x)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_other_arguments_stay_however_they_were_given(by_keyword: bool) -> None:
    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv1d(x, w, None, stride=2, padding=1, groups=2) + b.sum()

    gm = capture(Call(call, (6, 2, 3)), torch.ones(2, 4, 9))
    x, (op,) = torch.randn(3, 4, 9), biased(gm)
    before = run(gm, x)
    node = op.node
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    values = {name: op.argument(name) for name in names}
    if by_keyword:
        node.args, node.kwargs = (values["input"],), {n: values[n] for n in ("weight", "stride", "padding", "groups")}
    assert torch.equal(run(gm, x), before)
    (made,) = set_bias(GraphIndex(gm), [op], "c.bias", torch.ones(6), by="test")
    assert torch.allclose(run(gm, x), before + 1, rtol=0, atol=1e-5)  # float32 sums of magnitude 10
    assert [made.argument(name) for name in names[3:]] == [[2], [1], [1], 2]


def test_a_name_that_is_taken() -> None:
    gm = capture(MLP(bias=False), torch.ones(2, 8))
    with pytest.raises(GraphError) as error:
        set_bias(GraphIndex(gm), biased(gm)[:1], "up.weight", torch.ones(12), by="test")
    assert str(error.value) == (
        "up.weight: the model has a tensor of this name, which test gives to a layer's bias; rename it"
    )
