"""llm-compressor's recipes, key by key: what is read, what is noted, and what is refused with which message."""

from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec, write_spec
from graphq.frontends.llm_compressor.presets import PRESETS
from graphq.spec.rules import Rule, Run

PREFIX = "quant_stage.quant_modifiers.QuantizationModifier."
RTN = ("QuantizationModifier", {"scheme": "W4A16"})


def scheme(name: Any = "W4A16", **fields: Any) -> dict[str, Any]:
    """A recipe with one QuantizationModifier."""
    return {"quant_stage": {"quant_modifiers": {"QuantizationModifier": {"scheme": name, **fields}}}}


def group(**fields: Any) -> dict[str, Any]:
    """A recipe with one group for every linear."""
    return scheme(None, config_groups={"g": {"targets": ["Linear"], **fields}})


def weights(**args: Any) -> dict[str, Any]:
    return group(weights={"num_bits": 4, **args})


def inputs(**args: Any) -> dict[str, Any]:
    return group(weights={"strategy": "channel"}, input_activations={"num_bits": 8, **args})


def several(*modifiers: tuple[str, Any], **arguments: Any) -> dict[str, Any]:
    """A recipe with these modifiers in order, in a list."""
    return {**arguments, "quant_stage": {"quant_modifiers": [{name: fields} for name, fields in modifiers]}}


def text(rule: Rule) -> str:
    return f"{rule.match}: {rule.decision}"


def first(recipe: dict[str, Any]) -> str:
    """The decision of the first rule."""
    return str(load_spec(recipe).rules[0].decision)


# The thirty names of compressed-tensors 0.19 with what its quant_scheme.py says of them.
DOCUMENTED = {
    "UNQUANTIZED": "float (UNQUANTIZED)",
    **{f"W{bits}A16": f"weight int{bits}/half/g128/source" for bits in (2, 3, 4, 5, 6, 7, 8)},
    **{
        f"W{bits}A8": f"weight int{bits}/half/g128/source, input int8/half/token/dynamic" for bits in (2, 3, 4, 5, 6, 7)
    },
    **{f"W{bits}A4": f"weight int{bits}/half/g128/source, input int4/half/token/dynamic" for bits in (2, 3, 4)},
    "W4A16_ASYM": "weight int4/asym/joint/g128/source",
    "W8A8": "weight int8/half/channel/source, input int8/half/token/dynamic",
    "INT8": "weight int8/half/channel/source, input int8/half/token/dynamic",
    "W4AFP8": "weight int4/half/g128/source, input float8_e4m3fn/token/dynamic",
    "FP8": "weight float8_e4m3fn/tensor/source, input float8_e4m3fn/tensor",
    "FP8_DYNAMIC": "weight float8_e4m3fn/channel/source, input float8_e4m3fn/token/dynamic",
    "FP8_BLOCK": "weight float8_e4m3fn/128x128/source, input float8_e4m3fn/g128/dynamic",
    "NVFP4A16": "weight nvfp4/source",
    "NVFP4": "weight nvfp4/source, input nvfp4",
    "MXFP4A16": "weight mxfp4/even",
    "MXFP4": "weight mxfp4/even, input mxfp4/even/dynamic",
    "MXFP8A16": "weight mxfp8_e4m3/even",
    "MXFP8": "weight mxfp8_e4m3/even, input mxfp8_e4m3/even/dynamic",
}


def test_presets():
    assert set(PRESETS) == set(DOCUMENTED)
    assert len(DOCUMENTED) == 30
    for name, decision in DOCUMENTED.items():
        assert first(scheme(name)) == decision
        assert first(scheme(name.lower())) == decision


