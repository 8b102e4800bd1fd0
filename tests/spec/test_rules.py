"""The text forms of formats and matches, illegal states, and which rule decides for which layer."""

import contextlib
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.spec.formats import Int
from graphq.spec.match import (
    MAX_BLOCK,
    Blocks,
    Exact,
    Glob,
    Layer,
    Name,
    Unnamed,
    parse_blocks,
    parse_match,
)
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import MAX_GROUP_SIZE, PerChannel, PerGroup, PerTensor, PerToken, Quant, parse_quant
from graphq.spec.rules import Algorithm, Rule, Spec, resolve

BITS = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])
FORMATS = st.builds(Int, BITS, st.just(True), st.sampled_from(["max", "half", "by_sign"])) | st.builds(
    Int, BITS, st.just(False)
)
SIZES = st.builds(PerGroup, st.integers(1, MAX_GROUP_SIZE))
QUANTS = st.builds(Quant, FORMATS, st.just(PerTensor()) | st.just(PerChannel()) | SIZES, st.booleans()) | st.builds(
    Quant, FORMATS, st.just(PerToken()), st.just(True)
)
PATHS = st.from_regex(r"[\w-]+(\.[\w-]+)*", fullmatch=True)
INDICES = st.none() | st.lists(st.integers(0, MAX_BLOCK), min_size=1, unique=True).map(tuple)
RUNS = st.builds(lambda first, size: tuple(range(first, first + size)), st.integers(0, 90), st.integers(1, 9))
PATTERNS = st.text(st.characters() | st.sampled_from("*?[].=#")).filter(
    lambda text: bool(set(text) & set("*?[")) and "#" not in text and not text.startswith("=")
)
MATCHES = (
    st.builds(Name, PATHS.filter(lambda path: path != "blocks"), INDICES | RUNS)
    | st.builds(Exact, PATHS)
    | st.builds(Glob, PATTERNS)
    | st.builds(Blocks, INDICES | RUNS)
)


@given(QUANTS)
def test_a_format_reads_as_it_prints(quant):
    assert parse_quant(str(quant)) == quant


@given(MATCHES)
def test_a_match_reads_as_it_prints(match):
    assert parse_match(str(match)) == match


@given(st.text() | st.from_regex(r"(int\d+|blocks|\w+|=)[/#.*a-z0-9-]*", fullmatch=True))
def test_reading_any_text_raises_nothing_but_spec_errors(text):
    for read in (parse_quant, parse_match, parse_blocks):
        with contextlib.suppress(SpecError):
            read(text)


@pytest.mark.parametrize(
    ("text", "quant"),
    [
        ("int4/asym/g128", Quant(Int(4, symmetric=False), PerGroup(128))),
        ("int8/token/dynamic", Quant(Int(8), PerToken(), dynamic=True)),
        ("int8/half/channel", Quant(Int(8, divisor="half"), PerChannel())),
        ("int16/by_sign/tensor/dynamic", Quant(Int(16, divisor="by_sign"), PerTensor(), dynamic=True)),
    ],
)
def test_formats(text, quant):
    assert parse_quant(text) == quant
    assert str(quant) == text


@pytest.mark.parametrize(
    ("text", "match", "printed"),
    [
        ("mlp.down_proj", Name("mlp.down_proj"), "mlp.down_proj"),
        ("down_proj#0-7", Name("down_proj", (0, 7)), "down_proj#0-7"),
        ("down_proj#0..3-28..31-5", Name("down_proj", (0, 1, 2, 3, 28, 29, 30, 31, 5)), "down_proj#0..3-28..31-5"),
        ("down_proj#2-2-3-4", Name("down_proj", (2, 3, 4)), "down_proj#2..4"),
        ("=lm_head", Exact("lm_head"), "=lm_head"),
        ("=blocks", Exact("blocks"), "=blocks"),
        ("*.down_proj", Glob("*.down_proj"), "*.down_proj"),
        ("blocks", Blocks(), "blocks"),
        ("blocks#1", Blocks((1,)), "blocks#1"),
    ],
)
def test_matches(text, match, printed):
    assert parse_match(text) == match
    assert str(match) == printed


