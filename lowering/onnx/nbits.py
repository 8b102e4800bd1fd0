"""Weights as ONNX Runtime's MatMulNBits takes them.

Codes are raised by half the range and packed, the first in the lowest bits: ``[N, ceil(K / block), block * bits / 8]``,
with zeros behind a short last block. Scales are ``[N, ceil(K / block)]``, zero points are raised and packed along their
rows. Source: ONNX Runtime's contributed operators, com.microsoft.MatMulNBits; block sizes: its kernel
contrib_ops/cpu/quantization/matmul_nbits.cc, version 1.31.
"""

from typing import Final

import torch
from torch import Tensor

BLOCKS: Final = (16, 32, 64, 128, 256)


def packed_codes(codes: Tensor, bits: int, block_size: int) -> Tensor:
    """int8 codes ``[N, K]`` of at most ``bits`` bits, which is 4 or 8, packed."""
    n, k = codes.shape
    raised = (codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    return _pack(torch.nn.functional.pad(raised, (0, -k % block_size)).view(n, -1, block_size), bits)


def packed_zero_points(zero_point: Tensor, bits: int) -> Tensor:
    """int8 zero points ``[N, blocks]`` packed."""
    raised = (zero_point.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    return _pack(torch.nn.functional.pad(raised, (0, -raised.shape[1] % (8 // bits))), bits)


def unpacked_codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """The int8 codes ``[N, K]`` that ``packed_codes`` was given."""
    return _unpack(packed, bits).flatten(1)[:, :k].contiguous()


def unpacked_zero_points(packed: Tensor, bits: int, blocks: int) -> Tensor:
    """The int8 zero points ``[N, blocks]`` that ``packed_zero_points`` was given."""
    return _unpack(packed, bits)[:, :blocks].contiguous()


def _pack(raised: Tensor, bits: int) -> Tensor:
    return raised if bits == 8 else raised[..., ::2] | raised[..., 1::2] << 4


def _unpack(packed: Tensor, bits: int) -> Tensor:
    raised = packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return (raised.to(torch.int16) - (1 << bits - 1)).to(torch.int8)
