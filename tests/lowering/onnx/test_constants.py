"""Constants are initializers, equal ones one; those that a subgraph gives stay nodes."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import graphq
from graphq.lowering.onnx.constants import hold_constants

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x, bool c) => (float[2] y, float[2] z)
<float[2] held = {9, 8}>
{
    a = Constant<value = float[2] {1, 2}>()
    b = Constant<value = float[2] {1, 2}>()
    d = Constant<value_ints = [0]>()
    e = Constant<value_float = 3.5>()
    f = Constant<value = float[2] {3, 4}>()
    h = Unsqueeze(e, d)
    p = Add(x, a)
    q = Add(p, b)
    r = Add(q, h)
    s = Add(r, held)
    y = If(c) <
        then_branch = t () => (float[2] u) { k = Constant<value = float[2] {1, 2}>() u = Add(s, k) },
        else_branch = o () => (float[2] v) { v = Constant<value = float[2] {5, 6}>() }
    >
    z = Add(f, s)
}
"""


def run(model: ir.Model, condition: bool) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.array([0.5, -1], np.float32), "c": np.array(condition)})
    return [np.asarray(one) for one in found]


def test_which_constants() -> None:
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    before = [one for condition in (True, False) for one in run(model, condition)]
    assert hold_constants(model) == 6
    assert hold_constants(model) == 0
    after = [one for condition in (True, False) for one in run(model, condition)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    left = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type == "Constant"]
    assert [str(node.outputs[0].name) for node in left] == ["v"]
    held = {name: value.const_value.numpy().tolist() for name, value in model.graph.initializers.items()}  # pyright: ignore[reportOptionalMemberAccess]
    assert_expected_inline(
        str(held),
        """{'held': [9.0, 8.0], 'constants.float.2': [1.0, 2.0], 'constants.int64.1': [0], 'constants.float': 3.5, 'constants.float.2_1': [3.0, 4.0]}""",
    )
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_words_stay() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g () => (string y) { a = Constant<value_string = "a">() y = Identity(a) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert hold_constants(model) == 0


class Model(nn.Module):
    """What gives constants of shapes, numbers and axes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(x).reshape(x.shape[0], 3, 4).softmax(-1)
        return torch.nn.functional.gelu(y[:, 1:] * 0.3).mean(1), torch.full((2,), 0.25)


@pytest.mark.parametrize("profile", [None, "ort-cpu", "qnn-htp"])
def test_files_have_no_constant_nodes(profile: str | None, tmp_path: Path) -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    spec = {"graphq": 1, "rules": [{"match": "up", "weight": "int8/channel", "input": "uint8/tensor"}]}
    graphq.compile(Model().eval(), spec, inputs=x, calibration=[x]).emit("onnx", tmp_path / "onnx", profile=profile)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    assert "Constant" not in [node.op_type for node in graph.node]
    assert graphq.verify(tmp_path / "onnx").ok
