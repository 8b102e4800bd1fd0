"""Sums in front of norms: written as Sum where one norm alone reads them, since their fusion is slower."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.lowering.onnx.norms import divide_by_roots, split_norms
from tests.lowering.onnx import sessions

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1, 3, 4] x, float[1, 3, 4] y, float[4] w, float[4] b) => (float[1, 3, 4] z) {
    BODY
}
"""
CASES: dict[str, tuple[str, list[str]]] = {
    "one reader": ("s = Add(x, y)\n z = LayerNormalization<axis=-1>(s, w, b)", ["Sum"]),
    "behind another sum": ("r = Add(x, b)\n s = Add(r, y)\n z = LayerNormalization<axis=-1>(s, w, b)", ["Add", "Sum"]),
    "another reader": (
        "s = Add(x, y)\n n = LayerNormalization<axis=-1>(s, w, b)\n z = Mul(n, s)",
        ["Add"],
    ),
    "two norms": (
        "s = Add(x, y)\n n = LayerNormalization(s, w, b)\n m = LayerNormalization<axis=-2>(s, x, y)\n z = Mul(n, m)",
        ["Add"],
    ),
    "of a gain": ("s = Add(w, b)\n z = LayerNormalization<axis=-1>(x, s, b)", ["Add"]),
    "a difference": ("s = Sub(x, y)\n z = LayerNormalization<axis=-1>(s, w, b)", ["Sub"]),
    "in front of another op": ("s = Add(x, y)\n z = Relu(s)", ["Add"]),
    "no producer": ("z = LayerNormalization<axis=-1>(x, w, b)", []),
}


@pytest.mark.parametrize("name", CASES)
def test_which_sums(name: str) -> None:
    body, wanted = CASES[name]
    model = ir.from_proto(onnx.parser.parse_model(TEXT.replace("BODY", body)))
    before = ir.to_proto(model).SerializeToString()
    count = split_norms(model)
    assert [node.op_type for node in model.graph if node.op_type in ("Add", "Sum", "Sub")] == wanted
    assert count == wanted.count("Sum")
    assert split_norms(model) == 0
    random = np.random.default_rng(0)
    feeds = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in {"x": (1, 3, 4), "y": (1, 3, 4), "w": (4,), "b": (4,)}.items()
    }
    found: list[Any] = [
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for data in (before, ir.to_proto(model).SerializeToString())
    ]
    assert np.abs(found[0] - found[1]).max() <= 1e-6


def test_a_sum_that_the_graph_gives_stays() -> None:
    text = TEXT.replace("(float[1, 3, 4] z)", "(float[1, 3, 4] z, float[1, 3, 4] s)")
    body = CASES["one reader"][0]
    assert split_norms(ir.from_proto(onnx.parser.parse_model(text.replace("BODY", body)))) == 0


ROOTS: dict[str, tuple[str, list[str]]] = {
    "behind": ("s = Sqrt(x)\n r = Reciprocal(s)\n z = Mul(y, r)", ["Sqrt", "Div"]),
    "in front": ("s = Sqrt(x)\n r = Reciprocal(s)\n z = Mul(r, y)", ["Sqrt", "Div"]),
    "another reader": ("s = Sqrt(x)\n r = Reciprocal(s)\n m = Mul(r, y)\n z = Add(m, r)", ["Sqrt", "Reciprocal", "Mul", "Add"]),
    "a square": ("s = Sqrt(x)\n r = Reciprocal(s)\n z = Mul(r, r)", ["Sqrt", "Reciprocal", "Mul"]),
    "of no root": ("s = Exp(x)\n r = Reciprocal(s)\n z = Mul(y, r)", ["Exp", "Reciprocal", "Mul"]),
    "a sum": ("s = Sqrt(x)\n r = Reciprocal(s)\n z = Add(y, r)", ["Sqrt", "Reciprocal", "Add"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ROOTS)
def test_which_products(name: str) -> None:
    body, wanted = ROOTS[name]
    model = ir.from_proto(onnx.parser.parse_model(TEXT.replace("BODY", body)))
    feeds = {key: np.random.default_rng(0).uniform(0.5, 2, (1, 3, 4)).astype(np.float32) for key in "xy"}
    feeds |= {key: np.ones(4, np.float32) for key in "wb"}
    before = ir.to_proto(model).SerializeToString()
    assert divide_by_roots(model) == wanted.count("Div")
    assert [node.op_type for node in model.graph] == wanted
    assert divide_by_roots(model) == 0
    found: list[Any] = [
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for data in (before, ir.to_proto(model).SerializeToString())
    ]
    assert np.abs(found[0] / found[1] - 1).max() <= 1e-6


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_a_norm_of_squares_is_one_op_in_onnx_runtime(tmp_path: Path) -> None:
    model = RMSNorm().eval()
    made = graphq.compile(model, {"graphq": 1, "rules": [{"match": "*", "float": True}]}, inputs=X)
    made.emit("onnx", tmp_path / "onnx", profile="ort-cpu")
    (found,), kinds = sessions.run(tmp_path / "onnx", X)
    assert kinds == {"SimplifiedLayerNormalization": 1}
    assert (found - model(X)).abs().max() <= 1e-6


class Block(nn.Module):
    """What follows attention in a BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x) + x)


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def ran(folder: Path, profile: str | None, opset: int | None = None) -> Counter[str]:
    torch.manual_seed(0)
    made = graphq.compile(Block().eval(), {"graphq": 1, "rules": [{"match": "*", "float": True}]}, inputs=X)
    made.emit("onnx", folder / "onnx", profile=profile, opset=opset)
    (found,), kinds = sessions.run(folder / "onnx", X)
    with torch.no_grad():
        assert (found - made.graph(X)[0]).abs().max() <= 1e-5
    return kinds


def test_norms_for_onnx_runtime_are_whole_and_alone(tmp_path: Path) -> None:
    kinds = ran(tmp_path, "ort-cpu")
    assert (kinds["LayerNormalization"], kinds["Sum"], kinds["SkipLayerNormalization"]) == (1, 1, 0)


def test_the_lowest_opset_of_a_profile_gives_way_to_the_one_that_is_asked_for(tmp_path: Path) -> None:
    assert ran(tmp_path / "asked", "ort-cpu", 13)["Sqrt"] == 1
    assert onnx.load(tmp_path / "asked" / "onnx" / "model.onnx").opset_import[0].version == 13
    ran(tmp_path / "portable", None)
    assert onnx.load(tmp_path / "portable" / "onnx" / "model.onnx").opset_import[0].version == 13
