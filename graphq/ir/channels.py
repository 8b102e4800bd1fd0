"""Where a tensor's channels come from and go to: what a positive factor for each channel can move through.

Labels number the channels of a producer. A ``Flow`` follows them forward through the graph by running its shape ops on
small tensors of labels, so that views, transposes, splits, repeats of heads and attention need no rules of their own. A
label goes no further where an op would not commute with a factor; all paths of what is left end in weights that can
take the factor up. -1 labels what has no factor.
"""

from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.labels import (
    EVEN,
    FIRST,
    NONE,
    NORMS,
    POOLS,
    SDPA,
    SHAPES,
    Part,
    Reader,
    Walk,
    is_own,
)
from graphq.ir.views import Cast, GroupedLinear, Op, Param, TransposedLinear, Weighted, view
from graphq.spec.folds import Subgraph

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class Flow:
    """A producer whose channels can be divided by factors that ``readers`` take up; ``count`` labels in all.

    ``moved``: the labels that have such factors. The others must have factor 1.
    """

    producer: Op
    count: int
    moved: Tensor
    produced: tuple[Part, ...]
    readers: tuple[Reader, ...]


@final
@dataclass(frozen=True)
class Blocked:
    """Why no factor can move out of a producer."""

    reason: str


def flow_from(gm: fx.GraphModule, producer: Op) -> Flow | Blocked:
    """What becomes of the channels of ``producer``."""
    own = _parts_of(gm, producer)
    if isinstance(own, Blocked):
        return own
    parts, count = own
    moved = torch.ones(count, dtype=torch.bool)
    reason = "nothing reads it"
    while moved.any():
        walk = Walk(gm, moved)
        walk.go(producer)
        if walk.stopped:
            labels = torch.cat([labels.flatten() for labels, _ in walk.stopped])
            reason = walk.stopped[0][1]
            moved[labels[labels != NONE].unique()] = False
            continue
        if not walk.readers:
            break
        reached = torch.zeros_like(moved)
        for reader in walk.readers:
            reached[reader.channels[reader.channels != NONE]] = True
        if not torch.equal(reached, moved):
            moved &= reached
            continue
        keep = torch.where(moved, torch.arange(count), NONE)
        made = tuple(Part(part.fqn, _relabel(part.labels, keep), part.plus) for part in (*parts, *walk.added))
        return Flow(producer, count, moved, made, tuple(walk.readers))
    return Blocked(reason)


def flow_into(gm: fx.GraphModule, op: Weighted) -> Flow | Blocked:
    """The flow that ends in the weight of ``op``, from the nearest producer whose factors get there."""
    reasons: list[str] = []
    for producer in producers_behind(op.input_op):
        found = flow_from(gm, producer)
        if isinstance(found, Flow) and any(reader.op == op for reader in found.readers):
            return found
        reasons.append(f"{producer.node.name}: {found.reason}" if isinstance(found, Blocked) else producer.node.name)
    return Blocked("; ".join(reasons) or "nothing that makes it has weights a factor could move to")


def producers_behind(x: Op) -> list[Op]:
    """The nodes that may have made the channels of ``x``, nearest first."""
    found: list[Op] = []
    pending, seen = [x], set[Op]()
    while pending:
        op = pending.pop(0)
        if op in seen:
            continue
        seen.add(op)
        if _is_producer(op):
            found.append(op)
        else:
            pending += [view(node) for node in _behind(op)]
    return found


def subgraph_of(producer: Op, op: Weighted) -> Subgraph:
    """What kind of subgraph the channels go through from ``producer`` to the input of ``op``."""
    if not isinstance(producer, Weighted):
        return "norm-linear"
    way = [step.node for step in _way(producer, op.input_op)]
    if any(node.target in (SDPA, aten.matmul.default, aten.bmm.default) for node in way):
        return "ov"
    products = [node.all_input_nodes for node in way if node.target == aten.mul.Tensor]
    if any(len(factors) == 2 and not any(isinstance(view(x), Param) for x in factors) for factors in products):
        return "up-down"
    return "linear-linear"


def _way(producer: Op, x: Op) -> list[Op]:
    """The ops that a producer's channels go through until they are those of ``x``, which is one of them."""
    readers: dict[Op, list[Op]] = {}
    pending, seen = [x], {x}
    while pending:
        op = pending.pop()
        for behind in () if _is_producer(op) else map(view, _behind(op)):
            readers.setdefault(behind, []).append(op)
            if behind not in seen:
                seen.add(behind)
                pending.append(behind)
    found: dict[Op, None] = {}
    pending = [producer]
    while pending:
        for reader in readers.get(pending.pop(), ()):
            if reader not in found:
                found[reader] = None
                pending.append(reader)
    return list(found)


def _is_producer(op: Op) -> bool:
    return isinstance(op, Weighted) or _gain_of(op) is not None or op.node.target in NORMS


