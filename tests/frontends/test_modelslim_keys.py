"""msModelSlim configs, key by key: the specs they make, what is noted, and who is rounded by what."""

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.spec.algorithms import problems
from graphq.spec.match import Layer
from graphq.spec.rules import resolve

A8 = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
S8 = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
W8 = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
W4 = W8 | {"dtype": "int4"}
MX = {"scope": "per_block", "dtype": "mxfp4", "method": "minmax"}


def lq(act: Any = A8, weight: Any = W8, **others: Any) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight} if act else {"weight": weight}, **others}


def cfg(*process: Any, **spec: Any) -> dict[str, Any]:
    return {"apiversion": "modelslim_v1", "spec": {"process": list(process), **spec}}


def groups(**ext: Any) -> dict[str, Any]:
    return W4 | {"scope": "per_group", "method": "gptq", "ext": ext}


def rules(config: dict[str, Any]) -> list[str]:
    return [f"{rule.match}: {rule.decision}" for rule in load_spec(config).rules]


def weights(**ext: Any) -> dict[str, Any]:
    return W8 | {"scope": "per_group", "ext": ext}


@pytest.mark.parametrize(
    ("act", "weight", "plan"),
    [
        (A8, W8, "weight int8/channel/source, input int8/token/dynamic"),
        (A8, groups(), "weight int4/over_int8/g128, input int8/token/dynamic"),
        (A8, groups(group_size=64), "weight int4/over_int8/g64, input int8/token/dynamic"),
        (A8, groups() | {"dtype": "int8", "symmetric": False}, "weight int8/asym/joint/g128, input int8/token/dynamic"),
        (A8, W4, "weight int4/channel/source, input int8/token/dynamic"),
        (A8, W4 | {"method": "ssz"}, "weight int4/channel/ssz/source, input int8/token/dynamic"),
        (A8, W4 | {"method": "ssz", "ext": {"step": 10}}, "weight int4/channel/ssz10/source, input int8/token/dynamic"),
        (S8, W8, "weight int8/channel/source, input int8/asym/joint/tensor"),
        (S8 | {"symmetric": True}, W8, "weight int8/channel/source, input int8/tensor"),
        (S8 | {"scope": "pd_mix"}, W8, "weight int8/channel/source, input int8/asym/joint/tensor"),
        (S8 | {"method": "histogram"}, W8, "weight int8/channel/source, input int8/asym/joint/tensor/histogram"),
        (None, W8, "weight int8/channel/source"),
        (None, W8 | {"symmetric": False}, "weight int8/asym/joint/channel"),
        (None, weights(group_size=32), "weight int8/g32"),
        (None, groups(), "weight int4/g128"),
        ({"dtype": "float"}, groups() | {"symmetric": False}, "weight int4/asym/joint/g128"),
        (A8 | {"dtype": "int4"}, W4, "weight int4/channel/source, input int4/token/dynamic"),
        (A8 | {"dtype": "int4"}, groups(), "weight int4/g128, input int4/token/dynamic"),
        (
            {"dtype": "fp8_e4m3", "scope": "per_token", "method": "minmax"},
            {"dtype": "fp8_e4m3", "scope": "per_channel", "method": "minmax"},
            "weight float8_e4m3fn/channel/source, input float8_e4m3fn/token/dynamic",
        ),
        (
            {"dtype": "mxfp8", "scope": "per_block", "method": "minmax"},
            {"dtype": "mxfp4", "scope": "per_block", "method": "minmax"},
            "weight mxfp4/ascend/source, input mxfp8_e4m3/ascend/dynamic",
        ),
    ],
)
def test_plans(act, weight, plan):
    assert rules(cfg(lq(act, weight))) == [f"linear:*: {plan}"]


BEYOND = "spec.process[0].qconfig: msModelSlim's v1 has"


