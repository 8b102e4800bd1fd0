"""Rows of a graph's calibration batches, to be drawn at random: the sequences, images or samples that it is run on.

Batches that agree in all but their rows are one pool. Rows are what stands along the axes of the symbolic size that the
first axis of the outputs has; where it cannot be followed through the inputs, a whole batch is drawn as one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, fx

from graphq.capture.source import source_of
from graphq.data.masks import MaskedBatch, Validity, masked_batch

_MIXED: Final = -1


@final
@dataclass(frozen=True, eq=False)
class Pool:
    """``size`` rows. ``axes``: that of the rows, for each input; None for inputs that all rows share.

    ``counts``: numbers that depend on how many rows there are, by input; they are sums of products of sizes.
    """

    inputs: MaskedBatch
    axes: tuple[int | None, ...]
    counts: dict[int, Any]
    symbol: Any
    sizes: dict[Any, int]
    size: int

    @property
    def is_whole(self) -> bool:
        """Whether its one row is a batch that cannot be taken apart."""
        return self.symbol is None

    def pick(self, rows: Tensor) -> MaskedBatch:
        """The inputs of these rows, as tensors of their own."""
        if self.is_whole:
            return MaskedBatch((x.clone() if isinstance(x, Tensor) else x for x in self.inputs), self.inputs.validity)
        found = [
            x if axis is None else x.index_select(axis, rows) for x, axis in zip(self.inputs, self.axes, strict=True)
        ]
        for index, expression in self.counts.items():
            found[index] = int(expression.subs(self.sizes | {self.symbol: rows.numel()}))
        validity = [
            one if axis is None or one.mask is None else Validity(one.mask.index_select(axis, rows), one.stops)
            for one, axis in zip(self.inputs.validity, self.axes, strict=True)
        ]
        return MaskedBatch(found, validity)

    def of(self, output: Tensor, rows: Tensor) -> Tensor:
        """These rows of what the graph gave for all."""
        return output if self.is_whole else output.index_select(0, rows)


def draw(pools: Sequence[Pool], count: int, generator: torch.Generator) -> list[tuple[int, Tensor]]:
    """``count`` different rows at random (all where there are fewer), by their pools' indices; where batches are whole,
    one batch.
    """
    total = sum(pool.size for pool in pools)
    count = 1 if any(pool.is_whole for pool in pools) else count
    chosen = torch.randperm(total, generator=generator)[:count].sort().values
    found: list[tuple[int, Tensor]] = []
    first = 0
    for index, pool in enumerate(pools):
        rows = chosen[(chosen >= first) & (chosen < first + pool.size)] - first
        first += pool.size
        if rows.numel():
            found.append((index, rows))
    return found


def in_turn(pools: Sequence[Pool], count: int) -> Iterator[tuple[int, Tensor]]:
    """All rows of each pool, by the pool's index, in order and ``count`` at a time."""
    for index, pool in enumerate(pools):
        for rows in torch.arange(pool.size).split(count):
            yield index, rows


def pools_of(gm: fx.GraphModule, batches: Sequence[tuple[Any, ...]], outputs: Sequence[fx.Node]) -> list[Pool]:
    """The batches of ``gm`` as pools of rows, as ``outputs`` have them. Their tensors are copies."""
    with torch.inference_mode(False):
        given = [masked_batch(source_of(gm), batch) for batch in batches]
        vals = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        symbol = _symbol(outputs)
        axes = None if symbol is None else [_axis(val, symbol) for val in vals]
        if axes is None or _MIXED in axes or all(axis is None for axis in axes):
            return [_whole(batch) for batch in given]
        counts = {i: val.node.expr for i, val in enumerate(vals) if _depends(val, symbol)}
        groups: list[list[MaskedBatch]] = []
        for batch in given:
            group = next((g for g in groups if _agree(g[0], batch, axes, counts)), None)
            if group is None:
                groups.append([batch])
            else:
                group.append(batch)
        made = [_joined(group, vals, axes, counts, symbol) for group in groups]
        if all(set(pool.sizes) >= e.free_symbols - {symbol} for pool in made for e in counts.values()):
            return made
        return [_whole(batch) for batch in given]


