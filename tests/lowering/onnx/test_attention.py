"""Attention as its parts in ONNX: the same function, masks that hide whole rows and none, few operators."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

import graphq
from graphq.ir.text import dump
from graphq.ir.views import ops_of
from graphq.lowering.onnx.attention import spell_attention
from tests.graphs import assert_vals, run, targets
from tests.lowering.onnx import sessions
from tests.models import capture

Q = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(1))
KEEP_FLOAT = {"graphq": 1, "rules": [{"match": "*", "float": True}]}


class Attention(nn.Module):
    """Scaled dot product attention of x, and of x cut to fewer heads, ``layers`` times, with some of its options."""

    def __init__(self, kv: int = 4, masked: Any = None, layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.kv, self.masked, self.layers, self.options = kv, masked, layers, options

    def forward(self, q: Tensor) -> Tensor:
        mask = None if self.masked is None else self.masked(q)
        for _ in range(self.layers):
            k = q.flip(-2)[..., : self.kv, :, :] if q.dim() == 4 else q.flip(-2)
            q = F.scaled_dot_product_attention(q, k, k * 2, attn_mask=mask, **self.options)
        return q


def hides_some(q: Tensor) -> Tensor:
    return q[:, :1] @ q[:, :1].transpose(-1, -2) > -1


def hides_rows(q: Tensor) -> Tensor:
    return (q[:, :1, :, :1] > 0) & hides_some(q)


def adds(q: Tensor) -> Tensor:
    return q[:, :1] @ q[:, :1].transpose(-1, -2)


def hides_none(q: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool)


CASES: dict[str, Attention] = {
    "plain": Attention(),
    "scale": Attention(scale=0.3),
    "causal": Attention(is_causal=True),
    "booleans": Attention(masked=hides_some),
    "rows that see nothing": Attention(masked=hides_rows),
    "numbers": Attention(masked=adds),
    "true throughout": Attention(masked=hides_none),
    "grouped": Attention(kv=2, enable_gqa=True),
    "grouped alike": Attention(enable_gqa=True),
    "grouped causal": Attention(kv=1, enable_gqa=True, is_causal=True, scale=1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_function(name: str, tmp_path: Path) -> None:
    q = Q.double()
    gm = capture(CASES[name], q)
    wanted = run(gm, q)
    assert spell_attention(gm) == 1
    assert not [target for target in targets(gm) if "attention" in target]
    assert (run(gm, q) - wanted).abs().max() <= 1e-12
    assert_vals(gm, q[:1])
    assert spell_attention(gm) == 0
    graphq.compile(CASES[name], KEEP_FLOAT, inputs=Q).emit("onnx", tmp_path / "onnx")
    (found,), _ = sessions.run(tmp_path / "onnx", Q)
    assert (found - CASES[name](Q)).abs().max() <= 1e-5


def test_rows_that_see_nothing_are_zeros_among_others() -> None:
    """That is what the case above holds to: some rows of its mask are of the one kind, some of the other."""
    sees = hides_rows(Q).any(-1)
    assert sees.any()
    assert not sees.all()
    assert CASES["rows that see nothing"](Q)[~sees.expand(2, 4, 5)].abs().max() == 0


class Heads(nn.Module):
    """Heads of a row are put together again by a view, as what torch's kernel gives is laid out."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(*x.shape[:2], 4, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(*x.shape[:2], -1)


def test_views_of_what_it_gives() -> None:
    x = Q.flatten(2)[:, :, :32]
    gm = capture(Heads(), x)
    wanted = run(gm, x)
    *_, merged = (node for node in gm.graph.nodes if node.target is torch.ops.aten.reshape.default)
    merged.target = torch.ops.aten.view.default  # as capture has it of sequences of any length
    assert torch.equal(run(gm, x), wanted)
    assert spell_attention(gm) == 1
    assert (run(gm, x) - wanted).abs().max() <= 1e-6


