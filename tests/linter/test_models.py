"""Prediction and observation agree on whole models: ours, those of ``quantize_static``, of torch's exporter."""

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.errors import TargetError
from graphq.linter import onnx_runtime, openvino

PROFILES = ("ort-cpu", "openvino")
openvino_apart = openvino.run_apart
STATIC = {"graphq": 1, "weight": "int8/channel", "input": "uint8/tensor"}
SIGNED = {"graphq": 1, "weight": "int8/channel", "input": "int8/asym/tensor"}
LLAMA = Path(__file__).parents[2] / "examples" / "models" / "stdlib-llama"


class Block(nn.Module):
    def __init__(self, wide_in: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(wide_in, wide, 3, stride, 1), nn.Conv2d(wide, wide, 3, 1, 1)
        self.relu = nn.ReLU()
        self.shortcut = nn.Conv2d(wide_in, wide, 1, stride) if stride > 1 or wide_in != wide else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet().eval()


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 10,
    }
    return ViTForImageClassification(ViTConfig(**options)).eval()


def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(openvino, "run_apart", openvino.run_here)
    monkeypatch.setattr(onnx_runtime, "run_apart", onnx_runtime.run_here)


def agree(path: Path, profile: str, unseen: int = 0) -> Any:
    """The report, once prediction and observation are equal for all ops but ``unseen`` that left no trace."""
    report = graphq.lint(path, profile, run=True)
    assert report.differences == (), report
    assert [op for op in report.ops if not op.counted and op.ran not in (None, "float")] == []
    assert sum(op.ran is None for op in report.counted) <= unseen, [op for op in report.counted if op.ran is None]
    return report


def ran(report: Any, *kinds: str) -> str:
    """How many ops of these kinds ran in integers, of how many; a ``w`` behind those by stored weights alone."""
    ops = [op for op in report.ops if op.kind in kinds and op.ran is not None]
    weights = sum(op.ran == "weights" for op in ops)
    return f"{sum(op.ran == 'integers' for op in ops)} of {len(ops)}" + (f", {weights} w" if weights else "")


LAYERS = ("Conv", "Linear", "Gemm")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """The float models as torch's exporter writes them, ready for ONNX Runtime's quantizer."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder, found = tmp_path_factory.mktemp("float"), {}
    for name, model in (("resnet", resnet()), ("vit", vit())):
        raw, ready = folder / f"{name}_raw.onnx", folder / f"{name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (image(),), str(raw), dynamo=True, external_data=False, verbose=False)
            logging.disable(logging.WARNING)
            quant_pre_process(str(raw), str(ready), skip_symbolic_shape=True)
            logging.disable(logging.NOTSET)
        found[name] = ready
    return found


def quantized(path: Path, out: Path, signed: bool, form: str = "QDQ") -> Path:
    """By onnxruntime's ``quantize_static``, with all kinds of ops that it quantizes."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    name = onnx.load(path).graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{name: image().numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    activation = QuantType.QInt8 if signed else QuantType.QUInt8
    options: dict[str, Any] = {"per_channel": True, "activation_type": activation, "weight_type": QuantType.QInt8}
    quantize_static(str(path), str(out), Reader(), quant_format=QuantFormat[form], **options)
    return out


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("model", "layers"), [("resnet", 9), ("vit", 34)])
def test_quantize_static_by_operators(exported, model, layers, signed, tmp_path):
    """QLinearConv, QLinearMatMul, ...: ONNX Runtime runs each as it is; no other consumer reads them."""
    path = quantized(exported[model], tmp_path / "q.onnx", signed, "QOperator")
    report = agree(path, "ort-cpu")
    assert report.ok
    assert len(report.counted) == sum(op.ran == "integers" for op in report.counted) >= layers
    (problem,) = graphq.lint(path, "openvino").model
    assert problem.reason.startswith("openvino has no QLinear")
    with pytest.raises(TargetError, match="OpenVINO cannot run it"):
        openvino_apart(path)


QUANTIZE_STATIC = {
    ("resnet", False, "ort-cpu"): ("7 of 7", True),
    ("resnet", True, "ort-cpu"): ("4 of 7", False),
    ("resnet", False, "openvino"): ("7 of 7", True),
    ("resnet", True, "openvino"): ("7 of 7", True),
    ("vit", False, "ort-cpu"): ("14 of 14", True),
    ("vit", True, "ort-cpu"): ("14 of 14", False),
    ("vit", False, "openvino"): ("14 of 14", False),
    ("vit", True, "openvino"): ("14 of 14", False),
}


