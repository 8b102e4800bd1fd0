"""What an artifact says of itself: the exact text and JSON, of both targets, without its weights, and of damaged ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graphq
from graphq.artifacts.inspect import inspect
from graphq.cli import app
from graphq.errors import TargetError
from graphq.runtime.kernels import using
from tests.models import MLP

PLACED: dict[str, Any] = {"profile": "ort-cpu", "ops": [], "tensors": {}, "fallback": None}
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
        "activations": None,
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
        (lambda d: d.pop("report"), "damaged: report: missing"),
        (lambda d: d.update(report=3), "damaged: report: 3 is not a list of layers"),
        (lambda d: d.update(report=[3]), "damaged: report: layer: 3 holds no entries"),
        (lambda d: d["report"][0].update(weight=3), "damaged: report: weight: 3 is not a plan or null"),
        (lambda d: d["report"][0].update(input={}), "damaged: report: text: missing"),
        (lambda d: d["report"][0].update(reason=None), "damaged: report: reason: None is not text"),
        (lambda d: d["report"][0].update(bytes="many"), "damaged: report: bytes: 'many' is not a size"),
        (lambda d: d["report"][0].update(bytes=-1), "damaged: report: bytes: -1 is not a size"),
        (lambda d: d["report"][0].update(bytes=True), "damaged: report: bytes: True is not a size"),
        (lambda d: d["report"][0].update(bytes=2**63), "damaged: report: bytes: 9223372036854775808 is not a size"),
        (lambda d: d["report"][0].update(bytes=math.inf), "damaged: Infinity is not a finite number"),
        (lambda d: d.update(activations=3), "damaged: activations: profile: 3 holds no entries"),
        (lambda d: d.update(activations=PLACED | {"profile": 3}), "damaged: activations: profile: 3 is not text"),
        (
            lambda d: d.update(activations=PLACED | {"tensors": 3}),
            "damaged: activations: tensors: 3 is not counts by type",
        ),
        (lambda d: d.update(activations=PLACED | {"ops": {}}), "damaged: activations: ops: {} is not a list of ops"),
        (lambda d: d.update(activations=PLACED | {"ops": [3]}), "damaged: activations: op: 3 holds no entries"),
        (
            lambda d: d.update(activations=PLACED | {"ops": [{"op": "a", "kind": "b", "reason": "", "types": 3}]}),
            "damaged: activations: types: 3 is not text or null",
        ),
        (
            lambda d: d.update(activations=PLACED | {"fallback": []}),
            "damaged: activations: fallback: [] is not a fallback or null",
        ),
        (lambda d: d.update(seed=math.nan), "damaged: NaN is not a finite number"),
        (lambda d: d.update(seed=-math.inf), "damaged: -Infinity is not a finite number"),
        (lambda d: d.update(seed=None), "damaged: seed: None is not a seed"),
        (lambda d: d.update(seed=1.5), "damaged: seed: 1.5 is not a seed"),
        (lambda d: d.update(seed=2**64), "damaged: seed: 18446744073709551616 is not a seed"),
        (lambda d: d.update(target=[]), "damaged: target: [] is not text"),
        (lambda d: d.update(version=1), "damaged: version: 1 is not text"),
        (lambda d: d.update(torch=1), "damaged: torch: 1 is not text"),
        (lambda d: d.update(computed_in=1), "damaged: computed_in: 1 is not text or null"),
        (lambda d: d.update(spec={}), "damaged: spec: {} is not text"),
        (lambda d: d.update(algorithm=None), "damaged: algorithm: None is not text"),
        (lambda d: d.pop("files"), "damaged: files: missing"),
        (lambda d: d["files"].update(a=1), "damaged: a: 1 is not a digest"),
        *(
            (
                lambda d, name=name: d["files"].update({name: "0"}),
                f"damaged: files: {shown!s} is not the name of a file in the artifact",
            )
            for name, shown in {
                "../secret": "'../secret'",
                "/etc/passwd": "'/etc/passwd'",
                "a/../../b": "'a/../../b'",
                "": "''",
                ".": "'.'",
                "a\0b": r"'a\x00b'",
                "x" * 5000: "'xxxxxxxxxxxx...xxxxxxxxxxxxx'",
                "é" * 128: "'éééééééééééé...ééééééééééééé'",
            }.items()
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


def test_numbers_too_large_to_be_any(artifacts: Path, tmp_path: Path) -> None:
    text = (artifacts / "torch" / "graphq.json").read_text().replace('"seed": 0', '"seed": -1e999')
    (tmp_path / "graphq.json").write_text(text)
    for command in ("inspect", "verify"):
        result = CliRunner().invoke(app, [command, str(tmp_path)])
        message = f"{tmp_path / 'graphq.json'}: damaged: -1e999 is not a finite number\n"
        assert (result.exit_code, result.stderr) == (1, message)


def test_the_longest_name_of_a_file(artifacts: Path, tmp_path: Path) -> None:
    data = json.loads((artifacts / "torch" / "graphq.json").read_text())
    name = f"folder/{'x' * 255}"
    (tmp_path / "graphq.json").write_text(json.dumps(data | {"files": {name: "0"}}))
    assert [(file.name, file.nbytes) for file in inspect(tmp_path).files] == [(name, None)]


def test_what_is_not_printable_is_escaped(artifacts: Path, tmp_path: Path) -> None:
    """A terminal obeys nothing that a manifest says, no name makes a line, and lone surrogates are shown."""
    data = json.loads((artifacts / "torch" / "graphq.json").read_text())
    said = "\x1b]0;owned\x07\x9b2J\ud800\u202eé\n\r"
    escaped = r"\x1b]0;owned\x07\x9b2J\ud800\u202eé\n\r"
    data |= {"algorithm": said, "version": said, "spec": said, "files": {said: said}}
    data["report"][0] |= {"layer": said, "rule": said, "reason": said}
    (tmp_path / "graphq.json").write_text(json.dumps(data))
    text = shown(tmp_path).stdout
    assert all(c.isprintable() for c in text.replace("\n", ""))
    assert text.count(escaped) == 7
    assert text.count("\n") == 8 + (1 + 2) + 1 + 3 + 1 + 2  # facts, spec (whose line breaks are its own), layers, files
    assert str(inspect(tmp_path)) + "\n" == text
    as_json = json.loads(shown(tmp_path, "--json").stdout)
    assert (as_json["algorithm"], list(as_json["files"])) == (said, [said])


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    assert shown(tmp_path, status=1).stderr == f"{tmp_path}: not a graphq artifact: graphq.json is missing\n"


def test_what_computes_each_layer_here(artifacts: Path) -> None:
    place = artifacts / "torch"
    plain = shown(place).stdout
    with using("torch"):
        text, data = shown(place, "--kernels").stdout, json.loads(shown(place, "--kernels", "--json").stdout)
    wanted = dict(graphq.load(place).kernels)
    assert set(wanted) == {"up"}
    assert text.startswith(plain)
    lines = text[len(plain) :].splitlines()
    assert lines[:2] == ["", "layer  computed here by"]
    assert lines[2] == f"up     {data['kernels']['up']}"
    assert "kernels" not in json.loads(shown(place, "--json").stdout)
    assert "graphq.load reads torch artifacts" in shown(artifacts / "onnx", "--kernels", status=1).stderr
