"""ONNX Runtime computes linears with the activations that the QDQ form has: it fuses none into MatMulNBits."""

import contextlib
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.errors import TargetError

OPSETS = (13, 17, 21, 23)
FORMATS = ("int8", "int8/asym", "int6", "int6/asym", "int4", "int4/asym", "int2", "float8_e4m3fn")
GRANULARITIES = ("channel", "tensor", "g16")


class Products(nn.Module):
    """Linears on two and on three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 48), nn.Linear(48, 64, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(torch.relu(self.up(x)) - 0.2)
        return y, self.up(y[:, 0])


def in_onnx_runtime(folder: Path, x: Tensor) -> tuple[list[Tensor], list[str]]:
    """The outputs, and the ops that ONNX Runtime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    found: Any = session.run(None, {"x": x.numpy()})
    return [torch.from_numpy(y) for y in found], [
        n.op_type for n in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node
    ]


def check(rule: dict[str, str], folder: Path, opset: int) -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    made = graphq.compile(Products(), {"graphq": 1, "rules": [{"match": "*"} | rule]}, inputs=x, calibration=[x])
    with contextlib.suppress(TargetError):  # where its types are of a later one
        made.emit("onnx", folder, opset=opset)
    if not folder.exists():
        made.emit("onnx", folder)
    outputs, ops = in_onnx_runtime(folder, x)
    assert "DequantizeLinear" in ops
    assert "MatMulNBits" not in ops
    for found, expected in zip(outputs, made.graph(x), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # another order of sums


def case(*values: Any, quick: bool) -> Any:
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("format", "granularity", "opset"),
    [
        case(format, granularity, opset, quick=format == "int8" or (granularity, opset) == ("channel", 21))
        for format in FORMATS
        for granularity in GRANULARITIES
        for opset in OPSETS
    ],
)
def test_no_weight_is_fused_with_rounding_of_its_input(
    format: str, granularity: str, opset: int, tmp_path: Path
) -> None:
    check({"weight": f"{format}/{granularity}"}, tmp_path / "a", opset)


@pytest.mark.parametrize("opset", [case(opset, quick=opset in (13, 21)) for opset in OPSETS])
@pytest.mark.parametrize("input", ["int8/tensor", "int8/asym/tensor", "int8/token/dynamic"])
@pytest.mark.parametrize("weight", ["int8/channel", "int8/asym/channel", "int4/g16"])
def test_codes_of_inputs_are_not_cut_off(weight: str, input: str, opset: int, tmp_path: Path) -> None:
    check({"weight": weight, "input": input}, tmp_path / "a", opset)


def test_one_layer_of_4_bits_changes_no_other(tmp_path: Path) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    rules = [{"match": "=0", "weight": "int8/channel"}, {"match": "=1", "weight": "int4/asym/g16"}]
    made = graphq.compile(model, {"graphq": 1, "rules": rules}, inputs={"input": x})
    made.emit("onnx", tmp_path / "a")
    session = onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx")
    (found,) = session.run(None, {"input": x.numpy()})
    expected = made.graph(x)[0]
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_small_scales_by_sign(tmp_path: Path) -> None:
    # AMCT takes a scale below 2^-23 as 1, so that a token of small numbers is lost; the file computes the same.
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-6], [1e-4]])
    made = graphq.compile(
        nn.Linear(64, 32, bias=False),
        {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel", "input": "int8/by_sign/token/dynamic"}]},
        inputs={"input": x},
    )
    made.emit("onnx", tmp_path / "a")
    (found,) = onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx").run(None, {"input": x.numpy()})
    expected = made.graph(x)[0]
    assert expected[1].eq(0).all()
    assert expected[2].ne(0).all()
    # 1e-5 of each token's largest: float32 sums of 64 products in another order.
    assert (abs(found - expected.numpy()) <= 1e-5 * abs(expected.numpy()).max(-1, keepdims=True)).all()
