"""The bytes of each tag, worked out by hand, and what is no tensor of a tag."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphq.errors import TargetError
from graphq.lowering.checkpoints.ascend.layouts import Place, decode, encode
from graphq.lowering.checkpoints.layers import QuantizedLinear
from graphq.numerics import Scales
from graphq.spec.quant import parse_quant

NOWHERE = Place(None, False, torch.bfloat16)


def layer(
    codes: Tensor,
    scale: Tensor,
    weight: str = "int8/channel",
    input: str | None = None,
    zero_point: Tensor | None = None,
    input_scales: Scales | None = None,
) -> QuantizedLinear:
    quant = None if input is None else parse_quant(input)
    scales = Scales(scale, zero_point)
    return QuantizedLinear("a.b", "linear", codes, scales, parse_quant(weight), quant, input_scales)


def static(zero_point: int | None = -3) -> QuantizedLinear:
    zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int8)
    codes = torch.tensor([[10, -20, 30, -40], [127, -128, 1, 0]], dtype=torch.int8)
    kind = "int8/tensor" if zero is None else "int8/asym/joint/tensor"
    scale = torch.tensor([[0.01], [0.02]])
    return layer(codes, scale, input=kind, input_scales=Scales(torch.tensor(0.05), zero))


def test_static_layers() -> None:
    """deq_scale = s_x s_w; quant_bias = round(bias / deq_scale - z sum q)."""
    place = Place(torch.tensor([0.5, -0.25]), False, torch.bfloat16)
    made = encode(static(), "W8A8", place)
    assert made["quant_bias"].tolist() == [940, -250]
    assert made["quant_bias"].dtype == torch.int32
    assert torch.equal(made["deq_scale"], torch.tensor([0.05]) * torch.tensor([0.01, 0.02]))
    assert (made["input_scale"].tolist(), made["input_offset"].tolist()) == ([pytest.approx(0.05)], [-3.0])
    assert made["weight_offset"].tolist() == [[0.0], [0.0]]
    half = encode(static(), "W8A8_MIX", Place(None, False, torch.float16))
    assert half["deq_scale"].tolist() == [973279855, 981668463]  # the bits of 0.0005 and 0.001
    assert half["deq_scale"].dtype == torch.int64
    assert half["quant_bias"].tolist() == [-60, 0]  # 3 times the sums -20 and 0


@pytest.mark.parametrize(("number", "bits"), [(1.0, 1065353216), (0.01, 1008981770), (0.00125, 983815946)])
def test_the_bits_of_deq_scale(number: float, bits: int) -> None:
    codes = torch.ones(1, 2, dtype=torch.int8)
    one = layer(codes, torch.tensor([[number]]), input="int8/tensor", input_scales=Scales(torch.tensor(1.0)))
    made = encode(one, "W8A8", Place(None, False, torch.float16))
    assert made["deq_scale"].tolist() == [bits]


def test_a_bias_that_int32_does_not_hold_is_refused() -> None:
    with pytest.raises(TargetError, match=r"^a\.b: its bias is no int32 in steps of input scale times weight scale$"):
        encode(static(), "W8A8", Place(torch.tensor([1e7, 0.0]), False, torch.bfloat16))


def test_sums_of_long_rows_are_exact() -> None:
    """float32 does not hold z times the sum of 2^20 codes."""
    codes = torch.full((1, 1 << 20), 127, dtype=torch.int8)
    codes[0, 0] = 126
    scales = Scales(torch.tensor(1.0), torch.tensor(3, dtype=torch.int8))
    made = encode(layer(codes, torch.ones(1, 1), input="int8/asym/joint/tensor", input_scales=scales), "W8A8", NOWHERE)
    assert made["quant_bias"].tolist() == [-3 * (127 * (1 << 20) - 1)]


CODES = torch.tensor([[-8, 7], [3, -1], [0, 1], [-4, 5]], dtype=torch.int8)
SCALE = torch.tensor([[0.1], [0.2], [0.05], [0.4]])


def test_int4_is_packed_in_pairs_of_outputs() -> None:
    made = encode(layer(CODES, SCALE, "int4/channel", "int8/token/dynamic"), "W4A8_DYNAMIC", NOWHERE)
    assert made["weight"].tolist() == [[56, -9], [-64, 81]]
    assert made["weight"].dtype == torch.int8
    assert torch.allclose(made["scale_bias"], torch.tensor([[-0.8], [3.2], [0.4], [3.2]]), atol=1e-6)  # float32


def test_scale_bias_of_a_row_parallel_layer_has_a_sum_for_each_sixteenth() -> None:
    codes = torch.arange(64, dtype=torch.int8).reshape(2, 32) % 16 - 8
    row = Place(None, True, torch.bfloat16)
    w4a8 = layer(codes, torch.tensor([[1.0], [0.5]]), "int4/channel", "int8/token/dynamic")
    made = encode(w4a8, "W4A8_DYNAMIC", row)
    sums = [8.0 * (2 * k - 15) for k in range(0, 16, 2)]
    assert made["scale_bias"].tolist() == [sums * 2, [one / 2 for one in sums * 2]]
    whole = encode(w4a8, "W4A8_DYNAMIC", NOWHERE)
    assert torch.equal(made["scale_bias"].sum(1, keepdim=True), whole["scale_bias"])


def test_float4_is_packed_in_pairs_of_inputs() -> None:
    codes = torch.tensor([[0, 1, 10, 15]], dtype=torch.uint8)  # 0, 0.5, -1, -6
    made = encode(
        layer(codes, torch.tensor([[0.25]]).to(torch.float8_e8m0fnu), "mxfp4", "mxfp4/dynamic"), "W4A4_MXFP4", NOWHERE
    )
    assert made["weight"].tolist() == [[16, 250]]
    assert made["weight_scale"].tolist() == [[125]]  # 2^-2
    assert {str(t.dtype) for t in made.values()} == {"torch.uint8"}


def test_w4a16_is_packed_along_inputs_by_channel_and_along_outputs_in_groups() -> None:
    by_channel = encode(layer(CODES, SCALE, "int4/channel"), "W4A16", NOWHERE)["weight"]
    assert by_channel.tolist() == [[120], [-13], [16], [92]]
    codes = torch.cat([CODES, CODES], 1)
    groups = encode(layer(codes, torch.ones(4, 2), "int4/g2"), "W4A16", NOWHERE)["weight"]
    assert groups.tolist() == [[56, -9, 56, -9], [-64, 81, -64, 81]]


@pytest.mark.parametrize("zero_point", [None, 0, -3, 127])
def test_a_zero_point_of_0_is_another_than_none(zero_point: int | None) -> None:
    made = encode(static(zero_point), "W8A8", NOWHERE)
    assert made["input_offset"].tolist() == [zero_point or 0.0]  # -0 is equal to 0
    _, _, found = decode(made, "W8A8")
    assert found.keys() == {"input_scale"} | ({"input_zero_point"} if zero_point is not None else set())
    if zero_point is not None:
        assert (found["input_zero_point"].dtype, found["input_zero_point"].shape) == (torch.int8, ())
        assert int(found["input_zero_point"]) == zero_point


def test_weights_of_zero_points() -> None:
    zero = torch.tensor([[0], [5], [-8], [7]], dtype=torch.int8)
    for weight, tag in (("int4/asym/channel", "W4A16"), ("int8/asym/channel", "W8A16")):
        made = encode(layer(CODES, SCALE, weight, zero_point=zero), tag, NOWHERE)
        codes, scales, _ = decode(made, tag)
        assert torch.equal(codes, CODES)
        assert torch.equal(scales.zero_point, zero)  # type: ignore[arg-type]
        assert made["weight_offset"].dtype == torch.float32
        none = encode(layer(CODES, SCALE, weight, zero_point=torch.zeros_like(zero)), tag, NOWHERE)
        assert torch.equal(decode(none, tag)[1].zero_point, torch.zeros_like(zero))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_what_is_stored_is_read_back(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (2 * rows, 2 * columns), generator=generator).to(torch.int8)
    scale = torch.rand(2 * rows, 1, generator=generator)
    for weight, input, tag in (
        ("int4/channel", "int8/token/dynamic", "W4A8_DYNAMIC"),
        ("int4/channel", "int4/token/dynamic", "W4A4_DYNAMIC"),
        ("int8/channel", "int8/token/dynamic", "W8A8_DYNAMIC"),
        ("int4/channel", None, "W4A16"),
    ):
        found, scales, _ = decode(encode(layer(codes, scale, weight, input), tag, NOWHERE), tag)
        assert torch.equal(found, codes)
        assert torch.equal(scales.scale, scale)


@pytest.mark.parametrize("tag", ["W8A8FP8_DYNAMIC", "WFP8AFP8_DYNAMIC", "W8A8_MXFP8"])
def test_float8_is_stored_as_such(tag: str) -> None:
    codes = torch.arange(80, dtype=torch.uint8).reshape(2, 40)  # one block and a quarter
    is_mx = tag == "W8A8_MXFP8"
    scale = torch.tensor([[0.5, 4.0], [1.0, 2.0]]).to(torch.float8_e8m0fnu) if is_mx else torch.rand(2, 1)
    weight = "mxfp8_e4m3" if is_mx else "float8_e4m3fn/channel"
    made = encode(layer(codes, scale, weight, f"{weight.removesuffix('/channel')}{'' if is_mx else '/token'}/dynamic"),
                  tag, NOWHERE)  # fmt: skip
    assert torch.equal(made["weight"].view(torch.uint8), codes)
    assert made["weight"].dtype == torch.float8_e4m3fn
    found, scales, _ = decode(made, tag)
    assert torch.equal(found, codes)
    assert torch.equal(scales.scale.float(), scale.float())
    if is_mx:
        assert made["weight_scale"].tolist() == [[126, 129], [127, 128]]


def test_codes_of_a_byte_each_are_read_as_before_version_1() -> None:
    parts = {"weight": CODES, "weight_scale": SCALE, "weight_offset": torch.zeros(4, 1)}
    assert torch.equal(decode(parts, "W4A8_DYNAMIC")[0], CODES)
    with pytest.raises(TargetError, match="weight: holds codes of more than 4 bits, a byte each"):
        decode(parts | {"weight": CODES * 2}, "W4A8_DYNAMIC")


F32 = {"weight_scale": SCALE, "weight_offset": torch.zeros(4, 1)}
WRONG = {
    "one axis": ("W8A16", {"weight": CODES[0]}, "weight [2], weight_scale [4, 1]: are not of two axes"),
    "float weight": ("W8A16", {"weight": CODES.float()}, "weight: float32[4, 2], where int8[4, 2] belongs"),
    "unsigned": ("W8A8_DYNAMIC", {"weight": CODES.view(torch.uint8)}, "weight: uint8[4, 2], where int8[4, 2] belongs"),
    "other rows": ("W8A8_DYNAMIC", {"weight": CODES[:3]}, "weight: int8[3, 2], where int8[4, 2] belongs"),
    "rows of pairs": ("W4A8_DYNAMIC", {"weight": CODES[:3]}, "weight: int8[3, 2], where int8[2, 2] belongs"),
    "half scales": ("W8A16", {"weight_scale": SCALE.half()}, "weight_scale: float16[4, 1], where float32[4, 1] belongs"),
    "no groups": ("W8A16", {"weight_scale": torch.ones(4, 0)}, "weight_scale: [4, 0] of a weight [4, 2]"),
    "uneven groups": ("W8A16", {"weight_scale": torch.ones(4, 3)}, "weight_scale: [4, 3] of a weight [4, 2]"),
    "offsets": ("W8A16", {"weight_offset": torch.ones(4, 2)}, "weight_offset: float32[4, 2], where float32[4, 1] belongs"),
    "broken offsets": (
        "W8A16",
        {"weight_offset": torch.full((4, 1), 0.5)},
        "weight_offset: holds what is no whole number from -128 to 127",
    ),
    "large offsets": (
        "W8A16",
        {"weight_offset": torch.full((4, 1), 128.0)},
        "weight_offset: holds what is no whole number from -128 to 127",
    ),
    "no numbers": (
        "W8A16",
        {"weight_offset": torch.full((4, 1), torch.nan)},
        "weight_offset: holds what is no whole number from -128 to 127",
    ),
    "mx scales": ("W8A8_MXFP8", {"weight": CODES.view(torch.float8_e4m3fn)}, "weight_scale: float32[4, 1], where uint8[4, 1] belongs"),
    "float8": ("WFP8AFP8_DYNAMIC", {}, "weight: int8[4, 2], where float8_e4m3fn[4, 2] belongs"),
    "mx codes": ("W4A4_MXFP4", {}, "weight: int8[4, 2], where uint8[4, 2] belongs"),
    "input": ("W8A8", {"input_scale": torch.ones(2)}, "input_scale: float32[2], where float32[1] belongs"),
    "input offset": (
        "W8A8",
        {"input_scale": torch.ones(1), "input_offset": torch.ones(1, dtype=torch.int8)},
        "input_offset: int8[1], where float32[1] belongs",
    ),
    "second": (
        "W4A8_DYNAMIC",
        {"weight_scale_second": torch.ones(4, 1, 1)},
        "weight_scale_second: [4, 1, 1] of a weight [4, 2]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_tensor_of_a_tag(case: str) -> None:
    tag, changed, message = WRONG[case]
    with pytest.raises(TargetError) as caught:
        decode({"weight": CODES, **F32, **changed}, tag)
    assert str(caught.value) == message
