"""Names of inputs, outputs and tensors in ONNX files: the source's own, whatever the exporter calls its values."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.capture.source import source_of
from graphq.errors import TargetError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)


class OneTensorTwice(Layer):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.l(x)
        return {"a": y, "b": y, "c": y}


class InputReturned(Layer):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, self.l(x), x


class BufferReturned(Layer):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.l(x) + self.table, self.table, self.table


class NamedAsValues(Layer):
    def forward(self, val_0: Tensor, dequantize: Tensor) -> dict[str, Tensor]:
        return {"val_1": self.l(val_0).reshape(-1, 4) + val_0.sum(), "linear": self.l(dequantize)}


class ParameterNamedAsOutput(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.output, self.val_0 = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.l(x) + self.output).reshape(-1, 2) * self.val_0


MODELS: tuple[type[nn.Module], ...] = (
    OneTensorTwice,
    InputReturned,
    BufferReturned,
    NamedAsValues,
    ParameterNamedAsOutput,
)
INT8 = {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel"}]}


@pytest.mark.parametrize("model", MODELS)
def test_each_name_stands_for_its_own_tensor(model: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(3, 8) for _ in range(2 if model is NamedAsValues else 1))
    made = graphq.compile(model(), INT8, inputs=inputs)
    made.emit("onnx", tmp_path / "a")
    onnx.checker.check_model(str(tmp_path / "a" / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx")
    source = source_of(made.graph)
    names = [i.name for i in source.inputs]
    assert [i.name for i in session.get_inputs()] == names
    assert [o.name for o in session.get_outputs()] == list(source.outputs)
    found: Any = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    for ours, expected in zip(found, made.graph(*inputs), strict=True):
        assert (torch.from_numpy(ours) - expected).abs().max() <= 1e-6 * expected.abs().max()  # another order of sums
    assert graphq.verify(tmp_path / "a").ok


class Returns(Layer):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {self.name: self.l(x)}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("x", "onnx: x is the name of an input and of an output, ONNX has one tensor of a name"),
        ("l.weight", "onnx: l.weight is the name of a quantized tensor and of an input or output"),
        ("", "onnx: an output has no name; ONNX tells outputs by their names"),
    ],
)
def test_names_that_onnx_cannot_hold(name: str, problem: str, tmp_path: Path) -> None:
    made = graphq.compile(Returns(name), INT8, inputs=torch.randn(3, 8))
    with pytest.raises(TargetError) as caught:
        made.emit("onnx", tmp_path / "a")
    assert str(caught.value) == problem
    assert list(tmp_path.iterdir()) == []
