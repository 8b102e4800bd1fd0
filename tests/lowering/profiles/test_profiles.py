"""The tables of what consumers run in integers: what all of them must hold, and what each must say."""

import dataclasses

import onnx
import pytest

from graphq.errors import SpecError
from graphq.ir.integer_units import takes_weight
from graphq.lowering.profiles import PROFILES, for_its_profile, profile_named
from graphq.spec.activations import ActivationRule
from graphq.spec.formats import Int, codes_of, parse_format
from graphq.spec.match import parse_match
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.profile import GEMM, LINEAR, OpTypes
from graphq.spec.quant import PerGroup, has_powers_of_two, parse_quant
from graphq.spec.rules import Rule, Spec

ONNX_KINDS = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
ROWS = [(p.name, kind) for p in PROFILES.values() for kind in p.ops]


def types_of(profile: str, kind: str) -> list[str]:
    rule = PROFILES[profile].ops[kind]
    return [str(types) for types in (*rule.types, *rule.also)]


def test_names():
    names = ["ort-cpu", "openvino", "tensorrt", "qnn-htp", "vitis-ai", "rknn", "generic-int8", "torch-cpu"]
    assert list(PROFILES) == names
    assert all(profile_named(name) is profile and profile.name == name for name, profile in PROFILES.items())
    with pytest.raises(SpecError, match="profile: hailo: no such profile; there are ort-cpu, openvino, tensorrt, "):
        profile_named("hailo")


@pytest.mark.parametrize("name", PROFILES)
def test_a_table_is_whole(name):
    profile = PROFILES[name]
    assert profile.consumer
    assert profile.sources
    low, high = profile.opsets
    assert 13 <= low <= high <= onnx.defs.onnx_opset_version()
    assert {"Conv", LINEAR} <= profile.ops.keys()
    for kind in ("Conv", LINEAR):
        rule = profile.ops[kind]
        assert profile.activations[0] == rule.types[0].inputs[0], "the default is what is placed first"
        assert rule.types[0].weight is not None
        assert takes_weight(rule.types[0].weight, profile.weight)
        assert has_powers_of_two(profile.weight.format) == profile.power_of_two
    assert all(isinstance(one, Int) for one in profile.activations)
    assert codes_of(profile.activation().format) == profile.activations[0]
    assert has_powers_of_two(profile.activation().format) == profile.power_of_two
    for source, made in profile.retypes.items():
        assert isinstance(parse_format(source), Int)
        assert parse_format(made) in profile.activations
    assert set(profile.lacks) & set(profile.ops) == set()
    assert set(profile.float_weights) <= {"LSTM", "GRU", "RNN"} - set(profile.ops)
    if profile.steps:  # whose ops it always has in integers
        parts = ("Linear", "Gather", "Slice", "Sigmoid", "Tanh", "Relu", "Mul", "Add", "Sub", "Unsqueeze", "Concat")
        assert {profile.ops[kind].placed for kind in parts} == {"always"}
    if profile.weights_alone is not None:
        assert profile.weights_alone.because
        assert bool(profile.weights_alone.rounded) == bool(profile.weights_alone.exact)


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_a_row_is_whole(name, kind):
    profile, rule = PROFILES[name], PROFILES[name].ops[kind]
    assert kind in ONNX_KINDS | {LINEAR, "Embedding"}
    assert rule.types
    assert rule.because or profile.sources
    assert not set(rule.types) & set(rule.also)
    for types in (*rule.types, *rule.also):
        assert all(isinstance(one, Int) for one in (*types.inputs, types.output))
        if kind in ("Conv", "ConvTranspose", LINEAR, GEMM):
            assert types.weight is not None
            assert types.weight.dynamic is False
    for types in rule.types:
        assert set(types.inputs) <= set(profile.activations) | {parse_format("int8"), parse_format("int8/asym")}
        if rule.output == "same":
            assert all(one == types.output for one in types.inputs)
    assert rule.output == "same" or not (rule.passes or rule.lifts or rule.regrids)
    assert rule.output != "optional" or not rule.one_reader
    if rule.retyped_alone:
        assert profile.retypes
        assert any(str(types.inputs[0]) in profile.retypes.values() for types in rule.types)
    for fault in rule.faults:
        assert fault.effect
        assert fault.instead


