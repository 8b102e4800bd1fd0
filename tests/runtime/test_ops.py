"""The custom ops: their schemas, their fake kernels, and what they compute."""

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphq import numerics
from graphq.errors import PassError
from graphq.numerics import Scales
from graphq.runtime import ops
from graphq.spec.formats import Int


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_schemas() -> None:
    schemas = [
        str(op._schema) for op in (ops.dequantize, ops.quantize, ops.choose_scale, ops.grouped_linear, ops.select_rows)
    ]
    assert schemas == [
        "graphq::dequantize(Tensor codes, Tensor scale, Tensor? zero_point, Tensor? global_scale, str format, int[] block, ScalarType? dtype=None) -> Tensor",
        "graphq::quantize(Tensor x, Tensor scale, Tensor? zero_point, Tensor? global_scale, str format, int[] block) -> Tensor",
        "graphq::choose_scale(Tensor x, str format, int[] block, Tensor? global_scale=None) -> (Tensor scale, Tensor zero_point)",
        "graphq::grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
        "graphq::select_rows(Tensor[] candidates, Tensor offsets, int[] choice) -> Tensor",
    ]


def quantized(format: Int, block: list[int], *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x = random(*shape, dtype=dtype)
    scale, zero_point, _ = numerics.choose_scale(x, format, block)
    return x, scale, zero_point, numerics.quantize(x, Scales(scale, zero_point), format, block)


PICTURE = torch.arange(2 * 3 * 7 * 5).mul(37).remainder(256).to(torch.uint8).view(2, 3, 7, 5)
OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)
X, SCALE, ZERO_POINT, CODES = quantized(Int(4, symmetric=False), [1, 4], 6, 10)
HALF, HALF_SCALE, _, HALF_CODES = quantized(Int(8), [1, 1, -1], 2, 3, 8, dtype=torch.bfloat16)
DOUBLE, _, _, _ = quantized(Int(16), [-1, -1], 6, 10, dtype=torch.float64)
CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "dequantize": (ops.dequantize, (CODES, SCALE, ZERO_POINT, None, "int4/asym", [1, 4])),
    "dequantize-symmetric": (ops.dequantize, (HALF_CODES, HALF_SCALE, None, None, "int8", [1, 1, -1])),
    "dequantize-dtype": (ops.dequantize, (CODES, SCALE, ZERO_POINT, None, "int4/asym", [1, 4], torch.bfloat16)),
    "dequantize-half-scale": (ops.dequantize, (HALF_CODES, HALF_SCALE.half(), None, None, "int8", [1, 1, -1])),
    "dequantize-transposed": (ops.dequantize, (CODES.t(), SCALE.t(), ZERO_POINT.t(), None, "int4/asym", [4, 1])),
    "quantize": (ops.quantize, (X, SCALE, ZERO_POINT, None, "int4/asym", [1, 4])),
    "quantize-half": (ops.quantize, (HALF, HALF_SCALE, None, None, "int8", [1, 1, -1])),
    "quantize-int16": (ops.quantize, (X, torch.tensor(0.01), None, None, "int16", [-1, -1])),
    "quantize-transposed": (ops.quantize, (X.t(), SCALE.t(), ZERO_POINT.t(), None, "int4/asym", [4, 1])),
    "choose-scale-groups": (ops.choose_scale, (X, "int4/asym", [1, 4])),
    "choose-scale-channels": (ops.choose_scale, (X, "int4/half", [1, -1])),
    "choose-scale-tokens": (ops.choose_scale, (HALF, "int8", [1, 1, -1])),
    "choose-scale-tensor": (ops.choose_scale, (DOUBLE, "int16/asym", [-1, -1])),
    "choose-scale-no-rows": (ops.choose_scale, (X[:0], "int8/asym", [-1, -1])),
    "grouped-linear": (ops.grouped_linear, (X, random(3, 7, 10), OFFSETS)),
    "grouped-linear-half": (ops.grouped_linear, (X.bfloat16(), random(3, 7, 10, dtype=torch.bfloat16), OFFSETS)),
    "select-rows": (ops.select_rows, ([X, -X], OFFSETS, [0, 1, 1])),
    "max-pool": (ops.max_pool2d, (PICTURE, [3, 2], [2, 1], [1, 1], [1, 2], True)),
    "max-pool-signed": (ops.max_pool2d, (PICTURE.view(torch.int8), [2, 2], [2, 2], [0, 0], [1, 1], False)),
}


