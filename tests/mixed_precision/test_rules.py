"""A mix as few rules, which decide as the mix does."""

from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from graphq.mixed_precision.rules import compact_rules
from graphq.spec.match import Layer
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Spec, resolve

ROLES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.experts.0.down_proj", "down_proj")
LAYERS = {
    f"model.layers.{block}.{role}": Layer(f"model.layers.{block}.{role}", "linear", (8, 8), block)
    for block in range(4)
    for role in ROLES
} | {
    "model.embed_tokens": Layer("model.embed_tokens", "embedding", (8, 8), None, "embedding"),
    "lm_head": Layer("lm_head", "linear", (8, 8), None, "output head"),
}
DECISIONS = [Plan(parse_quant(text)) for text in ("int2/g64", "int4/g128", "int8/channel")]
FLOAT = KeepFloat("of all options best")


@given(st.dictionaries(st.sampled_from(list(LAYERS)), st.sampled_from([*DECISIONS, FLOAT]), min_size=1))
def test_they_decide_as_the_mix_does(mix):
    resolved, _ = resolve(Spec(compact_rules(mix, LAYERS)), LAYERS)
    for fqn, one in resolved.items():
        wanted = mix.get(fqn, FLOAT)
        assert isinstance(one.decision, KeepFloat) if isinstance(wanted, KeepFloat) else one.decision == wanted


def text(mix) -> str:
    return "\n".join(f"{rule.match}: {rule.decision}" for rule in compact_rules(mix, LAYERS))


def test_the_most_frequent_decision_is_that_of_all_blocks():
    mix = {fqn: DECISIONS[1] for fqn, layer in LAYERS.items() if layer.block is not None}
    mix |= {f"model.layers.{b}.self_attn.q_proj": DECISIONS[2] for b in (0, 1, 2)}
    mix |= {f"model.layers.{b}.self_attn.o_proj": FLOAT for b in range(4)}
    mix |= {"lm_head": DECISIONS[2]}
    assert_expected_inline(
        text(mix),
        """\
blocks: weight int4/g128
self_attn.q_proj#0..2: weight int8/channel
self_attn.o_proj: float (of all options best)
=lm_head: weight int8/channel""",
    )


def test_a_name_that_others_have_too_is_written_whole():
    mix = {fqn: DECISIONS[1] for fqn, layer in LAYERS.items() if layer.block is not None}
    mix |= {"model.layers.1.down_proj": DECISIONS[2]}
    assert_expected_inline(
        text(mix),
        """\
blocks: weight int4/g128
=model.layers.1.down_proj: weight int8/channel""",
    )
