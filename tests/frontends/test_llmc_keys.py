"""LLMC configs, key by key: the rules they make, what is noted, and what is refused with which message."""

import copy
from pathlib import Path
from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.frontends.llmc import METHODS
from graphq.spec.algorithms import problems
from graphq.spec.folds import NORMS
from graphq.spec.match import parse_match
from graphq.spec.plan import KeepFloat
from graphq.spec.rules import Algorithm, Rule, Spec

WEIGHT = {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 128}
ACT = {"bit": 8, "symmetric": True, "granularity": "per_token"}
BASE = {"quant": {"method": "RTN", "weight": WEIGHT}}
GONE = object()
OFFLINE = (("r1", True), ("r2", False), ("r3", False), ("r4", False))
ONLINE = (("r1", True), ("r2", True), ("r3", False), ("r4", True))


def edited(*edits: tuple[str, Any]) -> dict[str, Any]:
    """The base config with values set, or taken out, at dotted paths."""
    config: dict[str, Any] = copy.deepcopy(BASE)
    for path, value in edits:
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        if value is GONE:
            del section[key]
        else:
            section[key] = copy.deepcopy(value)
    return config


def setting(*names: Any, **others: Any) -> dict[str, Any]:
    return {"layer_name": list(names), "do_quant": True, "weight": WEIGHT, **others}


def text(rule: Rule) -> str:
    return f"{rule.match}: {rule.decision}"


@pytest.mark.parametrize(
    ("edits", "rules"),
    [
        ([], ["blocks: weight int4/asym/g128"]),
        ([("quant.act", ACT), ("quant.quant_type", "int-quant")], ["blocks: weight int4/asym/g128, input int8/token/dynamic"]),
        ([("quant.act", ACT), ("quant.mix_bits.setting_0", setting("a", act="inherit"))], [
            "blocks: weight int4/asym/g128, input int8/token/dynamic", "a: weight int4/asym/g128, input int8/token/dynamic"]),
        ([("quant.act", ACT), ("quant.mix_bits.setting_0", setting("a", act="none"))], [
            "blocks: weight int4/asym/g128, input int8/token/dynamic", "a: weight int4/asym/g128"]),
        ([("quant.mix_bits.setting_0", setting("a", act=ACT))], [
            "blocks: weight int4/asym/g128", "a: weight int4/asym/g128, input int8/token/dynamic"]),
        ([("quant.mix_bits.setting_0", setting("mlp.a#2-7", "b#1..3"))], [
            "blocks: weight int4/asym/g128", "mlp.a#2-7: weight int4/asym/g128", "b#1..3: weight int4/asym/g128"]),
        ([(f"quant.mix_bits.setting_{i}", setting(f"l{i}")) for i in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)],
         ["blocks: weight int4/asym/g128", *(f"l{i}: weight int4/asym/g128" for i in range(11))]),
        ([("ignored_layers", {"block_ids": [4, "0-2", "7"]})], ["blocks: weight int4/asym/g128", "blocks#4-0..2-7: float (ignored_layers: block_ids)"]),
        ([("ignored_layers", {"block_ids": ["0-1"], "layer_names": ["mlp.a", "b"], "speical_names": ["model.layers.1.c"]})], [
            "blocks: weight int4/asym/g128",
            "mlp.a#0-1: float (ignored_layers: layer_names)",
            "b#0-1: float (ignored_layers: layer_names)",
            "=model.layers.1.c: float (ignored_layers: speical_names)",
        ]),
        ([("ignored_layers", {"block_ids": [], "layer_names": [], "speical_names": []})], ["blocks: weight int4/asym/g128"]),
    ],
)  # fmt: skip
def test_rules(edits, rules):
    assert [text(rule) for rule in load_spec(edited(*edits)).rules] == rules


