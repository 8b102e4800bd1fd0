"""The weight, act and kvcache sections of LLMC configs: the formats they mean, and each refusal's message."""

from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.frontends.document import Document, Section
from graphq.frontends.llmc.format import Around
from graphq.frontends.llmc.tensor import read_tensor

WEIGHT = {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 128}
ACT = {"bit": 8, "symmetric": True, "granularity": "per_token"}
STATIC = ACT | {"granularity": "per_tensor", "static": True}
CACHE = ACT | {"method": "Naive", "granularity": "per_tensor"}
GONE = object()
E4M3 = {"bit": "e4m3", "symmetric": True, "granularity": "per_channel", "use_qtorch": True}


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
        ("weight", WEIGHT | {"calib_algo": "hqq"}, "RTN", "int4/asym/g128/hqq"),
        ("weight", WEIGHT | {"calib_algo": "hqq", "lp_norm": 1, "beta": 5, "kappa": 1, "iters": 3}, "RTN", "int4/asym/g128/hqq1:5:1:3"),
        ("weight", WEIGHT | {"calib_algo": "mse"}, "RTN", "int4/asym/g128/mse0.8:100:2.4:80"),
        ("weight", WEIGHT | {"calib_algo": "mse", "maxshrink": 0.29, "mse_grid": 100, "mse_b_num": 4}, "GPTQ", "int4/asym/g128/mse0.29:100:2.4:28"),
        ("weight", WEIGHT | {"calib_algo": "mse", "maxshrink": 0.1, "mse_grid": 5}, "RTN", "int4/asym/g128/mse0.1:5:2.4:1"),
        ("weight", WEIGHT | {"symmetric": True, "granularity": "per_block", "block_size": 64}, "RTN", "int4/64x64"),
        ("weight", E4M3, "RTN", "float8_e4m3fn/channel"),
        ("weight", E4M3 | {"float_range": [-448, 448], "quant_type": "float_quant"}, "RTN", "float8_e4m3fn/channel"),
        ("weight", E4M3 | {"bit": "e5m2", "float_range": [-57344, 57344.0], "symmetric": GONE}, "RTN", "float8_e5m2/channel"),
        ("weight", E4M3 | {"bit": "e3m2", "calib_algo": "mse"}, "RTN", "float6_e3m2/channel/mse0.8:100:2.4:80"),
        ("weight", E4M3 | {"bit": "e3m2", "use_qtorch": False}, "RTN", "float6_e3m2/channel"),
        ("weight", E4M3 | {"bit": "e2m1", "use_qtorch": GONE}, "RTN", "float4_e2m1/channel"),
        ("weight", E4M3 | {"bit": "e2m3", "use_qtorch": GONE}, "RTN", "float6_e2m3/channel"),
        ("weight", E4M3 | {"bit": "e1m2", "use_qtorch": GONE}, "RTN", "float4_e1m2/channel"),
        ("act", ACT, "RTN", "int8/token/dynamic"),
        ("act", ACT | {"granularity": "per_tensor"}, "RTN", "int8/tensor/dynamic"),
        ("act", STATIC | {"static": False}, "RTN", "int8/tensor/dynamic"),
        ("act", STATIC | {"calib_algo": "minmax", "bit": 16}, "RTN", "int16/tensor"),
        ("act", STATIC | {"calib_algo": "static_minmax", "quant_attn": False}, "RTN", "int8/tensor"),
        ("act", STATIC | {"calib_algo": "static_hist", "bins": 2048}, "RTN", "int8/tensor/histogram"),
        ("act", STATIC | {"calib_algo": "static_moving_minmax", "symmetric": False}, "RTN", "int8/asym/tensor/ema"),
        ("act", ACT | {"granularity": "per_group", "group_size": 64}, "RTN", "int8/g64/dynamic"),
        ("act", E4M3 | {"granularity": "per_tensor", "static": True}, "RTN", "float8_e4m3fn/tensor"),
        ("act", ACT | {"calib_algo": "learnable"}, "OmniQuant", "int8/token/dynamic"),
        ("kvcache", CACHE, "RTN", "int8/tensor/dynamic"),
        ("kvcache", CACHE | {"granularity": "per_token", "special": {}}, "RTN", "int8/token/dynamic"),
        ("kvcache", CACHE | {"static": True, "bit": 4, "symmetric": False}, "RTN", "int4/asym/tensor"),
        ("kvcache", CACHE | {"granularity": "per_group", "group_size": 32}, "RTN", "int8/g32/dynamic"),
        ("kvcache", CACHE | {"bit": "e4m3", "use_qtorch": True}, "RTN", "float8_e4m3fn/tensor/dynamic"),
    ],
)  # fmt: skip
def test_formats(role, values, method, quant):
    assert read(role, values, method) == (quant, [])


