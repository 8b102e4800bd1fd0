"""Dimensions with one size: sizes become numbers, and what follows from numbers alone becomes a constant.

What a graph computes from its inputs' sizes (shapes of views, positions, masks of causality) is known once the sizes
are. An input without elements, such as an empty cache, has nothing to say, and no graph needs it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, ClassVar, Final, cast, final

import torch
from torch import SymInt, Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from graphq.capture.source import KEY, PAST, SEQUENCE, TOTAL, Source, source_of
from graphq.ir import edit
from graphq.ir.effect_table import effect
from graphq.ir.effects import ReadsShape
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import view
from graphq.runtime import ops
from graphq.state import tensor_of

aten = torch.ops.aten
_NUMBERS: Final = (int, float, bool)
_SAME_ORDER: Final = frozenset(  # with the shape of what they are given they are what they are given
    [aten.view.default, aten.reshape.default, aten.expand.default, aten.slice.Tensor, aten.unflatten.int]
)
_UNSET: Final = (aten.empty_like.default, aten.new_empty.default)  # whose elements are nothing to rely on
_LARGEST: Final = 1 << 24  # elements of a constant; a mask of 4,096 tokens has as many


@final
@dataclass(frozen=True)
class FixSizes(Pass):
    """The graph for these ``sizes`` of its dimensions, by name, which are in their ranges; others stay dynamic.

    Sizes are numbers. What is made of numbers and buffers alone is a buffer, and what is quantized of a tensor that is
    held, its codes; other readers of parameters, codes or scales stay, and so does what draws at random. Reshapes to
    the shape at hand are gone. Inputs without elements are gone, too, and the source with them.
    """

    sizes: Mapping[str, int]
    name: ClassVar[str] = "fix-sizes"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        source = source_of(gm)
        if not self.sizes:
            return 0
        walk = _Walk(gm, _dimensions(gm, source, self.sizes), self.name)
        for node in list(gm.graph.nodes):
            walk.visit(node)
        changes = walk.changes
        ranges = tuple(
            (d, self.sizes[d], self.sizes[d]) if d in self.sizes else (d, low, high) for d, low, high in source.ranges
        )
        changes += sum(new != old for new, old in zip(ranges, source.ranges, strict=True))
        gm.meta[KEY] = replace(source, ranges=ranges)
        edit.drop_unused(gm)
        changes += _drop_empty_inputs(gm)
        gm.graph.lint()
        gm.recompile()
        return changes


def _dimensions(gm: fx.GraphModule, source: Source, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The size of each dimension: a number, or the symbol that the graph has for it."""
    found: dict[str, Any] = dict(sizes)
    for node, declared in zip(gm.graph.find_nodes(op="placeholder"), source.inputs, strict=True):
        for size, name in zip(node.meta["val"].shape, declared.shape, strict=True):
            if isinstance(name, str) and name != TOTAL:
                found.setdefault(name, size)
    return found | ({TOTAL: found[PAST] + found[SEQUENCE]} if {PAST, SEQUENCE} <= found.keys() else {})


