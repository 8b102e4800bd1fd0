"""Which inputs of an op its output's vectors are sums and multiples of."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.capture.modules import capture_module
from graphq.ir.effects import Carried, Normalizes, Stopped
from graphq.ir.vectors import carried, cut_of, indexed_axes, moved, place
from graphq.ir.views import Input, Op, view
from tests.ir.op_calls import CASES
from tests.ir.test_effects import effect_of, named, node_of


class Each(nn.Module):
    """Every function of ``functions`` of x and y, both [2, 5, 8]."""

    def __init__(self, functions: list[Callable[[Tensor, Tensor], Tensor]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x, y) for function in self.functions)


def square(x: Tensor) -> Tensor:
    """[batch, sequence, 8, 8]: what takes the last axis for another one still gives vectors of 8."""
    return x.unsqueeze(-2).expand(-1, -1, 8, -1)


def results(*functions: Callable[[Tensor, Tensor], Tensor]) -> list[Op]:
    """What each function gives."""
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    gm = capture_module(Each(list(functions)), (x, y))
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, list | tuple)
    return [view(node) for node in outputs if isinstance(node, fx.Node)]


def names(op: Op, size: int = 8) -> str | None:
    """The inputs that are carried, by name; computed ones as a dash."""
    match carried(op, size):
        case Carried(found):
            return "".join(str(o.node.name)[0] if isinstance(o, Input) else "-" for o in found)
        case Stopped():
            return None


TABLE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str | None]] = {
    "add": (lambda x, y: x + y, "xy"),
    "sub": (lambda x, y: x - y, "xy"),
    "add a row scalar": (lambda x, y: x + y.sum(-1, keepdim=True), None),
    "add a number": (lambda x, y: x + 2, None),
    "mul": (lambda x, y: x * y, None),
    "mul a row scalar": (lambda x, y: x * y.sum(-1, keepdim=True), "x"),
    "a row scalar mul": (lambda x, y: y.sum(-1, keepdim=True) * x, "x"),
    "mul a number": (lambda x, y: x * 2, "x"),
    "div by a row scalar": (lambda x, y: x / y.sum(-1, keepdim=True), "x"),
    "div a row scalar": (lambda x, y: y.sum(-1, keepdim=True) / x, None),
    "neg": (lambda x, y: -x, "x"),
    "relu": (lambda x, y: F.relu(x), None),
    "cast": (lambda x, y: x.to(torch.float64), "x"),
    "cast to integers": (lambda x, y: x.to(torch.int64), None),
    "transpose": (lambda x, y: x.transpose(0, 1), "x"),
    "transpose the last axis": (lambda x, y: square(x).transpose(-1, 2), None),
    "transpose the last axis second": (lambda x, y: square(x).transpose(2, 3), None),
    "permute": (lambda x, y: x.permute(1, 0, 2), "x"),
    "permute the last axis": (lambda x, y: square(x).permute(0, 1, 3, 2), None),
    "unsqueeze": (lambda x, y: x.unsqueeze(-2), "x"),
    "unsqueeze the last axis": (lambda x, y: x.unsqueeze(-1), None),
    "select": (lambda x, y: x.select(1, 0), "x"),
    "select of the last axis": (lambda x, y: square(x).select(-1, 0), None),
    "slice": (lambda x, y: x[:, :1], "x"),
    "slice of the last axis": (lambda x, y: x[..., :8:1][..., 0:4], None),
    "index": (lambda x, y: x[:, torch.zeros(3, dtype=torch.int64)], "x"),
    "index of the last axis": (lambda x, y: x[:, :, torch.zeros(8, dtype=torch.int64)], None),
    "narrow": (lambda x, y: x.narrow(1, 0, 2), "x"),
    "flip": (lambda x, y: x.flip(1), "x"),
    "flip the last axis": (lambda x, y: x.flip(-1), None),
    "roll": (lambda x, y: x.roll(2, 1), "x"),
    "roll of all": (lambda x, y: x.roll(2), None),
    "repeat": (lambda x, y: x.repeat(1, 2, 1), "x"),
    "repeat the last axis": (lambda x, y: x.repeat(1, 1, 2), None),
    "repeat_interleave": (lambda x, y: x.repeat_interleave(2, 1), "x"),
    "movedim": (lambda x, y: x.movedim(0, 1), "x"),
    "movedim of the last axis": (lambda x, y: square(x).movedim(-1, 2), None),
    "stack": (lambda x, y: torch.stack([x, y], 1), "xy"),
    "stack of a last axis": (lambda x, y: torch.stack([x, y], -1), None),
    "gather": (lambda x, y: x.gather(1, torch.zeros(2, 1, 8, dtype=torch.int64)), None),
    "dropout": (lambda x, y: F.dropout(x, 0.5, False), "x"),
    "dropout in training": (lambda x, y: F.dropout(x, 0.5, True), None),
    "batch norm": (lambda x, y: F.batch_norm(x, y[0, :, 0], y[0, :, 0].exp()), None),
    "index_copy": (lambda x, y: x.index_copy(1, torch.arange(5), y), "xy"),
    "index_select": (lambda x, y: x.index_select(1, torch.zeros(3, dtype=torch.int64)), "x"),
    "index_select of the last axis": (lambda x, y: x.index_select(2, torch.zeros(8, dtype=torch.int64)), None),
    "sum": (lambda x, y: x.sum(1), "x"),
    "sum of the last axis": (lambda x, y: square(x).sum(-1), None),
    "mean of the last axis": (lambda x, y: square(x).mean([1, -1]), None),
    "mean": (lambda x, y: x.mean(1), "x"),
    "cat": (lambda x, y: torch.cat([x, y], 1), "xy"),
    "cat of the last axis": (lambda x, y: torch.cat([x, y], -1), None),
    "index_add": (lambda x, y: x.index_add(1, torch.arange(x.shape[1]), y), "xy"),
    "index_put": (lambda x, y: x.index_put((torch.tensor([0]),), y[0]), "x-"),
    "index_put of the last axis": (
        lambda x, y: torch.ops.aten.index_put(x, [None, None, torch.tensor([0])], y[..., :1]),
        None,
    ),
    "index_put of one number": (lambda x, y: x.index_put((torch.tensor([0]),), y[0, :1, :1]), None),
    "matmul": (lambda x, y: x.transpose(1, 2) @ y, "y"),
    "matmul by a vector": (lambda x, y: x @ y[0, 0], None),
    "layer_norm": (lambda x, y: F.layer_norm(x, [8]), "x"),
    "rms_norm": (lambda x, y: F.rms_norm(x, [8]), "x"),
    "zeros": (lambda x, y: torch.zeros_like(x), ""),
    "view": (lambda x, y: x.reshape(-1, 8), "x"),
    "view into less": (lambda x, y: x.reshape(-1, 2, 4), None),
    "softmax": (lambda x, y: x.softmax(-1), None),
}


def test_carried() -> None:
    made = results(*(function for function, _ in TABLE.values()))
    assert {name: names(op) for name, op in zip(TABLE, made, strict=True)} == {
        name: expected for name, (_, expected) in TABLE.items()
    }


def test_smaller_vectors() -> None:
    into, out, uneven = results(
        lambda x, y: x.reshape(-1, 2, 4), lambda x, y: x.reshape(-1, 4, 2), lambda x, y: x.transpose(0, 1)
    )
    assert (names(into, 4), names(out, 4), names(uneven, 4), names(uneven, 3)) == ("x", None, "x", None)


def test_moved() -> None:
    kept = [lambda x, y: x.transpose(0, 1), lambda x, y: x[:, :1], lambda x, y: x.reshape(-1, 8)]
    changed = [lambda x, y: -x, lambda x, y: x * 2, lambda x, y: x.sum(1), lambda x, y: x + y, lambda x, y: F.relu(x)]
    assert [op and str(op.node.name) for op in (moved(made, 8) for made in results(*kept))] == ["x"] * 3
    assert [moved(made, 8) for made in results(*changed)] == [None] * 5


@pytest.mark.parametrize(
    ("function", "offset", "length"),
    [
        (lambda x, y: x[..., 2:5], 2, 3),
        (lambda x, y: x[..., -3:], 5, 3),
        (lambda x, y: x.split([1, 4, 3], -1)[1], 1, 4),
        (lambda x, y: x.split(3, -1)[2], 6, 2),
        (lambda x, y: x.chunk(2, 2)[1], 4, 4),
    ],
)
def test_cuts(function: Callable[[Tensor, Tensor], Tensor], offset: int, length: int) -> None:
    (made,) = results(function)
    cut = cut_of(made)
    assert cut is not None
    assert (cut[0].node.name, *cut[1:]) == ("x", offset, length)


@pytest.mark.parametrize(
    ("function", "axes"),
    [
        (lambda x, y: x[:, torch.tensor([0, 1])], (1,)),
        (lambda x, y: x[:, torch.tensor([0, 1]), torch.tensor([2, 3])], (1, 2)),
        (lambda x, y: x[:, :, torch.tensor([0, 1])], (2,)),
        (lambda x, y: x[0][y[0] > 0], (0, 1)),  # a mask covers as many axes as it has
        (lambda x, y: x[0][y[0, :, 0] > 0], (0,)),
        (lambda x, y: x.index_select(-2, torch.tensor([0, 1])), (1,)),
    ],
)
def test_indexed_axes(function: Callable[[Tensor, Tensor], Tensor], axes: tuple[int, ...]) -> None:
    (made,) = results(function)
    assert indexed_axes(made) == axes


def test_other_ops_are_no_cuts() -> None:
    made = results(
        lambda x, y: x.unbind(-1)[1],
        lambda x, y: x[..., ::2],
        lambda x, y: x[:, :1],
        lambda x, y: x.split([1, 7], -1)[0].topk(1)[0],
        lambda x, y: x.sort(-1)[0],
    )
    assert [cut_of(op) for op in made] == [None] * 5


def test_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    gm = capture_module(model, (torch.ones(2, 4),))
    found = [place(view(node)) for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    assert sorted(found) == ["0", "0.bias", "0.weight", "1"]


# -- every op: vectors that it carries may be in any basis

# A norm's gain is in one basis, and the mean that a layer norm takes off: passes that rotate see to them first.
RUN = [t for t, a in CASES.items() if not isinstance(effect_of(t, a), Normalizes) and "empty" not in str(t)]


def rotated(x: Tensor, q: Tensor) -> Tensor:
    return (x.double().unflatten(-1, (-1, len(q))) @ q).flatten(-2)


def call(target: Any, arguments: Sequence[Any]) -> Tensor:
    made = target(*[a for a in arguments if not isinstance(a, dict)], **named(arguments))
    return made if isinstance(made, Tensor) else made[0]


def holds_in_any_basis(target: Any, size: int) -> bool | None:
    """Whether the op gives rotated vectors for rotated vectors of those operands that it carries; None for none."""
    node = node_of(target, CASES[target])
    found = carried(view(node), size)
    if isinstance(found, Stopped):
        return None
    places = [node.all_input_nodes.index(op.node) for op in found.value]
    q = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(size)).double())[0]
    numbers = itertools.count()

    def turned(value: Any) -> Any:
        if isinstance(value, list):
            return [turned(one) for one in value]
        return rotated(value, q) if isinstance(value, Tensor) and next(numbers) in places else value

    before = call(target, CASES[target])
    made = call(target, [turned(argument) for argument in CASES[target]])
    return torch.allclose(made.double(), rotated(before, q), rtol=0, atol=1e-12 * float(before.abs().max()))


def test_what_is_carried_may_be_in_any_basis() -> None:
    found = {
        t: [holds for size in (2, 3, 4, 5, 7, 10) if (holds := holds_in_any_basis(t, size)) is not None] for t in RUN
    }
    assert [str(target) for target, holds in found.items() if not all(holds)] == []
    assert sum(map(bool, found.values())) > 40
