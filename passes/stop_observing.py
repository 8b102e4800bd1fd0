"""The end of observation: what was seen of activations does not hold once the layers before them are others."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from graphq.ir.pipeline import Batches, Invariant, Pass
from graphq.passes.observe import remove_observers
from graphq.passes.quantize_activations import no_observers


@final
@dataclass(frozen=True)
class StopObserving(Pass):
    """No observer is left, so that the next calibration begins anew."""

    name: ClassVar[str] = "stop-observing"
    ensures: ClassVar[tuple[Invariant, ...]] = (no_observers,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        return remove_observers(gm)
