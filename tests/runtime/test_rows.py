"""The scales and codes of rows are those of the reference ops, bit for bit."""

import pytest
import torch
from torch import Tensor

from graphq.runtime import ops
from graphq.runtime.rows import quantizer

TINY = 2.0**-149


def given(rank: int, dtype: torch.dtype) -> Tensor:
    """Rows of all magnitudes, of zeros, with infinities and NaN."""
    x = torch.randn(16, 37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * 10.0 ** torch.arange(-40, 40, 5)[:, None]
    x[3], x[4] = 0, -0.0
    x[5, 2], x[6, 2], x[7, 2] = torch.inf, -torch.inf, torch.nan
    x[8], x[9] = TINY, 1.0
    return x.to(dtype)[0] if rank == 1 else x.to(dtype).view([1] * (rank - 3) + [4, 4, 37] if rank > 2 else [16, 37])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_token", [True, False])
def test_as_the_reference(dtype: torch.dtype, rank: int, bits: int, per_token: bool) -> None:
    x = given(rank, dtype)
    for finite in (True, False):
        x = x if not finite else x.nan_to_num(0.5, 3.0, -3.0)
        block = [1] * (rank - 1) + [-1] if per_token else [-1] * rank
        made = quantizer(f"int{bits}", block)
        assert made is not None
        scale, codes = made(x)
        expected, _ = ops.choose_scale(x, f"int{bits}", block)
        assert torch.equal(scale, expected) or torch.equal(scale.isnan(), expected.isnan())
        assert (scale.dtype, scale.shape) == (expected.dtype, expected.shape)
        wanted = ops.quantize(x, scale, None, None, f"int{bits}", block)
        assert codes.dtype == wanted.dtype
        assert torch.equal(codes, wanted)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_gives_no_codes(shape: tuple[int, ...]) -> None:
    made = quantizer("int8", [1, -1])
    assert made is not None
    scale, codes = made(torch.empty(shape))
    assert scale.shape == (shape[0], 1)
    assert codes.shape == shape


def test_the_largest_quotients_stay_in_range() -> None:
    """Those of the largest magnitudes of a million rows."""
    x = torch.rand(1 << 20, 1, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0, -1.0]])
    made = quantizer("int8", [1, -1])
    assert made is not None
    _, codes = made(x)
    assert codes.tolist() == [[127, -127]] * (1 << 20)


@pytest.mark.parametrize(
    ("format", "block"),
    [
        ("int8/asym", [1, -1]),
        ("int8/half", [1, -1]),  # whose largest quotient is 127.5
        ("int8/by_sign", [1, -1]),
        ("int16", [1, -1]),
        ("uint8", [1, -1]),
        ("float8_e4m3fn", [1, -1]),
        ("int8", [1, 32]),
        ("int8", [-1, 1]),
        ("int8", [1, 1]),
        ("int8", []),
    ],
)
def test_others_are_left_to_the_ops(format: str, block: list[int]) -> None:
    assert quantizer(format, block) is None
