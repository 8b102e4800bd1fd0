"""Linears on packed codes: what they compute, hold, store and copy, whatever kernel they have."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphq
from graphq import numerics
from graphq.errors import PassError
from graphq.numerics import Scales
from graphq.runtime import kernels
from graphq.runtime.kernels import native
from graphq.runtime.linear import PackedLinear
from graphq.runtime.modules import codes_of, hold_weight
from graphq.spec.formats import parse_format

LIMITS: list[kernels.Limit] = ["torch", "portable", "avx2", "avx512", "all"]
needs_library = pytest.mark.skipif(native.library() is None, reason=native.NOT_BUILT)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(
    format: str = "int4", *, n: int = 40, k: int = 96, group: int = 32, transposed: bool = False, bias: bool = True,
    dtype: torch.dtype = torch.float32, takes_codes: bool = False, seed: int = 0,
) -> PackedLinear:  # fmt: skip
    shape, block = ((k, n), [group, 1]) if transposed else ((n, k), [1, group])
    parsed, w = parse_format(format), random(*shape, seed=seed).to(dtype)
    scales = numerics.choose_scale(w, parsed, block)
    codes = numerics.quantize(w, scales, parsed, block)
    made = PackedLinear(format, block, shape, (int(transposed),), dtype, bias, None, takes_codes)
    if bias:
        made.register_buffer("bias", random(n, seed=seed + 1).to(dtype))
    return hold_weight(made, codes, scales)


def expected(module: PackedLinear, x: Tensor) -> Tensor:
    it = module.graphq_form
    scales = Scales(module.weight_scale, dict(module.named_buffers()).get("weight_zero_point"))
    w = numerics.dequantize(codes_of(module), scales, it.format, it.block).double()
    bias = dict(module.named_buffers()).get("bias")
    return F.linear(x.double(), w.t() if it.rows_first[0] else w, None if bias is None else bias.double())


def assert_near(y: Tensor, wanted: Tensor, bound: float = 1e-6) -> None:
    assert y.shape == wanted.shape
    assert not y.numel() or (y.double() - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", ["int4", "int4/asym", "int8", "float8_e4m3fn"])
def test_computes_what_its_weight_stands_for(limit: kernels.Limit, format: str, transposed: bool) -> None:
    module, x = linear(format, transposed=transposed), random(2, 3, 96, seed=5)
    with kernels.using(limit):
        y = module(x)
    assert_near(y, expected(module, x))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("format", ["int8", "int8/asym"])
@pytest.mark.parametrize("transposed", [False, True])
def test_computes_with_codes_what_they_stand_for(limit: kernels.Limit, format: str, transposed: bool) -> None:
    module, x = linear("int4/asym", transposed=transposed, takes_codes=True), random(2, 3, 96, seed=5) + 0.4
    scales = numerics.choose_scale(x, parse_format(format), [1, 1, -1])
    q = numerics.quantize(x, scales, parse_format(format), [1, 1, -1])
    with kernels.using(limit):
        y = module(q, scales.scale, scales.zero_point)
    assert_near(y, expected(module, numerics.dequantize(q, scales, parse_format(format), [1, 1, -1])))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)])
def test_computes_in_its_dtype(dtype: torch.dtype, bound: float) -> None:
    module, x = linear(dtype=dtype), random(4, 96).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert_near(y, expected(module, x), bound)


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (96,)])
def test_inputs_of_no_rows_and_of_one_axis(shape: tuple[int, ...]) -> None:
    assert linear()(torch.ones(shape)).shape == (*shape[:-1], 40)


@pytest.mark.parametrize(("n", "k"), [(0, 96), (40, 0)])
def test_weights_without_codes(n: int, k: int) -> None:
    module = linear(n=n, k=k)
    assert module.choice.kernel.level is None
    assert_near(
        module(torch.ones(3, k)) + 0, F.linear(torch.ones(3, k), torch.zeros(n, k), module.get_buffer("bias")).double()
    )


# -- what it holds -----------------------------------------------------------------------------------------------------


@needs_library
def test_tiles_take_the_place_of_the_packed_codes() -> None:
    module, x = linear(), random(4, 96)
    packed = module.weight.clone()
    module(x)
    assert module.weight.dim() == 1  # the only copy
    assert torch.equal(module.packed(), packed)
    held = sum(b.numel() * b.itemsize for b in module.buffers()) - packed.numel()
    assert held <= packed.numel() * 1.5  # with scales beside the codes, and short tiles filled
    module.release()
    assert torch.equal(module.weight, packed)


@pytest.mark.parametrize("ran", [False, True])
def test_state_is_plain_before_and_after_a_product(ran: bool) -> None:
    module, other, x = linear(), linear(seed=7), random(4, 96)
    plain = {name: t.clone() for name, t in module.state_dict().items()}
    if ran:
        module(x)
        other(x)
    state = module.state_dict()
    assert set(state) == {"weight", "weight_scale", "bias"}
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("ran", [False, True])
def test_copies_compute_the_same_and_are_their_own(ran: bool) -> None:
    module, x = linear(), random(4, 96)
    if ran:
        module(x)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x), module(x))
    copied.load_state_dict(linear(seed=3).state_dict())
    assert not torch.equal(copied(x), module(x))
    assert torch.equal(nn.Sequential(module).to(torch.bfloat16)[0](x), module(x))  # whose dtypes are its own


def test_weights_that_are_put_in_later_count() -> None:
    module, other, x = linear(), linear(seed=3), random(4, 96)
    before = module(x)
    hold_weight(module, codes_of(other), Scales(other.weight_scale))
    assert not torch.equal(module(x), before)
    assert_near(module(x), expected(module, x))


def test_zero_points_may_come_after_products_without() -> None:
    module, q = linear(takes_codes=True), torch.ones(3, 96, dtype=torch.int8)
    without = module(q, torch.ones(3, 1), None)
    assert_near(without, expected(module, q))
    zero = torch.tensor([[0], [1], [5]], dtype=torch.int8)
    assert_near(module(q, torch.ones(3, 1), zero), expected(module, q - zero))


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("takes_codes", [False, True])
def test_is_exported(ran: bool, takes_codes: bool) -> None:
    module = linear("int4/asym", takes_codes=takes_codes)
    q = torch.arange(4 * 96).reshape(4, 96).to(torch.int8)
    inputs: tuple[Any, ...] = (q, torch.full((4, 1), 0.1)) if takes_codes else (random(4, 96),)
    wanted = module(*inputs) if ran else linear("int4/asym", takes_codes=takes_codes)(*inputs)
    rows = torch.export.Dim("rows")
    shapes = tuple({0: rows} for _ in inputs)
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False).module()
    assert_near(exported(*inputs), wanted.double())


@pytest.mark.parametrize("ran", [False, True])
def test_is_traced_by_torch_compile(ran: bool) -> None:
    module, x = linear(), random(4, 96)
    wanted = linear()(x)
    if ran:
        module(x)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert_near(compiled(x), wanted.double())


def test_gradients_reach_its_input() -> None:
    module, x = linear(), random(4, 96).requires_grad_()
    module(x).sum().backward()
    y = random(4, 96).requires_grad_()
    expected(module, y).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert_near(x.grad, y.grad.double())


@pytest.mark.parametrize("limit", ["torch", "all"])
def test_runs_in_inference_mode(limit: kernels.Limit) -> None:
    module, x = linear(), random(4, 96)
    with kernels.using(limit):
        with torch.inference_mode():
            inside = module(x)
        assert torch.equal(module(x), inside)


# -- what decides ------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (linear(dtype=torch.float64), "rows expanded by torch: float32 does not hold its numbers"),
        (linear(group=4), "rows expanded by torch: tiles of groups of 4 would be mostly padding"),
        (linear(n=0), "rows expanded by torch: it has no codes"),
        (linear(takes_codes=True, k=1 << 16, group=-1, n=1), "rows expanded by torch: int32 does not hold sums of 65536 products"),
        (linear("float8_e4m3fn", takes_codes=True), "rows expanded by torch: its codes are floats"),
    ],
    ids=["float64", "small groups", "empty", "long groups", "floats"],
)  # fmt: skip
def test_what_tiles_do_not_hold(module: PackedLinear, wanted: str) -> None:
    assert str(module.choice) == wanted


@needs_library
def test_a_limit_is_a_reason() -> None:
    with kernels.using("torch"):
        assert str(linear().choice) == "rows expanded by torch: asked for"
    with kernels.using("portable"):
        assert str(linear().choice) == "float32 tiles (portable): portable was asked for"
        module = linear()
        module(random(1, 96))
    assert str(module.choice) == "float32 tiles (portable): portable was asked for"  # it keeps what it has chosen


def test_without_the_library_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", lambda: (None, native.NOT_BUILT))
    monkeypatch.setattr(native, "levels", lambda: frozenset[str]())
    module, x = linear(), random(4, 96)
    assert str(module.choice) == f"rows expanded by torch: {native.NOT_BUILT}"
    assert_near(module(x), expected(module, x))


@pytest.mark.parametrize(
    ("x", "scale"), [(torch.ones(2, 95), None), (torch.ones(2, 96, dtype=torch.int8), None)], ids=["features", "codes"]
)
@needs_library
def test_refuses_what_does_not_fit(x: Tensor, scale: Tensor | None) -> None:
    with pytest.raises(PassError, match="for a linear of 96 features"):
        linear()(x, scale)


def test_a_compiled_model_tells_what_computes_its_layers() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16), nn.Linear(16, 8))
    rules = [
        {"match": "0", "weight": "int4/g32"},
        {"match": "1", "weight": "int8/channel", "input": "int8/token/dynamic"},
    ]
    compiled = graphq.compile(model, {"graphq": 1, "rules": rules}, inputs=torch.ones(2, 64))
    assert "kernel" not in compiled.report.table()[0]
    with kernels.using("torch"):
        told = compiled.module.kernels
    reason = "asked for" if native.library() is not None else native.NOT_BUILT
    assert told["0"] == f"rows expanded by torch: {reason}"
    assert set(told) == {"0", "1"}
    column = compiled.report.table()[0].index("kernel")
    assert [line[column] for line in compiled.report.table()[1:]] == [*compiled.report.kernels.values(), ""]
