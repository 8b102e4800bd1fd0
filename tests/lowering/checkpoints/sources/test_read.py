"""Which directories are quantized checkpoints, and which of them are read."""

import json
from pathlib import Path
from typing import Any

import pytest

from graphq.errors import GraphqError
from graphq.lowering.checkpoints.sources.read import is_quantized, read_quantized
from tests.quantized_checkpoints import float8, source, with_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return source(tmp_path / "model", num_hidden_layers=1)


def test_float_models_are_none(model: Path) -> None:
    assert not is_quantized(model)
    with_config(model, None)  # type: ignore[arg-type]
    assert not is_quantized(model)
    assert not is_quantized(model / "nothing")
    (model / "config.json").write_text("{")
    assert not is_quantized(model)


def test_float_models_are_not_called_damaged(tmp_path: Path) -> None:
    for config in ({"model_type": "llama"}, {"model_type": "llama", "quantization_config": None}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(GraphqError) as caught:
            read_quantized(tmp_path)
        assert (
            str(caught.value) == f"{tmp_path}/config.json: has no quantization_config: this is no quantized checkpoint"
        )


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "modelopt", None])
def test_other_ways_of_quantization_are_named(model: Path, method: Any) -> None:
    with_config(model, {"quant_method": method})
    assert is_quantized(model)
    with pytest.raises(GraphqError) as caught:
        read_quantized(model)
    assert str(caught.value) == (
        f"{model}/config.json: quantization_config: quant_method: {method}: is not read; checkpoints of"
        " compressed-tensors, fp8, mxfp4 and msModelSlim's are; dequantize it with the tool that made it"
    )


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    float8(tmp_path, num_hidden_layers=1)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-9])
    with pytest.raises(GraphqError, match=r"/model.safetensors: damaged or incomplete: "):
        read_quantized(tmp_path)


@pytest.mark.parametrize("found", [[], "fp8", 3])
def test_settings_that_are_no_object(model: Path, found: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": found}))
    with pytest.raises(GraphqError, match=r"config.json: damaged: quantization_config: is no object"):
        read_quantized(model)
