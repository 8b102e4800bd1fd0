"""The end of observation: what was seen of activations does not hold once the layers before them are others."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from graphq import edit
from graphq.passes.observe import observers
from graphq.passes.quantize_activations import no_observers
from graphq.pipeline import Batches, Invariant, Pass
from graphq.views import view


@final
@dataclass(frozen=True)
class StopObserving(Pass):
    """No observer is left, so that the next calibration begins anew."""

    name: ClassVar[str] = "stop-observing"
    ensures: ClassVar[tuple[Invariant, ...]] = (no_observers,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        watching = observers(gm)
        for op, _ in watching:
            edit.bypass(gm, op, view(op.node.all_input_nodes[0]))
        edit.drop_unused(gm)
        return len(watching)
