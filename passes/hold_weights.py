"""Float weights in the places where codes stand in the QDQ form, so that a target's form of them can be asked for."""

from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor, fx

from graphq import numerics
from graphq.ir import edit
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Weighted
from graphq.ir.weight_parts import QuantizedWeight
from graphq.passes.annotate import annotated
from graphq.passes.quantize_weights import PlannedWeight, planned_weights, replace_weight, with_weights
from graphq.state import defer, deferred_of


@final
@dataclass(frozen=True)
class HoldWeights(Pass):
    """Every planned weight is read through ``graphq::dequantize``, as if it were quantized, but what stands for its
    codes are its own numbers, and its scales are undefined: a graph to be looked at, not to be run.

    only: the weights of these layers. products: but for embeddings and the weights of states, which multiply no input.
    held: where the layers of each path that holds such a weight are written to, in the order of a stack.
    """

    held: dict[str, tuple[str, ...]] = field(compare=False)
    only: frozenset[str] | None = None
    products: bool = False
    name: ClassVar[str] = "hold-weights"
    requires: ClassVar = (annotated, with_weights)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for layer in planned_weights(gm, self.only, deferred=True, bare=True):
            if self.products and not _multiplies(layer):
                continue
            made: list[QuantizedWeight | None] = []
            for number, part in enumerate(layer.parts):
                if part.quant is None:
                    made.append(None)
                    continue
                sizes = (part.w.shape, part.block, part.quant.format, part.own_axes)
                made.append(QuantizedWeight(_as_codes(part.w), numerics.empty_scales(*sizes), part.block))
                path = layer.site.path if len(layer.parts) == 1 else f"{layer.site.path}.part{number}"
                self.held[path] = tuple(layer.site.fqns[member] for member in part.members)
            replace_weight(gm, layer, made, self.name)
            count += 1
        if count:
            edit.drop_unused(gm)
        return count


def _as_codes(w: Tensor) -> Tensor:
    """The weight as a buffer, which is still one with those that it is tied to."""
    deferred = deferred_of(w)
    return w.detach() if deferred is None else defer(w.detach(), deferred)


def _multiplies(layer: PlannedWeight) -> bool:
    ops = [user for read in layer.reads for user in read.users]
    return all(isinstance(op, Weighted) and op.is_product for op in ops)