def _behind(op: Op) -> list[fx.Node]:
    """What the channels of ``op`` may come from: the operands that a factor goes through."""
    target = op.node.target
    if target == SDPA:
        return [op.argument("value")]
    if target in (aten.matmul.default, aten.bmm.default):
        return op.node.all_input_nodes[1:]
    if target in (aten.mul.Tensor, aten.add.Tensor, aten.cat.default):
        return op.node.all_input_nodes
    if target in SHAPES | EVEN | POOLS | FIRST:
        return op.node.all_input_nodes[:1]
    return []


# -- producers


def _parts_of(gm: fx.GraphModule, op: Op) -> tuple[tuple[Part, ...], int] | Blocked:
    """The parameters that the channels of a producer come from, with labels, and the number of channels."""
    if isinstance(op, Weighted):
        return _rows_of(gm, op)
    if op.node.target in NORMS:
        params = [view(op.argument(name)) for name in ("weight", "bias") if op.argument(name) is not None]
        if op.argument("weight") is None:
            return Blocked(f"{op.node.name} has no gain")
        if not all(isinstance(p, Param) and is_own(gm, p) for p in params):
            return Blocked(f"the gain of {op.node.name} has other readers")
        if params[0].val.dim() != 1:
            return Blocked(f"{op.node.name} has no gain by channel")
        count = int(params[0].val.numel())
        return tuple(Part(cast(Param, p).fqn, torch.arange(count)) for p in params), count
    gain = _gain_of(op)
    if gain is None:
        return Blocked(f"{op.node.target} has no weights of its own")
    param, plus, way = gain
    if not all(len(node.users) == 1 for node in way) or not is_own(gm, param):
        return Blocked(f"{param.fqn} has other readers")
    labels = torch.arange(int(param.val.numel())).view(tuple(param.val.shape))
    return (Part(param.fqn, labels, plus),), labels.numel()


def _rows_of(gm: fx.GraphModule, op: Weighted) -> tuple[tuple[Part, ...], int] | Blocked:
    """The rows of a linear or convolution."""
    param = op.weight_op
    if not isinstance(param, Param) or op.node.target == aten.embedding.default:
        return Blocked(f"the weight of {op.node.name} is no parameter that it alone has")
    if not is_own(gm, param):
        return Blocked(f"{param.fqn} has other readers")
    shape = tuple(param.val.shape)
    count = int(shape[op.out_axis])
    labels = torch.arange(count).view([count if axis == op.out_axis else 1 for axis in range(len(shape))])
    parts = [Part(param.fqn, labels.expand(shape))]
    name = "self" if isinstance(op, TransposedLinear) else "bias"
    bias = None if isinstance(op, GroupedLinear) else op.argument(name)
    if bias is not None:
        held = view(bias)
        if not isinstance(held, Param) or not is_own(gm, held) or tuple(held.val.shape) != (count,):
            return Blocked(f"the bias of {op.node.name} is no parameter that it alone has")
        parts.append(Part(held.fqn, torch.arange(count)))
    return tuple(parts), count


def _gain_of(op: Op) -> tuple[Param, float, tuple[fx.Node, ...]] | None:
    """The parameter that a product multiplies the last axis by, what is added to it before, and the nodes between."""
    if op.node.target != aten.mul.Tensor:
        return None
    for name in ("self", "other"):
        node = op.argument(name)
        if not isinstance(node, fx.Node):
            continue
        way, plus, seen = [], 0.0, view(node)
        while not isinstance(seen, Param):
            if isinstance(seen, Cast) and seen.val.is_floating_point():
                step = seen.node.all_input_nodes[0]
            elif seen.node.target == aten.add.Tensor and isinstance(seen.argument("other"), int | float) and not plus:
                plus, step = float(seen.argument("other")) * float(seen.argument("alpha")), seen.argument("self")
            else:
                break
            way.append(seen.node)
            seen = view(step)
        if isinstance(seen, Param) and seen.val.is_floating_point() and _runs_along_last(seen, op):
            return seen, plus, tuple(way)
    return None


def _runs_along_last(param: Param, op: Op) -> bool:
    shape = tuple(param.val.shape)
    return bool(shape) and shape[-1] == op.val.shape[-1] and shape[-1] == param.val.numel() and shape[-1] > 1


def _relabel(labels: Tensor, keep: Tensor) -> Tensor:
    """``labels`` with those that have no factor as -1."""
    return torch.cat([keep, keep.new_full((1,), NONE)])[labels]


def move_factors(gm: fx.GraphModule, flow: Flow, factors: Tensor, by: str) -> int:
    """The producer's channels are divided by ``factors``, which its readers' weights take up; how many tensors changed.

    ``factors``: one for each label, positive. The function of the graph stays.
    """
    for part in flow.produced:
        edit.set_param(gm, part.fqn, lambda w, part=part: part.times(w, 1 / factors.double()), by)
    for reader in flow.readers:
        edit.set_param(gm, reader.weight.fqn, lambda w, part=reader.weight: part.times(w, factors), by)
    return len(flow.produced) + len(flow.readers)