def test_methods_and_their_options():
    translated = {
        "RTN": (),
        "Awq": (Algorithm("awq", (("duo", False), ("clip", False))),),
        "GPTQ": (
            Algorithm("gptq", (("act_order", "none"), ("scales", "plan"), ("block_size", 128), ("dampening", 0.01))),
        ),
        "SmoothQuant": (Algorithm("smooth-quant", folds=NORMS),),
        "Quarot": (Algorithm("rotate", (*OFFLINE, ("kind", "random_hadamard"))),),
        "HQQ": (),
    }
    for method in METHODS:  # those that graphq lacks keep their names, which compile refuses
        special = {"rotate_mode": "hadamard"} if method == "Quarot" else {}
        spec = load_spec(edited(("quant.method", method), ("quant.special", special)))
        assert spec.algorithms == translated.get(method, (Algorithm(method.lower()),))
        assert spec.prefix == ("quantized" if method in ("RTN", "HQQ") else "float")
        assert bool(problems(spec)) == (method not in translated)
    special = {"relative_threshold": "inf", "scale": {"bit": 3}, "zero": {"int_range": [0, 7]}}
    spec = load_spec(edited(("quant.method", "SpQR"), ("quant.special", special)))
    options = (*(("relative_threshold", "inf"), ("scale.bit", 3), ("zero.int_range.0", 0), ("zero.int_range.1", 7)),)
    assert spec.algorithms == (Algorithm("spqr", options),)
    assert load_spec(edited(("quant.special.weight_clip", False))).algorithms == ()


def test_options_are_translated():
    def algorithm(method: str, **special: Any) -> Algorithm:
        (found,) = load_spec(edited(("quant.method", method), ("quant.special", special))).algorithms
        return found

    assert algorithm("Awq", trans=True, trans_version="v1", weight_clip=True) == Algorithm(
        "awq", (("duo", True), ("clip", True))
    )
    assert algorithm("Awq", trans_version="v2") == Algorithm("awq", (("duo", False), ("clip", False)))
    given = {"actorder": True, "static_groups": True, "percdamp": 0.02, "blocksize": 64, "true_sequential": True}
    options = (("act_order", "static"), ("scales", "plan"), ("block_size", 64), ("dampening", 0.02))
    assert algorithm("GPTQ", **given) == Algorithm("gptq", options)
    assert algorithm("SmoothQuant", alpha=0.8) == Algorithm("smooth-quant", (("alpha", 0.8),), folds=NORMS)
    random = algorithm("Quarot", rotate_mode="random", online_rotate=True, fp32_had=True)
    assert random == Algorithm("rotate", (*ONLINE, ("kind", "orthogonal")))
    offline = algorithm("Quarot", rotate_mode="hadamard", online_rotate=False)
    assert offline == Algorithm("rotate", (*OFFLINE, ("kind", "random_hadamard")))
    for translated in (
        algorithm("Awq"),
        algorithm("GPTQ", **given),
        algorithm("SmoothQuant", alpha=1),
        random,
        offline,
    ):
        assert problems(Spec((Rule(parse_match("blocks"), KeepFloat("x")),), (translated,))) == []


def test_hqq_is_the_range_of_all_weights():
    special = {"axis": 1, "lp_norm": 0.5, "beta": 5, "kappa": 1, "iters": 7}
    eight = {"bit": 8, "symmetric": True, "granularity": "per_channel", "calib_algo": "minmax"}
    spec = load_spec(
        edited(
            ("quant.method", "HQQ"),
            ("quant.special", special),
            ("quant.weight.lp_norm", 0.9),
            ("quant.weight.round_zp", False),
            ("quant.act", ACT),
            ("quant.mix_bits.setting_0", setting("a", weight=eight)),
        )
    )
    assert [text(rule) for rule in spec.rules] == [
        "blocks: weight int4/asym/g128/hqq0.5:5:1:7, input int8/token/dynamic",
        "a: weight int8/channel/hqq0.5:5:1:7",
    ]
    assert list(spec.notes) == [
        "quant.weight.lp_norm: ignored: an option of calib_algo hqq",
        "quant.weight.round_zp: zero points are integers here; the search knows it",
        "quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
    ]
    spec = load_spec(edited(("quant.method", "HQQ"), ("quant.weight.calib_algo", "hqq"), ("quant.weight.beta", 1)))
    assert str(spec.rules[0].decision) == "weight int4/asym/g128/hqq"
    assert spec.notes == ("quant.weight.beta: ignored: special has the options of HQQ",)


