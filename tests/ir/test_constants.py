"""What a graph computes from its own tensors alone."""

import torch
from torch import Tensor, fx, nn

from graphq.ir.constants import computation_of, constants_of, evaluate
from graphq.state import tensor_of
from tests.models import capture


class Some(nn.Module):
    """Three terms: of parameters, of parameters with numbers drawn, of parameters and the input."""

    b: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4))
        self.register_buffer("b", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        c = self.a.exp() * self.b + torch.arange(4)
        drawn = torch.rand_like(self.a) * self.a
        return x + c + drawn + self.a * x


def names(nodes: list[fx.Node] | set[fx.Node]) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in sorted(nodes)]


def test_constants_and_what_they_are_computed_by() -> None:
    gm = capture(Some(), torch.ones(2, 4))
    constants = constants_of(gm)
    computed = [name for name in names(constants) if name.startswith("aten")]
    assert computed == ["aten.exp", "aten.mul.Tensor", "aten.arange", "aten.add.Tensor"]
    root = next(node for node in constants if str(node.target) == "aten.add.Tensor")
    assert names(computation_of(root)) == ["a", "b", "aten.exp", "aten.mul.Tensor", "aten.arange", "aten.add.Tensor"]
    a, b = tensor_of(gm, "a").detach(), tensor_of(gm, "b")
    assert torch.equal(evaluate(root, lambda name: {"a": a, "b": b}[name]), a.exp() * b + torch.arange(4))
    wide = evaluate(root, lambda name: {"a": a.double(), "b": b}[name])
    assert wide.dtype == torch.float64
    assert torch.equal(wide, a.double().exp() * b + torch.arange(4))