@pytest.mark.parametrize(
    ("recipe", "decision"),
    [
        (group(weights={}), "weight int8/half/tensor/source"),
        (group(input_activations={}), "input int8/half/tensor/ema"),
        (group(), "float (UNQUANTIZED)"),
        (weights(group_size=-1), "weight int4/half/channel/source"),
        (weights(group_size=64), "weight int4/half/g64/source"),
        (weights(group_size=64, strategy="GROUP", type="INT"), "weight int4/half/g64/source"),
        (weights(group_size=-1, strategy="tensor"), "weight int4/half/tensor/source"),
        (weights(strategy="block", block_structure=[2, 4]), "weight int4/half/2x4/source"),
        (weights(strategy="block", block_structure="2x4"), "weight int4/half/2x4/source"),
        (weights(symmetric=False, zp_dtype="torch.int8"), "weight int4/asym/joint/tensor/source"),
        (weights(scale_dtype="torch.float32", zp_dtype=None, dynamic=False), "weight int4/half/tensor/source"),
        (weights(type="float"), "weight float4_e2m1/tensor/source"),
        (weights(type="float", group_size=32), "weight float4_e2m1/g32/source"),
        (weights(type="float", group_size=32, scale_dtype="torch.uint8"), "weight mxfp4/even"),
        (weights(type="float", num_bits=8, group_size=32, scale_dtype="uint8"), "weight mxfp8_e4m3/even"),
        (weights(type="float", group_size=16, strategy="tensor_group"), "weight nvfp4/source"),
        (weights(observer="minmax"), "weight int4/half/tensor/source"),
        (weights(observer="static_minmax"), "weight int4/half/tensor/source"),
        (weights(observer="MSE"), "weight int4/half/tensor/mse"),
        (weights(observer="memoryless_mse"), "weight int4/half/tensor/mse"),
        (
            weights(observer="mse", observer_kwargs={"maxshrink": 0.5, "grid": 50.0, "norm": 2, "patience": 3}),
            "weight int4/half/tensor/mse0.5:50:2:3",
        ),
        (inputs(), "weight int8/half/channel/source, input int8/half/tensor/ema"),
        (inputs(observer="minmax", observer_kwargs={"averaging_constant": 0.1}), "weight int8/half/channel/source, input int8/half/tensor/ema0.1"),
        (inputs(observer="static_minmax"), "weight int8/half/channel/source, input int8/half/tensor"),
        (inputs(observer="memoryless_minmax"), "weight int8/half/channel/source, input int8/half/tensor/ema1"),
        (inputs(observer="mse"), "weight int8/half/channel/source, input int8/half/tensor/mse"),
        (inputs(dynamic=True, observer="minmax"), "weight int8/half/channel/source, input int8/half/tensor/dynamic"),
        (inputs(num_bits=16, symmetric=False), "weight int8/half/channel/source, input int16/asym/joint/tensor/ema"),
        (inputs(num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic="local"), "weight int8/half/channel/source, input nvfp4/ema"),
        (inputs(num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic=True), "weight int8/half/channel/source, input nvfp4/dynamic"),
        (inputs(type="float", group_size=128, dynamic=True), "weight int8/half/channel/source, input float8_e4m3fn/g128/dynamic"),
        (scheme("FP8", input_observer="minmax", weight_observer="mse"), "weight float8_e4m3fn/tensor/mse, input float8_e4m3fn/tensor/ema"),
        (scheme("FP8", input_observer="memoryless_minmax"), "weight float8_e4m3fn/tensor/source, input float8_e4m3fn/tensor/ema1"),
        (scheme("W8A8", observer={"weights": "MSE", "input": "mse"}), "weight int8/half/channel/mse, input int8/half/token/dynamic"),
        (scheme("W8A8", observer={"weights": "minmax"}, weight_observer="mse"), "weight int8/half/channel/source, input int8/half/token/dynamic"),
        (scheme({"weights": {"num_bits": 3, "group_size": 32}}), "weight int3/half/g32/source"),
        (scheme(None, config_groups={"W8A16": ["Linear"]}), "weight int8/half/g128/source"),
        (scheme(None, weight_observer="mse", config_groups={"g": {"targets": ["Linear"], "weights": {"observer": "minmax"}}}), "weight int8/half/tensor/mse"),
    ],
)  # fmt: skip
def test_formats(recipe, decision):
    assert first(recipe) == decision


