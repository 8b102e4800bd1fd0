"""Every kernel against the reference op, over drawn shapes, formats and inputs."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphq import numerics, packing
from graphq.errors import PassError
from graphq.numerics import Scales
from graphq.runtime import kernels
from graphq.runtime.kernels import KERNELS, Kernel, Product, native
from graphq.spec.formats import Format, code_bits, parse_format

FORMATS = (
    *(f"int{bits}{asym}" for bits in range(2, 9) for asym in ("", "/asym")), "uint8", "float8_e4m3fn", "float8_e5m2",
    "hifloat8", "float6_e2m3", "float6_e3m2", "float4_e2m1", "float4_e1m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3",
    "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4", "int4/over_int8", "float4_e2m1/over_float8",
)  # fmt: skip
HERE = [kernel for kernel in KERNELS if kernel.level in native.levels()]
needs_library = pytest.mark.skipif(native.library() is None, reason=native.NOT_BUILT)


@dataclass(frozen=True)
class Case:
    """A linear: its weight in codes, and as the numbers that these stand for."""

    format: Format
    block: list[int]
    codes: Tensor
    scales: Scales
    bias: Tensor | None

    @property
    def dense(self) -> Tensor:
        return numerics.dequantize(self.codes, self.scales, self.format, self.block).double()

    @property
    def rows(self) -> kernels.Rows:
        packed = packing.pack(self.codes, code_bits(self.format))
        return kernels.rows_of(packed, self.scales, self.format, self.block, self.codes.shape, 0)


def case(format: str, n: int, k: int, group: int, *, bias: bool = True, rows: int = 1, seed: int = 0) -> Case:
    draw = torch.Generator().manual_seed(seed)
    parsed, w = parse_format(format), torch.randn(n, k, generator=draw)
    group = 32 if format.startswith("mx") else 16 if format == "nvfp4" else group
    group = 8 if "/over" in format and group < 0 else group
    block = [rows if "/over" not in format else 1, group]
    scales = numerics.choose_scale(w, parsed, block)
    codes = numerics.quantize(w, scales, parsed, block)
    return Case(parsed, block, codes, scales, torch.randn(n, generator=draw) if bias else None)


def assert_near(y: Tensor, found: Case, x: Tensor, bound: float) -> None:
    """``y`` is the product of ``x`` in float64, but for ``bound`` of the sum of the products' magnitudes."""
    w, bias = found.dense, 0.0 if found.bias is None else found.bias.double()
    wanted, most = x.double() @ w.t() + bias, x.double().abs() @ w.t().abs() + abs(bias)
    assert y.shape == wanted.shape
    assert ((y.double() - wanted).abs() <= bound * most + 1e-30).all()


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(0, 70))
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@needs_library
@given(
    st.sampled_from(FORMATS), SHAPES, st.sampled_from([-1, 8, 13, 32, 128]), st.sampled_from([1, 4, -1]),
    st.sampled_from(list(DTYPES)), st.booleans(), st.sampled_from([1, 2]), st.integers(0, 9),
)  # fmt: skip
@settings(deadline=None)
def test_float_products_are_those_of_the_reference(
    format: str,
    shape: tuple[int, int, int],
    group: int,
    rows: int,
    dtype: torch.dtype,
    bias: bool,
    threads: int,
    seed: int,
) -> None:
    n, k, m = shape
    found = case(format, n, k, group, bias=bias, rows=rows, seed=seed)
    tiles = kernels.tile(found.rows)
    assert torch.equal(kernels.untile(tiles, found.rows), found.rows.codes)
    x = torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, ::2]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kernel in HERE:
            if str(dtype).removeprefix("torch.") in kernel.inputs:
                y = Product(kernel, tiles, found.rows, found.bias)(x, dtype)
                assert y.dtype == dtype
                assert_near(y, found, x, DTYPES[dtype])
                assert torch.equal(Product(kernel, tiles, found.rows, found.bias)(x, dtype), y)
    finally:
        torch.set_num_threads(before)


