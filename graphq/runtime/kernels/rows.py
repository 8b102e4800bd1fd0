"""A packed weight as every kernel reads it: rows of codes, a table of what they stand for, scales beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from graphq.numerics import Scales
from graphq.numerics.codes import code_values
from graphq.numerics.scales import effective_scale as scale_of
from graphq.spec.formats import Format, Int, Mx, Nvfp4, TwoLevel, code_bits

_KINDS: Final = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3", torch.float64: "float64"}


@final
@dataclass(frozen=True)
class Rows:
    """A weight ``[count, columns]``: a value is ``(values[code] - zero) * scale * row_scale``; called N and K below.

    ``codes``: ``uint8[N, bytes]``, code ``i`` of a row from bit ``i * bits`` on. ``scale``: ``[N, groups]``, float32 or
    float64, or the bytes of E8M0 or E4M3 numbers, ``kind`` of them. ``zero``: ``int8[N, groups]``, of integers as
    ``values`` has them. ``row_scale``: ``[N]``. ``values``: what the bit patterns stand for, ``float32[256]``; integers
    are all from ``-2^(bits-1)`` on, unsigned codes and their zero points less ``2^(bits-1)``.
    """

    codes: Tensor
    count: int
    scale: Tensor
    kind: str
    zero: Tensor | None
    row_scale: Tensor | None
    values: Tensor
    bits: int
    columns: int
    group: int
    is_integer: bool
    is_signed: bool


def rows_of(
    codes: Tensor, scales: Scales, format: Format, block: Sequence[int], shape: Sequence[int], row_axis: int
) -> Rows:
    """The rows of a linear's weight of this ``shape`` (two axes), packed along ``row_axis``, that has these scales."""
    columns, group = shape[1 - row_axis], block[1 - row_axis]
    group = columns if group < 0 or group > columns else group
    rows = shape[row_axis]
    bits = code_bits(format)

    def beside(part: Tensor | None) -> Tensor | None:
        """``[N, groups]``: one for each row."""
        if part is None:
            return None
        part = part.t() if row_axis else part
        if part.shape[0] != rows:
            part = part.repeat_interleave(rows if part.shape[0] == 1 else block[row_axis], 0)[:rows]
        return part.expand(rows, -(-columns // group) if group else part.shape[1])

    scale, zero, upper = (beside(part) for part in scales)
    assert scale is not None
    row_scale: Tensor | None = None
    if upper is not None:
        row_scale = upper[:, 0] if upper.dtype == torch.float64 else upper[:, 0].to(torch.float32)
        row_scale = row_scale.reciprocal() if isinstance(format, Nvfp4) else row_scale
    if isinstance(format, Mx) and format.element == "int8":
        row_scale = torch.full((rows,), 2.0**-6, device=codes.device)
    integer = is_integer(format)
    is_signed = not isinstance(format, Int) or format.signed
    kind = _KINDS.get(scale.dtype, "float32")
    scale = scale.contiguous()
    if zero is not None:
        zero = (zero if is_signed else zero ^ 128).contiguous().view(torch.int8)
    return Rows(
        codes=codes,
        count=rows,
        scale=scale.view(torch.uint8) if kind in ("e8m0", "e4m3") else scale.to(getattr(torch, kind)),
        kind=kind,
        zero=zero,
        row_scale=row_scale,
        values=_values(format, bits, integer, is_signed).to(codes.device),
        bits=bits,
        columns=columns,
        group=group,
        is_integer=integer,
        is_signed=is_signed,
    )


def stacked_rows(codes: Tensor, scales: Scales, format: Format, block: Sequence[int], shape: Sequence[int]) -> Rows:
    """The rows of experts' weights ``[E, N, K]``, those of one expert behind those of another: ``[E * N, K]``."""

    def each(part: Tensor | None) -> Tensor | None:
        for axis in (0, 1):
            if part is not None and part.shape[axis] != shape[axis]:
                size = shape[axis] if part.shape[axis] == 1 else block[axis]
                part = part.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
        return None if part is None else part.reshape(shape[0] * shape[1], part.shape[2])

    scale, zero_point, upper = map(each, scales)
    assert scale is not None
    return rows_of(codes, Scales(scale, zero_point, upper), format, [1, block[2]], [shape[0] * shape[1], shape[2]], 0)


def is_integer(format: Format) -> bool:
    """Whether codes are integers, which can be multiplied with integers."""
    return isinstance(format, Int) or (isinstance(format, Mx | TwoLevel) and format.element in ("int8", "int4"))


def _values(format: Format, bits: int, integer: bool, is_signed: bool) -> Tensor:
    pattern = torch.arange(256) & ((1 << bits) - 1)
    if integer:
        half = 1 << (bits - 1)
        return ((pattern ^ half if is_signed else pattern) - half).to(torch.float32)
    return code_values(pattern.to(torch.uint8), format)


def part_of(rows: Rows, first: int, end: int) -> Rows:
    """Some of the rows."""
    return replace(
        rows,
        codes=rows.codes[first:end],
        count=end - first,
        scale=rows.scale[first:end],
        zero=None if rows.zero is None else rows.zero[first:end],
        row_scale=None if rows.row_scale is None else rows.row_scale[first:end],
    )


def effective_scale(rows: Rows, first: int, end: int) -> Tensor:
    """``[rows, groups]``, in float32 or float64: what codes of some rows are multiplied by."""
    scale = rows.scale[first:end]
    if rows.kind in ("e8m0", "e4m3"):
        dtype = torch.float8_e8m0fnu if rows.kind == "e8m0" else torch.float8_e4m3fn
        scale = scale.view(dtype).to(torch.float32)
    return scale if rows.row_scale is None else scale * rows.row_scale[first:end, None]


def is_supported(scales: Scales, format: Format) -> bool:
    """Whether float32 holds what ``Rows`` makes of scales: those of float64 weights, and extreme ones, it does not."""
    if scales.scale.dtype == torch.float64 or (isinstance(format, Int) and format.bits > 8):
        return False
    upper = scales.global_scale
    if upper is None or upper.device.type == "meta":
        return True
    upper = scale_of(Scales(torch.ones_like(upper), None, upper), format)
    return bool((upper.abs() >= torch.finfo(torch.float32).tiny).all()) and bool(upper.isfinite().all())
