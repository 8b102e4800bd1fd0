"""Recipes are written as they were read; other specs where a recipe can hold them, and refused where it cannot."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec, write_spec
from graphq.frontends.llm_compressor.presets import PRESETS
from graphq.frontends.llm_compressor.targets import write_target
from graphq.frontends.yaml_text import read_file
from graphq.spec.match import KINDS, Layer, parse_match
from graphq.spec.plan import Plan
from graphq.spec.rules import Spec
from tests.frontends.test_llm_compressor_keys import several
from tests.frontends.test_llmc import llama

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
W4, W8 = "weight: int4/half/g128/source", "weight: int8/half/channel/source"


def native(rules: list[str], rest: str = "") -> Spec:
    """Rules written ``match | decision``, and more of the native form."""
    lines = "".join(f"  - match: '{match}'\n    {decision}\n" for match, decision in (r.split(" | ") for r in rules))
    return load_spec(f"graphq: 1\nrules:\n{lines}{rest}")


def written(spec: Spec) -> str:
    return write_spec(spec, "llm-compressor")


def refused(spec: Spec) -> list[str]:
    with pytest.raises(SpecError) as caught:
        written(spec)
    return list(caught.value.problems)


def test_a_recipe_in_full():
    spec = native(
        [
            f"kind:linear | {W4.replace('/source', '/mse')}",
            "re:.*mlp.* | weight: float8_e4m3fn/128x128/source\n    input: float8_e4m3fn/g128/dynamic",
            "=lm_head | float: ignore",
        ],
        "algorithms:\n"
        "  - rotate: {kind: hadamard, r4: true, r2: false, block_size: 32}\n"
        "  - smooth-quant: {alpha: 0.7, statistic: range, match: ['re:.*q_proj$', 're:.*k_proj$', 're:.*v_proj$']}\n"
        "  - awq: {duo: null, clip: false, n_grid: 10}\n"
        "  - gptq: {scales: plan, act_order: none, block_size: 64, dampening: 0.1}\n"
        "pipeline: sequential\nprefix: float\ncache: float8_e4m3fn/tensor/ema0.1\n"
        "run: {model: m, calibration: d, samples: 5, sequence_length: 7}\n",
    )
    text = written(spec)
    assert (
        text
        == """\
# Keys beside the stage are arguments of llm-compressor's oneshot, which it does not read from a recipe.
model: m
dataset_path: d
num_calibration_samples: 5
max_seq_length: 7
pipeline: sequential
propagate_error: false
quant_stage:
  quant_modifiers:
    SpinQuantModifier:
      rotations:
        - R1
        - R4
      transform_type: hadamard
      transform_block_size: 32
    SmoothQuantModifier:
      smoothing_strength: 0.7
      mappings:
        - - - re:.*q_proj$
            - re:.*k_proj$
            - re:.*v_proj$
          - re:.*input_layernorm$
    AWQModifier:
      duo_scaling: both
      n_grid: 10
    GPTQModifier:
      block_size: 64
      dampening_frac: 0.1
      actorder: null
      config_groups:
        group_0:
          targets:
            - Linear
          weights:
            num_bits: 4
            type: int
            symmetric: true
            strategy: group
            group_size: 128
            dynamic: false
            observer: mse
        group_1:
          targets:
            - re:.*mlp.*
          weights:
            num_bits: 8
            type: float
            symmetric: true
            strategy: block
            block_structure:
              - 128
              - 128
            dynamic: false
          input_activations:
            num_bits: 8
            type: float
            symmetric: true
            strategy: group
            group_size: 128
            dynamic: true
      ignore:
        - lm_head
      kv_cache_scheme:
        num_bits: 8
        type: float
        symmetric: true
        strategy: tensor
        dynamic: false
        observer: minmax
        observer_kwargs:
          averaging_constant: 0.1