@pytest.mark.parametrize(
    ("process", "notes"),
    [
        ([lq()], []),
        ([lq(A8, groups())], [f"{BEYOND} no W4A8 in groups itself; read as v0's, int4 over int8"]),
        ([lq(None, groups())], [f"{BEYOND} no W4A16 itself, its v0 has"]),
        (
            [lq(S8 | {"scope": "pd_mix"})],
            [
                (
                    "spec.process[0].qconfig: static scales to decode and dynamic ones to prefill are calibrated as static"
                    " ones; the target ascend writes both with its option prefill=dynamic"
                )
            ],
        ),
        (
            [lq(None, W8 | {"symmetric": False})],
            [f"{BEYOND} groups and asymmetric weights by gptq alone, not by minmax"],
        ),
        ([lq(None, weights(group_size=8))], [f"{BEYOND} groups and asymmetric weights by gptq alone, not by minmax"]),
        (
            [lq(A8, W8 | {"ext": {"group_size": 8}})],
            ["spec.process[0].qconfig.weight.ext.group_size: ignored: scope is per_channel"],
        ),
        (
            [lq(A8 | {"ext": {"scale_dtype": "bfloat16"}}, W4 | {"method": "ssz", "ext": {"group_size": 64}})],
            [
                "spec.process[0].qconfig.act.ext.scale_dtype: ignored: scales are float32 until a target stores them",
                "spec.process[0].qconfig.weight.ext.group_size: ignored: scope is per_channel",
            ],
        ),
        (
            [lq(A8 | {"ext": {"axes": 1}}), lq(MX | {"ext": {"axes": -1}}, MX | {"ext": {"axes": [-1]}})],
            [
                "spec.process[0].qconfig.act.ext.axes: ignored: scope is per_token",
                "spec.process[1].qconfig.act.ext.axes: ignored: blocks lie along the inputs",
                "spec.process[1].qconfig.weight.ext.axes: ignored: blocks lie along the inputs",
                "spec.process[1].include: ignored: linear:* has taken all of linear:* before",
            ],
        ),
        (
            [lq(include=["a"]), lq(include=["a", "*b"])],
            ["spec.process[1].include: ignored: linear:a has taken all of linear:a before"],
        ),
        (
            [{"type": "quarot", "max_tp_size": 4, "export_extra_info": True}, lq()],
            [
                "spec.process[0].max_tp_size: ignored: it is for online rotation",
                "spec.process[0].export_extra_info: ignored: the target decides",
            ],
        ),
        (
            [{"type": "flex_awq_ssz", "qconfig": {"act": A8, "weight": W4}}, lq()],
            ["spec.process[0].qconfig: ignored: factors are judged by each layer's own plan"],
        ),
    ],
)
def test_notes(process, notes):
    assert list(load_spec(cfg(*process)).notes) == notes


def test_notes_of_the_top_level():
    config = cfg(lq(), save=[{"type": "compressed_tensors", "part_file_size": 4}], dataset="a.jsonl")
    spec = load_spec({**config, "metadata": {}, "default": {}, "metdata": 1})
    assert spec.notes == (
        "metadata: ignored: it says what the config was tried with",
        "default: ignored: a key of the file's own",
        "metdata: ignored: a key of the file's own; did you mean metadata?",
        "spec.save[0].part_file_size: ignored: the target decides",
    )
    assert (spec.run.target, spec.run.calibration) == ("compressed-tensors", "a.jsonl")
    assert load_spec(cfg(lq(), runner="model_wise")).pipeline == "independent"
    assert {load_spec(cfg(lq(), runner=r)).pipeline for r in ("auto", "layer_wise", "dp_layer_wise")} == {"sequential"}


