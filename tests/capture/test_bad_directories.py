"""Model directories that are incomplete, damaged or of another kind, each with its exact message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import graphq
from graphq import GraphError
from graphq.cli import app
from tests.checkpoints import save_checkpoint

INT8 = {"graphq": 1, "weight": "int8/channel"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


def config(**keys: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | keys))

    return change


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def cut(count: int) -> Callable[[Path], object]:
    def truncate(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:count])

    return truncate


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


DOWN = "model.layers.0.mlp.down_proj.weight"
FILE, INDEX = "{}/model.safetensors", "{}/model.safetensors.index.json"
DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: shutil.rmtree(folder), "{}: no such model directory"),
    "no config": (rename("config.json", "x"), "{}: not a Hugging Face model directory: config.json is missing"),
    "bad config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "{0}/config.json: It looks like the config file at '{0}/config.json' is not a valid JSON file.",
    ),
    "quantized": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "{}/config.json: quantization_config: quant_method: gptq: is not read; checkpoints of compressed-tensors, ",
    ),
    "unknown class": (
        config(architectures=["NoSuchModel"]),
        "{}/config.json: architectures ['NoSuchModel'] names no class of transformers ",
    ),
    "unknown type": (
        config(model_type="nosuch"),
        "{}/config.json: The checkpoint you are trying to load has model type `nosuch`",
    ),
    "no weights": (
        rename("model.safetensors", "x"),
        "{}: no weights: expected model.safetensors or model.safetensors.index.json",
    ),
    "pickled": (
        rename("model.safetensors", "pytorch_model.bin"),
        "{}: pytorch_model.bin: pickled weights can run code and are not read; save safetensors",
    ),
    "truncated": (cut(-1), FILE + ": damaged or incomplete: Error while deserializing header: incomplete metadata"),
    "header": (cut(5), FILE + ": damaged or incomplete: Error while deserializing header: header too small"),
    "empty": (cut(0), FILE + ": damaged or incomplete: Error while deserializing header: header too small"),
    "lacking": (
        weights(lambda tensors: tensors.pop(DOWN)),
        f"{{}}: the weights do not fit LlamaForCausalLM: 1 missing ({DOWN})",
    ),
    "another shape": (
        weights(lambda tensors: tensors.update({DOWN: tensors[DOWN][:, :5].contiguous()})),
        f"{{}}: the weights do not fit LlamaForCausalLM: 1 of another shape ({DOWN})",
    ),
    "index": (index("[]"), INDEX + ": not an index of weight files: "),
    "index names": (
        index('{"weight_map": {"a": "m-1.safetensors"}}'),
        "{}/m-1.safetensors: missing, but model.safetensors.index.json names it",
    ),
    "index leads out": (
        index('{"weight_map": {"a": "../llama/model.safetensors"}}'),
        INDEX + ": model.safetensors lies outside of the model directory",
    ),
}


def test_tensors_that_the_model_has_no_place_for_are_named(whole, tmp_path):
    assert graphq.compile(whole, INT8).report.notes == ()
    more = Path(shutil.copytree(whole, tmp_path / "more"))
    weights(lambda tensors: tensors.update({"model.adapter.weight": tensors[DOWN].clone()}))(more)
    note = "1 tensor of the checkpoint that LlamaForCausalLM does not use: model.adapter.weight"
    assert graphq.compile(more, INT8).report.notes == (note,)
    deep = save_checkpoint(tmp_path / "deep", num_hidden_layers=2)
    config(num_hidden_layers=1)(deep)
    (note,) = graphq.compile(deep, INT8).report.notes
    assert note == (
        "9 tensors of the checkpoint that LlamaForCausalLM does not use: model.layers.1.input_layernorm.weight,"
        " model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight, ..."
    )


@pytest.mark.parametrize("case", DIRECTORIES)
def test_model_directories(whole, tmp_path, case):
    damage, problem = DIRECTORIES[case]
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    damage(folder)
    with pytest.raises(GraphError) as caught:
        graphq.compile(folder, INT8)
    assert str(caught.value).startswith(problem.format(folder))
    assert "\n" not in str(caught.value)
    if case in ("nothing", "truncated"):
        (tmp_path / "spec.yaml").write_text("graphq: 1\nweight: int8/channel\n")
        args = [folder, "--spec", tmp_path / "spec.yaml", "--target", "torch", "--out", tmp_path / "out"]
        result = CliRunner().invoke(app, ["compile", *map(str, args)])
        assert (result.exit_code, result.stderr) == (1, f"{caught.value}\n")