"""
    )
    again = load_spec(text)
    assert (again.rules, again.cache, again.run, again.prefix, again.pipeline) == (
        *(spec.rules, spec.cache, spec.run),
        *("float", "sequential"),
    )
    assert written(again) == text


def modifiers(spec: Spec) -> list[tuple[str, dict[str, Any]]]:
    """What is written: every modifier with its targets by group, and what it ignores."""
    import yaml

    recipe = yaml.safe_load(written(spec))
    found: list[tuple[str, dict[str, Any]]] = []
    for group in recipe["quant_stage"].values():
        for name, fields in group.items():
            groups = fields.get("config_groups", {})
            targets = {key: value["targets"] for key, value in groups.items()}
            found.append((name, {**targets, **({"ignore": fields["ignore"]} if "ignore" in fields else {})}))
    return found


RTN, GPTQ = "QuantizationModifier", "GPTQModifier"
PLAN = "algorithms: [{gptq: {scales: plan%s}}]\n"


@pytest.mark.parametrize(
    ("rules", "rest", "found"),
    [
        ([f"kind:linear | {W4}", f"re:b | {W8}", f"re:a | {W4}", f"=b | {W8}", f"=a | {W8}"], "", [
            (RTN, {"group_0": ["Linear", "re:a"], "group_1": ["re:b", "a", "b"]})]),
        # An order that targets in one modifier do not have takes another one.
        ([f"re:a | {W4}", f"re:b | {W8}"], "", [(RTN, {"group_0": ["re:a"]}), (RTN, {"group_0": ["re:b"]})]),
        ([f"re:a | {W4}", f"re:a | {W8}"], "", [(RTN, {"group_0": ["re:a"]}), (RTN, {"group_0": ["re:a"]})]),
        ([f"re:a | {W4}", f"kind:linear | {W8}"], "", [(RTN, {"group_0": ["re:a"]}), (RTN, {"group_0": ["Linear"]})]),
        # What is float and stands last is ignored; in between it is a group of its own, without weights.
        ([f"kind:linear | {W4}", "re:a | float: true", "=b | float: true"], "", [(RTN, {"group_0": ["Linear"], "ignore": ["re:a", "b"]})]),
        ([f"kind:linear | {W4}", "re:a | float: true", f"re:ab | {W8}"], "", [
            (RTN, {"group_0": ["Linear"], "ignore": ["re:a"]}), (RTN, {"group_0": ["re:ab"]})]),
        (["re:b | float: true", f"re:a | {W8}"], "", [(RTN, {"group_0": ["re:b"], "group_1": ["re:a"]})]),
        ([f"kind:linear | {W4}", "re:b | float: UNQUANTIZED"], "", [(RTN, {"group_0": ["Linear"], "group_1": ["re:b"]})]),
        ([f"re:a | {W4}", f"re:b | {W8}", "re:c | float: true"], "", [
            *((RTN, {"group_0": ["re:a"]}), (RTN, {"group_0": ["re:b"]})), (RTN, {"group_0": ["re:c"]})]),
        ([f"re:a | {W4}", "=c | float: true", f"re:b | {W8}", "=c | float: true"], "", [
            *((RTN, {"group_0": ["re:a"], "ignore": ["c"]}), (RTN, {"group_0": ["re:b"], "ignore": ["c"]}))]),
        # Algorithms: a modifier for the layers of each.
        ([f"re:b | {W4}", f"re:a | {W8}"], PLAN % "", [(GPTQ, {"group_0": ["re:b"], "group_1": ["re:a"]})]),
        ([f"re:b | {W4}", f"re:a | {W8}"], PLAN % ", match: 're:a'", [(RTN, {"group_0": ["re:b"]}), (GPTQ, {"group_0": ["re:a"]})]),
        ([f"re:c | {W4}", "re:b | float: UNQUANTIZED", f"re:a | {W8}"], PLAN % ", match: 're:a'", [
            (RTN, {"group_0": ["re:c"], "group_1": ["re:b"]}), (GPTQ, {"group_0": ["re:a"]})]),
        ([f"re:b | {W4}", f"re:a | {W8}"], PLAN % ", match: 're:(?!a)(?:b)'", [(GPTQ, {"group_0": ["re:b"]}), (RTN, {"group_0": ["re:a"]})]),
        ([f"kind:linear | {W4}", f"re:a | {W8}"], PLAN % ", match: 're:(?!a).*'", [(GPTQ, {"group_0": ["Linear"]}), (RTN, {"group_0": ["re:a"]})]),
        ([f"re:b | {W4}", f"re:a | {W8}"], "algorithms: [rtn]\n", [(RTN, {"group_0": ["re:b"], "group_1": ["re:a"]})]),
        ([f"re:a | {W4}", f"re:b | {W8}"], PLAN % "", [(GPTQ, {"group_0": ["re:a"]}), (GPTQ, {"group_0": ["re:b"]})]),
        ([f"re:a | {W4}"], "algorithms: [auto-round: {steps: 3, lr: 0.1, batch_size: 1}]\nprefix: float\n", [("AutoRoundModifier", {"group_0": ["re:a"]})]),
        ([f"re:a | {W4}"], "algorithms: [awq: {clip: false}]\n", [("AWQModifier", {}), (RTN, {"group_0": ["re:a"]})]),
        # Other matches become expressions.
        ([f"down_proj | {W4}", f"mlp.up_proj#0-3 | {W8}", f"~a.b | {W8}", f"*.x?.o_proj | {W8}"], "", [
            (RTN, {"group_0": [r"re:(.*\.)?down_proj(\..*)?$"]}),
            (RTN, {"group_0": [r"re:([^.0-9][^.]*\.)*(0|3)\.(.*\.)?mlp\.up_proj(\..*)?$"]}),
            (RTN, {"group_0": [r"re:.*a\.b", r"re:.*\.x.\.o_proj$"]})]),
    ],
)  # fmt: skip
def test_other_specs(rules, rest, found):
    assert modifiers(native(rules, rest)) == found


LAYERS = llama(12) | {
    fqn: Layer(fqn, "linear", (8, 8), block)
    for fqn, block in (("model.layers.3.mlp.experts.1.down_proj", 3), ("model.layers.1.self_attn.q_proj.base", 1))
}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "down_proj",
            "mlp.down_proj",
            "self_attn",
            "proj",
            "down_proj#1-3",
            "mlp#0..2",
            "layers",
            "lm_head",
            "q_proj",
        ),
        *("*.down_proj", "*.layers.?.*.q_proj", "*.[13].mlp.up_proj", "*.[!1].mlp.up_proj", "model.*.o_proj"),
        *("~down", "~layers.1.", "~1.mlp", "=lm_head", "kind:linear", "re:.*up", "kind:embedding"),
    ],
)
def test_a_target_matches_the_same_layers(text):
    match = parse_match(text)
    spec = native([f"{text} | {W4}"])
    (rule,) = load_spec(written(spec)).rules
    assert [fqn for fqn, layer in LAYERS.items() if rule.match.matches(layer)] == [
        fqn for fqn, layer in LAYERS.items() if match.matches(layer)
    ]


HALF = "compressed-tensors' 4-bit integers are int4/half"


@pytest.mark.parametrize(
    ("rules", "rest", "found"),
    [
        ([f"blocks | {W4}"], "", [
            "blocks: a target says nothing of repeated blocks; write re: and a regular expression, or kind:linear and a rule that keeps lm_head float"]),
        ([f"*.o_* | {W4}", f"=Linear | {W4}"], "", [
            "*.o_*: it leaves out heads and layers outside of the blocks that it does not spell, which a regular expression does not; write re: and an expression",
            "=Linear: llm-compressor would read Linear as a class; write re:Linear$"]),
        (["re:a | weight: int4/g128"], "", [f"int4/g128: {HALF}"]),
        (["re:a | weight: int4/asym/channel"], "", ["int4/asym/channel: compressed-tensors' 4-bit integers are int4/asym/joint"]),
        (["re:a | weight: int4/by_sign/channel"], "", [f"int4/by_sign/channel: {HALF}"]),
        (["re:a | weight: uint8/channel", "re:b | weight: int8/half/channel/ssz", "re:c | weight: mxfp4\n    input: mxint8/dynamic"], "", [
            "uint8/channel: compressed-tensors has no uint8",
            "int8/half/channel/ssz: llm-compressor has no observer like ssz",
            "mxfp4: compressed-tensors has mxfp4/even",
            "mxint8/dynamic: compressed-tensors has no mxint8"]),
        (["re:a | input: int16/half/tensor", "re:b | input: hifloat8/tensor", "re:c | input: int8/half/tensor/percentile"], "", [
            "int16/half/tensor: compressed-tensors has no int16/half",
            "hifloat8/tensor: compressed-tensors has no hifloat8",
            "int8/half/tensor/percentile: llm-compressor has no observer like percentile"]),
        (["re:a | weight: int4/half/g128", "re:b | weight: nvfp4"], "", [
            "int4/half/g128: llm-compressor computes such weights in the model's dtype; write int4/half/g128/source",
            "nvfp4: llm-compressor computes such weights in the model's dtype; write nvfp4/source"]),
        (["re:a | weight: float8_e4m3fn/pow2/channel"], "", ["float8_e4m3fn/pow2/channel: compressed-tensors has no float8_e4m3fn/pow2"]),
        (["re:a | weight: float8_e5m2/channel"], "cache: int8/tensor\n", [
            "int8/tensor: compressed-tensors' 8-bit integers are int8/half", "float8_e5m2/channel: compressed-tensors has no float8_e5m2"]),
        ([f"re:a | {W4}\n    exclusive: x", f"re:b | {W4}\n    may_match_nothing: true"], "", [
            "re:a: exclusive: targets have no such word", "re:b: may_match_nothing: a target that quantizes may not"]),
        ([f"re:a | {W4}"], "algorithms: [{smooth-quant: {statistic: range}}, {awq: {clip: false, folds: {exclude: [x]}}}]\n", [
            "smooth-quant: folds: everything: llm-compressor folds into norm-linear", "awq: folds: everything but x: llm-compressor folds into everything"]),
        ([f"re:a | {W4}"], "algorithms: [gptq, awq, smooth-quant, equalize]\n", [
            "awq: clip is true; llm-compressor's is false",
            "smooth-quant: statistic is magnitude; llm-compressor's is range",
            "equalize: llm-compressor has no such algorithm",
            "gptq: scales is search; llm-compressor's is plan"]),
        ([f"re:a | {W4}"], "algorithms: [{gptq: {scales: plan, min_samples: 0, x: 1}}]\n", [
            "gptq has no option x", "gptq: min_samples is 0; llm-compressor's is 32"]),
        ([f"re:a | {W4}"], "algorithms: [{smooth-quant: {alpha: search, statistic: range, folds: {kinds: [norm-linear]}}}, {rotate: {r1: false, r2: false}}]\n", [
            "smooth-quant: alpha is search; llm-compressor's smoothing_strength is a number", "rotate: it rotates nothing"]),
        ([f"re:a | {W4}"], "algorithms: [{awq: {clip: false, where: multiply, power: 4}}]\n", [
            "awq: power is 4; llm-compressor's is 2", "awq: where is multiply; llm-compressor's is fold"]),
        ([f"re:a | {W4}"], "algorithms: [{awq: {clip: false, match: self_attn}}]\n", [
            r"awq: re:(.*\.)?self_attn(\..*)?$: llm-compressor's mappings name the norm in front of a layer, known of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj alone"]),
        ([f"re:a | {W4}"], "run: {target: onnx, seed: 0, batches: 3}\n", [
            *("run.target: oneshot has no argument for it", "run.batches: oneshot has no argument for it"), "run.seed: oneshot has no argument for it"]),
        ([f"re:a | {W4}"], PLAN % ", match: 're:b'", ["the layers or the order of algorithms: a recipe's modifiers and their targets cannot say it"]),
        ([f"re:a | {W4}", f"re:b | {W8}"], PLAN % "" + "pipeline: independent\n", ["the layers or the order of algorithms: a recipe's modifiers and their targets cannot say it"]),
        ([f"re:a | {W4}"], "algorithms: [{gptq: {scales: plan}}, {awq: {clip: false}}]\n", [
            "the layers or the order of algorithms: a recipe's modifiers and their targets cannot say it"]),
        (["kind:linear | float: true"], "algorithms: [{awq: {clip: false}}, {rotate: {}}]\n", ["quant_stage.quant_modifiers.SpinQuantModifier: stands behind another modifier; a model is rotated before anything else"]),
    ],
)  # fmt: skip
def test_refusals(rules, rest, found):
    assert refused(native(rules, rest)) == [f"llm-compressor: {problem}" for problem in found]


def test_presets_by_name_are_refused_as_they_round_otherwise():
    first, second = refused(load_spec("w4a16"))
    assert first.startswith("llm-compressor: blocks: a target says nothing of repeated blocks; write re: and a")
    assert second == f"llm-compressor: int4/g128: {HALF}"


# Recipes at random, in this dialect: every field with a value that it may have.
TEXTS = [
    "re:.*q_proj$",
    "re:.*mlp.*",
    "re:.*down_proj",
    "re:.*self_attn\\.(k|v)_proj$",
    "Linear",
    "Embedding",
    "a.b",
    "lm_head",
]
BITS = st.integers(2, 8)
TARGETS = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3, unique=True)
WEIGHTS = st.one_of(
    st.fixed_dictionaries(
        {"num_bits": BITS},
        optional={
            "symmetric": st.booleans(),
            "group_size": st.sampled_from([-1, 32, 128, None]),
            "observer": st.sampled_from(["mse", "minmax", "memoryless_minmax", None]),
        },
    ),
    st.fixed_dictionaries(
        {"num_bits": st.sampled_from([4, 8]), "type": st.just("float")},
        optional={"group_size": st.sampled_from([32, -1]), "scale_dtype": st.none()},
    ),
    st.just({"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}),
    st.just({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    st.just({"strategy": "block", "block_structure": "64x32", "observer": "mse", "observer_kwargs": {"grid": 20}}),
)
INPUTS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"num_bits": st.sampled_from([4, 6, 8])},
        optional={
            "symmetric": st.booleans(),
            "observer": st.sampled_from(["minmax", "static_minmax", "memoryless_minmax", "mse"]),
        },
    ),
    st.just({"strategy": "token", "dynamic": True, "type": "float"}),
    st.just({"group_size": 64, "dynamic": True}),
    st.just({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}),
)
GROUPS = st.dictionaries(
    st.sampled_from(["group_0", "group_1", "x"]),
    st.fixed_dictionaries({"targets": TARGETS}, optional={"weights": WEIGHTS, "input_activations": INPUTS}),
    min_size=1,
    max_size=3,
)
SCHEMES = st.one_of(
    GROUPS.map(lambda groups: {"config_groups": groups}),
    st.fixed_dictionaries({"scheme": st.sampled_from(sorted(PRESETS)), "targets": TARGETS}),
)
IGNORE = st.lists(st.sampled_from(["lm_head", "re:.*o_proj$", "a.c", "Embedding"]), max_size=2, unique=True)
CACHE = (
    st.none()
    | st.just({"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"})
    | st.just({"num_bits": 8})
)
QUANTIZING = st.one_of(
    st.just(("QuantizationModifier", {})),
    st.fixed_dictionaries(
        {},
        optional={
            "actorder": st.sampled_from(["static", "weight", None]),
            "block_size": st.integers(1, 256),
            "dampening_frac": st.sampled_from([0.01, 0.1]),
        },
    ).map(lambda fields: ("GPTQModifier", fields)),
    st.fixed_dictionaries({}, optional={"iters": st.integers(1, 9), "lr": st.sampled_from([0.1, None])}).map(
        lambda fields: ("AutoRoundModifier", fields)
    ),
)
TRANSFORMS = st.one_of(
    st.fixed_dictionaries(
        {}, optional={"duo_scaling": st.sampled_from([True, False, "both"]), "n_grid": st.integers(1, 30)}
    ).map(lambda fields: ("AWQModifier", fields)),
    st.fixed_dictionaries(
        {},
        optional={
            "smoothing_strength": st.sampled_from([0.5, 0.8, 1]),
            "mappings": st.just([[["re:.*gate_proj$", "re:.*up_proj$"], "re:.*post_attention_layernorm$"]]),
        },
    ).map(lambda fields: ("SmoothQuantModifier", fields)),
)
SPIN = st.fixed_dictionaries(
    {},
    optional={
        "rotations": st.lists(st.sampled_from(["R1", "R2", "R3", "R4"]), min_size=1, max_size=4, unique=True),
        "transform_type": st.sampled_from(["hadamard", "random-hadamard", "random-matrix"]),
        "transform_block_size": st.sampled_from([None, 32]),
    },
).map(lambda fields: ("SpinQuantModifier", fields))
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "pipeline": st.sampled_from(["sequential", "independent", "basic"]),
        "propagate_error": st.booleans(),
        "num_calibration_samples": st.integers(1, 999),
        "model": st.sampled_from(["m", "a: b"]),
    },
)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    groups: list[tuple[str, dict[str, Any]]] = [draw(SPIN)] if draw(st.booleans()) else []
    groups += draw(st.lists(TRANSFORMS, max_size=2))
    ignored = draw(IGNORE)
    for _ in range(draw(st.integers(1, 3))):
        name, fields = draw(QUANTIZING)
        groups.append((name, {**fields, **draw(SCHEMES), "ignore": ignored}))
    groups[-1][1]["kv_cache_scheme"] = draw(CACHE)
    return {**draw(ARGUMENTS), "quant_stage": {"quant_modifiers": [{name: fields} for name, fields in groups]}}


def targets(fields: dict[str, Any]) -> set[str]:
    """All targets of a modifier."""
    groups = fields.get("config_groups", {}).values()
    return {*fields.get("targets", []), *(target for group in groups for target in group["targets"])}


def no_target_twice(recipe: dict[str, Any]) -> bool:
    """Whether no two modifiers have one target: the earlier one's has no meaning, and a recipe for it may be refused."""
    every = [targets(fields) for one in recipe["quant_stage"]["quant_modifiers"] for fields in one.values()]
    return len(set().union(*every)) == sum(map(len, every))


