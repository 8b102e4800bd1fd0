"""Calibration: the observers see the activations of the user's data."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx

from graphq.errors import GraphqError, SpecError
from graphq.ir.pipeline import Batches, Pass
from graphq.passes.observe import observers


@final
@dataclass(frozen=True)
class Calibrate(Pass):
    """Every observer has seen every batch, in as many sweeps as it asks for. Without observers no batch is run."""

    name: ClassVar[str] = "calibrate"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        watching = observers(gm)
        if not watching:
            return 0
        gm.recompile()
        count = 0
        sweeps = max(observer.sweeps for _, observer in watching)
        if sweeps > 1 and batches is not None:
            batches = list(batches)
        for sweep in range(sweeps):
            for _, observer in watching:
                observer.sweep = sweep
            with torch.inference_mode():
                for number, batch in enumerate(batches or ()):
                    see_batch(gm, batch, number)
                    count += 1
        if count == 0:
            raise SpecError("calibration: no batches; static scales need at least one")
        unseen = dict.fromkeys(layer for _, seen in watching if not seen.has_observed for layer in seen.layers)
        if unseen:
            problem = "calibration: no data reached {}; calibrate with data that uses it"
            raise SpecError([problem.format(layer) for layer in unseen])
        return len(watching)


def see_batch(gm: fx.GraphModule, batch: tuple[Any, ...], number: int) -> tuple[Any, ...]:
    """What the graph gives for a batch.

    Raises ``SpecError`` for one on which the model fails, such as token ids beyond its vocabulary.
    """
    try:
        return gm.forward(*batch)  # a call would print where in the graph it failed
    except GraphqError:
        raise
    except Exception as error:  # whatever the ops say
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SpecError(f"calibration: batch {number}: the model fails on it: {first}") from error
