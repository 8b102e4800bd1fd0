"""C8: scales and offsets of caches in Ascend checkpoints, as the format's description has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graphq
from graphq.errors import TargetError
from graphq.verifier import verify
from tests.models import tiny, tiny_config

IDS = torch.tensor([[3, 17, 64, 2, 90, 11, 5], [8, 8, 99, 0, 45, 6, 77]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, config = tiny_config("llama", num_hidden_layers=1)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source")
    model(config).to(torch.bfloat16).save_pretrained(path)
    return path


def compiled(model: Any, cache: str, target: str | None = "ascend") -> graphq.Compiled:
    spec = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic", "cache": cache}
    return graphq.compile(model, spec, calibration=[IDS], target=target)


@pytest.mark.parametrize("cache", ["int8/channel", "int8/asym/joint/channel"])
def test_scales_and_offsets(source: Path, tmp_path: Path, cache: str) -> None:
    made = compiled(source, cache)
    made.emit("ascend", tmp_path / "a")
    described = json.loads((tmp_path / "a" / "quant_model_description.json").read_text())
    assert (described["kv_cache_type"], described["kv_quant_type"]) == ("C8", "C8")
    assert described["model_quant_type"] == "W8A8_DYNAMIC"
    held: dict[str, Any] = {}
    for file in (tmp_path / "a").glob("*.safetensors"):
        held |= load_file(file)
    state = made.graph.state_dict()
    for ours, theirs in (("key", "k_proj"), ("value", "v_proj")):
        name = f"model.layers.0.self_attn.{theirs}.kv_cache"
        assert described[f"{name}_scale"] == described[f"{name}_offset"] == "C8"
        scale, offset = held[f"{name}_scale"], held[f"{name}_offset"]
        assert (scale.dtype, scale.shape, offset.dtype, offset.shape) == (torch.bfloat16, (32,), torch.bfloat16, (32,))
        own = state[f"model.layers.0.self_attn.{ours}_scale"]
        assert torch.equal(scale.float(), own.flatten())
        zero = state.get(f"model.layers.0.self_attn.{ours}_zero_point", torch.zeros(32))
        assert torch.equal(offset.float(), zero.flatten().float())
        assert bool(zero.any()) == ("asym" in cache)
        x = torch.linspace(-3, 3, 32)
        code = (x / scale.float() + offset.float()).round().clamp(-128, 127)
        codes = torch.ops.graphq.quantize(
            x.view(1, 2, 1, 16),
            own,
            None if "asym" not in cache else zero,
            None,
            cache.removesuffix("/channel"),
            [-1, 1, -1, 1],
        )
        assert torch.equal(codes.flatten().float(), code)
    assert verify(tmp_path / "a").differences == ()
    assert verify(tmp_path / "a", against=source).differences == ()


def test_without_a_cache_nothing_is_said(source: Path, tmp_path: Path) -> None:
    graphq.compile(
        source, {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic"}, target="ascend"
    ).emit("ascend", tmp_path / "a")
    described = json.loads((tmp_path / "a" / "quant_model_description.json").read_text())
    assert not {"kv_cache_type", "kv_quant_type"} & described.keys()


@pytest.mark.parametrize(
    "cache", ["int8/tensor", "int8/head", "float8_e4m3fn/tensor", "int8/token/dynamic", "int4/channel"]
)
def test_refused_in_preflight(source: Path, cache: str) -> None:
    with pytest.raises(TargetError) as caught:
        compiled(source, cache)
    wanted = "an Ascend checkpoint has caches of int8/channel and int8/asym/joint/channel"
    assert str(caught.value) == f"ascend: cache: {cache}: {wanted}"


def test_refused_when_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"self_attn\.key: int8/channel: its scales are no numbers of bfloat16"):
        compiled(source, "int8/channel", None).emit("ascend", tmp_path / "a")


@pytest.mark.slow
def test_keys_of_a_fused_projection_are_refused(tmp_path: Path) -> None:
    made = compiled(tiny("gpt2"), "int8/channel", None)
    with pytest.raises(
        TargetError, match=r"it comes of transformer\.h\.0\.attn\.c_attn, and vLLM-Ascend looks for k_proj"
    ):
        made.emit("ascend", tmp_path / "a")
