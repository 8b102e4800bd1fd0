"""Buffers that a call writes: left out where each call fills them before it reads them, refused elsewhere."""

import pytest
import torch
from torch import Tensor, nn

from graphq.capture.modules import capture_module
from graphq.errors import GraphError

X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


class Filled(nn.Module):
    """A buffer that is filled anew, and then read."""

    table: Tensor

    def __init__(self, how: str = "copy") -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        before = self.table * 1 if self.how == "read before" else 0
        match self.how:
            case "add":
                self.table.add_(x.sum(0))
            case "part":
                self.table[:2].copy_(x.sum(0)[:2])
            case "itself":
                self.table.copy_(self.table + x.sum(0))
            case _:
                self.table.copy_(x.sum(0))
        return x * self.table + before


def test_a_buffer_that_is_filled_before_it_is_read() -> None:
    model = Filled()
    gm = capture_module(model, X)
    assert torch.equal(model.table, torch.ones(3)), "capture leaves it as it was"
    assert torch.equal(gm(X)[0], X * X.sum(0))
    assert torch.equal(gm(2 * X)[0], 2 * X * (2 * X).sum(0))
    assert not [node for node in gm.graph.nodes if "copy_" in str(node.target)]


@pytest.mark.parametrize("how", ["add", "part", "itself", "read before"])
def test_others_are_refused(how: str) -> None:
    with pytest.raises(GraphError, match="Filled changes table in place; a graph leaves its inputs and buffers alone"):
        capture_module(Filled(how), X)


class WritesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.copy_(x + 1) * 2


def test_an_input_that_is_written() -> None:
    with pytest.raises(GraphError, match="WritesInput changes x in place"):
        capture_module(WritesInput(), X.clone())
