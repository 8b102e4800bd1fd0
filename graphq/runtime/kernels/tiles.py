"""Weights in tiles (native/weight.h says how they lie), and products with them by the library of kernels."""

from ctypes import byref, pointer
from dataclasses import replace
from typing import Final, final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq.errors import PassError
from graphq.packing import packed_size
from graphq.runtime.kernels import native
from graphq.runtime.kernels.choice import Kernel
from graphq.runtime.kernels.expand import expanded
from graphq.runtime.kernels.rows import Rows, part_of

_KINDS: Final = {"float32": 0, "e8m0": 1, "e4m3": 2}
_PRODUCTS: Final = {"float32": 0, "bfloat16": 1, "int8": 2}
_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_OFFSETS: Final = {torch.int32: 3, torch.int64: 4}
_NOT_CUT: Final = 4  # what the library says of such offsets


def _described(rows: Rows) -> native.Weight:
    return native.Weight(
        n=rows.count,
        k=rows.columns,
        group=rows.group,
        bits=rows.bits,
        scale=_KINDS[rows.kind],
        has_zero=rows.zero is not None,
        is_integer=rows.is_integer,
    )


def tile(rows: Rows, experts: int = 1) -> Tensor:
    """The weight in tiles, ``uint8[bytes]``. ``rows``: on the CPU, of at least one code.

    ``experts``: so many weights with as many rows each, whose tiles follow those of the one before.
    """
    each = _of_each(rows, experts)
    size = native.library().graphq_tiles_size(byref(_described(each[0])))
    tiles = torch.empty(size * experts, dtype=torch.uint8)
    for part, own in zip(each, tiles.split(size), strict=True):
        _tile(part, own)
    return tiles


def _of_each(rows: Rows, experts: int) -> list[Rows]:
    count = rows.count // experts
    return [rows] if experts == 1 else [part_of(rows, e * count, (e + 1) * count) for e in range(experts)]


def _tile(rows: Rows, tiles: Tensor) -> None:
    weight = _described(rows)
    codes = rows.codes.contiguous()
    codes = codes if rows.is_signed else codes ^ 128  # as signed ones are: of 8 bits, as unsigned ones have
    packing = native.Packing(
        weight=pointer(weight),
        tiles=tiles.data_ptr(),
        rows=codes.data_ptr(),
        row_bytes=codes.shape[1],
        scale=rows.scale.data_ptr(),
        zero=None if rows.zero is None else rows.zero.data_ptr(),
    )
    native.library().graphq_pack(byref(packing), torch.get_num_threads())