def test_the_services_for_images_and_for_diffusion_are_read_as_the_v1():
    """What is theirs alone is noted: their calibration data are images, and the pipelines around a diffusion model."""
    plain = load_spec(cfg(lq(), default_text="Describe."))
    assert plain.notes == (
        "spec.default_text: ignored: it stands beside images that have no text, and graphq reads no images from files",
    )
    images = cfg(lq(), dataset="calibImages", default_text="Describe.") | {"apiversion": "multimodal_vlm_modelslim_v1"}
    spec = load_spec(images)
    assert (spec, spec.run.calibration) == (plain, "")
    assert spec.notes[1:] == ("spec.dataset: ignored: graphq calibrates on text, or on the inputs that it is given",)
    diffusion = cfg(lq(), multimodal_sd_config={"a": 1}, save=[{"type": "mindie_format_saver"}])
    spec = load_spec(diffusion | {"apiversion": "multimodal_sd_modelslim_v1"})
    assert (spec.rules, spec.run.target) == (plain.rules, "mindie")
    assert spec.notes == (
        "spec.multimodal_sd_config: ignored: it runs the pipeline of a diffusion model; give the model's own inputs",
    )
    with pytest.raises(SpecError, match=r"spec.multimodal_sd_config: unknown key"):
        load_spec(diffusion)


ALL = ["norm-linear", "linear-linear", "ov", "up-down"]


@pytest.mark.parametrize(
    ("processor", "algorithm"),
    [
        ({"type": "quarot"}, "rotate {} everything"),
        ({"type": "quarot", "online": False, "block_size": 32}, "rotate {'block_size': 32} everything"),
        ({"type": "smooth_quant"}, "smooth-quant {'alpha': 0.5} norm-linear"),
        ({"type": "iter_smooth"}, "smooth-quant {'alpha': 0.9} everything"),
        ({"type": "iter_smooth", "alpha": "5e-1", "scale_min": "1e-5", "include": ["*"], "exclude": []}, "smooth-quant {'alpha': 0.5} everything"),
        ({"type": "iter_smooth", "enable_subgraph_type": ALL}, "smooth-quant {'alpha': 0.9} everything"),
        ({"type": "iter_smooth", "enable_subgraph_type": ["norm-linear", "ov"]}, "smooth-quant {'alpha': 0.9} norm-linear, ov"),
        ({"type": "iter_smooth", "enable_subgraph_type": ["norm-linear", "up-down"]}, "smooth-quant {'alpha': 0.9} norm-linear, up-down"),
        ({"type": "iter_smooth", "enable_subgraph_type": ["ov", "up-down"]}, "smooth-quant {'alpha': 0.9} ov, up-down"),
        ({"type": "iter_smooth", "enable_subgraph_type": ["linear-linear"]}, "smooth-quant {'alpha': 0.9} linear-linear"),
        ({"type": "iter_smooth", "enable_subgraph_type": ["ov", "norm-linear"], "include": ["*"], "exclude": ["*self_attn*"]},
         "smooth-quant {'alpha': 0.9} norm-linear, ov but *self_attn*"),
        ({"type": "smooth_quant", "include": ["*.{0..2}.input_layernorm"]},
         "smooth-quant {'alpha': 0.5} norm-linear of *.0.input_layernorm *.1.input_layernorm *.2.input_layernorm"),
        ({"type": "flex_awq_ssz", "qconfig": {"weight": W8}, "enable_subgraph_type": ["up-down"], "include": ["*mlp.experts*"]},
         "awq {'duo': False, 'clip': False} up-down of *mlp.experts*"),
        ({"type": "flex_smooth_quant"}, "smooth-quant {'alpha': 'search'} everything"),
        ({"type": "flex_smooth_quant", "alpha": None, "beta": None}, "smooth-quant {'alpha': 'search'} everything"),
        ({"type": "flex_smooth_quant", "alpha": 0.7, "beta": 0.3}, "smooth-quant {'alpha': 0.7} everything"),
        ({"type": "flex_awq_ssz", "qconfig": {"weight": W8}, "enable_subgraph_type": ["up-down"]},
         "awq {'duo': False, 'clip': False} up-down"),
        ({"type": "awq", "n_grid": 10}, "awq {'n_grid': 10, 'duo': False, 'clip': False} everything"),
    ],
)  # fmt: skip
def test_algorithms(processor, algorithm):
    spec = load_spec(cfg(processor, lq()))
    assert problems(spec) == []
    (found,) = spec.algorithms
    assert f"{found.name} {dict(found.options)} {found.folds}" == algorithm
    assert found.match == ()
    assert found.source == "process[0]"


