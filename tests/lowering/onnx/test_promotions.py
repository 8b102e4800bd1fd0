"""Operands of mixed dtypes are cast as torch's exporter casts them, and no other node of the graph is run for that."""

import contextlib
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from graphq.lowering.onnx import emit as target
from graphq.lowering.onnx.emit import emit
from tests.models import capture


class Mixed(nn.Module):
    """Tensors of different dtypes, numbers of another kind than their tensor, results of another dtype; a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x) * (x > 0) + ids
        half = ids / 2 + 0.5 * ids
        return y + half, (x > 0).sum(-1) + 1.5, torch.where(ids > 1, x, 0), (x.half() * x).pow(2)


X, IDS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60).reshape(3, 5, 4)


def test_the_file_is_the_exporters_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = capture(Mixed(), X, IDS)
    emit(gm, tmp_path / "a", {})
    monkeypatch.setattr(target, "lean_promotions", contextlib.nullcontext)
    emit(gm, tmp_path / "b", {})
    ours, theirs = (tmp_path / name / "model.onnx" for name in "ab")
    assert ours.read_bytes() == theirs.read_bytes()
    assert sum(node.op_type == "Cast" for node in onnx.load(ours).graph.node) >= 6
    found = onnxruntime.InferenceSession(ours).run(None, {"x": X.numpy(), "ids": IDS.numpy()})
    for one, expected in zip(found, gm(X, IDS), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), expected, rtol=1e-5, atol=1e-6)


def test_nodes_that_cast_nothing_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

    run: list[str] = []
    run_node = fx.Interpreter.run_node

    def counted(self: fx.Interpreter, n: fx.Node) -> Any:
        if isinstance(self, _TypePromotionInterpreter) and n.op == "call_function":
            run.append(str(n.target))
        return run_node(self, n)

    monkeypatch.setattr(fx.Interpreter, "run_node", counted)
    gm = capture(Mixed(), X, IDS)
    emit(gm, tmp_path / "a", {})
    assert "aten.linear.default" not in run
    assert "prims.convert_element_type.default" in run
    monkeypatch.setattr(target, "lean_promotions", contextlib.nullcontext)
    emit(gm, tmp_path / "b", {})
    assert "aten.linear.default" in run
