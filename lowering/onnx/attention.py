"""Attention in ONNX's terms: softmax(query * scale @ key^T + mask) @ value (Vaswani et al., arXiv 1706.03762, eq. 1).

torch's exporter transposes keys by way of their shape, which no runtime folds, scales them besides the queries, and
adds masks that hide nothing. Of a query whose mask hides all keys it gives the mean of the values, torch zeros.
"""

import math
from typing import Any, Final

import torch
from torch import fx

from graphq.ir import edit
from graphq.ir.views import Op, ops_of, view
from graphq.passes.decompose import is_true_throughout

aten = torch.ops.aten
_BY: Final = "onnx-form"


def spell_attention(gm: fx.GraphModule) -> int:
    """Every attention stands as its parts, what readers of one mask add made once; the number of them.

    Views are reshapes then: what the parts give is not laid out as torch's own kernel has it.
    """
    masks: dict[Op, tuple[Op, Op]] = {}
    count = 0
    for op in ops_of(gm):
        if op.node.target is aten.scaled_dot_product_attention.default and not op.argument("dropout_p"):
            edit.bypass(gm, op, _spelled(gm, op, masks))
            count += 1
    for op in ops_of(gm) if count else ():
        if op.node.target is aten.view.default:
            edit.replace(gm, op, aten.reshape.default, view(op.argument("self")), _sizes(op), by=_BY)
    edit.drop_unused(gm)
    return count


def _sizes(op: Op) -> list[Any]:
    return [view(size) if isinstance(size, fx.Node) else size for size in op.argument("size")]


def _spelled(gm: fx.GraphModule, op: Op, masks: dict[Op, tuple[Op, Op]]) -> Op:
    query, key, value = (view(op.argument(name)) for name in ("query", "key", "value"))

    def insert(target: Any, *args: Any, **options: Any) -> Op:
        return edit.insert(gm, op, target, *args, by=_BY, like=op, options=options)

    times = int(query.val.shape[-3]) // int(key.val.shape[-3]) if op.argument("enable_gqa") else 1
    if times > 1:
        key, value = (insert(aten.repeat_interleave.self_int, x, times, -3) for x in (key, value))
    scale = op.argument("scale")
    scaled = insert(aten.mul.Tensor, query, 1 / math.sqrt(query.val.shape[-1]) if scale is None else float(scale))
    scores = insert(aten.matmul.default, scaled, insert(aten.transpose.int, key, -2, -1))
    given = op.argument("attn_mask")
    mask = None if given is None or is_true_throughout(view(given)) else view(given)
    if op.argument("is_causal"):
        sizes = [insert(aten.sym_size.int, x, -2) for x in (query, key)]
        ones = insert(aten.ones.default, sizes, dtype=torch.bool, device=query.val.device)
        mask = insert(aten.tril.default, ones)
    if mask is None or mask.val.dtype != torch.bool:
        scores = scores if mask is None else insert(aten.add.Tensor, scores, mask)
        return insert(aten.matmul.default, insert(aten.softmax.int, scores, -1), value)
    if mask not in masks:
        masks[mask] = _of_booleans(gm, mask, scores.val.dtype, op)
    hides, sees = masks[mask]
    y = insert(aten.matmul.default, insert(aten.softmax.int, insert(aten.add.Tensor, scores, hides), -1), value)
    return y if op.argument("is_causal") else insert(aten.mul.Tensor, y, sees)


def _of_booleans(gm: fx.GraphModule, mask: Op, dtype: torch.dtype, like: Op) -> tuple[Op, Op]:
    """What is added to scores where ``mask`` hides keys, and for each query 1, or 0 where it sees no key at all.

    Half of the lowest number: a sum with a score is finite, and e to it is 0.
    """
    after = edit.following(mask)

    def insert(target: Any, *args: Any, **options: Any) -> Op:
        return edit.insert(gm, after, target, *args, by=_BY, like=like, options=options)

    numbers = [insert(aten.full.default, [], number, dtype=dtype) for number in (0.0, torch.finfo(dtype).min / 2)]
    hides = insert(aten.where.self, mask, *numbers)
    return hides, insert(aten._to_copy.default, insert(aten.any.dim, mask, -1, True), dtype=dtype)
