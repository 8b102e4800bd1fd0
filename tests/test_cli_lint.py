"""``graphq lint``: what is printed where, and exit statuses."""

import json

import pytest
from typer.testing import CliRunner

from graphq.cli import app
from tests.linter.cases import conv, linear


@pytest.fixture
def model(tmp_path):
    """A directory with a convolution whose output is in float, and a model all in integers beside it."""
    m, outputs = conv(out=None)
    m.save(tmp_path / "model.onnx", *outputs)
    m, outputs = linear(out=None)
    m.save(tmp_path / "good.onnx", *outputs)
    return tmp_path


def run(*args, status=0):
    result = CliRunner().invoke(app, ["lint", *map(str, args)])
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    return result


def test_findings_are_exit_status_1(model):
    found = run(model, "--profile", "ort-cpu", status=1)
    assert found.stdout.splitlines() == [
        "conv (Conv): conv_y: it is not quantized; quantize it to uint8, for all that reads it",
        "0 of 1 ops run in integers on ort-cpu",
    ]
    assert found.stderr == ""


def test_no_findings_are_exit_status_0(model):
    found = run(model / "good.onnx", "--profile", "ort-cpu", "--run")
    *_, predicted, observed = found.stdout.splitlines()
    assert predicted == "1 of 1 ops run in integers on ort-cpu"
    assert observed.startswith("1 of 1 ops ran in integers in ONNX Runtime ")


def test_json(model):
    found = json.loads(run(model, "--profile", "openvino", "--json").stdout)
    assert found["ok"] is True
    assert [op["runs"] for op in found["ops"]] == ["integers"]


def test_wrong_usage_is_exit_status_2(model):
    assert "--profile" in run(model, status=2).stderr


@pytest.mark.parametrize(
    ("path", "profile", "said"),
    [
        ("model.onnx", "hailo", "profile: hailo: no such profile"),
        ("absent.onnx", "ort-cpu", "absent.onnx: no such file"),
    ],
)
def test_errors_are_exit_status_1(model, path, profile, said):
    found = run(model / path, "--profile", profile, status=1)
    assert said in found.stderr
    assert found.stdout == ""


def test_names_cannot_drive_a_terminal(model):
    m, outputs = conv(out=None)
    m.nodes[-1].name = "conv\x1b[2J"
    m.save(model / "odd.onnx", *outputs)
    assert "\x1b" not in run(model / "odd.onnx", "--profile", "ort-cpu", status=1).stdout
