"""The weight, act and kvcache sections of LLMC configs: the formats they mean, and each refusal's message."""

from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.frontends.document import Document, Section
from graphq.frontends.llmc_format import Around
from graphq.frontends.llmc_tensor import read_tensor

WEIGHT = {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 128}
ACT = {"bit": 8, "symmetric": True, "granularity": "per_token"}
STATIC = ACT | {"granularity": "per_tensor", "static": True}
CACHE = ACT | {"method": "Naive", "granularity": "per_tensor"}
GONE = object()


def read(role: Any, values: dict[str, Any], method: str | None) -> tuple[str, list[str]]:
    present = {key: value for key, value in values.items() if value is not GONE}
    document = Document()
    quant = read_tensor(Section(document, present, (role,)), role, Around(method))
    return str(quant), document.problems


@pytest.mark.parametrize(
    ("role", "values", "method", "quant"),
    [
        ("weight", WEIGHT, "RTN", "int4/asym/g128"),
        ("weight", WEIGHT | {"granularity": "per_channel", "group_size": -1}, "RTN", "int4/asym/channel"),
        ("weight", WEIGHT | {"granularity": "per_tensor", "group_size": GONE}, "RTN", "int4/asym/tensor"),
        ("weight", WEIGHT | {"symmetric": True, "bit": 2}, "RTN", "int2/g128"),
        ("weight", WEIGHT | {"int_range": [0, 15], "round_zp": True, "ste": False}, "RTN", "int4/asym/g128"),
        ("weight", WEIGHT | {"calib_algo": "minmax", "quant_type": "int-quant", "w_1": {}}, "RTN", "int4/asym/g128"),
        ("weight", WEIGHT | {"calib_algo": "learnable"}, "OmniQuant", "int4/asym/g128"),
        ("weight", WEIGHT | {"ste": True}, "TesseraQ", "int4/asym/g128"),
        ("weight", WEIGHT | {"calib_algo": "hqq"}, "HQQ", "int4/asym/g128"),
        ("act", ACT, "RTN", "int8/token/dynamic"),
        ("act", ACT | {"granularity": "per_tensor"}, "RTN", "int8/tensor/dynamic"),
        ("act", STATIC | {"static": False}, "RTN", "int8/tensor/dynamic"),
        ("act", STATIC | {"calib_algo": "minmax", "bit": 16}, "RTN", "int16/tensor"),
        ("act", STATIC | {"calib_algo": "static_minmax", "quant_attn": False}, "RTN", "int8/tensor"),
        ("kvcache", CACHE, "RTN", "int8/tensor/dynamic"),
        ("kvcache", CACHE | {"granularity": "per_token", "special": {}}, "RTN", "int8/token/dynamic"),
        ("kvcache", CACHE | {"static": True, "bit": 4, "symmetric": False}, "RTN", "int4/asym/tensor"),
    ],
)
def test_formats(role, values, method, quant):
    assert read(role, values, method) == (quant, [])


@pytest.mark.parametrize(("own", "cache"), [({}, "int8/tensor"), ({"static": False}, "int8/tensor/dynamic")])
def test_a_cache_is_static_where_activations_are(own, cache):
    quant = {"method": "RTN", "weight": WEIGHT, "act": STATIC, "kvcache": CACHE | own}
    assert str(load_spec({"quant": quant}).cache) == cache


BITS = "is not supported; weight takes 2, 3, 4, 5, 6, 7 or 8"
GRANULARITY = "is not supported; weight takes per_tensor, per_channel or per_group"


