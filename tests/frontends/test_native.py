"""The native form: its canonical text, what it refuses, and that reading undoes printing."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import load_spec, native, print_spec
from graphq.frontends.yaml_text import read_text
from graphq.spec.activations import ActivationRule
from graphq.spec.attention import AttentionOperands
from graphq.spec.folds import EVERYWHERE, SUBGRAPHS, Folds, kinds_among
from graphq.spec.formats import Int, parse_format
from graphq.spec.match import KINDS, Blocks, Exact, Glob, Kind, Name, Part, Regex
from graphq.spec.plan import ACTIVATION_BITS, KeepFloat, Plan
from graphq.spec.quant import PerChannel, PerGroup, PerTensor, PerToken, Quant, parse_quant
from graphq.spec.rules import Algorithm, Rule, Run, Spec

CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "native"


def parse(text):
    return native.parse(read_text(text, "f.yaml"))


def formats(bits):
    symmetric = st.builds(Int, bits, st.just(True), st.sampled_from(["max", "half", "by_sign"]))
    return symmetric | st.builds(Int, bits, st.just(False))


WEIGHTS = st.builds(
    Quant,
    formats(st.integers(2, 8)),
    st.just(PerTensor()) | st.just(PerChannel()) | st.builds(PerGroup, st.integers(1, 4096)),
)
TOKEN = st.builds(Quant, formats(st.sampled_from(ACTIVATION_BITS)), st.just(PerToken()), st.just(True))
INPUTS = TOKEN | st.builds(Quant, formats(st.sampled_from(ACTIVATION_BITS)), st.just(PerTensor()), st.booleans())
TENSORS = st.builds(
    Quant, st.sampled_from([parse_format(f) for f in ("uint8", "int8", "int8/asym", "uint16")]), st.just(PerTensor())
)
ACTIVATIONS = st.builds(
    ActivationRule,
    st.none() | TENSORS,
    st.lists(st.text(), max_size=2).map(tuple),
    st.text() | st.just("*"),
)
PLANS = (
    st.builds(Plan, WEIGHTS, st.none() | INPUTS, st.none() | TENSORS)
    | st.builds(Plan, st.none(), INPUTS)
    | st.builds(Plan, WEIGHTS, INPUTS)
)
PATHS = st.from_regex(r"[\w-]+(\.[\w-]+)*", fullmatch=True)
INDICES = st.none() | st.lists(st.integers(0, 70), min_size=1, unique=True).map(tuple)
MATCHES = (
    st.builds(Name, PATHS.filter(lambda path: path != "blocks"), INDICES)
    | st.builds(Exact, PATHS)
    | st.builds(Glob, st.text().map(lambda text: "*" + text.replace("#", "?")))
    | st.builds(Blocks, INDICES)
    | st.builds(
        Regex, st.text(min_size=1).map(re.escape) | st.sampled_from([".*", "(a|b)$", " re:x", "#0", "~", "a: b"])
    )
    | st.builds(Kind, st.sampled_from(KINDS))
    | st.builds(Part, st.text(min_size=1).filter(str.isprintable))
)
REASONS = st.text() | st.sampled_from(["true", "yes", "~", "", "1", native.KEPT_BY_RULE])
RULES = st.builds(
    Rule,
    MATCHES,
    PLANS | st.builds(KeepFloat, REASONS),
    may_match_nothing=st.booleans(),
    exclusive=st.just("") | st.text(),
)
PATTERNS = st.text(min_size=1).filter(lambda text: " " not in text and text.isprintable())
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
ALGORITHMS = st.builds(
    Algorithm,
    st.from_regex(r"[a-z][a-z0-9_-]*", fullmatch=True),
    st.dictionaries(st.text().filter(lambda name: name not in ("match", "folds")), SCALARS, max_size=3).map(
        lambda options: tuple(options.items())
    ),
    match=st.lists(MATCHES, max_size=3).map(tuple),
    folds=st.just(EVERYWHERE)
    | st.builds(
        lambda kinds, include, exclude: Folds(kinds_among(kinds), tuple(include), tuple(exclude)),
        st.lists(st.sampled_from(SUBGRAPHS), min_size=1),
        st.lists(PATTERNS, min_size=1, max_size=3),
        st.lists(PATTERNS, max_size=3),
    ),
)
RUNS = st.builds(
    Run,
    *3 * [st.text()],
    st.none() | st.integers(1, 2**63 - 1),
    st.none() | st.integers(2, 2**63 - 1),
    st.none() | st.integers(1, 2**63 - 1),
    st.none() | st.integers(0, 2**63 - 1),
)
QUANT_OF_Q = st.sampled_from(["int8/head", "float8_e4m3fn/tensor", "int4/asym/token/dynamic", "int8/channel/ema"]).map(
    parse_quant
)
QUANT_OF_P = st.sampled_from(["uint8/tensor", "int8/head", "int8/token/dynamic"]).map(parse_quant)
SPECS = st.builds(
    Spec,
    st.lists(RULES, min_size=1, max_size=4).map(tuple),
    st.lists(ALGORITHMS, max_size=2).map(tuple),
    st.none() | WEIGHTS | INPUTS,
    pipeline=st.sampled_from(["sequential", "independent"]),
    prefix=st.sampled_from(["quantized", "float"]),
    run=RUNS,
    activations=st.lists(ACTIVATIONS, max_size=3).map(tuple),
    profile=st.just("") | st.text(min_size=1),
    attention=st.none() | st.builds(AttentionOperands, QUANT_OF_Q, st.none() | QUANT_OF_Q, p=st.none() | QUANT_OF_P),
)


@given(SPECS)
@example(Spec((Rule(Glob("*\x85"), KeepFloat("of\u2028two\nlines ")),)))
def test_reading_undoes_printing(spec):
    assert parse(print_spec(spec)) == spec
    assert print_spec(parse(print_spec(spec))) == print_spec(spec)


GOLDEN = {
    "deepseek_w4a8_ascend": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
    input: int8/tensor
  - match: mlp#0..2
    weight: int8/channel
    input: int8/token/dynamic
  - match: experts
    weight: int4/channel
    input: int8/token/dynamic
  - match: kv_b_proj
    float: MLA absorbs it
algorithms:
  - smooth-quant:
      alpha: 0.9
      folds:
        kinds:
          - norm-linear
run:
  target: ascend
""",
    "w4a16": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/g128
