"""Integer codes of any width from 2 to 8 bits in bytes, and back.

Layout: codes are taken in row-major order of the last axis; each row starts on a byte. Code i of a row fills bits
``i * bits`` upwards of the row's bit string, least significant first, in two's complement: for 4 bits the first code is
the low nibble. A row of K codes takes ceil(K * bits / 8) bytes; the bits after the last code are 0.
"""

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from graphq.errors import PassError


def packed_size(count: int, bits: int) -> int:
    """Bytes that a row of ``count`` codes takes."""
    return -(-count * bits // 8)


def _check(bits: int, given: Tensor, wanted: torch.dtype) -> None:
    if not 2 <= bits <= 8:
        raise PassError(f"packing: {bits} bits; codes of 2 to 8 bits are packed")
    if given.dtype != wanted:
        raise PassError(f"packing: {given.dtype}, not {wanted}")


def pack(codes: Int8[Tensor, "*rows count"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """The bytes of codes from -2^(bits-1) to 2^(bits-1)-1; higher bits of a code are cut off."""
    _check(bits, codes, torch.int8)
    codes = codes.contiguous()
    if bits == 8:
        return codes.view(torch.uint8)
    if bits == 4:  # the common width, without spreading bits
        low, high = codes[..., ::2], codes[..., 1::2]
        if codes.shape[-1] % 2:
            high = torch.nn.functional.pad(high, (0, 1))
        return (low & 15).view(torch.uint8) | (high << 4).view(torch.uint8)
    bit = torch.arange(bits, device=codes.device, dtype=torch.int8)
    string = ((codes.unsqueeze(-1) >> bit) & 1).flatten(-2).view(torch.uint8)
    size = packed_size(codes.shape[-1], bits)
    string = torch.nn.functional.pad(string, (0, 8 * size - string.shape[-1])).unflatten(-1, (size, 8))
    return (string << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int, count: int) -> Int8[Tensor, "*rows {count}"]:
    """The ``count`` codes of each row that ``pack`` packed."""
    _check(bits, packed, torch.uint8)
    if packed.shape[-1] != packed_size(count, bits):
        raise PassError(f"packing: {packed.shape[-1]} bytes a row; {count} codes take {packed_size(count, bits)}")
    if bits == 8:
        return packed.view(torch.int8)
    if bits == 4:
        low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
        return torch.stack([low, high], -1).flatten(-2)[..., :count]
    string = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    string = string.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    codes = (string << torch.arange(bits, device=packed.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)  # the arithmetic shift back extends the sign