@pytest.mark.parametrize(
    ("recipe", "rules"),
    [
        (scheme(), ["kind:linear: weight int4/half/g128/source"]),
        (scheme(targets="re:.*mlp"), ["re:.*mlp: weight int4/half/g128/source"]),
        (scheme(targets=["Linear", "LinearBase", "Conv2d", "Embedding"]), [
            *("kind:linear: weight int4/half/g128/source",) * 2, "kind:embedding: weight int4/half/g128/source", "kind:conv2d: weight int4/half/g128/source"]),
        (scheme({"W8A8": "re:.*b$", "w4a16": ["re:.*a$", "re:.*c$", "a.b"]}), [
            "re:.*c$: weight int4/half/g128/source",
            "re:.*b$: weight int8/half/channel/source, input int8/half/token/dynamic",
            "re:.*a$: weight int4/half/g128/source",
            "=a.b: weight int4/half/g128/source",
        ]),
        # Full names above expressions above classes; the alphabet, not the config, orders expressions, a beginning first.
        (scheme({"W8A16": ["a.b", "re:.*mlp", "Linear"], "W4A16": ["re:.*mlp.*", "re:.*down", "a.a"]}), [
            "kind:linear: weight int8/half/g128/source",
            "re:.*mlp.*: weight int4/half/g128/source",
            "re:.*mlp: weight int8/half/g128/source",
            "re:.*down: weight int4/half/g128/source",
            "=a.a: weight int4/half/g128/source",
            "=a.b: weight int8/half/g128/source",
        ]),
        (scheme({"W8A16": ["a"], "W4A16": ["a"]}), ["=a: weight int4/half/g128/source"]),
        (scheme(ignore=["lm_head", "re:.*x", "Embedding", "LlamaRMSNorm"]), [
            "kind:linear: weight int4/half/g128/source", "=lm_head: float (ignore)", "re:.*x: float (ignore)", "kind:embedding: float (ignore)"]),
        (scheme(ignore="lm_head"), ["kind:linear: weight int4/half/g128/source", "=lm_head: float (ignore)"]),
    ],
)  # fmt: skip
def test_rules(recipe, rules):
    assert [text(rule) for rule in load_spec(recipe).rules] == rules


W4, W8 = "weight int4/half/g128/source", "weight int8/half/g128/source"


@pytest.mark.parametrize(
    ("earlier", "later", "rules"),
    [
        # What a later modifier ignores keeps what the earlier one decided; what that ignored, too, stays float.
        ({"ignore": ["lm_head"]}, {"ignore": ["lm_head"]}, [f"kind:linear: {W4}", "=lm_head: float (ignore)", f"kind:linear: {W8}", "=lm_head: float (ignore)"]),
        ({}, {"ignore": ["lm_head"]}, [f"kind:linear: {W4}", f"kind:linear: {W8}", f"=lm_head: {W4}"]),
        ({"ignore": ["re:.*a"]}, {"ignore": ["re:.*b"]}, [
            f"kind:linear: {W4}", "re:.*a: float (ignore)", f"kind:linear: {W8}", f"re:.*b: {W4}", "re:(?=.*b)(?:.*a): float (ignore)"]),
        ({"targets": ["re:.*attn"]}, {"targets": ["re:.*mlp"], "ignore": ["lm_head"]}, [f"re:.*attn: {W4}", f"re:.*mlp: {W8}", "=lm_head: float (ignore)"]),
        ({"targets": ["re:.*head$"]}, {"ignore": ["lm_head"]}, [f"re:.*head$: {W4}", f"kind:linear: {W8}", f"=lm_head: {W4}"]),
        ({"targets": ["a.b"]}, {"ignore": ["a.b", "a.c", "re:a"]}, [
            f"=a.b: {W4}", f"kind:linear: {W8}", f"=a.b: {W4}", "=a.c: float (ignore)", "re:a: float (ignore)", f"=a.b: {W4}"]),
        ({"targets": ["re:(x+)+.*"]}, {"ignore": ["a.b"]}, [
            f"re:(x+)+.*: {W4}", f"kind:linear: {W8}", "=a.b: float (ignore)", f"re:(?=a\\.b$)(?:(x+)+.*): {W4}"]),
        ({"targets": ["Embedding"]}, {"ignore": ["Linear"]}, [f"kind:linear: {W8}", f"kind:embedding: {W4}", "kind:linear: float (ignore)"]),
        ({"targets": ["re:a"]}, {"targets": ["re:a"], "ignore": ["Linear"]}, [f"re:a: {W4}", f"re:a: {W8}", "kind:linear: float (ignore)", f"re:a: {W4}"]),
    ],
)  # fmt: skip
def test_a_later_modifier_leaves_alone_what_it_ignores(earlier, later, rules):
    recipe = several(
        ("QuantizationModifier", {"scheme": "W4A16", **earlier}), ("QuantizationModifier", {"scheme": "W8A16", **later})
    )
    spec = load_spec(recipe)
    assert [text(rule) for rule in spec.rules] == rules


