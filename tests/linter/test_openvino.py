"""What is read from OpenVINO's run-time model, in a process of its own."""

from importlib.metadata import PackageNotFoundError

import pytest

import graphq
from graphq.errors import TargetError
from graphq.linter import openvino
from tests.linter.cases import conv, linear


def test_apart_and_here_say_the_same(tmp_path):
    m, outputs = conv()
    path = m.save(tmp_path / "m.onnx", *outputs)
    report = graphq.lint(path, "openvino", run=True)
    assert report.ok
    assert report.observation() == f"1 of 1 ops ran in integers in {report.observed}"
    assert str(report.observed).startswith("OpenVINO 20")
    assert [op.layer for op in openvino.run_apart(path)] == [op.layer for op in openvino.run_here(path)]


def test_a_file_that_ends_its_process(tmp_path):
    """OpenVINO 2026.4 divides by zero on a MatMul whose weight has its scales along the input; graphq goes on."""
    m, outputs = linear(scales="input", out=None)
    path = m.save(tmp_path / "m.onnx", *outputs)
    with pytest.raises(TargetError, match=r"m\.onnx: OpenVINO cannot run it: its process ended with SIG"):
        graphq.lint(path, "openvino", run=True)


def test_a_file_that_it_does_not_read(tmp_path):
    m, outputs = linear(x=None, out=None, w="int2", opset=25)
    path = m.save(tmp_path / "m.onnx", *outputs)
    with pytest.raises(TargetError, match=r"m\.onnx: OpenVINO cannot run it: Unsupported type"):
        graphq.lint(path, "openvino", run=True)


def test_it_says_what_to_install(tmp_path, monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    m, outputs = conv()
    path = m.save(tmp_path / "m.onnx", *outputs)
    monkeypatch.setattr("importlib.metadata.version", absent)
    with pytest.raises(TargetError, match=r"run: openvino: it is not installed; pip install openvino==2026\.4\.1"):
        graphq.lint(path, "openvino", run=True)


def test_a_name_is_that_in_the_file():
    assert openvino._plain("conv/WithoutBiases") == "conv"
    assert openvino._plain("conv_y_original") == "conv_y"
    assert openvino._plain("conv") == "conv"


@pytest.mark.parametrize(
    ("op", "ran"),
    [
        (("Convolution", "u8", "u8"), "integers"), (("Convolution", "f32", "f32"), "float"), (("FullyConnected", "i8", "i8"), "integers"),
        (("FullyConnected", "i8", "f32"), "weights"), (("FullyConnected", "i4", "bf16"), "weights"), (("FullyConnected", "bf16", "bf16"), "float"),
        (("Subgraph", "u8", "u8"), "float"), (("Eltwise", "u8", "u8"), "float"), (("Select", "u8", "u8"), "float"), (("Pooling", "u8", "u8"), "integers"),
    ],
)  # fmt: skip
def test_how_an_op_ran(op, ran):
    assert openvino._how(openvino.RunOp((), *op)) == ran
