"""The keys of AMCT configs: what each may be, and every problem with its exact message."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec
from graphq.spec.match import Layer
from graphq.spec.rules import resolve

INT8: dict[str, Any] = {"type": "int8", "symmetric": True, "strategy": "channel"}
INT4: dict[str, Any] = INT8 | {"type": "int4"}
TENSOR: dict[str, Any] = {"type": "int8", "symmetric": True, "strategy": "tensor"}
CACHE: dict[str, Any] = {"type": "hifloat8", "symmetric": True, "strategy": "tensor"}


def config(weights: Any = INT8, algorithm: Any = "minmax", **keys: Any) -> dict[str, Any]:
    """A config with these weights; ``keys`` of the top, or of ``quant_cfg``."""
    top = {key: keys.pop(key) for key in ("batch_num", "skip_layers") if key in keys}
    return {"quant_cfg": {"weights": weights, **keys}, "algorithm": algorithm, **top}


def problems(source: Any) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        load_spec(source, "amct")
    return caught.value.problems


THERE = "(there are minmax, smoothquant, awq, gptq, ofmr, quantile, cast, mxquant)"
BAD: dict[str, tuple[Any, list[str]]] = {
    "nothing": ({}, ["quant_cfg: is missing"]),
    "no weights": ({"quant_cfg": {}, "algorithm": "minmax"}, ["quant_cfg: has no weights: it quantizes nothing"]),
    "no cache": ({"quant_cfg": {"kvcache": {"enable_quant": False}}}, [
        "quant_cfg: has no weights: it quantizes nothing"]),
    "inputs alone": ({"quant_cfg": {"inputs": TENSOR}, "algorithm": "minmax"}, [
        "quant_cfg: has no weights: it quantizes nothing",
        "quant_cfg.inputs: AMCT quantizes no inputs alone; write weights, too",
    ]),
    "a list": ({"quant_cfg": [INT8]}, ["quant_cfg: a list is not a mapping"]),
    "empty weights": (config(None), ["quant_cfg.weights: an empty value is not a mapping"]),
    "unknown keys": (
        config(INT8 | {"groupsize": 32}, weight=INT8) | {"batchnum": 1, "skip": []},
        [
            "batchnum: unknown key; did you mean batch_num?",
            "skip: unknown key",
            "quant_cfg.weight: unknown key; did you mean weights?",
            "quant_cfg.weights.groupsize: unknown key; did you mean group_size?",
        ],
    ),
    "no algorithm": (
        {"quant_cfg": {"weights": INT8}},
        [("quant_cfg.weights: AMCT has no combination of weights int8 by channel symmetric, no algorithm; the nearest "
         "is weights int8 by channel symmetric, algorithm minmax")],
    ),
    "an empty algorithm": (config(algorithm=None), [
        "algorithm: an empty value is neither an algorithm's name nor a mapping of it to its options"]),
    "an empty set": (config(algorithm=set()), [
        "algorithm: is empty: name an algorithm, or leave the key out where there is none"]),
    "a number": (config(algorithm=[4]), ["algorithm: 4 is not the name of an algorithm"]),
    "a word": (config(algorithm="smooth_quant"), [
        f"algorithm: 'smooth_quant' is not an algorithm of AMCT's; did you mean smoothquant? {THERE}"]),
    "two words": (config(algorithm={"abq": None, "zzz": {}}), [
        f"algorithm: 'abq' is not an algorithm of AMCT's; did you mean awq? {THERE}",
        f"algorithm: 'zzz' is not an algorithm of AMCT's {THERE}"]),
    "two algorithms": (config(algorithm={"minmax", "gptq"}), [
        "algorithm: gptq, minmax: a layer has one algorithm; AMCT would take the last of them, of a set any of them"]),
    "options": (config(algorithm={"awq": {"grid_num": 10}}), [
        "algorithm.awq.grid_num: unknown key; did you mean grids_num?"]),
    "options that are none": (config(algorithm={"awq": 20}), ["algorithm.awq: 20 is not a mapping of options"]),
    "options of minmax": (config(algorithm={"minmax": {"grids_num": 20}}), [
        "algorithm.minmax.grids_num: minmax has no options"]),
    "no grids": (config(algorithm={"awq": {"grids_num": 0}}), [
        "algorithm.awq.grids_num: 0 is not a whole number from 1 to 2^32 - 1"]),
    "true grids": (config(algorithm={"awq": {"grids_num": True}}), [
        "algorithm.awq.grids_num: True is not a whole number from 1 to 2^32 - 1"]),
    "many grids": (config(algorithm={"awq": {"grids_num": 1 << 32}}), [
        "algorithm.awq.grids_num: 4294967296 is not a whole number from 1 to 2^32 - 1"]),
    "strength 1": (config(INT8, {"smoothquant": {"smooth_strength": 1}}, inputs=TENSOR), [
        "algorithm.smoothquant.smooth_strength: 1 is not a number between 0 and 1, such as 0.5"]),
    "strength 1.0": (config(INT8, {"smoothquant": {"smooth_strength": 1.0}}, inputs=TENSOR), [
        "algorithm.smoothquant.smooth_strength: 1.0 is not a number between 0 and 1, such as 0.5"]),
    "strength 0.0": (config(INT8, {"smoothquant": {"smooth_strength": 0.0}}, inputs=TENSOR), [
        "algorithm.smoothquant.smooth_strength: 0.0 is not a number between 0 and 1, such as 0.5"]),
    "strength nan": (config(INT8, {"smoothquant": {"smooth_strength": float("nan")}}, inputs=TENSOR), [
        "algorithm.smoothquant.smooth_strength: nan is not a number between 0 and 1, such as 0.5"]),
    "no batches": (config(batch_num=0), ["batch_num: 0 is not a whole number from 1 to 2^32 - 1"]),
    "true batches": (config(batch_num=True), ["batch_num: True is not an integer"]),
    "many batches": (config(batch_num=1 << 32), ["batch_num: 4294967296 is not a whole number from 1 to 2^32 - 1"]),
    "a bare string": (config(skip_layers="lm_head"), [
        "skip_layers: 'lm_head' is one text, and AMCT takes its letters one by one; write ['lm_head']"]),
    "no list": (config(skip_layers=None), [
        "skip_layers: an empty value is not a list of parts of layers' names, such as [lm_head]"]),
    "a part that is none": (config(skip_layers=["lm_head", 4, ""]), [
        "skip_layers[1]: 4 is not a part of a layer's name", "skip_layers[2]: '' is no part of a layer's name"]),
    "group_size of 0": (config(INT4 | {"strategy": "group", "group_size": 0}), [
        "quant_cfg.weights.group_size: 0 is not a whole number from 1"]),
    "group_size of too many": (config(INT4 | {"strategy": "group", "group_size": 10**9}), [
        "quant_cfg.weights.group_size: 1000000000 is not a whole number from 1"]),
    "group_size in words": (config(INT4 | {"strategy": "group", "group_size": "32"}), [
        "quant_cfg.weights.group_size: '32' is not an integer"]),
    "group_size of 48": (config(INT4 | {"strategy": "group", "group_size": 48}), [
        ("quant_cfg.weights: AMCT has no combination of weights int4 by group of 48 symmetric, algorithm minmax; the "
        "nearest is weights int4 by group of 64 symmetric, algorithm minmax")]),
    "group_size of 8": (config(INT4 | {"strategy": "group", "group_size": 8}), [
        ("quant_cfg.weights: AMCT has no combination of weights int4 by group of 8 symmetric, algorithm minmax; the "
        "nearest is weights int4 by group of 32 symmetric, algorithm minmax")]),
    "no group_size": (config(INT4 | {"strategy": "group"}), [
        ("quant_cfg.weights: AMCT has no combination of weights int4 by group symmetric, algorithm minmax; the nearest "
        "is weights int4 by group of 32 symmetric, algorithm minmax")]),
    "group_size of channels": (config(INT4 | {"group_size": 32}), [
        ("quant_cfg.weights: AMCT has no combination of weights int4 by channel of 32 symmetric, algorithm minmax; the "
        "nearest is weights int4 by channel symmetric, algorithm minmax")]),
    "asymmetric tokens": (config(inputs=TENSOR | {"symmetric": False, "strategy": "token"}), [
        ("quant_cfg.weights: AMCT has no combination of weights int8 by channel symmetric, inputs int8 by token "
        "asymmetric, algorithm minmax; the nearest is weights int8 by channel symmetric, inputs int8 by tensor "
        "asymmetric, algorithm minmax")]),
    "dynamic tensors": (config(inputs=TENSOR | {"dynamic": True}), [
        "quant_cfg.inputs.dynamic: is for strategy token alone, not for tensor; leave it out"]),
    "words for truth": (config(inputs=TENSOR | {"symmetric": "True"}), [
        "quant_cfg.inputs.symmetric: 'True' is not true or false"]),
    "enable_quant": (config(inputs=TENSOR | {"enable_quant": 1}), [
        "quant_cfg.inputs.enable_quant: 1 is not true or false"]),
    "empty inputs": (config(inputs={}), [
        "quant_cfg.inputs.type: is missing", "quant_cfg.inputs.symmetric: is missing",
        "quant_cfg.inputs.strategy: is missing"]),
    "a layer's name": (config(**{"model.layers.0.weights": INT4}), [
        ("quant_cfg.'model.layers.0.weights': has no *, and AMCT ignores it; write a pattern, such as "
        "*model.layers.0.weights")]),
    "a pattern of nothing": (config(**{"*mlp*": INT4}), ["quant_cfg.'*mlp*': unknown key"]),
    "a pattern of weight": (config(**{"*mlp*.weight": INT4, ".weights": INT4}), [
        "quant_cfg.'*mlp*.weight': unknown key; did you mean weights?",
        "quant_cfg.'.weights': unknown key; did you mean weights?"]),
    "a pattern's cache": (config(**{"*mlp*.kvcache": CACHE}), [
        "quant_cfg.'*mlp*.kvcache': a cache for some layers is not supported; write kvcache"]),
    "a pattern with blocks": (config(**{"*mlp*#1.weights": INT4}), [
        ("quant_cfg.'*mlp*#1.weights': '*mlp*#1': a pattern takes neither =, ~, re:, kind: or linear: nor #blocks; write a name, such as "
        "down_proj#0-1")]),
    "a pattern that is illegal": (config(**{"*mlp*.weights": INT8 | {"type": "hifloat8"}}, algorithm="awq"), [
        ("quant_cfg.'*mlp*.weights': AMCT has no combination of weights hifloat8 by channel symmetric, algorithm awq; "
        "the nearest is weights int8 by channel symmetric, algorithm awq")]),
    "a pattern's inputs alone": ({"quant_cfg": {"*mlp*.inputs": TENSOR}, "algorithm": "minmax"}, [
        "quant_cfg: has no weights: it quantizes nothing",
        "quant_cfg.'*mlp*.inputs': AMCT quantizes no inputs alone; write *mlp*.weights, too"]),
    "patterns apart": (config(**{"*a*.weights": INT4, "*b*.inputs": TENSOR}), [
        ("quant_cfg: AMCT looks for the first pattern with weights and for the first with inputs apart; write both for "
        "each pattern, in the same order")]),
    "a cache without quantile": (config(kvcache=CACHE), [
        "quant_cfg.kvcache: the cache has the algorithm quantile; add it to algorithm"]),
    "another cache": (config(kvcache={"type": "int8", "symmetric": False, "strategy": "token", "group_size": 1},
                             algorithm={"quantile", "minmax"}), [
        "quant_cfg.kvcache.group_size: unknown key",
        "quant_cfg.kvcache.type: 'int8' is not one of hifloat8",
        "quant_cfg.kvcache.symmetric: False is not supported: AMCT quantizes the cache symmetrically",
        "quant_cfg.kvcache.strategy: 'token' is not one of tensor"]),
    "an empty cache": (config(CACHE, "quantile", kvcache={}), [
        "quant_cfg.kvcache.type: is missing", "quant_cfg.kvcache.symmetric: is missing",
        "quant_cfg.kvcache.strategy: is missing"]),
    "a cache and an algorithm of layers": ({"quant_cfg": {"kvcache": CACHE}, "algorithm": {"quantile", "awq"}}, [
        "quant_cfg: has no weights for the algorithm awq"]),
    "a set of numbers": (config(skip_layers={1, 2}), ["skip_layers: a value of type set holds more than strings"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_configs(name: str) -> None:
    source, wanted = BAD[name]
    assert list(problems(source)) == wanted


def test_problems_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "amct.yaml"
    path.write_text("batch_num: 0\nquant_cfg:\n  weights:\n    type: int5\n    symmetric: 1\nalgorithm: {minmax}\n")
    assert list(problems(path)) == [
        f"{path}:1:batch_num: 0 is not a whole number from 1 to 2^32 - 1",
        (
            f"{path}:4:quant_cfg.weights.type: 'int5' is not one of int8, int4, hifloat8, float8_e4m3fn, mxfp4_e2m1, "
            "float4_e2m1, float4_e1m2, mxfp8_e4m3fn; did you mean int8?"
        ),
        f"{path}:5:quant_cfg.weights.symmetric: 1 is not true or false",
        f"{path}:3:quant_cfg.weights.strategy: is missing",
    ]
    path.write_text("quant_cfg:\n  weights: {type: int8, symmetric: True, strategy: channel}\nalgorithm: {ofmr}\n")
    assert problems(path)[0].startswith(f"{path}:2:quant_cfg.weights: AMCT has no combination of weights int8 by ")


# -- near misses: what is legal


@pytest.mark.parametrize(
    "algorithm", ["minmax", {"minmax"}, ["minmax"], {"minmax": None}, {"minmax": {}}, frozenset({"minmax"})]
)
def test_spellings_of_an_algorithm(algorithm: Any) -> None:
    assert load_spec(config(algorithm=algorithm)) == load_spec(config())


def test_options_have_defaults() -> None:
    assert load_spec(config(algorithm="awq")) == load_spec(config(algorithm={"awq": {"grids_num": 20}}))
    strength = {"smoothquant": {"smooth_strength": 0.5}}
    assert load_spec(config(INT8, "smoothquant", inputs=TENSOR)) == load_spec(config(INT8, strength, inputs=TENSOR))
    ten = dict(load_spec(config(algorithm={"awq": {"grids_num": 10}})).algorithms[0].options)
    assert ten == {"n_grid": 10, "duo": False, "power": 4, "clip": False, "where": "multiply"}


def test_batches() -> None:
    assert load_spec(config(batch_num=(1 << 32) - 1)).run.batches == (1 << 32) - 1
    assert load_spec(config()).run.batches is None


def test_a_set_is_read_in_the_order_of_the_alphabet() -> None:
    spec = load_spec(config(skip_layers={"b", "a", "c"}))
    assert [str(rule.match) for rule in spec.rules] == ["kind:linear|conv2d", "~a", "~b", "~c"]
    assert spec == load_spec(config(skip_layers=["a", "b", "c"]))
    assert [rule.source for rule in spec.rules] == ["quant_cfg.weights", *(f"skip_layers[{i}]" for i in range(3))]


def test_inputs_that_are_not_quantized() -> None:
    assert load_spec(config(inputs={"enable_quant": False})) == load_spec(config())
    assert load_spec(config(inputs=TENSOR | {"enable_quant": True})) == load_spec(config(inputs=TENSOR))
    spec = load_spec(config(inputs=TENSOR | {"enable_quant": False}))
    assert spec == load_spec(config())
    assert list(spec.notes) == [
        f"quant_cfg.inputs.{key}: ignored: enable_quant is False" for key in ("type", "symmetric", "strategy")
    ]


def test_caches() -> None:
    assert load_spec(config(kvcache={"enable_quant": False})).cache is None
    hif8 = {"type": "hifloat8", "symmetric": True, "strategy": "tensor"}
    both = load_spec(config(hif8, "quantile", kvcache=CACHE, inputs=hif8))
    assert (str(both.rules[0].decision), str(both.cache)) == (
        "weight hifloat8/tensor, input hifloat8/tensor/ema",
        "hifloat8/tensor/ema",
    )
    other = load_spec(config(algorithm={"quantile", "awq"}, kvcache=CACHE))
    assert [one.name for one in other.algorithms] == ["awq"]
    assert str(other.cache) == "hifloat8/tensor/ema"
    spec = load_spec(config(kvcache=CACHE | {"enable_quant": False}))
    assert spec.notes[0] == "quant_cfg.kvcache.type: ignored: enable_quant is False"


OLD = "AMCT's documentation of February 2026 has this combination, its code of August 2026 has not"


@pytest.mark.parametrize(
    ("source", "notes"),
    [
        (config(INT8 | {"type": "hifloat8"}), [f"quant_cfg.weights: {OLD}"]),
        (config(INT4 | {"type": "float4_e1m2", "strategy": "group", "group_size": 64}), [f"quant_cfg.weights: {OLD}"]),
        (config(INT8 | {"type": "hifloat8"}, "gptq"), []),
        (config(inputs=TENSOR | {"strategy": "token", "dynamic": False}), [
            "quant_cfg.inputs.dynamic: ignored: scales of tokens are computed at run time, as AMCT's deployed layers do"
        ]),
        (config(inputs=TENSOR | {"strategy": "token", "dynamic": True}), []),
        (config(CACHE, "ofmr", inputs=CACHE | {"strategy": "token"}), [
            "quant_cfg.weights: inputs by token: ofmr has no scales of tokens"]),
        (config(CACHE, "cast", inputs=CACHE | {"strategy": "token"}), [
            "quant_cfg.weights: inputs by token: cast has no scales of tokens"]),
        (config(CACHE, "quantile", inputs=CACHE | {"strategy": "token"}), []),
    ],
)  # fmt: skip
def test_notes(source: dict[str, Any], notes: list[str]) -> None:
    assert list(load_spec(source).notes) == notes


# -- patterns: AMCT takes the first that fits


def plans(quant_cfg: dict[str, Any], *names: str) -> list[str]:
    layers = {name: Layer(name, "linear", (64, 128), dtype="float16") for name in names}
    resolved, _ = resolve(load_spec({"quant_cfg": quant_cfg, "algorithm": "minmax"}), layers)
    return [str(one.decision) for one in resolved.values()]


def test_the_first_pattern_that_fits_decides() -> None:
    quant_cfg = {
        "weights": INT8,
        "*down*.weights": INT4,
        "*.mlp.*.weights": INT4 | {"strategy": "tensor"},
        "inputs": TENSOR,
        "*down*.inputs": {"enable_quant": False},
    }
    assert plans(quant_cfg, "a.mlp.down", "a.mlp.up", "a.q") == [
        "weight int4/by_sign/channel",
        "weight int4/by_sign/tensor, input int8/by_sign/tensor",
        "weight int8/by_sign/channel, input int8/by_sign/tensor",
    ]


def test_patterns_of_inputs_alone_keep_the_weights() -> None:
    quant_cfg = {"weights": INT8, "inputs": TENSOR, "*down*.inputs": TENSOR | {"strategy": "token"}}
    assert plans(quant_cfg, "a.down", "a.up") == [
        "weight int8/by_sign/channel, input int8/by_sign/token/dynamic",
        "weight int8/by_sign/channel, input int8/by_sign/tensor",
    ]


def test_patterns_without_weights_for_all() -> None:
    quant_cfg = {"*down*.weights": INT4}
    assert plans(quant_cfg, "a.down", "a.up") == [
        "weight int4/by_sign/channel",
        "float (quant_cfg has no weights for it)",
    ]


def test_a_pattern_that_fits_no_layer_is_an_error() -> None:
    with pytest.raises(SpecError) as caught:
        plans({"weights": INT8, "*mpl*.weights": INT4}, "a.mlp")
    assert caught.value.problems == ("quant_cfg.*mpl*.weights: *mpl* matches no layer",)


def test_a_convolution_that_fits_a_pattern_stays_float() -> None:
    spec = load_spec(config(**{"*a*.weights": INT4}))
    resolved, _ = resolve(spec, {"a": Layer("a", "conv2d", (64, 64, 1, 1))})
    assert str(resolved["a"].decision) == "float (needs kind linear: its kind is conv2d)"


# -- whatever stands in a config

WORDS = st.sampled_from(
    [
        *("quant_cfg", "weights", "inputs", "kvcache", "algorithm", "skip_layers", "batch_num", "type", "symmetric"),
        *("strategy", "group_size", "dynamic", "enable_quant", "*a*.weights", "*a*.inputs", "=*.weights", "*#.weights"),
        *("int8", "int4", "hifloat8", "mxfp4_e2m1", "tensor", "channel", "group", "token", "minmax", "awq", "gptq"),
        *("ofmr", "quantile", "grids_num", "smoothquant", "smooth_strength"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | WORDS | st.sampled_from([32, 64]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS, inner, max_size=4)
        | st.frozensets(st.text(max_size=2) | st.integers(), max_size=2)
    ),
    max_leaves=12,
)


@settings(max_examples=2 * settings().max_examples)
@given(st.dictionaries(WORDS, VALUES, max_size=4))
def test_any_config_raises_nothing_but_spec_errors(source: dict[str, Any]) -> None:
    with contextlib.suppress(SpecError):
        spec = load_spec(source | {"quant_cfg": source.get("quant_cfg", {})}, "amct")
        assert load_spec(print_spec(spec)) == spec
