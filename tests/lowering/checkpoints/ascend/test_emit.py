"""Ascend checkpoints as a reader from the format's description alone finds them: the numbers of the QDQ form."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import graphq
from graphq import numerics
from graphq.errors import TargetError
from graphq.lowering.checkpoints.content import content_of
from graphq.lowering.checkpoints.layers import QuantizedLinear
from graphq.verifier import verify
from tests.lowering.checkpoints.ascend import reader
from tests.models import MLP, tiny_config

IDS = torch.tensor([[3, 17, 64, 2, 90, 11, 5], [8, 8, 101, 0, 45, 6, 127]])
DEEPSEEK = """graphq: 1
rules:
  - {match: self_attn, weight: int8/channel, input: int8/asym/joint/tensor}
  - {match: kv_b_proj, float: kept}
  - {match: "mlp#0", weight: int8/channel, input: int8/token/dynamic}
  - {match: shared_experts, weight: int8/channel, input: int8/token/dynamic}
  - {match: experts, weight: int4/channel, input: int8/token/dynamic}
"""
# layer -> weight, input, tag: all that there are, in one file, whose groups are of 32
EVERY: Mapping[str, tuple[str, str | None, str]] = {
    "0.self_attn.q_proj": ("int8/channel", "int8/tensor", "W8A8"),
    "0.self_attn.k_proj": ("int8/channel", "int8/asym/joint/tensor", "W8A8"),
    "0.self_attn.v_proj": ("int8/channel", "int8/token/dynamic", "W8A8_DYNAMIC"),
    "0.self_attn.o_proj": ("int8/asym/channel", None, "W8A16"),
    "0.mlp.gate_proj": ("int4/channel", None, "W4A16"),
    "0.mlp.up_proj": ("int4/asym/g32", None, "W4A16"),
    "0.mlp.down_proj": ("int4/asym/channel", "int4/token/dynamic", "W4A4_DYNAMIC"),
    "1.self_attn.q_proj": ("mxfp8_e4m3", "mxfp8_e4m3/dynamic", "W8A8_MXFP8"),
    "1.self_attn.k_proj": ("mxfp4", "mxfp8_e4m3/dynamic", "W4A8_MXFP"),
    "1.self_attn.v_proj": ("mxfp4", "mxfp4/dynamic", "W4A4_MXFP4"),
    "1.self_attn.o_proj": ("mxfp4", None, "W4A16_MXFP4"),
    "1.mlp.gate_proj": ("int4/channel", "int8/token/dynamic", "W4A8_DYNAMIC"),
    "1.mlp.up_proj": ("float8_e4m3fn/channel", "float8_e4m3fn/token/dynamic", "WFP8AFP8_DYNAMIC"),
    "1.mlp.down_proj": ("int4/channel", "int8/token/dynamic", "W4A8_DYNAMIC"),
}
FORMS = {
    "W8A8": {
        "weight": "int8[N, K]",
        "quant_bias": "int32[N]",
        "input_scale": "float32[1]",
        "input_offset": "float32[1]",
        "deq_scale": "float32[N]",
        "weight_scale": "float32[N, 1]",
        "weight_offset": "float32[N, 1]",
    },
    "W8A8_DYNAMIC": {"weight": "int8[N, K]", "weight_scale": "float32[N, 1]", "weight_offset": "float32[N, 1]"},
    "W8A16": {"weight": "int8[N, K]", "weight_scale": "float32[N, 1]", "weight_offset": "float32[N, 1]"},
    "W4A4_DYNAMIC": {"weight": "int8[N, K]", "weight_scale": "float32[N, 1]", "weight_offset": "float32[N, 1]"},
    "WFP8AFP8_DYNAMIC": {
        "weight": "float8_e4m3fn[N, K]",
        "weight_scale": "float32[N, 1]",
        "weight_offset": "float32[N, 1]",
    },
    "W8A8_MXFP8": {"weight": "float8_e4m3fn[N, K]", "weight_scale": "uint8[N, K/32]"},
    "W4A8_MXFP": {"weight": "uint8[N, K/2]", "weight_scale": "uint8[N, K/32]"},
    "W4A4_MXFP4": {"weight": "uint8[N, K/2]", "weight_scale": "uint8[N, K/32]"},
    "W4A16_MXFP4": {"weight": "uint8[N, K/2]", "weight_scale": "uint8[N, K/32]"},
}


def saved(family: str, dtype: torch.dtype, path: Path, **options: Any) -> Path:
    model, config = tiny_config(family, **options)
    torch.manual_seed(0)
    model(config).to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    saved("deepseek", torch.bfloat16, folder / "deepseek")
    saved("llama", torch.bfloat16, folder / "llama", tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def deepseek(sources: Path) -> Any:
    return graphq.compile(sources / "deepseek", DEEPSEEK, calibration=[(IDS,)], target="ascend")


@pytest.fixture(scope="module")
def every(sources: Path) -> Any:
    rules = [
        {"match": f"=model.layers.{layer}", "weight": weight} | ({"input": given} if given else {})
        for layer, (weight, given, _) in EVERY.items()
    ]
    spec = {"graphq": 1, "rules": rules}
    options = {"consumer": "any"}
    return graphq.compile(sources / "llama", spec, calibration=[(IDS,)], target="ascend", target_options=options)


def layers_of(made: Any) -> Mapping[str, QuantizedLinear]:
    return content_of(made.graph, "ascend").layers


def weight_of(layer: QuantizedLinear) -> Tensor:
    block = numerics.weight_block(layer.weight.granularity, 2, 0, 1)
    return numerics.dequantize(layer.codes, layer.scales, layer.weight.format, block).double()


def product(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """What the QDQ form's linear gives, without a bias, in float64."""
    assert layer.input is not None
    block = numerics.activation_block(layer.input.granularity, x.dim())
    scales = layer.input_scales or numerics.choose_scale(x, layer.input.format, block)
    q = numerics.quantize(x, scales, layer.input.format, block)
    return numerics.dequantize(q, scales, layer.input.format, block).double() @ weight_of(layer).T


