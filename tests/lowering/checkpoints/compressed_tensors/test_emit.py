"""Checkpoints as transformers and compressed-tensors load them: the numbers of the QDQ form, names, config, refusals."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, fx

import graphq
from graphq.errors import TargetError
from graphq.ir.views import Dequantize, Param, ops_of
from graphq.lowering.checkpoints.compressed_tensors.emit import tensors
from graphq.verifier import verify
from tests.models import MLP, tiny_config

IDS = torch.tensor([[3, 17, 64, 2, 90, 11, 5], [8, 8, 101, 0, 45, 6, 127]])


@functools.cache
def saved(family: str, dtype: torch.dtype, root: Path) -> Path:
    model, config = tiny_config(family)
    torch.manual_seed(0)
    path = root / f"{family}-{dtype}"
    model(config).to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


def compiled(source: Path, spec: str, **options: Any) -> Any:
    asks_data = "/tensor" in spec.partition("input")[2] or "nvfp4" in spec.partition("input")[2]
    options = {"consumer": "any"} | options
    return graphq.compile(
        source,
        f"graphq: 1\n{spec}",
        calibration=[(IDS,)] if asks_data else None,
        target="compressed-tensors",
        target_options=options,
    )


def loaded(path: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    config = json.loads((path / "config.json").read_text())
    model, told = getattr(transformers, config["architectures"][0]).from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        model(IDS[:, :1])  # which decompresses the weights
    return torch.nn.Module.float(model)


def with_weights_of(dtype: torch.dtype, gm: fx.GraphModule) -> fx.GraphModule:
    """The QDQ form whose dequantized weights are rounded to ``dtype``, in which clients hold them."""
    made = copy.deepcopy(gm)
    for op in ops_of(made):
        if isinstance(op, Dequantize) and isinstance(op.codes, Param):
            with made.graph.inserting_after(op.node):
                narrow = made.graph.call_function(torch.ops.aten.to.dtype, (op.node, dtype))
            with made.graph.inserting_after(narrow):
                wide = made.graph.call_function(torch.ops.aten.to.dtype, (narrow, torch.float32))
            op.node.replace_all_uses_with(wide, lambda user, narrow=narrow: user is not narrow)
    made.recompile()
    return made


def logits(made: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    from graphq.runtime.model import CompiledModel

    gm = made.graph if dtype == torch.float32 else with_weights_of(dtype, made.graph)
    with torch.no_grad():
        return CompiledModel(gm).eval()(input_ids=IDS).logits


WEIGHT_ONLY = (
    *("int4/g16", "int4/channel", "int8/g32", "int3/g32", "int2/g16", "float8_e4m3fn/channel", "int5/tensor"),
    "int4/asym/tensor",
)
BLOCKS = ("float8_e4m3fn/32x16",)


@pytest.mark.parametrize("weight", [*WEIGHT_ONLY, *BLOCKS])
def test_transformers_computes_what_was_compiled(root: Path, tmp_path: Path, weight: str) -> None:
    made = compiled(saved("llama", torch.float32, root), f"weight: {weight}")
    made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    wanted = logits(made)
    with torch.no_grad():
        found = loaded(tmp_path / "out")(IDS).logits
    # the same float32 weights, exactly, through the same modules but for the order of sums
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-6
    assert verify(tmp_path / "out").ok
    assert verify(tmp_path / "out", saved("llama", torch.float32, root)).ok


@pytest.mark.parametrize("weight", ["int4/g16", "mxfp4/even", "nvfp4", "mxfp8_e4m3/even"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt"])
def test_bfloat16_sources(root: Path, tmp_path: Path, family: str, weight: str) -> None:
    if family != "llama" and weight != "int4/g16":
        pytest.skip("a format is the same in every family")
    made = compiled(saved(family, torch.bfloat16, root), f"weight: {weight}")
    made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    wanted = logits(made, torch.bfloat16)
    with torch.no_grad():
        found = loaded(tmp_path / "out")(IDS).logits
    # clients round the products of codes and scales to bfloat16; beyond that, float32 sums in another order
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for name, t in held.items() if name.endswith(("norm.weight", "embed_tokens.weight"))} == {
        "torch.bfloat16"
    }
    assert verify(tmp_path / "out", saved(family, torch.bfloat16, root)).ok


@pytest.mark.parametrize(
    ("weight", "given", "bound"),
    [
        ("int8/channel", "int8/tensor", 1e-6),
        ("int8/channel", "int8/asym/joint/tensor", 1e-6),
        ("float8_e4m3fn/channel", "float8_e4m3fn/token/dynamic", 1e-6),
        ("float8_e4m3fn/tensor", "float8_e4m3fn/tensor", 1e-6),
        # a code that rounds the other way moves what follows by a step: seen to differ by 0.012
        ("int8/channel", "int8/half/token/dynamic", 3e-2),
        ("int4/g16", "int8/half/token/dynamic", 3e-2),
    ],
)
def test_quantized_inputs(root: Path, tmp_path: Path, weight: str, given: str, bound: float) -> None:
    made = compiled(saved("llama", torch.float32, root), f"weight: {weight}\ninput: {given}")
    made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    wanted = logits(made)
    with torch.no_grad():
        found = loaded(tmp_path / "out")(IDS).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= bound
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2"),
        ("deepseek", "model.layers.1.mlp.experts.2.gate_proj"),
    ],
)
def test_experts_are_stored_one_by_one(root: Path, tmp_path: Path, family: str, name: str) -> None:
    source = saved(family, torch.bfloat16, root)
    made = compiled(source, "weight: int4/g16\nrules:\n  - {match: experts, weight: int8/channel}")
    made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    held = load_file(tmp_path / "out" / "model.safetensors")
    own = load_file(source / "model.safetensors")
    quantized = {n.removesuffix(".weight_scale") for n in held if n.endswith(".weight_scale")}
    assert {f"{n}.weight" if n in quantized else n for n in own} >= {*own} - {f"{q}.weight" for q in quantized}
    assert {n for n in own if n.removesuffix(".weight") not in quantized} <= held.keys()
    assert {f"{q}.weight" for q in quantized} <= own.keys()
    # every code and scale is within half a step of the source's own expert
    w = own[f"{name}.weight"].float()
    scale = held[f"{name}.weight_scale"].float()
    back = tensors(tmp_path / "out")[f"{name}.weight"].float() * scale
    assert held[f"{name}.weight_packed"].dtype == torch.int32
    # servers build routers as linears: they have to know that these stay float
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    router = "block_sparse_moe.gate" if family == "mixtral" else "mlp.gate"
    assert f"model.layers.1.{router}" in settings["ignore"]
    assert not {*settings["ignore"]} & quantized
    assert float(((back - w).abs() / scale).max()) <= 0.51
    assert verify(tmp_path / "out").ok


def test_experts_that_are_stored_with_inputs_first_stay_so(root: Path, tmp_path: Path) -> None:
    source = saved("gpt_oss", torch.float32, root)
    made = compiled(source, "weight: int4/g16\nrules:\n  - {match: '*.experts.*', float: true}")
    made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    held, own = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(held[name], own[name])
    wanted = logits(made)
    with torch.no_grad():
        found = loaded(tmp_path / "out")(IDS).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-6  # float32 sums in another order


def test_the_configuration(root: Path, tmp_path: Path) -> None:
    spec = "weight: int4/g16\nrules:\n  - {match: down_proj, weight: int8/channel, input: int8/token/dynamic}"
    made = compiled(saved("llama", torch.bfloat16, root), spec)
    made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = found.pop("config_groups")
    assert found == {
        "format": "mixed-precision",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }
    assert [(g["format"], g["targets"]) for g in groups.values()] == [
        (
            "pack-quantized",
            [
                rf"re:^model\.layers\.\d+\.{part}$"
                for part in (
                    r"self_attn\.q_proj",
                    r"self_attn\.k_proj",
                    r"self_attn\.v_proj",
                    r"self_attn\.o_proj",
                    r"mlp\.gate_proj",
                    r"mlp\.up_proj",
                )
            ],
        ),
        ("int-quantized", [r"re:^model\.layers\.\d+\.mlp\.down_proj$"]),
    ]
    assert groups["group_0"]["weights"] == {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": 16,
        "num_bits": 4,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "group",
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }
    loaded(tmp_path / "out")


RECIPE = """
quant_stage:
  quant_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        wide: {targets: ['re:.*down_proj$'], weights: {num_bits: 8, strategy: channel}}
        narrow: {targets: [Linear], weights: {num_bits: 4, group_size: 16}}
