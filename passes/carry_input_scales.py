"""Static scales of inputs that a quantized checkpoint holds, in the place of a calibration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from graphq.errors import GraphError
from graphq.ir.layers import sites
from graphq.ir.pipeline import Batches, Invariant, Pass
from graphq.ir.views import Op, Weighted
from graphq.numerics import Scales
from graphq.observers.known import KnownScales
from graphq.observers.observer import ObserverRequest
from graphq.passes.annotate import annotated
from graphq.passes.observe import add_observers, observer_on, to_quantize
from graphq.spec.quant import Quant


@final
@dataclass(frozen=True)
class CarryInputScales(Pass):
    """Every activation with a static scale has the one that ``scales`` has for the layers that read it.

    Layers that read one activation, and the experts of a stack, share a scale in a graph: ``GraphError`` names two of
    them whose scales are unlike, and a layer that ``scales`` has none for.
    """

    scales: Mapping[str, Scales] = field(default_factory=dict[str, Scales])
    name: ClassVar[str] = "carry-input-scales"
    requires: ClassVar[tuple[Invariant, ...]] = (annotated,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        fqns = {site.op: site.fqns for site in sites(gm)}
        readers: dict[tuple[Op, Quant], list[tuple[str, Weighted]]] = {}
        for op, quants in to_quantize(gm):
            for fqn, quant in zip(fqns[op], quants, strict=True):
                if quant is not None and not quant.dynamic and observer_on(gm, op.input_op, quant) is None:
                    readers.setdefault((op.input_op, quant), []).append((fqn, op))
        made: list[ObserverRequest] = []
        for (x, quant), layers in readers.items():
            for fqn, _ in layers:
                if fqn not in self.scales:
                    raise GraphError(f"{fqn}: input {quant}: there is no scale of it")
            first, op = layers[0]
            unlike = next((fqn for fqn, _ in layers if not same_scales(self.scales[fqn], self.scales[first])), None)
            if unlike is not None:
                raise GraphError(f"{first} and {unlike} read one activation, and have unlike scales of it")
            names = tuple(dict.fromkeys(fqn for fqn, _ in layers))
            made.append(ObserverRequest(x, KnownScales(quant, names, self.scales[first]), op))
        add_observers(gm, made, by=self.name)
        return len(made)


def same_scales(one: Scales, other: Scales) -> bool:
    """Whether two have the same numbers."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    return all(same(a, b) for a, b in zip(one, other, strict=True))
