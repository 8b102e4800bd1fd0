"""Zeros in front of convolutions in ONNX: at each end what is asked for, through quantizers, and nothing else."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx_ir.passes import common
from torch import Tensor, nn

import graphq
from graphq.lowering.onnx.pads import fold_pads
from tests.lowering.onnx import sessions

TEXT = """
<ir_version: 8, opset_import: ["" : OPSET]>
g (float[1, 4, 6, 6] x, float[4, 4, 3, 3] w) => (float[1, 4, h, v] y)
<int64[8] p = {0, 0, 0, 0, 0, 0, 1, 1}, float zero = {0}, float one = {1}, int64[8] cut = {0, 0, 0, -1, 0, 0, 0, 1},
 int64[8] deep = {0, 1, 0, 0, 0, 0, 0, 0}, int64[4] two = {1, 0, 2, 1}, int64[2] axes = {-1, 2},
 float s = {0.03}, float t = {0.02}, uint8 z = {120}, float[4] ss = {0.03, 0.02, 0.01, 0.05}, uint8[4] zz = {1, 2, 3, 4}>
{
    BODY
}
"""
Q = "q = QuantizeLinear(a, s, z)\n b = DequantizeLinear(q, s, z)\n "
BEFORE = "r = QuantizeLinear(x, s, z)\n d = DequantizeLinear(r, s, z)\n "
FOLDED: dict[str, tuple[str, list[int], int]] = {  # pads of the convolution, quantizers that are left
    "one end": ("a = Pad(x, p, zero)\n y = Conv(a, w)", [0, 0, 1, 1], 0),
    "no value": ("a = Pad(x, p)\n y = Conv(a, w)", [0, 0, 1, 1], 0),
    "beside its own": ('a = Pad<mode="constant">(x, p)\n y = Conv<pads=[1, 2, 3, 4]>(a, w)', [1, 2, 4, 5], 0),
    "axes": ("a = Pad(x, two, , axes)\n y = Conv(a, w)", [0, 1, 1, 2], 0),
    "in front of quantizers": ("a = Pad(x, p)\n " + Q + "y = Conv(b, w)", [0, 0, 1, 1], 1),
    "between equal ones": (BEFORE + "a = Pad(d, p)\n " + Q + "y = Conv(b, w)", [0, 0, 1, 1], 2),
    "between unlike ones": (BEFORE + "a = Pad(d, p)\n " + Q.replace("s,", "t,") + "y = Conv(b, w)", [0, 0, 1, 1], 2),
    "twice": ("c = Pad(x, p)\n a = Pad(c, p)\n y = Conv(a, w)", [0, 0, 2, 2], 0),
}
KEPT: dict[str, str] = {
    "another number": "a = Pad(x, p, one)\n y = Conv(a, w)",
    "a number that is computed": "v = ReduceMax<keepdims=0>(w)\n a = Pad(x, p, v)\n y = Conv(a, w)",
    "sizes that are computed": "c = Add(p, p)\n a = Pad(x, c)\n y = Conv(a, w)",
    "cut off": "a = Pad(x, cut)\n y = Conv(a, w)",
    "edges again": 'a = Pad<mode="edge">(x, p)\n y = Conv(a, w)',
    "channels": "c = Slice(x, i0, i3, i1)\n a = Pad(c, deep)\n y = Conv(a, w)",
    "sizes of its own": 'a = Pad(x, p)\n y = Conv<auto_pad="SAME_UPPER">(a, w)',
    "another reader": "a = Pad(x, p)\n c = Conv(a, w)\n m = ReduceMax<keepdims=0>(a)\n y = Add(c, m)",
    "another reader of what is quantized": "a = Pad(x, p)\n "
    + Q
    + "c = Conv(b, w)\n m = ReduceMax<keepdims=0>(b)\n y = Add(c, m)",
    "codes": "q = QuantizeLinear(x, s, z)\n a = Pad(q, p)\n b = DequantizeLinear(a, s, z)\n y = Conv(b, w)",
    "scales by channel": "a = Pad(x, p)\n "
    + Q.replace("s, z", "ss, zz").replace("Linear(", "Linear<axis=1>(")
    + "y = Conv(b, w)",
    "an op between": "a = Pad(x, p)\n b = Cos(a)\n y = Conv(b, w)",
    "as weights": "c = Pad(w, p)\n y = Conv(x, c)",
    "no convolution": "a = Pad(x, p)\n y = Relu(a)",
}


def model(body: str) -> ir.Model:
    text = TEXT.replace("OPSET", "21" if "two" in body else "17")
    if "i0" in body:
        text = text.replace("int64[8] p", "int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i3 = {3}, int64[8] p")
    made = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text.replace("BODY", body))))
    if "21" in text[:60]:
        made.ir_version = 10
    return made


def run(made: ir.Model) -> Any:
    random = np.random.default_rng(0)
    feeds = {"x": random.standard_normal((1, 4, 6, 6)), "w": random.standard_normal((4, 4, 3, 3))}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(made).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(
        None, {name: x.astype(np.float32) for name, x in feeds.items()}
    )[0]


@pytest.mark.parametrize("name", FOLDED)
def test_the_same_function(name: str) -> None:
    body, pads, quantizers = FOLDED[name]
    made = model(body)
    before = run(made)
    assert fold_pads(made) == (2 if name == "twice" else 1)
    (conv,) = (node for node in made.graph if node.op_type == "Conv")
    assert list(conv.attributes["pads"].as_ints()) == pads
    assert np.array_equal(run(made), before)
    common.RemoveUnusedNodesPass()(made)
    assert [node.op_type for node in made.graph].count("QuantizeLinear") == quantizers
    assert not [node for node in made.graph if node.op_type == "Pad"]
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert fold_pads(made) == 0


@pytest.mark.parametrize("name", KEPT)
def test_near_misses(name: str) -> None:
    made = model(KEPT[name])
    before = ir.to_proto(made).SerializeToString()
    run(made)
    assert fold_pads(made) == 0
    assert ir.to_proto(made).SerializeToString() == before


class Strided(nn.Module):
    """Convolutions of stride 2 as models from TensorFlow have them, which pad one end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, stride=2, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.first(F.pad(x, (0, 1, 0, 1))))
        return F.relu6(self.second(F.pad(x, (0, 1, 0, 1))))


def test_all_convolutions_run_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    compiled = graphq.compile(Strided().eval(), profile="ort-cpu", inputs=x, calibration=[x])
    compiled.emit("onnx", tmp_path / "onnx")
    (found,), ran = sessions.run(tmp_path / "onnx", x)
    assert ran - Counter(Transpose=2) == Counter(QLinearConv=2, QuantizeLinear=1, DequantizeLinear=1)
    assert (found - compiled.graph(x)[0]).abs().max() <= 1e-6
    assert graphq.verify(tmp_path / "onnx").ok
    report = graphq.lint(tmp_path / "onnx", "ort-cpu", run=True)
    assert [(op.runs, op.ran) for op in report.ops if op.kind == "Conv"] == [("integers", "integers")] * 2
