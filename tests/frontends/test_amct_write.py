"""Specs as AMCT configs: what is written reads back as it was, and what AMCT cannot hold is refused by name."""

import dataclasses
from typing import Any

import pytest
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import amct, load_spec, print_spec, write_spec
from graphq.spec.constraint import Multiple
from graphq.spec.match import Glob, Kind, Part, parse_match
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Algorithm, Rule, Run, Spec
from tests.frontends.test_amct_table import LEGAL, config

ALGORITHMS = sorted({one[1] for one in LEGAL if one[1] is not None})
OF = {name: [config(one)["quant_cfg"] for one in LEGAL if one[1] == name] for name in ALGORITHMS}
CACHE = {"type": "hifloat8", "symmetric": True, "strategy": "tensor"}
PARTS = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=5) | st.sampled_from(
    ["lm_head", "no", "1", "1e3", "~", "a: b", "2020-01-01", "{", "<<"]
)
PATTERNS = st.text("abc._*[]?:{}'\"1", max_size=4).map(lambda text: f"*{text}")


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(ALGORITHMS))
    legal = st.sampled_from(OF[name])
    quant_cfg: dict[str, Any] = dict(draw(legal)) if draw(st.booleans()) else {}
    for text in draw(st.lists(PATTERNS, max_size=3, unique=True)):
        sections = {"inputs": {"enable_quant": False}} | draw(legal)
        quant_cfg |= {f"{text}.{key}": section for key, section in sections.items()}
    if not quant_cfg:
        quant_cfg = dict(draw(legal))
    options: dict[str, Any] = {name: None}
    if name == "awq" and draw(st.booleans()):
        options = {"awq": {"grids_num": draw(st.integers(1, (1 << 32) - 1))}}
    elif name == "smoothquant" and draw(st.booleans()):
        strength = draw(st.floats(0, 1, exclude_min=True, exclude_max=True))
        options = {"smoothquant": {"smooth_strength": strength}}
    if draw(st.booleans()):
        quant_cfg["kvcache"] = CACHE
        options.setdefault("quantile", None)
    made: dict[str, Any] = {"quant_cfg": quant_cfg, "algorithm": options}
    if draw(st.booleans()):
        made["batch_num"] = draw(st.integers(1, (1 << 32) - 1))
    if draw(st.booleans()):
        made["skip_layers"] = draw(st.lists(PARTS, max_size=3))
    return made


@given(configs())
def test_what_is_written_reads_as_it_was(source: dict[str, Any]) -> None:
    spec = load_spec(source)
    text = write_spec(spec, "amct")
    again = load_spec(text)
    assert again == spec
    assert again.dialect == "amct"
    assert print_spec(again) == print_spec(spec)
    assert write_spec(load_spec(print_spec(spec)), "amct") == text


@pytest.mark.parametrize("name", amct.PRESETS)
def test_presets_are_written(name: str) -> None:
    spec = load_spec(amct.preset(name))
    again = load_spec(write_spec(spec, "amct"))
    assert again == spec
    assert again.notes == ()


def test_the_text() -> None:
    source = {
        "batch_num": 2,
        "quant_cfg": {
            "weights": {"type": "int8", "symmetric": True, "strategy": "channel"},
            "inputs": {"type": "int8", "symmetric": False, "strategy": "tensor"},
            "kvcache": CACHE,
            "*mlp*.weights": {"type": "int4", "symmetric": True, "strategy": "tensor"},
            "*q*.weights": {"type": "int8", "symmetric": True, "strategy": "tensor"},
            "*mlp*.inputs": {"enable_quant": True, "type": "int8", "symmetric": True, "strategy": "tensor"},
        },
        "algorithm": {"smoothquant": {"smooth_strength": 0.25}, "quantile": None},
        "skip_layers": {"lm_head"},
    }
    assert_expected_inline(
        write_spec(load_spec(source), "amct"),
        """\
batch_num: 2
quant_cfg:
  weights:
    type: int8
    symmetric: true
    strategy: channel
  inputs:
    type: int8
    symmetric: false
    strategy: tensor
  '*mlp*.weights':
    type: int4
    symmetric: true
    strategy: tensor
  '*mlp*.inputs':
    type: int8
    symmetric: true
    strategy: tensor
  '*q*.weights':
    type: int8
    symmetric: true
    strategy: tensor
  '*q*.inputs':
    type: int8
    symmetric: false
    strategy: tensor
  kvcache:
    type: hifloat8
    symmetric: true
    strategy: tensor
algorithm:
  smoothquant:
    smooth_strength: 0.25
  quantile: null
skip_layers:
- lm_head
""",
    )


