"""Which elements of an op's output come of valid ones alone: a rule for each effect.

What moves elements moves the boolean alike, by the indices that it takes at run time where these are tensors;
elementwise ops are valid where all their operands are; what mixes an axis, a linear its channels, keeps rows that are
valid or invalid as a whole; products and attention have the rows of their first factor, the query.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx

from graphq.data.masks import ALL, Validity
from graphq.ir.effect_table import axes_of, effect
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
    Pads,
    Pools,
    Projects,
    ReadsShape,
    Reduces,
    Scales,
    Scatters,
    Stopped,
)
from graphq.ir.products import reads_inputs
from graphq.ir.row_masks import fits, fitted, padded, row_mask
from graphq.ir.views import Dequantize, Op, Quantize
from graphq.runtime import ops

aten = torch.ops.aten
Known = Validity | list[Validity]  # of a value, or of each part of one that has several
_Masks = Tensor | list[Tensor | None] | None
_MIXES: Final = Stopped("mixes tokens")


@final
class Rule:
    """How the validity of one op's output follows from that of its operands, as it runs.

    ``validity``, ``values``: of the nodes before it; one that is in neither is valid. ``made``: what the op gave.
    """

    def __init__(self, op: Op, validity: Mapping[fx.Node, Known], values: Mapping[fx.Node, Any], made: Any) -> None:
        self.op, self.known, self.values, self.made = op, validity, values, made
        self.stops: dict[str, None] = {}

    def validity(self) -> Known:
        """That of the output; of each part of one that has several."""
        match self._masks():
            case Carried(masks):
                pass
            case Stopped(reason):
                masks = None
                self._stop(reason)
        stops = tuple(self.stops)
        if isinstance(self.made, list | tuple):
            parts = masks if isinstance(masks, list) else [masks] * len(cast(Sequence[Any], self.made))
            return [Validity(mask, stops) for mask in parts]
        assert not isinstance(masks, list)
        return ALL if masks is None and not stops else Validity(masks, stops)

    def _stop(self, reason: str) -> None:
        self.stops[f"{self.op.node.target} ({place_of(self.op.node)}) {reason}"] = None

    def _masks(self) -> Carried[_Masks] | Stopped:
        op, node = self.op, self.op.node
        if isinstance(op, Quantize | Dequantize):  # each element by the scale of its block
            return Carried(self._mask(node.args[0]))
        if node.target is ops.select_rows:
            return Carried(self._all_of(cast(Sequence[fx.Node], node.args[0])))
        what = effect(op)
        match what:
            case ReadsShape():
                return Carried(None)
            case Observes() | Copies():
                return Carried(self._mask(node.args[0]))
            case Moves(how="item"):
                return self._item()
            case Moves():
                mask = self._mask(node.args[0])
                return Carried(None if mask is None else self._rerun(mask))
            case Homogeneous() | Elementwise() | Adds() | Scales():
                return Carried(self._all_of(node.all_input_nodes))
            case Joins():
                return Carried(self._joined(cast(Sequence[fx.Node], node.args[0])))
            case Reduces():
                return self._rows(self._mask(node.args[0]), axes_of(op))
            case MixesAxis(orders=True):
                return self._ordered(self._mask(node.args[0]))
            case MixesAxis():
                return self._rows(self._mask(node.args[0]), axes_of(op))
            case Normalizes():
                return self._normalized(what)
            case Pools(rank):
                return self._rows(self._mask(node.args[0]), tuple(range(-rank, 0)))
            case Convolves(rank):
                return self._convolved(rank)
            case Projects():
                return self._projected()
            case LooksUp(indices):
                mask = self._mask(op.argument(indices))
                return Carried(None if mask is None else mask.unsqueeze(-1).expand(self.made.shape))
            case Contracts():
                return self._contracted(node.args[0], node.args[1])
            case AddsProduct(sums):
                added = self._mask(node.args[0])
                return self._added(self._contracted(node.args[1], node.args[2], sums), added)
            case Attends():
                for name in ("key", "value"):
                    self._mask(op.argument(name))
                found = self._rows(self._mask(op.argument("query")), (-1,))
                self._settle(op.argument("query"))
                return found
            case Gathers("slices"):
                return Carried(self._gathered_slices())
            case Gathers("elements"):
                return Carried(self._gathered_elements())
            case Scatters():
                return Carried(self._scattered(what))
            case Pads():
                return self._padded(what)
            case _:
                for read in node.all_input_nodes:
                    self._mask(read)
                return Stopped("is not known to keep tokens apart")

    # -- operands

    def _mask(self, node: Any) -> Tensor | None:
        """The mask of an operand, whose stops are the output's, too."""
        found = validity_of(node, self.known)
        self.stops |= dict.fromkeys(found.stops)
        return found.mask

    def _settle(self, *nodes: Any) -> None:
        """Forgets the stops of all operands where one of these, each of which has the output's rows, has a mask and no
        stops: that mask tells the invalid rows of the output.
        """
        if any(one.mask is not None and not one.stops for one in (validity_of(node, self.known) for node in nodes)):
            self.stops.clear()

    def _value(self, node: Any) -> Any:
        return self.values[node] if isinstance(node, fx.Node) else node

    def _full(self, node: Any) -> Tensor:
        """The mask of an operand, in full where all of it counts."""
        return Validity(self._mask(node)).full(self._value(node))

    def _all_of(self, nodes: Sequence[fx.Node]) -> _Masks:
        """Where all operands are valid, as they broadcast; for each part of what has several."""
        masks = list({id(mask): mask for node in nodes if (mask := self._mask(node)) is not None}.values())
        if not masks:
            return None
        whole = masks[0]
        for mask in masks[1:]:
            whole = whole & mask
        parts = cast(Sequence[Tensor], self.made if isinstance(self.made, list | tuple) else [self.made])
        self._settle(*[node for node in nodes if getattr(self._value(node), "shape", None) == parts[0].shape])
        return [whole.expand(part.shape) for part in parts] if len(parts) > 1 else whole.expand(parts[0].shape)

    def _rerun(self, *masks: Tensor) -> Any:
        """What the op gives for masks in the place of its first arguments."""
        args = [self._value(arg) if isinstance(arg, fx.Node) else self._values(arg) for arg in self.op.node.args]
        args[: len(masks)] = [mask.contiguous() for mask in masks]
        kwargs = {name: self._value(arg) for name, arg in self.op.node.kwargs.items() if name != "memory_format"}
        return cast(Callable[..., Any], self.op.node.target)(*args, **kwargs)

    def _values(self, arg: Any) -> Any:
        if isinstance(arg, list | tuple):
            return [self._value(one) for one in cast(Sequence[Any], arg)]
        return arg

    # -- rules

    def _item(self) -> Carried[_Masks] | Stopped:
        source, index = cast(tuple[fx.Node, int], self.op.node.args)
        parts = self.known.get(source, ALL)
        part = parts[index] if isinstance(parts, list) else parts
        self.stops |= dict.fromkeys(part.stops)
        return Carried(part.mask)

    def _rows(self, mask: Tensor | None, axes: Sequence[int]) -> Carried[_Masks] | Stopped:
        """A mask that is constant along ``axes``, in the shape of the output, whose sizes may differ there."""
        if mask is None:
            return Carried(None)
        row = row_mask(mask, axes)
        if row is None:
            return _MIXES
        if isinstance(self.made, list | tuple):
            masks: list[Tensor | None] = [fitted(row, part.shape) for part in cast(Sequence[Tensor], self.made)]
            return Carried(masks)
        return Carried(fitted(row, self.made.shape))

    def _ordered(self, mask: Tensor | None) -> Carried[_Masks]:
        if mask is None:
            return Carried(None)
        (axis,) = axes_of(self.op)
        indices = self.made[1] if isinstance(self.made, list | tuple) else self.made
        moved = mask.gather(axis, indices)
        if moved.shape != mask.shape and row_mask(mask, (axis,)) is None:
            self._stop("takes some tokens out of all")  # valid ones, which invalid ones may have kept out
        return Carried([moved, moved] if isinstance(self.made, list | tuple) else moved)

    def _normalized(self, what: Normalizes) -> Carried[_Masks] | Stopped:
        mask = self._mask(self.op.node.args[0])
        if mask is None or what.over == "nothing":
            return Carried([mask, None, None] if isinstance(self.made, list | tuple) else mask)
        match what.over:
            case "row":
                axes = range(-len(cast(Sequence[int], self.op.argument("normalized_shape"))), 0)
            case "positions":
                axes = range(1, mask.dim())
            case "batch":
                axes = [axis for axis in range(mask.dim()) if axis != what.axis]
        row = row_mask(mask, tuple(axes))
        if row is None:
            return _MIXES
        return Carried([mask, None, None] if isinstance(self.made, list | tuple) else mask)

    def _convolved(self, rank: int) -> Carried[_Masks] | Stopped:
        """A window of one place mixes channels alone."""
        mask = self._mask(self.op.node.args[0])
        x, w = self._value(self.op.node.args[0]), self._value(self.op.node.args[1])
        is_pointwise = w.shape[2:].numel() == 1 and x.shape[-rank:] == self.made.shape[-rank:]
        return self._rows(mask, (-1 - rank,) if is_pointwise else tuple(range(-1 - rank, 0)))

    def _projected(self) -> Carried[_Masks] | Stopped:
        target, args = self.op.node.target, self.op.node.args
        if target is not aten.addmm.default:
            return self._rows(self._mask(args[0]), (-1,))
        added = self._mask(args[0])
        product = self._rows(self._mask(args[1]), (-1,))
        self._settle(args[1])
        return self._added(product, added)

    def _added(self, product: Carried[_Masks] | Stopped, added: Tensor | None) -> Carried[_Masks] | Stopped:
        """The mask of a product, and that of what is added to it."""
        if isinstance(product, Stopped) or added is None:
            return product
        return Carried(added.expand(self.made.shape) if product.value is None else added & cast(Tensor, product.value))

    def _contracted(self, first: Any, second: Any, sums: bool = False) -> Carried[_Masks] | Stopped:
        """The rows of the first factor; where all of these count, the columns of the second.

        ``sums``: over the first axis, too.
        """
        a, b = self._mask(first), self._mask(second)
        ranks = [self._value(node).dim() for node in (first, second)]
        summed = (0,) if sums else ()
        if a is not None:
            row = row_mask(a, (*summed, -1))
            if row is None:
                return _MIXES
            self._settle(first)
            return Carried((row[..., 0] if ranks[1] == 1 else row[0] if sums else row).expand(self.made.shape))
        if b is None:
            return Carried(None)
        axis = -1 if ranks[1] == 1 else -2
        column = row_mask(b, (*summed, axis))
        if column is None:
            return _MIXES
        column = column.squeeze(axis) if 1 in ranks else column[0] if sums else column
        return Carried(column.expand(self.made.shape))

    def _joined(self, nodes: Sequence[fx.Node]) -> Tensor | None:
        """The masks of all parts. What is made of parameters alone, as attention's sinks are, is valid in those rows
        where something of the rest is.
        """
        if all(self._mask(node) is None for node in nodes):
            return None
        masks = [self._full(node) for node in nodes]
        joined = self._join(masks)
        are_data = [self._mask(node) is not None or reads_inputs(node) for node in nodes]
        if all(are_data):
            return joined
        is_data = self._join([torch.full_like(m, one) for m, one in zip(masks, are_data, strict=True)])
        if not is_data.any():
            return joined  # as empty caches are
        dim = int(self.op.argument("dim"))
        return joined & (is_data | (joined & is_data).any(dim, keepdim=True))

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        return cast(Callable[..., Tensor], self.op.node.target)(parts, *self.op.node.args[1:], **self.op.node.kwargs)

    def _gathered_slices(self) -> Tensor | None:
        """Where what is picked is valid, and so is the index that picks it."""
        x = self.op.node.args[0]
        mask, index = self._mask(x), self._index_mask()
        picked = None if mask is None else self._rerun(mask)
        if index is None or picked is None:
            return picked if index is None else index.expand(self.made.shape)
        return picked & index

    def _gathered_elements(self) -> Tensor | None:
        mask, index = self._mask(self.op.node.args[0]), self._mask(self.op.argument("index"))
        picked = None if mask is None else self._rerun(mask)
        return index if picked is None else picked if index is None else picked & index

    def _index_mask(self) -> Tensor | None:
        """The mask of an op's indices, as it broadcasts to the slices that they stand for."""
        rank = self._value(self.op.node.args[0]).dim()
        names = [argument.name for argument in cast(Any, self.op.node.target)._schema.arguments]
        if "indices" not in names:
            mask, dim = self._mask(self.op.argument("index")), int(self.op.argument("dim")) % rank
            return None if mask is None else mask.view([-1 if axis == dim else 1 for axis in range(rank)])
        indices = cast(Sequence[fx.Node | None], self.op.argument("indices"))
        places = [place for place, node in enumerate(indices) if node is not None]
        given = [cast(fx.Node, indices[place]) for place in places]
        if all(self._mask(node) is None for node in given):
            return None
        if any(self._value(node).dtype == torch.bool for node in given):
            return None  # it picks what is True, whatever the rest is
        whole = torch.stack(torch.broadcast_tensors(*map(self._full, given))).all(0)
        is_block = places == list(range(places[0], places[-1] + 1))
        behind = rank - len(places) - (places[0] if is_block else 0)
        return whole.view(*whole.shape, *[1] * behind)

    def _scattered(self, what: Scatters) -> Tensor:
        """What is written is valid where its source is, and its index; a sum where all its parts are.

        Where indices are valid by rows, an invalid row is invalid as a whole: where it was not written says something,
        too.
        """
        op, base = self.op, self._full(self.op.node.args[0])
        names = [argument.name for argument in cast(Any, op.node.target)._schema.arguments]
        source = op.argument(what.source) if what.source is not None else None
        if "indices" in names:
            indices = self._values(op.argument("indices"))
            written = self._written(source, self._index_mask(), base[tuple(_slices(indices))].shape)
            if not what.adds:
                return base.index_put(tuple(indices), written)
            return base & (base.int().zero_().index_put(tuple(indices), (~written).int(), True) == 0)
        index = op.argument("index") if "index" in names else None
        if not isinstance(index, fx.Node):  # a number, or a range
            return self._rerun(base, self._full(source))
        dim, places = int(op.argument("dim")), self._value(index)
        if what.what == "slices":
            written = self._written(source, self._index_mask(), self._value(source).shape)
            if not what.adds:
                return base.index_copy(dim, places, written)
            return base & (base.int().zero_().index_add(dim, places, (~written).int()) == 0)
        known = self._mask(index)
        written = self._written(source, known, places.shape)
        if what.adds:
            return base & (base.int().zero_().scatter_add(dim, places, (~written).int()) == 0)
        row = None if known is None else row_mask(known, (dim,))
        made = base.scatter(dim, places, written)
        return made if row is None or not fits(row, made) else made & row

    def _written(self, source: Any, index: Tensor | None, shape: torch.Size) -> Tensor:
        """The mask of what is written, of this shape."""
        mask = self._mask(source)
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=self.made.device)
        if mask.dim() == len(shape):
            mask = mask[tuple(slice(size) for size in shape)]  # a source may be larger than its index
        mask = mask.expand(shape)
        return mask if index is None else mask & index

    def _padded(self, what: Pads) -> Carried[_Masks] | Stopped:
        """New elements are valid, but for those of rows that are invalid as a whole."""
        mask = self._mask(self.op.node.args[0])
        if mask is None:
            return Carried(None)
        made = padded(mask, [int(self._value(n)) for n in self.op.argument("pad")], what.value is not None)
        return _MIXES if made is None else Carried(made)


def validity_of(node: Any, known: Mapping[fx.Node, Known]) -> Validity:
    """The validity of a node; of what is no node, or is several values, that all of it counts."""
    found = known.get(node, ALL) if isinstance(node, fx.Node) else ALL
    return found if isinstance(found, Validity) else ALL


def _slices(indices: Sequence[Tensor | None]) -> list[Any]:
    return [slice(None) if index is None else index for index in indices]


def place_of(node: fx.Node) -> str:
    """The module that a node belongs to."""
    stack = cast(dict[str, tuple[str, Any]], node.meta.get("nn_module_stack") or {})
    return next(reversed([path for path, _ in stack.values()]), "") or node.name