@pytest.mark.parametrize(
    ("role", "values", "problem"),
    [
        ("weight", {"bits": 4}, "bits: unknown key; did you mean bit?"),
        ("weight", {"static": True}, "static: unknown key"),
        ("weight", {"special": {}}, "special: unknown key"),
        ("weight", {"bit": GONE}, "bit: is missing"),
        ("weight", {"bit": 1}, f"bit: 1 {BITS}"),
        ("weight", {"bit": 9}, f"bit: 9 {BITS}"),
        ("weight", {"bit": 48}, f"bit: 48 (int4 inside int8) {BITS}"),
        ("weight", {"bit": 4.0}, "bit: 4.0 is not an integer"),
        ("weight", {"bit": True}, "bit: True is not an integer"),
        ("weight", {"bit": "e4m3"}, "bit: 'e4m3': float formats are not supported; write a number"),
        ("weight", {"symmetric": GONE}, "symmetric: is missing"),
        ("weight", {"symmetric": "False"}, "symmetric: 'False' is not true or false"),
        ("weight", {"granularity": GONE}, "granularity: is missing"),
        ("weight", {"granularity": "per_block"}, f"granularity: 'per_block' {GRANULARITY}"),
        ("weight", {"granularity": "per_token"}, f"granularity: 'per_token' {GRANULARITY}"),
        ("weight", {"group_size": GONE}, "group_size: is missing"),
        ("weight", {"group_size": "128"}, "group_size: '128' is not an integer"),
        ("weight", {"group_size": 0}, "group_size: 0 is not a positive integer"),
        ("weight", {"group_size": -1}, "group_size: -1 is not a positive integer"),
        ("weight", {"calib_algo": "mse"}, "calib_algo: 'mse' is not supported; write minmax"),
        ("weight", {"calib_algo": "learnable"}, "calib_algo: 'learnable' is not supported; write minmax"),
        ("weight", {"calib_algo": "hqq"}, "calib_algo: 'hqq' is not supported; write minmax"),
        ("weight", {"quant_type": "float-quant"}, "quant_type: 'float-quant' is not supported; write int-quant"),
        ("weight", {"int_range": [-7, 7]}, "int_range: only the whole range is supported: [0, 15]"),
        ("weight", {"symmetric": True, "int_range": [0, 15]}, "int_range: only the whole range is supported: [-8, 7]"),
        ("weight", {"round_zp": False}, "round_zp: a float zero point is not supported; write True, or leave it out"),
        ("weight", {"ste": True}, "ste: straight-through rounding is part of methods that learn, and of no other"),
        ("weight", {"w_1": {"bit": 8}}, "w_1: a weight of two levels is not supported"),
        ("act", {"bit": 5}, "bit: 5 is not supported; act takes 4, 6, 8 or 16"),
        ("act", {"granularity": "per_group"}, "granularity: 'per_group' is not supported; act takes per_tensor or per_token"),
        ("act", {"static": True}, "static: one scale for each token exists only at run time; write granularity: per_tensor"),
        ("act", {"calib_algo": "static_minmax"}, "calib_algo: 'static_minmax' is not supported; write minmax"),
        ("act", STATIC | {"calib_algo": "static_hist"}, "calib_algo: 'static_hist' is not supported; write minmax or static_minmax"),
        ("act", {"quant_softmax": True}, "quant_softmax: quantization of anything but linear layers is not supported"),
        ("kvcache", {"bit": 9}, "bit: 9 is not supported; kvcache takes 2, 3, 4, 5, 6, 7 or 8"),
    ],
)  # fmt: skip
def test_refused(role, values, problem):
    whole = {"weight": WEIGHT, "act": ACT, "kvcache": CACHE}[role] | values
    assert read(role, whole, "RTN")[1] == [f"{role}.{problem}"]


@pytest.mark.parametrize(
    ("cache", "problems"),
    [
        (ACT, ["quant.kvcache.method: is missing"]),
        (CACHE | {"method": "Kivi", "residual_length": 128}, [
            "quant.kvcache.method: 'Kivi' is not supported; write Naive",
            "quant.kvcache.residual_length: options of other caches than Naive are not supported",
        ]),
    ],
)  # fmt: skip
def test_refused_caches(cache, problems):
    with pytest.raises(SpecError) as caught:
        load_spec({"quant": {"method": "RTN", "weight": WEIGHT, "kvcache": cache}})
    assert list(caught.value.problems) == problems
