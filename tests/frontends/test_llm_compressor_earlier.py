"""Recipes of llm-compressor's earlier releases, and GPTQ that rounds what the modifier before it plans."""

from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.spec.rules import Spec
from tests.frontends.test_llm_compressor_keys import RTN, several

RUN_TIME = "scales that are found at run time are those of the extremes"
AT = "quant_stage.quant_modifiers[1].GPTQModifier"


def plan(**weights: Any) -> tuple[str, Any]:
    """A QuantizationModifier of int4 groups, whose fields come from ``weights``."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel", **weights}}
    return "QuantizationModifier", {"ignore": ["lm_head", "a.b"], "config_groups": {"g": group}}


def shown(spec: Spec) -> list[str]:
    return [
        *(f"{rule.match}: {rule.decision}" for rule in spec.rules),
        *(f"{a.name} {dict(a.options)} {' '.join(map(str, a.match))}".rstrip() for a in spec.algorithms),
    ]


PLANNED = ["kind:linear: weight int4/half/channel/source", "=lm_head: float (ignore)", "=a.b: float (ignore)"]
GPTQ = "'scales': 'plan', 'block_size': 64}"


@pytest.mark.parametrize(
    ("weights", "fields", "order"),
    [
        ({}, {}, "none"),
        ({"actorder": "weight"}, {}, "static"),
        ({"actorder": "static"}, {"targets": "Linear"}, "static"),
        ({}, {"targets": ["Linear"], "ignore": ["lm_head"]}, "none"),
    ],
)
def test_gptq_without_a_scheme_rounds_what_the_modifier_before_it_plans(weights, fields, order):
    """The columns stand in the order that the scheme says: GPTQ's own default is for its own schemes."""
    spec = load_spec(several(plan(**weights), ("GPTQModifier", {"block_size": 64, **fields})))
    assert shown(spec) == [*PLANNED, f"gptq {{'act_order': '{order}', {GPTQ}"]
    assert spec.rules[0].source == "QuantizationModifier.config_groups.g"
    assert spec.notes == ()


def test_what_gptq_ignores_is_rounded_to_nearest():
    """The plan of a layer that GPTQ alone leaves out is still that of the modifier before it."""
    spec = load_spec(several(plan(), ("GPTQModifier", {"block_size": 64, "ignore": ["c"]})))
    rounds = f"gptq {{'act_order': 'none', {GPTQ} re:(?!c$).*"
    assert shown(spec) == [*PLANNED, *PLANNED, "=c: weight int4/half/channel/source", rounds]