@pytest.mark.parametrize(("model", "signed", "profile"), QUANTIZE_STATIC)
def test_quantize_static(exported, model, signed, profile, tmp_path):
    """int8 activations that are read twice stay int8 in ONNX Runtime beside uint8 ones, and take their ops to float."""
    layers, ok = QUANTIZE_STATIC[model, signed, profile]
    report = agree(quantized(exported[model], tmp_path / "q.onnx", signed), profile, unseen=8)
    assert ran(report, *LAYERS) == layers
    assert report.ok == ok


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ours")
    specs: dict[str, tuple[nn.Module, Any]] = {
        "resnet static": (resnet(), STATIC),
        "resnet weights": (resnet(), {"graphq": 1, "weight": "int8/channel"}),
        "vit static": (vit(), SIGNED),
        "vit weights": (vit(), {"graphq": 1, "weight": "int4/g16"}),
    }
    for name, (model, spec) in specs.items():
        compiled = graphq.compile(model, spec, inputs=(image(),), calibration=[(image(),)])
        compiled.emit("onnx", folder / name)
    return {name: folder / name for name in specs}


OURS = {
    ("resnet static", "ort-cpu"): "2 of 7",
    ("resnet static", "openvino"): "7 of 7",
    ("resnet weights", "ort-cpu"): "0 of 7",
    ("resnet weights", "openvino"): "0 of 7, 1 w",
    ("vit static", "ort-cpu"): "0 of 14",
    ("vit static", "openvino"): "12 of 14",
    ("vit weights", "ort-cpu"): "0 of 14",
    ("vit weights", "openvino"): "0 of 14, 12 w",
}


@pytest.mark.parametrize(("model", "profile"), OURS)
def test_our_files(ours, model, profile):
    assert ran(agree(ours[model], profile, unseen=1), *LAYERS) == OURS[model, profile]


class Decomposed(nn.Module):
    """What PT2E converts to: quantize and dequantize of ``torch.ops.quantized_decomposed`` around float ops."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("conv", (16, 8, 3, 3)), ("fc", (10, 16))):
            self.register_buffer(
                f"{name}_codes", torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
            )
            self.register_buffer(f"{name}_scale", torch.full(shape[:1], 0.01))
            self.register_buffer(f"{name}_zero", torch.zeros(shape[:1], dtype=torch.int64))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.ones(shape[0])))

    def weight(self, name: str) -> Tensor:
        parts = [getattr(self, f"{name}_{part}") for part in ("codes", "scale", "zero")]
        return torch.ops.quantized_decomposed.dequantize_per_channel.default(*parts, 0, -127, 127, torch.int8)

    def activation(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        grid = (scale, zero_point, 0, 255, torch.uint8)
        q = torch.ops.quantized_decomposed.quantize_per_tensor.default(x, *grid)
        return torch.ops.quantized_decomposed.dequantize_per_tensor.default(q, *grid)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.conv2d(self.activation(x, 0.03, 128), self.weight("conv"), self.conv_bias, padding=1)  # type: ignore[arg-type]
        y = self.activation(torch.relu(y), 0.02, 0).mean((2, 3))
        return nn.functional.linear(self.activation(y, 0.02, 0), self.weight("fc"), self.fc_bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(("profile", "layers"), [("ort-cpu", "1 of 2"), ("openvino", "2 of 2")])
def test_torch_s_exporter_of_pt2e(tmp_path, profile, layers):
    """The last layer has no quantizer behind it and a bias in float: ONNX Runtime leaves it in float."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # it defines the ops

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = tmp_path / "pt2e.onnx"
        args = (torch.randn(2, 8, 8, 8),)
        torch.onnx.export(Decomposed().eval(), args, str(path), dynamo=True, external_data=False, verbose=False)
    assert ran(agree(path, profile), *LAYERS) == layers


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["w8a8", "w4a16"])
def test_a_language_model(spec, tmp_path):
    """Mask, positions and caches: inputs whose sizes belong together."""
    graphq.compile(LLAMA, spec).emit("onnx", tmp_path / "onnx")
    assert ran(agree(tmp_path / "onnx", "ort-cpu"), *LAYERS) == "0 of 43"
    assert ran(agree(tmp_path / "onnx", "openvino"), *LAYERS) == "0 of 43, 42 w"


def test_the_sample_in_the_documents(exported, tmp_path):
    """What docs/profiles.md prints is what lint says of this file."""
    text = (Path(__file__).parents[2] / "docs" / "profiles.md").read_text()
    sample = text.partition("`--profile ort-cpu --run` says:\n\n```\n")[2].partition("```")[0]
    report = agree(quantized(exported["resnet"], tmp_path / "q.onnx", signed=True), "ort-cpu", unseen=8)
    assert sample == f"{report}\n"
