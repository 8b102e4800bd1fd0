"""A linear or a convolution from codes to codes: an integer product with all that the QDQ form computes behind it.

oneDNN's ``qconv_pointwise``, ``qconv2d_pointwise.binary`` and ``qlinear_pointwise``: products of unsigned by signed
bytes, summed in 32 bits; scales, bias, sum, activation and rounding follow in float32, while the sums are at hand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq import numerics
from graphq.errors import PassError
from graphq.runtime import ops
from graphq.runtime.modules import QuantizedModule, tensor_version
from graphq.spec.formats import Int

_onednn: Any = torch.ops.onednn
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
        fits = known and all(isinstance(number, int | float) for number in self.numbers)
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


class _Kind(NamedTuple):
    """What a format's text says of its codes."""

    dtype: torch.dtype
    is_signed: bool
    is_asymmetric: bool


def _kind(text: str) -> _Kind:
    format = numerics.parse_format(text)
    assert isinstance(format, Int), "one of CODES"
    return _Kind(numerics.code_dtype(format), format.signed, not format.symmetric)


_KINDS: Final[Mapping[str, _Kind]] = {text: _kind(text) for text in CODES}


class _Grid(NamedTuple):
    """Codes, or the place for them, with their single scale and zero point."""

    codes: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None


@final
@dataclass(frozen=True)
class _Prepared:
    """What a layer computes from its weight before the first call. ``versions``: of codes and scales."""

    of: tuple[Tensor, Tensor]
    versions: tuple[int | None, int | None]
    packed: Tensor
    scale: Tensor
    zero_points: Tensor

    def is_of(self, codes: Tensor, scale: Tensor) -> bool:
        same = self.of[0] is codes and self.of[1] is scale
        return same and self.versions == (tensor_version(codes), tensor_version(scale))