class _Walk:
    """The nodes of a graph in order, each rewritten for the sizes; ``known`` are the values that follow from these."""

    def __init__(self, gm: fx.GraphModule, dimensions: Mapping[str, Any], by: str) -> None:
        self.gm = gm
        self.by = by
        self.mode = edit.fake_mode_of(gm)
        inputs = zip(gm.graph.find_nodes(op="placeholder"), source_of(gm).inputs, strict=True)
        self.shapes = {
            node: [dimensions[d] if isinstance(d, str) else d for d in declared.shape] for node, declared in inputs
        }
        self.known: dict[fx.Node, Any] = {}
        self.held: dict[fx.Node, fx.Node] = {}
        self.changes = 0

    def visit(self, node: fx.Node) -> None:
        match node.op:
            case "placeholder":
                val = node.meta["val"]
                with self.mode:
                    node.meta["val"] = torch.empty(self.shapes[node], dtype=val.dtype, device=val.device)
            case "get_attr":
                tensor = tensor_of(self.gm, str(node.target))
                if not isinstance(tensor, nn.Parameter) and not any(_is_own(user) for user in node.users):
                    self.known[node] = tensor
                    self.held[node] = node
            case "output":
                node.args = cast(Any, map_arg(node.args, self._read))
            case _:
                self._call(node)

    def _call(self, node: fx.Node) -> None:
        target = cast(Callable[..., Any], node.target)
        if target is ops.quantize and all(n in self.known or n.op == "get_attr" for n in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), self._tensor)
            with torch.no_grad():
                self.known[node] = target(*args, **kwargs)
            return
        if _is_pure(node) and all(n in self.known or _gives_its_shape(n, node) for n in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), self._value)
            with torch.no_grad():
                value = target(*args, **kwargs)
            if _is_small(value):
                self.known[node] = value
                return
        if target is aten.cat.default:
            self._skip_empty(node)
        elif target is aten.sym_size.int:
            self._ask_another(node)
        elif target is aten.index.Tensor:
            self._skip_index(node)
            target = cast(Callable[..., Any], node.target)
        before = (node.args, node.kwargs)
        node.args, node.kwargs = cast(Any, map_arg(before, self._read))
        self.changes += before != (node.args, node.kwargs)
        with self.mode, torch.no_grad():
            val = target(*map_arg(node.args, _val), **map_arg(node.kwargs, _val))
        node.meta["val"] = val
        if isinstance(val, _NUMBERS):
            self.known[node] = val
        elif _is_identity(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            self.changes += 1

    def _value(self, node: fx.Node) -> Any:
        """What is known of a node's value, which is its shape at least."""
        val = node.meta["val"]
        return self.known[node] if node in self.known else torch.zeros(val.shape, dtype=val.dtype)

    def _tensor(self, node: fx.Node) -> Any:
        return self.known[node] if node in self.known else tensor_of(self.gm, str(node.target)).detach()

    def _skip_empty(self, node: fx.Node) -> None:
        """A concatenation has no parts without elements, as long as it has others."""
        parts = cast(list[fx.Node], node.args[0])
        full = [part for part in parts if not _is_empty(part)]
        if full and len(full) < len(parts):
            node.args = (full, *node.args[1:])
            self.changes += 1

    def _ask_another(self, node: fx.Node) -> None:
        """The size of an input without elements is read from one that has some."""
        size = node.meta["val"]
        if not (isinstance(size, SymInt) and _is_empty(cast(fx.Node, node.args[0]))):
            return
        for other, shape in self.shapes.items():
            axes = [
                axis
                for axis, found in enumerate(shape)
                if isinstance(found, SymInt) and found.node.expr == size.node.expr
            ]
            if axes and not _is_empty(other):
                node.args = (other, axes[0])
                self.changes += 1
                return

    def _skip_index(self, node: fx.Node) -> None:
        """An index that picks every element in its place is a reshape."""
        x, indices = cast(tuple[fx.Node, list[fx.Node | None]], node.args)
        found = [None if i is None else self.known.get(i) for i in indices]
        shape = x.meta["val"].shape
        if any(f is None and i is not None for f, i in zip(found, indices, strict=True)) or not _is_static(shape):
            return
        places = torch.arange(shape.numel()).reshape(shape)
        picked = places[tuple(slice(None) if f is None else f for f in found)]
        if torch.equal(picked.flatten(), places.flatten()):
            node.target = aten.reshape.default
            node.args = (x, list(picked.shape))
            self.changes += 1

    def _read(self, node: fx.Node) -> Any:
        """What a node that stays reads where it read ``node``."""
        if node not in self.known or (value := self.known[node]) is None:
            return node
        if not isinstance(value, Tensor):
            return value if isinstance(value, _NUMBERS) else node
        if node not in self.held:
            names = (f"constants.{node.name}{'_' * i}" for i in count())
            free = next(name for name in names if not edit.has_tensor(self.gm, name))
            first = view(next(n for n in self.gm.graph.nodes if n.op not in ("placeholder", "get_attr")))
            held = edit.add_tensor(self.gm, first, free, value.detach().clone().contiguous(), self.by, like=view(node))
            self.held[node] = held.node
            self.changes += 1
        return self.held[node]


def _val(node: fx.Node) -> Any:
    return node.meta["val"]


def _is_static(shape: torch.Size) -> bool:
    return not any(isinstance(size, SymInt) for size in shape)


def _is_empty(node: fx.Node) -> bool:
    """Whether a node gives a tensor without elements, whatever the sizes that are not fixed."""
    return any(not isinstance(size, SymInt) and size == 0 for size in node.meta["val"].shape)


def _gives_its_shape(x: fx.Node, reader: fx.Node) -> bool:
    """Whether ``x`` is a tensor of whose shape, which is fixed, and of nothing else ``reader`` makes a constant."""
    val = x.meta["val"]
    if not isinstance(val, Tensor) or not _is_static(val.shape) or not _is_small(val):
        return False
    return isinstance(effect(view(reader)), ReadsShape) and reader.target not in _UNSET


def _is_own(node: fx.Node) -> bool:
    """Whether it is an op of graphq, whose operands artifacts hold under their own names."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "graphq"


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or _is_own(node):
        return False
    return not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags


def _is_small(value: Any) -> bool:
    parts = value if isinstance(value, list | tuple) else (value,)
    return all(not isinstance(part, Tensor) or part.numel() <= _LARGEST for part in cast(list[Any], parts))


def _is_identity(node: fx.Node) -> bool:
    """Whether a node gives what it is given."""
    if node.target is aten.cat.default:
        return len(cast(list[fx.Node], node.args[0])) == 1
    if node.target not in _SAME_ORDER:
        return False
    given, made = node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape
    return len(given) == len(made) and all(statically_known_true(a == b) for a, b in zip(given, made, strict=True))


def _drop_empty_inputs(gm: fx.GraphModule) -> int:
    """Inputs without elements, which nothing reads, are none of the graph's; their number."""
    source = source_of(gm)
    gone: set[str] = set()
    for node, declared in zip(gm.graph.find_nodes(op="placeholder"), source.inputs, strict=True):
        if _is_empty(node) and not node.users:
            gone.add(declared.name)
            gm.graph.erase_node(node)
    if gone:
        ended = all(PAST not in one.shape for one in source.inputs if one.name not in gone)
        gm.meta[KEY] = replace(
            source,
            inputs=tuple(
                replace(one, shape=tuple(SEQUENCE if d == TOTAL and ended else d for d in one.shape))
                for one in source.inputs
                if one.name not in gone
            ),
            caches=tuple(pair for pair in source.caches if pair.past not in gone),
            ranges=tuple(r for r in source.ranges if r[0] != PAST or not ended),
        )
    return len(gone)
