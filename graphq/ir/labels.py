"""How far a factor of each channel goes through a graph: the ops that it commutes with, and the weights that end it.

Labels number the channels of a producer. They follow the graph's shape ops by running these on small tensors of labels,
so that views, transposes, splits, repeats of heads and attention need no rules of their own. A label goes no further
where an op would not commute with a factor. -1 labels what has no factor.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from graphq.ir.effect_table import axes_of, channel_axis, effect
from graphq.ir.effects import (
    Adds,
    AddsProduct,
    Attends,
    Carried,
    Contracts,
    Convolves,
    Copies,
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
    Stopped,
)
from graphq.ir.index import GraphIndex
from graphq.ir.layers import weight_param
from graphq.ir.vectors import indexed_axes
from graphq.ir.views import Convolution, Op, Param, Weighted, view

NONE: Final = -1
Labels = Tensor | Sequence[Tensor]  # of a tensor's elements, or of those of a list of tensors
_UNLABELLED: Final = Carried[Labels](torch.tensor([NONE]))


@final
@dataclass(frozen=True)
class LabelledParam:
    """A parameter and the label of each of its elements, in its shape: divided (a producer's) or
    multiplied (a reader's).

    ``plus``: what the graph adds to the parameter before it uses it (Gemma's norms multiply by 1 + weight).
    """

    fqn: str
    labels: Tensor
    plus: float = 0.0

    def times(self, w: Tensor, factor: Tensor) -> Tensor:
        """``w`` with each element multiplied by its label's ``factor``, computed in float64."""
        own = torch.cat([factor.double(), factor.new_ones(1).double()])[self.labels]  # -1: the last, 1
        return ((w.double() + self.plus) * own - self.plus).to(w.dtype)


@final
@dataclass(frozen=True)
class Reader:
    """A weight that takes factors up. ``channels``: the label of each element along the channels of its input."""

    op: Weighted
    weight: LabelledParam
    channels: Tensor


@final
class Walk:
    """One walk from a producer with the labels ``moved``, along the nodes that labels reach, in graph order."""

    def __init__(self, index: GraphIndex, moved: Tensor) -> None:
        self.index = index
        self.moved = moved
        self.labels: dict[fx.Node, Labels] = {}  # of the nodes that have any
        self.readers: list[Reader] = []
        self.added: list[LabelledParam] = []
        self.stopped: list[tuple[Tensor, str]] = []
        self.sizes = _Sizes()
        self._pending: list[fx.Node] = []
        self._met: set[fx.Node] = set()

    def go(self, producer: Op) -> None:
        """``readers`` and ``stopped`` hold every end of the way of every label."""
        keep = torch.where(self.moved, torch.arange(len(self.moved)), NONE)
        several = isinstance(producer.val, list | tuple)  # a norm that gives its statistics, too
        first = cast(Tensor, producer.val[0] if several else producer.val)
        labels = self._spread(keep, first, channel_axis(producer))
        self._put(producer.node, [labels, *(torch.tensor([NONE]),) * (len(producer.val) - 1)] if several else labels)
        while self._pending:  # in graph order, so that all operands are known
            node = heapq.heappop(self._pending)
            read = [n for n in node.all_input_nodes if n in self.labels]
            if node.op == "output":
                for n in read:
                    if not self._is_cache(n):
                        self._stop(n, "it is an output of the model")
                continue
            match self._through(view(node), read):
                case Carried(labels):
                    self._put(node, labels)
                case Stopped(reason):
                    for n in read:
                        self._stop(n, reason)

    def _put(self, node: fx.Node, labels: Labels) -> None:
        """The labels of ``node``, which its readers are to be asked about."""
        if not _any(labels):
            return
        self.labels[node] = labels
        for user in node.users:
            if user not in self._met:
                self._met.add(user)
                heapq.heappush(self._pending, user)

    def _stop(self, node: fx.Node, reason: str) -> None:
        found = self.labels[node]
        for part in [found] if isinstance(found, Tensor) else found:
            self.stopped.append((part, reason))

    def _is_cache(self, node: fx.Node) -> bool:
        """Whether an output is what the model itself will read back: ``cat([past, new])`` of one cache."""
        past = self.index.caches.get(node)
        op = view(node)
        return past is not None and isinstance(effect(op), Joins) and op.argument("tensors")[0] is past

    def _through(self, op: Op, read: list[fx.Node]) -> Carried[Labels] | Stopped:
        """The labels of what ``op`` gives, none where weights take them up; or why they go no further."""
        if isinstance(op, Weighted):
            return self._read(op, read)
        x = read[0]
        is_first = len(read) == 1 and op.node.all_input_nodes[0] is x
        labels = self.labels[x]
        match effect(op):
            case Observes() | ReadsShape():
                return _UNLABELLED
            case Moves():
                return self._run(op)
            case Copies() | Homogeneous() if is_first and isinstance(labels, Tensor):
                is_float = op.val.is_floating_point()
                return Carried(labels) if is_float else Stopped(f"{op.node.target} makes it {op.val.dtype}")
            case Pools(rank) if isinstance(labels, Tensor):
                line = _along(labels, -1 - rank)
                mixed = Stopped(f"{op.node.target} mixes its channels")
                return mixed if line is None else Carried(self._spread(line, op.val, -1 - rank))
            case Reduces("linear" | "homogeneous") if isinstance(labels, Tensor):
                return self._reduced(op, labels)
            case Scales(divides) if isinstance(labels, Tensor):
                if len(read) == 2 or op.argument("self") is op.argument("other"):
                    return Stopped("it is multiplied by itself")
                if divides and not is_first:
                    return Stopped("it is a divisor")
                return Carried(labels.expand(self.sizes.of(op.val)))
            case Adds():
                return self._sum(op, read)
            case Attends():
                value = op.argument("value")
                for name in ("query", "key", "attn_mask"):
                    if op.argument(name) in read:
                        self._stop(op.argument(name), "attention compares it")
                return self._contracted(op, value) if value in read else _UNLABELLED
            case Contracts():
                if len(read) != 1 or op.node.args[1] is not x or op.node.args[0] is x:
                    return Stopped("it is multiplied by what is no weight")
                return self._contracted(op, x)
            case Joins(new=False):
                return self._joined(op, read)
            case Gathers("slices") if isinstance(labels, Tensor):
                if not is_first:
                    return Stopped("it is an index")
                line = None if labels.dim() - 1 in indexed_axes(op) else _along(labels, -1)
                mixed = Stopped("rows are picked across its channels")
                return mixed if line is None else Carried(self._spread(line, op.val, -1))
            case Pads(0.0) if isinstance(labels, Tensor):
                pads = [self.sizes.number(p) for p in cast(Iterable[Any], op.argument("pad"))]
                return Carried(torch.nn.functional.pad(labels, pads, value=NONE))
            case (
                (Copies() | Homogeneous() | Pools() | Reduces() | Scales() | Joins() | Gathers() | Pads())
                | (Elementwise() | MixesAxis() | Normalizes() | Projects() | Convolves() | LooksUp())
                | (AddsProduct() | Scatters() | Opaque())
            ):
                return Stopped(f"{op.node.target} reads it")

    def _run(self, op: Op) -> Carried[Labels] | Stopped:
        args = map_arg(op.node.args, self._concrete)
        kwargs = map_arg(op.node.kwargs, self._concrete)
        target = cast(Callable[..., Any], op.node.target)
        try:
            return Carried(target(*args, **cast(Mapping[str, Any], kwargs)))
        except RuntimeError:  # the small sizes are none that this op takes
            return Stopped(f"{target} cannot be followed")

    def _concrete(self, node: fx.Node) -> Any:
        found = self.labels.get(node)
        if found is None:
            return self.sizes.number(node.meta["val"])
        return found.contiguous() if isinstance(found, Tensor) else found

    def _spread(self, line: Tensor, val: Tensor, axis: int) -> Tensor:
        """Labels of the shape of ``val``: those of ``line`` along ``axis``."""
        shape = self.sizes.of(val)
        return line.view([-1 if a == axis % len(shape) else 1 for a in range(len(shape))]).expand(shape)

    def _reduced(self, op: Op, labels: Tensor) -> Carried[Labels] | Stopped:
        dims = list(axes_of(op))
        low, high = labels.amin(dims, keepdim=True), labels.amax(dims, keepdim=True)
        if not torch.equal(low, high):
            return Stopped("a mean mixes its channels")
        return Carried(low.view(self.sizes.of(op.val)))

    def _sum(self, op: Op, read: list[fx.Node]) -> Carried[Labels] | Stopped:
        shape = self.sizes.of(op.val)
        labels = cast(Tensor, self.labels[read[0]]).expand(shape)
        if len(read) == 2:
            same = torch.equal(labels, cast(Tensor, self.labels[read[1]]).expand(shape))
            return Carried(labels) if same else Stopped("it is added to other channels")
        stopped = Stopped("a sum reads it beside what has no factors")
        others = [n for n in op.node.all_input_nodes if n not in read]
        param = view(others[0]) if others else None
        if not isinstance(param, Param) or not self.index.is_own(param):
            return stopped
        own = tuple(param.val.shape)
        line = _along(labels, -1)
        if line is None or own[-1:] != line.shape or param.val.numel() != line.numel():
            return stopped
        self.added.append(LabelledParam(param.fqn, line.view(own)))
        return Carried(labels)

    def _contracted(self, op: Op, value: fx.Node) -> Carried[Labels] | Stopped:
        labels = cast(Tensor, self.labels[value])
        first = labels[..., :1, :] if labels.dim() > 1 else labels
        if labels.dim() < 2 or labels.numel() == 0 or not torch.equal(first.expand_as(labels), labels):
            return Stopped("a product mixes its channels")
        shape = self.sizes.of(op.val)
        if isinstance(effect(op), Attends) and labels.dim() > 2 and first.shape[-3] > 1:
            first = first.repeat_interleave(shape[-3] // first.shape[-3], -3)  # query heads may share a head of values
        is_vector = len(shape) < labels.dim()  # a vector times a matrix
        return Carried((first.squeeze(-2) if is_vector else first).expand(shape))

    def _joined(self, op: Op, read: list[fx.Node]) -> Carried[Labels] | Stopped:
        """A cache in front of new tokens has the labels of these; other tensors have none."""
        tensors = cast(list[fx.Node], op.argument("tensors"))
        axis = int(op.argument("dim"))
        is_cache = len(tensors) == 2 and tensors[0] in self.index.pasts and tensors[1] in read
        parts: list[Tensor] = []
        for node in tensors:
            found = self.labels.get(node)
            if found is not None:
                parts.append(cast(Tensor, found))
                continue
            shape = self.sizes.of(node.meta["val"])
            if not is_cache:
                parts.append(torch.full(shape, NONE))
                continue
            if self.index.caches.get(op.node) is not node:
                return Stopped("a cache that is not given back holds it")
            if any(user is not op.node and not isinstance(effect(view(user)), ReadsShape) for user in node.users):
                return Stopped("its cache has other readers")
            new = cast(Tensor, self.labels[tensors[1]])
            first = new.narrow(axis, 0, 1)
            if not torch.equal(first.expand_as(new), new):
                return Stopped("a cache mixes its channels")
            parts.append(first.expand(shape))
        return Carried(torch.cat(parts, axis))

    def _read(self, op: Weighted, read: list[fx.Node]) -> Carried[Labels] | Stopped:
        """Notes the weight that takes the labels up; or why it cannot."""
        if not op.is_product:
            return Stopped(f"{op.node.name} reads it")
        x = op.argument(op.input_name)
        if read != [x]:
            return Stopped(f"{op.node.name} does not read it as its input")
        param = weight_param(op)
        if param is None or op.weight_op != param or not self.index.is_own(param):
            return Stopped(f"the weight of {op.node.name} has other readers")
        labels = self.labels[x]
        line = _along(labels, op.input_axis) if isinstance(labels, Tensor) else None
        if line is None:
            return Stopped(f"the channels of {op.node.name} are mixed")
        shape = tuple(param.val.shape)
        if isinstance(op, Convolution):
            rows = shape[0] // int(op.groups)
            by_group = line.view(-1, shape[1])  # of each group
            wide = by_group.repeat_interleave(rows, 0).view(shape[0], shape[1], *[1] * (len(shape) - 2))
        else:
            wide = line.view([-1 if a == op.in_axis else 1 for a in range(len(shape))])
        self.readers.append(Reader(op, LabelledParam(param.fqn, wide.expand(shape)), line))
        return _UNLABELLED


def _any(labels: Labels) -> bool:
    return any(bool((part != NONE).any()) for part in ([labels] if isinstance(labels, Tensor) else labels))


def _along(labels: Tensor, axis: int) -> Tensor | None:
    """The labels along one axis, if they are the same in all others."""
    axis %= labels.dim()
    line = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])
    if line.shape[0] == 0 or not torch.equal(line, line[:1].expand_as(line)):
        return None
    return line[0]


@final
class _Sizes:
    """Small numbers for the dynamic sizes of a graph."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}

    def number(self, value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        expression = value.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self.known.setdefault(symbol, 2 + len(self.known))
        return int(expression.subs(self.known))

    def of(self, value: Tensor) -> list[int]:
        return [self.number(size) for size in value.shape]
