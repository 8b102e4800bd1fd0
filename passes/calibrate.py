"""Calibration: the observers see the activations of the user's data."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import fx

from graphq.errors import SpecError
from graphq.passes.observe import observers
from graphq.pipeline import Batches, Pass


@final
@dataclass(frozen=True)
class Calibrate(Pass):
    """Every observer has seen every batch, as often as it looks. Without observers the batches are not run."""

    name: ClassVar[str] = "calibrate"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        watching = observers(gm)
        if not watching:
            return 0
        gm.recompile()
        count = 0
        looks = max(observer.looks for _, observer in watching)
        if looks > 1 and batches is not None:
            batches = list(batches)
        for look in range(looks):
            for _, observer in watching:
                observer.look = look
            with torch.inference_mode():
                for batch in batches or ():
                    gm(*batch)
                    count += 1
        if count == 0:
            raise SpecError("calibration: no batches; static scales need at least one")
        unseen = dict.fromkeys(layer for _, seen in watching if not seen.has_seen for layer in seen.layers)
        if unseen:
            problem = "calibration: no data reached {}; calibrate with data that uses it"
            raise SpecError([problem.format(layer) for layer in unseen])
        return len(watching)
