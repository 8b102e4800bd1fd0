"""Codes in the words that other formats store: the bit string of ``graphq.packing.rows`` along any axis, cut anywhere.

What each format passes to ``pack_words``, after bits; N are output channels, K input channels, b bits:

    compressed-tensors pack-quantized, weight: int32[N, ceil(K*b/32)]    torch.int32, offset_binary=True, pad=True
      its zero points: int32[ceil(N*b/32), groups]                       the same, axis=0
      before its 0.18, both with 32//b codes a word                      the same, straddle=False
    compressed-tensors nvfp4 and mxfp4: uint8[N, K/2]                    torch.uint8
    compressed-tensors mxfp6: uint8[N, 3*K/4]                            torch.uint8
    Ascend (msModelSlim) W4A8_DYNAMIC: int8[N/2, K], int8[E, N/2, K]     torch.int8, axis=-2
    Ascend W4A8_MXFP and W4A4_MXFP4: uint8[N, K/2]                       torch.uint8
    AMCT int8 by int4: int8[K, N/2] of codes [K, N]                      torch.int8
    AMCT int4 and float4_e2m1: int32[K, N/8] of codes [K, N]             torch.int32
    AMCT mxfp4: int32[K/8, N] of codes [K, N]                            torch.int32, axis=0
    AMCT INT4 in deploy ONNX: int8[N, K/2, ...]                          torch.int8, axis=1
    AMCT HiF4, sign and magnitude: uint8[N, K/2]                         torch.uint8
    AutoAWQ gemm: qweight int32[K, N/8], qzeros int32[groups, N/8]       torch.int32, order=AWQ_ORDER
    ONNX raw_data: ``pack_flat``

Codes are int8, in two's complement, or uint8, as bit patterns.
"""

from collections.abc import Sequence
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Int8, Int32, UInt8
from torch import Tensor

from graphq.errors import PassError
from graphq.packing.rows import CODE_DTYPES, check_bits, check_dtype, check_range, from_bytes, to_bytes

Codes: TypeAlias = Int8[Tensor, "..."] | UInt8[Tensor, "..."]
Words: TypeAlias = UInt8[Tensor, "..."] | Int8[Tensor, "..."] | Int32[Tensor, "..."]

AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word, from the lowest, is code AWQ_ORDER[i] of eight
_WORD_DTYPES: Final = (torch.uint8, torch.int8, torch.int32)


