"""Descriptions of checkpoints as plans: types, agreement of a layer's tensors, what is counted, and what is refused."""

import json
from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.spec.algorithms import problems
from graphq.spec.match import Exact, Layer
from graphq.spec.rules import resolve

V1 = {"version": "1.0.0", "metadata": {}, "group_size": 0, "optional": {}}
IGNORED = "ignored: the layers' own types hold"


def text(data: dict[str, Any]) -> list[str]:
    return [f"{rule.match}: {rule.decision}" for rule in load_spec(data).rules]


TOKEN = "input int8/token/dynamic"


@pytest.mark.parametrize(
    ("kind", "size", "plan"),
    [
        ("W8A8", 0, "weight int8/channel/source, input int8/asym/joint/tensor"),
        ("W8A8_DYNAMIC", 0, f"weight int8/channel/source, {TOKEN}"),
        ("W8A8_DYNAMIC", 64, f"weight int8/g64, {TOKEN}"),
        ("W8A16", 0, "weight int8/channel/source"),
        ("W8A16", 128, "weight int8/g128"),
        ("W4A16", 0, "weight int4/channel/source"),
        ("W4A16", 64, "weight int4/g64"),
        ("W4A8_DYNAMIC", 0, f"weight int4/channel/source, {TOKEN}"),
        ("W4A4_DYNAMIC", 0, "weight int4/channel/source, input int4/token/dynamic"),
        ("W4A4_DYNAMIC", 32, "weight int4/g32, input int4/token/dynamic"),
        ("WFP8AFP8_DYNAMIC", 0, "weight float8_e4m3fn/channel/source, input float8_e4m3fn/token/dynamic"),
        ("W8A8_MXFP8", 32, "weight mxfp8_e4m3/ascend/source, input mxfp8_e4m3/ascend/dynamic"),
        ("W8A8_MIX", 0, "weight int8/channel/source, input int8/asym/joint/tensor"),
        ("W8A8FP8_DYNAMIC", 0, "weight float8_e4m3fn/channel/source, input float8_e4m3fn/token/dynamic"),
        ("W4A16_MXFP4", 32, "weight mxfp4/ascend/source"),
        ("W4A8_MXFP", 32, "weight mxfp4/ascend/source, input mxfp8_e4m3/ascend/dynamic"),
        ("W4A4_MXFP4", 32, "weight mxfp4/ascend/source, input mxfp4/ascend/dynamic"),
    ],
)
def test_types(kind, size, plan):
    assert text({"a.b.weight": kind, "a.b.weight_scale": kind, **V1, "group_size": size}) == [f"=a.b: {plan}"]


def test_one_group_size_for_the_whole_file():
    two_level = {
        f"e.{name}": "W4A8_DYNAMIC" for name in ("weight", "weight_scale", "weight_scale_second", "scale_bias")
    }
    dynamic = {"d.weight": "W8A8_DYNAMIC", "f.weight": "W4A8_DYNAMIC"}
    data = two_level | dynamic | {"group_size": 256}
    assert text(data) == [
        f"=e: weight int4/over_int8/g256, {TOKEN}",
        f"=d: weight int8/channel/source, {TOKEN}",
        f"=f: weight int4/channel/source, {TOKEN}",
    ]
    assert load_spec(data).notes == (
        "group_size: read as the group size of W4A8_DYNAMIC; W8A8_DYNAMIC have one scale for each channel",
    )
    mx = {"m.weight": "W4A4_MXFP4", "d.weight": "W8A8_DYNAMIC", "group_size": 32}
    assert text(mx)[1] == f"=d: weight int8/channel/source, {TOKEN}"
    assert text(mx | {"group_size": 64})[1] == f"=d: weight int8/g64, {TOKEN}"


