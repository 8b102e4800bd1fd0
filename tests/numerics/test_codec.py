"""graphq.encode, graphq.decode and graphq.fake_quantize: what they take, what they refuse, and in which words."""

import math

import pytest
import torch
from torch import Tensor

import graphq
from graphq import numerics
from graphq.errors import SpecError
from graphq.numerics import Scales
from graphq.spec.formats import Float, Int
from graphq.spec.quant import PerChannel, PerGroup, Quant

NAMES = "float8_e4m3fn, float8_e5m2, float6_e2m3, float6_e3m2, float4_e2m1, float4_e1m2, hifloat8, e8m0"
X = torch.tensor([[0.5, -1.25, 3.0, 8.0], [0.0, 2.5, -6.0, 1.0]])


def message(call, *args, **options) -> str:
    with pytest.raises(SpecError) as raised:
        call(*args, **options)
    return str(raised.value)


# -- encode and decode


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_encode_takes_all_float_dtypes(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -6.5, 448.0], dtype=dtype)
    assert graphq.encode(x, "float8_e4m3fn").tolist() == [0x38, 0xCD, 0x7E]
    assert graphq.encode(x, "hifloat8").tolist() == [0x08, 0xA5, 0x62]


def test_integers() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 300, -300, math.inf, -math.inf])
    expected = {
        "int2": ([0, 1, -2, 1, -2, 1, -2], torch.int8),
        "int3": ([0, 2, -2, 3, -4, 3, -4], torch.int8),
        "int8": ([0, 2, -2, 127, -128, 127, -128], torch.int8),
        "int16": ([0, 2, -2, 300, -300, 32767, -32768], torch.int16),
        "uint8": ([0, 2, 0, 255, 0, 255, 0], torch.uint8),
        "uint16": ([0, 2, 0, 300, 0, 65535, 0], torch.uint16),
    }
    for name, (codes, dtype) in expected.items():
        got = graphq.encode(x, name)
        assert got.dtype == dtype
        assert got.tolist() == codes
        assert graphq.decode(got, name).tolist() == codes
        assert graphq.decode(got, name).dtype == torch.float32


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_integer_comes_back(bits: int) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)
    assert torch.equal(graphq.encode(graphq.decode(codes, f"int{bits}"), f"int{bits}"), codes)


def test_every_16_bit_integer_comes_back() -> None:
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    assert torch.equal(graphq.encode(graphq.decode(codes, "int16"), "int16"), codes)
    wide = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    assert torch.equal(graphq.encode(graphq.decode(wide, "uint16"), "uint16").int(), wide.int())


@pytest.mark.parametrize(
    "name",
    ["float8", "int4/asym", "int4/half", "hifloat8/pow2", "mxfp4", "nvfp4", "int4/over_int8", "", "uint4", "E8M0"],
)
def test_what_is_not_an_element_format(name: str) -> None:
    expected = f"{name!r} is not an element format; write int2 to int8, int16, uint8, uint16 or one of {NAMES}"
    assert message(graphq.encode, X, name) == expected
    assert message(graphq.decode, X, name) == expected


def test_widths_that_no_integer_has() -> None:
    for name in ("int1", "int9", "int32"):
        assert message(graphq.encode, X, name) == f"bits: {name[3:]} is not one of 2 to 8 or 16"


def test_dtypes_that_are_not_encoded() -> None:
    for dtype in (torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64):
        expected = f"hifloat8: x is {dtype}; give float16, bfloat16, float32 or float64"
        assert message(graphq.encode, torch.zeros(2).to(dtype), "hifloat8") == expected
        quant = f"int8/channel: x is {dtype}; give float16, bfloat16, float32 or float64"
        assert message(graphq.fake_quantize, torch.zeros(2, 2).to(dtype), "int8/channel") == quant


def test_values_that_a_format_lacks() -> None:
    assert message(graphq.encode, torch.tensor([math.nan]), "int8") == "int8 has no NaN; x holds one"
    assert message(graphq.encode, torch.tensor([-1.0]), "e8m0") == "e8m0 has no negative numbers; x holds one"


def test_codes_of_another_dtype() -> None:
    assert (
        message(graphq.decode, torch.zeros(1, dtype=torch.int8), "e8m0")
        == "e8m0: codes are torch.uint8, not torch.int8"
    )
    assert message(graphq.decode, torch.zeros(1), "int4") == "int4: codes are torch.int8, not torch.float32"
    found = message(graphq.decode, torch.zeros(1, dtype=torch.int16), "uint16")
    assert found == "uint16: codes are torch.uint16, not torch.int16"
    found = message(graphq.decode, torch.zeros(1).to(torch.float8_e4m3fn), "float8_e4m3fn")
    assert found == "float8_e4m3fn: codes are torch.uint8, not torch.float8_e4m3fn"