def untile(tiles: Tensor, rows: Rows, experts: int = 1) -> Tensor:
    """The codes of ``rows``, whose own are not read, from their tiles: ``uint8[N, bytes]``."""
    each = [replace(rows, count=rows.count // experts)] * experts
    parts = zip(tiles.split(tiles.numel() // experts), each, strict=True)
    found = [_untiled(own, part) for own, part in parts]
    return found[0] if experts == 1 else torch.cat(found)


def _untiled(tiles: Tensor, rows: Rows) -> Tensor:
    weight = _described(rows)
    codes = torch.empty(rows.count, packed_size(rows.columns, rows.bits), dtype=torch.uint8)
    packing = native.Packing(
        weight=pointer(weight), tiles=tiles.data_ptr(), rows=codes.data_ptr(), row_bytes=codes.shape[1]
    )
    native.library().graphq_unpack(byref(packing), torch.get_num_threads())
    return codes if rows.is_signed else codes ^ 128


def group_sums(rows: Rows, experts: int = 1) -> Tensor:
    """``int32[tiles, groups, 16]``: the sums of each group's codes less its zero point, as asymmetric inputs need."""
    if experts > 1:
        return torch.cat([group_sums(part) for part in _of_each(rows, experts)])
    n, groups = rows.count, rows.scale.shape[1]
    ones = torch.ones(rows.scale.shape)
    plain = replace(rows, scale=ones, kind="float32", row_scale=None)
    sums = torch.zeros(-(-n // 16) * 16, groups, dtype=torch.int32)
    step = max(16, (1 << 21) // max(rows.columns, 1))
    for first in range(0, n, step):
        end = min(first + step, n)
        values = F.pad(expanded(plain, first, end), (0, groups * rows.group - rows.columns))
        sums[first:end] = values.view(-1, groups, rows.group).sum(-1, dtype=torch.float64).int()
    return sums.view(-1, 16, groups).transpose(1, 2).contiguous()


@final
class Product:
    """A linear with a weight in tiles.

    ``tiles``: as ``tile`` made them of ``rows``, whose codes are not read. ``sums``: of ``group_sums``, for int8 inputs
    with zero points. ``weight``, ``codes``: what the library takes: the weight, the product and the instruction set.
    ``takes_codes``: its inputs are int8 codes. ``experts``: ``rows`` are those of so many weights, one behind another,
    and each is multiplied with rows of its own.
    """

    def __init__(
        self,
        kernel: Kernel,
        tiles: Tensor,
        rows: Rows,
        bias: Tensor | None = None,
        sums: Tensor | None = None,
        experts: int | None = None,
    ) -> None:
        assert kernel.level is not None, "a kernel of the library"
        values = rows.values
        if rows.is_integer:  # tiles hold them from 0 on
            values = torch.arange(256, dtype=torch.float32) - (1 << (rows.bits - 1))
        self.kernel = kernel
        self.tiles = tiles
        scale = None if rows.row_scale is None else rows.row_scale.contiguous()
        self._held = (values.contiguous(), scale, None if bias is None else bias.float().contiguous(), sums)
        self.experts = experts
        self.n, self.k = rows.count // (experts or 1), rows.columns
        self.weight = _described(replace(rows, count=self.n))
        self.weight.tiles = tiles.data_ptr()
        for name, part in zip(("table", "row_scale", "bias", "sums"), self._held, strict=True):
            setattr(self.weight, name, None if part is None else part.data_ptr())
        self._function = native.library().graphq_linear if experts is None else native.library().graphq_grouped
        self._reference = byref(self.weight)
        self.takes_codes = kernel.product == "int8"
        self.codes = (_PRODUCTS[kernel.product], native.LEVELS.index(kernel.level))

    def __call__(
        self,
        x: Tensor,
        dtype: torch.dtype,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """``x[..., K]`` times the weight, and the bias, in ``dtype``: ``[..., N]``.

        x: float, or int8 codes with the ``scale`` of each row or of all, and their ``zero_point`` (where the product
        was made for one). ``offsets``: of experts, whose rows are ``x[T, K]`` up to the first for the first, up to the
        second for the second and so on; rows behind the last one give 0.
        """
        shape, is_integer = x.shape, scale is not None
        fits = shape[-1:] == (self.k,) and x.is_cpu and is_integer == (x.dtype == torch.int8)
        if not fits or is_integer != self.takes_codes:
            raise PassError(f"{x.dtype}{list(shape)} on {x.device.type} for a linear of {self.k} features")
        m = x.numel() // self.k
        groups: tuple[int, ...] = ()
        if self.experts is not None:
            assert offsets is not None, "experts have them"
            offsets = (offsets if offsets.dtype in _OFFSETS else offsets.to(torch.int64)).cpu().contiguous()
            if offsets.shape != (self.experts,) or len(shape) != 2:
                raise PassError(f"{list(offsets.shape)} offsets and rows {list(shape)} for {self.experts} experts")
            groups = (offsets.data_ptr(), self.experts, _OFFSETS[offsets.dtype])
        x_type = _TYPES.get(x.dtype)
        if x_type is None:
            x, x_type = x.float(), 0
        x = x.contiguous().resolve_neg()
        x_scale = None if scale is None else _of_rows(scale, torch.float32, m)
        x_zero = None if zero_point is None else _of_rows(zero_point, torch.int8, m)
        is_half = dtype == torch.bfloat16
        y = torch.empty((*shape[:-1], self.n), dtype=torch.bfloat16 if is_half else torch.float32)
        failed = self._function(
            self._reference,
            *groups,
            x.data_ptr(),
            None if x_scale is None else x_scale.data_ptr(),
            None if x_zero is None else x_zero.data_ptr(),
            y.data_ptr(),
            m,
            x_type,
            int(is_half),
            *self.codes,
            torch.get_num_threads(),
        )
        if failed == _NOT_CUT and offsets is not None:
            raise PassError(f"offsets {offsets.tolist()} do not divide {m} rows")
        if failed:
            raise MemoryError(f"a linear of {m} rows: {native.OUT_OF_MEMORY}")
        return y if y.dtype == dtype else y.to(dtype)


def _of_rows(part: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """One for each row."""
    flat = part.to(device="cpu", dtype=dtype).reshape(-1)
    if flat.shape[0] not in (1, rows):
        raise PassError(f"{flat.shape[0]} scales or zero points for {rows} rows")
    return flat.contiguous() if flat.shape[0] == rows else flat.expand(rows).contiguous()
