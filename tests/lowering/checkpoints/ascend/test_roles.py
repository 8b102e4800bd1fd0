"""Which layers are row-parallel, in captured models of several families and in small graphs that differ in one op."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphq.ir.layers import sites
from graphq.ir.pipeline import Pipeline
from graphq.lowering.checkpoints.ascend.roles import is_row_parallel
from graphq.pipelines import canonical_passes
from tests.models import MoE, capture, captured


def roles(gm: torch.fx.GraphModule) -> dict[str, bool]:
    Pipeline(canonical_passes()).run(gm)
    return {fqn: is_row_parallel(site.op.input_op) for site in sites(gm) for fqn in site.fqns}


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("llama", {"o_proj", "down_proj"}),
        ("qwen3", {"o_proj", "down_proj"}),
        ("gemma3", {"o_proj", "down_proj"}),
        ("mixtral", {"o_proj", "down_proj"}),
        ("deepseek", {"o_proj", "down_proj"}),
        ("opt", {"out_proj", "fc2"}),
        ("gpt2", {"c_proj"}),  # of attention and of the MLP alike
        ("bert", {"attention.output.dense", "layer.0.output.dense", "layer.1.output.dense"}),
    ],
)
def test_families(family: str, rows: set[str]) -> None:
    found = roles(captured(family))
    wanted = {fqn for fqn in found if any(fqn.endswith(f".{name}") for name in rows)}
    assert {fqn for fqn, is_row in found.items() if is_row} == wanted
    assert len(wanted) >= 4


def test_experts() -> None:
    found = roles(capture(MoE(), torch.randn(6, 8)))
    assert {fqn for fqn, is_row in found.items() if is_row} == {f"experts.{e}.down_proj" for e in range(4)}


class Pair(nn.Module):
    """A linear of what ``between`` makes of another's output."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between = between
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        match self.between:
            case "gated":
                y = y * F.silu(self.gate(x))
            case "norm":
                y = F.layer_norm(y, (12,))
            case "root mean square":
                y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
            case "softmax":
                y = y.softmax(-1)
            case "reshaped":
                y = y.view(-1, 3, 4).transpose(1, 2).transpose(1, 2).reshape(-1, 12)
            case "added":
                y = y + torch.cat([x, x[:, :4]], -1)
            case _:
                y = F.gelu(y)
        return self.down(y)

    def extra_repr(self) -> str:
        return self.between


@pytest.mark.parametrize(
    ("between", "is_row"),
    [
        ("gelu", True),
        ("gated", True),
        ("reshaped", True),
        ("norm", False),  # a norm of the whole row is on every rank
        ("root mean square", False),
        ("softmax", False),
    ],
)
def test_what_stands_between(between: str, is_row: bool) -> None:
    found = roles(capture(Pair(between), torch.randn(3, 8)))
    assert found["down"] is is_row
    assert found["up"] is False
