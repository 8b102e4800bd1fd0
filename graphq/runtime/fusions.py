"""What a fused layer is, beside its tensors: the product, and what is computed behind it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq import numerics
from graphq.spec.formats import Int

LARGEST_SUM: Final = 1 << 16  # products of a byte by a byte, whose sum 32 bits hold
_WIDEST: Final = 1 << 16  # window, from which kernels compute memory without care
CODES: Final = ("uint8", "uint8/joint", "int8", "int8/asym", "int8/asym/joint", "int8/half", "int8/by_sign")


@final
@dataclass(frozen=True)
class Activation:
    """A function of each element, and oneDNN's words for it. ``numbers``: how many it takes besides."""

    function: Callable[..., Tensor]
    attribute: str
    algorithm: str = "none"
    numbers: int = 0
    of_convolutions: bool = True


def _itself(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "none": Activation(_itself, "none"),
    "relu": Activation(F.relu, "relu"),
    "clamp": Activation(torch.clamp, "hardtanh", numbers=2),
    "silu": Activation(F.silu, "swish"),
    "hardswish": Activation(F.hardswish, "hardswish"),
    "gelu": Activation(F.gelu, "gelu", of_convolutions=False),
    "gelu_tanh": Activation(_gelu_tanh, "gelu", "tanh", of_convolutions=False),
    "leaky_relu": Activation(F.leaky_relu, "leaky_relu", numbers=1, of_convolutions=False),
    "tanh": Activation(torch.tanh, "tanh", of_convolutions=False),
}


@final
@dataclass(frozen=True)
class Fusion:
    """What a fused layer is, beside its tensors.

    shape: the weight's, of two axes (a linear) or four (a convolution, of these strides, padding, dilation and groups).
    input, other, output: the formats of what it reads, of what it adds (None: nothing) and of what it gives (None:
    float32). activation: one of ``ACTIVATIONS``, with its ``numbers``.
    """

    shape: list[int]
    per_channel: bool
    input: str
    output: str | None = None
    other: str | None = None
    activation: str = "none"
    numbers: Sequence[float] = ()
    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 1
    dtype: ClassVar = torch.float32
    symmetric: ClassVar = True
    transposed: ClassVar = False

    @property
    def is_convolution(self) -> bool:
        return len(self.shape) == 4

    @property
    def is_possible(self) -> bool:
        """Whether a kernel takes it."""
        sizes = [*self.shape, self.groups]
        pairs = (self.stride, self.padding, self.dilation)
        known = self.activation in ACTIVATIONS and len(self.numbers) == ACTIVATIONS[self.activation].numbers
        fits = known and all(type(cast(object, number)) in (int, float) for number in self.numbers)
        fits = fits and self.input in CODES and all(one is None or one in CODES for one in (self.output, self.other))
        if self.is_convolution:
            fits = fits and all(len(pair) == 2 for pair in pairs) and min(*self.stride, *self.dilation) > 0
            fits = fits and min(self.padding) >= 0 and max(map(max, pairs)) <= _WIDEST
            fits = fits and ACTIVATIONS[self.activation].of_convolutions
            fits = fits and (self.other is None or (self.activation in ("none", "relu") and self.output is not None))
        else:
            fits = fits and len(self.shape) == 2 and not any(pairs) and self.groups == 1 and self.other is None
        return fits and min(sizes) > 0 and self.shape[0] % self.groups == 0 and self.fan_in <= LARGEST_SUM

    @property
    def fan_in(self) -> int:
        """How many products are summed."""
        count = 1
        for size in self.shape[1:]:
            count *= size
        return count

    def output_shape(self, shape: Sequence[int]) -> list[int] | None:
        """The shape of the output for an input of this shape; None where there is none."""
        channels = self.shape[1] * self.groups
        if not self.is_convolution:
            return [*shape[:-1], self.shape[0]] if len(shape) > 0 and shape[-1] == channels else None
        if len(shape) != 4 or shape[1] != channels:
            return None
        windows = zip(shape[2:], self.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        made = [(size + 2 * padding - dilation * (k - 1) - 1) // s + 1 for size, k, s, padding, dilation in windows]
        return [shape[0], self.shape[0], *made] if min(made) > 0 else None


class CodeKind(NamedTuple):
    """What a format's text says of its codes."""

    dtype: torch.dtype
    is_signed: bool
    is_asymmetric: bool


def _kind(text: str) -> CodeKind:
    format = numerics.parse_format(text)
    assert isinstance(format, Int), "one of CODES"
    return CodeKind(numerics.code_dtype(format), format.signed, not format.symmetric)


CODE_KINDS: Final[Mapping[str, CodeKind]] = {text: _kind(text) for text in CODES}
