"""msModelSlim's checkpoints: weights are what an independent reader of the format makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from graphq.errors import GraphqError
from graphq.lowering.checkpoints.sources.read import read_quantized
from tests.lowering.checkpoints.ascend import reader
from tests.quantized_checkpoints import changed, written

IDS = torch.tensor([[3, 17, 64, 2, 90, 11, 5], [8, 8, 101, 0, 45, 6, 127]])
TAGS = """
graphq: 1
rules:
- {match: "*.0.*.q_proj", weight: int8/channel, input: int8/token/dynamic}
- {match: "*.0.*.k_proj", weight: int8/asym/joint/g32}
- {match: "*.0.*.v_proj", weight: int4/channel}
- {match: "*.0.*.o_proj", weight: int4/asym/joint/channel}
- {match: "*.0.*.gate_proj", weight: int4/channel, input: int8/token/dynamic}
- {match: "*.0.*.up_proj", weight: float8_e4m3fn/channel, input: float8_e4m3fn/token/dynamic}
- {match: "*.0.*.down_proj", weight: int8/channel, input: int8/tensor}
- {match: "*.1.*.q_proj", weight: int8/channel, input: int8/asym/joint/tensor}
- {match: "*.1.*.k_proj", weight: int8/g32}
- {match: "*.1.*.v_proj", weight: int4/channel, input: int4/token/dynamic}
"""
MX = """
graphq: 1
rules:
- {match: "*.o_proj", weight: mxfp8_e4m3, input: mxfp8_e4m3/dynamic}
- {match: "*.up_proj", weight: mxfp4, input: mxfp4/dynamic}
- {match: "*.gate_proj", weight: mxfp4, input: mxfp8_e4m3/dynamic}
- {match: "*.down_proj", weight: mxfp4}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("checkpoints") / "mix", TAGS, "ascend", calibration=[(IDS,)])


def judged(checkpoint: Path) -> None:
    made, found = reader.read(checkpoint), read_quantized(checkpoint)
    assert sorted(made.layers()) == sorted(found.weights)
    for layer, weight in found.weights.items():
        assert torch.equal(weight.numbers(), reader.dequantized(made, layer).to(torch.bfloat16)), layer
        assert weight.format == made.description[f"{layer}.weight"]


def test_every_tag_is_dequantized_as_an_independent_reader_does(checkpoint: Path) -> None:
    judged(checkpoint)
    assert {weight.format for weight in read_quantized(checkpoint).weights.values()} == {
        *("W8A8_DYNAMIC", "W8A16", "W4A16", "W4A8_DYNAMIC", "WFP8AFP8_DYNAMIC", "W8A8", "W4A4_DYNAMIC"),
    }


def test_blocks_with_an_exponent(tmp_path: Path) -> None:
    judged(written(tmp_path / "mx", MX, "ascend", num_hidden_layers=1))


def test_zero_points_that_no_tag_says(checkpoint: Path) -> None:
    found = read_quantized(checkpoint).weights
    grids = {
        layer.removeprefix("model.layers."): str(weight.grid()).removesuffix("/source")
        for layer, weight in found.items()
    }
    assert (grids["0.self_attn.k_proj"], grids["0.self_attn.v_proj"]) == ("int8/asym/joint/g32", "int4/channel")
    assert (grids["0.self_attn.o_proj"], grids["1.self_attn.k_proj"]) == ("int4/asym/joint/channel", "int8/g32")


def test_scales_that_only_their_products_with_the_inputs_are_stored_of(checkpoint: Path, tmp_path: Path) -> None:
    """MsModelSlim stores no scales of W8A8's weights: those that are numbers of bfloat16 are found again, exactly."""
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    layers = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    gone = [f"{layer}.{suffix}" for layer in layers for suffix in ("weight_scale", "weight_offset")]
    wanted = {layer: read_quantized(checkpoint).weights[layer].read() for layer in layers}
    changed(copied, lambda tensors: [tensors.pop(name) for name in gone])
    describe(copied, lambda tags: [tags.pop(name) for name in gone])
    for layer, made in wanted.items():
        found = read_quantized(copied).weights[layer].read()
        assert torch.equal(found.scales.scale, made.scales.scale)
        assert torch.equal(found.codes, made.codes)


def describe(path: Path, change: Any) -> None:
    file = path / "quant_model_description.json"
    tags = json.loads(file.read_text())
    change(tags)
    file.write_text(json.dumps(tags))


Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
WEIGHTS = "/quant_model_weights-00001-of-00001.safetensors: "


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}.weight_scale", torch.ones(64, 3), f"{WEIGHTS}{Q}.weight_scale: F32[64, 3], where F32[64, 2] belongs"),
        (f"{K}.weight_offset", torch.ones(32, 1), f"{WEIGHTS}{K}.weight_offset: F32[32, 1], where F32[32, 2] belongs"),
        (f"{Q}.weight", torch.ones(64, 64), f"{WEIGHTS}{Q}.weight: F32[64, 64], where I8[64, 64] belongs"),
        (f"{Q}.weight", torch.ones(64, dtype=torch.int8), f"{WEIGHTS}{Q}.weight: [64]: is no matrix"),
    ],
)
def test_a_tensor_of_another_dtype_or_shape_is_named(
    checkpoint: Path, tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    changed(copied, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(GraphqError) as caught:
        read_quantized(copied)
    assert str(caught.value) == f"{copied}{message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tags: tags.update(version="2.0.0"), "version: '2.0.0': is not known; 1.0.0 is read, and none"),
        (lambda tags: tags.update({"a.weight": "W8A16"}), "a.weight: is in no file of weights"),
        (lambda tags: tags.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale: has no tag"),
        (
            lambda tags: tags.update({f"{Q}.weight_scale": "W8A16"}),
            f"{Q}.weight_scale: W8A16, but its weight is W8A8_DYNAMIC",
        ),
        (
            lambda tags: tags.update({"model.norm.weight": "W8A16"}),
            ": model.norm: W8A16: has no weight_scale",
        ),
    ],
)
def test_a_description_of_other_tensors_is_named(checkpoint: Path, tmp_path: Path, change: Any, message: str) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    describe(copied, change)
    with pytest.raises(GraphqError) as caught:
        read_quantized(copied)
    assert message in str(caught.value)
    assert str(copied) in str(caught.value)
