"""Scales in the layouts of Ascend's tools: MX scales in pairs, float32 scales in 64-bit words, HiF4's scales of blocks.

Sources: msModelSlim's checkpoints and vLLM-Ascend, which reads them; AMCT's deployed modules, deploy ONNX and HiF4.
"""

from typing import Final

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from graphq.errors import PassError
from graphq.packing.rows import check_dtype
from graphq.packing.words import pack_words, unpack_words

_MSB_FIRST: Final = (7, 6, 5, 4, 3, 2, 1, 0)


def pair_scales(scale: UInt8[Tensor, "*experts out blocks"]) -> UInt8[Tensor, "*experts pairs out 2"]:
    """E8M0 scales of MX blocks, neighbours along the input axis two by two in the last axis, the pairs in the first.

    AMCT's ``scale_w`` of mxfp8 is such: ``[K/64, N, 2]`` of ``[N, K/32]``. Raises ``PassError`` for an odd number of
    blocks, which the layout does not pad.
    """
    check_dtype(scale.dtype, (torch.uint8,))
    if scale.ndim < 2 or scale.shape[-1] % 2:
        raise PassError(f"packing: scales of shape {tuple(scale.shape)}, not [..., out, an even number of blocks]")
    return scale.unflatten(-1, (scale.shape[-1] // 2, 2)).movedim(-2, -3).contiguous()


def unpair_scales(paired: UInt8[Tensor, "*experts pairs out 2"]) -> UInt8[Tensor, "*experts out blocks"]:
    """The scales that ``pair_scales`` paired."""
    check_dtype(paired.dtype, (torch.uint8,))
    if paired.ndim < 3 or paired.shape[-1] != 2:
        raise PassError(f"packing: paired scales of shape {tuple(paired.shape)}, not [..., pairs, out, 2]")
    return paired.movedim(-3, -2).flatten(-2).contiguous()


def scale_to_word(scale: Float32[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Each scale's float32 bits in the low half of a 64-bit word; the high half is 0.

    So are Ascend's ``deq_scale`` for float16 models, and AMCT's ``.dequant.param`` and int4 ``weight_scale``, which are
    uint64 (``.view`` of this). Raises ``PassError`` for a negative scale: the writers disagree on its high half.
    """
    check_dtype(scale.dtype, (torch.float32,))
    if scale.signbit().any():
        raise PassError(f"packing: a scale of {scale.min().item()}; 64-bit words hold positive scales")
    return scale.view(torch.int32).to(torch.int64)


def word_to_scale(words: Int64[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The scales whose words these are. Raises ``PassError`` for words that are not those of positive scales alone."""
    check_dtype(words.dtype, (torch.int64,))
    if (words >> 31).any():
        raise PassError("packing: a word holds more than the bits of a positive float32 scale")
    return words.to(torch.int32).view(torch.float32)


def pack_hif4_scales(
    scale: UInt8[Tensor, "*rows blocks"], level2: UInt8[Tensor, "*rows eighths"], level3: UInt8[Tensor, "*rows fourths"]
) -> UInt8[Tensor, "*rows blocks 4"]:
    """Four bytes for each of HiF4's blocks of 64: the E6M2 scale, 8 bits of level 2, 16 bits of level 3.

    ``level2`` holds a 0 or 1 for every 8 elements of a row, ``level3`` for every 4; the first of a byte's bits is its
    highest. Raises ``PassError`` for other values, and for shapes that do not belong together.
    """
    for given in (scale, level2, level3):
        check_dtype(given.dtype, (torch.uint8,))
    *rows, blocks = scale.shape
    if level2.shape != (*rows, 8 * blocks) or level3.shape != (*rows, 16 * blocks):
        raise PassError(
            f"packing: levels of shapes {tuple(level2.shape)} and {tuple(level3.shape)} to scales of shape "
            f"{tuple(scale.shape)}; a block has 8 and 16"
        )
    second = pack_words(level2, 1, torch.uint8, order=_MSB_FIRST).unsqueeze(-1)
    third = pack_words(level3, 1, torch.uint8, order=_MSB_FIRST).unflatten(-1, (blocks, 2))
    return torch.cat([scale.unsqueeze(-1), second, third], -1)


def unpack_hif4_scales(
    packed: UInt8[Tensor, "*rows blocks 4"],
) -> tuple[UInt8[Tensor, "*rows blocks"], UInt8[Tensor, "*rows eighths"], UInt8[Tensor, "*rows fourths"]]:
    """Scale, level 2 and level 3 that ``pack_hif4_scales`` packed."""
    check_dtype(packed.dtype, (torch.uint8,))
    if packed.ndim < 2 or packed.shape[-1] != 4:
        raise PassError(f"packing: HiF4 scales of shape {tuple(packed.shape)}, not [..., blocks, 4]")
    blocks = packed.shape[-2]
    level2 = unpack_words(packed[..., 1], 1, 8 * blocks, order=_MSB_FIRST, dtype=torch.uint8)
    level3 = unpack_words(packed[..., 2:].flatten(-2), 1, 16 * blocks, order=_MSB_FIRST, dtype=torch.uint8)
    return packed[..., 0].contiguous(), level2, level3