@pytest.mark.parametrize(("own", "cache"), [({}, "int8/tensor"), ({"static": False}, "int8/tensor/dynamic")])
def test_a_cache_is_static_where_activations_are(own, cache):
    quant = {"method": "RTN", "weight": WEIGHT, "act": STATIC, "kvcache": CACHE | own}
    assert str(load_spec({"quant": quant}).cache) == cache


BITS = "is not supported; weight takes 2, 3, 4, 5, 6, 7 or 8"
GRANULARITY = "is not supported; weight takes per_tensor, per_channel, per_group or per_block"


@pytest.mark.parametrize(
    ("role", "values", "problem"),
    [
        ("weight", {"bits": 4}, "bits: unknown key; did you mean bit?"),
        ("weight", {"static": True}, "static: unknown key"),
        ("weight", {"special": {}}, "special: unknown key"),
        ("weight", {"bit": GONE}, "bit: is missing"),
        ("weight", {"bit": 1}, f"bit: 1 {BITS}"),
        ("weight", {"bit": 9}, f"bit: 9 {BITS}"),
        ("weight", {"bit": 48}, f"bit: 48 (int4 inside int8, whose groups' scales LLMC rounds to integers) {BITS}"),
        ("weight", {"bit": 4.0}, "bit: 4.0 is not an integer"),
        ("weight", {"bit": True}, "bit: True is not an integer"),
        ("weight", {"bit": "e4m3"}, "bit: without use_qtorch, LLMC's e4m3 has other values than float8_e4m3fn; write use_qtorch: True"),
        ("weight", {"bit": "e4m7", "use_qtorch": True}, "bit: 'e4m7' is not one of e4m3, e5m2, e3m2, e2m3, e2m1, e1m2; did you mean e4m3?"),
        ("weight", {"bit": "4"}, "bit: '4' is not one of e4m3, e5m2, e3m2, e2m3, e2m1, e1m2"),
        ("weight", {"bit": "e2m3", "use_qtorch": True}, "use_qtorch: LLMC has no range of e2m3 for qtorch; leave it out"),
        ("weight", {"bit": "e2m1", "quant_type": "int-quant"}, "bit: 'e2m1' is a float format; write quant_type: float-quant, or a number"),
        ("weight", {"bit": "e4m3", "use_qtorch": True, "float_range": [-240, 240]}, "float_range: only the format's own range is supported: [-448, 448]"),
        ("weight", {"use_qtorch": True}, "use_qtorch: an option of float formats, such as bit: e4m3"),
        ("weight", {"quant_type": "hif4"}, "quant_type: 'hif4' is not supported; write int-quant or float-quant"),
        ("weight", {"symmetric": GONE}, "symmetric: is missing"),
        ("weight", {"symmetric": "False"}, "symmetric: 'False' is not true or false"),
        ("weight", {"granularity": GONE}, "granularity: is missing"),
        ("weight", {"granularity": "per_head"}, f"granularity: 'per_head' {GRANULARITY}"),
        ("weight", {"granularity": "per_block", "symmetric": True}, "block_size: is missing"),
        ("weight", {"granularity": "per_block", "symmetric": True, "block_size": 0}, "block_size: block rows: 0 is not a positive integer"),
        ("weight", {"granularity": "per_block", "block_size": 64}, "granularity: per_block takes symmetric formats and calib_algo minmax"),
        ("weight", {"granularity": "per_block", "symmetric": True, "block_size": 64, "calib_algo": "mse"}, "granularity: per_block takes symmetric formats and calib_algo minmax"),
        ("weight", {"granularity": "per_token"}, f"granularity: 'per_token' {GRANULARITY}"),
        ("weight", {"group_size": GONE}, "group_size: is missing"),
        ("weight", {"group_size": "128"}, "group_size: '128' is not an integer"),
        ("weight", {"group_size": 0}, "group_size: 0 is not a positive integer"),
        ("weight", {"group_size": -1}, "group_size: -1 is not a positive integer"),
        ("weight", {"calib_algo": "learnable"}, "calib_algo: 'learnable' is not supported; write minmax, mse or hqq"),
        ("weight", {"calib_algo": "static_hist"}, "calib_algo: 'static_hist' is not supported; write minmax, mse or hqq"),
        ("weight", {"calib_algo": "mse", "maxshrink": 1.5}, "maxshrink: mse shrink: 1.5 is not a number above 0 and up to 1"),
        ("weight", {"calib_algo": "mse", "maxshrink": float("nan")}, "maxshrink: mse shrink: nan is not a number above 0 and up to 1"),
        ("weight", {"calib_algo": "mse", "maxshrink": "0.8"}, "maxshrink: '0.8' is not a number"),
        ("weight", {"calib_algo": "mse", "mse_grid": 0}, "mse_grid: mse grid: 0 is not a positive integer"),
        ("weight", {"calib_algo": "hqq", "iters": 2.0}, "iters: 2.0 is not an integer"),
        ("weight", {"calib_algo": "hqq", "beta": True}, "beta: True is not a number"),
        ("weight", {"calib_algo": "hqq", "lp_norm": 2}, "lp_norm: hqq norm: 2 is not a number above 0 and up to 1"),
        ("weight", {"calib_algo": "hqq", "kappa": float("inf")}, "kappa: hqq growth: inf is not a number above 0 and up to 10"),
        ("weight", {"quant_type": "float-quant"}, "bit: 4 is no float format; write e4m3, or quant_type: int-quant here"),
        ("weight", {"int_range": [-7, 7]}, "int_range: only the whole range is supported: [0, 15]"),
        ("weight", {"symmetric": True, "int_range": [0, 15]}, "int_range: only the whole range is supported: [-8, 7]"),
        ("weight", {"round_zp": False}, "round_zp: a float zero point is not supported; write True, or leave it out"),
        ("weight", {"ste": True}, "ste: straight-through rounding is part of methods that learn, and of no other"),
        ("weight", {"w_1": {"bit": 8}}, "w_1: a weight of two levels is not supported"),
        ("act", {"bit": 5}, "bit: 5 is not supported; act takes 4, 6, 8 or 16"),
        ("act", {"granularity": "per_head"}, "granularity: 'per_head' is not supported; act takes per_tensor, per_token or per_group"),
        ("act", {"granularity": "per_group"}, "group_size: is missing"),
        ("act", {"granularity": "per_group", "group_size": 64, "static": True}, "static: one scale for each group exists only at run time; write granularity: per_tensor"),
        ("act", {"calib_algo": "mse"}, "calib_algo: 'mse' is not supported; write minmax"),
        ("act", STATIC | {"calib_algo": "mse"}, "calib_algo: 'mse' is not supported; write minmax, static_minmax, static_hist or static_moving_minmax"),
        ("act", STATIC | {"calib_algo": "static_hist", "symmetric": False}, "calib_algo: static_hist is for symmetric integers"),
        ("act", STATIC | {"calib_algo": "static_hist", "bit": "e4m3", "use_qtorch": True}, "calib_algo: static_hist is for symmetric integers"),
        ("act", {"static": True}, "static: one scale for each token exists only at run time; write granularity: per_tensor"),
        ("act", {"calib_algo": "static_minmax"}, "calib_algo: 'static_minmax' is not supported; write minmax"),
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
