"""``graphq convert``, and what tells it from ``graphq spec convert``."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graphq.cli import app
from tests.quantized_checkpoints import held, written


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("checkpoints") / "w8", "w8a8", num_hidden_layers=1)


def run(*args: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    return result


def test_a_checkpoint_in_another_format(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run("convert", checkpoint, "--target", "ascend", "--out", out)
    assert shown.stderr.splitlines()[-1] == f"{out}: ascend artifact, with the codes of {checkpoint}"
    line = next(line for line in shown.stdout.splitlines() if line.startswith("model.layers.0.mlp.down_proj"))
    assert line.split()[1:3] == ["int8/half/channel", "int8/token/dynamic"]
    assert f"note: 7 weights have the codes of {checkpoint}" in shown.stdout
    assert (out / "quant_model_description.json").is_file()
    again = run("convert", out, "--target", "compressed-tensors", "--out", tmp_path / "back", "--for", "any", "--json")
    assert len(json.loads(again.stdout)["layers"]) >= 7
    assert held(tmp_path / "back").keys() == held(checkpoint).keys()
    assert "exists" in run("convert", checkpoint, "--target", "ascend", "--out", out, status=1).stderr
    run("convert", checkpoint, "--target", "ascend", "--out", out, "--overwrite", "--option", "shard_bytes=20000")
    assert len(list(out.glob("*.safetensors"))) > 1


def test_what_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("graphq: 1\nweight: int8/channel\n")
    shown = run("convert", spec, "--target", "ascend", "--out", tmp_path / "out", status=2).stderr
    assert "a spec is converted by graphq spec convert" in " ".join(shown.replace("│", " ").split())
    shown = run("spec", "convert", checkpoint, "--to", "llmc", status=2).stderr
    assert "is a directory" in " ".join(shown.replace("│", " ").split())
    shown = run("convert", checkpoint, "--target", "torch", "--out", tmp_path / "out", status=1).stderr
    assert shown.startswith("torch: is no checkpoint that codes are carried over to")
    assert not (tmp_path / "out").exists()