def roundings(*process: Any) -> list[str]:
    return [f"{a.name} {' | '.join(map(str, a.match))}" for a in load_spec(cfg(*process)).algorithms]


def test_who_is_rounded_by_gptq():
    gptq = W8 | {"method": "gptq"}
    assert roundings(lq(A8, gptq)) == ["gptq "]
    assert roundings(lq(A8, gptq, include=["*a", "b"]), lq(A8, groups())) == ["gptq "]
    assert roundings(lq(A8, gptq, include=["*a", "b"]), lq()) == ["gptq linear:*a | linear:b"]
    # What earlier processors take is left out.
    assert roundings(lq(include=["*mlp*"]), lq(A8, gptq)) == ["gptq linear:* but *mlp*"]
    assert roundings(lq(include=["x.a", "y"]), lq(A8, gptq, include=["x.*"], exclude=["*c"])) == [
        "gptq linear:x.* but *c x.a"
    ]
    assert roundings(lq(include=["x.*"]), lq(A8, gptq, include=["x.a", "y.a"])) == ["gptq linear:y.a"]
    assert roundings(lq(include=["x.*"], exclude=["*a"]), lq(A8, gptq, include=["x.a"])) == ["gptq linear:x.a"]
    assert roundings(lq(include=["x.*"]), lq(A8, gptq, include=["y.*"])) == ["gptq linear:y.*"]  # they cannot meet
    assert roundings(lq(include=["x.*"]), lq(A8, gptq, exclude=["x.*"])) == ["gptq linear:* but x.*"]
    assert roundings(lq(exclude=["*mlp*"]), lq(A8, gptq, include=["*mlp.up"])) == ["gptq linear:*mlp.up"]
    assert roundings(lq(include=["*a*"], exclude=["x.*"]), lq(A8, gptq, include=["y*"])) == ["gptq linear:y* but *a*"]
    assert roundings(lq(include=["x.a*"], exclude=["*c"]), lq(A8, gptq, exclude=["x.*"])) == ["gptq linear:* but x.*"]
    assert roundings(lq(A8, gptq, include=["a.*"]), lq(A8, gptq, include=["*c"]), lq()) == [
        "gptq linear:*c | linear:a.*"
    ]
    learned = {"type": "autoround_quant", "strategies": [{"qconfig": {"weight": W4 | {"method": "autoround"}}}]}
    assert load_spec(cfg(learned)).algorithms[0].options == (("steps", 10),)
    damped = gptq | {"ext": {"percdamp": "1e-1"}}
    assert roundings(lq(A8, gptq, include=["x.*"]), lq(A8, damped)) == ["gptq linear:x.*", "gptq linear:* but x.*"]


def test_the_first_processor_that_selects_a_layer_keeps_it():
    def layer(name: str) -> Layer:
        return Layer(name, "linear", (8, 8), 0)

    layers = {name: layer(name) for name in ("b.q", "b.kv", "b.up", "b.down", "b.e.0.up")}
    config = cfg(
        {
            "type": "group",
            "configs": [lq(include=["*.[qk]*"], exclude=["*kv"]), lq(A8, W4, exclude=["*down", "*.e.*", "*.q"])],
        },
        lq(S8, W8, include=["*.kv", "*.e.*"]),
    )
    resolved, notes = resolve(load_spec(config), layers)
    assert {name: f"{one.decision} {one.rule and one.rule.source}" for name, one in resolved.items()} == {
        "b.q": "weight int8/channel/source, input int8/token/dynamic process[0].configs[0]",
        "b.kv": "weight int4/channel/source, input int8/token/dynamic process[0].configs[1]",
        "b.up": "weight int4/channel/source, input int8/token/dynamic process[0].configs[1]",
        "b.down": "float (linear_quant excludes it) process[0].configs[1]: exclude",
        "b.e.0.up": "weight int8/channel/source, input int8/asym/joint/tensor process[1]",
    }
    assert notes == ()
    resolved, notes = resolve(load_spec(cfg(lq(exclude=["*dwon"]))), layers)
    assert notes == ("process[0]: exclude: linear:*dwon matches no layer",)
    for bad, problem in (
        (lq(include=["*dwon"]), "process[0]: linear:*dwon matches no layer; did you mean down?"),
        (lq(include=["b.dwon"]), "process[0]: linear:b.dwon matches no layer; did you mean b.down?"),
        (lq(exclude=["b.dwon"]), "process[0]: exclude: =b.dwon matches no layer; did you mean b.down?"),
    ):
        with pytest.raises(SpecError) as caught:
            resolve(load_spec(cfg(bad)), layers)
        assert caught.value.problems == (problem,)