def test_the_kind_of_format_may_stand_above():
    e4m3 = {"bit": "e4m3", "granularity": "per_channel", "use_qtorch": True}
    for word in ("float-quant", "float_quant"):  # in LLMC's samples, and in its documentation
        spec = load_spec(edited(("quant.quant_type", word), ("quant.weight", e4m3)))
        assert str(spec.rules[0].decision) == "weight float8_e4m3fn/channel"
        assert spec.notes == ("quant.quant_type: read as documented; LLMC's code reads it under weight and act alone",)
    eight = {"quant_type": "int-quant", "bit": 8, "symmetric": True, "granularity": "per_channel"}
    spec = load_spec(
        edited(
            *(("quant.quant_type", "float-quant"), ("quant.weight", e4m3)),
            ("quant.mix_bits.setting_0", setting("a", weight=eight)),
        )
    )
    assert str(spec.rules[1].decision) == "weight int8/channel"


def test_blocks_are_calibrated_as_llmc_does():
    assert load_spec(edited(("quant.method", "Awq"))).prefix == "float"
    assert load_spec(edited(("quant.method", "Awq"), ("quant.quant_out", False))).prefix == "float"
    assert load_spec(edited(("quant.method", "Awq"), ("quant.quant_out", True))).prefix == "quantized"


def test_options_without_effect_are_noted():
    special = {
        "true_sequential": True,
        "save_scale": True,
        "clip_sym": True,
        "static_groups": False,
        "n_outs": [1],
        "do_gqa_trans": True,
    }
    assert sorted(load_spec(edited(("quant.method", "GPTQ"), ("quant.special", special))).notes) == [
        "quant.special.clip_sym: ignored: weights are clipped as their format is symmetric",
        "quant.special.do_gqa_trans: ignored: graphq scales through repeated heads",
        "quant.special.n_outs: ignored: an option of owq",
        "quant.special.save_scale: ignored: it steers LLMC's own run",
        "quant.special.static_groups: ignored: a group's range is that of the weights as they were",
        "quant.special.true_sequential: ignored: graphq calibrates a block at once",
    ]


@pytest.mark.parametrize(
    ("method", "special", "problem"),
    [
        ("Awq", {"alhpa": 1}, "alhpa: Awq has no such option"),
        ("OsPlus", {"true_sequental": 1}, "true_sequental: OsPlus has no such option; did you mean true_sequential?"),
        ("HQQ", {"lp_nrom": 1}, "lp_nrom: HQQ has no such option; did you mean lp_norm?"),
        ("HQQ", {"axis": 0}, "axis: groups along the output axis are not supported; write 1"),
        ("HQQ", {"axis": 2}, "axis: 2 is not 0 or 1"),
        ("HQQ", {"lp_norm": 0}, "lp_norm: hqq norm: 0 is not a number above 0 and up to 1"),
        ("HQQ", {"weight_clip": True}, "weight_clip: is not supported with HQQ"),
        ("Quarot", {}, "rotate_mode: is missing"),
        ("Quarot", {"rotate_mode": "hadamrd"}, "rotate_mode: 'hadamrd' is not hadamard or random"),
        ("GPTQ", {"online_rotate": True}, "online_rotate: LLMC rotates the model before, by a config of Quarot; in the native form one spec has both: algorithms: [{rotate: {r4: true}}, gptq]"),
        ("SmoothQuant", {"alhpa": 1}, "alhpa: SmoothQuant has no such option; did you mean alpha?"),
        ("SmoothQuant", {"alpha": "big"}, "alpha: 'big' is not a number"),
        ("Awq", {"trans": False}, "trans: Awq without its scales is not supported"),
        ("Awq", {"trans_version": "v3"}, "trans_version: 'v3' is not v1 or v2"),
        ("Awq", {"clip_version": "v2"}, "clip_version: v2 needs calib_algo: learnable of weight, in LLMC, too; write v1"),
        ("Awq", {"clip_version": "v3"}, "clip_version: 'v3' is not v1 or v2"),
        ("Awq", {"search_clip_init": True}, "search_clip_init: is not supported"),
        ("GPTQ", {"weight_clip": True}, "weight_clip: is not supported with GPTQ"),
        ("GPTQ", {"owq": True}, "owq: is not supported"),
        ("GPTQ", {"actorder": 1}, "actorder: 1 is not true or false"),
        ("GPTQ", {"blocksize": 1.5}, "blocksize: 1.5 is not an integer"),
        ("GPTQ", {"percdamp": True}, "percdamp: True is not a number"),
    ],
)  # fmt: skip
def test_options_that_are_refused(method, special, problem):
    with pytest.raises(SpecError) as caught:
        load_spec(edited(("quant.method", method), ("quant.special", special)))
    assert list(caught.value.problems) == [f"quant.special.{problem}"]


