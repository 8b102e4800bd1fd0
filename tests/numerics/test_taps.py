"""Sums of what the taps of a convolution read, against torch's own convolutions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphq.numerics.taps import TransposedWindow, Window, tap_sums, transposed_window, window


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_mean_output_is_the_product_with_them(stride: int, padding: int, dilation: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(stride)
    x = torch.randn(3, 4, *(9, 8)[:rank], generator=generator, dtype=torch.float64)
    w = torch.randn(5, 4, *(3, 2)[:rank], generator=generator, dtype=torch.float64)
    conv: Any = F.conv1d if rank == 1 else F.conv2d
    y = conv(x, w, None, stride, padding, dilation)
    sums, count = tap_sums(x, window(w.shape[2:], [stride], [padding] * rank, [dilation] * rank))
    assert sums.shape == w.shape[1:]
    assert count == y.numel() // 5
    assert torch.allclose(y.transpose(0, 1).flatten(1).sum(1), w.flatten(1) @ sums.flatten(), rtol=0, atol=1e-11)
    one, places = tap_sums(x[0], window(w.shape[2:], [stride], [padding], [dilation]))
    assert torch.allclose(one, tap_sums(x[:1], window(w.shape[2:], [stride], [padding], [dilation]))[0], rtol=0, atol=0)
    assert places == count // 3


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 2), (4, 5), (1, 2)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_padding_by_name(padding: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, 15, 16, dtype=torch.float64)
    w = torch.randn(5, 4, *kernel, dtype=torch.float64)
    y = F.conv2d(x, w, None, 1, padding, dilation)
    sums, count = tap_sums(x, window(kernel, [1, 1], padding, dilation))
    assert count == y.numel() // 5
    assert torch.allclose(y.sum((0, 2, 3)), w.flatten(1) @ sums.flatten(), rtol=0, atol=1e-11)


def test_a_window_by_hand() -> None:
    assert window([3, 4], [2], [1], [1, 2]) == Window((3, 4), (2, 2), ((1, 1), (1, 1)), (1, 2))
    assert window([4], [1], "same", [1]).padding == ((1, 2),)
    sums, count = tap_sums(torch.tensor([[[1.0, 2, 3, 4]]]), window([2], [1], [1], [1]))
    assert (sums.tolist(), count) == ([[10, 10]], 5)
    sums, count = tap_sums(torch.tensor([[[1.0, 2, 3, 4]]]), window([2], [2], [0], [1]))
    assert (sums.tolist(), count) == ([[4, 6]], 2)
    assert tap_sums(torch.ones(1, 1, 4, dtype=torch.float16), window([2], [2], [0], [1]))[0].dtype == torch.float64


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_mean_output_of_a_transposed_convolution(stride: int, padding: int, dilation: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(stride)
    x = torch.randn(3, 4, *(5, 4, 3)[:rank], generator=generator, dtype=torch.float64)
    w = torch.randn(4, 5, *(3, 2, 1)[:rank], generator=generator, dtype=torch.float64)
    further = max(stride, dilation) - 1
    conv: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    sizes = [
        (n - 1) * stride - 2 * padding + dilation * (k - 1) + further + 1
        for n, k in zip(x.shape[2:], w.shape[2:], strict=True)
    ]
    if min(sizes) < 1:
        pytest.skip("nothing is left of the output")
    y = conv(x, w, None, stride, padding, further, 1, dilation)
    given = transposed_window(w.shape[2:], [stride], [padding] * rank, [further], [dilation] * rank)
    sums, count = tap_sums(x, given)
    assert count == y.numel() // 5
    wanted = torch.einsum("io...,i...->o", w, sums)
    assert torch.allclose(y.transpose(0, 1).flatten(1).sum(1), wanted, rtol=0, atol=1e-11)
    assert torch.equal(tap_sums(x[0], given)[0], tap_sums(x[:1], given)[0])


def test_a_transposed_window_by_hand() -> None:
    given = transposed_window([2], [2], [1], [1], [1])
    assert given == TransposedWindow((2,), (2,), (1,), (1,), (1,))
    # Tap 0 takes j to place 2 j - 1, which 0 has none of; tap 1 takes it to 2 j. There are 5 places.
    sums, count = tap_sums(torch.tensor([[[1.0, 2, 3]]]), given)
    assert (sums.tolist(), count) == ([[5, 6]], 5)
