"""Regular expressions, kinds and parts of names: what each matches, and what it leaves alone; texts of bad ones."""

import pytest

from graphq.errors import SpecError
from graphq.spec.match import KINDS, Exact, Kind, Layer, Linears, Part, Regex, parse_match
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec, resolve

LAYERS = {
    layer.fqn: layer
    for layer in (
        Layer("model.embed_tokens", "embedding", (8, 4), named_only="embedding"),
        Layer("model.layers.0.self_attn.q_proj", "linear", (4, 4), 0),
        Layer("model.layers.0.mlp.gate", "linear", (2, 4), 0, named_only="router"),
        Layer("model.layers.0.mlp.experts.0.up_proj", "expert", (4, 4), 0),
        Layer("model.layers.1.conv", "conv2d", (4, 4, 3, 3), 1),
        Layer("model.layers.1.c_attn", "conv1d", (4, 4), 1),
        Layer("lm_head", "linear", (8, 4), named_only="output head"),
    )
}
EMBED, Q, ROUTER, EXPERT, CONV, CONV1D, HEAD = LAYERS


@pytest.mark.parametrize(
    ("text", "matched"),
    [
        ("re:.*", [Q, EXPERT, CONV, CONV1D, HEAD]),
        ("re:.*mlp.*", [EXPERT]),
        (r"re:.*mlp\.gate$", [ROUTER]),
        ("re:mlp", []),  # from the start of the name
        ("re:model.embed_tokens", [EMBED]),
        ("re:lm_head", [HEAD]),
        ("re:model", [Q, EXPERT, CONV, CONV1D]),
        ("kind:linear", [Q, EXPERT, HEAD]),
        ("kind:conv2d", [CONV]),
        ("kind:conv1d", [CONV1D]),
        ("kind:embedding", [EMBED]),
        ("linear:*", [Q, EXPERT, HEAD]),
        ("linear:*mlp*", [EXPERT]),
        ("linear:*gate", [ROUTER]),  # its last segment is spelled
        ("linear:model*", [Q, EXPERT]),
        ("linear:* but *_proj", [HEAD]),
        ("linear:* but *q_proj lm_head", [EXPERT]),
        ("linear:*conv*", []),
        ("linear:*embed_tokens", []),
        ("linear:*.experts.[0-3].*", [EXPERT]),
        ("linear:*.experts.[!0-3].*", []),
        ("~mlp", [ROUTER, EXPERT]),
        ("~_proj", [Q, EXPERT]),
        ("~e", list(LAYERS)),
        ("~E", []),
    ],
)
def test_matches(text, matched):
    match = parse_match(text)
    assert [fqn for fqn, layer in LAYERS.items() if match.matches(layer)] == matched
    assert str(match) == text
    assert parse_match(str(match)) == match


def test_kinds_of_objects():
    assert parse_match("re:a") == Regex("a")
    assert parse_match("kind:linear") == Kind("linear")
    assert parse_match("linear:*a* but b* c") == Linears("*a*", ("b*", "c"))
    assert parse_match("~a#0") == Part("a#0")  # a part of a name has no blocks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear:", "linear: '' is not a pattern of layers' names, such as *.mlp.*"),
        ("linear:* but", "linear:* but: write linear:<pattern>, or linear:<pattern> but <pattern> <pattern>..."),
        ("linear:a b", "linear:a b: write linear:<pattern>, or linear:<pattern> but <pattern> <pattern>..."),
        ("linear:a but  b", "linear: '' is not a pattern of layers' names, such as *.mlp.*"),
        ("linear:a\n", "linear: 'a\\n' is not a pattern of layers' names, such as *.mlp.*"),
        ("re:", "re: an empty pattern matches every layer; write re:.*"),
        ("re:(", "re:(: missing ), unterminated subpattern at position 0"),
        ("re:*a", "re:*a: nothing to repeat at position 0"),
        ("kind:Linear", f"kind: 'Linear' is not one of {', '.join(KINDS)}"),
        ("~", "'' is no part of a layer's name"),
        ("~\n", "'\\n' is no part of a layer's name"),
    ],
)
def test_bad_texts(text, message):
    with pytest.raises(SpecError) as caught:
        parse_match(text)
    assert caught.value.problems == (message,)


W8 = Plan(parse_quant("int8/channel"))


def test_what_matches_nothing_is_told_in_few_lines():
    rules = [Rule(Exact(f"nosuch{i}"), W8, f"x{i}") for i in range(13)]
    with pytest.raises(SpecError) as caught:
        resolve(Spec((*rules, Rule(Linears("*.q_porj"), W8, "q"))), LAYERS)
    assert caught.value.problems[:2] == tuple(f"x{i}: =nosuch{i} matches no layer" for i in (0, 1))
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1] == "4 more rules match no layer, the last: linear:*.q_porj"
    with pytest.raises(SpecError, match=r"^q: linear:\*\.q_porj matches no layer; did you mean q_proj\?$"):
        resolve(Spec((Rule(Linears("*.q_porj"), W8, "q"),)), LAYERS)


def test_names_kept_float_that_no_layer_has_are_counted():
    keep = [Rule(Exact(f"norm{i}"), KeepFloat("FLOAT"), f"n{i}", may_match_nothing=True) for i in range(25)]
    _, notes = resolve(Spec((*keep, Rule(Exact(HEAD), W8))), LAYERS)
    assert notes == (
        *(f"n{i}: =norm{i} matches no layer" for i in range(9)),
        "16 more names match no layer; they would stay float",
    )
    _, notes = resolve(Spec((*keep[:10], Rule(Exact(HEAD), W8))), LAYERS)
    assert notes == tuple(f"n{i}: =norm{i} matches no layer" for i in range(10))
