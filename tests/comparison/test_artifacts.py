"""Every target's artifact is compared as the layers that it holds: a wrong scale in one of them comes first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

import graphq
from graphq.errors import SpecError, TargetError
from tests.models import Blocks, tiny

FACTOR = 1.5
TOKENS = [torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(i)) for i in range(2)]
SPECS: dict[str, Any] = {
    "torch": {"graphq": 1, "weight": "int4/asym/g32", "input": "int8/token/dynamic"},
    "onnx": {"graphq": 1, "weight": "int4/g32"},
    "compressed-tensors": {"graphq": 1, "weight": "int4/half/g32"},
    "ascend": {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic"},
}
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def scale_safetensors(file: Path, layer: str, factor: float = FACTOR) -> None:
    """The scales of a layer's weight in a file of tensors are this many times what they were."""
    tensors = load_file(file)
    names = [name for name in tensors if name.startswith(f"{layer}.") and name.endswith("scale")]
    (name,) = [name for name in names if "input" not in name]
    tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})


def scale_onnx(file: Path, layer: str, factor: float = FACTOR) -> None:
    held = onnx.load(file)
    (scale,) = [x for x in held.graph.initializer if x.name == f"{layer}.weight_scale"]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * scale_type(scale, factor), scale.name))
    onnx.save(held, file, save_as_external_data=True, location="model.onnx.data")


def scale_type(scale: Any, factor: float) -> Any:
    return numpy_helper.to_array(scale).dtype.type(factor)


def damage(target: str, directory: Path, layer: str) -> None:
    if target == "onnx":
        scale_onnx(directory / "model.onnx", layer)
    else:
        (file,) = directory.glob("*.safetensors")
        scale_safetensors(file, layer)


@pytest.mark.parametrize("target", SPECS)
def test_a_wrong_scale_comes_first(model: Any, target: str, tmp_path: Path) -> None:
    spec = SPECS[target]
    made = graphq.compile(model, spec, target=target)
    options = {"consumer": "any"} if target in ("compressed-tensors", "ascend") else {}
    made.emit(target, tmp_path / "artifact", **options)
    whole = graphq.diff(made, tmp_path / "artifact", model=model, calibration=TOKENS)
    assert [layer.name for layer in whole.layers if layer.local.share > 0] == []
    assert whole.agreement is not None
    assert (whole.agreement.kl, whole.agreement.top1) == (0, 1)
    before = graphq.diff(model, made, calibration=TOKENS)
    assert before.layers[0].local.share < 0.02
    damage(target, tmp_path / "artifact", LAYER)
    found = graphq.diff(model, tmp_path / "artifact", calibration=TOKENS)
    first, second = found.layers[:2]
    assert first.name == LAYER
    # what it gives is 1.5 times as much: half of it is error
    assert first.local.share == pytest.approx(0.25, abs=0.03)  # and 2.25 times the noise of rounding, 1.2 %
    assert second.local.share < 0.02
    assert {layer.name for layer in found.layers if layer.b != "float"} == {
        f"model.layers.{i}.{part}"
        for i in (0, 1)
        for part in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    }
    # the fault is carried on: what reads it is as it was by itself, and not with what it is given
    down = next(layer for layer in found.layers if layer.name == "model.layers.1.mlp.down_proj")
    same = next(layer for layer in before.layers if layer.name == down.name)
    assert down.local.share == pytest.approx(same.local.share, rel=1e-9)
    assert down.cumulative.share > 5 * same.cumulative.share
    both = graphq.diff(made, tmp_path / "artifact", model=model, calibration=TOKENS)
    assert [layer.name for layer in both.layers if layer.local.share > 1e-9] == [LAYER]
    assert both.layers[0].local.share == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("target", ["torch", "onnx"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_transposed_weights_and_stacks_of_experts(family: str, target: str, tmp_path: Path) -> None:
    model = tiny(family)
    made = graphq.compile(model, {"graphq": 1, "weight": "int8/channel"})
    made.emit(target, tmp_path / "artifact")
    found = graphq.diff(made, tmp_path / "artifact", model=model, calibration=TOKENS)
    assert [layer.name for layer in found.layers if layer.local.share > 0] == []
    assert sum(layer.b != "float" for layer in found.layers) == (8 if family == "gpt2" else 14)
    assert not found.notes


@pytest.mark.parametrize("weight", ["int8/4x4", "int4/asym/g3", "int8/tensor", "mxfp4"])
@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_scales_of_every_granularity(target: str, weight: str, tmp_path: Path) -> None:
    """ONNX repeats the scales of blocks along rows, and leaves out axes of size 1."""
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(16, 8)
    made = graphq.compile(model, {"graphq": 1, "weight": weight}, inputs=x)
    made.emit(target, tmp_path / "artifact")
    found = graphq.diff(made, tmp_path / "artifact", model=model, inputs=x, calibration=[x])
    assert [layer.name for layer in found.layers if layer.local.share > 0] == []


def test_static_inputs_are_those_of_the_artifact(tmp_path: Path) -> None:
    """Calibrated on other data than it is compared on."""
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(16, 8)
    spec = {"graphq": 1, "weight": "int8/channel", "input": "int8/asym/tensor"}
    made = graphq.compile(model, spec, inputs=x, calibration=[x / 4])
    made.emit("onnx", tmp_path / "artifact")
    found = graphq.diff(made, tmp_path / "artifact", model=model, inputs=x, calibration=[x])
    assert [layer.name for layer in found.layers if layer.local.share > 0] == []
    clipped = {layer.name: layer.clipped for layer in found.layers}
    anew = graphq.diff(model, spec, inputs=x, calibration=[x])
    assert min(clipped[f"blocks.{i}.up"] or 0 for i in (0, 1)) > 0.3
    assert all((layer.clipped or 0) < 0.1 for layer in anew.layers)


def test_a_graph_with_quantizers_everywhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(16, 8)
    made = graphq.compile(model, profile="ort-cpu", inputs=x, calibration=[x])
    made.emit("onnx", tmp_path / "artifact")
    found = graphq.diff(made, tmp_path / "artifact", model=model, inputs=x, calibration=[x / 2])
    assert [layer.name for layer in found.layers if layer.local.share > 0] == []
    assert all(layer.clipped is not None for layer in found.layers)


def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in tensors.items() if name != f"{LAYER}.weight_scale"}


def reshaped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.norm.weight": torch.ones(32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, f"holds no {LAYER}.weight"),
        (reshaped, "model.norm.weight: float32[32], and its spec makes float32[64]"),
    ],
)
def test_an_artifact_that_is_not_what_its_spec_makes(
    model: Any, change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    graphq.compile(model, SPECS["compressed-tensors"]).emit("compressed-tensors", tmp_path / "artifact", consumer="any")
    file = tmp_path / "artifact" / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(TargetError) as raised:
        graphq.diff(model, tmp_path / "artifact", calibration=TOKENS)
    assert message in str(raised.value)


def test_an_artifact_needs_its_model(model: Any, tmp_path: Path) -> None:
    graphq.compile(model, SPECS["torch"]).save(tmp_path / "artifact")
    with pytest.raises(SpecError, match=r"artifact: give the model that it is of \(model=, --model\)"):
        graphq.diff(tmp_path / "artifact", tmp_path / "artifact", calibration=TOKENS)