def test_a_restored_expression_may_match_nothing():
    spec = load_spec(several(RTN, ("QuantizationModifier", {"scheme": "W8A16", "ignore": ["re:.*vision", "lm_head"]})))
    assert [rule.may_match_nothing for rule in spec.rules] == [False, False, True, False]
    spec = load_spec(several(("QuantizationModifier", {"scheme": "W4A16", "targets": ["re:.*attn"]}), ("QuantizationModifier", {"scheme": "W8A16", "ignore": ["re:.*vision"]})))  # fmt: skip
    assert [rule.may_match_nothing for rule in spec.rules] == [False, False, True, True]


GPTQ = "gptq(act_order=static, scales=plan)"


def algorithms(recipe: dict[str, Any]) -> list[str]:
    return [
        f"{a.name}({', '.join(f'{k}={v}' for k, v in a.options)}){[str(m) for m in a.match] if a.match else ''}"
        for a in load_spec(recipe).algorithms
    ]


@pytest.mark.parametrize(
    ("modifiers", "found"),
    [
        ([RTN], []),
        ([("GPTQModifier", {"scheme": "W4A16"})], [GPTQ]),
        ([("GPTQModifier", {"scheme": "W4A16", "actorder": None})], ["gptq(act_order=none, scales=plan)"]),
        ([("GPTQModifier", {"scheme": "W4A16", "actorder": False})], ["gptq(act_order=none, scales=plan)"]),
        ([("GPTQModifier", {"scheme": "W4A16", "actorder": "weight", "block_size": 64, "dampening_frac": 0.1})],
         ["gptq(act_order=static, scales=plan, block_size=64, dampening=0.1)"]),
        ([("GPTQModifier", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"actorder": False}}}})], [GPTQ]),
        ([("GPTQModifier", {"actorder": "static", "config_groups": {"g": {"targets": ["Linear"], "weights": {"actorder": "weight"}}}})], [GPTQ]),
        ([("AWQModifier", {}), RTN], ["awq(duo=True, clip=False)"]),
        ([("AWQModifier", None), RTN], ["awq(duo=True, clip=False)"]),
        ([("AWQModifier", {"duo_scaling": False, "n_grid": 10}), RTN], ["awq(duo=False, clip=False, n_grid=10)"]),
        ([("AWQModifier", {"duo_scaling": "both", "offload_device": None}), RTN], ["awq(duo=None, clip=False)"]),
        ([("AWQModifier", {"mappings": [{"smooth_layer": "a", "balance_layers": ["re:.*b$", "c.d"]}, {"smooth_layer": "a", "balance_layers": ["re:.*b$"]}]}), RTN],
         ["awq(duo=True, clip=False)['re:.*b$', '=c.d']"]),
        ([("AWQModifier", {"scheme": "W4A16", "targets": ["re:.*mlp"]})], ["awq(duo=True, clip=False)"]),
        ([("AWQModifier", {"scheme": "W4A16", "targets": ["re:.*attn"]}), ("QuantizationModifier", {"scheme": "W4A16", "targets": ["re:.*mlp"]})],
         ["awq(duo=True, clip=False)['re:(?!.*mlp)(?:.*attn)']"]),
        ([("SmoothQuantModifier", {}), RTN], ["smooth-quant(statistic=range)"]),
        ([("SmoothQuantModifier", {"smoothing_strength": 0.8, "mappings": [[["re:.*q", "re:.*k"], "re:.*norm"], ["re:.*fc1", ["re:.*norm2"]]], "ignore": [], "algorithm": "smoothquant"}), RTN],
         ["smooth-quant(statistic=range, alpha=0.8)['re:.*q', 're:.*k', 're:.*fc1']"]),
        ([("SpinQuantModifier", {}), RTN], ["rotate(kind=hadamard)"]),
        ([("SpinQuantModifier", {"rotations": ["r1", "R4"], "transform_type": "random-matrix", "transform_block_size": 32, "precision": "torch.float64", "randomize": False}), RTN],
         ["rotate(kind=orthogonal, r2=False, r4=True, block_size=32)"]),
        ([("SpinQuantModifier", {"rotations": ["R2", "R3"], "transform_type": "random-hadamard"}), RTN], ["rotate(kind=random_hadamard, r1=False, r3=True)"]),
        ([("AutoRoundModifier", {"scheme": "W4A16"})], ["auto-round()"]),
        ([("AutoRoundModifier", {"scheme": "W4A16", "iters": 5, "lr": 0.01, "batch_size": 2, "device_ids": "0"})], ["auto-round(steps=5, lr=0.01, batch_size=2)"]),
        # Several that quantize: each algorithm is for its own targets, less what a later modifier takes.
        ([("GPTQModifier", {"scheme": "W4A16", "targets": ["re:.*attn"]}), ("QuantizationModifier", {"scheme": "W8A16", "targets": ["re:.*mlp"]})],
         [f"{GPTQ}['re:(?!.*mlp)(?:.*attn)']"]),
        ([("QuantizationModifier", {"scheme": "W8A16", "targets": ["re:.*mlp"]}), ("GPTQModifier", {"scheme": "W4A16", "targets": ["re:.*attn"]})], [f"{GPTQ}['re:.*attn']"]),
        ([("GPTQModifier", {"scheme": "W4A16"}), ("QuantizationModifier", {"scheme": "W8A16", "targets": ["re:.*down$", "a.b"]})],
         [f"{GPTQ}['re:(?!a\\\\.b$)(?!.*down$).*']"]),
        ([("GPTQModifier", {"scheme": "W4A16", "targets": ["a.b", "a.c"]}), ("QuantizationModifier", {"scheme": "W8A16", "targets": ["a.b", "re:x"]})], [f"{GPTQ}['=a.c']"]),
        ([("GPTQModifier", {"scheme": "W4A16"}), ("QuantizationModifier", {"scheme": "UNQUANTIZED", "targets": ["re:x"]})], [GPTQ]),
        ([("GPTQModifier", {"scheme": "W4A16"}), ("QuantizationModifier", {"scheme": "W8A16", "targets": ["Embedding"]})], [f"{GPTQ}['kind:linear']"]),
        ([RTN, ("GPTQModifier", {"scheme": "W8A16", "ignore": ["re:.*down$"]})], [f"{GPTQ}['re:(?!.*down$).*']"]),
        ([("GPTQModifier", {"scheme": "W4A16", "targets": ["re:a"]}), ("GPTQModifier", {"scheme": "W8A16", "targets": ["re:b"]})], [f"{GPTQ}['re:(?!b)(?:a)']", f"{GPTQ}['re:b']"]),
    ],
)  # fmt: skip
def test_algorithms(modifiers, found):
    assert algorithms(several(*modifiers)) == found