def test_codes_that_are_too_large() -> None:
    for bits, name in [(4, "float4_e2m1"), (4, "float4_e1m2"), (6, "float6_e2m3"), (6, "float6_e3m2")]:
        codes = torch.tensor([1, 1 << bits], dtype=torch.uint8)
        assert message(graphq.decode, codes, name) == f"{name}: codes of {bits} bits; one has more"
    for code in (8, -9):
        found = message(graphq.decode, torch.tensor([code], dtype=torch.int8), "int4")
        assert found == "int4: codes from -8 to 7; one is outside"


# -- fake_quantize


def test_scales_are_chosen_where_none_are_given() -> None:
    for text, format, block in [
        ("int4/g2", Int(4), [1, 2]),
        ("int8/asym/channel", Int(8, symmetric=False), [1, -1]),
        ("float8_e4m3fn/tensor", Float("float8_e4m3fn"), [-1, -1]),
        ("hifloat8/1x2", Float("hifloat8"), [1, 2]),
        ("int8/token/dynamic", Int(8), [1, -1]),
        ("int8/g2/dynamic", Int(8), [1, 2]),
        ("int8/channel/dynamic", Int(8), [-1, -1]),  # an activation has no channels of its own
    ]:
        scales = numerics.choose_scale(X, format, block)
        assert torch.equal(graphq.fake_quantize(X, text), numerics.fake_quantize(X, scales, format, block))


def test_a_quant_serves_as_well_as_its_text() -> None:
    assert torch.equal(graphq.fake_quantize(X, Quant(Int(4), PerGroup(2))), graphq.fake_quantize(X, "int4/g2"))


def test_weights_of_more_axes_and_vectors() -> None:
    kernel = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    for text, block in [("int8/channel", [1, -1, -1, -1]), ("int8/g2", [1, 2, -1, -1]), ("int8/tensor", [-1] * 4)]:
        scales = numerics.choose_scale(kernel, Int(8), block)
        assert torch.equal(graphq.fake_quantize(kernel, text), numerics.fake_quantize(kernel, scales, Int(8), block))
    tokens = kernel.reshape(4, 6, 9)
    scales = numerics.choose_scale(tokens, Int(8), [1, 1, -1])
    assert torch.equal(
        graphq.fake_quantize(tokens, "int8/token/dynamic"), numerics.fake_quantize(tokens, scales, Int(8), [1, 1, -1])
    )
    vector = X.flatten()
    assert torch.equal(graphq.fake_quantize(vector, "int8/g4"), graphq.fake_quantize(X, "int8/g4").flatten())
    assert torch.equal(graphq.fake_quantize(vector, "mxfp4"), graphq.fake_quantize(X.reshape(1, 8), "mxfp4")[0])
    assert graphq.fake_quantize(torch.zeros(0, 4), "int8/g4").shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("quant", ["int4/g2", "hifloat8/channel", "mxfp4", "nvfp4", "float4_e2m1/over_float8/g2"])
def test_dtype_and_argument_are_kept(quant: str, dtype: torch.dtype) -> None:
    x = X.to(dtype).T.contiguous().T
    before = x.clone()
    got = graphq.fake_quantize(x, quant)
    assert got.dtype == dtype
    assert torch.equal(x, before)
    if dtype in (torch.float16, torch.bfloat16):  # computed in float32
        assert torch.equal(got, graphq.fake_quantize(x.float(), quant).to(dtype))


def test_given_scales() -> None:
    scale = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    got = graphq.fake_quantize(X, "int4/g2", scale=scale)
    assert got.tolist() == [[0.5, -1.0, 3, 7], [0, 2, -8, 0]]  # halves: -2.5 and -1.5 go to -2, 1.25 to 1
    zero_point = torch.tensor([[1, 2], [-8, 7]], dtype=torch.int8)
    got = graphq.fake_quantize(X, "int4/asym/g2", scale=scale, zero_point=zero_point)
    by_hand = [(X[r, c] / scale[r, c // 2]).round() + zero_point[r, c // 2] for r in range(2) for c in range(4)]
    expected = (
        torch.stack(by_hand).clamp(-8, 7).reshape(2, 4) - zero_point.repeat_interleave(2, 1)
    ) * scale.repeat_interleave(2, 1)
    assert torch.equal(got, expected)
    for one in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])):
        assert graphq.fake_quantize(X, "int4/channel", scale=one).tolist() == [[0.5, -1, 3, 3.5], [0, 2.5, -4, 1]]