def activations(columns: int) -> Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)) * 3


def described(x: Tensor, rows: int, columns: int) -> str:
    names = {rows: "N", columns: "K", columns // 2: "K/2", -(-columns // 32): "K/32"}
    sizes = [names.get(size, str(size)) if axis < 2 and size > 1 else str(size) for axis, size in enumerate(x.shape)]
    return f"{str(x.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"


def test_every_tag(every: Any, sources: Path, tmp_path: Path) -> None:
    every.emit("ascend", tmp_path / "out", consumer="any")
    made, layers = reader.read(tmp_path / "out"), layers_of(every)
    assert {name.removeprefix("model.layers."): made.description[f"{name}.weight"] for name in made.layers()} == {
        layer: tag for layer, (_, _, tag) in EVERY.items()
    }
    for name, layer in layers.items():
        tag = made.description[f"{name}.weight"]
        if tag in FORMS and layer.codes.shape[0] not in (layer.codes.shape[1], 32):
            parts = {n.rpartition(".")[2]: t for n, t in made.tensors.items() if n.startswith(f"{name}.")}
            assert {suffix: described(t, *layer.codes.shape) for suffix, t in parts.items()} == FORMS[tag]
        # codes times scales: exact in float64, rounded to float32 in the QDQ form
        assert torch.allclose(reader.dequantized(made, name), weight_of(layer), rtol=1e-6, atol=0)
    with safe_open(tmp_path / "out" / "quant_model_weights-00001-of-00001.safetensors", "pt") as opened:
        assert opened.metadata() is None  # as msModelSlim's
    keys = {key: value for key, value in made.description.items() if key not in made.tensors}
    assert keys == {
        "version": "1.0.0",
        "model_quant_type": "W4A4_MXFP4",
        "metadata": {},
        "group_size": 32,
        "optional": {},
    }
    assert made.tensors["model.layers.0.mlp.up_proj.weight"].shape == (48, 64)  # groups: pairs of outputs
    assert made.tensors["model.layers.0.mlp.gate_proj.weight"].shape == (96, 32)  # channels: pairs of inputs
    assert verify(tmp_path / "out").ok
    found = verify(tmp_path / "out", sources / "llama")
    assert found.ok, found.differences
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {
        *("config.json", "generation_config.json", "graphq.json", "quant_model_description.json"),
        *("quant_model_weights-00001-of-00001.safetensors", "quant_model_weights.safetensors.index.json"),
    }


def test_tied_tensors_stand_under_both_names(every: Any, tmp_path: Path) -> None:
    """vLLM-Ascend looks up the tag of a head that is tied, too."""
    every.emit("ascend", tmp_path / "out", consumer="any", shard_bytes=20_000)
    made = reader.read(tmp_path / "out")
    assert torch.equal(made.tensors["lm_head.weight"], made.tensors["model.embed_tokens.weight"])
    assert made.description["lm_head.weight"] == "FLOAT"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert len(list((tmp_path / "out").glob("*-of-*.safetensors"))) > 2
    assert verify(tmp_path / "out").ok


def test_the_arithmetic_of_each_tag_is_the_qdq_forms(every: Any, tmp_path: Path) -> None:
    every.emit("ascend", tmp_path / "out", consumer="any")
    made, layers = reader.read(tmp_path / "out"), layers_of(every)
    seen: set[str] = set()
    for name, layer in layers.items():
        tag, x = made.description[f"{name}.weight"], activations(layer.codes.shape[1])
        match tag:
            case "W8A8":
                found, step = reader.static_w8a8(made, name, x), made.part(name, "deq_scale").max()
                bound = 0.51 * float(step)  # quant_bias is a whole number of steps
            case "W8A8_DYNAMIC" | "W4A4_DYNAMIC":
                q, s = reader.by_token(x, 127 if tag == "W8A8_DYNAMIC" else 7)
                found, bound = s.double() * (q.double() @ reader.dequantized(made, name).T), 1e-6
            case "W4A8_DYNAMIC":
                found, bound = reader.split_w4a8(made, name, x), 1e-5  # scale_bias is a float32 sum
            case _:
                continue
        wanted = product(layer, x)
        assert float((found - wanted).abs().max()) <= bound * (1 if tag == "W8A8" else float(wanted.abs().max()))
        seen.add(tag)
    assert seen == {"W8A8", "W8A8_DYNAMIC", "W4A4_DYNAMIC", "W4A8_DYNAMIC"}


def test_a_mixed_model_of_experts(deepseek: Any, sources: Path, tmp_path: Path) -> None:
    deepseek.emit("ascend", tmp_path / "out")
    made, layers = reader.read(tmp_path / "out"), layers_of(deepseek)
    tags = {name: made.description[f"{name}.weight"] for name in made.layers()}
    assert {tag: sum(one == tag for one in tags.values()) for tag in sorted({*tags.values()})} == {
        "W4A8_DYNAMIC": 12,
        "W8A8": 8,
        "W8A8_DYNAMIC": 6,
    }
    for kept in ("self_attn.kv_b_proj.weight", "mlp.gate.weight", "mlp.gate.e_score_correction_bias"):
        assert made.description[f"model.layers.1.{kept}"] == "FLOAT"
    assert made.description["model_quant_type"] == "W8A8"
    assert made.description["group_size"] == 0
    for name, layer in layers.items():
        x = activations(layer.codes.shape[1])
        wanted = product(layer, x)
        if tags[name] == "W4A8_DYNAMIC":
            is_down = name.endswith("down_proj")
            assert made.part(name, "scale_bias").shape == (layer.codes.shape[0], 16 if is_down else 1)
            for ranks in (1, 4, 16):
                parts = [reader.split_w4a8(made, name, x, rank, ranks) for rank in range(ranks if is_down else 1)]
                # float32 sums in scale_bias
                assert float((sum(parts) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
        elif tags[name] == "W8A8":
            bound = 0.51 * float(made.part(name, "deq_scale").max())  # quant_bias is a whole number of steps
            assert float((reader.static_w8a8(made, name, x) - wanted).abs().max()) <= bound
    assert verify(tmp_path / "out").ok
    assert verify(tmp_path / "out", sources / "deepseek").ok


def test_static_layers_for_dynamic_prefill(deepseek: Any, tmp_path: Path) -> None:
    deepseek.emit("ascend", tmp_path / "static")
    deepseek.emit("ascend", tmp_path / "out", prefill="dynamic")
    made, static = reader.read(tmp_path / "out"), reader.read(tmp_path / "static")
    assert {t for n, t in made.description.items() if n.endswith("q_a_proj.weight_scale")} == {"W8A8_MIX"}
    assert made.description["model_quant_type"] == "W8A8_MIX"
    assert made.tensors.keys() == static.tensors.keys()
    assert all(torch.equal(t, static.tensors[n]) for n, t in made.tensors.items())
    assert verify(tmp_path / "out").ok


def test_float16_models_hold_deq_scale_as_bits(tmp_path: Path) -> None:
    source = saved("llama", torch.float16, tmp_path / "source", num_hidden_layers=1)
    spec = "graphq: 1\nweight: int8/channel\ninput: int8/tensor"
    compiled = graphq.compile(source, spec, calibration=[(IDS,)], target="ascend")
    compiled.emit("ascend", tmp_path / "out")
    made = reader.read(tmp_path / "out")
    for name, layer in layers_of(compiled).items():
        assert made.part(name, "deq_scale").dtype == torch.int64
        x = activations(layer.codes.shape[1])
        step = made.part(name, "input_scale") * made.part(name, "weight_scale").max()
        found, wanted = reader.static_w8a8(made, name, x), product(layer, x)
        assert float((found - wanted).abs().max()) <= 0.51 * float(step)  # quant_bias is a whole number of steps
        half = made.part(name, "weight_scale")  # vLLM-Ascend casts scales to the model's dtype
        assert torch.equal(half.half().float(), half)


def test_biases_stand_in_quant_bias_and_in_float32(tmp_path: Path) -> None:
    source = saved("opt", torch.bfloat16, tmp_path / "source", num_hidden_layers=1)
    biases = {name: t for name, t in load_file(source / "model.safetensors").items() if name.endswith("bias")}
    state = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).bfloat16() for n, t in biases.items()}
    save_file(load_file(source / "model.safetensors") | state, source / "model.safetensors", {"format": "pt"})
    spec = "graphq: 1\nweight: int8/channel\ninput: int8/asym/joint/tensor"
    compiled = graphq.compile(source, spec, calibration=[(IDS,)], target="ascend")
    compiled.emit("ascend", tmp_path / "out")
    made, layers = reader.read(tmp_path / "out"), layers_of(compiled)
    assert len(layers) == 6
    for name, layer in layers.items():
        bias = made.tensors[f"{name}.bias"]
        assert (made.description[f"{name}.bias"], bias.dtype) == ("FLOAT", torch.float32)
        assert torch.equal(bias, state[f"{name}.bias"].float())
        x = activations(layer.codes.shape[1])
        wanted, step = product(layer, x) + bias.double(), made.part(name, "deq_scale").max()
        # quant_bias is a whole number of steps
        assert float((reader.static_w8a8(made, name, x) - wanted).abs().max()) <= 0.51 * float(step)
    norm = next(name for name in made.tensors if name.endswith("layer_norm.bias"))
    assert made.tensors[norm].dtype == torch.bfloat16
    assert verify(tmp_path / "out").ok


def test_two_levels_as_version_0_has_them(sources: Path, tmp_path: Path) -> None:
    spec = DEEPSEEK.replace("int4/channel", "int4/over_int8/g16")
    options = {"consumer": "any", "layout": "v0"}
    compiled = graphq.compile(sources / "deepseek", spec, calibration=[(IDS,)], target="ascend", target_options=options)
    compiled.emit("ascend", tmp_path / "out", consumer="any", layout="v0")
    assert {file.name for file in (tmp_path / "out").glob("quant_model_*")} == {
        "quant_model_weight_w8a8.safetensors",
        "quant_model_description.json",
    }
    made, layers = reader.read(tmp_path / "out"), layers_of(compiled)
    name = "model.layers.1.mlp.experts.2.gate_proj"
    parts = {n.rpartition(".")[2]: t for n, t in made.tensors.items() if n.startswith(f"{name}.")}
    assert {suffix: (str(t.dtype).removeprefix("torch."), [*t.shape]) for suffix, t in sorted(parts.items())} == {
        "scale_bias": ("uint64", [48, 4]),
        "weight": ("int8", [24, 64]),
        "weight_offset": ("float32", [48, 1]),
        "weight_offset_second": ("int64", [48, 4]),
        "weight_scale": ("float32", [48, 1]),
        "weight_scale_second": ("float32", [48, 4]),
    }
    assert {made.description[f"{name}.{suffix}"] for suffix in parts} == {"W4A8_DYNAMIC"}
    assert made.description["group_size"] == 16
    for name, layer in layers.items():
        if "experts" in name and "shared" not in name:
            w = reader.dequantized(made, name)
            assert torch.allclose(w, weight_of(layer), rtol=1e-6, atol=0)  # rounded to float32 in the QDQ form
            sums = made.part(name, "scale_bias").view(torch.int64).to(torch.int32).view(torch.float32).double()
            wanted = 8 * w.reshape(w.shape[0], -1, 16).sum(2)
            assert torch.allclose(sums, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))  # float32 sums
    assert verify(tmp_path / "out", sources / "deepseek").ok