def test_what_has_no_effect_is_noted():
    config = edited(
        ("quant.weight.need_pack", True),
        ("quant.weight.mse_grid", 100),
        ("quant.weight.granularity", "per_channel"),
        ("quant.quant_out", True),
        ("quant.tp", 1),
        ("quant.token_reduction", {}),
        ("quant.mix_bits.setting_0", setting("a", do_quant=False, act=ACT)),
    )
    assert sorted(load_spec(config).notes) == [
        "quant.mix_bits.setting_0.act: ignored: do_quant is False",
        "quant.mix_bits.setting_0.weight: ignored: do_quant is False",
        "quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
        "quant.quant_out: ignored: graphq's own way of running holds",
        "quant.tp: ignored: graphq's own way of running holds",
        "quant.weight.group_size: ignored: the granularity is not per_group",
        "quant.weight.mse_grid: ignored: an option of calib_algo mse",
        "quant.weight.need_pack: ignored: the target decides",
    ]


NO_NAME = "is not a layer name: write dotted segments, such as mlp.down_proj"
NO_BLOCK = "is not a block index; write #2-7 for blocks 2 and 7, #2..7 for 2 to 7"
BITS = "is not supported; weight takes 2, 3, 4, 5, 6, 7 or 8"
SETTING = "quant.mix_bits.setting_0"
BLOCKS = {"bit": 8, "symmetric": True, "granularity": "per_block", "block_size": 64}


