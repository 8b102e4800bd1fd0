"""Formats and quants: their texts, and what cannot be written."""

import re
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphq import numerics
from graphq.errors import SpecError
from graphq.spec.formats import (
    Divisor,
    ExponentRule,
    Float,
    FloatLayout,
    FloatScale,
    Format,
    Int,
    Mx,
    MxElement,
    Nvfp4,
    TwoLevel,
    code_bits,
    parse_format,
)
from graphq.spec.plan import Plan
from graphq.spec.quant import (
    Arithmetic,
    Entropy,
    Histogram,
    Hqq,
    MinMax,
    MovingAverage,
    Mse,
    Ofmr,
    PerBlock,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Quant,
    Ssz,
    own_granularity,
    parse_quant,
)

FORMATS: list[Format] = [
    *(Int(bits, divisor=divisor) for bits in (*range(2, 9), 16) for divisor in get_args(Divisor)),
    *(Int(bits, symmetric=False, joint=joint) for bits in (*range(2, 9), 16) for joint in (False, True)),
    *(Int(bits, symmetric=False, signed=False, joint=joint) for bits in (8, 16) for joint in (False, True)),
    *(
        Float(layout, scale)
        for layout in get_args(FloatLayout)
        for scale in get_args(FloatScale)
        if scale not in ("to15", "unit") or layout == "hifloat8"
    ),
    *(Mx(element, rule) for element in get_args(MxElement) for rule in get_args(ExponentRule)),
    Nvfp4(),
    TwoLevel("int4"),
    TwoLevel("float4_e2m1"),
]
SHARES = st.floats(0.001, 1.0).map(lambda x: round(x, 6))
METHODS = (
    st.just(MinMax())
    | st.builds(MovingAverage, SHARES)
    | st.builds(Percentile, st.floats(50.001, 100).map(lambda x: round(x, 9)))
    | st.just(Histogram())
    | st.just(Entropy())
    | st.builds(Mse, SHARES, st.integers(1, 1000), st.floats(0.5, 4), st.integers(1, 100))
    | st.builds(Ofmr, st.booleans())
    | st.builds(Ssz, st.integers(1, 1000))
    | st.builds(
        Hqq, SHARES, st.floats(0.1, 1000).map(lambda x: round(x, 6)), SHARES.map(lambda x: 1 + x), st.integers(1, 99)
    )
)
GRANULARITIES = (
    st.sampled_from([PerTensor(), PerChannel(), PerToken()])
    | st.builds(PerGroup, st.integers(1, 4096))
    | st.builds(PerBlock, st.integers(1, 4096), st.integers(1, 4096))
)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_format_reads_as_it_prints(format: Format) -> None:
    assert parse_format(str(format)) == format
    assert code_bits(format) == int(re.findall(r"\d+", str(format))[0])


def test_no_two_formats_have_one_text() -> None:
    assert len({str(format) for format in FORMATS}) == len(FORMATS)


