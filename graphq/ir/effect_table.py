"""What each op does to the elements of its operands: one table, which every walk over a graph reads.

An op that is not in the table is ``Elementwise`` where torch says so (its tag ``pointwise``), else ``Opaque``. Each row
is checked by running its ops (tests/ir/test_effects.py).
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast, final

import torch
from torch._ops import OpOverload

from graphq.ir.effects import (
    Adds,
    AddsProduct,
    Attends,
    Contracts,
    Convolves,
    Copies,
    Effect,
    Elementwise,
    Gathers,
    Homogeneous,
    Joins,
    LooksUp,
    MixesAxis,
    Moves,
    Normalizes,
    Observes,
    Opaque,
    Pads,
    Pools,
    Projects,
    ReadsShape,
    Reduces,
    Scales,
    Scatters,
)
from graphq.ir.views import Op, Weighted, view
from graphq.runtime import ops

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class _Drops:
    """A dropout: in evaluation a copy."""

    training: Effect


_Row = Effect | _Drops


_ROWS: Final[tuple[tuple[_Row, tuple[Any, ...]], ...]] = (
    (
        Copies(),
        (
            *(aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default),
            *(aten.lift_fresh_copy.default, aten._to_copy.default, aten.to.dtype),
        ),
    ),
    (
        Moves("reshape"),
        (
            *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
            *(aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        ),
    ),
    (
        Moves("permute"),
        (
            *(aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.numpy_T.default),
            *(aten.movedim.int, aten.movedim.intlist, aten.swapaxes.default),
        ),
    ),
    (Moves("pick"), (aten.select.int, aten.slice.Tensor, aten.narrow.default, aten.flip.default, aten.roll.default)),
    (Moves("repeat"), (aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int)),
    (
        Moves("split"),
        (
            *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int),
            aten.tensor_split.sections,
        ),
    ),
    (Moves("item"), (operator.getitem,)),
    (Homogeneous(), (aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.abs.default)),
    (Homogeneous(linear=True), (aten.neg.default,)),
    (
        Elementwise(),  # those that torch does not tag as pointwise
        (
            *(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.__and__.Scalar, aten.__or__.Scalar),
            *(aten.floor_divide.default, aten.hardswish.default, aten.log_sigmoid.default),
            *(aten.tril.default, aten.triu.default),  # an element, or 0
            aten.copy.default,  # the second's element
            *(aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Tensor),
        ),
    ),
    (Adds(), (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)),
    (Scales(), (aten.mul.Tensor, aten.mul.Scalar)),
    (Scales(divides=True), (aten.div.Tensor, aten.div.Scalar)),
    (Reduces("linear"), (aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default)),
    (
        Reduces("homogeneous"),
        (aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, aten.linalg_vector_norm.default),
    ),
    (
        Reduces("other"),
        (
            *(aten.var.dim, aten.std.dim, aten.var.correction, aten.std.correction),
            *(aten.var.default, aten.std.default, aten.var_mean.default, aten.std_mean.default),
            *(aten.var_mean.dim, aten.std_mean.dim, aten.var_mean.correction, aten.std_mean.correction),
            *(aten.aminmax.default, aten.prod.default, aten.prod.dim_int, aten.logsumexp.default),
            *(aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim),
            *(aten.any.dim, aten.all.dim, aten.any.default, aten.all.default),
        ),
    ),
    (MixesAxis(), (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)),
    (MixesAxis(), (aten.cumsum.default, aten.cummax.default, aten.cummin.default, aten.glu.default)),
    (
        MixesAxis(orders=True),
        (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable, aten.topk.default),
    ),
    (Normalizes(-1, "row"), (aten.layer_norm.default, aten.native_layer_norm.default)),
    (Normalizes(-1, "row", centres=False, parameters=("weight",)), (aten.rms_norm.default,)),
    (Normalizes(1, "nothing"), (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)),
    (Normalizes(1, "positions"), (aten.group_norm.default, aten.instance_norm.default)),
    (Pools(1), (aten.max_pool1d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default)),
    (Pools(2), (aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default)),
    (Pools(3), (aten.max_pool3d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default)),
    (Projects(), (aten.linear.default, aten.addmm.default, ops.grouped_linear)),
    (Convolves(1), (aten.conv1d.default, aten.conv1d.padding, aten.conv_transpose1d.default)),
    (Convolves(2), (aten.conv2d.default, aten.conv2d.padding, aten.conv_transpose2d.input)),
    (Convolves(3), (aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose3d.input)),
    (LooksUp(), (aten.embedding.default,)),
    (LooksUp("self"), (aten.one_hot.default,)),
    (Contracts(), (aten.matmul.default, aten.bmm.default, aten.mm.default)),
    (AddsProduct(), (aten.baddbmm.default,)),
    (AddsProduct(sums=True), (aten.addbmm.default,)),
    (Attends(), (aten.scaled_dot_product_attention.default,)),
    (Joins(), (aten.cat.default,)),
    (Joins(new=True), (aten.stack.default,)),
    (Gathers("slices"), (aten.index.Tensor, aten.index_select.default)),
    (Gathers("elements"), (aten.gather.default,)),
    (Scatters("slices", "source"), (aten.index_copy.default,)),
    (Scatters("slices", "source", adds=True), (aten.index_add.default,)),
    (Scatters("slices", "values"), (aten.index_put.default,)),
    (Scatters("slices", "src"), (aten.slice_scatter.default, aten.select_scatter.default)),
    (Scatters("elements", "src"), (aten.scatter.src,)),
    (Scatters("elements", "src", adds=True), (aten.scatter_add.default,)),
    (Scatters("elements", None), (aten.scatter.value,)),
    (Pads(None), (aten.constant_pad_nd.default, aten.pad.default)),
    (
        ReadsShape(),
        (
            *(aten.sym_size.int, aten.sym_numel.default, aten.new_empty.default, aten.empty_like.default),
            *(aten.full.default, aten.full_like.default, aten.new_full.default, aten.arange.default),
            *(aten.arange.start, aten.arange.start_step, aten.empty.memory_format, aten.scalar_tensor.default),
            *(aten.eye.default, aten.eye.m, aten.fill.Scalar),
        ),
    ),
    (ReadsShape(0.0), (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)),
    (ReadsShape(1.0), (aten.ones.default, aten.ones_like.default, aten.new_ones.default)),
    (_Drops(Homogeneous()), (aten.dropout.default, aten.feature_dropout.default)),
    (_Drops(Opaque()), (aten.alpha_dropout.default, aten.feature_alpha_dropout.default)),
)
EFFECTS: Final[Mapping[Any, _Row]] = {target: row for row, targets in _ROWS for target in targets}
assert len(EFFECTS) == sum(len(targets) for _, targets in _ROWS), "an op has two effects"


def effect(op: Op) -> Effect:
    """The effect of the op, with its own arguments: a dropout in evaluation copies, say."""
    if op.node.op == "call_module":
        return Observes()
    target = op.node.target
    row = EFFECTS.get(target)
    match row:
        case None:
            tags = target.tags if isinstance(target, OpOverload) else ()
            is_pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
            return Elementwise() if is_pointwise else Opaque()
        case _Drops(training):
            return training if op.argument("train") else Copies()
        case Pads():
            by_mode = target == aten.pad.default and op.argument("mode") != "constant"
            return Pads(None if by_mode else float(op.argument("value") or 0))
        case Scatters() if target == aten.index_put.default:
            return replace(row, adds=bool(op.argument("accumulate")))
        case Normalizes() if target == aten.batch_norm.default and op.argument("training"):
            return Normalizes(row.axis, "batch")
        case Reduces() if target == aten.linalg_vector_norm.default and op.argument("ord") == 0:
            return Reduces("other")  # how many are not 0
        case _:
            return row


def axes_of(op: Op) -> tuple[int, ...]:
    """The axes that an op reduces, or mixes, counted from 0."""
    rank = view(op.node.all_input_nodes[0]).val.dim()
    names = [argument.name for argument in cast(Any, op.node.target)._schema.arguments]
    given = op.argument("dim") if "dim" in names else op.argument("dims") if "dims" in names else None
    dims = [given] if isinstance(given, int) else list(given or range(rank))
    return tuple(int(dim) % max(rank, 1) for dim in dims)


def channel_axis(op: Op) -> int:
    """The axis of the channels in what an op gives: a convolution's, a norm's; the last of all others."""
    if isinstance(op, Weighted):
        return op.output_axis
    match effect(op):
        case Normalizes(axis):
            return axis
        case Pools(rank) | Convolves(rank):
            return -1 - rank
        case _:
            return -1
