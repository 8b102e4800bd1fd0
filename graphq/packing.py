"""Integer codes of any width from 2 to 8 bits in bytes, and back.

Layout: codes are taken in row-major order of the last axis; each row starts on a byte. Code i of a row fills bits
``i * bits`` upwards of the row's bit string, least significant first, in two's complement: for 4 bits the first code is
the low nibble. A row of K codes takes ceil(K * bits / 8) bytes; the bits after the last code are 0.
"""

import torch
from torch import Tensor

from graphq.errors import PassError


def packed_size(count: int, bits: int) -> int:
    """Bytes that a row of ``count`` codes takes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes ``uint8[..., ceil(K * bits / 8)]`` of ``int8[..., K]`` codes from -2^(bits-1) to 2^(bits-1)-1."""
    if not 2 <= bits <= 8:
        raise PassError(f"pack: {bits} bits; rows of 2 to 8 bits are packed")
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    if bits == 4:  # the common width, without spreading bits
        low, high = codes[..., ::2], codes[..., 1::2]
        if codes.shape[-1] % 2:
            high = torch.nn.functional.pad(high, (0, 1))
        return (low & 15).view(torch.uint8) | (high << 4).view(torch.uint8)
    bit = torch.arange(bits, device=codes.device, dtype=torch.int8)
    string = ((codes.unsqueeze(-1) >> bit) & 1).flatten(-2).view(torch.uint8)
    string = torch.nn.functional.pad(string, (0, -string.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (string << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``int8[..., count]`` codes that ``pack`` packed."""
    if bits == 8:
        return packed.view(torch.int8)
    if bits == 4:
        low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
        return torch.stack([low, high], -1).flatten(-2)[..., :count]
    string = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    string = string.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    codes = (string << torch.arange(bits, device=packed.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)  # the arithmetic shift back extends the sign
