"""fp8 in blocks, as DeepSeek-V3 and MiniMax-M2 are stored: the numbers that transformers dequantizes to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphq.errors import GraphqError
from graphq.lowering.checkpoints.sources.read import read_quantized
from tests.quantized_checkpoints import changed, float8, held, source, with_config

DOWN = "model.layers.0.mlp.down_proj"


def test_the_numbers_are_those_of_transformers(tmp_path: Path) -> None:
    wanted = float8(tmp_path)
    found = read_quantized(tmp_path)
    assert {f"{layer}.weight" for layer in found.weights} == wanted.keys()
    assert len(wanted) == 14
    for layer, weight in found.weights.items():
        assert torch.equal(weight.numbers(), wanted[f"{layer}.weight"])
        assert (str(weight.quant), str(weight.input)) == ("float8_e4m3fn/32x16", "float8_e4m3fn/g16/dynamic")
    assert found.format == "fp8, blocks of 32x16"
    assert found.weights[DOWN].nbytes == 64 * 96 + 4 * 2 * 6


def test_blocks_at_the_edges_are_cut_off(tmp_path: Path) -> None:
    """As DeepSeek's own kernel has them: 96 rows in blocks of 64."""
    source(tmp_path, num_hidden_layers=1)
    layer = "model.layers.0.mlp.up_proj"
    codes = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0, 1.0], [0.5, 4.0]])
    changed(tmp_path, lambda t: t.update({f"{layer}.weight": codes, f"{layer}.weight_scale_inv": scale}))
    with_config(tmp_path, {"quant_method": "fp8", "weight_block_size": [64, 40]})
    times = scale.repeat_interleave(64, 0)[:96].repeat_interleave(40, 1)[:, :64]
    assert torch.equal(read_quantized(tmp_path).weights[layer].numbers(), (codes.float() * times).to(torch.bfloat16))


def test_one_scale_and_a_static_input(tmp_path: Path) -> None:
    source(tmp_path, num_hidden_layers=1)
    codes = held(tmp_path)[f"{DOWN}.weight"].to(torch.float8_e4m3fn)
    more = {
        f"{DOWN}.weight": codes,
        f"{DOWN}.weight_scale": torch.tensor(0.5),
        f"{DOWN}.input_scale": torch.tensor([2.0]),
    }
    changed(tmp_path, lambda tensors: tensors.update(more))
    with_config(tmp_path, {"quant_method": "fp8", "activation_scheme": "static"})
    weight = read_quantized(tmp_path).weights[DOWN]
    assert torch.equal(weight.numbers(), (codes.float() * 0.5).to(torch.bfloat16))
    scales = weight.input_scales()
    assert scales is not None
    assert (str(weight.input), float(scales.scale)) == ("float8_e4m3fn/tensor", 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {f"{DOWN}.weight_scale_inv": torch.ones(3, 6)},
            f"/model.safetensors: {DOWN}.weight_scale_inv: F32[3, 6], where BF16 or F16 or F32 or F8_E8M0[2, 6] belongs",
        ),
        (
            {f"{DOWN}.weight": torch.ones(64, 96)},
            f"/model.safetensors: {DOWN}.weight: F32[64, 96], where F8_E4M3[64, 96] belongs",
        ),
        ({f"{DOWN}.weight": None}, f": {DOWN}: fp8: has no weight"),
        (
            {f"{DOWN}.weight_scale_inv": None},
            f"/model.safetensors: {DOWN}.weight: F8_E4M3, and there are no scales of it",
        ),
    ],
)
def test_what_is_wrong_with_a_tensor_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    float8(tmp_path)

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in change.items():
            tensors.pop(name)
            tensors.update({} if tensor is None else {name: tensor})

    changed(tmp_path, apply)
    with pytest.raises(GraphqError) as caught:
        read_quantized(tmp_path)
    assert str(caught.value) == f"{tmp_path}{message}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fmt": "e5m2"}, "fmt: 'e5m2': is no format that is read"),
        ({"weight_block_size": [128]}, "weight_block_size: [128] is not [rows, columns]"),
        ({"activation_scheme": "odd"}, "activation_scheme: 'odd' is not dynamic or static"),
    ],
)
def test_what_is_wrong_with_the_settings_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    source(tmp_path, num_hidden_layers=1)
    with_config(tmp_path, {"quant_method": "fp8"} | settings)
    with pytest.raises(GraphqError) as caught:
        read_quantized(tmp_path)
    assert str(caught.value) == f"{tmp_path}/config.json: quantization_config: {message}"
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
