"""Prediction and observation agree on what PT2E converts to, as torch's exporter writes it.

PT2E leaves ``torch.ops.quantized_decomposed`` around float ops: per-tensor literals for activations, buffers by channel
for weights, biases in float, and quantizers where the torch quantizer had them.
"""

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphq.linter import onnx_runtime, openvino
from tests.linter.test_models import agree

importlib.import_module("torch.ao.quantization.fx._decomposed")  # it defines the ops
DECOMPOSED: Any = torch.ops.quantized_decomposed


class Converted(nn.Module):
    """Layers with codes for weights; ``signed``: whether activations are int8 with zero point 0."""

    def __init__(self, signed: bool, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.signed = signed
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scale", torch.full(shape[:1], 0.01))
            self.register_buffer(f"{name}_zero", torch.zeros(shape[:1], dtype=torch.int64))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.ones(shape[0])))

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        parts = [getattr(self, f"{name}_{part}") for part in ("codes", "scale", "zero")]
        weight = DECOMPOSED.dequantize_per_channel.default(*parts, 0, -127, 127, torch.int8)
        return weight, getattr(self, f"{name}_bias")

    def activation(self, x: Tensor, positive: bool = False) -> Tensor:
        grid: tuple[Any, ...] = (0.03, 0 if positive else 128, 0, 255, torch.uint8)
        grid = (0.03, 0, -128, 127, torch.int8) if self.signed else grid
        return DECOMPOSED.dequantize_per_tensor.default(DECOMPOSED.quantize_per_tensor.default(x, *grid), *grid)


class Residual(Converted):
    def __init__(self, signed: bool) -> None:
        super().__init__(signed, one=(8, 8, 3, 3), two=(8, 8, 3, 3), depthwise=(8, 1, 3, 3), fc=(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(x)
        y = self.activation(torch.relu(torch.conv2d(x, *self.layer("one"), padding=1)), True)
        y = self.activation(torch.conv2d(y, *self.layer("two"), padding=1))
        y = self.activation(torch.relu(x + y), True)
        y = self.activation(torch.conv2d(y, *self.layer("depthwise"), padding=1, groups=8))
        y = self.activation(F.max_pool2d(y, 2))
        return F.linear(self.activation(F.adaptive_avg_pool2d(y, 1)).flatten(1), *self.layer("fc"))


class MLP(Converted):
    def __init__(self, signed: bool, weights_alone: bool = False) -> None:
        super().__init__(signed, up=(32, 16), down=(16, 32))
        self.weights_alone = weights_alone

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(F.linear(x if self.weights_alone else self.activation(x), *self.layer("up")))
        y = F.linear(y if self.weights_alone else self.activation(y), *self.layer("down"))
        return y if self.weights_alone else x + self.activation(y)


IMAGE, TOKENS = (2, 8, 8, 8), (2, 5, 16)
# The model, its input's shape, and how many of its ops are in integers: in ONNX Runtime, in OpenVINO.
FILES: dict[str, tuple[Any, tuple[int, ...], tuple[str, str]]] = {
    "residual": (lambda: Residual(False), IMAGE, ("6 of 7", "7 of 7")),
    "signed residual": (lambda: Residual(True), IMAGE, ("4 of 7", "7 of 7")),
    "mlp": (lambda: MLP(False), TOKENS, ("1 of 3", "2 of 2")),
    "mlp, free batch": (lambda: MLP(False), TOKENS, ("2 of 3", "2 of 2")),
    "signed mlp": (lambda: MLP(True), TOKENS, ("1 of 3", "2 of 2")),
    "weights": (lambda: MLP(False, weights_alone=True), TOKENS, ("0 of 2", "0 of 2")),
}


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(openvino, "run_apart", openvino.run_here)
    monkeypatch.setattr(onnx_runtime, "run_apart", onnx_runtime.run_here)


@pytest.mark.parametrize("name", FILES)
def test_converted_models(name: str, tmp_path: Path) -> None:
    make, shape, counts = FILES[name]
    free = ({0: torch.export.Dim("batch")},) if "free" in name else None
    path, x = tmp_path / "m.onnx", torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}
        torch.onnx.export(make().eval(), (x,), str(path), dynamic_shapes=free, **options)
    for profile, count in zip(("ort-cpu", "openvino"), counts, strict=True):
        ops = agree(path, profile).counted
        assert f"{sum(op.ran == 'integers' for op in ops)} of {len(ops)}" == count, profile
        if name == "weights":
            assert {op.ran for op in ops} == {"weights"}