""",
    "w8a8_dynamic": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
    input: int8/token/dynamic
cache: int8/token/dynamic
""",
    "w8a8_static": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
    input: int8/asym/tensor
""",
    "mixed": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/g128
    input: int8/token/dynamic
  - match: down_proj#0-1-5
    weight: int8/asym/g128
  - match: self_attn.o_proj
    float: sensitive
  - match: '*.vision_tower.*'
    float: true
  - match: =lm_head
    weight: int8/channel
algorithms:
  - rtn
""",
    "gptq_w4a16": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/g128
algorithms:
  - gptq
""",
    "awq_gptq": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/g128
  - match: mlp
    weight: int8/channel
algorithms:
  - awq:
      match: self_attn
  - gptq:
      match: mlp
""",
    "smooth_quant_w8a8": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
    input: int8/tensor
algorithms:
  - smooth-quant:
      alpha: 0.5
  - gptq
""",
    "rotate_w4a4": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/channel
    input: int4/token/dynamic
algorithms:
  - rotate:
      r4: true
  - gptq
""",
    "served_w4a16_w8a8": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/g128
  - match: down_proj
    weight: int8/channel
    input: int8/token/dynamic
run:
  target: compressed-tensors
""",
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples(path):
    spec = load_spec(path)
    assert print_spec(spec) == GOLDEN[path.stem]
    assert parse(GOLDEN[path.stem]) == spec
    assert (spec.dialect, spec.notes) == ("native", ())


def test_the_documentation_s_example_is_canonical():
    text = Path(CONFIGS.parents[2] / "docs" / "specs.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert print_spec(parse(text)) == text


def test_all_that_can_be_written():
    text = """\
graphq: 1
weight: int8/half/channel
rules:
  - match: '*.a'
    float: true
    may_match_nothing: false
  - match: q_proj
    float: by hand
    may_match_nothing: true
  - {match: b, input: int8/tensor, exclusive: pair}