@given(recipes().filter(no_target_twice))
def test_a_recipe_is_written_as_it_was_read(recipe):
    try:
        spec = load_spec(recipe)
    except SpecError:
        return  # formats and targets that do not go together
    text = written(spec)
    again = load_spec(text)
    assert again == spec
    assert print_spec(again) == print_spec(spec)
    assert written(again) == text


def test_targets_of_one_algorithm_are_one_modifier():
    """Though another modifier's target stands between them in the order of names."""
    algorithm = {"targets": ["lm_head", "re:.*q_proj$"], "scheme": "FP8"}
    spec = load_spec(
        several(("GPTQModifier", algorithm), ("QuantizationModifier", {"targets": ["a.b"], "scheme": "W8A8"}))
    )
    assert [str(rule.match) for rule in spec.rules] == ["re:.*q_proj$", "=a.b", "=lm_head"]
    text = written(spec)
    assert text.count("GPTQModifier") == text.count("QuantizationModifier") == 1
    assert load_spec(text) == spec


def test_a_class_of_another_modifier_is_told_from_linears():
    spec = load_spec(
        several(
            ("QuantizationModifier", {"targets": ["Embedding"], "scheme": "FP8"}),
            ("GPTQModifier", {"targets": ["Linear"], "scheme": "FP8"}),
            ("QuantizationModifier", {"targets": ["re:.*q_proj$"], "scheme": "FP8"}),
        )
    )
    assert [str(match) for match in spec.algorithms[0].match] == ["re:(?!.*q_proj$).*"]
    assert load_spec(written(spec)) == spec


