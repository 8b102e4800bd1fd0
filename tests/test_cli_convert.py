"""``graphq spec convert`` for a model's layers, and by the other tool's conventions."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graphq.cli import app
from graphq.frontends import load_spec
from graphq.spec.plan import Plan
from tests.checkpoints import save_checkpoint

BY_NAME = "note: the layers are named as this model has them: the text is for this model alone"
NAMES = "with --model MODEL_DIR, layers can be said by their names"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


def convert(*args: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["spec", "convert", *(str(arg) for arg in args)])
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    return result


def test_a_preset_as_a_recipe(model, tmp_path):
    shown = convert("w8a8", "--to", "llm-compressor", "--model", model, "--adapt")
    assert shown.stderr.splitlines() == [
        BY_NAME,
        "note: int8/channel -> int8/half/channel: llm-compressor divides the extreme by (2^bits - 1) / 2",
        "note: int8/half/channel -> int8/half/channel/source: llm-compressor computes weights in the model's dtype",
        "note: int8/token/dynamic -> int8/half/token/dynamic: llm-compressor divides the extreme by (2^bits - 1) / 2",
    ]
    assert r"- re:model\.layers\.[0-9]+\.mlp\.down_proj$" in shown.stdout
    out = tmp_path / "recipe.yaml"
    assert convert("w8a8", "--to", "llm-compressor", "--model", model, "--adapt", "--out", out).stdout == ""
    assert out.read_text() == shown.stdout
    assert {str(rule.decision) for rule in load_spec(out).rules if isinstance(rule.decision, Plan)} == {
        "weight int8/half/channel/source, input int8/half/token/dynamic"
    }


def test_layers_alone_and_conventions_alone(model, tmp_path):
    rules = [{"match": "blocks", "weight": "int8/channel/source"}]
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"graphq": 1, "rules": rules}))
    slim = convert(spec, "--to", "modelslim", "--model", model)
    assert slim.stderr.splitlines() == [BY_NAME]
    assert "- model.layers.*.mlp.down_proj" in slim.stdout
    llmc = convert("w4a16+gptq", "--to", "llmc", "--adapt")
    assert llmc.stderr == "note: gptq: scales search -> plan: LLMC's GPTQ takes the range's scales, and searches none\n"
    assert "method: GPTQ" in llmc.stdout


def test_what_would_help_is_said(model):
    own = "with --adapt, in llm-compressor's own conventions"
    assert convert("w8a8", "--to", "llm-compressor", status=1).stderr.splitlines()[-1] == f"{NAMES}; {own}"
    refused = convert("w8a8", "--to", "llm-compressor", "--model", model, status=1)
    assert refused.stderr.splitlines()[-1] == own
    assert convert("w8a8", "--to", "llm-compressor", "--adapt", status=1).stderr.splitlines()[-1] == NAMES
    hopeless = convert("w4a8", "--to", "modelslim", "--adapt", "--model", model, status=1)
    assert hopeless.stderr == (
        "weight int4/g128, input int8/token/dynamic: msModelSlim has no such pair; its int4 groups under int8"
        " activations are over_int8\n"
    )


def test_a_model_that_is_none(tmp_path):
    refused = convert("w8a8", "--to", "modelslim", "--model", tmp_path / "none", status=1)
    assert str(tmp_path / "none") in refused.stderr
    assert "Traceback" not in refused.stderr
