"""modelslim_v0 configs: which layers get which plan, what is noted, and what is refused with which message."""

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec, write_spec
from graphq.frontends.modelslim.qconfig import PD_MIX
from graphq.spec.match import Layer
from graphq.spec.rules import Spec, resolve


def cfg(calib: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """A config with per-channel weights, as all that msModelSlim ships."""
    return {"apiversion": "modelslim_v0", "spec": {"calib_cfg": {"mm_tensor": False, **calib}, **spec}}


def first(**calib: Any) -> str:
    return str(load_spec(cfg(calib)).rules[0].decision)


STATIC = "weight int8/channel/source, input int8/asym/joint/tensor"
DYNAMIC = "weight int8/channel/source, input int8/token/dynamic"
LOW: dict[str, Any] = {"is_lowbit": True, "open_outlier": False}


@pytest.mark.parametrize(
    ("calib", "plan"),
    [
        ({}, STATIC),
        ({"w_bit": 8, "a_bit": 8, "w_sym": True, "act_method": 1, "pr": 1.0}, STATIC),
        ({"act_method": 2}, f"{STATIC}/histogram"),
        ({"is_dynamic": True}, DYNAMIC),
        ({"a_bit": 16}, "weight int8/channel/source"),
        ({"a_bit": 16, "w_sym": False}, "weight int8/asym/joint/channel"),
        ({"w_bit": 4, "a_bit": 16}, "weight int4/channel/source"),
        ({"w_bit": 4, "a_bit": 16, "group_size": 32}, "weight int4/channel/source"),
        ({"w_bit": 4, "a_bit": 16, **LOW}, "weight int4/g64"),
        ({"w_bit": 4, "a_bit": 16, "group_size": 32, "w_sym": False, **LOW}, "weight int4/asym/joint/g32"),
        (
            {"w_bit": 4, "is_dynamic": True, "group_size": 256, **LOW},
            "weight int4/over_int8/g256, input int8/token/dynamic",
        ),
        ({"w_bit": 4, "a_bit": 4, "is_dynamic": True}, "weight int4/channel/source, input int4/token/dynamic"),
    ],
)
def test_plans(calib, plan):
    assert first(**calib) == plan


LAYERS = {
    name: Layer(name, "linear", (256, 256), 0)
    for name in ("m.0.self_attn.q_proj", "m.0.mlp.up_proj", "m.0.mlp.down_proj", "m.1.mlp.down_proj", "lm_head")
}


def decided(spec: Spec) -> dict[str, str]:
    resolved, _ = resolve(spec, LAYERS)
    return {name: str(one.decision) for name, one in resolved.items()}


def test_names_stand_above_patterns_and_the_first_pattern_decides():
    """Rollbacks first, then full names, then patterns in order, then ``calib_cfg``, as msModelSlim looks them up."""
    spec = load_spec(
        cfg(
            {"disable_names": ["m.1.mlp.down_proj"]},
            calib_params={
                "disable_level": "L0",
                "mix_cfg": {
                    "*.down_proj": "w8a16",
                    "m.0.mlp.up_proj": "w8a8_dynamic",
                    "*.mlp.*": "float",
                    "m.1.mlp.down_proj": "w8a8",
                },
            },
        )
    )
    assert decided(spec) == {
        "m.0.self_attn.q_proj": STATIC,
        "m.0.mlp.up_proj": DYNAMIC,
        "m.0.mlp.down_proj": "weight int8/channel/source",
        "m.1.mlp.down_proj": "float (disable_names)",
        "lm_head": "float (disable_last_linear)",
    }


def test_the_same_layers_are_written_as_a_v1():
    spec = load_spec(cfg({"disable_names": ["m.1.mlp.down_proj"]}, calib_params={"mix_cfg": {"*.mlp.*": "w8a16"}}))
    again = load_spec(write_spec(spec, "modelslim"))
    assert [text.partition(" (")[0] for text in decided(again).values()] == [
        text.partition(" (")[0] for text in decided(spec).values()
    ]
    assert (again.algorithms, again.run) == (spec.algorithms, spec.run)


def test_the_last_linear_is_quantized_where_that_is_asked_for():
    assert decided(load_spec(cfg({"disable_last_linear": False})))["lm_head"] == STATIC
    assert decided(load_spec(cfg({"disable_last_linear": True})))["lm_head"] == "float (disable_last_linear)"


@pytest.mark.parametrize(
    ("anti", "algorithm", "alike"),
    [
        ({"anti_method": "m1"}, "smooth-quant {'alpha': 0.5}  norm-linear", "smooth_quant with alpha 0.5"),
        ({"anti_method": "m3"}, "awq {'duo': False, 'clip': False}  everything", "awq"),
        ({"anti_method": "m4"}, "smooth-quant {'alpha': 0.9}  everything", "iter_smooth with alpha 0.9"),
        ({"anti_method": "m6"}, "smooth-quant {'alpha': 'search'}  everything", "flex_smooth_quant"),
        (
            {"anti_method": "m6", "flex_config": {"alpha": 0.75, "beta": 0.25}, "disable_anti_names": ["a.o", "b.o"]},
            "smooth-quant {'alpha': 0.75} linear:* but a.o b.o everything",
            "flex_smooth_quant",
        ),
        (
            {"anti_method": "m6", "flex_config": {"alpha": None}},
            "smooth-quant {'alpha': 'search'}  everything",
            "flex_smooth_quant",
        ),
    ],
)
def test_smoothing(anti, algorithm, alike):
    spec = load_spec(cfg({}, anti_cfg=anti))
    (one,) = spec.algorithms
    assert f"{one.name} {dict(one.options)} {' '.join(map(str, one.match))} {one.folds}" == algorithm
    assert f"spec.anti_cfg.anti_method: read as {alike} of the v1, for the v0's is compiled" in spec.notes


def test_static_scales_are_those_of_pdmix():
    spec = load_spec(cfg({"pdmix": True}))
    assert (str(spec.rules[0].decision), spec.notes) == (STATIC, (f"spec.calib_cfg.pdmix: {PD_MIX}",))


def test_the_run_and_what_is_noted():
    spec = load_spec(
        cfg(
            {"dev_type": "npu", "fraction": 0.01, "group_size": 64, "use_kvcache_quant": True, "percdamp": 0.1},
            anti_cfg={"anti_method": "m4", "w_bit": 8, "flex_config": {}},
            calib_dataset="boolq.jsonl",
            anti_dataset="other.jsonl",
            batch_size=4,
            calib_save_params={"part_file_size": 4},
        )
    )
    assert (spec.dialect, spec.run.target, spec.run.calibration) == ("modelslim", "ascend", "boolq.jsonl")
    assert str(spec.cache) == "int8/channel"
    assert [note for note in spec.notes if "read as" not in note] == [
        "spec.anti_dataset: ignored: smoothing sees the data of calibration",
        "spec.batch_size: ignored: a window is a batch",
        "spec.calib_save_params: ignored: the target decides",
        "spec.anti_cfg.w_bit: ignored: factors are judged by each layer's own plan, where this runs",
        "spec.anti_cfg.flex_config: ignored: it is for m6",
        "spec.calib_cfg.fraction: ignored: an option of sparsity",
        "spec.calib_cfg.dev_type: ignored: it steers msModelSlim's own run",
        "spec.calib_cfg.group_size: ignored: there are groups with is_lowbit and without open_outlier alone",
        "spec.calib_cfg.percdamp: ignored: an option of GPTQ",
    ]
    (gptq,) = load_spec(cfg({"w_method": "GPTQ", "percdamp": 0.1, "a_bit": 16})).algorithms
    assert (gptq.name, dict(gptq.options)) == ("gptq", {"act_order": "none", "scales": "plan", "dampening": 0.1})


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        ({"apiversion": "modelslim_v0"}, ["spec: is missing"]),
        ({"apiversion": "modelslim_v0", "spec": {}}, ["spec.calib_cfg: is missing"]),
        (cfg({"mm_tensor": True}), ["spec.calib_cfg.mm_tensor: a weight has a scale for each channel; write False (left out, it is True)"]),
        ({"apiversion": "modelslim_v0", "spec": {"calib_cfg": {}}}, ["spec.calib_cfg.mm_tensor: a weight has a scale for each channel; write False (left out, it is True)"]),
        (cfg({"w_bits": 8}), ["spec.calib_cfg.w_bits: unknown key; did you mean w_bit?"]),
        (cfg({}, calib_cgf={}), ["spec.calib_cgf: unknown key; did you mean calib_cfg?"]),
        (cfg({"w_bit": 4, "co_sparse": True, "is_lowbit": True}), ["spec.calib_cfg.co_sparse: sparsity (W8A8S) is not supported"]),
        (cfg({"w_bit": 4, "is_lowbit": True}), ["spec.calib_cfg.is_lowbit: without is_dynamic, low bits are sparse: sparsity (W8A8S) is not supported"]),
        (cfg({"w_bit": 4}), ["spec.calib_cfg.w_bit: W4A8 has is_dynamic: True, is_lowbit: True, open_outlier: False and a group_size"]),
        (cfg({"w_bit": 4, "a_bit": 4}), ["spec.calib_cfg.w_bit: msModelSlim has no weights of 4 bits with inputs of 4 bits"]),
        (cfg({"w_bit": 6}), ["spec.calib_cfg.w_bit: msModelSlim has no weights of 6 bits with inputs of 8 bits"]),
        (cfg({"use_fa_quant": True, "fa_amp": 5}), [
            "spec.calib_cfg.use_fa_quant: attention's own inputs are not quantized; leave it out",
        ]),
        (cfg({"act_method": 3}), ["spec.calib_cfg.act_method: 3 chooses a range by layers, which is not supported; write 1 (minmax) or 2 (histogram)"]),
        (cfg({"act_method": 4}), ["spec.calib_cfg.act_method: 4 is not 1 (minmax) or 2 (histogram)"]),
        (cfg({"pr": 0.5}), ["spec.calib_cfg.pr: codes that are drawn are not supported; write 1.0"]),
        (cfg({"w_method": "NF"}), ["spec.calib_cfg.w_method: 'NF' is not supported; write MinMax or GPTQ"]),
        (cfg({"disable_names": ["a", 3]}), ["spec.calib_cfg.disable_names[1]: 3 is not a layer's name"]),
        (cfg({"group_size": 0, "w_bit": 4, "a_bit": 16, **LOW}), ["spec.calib_cfg.group_size: 0 is not a positive integer"]),
        (cfg({}, anti_cfg={"anti_method": "m2"}), ["spec.anti_cfg.anti_method: m2: a shift of channels is not supported; write m4"]),
        (cfg({}, anti_cfg={}), ["spec.anti_cfg.anti_method: m2: a shift of channels is not supported; write m4"]),
        (cfg({}, anti_cfg={"anti_method": "m7"}), ["spec.anti_cfg.anti_method: 'm7' is not one of m1 to m6"]),
        (cfg({}, anti_cfg={"anti_method": "m6", "flex_config": {"alpha": 0.75, "beta": 0.1}}), [
            "spec.anti_cfg.flex_config.alpha: beta is 1 - alpha in graphq; write such a pair, or neither to have them searched",
        ]),
        (cfg({}, anti_params={"norm_class_name": "RMSNorm"}), ["spec.anti_params: arguments of AntiOutlier are not supported; leave them out"]),
        (cfg({}, calib_params={"disable_level": "L10"}), ["spec.calib_params.disable_level: 'L10': layers that are chosen by their data are not supported; name them in disable_names"]),
        (cfg({}, calib_params={"mix_cfg": {"a*": "w8a8_dynamc", "b*": "w4a8_dynamic"}}), [
            "spec.calib_params.mix_cfg.'a*': 'w8a8_dynamc' is not one of w8a8, w8a16, w8a8_dynamic, float; did you mean w8a8_dynamic?",
            "spec.calib_params.mix_cfg.'b*': 'w4a8_dynamic' is not one of w8a8, w8a16, w8a8_dynamic, float; did you mean w8a8_dynamic?",
        ]),
    ],
)  # fmt: skip
def test_what_is_refused(config, problems):
    with pytest.raises(SpecError) as caught:
        load_spec(config)
    assert list(caught.value.problems) == problems


