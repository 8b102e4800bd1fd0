"""Weights of every format are what compressed-tensors' own decompression makes of them, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphq.errors import GraphqError
from graphq.lowering.checkpoints.sources.read import read_quantized
from graphq.packing.words import unpack_words
from tests.quantized_checkpoints import EVERY_FORMAT, changed, decompressed, held, written


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("checkpoints") / "mix", EVERY_FORMAT)


def test_every_format_is_dequantized_as_its_own_library_does(checkpoint: Path) -> None:
    pytest.importorskip("compressed_tensors")
    found = read_quantized(checkpoint)
    wanted = decompressed(checkpoint)
    assert found.weights.keys() == wanted.keys()
    assert len({weight.format for weight in found.weights.values()}) == 7
    for layer, weight in found.weights.items():
        w = weight.numbers()
        assert w.dtype == torch.bfloat16
        assert torch.equal(w, wanted[layer].to(torch.bfloat16)), layer


def test_what_a_layer_is(checkpoint: Path) -> None:
    found = read_quantized(checkpoint)
    q, down = (found.weights[f"model.layers.0.{name}"] for name in ("self_attn.q_proj", "mlp.down_proj"))
    assert (str(q.quant), q.input, q.format) == ("int4/half/g32/source", None, "pack-quantized")
    assert (str(down.input), down.format) == ("mxfp8_e4m3/even/dynamic", "mxfp8-quantized")
    assert found.dtype == torch.bfloat16
    own = held(checkpoint)
    assert q.nbytes == sum(t.numel() * t.itemsize for n, t in own.items() if n.startswith(f"{q.layer}."))
    assert found.parts == {n for n in own if n.rpartition(".")[0] in found.weights}
    assert found.tensors.keys() == (own.keys() - found.parts) | {f"{layer}.weight" for layer in found.weights}
    assert found.elements == sum(t.numel() for t in _model(checkpoint))


def _model(checkpoint: Path) -> list[torch.Tensor]:
    return list(load_file(checkpoint.with_name("mix-source") / "model.safetensors").values())


def test_columns_in_groups_that_are_not_neighbours(checkpoint: Path, tmp_path: Path) -> None:
    """``weight_g_idx`` of older releases: the scale of a column is that of its own group."""
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    layer, order = "model.layers.0.self_attn.k_proj", torch.randperm(64, generator=torch.Generator().manual_seed(1))
    groups = (order // 16).to(torch.int32)
    changed(copied, lambda tensors: tensors.update({f"{layer}.weight_g_idx": groups}))
    weight = read_quantized(copied).weights[layer]
    parts = {name.rpartition(".")[2]: t for name, t in held(copied).items() if name.startswith(f"{layer}.")}
    rows = parts["weight_scale"].shape[0]
    q = unpack_words(parts["weight_packed"], 4, 64, offset_binary=True).float()
    zero = unpack_words(parts["weight_zero_point"], 4, rows, axis=0, offset_binary=True).float()
    wanted = (q - zero[:, groups.long()]) * parts["weight_scale"].float()[:, groups.long()]
    assert torch.equal(weight.numbers(), wanted.to(torch.bfloat16))
    assert weight.grid() is None


def setting(path: Path, change: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


Q, K, GATE = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))
FLOATS = "BF16 or F16 or F32"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}.weight_scale", torch.ones(64, 2, dtype=torch.int8), f"I8[64, 2], where {FLOATS}[64, 2] belongs"),
        (f"{Q}.weight_scale", torch.ones(64, 3), f"F32[64, 3], where {FLOATS}[64, 2] belongs"),
        (f"{Q}.weight_packed", torch.ones(64, 8), "F32[64, 8], where I32[64, 8] belongs"),
        (f"{Q}.weight_packed", torch.ones(64, dtype=torch.int32), "[64]: is no matrix"),
        (f"{Q}.weight_shape", torch.ones(3, dtype=torch.int64), "I64[3], where I64[2] belongs"),
        (f"{K}.weight_zero_point", torch.ones(64, 4, dtype=torch.int8), "I8[64, 4], where I32[4, 4] belongs"),
        (f"{GATE}.weight_global_scale", torch.ones(2), "F32[2], where F32[1] belongs"),
        (f"{GATE}.weight_scale", torch.ones(96, 4), "F32[96, 4], where F8_E4M3[96, 4] belongs"),
        ("model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn), "F8_E4M3, and there are no scales of it"),
    ],
)
def test_a_part_of_another_dtype_or_shape_is_named(
    checkpoint: Path, tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    changed(copied, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(GraphqError) as caught:
        read_quantized(copied)
    assert str(caught.value) == f"{copied}/model.safetensors: {name}: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda settings: settings.update(sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config: sparse weights are not read",
        ),
        (
            lambda settings: settings.update(transform_config={"config_groups": {"u": {}}}),
            "transform_config: rotations at run time are not read",
        ),
        (lambda settings: settings.update(version="1.7"), "version: '1.7': is not known; 0.x is read"),
    ],
)
def test_settings_that_are_not_read_are_named(checkpoint: Path, tmp_path: Path, change: Any, message: str) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    setting(copied, change)
    with pytest.raises(GraphqError) as caught:
        read_quantized(copied)
    assert str(caught.value) == f"{copied}/config.json: quantization_config: {message}"


def test_parts_that_do_not_fit_each_other_are_named_when_they_are_read(checkpoint: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    changed(copied, lambda tensors: tensors.update({f"{Q}.weight_shape": torch.tensor([64, 48])}))
    weight = read_quantized(copied).weights[Q]
    with pytest.raises(GraphqError, match=f"model.safetensors: {Q}: pack-quantized: damaged: packing: 8 words"):
        weight.read()
    bad = held(checkpoint)[f"{Q}.weight_scale"]
    bad[3, 1] = torch.nan
    changed(
        copied, lambda tensors: tensors.update({f"{Q}.weight_scale": bad, f"{Q}.weight_shape": torch.tensor([64, 64])})
    )
    with pytest.raises(GraphqError, match=f"model.safetensors: {Q}: pack-quantized: a scale is NaN or Inf"):
        read_quantized(copied).weights[Q].read()
    save_file({"other": torch.ones(1)}, copied / "model.safetensors")
    with pytest.raises(GraphqError, match=f"model.safetensors: {Q}.weight_packed: cannot be read any more"):
        weight.read()