def test_the_cache():
    cache = {"type": "dynamic_cache", "include": ["*"]}
    assert str(load_spec(cfg(lq(), cache)).cache) == "int8/channel"
    assert str(load_spec(cfg(cache | {"qconfig": W8 | {"symmetric": False}}, lq())).cache) == "int8/asym/joint/channel"


def test_attention():
    kind = {"type": "fa3_quant"}
    assert str(load_spec(cfg(kind, lq())).attention) == "q int8/head, k int8/head, v int8/head"
    float8, token = {"dtype": "fp8_e4m3"}, {"dtype": "fp8_e4m3", "scope": "per_token"}
    found = load_spec(cfg(lq(), kind | {"qconfig": float8, "include": ["*"], "exclude": []})).attention
    assert str(found) == "q float8_e4m3fn/head, k float8_e4m3fn/head, v float8_e4m3fn/head"
    details = {"fa_q": token, "fa_k": float8}
    found = load_spec(cfg(lq(), kind | {"details": details})).attention
    assert str(found) == "q float8_e4m3fn/token/dynamic, k float8_e4m3fn/head"


WORDS = st.sampled_from(
    [
        *(
            "type",
            "qconfig",
            "act",
            "weight",
            "include",
            "exclude",
            "ext",
            "scope",
            "dtype",
            "symmetric",
            "method",
            "*",
        ),
        *("linear_quant", "group", "configs", "autoround_quant", "strategies", "dynamic_cache", "awq", "quarot", "ssz"),
        *(
            "iter_smooth",
            "flex_smooth_quant",
            "per_channel",
            "per_group",
            "int4",
            "int8",
            "gptq",
            "minmax",
            "group_size",
        ),
        *("{a,b}", "{1..3}*", "[a]", "alpha", "block_size", "apiversion", "modelslim_v1", "spec", "process", "save"),
    ]
)
LEAVES = WORDS | st.text() | st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([1, 0.5, -1])
DATA = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(), inner, max_size=5)
)
FULL = cfg(
    {"type": "quarot", "block_size": -1},
    {"type": "iter_smooth", "alpha": 0.5, "enable_subgraph_type": ["ov"], "include": ["*"]},
    {"type": "flex_awq_ssz", "qconfig": {"act": A8, "weight": W4}},
    {"type": "awq", "weight_qconfig": W4, "n_grid": 3},
    {"type": "autoround_quant", "iters": 3, "strategies": [{"qconfig": {"weight": W4 | {"method": "autoround"}}, "include": ["{1..3}.*"]}]},
    {"type": "group", "configs": [lq(A8, groups(percdamp=0.1), include=["*a*"], exclude=["*{b,c}"])]},
    lq(S8, W8, include=["x*"]),
    {"type": "dynamic_cache", "qconfig": W8, "include": ["*"]},
    runner="auto", dataset="a", save=[{"type": "ascendv1_saver", "part_file_size": 4}],
)  # fmt: skip


def paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(path for key, value in items for path in paths(value, (*at, key)))]


def test_the_full_config_is_read():
    assert len(load_spec(FULL).rules) == 7


@given(st.sampled_from(paths(FULL)[1:]), DATA)
def test_a_config_with_one_value_replaced_is_read_or_refused(path, value):
    config: Any = copy.deepcopy(FULL)
    section = config
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with contextlib.suppress(SpecError):
        load_spec(config, "modelslim")