"""


@pytest.mark.parametrize("order", ["", "      actorder: null\n"])
def test_what_a_recipe_says_of_its_groups(root: Path, tmp_path: Path, order: str) -> None:
    source = saved("llama", torch.bfloat16, root)
    recipe = RECIPE.replace("      ignore", f"{order}      ignore")
    made = graphq.compile(source, yaml.safe_load(recipe), calibration=[(IDS,)], target="compressed-tensors")
    made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {name: len(group["targets"]) for name, group in found.items()} == {"narrow": 6, "wide": 1}
    assert {group["weights"]["actorder"] for group in found.values()} == {None if order else "weight"}
    loaded(tmp_path / "out")


def test_a_tied_head_that_is_quantized_is_untied(root: Path, tmp_path: Path) -> None:
    source = saved("gemma3", torch.bfloat16, root)
    made = compiled(source, "weight: int4/g16\nrules:\n  - {match: lm_head, weight: int8/channel}")
    made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    wanted = logits(made, torch.bfloat16)
    with torch.no_grad():
        found = loaded(tmp_path / "out")(IDS).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5  # as for bfloat16 sources


def test_files_of_a_bounded_size_load_alike(root: Path, tmp_path: Path) -> None:
    made = compiled(saved("llama", torch.float32, root), "weight: int4/g16")
    made.emit("compressed-tensors", tmp_path / "out", consumer="any", shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    wanted = logits(made)
    with torch.no_grad():
        found = loaded(tmp_path / "out")(IDS).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-6  # float32 sums in another order
    assert verify(tmp_path / "out").ok


def test_scales_that_the_file_does_not_hold_are_refused(root: Path, tmp_path: Path) -> None:
    made = graphq.compile(saved("llama", torch.bfloat16, root), "graphq: 1\nweight: int4/g16")
    with pytest.raises(TargetError) as caught:
        made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    assert str(caught.value).splitlines()[0] == (
        "compressed-tensors: model.layers.0.self_attn.q_proj: its scales are no numbers of bfloat16, which stores them;"
        " compile with target='compressed-tensors'"
    )
    assert not (tmp_path / "out").exists()


def test_a_model_of_no_class_of_transformers_is_refused(tmp_path: Path) -> None:
    made = graphq.compile(MLP(), "graphq: 1\nweight: int4/g8", inputs=torch.ones(2, 8))
    with pytest.raises(
        TargetError, match="the model is none of transformers; a checkpoint is loaded by its class there"
    ):
        made.emit("compressed-tensors", tmp_path / "out")


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (
            "weight: int8/channel\nalgorithms: [correct-bias]",
            "model.layers.0.self_attn.q_proj.bias: the architecture has no such parameter [64]; it would be lost",
        ),
        (
            "weight: int8/channel\nalgorithms: [{smooth-quant: {where: multiply}}]\ninput: int8/tensor",
            "smooth-quant computes it when the model runs, which the architecture does not",
        ),
    ],
)
def test_what_the_architecture_cannot_hold_is_refused(root: Path, tmp_path: Path, spec: str, line: str) -> None:
    made = graphq.compile(saved("llama", torch.float32, root), f"graphq: 1\n{spec}", calibration=[(IDS,)])
    with pytest.raises(TargetError) as caught:
        made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    assert any(one.endswith(line) for one in str(caught.value).splitlines())
    assert not (tmp_path / "out").exists()