def pack_words(
    codes: Codes,
    bits: int,
    word: torch.dtype,
    *,
    axis: int = -1,
    offset_binary: bool = False,
    order: Sequence[int] | None = None,
    straddle: bool = True,
    pad: bool = False,
) -> Words:
    """Codes of 1 to 8 bits in words of dtype uint8, int8 or int32, which take the place of the codes' ``axis``.

    The first code is in the lowest bits of the first word. ``offset_binary``: int8 codes are stored plus 2^(bits-1).
    ``order``: of each ``len(order)`` codes the one at ``order[i]`` is stored as number i. ``straddle=False``: no code
    lies in two words, whose highest bits may be unused. ``pad``: the last word may be partly filled. Unused bits are 0.
    Raises ``PassError`` for a code that ``bits`` do not hold and, without ``pad``, for codes that do not fill words.
    """
    _check_layout(codes, bits, axis, offset_binary, order, codes.dtype, word)
    check_range(codes, bits)
    count, width = codes.shape[axis], 8 * word.itemsize
    per_word = width // bits
    if not pad and (count * bits % width if straddle else count % per_word):
        raise PassError(f"packing: {count} codes of {bits} bits along axis {axis} do not fill words of {width} bits")
    lanes = codes.view(torch.uint8).movedim(axis, -1)
    if offset_binary:
        lanes = lanes + (1 << (bits - 1))  # modulo 256
    if order is not None:
        lanes = _reordered(lanes, order)
    if not straddle:  # each word is a row of its own
        lanes = F.pad(lanes, (0, -count % per_word)).unflatten(-1, (-(-count // per_word), per_word))
    data = to_bytes(lanes, bits)
    words = _viewed(F.pad(data, (0, -data.shape[-1] % word.itemsize)), word)
    return (words if straddle else words.flatten(-2)).movedim(-1, axis).contiguous()


def unpack_words(
    words: Words,
    bits: int,
    count: int,
    *,
    axis: int = -1,
    offset_binary: bool = False,
    order: Sequence[int] | None = None,
    straddle: bool = True,
    dtype: torch.dtype = torch.int8,
) -> Codes:
    """The ``count`` codes along ``axis`` that ``pack_words`` packed so, as int8, whose sign is extended, or as uint8.

    Raises ``PassError`` for another number of words than ``count`` codes take.
    """
    _check_layout(words, bits, axis, offset_binary, order, dtype, words.dtype)
    width = 8 * words.dtype.itemsize
    per_word = width // bits
    size = -(-count * bits // width) if straddle else -(-count // per_word)
    if words.shape[axis] != size:
        raise PassError(
            f"packing: {words.shape[axis]} words of {width} bits along axis {axis}; "
            f"{count} codes of {bits} bits take {size}"
        )
    lanes = words.movedim(axis, -1)
    if not straddle:
        lanes = lanes.unsqueeze(-1)
    data = _viewed(lanes, torch.uint8)
    codes = from_bytes(data, bits, count if straddle else per_word, torch.uint8 if offset_binary else dtype)
    if not straddle:
        codes = codes.flatten(-2)[..., :count]
    if order is not None:
        codes = _reordered(codes, sorted(range(len(order)), key=order.__getitem__))
    if offset_binary:
        codes = (codes - (1 << (bits - 1))).view(torch.int8)  # modulo 256
    return codes.movedim(-1, axis).contiguous()


def pack_flat(codes: Codes, bits: int) -> UInt8[Tensor, " bytes"]:
    """The bytes of all codes in row-major order, the bits after the last one 0, as in ONNX's ``raw_data``.

    ONNX packs INT2 and UINT2, INT4, UINT4 and FLOAT4E2M1, FLOAT6E2M3 and FLOAT6E3M2 so (onnx.proto, ``TensorProto``).
    Raises ``PassError`` for a code that ``bits`` do not hold.
    """
    return pack_words(codes.flatten(), bits, torch.uint8, pad=True)


def unpack_flat(
    packed: UInt8[Tensor, " bytes"], bits: int, shape: Sequence[int], dtype: torch.dtype = torch.int8
) -> Codes:
    """The codes of this shape that ``pack_flat`` packed, as int8, whose sign is extended, or as uint8."""
    return unpack_words(packed, bits, torch.Size(shape).numel(), dtype=dtype).reshape(tuple(shape))


def _viewed(lanes: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes in another dtype, along the last axis."""
    shape = (*lanes.shape[:-1], lanes.shape[-1] * lanes.dtype.itemsize // dtype.itemsize)
    # A copy, as a tensor of one element or none may be contiguous and have strides that ``view`` refuses.
    return lanes.clone(memory_format=torch.contiguous_format).flatten().view(dtype).reshape(shape)


def _reordered(codes: Tensor, order: Sequence[int]) -> Tensor:
    """Of each ``len(order)`` codes of a row, the one at ``order[i]`` in place i."""
    count, size = codes.shape[-1], len(order)
    if count % size:
        raise PassError(f"packing: {count} codes; they are reordered {size} at a time")
    return codes.unflatten(-1, (count // size, size))[..., list(order)].flatten(-2)


def _check_layout(
    tensor: Tensor,
    bits: int,
    axis: int,
    offset_binary: bool,
    order: Sequence[int] | None,
    code: torch.dtype,
    word: torch.dtype,
) -> None:
    check_bits(bits, lowest=1)
    check_dtype(code, CODE_DTYPES)
    check_dtype(word, _WORD_DTYPES)
    if not -tensor.ndim <= axis < tensor.ndim:
        raise PassError(f"packing: axis {axis} of a tensor with {tensor.ndim} axes")
    if offset_binary and code != torch.int8:
        raise PassError(f"packing: {code} codes in offset binary, which stores torch.int8")
    if order is not None and (not order or sorted(order) != list(range(len(order)))):
        raise PassError(f"packing: order {tuple(order)} is no permutation of its places")
