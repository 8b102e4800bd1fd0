"""Which layers runtimes fuse, from the graph."""

import pytest
from expecttest import assert_expected_inline

from graphq.ir.fused import fused_layers
from graphq.ir.layers import layers, sites
from graphq.ir.pipeline import Pipeline
from graphq.pipelines import canonical_passes
from tests.models import captured


def groups(family: str) -> str:
    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    found = fused_layers(sites(gm), layers(gm))
    named = [", ".join(fqn.removeprefix("model.layers.") for fqn in group) for group in found]
    assert sorted(fqn for group in found for fqn in group) == sorted(layers(gm))  # each in one group
    return "\n".join(line for line in named if line.startswith("1."))


def test_parts_of_attention_and_of_gated_layers():
    assert_expected_inline(
        groups("llama"),
        """\
1.self_attn.q_proj, 1.self_attn.k_proj, 1.self_attn.v_proj
1.self_attn.o_proj
1.mlp.gate_proj, 1.mlp.up_proj
1.mlp.down_proj""",
    )


def test_experts_and_their_router():
    """All experts of a block are one; the router, which reads the same value, is not."""
    assert_expected_inline(
        groups("mixtral"),
        """\
1.self_attn.q_proj, 1.self_attn.k_proj, 1.self_attn.v_proj
1.self_attn.o_proj
1.mlp.gate
1.mlp.experts.0.gate_proj, 1.mlp.experts.1.gate_proj, 1.mlp.experts.2.gate_proj, 1.mlp.experts.3.gate_proj, 1.mlp.experts.0.up_proj, 1.mlp.experts.1.up_proj, 1.mlp.experts.2.up_proj, 1.mlp.experts.3.up_proj, 1.mlp.experts.0.down_proj, 1.mlp.experts.1.down_proj, 1.mlp.experts.2.down_proj, 1.mlp.experts.3.down_proj""",
    )


def test_latent_attention_and_shared_experts():
    assert_expected_inline(
        groups("deepseek"),
        """\
1.self_attn.q_a_proj, 1.self_attn.kv_a_proj_with_mqa
1.self_attn.q_b_proj
1.self_attn.kv_b_proj
1.self_attn.o_proj
1.mlp.gate
1.mlp.experts.0.gate_proj, 1.mlp.experts.1.gate_proj, 1.mlp.experts.2.gate_proj, 1.mlp.experts.3.gate_proj, 1.mlp.experts.0.up_proj, 1.mlp.experts.1.up_proj, 1.mlp.experts.2.up_proj, 1.mlp.experts.3.up_proj, 1.mlp.experts.0.down_proj, 1.mlp.experts.1.down_proj, 1.mlp.experts.2.down_proj, 1.mlp.experts.3.down_proj
1.mlp.shared_experts.gate_proj, 1.mlp.shared_experts.up_proj
1.mlp.shared_experts.down_proj""",
    )


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_what_reads_another_value_stands_alone(family):
    found = fused_layers(sites(gm := captured(family)), layers(gm))
    assert {len(group) for group in found if not any("attn" in fqn for fqn in group)} == {1}
