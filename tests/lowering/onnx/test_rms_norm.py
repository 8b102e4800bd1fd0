"""RMS norms as one op where the consumer has it, and as what defines it elsewhere: the same function."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import graphq

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


class Written(nn.Module):
    """A linear of a norm that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8, generator=torch.Generator().manual_seed(2)) + 0.5)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


class One(nn.Module):
    """A linear of torch's own norm, with and without gain and epsilon."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(8, **options), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def emitted(model: nn.Module, path: Path, profile: str | None, **options: Any) -> tuple[onnx.ModelProto, Any, Tensor]:
    torch.manual_seed(0)
    spec = None if profile else "w8a16"
    made = graphq.compile(model.eval(), spec, profile=profile, inputs=(X,), calibration=[X] if profile else None)
    made.emit("onnx", path / "onnx", **options)
    file = path / "onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    made.graph.recompile()
    return onnx.load(str(file)), session.run(None, {"x": X.numpy()})[0], made.graph(X)[0].detach()


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("model", [Written(), One(eps=1e-6)])
def test_one_op_for_a_consumer_that_has_it(model: nn.Module, tmp_path: Path) -> None:
    file, found, wanted = emitted(model, tmp_path, "qnn-htp")
    assert kinds(file).count("RMSNormalization") == 1
    assert file.opset_import[0].version == 23
    assert not {"Pow", "ReduceMean", "Sqrt"} & set(kinds(file))
    step = 2 * float(np.abs(wanted.numpy()).max()) / 255
    assert np.abs(found - wanted.numpy()).max() <= 1.01 * step  # of the last grid


@pytest.mark.parametrize("options", [{}, {"opset": 20}])
def test_its_definition_elsewhere(options: dict[str, Any], tmp_path: Path) -> None:
    profile = "qnn-htp" if options else "ort-cpu"
    file, found, wanted = emitted(Written(), tmp_path, profile, **options)
    assert "RMSNormalization" not in kinds(file)
    assert kinds(file).count("ReduceMean") == 1
    assert np.abs(found - wanted.numpy()).max() <= 0.02 * np.abs(wanted.numpy()).max()


class Inside(One):
    """The norm in another dtype than the linear."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.to(self.dtype)).to(x.dtype))

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(**options)
        self.norm.to(dtype)
        self.dtype = dtype


@pytest.mark.parametrize("options", [{"eps": 1e-3}, {}, {"eps": 1e-3, "elementwise_affine": False}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-5), (torch.float16, 2e-3)])
def test_without_a_profile(options: dict[str, Any], dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    file, found, wanted = emitted(Inside(dtype, **options), tmp_path, None)
    assert "RMSNormalization" not in kinds(file)
    assert np.abs(found - wanted.numpy()).max() <= tolerance * np.abs(wanted.numpy()).max()
