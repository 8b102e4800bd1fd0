"""What each tap of a convolution's kernel reads, summed over the places of its output.

A convolution's output, summed over its places, is its weight's product with these sums, zero padding and all: the sum
over p of sum_ij W[i, j] x[s p + d (i, j)] is sum_ij W[i, j] times the sum over p of x[s p + d (i, j)].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import final

import torch
from torch import Tensor
from torch.nn import functional


@final
@dataclass(frozen=True)
class Window:
    """How a convolution reads its input, along each spatial axis. ``padding``: zeros before and after."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


def window(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]
) -> Window:
    """The window of a convolution with these arguments; one number serves all axes. As torch does, ``same`` padding
    that is odd has the greater part behind.
    """
    rank = len(kernel)
    strides, dilations = (tuple(v) * (rank if len(v) == 1 else 1) for v in (stride, dilation))
    if padding == "same":
        whole = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = tuple((zeros // 2, zeros - zeros // 2) for zeros in whole)
    else:
        given = [0] * rank if isinstance(padding, str) else [*padding] * (rank if len(padding) == 1 else 1)
        pads = tuple((zeros, zeros) for zeros in given)
    return Window(tuple(kernel), strides, pads, dilations)


@final
@dataclass(frozen=True)
class TransposedWindow:
    """How a transposed convolution reads its input, along each spatial axis: tap i takes place j to place s j + d i - p
    of the output, if there is one.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]


def transposed_window(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> TransposedWindow:
    """The window of a transposed convolution with these arguments; one number serves all axes."""
    given = (stride, padding, output_padding, dilation)
    each = (tuple(v) * (len(kernel) if len(v) == 1 else 1) for v in given)
    return TransposedWindow(tuple(kernel), *each)


def tap_sums(x: Tensor, window: Window | TransposedWindow) -> tuple[Tensor, int]:
    """The sums in float64, of shape ``[in, *kernel]``, of ``x[batch, in, *places]`` or ``x[in, *places]``; and of how
    many places of the output, those of the batch together.
    """
    x = x.unsqueeze(0) if x.dim() == len(window.kernel) + 1 else x
    return _sums(x, window) if isinstance(window, Window) else _transposed_sums(x, window)


def _transposed_sums(x: Tensor, it: TransposedWindow) -> tuple[Tensor, int]:
    places = [
        (size - 1) * s - 2 * p + d * (k - 1) + further + 1
        for size, k, s, p, further, d in zip(
            x.shape[2:], it.kernel, it.stride, it.padding, it.output_padding, it.dilation, strict=True
        )
    ]
    totals = torch.empty(x.shape[1], *it.kernel, dtype=torch.float64, device=x.device)
    for tap in product(*map(range, it.kernel)):
        part = x
        for axis, (i, s, p, d, count) in enumerate(
            zip(tap, it.stride, it.padding, it.dilation, places, strict=True), 2
        ):
            first = max(0, -((d * i - p) // s))  # s j + d i - p >= 0
            last = min(x.shape[axis] - 1, (count - 1 + p - d * i) // s)
            part = part.narrow(axis, min(first, x.shape[axis]), max(0, last - first + 1))
        totals[(slice(None), *tap)] = part.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)
    return totals, x.shape[0] * torch.Size(places).numel()


def _sums(x: Tensor, window: Window) -> tuple[Tensor, int]:
    x = functional.pad(x, [zeros for pair in reversed(window.padding) for zeros in pair])
    spans = [d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True)]  # from the first to the last tap
    places = [(size - span - 1) // s + 1 for size, span, s in zip(x.shape[2:], spans, window.stride, strict=True)]
    totals = torch.empty(x.shape[1], *window.kernel, dtype=torch.float64, device=x.device)
    for tap in product(*map(range, window.kernel)):
        part = x
        for axis, (i, d, s, size) in enumerate(zip(tap, window.dilation, window.stride, places, strict=True), 2):
            part = part.narrow(axis, i * d, s * (size - 1) + 1)[(slice(None),) * axis + (slice(None, None, s),)]
        totals[(slice(None), *tap)] = part.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)
    return totals, x.shape[0] * torch.Size(places).numel()