FULL = cfg(
    {
        "w_bit": 8,
        "a_bit": 8,
        "w_sym": True,
        "act_method": 2,
        "w_method": "GPTQ",
        "percdamp": 0.1,
        "pr": 1.0,
        "disable_names": ["a"],
        "disable_last_linear": True,
        "use_kvcache_quant": True,
        "group_size": 64,
        "is_dynamic": False,
        "is_lowbit": False,
        "open_outlier": True,
        "pdmix": False,
        "co_sparse": False,
    },
    anti_cfg={"anti_method": "m6", "flex_config": {"alpha": 0.5, "beta": 0.5}, "disable_anti_names": ["b"]},
    calib_params={"disable_level": "L0", "mix_cfg": {"*": "w8a8", "c": "float"}},
    calib_save_params={"part_file_size": 4},
    calib_dataset="d.jsonl",
)
SECTIONS = [("spec",), *(("spec", key) for key in ("anti_cfg", "calib_cfg", "calib_params", "calib_save_params"))]
PATHS = [(*at, key) for at in SECTIONS for key in (FULL["spec"] if len(at) == 1 else FULL["spec"][at[1]])]
VALUES = st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=5)


@given(st.sampled_from(PATHS), VALUES | st.lists(VALUES, max_size=3) | st.dictionaries(st.text(), VALUES, max_size=3))
def test_a_config_with_one_value_replaced_is_read_or_refused(path, value):
    """Whatever a value is, the config is read to a spec that prints and reads alike, or refused as a whole."""
    config = copy.deepcopy(FULL)
    section: Any = config
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with contextlib.suppress(SpecError):
        spec = load_spec(config, "modelslim")
        assert load_spec(print_spec(spec)) == spec
