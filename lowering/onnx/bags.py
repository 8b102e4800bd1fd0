"""Bags of embeddings whose sizes are known, as a lookup and a reduction: torch's exporter writes a Loop over bags."""

from itertools import pairwise
from typing import Any, Final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir import edit
from graphq.ir.views import EmbeddingBag, Op, Param, ops_of, view
from graphq.state import tensor_of

aten = torch.ops.aten
_BY: Final = "onnx-form"
_IN_ORDER: Final = (aten.reshape.default, aten.view.default, aten.flatten.using_ints)
_ARANGES: Final = (aten.arange.start_step, aten.arange.start, aten.arange.default)
_REDUCTIONS: Final = {"sum": aten.sum.dim_IntList, "mean": aten.mean.dim, "max": aten.amax.default}
_MODES: Final = ("sum", "mean", "max")


def spell_bags(gm: fx.GraphModule) -> int:
    """Every bag of rows of a table of indices, and those between offsets that the graph holds, are looked up at once
    and reduced; the number of such ops. Others stay: those of which more is read than the bags, or with indices that
    count for nothing (``padding_idx``).
    """
    count = 0
    for op in ops_of(gm):
        if not isinstance(op, EmbeddingBag) or op.argument("padding_idx") is not None:
            continue
        if [user.node.args[1] for user in op.users] != [0]:
            continue
        made = _of_rows(gm, op) or _of_offsets(gm, op)
        if made is not None:
            edit.bypass(gm, op.users[0], made)
            count += 1
    if count:
        edit.drop_unused(gm)
    return count


def _of_rows(gm: fx.GraphModule, op: EmbeddingBag) -> Op | None:
    """The bags that are the rows of a table ``[bags, size]``."""
    if op.indices.node.target not in _IN_ORDER:
        return None
    table = view(op.indices.node.all_input_nodes[0])
    size = table.val.shape[-1]
    if table.val.dim() != 2 or not isinstance(size, int) or size == 0:
        return None
    if not _steps(op.offsets, size) or not statically_known_true(op.offsets.val.shape[0] == table.val.shape[0]):
        return None
    return _reduced(gm, op, _rows(gm, op, table, size), 1)


def _steps(offsets: Op, size: int) -> bool:
    """Whether offsets are 0, ``size``, twice ``size`` and so on."""
    if offsets.node.target not in _ARANGES:
        return False
    names = {argument.name for argument in offsets.schema()}
    start = offsets.argument("start") if "start" in names else 0
    step = offsets.argument("step") if "step" in names else 1
    return (start, step) == (0, size)


def _of_offsets(gm: fx.GraphModule, op: EmbeddingBag) -> Op | None:
    """The bags between offsets that the graph holds, of a known number of indices."""
    total = op.indices.val.shape[0]
    if not isinstance(op.offsets, Param) or not isinstance(total, int):
        return None
    ends: list[int] = tensor_of(gm, op.offsets.fqn).tolist()
    if not op.argument("include_last_offset"):
        ends = [*ends, total]
    if ends[0] != 0 or ends[-1] != total or any(a >= b for a, b in pairwise(ends)):
        return None
    rows = _rows(gm, op, op.indices, None)
    bags = [
        _reduced(gm, op, _insert(gm, op, aten.slice.Tensor, rows, 0, a, b), 0, keepdim=True) for a, b in pairwise(ends)
    ]
    return _insert(gm, op, aten.cat.default, bags, 0)


def _rows(gm: fx.GraphModule, op: EmbeddingBag, indices: Op, size: int | None) -> Op:
    """The rows of the table at ``indices``, each times its sample's weight where there are such."""
    rows = _insert(gm, op, aten.embedding.default, op.weight, indices)
    weights = op.argument("per_sample_weights")
    if weights is None:
        return rows
    shape = [-1, 1] if size is None else [-1, size, 1]
    return _insert(gm, op, aten.mul.Tensor, rows, _insert(gm, op, aten.reshape.default, view(weights), shape))


def _reduced(gm: fx.GraphModule, op: EmbeddingBag, rows: Op, axis: int, keepdim: bool = False) -> Op:
    return _insert(gm, op, _REDUCTIONS[_MODES[op.argument("mode")]], rows, [axis], keepdim)


def _insert(gm: fx.GraphModule, op: Op, target: Any, *args: Any) -> Op:
    return edit.insert(gm, op, target, *args, by=_BY, like=op)
