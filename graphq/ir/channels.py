"""Where a tensor's channels come from and go to: what a positive factor for each channel can move through.

Labels number the channels of a producer. A ``Flow`` follows them forward through the graph by running its shape ops on
small tensors of labels, so that views, transposes, splits, repeats of heads and attention need no rules of their own. A
label goes no further where an op would not commute with a factor; all paths of what is left end in weights that can
take the factor up. -1 labels what has no factor.
"""

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.effect_table import effect
from graphq.ir.effects import (
    Adds,
    Attends,
    Contracts,
    Copies,
    Gathers,
    Homogeneous,
    Joins,
    Moves,
    Normalizes,
    Pads,
    Pools,
    Reduces,
    Scales,
    Stopped,
)
from graphq.ir.index import GraphIndex
from graphq.ir.labels import NONE, LabelledParam, Reader, Walk
from graphq.ir.matrices import output_channels
from graphq.ir.views import Cast, GroupedLinear, Op, Param, Recurrence, TransposedLinear, Weighted, view
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
    produced: tuple[LabelledParam, ...]
    readers: tuple[Reader, ...]


@final
class Flows:
    """The flows of a graph as it was when this was made; each is found once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.index = GraphIndex(gm)
        self._found: dict[Op, Flow | Stopped] = {}

    def out_of(self, producer: Op) -> Flow | Stopped:
        """What becomes of the channels of ``producer``, or why no factor can move out of it."""
        if producer not in self._found:
            self._found[producer] = _flow(self.index, producer)
        return self._found[producer]

    def into(self, op: Weighted) -> Flow | Stopped:
        """The flow that ends in the weight of ``op``, from the nearest producer whose factors get there."""
        reasons: list[str] = []
        for producer in producers_behind(op.input_op):
            found = self.out_of(producer)
            if isinstance(found, Flow) and any(reader.op == op for reader in found.readers):
                return found
            name = producer.node.name
            reasons.append(f"{name}: {found.reason}" if isinstance(found, Stopped) else name)
        return Stopped("; ".join(reasons) or "nothing that makes it has weights a factor could move to")


def _flow(index: GraphIndex, producer: Op) -> Flow | Stopped:
    own = _parameters_of(index, producer)
    if isinstance(own, Stopped):
        return own
    parts, count = own
    moved = torch.ones(count, dtype=torch.bool)
    reason = "nothing reads it"
    while moved.any():
        walk = Walk(index, moved)
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
        made = tuple(LabelledParam(part.fqn, _relabel(part.labels, keep), part.plus) for part in (*parts, *walk.added))
        return Flow(producer, count, moved, made, tuple(walk.readers))
    return Stopped(reason)


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
    way = _way(producer, op.input_op)
    if any(isinstance(effect(step), Attends | Contracts) for step in way):
        return "ov"
    products = [step.node.all_input_nodes for step in way if effect(step) == Scales()]
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
    return isinstance(op, Weighted) or _gain_of(op) is not None or isinstance(effect(op), Normalizes)


def _behind(op: Op) -> list[fx.Node]:
    """What the channels of ``op`` may come from: the operands that a factor goes through."""
    match effect(op):
        case Attends():
            return [op.argument("value")]
        case Contracts():
            return op.node.all_input_nodes[1:]
        case Scales(divides=False) | Adds() | Joins(new=False):
            return op.node.all_input_nodes
        case Scales() | Moves() | Copies() | Homogeneous() | Pools() | Gathers("slices") | Pads():
            return op.node.all_input_nodes[:1]
        case Reduces("linear" | "homogeneous"):
            return op.node.all_input_nodes[:1]
        case _:
            return []


# -- producers


def _parameters_of(index: GraphIndex, op: Op) -> tuple[tuple[LabelledParam, ...], int] | Stopped:
    """The parameters that the channels of a producer come from, with labels, and the number of channels."""
    if isinstance(op, Weighted):
        return _rows_of(index, op)
    match effect(op):
        case Normalizes(parameters=names):
            held = [view(op.argument(name)) for name in names if op.argument(name) is not None]
            if op.argument("weight") is None:
                return Stopped(f"{op.node.name} has no gain")
            params = [param for param in held if isinstance(param, Param) and index.is_own(param)]
            if len(params) != len(held):
                return Stopped(f"the gain of {op.node.name} has other readers")
            if len(set(params)) < len(params):
                return Stopped(f"the gain of {op.node.name} is its bias, too")
            if params[0].val.dim() != 1:
                return Stopped(f"{op.node.name} has no gain by channel")
            count = int(params[0].val.numel())
            return tuple(LabelledParam(param.fqn, torch.arange(count)) for param in params), count
        case _:
            pass
    gain = _gain_of(op)
    if gain is None:
        return Stopped(f"{op.node.target} has no weights of its own")
    param, plus, way = gain
    if not all(len(node.users) == 1 for node in way) or not index.is_own(param):
        return Stopped(f"{param.fqn} has other readers")
    labels = torch.arange(int(param.val.numel())).view(tuple(param.val.shape))
    return (LabelledParam(param.fqn, labels, plus),), labels.numel()


def _rows_of(index: GraphIndex, op: Weighted) -> tuple[tuple[LabelledParam, ...], int] | Stopped:
    """The rows of a linear or convolution."""
    param = op.weight_op
    if isinstance(op, Recurrence):
        return Stopped(f"{op.node.name} gives states, step by step")
    if not isinstance(param, Param) or not op.is_product:
        return Stopped(f"the weight of {op.node.name} is no parameter that it alone has")
    if not index.is_own(param):
        return Stopped(f"{param.fqn} has other readers")
    labels = output_channels(op)
    count = int(op.val.shape[op.output_axis])
    parts = [LabelledParam(param.fqn, labels)]
    name = "self" if isinstance(op, TransposedLinear) else "bias"
    bias = None if isinstance(op, GroupedLinear) else op.argument(name)
    if bias is not None:
        held = view(bias)
        if not isinstance(held, Param) or not index.is_own(held) or tuple(held.val.shape) != (count,):
            return Stopped(f"the bias of {op.node.name} is no parameter that it alone has")
        parts.append(LabelledParam(held.fqn, torch.arange(count)))
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


def move_factors(index: GraphIndex, flow: Flow, factors: Tensor, by: str) -> int:
    """The producer's channels are divided by ``factors``, which its readers' weights take up; how many tensors changed.

    ``factors``: one for each label, positive. The function of the graph stays.
    """
    changes = [(part, 1 / factors.double()) for part in flow.produced]
    changes += [(reader.weight, factors) for reader in flow.readers]
    for part, own in changes:
        change = partial(part.times, factor=own)
        edit.set_param(index.gm, part.fqn, change, by, index.reads(part.fqn))
    return len(flow.produced) + len(flow.readers)
