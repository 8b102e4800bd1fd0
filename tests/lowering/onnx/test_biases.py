"""Biases that ONNX Runtime's default session rounds to int32, in steps of input scale times weight scale."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import graphq

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
W8A8 = {"match": "kind:linear|conv1d|conv2d", "weight": "int8/channel", "input": "int8/asym/tensor"}


class Net(nn.Module):
    """Two convolutions, and a linear that reads the pooled channels; ``size`` is that of channel 0 of all weights."""

    def __init__(self, size: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3), nn.Linear(5, 3)
        for layer in (self.first, self.second, self.head):
            layer.weight.data[0] *= size
            layer.get_parameter("bias").data[0] = 0.4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def outputs(model: nn.Module, spec: dict[str, Any], path: Path, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Of the float model, of the QDQ form, and of ONNX Runtime's default session."""
    x = X * factor
    made = graphq.compile(model.eval(), spec, inputs=x, calibration=[x])
    made.emit("onnx", path)
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        return model(x), made.graph(x)[0], torch.from_numpy(found)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("size", "algorithm"),
    [(0.0, "rtn"), (1e-5, "rtn"), (1e-8, "rtn"), (1e-44, "rtn"), (0.0, "gptq"), (1e-6, "gptq"), (1e-6, "auto-round")],
)
def test_channels_of_zeros_and_tiny_ones_keep_their_biases(size: float, algorithm: str, tmp_path: Path) -> None:
    steps = {"auto-round": {"steps": 2}}.get(algorithm, {})
    spec = {"graphq": 1, "rules": [W8A8], "algorithms": [{algorithm: steps} if steps else algorithm]}
    wanted, qdq, found = outputs(Net(size), spec, tmp_path / "a")
    assert error(qdq, wanted) < 0.02  # of 8 bits
    assert error(found, qdq) < 2e-3  # codes off by one; 0.2 to 1 where the bias is lost


def test_a_batch_norm_of_gain_0(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[1].weight.data = torch.tensor([0.0, 0.0, 0.01, 0.01])
    model[1].bias.data = torch.tensor([0.4, 0.4, 0.0, 0.0])
    spec = {"graphq": 1, "rules": [W8A8], "algorithms": ["fold-batch-norm"]}
    wanted, qdq, found = outputs(model, spec, tmp_path / "a", factor=255)
    assert error(qdq, wanted) < 0.01
    assert error(found, qdq) < 2e-3  # 0.73 with a scale of 1


def test_a_weight_of_zeros(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[0].weight.data.zero_()
    for granularity in ("channel", "tensor"):
        spec = {"graphq": 1, "rules": [W8A8 | {"weight": f"int8/{granularity}"}]}
        wanted, qdq, found = outputs(model, spec, tmp_path / granularity, factor=255)
        assert error(qdq, wanted) < 0.02
        assert error(found, qdq) < 2e-3


def test_scales_of_other_tools_are_left_alone() -> None:
    model = Net(1e-8).eval()
    for text in ("int8/by_sign/channel", "int8/half/channel"):
        spec = {"graphq": 1, "rules": [W8A8 | {"weight": text}]}
        made = graphq.compile(model, spec, inputs=X, calibration=[X])
        extreme = model.first.weight[0].detach().abs().max()
        wanted = 1.0 if "by_sign" in text else float(extreme / 127.5)
        assert made.graph.get_buffer("first.weight_scale")[0].item() == pytest.approx(wanted, rel=1e-6)