@pytest.mark.parametrize("name", PROFILES)
def test_chains_are_of_kinds_that_there_are(name):
    profile = PROFILES[name]
    assert len(set(profile.fuses)) == len(profile.fuses)
    for chain in profile.fuses:
        assert len(chain) > 1
        assert chain[0] in profile.ops
        assert set(chain) <= ONNX_KINDS | {LINEAR, "Silu"}


@pytest.mark.parametrize(("name", "kind"), [(p, k) for p, k in ROWS if PROFILES[p].ops[k].grids])
def test_a_fixed_grid_holds_its_function_s_range(name, kind):
    """Sigmoid and softmax from 0 to 1, tanh from -1 to 1, but for the last step."""
    least = -1.0 if kind == "Tanh" else 0.0
    for text, grid in PROFILES[name].ops[kind].grids.items():
        format = parse_format(text)
        assert isinstance(format, Int)
        assert not format.signed
        assert -grid.zero_point * grid.scale <= least
        assert ((1 << format.bits) - 1 - grid.zero_point) * grid.scale >= 1 - grid.scale


def test_ort_cpu():
    """U8 by S8 first; a Gemm is another row; in 16 bits nothing but what moves them; what codes pass through."""
    profile = PROFILES["ort-cpu"]
    assert types_of("ort-cpu", "Conv")[0] == "uint8 x int8/channel -> uint8"
    assert {kind for kind in profile.ops if any("16" in types for types in types_of("ort-cpu", kind))} == {
        *("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Expand", "Tile", "Gather", "Flatten")
    }
    assert not any("16" in str(types) for rule in profile.ops.values() for types in rule.types)
    assert profile.ops["Conv"].output == "required"
    assert profile.ops[LINEAR].output == "optional"
    assert (profile.ops[GEMM].bias, profile.ops[GEMM].bias_needed) == ("int32", "float output")
    assert {kind for kind, rule in profile.ops.items() if rule.passes} == {
        *("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "MaxPool")
    }  # fmt: skip
    assert profile.clamps == "covered"
    assert profile.retypes == {"int8": "uint8"}
    assert not profile.whole
    assert "Tanh" not in profile.ops


def test_openvino():
    """uint8 alone is placed; zero points of 0 in products; nothing element by element."""
    profile = PROFILES["openvino"]
    assert profile.activations == (parse_format("uint8"),)
    assert {kind for kind, rule in profile.ops.items() if rule.zero_points == "zero"} == {"MatMul", "ConvTranspose"}
    assert not {"Add", "Mul", "Sigmoid", "Softmax", "Tile", "Pad", "SpaceToDepth"} & profile.ops.keys()
    assert all(rule.output != "required" for rule in profile.ops.values())
    assert [kind for kind, rule in profile.ops.items() if rule.faults] == ["Conv", "Concat"]
    assert profile.refuses == ("int2", "uint2")


def test_tensorrt():
    """Symmetric int8 alone, biases in float, no output that has to be quantized, residual sums fused."""
    profile = PROFILES["tensorrt"]
    every = [types for rule in profile.ops.values() for types in rule.types]
    assert {str(one) for types in every for one in (*types.inputs, types.output)} == {"int8"}
    assert all(profile.ops[kind].bias == "float" for kind in ("Conv", LINEAR))
    assert all(profile.ops[kind].bias_needed == "always" for kind in ("Conv", LINEAR))
    assert all(rule.output != "required" for rule in profile.ops.values())
    assert ("Conv", "Add", "Relu") in profile.fuses
    assert not {"Softmax", "LayerNormalization"} & profile.ops.keys()
    assert "QLinearConv" not in profile.operators


def test_qnn_htp():
    """A static graph of u8 or u16, linears as Gemm with int32 biases, u8 gains of norms, fixed grids."""
    profile = PROFILES["qnn-htp"]
    assert profile.static
    assert profile.whole
    assert profile.linear == "gemm"
    assert [str(one) for one in profile.activations] == ["uint8", "uint16"]
    assert profile.ops["LayerNormalization"].types[0].weight == parse_quant("uint8/tensor")
    assert profile.ops["Sigmoid"].grids["uint16"].scale == 1 / 65536
    assert profile.ops[LINEAR].bias == "int32"


def test_vitis_ai():
    """Powers of two, symmetric, one scale for a weight; static; opset 17 at most."""
    profile = PROFILES["vitis-ai"]
    assert profile.power_of_two
    assert profile.static
    assert profile.opsets[1] == 17
    assert not any(types.weight == parse_quant("int8/channel") for types in profile.ops["Conv"].types)
    assert str(profile.weight) == "int8/pow2/tensor/mse0.2:100:2:5"
    assert str(profile.activation()) == "int8/pow2/tensor/histogram"


def test_a_spec_for_a_profile_that_wants_powers_of_two():
    plan = Plan(parse_quant("int8/half/tensor"), parse_quant("int8/tensor"), parse_quant("uint8/tensor/mse"))
    spec = Spec(
        (Rule(parse_match("a"), plan, "rules[0]"), Rule(parse_match("b"), KeepFloat("so"))),
        activations=(ActivationRule(parse_quant("int8/tensor")), ActivationRule(None, ("Add",))),
        profile="vitis-ai",
        notes=("a note",),
    )
    made = for_its_profile(spec)
    assert (
        str(made.rules[0].decision) == "weight int8/pow2/tensor, input int8/pow2/tensor, output uint8/pow2/tensor/mse"
    )
    assert made.rules[1] == spec.rules[1]
    assert [str(rule) for rule in made.activations] == ["all: int8/pow2/tensor", "Add: float"]
    assert made.notes == (
        "a note",
        "vitis-ai: scales are powers of two: int8/half/tensor is int8/pow2/tensor",
        "vitis-ai: scales are powers of two: int8/tensor is int8/pow2/tensor",
        "vitis-ai: scales are powers of two: uint8/tensor/mse is uint8/pow2/tensor/mse",
    )
    assert for_its_profile(made) is made or for_its_profile(made).notes == made.notes
    assert for_its_profile(dataclasses.replace(spec, profile="qnn-htp")).rules == spec.rules
    fitted = Rule(parse_match("a"), Plan(parse_quant("int8/channel/ssz")), "rules[0]")
    with pytest.raises(SpecError) as raised:
        for_its_profile(Spec((fitted, fitted), profile="vitis-ai"))
    assert raised.value.problems == 2 * (
        (
            "rules[0]: vitis-ai wants powers of two: int8/pow2/channel/ssz: ssz fits scales that may be any number; those of"
            " int8/pow2 are powers of two"
        ),
    )


def test_rknn():
    """int8 with a zero point, weights by channel; what is not verified says so."""
    profile = PROFILES["rknn"]
    assert str(profile.ops["Conv"].types[0]) == "int8/asym x int8/channel -> int8/asym"
    assert profile.opsets == (13, 19)
    assert profile.static
    assert all("unverified" in rule.because for rule in profile.ops.values())
    assert ("Conv", "HardSwish") in profile.fuses


def test_generic_int8():
    """All that ONNX's importers hold: uint8 or uint16, int8 weights by channel, int32 biases; no float."""
    profile = PROFILES["generic-int8"]
    assert profile.whole
    assert all(rule.placed == "always" for rule in profile.ops.values())
    assert profile.ops["Conv"].bias == "int32"


def test_torch_cpu():
    """uint8 first; floats come out of every product; what the fused layers compute is one op; the rest stays float."""
    profile = PROFILES["torch-cpu"]
    assert types_of("torch-cpu", "Conv")[0] == "uint8 x int8/channel -> uint8"
    assert {kind for kind, rule in profile.ops.items() if rule.output == "optional"} == {"Conv", LINEAR}
    assert all(rule.bias == "float" for rule in profile.ops.values())
    assert ("Conv", "Add", "Relu") in profile.fuses
    assert not {"Add", "GlobalAveragePool", "Softmax", "MatMul", "ConvTranspose"} & profile.ops.keys()


@pytest.mark.parametrize("name", PROFILES)
def test_blocks_are_of_weights_alone(name):
    """No consumer here multiplies codes that share scales by block in integers."""
    for rule in PROFILES[name].ops.values():
        assert not any(t.weight is not None and isinstance(t.weight.granularity, PerGroup) for t in rule.types)


def test_fields_beyond_the_first_have_defaults():
    """A new consumer's table says what is different, and nothing else."""
    assert {f.name for f in dataclasses.fields(OpTypes) if f.default is dataclasses.MISSING} == {"inputs", "output"}