def test_golden() -> None:
    gm = capture(Attention(masked=hides_some, layers=2), Q.double())
    assert spell_attention(gm) == 2
    assert_expected_inline(
        dump(gm),
        """\
%q: f64[batch, 4, 5, 8] = input
%1: f64[batch, 1, 5, 8] = aten.slice.Tensor(%q, 1, 0, 1)
%2: f64[batch, 1, 5, 8] = aten.slice.Tensor(%q, 1, 0, 1)
%3: f64[batch, 1, 8, 5] = aten.transpose.int(%2, -1, -2)
%4: f64[batch, 1, 5, 5] = aten.matmul(%1, %3)
%5: bool[batch, 1, 5, 5] = aten.gt.Scalar(%4, -1)
%6: f64[] = aten.full([], 0.0, dtype=f64)
%7: f64[] = aten.full([], -8.988465674311579e+307, dtype=f64)
%8: f64[batch, 1, 5, 5] = aten.where.self(%5, %6, %7)
%9: bool[batch, 1, 5, 1] = aten.any.dim(%5, -1, True)
%10: f64[batch, 1, 5, 1] = aten._to_copy(%9, dtype=f64)
%11: f64[batch, 4, 5, 8] = aten.flip(%q, [-2])
%12: f64[batch, 4, 5, 8] = aten.alias(%11)
%13: f64[batch, 4, 5, 8] = aten.mul.Tensor(%12, 2)
%14: f64[batch, 4, 5, 8] = aten.mul.Tensor(%q, 0.35355339059327373)
%15: f64[batch, 4, 8, 5] = aten.transpose.int(%12, -2, -1)
%16: f64[batch, 4, 5, 5] = aten.matmul(%14, %15)
%17: f64[batch, 4, 5, 5] = aten.add.Tensor(%16, %8)
%18: f64[batch, 4, 5, 5] = aten.softmax.int(%17, -1)
%19: f64[batch, 4, 5, 8] = aten.matmul(%18, %13)
%20: f64[batch, 4, 5, 8] = aten.mul.Tensor(%19, %10)
%21: f64[batch, 4, 5, 8] = aten.flip(%20, [-2])
%22: f64[batch, 4, 5, 8] = aten.alias(%21)
%23: f64[batch, 4, 5, 8] = aten.mul.Tensor(%22, 2)
%24: f64[batch, 4, 5, 8] = aten.mul.Tensor(%20, 0.35355339059327373)
%25: f64[batch, 4, 8, 5] = aten.transpose.int(%22, -2, -1)
%26: f64[batch, 4, 5, 5] = aten.matmul(%24, %25)
%27: f64[batch, 4, 5, 5] = aten.add.Tensor(%26, %8)
%28: f64[batch, 4, 5, 5] = aten.softmax.int(%27, -1)
%29: f64[batch, 4, 5, 8] = aten.matmul(%28, %23)
%30: f64[batch, 4, 5, 8] = aten.mul.Tensor(%29, %10)
return [%30]
""",
    )


def test_attention_that_drops_at_random_stays() -> None:
    gm = capture(Attention(), Q)
    (op,) = (op for op in ops_of(gm) if "attention" in str(op.node.target))
    op.node.args = (*op.node.args[:3], None, 0.1)
    assert spell_attention(gm) == 0


def operators(model: nn.Module, folder: Path, x: Tensor) -> list[str]:
    graphq.compile(model, KEEP_FLOAT, inputs=x).emit("onnx", folder)
    return [node.op_type for node in onnx.load(folder / "model.onnx").graph.node if node.op_type != "Constant"]


def test_what_is_left_in_the_file(tmp_path: Path) -> None:
    assert operators(Attention(masked=hides_none), tmp_path / "plain", Q)[-5:] == [
        *("Mul", "Transpose", "MatMul", "Softmax", "MatMul"),
    ]
    two = operators(Attention(masked=hides_some, layers=2), tmp_path / "two", Q)
    assert [two.count(kind) for kind in ("Softmax", "Where", "ReduceMax", "IsNaN", "Shape")] == [2, 1, 1, 0, 0]


def test_of_three_axes(tmp_path: Path) -> None:
    """Torch's exporter takes four alone."""
    x = Q[:, 0]
    graphq.compile(Attention(), KEEP_FLOAT, inputs=x).emit("onnx", tmp_path / "onnx")
    (found,), _ = sessions.run(tmp_path / "onnx", x)
    assert (found - Attention()(x)).abs().max() <= 1e-5
