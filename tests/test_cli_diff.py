"""``graphq diff``: what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import graphq
from tests.checkpoints import save_checkpoint, text
from tests.test_cli import graphq_

SPEC = "graphq: 1\nweight: int4/g16\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(text(100))
    return file


def test_two_specs_on_a_model(model, words, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC)
    done = graphq_(
        *("diff", "w8a16", spec, "--model", model, "--calibration", words, "--samples", 2, "--sequence-length", 16),
        "--json",
    )
    found = json.loads(done.stdout)
    assert (found["a"], found["b"]) == ("w8a16", str(spec))
    assert len(found["layers"]) == 9
    first = found["layers"][0]
    assert first["a"].startswith("weight int8")
    assert first["b"] == "weight int4/g16"
    assert 10 < first["local"]["sqnr_db"] < 30
    assert found["agreement"]["tokens"] == 32


def test_an_artifact_beside_its_model(model, words, tmp_path):
    graphq.compile(model, {"graphq": 1, "weight": "int4/g16"}).emit("compressed-tensors", tmp_path / "artifact")
    done = graphq_(
        *("diff", model, tmp_path / "artifact", "--calibration", words, "--samples", 2, "--sequence-length", 16)
    )
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["layer", "plan", "local"]
    assert sum(line.startswith("model.layers.0.") for line in lines) == 7
    assert lines[-2].startswith("output logits: ")
    assert lines[-1].startswith("KL divergence ")


def test_inputs_of_a_model_without_text(tmp_path):
    model = save_checkpoint(tmp_path / "model", "resnet")
    save_file({"pixel_values": torch.randn(2, 3, 32, 32)}, tmp_path / "inputs.safetensors")
    done = graphq_("diff", model, "w8a16", "--inputs", tmp_path / "inputs.safetensors")
    assert "classifier" in done.stdout


def test_refused(model, words):
    assert "no --inputs" in graphq_("diff", model, "w8a16", status=2).stderr
    assert "tokenizer reads the text" in graphq_("diff", "w8a16", "w4a16", "--calibration", words, status=2).stderr
    done = graphq_("diff", model, model, "--calibration", words, "--sequence-length", 16, status=1)
    assert "both are models as they are" in done.stderr
