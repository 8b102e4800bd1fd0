"""Regular expressions, kinds and parts of names: what each matches, and what it leaves alone; texts of bad ones."""

import pytest

from graphq.errors import SpecError
from graphq.match import Kind, Layer, Part, Regex, parse_match

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
    assert parse_match("~a#0") == Part("a#0")  # a part of a name has no blocks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("re:", "re: an empty pattern matches every layer; write re:.*"),
        ("re:(", "re:(: missing ), unterminated subpattern at position 0"),
        ("re:*a", "re:*a: nothing to repeat at position 0"),
        ("kind:Linear", "kind: 'Linear' is not one of linear, conv1d, conv2d, embedding"),
        ("~", "'' is no part of a layer's name"),
        ("~\n", "'\\n' is no part of a layer's name"),
    ],
)
def test_bad_texts(text, message):
    with pytest.raises(SpecError) as caught:
        parse_match(text)
    assert caught.value.problems == (message,)
