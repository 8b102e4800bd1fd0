"""Scales of caches in compressed-tensors checkpoints: what transformers computes with them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graphq
from graphq.errors import TargetError
from graphq.runtime.model import CompiledModel
from graphq.verifier import verify
from tests.checkpoints import save_checkpoint

IDS = torch.tensor([[3, 17, 64, 2, 90, 11, 5], [8, 8, 99, 0, 45, 6, 77]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source"))


def compiled(source: Path, cache: str, consumer: str = "transformers", **spec: Any) -> graphq.Compiled:
    return graphq.compile(
        source,
        {"graphq": 1, "weight": "int8/channel", "cache": cache, **spec},
        calibration=[IDS],
        target="compressed-tensors",
        target_options={"consumer": consumer},
    )


@pytest.mark.parametrize(
    ("cache", "kind", "strategy", "shape"),
    [("float8_e4m3fn/tensor", "float", "tensor", [1]), ("int8/head", "int", "attn_head", [2, 1, 1])],
)
def test_transformers_caches_the_same_values(
    source: Path, tmp_path: Path, cache: str, kind: str, strategy: str, shape: list[int]
) -> None:
    import transformers

    made = compiled(source, cache)
    made.emit("compressed-tensors", tmp_path / "c", consumer="transformers")
    config = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    said = config["kv_cache_scheme"]
    assert (said["type"], said["strategy"], said["num_bits"], said["dynamic"]) == (kind, strategy, 8, False)
    held = load_file(tmp_path / "c" / "model.safetensors")
    names = {name for name in held if name.endswith(("k_scale", "v_scale"))}
    assert names == {"model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"}
    state = made.graph.state_dict()
    for ours, theirs in (("key", "k"), ("value", "v")):
        tensor = held[f"model.layers.0.self_attn.{theirs}_scale"]
        assert list(tensor.shape) == shape
        assert torch.equal(tensor.flatten(), state[f"model.layers.0.self_attn.{ours}_scale"].flatten())
    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32).eval()
    run = CompiledModel(made.graph)
    past_theirs = past = None
    with torch.no_grad():
        for part in IDS.split((4, 1, 2), 1):
            theirs = model(part, past_key_values=past_theirs, use_cache=True)
            ours = run(part, past_key_values=past) if past is not None else run(part)
            past_theirs, past = theirs.past_key_values, ours.past_key_values
            # The cache is 2 % of these logits; float32 sums in another order 1e-6 of them.
            assert (ours.logits - theirs.logits).abs().max() <= 1e-5 * theirs.logits.abs().max()
    assert verify(tmp_path / "c").differences == ()
    assert verify(tmp_path / "c", against=source).differences == ()


def test_a_cache_alone(source: Path, tmp_path: Path) -> None:
    """As llm-compressor writes a recipe that quantizes nothing else."""
    recipe = {
        "quant_stage": {
            "quant_modifiers": {
                "QuantizationModifier": {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
            }
        }
    }
    made = graphq.compile(source, recipe, calibration=[IDS], target="compressed-tensors")
    made.emit("compressed-tensors", tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    assert (config["config_groups"], config["format"]) == ({}, "dense")
    assert config["kv_cache_scheme"]["type"] == "float"
    assert len([name for name in load_file(tmp_path / "c" / "model.safetensors") if name.endswith("_scale")]) == 2
    assert verify(tmp_path / "c").differences == ()


@pytest.mark.parametrize(
    ("cache", "consumer", "reason"),
    [
        ("int8/tensor", "vllm", "vLLM reads caches of float8_e4m3fn alone; write that, or say consumer=transformers"),
        (
            "int8/channel",
            "any",
            "compressed-tensors has one scale of a cache for each tensor or head; write tensor or head",
        ),
        ("int8/token/dynamic", "any", "a checkpoint holds scales of caches that calibration fixed; leave out dynamic"),
        ("int8/asym/tensor", "any", "compressed-tensors has no zero points of caches; write a symmetric format"),
        ("float8_e5m2/tensor", "any", "float8_e5m2/tensor: compressed-tensors has no float8_e5m2"),
    ],
)
def test_refused_in_preflight(source: Path, cache: str, consumer: str, reason: str) -> None:
    with pytest.raises(TargetError) as caught:
        compiled(source, cache, consumer)
    assert str(caught.value) == f"compressed-tensors: cache: {cache}: {reason}"


def test_refused_when_written(source: Path, tmp_path: Path) -> None:
    """A model that was compiled for another target."""
    made = graphq.compile(source, {"graphq": 1, "weight": "int8/channel", "cache": "int8/token/dynamic"})
    with pytest.raises(TargetError, match=r"self_attn\.key: int8/token/dynamic: a checkpoint holds scales of caches"):
        made.emit("compressed-tensors", tmp_path / "c", consumer="any")
    assert not (tmp_path / "c").exists()


def test_the_scales_of_latent_attention_are_refused() -> None:
    from tests.models import tiny

    with pytest.raises(
        TargetError, match=r"cache: float8_e4m3fn/tensor: this model's attention is latent \(MLA\); servers"
    ):
        graphq.compile(
            tiny("deepseek", num_hidden_layers=1),
            {"graphq": 1, "weight": "int8/channel", "cache": "float8_e4m3fn/tensor"},
            calibration=[IDS],
            target="compressed-tensors",
        )
