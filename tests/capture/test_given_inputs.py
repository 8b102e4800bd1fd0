"""Directories of models whose inputs do not follow from their configuration: from examples, with weights and without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import graphq
from graphq.capture.given_inputs import capture_directory_on
from graphq.capture.source import source_of
from graphq.cli import app
from graphq.errors import GraphError
from graphq.ir.text import dump
from tests.models import tiny

T5: dict[str, Any] = {
    **dict.fromkeys(("d_model", "d_ff"), 32),
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 1,
    "vocab_size": 64,
    "decoder_start_token_id": 0,
}


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(seed))


INPUTS = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64), "decoder_input_ids": ids(2, 3)}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A T5 of one layer, and the directory that it is saved in."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**T5)).eval()
    path = tmp_path_factory.mktemp("t5")
    model.save_pretrained(path)
    return model, path


def test_an_encoder_decoder_from_its_directory(t5, tmp_path):
    """Its inputs are honoured, its logits are the model's, and its files and configuration go with the artifact."""
    model, path = t5
    compiled = graphq.compile(path, "w8a16", inputs=INPUTS)
    with torch.no_grad():
        wanted = model(**INPUTS).logits
    outputs: Any = compiled(**INPUTS)
    found = outputs["logits"]
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    source = source_of(compiled.graph)
    assert source.names == ("input_ids", "attention_mask", "decoder_input_ids")
    assert source.files == str(path)
    assert json.loads(source.config or "")["architectures"] == ["T5ForConditionalGeneration"]
    assert "T5ForConditionalGeneration: its key/value cache is left out" in compiled.report.notes
    assert sum(row.weight is not None for row in compiled.report.layers) == 16
    compiled.save(tmp_path / "t5")
    again = graphq.load(tmp_path / "t5")
    assert torch.equal(again(**INPUTS)["logits"], found)
    with pytest.raises(GraphError, match=r"is an encoder-decoder: pass example inputs of its forward \(inputs="):
        graphq.compile(path, "w8a16")


def test_the_graph_without_weights_is_the_same(t5):
    _, path = t5
    whole = capture_directory_on(path, INPUTS)
    bare = capture_directory_on(path, INPUTS, weights=False)
    assert dump(bare) == dump(whole)
    assert source_of(bare).config == source_of(whole).config
    report = graphq.explain(path, "w8a16", inputs=INPUTS)
    assert sum(row.weight is not None for row in report.layers) == 16


def test_inputs_beside_a_directory_that_would_not_need_them(tmp_path):
    """They are taken, in the dtype that the directory records, and the mask and the sizes that are given hold."""
    tiny("bert").save_pretrained(tmp_path)
    inputs = {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    gm = graphq.compiler.capture(tmp_path, inputs, mask="attention_mask", shapes={"batch": 2})
    source = source_of(gm)
    assert (source.names, source.mask, source.fixed) == (tuple(inputs), "attention_mask", {"batch": 2})


def test_the_command_line_reads_them_from_a_file(t5, tmp_path):
    _, path = t5
    file = tmp_path / "inputs.safetensors"
    save_file(INPUTS, file)
    given = ["--spec", "w8a16", "--inputs", str(file)]
    done = CliRunner().invoke(app, ["compile", str(path), *given, "--target", "torch", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "16 of " in done.output
    done = CliRunner().invoke(app, ["explain", str(path), *given])
    assert (done.exit_code, "decoder.block.0.layer.0.SelfAttention.q" in done.output) == (0, True)
    for name, what in (("missing.safetensors", "No such file"), ("config.json", "no safetensors file")):
        wrong = ["explain", str(path), "--spec", "w8a16", "--inputs", str(path / name)]
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2
        assert what in " ".join(done.output.replace("│", " ").split())


CODE = """
import torch
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, width=8, **kwargs):
        self.width = width
        super().__init__(**kwargs)

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(config.width, config.width)
        self.post_init()
    def forward(self, x):
        return self.first(x)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that brings its model's code along."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "own"
    path.mkdir()
    (path / "modeling_own.py").write_text(CODE)
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names, "width": 8}
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file({"first.weight": torch.randn(8, 8), "first.bias": torch.randn(8)}, path / "model.safetensors")
    return path


def test_code_of_a_directory_runs_only_where_that_is_asked_for(own, tmp_path):
    x = torch.randn(2, 8)
    with pytest.raises(GraphError) as caught:
        graphq.compile(own, "w8a16", inputs=x)
    assert str(caught.value) == (
        f"{own / 'config.json'}: auto_map names code that the directory brings along, which is run only with"
        " trust_remote_code=True (--trust-remote-code)"
    )
    compiled = graphq.compile(own, "w8a16", inputs=x, trust_remote_code=True)
    assert [row.layer.fqn for row in compiled.report.layers if row.weight is not None] == ["first"]
    file = tmp_path / "x.safetensors"
    save_file({"x": x}, file)
    command = ["explain", str(own), "--spec", "w8a16", "--inputs", str(file)]
    assert CliRunner().invoke(app, command).exit_code == 1
    assert CliRunner().invoke(app, [*command, "--trust-remote-code"]).exit_code == 0


def test_a_class_of_its_own_beside_a_known_configuration_is_named(own):
    """Transformers has the configuration and not the class."""
    config = {"model_type": "bert", "architectures": ["OwnModel"], "auto_map": {"AutoModel": "modeling_own.OwnModel"}}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraphError, match=r"names no class of transformers .*; auto_map names code"):
        graphq.compile(own, "w8a16", inputs=torch.randn(2, 8))
