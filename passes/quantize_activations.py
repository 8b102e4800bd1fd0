"""Activations through ``graphq::quantize`` and ``graphq::dequantize``, with scales from observers or from run time."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import fx

from graphq import edit, numerics
from graphq.layers import LAYER, PLAN
from graphq.passes.observe import MinMaxObserver, input_quants, observer_of, observers
from graphq.pipeline import Batches, Invariant, Pass
from graphq.runtime import ops
from graphq.spec import Quant
from graphq.views import Op, Weighted, ops_of, view


def _observing(gm: fx.GraphModule) -> str | None:
    left = observers(gm)
    return f"{left[0][1].layers[0]} is still observed" if left else None


no_observers = Invariant("no observers", _observing)


@final
@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Every layer with a planned input reads it quantized and dequantized; layers that agree share these ops.

    A stack whose experts differ reads, for each row, the input of the expert that gets it.
    """

    name: ClassVar[str] = "quantize-activations"
    ensures: ClassVar[tuple[Invariant, ...]] = (no_observers,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        made: dict[tuple[fx.Node, Quant], Op] = {}
        count = 0
        for op in ops_of(gm):
            if not isinstance(op, Weighted) or PLAN not in op.node.meta:
                continue
            quants = input_quants(op.node.meta[PLAN])
            distinct = list(dict.fromkeys(quants))
            if distinct == [None]:
                continue
            x = op.input_op
            candidates = [x if quant is None else self._read(gm, x, quant, op, made) for quant in distinct]
            if len(candidates) > 1:
                choice = [distinct.index(quant) for quant in quants]
                read = edit.insert(gm, op, ops.select_rows, candidates, view(op.argument("offsets")), choice, by=self.name)
            else:
                read = candidates[0]
            edit.redirect(op, x, read, by=self.name)
            count += 1
        for op, _ in observers(gm):
            edit.bypass(gm, op, view(op.node.all_input_nodes[0]))
        edit.drop_unused(gm)
        return count

    def _read(self, gm: fx.GraphModule, x: Op, quant: Quant, reader: Op, made: dict[tuple[fx.Node, Quant], Op]) -> Op:
        """``x`` quantized and dequantized, right after ``x``."""
        found = made.get((x.node, quant))
        if found is not None:
            return found
        layer = str(reader.node.meta[LAYER])
        after = view(x.node.next)
        block = numerics.activation_block(quant.granularity, x.val.dim())
        text = str(quant.format)
        zero_point: Op | None
        if quant.dynamic:
            chosen = edit.insert(gm, after, ops.choose_scale, x, text, block, by=self.name, like=x)
            scale, zero_point = edit.items(gm, chosen, 2, by=self.name)
        else:
            observer = _observer(gm, x, quant)
            low_high = numerics.scale_from_extremes(observer.low, observer.high, quant.format)
            path = _free_path(gm, layer)
            scale = edit.add_tensor(gm, after, f"{path}.input_scale", low_high[0], by=self.name, like=reader)
            zero_point = None
            if low_high[1] is not None:
                zero_point = edit.add_tensor(gm, after, f"{path}.input_zero_point", low_high[1], by=self.name, like=reader)
        if quant.format.symmetric:
            zero_point = None
        codes = edit.insert(gm, after, ops.quantize, x, scale, zero_point, None, text, block, by=self.name, like=x)
        dtype: torch.dtype = x.val.dtype
        read = edit.insert(gm, after, ops.dequantize, codes, scale, zero_point, None, text, block, dtype, by=self.name, like=x)
        made[x.node, quant] = read
        return read


def _observer(gm: fx.GraphModule, x: Op, quant: Quant) -> MinMaxObserver:
    found = (observer_of(gm, user) for user in x.users)
    return next(observer for observer in found if observer is not None and observer.quant == quant)


def _free_path(gm: fx.GraphModule, layer: str) -> str:
    """``layer``, or a part of it where the experts of a stack have several static inputs."""
    path, number = layer, 0
    while any(name == f"{path}.input_scale" for name, _ in gm.named_buffers()):
        path, number = f"{layer}.input{number}", number + 1
    return path
