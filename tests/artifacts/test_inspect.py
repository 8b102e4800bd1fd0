"""What an artifact says of itself: the exact text and JSON, of both targets, without its weights, and of damaged ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graphq
from graphq.artifacts.inspect import inspect
from graphq.cli import app
from graphq.errors import TargetError
from tests.models import MLP

SPEC = {"graphq": 1, "rules": [{"match": "up", "weight": "int8/channel", "input": "int8/asym/tensor"}]}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    made = graphq.compile(MLP(), SPEC, inputs=x, calibration=[x])
    made.save(folder / "torch")
    made.emit("onnx", folder / "onnx")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return json.loads((folder / "graphq.json").read_text())["files"]


def shown(*args: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["inspect", *(str(arg) for arg in args)])
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    return result


def test_the_text(artifacts: Path) -> None:
    place = artifacts / "torch"
    files, graph, weights = digests(place), *(place / n for n in ("graph.json", "model.safetensors"))
    sizes = {file.name: file.stat().st_size for file in (graph, weights)}
    lines = [line.rstrip() for line in shown(place).stdout.splitlines()]
    assert lines[:8] == [
        f"artifact   {place}",
        "target     torch",
        f"made with  graphq {_version()}, torch {torch.__version__}",
        "model      a torch module, float32, computed in float32",
        "inputs     x",
        "algorithm  rtn, seed 0",
        "layers     1 of 2 quantized",
        f"bytes      {sum(sizes.values())}",
    ]
    assert lines[8:12] == ["spec", "  graphq: 1", "  rules:", "    - match: up"]
    assert lines[-8:] == [
        "",
        "layer  weight        input             rule           bytes  why float",
        "up     int8/channel  int8/asym/tensor  rules[0] (up)  144",
        "down   float         float                            384    no rule matches it",
        "",
        "file               bytes  sha256",
        f"graph.json         {sizes['graph.json']:<5}  {files['graph.json']}",
        f"model.safetensors  {sizes['model.safetensors']:<5}  {files['model.safetensors']}",
    ]


def _version() -> str:
    return CliRunner().invoke(app, ["--version"]).stdout.splitlines()[0].split()[1]


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_the_json(artifacts: Path, target: str) -> None:
    place = artifacts / target
    found = json.loads(shown(place, "--json").stdout)
    files: dict[str, Any] = {
        name: {"bytes": (place / name).stat().st_size, "sha256": sha} for name, sha in digests(place).items()
    }
    assert {key: value for key, value in found.items() if key not in ("spec", "layers")} == {
        "artifact": str(place),
        "target": target,
        "versions": {"graphq": _version(), "torch": torch.__version__},
        "model": "a torch module",
        "dtype": "float32",
        "computed_in": "float32",
        "inputs": {"x": ["batch", 8]},
        "outputs": ["output"],
        "algorithm": "rtn",
        "seed": 0,
        "bytes": sum(file["bytes"] for file in files.values()),
        "files": files,
    }
    assert [(layer["layer"], layer["weight"], layer["input"]) for layer in found["layers"]] == [
        ("up", "int8/channel", "int8/asym/tensor"),
        ("down", "float", "float"),
    ]
    assert graphq.load_spec(found["spec"]) == graphq.load_spec(SPEC)


def test_no_weights_are_needed(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "graphq.json").write_bytes((artifacts / "torch" / "graphq.json").read_bytes())
    found = inspect(tmp_path)
    assert [(file.name, file.nbytes) for file in found.files] == [("graph.json", None), ("model.safetensors", None)]
    assert found.nbytes == 0
    assert "model.safetensors  missing  " in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("report"), "damaged: KeyError: 'report'"),
        (lambda d: d.update(report=3), "damaged: TypeError"),
        (lambda d: d["report"][0].update(weight=3), "damaged: TypeError"),
        (lambda d: d["report"][0].update(bytes="many"), "damaged: ValueError"),
        (lambda d: d.update(seed=None), "damaged: TypeError"),
        (lambda d: d.pop("files"), "damaged: files: 'files'"),
        (
            lambda d: d["files"].update({"../secret": "0"}),
            "damaged: ValueError: files: ../secret is not in the artifact",
        ),
        (lambda d: d["source"].update(config="{"), "damaged: source: config: '{' is not null or"),
        (lambda d: d["source"].pop("inputs"), "damaged: source: inputs: missing"),
        (lambda d: d.update(graphq=2), "not a graphq artifact of format 1"),
    ],
)
def test_damaged_manifests(artifacts: Path, tmp_path: Path, change: Any, message: str) -> None:
    data = json.loads((artifacts / "torch" / "graphq.json").read_text())
    change(data)
    (tmp_path / "graphq.json").write_text(json.dumps(data))
    with pytest.raises(TargetError) as caught:
        inspect(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'graphq.json'}: {message}")
    assert shown(tmp_path, status=1).stderr == f"{caught.value}\n"


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    assert shown(tmp_path, status=1).stderr == f"{tmp_path}: not a graphq artifact: graphq.json is missing\n"
