"""Observers on the activations whose scale is fixed before run time, and what they see."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast, final

import torch
from torch import Tensor, fx, nn

from graphq.errors import SpecError
from graphq.layers import LAYER, PLAN, sites
from graphq.pipeline import Batches, Pass
from graphq.spec import PerExpert, Plan, Quant
from graphq.views import Op, view


@final
class MinMaxObserver(nn.Module):
    """Hands its input on and keeps the smallest and the largest element seen, exactly, in float32.

    ``layers``: the layers that read this activation. An element that is NaN or infinite raises ``SpecError``.
    """

    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(self, quant: Quant, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.quant = quant
        self.layers = layers
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if x.numel():
            low, high = x.amin().float(), x.amax().float()
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise SpecError(f"calibration: batch {int(self.batches)}: the input of {self.layers[0]} holds NaN or Inf")
            self.low = torch.minimum(self.low, low)
            self.high = torch.maximum(self.high, high)
        self.batches += 1
        return x

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # A change of the model's dtype moves statistics between devices, but leaves their precision alone.
        for name, buffer in self._buffers.items():
            device = fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device if buffer is not None else None
            self._buffers[name] = buffer.to(device) if buffer is not None else None
        return self


def input_quants(decision: object) -> tuple[Quant | None, ...]:
    """The input format of a layer, or of each expert of a stack."""
    decisions = decision.decisions if isinstance(decision, PerExpert) else (decision,)
    return tuple(d.input if isinstance(d, Plan) else None for d in decisions)


@final
@dataclass(frozen=True)
class Observe(Pass):
    """Every activation with a static scale passes through one observer, which all layers that agree on it share.

    The experts of a stack that have the same format share a scale: they read rows of one tensor.
    """

    name: ClassVar[str] = "observe"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        made: dict[tuple[fx.Node, Quant], list[tuple[str, Op]]] = {}
        for site in sites(gm):
            for quant in dict.fromkeys(input_quants(site.op.node.meta.get(PLAN))):
                if quant is not None and not quant.dynamic and not is_observed(gm, site.op.input_op, quant):
                    made.setdefault((site.op.input_op.node, quant), []).append((site.path, site.op))
        for (node, quant), readers in made.items():
            first = readers[0][0]
            path = f"observers.{len(observers(gm))}"
            gm.add_submodule(path, MinMaxObserver(quant, tuple(name for name, _ in readers)))
            with gm.graph.inserting_after(node):
                observed = gm.graph.call_module(path, (node,))
            observed.meta = {"val": node.meta["val"], LAYER: first, "graphq.by": (self.name,)}
        return len(made)


def observer_of(gm: fx.GraphModule, op: Op) -> MinMaxObserver | None:
    """The observer that a node calls."""
    if op.node.op != "call_module":
        return None
    module = gm.get_submodule(str(op.node.target))
    return module if isinstance(module, MinMaxObserver) else None


def is_observed(gm: fx.GraphModule, x: Op, quant: Quant) -> bool:
    """Whether an observer for this format watches ``x``."""
    return any((seen := observer_of(gm, user)) is not None and seen.quant == quant for user in x.users)


def observers(gm: fx.GraphModule) -> list[tuple[Op, MinMaxObserver]]:
    """The nodes that call observers, and the observers."""
    found = ((view(cast(fx.Node, node)), observer_of(gm, view(node))) for node in gm.graph.nodes)
    return [(op, observer) for op, observer in found if observer is not None]
