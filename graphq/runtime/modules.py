"""The modules of a compiled model: weights as packed bytes, scales and zero points as buffers.

Their dtypes are part of the compiled model: ``.to(dtype)`` moves these modules' tensors, scales and biases included,
between devices and leaves their dtypes, and that of the result, alone.
"""

import math
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, cast, final

import torch
from torch import Tensor, nn

from graphq import numerics, packing
from graphq.errors import PassError
from graphq.formats import Format, code_bits
from graphq.numerics import Scales

_onednn: Any = torch.ops.onednn
_BITS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn`` of the tensor's bits: ``.to`` and its like convert floating-point numbers and only move integers."""
    bits = tensor.detach().view(_BITS[tensor.dtype.itemsize])
    moved = fn(bits)
    return tensor.to(moved.device) if moved.dtype != bits.dtype else moved.view(tensor.dtype)


def _expect(what: str, tensor: Tensor | None, wanted: Tensor | None) -> None:
    given, want = (None if t is None else tuple(t.shape) for t in (tensor, wanted))
    if given != want:
        raise PassError(f"{what} of shape {given}, not {want}")


class _FixedDtypes(nn.Module, ABC):
    """A module whose own tensors keep their dtypes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for child in self.children() if recurse else ():
            child._apply(fn)
        return super()._apply(lambda tensor: _moved(tensor, fn), recurse=False)


@final
class PackedWeight(_FixedDtypes):
    """A weight in packed codes; calling it gives the dequantized weight.

    ``weight``: ``uint8[rows, bytes]``, packed as ``graphq.packing`` says, one row for each index of ``row_axes``
    (output channels, of each expert). ``weight_scale``, ``weight_zero_point``, ``weight_global_scale`` and ``block``
    are those of the QDQ form, ``shape`` and ``row_axes`` those of the float weight; ``dtype`` is what it is dequantized
    to.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_global_scale: Tensor | None

    def __init__(
        self, format: str, block: Sequence[int], shape: Sequence[int], row_axes: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.format, self.block, self.dtype = format, list(block), dtype
        self.shape, self.row_axes = list(shape), list(row_axes)
        self.parsed: Format = numerics.parse_format(format)
        self.rows_first = [*row_axes, *(a for a in range(len(shape)) if a not in row_axes)]
        sizes = [shape[a] for a in self.rows_first]
        rows, self.columns = math.prod(sizes[: len(row_axes)]), math.prod(sizes[len(row_axes) :])
        self.bits = code_bits(self.parsed)
        row_bytes = packing.packed_size(self.columns, self.bits)
        self.register_buffer("weight", torch.empty(rows, row_bytes, dtype=torch.uint8))
        scales = numerics.empty_scales(shape, block, self.parsed)
        self.register_buffer("weight_scale", scales.scale)
        self.register_buffer("weight_zero_point", scales.zero_point)
        self.register_buffer("weight_global_scale", scales.global_scale)

    def settings(self) -> dict[str, Any]:
        """The arguments that make an empty module of this kind."""
        return {k: getattr(self, k) for k in ("format", "block", "shape", "row_axes", "dtype")}

    def hold(self, codes: Tensor, scales: Scales) -> Self:
        """Pack these codes; the scales are kept as they are. Raises ``PassError`` for other shapes."""
        if list(codes.shape) != self.shape:
            raise PassError(f"codes of shape {tuple(codes.shape)}, not {tuple(self.shape)}")
        _expect("a scale", scales.scale, self.weight_scale)
        _expect("a zero point", scales.zero_point, self.weight_zero_point)
        _expect("a global scale", scales.global_scale, self.weight_global_scale)
        self.weight = packing.pack(codes.permute(self.rows_first).reshape(-1, self.columns), self.bits)
        self.weight_scale, self.weight_zero_point, self.weight_global_scale = scales
        return self

    def codes(self) -> Tensor:
        """The codes in the float weight's shape."""
        flat = packing.unpack(self.weight, self.bits, self.columns, numerics.code_dtype(self.parsed))
        moved = flat.reshape([self.shape[a] for a in self.rows_first])
        return moved.permute([self.rows_first.index(a) for a in range(len(self.shape))])

    def forward(self) -> Tensor:
        scales = Scales(self.weight_scale, self.weight_zero_point, self.weight_global_scale)
        return numerics.dequantize(self.codes(), scales, self.parsed, self.block).to(self.dtype)


@final
@dataclass(frozen=True)
class _Prepared:
    """What an integer linear computes from its codes before the first product. ``row_sums``: exact up to K = 2^17."""

    codes: Tensor
    version: int | None
    packed: Tensor | None
    row_sums: Tensor

    def is_of(self, codes: Tensor) -> bool:
        return self.codes is codes and self.version == _version(codes)


def _version(tensor: Tensor) -> int | None:
    """Counts the changes of a tensor in place, such as by ``load_state_dict``; inference tensors are not counted."""
    return None if tensor.is_inference() else cast(Any, tensor)._version


@final
class Int8Linear(_FixedDtypes):
    """A linear on int8 codes of the input, with integer accumulation where the machine has a kernel for it.

    ``weight``: ``int8[N, K]``; ``weight_scale`` (and ``weight_zero_point``): ``[N, 1]`` or ``[1, 1]``; ``transposed``:
    the float weight is ``[K, N]`` (GPT-2's Conv1D), its scales ``[1, N]``. The product is
    ``scale_x * scale_w * sum_k (q_x - z_x)(q_w - z_w)``, whose zero points are taken out of the integer sum. It is
    computed in float32, which holds sums up to 2^24 exactly, and given in ``dtype``. The kernel's own integer sums, of
    ``(q_x + 128) q_w``, are rounded to float32 too: by 2^-24 of themselves where they are above 2^24.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        per_channel: bool,
        symmetric: bool,
        bias: bool,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.per_channel, self.symmetric = list(shape), per_channel, symmetric
        self.has_bias, self.dtype, self.transposed = bias, dtype, transposed
        scales = [shape[0] if per_channel else 1, 1][:: -1 if transposed else 1]
        self.register_buffer("weight", torch.empty(*shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(scales, dtype=torch.float32))
        self.register_buffer("weight_zero_point", None if symmetric else torch.empty(scales, dtype=torch.int8))
        self.register_buffer("bias", torch.empty(shape[0], dtype=dtype) if bias else None)
        self._prepared: _Prepared | None = None

    def settings(self) -> dict[str, Any]:
        """The arguments that make an empty module of this kind."""
        return {
            "shape": self.shape,
            "per_channel": self.per_channel,
            "symmetric": self.symmetric,
            "bias": self.has_bias,
            "dtype": self.dtype,
            "transposed": self.transposed,
        }

    def hold(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Self:
        """Hold a float weight's codes; scale and zero point stay as they are. Raises ``PassError`` for other shapes."""
        codes = codes.t().contiguous() if self.transposed else codes
        _expect("codes", codes, self.weight)
        _expect("a scale", scale, self.weight_scale)
        _expect("a zero point", zero_point, self.weight_zero_point)
        _expect("a bias", bias, self.bias)
        self.weight, self.weight_scale, self.weight_zero_point, self.bias = codes, scale, zero_point, bias
        return self

    def codes(self) -> Tensor:
        """The codes in the float weight's shape."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``q``: int8 codes ``[..., K]``; ``scale``, ``zero_point``: ``[..., 1]``, for each token, or single ones."""
        if self._prepared is None or not self._prepared.is_of(self.weight):
            row_sums = self.weight.sum(1, dtype=torch.int32).to(torch.float32)
            self._prepared = _Prepared(self.weight, _version(self.weight), _prepack(self.weight), row_sums)
        sums = _integer_product(q, self.weight, self._prepared.packed)
        if zero_point is not None:
            sums = sums - zero_point.to(torch.float32) * self._prepared.row_sums
        if self.weight_zero_point is not None:
            totals = q.sum(-1, keepdim=True, dtype=torch.int32).to(torch.float32)
            if zero_point is not None:
                totals = totals - zero_point.to(torch.float32) * self.shape[1]
            sums = sums - totals * self.weight_zero_point.flatten().to(torch.float32)
        y = sums * scale * self.weight_scale.flatten()
        if self.bias is not None:
            y = y + self.bias
        return y.to(self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prepared": None}  # prepacked tensors cannot be copied


def _prepack(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu" or not has_integer_kernel():
        return None
    return cast(Tensor, _onednn.qlinear_prepack(weight.contiguous(), None))  # torch 2.13 ignores strides here


def _integer_product(q: Tensor, weight: Tensor, packed: Tensor | None) -> Tensor:
    """``q @ weight.T`` of int8 codes, as float32: exact up to 2^24, correctly rounded above. The kernel's are exact
    where ``(q + 128) @ weight.T`` is no larger than that.
    """
    if packed is None:  # float64 holds these sums exactly
        return (q.double() @ weight.double().t()).float()
    one, none = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0], dtype=torch.int32)
    # oneDNN 3.12 has fast kernels for unsigned inputs alone: codes move up by 128, and the zero point with them.
    raised = (q.reshape(-1, q.shape[-1]).contiguous() ^ -128).view(torch.uint8)
    made = _onednn.qlinear_pointwise(raised, 1.0, 128, packed, one, none, None, 1.0, 0, torch.float32, "none", [], "")
    return cast(Tensor, made).reshape(*q.shape[:-1], weight.shape[0])


_PROBED: Final[list[bool]] = []


def has_integer_kernel() -> bool:
    """Whether oneDNN multiplies int8 exactly here: without VNNI, sums of two large products saturate in 16 bits."""
    if not _PROBED:
        q, w = torch.full((1, 64), 127, dtype=torch.int8), torch.full((16, 64), 127, dtype=torch.int8)
        w[1::2] = -128
        try:
            got = _integer_product(q, w, cast(Tensor, _onednn.qlinear_prepack(w, None)))
            _PROBED.append(bool((got == (q.double() @ w.double().t()).float()).all()))
        except (RuntimeError, NotImplementedError, AttributeError):
            _PROBED.append(False)
    return _PROBED[0]