def test_float_layers_and_the_rest():
    data = {
        "model_quant_type": "W8A8",
        "embed.weight": "FLOAT",
        "l.0.q.weight": "W8A8",
        "l.0.q.bias": "FLOAT",
        "l.0.q.quant_bias": "W8A8",
        "l.0.k.weight": "FLOAT",
        "l.0.k.bias": "FLOAT",
        "l.0.input_layernorm.weight": "FLOAT",
        "l.0.input_layernorm.module.bias": "FLOAT",
        "l.0.old_norm.module.weight": "FLOAT",
        "l.0.gate.e_score_correction_bias": "FLOAT",
        "l.1.eh_proj.weight": "FLOAT",
        "l.1.q.weight": "W8A8",
        **V1,
    }
    assert text(data) == [
        "=embed: float (FLOAT in the description)",
        "=l.0.q: weight int8/channel/source, input int8/asym/joint/tensor",
        "=l.0.k: float (FLOAT in the description)",
        "=l.1.eh_proj: float (FLOAT in the description)",
        "=l.1.q: weight int8/channel/source, input int8/asym/joint/tensor",
    ]
    spec = load_spec(data)
    assert [rule.may_match_nothing for rule in spec.rules] == [True, False, True, True, True]
    assert spec.notes == (
        f"version: {IGNORED}",
        f"model_quant_type: {IGNORED}",
        "l.1: predicts further tokens; the model may lack it",
        "4 FLOAT tensors of norms, biases and the like have no rule",
    )
    layers = {name: Layer(name, "linear", (8, 8), 0) for name in ("l.0.q", "l.0.k")}
    resolved, notes = resolve(spec, layers)
    assert str(resolved["l.0.q"].decision) == "weight int8/channel/source, input int8/asym/joint/tensor"
    assert notes[4:] == (
        "FLOAT: =embed matches no layer",
        "FLOAT: =l.1.eh_proj matches no layer",
        "W8A8: =l.1.q matches no layer",
    )
    assert load_spec({"a.weight": "W8A16"}).notes == (
        "W8A16: weights are read as symmetric, which the types do not say",
    )


def test_rotation_and_cache():
    spec = load_spec(
        {
            "a.weight": "W8A8",
            "optional": {"quarot": {"rotation_map": {}}},
            "kv_cache_type": "C8",
            "kv_quant_type": "C8",
            "a.k_proj.kv_cache_scale": "C8",
            "a.k_proj.kv_cache_offset": "C8",
        }
    )
    assert ([a.name for a in spec.algorithms], problems(spec), str(spec.cache)) == (["rotate"], [], "int8/channel")
    assert load_spec({"a.weight": "W8A8", "is_rot_used": True}).algorithms == spec.algorithms
    assert load_spec({"a.weight": "W8A8", "is_rot_used": False}).algorithms == ()
    assert load_spec({"a.weight": "W8A8", "max_supported_tp": 4}).cache is None


