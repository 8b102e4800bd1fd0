"""A linear or a convolution from codes to codes: an integer product with all that the QDQ form computes behind it.

oneDNN's ``qconv_pointwise``, ``qconv2d_pointwise.binary`` and ``qlinear_pointwise``: products of unsigned by signed
bytes, summed in 32 bits; scales, bias, sum, activation and rounding follow in float32, while the sums are at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq.errors import PassError
from graphq.runtime import ops
from graphq.runtime.exactness import is_exact, largest_codes
from graphq.runtime.fusions import ACTIVATIONS, CODE_KINDS, Fusion
from graphq.runtime.quantized_module import QuantizedModule
from graphq.runtime.tiled import tensor_version

_onednn: Any = torch.ops.onednn


class _Grid(NamedTuple):
    """Codes, or the place for them, with their single scale and zero point."""

    codes: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None


@final
@dataclass(frozen=True)
class _Packed:
    """What the kernels take of a weight: oneDNN's own layout, a scale for each channel, zero points of 0."""

    codes: Tensor
    scale: Tensor
    zero_points: Tensor


@final
@dataclass(frozen=True)
class _Call:
    """A call as it was checked and prepared. ``of``: weight, scales, zero points and bias, with their ``versions``;
    ``shapes``: of what is convolved or multiplied, and of what is added; ``run``: the kernel, of codes of these shapes.
    """

    of: tuple[Tensor | None, ...]
    versions: tuple[int | None, ...]
    shapes: tuple[torch.Size, torch.Size | None]
    dtypes: tuple[torch.dtype, torch.dtype | None]
    packed: _Packed
    run: Callable[[Tensor, Tensor | None], Tensor]

    def is_of(self, held: tuple[Tensor | None, ...], q: Tensor, other: Tensor | None) -> bool:
        return (
            all(a is b for a, b in zip(self.of, held, strict=True))
            and self.versions == tuple(map(_version, held))
            and self.shapes == (q.shape, None if other is None else other.shape)
            and self.dtypes == (q.dtype, None if other is None else other.dtype)
        )


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor_version(tensor)


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
        self._graphq_prepared: _Call | None = None

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
        if not isinstance(cast(object, q), Tensor) or not isinstance(cast(object, other), Tensor | None):
            raise PassError("codes that are no tensor")
        if torch.compiler.is_compiling() or type(q) is not Tensor:
            x, added = _Grid(q, scale, zero_point), _Grid(other, other_scale, other_zero_point)
            return _reference(self, x, bias, added, _Grid(None, output_scale, output_zero_point))
        grids = (scale, zero_point, bias, other_scale, other_zero_point, output_scale, output_zero_point)
        held, known = (self.weight, self.weight_scale, *grids), self._graphq_prepared
        if known is not None and known.is_of(held, q, other) and has_fused_kernel():
            return known.run(q, other)
        x, added = _Grid(q, scale, zero_point), _Grid(other, other_scale, other_zero_point)
        given = _Grid(None, output_scale, output_zero_point)
        _check(self, x, bias, added, given)
        on_cpu = all(tensor is None or tensor.device.type == "cpu" for tensor in (q, *held))
        if not on_cpu or not q.numel() or not has_fused_kernel():
            return _reference(self, x, bias, added, given)
        self._graphq_prepared = known = _prepared(self, held, x, bias, added, given, known)
        return known.run(q, other)

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
    if not all(isinstance(cast(object, part), Tensor | None) for part in (*x, bias, *added, *given)):
        raise PassError("scales, zero points or a bias that are no tensors")
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
    dtype, _, is_asymmetric = CODE_KINDS[text]
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
        zero_point = grid.zero_point if CODE_KINDS[text].is_asymmetric else None
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
    zero_point = given.zero_point if CODE_KINDS[it.output].is_asymmetric else None
    assert given.scale is not None, "checked"
    return ops.quantize(y, given.scale, zero_point, None, it.output, [-1] * y.dim())


def _unsigned(text: str | None, grid: _Grid) -> tuple[float, int]:
    """Scale and zero point of unsigned codes: signed ones move up by 128, and the zero point with them."""
    if text is None:
        return 1.0, 0
    _, is_signed, is_asymmetric = CODE_KINDS[text]
    zero_point = int(cast(Tensor, grid.zero_point)) if is_asymmetric else 0
    return float(cast(Tensor, grid.scale)), zero_point + (128 if is_signed else 0)


def _raised(codes: Tensor) -> Tensor:
    return codes if codes.dtype == torch.uint8 else (codes ^ -128).view(torch.uint8)