@pytest.mark.parametrize("call", CALLS)
def test_fake_kernels_agree_with_the_real_ones(call: str) -> None:
    op, arguments = CALLS[call]
    # Schema, no hidden mutation or aliasing, shape, dtype and strides of the fake outputs, with dynamic sizes too.
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("call", CALLS)
def test_fake_outputs_have_the_real_shapes_and_dtypes(call: str) -> None:
    op, arguments = CALLS[call]
    mode = FakeTensorMode()

    def faked(value: Any) -> Any:
        if isinstance(value, list):
            return [faked(item) for item in value]
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    with mode:
        fake = op(*map(faked, arguments))
    real = op(*arguments)
    pairs = zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]
    assert [(f.shape, f.dtype) for f, _ in pairs] == [
        (r.shape, r.dtype) for r in (real if isinstance(real, tuple) else [real])
    ]


def test_quantize_and_dequantize_are_those_of_numerics() -> None:
    got_scale, got_zero_point = ops.choose_scale(X, "int4/asym", [1, 4])
    assert torch.equal(got_scale, SCALE)
    assert torch.equal(got_zero_point, ZERO_POINT)
    assert torch.equal(ops.quantize(X, SCALE, ZERO_POINT, None, "int4/asym", [1, 4]), CODES)
    values = ops.dequantize(CODES, SCALE, ZERO_POINT, None, "int4/asym", [1, 4])
    assert torch.equal(
        values, numerics.dequantize(CODES, Scales(SCALE, ZERO_POINT), numerics.parse_format("int4/asym"), [1, 4])
    )
    assert not torch.equal(values, X)
    assert CODES.unique().numel() > 10


def test_choose_scale_of_a_symmetric_format_has_zero_points_of_0() -> None:
    scale, zero_point = ops.choose_scale(torch.tensor([[-15.0, 3], [0, 30]]), "int4/half", [1, -1])
    assert scale.tolist() == [[2], [4]]
    assert zero_point.tolist() == [[0], [0]]
    assert zero_point.dtype == torch.int8
    assert ops.choose_scale(X, "int16", [-1, -1])[1].dtype == torch.int16


def test_dequantize_rounds_to_the_dtype_once() -> None:
    scale = torch.tensor([[1 / 3]], dtype=torch.float16)
    codes = torch.tensor([[101, -77]], dtype=torch.int8)
    exact = codes.double() * scale.double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(ops.dequantize(codes, scale, None, None, "int8", [-1, -1], dtype), exact.to(dtype))
    assert torch.equal(ops.dequantize(codes, scale, None, None, "int8", [-1, -1]), exact.to(torch.float16))


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_global_scale_is_refused_where_the_format_has_none(mode: str) -> None:
    codes, x, one = torch.zeros(2, 2, dtype=torch.int8), torch.zeros(2, 2), torch.ones(1, 1)
    if mode == "fake":
        fake = FakeTensorMode()
        codes, x, one = fake.from_tensor(codes), fake.from_tensor(x), fake.from_tensor(one)
    with pytest.raises(PassError, match="int8 has no global scale"):
        ops.dequantize(codes, one, None, one, "int8", [-1, -1])
    with pytest.raises(PassError, match="int8 has no global scale"):
        ops.quantize(x, one, None, one, "int8", [-1, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_grouped_linear_is_a_loop_over_rows(dtype: torch.dtype, index: torch.dtype) -> None:
    x, weight = random(6, 10, dtype=dtype), random(4, 7, 10, seed=1, dtype=dtype)
    got = ops.grouped_linear(x, weight, torch.tensor([2, 2, 3, 5], dtype=index))
    assert got.dtype == dtype
    for row, expert in enumerate([0, 0, 2, 3, 3]):
        # Row by row and in groups, K = 10 products may be added in another order: 8 roundings of the result's size.
        torch.testing.assert_close(
            got[row], (weight[expert] @ x[row]), rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
        )
    assert (got[5] == 0).all()  # no expert's row


def test_grouped_linear_of_no_rows() -> None:
    offsets = torch.zeros(3, dtype=torch.int32)
    assert ops.grouped_linear(X[:0], random(3, 7, 10), offsets).shape == (0, 7)
    assert torch.equal(ops.grouped_linear(X, random(3, 7, 10), offsets), torch.zeros(6, 7))


def test_grouped_linear_takes_weights_that_fit() -> None:
    """Also of fake tensors, so that no pass makes a product that fails when it runs."""
    x, w, offsets = random(6, 10), random(3, 7, 10), OFFSETS
    for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode:
            assert ops.grouped_linear(x, w, offsets).shape == (6, 7)
            for rows, weight in ((x, w.double()), (x.half(), w), (x, w[0]), (x[:, :9], w), (x[None], w)):
                with pytest.raises(PassError, match="for experts' weights"):
                    ops.grouped_linear(rows, weight, offsets)


def test_select_rows() -> None:
    candidates = [torch.full((6, 2), value) for value in (1.0, 2.0, 3.0)]
    got = ops.select_rows(candidates, torch.tensor([1, 1, 3, 5]), [2, 0, 0, 1])
    assert got[:, 0].tolist() == [3, 1, 1, 2, 2, 0]
    assert torch.equal(got[:, 0], got[:, 1])
    assert [candidate.unique().tolist() for candidate in candidates] == [[1], [2], [3]]


def test_offsets_are_one_for_each_expert() -> None:
    with pytest.raises(PassError, match="3 offsets for 4 experts"):
        ops.grouped_linear(X, random(4, 7, 10), OFFSETS)
    with pytest.raises(PassError, match="3 offsets for 2 experts"):
        ops.select_rows([X, X], OFFSETS, [0, 1])


# -- recurrences


MODULES: dict[str, Any] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": functools.partial(nn.RNN, nonlinearity="relu"),
}


def recurrent(kind: str, bias: bool = True) -> tuple[Any, list[Tensor | None], Tensor]:
    """Torch's layer, what ``recurrence`` takes for it, and the layer's input, all in float64."""
    torch.manual_seed(0)
    layer = MODULES[kind](3, 4, bias=bias).double()
    x, states = torch.randn(5, 2, 3).double(), torch.randn(2, 2, 4).double()
    gates = torch.nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0 if bias else None)
    b = layer.bias_hh_l0 if bias else None
    return layer, [gates, layer.weight_hh_l0, b, states[0], states[1] if kind == "lstm" else None], x


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_a_recurrence_is_a_direction_of_torchs_layer(kind: str, bias: bool, reverse: bool) -> None:
    layer, given, x = recurrent(kind, bias)
    states = given[3:] if kind == "lstm" else given[3:4]
    with torch.no_grad():
        own = tuple(s[None] for s in states if s is not None)
        y, last = layer(x.flip(0) if reverse else x, own if kind == "lstm" else own[0])
        output, hidden, cell = ops.recurrence(*given, kind, reverse)
    torch.testing.assert_close(output, y.flip(0) if reverse else y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden, (last[0] if kind == "lstm" else last)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cell, last[1][0] if kind == "lstm" else hidden, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MODULES)