WEIGHT = Quant(Int(8), PerChannel())
NO_SCALES = (
    "does not say how many scales there are; write int8 with /tensor, /channel, /token, /g<size> or /<rows>x<columns>"
)
FORM = (
    "is not a format; write <format>[/<granularity>][/dynamic or /<method>], such as int4/asym/g128,"
    " int8/token/dynamic, float8_e4m3fn/channel or mxfp4"
)
NO_BLOCKS = "are not a list of different numbers from 0 to 9999"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int(1), "bits: 1 is not one of 2 to 8 or 16"),
        (lambda: Int(9), "bits: 9 is not one of 2 to 8 or 16"),
        (lambda: Int(True), "bits: True is not one of 2 to 8 or 16"),
        (lambda: Int(4.0), "bits: 4.0 is not one of 2 to 8 or 16"),  # pyright: ignore[reportArgumentType]
        (lambda: Int(8, "no"), "symmetric: 'no' is not true or false"),  # pyright: ignore[reportArgumentType]
        (lambda: Int(8, divisor="third"), "divisor: 'third' is not one of max, half, by_sign"),  # pyright: ignore[reportArgumentType]
        (lambda: Int(8, False, "half"), "divisor: half is a rule for symmetric scales; this format is asymmetric"),
        (lambda: PerGroup(0), "group_size: 0 is not a positive integer"),
        (lambda: PerGroup(10**9), "group_size: 1000000000 is not a positive integer"),
        (lambda: Quant(Int(8), PerToken()), "int8/token: one scale per token exists only at run time; write int8/token/dynamic"),
        (lambda: parse_quant("fp8"), f"'fp8' {FORM}"),
        (lambda: parse_quant("int8"), f"'int8' {NO_SCALES}"),
        (lambda: parse_quant("int8/channel\n"), f"'int8/channel\\n' {FORM}"),
        (Plan, "a plan quantizes a weight or an input; to keep a layer float, write a keep-float rule"),
        (lambda: Plan(Quant(Int(16), PerChannel())), "weight: int16/channel has 16 bits; weights hold 2 to 8"),
        (lambda: Plan(parse_quant("int8/token/dynamic")), "weight: int8/token/dynamic is dynamic; a weight's scale is known when it is compiled"),
        (lambda: Plan(input=parse_quant("int8/8x8/dynamic")), "input: int8/8x8/dynamic: activations have one scale per tensor, per token or per group"),
        (lambda: Plan(input=parse_quant("int5/tensor")), "input: int5/tensor has 5 bits; activations hold 4, 6, 8 or 16"),
        (lambda: Name("a..b"), "'a..b' is not a layer name: write dotted segments, such as mlp.down_proj"),
        (lambda: Name("blocks"), "blocks stands for all layers of the repeated blocks; write *.blocks.* for layers below that name"),
        (lambda: Name("a", ()), f"a: block indices () {NO_BLOCKS}"),
        (lambda: Name("a", (1, 1)), f"a: block indices (1, 1) {NO_BLOCKS}"),
        (lambda: Blocks((-1,)), f"blocks: block indices (-1,) {NO_BLOCKS}"),
        (lambda: Blocks((10000,)), f"blocks: block indices (10000,) {NO_BLOCKS}"),
        (lambda: Exact("a b"), "'a b' is not a layer name: write dotted segments, such as model.layers.0.mlp.down_proj"),
        (lambda: Glob("a"), "'a' has no wildcard; write it as a name"),
        (lambda: parse_match("*.a#0-1"), "'*.a#0-1': a pattern takes neither =, ~, re:, kind: or linear: nor #blocks; write a name, such as down_proj#0-1"),
        (lambda: Glob("=*"), "'=*': a pattern takes neither =, ~, re:, kind: or linear: nor #blocks; write a name, such as down_proj#0-1"),
        (lambda: parse_match("a#"), "#: '' is not a block index; write #2-7 for blocks 2 and 7, #2..7 for 2 to 7"),
        (lambda: parse_match("a#0,1"), "#0,1: '0,1' is not a block index; write #2-7 for blocks 2 and 7, #2..7 for 2 to 7"),
        (lambda: parse_match("a#3..2"), "#3..2: the range 3..2 is empty; write #2..3"),
        (lambda: Algorithm("AWQ"), "'AWQ' is not an algorithm's name: write lower-case letters, such as awq"),
        (lambda: Algorithm("awq", (("a", 1), ("a", 2))), "awq: an option is given twice"),
        (lambda: Algorithm("awq", (("a", float("nan")),)), "awq: a: nan is not a finite number"),
        (lambda: Spec(()), "the spec has no rules: it quantizes nothing"),
    ],
)  # fmt: skip
def test_illegal_states_cannot_be_made(make, message):
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        make()