@pytest.mark.parametrize(
    ("edits", "problems"),
    [
        # sections
        ([("qaunt", {})], ["qaunt: unknown key; did you mean quant?"]),
        ([("base", {}), ("model", {}), ("quant", GONE), ("sparse", {"method": "Wanda"})], ["sparse: sparsity is not supported"]),
        ([("base", {}), ("model", {}), ("quant", []),], ["quant: a list is not a mapping"]),
        ([("quant.method", "SpinQuant")], ["quant.method: 'SpinQuant' learns rotations, which is not supported, and is in no release of LLMC; write Quarot"]),
        ([("quant", GONE), ("base", {}), ("model", {}), ("sparse", {"method": "TokenReduction"})], ["sparse: token reduction is not supported"]),
        ([("quant", GONE), ("base", {}), ("model", {}), ("sparse", {"method": "Dense"})], ["sparse: sparsity of the KV cache is not supported"]),
        ([("base", {}), ("model", {}), ("quant", {"language": BASE["quant"], "weight": WEIGHT})], ["quant.weight: unknown key"]),
        ([("base", {}), ("model", {}), ("quant", {"language": 3})], ["quant.language: 3 is not a mapping"]),
        ([("base", {}), ("model", {}), ("quant", {"language": BASE["quant"], "vision": {**BASE["quant"], "act": ACT}})], [
            "quant: vision and language are quantized in two ways, and graphq compiles one model at a time; leave the section of the model that is compiled"]),
        ([("base", {}), ("model", {}), ("quant", {"language": {**BASE["quant"], "token_reduction": {"method": "FastV"}}})], [
            "quant.language.token_reduction: token reduction is not supported"]),
        ([("base", {}), ("model", {}), ("quant", {"language": {}, "vision": {}})], [
            "quant.vision.method: is missing",
            "quant.vision.weight: is missing",
            "quant.language.method: is missing",
            "quant.language.weight: is missing",
        ]),
        ([("quant.mixbits", {})], ["quant.mixbits: unknown key; did you mean mix_bits?"]),
        ([("quant.token_reduction", {"method": "ToMe"})], ["quant.token_reduction: token reduction is not supported"]),
        ([("quant.quant_type", "hif4")], ["quant.quant_type: 'hif4' is not supported; write int-quant or float-quant"]),
        ([("quant.quant_type", "float_quant")], ["quant.weight.bit: 4 is no float format; write e4m3, or quant_type: int-quant here"]),
        ([("quant.weight", BLOCKS), ("quant.act", ACT)], ["quant.act: with per_block weights, LLMC takes per_group activations with group_size: 64"]),
        ([("quant.act", ACT), (SETTING, setting("a", act="inherit", weight=BLOCKS))], [
            f"{SETTING}.act: with per_block weights, LLMC takes per_group activations with group_size: 64"]),
        ([("quant.method", "QuaRot")], ["quant.method: 'QuaRot' is not a method; did you mean Quarot?"]),
        ([("quant.weight", GONE)], ["quant.weight: is missing"]),
        ([("quant.act", None)], ["quant.act: an empty value is not a mapping"]),
        ([("quant.method", GONE)], ["quant.method: is missing"]),
        ([("quant.method", "awq")], ["quant.method: 'awq' is not a method; did you mean Awq?"]),
        ([("quant.method", "GTPQ")], ["quant.method: 'GTPQ' is not a method; did you mean GPTQ?"]),
        ([("quant.special.weight_clip", True)], ["quant.special.weight_clip: RTN has no options"]),
        ([("quant.method", "SpQR"), ("quant.special", {"percdamp": float("inf")})], ["quant.special: spqr: percdamp: inf is not a finite number"]),
        # mix_bits
        ([("quant.mix_bits", [])], ["quant.mix_bits: a list is not a mapping"]),
        ([("quant.mix_bits.setting_1", setting("a"))], ["quant.mix_bits: setting_0 is missing: settings are numbered from 0 without a gap"]),
        ([("quant.mix_bits.setting_0", setting("a")), ("quant.mix_bits.setting_2", setting("b"))], ["quant.mix_bits: setting_1 is missing: settings are numbered from 0 without a gap"]),
        ([("quant.mix_bits.down", setting("a"))], [
            "quant.mix_bits.down: unknown key; settings are named setting_0, setting_1, ...",
            "quant.mix_bits: setting_0 is missing: settings are numbered from 0 without a gap",
        ]),
        ([(SETTING, 8)], [f"{SETTING}: 8 is not a mapping"]),
        ([(SETTING, setting("a", layer_names=["b"]))], [f"{SETTING}.layer_names: unknown key; did you mean layer_name?"]),
        ([(SETTING, setting("a", layer_name="down_proj"))], [f"{SETTING}.layer_name: 'down_proj' is not a list of names; write [down_proj]"]),
        ([(SETTING, setting())], [f"{SETTING}.layer_name: names no layer"]),
        ([(SETTING, {"do_quant": False})], [f"{SETTING}.layer_name: is missing"]),
        ([(SETTING, {"layer_name": ["a"]})], [f"{SETTING}.do_quant: is missing"]),
        ([(SETTING, setting("a", do_quant="no"))], [f"{SETTING}.do_quant: 'no' is not true or false"]),
        ([(SETTING, {"layer_name": ["a"], "do_quant": True})], [f"{SETTING}.weight: is missing"]),
        ([(SETTING, setting("a", weight=WEIGHT | {"bit": 9}))], [f"{SETTING}.weight.bit: 9 {BITS}"]),
        ([(SETTING, setting("a", act="inherit"))], [f"{SETTING}.act: quant has no act to inherit"]),
        ([(SETTING, setting("a", act="W8"))], [f"{SETTING}.act: 'W8' is not a mapping, inherit or none"]),
        ([(SETTING, setting("a", act=None))], [f"{SETTING}.act: an empty value is not a mapping, inherit or none"]),
        ([(SETTING, setting("a", "#0", "*.b", "a#1#2", "a#1,2", "a#x", "a#3..1", 7, "blocks"))], [
            f"{SETTING}.layer_name[1]: '' {NO_NAME}",
            f"{SETTING}.layer_name[2]: '*.b' {NO_NAME}",
            f"{SETTING}.layer_name[3]: #1#2: '1#2' {NO_BLOCK}",
            f"{SETTING}.layer_name[4]: #1,2: '1,2' {NO_BLOCK}",
            f"{SETTING}.layer_name[5]: #x: 'x' {NO_BLOCK}",
            f"{SETTING}.layer_name[6]: #3..1: the range 3..1 is empty; write #1..3",
            f"{SETTING}.layer_name[7]: 7 is not a layer name",
            f"{SETTING}.layer_name[8]: blocks stands for all layers of the repeated blocks; write *.blocks.* for layers below that name",
        ]),
        # ignored_layers
        ([("ignored_layers.special_names", [])], ["ignored_layers.special_names: unknown key; did you mean speical_names?"]),
        ([("ignored_layers.layer_names", ["a"])], ["ignored_layers.layer_names: has no effect in LLMC without block_ids; list the blocks, or write full speical_names"]),
        ([("ignored_layers.block_ids", "0-3")], ["ignored_layers.block_ids: '0-3' is not a list, such as [0, 2-5]"]),
        ([("ignored_layers.block_ids", ["4-3", "a", 1.5, -1, True])], [
            "ignored_layers.block_ids[0]: the range 4-3 is empty; write 3-4",
            "ignored_layers.block_ids[1]: 'a' is neither a block's number nor a range such as 2-5",
            "ignored_layers.block_ids[2]: 1.5 is neither a block's number nor a range such as 2-5",
            "ignored_layers.block_ids[3]: -1 is neither a block's number nor a range such as 2-5",
            "ignored_layers.block_ids[4]: True is neither a block's number nor a range such as 2-5",
        ]),
        ([("ignored_layers", {"block_ids": [0], "layer_names": "a", "speical_names": ["a b"]})], [
            "ignored_layers.layer_names: 'a' is not a list of names; write [a]",
            "ignored_layers.speical_names[0]: 'a b' is not a layer name: write dotted segments, such as model.layers.0.mlp.down_proj",
        ]),
        # several at once
        ([("quant.method", "Gptq2"), ("quant.weight.bit", 1), ("quant.act", ACT | {"bit": 3}), (SETTING, setting("a", do_quant=1)), ("extra", 1)], [
            "extra: unknown key",
            "quant.method: 'Gptq2' is not a method; did you mean GPTQ?",
            f"quant.weight.bit: 1 {BITS}",
            "quant.act.bit: 3 is not supported; act takes 4, 6, 8 or 16",
            f"{SETTING}.do_quant: 1 is not true or false",
        ]),
    ],
)  # fmt: skip
def test_refused(edits, problems):
    if not problems:
        load_spec(edited(*edits))
        return
    with pytest.raises(SpecError) as caught:
        load_spec(edited(*edits))
    assert list(caught.value.problems) == problems


def test_a_file_s_problems_have_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(
        "base:\n    seed: &seed 42\ncalib:\n    seed: *seed\nquant:\n    method: RTM\n    weight:\n        bit: 4\n"
        "        symetric: False\n        granularity: per_channel\n    mix_bits:\n        setting_0:\n"
        "            layer_name: down_proj\n            do_quant: 'no'\n"
    )
    with pytest.raises(SpecError) as caught:
        load_spec("c.yaml")
    assert list(caught.value.problems) == [
        "c.yaml:6:quant.method: 'RTM' is not a method; did you mean RTN?",
        "c.yaml:9:quant.weight.symetric: unknown key; did you mean symmetric?",
        "c.yaml:7:quant.weight.symmetric: is missing",
        "c.yaml:14:quant.mix_bits.setting_0.do_quant: 'no' is not true or false",
        "c.yaml:13:quant.mix_bits.setting_0.layer_name: 'down_proj' is not a list of names; write [down_proj]",
    ]
