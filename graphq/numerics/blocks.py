"""Blocks of a tensor that share a scale.

``block`` gives the elements per scale along each axis, -1 for the whole axis; a last block may be short. A scale has
the rank of its tensor and ceil(size / block) elements along each axis; one with a single element serves the whole
tensor.
"""

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from graphq.errors import PassError
from graphq.spec.quant import Granularity, PerBlock, PerChannel, PerGroup, PerHead, PerTensor, PerToken


def weight_block(
    granularity: Granularity, rank: int, out_axis: int, in_axis: int, own_axes: Sequence[int] = ()
) -> list[int]:
    """Elements per scale along each axis of a weight; ``own_axes`` always have a scale for each index (experts)."""
    block = [-1] * rank
    for axis in own_axes:
        block[axis] = 1
    match granularity:
        case PerTensor():
            pass
        case PerChannel() | PerToken() | PerHead():
            block[out_axis] = 1
        case PerGroup(size):
            block[out_axis], block[in_axis] = 1, size
        case PerBlock(rows, columns):
            block[out_axis], block[in_axis] = rows, columns
        case _:
            assert_never(granularity)
    return block


def activation_block(granularity: Granularity, rank: int) -> list[int]:
    """Elements per scale along each axis of an activation: one scale for all of it, for each token vector, or for each
    group of one.
    """
    match granularity:
        case PerToken():
            return [1] * (rank - 1) + [-1]
        case PerGroup(size):
            return [1] * (rank - 1) + [size]
        case PerTensor() | PerChannel() | PerBlock() | PerHead():
            return [-1] * rank
        case _:
            assert_never(granularity)


def state_block(granularity: Granularity, dynamic: bool, rank: int, batch_axis: int, token_axis: int) -> list[int]:
    """Elements per scale along each axis of keys, values or another state that tokens are put behind.

    Channels lie along the last axis that is not the tokens', heads along those that are left beside the batch. Scales
    of run time are each token's own, so that they do not depend on which tokens come in one call.
    """
    block = [-1] * rank
    channels = rank - 1 if token_axis != rank - 1 else rank - 2
    heads = [axis for axis in range(rank) if axis not in (batch_axis, token_axis, channels)]
    if dynamic:
        block[batch_axis] = block[token_axis] = 1
    match granularity:
        case PerTensor():
            return block
        case PerHead() | PerToken():
            pass
        case PerChannel():
            block[channels] = 1
        case PerGroup(size):
            block[channels] = size
        case PerBlock():
            raise PassError(f"{granularity} of a cache")
        case _:
            assert_never(granularity)
    for axis in heads:
        block[axis] = 1
    return block


def scale_shape(shape: Sequence[int], block: Sequence[int]) -> list[int]:
    """The shape of the scales of a tensor of this shape."""
    return [1 if b < 0 else size if b == 1 else -(-size // b) for size, b in zip(shape, block, strict=True)]


def channel_block(block: Sequence[int]) -> list[int]:
    """The block of the scales above those of groups: the same axes, the grouped ones whole."""
    return [b if b == 1 else -1 for b in block]


def split_blocks(x: Tensor, block: Sequence[int]) -> tuple[Tensor, list[int]]:
    """``x`` with every axis as (blocks, elements of a block), and the axes of these elements.

    Short last blocks are filled by repeating their last element, which leaves their extremes alone.
    """
    inner: list[int] = []
    axis = 0
    for b in block:
        size = x.shape[axis]
        if b == 1:
            axis += 1
            continue
        width = size if b < 0 or b >= size else b
        short = -size % width if width else 0
        if short:
            last = [short if a == axis else n for a, n in enumerate(x.shape)]
            x = torch.cat([x, x.narrow(axis, size - 1, 1).expand(last)], axis)
        x = x.unflatten(axis, (x.shape[axis] // width if width else 1, width))
        inner.append(axis + 1)
        axis += 2
    return x, inner


def block_extremes(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest element of each block of ``x``, in the shape of a scale; 0 if it has none."""
    shape = scale_shape(x.shape, block)
    if x.numel() == 0:
        return x.new_zeros(shape), x.new_zeros(shape)
    split, inner = split_blocks(x, block)
    if not inner:
        return x, x
    return split.amin(inner).view(shape), split.amax(inner).view(shape)


def block_sum(x: Tensor, block: Sequence[int]) -> Tensor:
    """The sum of each block of ``x``, in the shape of a scale."""
    pads: list[int] = []
    for size, b in zip(reversed(x.shape), reversed(block), strict=True):
        pads += [0, -size % b if 1 < b < size else 0]
    shape = scale_shape(x.shape, block)
    if any(pads):
        x = torch.nn.functional.pad(x, pads)
    split, inner = split_blocks(x, block)
    return split.sum(inner).view(shape) if inner else x


def beside_scales(
    x: Tensor, scales: Sequence[Tensor | None], block: Sequence[int]
) -> tuple[Tensor, list[Tensor | None]]:
    """``x`` and its scales in shapes that broadcast, without copies where blocks fill their axes; the caller gives the
    result ``x``'s shape.
    """
    if any(1 < b < size and size % b for size, b in zip(x.shape, block, strict=True)):
        return x, [None if scale is None else expand_scale(scale, x, block) for scale in scales]
    inner = [1 < b < size for size, b in zip(x.shape, block, strict=True)]
    shape = [
        n for size, b, cut in zip(x.shape, block, inner, strict=True) for n in ((size // b, b) if cut else (size,))
    ]
    found: list[Tensor | None] = []
    for scale in scales:
        if scale is None or scale.numel() == 1:
            found.append(scale)
        else:
            sizes = zip(scale.shape, inner, strict=True)
            found.append(scale.reshape([n for size, cut in sizes for n in ((size, 1) if cut else (size,))]))
    return x.reshape(shape), found


def expand_scale(scale: Tensor, x: Tensor, block: Sequence[int]) -> Tensor:
    """``scale`` with each element repeated over its block, broadcastable to ``x``."""
    if scale.numel() == 1:
        return scale
    for axis, (size, b) in enumerate(zip(x.shape, block, strict=True)):
        if 1 < b < size:
            scale = scale.repeat_interleave(b, axis).narrow(axis, 0, size)
    return scale