def test_scales_that_the_consumer_does_not_hold_are_refused(tmp_path: Path) -> None:
    source = saved("llama", torch.bfloat16, tmp_path / "source", num_hidden_layers=1)
    compiled = graphq.compile(source, "graphq: 1\nweight: int8/channel")
    with pytest.raises(TargetError) as caught:
        compiled.emit("ascend", tmp_path / "out")
    assert str(caught.value).splitlines()[0] == (
        "ascend: model.layers.0.self_attn.q_proj: its scales are no numbers of bfloat16, in which vLLM-Ascend holds them;"
        " compile with target='ascend'"
    )
    assert not (tmp_path / "out").exists()
    compiled.emit("ascend", tmp_path / "out", consumer="any")
    assert verify(tmp_path / "out").ok
    with pytest.raises(TargetError, match=r"shard_bytes: 0 is not a positive number of bytes"):
        compiled.emit("ascend", tmp_path / "other", shard_bytes=0)


def test_what_is_no_transformers_model_is_refused(tmp_path: Path) -> None:
    made = graphq.compile(MLP(), "graphq: 1\nweight: int8/channel", inputs=torch.ones(2, 8))
    with pytest.raises(TargetError, match="ascend: the model is none of transformers"):
        made.emit("ascend", tmp_path / "out")
