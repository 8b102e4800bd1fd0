"""Kinds of ops are those that they are exported to; activations are what an op reads beside its own parameters."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphq.ir.op_kinds import INPUT, KINDS, activations_of, is_float, kind_of
from graphq.ir.views import Op, ops_of
from graphq.lowering.profiles import PROFILES
from tests.models import capture

OWN = {"Linear", "Experts", "Attention", "Embedding", "Input", "Silu"}  # graphq's own words
X = torch.randn(2, 4, 6)


def ops(model: nn.Module, *inputs: Tensor) -> dict[str, Op]:
    return {
        op.node.name: op for op in ops_of(capture(model, *inputs)) if op.node.op in ("placeholder", "call_function")
    }


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.norm = nn.Linear(6, 6), nn.Conv1d(4, 4, 1), nn.LayerNorm(6)
        self.table = nn.Embedding(8, 6)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = self.norm(self.conv(self.linear(x))) * self.gain
        y = torch.add(y, x, alpha=2) - 1
        y = 1 - y + self.table(tokens)
        return F.scaled_dot_product_attention(y, y, x).cumsum(-1).clone()


def test_kinds() -> None:
    found = {name: kind_of(op) for name, op in ops(Calls(), X, torch.ones(2, 4, dtype=torch.int64)).items()}
    assert found == {
        "x": INPUT,
        "tokens": INPUT,
        "linear": "Linear",
        "conv1d": "Conv",
        "layer_norm": "LayerNormalization",
        "mul": "Mul",
        "add": "add",  # of a multiple, which is a product and a sum
        "sub": "Sub",
        "rsub": "Sub",
        "embedding": "Embedding",
        "add_1": "Add",
        "scaled_dot_product_attention": "Attention",
        "cumsum": "cumsum",
        "clone": "clone",
    }


def test_every_kind_is_an_op_of_onnx_or_a_word_of_ours() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    newest = {"Gelu", "HardSwish", "RMSNormalization", "GroupNormalization", "Attention"}
    assert {*KINDS} - OWN - known - newest == set()
    assert len({*KINDS}) == len(KINDS)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_have_rows_for_kinds_that_there_are(name: str) -> None:
    profile = PROFILES[name]
    assert {*profile.ops} - {*KINDS} <= {"Flatten", "Gemm"}  # of files: here these are Reshape and Linear
    assert {kind for chain in profile.fuses for kind in chain} - {*KINDS} == set()


def test_activations_are_read_once_each_without_an_ops_own_parameters() -> None:
    found = {
        name: [x.node.name for x in activations_of(op)]
        for name, op in ops(Calls(), X, torch.ones(2, 4, dtype=torch.int64)).items()
        if op.node.op == "call_function"
    }
    assert found == {
        "linear": ["x"],
        "conv1d": ["linear"],
        "layer_norm": ["conv1d"],
        "mul": ["layer_norm", "gain"],
        "add": ["mul", "x"],
        "sub": ["add"],
        "rsub": ["sub"],
        "embedding": ["table_weight"],
        "add_1": ["rsub", "embedding"],
        "scaled_dot_product_attention": ["add_1", "x"],
        "cumsum": ["scaled_dot_product_attention"],
        "clone": ["cumsum"],
    }


def test_an_op_that_gives_no_one_float_tensor() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, _ = x.chunk(2, -1)
            return left * (left > 0)

    found = {name: is_float(op) for name, op in ops(Cut(), X).items()}
    assert found == {"x": True, "chunk": False, "getitem": True, "gt": False, "mul": True}
