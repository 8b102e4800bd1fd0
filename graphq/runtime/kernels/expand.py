"""A product with packed weights in torch alone: some rows at a time become numbers, are multiplied, and are dropped."""

from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq.errors import PassError
from graphq.runtime.kernels.offsets import bounds
from graphq.runtime.kernels.rows import Rows, effective_scale, part_of

_AT_A_TIME: Final = 1 << 18  # elements of a weight: what a core's own cache holds of their float32
_WIDE: Final = {1: torch.float32, 2: torch.float64, 4: torch.complex128}  # so many float32 as one element to look up


@cache
def _table(bits: int, count: int, values: bytes, device: str) -> Tensor:
    """What ``count`` codes beside each other stand for, as one element of ``count`` float32: ``[2^(bits * count)]``."""
    with torch.inference_mode(False):
        pattern = torch.arange(1 << (bits * count))
        parts = [pattern >> (bits * i) & ((1 << bits) - 1) for i in range(count)]
        numbers = torch.frombuffer(bytearray(values), dtype=torch.float32)
        return numbers[torch.stack(parts, 1)].view(_WIDE[count]).flatten().to(device)


def _looked_up(packed: Tensor, rows: Rows) -> Tensor:
    """The numbers of packed codes, several found at a time: ``float32[rows, codes]``, with what fills the last byte."""
    bits, (height, width) = rows.bits, packed.shape
    count = {2: 4, 3: 4, 4: 2}.get(bits, 2)
    table = _table(bits, count, rows.values.cpu().numpy().tobytes(), str(packed.device))
    if bits * count == 8:
        index = packed.view(-1).int()
    elif bits == 8:
        index = F.pad(packed, (0, width % 2)).view(torch.int16).int() & 0xFFFF
    else:  # eight codes lie in ``bits`` bytes
        short = -width % bits
        whole = F.pad(packed, (0, short)).unflatten(1, ((width + short) // bits, bits))
        words = whole[..., 0].long()
        for i in range(1, bits):
            words |= whole[..., i].long() << (8 * i)
        mask = (1 << (bits * count)) - 1
        index = torch.stack([((words >> (bits * count * i)) & mask).int() for i in range(8 // count)], -1)
    found = table.index_select(0, index.view(-1))
    return found.view(torch.float32).view(height, count * (index.numel() // max(height, 1)))


def expanded(rows: Rows, first: int, end: int) -> Tensor:
    """The rows from ``first`` to ``end`` in float32 (float64 where the scales are): ``[end - first, K]``."""
    packed = rows.codes[first:end].contiguous()
    count = packed.shape[0]
    if rows.bits == 8 and rows.is_integer:
        w = packed.view(torch.int8).to(torch.float32) if rows.is_signed else packed.to(torch.float32) - 128.0
    else:
        w = _looked_up(packed, rows)
    scale = effective_scale(rows, first, end)
    w = w[:, : rows.columns].to(scale.dtype)
    zero = None if rows.zero is None else rows.zero[first:end].to(scale.dtype)
    if scale.shape[1] > 1 and rows.columns % rows.group:
        scale = scale.repeat_interleave(rows.group, 1)[:, : rows.columns]
        zero = None if zero is None else zero.repeat_interleave(rows.group, 1)[:, : rows.columns]
    elif scale.shape[1] > 1:
        w, scale = w.unflatten(1, (scale.shape[1], rows.group)), scale.unsqueeze(-1)
        zero = None if zero is None else zero.unsqueeze(-1)
    w = w.mul_(scale) if zero is None else w.sub_(zero).mul_(scale)
    return w.reshape(count, rows.columns)


def expanded_linear(x: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
    """``F.linear`` of ``x[..., K]`` with the weight and ``bias[N]``, in the dtype of ``x``."""
    n = rows.count
    out = x.new_empty(*x.shape[:-1], n)
    step = max(16, _AT_A_TIME // max(rows.columns, 1))
    for first in range(0, n, step):
        end = min(first + step, n)
        w = expanded(rows, first, end).to(x.dtype)
        out[..., first:end] = F.linear(x, w, None if bias is None else bias[first:end].to(x.dtype))
    return out


def expanded_experts(x: Tensor, rows: Rows, experts: int, offsets: Tensor) -> Tensor:
    """``graphq::grouped_linear`` of ``x[T, K]`` with the weights of ``experts``, one behind another in ``rows``."""
    if x.dim() != 2 or x.shape[1] != rows.columns:
        raise PassError(f"rows {list(x.shape)} for experts of {rows.columns} features")
    n = rows.count // experts
    out = x.new_zeros(x.shape[0], n)
    for expert, (first, last) in enumerate(bounds(offsets, experts, x.shape[0])):
        if first < last:
            out[first:last] = expanded_linear(x[first:last], part_of(rows, expert * n, (expert + 1) * n), None)
    return out