@final
class FusedLayer(QuantizedModule):
    """A linear or a two-dimensional convolution of codes with static scales, with a bias, a residual sum, an activation
    and the quantization of the result, as far as its ``Fusion`` has them.

    ``weight``: ``int8[N, K]`` or ``int8[N, C / groups, kh, kw]``; ``weight_scale``: ``[N, 1, ...]`` or ``[1, ...]``.
    It gives what the ops of the QDQ form give (``_reference``): the integer sums are exact, and a code of the output
    may be off by one step where the value is within float32's rounding of the middle between two. Where a kernel is
    lacking, and where the call is traced, these ops are what runs.
    """

    def __init__(
        self,
        shape: Sequence[int],
        per_channel: bool,
        input: str,
        output: str | None = None,
        other: str | None = None,
        activation: str = "none",
        numbers: Sequence[float] = (),
        stride: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilation: Sequence[int] = (),
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.graphq_form = Fusion(
            list(shape),
            per_channel,
            input,
            output,
            other,
            activation,
            list(numbers),
            list(stride),
            list(padding),
            list(dilation),
            groups,
        )
        if not self.graphq_form.is_possible:
            raise PassError(f"no layer can be {self.graphq_form}")
        self.register_buffer("weight", torch.empty(*shape, dtype=torch.int8))
        scales = [shape[0] if per_channel else 1, *[1] * (len(shape) - 1)]
        self.register_buffer("weight_scale", torch.empty(scales, dtype=torch.float32))
        self._graphq_prepared: _Prepared | None = None

    def forward(
        self,
        q: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        other: Tensor | None,
        other_scale: Tensor | None,
        other_zero_point: Tensor | None,
        output_scale: Tensor | None,
        output_zero_point: Tensor | None,
    ) -> Tensor:
        """Codes, or float32 where the output has no format. ``q``: codes ``[..., K]`` or ``[B, C, H, W]``; ``bias``:
        ``float32[N]``; ``other``: codes of the output's shape. Raises ``PassError`` for what does not fit.
        """
        x, added = _Grid(q, scale, zero_point), _Grid(other, other_scale, other_zero_point)
        given = _Grid(None, output_scale, output_zero_point)
        is_traced = torch.compiler.is_compiling() or type(q) is not Tensor
        if is_traced:
            return _reference(self, x, bias, added, given)
        _check(self, x, bias, added, given)
        on_cpu = q.device.type == "cpu" and self.weight.device.type == "cpu"
        if not on_cpu or not q.numel() or not has_fused_kernel():
            return _reference(self, x, bias, added, given)
        return _fused(self, x, bias, added, given)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_graphq_prepared": None}  # prepacked tensors cannot be copied


def hold_fused(module: FusedLayer, codes: Tensor, scale: Tensor) -> FusedLayer:
    """``module`` with a weight's codes and scale, as they are. Raises ``PassError`` for other shapes."""
    for name, tensor in (("weight", codes), ("weight_scale", scale)):
        if tensor.shape != getattr(module, name).shape:
            raise PassError(f"{name} of shape {list(tensor.shape)}, not {list(getattr(module, name).shape)}")
        module.register_buffer(name, tensor)
    return module


def _check(module: FusedLayer, x: _Grid, bias: Tensor | None, added: _Grid, given: _Grid) -> None:
    """Raises ``PassError`` for operands that the kernels, which take them for granted, would read beyond."""
    it = cast(Fusion, module.graphq_form)
    assert x.codes is not None, "an argument"
    shape = it.output_shape(x.codes.shape)
    if shape is None:
        raise PassError(f"codes {list(x.codes.shape)} for a weight {it.shape}")
    _check_grid("codes", x, it.input)
    if bias is not None and (bias.dtype != torch.float32 or list(bias.shape) != it.shape[:1]):
        raise PassError(f"a bias {bias.dtype}{list(bias.shape)} for a weight {it.shape}")
    if it.other is not None:
        _check_grid("what is added", added, it.other)
        if added.codes is None or list(added.codes.shape) != shape:
            found = None if added.codes is None else list(added.codes.shape)
            raise PassError(f"what is added: {found}, not {shape}")
    if it.output is not None:
        _check_grid("the output", given, it.output)


def _check_grid(what: str, grid: _Grid, text: str) -> None:
    dtype, _, is_asymmetric = _KINDS[text]
    scale, zero_point = grid.scale, grid.zero_point
    fits = scale is not None and scale.numel() == 1
    if is_asymmetric:
        fits = fits and zero_point is not None and zero_point.numel() == 1 and zero_point.dtype == dtype
    if not fits or (grid.codes is not None and grid.codes.dtype != dtype):
        raise PassError(f"{what}: not {text} with a single scale")


def _reference(module: FusedLayer, x: _Grid, bias: Tensor | None, added: _Grid, given: _Grid) -> Tensor:
    """The ops of the QDQ form."""
    it = cast(Fusion, module.graphq_form)

    def value(grid: _Grid, text: str) -> Tensor:
        assert grid.codes is not None and grid.scale is not None, "checked"  # noqa: PT018
        zero_point = grid.zero_point if _KINDS[text].is_asymmetric else None
        return ops.dequantize(grid.codes, grid.scale, zero_point, None, text, [-1] * grid.codes.dim(), torch.float32)

    block = [1 if it.per_channel else -1, *[-1] * (len(it.shape) - 1)]
    w = ops.dequantize(module.weight, module.weight_scale, None, None, "int8", block, torch.float32)
    if it.is_convolution:
        y = F.conv2d(value(x, it.input), w, bias, it.stride, it.padding, it.dilation, it.groups)
    else:
        y = F.linear(value(x, it.input), w, bias)
    if it.other is not None:
        y = y + value(added, it.other)
    y = ACTIVATIONS[it.activation].function(y, *it.numbers)
    if it.output is None:
        return y
    zero_point = given.zero_point if _KINDS[it.output].is_asymmetric else None
    assert given.scale is not None, "checked"
    return ops.quantize(y, given.scale, zero_point, None, it.output, [-1] * y.dim())


def _raised(grid: _Grid, text: str | None) -> tuple[Tensor | None, float, int]:
    """A grid of unsigned codes: signed ones move up by 128, and the zero point with them."""
    if text is None:
        return None, 1.0, 0
    _, is_signed, is_asymmetric = _KINDS[text]
    assert grid.scale is not None, "checked"
    zero_point = int(cast(Tensor, grid.zero_point)) if is_asymmetric else 0
    codes = grid.codes
    if codes is not None and is_signed:
        codes = (codes ^ -128).view(torch.uint8)
    return codes, float(grid.scale), zero_point + (128 if is_signed else 0)


def _fused(module: FusedLayer, x: _Grid, bias: Tensor | None, added: _Grid, given: _Grid) -> Tensor:
    it = cast(Fusion, module.graphq_form)
    prepared = module._graphq_prepared  # pyright: ignore[reportPrivateUsage]
    if prepared is None or not prepared.is_of(module.weight, module.weight_scale):
        prepared = _prepare(it, module.weight, module.weight_scale)
        module._graphq_prepared = prepared  # pyright: ignore[reportPrivateUsage]
    codes, x_scale, x_zero_point = _raised(x, it.input)
    _, out_scale, out_zero_point = _raised(given, it.output)
    assert codes is not None, "an argument"
    weight = (prepared.packed, prepared.scale, prepared.zero_points)
    wanted = torch.float32 if it.output is None else torch.uint8
    activation = ACTIVATIONS[it.activation]
    bias = None if bias is None else bias.detach().contiguous()
    if it.is_convolution:
        where = (it.stride, it.padding, it.dilation, it.groups)
        codes = codes.contiguous(memory_format=torch.channels_last)
        if it.other is None:
            last = (out_scale, out_zero_point, wanted, activation.attribute, it.numbers, activation.algorithm)
            made = _onednn.qconv_pointwise(codes, x_scale, x_zero_point, *weight, bias, *where, *last)
        else:
            other, other_scale, other_zero_point = _raised(added, it.other)
            assert other is not None, "checked"
            # The sum is written over it. Another may read it.
            other = other.clone(memory_format=torch.channels_last)
            last = (out_scale, out_zero_point, wanted, other_scale, other_zero_point)
            post = ("sum", 1.0, activation.attribute, [], "")
            args = (codes, x_scale, x_zero_point, *weight, other, bias, *where, *last, *post)
            made = _onednn.qconv2d_pointwise.binary(*args)
    else:
        flat = codes.reshape(-1, codes.shape[-1]).contiguous()
        last = (out_scale, out_zero_point, wanted, activation.attribute, it.numbers, activation.algorithm)
        made = _onednn.qlinear_pointwise(flat, x_scale, x_zero_point, *weight, bias, *last)
        made = made.reshape(*codes.shape[:-1], it.shape[0])
    if it.output is not None and _KINDS[it.output].is_signed:
        return cast(Tensor, made ^ 128).view(torch.int8)
    return cast(Tensor, made)


def _prepare(it: Fusion, codes: Tensor, scale: Tensor) -> _Prepared:
    # The kernels take int8 that oneDNN has packed, and end the process for other tensors.
    if codes.dtype != torch.int8 or list(codes.shape) != it.shape or scale.numel() not in (1, it.shape[0]):
        raise PassError(f"a weight {codes.dtype}{list(codes.shape)} with {scale.numel()} scales, not int8{it.shape}")
    each = scale.detach().flatten().expand(it.shape[0]).contiguous()
    zero_points = torch.zeros(it.shape[0], dtype=torch.int32)
    held = codes.detach().contiguous()
    if it.is_convolution:
        packed = _onednn.qconv_prepack(held, each, 1.0, 0, it.stride, it.padding, it.dilation, it.groups, None)
    else:
        packed = _onednn.qlinear_prepack(held, None)
    versions = (tensor_version(codes), tensor_version(scale))
    return _Prepared((codes, scale), versions, cast(Tensor, packed), each, zero_points)


_PROBED: Final[list[bool]] = []


def has_fused_kernel() -> bool:
    """Whether oneDNN sums products of uint8 and int8 exactly here: without VNNI two large ones saturate in 16 bits."""
    if not _PROBED:
        _PROBED.append(True)  # what the probe itself asks
        try:
            _PROBED[0] = all(_is_exact(shape) for shape in ((16, 64, 3, 3), (16, 64)))
        except (RuntimeError, NotImplementedError, AttributeError):
            _PROBED[0] = False
    return _PROBED[0]


def _is_exact(shape: tuple[int, ...]) -> bool:
    codes = torch.full(shape, 127, dtype=torch.int8)
    codes[1::2] = -128
    is_convolution = len(shape) == 4
    pairs = ([1, 1], [1, 1], [1, 1]) if is_convolution else ([], [], [])
    module = FusedLayer(shape, False, "uint8", None, None, "none", (), *pairs)
    hold_fused(module, codes, torch.ones([1] * len(shape)))
    q = torch.full((1, 64, 4, 4) if is_convolution else (2, 64), 255, dtype=torch.uint8)
    grid, nothing = _Grid(q, torch.ones(()), torch.zeros((), dtype=torch.uint8)), _Grid(None, None, None)
    got = _fused(module, grid, None, nothing, nothing)
    expected = F.conv2d(q.double(), codes.double(), padding=1) if is_convolution else q.double() @ codes.double().t()
    return bool((got.double() == expected).all())
