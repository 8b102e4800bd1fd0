"""Activations through ``graphq::quantize`` and ``graphq::dequantize``, with scales from observers or from run time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor, fx

from graphq import numerics
from graphq.capture.source import source_of
from graphq.ir import edit
from graphq.ir.layers import LAYER, layer_path
from graphq.ir.mask_values import MaskValues
from graphq.ir.pipeline import Batches, Invariant, Pass
from graphq.ir.views import Op, Param, Weighted, view
from graphq.ir.weight_parts import QuantizedWeight
from graphq.numerics import Scales
from graphq.observers.grids import BELOW, GridObserver
from graphq.observers.ranges import RangeObserver
from graphq.passes.observe import observer_on, observers, remove_observers, to_quantize
from graphq.passes.quantize_weights import hold_codes
from graphq.runtime import ops
from graphq.spec.formats import has_global_scale, is_asymmetric
from graphq.spec.quant import Quant
from graphq.state import remove_tensor, tensor_of

aten = torch.ops.aten
PADDING: Final = "; where a batch with padding brings other numbers, calibrate with one"


def _uncalibrated(gm: fx.GraphModule) -> str | None:
    for op, quants in to_quantize(gm):
        for quant in quants:
            if quant is not None and not quant.dynamic:
                observer = observer_on(gm, op.input_op, quant)
                if observer is None or not observer.has_observed:
                    return f"no data was seen of the input of {op.node.meta[LAYER]}"
    return None


def _observed(gm: fx.GraphModule) -> str | None:
    left = observers(gm)
    return f"{left[0][1].layers[0]} is still observed" if left else None


calibrated = Invariant("data for every static scale", _uncalibrated)
no_observers = Invariant("no observers", _observed)


@final
@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Every layer with a planned input reads it quantized and dequantized; layers that agree share these ops.

    A stack whose experts differ reads, for each row, the input of the expert that gets it. ``note`` is told of each
    layer with a static scale of whose input calibration saw a single number, so that its range is unknown.
    """

    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "quantize-activations"
    requires: ClassVar[tuple[Invariant, ...]] = (calibrated,)
    ensures: ClassVar[tuple[Invariant, ...]] = (no_observers,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        made: dict[tuple[Op, Quant], Op] = {}
        changes = self._quantize_grids(gm)
        for op, quants in list(to_quantize(gm)):
            x = op.input_op
            distinct = list(dict.fromkeys(quants))
            for quant in distinct:
                if quant is not None and (x, quant) not in made:
                    made[x, quant] = self._quantize(gm, x, quant, op)
            candidates = [x if quant is None else made[x, quant] for quant in distinct]
            read = candidates[0]
            if len(candidates) > 1:
                choice = [distinct.index(quant) for quant in quants]
                offsets = view(op.argument("offsets"))
                read = edit.insert(gm, op, ops.select_rows, candidates, offsets, choice, by=self.name)
            edit.redirect(op, x, read, by=self.name)
            changes += 1
        left = remove_observers(gm)
        if changes or left:
            edit.drop_unused(gm)
        return changes or left

    def _quantize_grids(self, gm: fx.GraphModule) -> int:
        """What is read through the observer of a grid is read quantized and dequantized on it."""
        found = [(op, one) for op, one in observers(gm) if isinstance(one, GridObserver)]
        grids = scales_of_grids(gm)
        held: dict[int, tuple[Op | None, ...]] = {}
        for op, one in found:
            x, quant = view(op.node.all_input_nodes[0]), one.grid.quant
            scales = grids[one.grid.number].scales()
            if one.grid.number not in held and not isinstance(x, Param):
                is_mask = MaskValues(gm).is_of_masks(x)
                self._note_one_value(grids[one.grid.number], quant, PADDING if is_mask else "")
            block = numerics.activation_block(quant.granularity, x.val.dim())
            if isinstance(x, Param):
                made = self._hold_constant(gm, x, quant, scales, op)
            else:
                if one.grid.number not in held:
                    held[one.grid.number] = self._hold(gm, op, one.layers[0], one.role, scales, op)
                level = (*held[one.grid.number], str(quant.format), block)  # in graph order: read here, too
                codes = edit.insert(gm, op, ops.quantize, x, *level, by=self.name, like=op)
                made = edit.insert(gm, op, ops.dequantize, codes, *level, x.val.dtype, by=self.name, like=op)
            edit.bypass(gm, op, made)
        if found:
            edit.drop_unused(gm)
        return len(found)

    def _quantize(self, gm: fx.GraphModule, x: Op, quant: Quant, reader: Weighted) -> Op:
        """``x`` quantized and dequantized, right after ``x``, for ``reader`` and all that agree with it."""
        after = edit.following(x)
        block = numerics.activation_block(quant.granularity, x.val.dim())
        text = str(quant.format)
        scale: Op | None = None
        zero_point: Op | None = None
        global_scale: Op | None = None
        if not quant.dynamic:
            observer = observer_on(gm, x, quant)
            assert observer is not None, "calibrated"
            self._note_one_value(observer, quant)
            found = numerics.rounded_scales(observer.scales(), quant.format, source_of(gm).scales)
            if has_global_scale(quant.format):  # the only one that is fixed
                found = (None, None, found.scale)
            layer = str(reader.node.meta[LAYER])
            scale, zero_point, global_scale = self._hold(gm, after, layer, "input", found, reader)
        elif has_global_scale(quant.format):
            global_scale = edit.insert(gm, after, ops.choose_global_scale, x, by=self.name, like=reader)
        if scale is None:
            upper = () if global_scale is None else (global_scale,)
            chosen = edit.insert(gm, after, ops.choose_scale, x, text, block, *upper, by=self.name, like=reader)
            scale, zero = edit.items(gm, chosen, 2, by=self.name)
            zero_point = zero if is_asymmetric(quant.format) else None
        level = (scale, zero_point, global_scale, text, block)
        codes = edit.insert(gm, after, ops.quantize, x, *level, by=self.name, like=reader)
        return edit.insert(gm, after, ops.dequantize, codes, *level, x.val.dtype, by=self.name, like=reader)

    def _hold(
        self, gm: fx.GraphModule, before: Op, owner: str, role: str, scales: Iterable[Tensor | None], like: Op
    ) -> tuple[Op | None, Op | None, Op | None]:
        """Scale, zero point and global scale of an activation, those that there are, under the name of whose it is."""
        names = [f"{role}_{part}" for part in ("scale", "zero_point", "global_scale")]
        path = edit.free_path(gm, owner, names)
        scale, zero_point, global_scale = (
            None if part is None else edit.add_tensor(gm, before, f"{path}.{name}", part, by=self.name, like=like)
            for name, part in zip(names, scales, strict=True)
        )
        return scale, zero_point, global_scale

    def _hold_constant(self, gm: fx.GraphModule, x: Param, quant: Quant, scales: Scales, like: Op) -> Op:
        """A constant as codes, and the op that reads them."""
        w = tensor_of(gm, x.fqn).detach()
        block = numerics.activation_block(quant.granularity, w.dim())
        shape = numerics.scale_shape(w.shape, block)
        zero_point = None if scales.zero_point is None else scales.zero_point.view(shape)
        own = Scales(scales.scale.view(shape), zero_point)
        codes = QuantizedWeight(numerics.quantize(w, own, quant.format, block), own, block)
        path = layer_path(x.fqn)
        if len(gm.graph.find_nodes(op="get_attr", target=x.fqn)) > 1 or len(x.users) > 1:
            path = edit.free_path(gm, f"{path}_quantized", ("weight",))
        else:
            remove_tensor(gm, x.fqn)
        return hold_codes(gm, like, path, quant, codes, w.dtype, like, self.name)

    def _note_one_value(self, observer: RangeObserver | GridObserver, quant: Quant, hint: str = "") -> None:
        if self.note is not None:
            for line in one_value(observer, quant):
                self.note(f"{line}{hint}")


def one_value(observer: RangeObserver | GridObserver, quant: Quant) -> list[str]:
    """A line for each layer of whose tensor an observer saw a single number, from which no range follows."""
    only = observer.only
    if only is None:
        return []
    seen = "only zeros" if only == 0 else f"nothing but {only:g}"
    unknown = f"from which no range of {quant} follows"
    return [f"{layer}: calibration saw {seen} in its {observer.role}, {unknown}" for layer in observer.layers]


def scales_of_grids(gm: fx.GraphModule) -> dict[int, GridObserver]:
    """By the number of each grid, one of its observers, which has taken in what all of them saw."""
    found: dict[int, GridObserver] = {}
    watching = {op.node: one for op, one in observers(gm) if isinstance(one, GridObserver)}
    for one in watching.values():
        if (whole := found.setdefault(one.grid.number, one)) is not one:
            whole.merge(one)
    for node, one in watching.items():
        total = node.all_input_nodes[0]
        if total.target is aten.add.Tensor:
            for grid in _hiding(total.all_input_nodes, watching, found):
                grid.depth = max(grid.depth, BELOW + one.spread)
    return found


def _hiding(
    read: Iterable[fx.Node], watching: Mapping[fx.Node, GridObserver], grids: Mapping[int, GridObserver]
) -> Iterator[GridObserver]:
    """The grids of what hides scores among the operands of a sum, and of all that hides and these are made of."""
    pending = [node for node in read if node in watching]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node in watching:
            grid = grids[watching[node].grid.number]
            if not grid.hides:
                continue
            yield grid
        new = [one for one in node.all_input_nodes if one not in seen]
        seen.update(new)
        pending += new
