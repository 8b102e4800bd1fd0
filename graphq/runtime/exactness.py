"""Whether a kernel of torch sums products of int8 codes exactly on this machine: the one place that asks.

Without VNNI oneDNN's sums of two large products saturate in 16 bits, and builds of torch lack some of its kernels.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_MISSING: Final = (
    RuntimeError,
    NotImplementedError,
    AttributeError,
)  # what torch raises where there is none


def largest_codes(*shape: int) -> Tensor:
    """An int8 weight of this shape whose sums are the largest there are: 127, and -128 in every second channel."""
    codes = torch.full(shape, 127, dtype=torch.int8)
    codes[1::2] = -128
    return codes


def is_exact(product: Callable[[], Tensor], wanted: Tensor) -> bool:
    """Whether the kernel is there and gives these float64 sums."""
    try:
        return bool((product().double() == wanted).all())
    except _MISSING:
        return False