def test_gradients_go_through_recurrences(kind: str) -> None:
    _, given, _ = recurrent(kind)
    given = [None if t is None else t.detach().requires_grad_() for t in given]
    tensors: Any = given  # None among them is taken
    assert torch.autograd.gradcheck(lambda *tensors: ops.recurrence(*tensors, kind, True), tensors)


@pytest.mark.parametrize(
    ("position", "shape"), [(0, (5, 2, 8)), (0, (5, 16)), (1, (16, 3)), (2, (4,)), (3, (1, 4)), (4, (2, 3)), (4, None)]
)
def test_a_recurrence_checks_its_arguments(position: int, shape: tuple[int, ...] | None) -> None:
    _, given, _ = recurrent("lstm")
    given[position] = None if shape is None else torch.ones(shape, dtype=torch.float64)
    with pytest.raises(PassError, match="recurrence lstm: gates"):
        ops.recurrence(*given, "lstm", False)


def test_a_recurrence_of_no_known_kind_or_of_no_steps() -> None:
    _, given, _ = recurrent("gru")
    with pytest.raises(PassError, match="recurrence elman: gates"):
        ops.recurrence(*given, "elman", False)
    assert given[0] is not None
    with pytest.raises(PassError, match="no steps"):
        ops.recurrence(given[0][:0], *given[1:], "gru", False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "window", [([2, 2], [2, 2], [0, 0], [1, 1], False), ([3, 2], [2, 1], [1, 1], [1, 2], True)], ids=["plain", "odd"]
)
def test_max_pool2d_is_that_of_the_codes(dtype: torch.dtype, layout: torch.memory_format, window: Any) -> None:
    codes = PICTURE.view(dtype).contiguous(memory_format=layout)
    made = ops.max_pool2d(codes, *window)
    assert made.dtype == dtype
    assert torch.equal(made.float(), torch.nn.functional.max_pool2d(codes.float(), *window))
    assert ops.max_pool2d(codes[:0], *window).shape == (0, *made.shape[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        (PICTURE.float(), [2, 2], [2, 2], [0, 0], [1, 1]),
        (PICTURE[0], [2, 2], [2, 2], [0, 0], [1, 1]),
        (PICTURE, [2], [2, 2], [0, 0], [1, 1]),
        (PICTURE, [0, 2], [2, 2], [0, 0], [1, 1]),
        (PICTURE, [2, 2], [0, 2], [0, 0], [1, 1]),
        (PICTURE, [2, 2], [2, 2], [2, 0], [1, 1]),
        (PICTURE, [2, 2], [2, 2], [-1, 0], [1, 1]),
        (PICTURE, [2, 2], [2, 2], [0, 0], [0, 1]),
        (PICTURE, [9, 2], [2, 2], [0, 0], [1, 1]),
    ],
)
def test_max_pool2d_checks_its_arguments(arguments: Any) -> None:
    with pytest.raises((PassError, RuntimeError)):
        ops.max_pool2d(*arguments, False)
