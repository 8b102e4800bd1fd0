"""Codes of any width from 2 to 8 bits in bytes, and back: graphq's own layout, and the bit string all others cut.

Layout: codes are taken in row-major order of the last axis; each row starts on a byte. Code i of a row fills bits
``i * bits`` upwards of the row's bit string, least significant first: for 4 bits the first code is the low nibble. A
row of K codes takes ceil(K * bits / 8) bytes; the bits after the last code are 0.

Codes are int8, in two's complement, or uint8, as bit patterns: unsigned integers, and floats of up to 8 bits.
"""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Int8, UInt8
from torch import Tensor

from graphq.errors import PassError

CODE_DTYPES: Final = (torch.int8, torch.uint8)


def packed_size(count: int, bits: int) -> int:
    """Bytes that a row of ``count`` codes takes."""
    return -(-count * bits // 8)


def pack(codes: Int8[Tensor, "*rows count"] | UInt8[Tensor, "*rows count"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """The bytes of codes: int8 ones from -2^(bits-1) to 2^(bits-1)-1, whose higher bits are cut off; or uint8 ones.

    Raises ``PassError`` for other dtypes, for widths other than 2 to 8, and for uint8 codes above 2^bits - 1.
    """
    check_bits(bits, lowest=2)
    check_dtype(codes.dtype, CODE_DTYPES)
    if codes.dtype == torch.uint8:
        check_range(codes, bits)
    return to_bytes(codes, bits)


def unpack(
    packed: UInt8[Tensor, "*rows bytes"], bits: int, count: int, dtype: torch.dtype = torch.int8
) -> Int8[Tensor, "*rows {count}"] | UInt8[Tensor, "*rows {count}"]:
    """The ``count`` codes of each row that ``pack`` packed, as int8, whose sign is extended, or as uint8."""
    check_bits(bits, lowest=2)
    check_dtype(packed.dtype, (torch.uint8,))
    check_dtype(dtype, CODE_DTYPES)
    if packed.shape[-1] != packed_size(count, bits):
        raise PassError(f"packing: {packed.shape[-1]} bytes a row; {count} codes take {packed_size(count, bits)}")
    return from_bytes(packed, bits, count, dtype)


def to_bytes(codes: Tensor, bits: int) -> Tensor:
    """The bit string of each row in bytes; higher bits of a code are cut off."""
    codes = codes.contiguous().view(torch.uint8)
    if bits == 8:
        return codes
    if bits == 4:  # the common width, without spreading bits
        low, high = codes[..., ::2], codes[..., 1::2]
        if codes.shape[-1] % 2:
            high = F.pad(high, (0, 1))
        return (low & 15) | (high << 4)
    string = ((codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device, dtype=torch.uint8)) & 1).flatten(-2)
    size = packed_size(codes.shape[-1], bits)
    string = F.pad(string, (0, 8 * size - string.shape[-1])).unflatten(-1, (size, 8))
    return (string << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def from_bytes(packed: Tensor, bits: int, count: int, dtype: torch.dtype) -> Tensor:
    """The first ``count`` codes of each row's bit string. A shift to the right extends the sign of int8 alone."""
    if bits == 8:
        return packed[..., :count].view(dtype)
    if bits == 4:
        low, high = (packed << 4).view(dtype) >> 4, packed.view(dtype) >> 4
        return torch.stack([low, high], -1).flatten(-2)[..., :count]
    string = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    string = string.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    codes = (string << torch.arange(bits, device=packed.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return (codes << (8 - bits)).view(dtype) >> (8 - bits)


def check_bits(bits: int, lowest: int) -> None:
    """Raises ``PassError`` for a width other than ``lowest`` to 8."""
    if not lowest <= bits <= 8:
        raise PassError(f"packing: {bits} bits; codes of {lowest} to 8 bits are packed")


def check_dtype(given: torch.dtype, wanted: Sequence[torch.dtype]) -> None:
    """Raises ``PassError`` for a dtype that is not wanted."""
    if given not in wanted:
        raise PassError(f"packing: {given}, not {' or '.join(map(str, wanted))}")


def check_range(codes: Tensor, bits: int) -> None:
    """Raises ``PassError`` for a code that ``bits`` would cut."""
    if codes.numel():
        lowest = 0 if codes.dtype == torch.uint8 else -(1 << (bits - 1))
        highest = lowest + (1 << bits) - 1
        least, most = (int(found) for found in codes.aminmax())
        if least < lowest or most > highest:
            raise PassError(f"packing: codes from {least} to {most}; {bits} bits hold {lowest} to {highest}")