def test_a_given_global_scale() -> None:
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for shape in ((), (1,), (1, 1)):
        upper = torch.full(shape, 200.0)
        scales = numerics.choose_scale(x, numerics.parse_format("nvfp4"), [1, 16], upper)
        got = graphq.fake_quantize(x, "nvfp4", global_scale=upper)
        assert torch.equal(got, numerics.fake_quantize(x, scales, numerics.parse_format("nvfp4"), [1, 16]))
        assert torch.equal(graphq.fake_quantize(x, "nvfp4", scale=scales.scale, global_scale=upper), got)
    scale, upper = torch.full((2, 4), 2.0), torch.tensor([[0.5], [1.0]])
    format = numerics.parse_format("int4/over_int8")
    got = graphq.fake_quantize(x, "int4/over_int8/g8", scale=scale, global_scale=upper)
    assert torch.equal(got, numerics.fake_quantize(x, Scales(scale, None, upper), format, [1, 8]))


SCALE, ZERO = torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.int8)
REFUSED: list[tuple[str, dict[str, Tensor], str]] = [
    ("int4/g2", {"global_scale": torch.ones(1)}, "int4/g2: global_scale: this format has one level of scales"),
    ("mxfp4", {"global_scale": torch.ones(1)}, "mxfp4: global_scale: this format has one level of scales"),
    ("int4/g2", {"scale": SCALE, "zero_point": ZERO}, "int4/g2: zero_point: the format is symmetric"),
    ("int4/asym/g2", {"zero_point": ZERO}, "int4/asym/g2: zero_point: give its scale too"),
    ("int4/asym/g2", {"scale": SCALE}, "int4/asym/g2: scale: give its zero_point too"),
    ("nvfp4", {"scale": torch.ones(2, 1)}, "nvfp4: scale: give its global_scale too"),
    (
        "int4/over_int8/g2",
        {"global_scale": torch.ones(2, 1)},
        "int4/over_int8/g2: global_scale: give the scales of groups too",
    ),
    (
        "int4/over_int8/g2",
        {"scale": SCALE, "global_scale": torch.ones(4, 1)},
        "int4/over_int8/g2: global_scale of shape (4, 1); expected one number or (2, 1)",
    ),
    ("int4/g2", {"scale": torch.ones(2, 1)}, "int4/g2: scale of shape (2, 1); expected one number or (2, 2)"),
    ("int4/g2", {"scale": torch.ones(4)}, "int4/g2: scale of shape (4,); expected one number or (2, 2)"),
    ("int4/channel", {"scale": torch.ones(2)}, "int4/channel: scale of shape (2,); expected one number or (2, 1)"),
    (
        "int4/asym/g2",
        {"scale": SCALE, "zero_point": ZERO[:1]},
        "int4/asym/g2: zero_point of shape (1, 2); expected one number or (2, 2)",
    ),
    (
        "int4/asym/g2",
        {"scale": SCALE, "zero_point": ZERO.float()},
        "int4/asym/g2: zero_point: give torch.int8, not torch.float32",
    ),
    (
        "nvfp4",
        {"scale": torch.ones(2, 1), "global_scale": torch.ones(2)},
        "nvfp4: global_scale of shape (2,); expected one number or (1,)",
    ),
    (
        "int4/g2/percentile99",
        {},
        "int4/g2/percentile99: blocks of a few elements have no percentiles; write /tensor or /channel",
    ),
    *[
        (
            f"int8/channel/{m}",
            {},
            f"int8/channel/{m}: {m} takes its range from batches; give the scale, or leave it out",
        )
        for m in ("histogram", "entropy", "ema", "ofmr")
    ],
]


@pytest.mark.parametrize(("quant", "given", "expected"), REFUSED)
def test_what_does_not_fit_together(quant: str, given: dict[str, Tensor], expected: str) -> None:
    assert message(graphq.fake_quantize, X, quant, **given) == expected


def test_what_is_not_quantized() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        assert message(graphq.fake_quantize, torch.tensor([[1, bad]]), "mxfp4") == "mxfp4: x holds NaN or Inf"
    found = message(graphq.fake_quantize, torch.tensor(1.0), "int8/tensor")
    assert found == "int8/tensor: x has no axes; give at least one"
    for quant in ("int8/channel", "int8/2x2"):
        assert (
            message(graphq.fake_quantize, torch.ones(4), quant) == f"{quant}: x has one axis; give a weight [out, in]"
        )


def test_methods_of_weights() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for method in ("mse", "ssz", "percentile95", "mse0.5:20:2:3"):
        assert not torch.equal(
            graphq.fake_quantize(w, f"int4/channel/{method}"), graphq.fake_quantize(w, "int4/channel")
        )
    assert torch.equal(
        graphq.fake_quantize(w, Quant(Int(4), PerChannel())), graphq.fake_quantize(w, "int4/channel/mse0.01:1:2:1")
    )  # of which the widest range is the only one


def test_exported() -> None:
    assert {"encode", "decode", "fake_quantize"} <= set(graphq.__all__)
