"""Attention of a few queries over a cache: keys and values are read once for all query heads that share them."""

import struct
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphq.runtime.kernels import native
from graphq.runtime.kernels.choice import features
from graphq.runtime.kernels.watched import is_watched

MOST_QUERIES: Final = 4  # tokens of a step; more are the work of torch's products of matrices
LEAST: Final = {torch.float32: 1 << 16, torch.bfloat16: 1 << 12}  # elements of keys from which on torch is slower
_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
_PLAIN: Final = (Tensor, nn.Parameter)
_LANES: Final = 16


_CALL: Final = struct.Struct("@5P20qd2i")  # ``Attention`` of native/attention.h


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` of the same arguments.

    The library computes it for up to ``MOST_QUERIES`` queries over keys of at least ``LEAST`` elements: it sums in
    float32, and rounds once. A query to which the mask leaves no token gives 0.
    """
    made = None
    is_plain = type(query) in _PLAIN and not torch.compiler.is_dynamo_compiling()
    if is_plain and query.dim() == 4 and query.shape[2] <= MOST_QUERIES and not (dropout_p or is_causal):
        made = _by_library(query, key, value, attn_mask, scale, enable_gqa)
    if made is not None:
        return made
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _by_library(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, is_grouped: bool
) -> Tensor | None:
    """None where the library does not compute it: for other dtypes, devices, layouts and shapes, and for gradients."""
    dtype = q.dtype
    kind = _TYPES.get(dtype)
    if kind is None or k.dtype != dtype or v.dtype != dtype or type(k) not in _PLAIN or type(v) not in _PLAIN:
        return None
    if k.numel() < LEAST[dtype]:
        return None
    if k.dim() != 4 or v.dim() != 4 or not (q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    (batch, heads, queries, width), (_, kv_heads, tokens, v_width) = q.shape, v.shape
    if k.shape != (batch, kv_heads, tokens, width) or v.shape[0] != batch or width % _LANES or v_width % _LANES:
        return None
    if not (batch and heads and queries and kv_heads and tokens and width and v_width):
        return None
    if heads != kv_heads and (not is_grouped or heads % kv_heads):
        return None
    *q_strides, q_last = q.stride()
    *k_strides, k_last = k.stride()
    *v_strides, v_last = v.stride()
    if q_last != 1 or k_last != 1 or v_last != 1 or _is_watched(q, k, v, mask):
        return None
    if q.is_neg() or k.is_neg() or v.is_neg() or (mask is not None and mask.is_neg()):  # memory holds the negatives
        return None
    mask_place, mask_type, mask_strides = 0, 0, [0, 0, 0, 0]
    if mask is not None:
        known = 2 if mask.dtype == torch.bool else _TYPES.get(mask.dtype)
        if known is None or type(mask) not in _PLAIN or not mask.is_cpu or mask.dim() != 4:
            return None
        if any(a not in (1, b) for a, b in zip(mask.shape, (batch, heads, queries, tokens), strict=True)):
            return None
        mask_place, mask_type = mask.data_ptr(), known
        mask_strides = [0 if size == 1 else by for size, by in zip(mask.shape, mask.stride(), strict=True)]
    level = _level()
    if level < 0:
        return None
    out = torch.empty((batch, queries, heads, v_width), dtype=dtype)
    call = _CALL.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), mask_place, out.data_ptr(),
        batch, heads, kv_heads, queries, tokens, width, v_width,
        *q_strides, *k_strides, *v_strides, *mask_strides,
        width**-0.5 if scale is None else scale, kind, mask_type,
    )  # fmt: skip
    if native.library().graphq_attention(call, level, torch.get_num_threads()):
        raise MemoryError(f"attention over {tokens} tokens: {native.OUT_OF_MEMORY}")
    return out.transpose(1, 2)


def _level() -> int:
    """The best instruction set that attention has and may use, -1 where there is none."""
    known = features()
    return next((i for i in (2, 1, 0) if native.LEVELS[i] in known), -1)


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether something is to see the op of torch, to change it, or to differentiate it."""
    if is_watched():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
