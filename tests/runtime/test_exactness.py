"""Probes of kernels: exact, saturating, missing, broken."""

import pytest
import torch
from torch import Tensor

from graphq.runtime.exactness import is_exact, largest_codes


def test_the_largest_codes() -> None:
    assert largest_codes(3, 2).tolist() == [[127, 127], [-128, -128], [127, 127]]
    assert largest_codes(2, 1, 1, 1).dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_exact_sums_in_any_dtype(dtype: torch.dtype) -> None:
    q, w = largest_codes(1, 64), largest_codes(16, 64)
    wanted = q.double() @ w.double().t()
    assert is_exact(lambda: wanted.to(dtype), wanted)
    assert not is_exact(lambda: wanted.clamp(max=32767).to(dtype), wanted)
    assert not is_exact(lambda: wanted.to(dtype) + torch.tensor([0] * 15 + [1], dtype=dtype), wanted)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError])
def test_a_kernel_that_is_not_there(error: type[Exception]) -> None:
    def missing() -> Tensor:
        raise error

    assert not is_exact(missing, torch.ones(1).double())


def test_other_errors_are_not_hidden() -> None:
    def broken() -> Tensor:
        raise TypeError("an argument")

    with pytest.raises(TypeError, match="an argument"):
        is_exact(broken, torch.ones(1).double())