def _prepared(
    module: FusedLayer,
    held: tuple[Tensor | None, ...],
    x: _Grid,
    bias: Tensor | None,
    added: _Grid,
    given: _Grid,
    known: _Call | None,
) -> _Call:
    """The call, ready to run; with the packed weight of the one before, if that is the same."""
    it, q = cast(Fusion, module.graphq_form), cast(Tensor, x.codes)
    versions = tuple(map(_version, held))
    is_same = known is not None and all(a is b for a, b in zip(known.of[:2], held, strict=False))
    if known is None or not is_same or known.versions[:2] != versions[:2]:
        packed = _pack(it, module.weight, module.weight_scale, q.shape)
    else:
        packed = known.packed
    weight = (*_unsigned(it.input, x), packed.codes, packed.scale, packed.zero_points)
    bias = None if bias is None else bias.detach().contiguous()
    output = (*_unsigned(it.output, given), torch.float32 if it.output is None else torch.uint8)
    activation = ACTIVATIONS[it.activation]
    post = (activation.attribute, it.numbers, activation.algorithm)
    window = (bias, it.stride, it.padding, it.dilation, it.groups)
    last, is_signed = torch.channels_last, it.output is not None and CODE_KINDS[it.output].is_signed

    def convolved(q: Tensor, other: Tensor | None) -> Tensor:
        return _onednn.qconv_pointwise(_raised(q).contiguous(memory_format=last), *weight, *window, *output, *post)

    def summed(q: Tensor, other: Tensor | None) -> Tensor:
        # The sum is written over what is added, which another may read.
        total = _raised(cast(Tensor, other)).clone(memory_format=last)
        x = _raised(q).contiguous(memory_format=last)
        return _onednn.qconv2d_pointwise.binary(x, *weight, total, *window, *output, *of_other, *sum_post)

    def multiplied(q: Tensor, other: Tensor | None) -> Tensor:
        flat = _raised(q).reshape(-1, q.shape[-1]).contiguous()
        made = _onednn.qlinear_pointwise(flat, *weight, bias, *output, *post)
        return made.reshape(*q.shape[:-1], it.shape[0])

    of_other, sum_post = _unsigned(it.other, added), ("sum", 1.0, activation.attribute, [], "")
    kernel = multiplied if not it.is_convolution else convolved if it.other is None else summed

    def lowered(q: Tensor, other: Tensor | None) -> Tensor:
        return (kernel(q, other) ^ 128).view(torch.int8)

    other = added.codes
    shapes = (q.shape, None if other is None else other.shape)
    dtypes = (q.dtype, None if other is None else other.dtype)
    return _Call(held, versions, shapes, dtypes, packed, lowered if is_signed else kernel)


def _pack(it: Fusion, codes: Tensor, scale: Tensor, shape: Sequence[int]) -> _Packed:
    """``shape``: of the input: for small pictures oneDNN has another layout, to which it would go in every call."""
    # The kernels take int8 that oneDNN has packed, and end the process for other tensors.
    if codes.dtype != torch.int8 or list(codes.shape) != it.shape or scale.numel() not in (1, it.shape[0]):
        raise PassError(f"a weight {codes.dtype}{list(codes.shape)} with {scale.numel()} scales, not int8{it.shape}")
    each = scale.detach().flatten().expand(it.shape[0]).contiguous()
    held = codes.detach().contiguous()
    if it.is_convolution:
        window = (it.stride, it.padding, it.dilation, it.groups)
        packed = _onednn.qconv_prepack(held, each, 1.0, 0, *window, list(shape))
    else:
        packed = _onednn.qlinear_prepack(held, None)
    return _Packed(cast(Tensor, packed), each, torch.zeros(it.shape[0], dtype=torch.int32))


_PROBED: Final[list[bool]] = []


def has_fused_kernel() -> bool:
    """Whether oneDNN sums products of uint8 and int8 exactly here."""
    if not _PROBED:
        _PROBED.append(True)  # what the probe itself asks
        _PROBED[0] = all(_is_exact(shape) for shape in ((16, 64, 3, 3), (16, 64)))
    return _PROBED[0]


def _is_exact(shape: tuple[int, ...]) -> bool:
    codes, is_convolution = largest_codes(*shape), len(shape) == 4
    pair = [1, 1] if is_convolution else []
    q = torch.full((1, 64, 4, 4) if is_convolution else (2, 64), 255, dtype=torch.uint8)

    def product() -> Tensor:
        module = FusedLayer(shape, False, "uint8", stride=pair, padding=pair, dilation=pair)
        hold_fused(module, codes, torch.ones([1] * len(shape)))
        return module(q, torch.ones(()), torch.zeros((), dtype=torch.uint8), *[None] * 6)

    wanted = F.conv2d(q.double(), codes.double(), padding=1) if is_convolution else q.double() @ codes.double().t()
    return is_exact(product, wanted)
