"""Ops that a consumer lacks, spelled by those that it runs in integers: attention, SiLU, rolls, repeats, some norms."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir import edit
from graphq.ir.effect_table import effect
from graphq.ir.effects import Adds, Copies, Moves, ReadsShape
from graphq.ir.op_kinds import kind_of
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.units import module_of
from graphq.ir.views import Linear, Op, Param, ops_of, view
from graphq.observers.grids import BELOW, HIDES
from graphq.spec.profile import LINEAR, Profile
from graphq.state import tensor_of

aten = torch.ops.aten
_VIEWS: Final = (aten.view.default, aten._unsafe_view.default)


@final
@dataclass(frozen=True)
class Decompose(Pass):
    """Every op that ``profile`` has no row for, and whose parts it always quantizes, stands as its parts.

    Attention is softmax(query * scale @ key^T + mask) @ value (Vaswani et al., arXiv 1706.03762, equation 1), heads of
    grouped queries repeated; SiLU is x * sigmoid(x); a roll joins two slices; a norm of groups of one channel is one of
    instances; a batch norm that no layer takes up scales and shifts channels; a stack joins what has an axis more. An
    attention that drops at random stays.
    Where the consumer wants linears as Gemm, and everything in integers, a linear of more or fewer axes than two
    multiplies rows, between two reshapes: what is quantized is then what the Gemm reads and gives.
    Where it wants everything in integers, an axis of size 1 that is repeated along a new axis beside it, with which it
    is then joined (one head of keys for all queries), is itself repeated: QNN 2.7 gives other elements where the batch
    is 1.
    """

    profile: Profile
    name: ClassVar[str] = "decompose"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            kind = kind_of(op)
            found = _DECOMPOSITIONS.get(kind)
            if kind == LINEAR and self.profile.linear == "gemm" and self.profile.whole:
                found = ((LINEAR, "Reshape"), _rows) if isinstance(op, Linear) and op.input.val.dim() != 2 else None
            elif kind == "Reshape" and self.profile.whole:
                found = (("Expand",), _repeated_axis)
            elif kind in self.profile.ops:
                continue
            if found is None:
                continue
            parts, make = found
            rules = [self.profile.ops.get(part) for part in parts]
            if not all(rule is not None and rule.placed == "always" for rule in rules):
                continue
            made = make(gm, op, self.name)
            if made is not None:
                edit.bypass(gm, op, made)
                count += 1
        if count:
            self._allow_layouts(gm)
            edit.drop_unused(gm)
        return count

    def _allow_layouts(self, gm: fx.GraphModule) -> None:
        """Views are reshapes: parts lay out what they give otherwise than the whole did, which a view may not stand."""
        for op in ops_of(gm):
            if op.node.target in _VIEWS:
                edit.replace(gm, op, aten.reshape.default, *op.node.args, by=self.name)


def attention_parts(gm: fx.GraphModule, op: Op, by: str) -> Op | None:
    """What gives the same as an attention: weights of a softmax times values. None where it drops at random."""
    if op.argument("dropout_p"):
        return None
    query, key, value, mask = (_operand(op, name) for name in ("query", "key", "value", "attn_mask"))
    assert query is not None and key is not None and value is not None  # noqa: PT018 - what its schema says

    def insert(target: Callable[..., Any], *args: Any) -> Op:
        return edit.insert(gm, op, target, *args, by=by, like=op)

    if op.argument("enable_gqa"):
        times = int(query.val.shape[-3]) // int(key.val.shape[-3])
        if times > 1:
            key, value = (_repeated(gm, op, by, x, times, x.val.dim() - 3) for x in (key, value))
    width = int(query.val.shape[-1])
    scale = op.argument("scale")
    scaled = insert(aten.mul.Tensor, query, 1 / math.sqrt(width) if scale is None else float(scale))
    scores = insert(aten.matmul.default, scaled, insert(aten.transpose.int, key, -2, -1))
    if op.argument("is_causal"):
        sizes = [insert(aten.sym_size.int, x, -2) for x in (query, key)]
        ones = edit.insert(
            gm, op, aten.ones.default, sizes, by=by, like=op, options={"dtype": torch.bool, "device": query.val.device}
        )
        mask = insert(aten.tril.default, ones)
    if mask is not None and not is_true_throughout(mask):
        if mask.val.dtype == torch.bool:
            hidden = insert(aten.bitwise_not.default, mask)
            number = edit.insert(
                gm, op, aten._to_copy.default, hidden, by=by, like=op, options={"dtype": scores.val.dtype}
            )
            holds = torch.finfo(scores.val.dtype).min <= HIDES  # float16 does not
            mask = insert(aten.mul.Tensor, number, HIDES if holds else -BELOW)
        scores = insert(aten.add.Tensor, scores, mask)
    return insert(aten.matmul.default, insert(aten.softmax.int, scores, -1), value)


def _repeat_interleave(gm: fx.GraphModule, op: Op, by: str) -> Op | None:
    x, axis = _operand(op, "self"), op.argument("dim")
    if x is None or axis is None:
        return None
    return _repeated(gm, op, by, x, int(op.argument("repeats")), axis % x.val.dim())


def _repeated(gm: fx.GraphModule, op: Op, by: str, x: Op, times: int, axis: int) -> Op:
    """Each index of an axis ``times`` times in a row."""

    def insert(target: Callable[..., Any], *args: Any) -> Op:
        return edit.insert(gm, op, target, *args, by=by, like=op)

    kept = [-1] * x.val.dim()
    if statically_known_true(x.val.shape[axis] == 1):
        return insert(aten.expand.default, x, [*kept[:axis], times, *kept[axis + 1 :]])
    single = insert(aten.unsqueeze.default, x, axis + 1)
    wide = insert(aten.expand.default, single, [*kept[: axis + 1], times, *kept[axis + 1 :]])
    sizes = [int(s) if isinstance(s, int) else insert(aten.sym_size.int, x, i) for i, s in enumerate(x.val.shape)]
    return insert(aten.reshape.default, wide, [*sizes[:axis], -1, *sizes[axis + 1 :]])


def _repeated_axis(gm: fx.GraphModule, op: Op, by: str) -> Op | None:
    """What is repeated along a new axis beside one of size 1, and reshaped so that both are one, is repeated along that
    one.
    """
    wide = view(op.node.all_input_nodes[0])
    single = _operand(wide, "self") if wide.node.target is aten.expand.default else None
    if single is None or single.node.target is not aten.unsqueeze.default:
        return None
    x, rank = _operand(single, "self"), wide.val.dim()
    new = int(single.argument("dim")) % rank
    for gone in (new - 1, new + 1):
        rest = [axis for axis in range(rank) if axis != gone]
        is_of_one = 0 <= gone < rank and statically_known_true(single.val.shape[gone] == 1)
        if not is_of_one or op.val.dim() != len(rest):
            continue
        made = zip(rest, op.val.shape, strict=True)
        if all(statically_known_true(wide.val.shape[axis] == size) for axis, size in made):
            sizes = [view(s) if isinstance(s, fx.Node) else s for s in wide.argument("size")]
            return edit.insert(gm, op, aten.expand.default, x, [sizes[axis] for axis in rest], by=by, like=op)
    return None


def is_true_throughout(op: Op) -> bool:
    """Whether all elements of a tensor of booleans are known to be true, whatever the sizes: proved from ones, and from
    integers that are compared with less than the least of them.
    """
    node = op.node
    match effect(op):
        case Copies() | Moves():
            return op.val.dtype == torch.bool and is_true_throughout(view(node.all_input_nodes[0]))
        case ReadsShape(value):
            return op.val.dtype == torch.bool and value == 1.0
        case _:
            pass
    if node.target in (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default):
        return all(isinstance(one, fx.Node) and is_true_throughout(view(one)) for one in node.args)
    if node.target is aten.ge.Scalar:
        least = _least(_operand(op, "self"))
        return least is not None and least >= float(op.argument("other"))
    return False


def _least(op: Op | None) -> float | None:
    """What no element of a tensor of integers is below, where that is known."""
    if op is None or op.val.dtype not in (torch.int32, torch.int64):  # narrower ones may overflow
        return None
    if op.node.target is aten.arange.default:
        return 0.0
    match effect(op):
        case Copies() | Moves():
            return _least(view(op.node.all_input_nodes[0]))
        case Adds() if op.node.target is aten.add.Tensor and isinstance(op.argument("other"), int):
            least = _least(_operand(op, "self"))
            return None if least is None else least + float(op.argument("other") * op.argument("alpha"))
        case _:
            return None


def _silu(gm: fx.GraphModule, op: Op, by: str) -> Op:
    x = _operand(op, "self")
    gate = edit.insert(gm, op, aten.sigmoid.default, x, by=by, like=op)
    return edit.insert(gm, op, aten.mul.Tensor, x, gate, by=by, like=op)


def _roll(gm: fx.GraphModule, op: Op, by: str) -> Op | None:
    """Along each axis the end before the beginning; not without axes, nor along one of unknown size."""
    made = _operand(op, "self")
    shifts, dims = op.argument("shifts"), op.argument("dims")
    assert made is not None
    if not dims or not all(isinstance(made.val.shape[dim], int) for dim in dims):
        return None
    for shift, dim in zip(shifts, dims, strict=True):
        size = int(made.val.shape[dim])
        first = size - shift % size
        if first < size:
            parts = [
                edit.insert(gm, op, aten.slice.Tensor, made, dim, low, high, by=by, like=op)
                for low, high in ((first, size), (0, first))
            ]
            made = edit.insert(gm, op, aten.cat.default, parts, dim, by=by, like=op)
    return made


def _group_norm(gm: fx.GraphModule, op: Op, by: str) -> Op | None:
    """Groups of one channel are instances."""
    x = _operand(op, "input")
    assert x is not None
    if int(op.argument("num_groups")) != x.val.shape[1] or op.argument("weight") is None:
        return None
    parameters = (op.argument("weight"), op.argument("bias"), None, None)
    return edit.insert(
        gm, op, aten.instance_norm.default, x, *parameters, True, 0.0, op.argument("eps"), False, by=by, like=op
    )


def _batch_norm(gm: fx.GraphModule, op: Op, by: str) -> Op | None:
    """A factor and a shift for each channel, where all its numbers are held."""
    x = _operand(op, "input")
    parts = [_operand(op, name) for name in ("weight", "bias", "running_mean", "running_var")]
    if x is None or op.argument("training") or any(not isinstance(part, Param) for part in parts):
        return None
    gain, bias, mean, var = (tensor_of(gm, part.fqn).detach().double() for part in parts if isinstance(part, Param))
    factor = gain * (var + float(op.argument("eps"))).rsqrt()
    path = edit.free_path(gm, module_of(op) or "norm", ("factor", "shift"))
    shape = [-1, *[1] * (x.val.dim() - 2)]
    held = [
        edit.add_tensor(gm, op, f"{path}.{name}", value.view(shape).to(x.val.dtype), by=by, like=op)
        for name, value in (("factor", factor), ("shift", bias - mean * factor))
    ]
    scaled = edit.insert(gm, op, aten.mul.Tensor, x, held[0], by=by, like=op)
    return edit.insert(gm, op, aten.add.Tensor, scaled, held[1], by=by, like=op)


def _rows(gm: fx.GraphModule, op: Op, by: str) -> Op:
    x = _operand(op, "input")
    assert x is not None
    sizes = [
        int(s) if isinstance(s, int) else edit.insert(gm, op, aten.sym_size.int, x, i, by=by, like=op)
        for i, s in enumerate(x.val.shape[:-1])
    ]
    width, outputs = int(x.val.shape[-1]), int(op.val.shape[-1])
    rows = edit.insert(gm, op, aten.reshape.default, x, [-1, width], by=by, like=op)
    rest = [op.argument("weight"), op.argument("bias")]
    made = edit.insert(gm, op, aten.linear.default, rows, *rest, by=by, like=op)
    return edit.insert(gm, op, aten.reshape.default, made, [*sizes, outputs], by=by, like=op)


def _stack(gm: fx.GraphModule, op: Op, by: str) -> Op:
    axis = int(op.argument("dim")) % op.val.dim()
    parts = [edit.insert(gm, op, aten.unsqueeze.default, view(x), axis, by=by, like=op) for x in op.argument("tensors")]
    return edit.insert(gm, op, aten.cat.default, parts, axis, by=by, like=op) if len(parts) > 1 else parts[0]


def _operand(op: Op, name: str) -> Op | None:
    given = op.argument(name)
    return None if given is None else view(given)


# The kinds that an op falls into, and what spells it so.
_DECOMPOSITIONS: Final[Mapping[str, tuple[tuple[str, ...], Callable[[fx.GraphModule, Op, str], Op | None]]]] = {
    "Attention": (("MatMul", "Mul", "Add", "Softmax"), attention_parts),
    "Silu": (("Sigmoid", "Mul"), _silu),
    "roll": (("Slice", "Concat"), _roll),
    "repeat_interleave": (("Unsqueeze", "Expand", "Reshape"), _repeat_interleave),
    "stack": (("Unsqueeze", "Concat"), _stack),
    "BatchNormalization": (("Mul", "Add"), _batch_norm),
    "GroupNormalization": (("InstanceNormalization",), _group_norm),
}
PARTS: Final = {kind: parts for kind, (parts, _) in _DECOMPOSITIONS.items()}
