"""The modules of a compiled model: what they hold, what they compute, how they are copied, stored and moved."""

import copy
import io
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from graphq import numerics, packing
from graphq.errors import PassError
from graphq.numerics import Scales
from graphq.runtime import kernels, modules
from graphq.runtime.kernels import KERNELS, features, native
from graphq.runtime.modules import (
    Int8Linear,
    PackedWeight,
    codes_of,
    has_integer_kernel,
    hold_linear,
    hold_weight,
    scales_of,
    settings_of,
)
from graphq.spec.formats import Int


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Where the rows are: a linear, GPT-2's Conv1D with channels along axis 1, a convolution, the last axis, experts.
LAYOUTS = {
    "linear": ((6, 10), (0,), [1, 4]),
    "linear-tensor": ((6, 10), (0,), [-1, -1]),
    "conv1d-transposed": ((10, 6), (1,), [4, 1]),
    "convolution": ((6, 3, 3, 2), (0,), [1, 2, -1, -1]),
    "rows-last": ((2, 3, 6), (2,), [-1, 2, 1]),
    "experts": ((3, 6, 10), (0, 1), [1, 1, 4]),
}


def packed_weight(format: Int, layout: str, dtype: torch.dtype = torch.float32) -> tuple[PackedWeight, Tensor, Scales]:
    shape, row_axes, block = LAYOUTS[layout]
    w = random(*shape)
    scales = numerics.choose_scale(w, format, block)
    codes = numerics.quantize(w, scales, format, block)
    module = PackedWeight(str(format), block, shape, row_axes, dtype)
    return hold_weight(module, codes, scales), codes, scales


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weight_gives_the_codes_and_values_back(bits: int, layout: str, symmetric: bool) -> None:
    module, codes, scales = packed_weight(Int(bits, symmetric), layout)
    block = LAYOUTS[layout][2]
    assert torch.equal(codes_of(module), codes)
    assert torch.equal(module(), numerics.dequantize(codes, scales, Int(bits, symmetric), block))
    rows = 18 if layout == "experts" else 6
    columns = codes.numel() // rows
    assert module.weight.dtype == torch.uint8
    assert module.weight.shape == (rows, -(-columns * bits // 8))
    held = scales_of(module)
    assert torch.equal(held.scale, scales.scale)
    assert (held.zero_point is None) == (scales.zero_point is None) == symmetric
    if held.zero_point is not None and scales.zero_point is not None:
        assert torch.equal(held.zero_point, scales.zero_point)


def test_each_output_channel_is_a_row_of_bytes() -> None:
    module, codes, _ = packed_weight(Int(3), "conv1d-transposed")
    for channel in range(6):
        assert torch.equal(module.weight[channel], packing.pack(codes[:, channel], 3))
    module, codes, _ = packed_weight(Int(4), "experts")
    assert torch.equal(module.weight[1 * 6 + 2], packing.pack(codes[1, 2], 4))
    module, codes, _ = packed_weight(Int(4), "convolution")
    assert torch.equal(module.weight[5], packing.pack(codes[5].flatten(), 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_packed_weight_is_dequantized_to_its_dtype(dtype: torch.dtype) -> None:
    module, codes, scales = packed_weight(Int(4), "linear", dtype)
    assert module().dtype == dtype
    assert torch.equal(module(), numerics.dequantize(codes, scales, Int(4), [1, 4]).to(dtype))


def test_packed_weight_refuses_other_shapes() -> None:
    module, codes, scales = packed_weight(Int(4, symmetric=False), "linear")
    with pytest.raises(PassError, match=r"codes of shape \(10, 6\), not \(6, 10\)"):
        hold_weight(module, codes.t(), scales)
    with pytest.raises(PassError, match=r"a scale of shape \(6, 1\), not \(6, 3\)"):
        hold_weight(module, codes, scales._replace(scale=scales.scale[:, :1]))
    with pytest.raises(PassError, match=r"a zero point of shape None, not \(6, 3\)"):
        hold_weight(module, codes, Scales(scales.scale))


class Case:
    """An int8 linear with its input, and the product of what both stand for, in float64."""

    def __init__(
        self, *, n: int = 24, k: int = 40, batch: tuple[int, ...] = (5,), per_channel: bool = True, symmetric: bool = True,
        input_symmetric: bool = True, per_token: bool = False, bias: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        format, block = Int(8, symmetric), [1 if per_channel else -1, -1]
        w = random(n, k, seed=seed) + (0 if symmetric else 0.7)
        self.scale, self.zero_point, _ = numerics.choose_scale(w, format, block)
        self.codes = numerics.quantize(w, Scales(self.scale, self.zero_point), format, block)
        self.bias = random(n, seed=seed + 1) if bias else None
        x = random(*batch, k, seed=seed + 2).relu() if not input_symmetric else random(*batch, k, seed=seed + 2)
        format = Int(8, input_symmetric)
        x_block = [1] * len(batch) + [-1] if per_token else [-1] * (len(batch) + 1)
        self.x_scale, self.x_zero_point, _ = numerics.choose_scale(x, format, x_block)
        if not per_token:  # as observers give it
            self.x_scale = self.x_scale.reshape(())
            self.x_zero_point = None if self.x_zero_point is None else self.x_zero_point.reshape(())
        self.q = numerics.quantize(x, Scales(self.x_scale, self.x_zero_point), format, x_block)
        self.module = Int8Linear((n, k), per_channel, symmetric, bias, torch.float32)
        hold_linear(self.module, self.codes, self.scale, self.zero_point, self.bias)

    def run(self) -> Tensor:
        return self.module(self.q, self.x_scale, self.x_zero_point)

    def expected(self) -> Tensor:
        def value(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
            return (codes.double() - (0 if zero_point is None else zero_point.double())) * scale.double()

        x, w = value(self.q, self.x_scale, self.x_zero_point), value(self.codes, self.scale, self.zero_point)
        y = x @ w.t()
        return y if self.bias is None else y + self.bias.double()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "per-tensor": {"per_channel": False},
    "asymmetric-weight": {"symmetric": False},
    "asymmetric-weight-per-tensor": {"symmetric": False, "per_channel": False},
    "asymmetric-input": {"input_symmetric": False},
    "asymmetric-both": {"symmetric": False, "input_symmetric": False},
    "per-token": {"per_token": True},
    "per-token-asymmetric-both": {"per_token": True, "symmetric": False, "input_symmetric": False},
    "batched": {"batch": (2, 3, 4)},
    "batched-per-token-asymmetric": {"batch": (2, 3), "per_token": True, "symmetric": False, "input_symmetric": False},
    "vector": {"batch": ()},
    "one-row": {"batch": (1,)},
    "many-rows": {"batch": (130,)},
    "odd-k": {"k": 37},
    "k-of-1": {"k": 1},
    "n-of-1": {"n": 1},
    "odd-everything": {"n": 17, "k": 67, "batch": (3, 7), "symmetric": False, "input_symmetric": False},
    "large": {"n": 64, "k": 4096, "batch": (33,)},
    "large-asymmetric": {"n": 64, "k": 4096, "batch": (33,), "symmetric": False, "input_symmetric": False},
}


@pytest.fixture(params=["tiles", "onednn", "fallback"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way the integer product goes."""
    if request.param == "onednn" and not has_integer_kernel():
        pytest.skip("oneDNN has no exact int8 product on this machine")
    if request.param == "tiles" and not features():
        pytest.skip(native.NOT_BUILT)
    best = next((kernel for kernel in KERNELS if kernel.product == "int8" and kernel.level in features()), None)
    monkeypatch.setattr(kernels, "integer_kernel", lambda _: best if request.param == "tiles" else None)
    monkeypatch.setattr(modules, "has_integer_kernel", lambda: request.param == "onednn")
    monkeypatch.setattr(modules, "has_row_kernel", lambda device: False)
    return str(request.param)


@pytest.mark.parametrize("name", CASES)
def test_int8_linear_is_the_linear_of_what_the_codes_stand_for(name: str, path: str) -> None:
    case = Case(**CASES[name])
    got, expected = case.run(), case.expected()
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    # The sums are integers, which float32 holds exactly up to 2^24 and rounds by 2^-24 of themselves above; scales and
    # bias round three more times. 1e-5 leaves room for what zero points take out of larger sums.
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert case.module._graphq_ready is not None
    assert (case.module._graphq_ready.packed is not None) == (path == "onednn")
    assert (case.module._graphq_ready.product is not None) == (path == "tiles")


def test_an_integer_linear_is_exported_before_and_after_a_product(path: str) -> None:
    case = Case(per_token=True)
    expected = case.run()
    inputs = (case.q, case.x_scale, None)
    for _ in range(2):
        exported = torch.export.export(case.module, inputs, strict=False).module()
        assert (exported(*inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert torch.equal(case.run(), expected)
        compiled = torch.compile(case.module, backend="eager")
        assert (compiled(*inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_both_ways_give_the_same_bits() -> None:
    if not has_integer_kernel():
        pytest.skip("oneDNN has no exact int8 product on this machine")
    for arguments in CASES.values():
        case = Case(**arguments)
        packed = torch.ops.onednn.qlinear_prepack(case.codes, None)
        assert torch.equal(
            modules._integer_product(case.q, case.codes, packed), modules._integer_product(case.q, case.codes, None)
        )


ROWS = [
    {"batch": ()},
    {"batch": (1,)},
    {"batch": (1, 1)},
    {"batch": (1,), "bias": False},
    {"batch": (1,), "k": 37, "n": 3},
]


@pytest.mark.parametrize("arguments", ROWS)
def test_a_single_row_needs_no_second_copy_of_the_weight(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not modules.has_row_kernel(torch.device("cpu")):
        pytest.skip("torch has no exact product of one row of int8 codes on this machine")
    monkeypatch.setattr(kernels, "integer_kernel", lambda weight: None)
    case = Case(**arguments)
    found = case.run()
    assert case.module._graphq_ready is None
    monkeypatch.setattr(modules, "has_row_kernel", lambda device: False)
    assert torch.equal(found, case.run())
    assert case.module._graphq_ready is not None


@pytest.mark.parametrize("arguments", [{"batch": (2,)}, {"batch": (0,)}, {"batch": (1, 0)}, {"batch": (), "k": 0}])
def test_what_is_no_single_row(arguments: dict[str, Any]) -> None:
    case = Case(**arguments)
    found = case.run()
    assert found.shape == case.expected().shape
    assert (found - case.expected()).abs().sum() <= 1e-5 * case.expected().abs().sum()


def test_sums_up_to_2_to_the_24_are_exact_where_those_of_raised_inputs_are(path: str) -> None:
    case = Case(n=64, k=1024, batch=(33,), bias=False)  # 1024 * 128 * 128 = 2^24
    codes = torch.randint(-128, 128, (64, 1024), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    q = torch.randint(-128, 128, (33, 1024), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    codes[0], q[0], codes[1] = -128, -128, 127
    hold_linear(case.module, codes, torch.ones(64, 1), None, None)
    exact = q.long() @ codes.long().t()
    assert exact[0, 0] == 1 << 24
    raised = (q.long() + 128) @ codes.long().t()
    assert (raised.abs() > 1 << 24).any()
    # The kernel may round its own sums, of raised inputs, to float32 before it takes the 128 out: to an even number
    # from 2^24 to 2^25, so by 1 at most.
    allowed = (raised.abs() > 1 << 24).long() * (path == "onednn")
    assert ((case.module(q, torch.ones(()), None).long() - exact).abs() <= allowed).all()


@pytest.mark.parametrize(("q", "w"), [(127, 127), (-128, -128), (127, -128), (-128, 127)])
@pytest.mark.parametrize("k", [64, 4096])
def test_extreme_codes_do_not_saturate(q: int, w: int, k: int, path: str) -> None:
    module = Int8Linear((16, k), True, True, False, torch.float32)
    hold_linear(module, torch.full((16, k), w, dtype=torch.int8), torch.ones(16, 1), None, None)
    got = module(torch.full((3, k), q, dtype=torch.int8), torch.ones(()), None)
    assert torch.equal(got, torch.full((3, 16), float(q * w * k)))  # q w 2^6 or 2^12: float32 holds them all


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_no_rows(batch: tuple[int, ...], asymmetric: bool, path: str) -> None:
    case = Case(batch=(1,) * len(batch), symmetric=not asymmetric, input_symmetric=not asymmetric)
    got = case.module(torch.empty(*batch, 40, dtype=torch.int8), case.x_scale, case.x_zero_point)
    assert got.shape == (*batch, 24)
    assert got.dtype == torch.float32


def test_inputs_and_weights_need_not_be_contiguous(path: str) -> None:
    case = Case(n=24, k=40, batch=(5,))
    expected = case.run()
    hold_linear(case.module, case.codes.t().contiguous().t(), case.scale, None, case.bias)
    assert torch.equal(case.module(case.q.t().contiguous().t(), case.x_scale, None), expected)


def test_the_result_has_the_dtype_of_the_source() -> None:
    case = Case()
    module = Int8Linear((24, 40), True, True, True, torch.bfloat16)
    hold_linear(module, case.codes, case.scale, None, random(24).bfloat16())
    case.bias = random(24).bfloat16()
    got = module(case.q, case.x_scale, None)
    assert got.dtype == torch.bfloat16
    # One rounding to bfloat16 at the end, 2^-8, and float32's before it.
    torch.testing.assert_close(got.double(), case.expected(), rtol=2**-8 + 1e-5, atol=1e-5)


def test_int8_linear_refuses_other_shapes() -> None:
    case = Case(symmetric=False)
    with pytest.raises(PassError, match=r"codes of shape \(40, 24\), not \(24, 40\)"):
        hold_linear(case.module, case.codes.t(), case.scale, case.zero_point, case.bias)
    with pytest.raises(PassError, match=r"a scale of shape \(1, 1\), not \(24, 1\)"):
        hold_linear(case.module, case.codes, case.scale[:1], case.zero_point, case.bias)
    with pytest.raises(PassError, match=r"a zero point of shape None, not \(24, 1\)"):
        hold_linear(case.module, case.codes, case.scale, None, case.bias)
    with pytest.raises(PassError, match=r"a bias of shape None, not \(24,\)"):
        hold_linear(case.module, case.codes, case.scale, case.zero_point, None)


def test_changed_weights_are_seen(path: str) -> None:
    case, other = Case(input_symmetric=False), Case(input_symmetric=False, seed=7)
    codes, before = case.codes.clone(), case.run()
    expected = other.module(case.q, case.x_scale, case.x_zero_point)
    assert not torch.equal(before, expected)
    case.module.load_state_dict(other.module.state_dict())  # copies into the same tensors
    assert torch.equal(case.run(), expected)
    with torch.inference_mode():
        hold_linear(case.module, codes.clone(), case.scale, None, case.bias)
        assert not torch.equal(case.run(), expected)
        hold_linear(case.module, other.codes.clone(), other.scale, None, other.bias)
        assert torch.equal(case.run(), expected)


def modules_and_inputs() -> list[tuple[nn.Module, tuple[Any, ...]]]:
    linear = Case(symmetric=False, input_symmetric=False, per_token=True)
    per_tensor = Case(per_channel=False, bias=False)
    packed = [packed_weight(Int(3, symmetric=False), "experts"), packed_weight(Int(4), "conv1d-transposed")]
    return [
        (linear.module, (linear.q, linear.x_scale, linear.x_zero_point)),
        (per_tensor.module, (per_tensor.q, per_tensor.x_scale, None)),
        *((module, ()) for module, *_ in packed),
    ]


@pytest.mark.parametrize("index", range(4))
def test_copies_stand_alone(index: int) -> None:
    module, inputs = modules_and_inputs()[index]
    module.register_buffer("other", torch.ones(1))  # what the float layer held besides
    module.add_module("child", nn.Linear(2, 2))
    expected = module(*inputs)  # a linear has prepared its weight by now
    copied = copy.deepcopy(nn.ModuleList([module, module]))
    assert copied[0] is copied[1]
    assert torch.equal(copied[0](*inputs), expected)
    assert set(copied[0].state_dict()) == set(module.state_dict())
    for tensor in module.state_dict().values():
        tensor.zero_()
    assert torch.equal(copied[0](*inputs), expected)


@pytest.mark.parametrize("index", range(4))
def test_settings_and_state_make_the_module_again(index: int) -> None:
    module, inputs = modules_and_inputs()[index]
    expected = module(*inputs)
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = cast(Any, type(module))(**settings_of(cast(Any, module)))
    finally:
        torch.set_default_dtype(torch.float32)
    made.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(made(*inputs), expected)
    assert {n: (t.shape, t.dtype) for n, t in made.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in module.state_dict().items()
    }


CONVERSIONS = {
    "to": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.float16),
    "inside a model": lambda module: nn.Sequential(module).to(torch.float64)[0],
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("index", range(4))
def test_conversions_leave_dtypes_and_values_alone(index: int, conversion: str) -> None:
    module, inputs = modules_and_inputs()[index]
    expected = module(*inputs)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    converted = CONVERSIONS[conversion](module)
    assert converted is module
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    got = module(*inputs)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_modules_below_are_converted() -> None:
    for module, _ in modules_and_inputs():
        module.add_module("child", nn.Linear(2, 2))
        module.to(torch.float64)
        assert {p.dtype for p in module.get_submodule("child").parameters()} == {torch.float64}


@pytest.mark.parametrize("index", range(4))
def test_modules_move_between_devices(index: int) -> None:
    module, inputs = modules_and_inputs()[index]
    expected, state = module(*inputs), copy.deepcopy(module.state_dict())
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    module.to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    module.to_empty(device="cpu")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
    assert {name: tensor.dtype for name, tensor in module.state_dict().items()} == dtypes
    module.load_state_dict(state)
    assert torch.equal(module(*inputs), expected)


def test_the_probe_finds_a_kernel_that_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(q: Tensor, weight: Tensor, packed: Tensor | None) -> Tensor:
        # vpmaddubsw: products of unsigned and signed bytes, summed in pairs in 16 bits
        pairs = ((q.long() + 128).unsqueeze(-2) * weight.long()).unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767)
        return (pairs.sum(-1) - 128 * weight.long().sum(-1)).float()

    monkeypatch.setattr(modules, "_PROBED", [])
    monkeypatch.setattr(modules, "_integer_product", saturating)
    assert not has_integer_kernel()
    monkeypatch.setattr(modules, "_PROBED", [])
    monkeypatch.setattr(modules, "_integer_product", lambda q, w, packed: q.float() @ w.float().t())
    assert has_integer_kernel() == hasattr(torch.ops.onednn, "qlinear_prepack")


def test_without_the_kernel_the_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Tensor:
        raise NotImplementedError

    monkeypatch.setattr(modules, "_PROBED", [])
    monkeypatch.setattr(modules, "_integer_product", missing)
    assert not has_integer_kernel()