algorithms:
  - smoothquant: {alpha: 0.5, match: [self_attn, '*.up'], on: true}
  - gptq: {match: mlp#0}
  - awq
pipeline: independent
prefix: float
"""
    spec = parse(text.replace("on:", "'on':"))
    assert spec == Spec(
        (
            Rule(Blocks(), Plan(parse_quant("int8/half/channel"))),
            Rule(Glob("*.a"), KeepFloat("a rule keeps it float")),
            Rule(Name("q_proj"), KeepFloat("by hand"), may_match_nothing=True),
            Rule(Name("b"), Plan(input=parse_quant("int8/tensor")), exclusive="pair"),
        ),
        (
            Algorithm("smoothquant", (("alpha", 0.5), ("on", True)), match=(Name("self_attn"), Glob("*.up"))),
            Algorithm("gptq", match=(Name("mlp", (0,)),)),
            Algorithm("awq"),
        ),
        pipeline="independent",
        prefix="float",
    )
    assert [rule.source for rule in spec.rules] == [
        *("weight (line 2)", "rules[0] (line 4)", "rules[1] (line 7)", "rules[2] (line 10)")
    ]
    assert [algorithm.source for algorithm in spec.algorithms] == [f"algorithms[{i}] (line {12 + i})" for i in range(3)]
    assert load_spec({"graphq": 1, "input": "int8/tensor"}).rules[0].source == "input"


def test_activations_that_can_be_written():
    text = """\
graphq: 1
weight: int8/channel
input: uint8/tensor
output: uint16/tensor
activations:
  - quant: uint8/tensor
  - {quant: uint16/tensor/percentile99, op: [Softmax, Sigmoid]}
  - {float: true, op: Add, module: 'head.*'}
  - {float: true, module: ''}
profile: qnn-htp
"""
    spec = parse(text)
    assert spec.rules[0].decision == Plan(
        parse_quant("int8/channel"), parse_quant("uint8/tensor"), parse_quant("uint16/tensor")
    )
    assert spec.activations == (
        ActivationRule(parse_quant("uint8/tensor")),
        ActivationRule(parse_quant("uint16/tensor/percentile99"), ("Softmax", "Sigmoid")),
        ActivationRule(None, ("Add",), "head.*"),
        ActivationRule(None, (), ""),
    )
    assert spec.profile == "qnn-htp"
    assert [rule.source for rule in spec.activations] == [f"activations[{i}] (line {6 + i})" for i in range(4)]
    assert parse(print_spec(spec)) == spec
    short = parse("graphq: 1\nweight: int8/channel\nactivations: uint8/tensor")
    assert short.activations == (ActivationRule(parse_quant("uint8/tensor")),)
    assert short.activations[0].source == "activations (line 3)"


@pytest.mark.parametrize(("keep", "expected"), [("float: true", True), ("weight: int8/channel", False)])
def test_only_a_pattern_that_keeps_float_may_match_nothing(keep, expected):
    rules = parse(f"graphq: 1\nrules: [{{match: '*.a', {keep}}}, {{match: a, {keep}}}, {{match: =a, {keep}}}]").rules
    assert [rule.may_match_nothing for rule in rules] == [expected, False, False]


NO_SCALES = (
    "does not say how many scales there are; write int8 with /tensor, /channel, /token, /g<size> or /<rows>x<columns>"
)
FORM = (
    "is not a format; write <format>[/<granularity>][/dynamic or /<method>], such as int4/asym/g128,"
    " int8/token/dynamic, float8_e4m3fn/channel or mxfp4"
)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("graphq: 1", ["rules: is missing: write rules, or weight and input for all blocks"]),
        ("graphq: 2\nweight: int8/channel", ["1:graphq: 2 is not a version of the form that this graphq reads: write 1"]),
        ("graphq: '1'\nweight: int8/channel", ["1:graphq: '1' is not an integer"]),
        ("graphq: 1\nrules: []", ["2:rules: is empty: the spec quantizes nothing"]),
        ("graphq: 1\nrules: blocks", ["2:rules: 'blocks' is not a list"]),
        ("graphq: 1\nrules:\n- blocks", ["3:rules[0]: 'blocks' is not a mapping with match and weight, input or float"]),
        ("graphq: 1\nweights: int8/channel", [
            "2:weights: unknown key; did you mean weight?",
            "rules: is missing: write rules, or weight and input for all blocks",
        ]),
        ("graphq: 1\nweight: int8", [f"2:weight: 'int8' {NO_SCALES}"]),
        ("graphq: 1\nweight: 8", ["2:weight: 8 is not a string"]),
        ("graphq: 1\nweight: int1/channel", ["2:weight: bits: 1 is not one of 2 to 8 or 16"]),
        ("graphq: 1\nweight: int9/channel", ["2:weight: bits: 9 is not one of 2 to 8 or 16"]),
        ("graphq: 1\nweight: int8/g0", ["2:weight: group_size: 0 is not a positive integer"]),
        ("graphq: 1\ninput: int8/token", ["2:input: int8/token: one scale per token exists only at run time; write int8/token/dynamic"]),
        ("graphq: 1\ninput: int8/channel", ["2:input: int8/channel: activations have one scale per tensor, per token or per group"]),
        ("graphq: 1\nrules:\n- {match: a, weight: int16/channel}", ["3:rules[0].weight: int16/channel has 16 bits; weights hold 2 to 8"]),
        ("graphq: 1\nrules:\n- match: a", ["3:rules[0]: decides nothing: write weight, input or float"]),
        ("graphq: 1\nrules:\n- weight: int8/channel", ["3:rules[0].match: is missing"]),
        ("graphq: 1\nrules:\n- match: a\n  float: false", ["4:rules[0].float: False is neither true nor the reason"]),
        ("graphq: 1\nrules:\n- match: a\n  float: true\n  input: int8/tensor", ["5:rules[0].input: the rule keeps layers float: write either this or float"]),
        ("graphq: 1\nrules:\n- match: a b\n  float: true", ["3:rules[0].match: 'a b' is not a layer name: write dotted segments, such as mlp.down_proj"]),
        ("graphq: 1\nrules:\n- match: a#0-x\n  float: true", ["3:rules[0].match: #0-x: 'x' is not a block index; write #2-7 for blocks 2 and 7, #2..7 for 2 to 7"]),
        ("graphq: 1\nrules:\n- match: a\n  float: true\n  may_match_nothing: 'no'", ["5:rules[0].may_match_nothing: 'no' is not true or false"]),
        ("graphq: 1\nweight: int8/channel\nrun: {samples: 0, seed: a, sed: 1, sequence_length: 1, model: 3, batches: 1.5}", [
            "3:run.sed: unknown key; did you mean seed?",
            "3:run.model: 3 is not a string",
            "3:run.batches: 1.5 is not an integer",
            "3:run.seed: 'a' is not an integer",
            "3:run.samples: 0 is not a whole number from 1",
            "3:run.sequence_length: 1 is not a whole number from 2",
        ]),
        ("graphq: 1\nweight: int8/channel\nalgorithms: gptq", ["3:algorithms: 'gptq' is not a list"]),
        ("graphq: 1\nweight: int8/channel\nalgorithms: [GPTQ, 3, {a: 1}, {a: {b: [1]}}, {a: {}, b: {}}]", [
            "3:algorithms[0]: 'GPTQ' is not an algorithm's name: write lower-case letters, such as awq",
            "3:algorithms[1]: 3 is neither a name nor a mapping of one name to its options",
            "3:algorithms[2].a: 1 is not a mapping",
            "3:algorithms[3].a.b: a list is not a single value",
            "3:algorithms[4]: a mapping is neither a name nor a mapping of one name to its options",
        ]),
        ("graphq: 1\nweight: int8/channel\nalgorithms:\n- a: {b: .nan}", ["4:algorithms[0].a: b: nan is not a finite number"]),
        ("graphq: 1\nweight: int32/channel", ["2:weight: bits: 32 are those of biases, which a profile decides on; write 2 to 8 or 16"]),
        ("graphq: 1\noutput: uint8/tensor", ["2:output: is of layers with a weight or an input: write these, too"]),
        ("graphq: 1\nweight: int8/channel\noutput: int8/token/dynamic", ["3:output: int8/token/dynamic: tensors between ops have one scale, from calibration; write int8/tensor"]),
        ("graphq: 1\nrules:\n- {match: a, float: true, output: uint8/tensor}", ["3:rules[0].output: the rule keeps layers float: write either this or float"]),
        ("graphq: 1\nrules:\n- {match: a, output: uint8/tensor}", ["3:rules[0]: decides nothing: write weight, input or float"]),
        ("graphq: 1\nweight: int8/channel\nprofile: 3\nactivations: 3", ["4:activations: 3 is not a list: a quant for all tensors, or a list of rules", "3:profile: 3 is not a string"]),
        ("graphq: 1\nweight: int8/channel\nactivations: int4/tensor", ["3:activations: int4/tensor: tensors between ops hold integers of 8 or 16 bits"]),
        ("graphq: 1\nweight: int8/channel\nactivations: []", ["3:activations: is empty; leave it out"]),
        ("graphq: 1\nweight: int8/channel\nactivations:\n- uint8/tensor\n- {op: Add}\n- {quant: uint8/tensor, float: true}\n- {quant: uint8, op: [1]}\n- {float: true, op: []}\n- {quant: uint8/channel}\n- {quant: uint8/tensor, kind: Add, module: 3}", [
            "4:activations[0]: 'uint8/tensor' is not a mapping with quant or float, and op or module",
            "5:activations[1]: decides nothing: write quant, or float: true",
            "6:activations[2]: write quant or float",
            "7:activations[3].op: a list is not the kind of an op, such as Softmax, or a list of them",
            "8:activations[4].op: a list is not the kind of an op, such as Softmax, or a list of them",
            "9:activations[5].quant: uint8/channel: tensors between ops have one scale, from calibration; write uint8/tensor",
            "10:activations[6].kind: unknown key",
            "10:activations[6].module: 3 is not a string",
        ]),
        ("graphq: 1\nweight: int8/chanel\ncache: fp8\nrules:\n- {match: a, flaot: true}\nweight: int8/tensor", [
            "6:weight: the key stands twice, first in line 2",
            f"2:weight: 'int8/chanel' {FORM}",
            "5:rules[0].flaot: unknown key; did you mean float?",
            "5:rules[0]: decides nothing: write weight, input or float",
            f"3:cache: 'fp8' {FORM}",
        ]),
    ],
)  # fmt: skip
def test_refused(text, problems):
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert [problem.removeprefix("f.yaml:") for problem in caught.value.problems] == problems