def layer(fqn: str, block: int | None = None, kind: Any = "linear", named_only: Any = "") -> Layer:
    return Layer(fqn, kind, (8, 8), block, named_only)


LAYERS = {
    one.fqn: one
    for one in (
        layer("embed_tokens", kind="embedding", named_only="embedding"),
        layer("layers.0.attn.o_proj", 0),
        layer("layers.0.mlp.gate_proj", 0),
        layer("layers.1.attn.o_proj", 1),
        layer("layers.1.mlp.gate", 1, named_only="router"),
        layer("layers.1.mlp.experts.0.gate_proj", 1, kind="expert"),
        layer("pooler", named_only="outside of the repeated blocks"),
        layer("lm_head", named_only="output head"),
    )
}
IN_BLOCKS = [
    "layers.0.attn.o_proj",
    "layers.0.mlp.gate_proj",
    "layers.1.attn.o_proj",
    "layers.1.mlp.experts.0.gate_proj",
]


@pytest.mark.parametrize(
    ("match", "hits"),
    [
        ("blocks", IN_BLOCKS),
        ("blocks#0", IN_BLOCKS[:2]),
        ("gate_proj", [IN_BLOCKS[1], IN_BLOCKS[3]]),
        ("mlp.gate_proj", [IN_BLOCKS[1]]),
        ("o_proj#1", ["layers.1.attn.o_proj"]),
        ("experts", [IN_BLOCKS[3]]),
        ("mlp", [IN_BLOCKS[1], IN_BLOCKS[3]]),  # the router below it is not named
        ("gate", ["layers.1.mlp.gate"]),
        ("lm_head", ["lm_head"]),
        ("=lm_head", ["lm_head"]),
        ("*lm_head", ["lm_head"]),
        ("*", IN_BLOCKS),
        ("*.0.*", [IN_BLOCKS[0], IN_BLOCKS[1], IN_BLOCKS[3]]),
        ("*_proj", IN_BLOCKS),
        ("pooler", ["pooler"]),
    ],
)
def test_what_a_match_means(match, hits):
    resolved, notes = resolve(Spec((Rule(parse_match(match), Plan(WEIGHT)),)), LAYERS)
    assert [fqn for fqn, one in resolved.items() if one.decision == Plan(WEIGHT)] == hits
    assert notes == ()


def test_blocks_are_all_layers_of_a_model_without_blocks():
    layers = {"a": layer("a"), "b": layer("b"), "head": layer("head", named_only="output head")}
    resolved, _ = resolve(Spec((Rule(Blocks(), Plan(WEIGHT)),)), layers)
    assert [fqn for fqn, one in resolved.items() if one.rule] == ["a", "b"]


def test_the_last_rule_wins_whole():
    first = Rule(Blocks(), Plan(WEIGHT, parse_quant("int8/token/dynamic")))
    second = Rule(Name("o_proj"), Plan(parse_quant("int4/g8")))
    last = Rule(Name("o_proj", (1,)), KeepFloat("why"))
    resolved, _ = resolve(Spec((first, second, last)), LAYERS)
    assert {fqn: str(one.decision) for fqn, one in resolved.items()} == {
        "embed_tokens": "float (embedding: quantized only when a rule names it)",
        "layers.0.attn.o_proj": "weight int4/g8",
        "layers.0.mlp.gate_proj": "weight int8/channel, input int8/token/dynamic",
        "layers.1.attn.o_proj": "float (why)",
        "layers.1.mlp.gate": "float (router: quantized only when a rule names it)",
        "layers.1.mlp.experts.0.gate_proj": "weight int8/channel, input int8/token/dynamic",
        "pooler": "float (outside of the repeated blocks: quantized only when a rule names it)",
        "lm_head": "float (output head: quantized only when a rule names it)",
    }
    assert resolved["layers.1.attn.o_proj"].rule is last
    assert resolved["pooler"].rule is None


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("gate_prj", "here: gate_prj matches no layer; did you mean gate_proj?"),
        ("atn.o_proj", "here: atn.o_proj matches no layer; did you mean attn.o_proj?"),
        ("zzz", "here: zzz matches no layer"),
        ("=o_proj", "here: =o_proj matches no layer; did you mean o_proj?"),
        ("mlp.gate_proj#1", "here: mlp.gate_proj#1 matches no layer; other blocks have it"),
        ("o_proj#1-2", "here: o_proj#1-2: block 2 does not exist: this model has blocks 0 to 1; #a-b is a list, write #a..b for a range"),
        ("blocks#0..3", "here: blocks#0..3: block 2, 3 does not exist: this model has blocks 0 to 1; #a-b is a list, write #a..b for a range"),
    ],
)  # fmt: skip
def test_a_rule_that_matches_nothing(match, message):
    rules = (Rule(Blocks(), Plan(WEIGHT)), Rule(parse_match(match), KeepFloat("why"), "here"))
    with pytest.raises(SpecError) as caught:
        resolve(Spec(rules), LAYERS)
    assert caught.value.problems == (message,)


