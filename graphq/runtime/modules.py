"""The modules of a compiled model: weights as packed bytes, scales and zero points as buffers."""

from collections.abc import Sequence
from typing import Any, Final, Self, cast, final

import torch
from torch import Tensor, nn

from graphq import numerics, packing
from graphq.spec import Format

_onednn: Any = torch.ops.onednn


def _keep_dtypes(module: nn.Module, fn: Any) -> None:
    """Scales and codes move between devices with the model, but never change their dtype."""
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(fn(torch.empty(0, dtype=torch.int64, device=buffer.device)).device)


@final
class PackedWeight(nn.Module):
    """A weight in packed codes; calling it gives the dequantized weight.

    ``weight``: ``uint8[rows, bytes]``, one row for each output channel (of each expert), packed as ``graphq.packing`` says.
    ``weight_scale``, ``weight_zero_point`` and ``block`` are those of the QDQ form. ``shape`` and ``out_axis`` are the
    float weight's.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(
        self, format: str, block: Sequence[int], shape: Sequence[int], row_axes: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.format, self.block, self.shape, self.row_axes, self.dtype = format, list(block), list(shape), list(row_axes), dtype
        self.parsed: Format = numerics.parse_format(format)
        self.rows_first = [*row_axes, *(a for a in range(len(shape)) if a not in row_axes)]
        sizes = [shape[a] for a in self.rows_first]
        rows = 1
        for size in sizes[: len(row_axes)]:
            rows *= size
        self.columns = 1
        for size in sizes[len(row_axes) :]:
            self.columns *= size
        self.register_buffer("weight", torch.empty(rows, packing.packed_size(self.columns, self.parsed.bits), dtype=torch.uint8))
        scales = [size if b == 1 else 1 if b < 0 else -(-size // b) for size, b in zip(shape, block, strict=True)]
        self.register_buffer("weight_scale", torch.empty(scales))
        zero_point = None if self.parsed.symmetric else torch.empty(scales, dtype=numerics.code_dtype(self.parsed))
        self.register_buffer("weight_zero_point", zero_point)

    def settings(self) -> dict[str, Any]:
        """The arguments that make an empty module of this kind."""
        return {k: getattr(self, k) for k in ("format", "block", "shape", "row_axes", "dtype")}

    def hold(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Self:
        """Pack these codes; scale and zero point are kept as they are."""
        self.weight = packing.pack(codes.permute(self.rows_first).reshape(-1, self.columns), self.parsed.bits)
        self.weight_scale, self.weight_zero_point = scale, zero_point
        return self

    def codes(self) -> Tensor:
        """The codes in the float weight's shape."""
        flat = packing.unpack(self.weight, self.parsed.bits, self.columns)
        moved = flat.reshape([self.shape[a] for a in self.rows_first])
        return moved.permute([self.rows_first.index(a) for a in range(len(self.shape))])

    def forward(self) -> Tensor:
        return numerics.dequantize(self.codes(), self.weight_scale, self.weight_zero_point, self.block).to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        _keep_dtypes(self, fn)
        return self


@final
class Int8Linear(nn.Module):
    """A linear on int8 codes of the input, with exact integer accumulation where the machine has a kernel for it.

    ``weight``: ``int8[N, K]``; ``weight_scale`` (and ``weight_zero_point``): ``[N, 1]`` or ``[1, 1]``. The product is
    ``scale_x * scale_w * sum_k (q_x - z_x)(q_w - z_w)``, whose zero points are taken out of the integer sum.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, shape: Sequence[int], per_channel: bool, symmetric: bool, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.per_channel, self.symmetric, self.has_bias, self.dtype = list(shape), per_channel, symmetric, bias, dtype
        scales = [shape[0] if per_channel else 1, 1]
        self.register_buffer("weight", torch.empty(*shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(scales))
        self.register_buffer("weight_zero_point", None if symmetric else torch.empty(scales, dtype=torch.int8))
        self.register_buffer("bias", torch.empty(shape[0], dtype=dtype) if bias else None)
        self._prepared: tuple[Tensor, Tensor | None, Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        """The arguments that make an empty module of this kind."""
        return {
            "shape": self.shape,
            "per_channel": self.per_channel,
            "symmetric": self.symmetric,
            "bias": self.has_bias,
            "dtype": self.dtype,
        }

    def hold(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Self:
        """Hold these codes, with scale and zero point as they are."""
        self.weight, self.weight_scale, self.weight_zero_point, self.bias = codes, scale, zero_point, bias
        self._prepared = None
        return self

    def codes(self) -> Tensor:
        """The codes in the float weight's shape."""
        return self.weight

    def forward(self, q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``q``: int8 codes ``[..., K]``; ``scale``, ``zero_point``: one for each token ``[..., 1]`` or a single one."""
        if self._prepared is None or self._prepared[2] is not self.weight:
            packed = _prepack(self.weight)
            self._prepared = (packed, self.weight.sum(1, dtype=torch.int32), self.weight)
        packed, row_sums, _ = self._prepared
        sums = _integer_product(q, self.weight, packed)
        if zero_point is not None:
            sums = sums - zero_point.to(torch.float32) * row_sums
        if self.weight_zero_point is not None:
            w_zero = self.weight_zero_point.flatten().to(torch.float32)
            totals = q.sum(-1, keepdim=True, dtype=torch.int32).to(torch.float32)
            if zero_point is not None:
                totals = totals - zero_point.to(torch.float32) * self.shape[1]
            sums = sums - totals * w_zero
        y = sums * scale * self.weight_scale.flatten()
        if self.bias is not None:
            y = y + self.bias
        return y.to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        _keep_dtypes(self, fn)
        self._prepared = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # opaque prepacked tensors cannot be copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self)(**self.settings())
        for name, buffer in self._buffers.items():
            made._buffers[name] = None if buffer is None else buffer.clone()
        made.train(self.training)
        memo[id(self)] = made
        return made


def _prepack(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu" or not has_integer_kernel():
        return None
    return cast(Tensor, _onednn.qlinear_prepack(weight, None))


def _integer_product(q: Tensor, weight: Tensor, packed: Tensor | None) -> Tensor:
    """``q @ weight.T`` of int8 codes, as float32: exact up to 2^24, correctly rounded above."""
    if packed is None:  # float64 holds these sums exactly
        return (q.double() @ weight.double().t()).float()
    one, none = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0], dtype=torch.int32)
    flat = q.reshape(-1, q.shape[-1]).contiguous()
    if not flat.shape[0]:
        return q.new_zeros(*q.shape[:-1], weight.shape[0], dtype=torch.float32)
    made = _onednn.qlinear_pointwise(flat, 1.0, 0, packed, one, none, None, 1.0, 0, torch.float32, "none", [], "")
    return cast(Tensor, made).reshape(*q.shape[:-1], weight.shape[0])


_PROBED: Final[list[bool]] = []


def has_integer_kernel() -> bool:
    """Whether oneDNN multiplies int8 by int8 exactly here: without VNNI, pairs of large products saturate in 16 bits."""
    if not _PROBED:
        q, w = torch.full((1, 64), 127, dtype=torch.int8), torch.full((16, 64), 127, dtype=torch.int8)
        w[1::2] = -128
        try:
            got = _integer_product(q, w, cast(Tensor, _onednn.qlinear_prepack(w, None)))
            _PROBED.append(bool((got == (q.double() @ w.double().t()).float()).all()))
        except (RuntimeError, NotImplementedError, AttributeError):
            _PROBED.append(False)
    return _PROBED[0]