def test_the_cache_of_the_modifier_before_holds():
    name, fields = plan()
    fields = {**fields, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert load_spec(several((name, fields), ("GPTQModifier", {}))).cache == load_spec(several((name, fields))).cache


def test_an_order_of_gptq_s_own_has_no_effect_without_a_scheme():
    spec = load_spec(several(plan(actorder="weight"), ("GPTQModifier", {"actorder": "static"})))
    assert spec.notes == (f"{AT}.actorder: ignored: the order of the scheme holds, which stands before",)
    spec = load_spec(several(plan(), ("GPTQModifier", {"weight_observer": "mse", "scheme": None})))
    assert spec.notes == (f"{AT}.weight_observer: ignored: it has no scheme; that of the modifier before it holds",)


@pytest.mark.parametrize(
    ("modifiers", "problems"),
    [
        ([("GPTQModifier", {})], ["[0].GPTQModifier: quantizes nothing; write scheme or config_groups"]),
        (
            [RTN, ("QuantizationModifier", {"scheme": "W8A8", "targets": ["a"]}), ("GPTQModifier", {})],
            ["[2].GPTQModifier: has no scheme, and several modifiers before it have one; write it"],
        ),
        (
            [("QuantizationModifier", {"kv_cache_scheme": {"num_bits": 8}}), ("GPTQModifier", {})],
            ["[1].GPTQModifier: has no scheme, and no modifier before it plans a layer; write it"],
        ),
        (
            [RTN, ("GPTQModifier", {"targets": ["re:.*q_proj"]})],
            ["[1].GPTQModifier.targets: a GPTQModifier of some layers needs their scheme; write it"],
        ),
        ([RTN, ("AutoRoundModifier", {})], ["[1].AutoRoundModifier: quantizes nothing; write scheme or config_groups"]),
        # A modifier that could not be read is one fault, and says nothing of those in front of it.
        ([("AWQModifier", {}), ("QuantizationModifier", {"scheme": "W4A61"})],
         ["[1].QuantizationModifier.scheme: 'W4A61' is not a preset; did you mean W4A16?"]),
        ([("QuantizationModifier", {"scheme": "W4A61"}), ("GPTQModifier", {})],
         ["[0].QuantizationModifier.scheme: 'W4A61' is not a preset; did you mean W4A16?"]),
        ([("SmoothQuantModifier", {}), ("GPTQModifer", {"scheme": "W8A8"})],
         ["[1].GPTQModifer: unknown modifier; did you mean GPTQModifier?"]),
        (
            [("GPTQModifier", {"scheme": "W4A16", "quantize": {"QuantizationModifier": {}}})],
            ["[0].GPTQModifier.quantize: a field of earlier releases, True where it quantizes; write scheme or config_groups"],
        ),
    ],
)  # fmt: skip
def test_what_is_refused_with_one_line_for_a_fault(modifiers, problems):
    with pytest.raises(SpecError) as caught:
        load_spec(several(*modifiers))
    assert [problem.removeprefix("quant_stage.quant_modifiers") for problem in caught.value.problems] == problems


def test_fields_of_2024_are_noted():
    """The W8A8 recipe that llm-compressor showed first, with what its modifiers had beside it."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "strategy": "channel", "observer": "memoryless"},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True, "observer": "memoryless"},
    }
    fields: dict[str, Any] = {
        "sequential_update": False,
        "true_sequential": False,
        "sequential_targets": None,
        "quantize": True,
        "num_calibration_steps": 512,
        "disable_quantization_observer_epoch": None,
        "ignore": ["lm_head"],
        "config_groups": {"g": group},
    }
    spec = load_spec(several(("GPTQModifier", fields)))
    assert shown(spec) == [
        "kind:linear: weight int8/half/channel/source, input int8/half/token/dynamic",
        "=lm_head: float (ignore)",
        "gptq {'act_order': 'static', 'scales': 'plan'}",
    ]
    at = "quant_stage.quant_modifiers[0].GPTQModifier"
    assert spec.notes == (
        f"{at}.sequential_update: ignored: a field of earlier releases; blocks are calibrated in order",
        f"{at}.true_sequential: ignored: a field of earlier releases; blocks are calibrated in order",
        f"{at}.sequential_targets: ignored: a field of earlier releases; blocks are calibrated in order",
        f"{at}.disable_quantization_observer_epoch: ignored: a field of earlier releases; it is for training",
        f"{at}.num_calibration_steps: ignored: a field of earlier releases; it is for training",
        f"{at}.config_groups.g.input_activations.observer: ignored: {RUN_TIME}",
    )
    static = {**group, "input_activations": {"num_bits": 8, "observer": "memoryless"}}
    spec = load_spec(several(("QuantizationModifier", {"config_groups": {"g": static}})))
    assert str(spec.rules[0].decision) == "weight int8/half/channel/source, input int8/half/tensor/ema1"


CONFIG: dict[str, Any] = {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}


def test_a_dense_sparsity_config_is_noted_and_others_are_refused():
    dense = {"format": "dense", "global_sparsity": 0.1, "registry_requires_subclass": False}
    spec = load_spec({**CONFIG, "sparsity_config": dense})
    assert spec.notes == ("sparsity_config: ignored: weights are stored whole, zeros among them",)
    for value, what in (
        ({"format": "sparse-24-bitmask"}, "sparsity stored as sparse-24-bitmask"),
        ({"sparsity_structure": "2:4"}, "sparsity"),
        (3, "sparsity"),
    ):
        with pytest.raises(SpecError) as caught:
            load_spec({**CONFIG, "sparsity_config": value})
        assert caught.value.problems == (f"sparsity_config: {what} is not supported",)


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("gptq", "; the preset w4a16+gptq comes near"),
        ("awq", "; the preset w4a16-asym+awq comes near"),
        ("fp8", "; the preset fp8-block or fp8-dynamic comes near"),
        ("mxfp4", "; the preset mxfp4a16 comes near"),
        ("bitsandbytes", "; the preset w8a16 or w4a16 comes near"),
        ("modelopt", "; the preset nvfp4 or fp8 comes near"),
        ("own", ""),
    ],
)
def test_another_method_of_a_checkpoint_is_named(method, hint):
    """One line, also where the configuration has keys that compressed-tensors lacks."""
    config = {"quant_method": method, "bits": 4, "group_size": 128}
    problem = f"quant_method: '{method}' is not compressed-tensors, the one method that is read as a spec{hint}"
    for document, at in ((config, ""), ({"hidden_size": 8, "quantization_config": config}, "quantization_config.")):
        with pytest.raises(SpecError) as caught:
            load_spec(document)
        assert caught.value.problems == (f"{at}{problem}",)
