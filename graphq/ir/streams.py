"""Streams: all values and parameters of a graph that one change of basis of their last axis must reach together.

A residual stream is one: what embeddings and linears write, residual adds sum, norms scale row by row, and linears
read. The values of an attention's heads are another. Followed along the edges alone, both ways, from any value in it.
"""

from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, fx

from graphq.ir.effect_table import effect
from graphq.ir.effects import (
    Adds,
    Attends,
    Carried,
    Contracts,
    Copies,
    Moves,
    Normalizes,
    ReadsShape,
    Stopped,
)
from graphq.ir.index import GraphIndex
from graphq.ir.layers import weight_param
from graphq.ir.vectors import (
    carried,
    constant,
    cut_of,
    gain_of,
    is_mean_of_rows,
    is_square,
    op_name,
    params_of,
    place,
    times_read,
    width,
)
from graphq.ir.views import (
    Embedding,
    GroupedLinear,
    Input,
    Linear,
    Op,
    Param,
    TransposedLinear,
    Weighted,
    ops_of,
    view,
)

aten = torch.ops.aten
AxisSlice = tuple[int, int, int]  # (period, offset, length)


@final
@dataclass(frozen=True)
class Axis:
    """An axis of a parameter that carries a stream; of each ``period`` numbers along it only some, if ``part`` is set.

    ``writes``: whether the stream comes from the parameter, and is not read by it.
    """

    fqn: str
    axis: int
    writes: bool
    part: AxisSlice | None = None


@final
@dataclass(frozen=True)
class Stream:
    """A closed stream of vectors of ``size`` numbers. ``blocks``: why no change of basis leaves the function alone."""

    size: int
    members: tuple[Op, ...]  # in graph order
    axes: tuple[Axis, ...]
    writers: tuple[Weighted, ...]
    readers: tuple[Weighted, ...]
    norms: tuple[Op, ...]  # layer norms, which no rotation leaves alone
    joins: tuple[Op, ...]  # sums of two computed values: residual adds
    inputs: tuple[Input, ...]
    outputs: tuple[Op, ...]
    blocks: tuple[str, ...]


def trace(index: GraphIndex, seed: Op, size: int) -> Stream:
    """The stream that ``seed`` is in; every last axis in it is a multiple of ``size``."""
    walk = _Walk(index, size)
    walk.join(seed)
    walk.close()
    members = sorted(walk.members, key=lambda op: op.node)  # in graph order
    axes = dict.fromkeys(axis for uses in walk.uses.values() for found in uses.values() for axis in found)
    return Stream(
        size,
        members=tuple(members),
        axes=tuple(axes),
        writers=tuple(walk.writers),
        readers=tuple(walk.readers),
        norms=tuple(op for op in members if op in walk.norms),
        joins=tuple(op for op in members if op in walk.joins),
        inputs=tuple(walk.inputs),
        outputs=tuple(walk.outputs),
        blocks=tuple(sorted(walk.blocks, key=lambda why: walk.blocks[why].node)),
    )


def residual_streams(index: GraphIndex) -> list[Stream]:
    """The streams that linears write to and read, and in which computed values are summed."""
    found: list[Stream] = []
    seen = set[Op]()
    for op in ops_of(index.gm):
        if isinstance(op, Linear | TransposedLinear | GroupedLinear) and op.input_op not in seen:
            size = width(op.input_op)
            if size is not None and size > 1:
                stream = trace(index, op.input_op, size)
                seen.update(stream.members)
                found += [stream] if stream.joins and stream.writers else []
    return found


def value_streams(index: GraphIndex) -> list[Stream]:
    """The streams of the values of attentions: those that a product with a softmax, or a fused one, sums."""
    found: list[Stream] = []
    seen = set[Op]()
    for op in ops_of(index.gm):
        if isinstance(effect(op), Attends) or (isinstance(effect(op), Contracts) and _is_of_softmax(op)):
            size = width(op)
            if op not in seen and size is not None and size > 1:
                found.append(trace(index, op, size))
                seen.update(found[-1].members)
    return found


def _is_of_softmax(op: Op) -> bool:
    seen = view(cast(fx.Node, op.node.args[0]))
    while effect(seen) in (Copies(), Moves("reshape"), Moves("repeat")):
        seen = view(seen.node.all_input_nodes[0])
    return seen.node.target in (aten.softmax.int, aten._softmax.default)


