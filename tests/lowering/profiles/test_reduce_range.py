"""Weights of 7 bits, for CPUs that add pairs of uint8 times int8 products in 16 bits and saturate."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.errors import SpecError
from graphq.lowering.profiles import PROFILES, profile_named

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", ["ort-cpu", "openvino"])
def test_changes_the_default_weight_alone(name: str) -> None:
    reduced = profile_named(f"{name}+reduce_range")
    assert str(reduced.weight) == "int7/channel"
    assert reduced.name == f"{name}+reduce_range"
    assert reduced.ops is PROFILES[name].ops


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ort-cpu+reduce", "profile: ort-cpu+reduce: options of ort-cpu: reduce_range"),
        ("ort-cpu+", "profile: ort-cpu+: options of ort-cpu: reduce_range"),
        ("qnn-htp+reduce_range", r"profile: qnn-htp\+reduce_range: options of qnn-htp: none"),
        ("hailo+reduce_range", r"profile: hailo\+reduce_range: no such profile; there are ort-cpu, "),
    ],
)
def test_refused(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("t-cpu+", r"t-cpu\+")):
        graphq.compile(Net(), profile=name, inputs=X, calibration=[X])
    assert any(note.startswith("compile refuses: profile: ") for note in _explained(name))


def _explained(name: str) -> tuple[str, ...]:
    spec = {"graphq": 1, "profile": name, "rules": [{"match": "*", "weight": "int8/channel"}]}
    return tuple(graphq.explain(Net(), spec, inputs=X).notes)


def test_a_file_saturates_nowhere_and_runs_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    warned: dict[str, list[str]] = {}
    for name in ("ort-cpu", "ort-cpu+reduce_range"):
        compiled = graphq.compile(model, profile=name, inputs=X, calibration=[X])
        compiled.emit("onnx", tmp_path / name, profile=name)
        report = graphq.lint(tmp_path / name, name, run=True)
        layers = [op for op in report.ops if op.kind in ("Conv", "Linear")]
        assert [(op.runs, op.ran) for op in layers] == [("integers", "integers")] * 2
        warned[name] = [str(warning) for warning in report.warnings]
    assert warned["ort-cpu+reduce_range"] == []
    assert "(profile ort-cpu+reduce_range)" in warned["ort-cpu"][0]
    held = {t.name: t for t in onnx.load(tmp_path / "ort-cpu+reduce_range" / "model.onnx").graph.initializer}
    for layer in ("conv", "head"):
        codes = onnx.numpy_helper.to_array(held[f"{layer}.weight"])
        assert codes.dtype == "int8"
        assert 60 <= abs(codes.astype(int)).max() <= 64