def _whole(batch: MaskedBatch) -> Pool:
    validity = [one if one.mask is None else Validity(one.mask.clone(), one.stops) for one in batch.validity]
    return Pool(MaskedBatch(batch, validity), (None,) * len(batch), {}, None, {}, 1)


def _symbol(outputs: Sequence[fx.Node]) -> Any:
    """The size of the first axis of all of ``outputs``, and of no other; None where it is none, or no mere symbol."""
    shapes = [list(node.meta["val"].shape) for node in outputs]
    firsts = {_expression(shape[0]) if shape else None for shape in shapes}
    first = firsts.pop() if len(firsts) == 1 else None
    if first is None or not first.is_symbol or any(_depends(size, first) for shape in shapes for size in shape[1:]):
        return None
    return first


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _depends(size: Any, symbol: Any) -> bool:
    expression = _expression(size)
    return expression is not None and symbol in expression.free_symbols


def _axis(val: Any, symbol: Any) -> int | None:
    """The axis of the rows; None where there is none, ``_MIXED`` where rows cannot be picked."""
    if not isinstance(val, Tensor):
        return None
    found = [axis for axis, size in enumerate(val.shape) if _depends(size, symbol)]
    if not found:
        return None
    return found[0] if len(found) == 1 and _expression(val.shape[found[0]]) == symbol else _MIXED


def _agree(a: MaskedBatch, b: MaskedBatch, axes: Sequence[int | None], counts: dict[int, Any]) -> bool:
    """Whether two batches differ in their rows alone."""
    masks = ((x.mask, y.mask) for x, y, axis in zip(a.validity, b.validity, axes, strict=True) if axis is None)
    if any(x is not y and (x is None or y is None or not torch.equal(x, y)) for x, y in masks):
        return False
    for index, (x, y, axis) in enumerate(zip(a, b, axes, strict=True)):
        if not isinstance(x, Tensor):
            if index not in counts and x != y:
                return False
        elif axis is None:
            if x.shape != y.shape or not torch.equal(x, y):
                return False
        elif x.shape[:axis] + x.shape[axis + 1 :] != y.shape[:axis] + y.shape[axis + 1 :]:
            return False
    return True


def _joined(
    group: Sequence[MaskedBatch],
    vals: Sequence[Any],
    axes: Sequence[int | None],
    counts: dict[int, Any],
    symbol: Any,
) -> Pool:
    """One pool of the rows of batches that agree."""
    inputs: list[Any] = []
    sizes: dict[Any, int] = {}
    size = 0
    for index, (val, axis) in enumerate(zip(vals, axes, strict=True)):
        x = group[0][index]
        if axis is not None:
            x = torch.cat([batch[index] for batch in group], axis)
            size = x.shape[axis]
        elif isinstance(x, Tensor):
            x = x.clone()
        for wanted, actual in zip(val.shape, x.shape, strict=True) if isinstance(x, Tensor) else [(val, x)]:
            expression = _expression(wanted)
            if expression is not None and expression.is_symbol:
                sizes[expression] = int(actual)
        inputs.append(x)
    validity = [_joined_validity(group, index, axis) for index, axis in enumerate(axes)]
    return Pool(MaskedBatch(inputs, validity), tuple(axes), counts, symbol, sizes, size)


def _joined_validity(group: Sequence[MaskedBatch], index: int, axis: int | None) -> Validity:
    masks = [batch.validity[index].mask for batch in group]
    stops = tuple(dict.fromkeys(stop for batch in group for stop in batch.validity[index].stops))
    if axis is None:
        return Validity(None if masks[0] is None else masks[0].clone(), stops)
    if all(mask is None for mask in masks):
        return Validity(None, stops)
    return Validity(torch.cat([batch.validity[index].full(batch[index]) for batch in group], axis), stops)
