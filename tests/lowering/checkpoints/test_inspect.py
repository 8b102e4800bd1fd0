"""Checkpoints that graphq did not write, seen without their weights; what is wrong with them is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import graphq
from graphq.cli import app
from graphq.errors import TargetError
from graphq.lowering.checkpoints.inspect import inspect_checkpoint
from tests.models import tiny_config

SPEC = "graphq: 1\nweight: int4/g16\nrules:\n  - {match: down_proj, weight: int8/channel, input: int8/token/dynamic}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without graphq's manifest."""
    root = tmp_path_factory.mktemp("checkpoint")
    model, config = tiny_config("llama")
    torch.manual_seed(0)
    model(config).to(torch.bfloat16).save_pretrained(root / "source")
    made = graphq.compile(root / "source", SPEC, target="compressed-tensors")
    made.emit("compressed-tensors", root / "out", consumer="any")
    (root / "out" / "graphq.json").unlink()
    return root / "out"


def test_what_a_checkpoint_holds(written: Path) -> None:
    found = inspect_checkpoint(written)
    assert (found.format, found.model) == ("compressed-tensors 0.20.0, mixed-precision", "LlamaForCausalLM, bfloat16")
    layers = {layer.name: layer for layer in found.layers}
    assert len(layers) == 14
    down, q = layers["model.layers.0.mlp.down_proj"], layers["model.layers.0.self_attn.q_proj"]
    assert (down.weight, down.input, down.format) == ("int8/half/channel", "int8/half/token/dynamic", "int-quantized")
    assert (q.weight, q.input, q.format) == ("int4/half/g16", "float", "pack-quantized")
    held = load_file(written / "model.safetensors")
    own = [t for name, t in held.items() if name.startswith("model.layers.0.self_attn.q_proj.")]
    assert q.nbytes == sum(t.numel() * t.itemsize for t in own)
    everything = sum(t.numel() * t.itemsize for t in held.values())
    assert sum(layer.nbytes for layer in found.layers) + found.others[1] == everything
    assert found.files == {"model.safetensors": everything}


def test_through_the_command_line(written: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(written)])
    assert shown.exit_code == 0
    line = next(line for line in shown.stdout.splitlines() if line.startswith("model.layers.1.mlp.down_proj"))
    assert line.split()[1:4] == ["int8/half/channel", "int8/half/token/dynamic", "int-quantized"]
    found = json.loads(CliRunner().invoke(app, ["inspect", str(written), "--json"]).stdout)
    assert len(found["layers"]) == 14


def without(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        held = load_file(path / "model.safetensors")
        del held[f"model.layers.0.self_attn.q_proj.{name}"]
        save_file(held, path / "model.safetensors")

    return change


def setting(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        change(config["quantization_config"])
        (path / "config.json").write_text(json.dumps(config))

    return changed


def truncated(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


Q, FIRST = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"  # as they stand in the file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("weight_shape"), f": {Q}: pack-quantized: has no weight_shape"),
        (without("weight_scale"), f": {Q}: pack-quantized: has no weight_scale"),
        (without("weight_packed"), f": {Q}: pack-quantized: has no weight_packed"),
        (truncated, "/model.safetensors: damaged or incomplete: "),
        (
            setting(lambda found: found["config_groups"].pop("group_0")),
            f": {FIRST}: has quantized tensors, and no group of config.json is for it",
        ),
        (
            setting(lambda found: found["config_groups"]["group_0"].update(format="zip")),
            f": {FIRST}: zip: is no format that is read",
        ),
        (
            setting(lambda found: found.update(quant_method="gptq")),
            "/config.json: quantization_config: quant_method: gptq: is not read; ",
        ),
        (lambda path: (path / "model.safetensors").unlink(), "/model.safetensors: no such file"),
    ],
)
def test_what_is_damaged_is_named(written: Path, tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((written / file).read_bytes())
    change(tmp_path)
    with pytest.raises(TargetError) as caught:
        inspect_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}{message}")


# -- msModelSlim's


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Ascend checkpoint without graphq's manifest, and with a configuration of no quantization."""
    root = tmp_path_factory.mktemp("described")
    model, config = tiny_config("llama")
    torch.manual_seed(0)
    model(config).to(torch.bfloat16).save_pretrained(root / "source")
    rules = [{"match": "down_proj", "weight": "int8/channel"}]
    spec = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic", "rules": rules}
    graphq.compile(root / "source", spec, target="ascend").emit("ascend", root / "out")
    (root / "out" / "graphq.json").unlink()
    return root / "out"


def test_what_a_checkpoint_of_msmodelslim_holds(described: Path) -> None:
    found = inspect_checkpoint(described)
    assert (found.format, found.model) == ("msModelSlim 1.0.0, W8A8_DYNAMIC", "LlamaForCausalLM, bfloat16")
    layers = {layer.name: layer for layer in found.layers}
    assert len(layers) == 14
    down, q = layers["model.layers.0.mlp.down_proj"], layers["model.layers.0.self_attn.q_proj"]
    assert (down.weight, down.input, down.format) == ("int8/channel", "float", "W8A16")
    assert (q.weight, q.input, q.format) == ("int8/channel", "int8/token/dynamic", "W8A8_DYNAMIC")
    (file,) = found.files
    held = load_file(described / file)
    everything = sum(t.numel() * t.itemsize for t in held.values())
    assert sum(layer.nbytes for layer in found.layers) + found.others[1] == found.files[file] == everything
    shown = CliRunner().invoke(app, ["inspect", str(described)])
    assert shown.exit_code == 0
    assert "W8A16" in shown.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tags: tags.pop("lm_head.weight"), "lm_head.weight: has no tag"),
        (lambda tags: tags.update({"a.weight": "FLOAT"}), "a.weight: is in no file of weights"),
    ],
)
def test_a_description_of_other_tensors(described: Path, tmp_path: Path, change: Any, message: str) -> None:
    copied = Path(shutil.copytree(described, tmp_path / "copied"))
    file = copied / "quant_model_description.json"
    tags = json.loads(file.read_text())
    change(tags)
    file.write_text(json.dumps(tags))
    with pytest.raises(TargetError) as caught:
        inspect_checkpoint(copied)
    assert str(caught.value) == f"{file}: {message}"
