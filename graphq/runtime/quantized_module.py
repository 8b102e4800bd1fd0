"""What modules with weights in codes have in common: their tensors keep their dtypes."""

from abc import ABC
from collections.abc import Callable
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

_BITS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn`` of the tensor's bits: ``.to`` and its like convert floating-point numbers and only move integers."""
    bits = tensor.detach().view(_BITS[tensor.dtype.itemsize])
    moved = fn(bits)
    return tensor.to(moved.device) if moved.dtype != bits.dtype else moved.view(tensor.dtype)


class FixedDtypes(nn.Module, ABC):
    """A module whose own tensors keep their dtypes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for child in self.children() if recurse else ():
            child._apply(fn)
        return super()._apply(lambda tensor: _moved(tensor, fn), recurse=False)


class QuantizedModule(FixedDtypes, ABC):
    """A module that holds a weight in codes, ``weight``, with ``weight_scale``; ``graphq_form``: what it is beside."""

    weight: Tensor
    weight_scale: Tensor
    graphq_form: Any
