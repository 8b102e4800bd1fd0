"""Attention of grouped queries reads its keys and values as they are, without copies for each query head.

Models write what ``enable_gqa`` says (Ainslie et al., arXiv 2305.13245) as keys and values repeated over the query
heads: a copy of the whole cache at each step, in each layer.
"""

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir import edit
from graphq.ir.views import Op, ops_of, view

aten: Any = torch.ops.aten
_BY = "fuse-attention"
_ATTENTION = aten.scaled_dot_product_attention.default
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def fuse_attention(gm: fx.GraphModule) -> int:
    """Attention of four axes whose keys and values are both repeated over the query heads takes them unrepeated.

    Returns the number of attentions changed. What else reads the repeated tensors still does.
    """
    count = 0
    for op in ops_of(gm):
        if op.node.target != _ATTENTION or op.argument("enable_gqa"):
            continue
        query, key, value = (view(op.argument(name)) for name in ("query", "key", "value"))
        keys, values = _unrepeated(key), _unrepeated(value)
        if keys is None or values is None or not _same(query.val.shape[:2], key.val.shape[:2]):
            continue
        if not _same(keys.val.shape[:2], values.val.shape[:2]):
            continue
        mask, rate, causal, scale = (op.argument(name) for name in ("attn_mask", "dropout_p", "is_causal", "scale"))
        options = {"scale": scale, "enable_gqa": True}
        made = edit.insert(
            gm, op, _ATTENTION, query, keys, values, mask, rate, causal, by=_BY, like=op, options=options
        )
        edit.bypass(gm, op, made)
        count += 1
    edit.drop_unused(gm)
    return count


def _unrepeated(x: Op) -> Op | None:
    """``k[B, H, T, D]``, if ``x`` is ``k.unsqueeze(2).expand(B, H, R, T, D).reshape(B, H * R, T, D)``."""
    wide = _first(x, *_RESHAPES)
    split = None if wide is None else _first(wide, aten.expand.default)
    k = None if split is None else _first(split, aten.unsqueeze.default)
    if wide is None or split is None or k is None or split.argument("dim") not in (2, -3) or k.val.dim() != 4:
        return None
    batch, heads, tokens, width = k.val.shape
    repeats = wide.val.shape[2:3]
    if not _same(wide.val.shape, (batch, heads, *repeats, tokens, width)):
        return None
    return k if _same(x.val.shape, (batch, heads * repeats[0], tokens, width)) else None


def _first(op: Op, *targets: object) -> Op | None:
    """What ``op`` makes its result of, if it is one of these ops."""
    return view(op.node.all_input_nodes[0]) if op.node.target in targets else None


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(statically_known_true(i == j) for i, j in zip(a, b, strict=True))