def test_gptq_in_two_modifiers_is_one_where_they_run_together():
    two = [("GPTQModifier", {"scheme": f"W{bits}A16", "targets": [f"re:{bits}"]}) for bits in (4, 8)]
    assert algorithms(several(*two, pipeline="sequential")) == [GPTQ]
    other = ("GPTQModifier", {"scheme": "W8A16", "targets": ["re:8"], "block_size": 64})
    assert len(algorithms(several(two[0], other, pipeline="sequential"))) == 2


SMOOTH, ROUND = ("SmoothQuantModifier", {}), ("GPTQModifier", {"scheme": "W8A8"})
AUTO = ("AutoRoundModifier", {"scheme": "W4A16"})


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        (several(RTN), ("sequential", "quantized")),
        (several(ROUND), ("sequential", "quantized")),
        (several(SMOOTH, RTN), ("sequential", "quantized")),
        (several(SMOOTH, ROUND), ("independent", "quantized")),
        (several(SMOOTH, ROUND, pipeline=None), ("independent", "quantized")),
        (several(SMOOTH, ROUND, pipeline="sequential"), ("sequential", "quantized")),
        (several(ROUND, pipeline="independent"), ("independent", "quantized")),
        (several(ROUND, propagate_error=False), ("sequential", "float")),
        (several(ROUND, propagate_error=True), ("sequential", "quantized")),
        (several(SMOOTH, ROUND, pipeline="basic"), ("sequential", "float")),
        (several(RTN, pipeline="datafree"), ("sequential", "quantized")),
        (several(AUTO), ("sequential", "float")),
        (several(AUTO, propagate_error=True), ("sequential", "quantized")),
    ],
)
def test_pipelines(recipe, found):
    spec = load_spec(recipe)
    assert (spec.pipeline, spec.prefix) == found