def test_a_class_of_another_modifier_beside_expressions():
    spec = load_spec(
        several(
            ("QuantizationModifier", {"targets": ["Conv2d"], "scheme": "W8A8"}),
            ("GPTQModifier", {"targets": ["re:.*mlp.*"], "scheme": "W4A16"}),
            ("QuantizationModifier", {"targets": ["re:.*mlp.down$"], "scheme": "W4A16"}),
        )
    )
    assert [str(match) for match in spec.algorithms[0].match] == ["re:(?!.*mlp.down$)(?:.*mlp.*)"]


@pytest.mark.parametrize(
    ("front", "other"), [("AutoRoundModifier", "GPTQModifier"), ("QuantizationModifier", "GPTQModifier")]
)
def test_targets_of_the_algorithm_in_front_come_first(front, other):
    spec = load_spec(
        several(
            (front, {"targets": ["re:.*x$", "b"], "scheme": "W4A16"}),
            (other, {"targets": ["a"], "scheme": "W4A16"}),
            pipeline="independent",
        )
    )
    assert [str(rule.match) for rule in spec.rules] == ["re:.*x$", "=a", "=b"]
    text = written(spec)
    assert text.count(front) == text.count(other) == 1
    assert load_spec(text) == spec


@given(recipes())
def test_what_is_written_means_the_same(recipe):
    """Layer by layer, where a recipe is written at all."""
    try:
        spec = load_spec(recipe)
        again = load_spec(written(spec))
    except SpecError:
        return
    for fqn in ("a.b", "a.c", "lm_head", "x.q_proj", "x.self_attn.k_proj", "x.mlp.down_proj", "x.self_attn.o_proj"):
        for kind in ("linear", "embedding"):
            layer = Layer(fqn, kind, (8, 8), 0)
            assert decision(spec, layer) == decision(again, layer), (fqn, kind)


