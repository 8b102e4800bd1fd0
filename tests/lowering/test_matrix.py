"""The conformance matrix: models of many families, for each profile whose consumer runs here, in each scheme.

A file loads and runs in a default session, gives what the QDQ form gives, and runs in integers what lint says it does:
seen in ONNX Runtime's optimized graph, and in the precisions of OpenVINO's run-time model.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

import graphq
from tests.matrix_models import MODELS, model

SCHEMES: Final = ("w8a8", "w8a8-a16", "w4")
# Of the largest output. Integer kernels round another way now and then, and a code that is off by one is a whole step;
# 4-bit weights meet activations of 8 bits by block in ONNX Runtime's default session where the spelling leaves it that.
BOUND: Final = {"w8a8": 2e-2, "w8a8-a16": 2e-2, "w4": 2e-2}
UNSEEN: Final = 2  # ops that leave no trace of their names in what ran
MOVES: Final = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")  # which runtimes take away in pairs, or into others
QUICK: Final = ("resnet", "bert")
CONVOLUTIONS: Final = ("mobilenet-v2", "efficientnet", "unet", "densenet", "regnet")  # without a linear in groups of 32
# Whose every convolution and linear is in integers on both.
WHOLE: Final = ("resnet", "vit", "bert")


def _cases() -> list[Any]:
    return [
        pytest.param(name, profile, scheme, marks=[] if name in QUICK and scheme == "w8a8" else pytest.mark.slow)
        for name in MODELS
        for profile in ("ort-cpu", "openvino")
        for scheme in SCHEMES
    ]


def _spec(name: str, scheme: str) -> dict[str, Any] | None:
    """The scheme for a model; None for the profile's own."""
    match scheme:
        case "w8a8":
            return None
        case "w8a8-a16":
            wide = {"quant": "uint16/tensor", "op": ["Linear", "Conv"], "module": "head" if name == "bilstm" else "*1*"}
            rule = {"match": "*", "weight": "int8/channel", "may_match_nothing": True}  # an LSTM's weights, too
            return {"graphq": 1, "rules": [rule], "activations": [{"quant": "uint8/tensor"}, wide]}
        case _ if name == "bilstm":  # the head in groups, states in channels
            recurrent = {"match": "kind:recurrent", "weight": "int4/channel"}
            return {"graphq": 1, "rules": [{"match": "kind:linear", "weight": "int4/g32"}, recurrent]}
        case _ if name in CONVOLUTIONS:
            return {"graphq": 1, "rules": [{"match": "*", "weight": "int4/channel"}]}
        case _:
            return {"graphq": 1, "rules": [{"match": "kind:linear", "weight": "int4/g32"}]}


def _run(profile: str, path: Path, inputs: dict[str, torch.Tensor]) -> list[Any]:
    """All outputs."""
    given = {name: x.numpy() for name, x in inputs.items()}
    if profile == "ort-cpu":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return list(session.run(None, {one.name: given[one.name] for one in session.get_inputs()}))
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    opened = core.compile_model(core.read_model(str(path)), "CPU", exact)
    return list(opened({one.any_name: given[one.any_name] for one in opened.inputs}).values())


@pytest.mark.parametrize(("name", "profile", "scheme"), _cases())
def test_conforms(name: str, profile: str, scheme: str, tmp_path: Path) -> None:
    made, inputs = model(name)
    compiled = graphq.compile(made, _spec(name, scheme), profile=profile, inputs=inputs, calibration=[inputs])
    compiled.emit("onnx", tmp_path / "out")
    outputs = [output.detach().numpy() for output in compiled.graph(*inputs.values())]
    for found, wanted in zip(_run(profile, tmp_path / "out" / "model.onnx", inputs), outputs, strict=True):
        assert np.abs(found - wanted).max() <= BOUND[scheme] * np.abs(wanted).max()
    report = graphq.lint(tmp_path / "out", profile, run=True)
    seen = [op for op in report.ops if op.ran is not None]
    assert seen
    assert not [str(op) for op in seen if op.counted and op.ran != op.runs], "prediction and observation differ"
    assert sum(op.ran is None for op in report.counted if op.kind not in MOVES) <= UNSEEN
    if scheme == "w8a8" and name in WHOLE:
        layers = [op for op in report.ops if op.kind in ("Conv", "Linear", "Gemm")]
        assert len(layers) == sum(one.weight is not None and one.input is not None for one in compiled.report.layers)
        assert {op.ran for op in layers} == {"integers"}