BARE = ": llm-compressor itself reads modifiers below a stage and a group alone, and ignores others in a file"


@pytest.mark.parametrize(
    ("recipe", "notes"),
    [
        ({"QuantizationModifier": RTN[1]}, [f"QuantizationModifier{BARE}"]),
        ({"quant_modifiers": {"QuantizationModifier": RTN[1]}}, [f"quant_modifiers{BARE}"]),
        ({"modifiers": {"QuantizationModifier": RTN[1]}}, [f"modifiers{BARE}"]),
        ({"modifiers": [{"QuantizationModifier": RTN[1]}]}, [f"modifiers{BARE}"]),
        ({"quant_stage": {"modifiers": {"QuantizationModifier": RTN[1]}, "run_type": "oneshot"}}, [
            "quant_stage.modifiers: read as a group, as documented; llm-compressor's code ignores a group of this name"]),
        ({"default_stage_0": {"default_modifiers": {"QuantizationModifier": RTN[1]}}, "args": {}}, ["args: ignored: it steers llm-compressor's own run"]),
        ({"recipe": {"a_stage": {"b_modifiers": {"QuantizationModifier": RTN[1]}}}, "dataset": "ultrachat"}, ["dataset: ignored: it steers llm-compressor's own run"]),
    ],
)  # fmt: skip
def test_containers(recipe, notes):
    spec = load_spec(recipe)
    assert [text(rule) for rule in spec.rules] == ["kind:linear: weight int4/half/g128/source"]
    assert (spec.dialect, list(spec.notes)) == ("llm-compressor", notes)


def test_stages_and_groups_run_one_after_the_other():
    stages = {"a_stage": {"x_modifiers": {"SmoothQuantModifier": {}}}, "b_stage": {"y_modifiers": {"GPTQModifier": ROUND[1]}}}  # fmt: skip
    assert algorithms(stages) == ["smooth-quant(statistic=range)", GPTQ]