@final
class _Walk:
    """What is found on the way; every op is met once as a value, and once for each value it reads."""

    def __init__(self, index: GraphIndex, size: int) -> None:
        self.index, self.size = index, size
        self.members: dict[Op, None] = {}
        self.pending: list[Op] = []
        self.uses: dict[str, dict[fx.Node, dict[Axis, None]]] = {}
        self.writers: dict[Weighted, None] = {}
        self.readers: dict[Weighted, None] = {}
        self.norms, self.joins = set[Op](), set[Op]()
        self.inputs: list[Input] = []
        self.outputs: list[Op] = []
        self.blocks: dict[str, Op] = {}

    def block(self, op: Op, why: str) -> None:
        self.blocks.setdefault(f"{place(op)}: {why}", op)

    def join(self, op: Op) -> None:
        if op not in self.members:
            self.members[op] = None
            self.pending.append(op)

    def close(self) -> None:
        while self.pending:
            op = self.pending.pop()
            self.produced(op)
            for user in op.users:
                self.read(op, user)
        for fqn, uses in self.uses.items():
            why = self.index.why_shared(fqn, set(uses))
            if why is None and len({frozenset(axes) for axes in uses.values()}) > 1:
                why = f"{fqn}: it is read in several ways"
            if why is not None:
                self.blocks[why] = view(next(iter(uses)))

    def touch(self, user: Op, param: Op | None, axis: int, writes: bool, part: AxisSlice | None = None) -> None:
        """The parameter's axis carries the stream where ``user`` reads it."""
        if isinstance(param, Param):
            self.uses.setdefault(param.fqn, {}).setdefault(user.node, {})[Axis(param.fqn, axis, writes, part)] = None
        else:
            self.block(user, "its weight or bias is computed")

    def produced(self, op: Op) -> None:
        match carried(op, self.size):
            case Carried(sources):
                if isinstance(effect(op), Normalizes):
                    self.norm(op)
                elif isinstance(effect(op), Adds) and not any(isinstance(part, Param) for part in sources):
                    self.joins.add(op)
                for source in sources:
                    self.join(source)
            case Stopped():
                self.made(op)

    def made(self, op: Op) -> None:
        """What the stream holds is made by an op that reads other values than the stream's."""
        if isinstance(op, Weighted):
            self.written(op)
        elif isinstance(op, Input):
            self.inputs.append(op)
        elif isinstance(op, Param):
            pass  # its readers say how it is used
        elif (cut := cut_of(op)) is not None:
            self.cut(op, *cut)
        elif (gain := gain_of(self.index.gm, op)) is not None:
            self.scaled(*gain)
        else:
            self.block(op, f"{op_name(op)} makes what the stream holds")

    def read(self, x: Op, user: Op) -> None:
        found = carried(user, self.size)
        sources = found.value if isinstance(found, Carried) else []
        if user.node.op == "output":
            self.outputs.append(x)
        elif isinstance(effect(user), ReadsShape) or isinstance(user.val, torch.SymInt):
            pass
        elif is_square(user, x):
            if not user.users or not all(is_mean_of_rows(mean) for mean in user.users):
                self.block(user, "squares of the stream are read apart from their mean")
        elif x in sources and times_read(user, x) == sources.count(x):
            if isinstance(x, Param):
                self.touch(user, x, x.val.dim() - 1, writes=True)
            self.join(user)
        elif isinstance(user, Linear | TransposedLinear | GroupedLinear) and user.input_op == x:
            if times_read(user, x) > 1:
                self.block(user, "it multiplies the stream by itself")
            self.readers[user] = None
            self.touch(user, weight_param(user), user.in_axis, writes=False)
        elif (gain := gain_of(self.index.gm, user)) is not None and gain[0] == x:
            self.scaled(*gain)
            self.join(user)
        else:
            self.block(user, f"{op_name(user)} reads the stream")

    def scaled(self, x: Op, factor: Op, held: Tensor) -> None:
        """One gain for all channels leaves vectors their direction; several do not."""
        if not (held == held.flatten()[0]).all():
            self.block(next(params_of(factor)), "its gain differs from channel to channel")
        self.join(x)

    def norm(self, op: Op) -> None:
        found = effect(op)
        assert isinstance(found, Normalizes), "a norm"
        if found.centres:
            self.norms.add(op)
        for name, neutral in zip(found.parameters, (1, 0), strict=False):
            given = op.argument(name)
            held = None if given is None else constant(self.index.gm, view(given))
            if given is not None and (held is None or not (held == neutral).all()):
                self.block(view(given), "it is not folded into the layers that read the norm")
        if op.argument("normalized_shape") != [self.size]:
            self.block(op, "it is not of the width of the stream")

    def written(self, op: Weighted, part: AxisSlice | None = None) -> None:
        if isinstance(op, Embedding):
            self.writers[op] = None
            self.touch(op, weight_param(op), 1, True, part)
        elif isinstance(op, Linear | TransposedLinear | GroupedLinear):
            self.writers[op] = None
            self.touch(op, weight_param(op), op.out_axis, True, part)
            bias = None if isinstance(op, GroupedLinear) else op.self_ if isinstance(op, TransposedLinear) else op.bias
            if bias is not None:
                if bias.val.dim() != 1 or width(bias) != width(op):
                    self.block(op, "its bias is not one number for each of its outputs")
                self.touch(op, bias, 0, True, part)
        else:
            self.block(op, f"{op_name(op)} makes what the stream holds")

    def cut(self, op: Op, whole: Op, offset: int, length: int) -> None:
        """The stream is a part of the last axis of what a linear gives; nothing else reads this part."""
        period = cast(int, width(whole))
        for other in (item for user in whole.users for item in _pieces(user)):
            where = cut_of(other)
            if where == (whole, offset, length):
                self.join(other)
            elif not isinstance(effect(other), ReadsShape) and (
                where is None or (where[1] < offset + length and offset < where[1] + where[2])
            ):
                self.block(other, f"{op_name(other)} reads the stream")
        while not isinstance(whole, Weighted):
            match effect(whole), carried(whole, period):
                case ((Attends() | Contracts() | Normalizes()), _):
                    source = None
                case _, Carried([source]):
                    pass
                case _:
                    source = None
            if source is None:
                self.block(whole, f"{op_name(whole)} makes what the stream holds")
                return
            if any(user != whole and not isinstance(effect(user), ReadsShape) for user in source.users):
                self.block(source, "it is read apart from the stream")
            whole = source
        self.written(whole, (period, offset, length))


def _pieces(op: Op) -> list[Op]:
    """The items of a split; any other op itself."""
    return op.users if effect(op) == Moves("split") else [op]