FUSED = Unnamed(Layer("layers.0.attn.qkv", "linear", (3, 8, 8), block=0), "multiplied by aten.bmm; no rule can name it")
KEYS = Unnamed(Layer("layers.0.attn.keys", "linear", (8, 8), block=0), "multiplied by aten.mm behind aten.mul")


@pytest.mark.parametrize(
    ("match", "hint"),
    [
        ("qkv", "; layers.0.attn.qkv is multiplied by aten.bmm; no rule can name it"),
        ("=layers.0.attn.keys", "; layers.0.attn.keys is multiplied by aten.mm behind aten.mul"),
        ("re:.*attn.[qk]", "; layers.0.attn.qkv is multiplied by aten.bmm; no rule can name it (and 1 more)"),
        ("qkv#1", ""),
        ("gate_prj", "; did you mean gate_proj?"),
    ],
)
def test_a_rule_for_what_is_no_layer_says_what_that_is(match, hint):
    rule = Rule(parse_match(match), Plan(WEIGHT), "here")
    with pytest.raises(SpecError) as caught:
        resolve(Spec((rule,)), LAYERS, [FUSED, KEYS])
    assert caught.value.problems == (f"here: {match} matches no layer{hint}",)
    lenient = replace(rule, may_match_nothing=True)
    told = hint if "did you mean" not in hint else ""
    if not match.startswith("="):
        assert resolve(Spec((lenient,)), LAYERS, [FUSED, KEYS])[1] == (f"here: {match} matches no layer{told}",)
    keeps = Rule(parse_match(match), KeepFloat("why"), "here", may_match_nothing=True)
    assert resolve(Spec((keeps,)), LAYERS, [FUSED, KEYS])[1] == (f"here: {match} matches no layer",)


def test_a_pattern_may_match_nothing_where_its_rule_says_so():
    rules = (
        Rule(Blocks(), Plan(WEIGHT)),
        Rule(Glob("*.vision.*"), KeepFloat("why"), "rules[1]", may_match_nothing=True),
    )
    resolved, notes = resolve(Spec(rules, notes=("before",)), LAYERS)
    assert notes == ("before", "rules[1]: *.vision.* matches no layer")
    assert resolved["layers.0.attn.o_proj"].decision == Plan(WEIGHT)


def test_exclusive_rules_may_not_claim_one_layer():
    rules = [
        Rule(parse_match(match), Plan(WEIGHT), match, exclusive="x") for match in ("o_proj#0", "gate_proj", "attn")
    ]
    with pytest.raises(SpecError) as caught:
        resolve(Spec((*rules, Rule(Name("o_proj"), KeepFloat("why")))), LAYERS)
    assert caught.value.problems == ("attn: attn and o_proj#0: o_proj#0 both claim layers.0.attn.o_proj",)
    others = [Rule(rule.match, rule.decision, rule.source, exclusive=rule.source) for rule in rules]
    resolve(Spec(tuple(others)), LAYERS)


def test_all_problems_are_reported_at_once():
    rules = tuple(Rule(Name(name), Plan(WEIGHT), f"rules[{i}]") for i, name in enumerate(("zzz", "o_proj", "yyy")))
    with pytest.raises(SpecError) as caught:
        resolve(Spec(rules), LAYERS)
    assert caught.value.problems == ("rules[0]: zzz matches no layer", "rules[2]: yyy matches no layer")
