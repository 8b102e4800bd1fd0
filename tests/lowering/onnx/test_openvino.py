"""Spellings in OpenVINO's CPU plugin: its precisions and its results, with the hints that a user gives it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq

openvino = pytest.importorskip("openvino")

FLOAT = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}


def precisions(folder: Path, x: Tensor, hints: dict[str, str]) -> tuple[Tensor, list[str]]:
    """The output, and what each linear runs in."""
    model: Any = openvino.Core().compile_model(str(folder / "model.onnx"), "CPU", hints)
    (found,) = model(x.numpy()).values()
    kinds = [{k: v.astype(str) for k, v in op.get_rt_info().items()} for op in model.get_runtime_model().get_ops()]
    return torch.from_numpy(found), [k["runtimePrecision"] for k in kinds if k["layerType"] == "FullyConnected"]


def compiled(weight: str, input: str | None, x: Tensor) -> Any:
    torch.manual_seed(0)
    rule = {"match": "*", "weight": weight} | ({"input": input} if input else {})
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128))
    return graphq.compile(model, {"graphq": 1, "rules": [rule]}, inputs=x, calibration=[x])


@pytest.mark.parametrize(
    ("shape", "hints"),
    [((7, 256), {}), ((2, 7, 256), {}), ((2, 3, 7, 256), FLOAT)],  # what four axes give is added in bfloat16
)
def test_static_linears_run_in_integers(shape: tuple[int, ...], hints: dict[str, str], tmp_path: Path) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = compiled("int8/channel", "uint8/tensor", x)
    made.emit("onnx", tmp_path / "a", profile="openvino")
    found, ran = precisions(tmp_path / "a", x, hints)
    assert ran == ["u8", "u8"]
    expected = made.graph(x)[0]
    # Its own sums in float32; a code off by one would be 4e-3, and bfloat16 between the layers 5e-3.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("weight", ["int4/g32", "int4/asym/g128", "int8/channel"])
def test_weights_alone_leave_activations_alone_with_its_hints(weight: str, tmp_path: Path) -> None:
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    made = compiled(weight, None, x)
    made.emit("onnx", tmp_path / "a", profile="openvino")
    expected = made.graph(x)[0]
    found, _ = precisions(tmp_path / "a", x, FLOAT)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # float32 in another order