def test_run():
    recipe = several(RTN, model="m", dataset_path="d", num_calibration_samples=3, max_seq_length=4)
    assert load_spec(recipe).run == Run("m", calibration="d", samples=3, sequence_length=4)
    assert load_spec(several(RTN, max_seq_length=None)).run == Run()


def test_attention():
    """Its inputs, and with them the cache."""
    args = {"num_bits": 8, "type": "float", "strategy": "attn_head", "observer": "static_minmax"}
    only: dict[str, Any] = {"attention": {"targets": ["LlamaAttention"], "input_activations": args}}
    text = "float8_e4m3fn/head"
    spec = load_spec(scheme(None, config_groups=only))
    assert str(spec.attention) == f"q {text}, k {text}, v {text}"
    assert str(spec.cache) == text
    assert [str(rule.decision) for rule in spec.rules] == ["float (UNQUANTIZED)"]
    whole = {**only, "w8": {"targets": ["Linear"], "weights": {"num_bits": 8}}}
    spec = load_spec(scheme(None, config_groups=whole, kv_cache_scheme={"num_bits": 8, "observer": "static_minmax"}))
    assert (str(spec.cache), str(spec.attention)) == ("int8/half/tensor", f"q {text}, k {text}, v {text}")
    assert [str(rule.match) for rule in spec.rules] == ["kind:linear"]
    found = load_spec({"quant_method": "compressed-tensors", "config_groups": whole})
    assert (str(found.cache), found.attention) == (text, spec.attention)
    with pytest.raises(SpecError, match=r"attention.weights: is for layers; of attention input_activations alone"):
        load_spec(scheme(None, config_groups={"attention": {**only["attention"], "weights": {"num_bits": 8}}}))
    with pytest.raises(SpecError, match=r"input_activations: is missing"):
        load_spec(scheme(None, config_groups={"attention": {"targets": ["LlamaAttention"]}}))
    other = {"other": {"targets": "LlamaAttention", "input_activations": {"num_bits": 8}}}
    with pytest.raises(SpecError, match="another group quantizes attention in another way"):
        load_spec(scheme(None, config_groups={**only, **other}))
    with pytest.raises(SpecError, match="llm-compressor is not written with it"):
        write_spec(spec, "llm-compressor")


def test_cache():
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    spec = load_spec(scheme("W8A8", kv_cache_scheme={**cache, "observer": "static_minmax"}))
    assert str(spec.cache) == "float8_e4m3fn/tensor"
    spec = load_spec(scheme("W8A8", kv_cache_scheme={"num_bits": 8, "strategy": "attn_head"}))
    assert str(spec.cache) == "int8/half/head/ema"
    spec = load_spec(scheme(None, kv_cache_scheme=cache))
    assert str(spec.cache) == "float8_e4m3fn/tensor/ema"
    assert [text(rule) for rule in spec.rules] == ["kind:linear: float (UNQUANTIZED)"]


