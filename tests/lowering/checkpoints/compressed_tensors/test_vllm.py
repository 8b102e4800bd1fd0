"""Schemes that vLLM has kernels for, as its own choice of them takes them, and what is said of the others."""

import pytest

from graphq.lowering.checkpoints.compressed_tensors.vllm import unserved
from graphq.spec.quant import parse_quant


def said(weight: str, given: str | None) -> str | None:
    return unserved(parse_quant(weight), None if given is None else parse_quant(given))


@pytest.mark.parametrize(
    ("weight", "given"),
    [
        *(("int4/g128", None), ("int4/half/channel", None), ("int4/asym/g32", None), ("int8/g128", None)),
        *(("int8/channel", None), ("int4/g128", "int8/token/dynamic"), ("int4/g128", "int8/g128/dynamic")),
        *(("int8/channel", "int8/token/dynamic"), ("int8/tensor", "int8/asym/tensor"), ("int8/channel", "int8/tensor")),
        *(("float8_e4m3fn/channel", None), ("float8_e4m3fn/32x16", "float8_e4m3fn/g16/dynamic")),
        *(("float8_e4m3fn/tensor", "float8_e4m3fn/tensor"), ("nvfp4", None), ("nvfp4", "nvfp4"), ("mxfp4", None)),
        *(("mxfp4/even", "mxfp4/even/dynamic"), ("mxfp4", "float8_e4m3fn/token/dynamic")),
        *(("mxfp8_e4m3", "mxfp8_e4m3/dynamic"), ("int8/channel", "int8/asym/token/dynamic")),
    ],
)
def test_served(weight: str, given: str | None) -> None:
    assert said(weight, given) is None


BITS = "vLLM has kernels for packed weights of 4 and 8 bits; write"
ZERO_POINTS = "vLLM takes zero points of packed weights with 4 bits and float inputs; write a symmetric one"
INTEGERS = "vLLM takes integer inputs of integer weights; write int8/token/dynamic"


@pytest.mark.parametrize(
    ("weight", "given", "line"),
    [
        ("int3/g128", None, f"int3/g128: {BITS} int4"),
        ("int6/channel", None, f"int6/channel: {BITS} int8"),
        ("int4/tensor", None, "int4/tensor: vLLM takes packed weights by channel or group; write channel"),
        ("int4/asym/tensor", None, "int4/asym/tensor: vLLM takes packed weights by channel or group; write channel"),
        ("int8/asym/g128", None, f"int8/asym/g128: {ZERO_POINTS}"),
        ("int4/asym/g128", "int8/token/dynamic", f"int4/asym/g128: {ZERO_POINTS}"),
        ("int4/g128", "float8_e4m3fn/token/dynamic", f"int4/g128 beside input float8_e4m3fn/token/dynamic: {INTEGERS}"),
        ("int4/g128", "int8/tensor", "input int8/tensor: beside packed weights vLLM takes int8/token/dynamic"),
        (
            "int4/g128",
            "int8/asym/token/dynamic",
            "input int8/asym/token/dynamic: beside packed weights vLLM takes int8/token/dynamic",
        ),
        (
            "int8/channel",
            "float8_e4m3fn/token/dynamic",
            (
                "int8/channel beside input float8_e4m3fn/token/dynamic: vLLM takes integer inputs of 8 bits; write"
                " int8/token/dynamic"
            ),
        ),
        (
            "int8/g128",
            "int8/token/dynamic",
            "int8/g128: beside integer inputs vLLM takes symmetric weights by tensor or channel; write int8/channel",
        ),
        (
            "int8/asym/channel",
            "int8/token/dynamic",
            (
                "int8/asym/channel: beside integer inputs vLLM takes symmetric weights by tensor or channel; write"
                " int8/channel"
            ),
        ),
        (
            "int8/channel",
            "int8/tensor/dynamic",
            "input int8/tensor/dynamic: vLLM takes int8/token/dynamic, or static int8/tensor",
        ),
        (
            "float8_e4m3fn/g16",
            None,
            (
                "float8_e4m3fn/g16: vLLM takes float8 weights by tensor, channel or block; write"
                " float8_e4m3fn/channel"
            ),
        ),
        (
            "float8_e4m3fn/channel",
            "int8/token/dynamic",
            (
                "float8_e4m3fn/channel beside input int8/token/dynamic: vLLM takes float8 inputs, or float ones; write"
                " float8_e4m3fn/token/dynamic"
            ),
        ),
        (
            "nvfp4",
            "float8_e4m3fn/token/dynamic",
            "nvfp4 beside input float8_e4m3fn/token/dynamic: vLLM takes nvfp4 inputs, or float ones",
        ),
        (
            "mxfp8_e4m3",
            "float8_e4m3fn/token/dynamic",
            (
                "mxfp8_e4m3 beside input float8_e4m3fn/token/dynamic: vLLM takes inputs mxfp8_e4m3/dynamic, or float"
                " ones"
            ),
        ),
        ("mxfp4", "mxfp8_e4m3/dynamic", "mxfp4 beside input mxfp8_e4m3/dynamic: vLLM takes inputs mxfp4/dynamic, or float ones"),
    ],
)  # fmt: skip
def test_not_served(weight: str, given: str | None, line: str) -> None:
    assert said(weight, given) == line
