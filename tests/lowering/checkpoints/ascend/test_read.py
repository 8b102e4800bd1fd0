"""What is read of checkpoints that graphq did not write, or that were damaged since: a ``TargetError``, and at once."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from graphq.errors import TargetError
from graphq.lowering.checkpoints.ascend.read import read_checkpoint, read_description, tensors

LAYER = {
    "a.q.weight": torch.ones(4, 8, dtype=torch.int8),
    "a.q.weight_scale": torch.ones(4, 1),
    "a.q.weight_offset": torch.zeros(4, 1),
    "a.q.bias": torch.ones(4),
    "norm.weight": torch.ones(8, dtype=torch.bfloat16),
}
TAGS = {name: "W8A8_DYNAMIC" if name.startswith("a.q.weight") else "FLOAT" for name in LAYER}
KEYS = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "metadata": {}, "group_size": 0, "optional": {}}


def checkpoint(
    directory: Path,
    changed: dict[str, Tensor] | None = None,
    described: dict[str, Any] | None = None,
    file: str = "quant_model_weights.safetensors",
) -> Path:
    """A linear by token, and a norm; ``None`` in ``described`` takes a key out."""
    save_file(LAYER | (changed or {}), directory / file)
    text = {k: v for k, v in (TAGS | KEYS | (described or {})).items() if v is not None}
    (directory / "quant_model_description.json").write_text(json.dumps(text))
    return directory


@pytest.mark.parametrize("file", ["quant_model_weights.safetensors", "quant_model_weight_w8a8.safetensors"])
def test_a_checkpoint_of_one_file(tmp_path: Path, file: str) -> None:
    found = read_checkpoint(checkpoint(tmp_path, file=file))
    assert found.description.keys == KEYS
    assert found.description.tags == TAGS
    (layer,) = found.layers.values()
    assert (layer.name, layer.tag, set(layer.parts)) == (
        "a.q",
        "W8A8_DYNAMIC",
        {"weight", "weight_scale", "weight_offset"},
    )
    assert found.others.keys() == {"a.q.bias", "norm.weight"}
    assert tensors(tmp_path).keys() == LAYER.keys() - {"a.q.weight_offset"}


def test_several_files_with_an_index(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    (tmp_path / "quant_model_weights.safetensors").unlink()
    where: dict[str, str] = {}
    for number, name in enumerate(LAYER, 1):
        file = f"quant_model_weights-{number:05}-of-{len(LAYER):05}.safetensors"
        save_file({name: LAYER[name]}, tmp_path / file)
        where[name] = file
    index = tmp_path / "quant_model_weights.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert tensors(tmp_path).keys() == LAYER.keys() - {"a.q.weight_offset"}
    index.write_text(json.dumps({"weight_map": where | {"norm.weight": "../other.safetensors"}}))
    with pytest.raises(TargetError, match=r"'\.\./other\.safetensors' is not the name of a file in the directory"):
        tensors(tmp_path)
    (tmp_path / where["norm.weight"]).unlink()
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(TargetError, match=r"quant_model_weights-00005-of-00005\.safetensors: no such file"):
        tensors(tmp_path)


@pytest.mark.parametrize(
    ("changed", "described", "message"),
    [
        (
            {},
            {"norm.weight": None},
            r"description\.json: norm\.weight: has no tag, and the weights have such a tensor$",
        ),
        ({}, {"b.weight": "FLOAT"}, r"b\.weight: described, and not in the weights$"),
        ({}, {"a.q.input_scale": "W8A8"}, r"a\.q\.input_scale: described, and not in the weights$"),
        ({}, {"norm.weight": 3}, r"norm\.weight: 3 is not a tag such as W8A8$"),
        ({}, {"a.q.weight": "FLOAT"}, r"a\.q\.weight_offset: W8A8_DYNAMIC, of no quantized layer$"),
        ({}, {"a.q.weight_offset": "W8A8"}, r"a\.q\.weight_offset: W8A8, but its weight is W8A8_DYNAMIC$"),
        ({}, {"a.q.weight": "W9A9"}, r"a\.q\.weight_offset: W8A8_DYNAMIC, of no quantized layer$"),
        (
            {},
            {name: "W8A8" for name in TAGS if name.startswith("a.q.weight")},
            r"a\.q: W8A8: has no input_scale$",
        ),
        (
            {"a.q.weight_scale": torch.ones(4, 1, dtype=torch.int32)},
            {},
            r"a\.q: W8A8_DYNAMIC: damaged: weight_scale: int32\[4, 1\], where float32\[4, 1\] belongs$",
        ),
    ],
)
def test_weights_and_description_that_disagree(
    tmp_path: Path, changed: dict[str, Tensor], described: dict[str, Any], message: str
) -> None:
    with pytest.raises(TargetError, match=message):
        tensors(checkpoint(tmp_path, changed, described))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged: Expecting value"),
        ("[]", "damaged: is no object of tags by name"),
        ("[" * 200_000, "damaged: "),
        ('{"a.weight": "FLOAT", "a.weight": "W8A8"}', r"damaged: a\.weight stands twice"),
        ('{"a.weight": {"b": 1}}', r"damaged: a\.weight: \{'b': 1\} is not a tag such as W8A8"),
    ],
)
def test_a_damaged_description(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "quant_model_description.json").write_text(text)
    with pytest.raises(TargetError, match=rf"quant_model_description\.json: {message}"):
        read_description(tmp_path)


def test_a_description_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "quant_model_description.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(TargetError, match=r"quant_model_description\.json: damaged: "):
        read_description(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    file = checkpoint(tmp_path) / "quant_model_description.json"
    file.unlink()
    with pytest.raises(TargetError, match=r"description\.json: no such file$"):
        tensors(tmp_path)
    os.mkfifo(file)
    with pytest.raises(TargetError, match=r"description\.json: no such file$"):
        tensors(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 8, 60])
def test_truncated_weights(tmp_path: Path, size: int) -> None:
    file = checkpoint(tmp_path) / "quant_model_weights.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(TargetError, match=r"quant_model_weights\.safetensors: damaged or incomplete: "):
        tensors(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (checkpoint(tmp_path) / "quant_model_weights.safetensors").unlink()
    with pytest.raises(TargetError, match=r"quant_model_weights\.safetensors: no such file"):
        tensors(tmp_path)
