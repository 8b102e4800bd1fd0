"""When the memory of tensors is not all there is of them: what ops are traced, transformed or differentiated by."""

from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C: Final[Any] = cast(Any, torch)._C
_FORWARD: Final[Any] = forward_ad


def is_traced(x: Tensor) -> bool:
    """Whether ops on ``x`` are collected in a graph."""
    return type(x) is not Tensor or torch.compiler.is_dynamo_compiling() or _C._is_tracing()


def is_transformed() -> bool:
    """Whether ops are traced, are those of a transform of ``torch.func``, or carry forward derivatives."""
    return _C._is_tracing() or _C._functorch.peek_interpreter_stack() is not None or _FORWARD._current_level >= 0


def is_watched() -> bool:
    """Whether something is to see each op of torch, to change it, or to differentiate it forward."""
    return bool(_C._len_torch_dispatch_stack()) or torch.is_autocast_enabled("cpu") or is_transformed()