@needs_library
@given(
    st.sampled_from([f for f in FORMATS if "int" in f and "over_float" not in f]), SHAPES,
    st.sampled_from([-1, 8, 13, 32, 128]), st.sampled_from(["int8", "int8/asym"]), st.booleans(), st.integers(0, 9),
)  # fmt: skip
@settings(deadline=None)
def test_integer_products_are_those_of_the_reference(
    format: str, shape: tuple[int, int, int], group: int, input: str, per_token: bool, seed: int
) -> None:
    n, k, m = shape
    found = case(format, n, k, group, seed=seed)
    block = [1, -1] if per_token else [-1, -1]
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) + 0.7
    scales = numerics.choose_scale(x, parse_format(input), block)
    q = numerics.quantize(x, scales, parse_format(input), block)
    tiles = kernels.tile(found.rows)
    sums = kernels.group_sums(found.rows) if scales.zero_point is not None else None
    for kernel in HERE:
        if kernel.product == "int8":
            y = Product(kernel, tiles, found.rows, found.bias, sums)(q, torch.float32, scales.scale, scales.zero_point)
            assert_near(y, found, numerics.dequantize(q, scales, parse_format(input), block), 1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [-1, 13, 32])
def test_torch_expands_what_the_reference_does(format: str, group: int) -> None:
    found = case(format, 21, 75, group, rows=4)
    x = torch.randn(3, 2, 75)
    y = kernels.expanded_linear(x, found.rows, found.bias)
    assert_near(y, found, x, 2e-6)


@pytest.mark.parametrize("columns", [64, 1 << 17])  # of which one step of rows holds all, and 16
def test_torch_expands_some_rows_at_a_time(columns: int) -> None:
    found = case("int4", 37, columns, 64)
    x = torch.randn(2, columns)
    assert_near(kernels.expanded_linear(x, found.rows, found.bias), found, x, 1e-5)


@needs_library
@pytest.mark.parametrize("kernel", [k for k in HERE if k.product == "int8"], ids=lambda k: k.name)
@pytest.mark.parametrize("bits", [4, 7, 8])
def test_the_largest_integers_do_not_saturate(kernel: Kernel, bits: int) -> None:
    format, k = parse_format(f"int{bits}"), 1 << 15
    codes = torch.full((16, k), (1 << (bits - 1)) - 1, dtype=torch.int8)
    codes[1::2] = -(1 << (bits - 1))
    scales = Scales(torch.ones(16, 1))
    rows = kernels.rows_of(packing.pack(codes, bits), scales, format, [1, -1], (16, k), 0)
    q = torch.tensor([127, -128], dtype=torch.int8)[:, None].expand(2, k)
    y = Product(kernel, kernels.tile(rows), rows)(q, torch.float32, torch.ones(2))
    assert torch.equal(y, (q.double() @ codes.double().t()).float())


@needs_library
@pytest.mark.parametrize("kernel", [k for k in HERE if k.product != "int8"], ids=lambda k: k.name)
def test_what_is_not_finite_stays_so(kernel: Kernel) -> None:
    found = case("float8_e4m3fn", 16, 32, -1, bias=False)
    found.codes[3, 5] = 0x7F  # NaN
    dtype = torch.bfloat16 if kernel.product == "bfloat16" else torch.float32
    y = Product(kernel, kernels.tile(found.rows), found.rows)(torch.ones(1, 32, dtype=dtype), dtype)
    assert y.isnan().nonzero().tolist() == [[0, 3]]
    x = torch.ones(2, 32, dtype=dtype)
    x[1, 0] = torch.inf
    y = Product(kernel, kernels.tile(found.rows), found.rows)(x, dtype)
    assert not y[1].isfinite().any()
    assert y[0].isfinite().sum() == 15


@needs_library
@pytest.mark.parametrize(
    "x", [torch.ones(2, 31), torch.ones(()), torch.ones(2, 32, dtype=torch.int8), torch.ones(2, 32, device="meta")],
    ids=["features", "scalar", "codes", "device"],
)  # fmt: skip
def test_refuses_inputs_that_do_not_fit(x: Tensor) -> None:
    found = case("int4", 16, 32, -1)
    kernel = next(k for k in HERE if k.product == "float32")
    with pytest.raises(PassError, match="for a linear of 32 features"):
        Product(kernel, kernels.tile(found.rows), found.rows)(x, torch.float32)


@needs_library
def test_refuses_scales_of_other_rows() -> None:
    found = case("int4", 16, 32, -1)
    kernel = next(k for k in HERE if k.product == "int8")
    product = Product(kernel, kernels.tile(found.rows), found.rows)
    q = torch.ones(3, 32, dtype=torch.int8)
    with pytest.raises(PassError, match="2 scales or zero points for 3 rows"):
        product(q, torch.float32, torch.ones(2))
    with pytest.raises(PassError, match="for a linear of 32 features"):
        product(q.float(), torch.float32, torch.ones(3))
