"""Codes and scales of activations by the library are the reference's, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphq import numerics
from graphq.numerics import Scales
from graphq.runtime import kernels, ops
from graphq.runtime.kernels import native
from graphq.spec.formats import parse_format

FORMATS = ["int8", "int8/half", "int8/by_sign", "int8/asym", "int8/asym/joint"]
needs_library = pytest.mark.skipif(native.library() is None, reason=native.NOT_BUILT)


def reference(x: Tensor, format: str, block: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    parsed = parse_format(format)
    scale, zero_point, _ = numerics.choose_scale(x, parsed, block)
    codes = numerics.quantize(x, Scales(scale, zero_point), parsed, block)
    return codes, scale, torch.zeros(scale.shape, dtype=torch.int8) if zero_point is None else zero_point


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)


@needs_library
@pytest.mark.parametrize("limit", ["portable", "avx2"])
@given(
    st.sampled_from(FORMATS), st.integers(0, 5), st.integers(1, 200), st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(), st.sampled_from([0.0, 1e-42, 1e-39, 1e-20, 1.0, 1e38]), st.sampled_from([0.0, -1.0, 1.0, 3.0]),
    st.integers(0, 9),
)  # fmt: skip
@settings(deadline=None)
def test_rows_are_quantized_as_the_reference_does(
    limit: kernels.Limit,
    format: str,
    m: int,
    k: int,
    dtype: torch.dtype,
    whole: bool,
    size: float,
    shift: float,
    seed: int,
) -> None:
    x = torch.randn(2, m, 2 * k, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)
    x = ((x / 8 + shift / 8) * size * 2).to(dtype)[..., ::2]
    block = [-1, -1, -1] if whole else [1, 1, -1]
    with kernels.using(limit):
        found = kernels.quantized_rows(x, format, block)
    assert found is not None
    assert_same(found, reference(x, format, block))


@needs_library
@pytest.mark.parametrize("format", FORMATS)
def test_halves_go_to_even_and_extremes_to_the_last_codes(format: str) -> None:
    steps = torch.arange(-255.0, 256.0) / 2
    x = torch.stack([steps, -steps, steps + 0.5, steps.clamp(min=0), steps.clamp(max=0)])
    found = kernels.quantized_rows(x, format, [1, -1])
    assert found is not None
    assert_same(found, reference(x, format, [1, -1]))


@needs_library
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 20, 36])  # in a whole vector, and behind the last
def test_what_is_not_finite_is_left_to_the_reference(value: float, place: int) -> None:
    x = torch.ones(3, 37)
    x[1, place] = value
    assert kernels.quantized_rows(x, "int8", [1, -1]) is None
    codes, scale, _ = ops.quantize_dynamic(x, "int8", [1, -1])
    assert_same((codes[::2], scale[::2]), reference(x[::2], "int8", [1, -1])[:2])
    assert not scale[1].isfinite()


@pytest.mark.parametrize(
    ("x", "format", "block"),
    [
        (torch.ones(2, 4), "int4", [1, -1]),
        (torch.ones(2, 4), "int8", [1, 2]),
        (torch.ones(2, 4, 4), "int8", [1, -1, -1]),
        (torch.ones(2, 4, dtype=torch.float64), "int8", [1, -1]),
        (torch.ones(2, 4, dtype=torch.float16), "int8", [1, -1]),
        (torch.ones(()), "int8", []),
    ],
    ids=["format", "groups", "rows of several", "float64", "float16", "no axis"],
)
def test_what_the_library_has_no_rows_for(x: Tensor, format: str, block: list[int]) -> None:
    assert kernels.quantized_rows(x, format, block) is None
    assert_same(ops.quantize_dynamic(x, format, block), reference(x, format, block))


def test_the_op_is_exported_with_its_shapes() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return ops.quantize_dynamic(x, "int8/asym", [1, -1])

    x = torch.randn(3, 5)
    exported = torch.export.export(Module(), (x,), strict=False).module()
    assert_same(exported(x), reference(x, "int8/asym", [1, -1]))