@given(st.sampled_from(FORMATS), GRANULARITIES, st.booleans(), METHODS, st.sampled_from(get_args(Arithmetic)))
def test_a_quant_reads_as_it_prints(
    format: Format, granularity: Any, dynamic: bool, method: Any, arithmetic: Arithmetic
) -> None:
    try:
        quant = Quant(format, own_granularity(format) or granularity, dynamic, method, arithmetic)
    except SpecError:
        return
    assert parse_quant(str(quant)) == quant


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("uint4/channel", "'uint4/channel' is not a format"),
        ("float8/channel", "'float8/channel' is not a format"),
        ("float8_e4m3fn/to15/channel", "'float8_e4m3fn/to15/channel' is not a format"),
        ("float8_e4m3fn/unit/channel", "'float8_e4m3fn/unit/channel' is not a format"),
        ("hifloat8/unit/channel/mse", "the scale of hifloat8/unit is 1; leave out mse"),
        ("mxfp4/g32", "'mxfp4/g32': mxfp4 has a scale for each 32 inputs; leave out the granularity"),
        ("nvfp4/tensor", "'nvfp4/tensor': nvfp4 has a scale for each 16 inputs; leave out the granularity"),
        ("hifloat8", "'hifloat8' does not say how many scales there are; write hifloat8 with /tensor"),
        ("int4/over_int8/channel", "int4/over_int8 has scales of groups over those of channels"),
        ("int8/tensor/dynamic/entropy", "'int8/tensor/dynamic/entropy' is not a format"),
        ("mxfp4/mse", "mxfp4 takes its scales from the extremes; leave out mse"),
        ("int8/asym/channel/ssz", "ssz fits the scales of symmetric integers"),
        ("float8_e5m2/channel/ssz", "ssz fits the scales of symmetric integers"),
        ("int8/asym/tensor/ofmr", "ofmr gives powers of two without a zero point; the format is asymmetric"),
        (
            "float8_e4m3fn/pow2/channel/hqq",
            "hqq fits scales that may be any number; those of float8_e4m3fn/pow2 are powers",
        ),
        ("mxfp4/hqq", "mxfp4 takes its scales from the extremes; leave out hqq"),
        ("nvfp4/mse", "nvfp4 takes its scales from the extremes; leave out mse"),
        ("nvfp4/hqq", "nvfp4 takes its scales from the extremes; leave out hqq"),
        ("int4/over_int8/g128/hqq", "int4/over_int8 takes its scales from the extremes; leave out hqq"),
        ("int8/token/dynamic/hqq", "'int8/token/dynamic/hqq' is not a format"),
        ("int4/g128/hqq0.7:10:1.01", "'int4/g128/hqq0.7:10:1.01' is not a format"),
        ("int4/g128/hqq1.5:10:1.01:20", "hqq norm: 1.5 is not a number above 0 and up to 1"),
        ("int4/g128/hqq0.7:0:1.01:20", "hqq beta: 0.0 is not a number above 0 and up to 1e+06"),
        ("int4/g128/hqq0.7:10:11:20", "hqq growth: 11.0 is not a number above 0 and up to 10"),
        ("int4/g128/hqq0.7:10:1.01:0", "hqq steps: 0 is not a positive integer"),
        ("int8/tensor/percentile50", "percentile: 50.0 is not a number above 50 and up to 100"),
        ("int8/tensor/ema1.5", "ema: 1.5 is not a number above 0 and up to 1"),
        ("int8/channel/mse0.2:0:2.4:5", "mse grid: 0 is not a positive integer"),
        ("int8/0x8", "block rows: 0 is not a positive integer"),
        ("source", "'source' is not a format"),
        ("int8/source", "'int8/source' does not say how many scales there are"),
        (
            "int8/asym/channel/source",
            "int8/asym/channel/source: source is the arithmetic of int8, int8/half, int8/asym/joint, float8_e4m3fn",
        ),
        ("int8/by_sign/channel/source", "source is the arithmetic of int8, int8/half"),
        ("int8/pow2/channel/source", "source is the arithmetic of int8, int8/half"),
        ("int16/channel/source", "source is the arithmetic of int8, int8/half"),
        ("float8_e4m3fn/pow2/channel/source", "source is the arithmetic of int8, int8/half"),
        ("float8_e5m2/channel/source", "source is the arithmetic of int8, int8/half"),
        ("mxfp4/even/source", "source is the arithmetic of int8, int8/half"),
        ("int8/half/channel/ssz/source", "source is the arithmetic of weights by min-max or ssz; leave it out"),
        ("nvfp4/dynamic/source", "source is the arithmetic of weights by min-max or ssz; leave it out"),
        ("int8/token/dynamic/source", "source is the arithmetic of weights by min-max or ssz; leave it out"),
        ("int8/channel/mse/source", "source is the arithmetic of weights by min-max or ssz; leave it out"),
        ("int8/channel/source/ssz", "'int8/channel/source/ssz' is not a format"),
    ],
)
def test_refused_texts(text: str, problem: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_quant(text)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("weight", "input", "problem"),
    [
        ("int8/channel/entropy", None, "entropy is for activations, seen batch by batch"),
        ("int8/channel/ema", None, "ema is for activations"),
        ("int8/g32/percentile", None, "percentile gives one scale per tensor or per channel"),
        ("hifloat8/128x128/ofmr", None, "ofmr gives one scale per tensor or per channel"),
        ("mxfp4/dynamic", None, "weight: mxfp4/dynamic is dynamic"),
        (None, "mxfp4", "one scale per group exists only at run time; write mxfp4/dynamic"),
        (None, "int8/tensor/ssz", "ssz fits a weight's scales to its codes"),
        (None, "int8/asym/tensor/hqq", "input: int8/asym/tensor/hqq: hqq fits a weight's scales to its codes"),
        ("int8/channel/histogram", None, "a weight takes minmax, percentile, mse, ofmr, ssz or hqq"),
        ("int4/asym/g32/hqq", None, None),
        ("float4_e2m1/128x128/hqq", None, None),
        (None, "int4/over_int8/g32", "activations have one scale per tensor, per token or per group"),
        (None, "uint16/tensor", None),
        (None, "nvfp4", None),
        (None, "int8/tensor/source", "input: int8/tensor/source: source is the arithmetic of weights; leave it out"),
        ("int4/channel/ssz/source", "int8/tensor", None),
        ("nvfp4", "nvfp4/dynamic", None),
    ],
)
def test_plans(weight: str | None, input: str | None, problem: str | None) -> None:
    def make() -> Plan:
        return Plan(parse_quant(weight) if weight else None, parse_quant(input) if input else None)

    if problem is None:
        make()
        return
    with pytest.raises(SpecError, match=re.escape(problem)):
        make()


def test_illegal_formats() -> None:
    no: Any = str  # what type checkers would refuse, written through it
    for make, problem in (
        (lambda: Int(8, joint=True), "joint: says how a zero point is added; this format is symmetric"),
        (lambda: Int(8, signed=False), "uint8 is not one of uint8 and uint16, which are asymmetric"),
        (lambda: Int(4, symmetric=False, signed=False), "unsigned: uint4 is not one of"),
        (lambda: Float(no("float8")), "layout: 'float8' is not one of"),
        (lambda: Float("float8_e5m2", "to15"), "to15 is a convention of hifloat8, not of float8_e5m2"),
        (lambda: Float("float8_e5m2", "unit"), "unit is a convention of hifloat8, not of float8_e5m2"),
        (lambda: Mx(no("int4")), "element: 'int4' is not one of"),
        (lambda: Mx("int8", no("floor")), "exponent rule: 'floor' is not one of"),
        (lambda: TwoLevel(no("int8")), "element: 'int8' is not one of int4, float4_e2m1"),
        (
            lambda: Quant(Int(8), PerChannel(), arithmetic=no("bfloat16")),
            "arithmetic: 'bfloat16' is not one of float32, source",
        ),
        (lambda: Quant(Mx("int8"), PerGroup(16)), "mxint8 has a scale for each 32 inputs, not by group"),
    ):
        with pytest.raises(SpecError, match=re.escape(problem)):
            make()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_empty_scales_are_like_chosen_ones(format: Format) -> None:
    granularity = own_granularity(format) or PerGroup(16)
    block = numerics.weight_block(granularity, 2, 0, 1)
    chosen = numerics.choose_scale(torch.randn(6, 40), format, block)
    empty = numerics.empty_scales((6, 40), block, format)
    for ours, theirs in zip(empty, chosen, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