def decision(spec: Spec, layer: Layer) -> object:
    found = [rule.decision for rule in spec.rules if rule.match.matches(layer)]
    return found[-1] if found and isinstance(found[-1], Plan) else None


DATA = st.recursive(
    st.sampled_from(TEXTS) | st.text(max_size=5) | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["targets", "weights", "num_bits", "GPTQModifier"]), inner, max_size=3)
    ),
)
FULL: list[Any] = [
    read_file(path).root
    for name in (
        "awq_gptq_sequential.yaml",
        "nvfp4_fp8.yaml",
        "fp8_static_kv_cache.yaml",
        "w4a4_spin_quant.yaml",
        "config.json",
    )
    for path in [CONFIGS / "llm-compressor" / name]
]


def paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(path for key, value in items for path in paths(value, (*at, key)))]


@given(st.data())
def test_a_config_with_one_value_replaced_is_read_or_refused(data):
    config: Any = copy.deepcopy(data.draw(st.sampled_from(FULL)))
    *sections, last = data.draw(st.sampled_from(paths(config)[1:]))
    section = config
    for key in sections:
        section = section[key]
    section[last] = data.draw(DATA)
    with contextlib.suppress(SpecError):
        written(load_spec(config, "llm-compressor"))


@pytest.mark.parametrize("path", sorted((CONFIGS / "native").glob("*.yaml")), ids=lambda path: path.stem)
def test_native_examples_are_refused_for_their_blocks(path):
    assert any("a target says nothing of repeated blocks" in problem for problem in refused(load_spec(path)))


def test_a_class_has_a_target_of_its_own():
    kinds = [kind for kind in KINDS if kind != "recurrent"]
    assert [write_target(parse_match(f"kind:{kind}")) for kind in kinds] == [
        *("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Embedding")
    ]
    with pytest.raises(SpecError, match="kind:recurrent: llm-compressor has no class for one weight"):
        write_target(parse_match("kind:recurrent"))