def test_of_several_algorithms_that_mean_one_plan_the_one_that_amct_has() -> None:
    hif8 = {"quant_cfg": {"weights": CACHE}, "algorithm": "minmax"}
    assert "algorithm:\n  quantile: null\n" in write_spec(load_spec(hif8), "amct")


# -- refusals

BASE = load_spec(amct.default_config())
INT8, SKIP = BASE.rules
AWQ = load_spec(amct.preset("INT4_AWQ_WEIGHT_QUANT_CFG"))
FREE = dataclasses.replace(INT8, only_if=())


def rules(*found: Rule, **others: Any) -> Spec:
    return dataclasses.replace(BASE, rules=found, **others)


def asked(name: str, **options: Any) -> tuple[Algorithm, ...]:
    return (Algorithm(name, tuple(options.items())),)


NEEDS = "kind linear, dtype bfloat16|float16, N <= 65535, K <= 65535, K % 32, N % 32"
AMCT_AWQ = {"n_grid": 20, "duo": False, "power": 4, "clip": False, "where": "multiply"}
REFUSED: dict[str, tuple[Spec, list[str]]] = {
    "cache": (dataclasses.replace(BASE, cache=parse_quant("int8/token/dynamic")), [
        "cache: int8/token/dynamic: AMCT's cache is hifloat8/tensor/ema"]),
    "pipeline": (dataclasses.replace(BASE, pipeline="independent"), [
        "pipeline: independent: AMCT has one algorithm, and no order"]),
    "prefix": (dataclasses.replace(BASE, prefix="float"), [
        "prefix: float: AMCT says nothing of it without an algorithm; write quantized"]),
    "prefix of an algorithm": (dataclasses.replace(AWQ, prefix="quantized"), [
        "prefix: quantized: AMCT calibrates every layer on float inputs; write float"]),
    "run": (dataclasses.replace(BASE, run=Run(model="m", seed=0, batches=1 << 32)), [
        "run: model: 'm': a config does not say it", "run: seed: 0: a config does not say it",
        "run: batches: 4294967296 is more than 2^32 - 1"]),
    "nothing but float": (rules(SKIP), ["the spec quantizes nothing"]),
    "nothing": (rules(Rule(Kind("linear"), KeepFloat("quant_cfg has no weights for it"), may_match_nothing=True)), [
        "the spec quantizes nothing"]),
    "an algorithm for nothing": (
        rules(Rule(Kind("linear"), KeepFloat("quant_cfg has no weights for it"), may_match_nothing=True),
              cache=parse_quant("hifloat8/tensor/ema"), algorithms=AWQ.algorithms, prefix="float"),
        ["awq: no rule quantizes a layer"]),
    "the first rule": (rules(dataclasses.replace(INT8, match=parse_match("blocks"))), [
        "blocks: the first rule is for all layers; write kind:linear|conv2d"]),
    "float first": (rules(Rule(parse_match("a"), KeepFloat("x")), dataclasses.replace(INT8, match=Glob("*b"))), [
        "a: a config keeps layers float by a part of their name, as in ~lm_head, and last"]),
    "float in between": (rules(INT8, SKIP, dataclasses.replace(INT8, match=Glob("*b"))), [
        "~lm_head: a config keeps layers float by a part of their name, as in ~lm_head, and last"]),
    "names": (rules(INT8, *(dataclasses.replace(INT8, match=parse_match(m)) for m in ("a", "=b", "c?", "re:.*", "*d"))), [
        f"{text}: a config names layers by patterns with a *" for text in ("a", "=b", "c?", "re:.*")]),
    "a pattern twice": (rules(INT8, *[dataclasses.replace(INT8, match=Glob("*b"))] * 2), [
        "*b: stands twice, and the keys of a config do not"]),
    "may match nothing": (rules(dataclasses.replace(INT8, may_match_nothing=True)), [
        "kind:linear|conv2d: a config does not say may_match_nothing or exclusive"]),
    "exclusive": (rules(dataclasses.replace(INT8, exclusive="x")), [
        "kind:linear|conv2d: a config does not say may_match_nothing or exclusive"]),
    "a reason": (rules(INT8, Rule(Part("a"), KeepFloat("by hand"), may_match_nothing=True)), [
        "~a: a config gives no reason of its own; write 'skip_layers: a'"]),
    "a part that has to match": (rules(INT8, dataclasses.replace(SKIP, may_match_nothing=False)), [
        "~lm_head: a part of a name may match nothing in AMCT, and is not exclusive"]),
    "an exclusive part": (rules(INT8, dataclasses.replace(SKIP, exclusive="x")), [
        "~lm_head: a part of a name may match nothing in AMCT, and is not exclusive"]),
    "another format": (rules(dataclasses.replace(INT8, decision=Plan(parse_quant("int8/channel")))), [
        "kind:linear|conv2d: weight int8/channel: AMCT has no such combination"]),
    "inputs alone": (rules(dataclasses.replace(INT8, decision=Plan(None, parse_quant("int8/tensor")))), [
        "kind:linear|conv2d: input int8/tensor: AMCT has no such combination"]),
    "no constraints": (rules(FREE), [
        (f"kind:linear|conv2d: weight int8/by_sign/channel: AMCT quantizes by it only layers with {NEEDS}; write it as "
        "only_if")]),
    "another constraint": (rules(dataclasses.replace(INT8, only_if=(*INT8.only_if, Multiple("K", 7)))), [
        (f"kind:linear|conv2d: weight int8/by_sign/channel: AMCT quantizes by it only layers with {NEEDS}; write it as "
        "only_if")]),
    "another algorithm's plan": (dataclasses.replace(AWQ, rules=load_spec(amct.preset("HIFP8_OFMR_CFG")).rules), [
        ("kind:linear|conv2d: weight hifloat8/tensor/ofmr_absolute, input hifloat8/tensor/ofmr_absolute: AMCT has it "
        "with ofmr alone")]),
    "an algorithm": (rules(INT8, algorithms=asked("auto-round"), prefix="float"), [
        "auto-round: AMCT has no such algorithm"]),
    "options": (rules(INT8, algorithms=asked("gptq"), prefix="float"), ["gptq: AMCT's has scales plan"]),
    "other options": (rules(INT8, algorithms=asked("awq", **AMCT_AWQ | {"power": 2}), prefix="float"), [
        "awq: AMCT's has n_grid 20, duo False, power 4, clip False, where multiply"]),
    "grids": (rules(INT8, algorithms=asked("awq", **AMCT_AWQ | {"n_grid": 1 << 32}), prefix="float"), [
        "awq: AMCT's has n_grid 20, duo False, power 4, clip False, where multiply"]),
    "alpha": (dataclasses.replace(load_spec(amct.preset("INT8_SMOOTHQUANT_CFG")),
                                  algorithms=asked("smooth-quant", alpha="search", where="multiply")), [
        "smooth-quant: AMCT's has alpha 0.5, where multiply"]),
    "a match": (rules(INT8, algorithms=(Algorithm("gptq", (("scales", "plan"),), match=(Glob("*a"),)),), prefix="float"),
                ["gptq: AMCT's is for every layer; leave out its match"]),
    "two algorithms": (rules(INT8, algorithms=(*AWQ.algorithms, *asked("gptq", scales="plan")), prefix="float"), [
        "gptq: AMCT has one algorithm for a layer"]),
    "all at once": (Spec((FREE, SKIP), asked("auto-round"), run=Run(seed=1)), [
        "prefix: quantized: AMCT calibrates every layer on float inputs; write float",
        "run: seed: 1: a config does not say it", "auto-round: AMCT has no such algorithm",
        (f"kind:linear|conv2d: weight int8/by_sign/channel: AMCT quantizes by it only layers with {NEEDS}; write it as "
        "only_if")]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_amct_cannot_hold(name: str) -> None:
    spec, wanted = REFUSED[name]
    with pytest.raises(SpecError) as caught:
        write_spec(spec, "amct")
    assert list(caught.value.problems) == [f"amct: {line}" for line in wanted]


def test_the_order_of_options_does_not_matter() -> None:
    options = tuple(reversed(AWQ.algorithms[0].options))
    spec = dataclasses.replace(AWQ, algorithms=(Algorithm("awq", options),))
    assert load_spec(write_spec(spec, "amct")) == AWQ
