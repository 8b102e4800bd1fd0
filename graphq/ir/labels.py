"""How far a factor of each channel goes through a graph: the ops that it commutes with, and the weights that end it.

Labels number the channels of a producer. They follow the graph's shape ops by running these on small tensors of labels,
so that views, transposes, splits, repeats of heads and attention need no rules of their own. A label goes no further
where an op would not commute with a factor. -1 labels what has no factor.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from graphq.capture.source import SHARED, source_of
from graphq.ir.layers import weight_param
from graphq.ir.views import (
    CONVOLUTIONS,
    Op,
    Param,
    Weighted,
    view,
)
from graphq.state import is_tied

aten = torch.ops.aten
NONE: Final = -1

# Ops that move elements, and do nothing else: labels go through by running them.
SHAPES: Final = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default),
        *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default),
        *(aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
        *(aten.flatten.using_ints, aten.unflatten.int, aten.repeat.default, aten.t.default, aten.movedim.int),
        *(aten.repeat_interleave.self_int, aten.unbind.int, aten.narrow.default, operator.getitem),
    }
)
# Ops of which f(a x) = a f(x) holds element by element for a > 0.
EVEN: Final = frozenset(
    {
        *(aten.relu.default, aten.leaky_relu.default, aten.neg.default, aten.abs.default, aten.clone.default),
        *(aten.contiguous.default, aten.alias.default, aten.detach.default, aten._to_copy.default, aten.to.dtype),
        *(aten.dropout.default, aten.prelu.default),
    }
)
_PADS: Final = (aten.constant_pad_nd.default, aten.pad.default)
FIRST: Final = frozenset({aten.div.Tensor, aten.index.Tensor, aten.index_select.default, aten.mean.dim, *_PADS})
POOLS: Final = frozenset(
    {aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.max_pool1d.default}
)
# Ops that read a tensor's shape alone.
_SIZES: Final = frozenset(
    {
        *(aten.sym_size.int, aten.sym_numel.default, aten.new_ones.default, aten.new_zeros.default),
        *(aten.new_empty.default, aten.new_full.default, aten.zeros_like.default, aten.ones_like.default),
        *(aten.empty_like.default, aten.full_like.default),
    }
)
SDPA: Final = aten.scaled_dot_product_attention.default


NORMS: Final[dict[Any, int]] = {
    aten.layer_norm.default: -1,
    aten.native_layer_norm.default: -1,
    aten.batch_norm.default: 1,
    aten._native_batch_norm_legit_no_training.default: 1,
    aten.group_norm.default: 1,
}


@final
@dataclass(frozen=True)
class Part:
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
    weight: Part
    channels: Tensor


def is_own(gm: fx.GraphModule, param: Param) -> bool:
    """Whether one node alone reads the parameter, under this name or another."""
    reads = gm.graph.find_nodes(op="get_attr", target=param.fqn)
    if sum(len(node.users) for node in reads) != 1 or param.fqn in gm.meta.get(SHARED, ()):
        return False
    return not is_tied(gm, param.fqn)  # experts' gate and up are parts of one storage


class Walk:
    """One walk from a producer with the labels ``moved``."""

    def __init__(self, gm: fx.GraphModule, moved: Tensor) -> None:
        self.gm = gm
        self.moved = moved
        self.labels: dict[fx.Node, Any] = {}
        self.readers: list[Reader] = []
        self.added: list[Part] = []
        self.stopped: list[tuple[Tensor, str]] = []
        self.sizes = _Sizes()
        source = source_of(gm)
        outputs = next(node for node in gm.graph.nodes if node.op == "output").args[0]
        names = dict(zip(cast(tuple[fx.Node, ...], outputs), source.outputs, strict=True))
        self.caches = {node: name for node, name in names.items() if name.startswith("present")}

    def go(self, producer: Op) -> None:
        keep = torch.where(self.moved, torch.arange(len(self.moved)), NONE)
        axis = channel_axis(producer)
        several = isinstance(producer.val, list | tuple)  # a norm that gives its statistics, too
        first = cast(Tensor, producer.val[0] if several else producer.val)
        shape = self.sizes.of(first)
        labels = keep.view([-1 if a == axis % len(shape) else 1 for a in range(len(shape))]).expand(shape)
        self.labels[producer.node] = [labels, *(torch.tensor([NONE]),) * (len(producer.val) - 1)] if several else labels
        for node in self.gm.graph.nodes:  # in graph order, so that all operands are known
            read = [n for n in node.all_input_nodes if n in self.labels and _any(self.labels[n])]
            if not read or node is producer.node:
                continue
            if node.op == "output":
                for n in read:
                    if n not in self.caches or not self._is_cache(n):
                        self._stop(n, "it is an output of the model")
                continue
            op = view(node)
            if node.target in _SIZES:
                continue
            made = self._through(op, read)
            if isinstance(made, str):
                for n in read:
                    self._stop(n, made)
            elif made is not None:
                self.labels[node] = made

    def _stop(self, node: fx.Node, reason: str) -> None:
        found = self.labels[node]
        for part in found if isinstance(found, list | tuple) else [found]:
            self.stopped.append((part, reason))

    def _is_cache(self, node: fx.Node) -> bool:
        """Whether an output is what the model itself will read back: ``cat([past, new])`` of one cache."""
        if node.target != aten.cat.default:
            return False
        past = view(cast(Any, node.args[0])[0])
        return past.node.op == "placeholder"

    def _through(self, op: Op, read: list[fx.Node]) -> Any:
        """The labels of what ``op`` gives; None where weights take them up; a text: why they go no further."""
        target = op.node.target
        here = self.labels
        if isinstance(op, Weighted):
            return self._read(op, read)
        if op.node.op == "call_module":  # an observer
            return None
        if target in SHAPES:
            return self._run(op)
        if target in EVEN:
            if not op.val.is_floating_point():
                return f"{target} makes it {op.val.dtype}"
            if target == aten.prelu.default and op.node.args[0] is not read[0]:
                return f"{target} reads it"
            return here[read[0]]
        if target in POOLS:
            line = _along(here[read[0]], 1)
            return f"{target} mixes its channels" if line is None else self._spread(line, op, 1)
        if target == aten.mean.dim or target == aten.sum.dim_IntList:
            return self._reduced(op, here[read[0]])
        if target in (aten.mul.Tensor, aten.div.Tensor):
            if len(read) == 2 or op.argument("self") is op.argument("other"):
                return "it is multiplied by itself"
            if target == aten.div.Tensor and op.argument("other") in read:
                return "it is a divisor"
            return here[read[0]].expand(self.sizes.of(op.val))
        if target == aten.add.Tensor:
            return self._sum(op, read)
        if target == SDPA:
            value = op.argument("value")
            for name in ("query", "key", "attn_mask"):
                if op.argument(name) in read:
                    self._stop(op.argument(name), "attention compares it")
            return self._contracted(op, value) if value in read else None
        if target in (aten.matmul.default, aten.bmm.default):
            if len(read) != 1 or op.node.args[1] is not read[0] or op.node.args[0] is read[0]:
                return "it is multiplied by what is no weight"
            return self._contracted(op, read[0])
        if target == aten.cat.default:
            return self._joined(op, read)
        if target in (aten.index.Tensor, aten.index_select.default):
            if op.node.args[0] is not read[0] or len(read) != 1:
                return "it is an index"
            line = None if _picks_last(op) else _along(here[read[0]], -1)
            return "rows are picked across its channels" if line is None else self._spread(line, op, -1)
        if target in _PADS and _pads_with_zeros(op):
            pads = [self.sizes.number(p) for p in cast(Iterable[Any], op.argument("pad"))]
            return torch.nn.functional.pad(here[read[0]], pads, value=NONE)
        name = str(target)
        return f"{name} reads it"

    def _run(self, op: Op) -> Any:
        args = map_arg(op.node.args, self._concrete)
        kwargs = map_arg(op.node.kwargs, self._concrete)
        target = cast(Callable[..., Any], op.node.target)
        try:
            return target(*args, **cast(Mapping[str, Any], kwargs))
        except RuntimeError:  # the small sizes are none that this op takes
            return f"{target} cannot be followed"

    def _concrete(self, node: fx.Node) -> Any:
        if node not in self.labels:
            return self.sizes.number(node.meta["val"])
        found = self.labels[node]
        return found.contiguous() if isinstance(found, Tensor) else found

    def _spread(self, line: Tensor, op: Op, axis: int) -> Tensor:
        shape = self.sizes.of(op.val)
        return line.view([-1 if a == axis % len(shape) else 1 for a in range(len(shape))]).expand(shape)

    def _reduced(self, op: Op, labels: Tensor) -> Tensor | str:
        dims = cast(list[int], op.argument("dim"))
        low, high = labels.amin(dims, keepdim=True), labels.amax(dims, keepdim=True)
        if not torch.equal(low, high):
            return "a mean mixes its channels"
        return low if op.argument("keepdim") else low.squeeze(dims)

    def _sum(self, op: Op, read: list[fx.Node]) -> Tensor | str:
        shape = self.sizes.of(op.val)
        labels = self.labels[read[0]].expand(shape)
        if len(read) == 2:
            same = torch.equal(labels, self.labels[read[1]].expand(shape))
            return labels if same else "it is added to other channels"
        others = [n for n in op.node.all_input_nodes if n not in read]
        param = view(others[0]) if others else None
        if not isinstance(param, Param) or not is_own(self.gm, param):
            return "a sum reads it beside what has no factors"
        own = tuple(param.val.shape)
        line = _along(labels, -1)
        if line is None or own[-1:] != line.shape or param.val.numel() != line.numel():
            return "a sum reads it beside what has no factors"
        self.added.append(Part(param.fqn, line.view(own)))
        return labels

    def _contracted(self, op: Op, value: fx.Node) -> Tensor | str:
        labels = self.labels[value]
        first = labels[..., :1, :]
        if labels.numel() == 0 or not torch.equal(first.expand_as(labels), labels):
            return "a product mixes its channels"
        shape = self.sizes.of(op.val)
        if op.node.target == SDPA and first.shape[-3] > 1:  # several query heads may share a head of values
            first = first.repeat_interleave(shape[-3] // first.shape[-3], -3)
        return first.expand(shape)

    def _joined(self, op: Op, read: list[fx.Node]) -> Tensor | str:
        """A cache in front of new tokens has the labels of these; other tensors have none."""
        tensors = cast(list[fx.Node], op.argument("tensors"))
        axis = int(op.argument("dim"))
        is_cache = len(tensors) == 2 and tensors[0].op == "placeholder" and tensors[1] in read
        parts: list[Tensor] = []
        for node in tensors:
            if node in self.labels:
                parts.append(self.labels[node])
                continue
            shape = self.sizes.of(node.meta["val"])
            if not is_cache:
                parts.append(torch.full(shape, NONE))
                continue
            if op.node not in self.caches:
                return "a cache that is not given back holds it"
            if len(node.users) != 1 and any(u.target not in _SIZES for u in node.users if u is not op.node):
                return "its cache has other readers"
            new = self.labels[tensors[1]]
            first = new.narrow(axis, 0, 1)
            if not torch.equal(first.expand_as(new), new):
                return "a cache mixes its channels"
            parts.append(first.expand(shape))
        return torch.cat(parts, axis)

    def _read(self, op: Weighted, read: list[fx.Node]) -> str | None:
        """Notes the weight that takes the labels up; a text where it cannot."""
        x = op.argument(op.input_name)
        if read != [x]:
            return f"{op.node.name} does not read it as its input"
        param = weight_param(op)
        if param is None or op.weight_op != param or not is_own(self.gm, param):
            return f"the weight of {op.node.name} has other readers"
        labels = self.labels[x]
        axis = channel_axis(op)
        line = _along(labels, axis)
        if line is None:
            return f"the channels of {op.node.name} are mixed"
        shape = tuple(param.val.shape)
        if isinstance(op, CONVOLUTIONS):
            rows = shape[0] // int(op.argument("groups"))
            by_group = line.view(-1, shape[1])  # of each group
            wide = by_group.repeat_interleave(rows, 0).view(shape[0], shape[1], *[1] * (len(shape) - 2))
        else:
            wide = line.view([-1 if a == op.in_axis else 1 for a in range(len(shape))])
        self.readers.append(Reader(op, Part(param.fqn, wide.expand(shape)), line))
        return None


def _any(labels: Any) -> bool:
    parts = cast(Iterable[Tensor], labels) if isinstance(labels, list | tuple) else [labels]
    return any(bool((part != NONE).any()) for part in parts)


def _along(labels: Tensor, axis: int) -> Tensor | None:
    """The labels along one axis, if they are the same in all others."""
    axis %= labels.dim()
    line = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])
    if line.shape[0] == 0 or not torch.equal(line, line[:1].expand_as(line)):
        return None
    return line[0]


def _pads_with_zeros(op: Op) -> bool:
    if op.node.target == aten.pad.default and op.argument("mode") != "constant":
        return False
    return not op.argument("value")  # None is 0


def _picks_last(op: Op) -> bool:
    """Whether an index runs along the last axis of what it picks from."""
    rank = view(op.node.all_input_nodes[0]).val.dim()
    if op.node.target == aten.index_select.default:
        return int(op.argument("dim")) % rank == rank - 1
    indices = cast(list[fx.Node | None], op.argument("indices"))
    return len(indices) == rank and indices[-1] is not None


def channel_axis(op: Op) -> int:
    """The axis of channels; a convolution may be without batches."""
    if isinstance(op, CONVOLUTIONS):
        return 1 - op.weight_op.val.dim()
    return NORMS.get(op.node.target, -1)


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