Q = {"a.q.weight": "W8A8"}


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (Q | {"a.q.weight_scale": "W8A8_DYNAMIC", "a.q.deq_scale": "W8A8"}, [
            "'a.q.weight_scale': W8A8_DYNAMIC contradicts a.q.weight, which is W8A8"]),
        (Q | {"a.q.deq_scale": "FLOAT"}, ["'a.q.deq_scale': FLOAT contradicts a.q.weight, which is W8A8"]),
        ({"a.k.weight": "FLOAT", "a.k.bias": "W8A8"}, ["'a.k.bias': W8A8 contradicts a.k.weight, which is FLOAT"]),
        (Q | {"a.k.weight_scale": "W8A8"}, ["'a.k.weight_scale': W8A8, but there is no a.k.weight"]),
        (Q | {"a.q.weight_scael": "W8A8"}, ["'a.q.weight_scael': weight_scael is not a tensor of a quantized layer; did you mean weight_scale?"]),
        (Q | {"b.weight": "W8A8_DYNAMC", "c.weight": "W8A8_DYNAMC"}, [
            "'b.weight': 'W8A8_DYNAMC', of 2 tensors, is not a type; did you mean W8A8_DYNAMIC?"]),
        (Q | {"b.weight": "W8A8S"}, ["'b.weight': W8A8S, of 1 tensor: sparsity is not supported"]),
        (Q | {"b.weight": "W4A4_FLATQUANT_DYNAMIC"}, ["'b.weight': W4A4_FLATQUANT_DYNAMIC, of 1 tensor: a learned transform is not supported"]),
        (Q | {"b.weight": "W4A4_MXFP4_SVD"}, ["'b.weight': W4A4_MXFP4_SVD, of 1 tensor: a low-rank float branch is not supported"]),
        (Q | {"b.weight": "W8A8S", "c.weight": "NF4"}, [
            "'b.weight': W8A8S, of 1 tensor: sparsity is not supported", "'c.weight': NF4, of 1 tensor: a table of sixteen values is not supported"]),
        (Q | {"b.weight": 8}, ["'b.weight': 8 is not a type such as W8A8"]),
        (Q | {"b.weight": {}}, ["'b.weight': a mapping is not a type such as W8A8"]),
        (Q | {"b c.weight": "W8A8"}, ["'b c.weight': 'b c' is not a layer name: write dotted segments, such as model.layers.0.mlp.down_proj"]),
        (Q | {"a.o_proj.div.mul_scale": "FLOAT"}, [
            "'a.o_proj.div.mul_scale': smoothing that stands before a layer on its own is not read; quantize the model anew"]),
        (Q | {"a.attn.quant_type": "INT8"}, ["'a.attn.quant_type': attention's own inputs are not quantized here; take the key out"]),
        (Q | {"fa_quant_type": "FAKQuant", "reduce_quant_type": "per_channel", "indexer_quant_type": "INT8_DYNAMIC"}, [
            f"{key}: is not supported: linears are quantized, and no attention or communication"
            for key in ("fa_quant_type", "reduce_quant_type", "indexer_quant_type")]),
        (Q | {"metadata": {"quarot": {}}}, ["metadata.quarot: rotation at run time is written in the native form alone, as rotate with r4"]),
        (Q | {"kv_cache_type": "C4", "metadata": 3}, ["metadata: 3 is not a mapping", "kv_cache_type: 'C4' is not C8"]),
        (Q | {"group_size": -1}, ["group_size: -1 is not a positive integer"]),
        (Q | {"group_size": "x"}, ["group_size: 'x' is not an integer"]),
        ({"e.weight": "W4A8_DYNAMIC", "e.weight_scale_second": "W4A8_DYNAMIC"}, [
            "group_size: is missing or 0: weight_scale_second has one scale for each group"]),
        ({"e.weight": "W4A8_DYNAMIC", "group_size": 256}, ["group_size: is 256, but no layer has weight_scale_second"]),
        ({"a.weight": "FLOAT"}, ["every layer is FLOAT: the description quantizes nothing"]),
        ({"model_quant_type": "W8A8"}, ["every layer is FLOAT: the description quantizes nothing"]),
    ],
)  # fmt: skip
def test_what_is_refused(data, found):
    with pytest.raises(SpecError) as caught:
        load_spec(data)
    assert list(caught.value.problems) == found


def test_problems_of_a_file_name_lines_and_are_few(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = dict.fromkeys([f"l.{i}.{name}" for i in range(30) for name in ("weight", "weight_scale")], "W8A8")
    data |= {f"l.{i}.weight_scale": "W8A16" for i in range(30)}
    (tmp_path / "d.json").write_text(json.dumps(data, indent=1))
    with pytest.raises(SpecError) as caught:
        load_spec("d.json")
    assert (
        caught.value.problems[0] == "d.json:3:'l.0.weight_scale': W8A16 contradicts l.0.weight, which is W8A8 (line 2)"
    )
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "d.json: 10 more problems of this kind"


def test_a_description_of_very_many_tensors(tmp_path):
    """Far beyond what a YAML file may hold."""
    names = [
        f"model.layers.{block}.mlp.experts.{i}.{n}_proj"
        for block in range(8)
        for i in range(256)
        for n in ("gate", "up", "down")
    ]
    data = {f"{name}.{suffix}": "W4A8_DYNAMIC" for name in names for suffix in ("weight", "weight_scale", "scale_bias")}
    path = tmp_path / "quant_model_description.json"
    path.write_text(json.dumps(data | V1, indent=4))
    spec = load_spec(path)
    layers = {name: Layer(name, "expert", (8, 8), 0) for name in names}
    resolved, _ = resolve(spec, layers)
    assert {str(one.decision) for one in resolved.values()} == {f"weight int4/channel/source, {TOKEN}"}
    assert [rule.match for rule in spec.rules] == [Exact(name) for name in names]
    assert spec.rules[1].source == "W4A8_DYNAMIC (line 5)"
