"""Layers that runtimes fuse, and tied ones, get one option; what a group takes is what ``explain`` counts."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from graphq import compiler
from graphq.compiler import stored_bits
from graphq.errors import SpecError
from graphq.explanation import _explained
from graphq.frontends import load_spec
from graphq.ir.pipeline import Pipeline
from graphq.mixed_precision.layer_groups import Group, layer_groups
from graphq.mixed_precision.options import read_options
from graphq.pipelines import canonical_passes
from tests.models import captured


def groups_of(family: str, options: str) -> list[Group]:
    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    return layer_groups(gm, read_options(options))


def shown(groups: list[Group]) -> str:
    return "\n".join(f"{group.name}: {', '.join(group.options)}" for group in groups)


def test_parts_that_are_fused_are_one_group():
    assert_expected_inline(
        shown(groups_of("llama", "w4a16,w8a16")),
        """\
model.layers.0.self_attn.q_proj, k_proj, v_proj: w4a16, w8a16
model.layers.0.self_attn.o_proj: w4a16, w8a16
model.layers.0.mlp.gate_proj, up_proj: w4a16, w8a16
model.layers.0.mlp.down_proj: w4a16, w8a16
model.layers.1.self_attn.q_proj, k_proj, v_proj: w4a16, w8a16
model.layers.1.self_attn.o_proj: w4a16, w8a16
model.layers.1.mlp.gate_proj, up_proj: w4a16, w8a16
model.layers.1.mlp.down_proj: w4a16, w8a16""",
    )


def test_experts_of_a_block_are_one_group():
    assert_expected_inline(
        shown(groups_of("mixtral", "w4a16,w8a16")),
        """\
model.layers.0.self_attn.q_proj, k_proj, v_proj: w4a16, w8a16
model.layers.0.self_attn.o_proj: w4a16, w8a16
model.layers.0.mlp.experts.0.gate_proj, model.layers.0.mlp.experts.1.gate_proj, model.layers.0.mlp.experts.2.gate_proj, 9 more: w4a16, w8a16
model.layers.1.self_attn.q_proj, k_proj, v_proj: w4a16, w8a16
model.layers.1.self_attn.o_proj: w4a16, w8a16
model.layers.1.mlp.experts.0.gate_proj, model.layers.1.mlp.experts.1.gate_proj, model.layers.1.mlp.experts.2.gate_proj, 9 more: w4a16, w8a16""",
    )


def test_a_head_that_is_the_embedding_is_counted_once():
    rules = [{"match": "blocks", "weight": "int4/g32"}, {"match": "embed_tokens", "weight": "int4/g32"}]
    options = read_options([{"graphq": 1, "rules": rules}, "float"])
    gm = captured("gemma3")
    Pipeline(canonical_passes()).run(gm)
    first = layer_groups(gm, options)[0]
    assert [layer.fqn for layer in first.held] == [first.layers[0].fqn]
    assert first.options == ("weight int4/g32", "float")


def test_sizes_are_those_of_explain():
    gm = captured("llama")
    Pipeline(canonical_passes()).run(gm)
    groups = layer_groups(gm, read_options("int3/asym/g32,float"))
    held = stored_bits(gm)
    quantized = {
        row.layer.fqn: row.nbytes for row in _explained(gm, load_spec({"graphq": 1, "weight": "int3/asym/g32"})).layers
    }
    for group in groups:
        assert group.nbytes(0, held) == sum(quantized[layer.fqn] for layer in group.layers)
        assert group.nbytes(1, held) == sum(4 * layer.shape[0] * layer.shape[1] for layer in group.layers)
        assert group.numel == sum(layer.shape[0] * layer.shape[1] for layer in group.layers)


def test_options_that_decide_alike_are_one():
    groups = groups_of("llama", "int4/g32,int8/channel")
    mixed = read_options(
        [
            {
                "graphq": 1,
                "rules": [{"match": "blocks", "weight": "int4/g32"}, {"match": "down_proj", "weight": "int8/channel"}],
            },
            "int4/g32",
        ]
    )
    gm = captured("llama")
    Pipeline(canonical_passes()).run(gm)
    by_name = {group.name: len(group.options) for group in layer_groups(gm, mixed)}
    assert set(by_name) == {group.name for group in groups}
    assert {name for name, count in by_name.items() if count == 2} == {n for n in by_name if n.endswith("down_proj")}


def test_options_that_quantize_nothing_are_refused():
    given = [{"match": "blocks", "weight": "int4/channel", "only_if": [f"K % {size}"]} for size in (2048, 4096)]
    gm = compiler.capture(nn.Sequential(nn.Linear(8, 8)), torch.ones(2, 8))
    with pytest.raises(SpecError, match=r"^search: no option quantizes any layer of the model$"):
        layer_groups(gm, read_options([load_spec({"graphq": 1, "rules": [rule]}) for rule in given]))