@pytest.mark.parametrize(
    ("recipe", "notes"),
    [
        (scheme(bypass_divisibility_checks=True), ["bypass_divisibility_checks: ignored: a last group may be shorter than the others here"]),
        (scheme(requires_calibration_data=False, start=-1, group="g"), [
            f"{key}: ignored: it is llm-compressor's own bookkeeping" for key in ("requires_calibration_data", "group", "start")]),
        (scheme(ignore=["LlamaRMSNorm"]), ["ignore[0]: ignored: graphq quantizes no LlamaRMSNorm"]),
        (scheme({"weights": {}}), ["scheme: read as one scheme, as documented; llm-compressor's code takes presets alone"]),
        (scheme({"W4A16": ["Linear"]}, targets=["Linear"]), ["targets: ignored: the presets have their own"]),
        (scheme(None, targets=["Linear"], config_groups={"W4A16": ["Linear"]}), ["targets: ignored: the groups have their own"]),
        (scheme({"W8A16": ["a"], "W4A16": ["a"]}), ["scheme.W4A16[0]: a is the target of two groups; the later one's, as llm-compressor has it"]),
        (scheme(weight_observer="mse", observer={"input": "minmax", "output": "minmax"}, output_observer="mse"), [
            "output_observer: ignored: outputs are not quantized",
            "observer: stands above weight_observer and input_observer, as documented; llm-compressor's code refuses both",
            "observer.output: ignored: outputs are not quantized"]),
        (weights(actorder="static"), ["config_groups.g.weights.actorder: ignored: GPTQModifier alone orders columns"]),
        (weights(observer_kwargs={"averaging_constant": 0.1, "chunk_size": 5}), [
            "config_groups.g.weights.observer_kwargs.averaging_constant: ignored: the observer has no use for it",
            "config_groups.g.weights.observer_kwargs.chunk_size: ignored: it changes no number"]),
        (inputs(dynamic=True, observer="minmax", observer_kwargs={"averaging_constant": 0.1}), [
            f"config_groups.g.input_activations.{key}: ignored: scales that are found at run time are those of the extremes" for key in ("observer", "observer_kwargs")]),
        (inputs(observer="mse"), ["config_groups.g.input_activations.observer: ignored: graphq fits one range to all batches, llm-compressor averages those of batches"]),
        (group(weights={}, format="naive-quantized"), ["config_groups.g.format: ignored: how a layer is stored follows from its plan and the target"]),
    ],
)  # fmt: skip
def test_notes(recipe, notes):
    assert [note.removeprefix(PREFIX) for note in load_spec(recipe).notes] == notes


@pytest.mark.parametrize(
    ("modifiers", "notes"),
    [
        ([("GPTQModifier", {"scheme": "W4A16", "offload_hessians": True, "batched_quantization": "auto"})], [
            "GPTQModifier.offload_hessians: ignored: it changes no number", "GPTQModifier.batched_quantization: ignored: it changes no number"]),
        ([("AWQModifier", {"offload_device": "cpu", "mappings": [{"smooth_layer": "a", "balance_layers": ["b"], "activation_hook_target": "c"}]}), RTN], [
            "AWQModifier.offload_device: ignored: it changes no number",
            "AWQModifier.mappings[0].smooth_layer: ignored: what takes the factors up is read from the graph",
            "AWQModifier.mappings[0].activation_hook_target: ignored: what the layers read is read from the graph"]),
        ([("AWQModifier", {"scheme": "W4A16"})], [
            "AWQModifier: read with a QuantizationModifier behind it, as earlier releases have it; llm-compressor 0.14 refuses its scheme and targets"]),
        ([("SmoothQuantModifier", {"num_calibration_steps": 3, "mappings": [[["a"], "b"]]}), RTN], [
            "SmoothQuantModifier.num_calibration_steps: ignored: llm-compressor does not use it either",
            "SmoothQuantModifier.mappings[0][1]: ignored: what takes the factors up is read from the graph"]),
        ([("SpinQuantModifier", {"transform_block_size": 32}), RTN], ["SpinQuantModifier.transform_block_size: heads are rotated whole"]),
        ([("AutoRoundModifier", {"scheme": "W4A16", "enable_torch_compile": False})], ["AutoRoundModifier.enable_torch_compile: ignored: it steers llm-compressor's own run"]),
    ],
)  # fmt: skip
def test_notes_of_algorithms(modifiers, notes):
    found = [note.removeprefix("quant_stage.quant_modifiers[0].") for note in load_spec(several(*modifiers)).notes]
    assert found == notes


def test_propagated_errors_are_noted():
    (note,) = load_spec(several(ROUND, propagate_error=True)).notes
    assert note == (
        "propagate_error: blocks are calibrated on what quantized blocks give, as documented; llm-compressor's code"
        " passes on changed weights, and quantizes nothing"
    )
