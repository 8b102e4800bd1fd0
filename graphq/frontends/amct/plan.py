"""A legal combination of AMCT's as a plan and algorithms whose numbers are AMCT's.

Symmetric integers divide by sign, asymmetric ones add the zero point before rounding, HiFloat8 takes the largest
magnitude to 16 (at run time to 15), MX blocks have the exponents of AMCT's modules.
"""

from typing import Final

from graphq.frontends.amct.table import Combination
from graphq.spec.formats import Float, Int, Mx, TwoLevel
from graphq.spec.plan import Plan
from graphq.spec.quant import (
    Granularity,
    MinMax,
    MovingAverage,
    Ofmr,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Quant,
    RangeMethod,
)
from graphq.spec.rules import Algorithm

GRIDS: Final = 20
STRENGTH: Final = 0.5
_BITS: Final = {"int8": 8, "int4": 4}
CACHE: Final = Quant(Float("hifloat8"), PerTensor(), method=MovingAverage(0.01))


def plan_of(one: Combination) -> Plan:
    """The plan of a layer that a legal combination quantizes."""
    return Plan(_weight(one), None if one.inputs is None else _input(one))


def _weight(one: Combination) -> Quant:
    by: Granularity = PerTensor()
    if one.group_size is not None:
        by = PerGroup(one.group_size)
    elif one.strategy == "channel":
        by = PerChannel()
    method: RangeMethod = Ofmr(relative=False) if one.algorithm == "ofmr" else MinMax()
    match one.weights:
        case "hifloat8" | "float8_e4m3fn" | "float4_e1m2":
            return Quant(Float(one.weights), by, method=method)
        case "float4_e2m1":
            return Quant(Float("float4_e2m1") if one.inputs is None else TwoLevel("float4_e2m1"), by)
        case "mxfp4_e2m1":
            return Quant(Mx("float4_e2m1", "amct"), by)
        case "mxfp8_e4m3fn":
            return Quant(Mx("float8_e4m3fn"), by)
        case _:
            return Quant(_integer(one.weights, one.symmetric), by)


def _input(one: Combination) -> Quant:
    per_token = one.input_strategy == "token"
    match one.inputs:
        case "hifloat8" if one.algorithm == "cast":
            return Quant(Float("hifloat8", "unit"), PerTensor(), dynamic=True)
        case "hifloat8" if per_token and one.algorithm != "ofmr":
            return Quant(Float("hifloat8", "to15"), PerToken(), dynamic=True)
        case "hifloat8" | "float8_e4m3fn":
            methods: dict[str, RangeMethod] = {"ofmr": Ofmr(relative=False), "quantile": MovingAverage(0.01)}
            return Quant(Float(one.inputs), PerTensor(), method=methods.get(one.algorithm, MinMax()))
        case "mxfp8_e4m3fn":
            return Quant(Mx("float8_e4m3fn"), PerGroup(32), dynamic=True)
        case _:
            format = _integer("int8", one.input_symmetric is not False)
            return Quant(format, PerToken() if per_token else PerTensor(), dynamic=per_token)


def _integer(name: str, symmetric: bool) -> Int:
    return Int(_BITS[name], divisor="by_sign") if symmetric else Int(_BITS[name], symmetric=False, joint=True)


def algorithm_of(name: str, value: int | float | None, source: str = "") -> Algorithm | None:
    """Graphq's algorithm for one of AMCT's, with AMCT's choices; None for those that only choose ranges.

    ``value``: what AMCT's only option of it is set to, ``grids_num`` of awq and ``smooth_strength`` of smoothquant.
    """
    match name:
        case "awq":
            n_grid = GRIDS if value is None else value
            chosen = (("n_grid", n_grid), ("duo", False), ("power", 4), ("clip", False), ("where", "multiply"))
            return Algorithm("awq", chosen, source)
        case "smoothquant":
            alpha = STRENGTH if value is None else value
            return Algorithm("smooth-quant", (("alpha", alpha), ("where", "multiply")), source)
        case "gptq":
            return Algorithm("gptq", (("scales", "plan"),), source)
        case _:
            return None
