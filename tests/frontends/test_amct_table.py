"""AMCT's table of legal combinations, as it is written down, against every combination of what can be asked."""

import functools
import itertools
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

import graphq
from graphq.capture.modules import capture_module
from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec, write_spec
from graphq.passes.annotate import decide
from graphq.spec.plan import Plan

# inputs | weights | algorithms | strategies of weights, group sizes | strategies of inputs | signs of weights | of inputs
# | dtypes | layers | what else a layer needs. S: symmetric, A: asymmetric. Sizes that are written as 32n: multiples.
TABLE = """
int8     int8     minmax,smoothquant                 tensor,channel        -      tensor        S    S,A  bf16,fp16       linear         -
int8     int8     minmax,smoothquant                 tensor,channel        -      token         S    S    bf16,fp16       linear         K%16,N%8
int8     int4     minmax,smoothquant                 tensor,channel        -      tensor        S    S,A  fp16            linear         K%8,N%8
hifloat8 hifloat8 cast,quantile,smoothquant          tensor,channel        -      tensor,token  S    S    fp32,bf16,fp16  linear         -
hifloat8 hifloat8 ofmr                               tensor,channel        -      tensor,token  S    S    fp32,bf16,fp16  linear,conv2d  -
fp8      fp8      ofmr                               tensor,channel        -      tensor        S    S    fp32,bf16,fp16  linear,conv2d  -
mxfp8    mxfp8    mxquant,none                       group                 32     group         S    S    bf16            linear         K/32%2
fp8      fp4      minmax,smoothquant                 group   32,64,128,256        tensor        S    S    bf16            linear         K%64,no-bias
-        int8     minmax,awq,gptq                    tensor,channel,group  32n    -             S,A  -    bf16,fp16       linear         K%32,N%32
-        int4     minmax,awq,gptq                    tensor,channel,group  32n    -             S,A  -    fp32,bf16,fp16  linear         K%64,N%64
-        hifloat8 ofmr,gptq,cast,quantile,minmax     tensor,channel        -      -             S    -    bf16,fp16       linear         -
-        fp8      ofmr,gptq,minmax                   tensor,channel        -      -             S    -    bf16,fp16       linear         -
-        mxfp4    awq,gptq,mxquant,minmax            group                 32     -             S    -    bf16,fp16       linear         K%64,N%64
-        fp4      minmax,awq,gptq                    group   32,64,128,256        -             S    -    bf16,fp16       linear         K%64,N%64
-        e1m2     minmax,awq,gptq                    group   32,64,128,256        -             S    -    bf16,fp16       linear         K%64,N%64
mxfp8    mxfp4    mxquant,none                       group                 32     group         S    S    bf16            linear         K%64
"""
TYPES = {
    "int8": "int8",
    "int4": "int4",
    "hifloat8": "hifloat8",
    "fp8": "float8_e4m3fn",
    "fp4": "float4_e2m1",
    "e1m2": "float4_e1m2",
    "mxfp4": "mxfp4_e2m1",
    "mxfp8": "mxfp8_e4m3fn",
    "-": None,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIGNS = {"S": True, "A": False, "-": None}
SIZES = (None, 32, 48, 64, 128, 256)

WEIGHTS = ("int8", "int4", "hifloat8", "float8_e4m3fn", "mxfp4_e2m1", "float4_e2m1", "float4_e1m2", "mxfp8_e4m3fn")
INPUTS = ("int8", "int4", "hifloat8", "float8_e4m3fn", "mxfp8_e4m3fn")
ALGORITHMS = (None, "minmax", "smoothquant", "awq", "gptq", "ofmr", "quantile", "cast", "mxquant")

# weights' type, algorithm, strategy, group size, symmetric, then inputs' type, strategy, symmetric (three None: float)
Combination = tuple[str, str | None, str, int | None, bool, str | None, str | None, bool | None]


def legal_rows() -> dict[Combination, tuple[str, ...]]:
    """Each legal combination with its dtypes, layers and needs, for the group sizes above."""
    found: dict[Combination, tuple[str, ...]] = {}
    for line in filter(None, TABLE.splitlines()):
        x, w, algorithms, strategies, sizes, how, signs, input_signs, *layer = line.split()
        for algorithm, strategy, sign, by, input_sign in itertools.product(
            *(text.split(",") for text in (algorithms, strategies, signs, how, input_signs))
        ):
            allowed: list[int | None] = [None]
            if strategy == "group":
                allowed = [32, 64, 128, 256] if sizes == "32n" else [int(size) for size in sizes.split(",")]
            for size in allowed:
                inputs = (None, None, None) if x == "-" else (TYPES[x], by, SIGNS[input_sign])
                name = None if algorithm == "none" else algorithm
                one: Any = (TYPES[w], name, strategy, size, SIGNS[sign], *inputs)
                found[one] = tuple(layer)
    return found


LEGAL = legal_rows()
EVERY: list[Any] = [
    (*weights, *inputs)
    for weights in itertools.product(WEIGHTS, ALGORITHMS, ("tensor", "channel", "group"), SIZES, (True, False))
    for inputs in [(None, None, None), *itertools.product(INPUTS, ("tensor", "token", "group"), (True, False))]
]


def config(one: tuple[Any, ...]) -> dict[str, Any]:
    """The dict that asks for a combination. What is None is left out, and so are inputs without a type."""
    w, algorithm, strategy, size, symmetric, x, by, input_symmetric = one
    weights = {"type": w, "strategy": strategy, "group_size": size, "symmetric": symmetric}
    inputs = {"type": x, "strategy": by, "symmetric": input_symmetric}
    made = {"quant_cfg": {"weights": {key: value for key, value in weights.items() if value is not None}}}
    if (x, by, input_symmetric) != (None, None, None):
        made["quant_cfg"]["inputs"] = {key: value for key, value in inputs.items() if value is not None}
    return made if algorithm is None else made | {"algorithm": {algorithm}}


def words(one: Combination) -> str:
    """A combination as messages spell it."""
    w, algorithm, strategy, size, symmetric, x, by, input_symmetric = one
    text = f"weights {w} by {strategy}{f' of {size}' if size else ''} {'symmetric' if symmetric else 'asymmetric'}"
    if x:
        text += f", inputs {x} by {by} {'symmetric' if input_symmetric else 'asymmetric'}"
    return f"{text}, {f'algorithm {algorithm}' if algorithm else 'no algorithm'}"


def plan(one: Combination) -> str:
    """The plan of a legal combination: AMCT's divisor, zero points, full scales and exponents."""
    w, algorithm, strategy, size, symmetric, x, by, input_symmetric = one
    names = {"float8_e4m3fn": "float8_e4m3fn", "hifloat8": "hifloat8", "float4_e1m2": "float4_e1m2"}
    if w.startswith("int"):
        weight = f"{w}/by_sign" if symmetric else f"{w}/asym/joint"
    elif w == "float4_e2m1":
        weight = "float4_e2m1" if x is None else "float4_e2m1/over_float8"
    else:
        weight = {**names, "mxfp4_e2m1": "mxfp4/amct", "mxfp8_e4m3fn": "mxfp8_e4m3"}[w]
    if not w.startswith("mx"):
        weight += f"/g{size}" if size else f"/{strategy}"
    if algorithm == "ofmr":
        weight += "/ofmr_absolute"
    text = f"weight {weight}"
    if x == "int8":
        text += (
            f", input int8/{'by_sign' if input_symmetric else 'asym/joint'}/{by}{'/dynamic' if by == 'token' else ''}"
        )
    elif x == "mxfp8_e4m3fn":
        text += ", input mxfp8_e4m3/dynamic"
    elif x is not None and algorithm == "cast":
        text += ", input hifloat8/unit/tensor/dynamic"
    elif x is not None and algorithm == "ofmr":
        text += f", input {x}/tensor/ofmr_absolute"
    elif x is not None and by == "token":
        text += ", input hifloat8/to15/token/dynamic"
    elif x is not None:
        text += f", input {x}/tensor{'/ema' if algorithm == 'quantile' else ''}"
    return text


def distance(one: Combination, other: Combination) -> int:
    """In how many columns two differ. Groups, and the columns of inputs, count only where both have them."""
    same = [a == b for a, b in zip(one, other, strict=True)]
    counted = [0, 1, 2, 4, 5]
    counted += [3] * (one[2] == other[2])
    counted += [6, 7] * (one[5] is not None and other[5] is not None)
    return sum(not same[column] for column in counted)


def check(one: Combination, *, closely: bool = True) -> None:
    """It is read as its plan if it is in the table; else refused, with its name and that of one that is nearest."""
    if one in LEGAL:
        (rule,) = load_spec(config(one)).rules
        assert str(rule.decision) == plan(one)
        return
    with pytest.raises(SpecError) as caught:
        load_spec(config(one))
    (problem,) = caught.value.problems
    start = f"quant_cfg.weights: AMCT has no combination of {words(one)}; the nearest is "
    assert problem.startswith(start)
    nearest = SPELLED[problem.removeprefix(start)]
    if closely:
        assert distance(one, nearest) == min(distance(one, other) for other in LEGAL)


SPELLED = {words(one): one for one in LEGAL}


def test_the_sizes_of_the_table() -> None:
    assert len(LEGAL) == 166
    assert len(EVERY) == 80352
    assert set(LEGAL) <= set(EVERY)


def test_a_sample_of_all_combinations() -> None:
    for one in random.Random(0).sample(EVERY, 400):
        check(one)


def test_legal_combinations() -> None:
    for one in LEGAL:
        check(one)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_all_combinations(weights: str) -> None:
    for number, one in enumerate(one for one in EVERY if one[0] == weights):
        check(one, closely=number % 20 == 0)


# -- one value that is none, or none at all

MISSING = {"weights.type": 0, "weights.strategy": 2, "weights.symmetric": 4, "inputs.type": 5, "inputs.strategy": 6}
WRONG: dict[int, tuple[str, object, str]] = {
    0: ("quant_cfg.weights.type", "hifloat4", "'hifloat4' is not one of int8, int4, hifloat8, "),
    1: ("algorithm", "min-max", "'min-max' is not an algorithm of AMCT's; did you mean minmax? (there are minmax, "),
    2: ("quant_cfg.weights.strategy", "token", "'token' is not one of tensor, channel, group"),
    3: ("quant_cfg.weights.group_size", 0, "0 is not a whole number from 1"),
    4: ("quant_cfg.weights.symmetric", 1, "1 is not true or false"),
    5: ("quant_cfg.inputs.type", "fp8", "'fp8' is not one of int8, int4, hifloat8, float8_e4m3fn, mxfp8_e4m3fn"),
    6: ("quant_cfg.inputs.strategy", "channel", "'channel' is not one of tensor, token, group"),
    7: ("quant_cfg.inputs.symmetric", "yes", "'yes' is not true or false"),
}
ABSENT = (0, 2, 4, 5, 6, 7)  # the other columns may be


def spoiled(column: int, value: object, every: list[Any]) -> Iterator[tuple[Any, ...]]:
    """All combinations with this value in a column, once each."""
    for one in every:
        if (column < 5 or one[5] is not None) and one[column] in FIRST[column]:
            yield (*one[:column], value, *one[column + 1 :])


FIRST = {0: ("int8",), 1: ("minmax",), 2: ("tensor",), 3: (32,), 4: (True,), 5: ("int8",), 6: ("tensor",), 7: (True,)}


def check_spoiled(column: int, every: list[Any]) -> None:
    place, value, message = WRONG[column]
    for one in spoiled(column, value, every):
        with pytest.raises(SpecError) as caught:
            load_spec(config(one))
        (problem,) = caught.value.problems
        assert problem.startswith(f"{place}: {message}")
    if column in ABSENT:
        for one in spoiled(column, None, every):
            with pytest.raises(SpecError) as caught:
                load_spec(config(one))
            assert caught.value.problems == (f"{place}: is missing",)


@pytest.mark.parametrize("column", WRONG)
def test_a_sample_of_values_that_are_none(column: int) -> None:
    check_spoiled(column, random.Random(1).sample(EVERY, 2000))


@pytest.mark.slow
@pytest.mark.parametrize("column", WRONG)
def test_all_values_that_are_none(column: int) -> None:
    check_spoiled(column, EVERY)


# -- on a layer


class Layers(nn.Module):
    """A linear and a convolution of 128 by 128."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 128, bias=bias)
        self.conv2d = nn.Conv2d(128, 128, 3, padding=1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2d(self.linear(x).transpose(1, 2).unflatten(2, (2, 2)))


@functools.cache
def model(dtype: str, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Layers(bias).to(DTYPES[dtype]).eval()


def batch(dtype: str) -> torch.Tensor:
    return torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])


@functools.cache
def captured(dtype: str, bias: bool) -> fx.GraphModule:
    return capture_module(model(dtype, bias), (batch(dtype),))


def reason(one: Combination, kind: str, dtype: str, bias: bool) -> str:
    """What of the table's last columns a layer breaks."""
    dtypes, kinds, needs = LEGAL[one]
    long = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    found: list[str] = []
    if kind not in kinds.split(","):
        found.append(f"needs kind linear: its kind is {kind}")
    if dtype not in dtypes.split(","):
        found.append(f"needs dtype {'|'.join(long[name] for name in dtypes.split(','))}: the weight is {long[dtype]}")
    if (one[3] or 0) >= 128:
        found.append(f"needs K > {one[3]}: K is 128")
    if bias and "no-bias" in needs:
        found.append("needs no bias: it has one")
    return "; ".join(found)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_layer_gets(dtype: str, bias: bool) -> None:
    for one in LEGAL:
        resolved, _ = decide(captured(dtype, bias), load_spec(config(one)))
        for kind in ("linear", "conv2d"):
            why = reason(one, kind, dtype, bias)
            assert str(resolved[kind].decision) == (f"float ({why})" if why else plan(one)), (one, kind)


def compile_one(one: Combination) -> None:
    dtype, kinds, _ = LEGAL[one]
    dtype = dtype.split(",")[0]
    why = reason(one, "linear", dtype, False)
    if why and kinds == "linear":
        with pytest.raises(SpecError, match=rf"quantizes no layer[^\n]*\nlinear: stays float: {re.escape(why)}\n"):
            graphq.compile(model(dtype), config(one), inputs=batch(dtype), calibration=[batch(dtype)])
        return
    made = graphq.compile(model(dtype), config(one), inputs=batch(dtype), calibration=[batch(dtype)])
    found = {one.layer.fqn: one for one in made.report.layers}
    assert found["linear"].reason == why
    assert why or str(Plan(found["linear"].weight, found["linear"].input)) == plan(one)
    assert (found["conv2d"].weight is None) == (LEGAL[one][1] == "linear")
    y = made(batch(dtype))
    assert isinstance(y, torch.Tensor)
    assert torch.isfinite(y).all()
    error = (y.float() - model(dtype)(batch(dtype)).float()).square().mean()
    assert error <= 0.05 * model(dtype)(batch(dtype)).float().square().mean()


@pytest.mark.parametrize("one", random.Random(2).sample(list(LEGAL), 4), ids=words)
def test_a_sample_compiles(one: Combination) -> None:
    compile_one(one)


@pytest.mark.slow
@pytest.mark.parametrize("one", LEGAL, ids=words)
def test_all_of_the_table_compile(one: Combination) -> None:
    compile_one(one)


def test_all_of_the_table_is_written_as_it_was_read() -> None:
    for one in LEGAL:
        spec = load_spec(config(one))
        again = load_spec(write_spec(spec, "amct"))
        assert again == spec
        assert print_spec(again) == print_spec(spec)
        assert load_spec(print_spec(spec)) == spec
